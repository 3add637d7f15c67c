"""Which implementation tensors get, and what is left where the C++ library or Triton is missing."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from gentron_kernels import launch
from gentron_kernels.guided_step import guided_step, guided_step_ref


@pytest.mark.parametrize(
    "dtypes, chosen",
    [
        ([torch.float32], "cpu"),
        ([torch.float64], "cpu"),
        ([torch.bfloat16], "cpu"),
        ([torch.float16], "ref"),
        ([torch.float32, torch.bfloat16], "cpu"),
        ([torch.float32, torch.float16], "ref"),
    ],
    ids=str,
)
def test_the_cpu_takes_its_own_dtypes(dtypes, chosen):
    assert launch.backend(*(torch.empty(1, dtype=dtype) for dtype in dtypes)) == chosen


def test_the_device_decides(monkeypatch):
    pytest.importorskip("triton")
    with FakeTensorMode():
        x = torch.empty(1, device="cuda", dtype=torch.float16)
        assert launch.backend(x) == "cuda"
        assert launch.backend(torch.empty(1, device="meta")) == "ref"
        monkeypatch.setattr(launch, "triton", None)
        assert launch.backend(x) == "ref"


def step_inputs(device="cpu", branch_dtype=torch.float32):
    x = torch.linspace(-1, 1, 48, device=device).reshape(1, 2, 2, 3, 4)
    row = torch.tensor([0.5, 0.8, 0.7, 0.4, 0.0, 0.0], device=device)
    weights = torch.tensor([-0.2, -6.3, 7.5], device=device)
    return x, [x.to(branch_dtype).cos(), None, x.to(branch_dtype).sin()], weights, row


def test_fp16_on_the_cpu_goes_to_the_definition():
    arguments = step_inputs(branch_dtype=torch.float16)
    for out, reference in zip(guided_step(*arguments), guided_step_ref(*arguments), strict=True):
        assert torch.equal(out, reference)


def test_meta_goes_to_the_definition():
    x_next, x0 = guided_step(*step_inputs("meta"))
    assert x_next.shape == x0.shape == (1, 2, 2, 3, 4) and x_next.is_meta


def test_without_the_library_the_definition_answers():
    code = """
import torch
from gentron_kernels import launch
from gentron_kernels.guided_step import guided_step
assert not launch.cpu_library() and launch.backend(torch.ones(1)) == "ref"
x = torch.ones(1, 2, 2, 3, 4)
row = torch.tensor([0.5, 0.8, 0.7, 0.4, 0.0, 0.0])
x_next, x0 = guided_step(x, [x, None, None], torch.ones(3), row)
assert torch.allclose(x0, 0.4 * x) and torch.allclose(x_next, 0.86 * x)
"""
    environment = os.environ | {"GENTRON_LIBRARY": "nonexistent"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_jit_without_triton_leaves_the_function(monkeypatch):
    def kernel():
        pass

    monkeypatch.setattr(launch, "triton", None)
    assert launch.jit(kernel) is kernel and launch.jit(do_not_specialize=["x"])(kernel) is kernel


def test_without_triton_nothing_is_said():
    """torch warns, on standard error, of each operator that it looks for Triton kernels in."""
    code = """
import sys
sys.modules["triton"] = None
from gentron_kernels import launch
import gentron_kernels.guided_step
import gentron_kernels.layernorm_modulate
import gentron_kernels.temporal_attention
assert not launch.has_triton()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout + result.stderr == ""
