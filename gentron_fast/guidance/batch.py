"""Guided steps of many denoisers in one: each has a step of its own, and they come and go.

A denoiser brings what its samples need: contexts, modulation rows, guidance and solver. Here lies
how they run together, in one batched forward; the samples of one denoiser are the simplest case.
"""

# Shapes: B samples of all denoisers, K samples of all branches that run, C channels, T frames,
# H × W latents.

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gentron_fast.guidance.contexts import block_context, mark_length_dynamic
from gentron_fast.guidance.steps import (
    Branches,
    embed,
    finish,
    leading_motion_free,
    split,
    update,
)
from gentron_fast.layers import frame_numbers
from gentron_fast.transfer import on_device

if TYPE_CHECKING:
    from gentron_fast.guidance.denoiser import GuidedDenoiser


# Of a sample and step: weights of the branches, solver's row, bounds of its variance, rescale.
COEFFICIENT_SIZES = 3, 6, 2, 1


class Plan(NamedTuple):
    """How the branches of a step run: where their rows are, and what each block is given.

    sizes: samples of each branch; samples (K,): which of the batch they are, None where every
    branch that runs has all; conditions (K,): each one's row at its denoiser's step; denoisers
    (K,): whose it is, None for a single one; frames (K · T,): each frame's number.
    """

    sizes: tuple[int, int, int]
    samples: Tensor | None
    conditions: Tensor
    denoisers: Tensor | None
    contexts: list
    motion_free: list
    frames: Tensor


class GuidedBatch:
    """Denoisers of one model and latent shape, one guided step of each at a time.

    What a denoiser makes in a batch is what it makes alone (fp32: 1e-5). Members come and go by
    making another batch: what is kept of them is theirs.
    """

    def __init__(self, denoisers: Sequence[GuidedDenoiser]):
        """ValueError unless the denoisers share their work (`shared`), have one shape of latents
        and run every step in full (reuse 1)."""
        first = denoisers[0]
        if any(d.shared is not first.shared for d in denoisers):
            raise ValueError("the denoisers of a batch must share one SharedWork")
        if shapes := {d.latent_shape for d in denoisers} - {first.latent_shape}:
            raise ValueError(f"latents {first.latent_shape} and {min(shapes)} in one batch")
        if any(d.reuse > 1 for d in denoisers):
            raise ValueError("a denoiser that reuses its guidance steps alone")
        self.denoisers, self._plans = tuple(denoisers), {}
        self.batch = sum(d.batch for d in denoisers)

    @torch.no_grad()
    def step(
        self,
        latents: Tensor,
        steps: Sequence[int],
        x0_previous: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Each denoiser's step of its number: latents at the next noise level, this step's x0.

        latents, x0_previous, noise (B, C, T, H, W), the denoisers' samples one behind the other;
        of a sample that needs no x0_previous or noise at its step any value may stand there.
        """
        active = tuple(d.active(step) for d, step in zip(self.denoisers, steps, strict=True))
        branches = run_branches(self.denoisers, steps, active, latents, self._plans)
        branches = spread(branches, self._plans[active], len(latents))
        return update_together(self.denoisers, steps, latents, branches, x0_previous, noise)


def run_branches(
    denoisers: Sequence[GuidedDenoiser],
    steps: Sequence[int],
    active: tuple[Branches, ...],
    latents: Tensor,
    plans: dict,
    forward: Callable | None = None,
) -> tuple[Tensor | None, ...]:
    """Predictions of ε(∅,∅), ε(∅,c_M) and ε(c_T,c_M) for the samples whose denoiser runs them
    (`active`), None for a branch that none runs. plans: kept by the caller, by `active`."""
    plan, index = prepare(denoisers, steps, active, latents.device, plans)
    run = forward or forward_branches
    return split(run(denoisers[0], plan, latents.to(denoisers[0].dtype), index), plan.sizes)


def prepare(
    denoisers: Sequence[GuidedDenoiser],
    steps: Sequence[int],
    active: tuple[Branches, ...],
    device: torch.device,
    plans: dict,
) -> tuple[Plan, Tensor]:
    """The plan of a step, and where its modulation rows are in the table, which then has them."""
    fill_rows(denoisers, steps)
    if active not in plans:
        plans[active] = make_plan(denoisers, active)
    plan = plans[active]
    first_rows = [d.first_row(step) for d, step in zip(denoisers, steps, strict=True)]
    if plan.denoisers is None:
        return plan, plan.conditions + first_rows[0]
    first_rows = on_device(torch.tensor(first_rows), device)
    return plan, plan.conditions + first_rows[plan.denoisers]


def forward_branches(denoiser: GuidedDenoiser, plan: Plan, latents: Tensor, index: Tensor):
    """The branches' predictions, one behind the other, (K, C, T, H, W); index (K,): their rows in
    the table that the denoiser shares."""
    shared, model, size = denoiser.shared, denoiser.model, latents.shape[-2:]
    count = sum(1 for samples in plan.sizes if samples)
    positions = shared.positions(*size)  # which it keeps
    with _untracked(latents.device):
        x = embed(model, latents, count, positions, plan.samples)
        y = gate = None
        parts = zip(model.blocks, plan.contexts, plan.motion_free, strict=True)
        for number, (block, context, motion_free) in enumerate(parts):
            rows = shared.rows[:, number], index
            x, y, gate = block(x, y, gate, rows, context, motion_free, plan.frames)
    return finish(model, x, y, gate, (shared.final_rows, index), size)


def _untracked(device: torch.device) -> AbstractContextManager:
    """On the CPU no operator passes through autograd on its way, which costs a small model a tenth
    of its step. What is made within must not leave: others could not write to it."""
    return torch.inference_mode() if device.type == "cpu" else nullcontext()


def update_together(
    denoisers: Sequence[GuidedDenoiser],
    steps: Sequence[int],
    latents: Tensor,
    branches: tuple[Tensor | None, ...],
    x0_previous: Tensor | None,
    noise: Tensor | None,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Guidance and each solver's update of its own samples; own: coefficients in place of theirs at
    these steps."""
    at = list(zip(denoisers, steps, strict=True))
    if own is None:
        parts = [d.coefficients[step] for d, step in at]
        own = parts[0] if len(parts) == 1 else torch.cat(parts)
    weights, row, bounds, rescale = own.split(COEFFICIENT_SIZES, dim=1)
    return update(
        latents,
        branches,
        weights,
        row[0] if len(at) == 1 else row,  # a denoiser's samples are at one step
        x0_previous,
        noise,
        bounds if any(d.learns_range for d in denoisers) else None,
        rescale[:, 0] if any(d.rescales[step] for d, step in at) else None,
    )


def fill_rows(denoisers: Sequence[GuidedDenoiser], steps: Sequence[int]) -> None:
    """Make the modulation rows that the steps need and the table has not."""
    missing = [(d, s) for d, s in zip(denoisers, steps, strict=True) if not d.has_rows(s)]
    if not missing:
        return
    missing[0][0].shared.fill([d.conditions_from(step) for d, step in missing])
    for denoiser, step in missing:
        denoiser.rows_are_made(step)


def make_plan(denoisers: Sequence[GuidedDenoiser], active: tuple[Branches, ...]) -> Plan:
    """The plan of a step in which each denoiser runs its own branches."""
    model, device = denoisers[0].model, denoisers[0].device
    starts = [0, *accumulate(d.batch for d in denoisers)]
    sizes, samples, conditions, owners, running = [], [], [], [], []
    for branch in range(3):
        runs = [i for i, branches in enumerate(active) if branches[branch]]
        samples += [torch.arange(starts[i], starts[i + 1]) for i in runs]
        conditions += [denoisers[i].branch_conditions(branch) for i in runs]
        owners += [torch.full((denoisers[i].batch,), i) for i in runs]
        sizes.append(sum(denoisers[i].batch for i in runs))
        running.append([denoisers[i] for i in runs])
    in_step = all(size in (0, starts[-1]) for size in sizes)
    contexts = [
        block_context(
            [(d.null_text.contexts[i], d.batch) for runs in running[:2] for d in runs],
            [(d.text.contexts[i], d.batch) for d in running[2]],
            model.config.heads,
        )
        for i in range(len(model.blocks))
    ]
    if model.blocks[0]._compiled_call_impl is not None:
        for context in contexts:
            mark_length_dynamic(context)
    has_motion = denoisers[0].has_motion
    merged = denoisers[0].shared.merged
    return Plan(
        tuple(sizes),
        None if in_step else on_device(torch.cat(samples), device),
        on_device(torch.cat(conditions), device),
        on_device(torch.cat(owners), device) if len(denoisers) > 1 else None,
        contexts,
        [own and leading_motion_free(sizes, has_motion, own) for own in merged],
        frame_numbers(sum(sizes), denoisers[0].latent_shape[1], device),
    )


def spread(
    branches: tuple[Tensor | None, ...], plan: Plan, batch: int
) -> tuple[Tensor | None, ...]:
    """Predictions of some samples as those of all (B, C, T, H, W), 0 where a sample has none."""
    if plan.samples is None:
        return branches
    samples = plan.samples.split(plan.sizes)
    return tuple(
        None if part is None else part.new_zeros(batch, *part.shape[1:]).index_copy_(0, own, part)
        for part, own in zip(branches, samples, strict=True)
    )
