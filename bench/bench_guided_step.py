"""Guidance and solver update in one pass over the latents.

pytest bench/bench_guided_step.py --benchmark-only
"""

import math
from functools import partial

import pytest
import torch
from contest import OURS, Contender

guided_step = pytest.importorskip("gentron_kernels.guided_step").guided_step

# alpha, sigma, a, b, c, d: a second-order step that draws noise, so that no term is left out.
ROW = (0.8, 0.6, 0.7, 0.5, -0.2, 0.1)
WEIGHTS = (-0.2, -6.3, 7.5)  # of the three branches at λ_T = 7.5, λ_M = 1.2


def plain(latents, null_still, null_motion, text, weights, row, x0_previous, noise, shares=None):
    """Guidance, then the solver's table row, as their equations."""
    branches = torch.stack([null_still, null_motion, text], dim=1).to(latents.dtype)
    eps = torch.einsum("bk,bkcthw->bcthw", weights, branches)
    eps = eps if shares is None else rescaled(eps, text, shares)
    alpha, sigma, a, b, c, d = row.unbind()
    x0 = (latents - sigma * eps) / alpha
    return a * latents + b * x0 + c * x0_previous + d * noise, x0


def rescaled(eps, text, shares):
    """Guidance rescale, as its equation."""
    dims = (1, 2, 3, 4)
    ratio = text.float().std(dims, keepdim=True) / eps.std(dims, keepdim=True)
    shares = shares[:, None, None, None, None]
    return (shares * ratio + 1 - shares) * eps


def weighted_sum(
    latents, null_still, null_motion, text, weights, row, x0_previous, noise, shares=None
):
    """The same without a copy of the branches."""
    w0, w1, w2 = weights[:, :, None, None, None, None].unbind(1)
    eps = w0 * null_still + w1 * null_motion + w2 * text
    eps = eps if shares is None else rescaled(eps, text, shares)
    alpha, sigma, a, b, c, d = row.unbind()
    x0 = (latents - sigma * eps) / alpha
    return a * latents + b * x0 + c * x0_previous + d * noise, x0


def ours(latents, null_still, null_motion, text, weights, row, x0_previous, noise, shares=None):
    branches = null_still, null_motion, text
    return guided_step(latents, branches, weights, row, x0_previous, noise, None, shares)


def latents_shape(contest) -> tuple[int, ...]:
    side = 8 if contest.smoke else 64  # 512² pixels
    return 3, 4, 8, side, side


def inputs(randn, shape, device: str, has_rescale: bool = False) -> tuple:
    def wide():
        return randn(*shape, dtype=torch.float32)

    weights = torch.tensor(WEIGHTS, device=device).repeat(shape[0], 1)
    row = torch.tensor(ROW, device=device)
    branches = randn(3, *shape).unbind()
    shares = [torch.full((shape[0],), 0.7, device=device)] * has_rescale
    return wide(), *branches, weights, row, wide(), wide(), *shares


@pytest.mark.parametrize("has_rescale", [False, True], ids=["plain", "rescale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guided_step(measure, contest, dtype, has_rescale):
    shape = latents_shape(contest)
    # I/O: read latents, x0_previous, noise (fp32), three branches + write latents', x0 (fp32);
    # with a rescale the branches once before.
    nbytes = math.prod(shape) * (5 * 4 + 3 * dtype.itemsize * (1 + has_rescale))
    measure(
        "guided_step" + " with rescale" * has_rescale,
        shape,
        dtype,
        make=partial(inputs, shape=shape, device=contest.device, has_rescale=has_rescale),
        definition=plain,
        contenders=[
            Contender(OURS, ours),
            Contender("eager", plain, "stacked"),
            Contender("eager", weighted_sum, "summed"),
            *contest.compiled(weighted_sum),
        ],
        nbytes=nbytes,
        flops=(14 + 10 * has_rescale) * math.prod(shape),  # guidance 5, x0 2, update 7
    )
