"""Which implementation tensors get, and what is left where the C++ library or Triton is missing."""

import ast
import builtins
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from gentron_kernels import launch
from gentron_kernels.attention import attention
from gentron_kernels.guided_step import guided_step, guided_step_ref
from gentron_kernels.layernorm_modulate import layernorm_modulate, residual_layernorm_modulate
from gentron_kernels.linear import linear
from gentron_kernels.spatial_attention import spatial_attention
from gentron_kernels.temporal_attention import temporal_attention


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
from gentron_kernels.attention import attention
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


def kernels() -> dict:
    """Every Triton function of the folder by its name."""
    from triton import JITFunction

    files = sorted(Path(launch.__file__).parent.glob("*.py"))
    modules = [importlib.import_module(f"gentron_kernels.{file.stem}") for file in files]
    named = [item for module in modules for item in vars(module).items()]
    return {name: value for name, value in named if isinstance(value, JITFunction)}


def unknown_names(source: str) -> set[str]:
    """The names that a module which holds triton, tl and this source reads without having them."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return {node.id for node in names} - bound - {"tl", "triton"} - set(dir(builtins))


def test_a_kernel_names_nothing_that_inductor_does_not_copy():
    """Inductor writes a kernel, and what it calls, into a module that imports triton and tl."""
    pytest.importorskip("triton")
    from torch._inductor.codegen.wrapper import (
        user_defined_triton_kernel_transitive_closure_source_code as copied,
    )

    assert unknown_names("def f(x, W: constexpr):\n    N: other = x") == {"constexpr", "other"}
    found = {name: unknown_names(copied(kernel)) for name, kernel in kernels().items()}
    assert len(found) >= 12 and not any(found.values()), found


def test_without_triton_nothing_is_said():
    """torch warns, on standard error, of each operator that it looks for Triton kernels in."""
    code = """
import sys
sys.modules["triton"] = None
from gentron_kernels import launch
from gentron_kernels.attention import attention
import gentron_kernels.guided_step
import gentron_kernels.layernorm_modulate
import gentron_kernels.temporal_attention
assert not launch.has_triton()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout + result.stderr == ""


def test_what_is_no_tensor_is_refused_by_name():
    x, qkv, latents = torch.rand(2, 3, 8), torch.rand(1, 2, 3, 3, 2, 4), torch.rand(2, 4, 1, 4, 4)
    weights, row, text = torch.tensor([0.0, 0, 1]), torch.rand(6) + 0.1, (None, None, latents)
    q = torch.rand(1, 4, 2, 8)
    for call, name in (
        (lambda: layernorm_modulate(x.tolist()), "x"),
        (lambda: layernorm_modulate(x.numpy()), "x"),
        (lambda: layernorm_modulate(x, x[:, 0].numpy(), x[:, 0]), "shift"),
        (lambda: residual_layernorm_modulate(x, x.tolist()), "y"),
        (lambda: temporal_attention(qkv.numpy()), "qkv"),
        (lambda: spatial_attention(None), "qkv"),
        (lambda: attention(q, q.numpy(), q), "k"),
        (lambda: attention(q, q, q, [True] * 4), "mask"),
        (lambda: linear(x.numpy(), torch.rand(4, 8), torch.rand(4)), "x"),
        (lambda: guided_step(latents.numpy(), text, weights, row), "latents"),
        (lambda: guided_step(latents, text, weights.tolist(), row), "weights"),
        (lambda: guided_step(latents, text, weights, row, noise=0), "noise"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be a tensor, got a"):
            call()
    with pytest.raises(ValueError, match="branches must be three predictions"):
        guided_step(latents, None, weights, row)
    from_generator = guided_step(latents, (branch for branch in text), weights, row)
    for ours, wanted in zip(from_generator, guided_step(latents, text, weights, row), strict=True):
        assert torch.equal(ours, wanted)
