"""What a server on Ray does where replicas die or the cluster is lost, on a stand-in for Ray."""

import asyncio
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gentron_fast import GenTronPipeline
from gentron_fast.serving import Request, Scheduler, SchedulerClosed, replicas
from gentron_fast.serving.engine import Engine
from gentron_fast.web import bind

# The scheduler's thread ends of the fault that a test puts into it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
SHAPE = (4, 64, 64, 3)
WAIT = 60  # seconds, for what comes in far fewer


class Stream:
    """A clip in a replica, as Ray Serve's handle gives it."""

    def __init__(self, handle, sampling):
        self.handle, self.sampling = handle, sampling

    def cancel(self):
        pass

    async def __aiter__(self):
        deaths = self.handle.deaths
        await self.handle.is_there.wait()
        yield "step", 0
        for step in range(len(self.sampling.table.timesteps)):
            await asyncio.sleep(0.01)
            self.handle.deaths += self.sampling.prompts == ["deadly"] and step == 1
            if self.handle.deaths > deaths:
                raise ConnectionError("the replica died")
            yield "step", step + 1
        yield "frames", np.zeros(SHAPE, np.uint8)


class Handle:
    """One replica, that the prompt "deadly" kills with all that it is making."""

    def __init__(self):
        self.deaths, self.is_there = 0, asyncio.Event()
        self.is_there.set()
        self.make = SimpleNamespace(remote=lambda sampling: Stream(self, sampling))

    def options(self, **_):
        return self

    def shutdown(self):
        pass


@pytest.fixture
def handle(monkeypatch):
    for name, seconds in {"PAUSE": 0.01, "WATCH_SECONDS": 0.01}.items():
        monkeypatch.setattr(replicas, name, seconds)
    return Handle()


@pytest.fixture
def head():
    listening = bind("127.0.0.1", 0)
    listening.listen()
    yield listening
    listening.close()


@pytest.fixture
def scheduler(handle, head, tiny_pipeline_folder):
    engine = replicas.Replicas(handle, 4, f"127.0.0.1:{head.getsockname()[1]}")
    pipeline = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    scheduler = Scheduler(pipeline, engine=engine)
    engine.watch(scheduler)
    yield scheduler
    scheduler.close(0)
    engine.close()


def test_a_clip_that_kills_its_replica_fails_and_its_neighbours_do_not(scheduler, handle):
    prompts = ["a star", "deadly", *["a star"] * 5]
    jobs = [scheduler.submit(Request(prompt, steps=5)) for prompt in prompts]
    with pytest.raises(RuntimeError, match="2 died meanwhile: the replica died"):
        jobs.pop(1).result(WAIT)
    assert all(job.result(WAIT).shape == SHAPE for job in jobs)
    assert handle.deaths == 2


def test_a_cluster_whose_head_is_lost_ends_the_scheduler(scheduler, head, monkeypatch, caplog):
    monkeypatch.setattr(replicas, "HEAD_SECONDS", 0.1)
    assert scheduler.submit(Request("a star", steps=2)).result(WAIT).shape == SHAPE
    time.sleep(0.3)
    assert scheduler.submit(Request("a star", steps=2)).result(WAIT).shape == SHAPE
    long = scheduler.submit(Request("a star", steps=1000))
    head.close()
    with pytest.raises(SchedulerClosed):
        long.result(WAIT)
    with pytest.raises(SchedulerClosed):
        scheduler.submit(Request("a star"))
    assert "the Ray cluster is lost: nothing answers at 127.0.0.1:" in caplog.text


def test_a_cluster_without_replicas_ends_the_scheduler(scheduler, handle, monkeypatch, caplog):
    handle.is_there.clear()
    monkeypatch.setattr(replicas, "SILENT_SECONDS", 0.1)
    time.sleep(0.3)  # nobody is asked, nobody answers
    with pytest.raises(SchedulerClosed):
        scheduler.submit(Request("a star")).result(WAIT)
    assert "the Ray cluster is lost: no replica has answered for 0.1 s" in caplog.text


def words(replica, **changed) -> list:
    """What a replica tells of a clip."""
    sampling = replica.scheduler.pipeline.sampling("a star", steps=2, **changed)

    async def told():
        return [word async for word in replica.make(sampling)]

    return asyncio.run(told())


def test_a_replica_whose_scheduler_broke_ends_its_process(tiny_pipeline_folder, monkeypatch):
    replica = replicas.Replica(tiny_pipeline_folder, "float32", "cpu", torch.get_num_threads(), 1)
    told = words(replica)
    assert told[0] == ("step", 0) and told[-1][0] == "frames" and told[-1][1].shape == SHAPE

    def broken(*_):
        raise RuntimeError("a device that does not work")

    monkeypatch.setattr(Engine, "step", broken)
    (_, error) = words(replica)[-1]
    assert str(error) == "a device that does not work"
    monkeypatch.setattr(Engine, "turn", broken)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for _ in range(2):  # in the middle of a clip, and before it
        with pytest.raises(SystemExit):
            words(replica)
