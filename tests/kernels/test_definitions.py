"""The operators' definitions against their equations, in fp64."""

import pytest
import torch

from gentron_kernels.attention import attention
from gentron_kernels.layernorm_modulate import layernorm_modulate, residual_layernorm_modulate


def rand(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 63, 72), (3, 2, 5, 24)], ids=str)
def test_layernorm_modulate(shape):
    x = rand(*shape).requires_grad_()
    shift, scale = (rand(shape[0], shape[-1], seed=s).requires_grad_() for s in (1, 2))
    rows = [row.detach().reshape(shape[0], *(1,) * (len(shape) - 2), -1) for row in (shift, scale)]
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(
        layernorm_modulate(x, shift, scale), normed * (1 + rows[1]) + rows[0]
    )
    torch.testing.assert_close(layernorm_modulate(x), normed)
    assert torch.autograd.gradcheck(layernorm_modulate, (x, shift, scale))


def test_the_chain_joins_two_sublayers():
    x, y = rand(2, 5, 24), rand(2, 5, 24, seed=1)
    gate, shift, scale = (rand(2, 24, seed=s) for s in (2, 3, 4))
    stream, h = residual_layernorm_modulate(x, y, gate, shift, scale)
    torch.testing.assert_close(stream, x + gate[:, None] * y)
    torch.testing.assert_close(h, layernorm_modulate(stream, shift, scale))
    stream, h = residual_layernorm_modulate(x, y)
    torch.testing.assert_close(stream, x + y)
    assert residual_layernorm_modulate(x)[0] is x


def test_low_precision_is_computed_in_fp32():
    x = rand(2, 64, 1664) * 3 + 50  # a mean far from 0 cancels in 16 bits
    low = x.bfloat16()
    exact = layernorm_modulate(low.double())
    error = (layernorm_modulate(low).double() - exact).norm() / exact.norm()
    assert layernorm_modulate(low).dtype == torch.bfloat16 and error < 3e-3


def test_rows_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"modulation rows must be \(2, 24\)"):
        layernorm_modulate(rand(2, 5, 24), rand(3, 24))


def test_bf16_gradient_is_as_exact_as_fp32_attention_allows():
    inputs = [rand(2, 5, 3, 8, seed=s, dtype=torch.bfloat16).requires_grad_() for s in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = attention(*inputs)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    attention(*exact).square().sum().backward()
    for tensor, reference in zip(inputs, exact, strict=True):
        error = (tensor.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert tensor.grad.dtype == torch.bfloat16 and error < 1e-2


def test_attention_sees_only_what_the_mask_keeps():
    q, k, v = rand(2, 5, 3, 8), rand(2, 7, 3, 8, seed=1), rand(2, 7, 3, 8, seed=2)
    mask = torch.arange(7) < torch.tensor([[7], [2]])
    out = attention(q, k, v, mask)
    torch.testing.assert_close(out[:1], attention(q[:1], k[:1], v[:1]))
    torch.testing.assert_close(out[1:], attention(q[1:], k[1:, :2], v[1:, :2]))
