"""Clips made by replicas of a pipeline on a Ray cluster, by Ray Serve, in an engine's place."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gentron_fast.on_ray import Layout
from gentron_fast.pipeline import GenTronPipeline, Sampling
from gentron_fast.serving.engine import MOST_CLIPS
from gentron_fast.serving.scheduler import Scheduler, SchedulerClosed
from gentron_fast.threads import settle_threads

LOOK_SECONDS = 0.05  # between two looks at a clip's progress
TRIES, PAUSE = 5, 2.0  # of a clip that no replica answers for; seconds
DEATHS = 2  # of replicas that had begun a clip: then it is taken for the cause
WATCH_SECONDS = 1.0  # between two looks at the cluster
# Seconds until it is lost: without an answer of its head (Ray ends the process, without a word,
# after 60), and without one of any replica, that may have to load its weights again.
HEAD_SECONDS, SILENT_SECONDS = 30.0, 900.0
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
        settle_threads()
        pipeline = GenTronPipeline.from_pretrained(folder, getattr(torch, dtype), device)
        self.scheduler = Scheduler(pipeline, queue_size=100_000, max_batch=max_batch)

    async def make(self, sampling: Sampling):
        """("step", 0) once it is here, ("step", number) behind each step, then ("frames", uint8
        (T, H, W, 3)) or ("error", …).

        A caller that leaves ends the clip.
        """
        yield "step", 0
        await asyncio.sleep(LOOK_SECONDS)  # that is told before anything can go wrong
        job, told = None, 0
        try:
            job = self.scheduler.submit(Checked(sampling))
            while job.state in ("queued", "running"):
                if job.progress.step > told:
                    told = job.progress.step
                    yield "step", told
                await asyncio.sleep(LOOK_SECONDS)
            yield "frames", job.result(0).numpy()
        except SchedulerClosed:  # of a fault: others make its clips, Ray Serve begins a new one
            os._exit(1)
        except Exception as error:
            yield "error", error
        finally:
            if job is not None:
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
    """An engine for a scheduler: its clips are made elsewhere, at most `max_batch` at a time.

    head: HOST:PORT of the cluster's.
    """

    def __init__(self, handle, max_batch: int, head: str):
        self.max_batch, self._handle, self._head = max_batch, handle.options(stream=True), head
        self.is_lost, self._clips = False, []
        self._news, self._heard = threading.Event(), time.monotonic()
        self._again = asyncio.Lock()  # held by the one clip that is begun again
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="replicas", daemon=True)
        self._thread.start()

    def check(self, shape: tuple[int, ...]) -> None:
        """Only a replica knows its memory: it refuses a clip that is too large for it."""

    def has_room(self, shape: tuple[int, ...]) -> bool:
        return len(self._clips) < self.max_batch

    def step_takes(self, shape: tuple[int, ...]) -> bool:
        return True

    def join(self, sampling: Sampling) -> Remote:
        clip = Remote(sampling)
        if not self._clips:
            self._heard = time.monotonic()
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

    def watch(self, scheduler: Scheduler) -> None:
        """Close it, which is what ends the server, as soon as the cluster is lost."""
        asyncio.run_coroutine_threadsafe(self._watch(scheduler), self._loop)

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
        """Ask a replica, and where it dies another one.

        Which of a replica's clips was the cause is not known: they are begun again one after
        another, so that it meets none of the others a second time.
        """
        deaths = 0
        for _ in range(TRIES):
            async with self._again if deaths else nullcontext():
                begun, error = await self._ask(clip)
            if error is None:
                return
            deaths += begun
            if deaths == DEATHS:
                break
            await asyncio.sleep(PAUSE)
        told = f"no replica made it, {deaths} died meanwhile: {str(error)[:200]}"
        clip.outcome = RuntimeError(told)
        self._news.set()

    async def _ask(self, clip: Remote) -> tuple[bool, Exception | None]:
        """Whether a replica began the clip, and, where it was not made, why."""
        stream, begun = self._handle.make.remote(clip.sampling), False
        try:
            async for kind, value in stream:
                begun, self._heard = True, time.monotonic()
                if kind == "step":
                    clip.told = max(clip.told, value)
                else:
                    clip.outcome = torch.tensor(value) if kind == "frames" else value
                self._news.set()
            return begun, None
        except asyncio.CancelledError:
            stream.cancel()
            raise
        except Exception as error:  # of Ray's: those of a clip are told as an outcome
            return begun, error

    async def _watch(self, scheduler: Scheduler) -> None:
        host, _, port = self._head.rpartition(":")
        answered, reason = time.monotonic(), ""
        while not reason:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                connecting = asyncio.open_connection(host.strip("[]"), int(port))
                _, writer = await asyncio.wait_for(connecting, HEAD_SECONDS / 3)
                writer.close()
                answered = time.monotonic()
            except OSError:  # TimeoutError among them
                pass
            if time.monotonic() - answered > HEAD_SECONDS:
                reason = f"nothing answers at {self._head}"
            elif self._clips and time.monotonic() - self._heard > SILENT_SECONDS:
                reason = f"no replica has answered for {SILENT_SECONDS:g} s"
        self.is_lost = True
        logging.error("the Ray cluster is lost: %s", reason)
        scheduler.is_broken = True
        await asyncio.to_thread(scheduler.close, 0)


@contextmanager
def replicas(
    folder: Path, dtype: str, place: Layout, max_batch: int | None, name: str
) -> Iterator[Replicas]:
    """Replicas of the pipeline in a folder on the cluster that is connected, from one to as many as
    there is room for, and an engine that sends clips to them. ValueError where they do not start.

    max_batch: clips that each makes at a time, None for what its memory takes; name: of the
    application on the cluster.
    """
    import ray
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
    head = ray.get_runtime_context().gcs_address
    engine = Replicas(handle, each * place.actors, head)
    try:
        yield engine
    finally:
        engine.close()
        if not engine.is_lost:
            serve.delete(name)
