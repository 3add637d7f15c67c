"""The denoiser: the guided noise of `guided_prediction`, with the shared work done once."""

# Shapes: B batch, C channels, T frames, H × W latents, S sampling steps, D width.

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gentron_fast.guidance.batch import (
    COEFFICIENT_SIZES,
    Plan,
    forward_branches,
    prepare,
    run_branches,
    update_together,
)
from gentron_fast.guidance.contexts import ConstantContext, FoldedContext, PreparedText
from gentron_fast.guidance.cuda_graph import (
    ReplayedGraph,
    are_worth_capturing,
    is_bound_by_launches,
)
from gentron_fast.guidance.definition import (
    check_one_branch,
    check_rescale,
    guidance_inputs,
    guidance_weights,
)
from gentron_fast.guidance.shared import Conditions, SharedWork
from gentron_fast.guidance.steps import (
    Branches,
    active_branches,
    branch_conditions,
    split,
    update,
)
from gentron_fast.guidance.work import step_flops
from gentron_fast.layers import CrossContext
from gentron_fast.model import GenTron, TextCondition
from gentron_fast.solvers import SolverTable
from gentron_fast.transfer import on_device
from gentron_kernels.guided_step import rescaled_noise


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
        text: TextCondition | PreparedText,
        null_text: TextCondition | PreparedText | None,
        table: SolverTable,
        lambda_t: float | Tensor,
        lambda_m: float | Tensor,
        latent_shape: Sequence[int],
        *,
        rescale: float | Tensor = 0.0,
        clips: int = 1,
        reuse: int = 1,
        cuda_graph: bool | None = None,
        shared: SharedWork | None = None,
    ):
        """text of P prompts, each for `clips` samples in a row, so that B = P · clips; null_text,
        the empty or the negative prompt, of 1 or P, None for a distilled model; lambda_t, lambda_m
        and rescale a number, one a sample (B,), or a schedule (S, 1) or (S, B); latent_shape
        (C, T, H, W). reuse: only every so many steps all branches run; the others add the last
        difference to the text's branch, which is faster and another function. cuda_graph: replay
        the step, by default on CUDA where launching it takes the host longer than running it the
        GPU, and the steps of each kind pay for a capture. shared: with the other denoisers of a
        GuidedBatch; `release()` gives back the place there, as deleting the denoiser does.
        """
        distilled = model.config.guidance_embedding
        if reuse < 1:
            raise ValueError(f"reuse must be at least 1 step, got {reuse}")
        if distilled:
            check_one_branch(reuse=reuse)
        if distilled != (null_text is None):
            raise ValueError(
                "a distilled model has one branch: its null_text must be None"
                if distilled
                else "null_text must be the empty or the negative prompt, got None"
            )
        if null_text is not None and null_text.batch not in (1, text.batch):
            raise ValueError(f"null_text has {null_text.batch} prompts, not 1 or {text.batch}")
        self.model, self.table, self.batch = model, table, text.batch * clips
        self.latent_shape = tuple(latent_shape)
        latents = torch.empty(self.batch, *latent_shape, device="meta")
        texts = [part for part in (null_text, text) if part is not None]
        for part in texts:
            own = part.pooled if isinstance(part, PreparedText) else part
            model.check(latents, torch.empty(self.batch, device="meta"), own)
        self.device, self.dtype = model.patch_embed.weight.device, model.patch_embed.weight.dtype
        self.has_motion = model.config.temporal and latent_shape[1] > 1
        self._take_coefficients(lambda_t, lambda_m, rescale)
        texts = [
            part if isinstance(part, PreparedText) else PreparedText.of(model, part)
            for part in texts
        ]
        self.text, self.null_text = texts[-1], None if distilled else texts[0]
        # A row of modulation for each: of a distilled model each sample, since its scales go in.
        self._pooled = self.text.pooled.repeat(clips)
        if not distilled:
            self._pooled = TextCondition.cat([part.pooled for part in texts])
        conditions, steps = self._pooled.batch, len(table.timesteps)
        self.shared = SharedWork(model, conditions, steps) if shared is None else shared
        if self.shared.conditions != conditions:
            raise ValueError(f"{conditions} conditions, shared rows for {self.shared.conditions}")
        latents = torch.empty(conditions, *self.latent_shape, device="meta")
        sized = model.config.size_embedding
        self._size = model.pixel_size(latents, self.device) if sized else None
        self._chunk, self._chunk_start = self.shared.chunk, None
        self._place, self.release = self.shared.claim(self)
        self._plans: dict = {}
        self.reuse, self._difference = reuse, None
        if cuda_graph is None:
            cuda_graph = self.device.type == "cuda" and self._pays_for_graphs()
        self._graphs: dict[tuple, ReplayedGraph] | None = {} if cuda_graph else None
        self._draws = bool((table.rows[:, 5] != 0).any())

    def _pays_for_graphs(self) -> bool:
        """By the kinds of steps, and the tokens of the largest one, all its branches together."""
        kinds = len(set(zip(self._active, self.rescales, strict=True))) + (self.reuse > 1)
        if not are_worth_capturing(kinds, len(self._active)):
            return False
        _, frames, height, width = self.latent_shape
        config = self.model.config
        tokens = self.batch * frames * height * width // config.patch_size**2
        return is_bound_by_launches(max(map(sum, self._active)) * tokens, config.width)

    def _take_coefficients(self, lambda_t, lambda_m, rescale) -> None:
        """Of every step and sample, (S, B, 12): the weights of the branches, the solver's row, the
        bounds of the log variance, the rescale."""
        table = self.table
        scales = [_per_step(scale, table, self.batch) for scale in (lambda_t, lambda_m)]
        distilled = self.model.config.guidance_embedding
        self._guidance = None
        if distilled:
            self._guidance = on_device(guidance_inputs(*scales, self.has_motion), self.device)
        weights = guidance_weights(*scales, self.has_motion, distilled)
        weights = torch.stack([torch.as_tensor(w).expand_as(scales[0]) for w in weights], -1)
        shares = check_rescale(_per_step(rescale, table, self.batch), distilled)
        self._active = active_branches(weights, shares)
        self.rescales = (shares != 0).any(1).tolist()
        self.learns_range = table.log_variance is not None and self.model.config.learned_range
        # Beside a sample that learns its range, another's bounds are both its own d's.
        bounds = table.log_variance if self.learns_range else 2 * table.rows[:, 5:].log()
        of_step = torch.cat([table.rows, bounds.expand(-1, 2)], 1)
        of_step = of_step[:, None].expand(-1, self.batch, -1)
        coefficients = torch.cat([weights, of_step, shares[..., None]], -1)
        self.coefficients = on_device(coefficients, self.device)
        self._timesteps = on_device(table.timesteps, self.device)
        self._weights = self.coefficients[..., :3]

    def active(self, step: int) -> Branches:
        """The branches that a step runs."""
        return self._active[step]

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
        if self._graphs is not None and self.reuse == 1:
            return self._replayed_step(latents, step, x0_previous, noise)
        if self.reuse > 1 and self._active[step][2]:
            if step % self.reuse and self._difference is not None:
                return self._reused_step(latents, step, x0_previous, noise)
            branches = self.branches(latents, step)
            self._difference = self._guidance_difference(branches, step)
        else:
            branches = self.branches(latents, step)
        return update_together((self,), (step,), latents, branches, x0_previous, noise)

    def _replayed_step(self, latents, step, x0_previous, noise) -> tuple[Tensor, Tensor]:
        """The step, guidance and solver in it, as a CUDA graph: one for each set of branches."""
        self._check_shape(latents)
        active = (self._active[step],)
        plan, index = prepare((self,), (step,), active, latents.device, self._plans)
        # What is absent counts as 0: a first or a last step needs no graph of its own.
        dtype = torch.promote_types(latents.dtype, torch.float32)
        zeros = torch.zeros_like(latents, dtype=dtype)
        if noise is None and self._draws:
            noise = zeros
        inputs = [latents, index, self.coefficients[step]]
        inputs.append(zeros if x0_previous is None else x0_previous)
        inputs += [] if noise is None else [noise]

        def run(latents, index, own, x0_previous, noise=None):
            predictions = forward_branches(self, plan, latents.to(self.dtype), index)
            branches = split(predictions, plan.sizes)
            return update_together((self,), (step,), latents, branches, x0_previous, noise, own)

        key = "step", plan.sizes, self.rescales[step], noise is None, latents.dtype
        if key not in self._graphs:
            self._graphs[key] = ReplayedGraph(run, tuple(inputs))
        x_next, x0 = self._graphs[key](*inputs)
        return x_next.clone(), x0.clone()  # the next replay writes over them

    def _reused_step(self, latents, step, x0_previous, noise) -> tuple[Tensor, Tensor]:
        """A step of the text's branch and the difference of a step before, which is rescaled."""
        text = self.branches(latents, step, only_text=True)[2]
        branches, weights = (self._difference, None, text), self._weights.new_ones(3)
        _, row, bounds, _ = self.coefficients[step].split(COEFFICIENT_SIZES, dim=1)
        bounds = bounds if self.learns_range else None
        return update(latents, branches, weights, row, x0_previous, noise, bounds)

    def _guidance_difference(self, branches, step: int) -> Tensor:
        """What the guided noise adds to the text's branch, (B, C, T, H, W)."""
        weights, rescale = self._weights[step], self.coefficients[step, :, -1]
        guided = sum(
            weight.reshape(-1, 1, 1, 1, 1) * branch
            for weight, branch in zip(weights.unbind(1), branches, strict=True)
            if branch is not None
        )
        if self.rescales[step]:
            guided = rescaled_noise(guided, branches[2], rescale)
        return (guided - branches[2]).to(torch.promote_types(self.dtype, torch.float32))

    @torch.no_grad()
    def branches(
        self, latents: Tensor, step: int, only_text: bool = False
    ) -> tuple[Tensor | None, ...]:
        """The predictions ε(∅,∅), ε(∅,c_M) and ε(c_T,c_M) that the step needs, None for others.

        Under cuda_graph they are overwritten by the next call.
        """
        self._check_shape(latents)
        active = (False, False, True) if only_text else self._active[step]
        forward = None if self._graphs is None else self._replay
        return run_branches((self,), (step,), (active,), latents, self._plans, forward)

    def _replay(self, _, plan: Plan, *inputs: Tensor) -> Tensor:
        """`forward_branches` as a CUDA graph, captured at its first call."""
        if plan.sizes not in self._graphs:
            run = partial(forward_branches, self, plan)
            self._graphs[plan.sizes] = ReplayedGraph(run, inputs)
        return self._graphs[plan.sizes](*inputs)

    def _check_shape(self, latents: Tensor) -> None:
        wanted = self.batch, *self.latent_shape
        if latents.shape != wanted:
            raise ValueError(f"latents must be {wanted}, got {tuple(latents.shape)}")

    def branch_conditions(self, branch: int) -> Tensor:
        """Which of a step's rows each sample has in a branch, (B,) int64."""
        if self.null_text is None:
            return branch_conditions(branch, self.batch, 0, self.batch)
        return branch_conditions(branch, self.batch, self.null_text.batch, self.text.batch)

    def has_rows(self, step: int) -> bool:
        """Whether the modulation rows of a step are in the table."""
        return self._chunk_start == step - step % self._chunk

    def first_row(self, step: int) -> int:
        """Where the rows of a step are, one a condition, where the table has them."""
        return self._place + step % self._chunk * self._pooled.batch

    def conditions_from(self, step: int) -> Conditions:
        """What `SharedWork.fill` makes the rows of a step and its chunk of, in the place of those
        before; once they are there, `rows_are_made` is to be told."""
        self._chunk_start = None  # until then the place holds no step's rows
        own = slice(step - step % self._chunk, step - step % self._chunk + self._chunk)
        timesteps, guidance = self._timesteps[own], self._guidance
        steps, conditions = len(timesteps), self._pooled.batch
        return Conditions(
            range(self._place, self._place + steps * conditions),
            timesteps.repeat_interleave(conditions),
            self._pooled.map(lambda t: t.repeat(steps, *(1,) * (t.ndim - 1))),
            None if self._size is None else self._size.repeat(steps, 1),
            None if guidance is None else guidance[own].flatten(0, 1),
        )

    def rows_are_made(self, step: int) -> None:
        self._chunk_start = step - step % self._chunk

    def describe(self) -> str:
        """In one line: branches a step, the form of each text, the share of the work saved."""
        counts = [sum(branches) for branches in self._active]
        parts = [f"{counts.count(n)} steps of {n} branches" for n in (3, 2, 1) if n in counts]
        if self.null_text is None:
            parts = [f"{len(counts)} steps of one branch, distilled: guidance is its input"]
        for name, contexts in zip(("null", "text"), zip(*self._contexts, strict=True), strict=True):
            for block, context in zip(self.model.blocks[:2], contexts, strict=False):
                if context is not None:
                    parts.append(f"{name} {block.encoder} {_FORMS[type(context)]}")
        if self.null_text is not None:
            parts.append(f"{self.work_saved():.1%} of the work saved")
        return "; ".join(dict.fromkeys(parts))

    def work_saved(self) -> float:
        """Share of the blocks' FLOPs saved against a separate forward for every branch of every
        step (two where there is no motion), unpadded, the identity mask among them as a mask; 0 for
        a distilled model, of which nobody would run others."""
        every = (True, self.has_motion, True)
        kind = self.model.config, self.latent_shape
        if self.null_text is None:
            return 0.0
        run = sum(step_flops(*kind, branches, self._contexts) for branches in self._active)
        separate = step_flops(*kind, every, self._contexts, separate=True)
        return 1 - run / (len(self._active) * separate)

    @property
    def _contexts(self) -> list[tuple]:
        """Of each block the null text's context and the text's."""
        own = self.text.contexts
        nulls = [None] * len(own) if self.null_text is None else self.null_text.contexts
        return list(zip(nulls, own, strict=True))


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
