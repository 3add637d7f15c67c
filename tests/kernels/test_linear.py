"""Linear layers and their GELU: the same function whoever computes it."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from gentron_kernels.linear import linear

ONEDNN_CALLS = 2 if torch.backends.mkldnn.is_available() else 0  # of a layer and its gradient


def inputs(*leading, channels=(72, 40), dtype=torch.float64, transposed=False, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    width_in, width_out = channels
    weight = torch.randn(width_out, width_in, generator=generator, dtype=torch.float64)
    if transposed:
        weight = weight.T.contiguous().T
    x = torch.randn(*leading, width_in, generator=generator, dtype=torch.float64)
    bias = torch.randn(width_out, generator=generator, dtype=torch.float64)
    return [t.to(device, dtype) for t in (x, weight / width_in**0.5, bias)]


def definition(x, weight, bias, gelu):
    out = x @ weight.T + bias
    cubic = 0.044715 * out**3
    return 0.5 * out * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (out + cubic))) if gelu else out


def error(value, exact):
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_values(backend, device, leading, dtype, gelu, transposed):
    tensors = inputs(*leading, dtype=dtype, transposed=transposed, device=device)
    exact = definition(*(t.double() for t in tensors), gelu)
    plain = F.linear(*tensors)
    plain = F.gelu(plain, approximate="tanh") if gelu else plain
    limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1.1 * error(plain, exact))
    out = linear(*tensors, gelu)
    assert out.shape == plain.shape and out.dtype == dtype
    assert error(out, exact) <= limit


@pytest.fixture
def one_thread():
    """The loop over tiles is for as many rows as there are threads to share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    "channels", [(192, 576), (768, 192), (32, 17), (64, 40), (40, 64)], ids=str
)
@pytest.mark.parametrize("rows", [64, 97, 200])
@torch.no_grad()
def test_small_weights_in_bfloat16(backend, device, rows, channels, gelu, one_thread):
    """Rows and outputs that do not fill whole tiles, of a CPU that has tiles too."""
    tensors = inputs(rows, channels=channels, dtype=torch.bfloat16, device=device)
    exact = definition(*(t.double() for t in tensors), gelu)
    assert error(linear(*tensors, gelu), exact) < 3e-3
    apart = torch.full((2 * channels[1], channels[0] + 3), torch.nan).to(tensors[1])
    apart = apart[::2, : channels[0]].copy_(tensors[1])
    assert error(linear(tensors[0], apart, tensors[2], gelu), exact) < 3e-3


@pytest.mark.parametrize("outputs", [32, 40])
@torch.no_grad()
def test_gelu_far_out(outputs, one_thread):
    """Where the tanh is 1 to the last bit, and of what is not finite."""
    x = torch.zeros(64, 32, dtype=torch.bfloat16)
    weight = torch.zeros(outputs, 32, dtype=torch.bfloat16)
    weight[:, 0] = 1
    x[:4, 0] = torch.tensor([torch.nan, torch.inf, 1e30, -1e30])
    bias = torch.zeros(outputs, dtype=torch.bfloat16)
    out = linear(x, weight, bias, True)[:4]
    assert out[0].isnan().all() and (out[1] == torch.inf).all()
    assert (out[2] == x[2, 0]).all() and not out[3].any()
    assert not linear(x, weight, bias, True)[4:].any()


@torch.no_grad()
def test_no_rows():
    assert linear(*inputs(0, dtype=torch.bfloat16), True).shape == (0, 40)


@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_are_those_of_torch(gelu):
    tensors = [t.requires_grad_() for t in inputs(4)]
    assert torch.autograd.gradcheck(lambda *t: linear(*t, gelu), tensors)


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1, 2), (2,)], ids=str)
@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_in_fp32(backend, device, leading, gelu, transposed, wanted):
    tensors = inputs(*leading, dtype=torch.float32, transposed=transposed, device=device)
    exact = [t.double() for t in tensors]
    gradients = []
    for group in tensors, exact:
        operands = [group[i].requires_grad_() for i in wanted]
        out = linear(*group, gelu)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)
        gradients.append(torch.autograd.grad((out.sin() * weights).sum(), operands))
    for found, reference, i in zip(*gradients, wanted, strict=True):
        assert found.shape == tensors[i].shape and found.dtype == torch.float32
        if any(leading) or not leading:
            assert error(found, reference) < 1e-5
        else:
            assert not found.any()


def test_gradients_of_gradients_in_fp32():
    second = []
    for dtype in torch.float32, torch.float64:
        x, weight, bias = (t.requires_grad_() for t in inputs(4, dtype=dtype))
        (first,) = torch.autograd.grad(linear(x, weight, bias).sin().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), (x, weight)))
    for found, reference in zip(*second, strict=True):
        assert error(found, reference) < 1e-5


def onednn_calls(function, *arguments) -> int:
    with torch.profiler.profile() as profile:
        function(*arguments)
    return sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_call_of_onednn(dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 on this CPU")
    x, weight, bias = inputs(3, dtype=dtype)
    with torch.no_grad():
        assert onednn_calls(linear, x, weight, bias, True) == 1
        compiled = torch.compile(linear, fullgraph=True)
        torch.testing.assert_close(compiled(x, weight, bias, True), linear(x, weight, bias, True))
        assert onednn_calls(compiled, x, weight, bias, True) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x.float(), weight.float(), bias.float(), True).dtype == torch.bfloat16

    def trained():
        operands = x.requires_grad_(), weight.requires_grad_()
        return torch.autograd.grad(linear(*operands, bias).sum(), operands)

    assert onednn_calls(trained) == (2 if dtype == torch.float32 else 0)


def test_trained_under_a_compiler():
    tensors = [t.requires_grad_() for t in inputs(4, dtype=torch.float32)]
    compiled = torch.compile(linear, fullgraph=True)
    gradients = [
        torch.autograd.grad(function(*tensors, True).sum(), tensors)
        for function in (linear, compiled)
    ]
    for found, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(found, reference)
    assert onednn_calls(lambda: compiled(*tensors).sum().backward()) == ONEDNN_CALLS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("wanted", [(), (0, 1, 2), (1,)], ids=str)
def test_opcheck(dtype, gelu, wanted):
    x, weight, bias = (
        t.requires_grad_(i in wanted) for i, t in enumerate(inputs(2, 3, dtype=dtype))
    )
    for arguments in (x, weight, bias, gelu), (x, weight, None, gelu):
        torch.library.opcheck(torch.ops.gentron.linear_cpu, arguments)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_gradient_of_the_operator(gelu, biased):
    *tensors, bias = (t.requires_grad_() for t in inputs(2, 3, channels=(7, 5)))
    tensors += [bias] if biased else []

    def layer(x, weight, bias=None):
        return torch.ops.gentron.linear_cpu(x, weight, bias, gelu)

    assert torch.autograd.gradcheck(layer, tensors)
    assert torch.autograd.gradgradcheck(layer, tensors)


def test_forward_mode_is_refused():
    x, weight, bias = inputs(3)
    with pytest.raises(RuntimeError, match="jvp"), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        torch.ops.gentron.linear_cpu(dual, weight, bias, False)


def test_a_cpu_on_which_onednn_has_no_bfloat16():
    script = """
import torch
from gentron_kernels.linear import linear
torch.set_grad_enabled(False)
for dtype in torch.float32, torch.bfloat16:
    x, weight, bias = (torch.ones(*shape, dtype=dtype) for shape in ((3, 8), (5, 8), (5,)))
    assert linear(x, weight, bias).eq(9).all() and linear(x, weight, bias, True).eq(9).all()
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_the_operator_refuses_what_does_not_fit():
    x, weight, bias = inputs(3)
    with pytest.raises(ValueError, match=r"weight \(M, K\), got \[3, 72\] and \[40, 71\]"):
        torch.ops.gentron.linear_cpu(x, weight[:, 1:], bias, False)
    with pytest.raises(TypeError, match="weight must have x's dtype Double, got Float"):
        torch.ops.gentron.linear_cpu(x, weight.float(), bias, False)
    with pytest.raises(ValueError, match=r"bias must be \(40,\), got \[39\]"):
        torch.ops.gentron.linear_cpu(x, weight, bias[1:], False)
    with pytest.raises(TypeError, match="bias must have x's dtype Double, got Float"):
        torch.ops.gentron.linear_cpu(x, weight, bias.float(), False)
