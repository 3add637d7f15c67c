"""Attention among the tokens of a frame, read from the packed projection."""

# Shapes: B batch, T frames, N tokens of a frame, H heads, Dh head size.

from einops import rearrange
from torch import Tensor

from gentron_kernels import attention as backends
from gentron_kernels import launch
from gentron_kernels.attention import attention
from gentron_kernels.temporal_attention import temporal_attention

# On the CPU the operator for few frames is faster than sdpa for few tokens, with its gradient
# too (bench_attention.py, test_few_tokens).
FEW = 32


def spatial_attention(qkv: Tensor) -> Tensor:
    """Attention along N for every (sample, frame).

    qkv (B, T, N, 3, H, Dh), the packed projection; returns (B, T, N, H · Dh).
    """
    launch.check_tensors(qkv=qkv)
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be (B, T, N, 3, H, Dh), got {tuple(qkv.shape)}")
    if _takes_frames_operator(qkv):
        # A frame is a clip of one token a frame: N frames long.
        return temporal_attention(qkv.flatten(0, 1).unsqueeze(2)).view(
            *qkv.shape[:3], qkv.shape[4] * qkv.shape[5]
        )
    return rearrange(attention(*_parts(qkv)), "(b t) n d -> b t n d", t=qkv.shape[1])


def chosen_backend(qkv: Tensor) -> str:
    """What `spatial_attention` takes for this input: "temporal", the operator for frames, of few
    tokens on the CPU unless GENTRON_ATTENTION forces another; else `attention`'s choice."""
    if _takes_frames_operator(qkv):
        return "temporal"
    return backends.chosen_backend(*_parts(qkv))


def _takes_frames_operator(qkv: Tensor) -> bool:
    return qkv.shape[2] <= FEW and launch.backend(qkv) == "cpu" and not backends.FORCED


def _parts(qkv: Tensor) -> Tensor:
    return rearrange(qkv, "b t n three h d -> three (b t) n h d")
