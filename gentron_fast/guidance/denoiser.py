"""The denoiser: the guided noise of `guided_prediction`, with the shared work done once."""

# Shapes: B batch, C channels, T frames, H × W latents, S sampling steps, D width.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gentron_fast.guidance.definition import guidance_weights
from gentron_fast.layers import (
    BranchContexts,
    ConstantContext,
    CrossContext,
    FoldedContext,
    LeadingMotionFree,
)
from gentron_fast.model import EncodedText, GenTron, TextCondition
from gentron_fast.solvers import SolverTable, learned_range_d
from gentron_kernels.guided_step import guided_step

MODULATION_BYTES = 64 << 20  # of the modulation rows that are made ahead


class _Plan(NamedTuple):
    """How the branches of a step run: where their rows are, and what each block is given."""

    branches: tuple[bool, bool, bool]
    conditions: Tensor  # rows of the modulation table, one a sample of the stacked batch
    contexts: list
    motion_free: list


class GuidedDenoiser:
    """The guided noise of `guided_prediction`, with the work that the branches share done once.

    One batched forward runs the branches that a step needs: ε(∅,∅), ε(∅,c_M), ε(c_T,c_M), in this
    order, one behind the other along the batch. Before the first step the text of every block
    becomes keys and values, folded into W_Q and W_O where it is shorter than the head size; the
    modulation rows of all steps are made ahead, in chunks of at most MODULATION_BYTES; the
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
        fold: bool = True,
        merge: bool = True,
        reuse: int = 1,
        cuda_graph: bool | None = None,
    ):
        """text of B prompts and null_text, the empty or the negative prompt, of 1 or B; lambda_t
        and lambda_m a number, one a sample (B,), or a schedule (S, 1) or (S, B); latent_shape
        (C, T, H, W). fold, merge: whether to do as above. reuse: only every so many steps all
        branches run; the others add the last difference to the text's branch, which is faster and
        another function. cuda_graph: replay the forward, by default for images on CUDA.
        """
        if reuse < 1:
            raise ValueError(f"reuse must be at least 1 step, got {reuse}")
        if null_text.batch not in (1, text.batch):
            raise ValueError(f"null_text has {null_text.batch} prompts, not 1 or {text.batch}")
        latents = torch.empty(text.batch, *latent_shape, device="meta")
        for part in (text, null_text):
            model.check(latents, torch.empty(text.batch, device="meta"), part)
        self.model, self.table, self.batch = model, table, text.batch
        self.latent_shape = tuple(latent_shape)
        self.device, self.dtype = model.patch_embed.weight.device, model.patch_embed.weight.dtype
        self.has_motion = model.config.temporal and latent_shape[1] > 1
        scales = [_per_step(scale, table, self.batch) for scale in (lambda_t, lambda_m)]
        weights = guidance_weights(*scales, self.has_motion)
        weights = torch.stack([torch.as_tensor(w).expand_as(scales[0]) for w in weights], -1)
        self._active = [tuple(row) for row in (weights != 0).any(1).tolist()]
        self._weights, self._rows = weights.to(self.device), table.rows.to(self.device)

        null_text, text = (
            TextCondition(*map(_trimmed, _distinct(part))) for part in (null_text, text)
        )
        self._nulls, self._texts = null_text.batch, text.batch
        self._pooled = TextCondition.cat([_pooled_only(null_text), _pooled_only(text)])
        null_text, text = (model.project_captions(part) for part in (null_text, text))
        self._null_contexts = [block.context(null_text, fold) for block in model.blocks]
        self._text_contexts = [block.context(text, fold) for block in model.blocks]
        if model.blocks[0]._compiled_call_impl is not None:
            for context in (*self._null_contexts, *self._text_contexts):
                _mark_length_dynamic(context)
        self._merged = [
            block.temporal_attention.merged() if merge else None
            for block in model.blocks
            if model.config.temporal
        ]
        self._positions = model.positions(*self.latent_shape[-2:])
        self._plans: dict[tuple, _Plan] = {}

        latents = torch.empty(self._pooled.batch, *self.latent_shape, device="meta")
        sized = model.config.size_embedding
        self._size = model.pixel_size(latents, self.device) if sized else None
        values = (6 * model.config.depth + 2) * model.config.width * self._pooled.batch
        self._chunk = max(1, MODULATION_BYTES // (values * model.patch_embed.weight.element_size()))
        self._chunk_start = None
        self.reuse, self._difference = reuse, None
        if cuda_graph is None:
            cuda_graph = self.device.type == "cuda" and latent_shape[1] == 1
        self._graphs: dict | None = {} if cuda_graph else None

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
        if reuses and step % self.reuse and self._difference is not None:
            text = self.branches(latents, step, only_text=True)[2]
            branches, weights = (self._difference, None, text), self._weights.new_ones(3)
        else:
            branches, weights = self.branches(latents, step), self._weights[step]
            if reuses:
                self._difference = self._guidance_difference(branches, weights)
        channels, d = latents.shape[1], None
        if self.table.log_variance is not None and self.model.config.learned_range:
            last = [branch for branch in branches if branch is not None][-1]
            d = learned_range_d(self.table, step, last[:, channels:])
        branches = [branch if branch is None else branch[:, :channels] for branch in branches]
        return guided_step(latents, branches, weights, self._rows[step], x0_previous, noise, d)

    def _guidance_difference(self, branches, weights: Tensor) -> Tensor:
        """What the guided noise adds to the text's branch, (B, C, T, H, W)."""
        guided = sum(
            weight.reshape(-1, 1, 1, 1, 1) * branch
            for weight, branch in zip(weights.unbind(1), branches, strict=True)
            if branch is not None
        )
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
        runs = iter(forward(plan, latents.to(self.dtype), *rows).split(self.batch))
        return tuple(next(runs) if needed else None for needed in plan.branches)

    def _forward(self, plan: _Plan, latents: Tensor, rows: Tensor, final_rows: Tensor) -> Tensor:
        model = self.model
        x = model.embed(latents, self._positions).repeat(sum(plan.branches), 1, 1, 1)
        y = gate = None
        parts = zip(model.blocks, plan.contexts, plan.motion_free, strict=True)
        for index, (block, context, motion_free) in enumerate(parts):
            x, y, gate = block(x, y, gate, rows[:, index], context, motion_free)
        return model.unpatchify(model.final(x, y, gate, final_rows), *latents.shape[-2:])

    def _replay(self, plan: _Plan, *inputs: Tensor) -> Tensor:
        """`_forward` as a CUDA graph, captured at its first call: its buffers are its own."""
        if plan.branches not in self._graphs:
            static = [tensor.clone() for tensor in inputs]
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles kernels and fills caches, which no capture may do
                    self._forward(plan, *static)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self._forward(plan, *static)
            self._graphs[plan.branches] = graph, static, result
        graph, static, result = self._graphs[plan.branches]
        for buffer, tensor in zip(static, inputs, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return result

    def describe(self) -> str:
        """In one line: branches a step, the form of each text, the share of the work saved."""
        counts = [sum(branches) for branches in self._active]
        parts = [f"{counts.count(n)} steps of {n} branches" for n in (3, 2, 1) if n in counts]
        for name, contexts in (("null", self._null_contexts), ("text", self._text_contexts)):
            for block, context in zip(self.model.blocks[:2], contexts, strict=False):
                if context is not None:
                    parts.append(f"{name} {block.encoder} {_FORMS[type(context)]}")
        return "; ".join([*dict.fromkeys(parts), f"{self.work_saved():.1%} of the work saved"])

    def work_saved(self) -> float:
        """Share of the blocks' FLOPs saved against a separate forward for every branch of every
        step (two where there is no motion), unpadded, the identity mask among them as a mask."""
        every = (True, self.has_motion, True)
        run = sum(self._flops(branches) for branches in self._active)
        return 1 - run / (len(self._active) * self._flops(every, separate=True))

    def _flops(self, branches: tuple[bool, bool, bool], separate: bool = False) -> int:
        """FLOPs of the blocks in one step with these branches, for one sample."""
        config, (_, frames, height, width) = self.model.config, self.latent_shape
        d, patches = config.width, height * width // config.patch_size**2
        values = 4 * d if separate or self._merged[:1] == [None] else 2 * d
        count = sum(branches)
        total = 0
        for null_context, text_context in zip(
            self._null_contexts, self._text_contexts, strict=True
        ):
            texts = (branches[0] + branches[1], null_context), (branches[2], text_context)
            total += count * (8 * d + 4 * patches + int(4 * config.mlp_ratio * d))
            total += sum(n * self._cross_flops(context, separate) for n, context in texts)
            if config.temporal:
                still = count if frames == 1 else 0 if separate else int(branches[0])
                total += still * values + (count - still) * (8 * d + 4 * frames)
        return total * d * frames * patches

    def _cross_flops(self, context, separate: bool) -> int:
        """FLOPs a token and channel of one cross-attention, in the context's form or as plain."""
        d, heads = self.model.config.width, self.model.config.heads
        if context is None or (isinstance(context, ConstantContext) and not separate):
            return 0
        if isinstance(context, ConstantContext):
            return 4 * d + 4
        if isinstance(context, FoldedContext):
            rows = context.keys.shape[1]
            return 4 * d + 4 * rows // heads if separate else 4 * rows
        return 4 * d + 4 * context.k.shape[1]

    def _plan(self, branches: tuple[bool, bool, bool]) -> _Plan:
        nulls, texts = branches[0] + branches[1], int(branches[2])
        null_rows, text_rows = (
            torch.arange(count).repeat_interleave(self.batch // count)
            for count in (self._nulls, self._texts)
        )
        contexts = []
        for null_context, text_context in zip(
            self._null_contexts, self._text_contexts, strict=True
        ):
            if nulls and self._nulls > 1 and null_context is not None:
                null_context = _repeated(null_context, nulls)
            if nulls and texts and null_context is not None:
                sizes = nulls * self.batch, self.batch
                contexts.append(BranchContexts(sizes, (null_context, text_context)))
            else:
                contexts.append(text_context if texts else null_context)
        still = self.batch * (branches[0] if self.has_motion else nulls + texts)
        motion_free = [LeadingMotionFree(still, merged) for merged in self._merged]
        conditions = torch.cat([null_rows.repeat(nulls), self._nulls + text_rows.repeat(texts)])
        motion_free = motion_free or [None] * len(contexts)
        return _Plan(branches, conditions.to(self.device), contexts, motion_free)

    def _modulation(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows of a step, of every condition: the blocks' (P, depth, 6, D), the final layer's."""
        start = step - step % self._chunk
        if self._chunk_start != start:
            timesteps = self.table.timesteps[start : start + self._chunk].to(self.device)
            steps, conditions = len(timesteps), self._pooled.batch
            text = self._pooled.map(lambda t: t.repeat(steps, *(1,) * (t.ndim - 1)))
            size = None if self._size is None else self._size.repeat(steps, 1)
            c, time = self.model.condition(timesteps.repeat_interleave(conditions), text, size)
            self._table = None  # its memory serves the new one
            rows = c.new_empty(len(c), len(self.model.blocks), 6, c.shape[1])
            for index, block in enumerate(self.model.blocks):
                rows[:, index] = block.modulation(c)
            final_rows = self.model.final.modulation(c, time)
            parts = rows, final_rows
            self._table = [part.unflatten(0, (steps, conditions)) for part in parts]
            self._chunk_start = start
        return tuple(part[step - start] for part in self._table)


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


def _distinct(text: TextCondition) -> TextCondition:
    """Every prompt once, where each stands in the condition as many times in a row."""
    tensors = [tensor for part in text if part is not None for tensor in part if tensor is not None]
    for times in range(text.batch, 1, -1):
        if text.batch % times == 0:
            runs = [tensor.unflatten(0, (-1, times)) for tensor in tensors]
            if all(torch.equal(run, run[:, :1].expand_as(run)) for run in runs):
                return text.select(slice(None, None, times))
    return text


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


def _mark_length_dynamic(context) -> None:
    """Tell torch.compile that texts of other lengths will come: one compilation serves them all."""
    lengths = {CrossContext: ("k", "v", "mask"), FoldedContext: ("keys", "key_bias", "values")}
    for name in lengths.get(type(context), ()):
        if (tensor := getattr(context, name)) is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)


def _repeated(context, times: int):
    """A context whose samples come `times` times, one whole batch behind the other."""

    def repeat(tensor):
        return None if tensor is None else tensor.repeat(times, *(1,) * (tensor.ndim - 1))

    if isinstance(context, ConstantContext):
        return ConstantContext(repeat(context.row))
    if isinstance(context, FoldedContext):
        return FoldedContext(*(repeat(t) for t in context[:3]), context.out_bias)
    return CrossContext(*(repeat(t) for t in context))
