"""A server for tests: the command in a process of its own, or the application in a thread, above a
stand-in for the scheduler that the test itself moves on."""

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path

import torch

from gentron_fast.config import SamplingDefaults
from gentron_fast.serving import Job, Progress, QueueFull, SchedulerClosed
from gentron_fast.serving.app import application
from gentron_fast.serving.fields import Limits, ServedModel
from gentron_fast.serving.server import Server
from gentron_fast.serving.service import Service
from gentron_fast.serving.store import ClipStore
from gentron_fast.web import address, bind

MODEL = ServedModel("tiny", True, 4, (64, 48), SamplingDefaults(steps=10, lambda_t=3.0))
LIMITS = Limits(frames=16, steps=20, side=96, prompt=100, body=2000, images=4)


class StandIn:
    """As the scheduler; `is_quick`: what is submitted is done at once, else when the test says."""

    def __init__(self, queue_size: int = 4, is_quick: bool = True):
        self.queue_size, self.is_quick = queue_size, is_quick
        self.jobs: list[Job] = []
        self.rejected, self.is_closed, self.is_broken = 0, False, False

    def submit(self, request) -> Job:
        if self.is_closed:
            raise SchedulerClosed("the scheduler is closed")
        if request.height % 16 or request.width % 16:
            raise ValueError("height and width must be multiples of 16")
        if len(self.waiting()) >= self.queue_size:
            self.rejected += 1
            raise QueueFull(len(self.waiting()), 6.2)
        warnings = ["the model has never seen: orange"] if "orange" in request.prompt else []
        job = Job(request, request.steps, self._drop_cancelled, warnings)
        self.jobs.append(job)
        if self.is_quick:
            self.end(job)
        return job

    def waiting(self) -> list[Job]:
        return [job for job in self.jobs if job.state in ("queued", "running")]

    def advance(self, job: Job, step: int) -> None:
        job.start()
        job.progress = Progress(step, job.progress.steps)

    def end(self, job: Job, outcome=None) -> None:
        self.advance(job, job.progress.steps)
        job.finish(self.frames(job.request) if outcome is None else outcome)

    @staticmethod
    def frames(request) -> torch.Tensor:
        """A clip whose shade is its seed, brighter from frame to frame."""
        shades = torch.arange(request.frames, dtype=torch.uint8) * 8 + request.seed % 64
        return shades[:, None, None, None].repeat(1, request.height, request.width, 3)

    def _drop_cancelled(self) -> None:
        for job in self.waiting():
            if job.is_cancel_asked:
                job.finish(CancelledError())

    def close(self, timeout) -> None:
        self.is_closed = True
        for job in self.waiting():
            job.finish(SchedulerClosed("the scheduler was closed"))

    def stats(self) -> dict:
        states = [job.state for job in self.jobs]
        return {
            "queue_length": states.count("queued"),
            "batch": states.count("running"),
            "max_batch": 1,
            "submitted": len(states),
            **{state: states.count(state) for state in ("done", "failed", "cancelled")},
            "rejected": self.rejected,
            "steps": sum(job.progress.step for job in self.jobs),
            "steps_per_second": 1.5,
            "latency_p50": None,
            "latency_p95": None,
            "memory_bytes": 2**20,
        }


def make_service(folder: Path, scheduler=None, model=MODEL, keep=3600.0, most=100) -> Service:
    store = ClipStore(folder, keep, most)
    return Service(scheduler or StandIn(), model, store, LIMITS, fps=4)


@contextmanager
def served(service: Service, token: str | None = None):
    """The application on uvicorn, in a thread; yields its address."""
    listening = bind("127.0.0.1", 0)
    listening.listen()
    server = Server(application(service, token), service, grace=5)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield address("127.0.0.1", listening, None)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def served_process(*options: str):
    """`gentron_fast.serve` in a process of its own; yields it and its address."""
    command = [sys.executable, "-m", "gentron_fast.serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        yield process, lines[-1].split()[1]
    finally:
        process.kill()
        process.wait()


def call(url: str, body=None, method=None, **headers):
    """Status, headers and JSON or bytes of one request; body: bytes, or what JSON holds."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        headers.setdefault("Content-Type", "application/json")
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, body, names, method=method)
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        data = response.read()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, response.headers, json.loads(data) if is_json else data
