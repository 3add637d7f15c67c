"""LayerNorm + adaLN modulation, and the chain that joins every two sub-layers of a block.

pytest bench/bench_layernorm_modulate.py --benchmark-only
"""

import importlib.util
import math

import pytest
import torch
from bench_step import plain_chain
from contest import DTYPES, OURS, PRESET_NAMES, Contender, absent
from plain import EPS, modulated, residual_modulated

from gentron_fast import PRESETS
from gentron_kernels.layernorm_modulate import (
    layernorm_modulate,
    layernorm_modulate_ref,
    residual_layernorm_modulate,
    residual_layernorm_modulate_ref,
)

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
BATCHES = [None, 1] if HAS_LIGER else [None]  # Liger has a twin of one sample only


def liger(batch: int) -> Contender:
    if not HAS_LIGER:
        return absent("Liger", "liger_kernel is not installed")
    if batch > 1:
        return absent("Liger", "its LayerNorm has one row of weights, not one a sample")
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def run(x, shift, scale):
        return LigerLayerNormFunction.apply(x, 1 + scale[0], shift[0], EPS)

    return Contender("Liger", run)


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.full)])
def test_layernorm_modulate(measure, contest, clip, preset, dtype, batch, backward):
    clip = clip._replace(batch=batch or clip.batch)
    shape = *clip, PRESETS[preset].width
    rows = clip.batch, shape[-1]
    # I/O: forward read x + write y; backward read x, dy + write dx. A row serves T·N tokens.
    tensors = 3 if backward else 2
    # An element: mean 1, variance 3, normalise 2, modulate 2; its gradient twice that.
    flops = 8 * (2 if backward else 1)
    measure(
        "layernorm_modulate",
        shape,
        dtype,
        make=lambda randn: (randn(*shape), randn(*rows), randn(*rows)),
        definition=layernorm_modulate_ref,
        contenders=[
            Contender(OURS, layernorm_modulate),
            Contender("eager", modulated),
            *contest.compiled(modulated),
            liger(clip.batch),
        ],
        nbytes=tensors * math.prod(shape) * dtype.itemsize,
        flops=flops * math.prod(shape),
        backward=backward,
        preset=preset,
    )


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_residual_layernorm_modulate(measure, contest, clip, preset, dtype, backward):
    shape = *clip, PRESETS[preset].width
    rows = clip.batch, shape[-1]
    # I/O: forward read x, y + write x', h; backward read x', y, dx', dh + write dx, dy.
    tensors = 6 if backward else 4
    # An element: as above, and 2 to add the gated update.
    flops = 10 * (2 if backward else 1)
    measure(
        "residual_layernorm_modulate",
        shape,
        dtype,
        make=lambda randn: (randn(*shape), randn(*shape), *(randn(*rows) for _ in range(3))),
        definition=residual_layernorm_modulate_ref,
        contenders=[
            Contender(OURS, residual_layernorm_modulate),
            Contender("eager", residual_modulated),
            *contest.compiled(residual_modulated),
        ],
        nbytes=tensors * math.prod(shape) * dtype.itemsize,
        flops=flops * math.prod(shape),
        backward=backward,
        preset=preset,
    )


# What a block gives the chain behind its self-attention, its cross-attention and its MLP.
FORMS = {
    "gate": ("gate",),
    "positions": ("positions", "frame"),
    "gate, shift and scale": ("gate", "shift", "scale"),
}


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chain(measure, contest, clip, dtype, form):
    """The chain in the forms in which a video block calls it, beside plain torch and a copy."""
    preset, names = "G/2-T2V", FORMS[form]
    shape = *clip, PRESETS[preset].width

    def make(randn):
        frame = torch.arange(clip.frames, device=contest.device).repeat(clip.batch)
        sizes = dict.fromkeys(names, clip.batch) | {"positions": clip.frames}
        rows = (frame if name == "frame" else randn(sizes[name], shape[-1]) for name in names)
        return randn(*shape), randn(*shape), *rows

    def form_of(chain):
        def run(x, y, *rows):
            if "positions" in names:
                return chain(x, y, shift=rows)
            return chain(x, y, **dict(zip(names, rows, strict=True)))

        return run

    measure(
        f"chain, {form}",
        shape,
        dtype,
        make=make,
        definition=form_of(residual_layernorm_modulate_ref),
        contenders=[
            Contender(OURS, form_of(residual_layernorm_modulate)),
            Contender("eager", form_of(plain_chain)),
        ],
        nbytes=4 * math.prod(shape) * dtype.itemsize,  # I/O: read x, y + write x', h
        flops=10 * math.prod(shape),  # as above
        preset=preset,
    )
