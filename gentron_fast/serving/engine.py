"""Clips in the making: they join and leave, and all of one shape take a step together."""

# Shapes: C channels, T frames, h × w latents, H × W pixels.

import math
import time
from collections import deque
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from gentron_fast.diffusion import portable_noise
from gentron_fast.guidance import GuidedBatch, GuidedDenoiser, PreparedText, SharedWork
from gentron_fast.memory import free_memory, held_at_most
from gentron_fast.model import TextCondition
from gentron_fast.pipeline import GenTronPipeline, Sampling
from gentron_fast.schema import MOST_TIMESTEPS
from gentron_fast.transfer import on_device
from gentron_fast.vae import REASONS

# Clips in a step, however much memory there is: a CPU gains nothing from more, and a step of all of
# them is what a new one waits for.
MOST_CLIPS = {"cpu": 8, "cuda": 64}
SHAPES = 2  # of which so many clips can be in the making at once
SHARE = 0.8  # of the free memory that clips may take
Mark = float | torch.cuda.Event


class Memory(NamedTuple):
    """What was measured, in bytes: `clip`, of one of the pipeline's own frames and size at most, in
    a step or decoded; `room`, for all clips. max_batch: how many of them a step takes."""

    clip: int
    room: int
    max_batch: int

    @property
    def clips(self) -> int:
        """How many there is room for, at least one."""
        return max(1, self.room // self.clip)


class Clip:
    """A clip before step `step`: latents (1, C, T, h, w), and the x0 of the step before.

    made: steps that are over, of which a GPU may be one behind.
    """

    def __init__(self, denoiser: GuidedDenoiser, seed: int, latents: Tensor):
        self.denoiser, self.seed, self.step, self.made = denoiser, seed, 0, 0
        self.latents, self.x0 = latents, torch.zeros_like(latents)
        self.draws = (denoiser.table.rows[:, -1] != 0).tolist()

    @property
    def is_done(self) -> bool:
        return self.step == len(self.draws)

    def noise(self) -> Tensor:
        """What the solver draws at this step; zeros where it draws none."""
        if not self.draws[self.step]:
            return torch.zeros_like(self.latents)
        drawn = portable_noise(self.denoiser.latent_shape, [self.seed], self.step + 1)
        return on_device(drawn, self.latents.device)


class Engine:
    """The clips that one pipeline makes at a time. For one thread.

    A clip is what the pipeline makes of its sampling, whoever joins and leaves beside it.
    """

    def __init__(self, pipeline: GenTronPipeline, max_batch: int, memory: Memory | None = None):
        """max_batch: clips of one shape, of the pipeline's own frames and size, that take a step
        together; memory: None where a clip alone may be of any size."""
        self.pipeline, self.max_batch, self._memory = pipeline, max_batch, memory
        self.clips: list[Clip] = []
        self._own = math.prod(own_shape(pipeline))
        self._places = SHAPES * max_batch
        most = self._places if memory is None else min(self._places, memory.clips)
        self._room = max(max_batch, most)
        self._shared = SharedWork(
            pipeline.transformer, len(_texts(pipeline, "", "")), MOST_TIMESTEPS, places=self._places
        )
        # Of prompts that clips are made of: with the last one they go.
        self._texts: WeakValueDictionary[str, PreparedText] = WeakValueDictionary()
        self._kept = [self._prepared(text) for text in _texts(pipeline, "", "")[1:]]
        self._batches: dict[tuple, GuidedBatch] = {}
        # Seconds of a clip's steps that each shape has had, the one of the last turn last.
        self._turns: dict[tuple, float] = {}
        # While a GPU makes a step the next is launched; a CPU is through when the call is.
        self._launched: deque[tuple[tuple, list[Clip], Mark, Mark]] = deque()
        self._ahead = 1 if pipeline.device.type == "cuda" else 0

    def check(self, shape: tuple[int, int, int, int]) -> None:
        """ValueError where a clip with latents of this shape, alone, takes more memory than there
        is: a CPU's would end the process."""
        share = math.prod(shape) / self._own
        if self._memory is None or share <= self.max_batch:
            return
        need, room = share * self._memory.clip, self._memory.room
        if need > room:
            factor, (_, frames, height, width) = self.pipeline.vae.factor, shape
            raise ValueError(
                f"{frames} frames of {height * factor}x{width * factor} pixels take "
                f"{need / 2**30:.3g} GiB of memory, and there are {room / 2**30:.3g}"
            )

    def has_room(self, shape: tuple[int, int, int, int]) -> bool:
        """Whether there is room for a clip with latents of this shape beside all others; alone any
        has it."""
        taken = sum(math.prod(clip.denoiser.latent_shape) for clip in self.clips)
        fits = taken + math.prod(shape) <= self._room * self._own
        return not self.clips or (fits and len(self.clips) < self._places)

    def step_takes(self, shape: tuple[int, int, int, int]) -> bool:
        """Whether a step of the clips of this shape takes one more; one it always does."""
        count = 1 + sum(clip.denoiser.latent_shape == tuple(shape) for clip in self.clips)
        fits = count * math.prod(shape) <= self.max_batch * self._own
        return count == 1 or (fits and count <= self.max_batch)

    def join(self, sampling: Sampling) -> Clip:
        """A clip of a sampling of one. ValueError where its text is not finite."""
        (prompt,), (negative,) = sampling.prompts, sampling.negatives
        texts = _texts(self.pipeline, prompt, negative)
        return self._begin(sampling, *map(self._prepared, texts))

    def _begin(
        self, sampling: Sampling, text: PreparedText, null_text: PreparedText | None = None
    ) -> Clip:
        (seed,) = sampling.seeds
        denoiser = GuidedDenoiser(
            *(self.pipeline.transformer, text, null_text),
            *(sampling.table, sampling.lambda_t, sampling.lambda_m, sampling.shape),
            rescale=sampling.rescale,
            cuda_graph=False,
            shared=self._shared,
        )
        latents = portable_noise(sampling.shape, [seed], 0)
        clip = Clip(denoiser, seed, on_device(latents, self.pipeline.device))
        self.clips.append(clip)
        # Neighbours with one null text share what is made of it.
        self.clips.sort(key=lambda clip: id(clip.denoiser.null_text))
        return clip

    def leave(self, clip: Clip) -> None:
        """What is held for the clip is free."""
        self.clips.remove(clip)
        self._batches.pop(clip.denoiser.latent_shape, None)
        for _, clips, *_ in self._launched:
            if clip in clips:
                clips.remove(clip)
        clip.denoiser.release()

    def turn(self) -> list[Clip]:
        """The clips of one shape whose turn it is to take a step.

        Shapes take turns by the time of their steps, so that a clip has the same share of it
        whatever its shape: an image takes several steps beside one of a clip. Where several shapes
        had the same, the one whose turn is longest ago; one that comes is behind them all.
        """
        groups: dict[tuple, list[Clip]] = {}
        for clip in self.clips:
            groups.setdefault(clip.denoiser.latent_shape, []).append(clip)
        first = min((self._turns[shape] for shape in groups if shape in self._turns), default=0)
        turns = {shape: spent for shape, spent in self._turns.items() if shape in groups}
        self._turns = turns | {shape: first for shape in groups if shape not in turns}
        return groups[min(self._turns, key=self._turns.get)]

    @torch.no_grad()
    def step(self, clips: list[Clip]) -> None:
        """The next step of each of these clips of one shape; they are as before where it fails."""
        start, shape = self._mark(), clips[0].denoiser.latent_shape
        denoisers = tuple(clip.denoiser for clip in clips)
        batch = self._batches.get(shape)
        if batch is None or batch.denoisers != denoisers:
            batch = self._batches[shape] = GuidedBatch(denoisers)
        steps = [clip.step for clip in clips]
        noise = None
        if any(clip.draws[clip.step] for clip in clips):
            noise = torch.cat([clip.noise() for clip in clips])
        latents, x0 = (
            torch.cat([getattr(clip, name) for clip in clips]) for name in ("latents", "x0")
        )
        latents, x0 = (part.split(1) for part in batch.step(latents, steps, x0, noise))
        for clip, *own in zip(clips, latents, x0, strict=True):
            clip.latents, clip.x0 = own
            clip.step += 1
        self._turns[shape] = self._turns.pop(shape, 0)  # to the end: of equals the last
        self._launched.append((shape, list(clips), start, self._mark()))
        self._settle(self._ahead)

    def _settle(self, ahead: int) -> None:
        """Wait until no more than so many steps are on their way, and count those that are over."""
        while len(self._launched) > ahead:
            shape, clips, start, end = self._launched.popleft()
            if isinstance(end, float):
                seconds = end - start
            else:
                end.synchronize()
                seconds = start.elapsed_time(end) / 1000
            if shape in self._turns:
                self._turns[shape] += seconds / max(1, len(clips))
            for clip in clips:
                clip.made += 1

    def _mark(self) -> Mark:
        """This moment: of a GPU, when it is through with what it was given before."""
        if not self._ahead:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self.pipeline.device))
        return mark

    def frames(self, clip: Clip) -> Tensor:
        """Of a clip that is done: uint8 (T, H, W, 3) on the CPU. ValueError for what is not
        finite."""
        self._settle(0)
        if not bool(clip.latents.isfinite().all()):
            raise ValueError(f"the latents are not finite: {REASONS}")
        return self.pipeline.decode(clip.latents)[0]

    def _prepared(self, prompt: str) -> PreparedText:
        text = self._texts.get(prompt)
        if text is None:
            encoded = self.pipeline.encode([prompt])
            text = self._texts[prompt] = PreparedText.of(self.pipeline.transformer, encoded)
        return text


def _texts(pipeline: GenTronPipeline, prompt: str, negative: str) -> tuple[str, ...]:
    """What is encoded of a clip: of a distilled model the prompt alone."""
    return (prompt,) if pipeline.transformer.config.guidance_embedding else (prompt, negative)


def own_shape(pipeline: GenTronPipeline) -> tuple[int, int, int, int]:
    """Of the latents (C, T, h, w) of a clip of the pipeline's own frames and size."""
    return pipeline.sampling("").shape


def measured(pipeline: GenTronPipeline) -> Memory:
    """What a step of one clip and of two of the pipeline's own frames and size holds at most, all
    branches in it and with the longest texts, and a clip's decoding; room is SHARE of the memory
    that is free."""

    def step(count: int) -> None:
        engine = Engine(pipeline, count)
        for seed in range(count):
            sampling = pipeline.sampling("", seed=seed, steps=2, lambda_t=3.0, lambda_m=2.0)
            texts = (longest for _ in _texts(pipeline, "", ""))
            engine._begin(sampling, *(PreparedText.of(pipeline.transformer, own) for own in texts))
        engine.step(engine.clips)

    longest = longest_text(pipeline)
    room = int(SHARE * free_memory(pipeline.device))
    clip = held_at_most(lambda: step(1), pipeline.device)
    if 2 * clip <= room:  # else a second one is not tried
        clip = max(1, held_at_most(lambda: step(2), pipeline.device) - clip)
    latents = torch.zeros(1, *own_shape(pipeline), device=pipeline.device)
    decoding = held_at_most(lambda: pipeline.decode(latents), pipeline.device)
    most = int((room - max(0, decoding - clip)) / clip)
    return Memory(max(clip, decoding), room, max(1, min(MOST_CLIPS[pipeline.device.type], most)))


def longest_text(pipeline: GenTronPipeline) -> TextCondition:
    """As many tokens as the longest prompt has, of each encoder."""
    encoder, parts = pipeline.text_encoder, {}
    for name, part in pipeline.encode([""])._asdict().items():
        if part is not None:
            tokens = part.tokens[:, -1:].expand(-1, encoder.max_tokens(name), -1)
            part = part._replace(tokens=tokens, mask=None)
        parts[name] = part
    return TextCondition(**parts)
