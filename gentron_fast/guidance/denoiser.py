"""The denoiser: the guided noise of `guided_prediction`, with the shared work done once."""

# Shapes: B batch, C channels, T frames, H × W latents, S sampling steps, D width.

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gentron_fast.guidance.contexts import (
    ConstantContext,
    FoldedContext,
    mark_length_dynamic,
    merged_values,
    shared_context,
)
from gentron_fast.guidance.cuda_graph import ReplayedGraph
from gentron_fast.guidance.definition import check_rescale, guidance_weights
from gentron_fast.guidance.steps import (
    Branches,
    active_branches,
    block_context,
    condition_rows,
    embed,
    finish,
    leading_motion_free,
    modulation_chunk,
    modulation_row_bytes,
    split,
    update,
)
from gentron_fast.guidance.work import step_flops
from gentron_fast.layers import CrossContext
from gentron_fast.model import EncodedText, GenTron, TextCondition
from gentron_fast.solvers import SolverTable
from gentron_fast.transfer import on_device
from gentron_kernels.guided_step import rescaled_noise


class _Plan(NamedTuple):
    """How the branches of a step run: where their rows are, and what each block is given."""

    branches: Branches
    conditions: Tensor  # rows of the modulation table, one a sample of the stacked batch
    contexts: list
    motion_free: list


class GuidedDenoiser:
    """The guided noise of `guided_prediction`, with the work that the branches share done once.

    One batched forward runs the branches that a step needs: ε(∅,∅), ε(∅,c_M), ε(c_T,c_M), in this
    order, one behind the other along the batch. Before the first step the text of every block
    becomes keys and values, folded into W_Q and W_O where it is shorter than the head size; the
    modulation rows of all steps are made ahead, in chunks of at most `steps.MODULATION_BYTES`; the
    motion-free branch takes the merged value and output projections. All of it is the same
    function as the definition, in other products.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: GenTron,
        text: TextCondition,
        null_text: TextCondition,
        table: SolverTable,
        lambda_t: float | Tensor,
        lambda_m: float | Tensor,
        latent_shape: Sequence[int],
        *,
        rescale: float | Tensor = 0.0,
        clips: int = 1,
        reuse: int = 1,
        cuda_graph: bool | None = None,
    ):
        """text of P prompts, each for `clips` samples in a row, so that B = P · clips; null_text,
        the empty or the negative prompt, of 1 or P; lambda_t, lambda_m and rescale a number, one a
        sample (B,), or a schedule (S, 1) or (S, B); latent_shape (C, T, H, W). reuse: only every so
        many steps all branches run; the others add the last difference to the text's branch, which
        is faster and another function. cuda_graph: replay the forward, by default for images on
        CUDA.
        """
        if reuse < 1:
            raise ValueError(f"reuse must be at least 1 step, got {reuse}")
        if null_text.batch not in (1, text.batch):
            raise ValueError(f"null_text has {null_text.batch} prompts, not 1 or {text.batch}")
        self.model, self.table, self.batch = model, table, text.batch * clips
        self.latent_shape = tuple(latent_shape)
        latents = torch.empty(self.batch, *latent_shape, device="meta")
        for part in (text, null_text):
            model.check(latents, torch.empty(self.batch, device="meta"), part)
        self.device, self.dtype = model.patch_embed.weight.device, model.patch_embed.weight.dtype
        self.has_motion = model.config.temporal and latent_shape[1] > 1
        scales = [_per_step(scale, table, self.batch) for scale in (lambda_t, lambda_m)]
        weights = guidance_weights(*scales, self.has_motion)
        weights = torch.stack([torch.as_tensor(w).expand_as(scales[0]) for w in weights], -1)
        shares = check_rescale(_per_step(rescale, table, self.batch))
        self._active = active_branches(weights, shares)
        self._rescale = on_device(shares, self.device) if shares.any() else None
        self._weights, self._solver_rows, self._timesteps = (
            on_device(tensor, self.device) for tensor in (weights, table.rows, table.timesteps)
        )
        learns_range = table.log_variance is not None and model.config.learned_range
        self._bounds = on_device(table.log_variance, self.device) if learns_range else None

        null_text, text = (TextCondition(*map(_trimmed, part)) for part in (null_text, text))
        self._nulls, self._texts = null_text.batch, text.batch
        self._pooled = TextCondition.cat([_pooled_only(null_text), _pooled_only(text)])
        null_text, text = (model.project_captions(part) for part in (null_text, text))
        self._contexts = [
            (shared_context(block, null_text), shared_context(block, text))
            for block in model.blocks
        ]
        if model.blocks[0]._compiled_call_impl is not None:
            for pair in self._contexts:
                for context in pair:
                    mark_length_dynamic(context)
        self._merged = [
            merged_values(block.temporal_attention) if model.config.temporal else None
            for block in model.blocks
        ]
        self._positions = model.positions(*self.latent_shape[-2:])
        self._plans: dict[Branches, _Plan] = {}

        latents = torch.empty(self._pooled.batch, *self.latent_shape, device="meta")
        sized = model.config.size_embedding
        self._size = model.pixel_size(latents, self.device) if sized else None
        row_bytes = modulation_row_bytes(model.config, self.dtype)
        self._chunk = modulation_chunk(row_bytes, self._pooled.batch)
        self._chunk_start = None
        self.reuse, self._difference = reuse, None
        if cuda_graph is None:
            cuda_graph = self.device.type == "cuda" and latent_shape[1] == 1
        self._graphs: dict[Branches, ReplayedGraph] | None = {} if cuda_graph else None

    @torch.no_grad()
    def step(
        self,
        latents: Tensor,
        step: int,
        x0_previous: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Step number `step` of the table: latents at the next noise level, and this step's x0.

        latents, x0_previous, noise (B, C, T, H, W); returned in fp32, or fp64 for fp64 latents.
        """
        reuses = self.reuse > 1 and self._active[step][2]
        rescale = None if self._rescale is None else self._rescale[step]
        if reuses and step % self.reuse and self._difference is not None:
            text = self.branches(latents, step, only_text=True)[2]
            branches, weights = (self._difference, None, text), self._weights.new_ones(3)
            rescale = None  # the difference has it
        else:
            branches, weights = self.branches(latents, step), self._weights[step]
            if reuses:
                self._difference = self._guidance_difference(branches, weights, rescale)
        bounds = None if self._bounds is None else self._bounds[step]
        row = self._solver_rows[step]
        return update(latents, branches, weights, row, x0_previous, noise, bounds, rescale)

    def _guidance_difference(self, branches, weights: Tensor, rescale: Tensor | None) -> Tensor:
        """What the guided noise adds to the text's branch, (B, C, T, H, W)."""
        guided = sum(
            weight.reshape(-1, 1, 1, 1, 1) * branch
            for weight, branch in zip(weights.unbind(1), branches, strict=True)
            if branch is not None
        )
        if rescale is not None:
            guided = rescaled_noise(guided, branches[2], rescale)
        return (guided - branches[2]).to(torch.promote_types(self.dtype, torch.float32))

    @torch.no_grad()
    def branches(
        self, latents: Tensor, step: int, only_text: bool = False
    ) -> tuple[Tensor | None, ...]:
        """The predictions ε(∅,∅), ε(∅,c_M) and ε(c_T,c_M) that the step needs, None for others.

        Under cuda_graph they are overwritten by the next call.
        """
        if latents.shape != (self.batch, *self.latent_shape):
            wanted = (self.batch, *self.latent_shape)
            raise ValueError(f"latents must be {wanted}, got {tuple(latents.shape)}")
        active = (False, False, True) if only_text else self._active[step]
        if active not in self._plans:
            self._plans[active] = self._plan(active)
        plan = self._plans[active]
        rows = [part[plan.conditions] for part in self._modulation(step)]
        forward = self._forward if self._graphs is None else self._replay
        return split(forward(plan, latents.to(self.dtype), *rows), active, self.batch)

    def _forward(self, plan: _Plan, latents: Tensor, rows: Tensor, final_rows: Tensor) -> Tensor:
        model = self.model
        x = embed(model, latents, sum(plan.branches), self._positions)
        y = gate = None
        parts = zip(model.blocks, plan.contexts, plan.motion_free, strict=True)
        for index, (block, context, motion_free) in enumerate(parts):
            x, y, gate = block(x, y, gate, rows[:, index], context, motion_free)
        return finish(model, x, y, gate, final_rows, latents.shape[-2:])

    def _replay(self, plan: _Plan, *inputs: Tensor) -> Tensor:
        """`_forward` as a CUDA graph, captured at its first call."""
        if plan.branches not in self._graphs:
            self._graphs[plan.branches] = ReplayedGraph(partial(self._forward, plan), inputs)
        return self._graphs[plan.branches](*inputs)

    def describe(self) -> str:
        """In one line: branches a step, the form of each text, the share of the work saved."""
        counts = [sum(branches) for branches in self._active]
        parts = [f"{counts.count(n)} steps of {n} branches" for n in (3, 2, 1) if n in counts]
        for name, contexts in zip(("null", "text"), zip(*self._contexts, strict=True), strict=True):
            for block, context in zip(self.model.blocks[:2], contexts, strict=False):
                if context is not None:
                    parts.append(f"{name} {block.encoder} {_FORMS[type(context)]}")
        return "; ".join([*dict.fromkeys(parts), f"{self.work_saved():.1%} of the work saved"])

    def work_saved(self) -> float:
        """Share of the blocks' FLOPs saved against a separate forward for every branch of every
        step (two where there is no motion), unpadded, the identity mask among them as a mask."""
        every = (True, self.has_motion, True)
        kind = self.model.config, self.latent_shape
        run = sum(step_flops(*kind, branches, self._contexts) for branches in self._active)
        separate = step_flops(*kind, every, self._contexts, separate=True)
        return 1 - run / (len(self._active) * separate)

    def _plan(self, branches: Branches) -> _Plan:
        conditions = condition_rows(branches, self.batch, self._nulls, self._texts)
        contexts = [
            block_context(branches, self.batch, self._nulls, *pair) for pair in self._contexts
        ]
        motion_free = [
            leading_motion_free(branches, self.batch, self.has_motion, merged)
            if self.model.config.temporal
            else None
            for merged in self._merged
        ]
        return _Plan(branches, on_device(conditions, self.device), contexts, motion_free)

    def _modulation(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows of a step, of every condition: the blocks' (P, depth, 6, D), the final layer's."""
        start = step - step % self._chunk
        if self._chunk_start != start:
            timesteps = self._timesteps[start : start + self._chunk]
            steps, conditions = len(timesteps), self._pooled.batch
            text = self._pooled.map(lambda t: t.repeat(steps, *(1,) * (t.ndim - 1)))
            size = None if self._size is None else self._size.repeat(steps, 1)
            c, time = self.model.condition(timesteps.repeat_interleave(conditions), text, size)
            self._modulation_rows = None  # its memory serves the new one
            rows = c.new_empty(len(c), len(self.model.blocks), 6, c.shape[1])
            for index, block in enumerate(self.model.blocks):
                rows[:, index] = block.modulation(c)
            final_rows = self.model.final.modulation(c, time)
            parts = rows, final_rows
            self._modulation_rows = [part.unflatten(0, (steps, conditions)) for part in parts]
            self._chunk_start = start
        return tuple(part[step - start] for part in self._modulation_rows)


_FORMS = {ConstantContext: "constant", FoldedContext: "folded", CrossContext: "as keys and values"}


def _per_step(scale: float | Tensor, table: SolverTable, batch: int) -> Tensor:
    """A guidance scale of any accepted form as (S, B) float64."""
    steps = len(table.timesteps)
    scale = torch.as_tensor(scale, dtype=torch.float64, device="cpu")
    shapes = {(), (1,), (batch,)} if scale.ndim < 2 else {(steps, 1), (steps, batch)}
    if tuple(scale.shape) not in shapes:
        raise ValueError(
            f"a guidance scale must be a number, ({batch},), ({steps}, 1) or ({steps}, {batch}), "
            f"got {tuple(scale.shape)}"
        )
    return scale.expand(steps, batch)


def _trimmed(encoded: EncodedText | None) -> EncodedText | None:
    """The text without places that are padding everywhere, and no mask where none is left."""
    if encoded is None or encoded.mask is None:
        return encoded
    encoded = encoded.trim()
    return encoded._replace(mask=None) if encoded.mask.all() else encoded


def _pooled_only(text: TextCondition) -> TextCondition:
    """The condition without its tokens."""
    return TextCondition(
        *(
            part and EncodedText(part.tokens[:, :0], part.tokens[:, :0, 0].bool(), part.pooled)
            for part in text
        )
    )
