"""The guided step in pure functions, for the denoiser and the graphs of a compiled sampler.

A step runs branches ε(∅,∅), ε(∅,c_M), ε(c_T,c_M), in this order, one behind the other along the
batch: `embed`, then the blocks with `contexts.block_context` and `leading_motion_free`, then
`finish` and `update`.
"""

# Shapes: B batch, k branches that run, C channels, T frames, N tokens of a frame, D width,
# H × W latents, S sampling steps.

from collections.abc import Sequence

import torch
from torch import Tensor

from gentron_fast.config import GenTronConfig
from gentron_fast.diffusion import learned_range_log_variance
from gentron_fast.guidance.contexts import LeadingMotionFree
from gentron_fast.model import GenTron
from gentron_kernels.guided_step import guided_step

MODULATION_BYTES = 64 << 20  # of the modulation rows that are made ahead

Branches = tuple[bool, bool, bool]  # which of ε(∅,∅), ε(∅,c_M), ε(c_T,c_M) run


def active_branches(weights: Tensor, rescale: Tensor) -> list[Branches]:
    """The branches that each step runs: those to which some sample gives a weight, and the text's
    where some sample has a rescale.

    weights (S, B, 3), of `guidance_weights`; rescale (S, B).
    """
    return [tuple(row) for row in _needed(weights, rescale).any(1).tolist()]


def _needed(weights: Tensor, rescale: Tensor) -> Tensor:
    """Which branches each sample needs, bool of the weights' shape (..., 3); rescale (...)."""
    needs_text = torch.zeros_like(weights, dtype=torch.bool)
    needs_text[..., 2] = rescale != 0
    return (weights != 0) | needs_text


def modulation_row_bytes(config: GenTronConfig, dtype: torch.dtype) -> int:
    """Bytes of the modulation rows of all blocks and the final layer, for one condition."""
    return (6 * config.depth + 2) * config.width * dtype.itemsize


def modulation_chunk(row_bytes: int, conditions: int) -> int:
    """Steps whose modulation rows are made at once, of so many conditions each."""
    return max(1, MODULATION_BYTES // (row_bytes * conditions))


def branch_conditions(branch: int, batch: int, nulls: int, texts: int) -> Tensor:
    """Which condition each sample has in a branch, 0 to 2, (B,) int64.

    The conditions are `nulls` null texts, then `texts` texts, each for as many samples in a row.
    """
    first, count = (nulls, texts) if branch == 2 else (0, nulls)
    return first + torch.arange(count).repeat_interleave(batch // count)


def leading_motion_free(sizes: Sequence[int], has_motion: bool, merged) -> LeadingMotionFree:
    """The branches with the identity mask: ε(∅,∅), or all where there is no motion.

    sizes: how many samples each of the three branches has.
    """
    return LeadingMotionFree(sizes[0] if has_motion else sum(sizes), merged)


def embed(
    model: GenTron,
    latents: Tensor,
    count: int = 1,
    positions: Tensor | None = None,
    samples: Tensor | None = None,
) -> Tensor:
    """Latents (B, C, T, H, W) → patches of the branches' samples, one branch behind the other.

    `count` branches of all samples, (k · B, T, N, D), or those samples that an index names.
    """
    latents = latents.to(model.patch_embed.weight.dtype)
    x = model.embed(latents, positions)
    if samples is not None:
        return x[samples]
    return x if count == 1 else x.repeat(count, 1, 1, 1)


def finish(model: GenTron, x: Tensor, y: Tensor, gate: Tensor, rows: Tensor, size) -> Tensor:
    """The stream behind the last block → predictions (k · B, C, T, H, W); size (H, W)."""
    return model.unpatchify(model.final(x, y, gate, rows), *size)


def split(predictions: Tensor, sizes: Sequence[int]) -> tuple[Tensor | None, ...]:
    """Stacked predictions by branch; sizes: samples of each, None for one that has none."""
    parts = iter(predictions.split([size for size in sizes if size]))
    return tuple(next(parts) if size else None for size in sizes)


def update(
    latents: Tensor,
    predictions: tuple[Tensor | None, ...],
    weights: Tensor,
    row: Tensor,
    x0_previous: Tensor | None = None,
    noise: Tensor | None = None,
    bounds: Tensor | None = None,
    rescale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Guidance and the solver's update: latents at the next noise level, and this step's x0.

    weights (B, 3) or (3,); row (6,) of a SolverTable, or one a sample (B, 6); bounds (2,) or
    (B, 2): of the log variance that a learned-range model chooses (Nichol & Dhariwal 2021, arXiv
    2102.09672, eq. 15); rescale (B,), None where no sample has any.
    """
    channels, d = latents.shape[1], None
    if bounds is not None:
        variance = _last_used(predictions, weights, rescale)[:, channels:]
        variance = variance.to(torch.promote_types(variance.dtype, torch.float32))
        low, high = (part.to(variance.dtype).reshape(-1, 1, 1, 1, 1) for part in bounds.unbind(-1))
        d = torch.exp(0.5 * learned_range_log_variance(variance, low, high))
    noises = [p if p is None else p[:, :channels] for p in predictions]
    return guided_step(latents, noises, weights, row, x0_previous, noise, d, rescale)


def _last_used(
    predictions: tuple[Tensor | None, ...], weights: Tensor, rescale: Tensor | None
) -> Tensor:
    """Of each sample the last prediction that it needs, as in the definition."""
    needed = weights != 0 if rescale is None else _needed(weights, rescale)
    last = None
    for prediction, need in zip(predictions, needed.unbind(-1), strict=True):
        if last is None:
            last = prediction
        elif prediction is not None:
            last = prediction.where(need.reshape(-1, 1, 1, 1, 1), last)
    return last
