"""What the server does, free of HTTP: fields in, jobs to the scheduler, finished clips to disk."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import asdict
from queue import SimpleQueue

from gentron_fast.media import contact_sheet, encode_image, read_video
from gentron_fast.serving import DeadlinePassed, Job, Request, SchedulerClosed
from gentron_fast.serving.fields import (
    Limits,
    ServedModel,
    Wanted,
    WrongField,
    wanted_images,
    wanted_video,
)
from gentron_fast.serving.metrics import Metrics
from gentron_fast.serving.store import ClipStore
from gentron_fast.solvers import SOLVERS

WRITE_SECONDS = 10  # for the clips that are done when all else has ended
FAULT = "a fault of the server, which its log tells"


class Service:
    """Clips and images of one scheduler. Any thread may call any method.

    fps: frames a second of the clips.
    """

    def __init__(self, scheduler, model: ServedModel, store: ClipStore, limits: Limits, fps: int):
        self.scheduler, self.model, self.store = scheduler, model, store
        self.limits, self.fps = limits, fps
        self.metrics = Metrics(scheduler)
        self.started = int(time.time())
        self.is_stopping = self.is_stopped = False
        self._jobs: dict[str, Job] = {}
        # Encoding a clip takes milliseconds in which the scheduler's thread goes on.
        self._ended: SimpleQueue[tuple[str, Job] | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="writer", daemon=True)
        self._writer.start()

    @property
    def is_broken(self) -> bool:
        """Whether the scheduler ended by itself, of a fault: nothing more is made."""
        return self.scheduler.is_broken

    def make_video(self, values: dict) -> dict:
        """Begin a clip; its record. WrongField, QueueFull, SchedulerClosed; OSError where it could
        not be kept."""
        wanted = wanted_video(values, self.model, self.limits, self.fps)
        job = self._submit(wanted.request)
        try:
            record = self.store.add(
                model=self.model.name,
                prompt=wanted.request.prompt,
                seconds=f"{wanted.request.frames / self.fps:g}",
                size=wanted.settings["size"],
                settings=wanted.settings,
                fps=self.fps,
                warnings=job.warnings,
            )
        except OSError:
            job.cancel()
            raise
        self._jobs[record["id"]] = job
        job.add_done_callback(lambda job: self._ended.put((record["id"], job)))
        return record

    def _submit(self, request: Request) -> Job:
        try:
            return self.scheduler.submit(request)
        except ValueError as error:
            raise WrongField(None, str(error)) from None

    def _write(self) -> None:
        while ended := self._ended.get():
            self._end(*ended)

    def _end(self, clip_id: str, job: Job) -> None:
        """Keep what became of a clip."""
        try:
            self.store.finish(clip_id, job.result(0), self.fps)
            self.metrics.took("video", time.time() - job.created_at)
        except Exception as error:
            self.log(f"the clip {clip_id}", error)
            try:
                self.store.fail(clip_id, *told(error))
            except Exception:
                logging.exception("that the clip %s failed could not be kept", clip_id)
        finally:
            del self._jobs[clip_id]

    def log(self, what: str, error: Exception) -> None:
        """Log the failure of a clip or an image, where it is the server's fault, for those who
        watch over it: its client is told what `told` says."""
        if not isinstance(error, (CancelledError, DeadlinePassed, SchedulerClosed)):
            logging.error("%s failed", what, exc_info=error)

    def video(self, clip_id: str) -> dict | None:
        """A clip's record as of now; None where there is none."""
        job = self._jobs.get(clip_id)
        record = self.store.get(clip_id)
        if record is None or job is None or record["completed_at"]:
            return record
        step, steps = job.progress
        status = "queued" if job.state == "queued" else "in_progress"
        return record | {"status": status, "progress": 100 * step // steps}

    def videos(self, after: str | None, limit: int, newest_first: bool) -> tuple[list[dict], bool]:
        """The same of many: `ClipStore.page`."""
        records, more = self.store.page(after, limit, newest_first)
        return [self.video(record["id"]) or record for record in records], more

    def remove(self, clip_id: str) -> bool:
        """Remove a clip; one that is not finished is made no further. False where there is none."""
        if job := self._jobs.get(clip_id):
            job.cancel()
        return self.store.remove(clip_id)

    def picture(self, clip_id: str, sheet: bool) -> tuple[bytes, str]:
        """A finished clip's first frame as a webp, or all its frames on one jpeg; and its type."""
        frames, _ = read_video(self.store.path(clip_id))
        kind, picture = ("jpeg", contact_sheet([frames])) if sheet else ("webp", frames[0])
        return encode_image(picture, kind), f"image/{kind}"

    def about_model(self) -> dict:
        """The model as OpenAI lists it, with what is taken where a request says nothing, and the
        most that it may ask for."""
        height, width = self.model.size
        return {
            "id": self.model.name,
            "object": "model",
            "created": self.started,
            "owned_by": "gentron_fast",
            "makes_video": self.model.makes_video,
            "defaults": asdict(self.model.defaults)
            | {"frames": self.model.frames, "size": f"{width}x{height}"},
            "limits": asdict(self.limits),
            "solvers": SOLVERS,
            "distilled": self.model.distilled,
            "fps": self.fps,
        }

    def make_images(self, values: dict, done: Callable[[], None]) -> tuple[Wanted, list[Job]]:
        """Begin images, all of them or, where the queue has no room, none.

        done: called once for each, from another thread, when it is there or has failed.
        """
        wanted = wanted_images(values, self.model, self.limits)
        jobs = []
        try:
            for request in wanted.requests():
                jobs.append(self._submit(request))
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        for job in jobs:
            job.add_done_callback(lambda _: done())
        return wanted, jobs

    def sweep(self) -> None:
        try:
            self.store.sweep()
        except OSError:
            logging.exception("old clips could not be removed")

    def stop(self, seconds: float) -> None:
        """Take nothing more, finish what can be within so many seconds and hand back the rest as
        failed; `is_stopped` is true then. Called again, the shorter time counts.

        What the disk has not taken WRITE_SECONDS later is told as failed by the next start.
        """
        self.is_stopping = True

        def end() -> None:
            self.scheduler.close(seconds)
            self._ended.put(None)
            self._writer.join(WRITE_SECONDS)
            self.is_stopped = True

        threading.Thread(target=end, name="stop", daemon=True).start()


def told(error: BaseException) -> tuple[str, str]:
    """A failure's code and message."""
    if isinstance(error, CancelledError):
        return "cancelled", "the clip was cancelled"
    if isinstance(error, SchedulerClosed):
        return "server_stopped", "the server was stopped before it was done: ask again"
    if isinstance(error, DeadlinePassed):
        return "deadline_passed", str(error)
    if isinstance(error, ValueError):  # of the model: the latents are not finite
        return "generation_failed", str(error)
    return "generation_failed", FAULT
