"""Clips made by replicas of a pipeline on a Ray cluster, by Ray Serve, in an engine's place."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gentron_fast.on_ray import Layout
from gentron_fast.pipeline import GenTronPipeline, Sampling
from gentron_fast.serving.engine import MOST_CLIPS
from gentron_fast.serving.scheduler import Scheduler

LOOK_SECONDS = 0.05  # between two looks at a clip's progress
TRIES, PAUSE = 5, 2.0  # of a clip whose replica dies; seconds
# Replicas come and go by the clips that are on their way for each.
AUTOSCALING = {"upscale_delay_s": 10, "downscale_delay_s": 300}


@dataclass(frozen=True)
class Checked:
    """A request whose sampling is known."""

    known: Sampling
    deadline: None = None

    def sampling(self, pipeline: GenTronPipeline) -> Sampling:
        return self.known


class Replica:
    """A pipeline in a process of its own, with a scheduler that batches what comes to it."""

    def __init__(self, folder: Path, dtype: str, device: str, cores: int, max_batch: int | None):
        torch.set_num_threads(cores)
        pipeline = GenTronPipeline.from_pretrained(folder, getattr(torch, dtype), device)
        self.scheduler = Scheduler(pipeline, queue_size=100_000, max_batch=max_batch)

    async def make(self, sampling: Sampling):
        """("step", number) behind each step, then ("frames", uint8 (T, H, W, 3)) or ("error", …).

        A caller that leaves ends the clip.
        """
        try:
            job, told = self.scheduler.submit(Checked(sampling)), 0
        except ValueError as error:  # of a clip that its memory does not hold
            yield "error", error
            return
        try:
            while job.state in ("queued", "running"):
                if job.progress.step > told:
                    told = job.progress.step
                    yield "step", told
                await asyncio.sleep(LOOK_SECONDS)
            yield ("error", job.error) if job.error else ("frames", job.result(0).numpy())
        finally:
            job.cancel()


class Remote:
    """A clip on its way: its steps told so far, of which `step` were taken note of."""

    def __init__(self, sampling: Sampling):
        self.sampling, self.steps = sampling, len(sampling.table.timesteps)
        self.step = self.told = 0
        self.outcome: Tensor | Exception | None = None
        self.task: asyncio.Future | None = None

    @property
    def has_news(self) -> bool:
        """The last step counts once the frames are there."""
        return self.outcome is not None or self.step < min(self.told, self.steps - 1)

    @property
    def made(self) -> int:
        return self.step

    @property
    def is_done(self) -> bool:
        return self.step == self.steps


class Replicas:
    """An engine for a scheduler: its clips are made elsewhere, at most `max_batch` at a time."""

    def __init__(self, handle, max_batch: int):
        self.max_batch, self._handle = max_batch, handle.options(stream=True)
        self._clips: list[Remote] = []
        self._news = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="replicas", daemon=True)
        self._thread.start()

    def check(self, shape: tuple[int, ...]) -> None:
        """Only a replica knows its memory: it refuses a clip that is too large for it."""

    def has_room(self, shape: tuple[int, ...]) -> bool:
        return len(self._clips) < self.max_batch

    def join(self, sampling: Sampling) -> Remote:
        clip = Remote(sampling)
        self._clips.append(clip)
        clip.task = asyncio.run_coroutine_threadsafe(self._make(clip), self._loop)
        return clip

    def turn(self) -> list[Remote]:
        """The clips with a step to take note of; none where there was no news for a while."""
        for _ in range(2):
            found = [clip for clip in self._clips if clip.has_news]
            if found:
                return found
            self._news.wait(LOOK_SECONDS)
            self._news.clear()
        return []

    def step(self, clips: list[Remote]) -> None:
        for clip in clips:
            if isinstance(clip.outcome, Exception):
                raise clip.outcome
        for clip in clips:
            clip.step += 1

    def frames(self, clip: Remote) -> Tensor:
        return clip.outcome

    def leave(self, clip: Remote) -> None:
        self._clips.remove(clip)
        self._loop.call_soon_threadsafe(clip.task.cancel)

    def close(self) -> None:
        """End what is on its way, and the thread."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=PAUSE)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._handle.shutdown()  # else its threads would go on asking the cluster
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _make(self, clip: Remote) -> None:
        """Ask a replica, and where it dies another one."""
        for left in reversed(range(TRIES)):
            stream = self._handle.make.remote(clip.sampling)
            try:
                async for kind, value in stream:
                    if kind == "step":
                        clip.told = max(clip.told, value)
                    else:
                        clip.outcome = torch.tensor(value) if kind == "frames" else value
                    self._news.set()
                return
            except asyncio.CancelledError:
                stream.cancel()
                raise
            except Exception as error:  # of Ray's: those of a clip are told as an outcome
                if not left:
                    clip.outcome = RuntimeError(f"no replica made it: {str(error)[:200]}")
                    self._news.set()
                    return
                await asyncio.sleep(PAUSE)


@contextmanager
def replicas(
    folder: Path, dtype: str, place: Layout, max_batch: int | None, name: str
) -> Iterator[Replicas]:
    """Replicas of the pipeline in a folder on the cluster that is connected, from one to as many as
    there is room for, and an engine that sends clips to them. ValueError where they do not start.

    max_batch: clips that each makes at a time, None for what its memory takes; name: of the
    application on the cluster.
    """
    from ray import serve

    each = max_batch or MOST_CLIPS[place.device]
    deployment = serve.deployment(
        name="Replica",
        ray_actor_options={"num_cpus": place.cores, "num_gpus": int(place.device == "cuda")},
        max_ongoing_requests=2 * each,
        autoscaling_config=AUTOSCALING
        | {"min_replicas": 1, "max_replicas": place.actors, "target_ongoing_requests": each},
        logging_config={"log_level": "ERROR"},
    )(Replica)
    logging.getLogger("ray.serve").disabled = True  # the server tells what matters
    try:
        serve.start(proxy_location="Disabled")
        bound = deployment.bind(folder, dtype, place.device, place.cores, max_batch)
        handle = serve.run(bound, name=name, route_prefix=None)
    except RuntimeError as error:
        raise ValueError(f"no replica started: {' '.join(str(error).split())[:300]}") from error
    engine = Replicas(handle, each * place.actors)
    try:
        yield engine
    finally:
        engine.close()
        serve.delete(name)
