"""The scheduler: a bounded queue, and a thread that makes what is in it."""

import atexit
import math
import threading
import time
import traceback
from collections import Counter, deque
from concurrent.futures import CancelledError

import torch
from torch import Tensor

from gentron_fast.memory import peak_memory
from gentron_fast.pipeline import GenTronPipeline, Sampling
from gentron_fast.serving.engine import Clip, Engine, measured
from gentron_fast.serving.job import DeadlinePassed, Job, Progress
from gentron_fast.serving.request import Request
from gentron_fast.threads import release_workers

WINDOW = 10.0  # seconds over which the rate of steps is taken
LATENCIES = 512  # of the newest clips, that percentiles are taken of
MOST_FAULTS = 5  # clips one after the other that faults end, where nothing works any more
GIVEN_BACK = "the scheduler was closed before the clip was made"


class QueueFull(RuntimeError):
    """The queue is full; retry_after: seconds until a place should be free."""

    def __init__(self, length: int, retry_after: float):
        super().__init__(f"the queue is full: {length} requests wait")
        self.retry_after = retry_after


class SchedulerClosed(RuntimeError):
    """The scheduler was closed before the clip was made."""


NO_FAULTS = (ValueError, CancelledError, DeadlinePassed, SchedulerClosed)  # of a request alone


class Scheduler:
    """Makes what is submitted, in a thread of its own. Every method may be called from any thread.

    The pipeline is the scheduler's as long as it is open: nobody else may call it. is_broken: it
    ended by itself, of a fault: one of its own, one of the device, or so many clips failed one
    after the other that no other would be made.
    """

    def __init__(
        self,
        pipeline: GenTronPipeline,
        *,
        queue_size: int = 64,
        max_batch: int | None = None,
        engine=None,
    ):
        """queue_size: how many requests may wait; max_batch: how many clips of one shape take a
        step together, clips of the pipeline's own frames and size: of larger ones fewer. None: as
        many as there is memory for, but no more than `engine.MOST_CLIPS` of the device. Of two
        shapes there are as many each, where there is memory for them. engine: what makes the clips
        in the pipeline's place, which then only checks what is asked for."""
        self.pipeline, self.queue_size = pipeline, queue_size
        if engine is None:
            memory = measured(pipeline)
            engine = Engine(pipeline, max_batch or memory.max_batch, memory)
        self.max_batch, self._engine = engine.max_batch, engine
        self._changed = threading.Condition()
        self._queue: deque[tuple[Job, Sampling]] = deque()
        self._jobs: dict[Clip, Job] = {}
        self._closing, self._give_back_at = False, math.inf
        self._counts, self._faults, self.is_broken = Counter(), 0, False
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._recent: deque[tuple[float, int]] = deque()
        release_workers()  # of this thread: beside them the scheduler's could not spin
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()
        # A thread in the middle of a step would outlive what it needs.
        atexit.register(self.close, 0)

    def submit(self, request: Request) -> Job:
        """Put a request into the queue.

        ValueError, in one line, where it is wrong or takes more memory than there is; QueueFull,
        whose retry_after says in how many seconds to come again; SchedulerClosed.
        """
        sampling = request.sampling(self.pipeline)
        self._engine.check(sampling.shape)
        remarks = self.pipeline.remarks(sampling)
        job = Job(request, len(sampling.table.timesteps), self._wake, remarks)
        with self._changed:
            if self._closing:
                raise SchedulerClosed("the scheduler is closed")
            if len(self._queue) >= self.queue_size:
                self._counts["rejected"] += 1
                raise QueueFull(len(self._queue), self._seconds_to_a_place())
            self._queue.append((job, sampling))
            self._counts["submitted"] += 1
            self._changed.notify()
        return job

    def stats(self) -> dict:
        """Now: queue_length, batch (clips being made), max_batch, steps_per_second (each clip's
        steps counted, over the last 10 s), memory_bytes (the most held so far, on the device, or by
        the process on the CPU). Since the start: submitted, done, failed, cancelled, rejected and
        steps. Of the newest 512 clips: latency_p50 and latency_p95, seconds from submission to
        frames, None before the first."""
        with self._changed:
            counts = {name: self._counts[name] for name in _COUNTS}
            return {
                "queue_length": len(self._queue),
                "batch": len(self._jobs),
                "max_batch": self.max_batch,
                **counts,
                "steps_per_second": self._steps_per_second(),
                "latency_p50": _percentile(self._latencies, 0.50),
                "latency_p95": _percentile(self._latencies, 0.95),
                "memory_bytes": peak_memory(self.pipeline.device),
            }

    def close(self, timeout: float | None = None) -> None:
        """Take nothing more, finish what was submitted, and end the thread.

        What is not there after `timeout` seconds (None: however long it takes) is given back: its
        job fails with SchedulerClosed. Once closed, another call does nothing.
        """
        with self._changed:
            self._closing = True
            if timeout is not None:
                self._give_back_at = min(self._give_back_at, time.monotonic() + timeout)
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_unwanted()
                self._admit()
                if self._jobs:
                    self._step(self._engine.turn())
        except BaseException:  # a fault of ours, or of the device, leaves nobody waiting
            with self._changed:
                self.is_broken = self._closing = True
                left = [*self._jobs.values(), *(job for job, _ in self._queue)]
                self._jobs.clear()
                self._queue.clear()
            for job in left:
                self._finish(job, SchedulerClosed(GIVEN_BACK))
            raise

    def _wait_for_work(self) -> bool:
        """False where the scheduler is closed and nothing is left to do."""
        with self._changed:
            while not (self._queue or self._jobs):
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _drop_unwanted(self) -> None:
        """Leave out what was cancelled, is too late, or is given back."""
        closed = None
        if time.monotonic() >= self._give_back_at:
            closed = SchedulerClosed(GIVEN_BACK)
        with self._changed:
            queued = list(self._queue)
        for entry in queued:
            if reason := entry[0].reason_to_drop() or closed:
                with self._changed:
                    self._queue.remove(entry)
                self._finish(entry[0], reason)
        for clip, job in list(self._jobs.items()):
            if reason := job.reason_to_drop() or closed:
                self._leave(clip, reason)

    def _admit(self) -> None:
        """Take from the queue what there is room for: who came first goes first. Whoever waits only
        for a place in a step of his own shape keeps no other shape waiting."""
        while (entry := self._next()) is not None:
            job, sampling = entry
            job.start()
            try:
                clip = self._engine.join(sampling)
            except Exception as error:
                self._finish(job, without_locals(error))
            else:
                with self._changed:
                    self._jobs[clip] = job

    def _next(self) -> tuple[Job, Sampling] | None:
        with self._changed:
            for entry in self._queue:
                if not self._engine.has_room(entry[1].shape):
                    return None
                if self._engine.step_takes(entry[1].shape):
                    self._queue.remove(entry)
                    return entry
        return None

    def _step(self, clips: list[Clip]) -> None:
        """A step of clips of one shape. Where they fail together each is tried alone, so that
        one's fault, or a lack of memory, ends no other."""
        fault = None
        try:
            self._engine.step(clips)
        except Exception as error:
            fault = without_locals(error)
        if fault is not None:
            if len(clips) == 1:
                return self._leave(clips[0], fault)
            for clip in clips:
                self._step([clip])
            return
        with self._changed:
            self._counts["steps"] += len(clips)
            self._recent.append((time.monotonic(), len(clips)))
            self._forget_old_steps()
        for clip, job in self._jobs.items():
            job.progress = Progress(clip.made, job.progress.steps)
        for clip in clips:
            if clip.is_done:
                self._leave(clip, self._jobs[clip].reason_to_drop() or self._frames(clip))

    def _frames(self, clip: Clip) -> Tensor | Exception:
        try:
            return self._engine.frames(clip)
        except Exception as error:
            return without_locals(error)

    def _leave(self, clip: Clip, outcome: Tensor | BaseException) -> None:
        self._engine.leave(clip)
        with self._changed:
            job = self._jobs.pop(clip)
        self._finish(job, outcome)

    def _finish(self, job: Job, outcome: Tensor | BaseException) -> None:
        if isinstance(outcome, Tensor):
            job.progress = Progress(job.progress.steps, job.progress.steps)
            # Decoding takes its time too.
            outcome = job.reason_to_drop() or outcome
        with self._changed:
            if isinstance(outcome, Tensor):
                self._latencies.append(time.monotonic() - job.submitted)
        job.finish(outcome)
        with self._changed:
            self._counts[job.state] += 1
        if isinstance(outcome, Tensor):
            self._faults = 0
        elif not isinstance(outcome, NO_FAULTS):
            self._faults += 1
            if self.pipeline.device.type == "cuda":  # where it failed for good, this fails
                torch.cuda.synchronize(self.pipeline.device)
            if self._faults >= MOST_FAULTS:
                raise RuntimeError(f"{self._faults} clips failed, none was made") from outcome

    def _forget_old_steps(self) -> None:
        start = time.monotonic() - WINDOW
        while self._recent and self._recent[0][0] < start:
            self._recent.popleft()

    def _steps_per_second(self) -> float:
        self._forget_old_steps()
        return sum(count for _, count in self._recent) / WINDOW

    def _seconds_to_a_place(self) -> float:
        """Seconds until the next clip should be done, at the rate of steps so far; at least 1."""
        rate = self._steps_per_second()
        left = [job.progress.steps - job.progress.step for job in self._jobs.values()]
        return max(1.0, min(left, default=0) * len(left) / rate if rate else 1.0)


_COUNTS = ("submitted", "done", "failed", "cancelled", "rejected", "steps")


def without_locals(error: Exception) -> Exception:
    """The error, told with the lines it came from, and without what was held there: tensors, that
    others need the memory of, and a clip's place."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return error


def _percentile(values, share: float) -> float | None:
    """Of the nearest rank."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else None
