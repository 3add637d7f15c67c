"""Attention over the frames of a clip, read from the (b t) n layout, and its identity path.

pytest bench/bench_temporal_attention.py --benchmark-only
"""

import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from contest import DTYPES, OURS, PRESET_NAMES, Contender, absent
from einops import rearrange
from peers import flash_attention, sdpa_backends

from gentron_fast import PRESETS
from gentron_kernels.temporal_attention import temporal_attention, temporal_attention_ref


def transposed(attend, qkv):
    """Attention of the field: every (sample, token) a sequence of its own, copied into place."""
    q, k, v = rearrange(qkv, "b t n three h d -> three (b n) h t d")
    return rearrange(attend(q, k, v), "(b n) h t d -> b t n (h d)", b=qkv.shape[0])


def in_fp32(q, k, v):
    """The CPU's bf16 gradient of scaled_dot_product_attention is slower than fp32's."""
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def products(q, k, v):
    """Attention as sums of products, which a compiler can fuse into one kernel."""
    scores = (q.float()[..., :, None, :] * k.float()[..., None, :, :]).sum(-1)
    weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
    return (weights[..., None] * v.float()[..., None, :, :]).sum(-2).to(q.dtype)


def sdpa(device: str, dtype: torch.dtype) -> list[Contender]:
    contenders = [
        Contender("SDPA", partial(transposed, attend), note)
        for note, attend in sdpa_backends(device).items()
    ]
    if device == "cpu" and dtype == torch.bfloat16:
        contenders.append(Contender("SDPA", partial(transposed, in_fp32), "in fp32"))
    return contenders


def flash() -> Contender:
    found = flash_attention()
    if isinstance(found, str):
        return absent("flash-attn", found)
    attend, note = found

    def run(qkv):
        q, k, v = rearrange(qkv, "b t n three h d -> three (b n) t h d")
        return rearrange(attend(q, k, v), "(b n) t h d -> b t n (h d)", b=qkv.shape[0])

    return Contender("flash-attn", run, note)


def flex(contest, shape) -> Contender:
    """All sequences of a sample end to end, with a block-diagonal mask."""
    if contest.device != "cuda" or contest.smoke:
        return absent("FlexAttention", "compiled for CUDA only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, frames, tokens = shape[:3]
    attend = torch.compile(flex_attention, dynamic=False)

    @cache
    def mask():
        def same_sequence(b, h, query, key):
            return query // frames == key // frames

        length = frames * tokens
        # Compiled: the mask function only would be evaluated on length² pairs in memory.
        return create_block_mask(same_sequence, None, None, length, length, _compile=True)

    def run(qkv):
        q, k, v = rearrange(qkv, "b t n three h d -> three b h (n t) d")
        out = attend(q, k, v, block_mask=mask())
        return rearrange(out, "b h (n t) d -> b t n (h d)", t=frames)

    return Contender("FlexAttention", run)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "frames", [8, *(pytest.param(t, marks=pytest.mark.full) for t in (16, 32))]
)
def test_temporal_attention(measure, contest, clip, preset, dtype, frames, backward):
    config = PRESETS[preset]
    shape = clip.batch, frames, clip.tokens, 3, config.heads, config.head_size
    contenders = [
        Contender(OURS, temporal_attention),
        *sdpa(contest.device, dtype),
        *contest.compiled(partial(transposed, F.scaled_dot_product_attention)),
        flash(),
    ]
    if frames == 8 and not backward and not contest.brief:
        fused = contest.compiled(partial(transposed, products), "compiled products", ["default"])
        contenders += [*fused, flex(contest, shape)]
    # I/O: forward read q, k, v + write out; backward read q, k, v, dout + write dq, dk, dv.
    tensors = 7 if backward else 4
    # Two products of T × T × Dh a head; five in the gradient, one of them the scores again.
    products_of_sequences = 5 if backward else 2
    measure(
        "temporal_attention",
        shape,
        dtype,
        make=lambda randn: (randn(*shape),),
        definition=temporal_attention_ref,
        contenders=contenders,
        nbytes=tensors * math.prod(shape) // 3 * dtype.itemsize,
        flops=products_of_sequences * 2 * frames * math.prod(shape) // 3,
        backward=backward,
        preset=preset,
    )


def values(qkv):
    """Copied, as an operator's output may not share memory with its input."""
    return qkv[:, :, :, 2].flatten(3).contiguous()


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_motion_free(measure, contest, clip, preset, dtype):
    """Every sample takes the identity mask: the values are copied out."""
    config = PRESETS[preset]
    shape = *clip, 3, config.heads, config.head_size
    flags = torch.ones(clip.batch, dtype=torch.bool, device=contest.device)

    measure(
        "temporal_attention motion-free",
        shape,
        dtype,
        make=lambda randn: (randn(*shape),),
        definition=values,
        contenders=[
            Contender(OURS, partial(temporal_attention, motion_free=flags)),
            Contender("eager", values),
            *contest.compiled(values),
        ],
        # I/O: read v + write out; q and k are not read.
        nbytes=2 * math.prod(shape) // 3 * dtype.itemsize,
        preset=preset,
    )


@pytest.mark.full
@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guided_batch(measure, contest, clip, preset, dtype):
    """The three branches of guidance: one sample is motion-free, two are not."""
    config = PRESETS[preset]
    shape = *clip, 3, config.heads, config.head_size
    flags = torch.arange(clip.batch, device=contest.device) == 0

    def selected(qkv):
        out = transposed(F.scaled_dot_product_attention, qkv)
        return torch.where(flags[:, None, None, None], qkv[:, :, :, 2].flatten(3), out)

    sample = math.prod(shape[1:]) // 3
    measure(
        "temporal_attention guided batch",
        shape,
        dtype,
        make=lambda randn: (randn(*shape),),
        definition=partial(temporal_attention_ref, motion_free=flags),
        contenders=[
            Contender(OURS, partial(temporal_attention, motion_free=flags)),
            Contender("SDPA", selected),
            *contest.compiled(selected),
        ],
        # I/O: two samples read q, k, v + write out; the motion-free one reads v + writes out.
        nbytes=(2 * 4 + 2) * sample * dtype.itemsize,
        preset=preset,
    )
