"""A request on its way through the scheduler, as its client sees it."""

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import NamedTuple

from torch import Tensor

from gentron_fast.serving.request import Request


class DeadlinePassed(RuntimeError):
    """The clip was not there within the request's deadline."""


class Progress(NamedTuple):
    """Denoising steps behind a job, of how many."""

    step: int
    steps: int


class Job:
    """A submitted request. Every method may be called from any thread.

    id: 32 random hex digits. warnings: what is unusual about the request, a line each. state:
    "queued", "running", "done", "failed" or "cancelled". progress: (step, steps). error: what it
    failed with, else None. created_at, completed_at: Unix seconds; completed_at is None until the
    state is one of the last three.
    """

    def __init__(
        self, request: Request, steps: int, wake: Callable[[], None], warnings: Sequence[str] = ()
    ):
        """wake: called when the scheduler should look at its jobs again."""
        self.id, self.request, self.warnings = uuid.uuid4().hex, request, list(warnings)
        self.progress = Progress(0, steps)
        self.created_at, self.completed_at = time.time(), None
        self.submitted = time.monotonic()
        self.is_cancel_asked = False
        self._started = False
        self._future, self._wake = Future(), wake

    @property
    def state(self) -> str:
        if not self._future.done():
            return "running" if self._started else "queued"
        if self._future.cancelled():
            return "cancelled"
        return "done" if self._future.exception() is None else "failed"

    @property
    def error(self) -> Exception | None:
        done = self._future.done() and not self._future.cancelled()
        return self._future.exception() if done else None

    def cancel(self) -> bool:
        """Take the job out of the queue, or stop it behind the step that runs. False where it is
        done or failed already; nothing comes of calling it twice."""
        if self._future.done():
            return self._future.cancelled()
        self.is_cancel_asked = True
        self._wake()
        return True

    def result(self, timeout: float | None = None) -> Tensor:
        """Frames uint8 (F, H, W, 3), as soon as they are there.

        TimeoutError where they are not within `timeout` seconds; CancelledError of
        concurrent.futures where the job was cancelled; else what it failed with: DeadlinePassed,
        SchedulerClosed, or ValueError for latents or pixels that are not finite.
        """
        return self._future.result(timeout)

    def add_done_callback(self, function: Callable[["Job"], None]) -> None:
        """Call function(job), in the scheduler's thread, once the job is done, failed or cancelled;
        at once where it is. It must return soon: no step runs meanwhile."""
        self._future.add_done_callback(lambda _: function(self))

    def start(self) -> None:
        self._started = True

    def finish(self, outcome: Tensor | BaseException) -> None:
        """Of the scheduler: frames, a CancelledError, or what the job failed with."""
        self.completed_at = time.time()
        if isinstance(outcome, CancelledError):
            self._future.cancel()
        elif isinstance(outcome, BaseException):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)

    def reason_to_drop(self) -> BaseException | None:
        """Why no further step is to run, or None."""
        if self.is_cancel_asked:
            return CancelledError()
        limit = self.request.deadline
        if limit is not None and time.monotonic() - self.submitted > limit:
            return DeadlinePassed(
                f"the deadline of {limit:g} s passed at step {self.progress.step} of "
                f"{self.progress.steps}"
            )
        return None
