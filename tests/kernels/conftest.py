"""Which implementations an operator's tests run on.

A test that takes the fixture `backend` runs once for each: the definition, the C++ operator, and
the Triton kernels where there is a CUDA device. Without one, `run_interpreted(__file__)` runs the
same tests on the Triton kernels under their interpreter, in a process of its own: a kernel is
bound to the interpreter when it is defined.
"""

import os
import subprocess
import sys

import pytest
import torch

from gentron_kernels import launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["cuda"] if INTERPRETED else ["ref", "cpu"]
if torch.cuda.is_available() and not INTERPRETED:
    BACKENDS.append(pytest.param("cuda", marks=pytest.mark.gpu))


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True)


def pytest_collection_modifyitems(config, items):
    if INTERPRETED:  # the other tests ran in the process that asked for this one
        kept = [item for item in items if "backend" in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture
def backend(request, monkeypatch) -> str:
    """The implementation that tensors on `device` get: "ref", "cpu" or "cuda"."""
    if request.param == "cpu":
        assert launch.cpu_library(), "kernels/libgentron.so is not built: make .venv/dev"
    if request.param == "ref" or INTERPRETED:
        monkeypatch.setattr(launch, "backend", lambda *tensors: request.param)
    if INTERPRETED:  # few programs, each with a loop to run: one costs milliseconds
        monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    return request.param


@pytest.fixture
def device(backend) -> str:
    return "cuda" if backend == "cuda" and not INTERPRETED else "cpu"


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory holds NaN, so that what an operator does not write is seen."""
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    settings.fill_uninitialized_memory = before[1]


@pytest.fixture
def run_interpreted():
    """(file) → its tests pass on the Triton kernels, run by the interpreter."""

    pytest.importorskip("triton")

    def run(file: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    return run


@pytest.fixture(autouse=True)
def interpreted_bf16(monkeypatch):
    """Triton 3.7's interpreter truncates to bf16, and multiplies matrices of its bits as integers;
    a GPU rounds to nearest and multiplies the numbers."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x):
        bits = x.data.astype("uint32") << 16
        return TensorHandle(bits.view("float32"), tl.float32) if x.dtype == tl.bfloat16 else x

    def rounded(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        bits = torch.tensor(x.data).bfloat16().view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest),
    )
