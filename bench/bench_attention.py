"""Spatial and cross attention: what `attention` chooses, beside every backend forced.

pytest bench/bench_attention.py --benchmark-only
"""

import math

import pytest
import torch
from contest import DTYPES, OURS, PRESET_NAMES, Contender, absent
from peers import flash_attention, sdpa_backends
from torch.utils._python_dispatch import TorchDispatchMode

from gentron_fast import PRESETS
from gentron_kernels.attention import attention
from gentron_kernels.spatial_attention import spatial_attention

TEXT = 77  # tokens of a prompt with its padding, of which REAL are kept
REAL = 20


def definition(q, k, v, mask=None):
    """softmax(q kᵀ / √Dh) v, over the keys that the mask keeps."""
    scores = torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v).flatten(2)


class _Called(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **kwargs or {})


def ours(contest, dtype, make) -> Contender:
    """`attention`, noting the operator that it chose for these inputs."""
    tensors = make(lambda *shape: torch.zeros(shape, dtype=dtype, device=contest.device))
    with torch.no_grad(), _Called() as called:
        attention(*tensors)
    chosen = [name for name in called.names if "attention" in name or "flash" in name]
    return Contender(OURS, attention, chosen[0] if chosen else "math")


def forced(attend):
    def run(q, k, v, mask=None):
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        mask = None if mask is None else mask[:, None, None]
        return attend(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    return run


def needs_a_choice(contest) -> None:
    """On the CPU `attention` is SDPA's flash kernel: a figure would compare it with itself."""
    if contest.device == "cpu" and not contest.smoke:
        pytest.skip("on the CPU attention is SDPA's own")


def peers(device: str, masked: bool) -> list[Contender]:
    contenders = [Contender(name, forced(run)) for name, run in sdpa_backends(device).items()]
    found = flash_attention()
    if isinstance(found, str):
        return [*contenders, absent("flash-attn", found)]
    if masked:
        return [*contenders, absent("flash-attn", "it takes no mask of keys")]
    attend, note = found
    return [*contenders, Contender("flash-attn", lambda q, k, v: attend(q, k, v).flatten(2), note)]


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.full)])
def test_spatial_attention(measure, contest, clip, preset, dtype, backward):
    needs_a_choice(contest)
    config = PRESETS[preset]
    shape = clip.batch * clip.frames, clip.tokens, config.heads, config.head_size
    elements = math.prod(shape)

    def make(randn):  # q, k and v lie in one packed projection
        return randn(*shape[:2], 3, *shape[2:]).unbind(2)

    measure(
        "attention",
        shape,
        dtype,
        make=make,
        definition=definition,
        contenders=[ours(contest, dtype, make), *peers(contest.device, masked=False)],
        # I/O: forward read q, k, v + write out; backward read q, k, v, dout + write dq, dk, dv.
        nbytes=(7 if backward else 4) * elements * dtype.itemsize,
        flops=(5 if backward else 2) * 2 * elements * clip.tokens,
        backward=backward,
        preset=preset,
    )


@pytest.mark.parametrize("tokens", [16, 32])
@pytest.mark.parametrize("preset", ["small", "XL/2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.full)])
def test_few_tokens(measure, contest, preset, tokens, dtype, backward):
    """Frames of 16 tokens, as the small model has them, and of 32, from the packed projection."""
    config = PRESETS[preset]
    shape = 3, 8, tokens, 3, config.heads, config.head_size
    elements = math.prod(shape)

    def from_packed(attend):
        def run(qkv):
            q, k, v = (part.flatten(0, 1) for part in qkv.unbind(3))
            return attend(q, k, v).view(*qkv.shape[:3], -1)

        return run

    backends = sdpa_backends(contest.device).items()
    measure(
        "attention among few tokens",
        shape,
        dtype,
        make=lambda randn: (randn(*shape),),
        definition=from_packed(definition),
        contenders=[
            Contender(OURS, spatial_attention),
            *(Contender(name, from_packed(forced(run))) for name, run in backends),
        ],
        # I/O: forward read qkv + write a third; backward read qkv, dout + write dqkv.
        nbytes=elements * (7 if backward else 4) // 3 * dtype.itemsize,
        flops=(5 if backward else 2) * 2 * elements // 3 * shape[2],
        backward=backward,
        preset=preset,
    )


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.full)])
def test_cross_attention(measure, contest, clip, preset, dtype, backward):
    needs_a_choice(contest)
    config = PRESETS[preset]
    shape = clip.batch, clip.frames * clip.tokens, config.heads, config.head_size
    elements = math.prod(shape)
    text = clip.batch * TEXT * config.width

    def make(randn):
        keys = randn(clip.batch, TEXT, 2, *shape[2:])
        mask = torch.arange(TEXT, device=contest.device) < REAL
        return randn(*shape), *keys.unbind(2), mask.expand(clip.batch, -1)

    measure(
        "cross attention",
        shape,
        dtype,
        make=make,
        definition=definition,
        contenders=[ours(contest, dtype, make), *peers(contest.device, masked=True)],
        # I/O: forward read q, k, v + write out; backward read q, k, v, dout + write dq, dk, dv.
        nbytes=((3 if backward else 2) * elements + (4 if backward else 2) * text) * dtype.itemsize,
        flops=(5 if backward else 2) * 2 * elements * TEXT,
        backward=backward,
        preset=preset,
    )
