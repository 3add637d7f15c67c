"""spatial_attention against its equations in fp64, on either side of the few tokens."""

import pytest
import torch
from einops import rearrange

from gentron_kernels import attention as backends
from gentron_kernels import launch
from gentron_kernels.spatial_attention import FEW, chosen_backend, spatial_attention

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16


def packed(batch, frames, tokens, heads, size, dtype=FP64):
    generator = torch.Generator().manual_seed(tokens)
    shape = batch, frames, tokens, 3, heads, size
    return torch.randn(shape, generator=generator, dtype=FP64).to(dtype)


def expected(qkv):
    q, k, v = rearrange(qkv.double(), "b t n three h d -> three b t h n d")
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return rearrange(weights @ v, "b t h n d -> b t n (h d)")


@pytest.mark.parametrize("tokens", [1, 3, 16, FEW, FEW + 1, 63])
@pytest.mark.parametrize("frames, heads, size", [(1, 4, 48), (8, 2, 72)])
@pytest.mark.parametrize("dtype, tolerance", [(FP64, 1e-12), (FP32, 1e-5), (BF16, 2e-2)])
def test_values_and_gradient(tokens, frames, heads, size, dtype, tolerance):
    qkv = packed(2, frames, tokens, heads, size, dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    weights = torch.linspace(-1, 1, heads * size, dtype=FP64)
    out, wanted = spatial_attention(qkv), expected(exact)
    assert out.dtype == dtype and out.shape == wanted.shape
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    (out * weights.to(dtype)).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(qkv.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_an_empty_batch():
    assert spatial_attention(packed(0, 3, 16, 2, 8, FP32)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("tokens, forced", [(FEW, None), (FEW + 1, None), (FEW, "sdpa")])
def test_few_tokens_take_our_operator_unless_one_is_forced(monkeypatch, tokens, forced):
    if not launch.cpu_library():
        pytest.skip("the C++ operators are not built")
    monkeypatch.setattr(backends, "FORCED", forced)
    called = []
    monkeypatch.setattr(
        "gentron_kernels.spatial_attention.temporal_attention",
        lambda qkv: called.append(qkv.shape) or qkv[:, :, :, 2].flatten(3),
    )
    qkv = packed(2, 3, tokens, 2, 8)
    ours = tokens <= FEW and forced is None
    assert chosen_backend(qkv) == ("temporal" if ours else "sdpa")
    spatial_attention(qkv)
    assert called == ([(6, tokens, 1, 3, 2, 8)] if ours else [])


def test_it_compiles_whole():
    qkv = packed(2, 3, 16, 2, 8, FP32)
    compiled = torch.compile(spatial_attention, fullgraph=True)
    torch.testing.assert_close(compiled(qkv), spatial_attention(qkv))
