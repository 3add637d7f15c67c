"""The scheduler: what is made equals what the pipeline makes; queue, cancelling, deadline, end."""

import itertools
import random
import subprocess
import sys
import threading
import traceback
import weakref
from concurrent.futures import CancelledError
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from families import relative

from gentron_fast import GenTronPipeline
from gentron_fast.diffusion import portable_noise
from gentron_fast.guidance import GuidedBatch, PreparedText, guided_prediction
from gentron_fast.memory import held_at_most
from gentron_fast.serving import (
    DeadlinePassed,
    QueueFull,
    Request,
    Scheduler,
    SchedulerClosed,
    engine,
)
from gentron_fast.solvers import SOLVERS, solver_step

SMALL = {"steps": 3, "frames": 2, "height": 32, "width": 32}
WAIT = 60  # seconds, for what comes in far fewer


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder):
    return GenTronPipeline.from_pretrained(tiny_pipeline_folder)


@pytest.fixture
def scheduler(pipeline):
    scheduler = Scheduler(pipeline, queue_size=2, max_batch=1)
    yield scheduler
    scheduler.close(0)


@pytest.fixture
def held(scheduler, monkeypatch):
    """The scheduler stands in a first job's first step until the event is set."""
    go, inside, step = threading.Event(), threading.Event(), scheduler._step

    def held_step(*args):
        inside.set()
        assert go.wait(WAIT)
        return step(*args)

    monkeypatch.setattr(scheduler, "_step", held_step)
    job = scheduler.submit(Request("a star", **SMALL))
    assert inside.wait(WAIT)
    yield job, go
    go.set()


def test_a_clip_is_the_pipelines(scheduler, pipeline):
    request = Request("a red circle", negative_prompt="a star", seed=5, solver="ddpm", **SMALL)
    job, seen = scheduler.submit(request), []
    frames = job.result(WAIT)
    job.add_done_callback(seen.append)
    expected = pipeline(
        "a red circle",
        negative_prompt="a star",
        seed=5,
        solver="ddpm",
        steps=3,
        frames=2,
        size=(32, 32),
        progress=False,
    ).frames[0]
    assert (frames.int() - expected.int()).abs().max() <= 1
    assert job.state == "done" and job.progress == (3, 3) and job.error is None
    assert seen == [job] and job.created_at <= job.completed_at
    stats = scheduler.stats()
    assert (stats["submitted"], stats["done"], stats["steps"]) == (1, 1, 3)
    assert stats["latency_p50"] == stats["latency_p95"] > 0


def made_at_random(pipeline, monkeypatch, count=14):
    """[(request, frames, latents)] of clips that came at random between the steps of others, of
    two shapes; some beside them were cancelled. The same at every call."""
    pick, coming, jobs, latents = random.Random(3), [], [], {}
    shapes = [{"frames": 2, "height": 32, "width": 32}, {"frames": 1, "height": 32, "width": 48}]
    for seed in range(count):
        own = {
            "steps": pick.randint(1, 6),
            "solver": pick.choice(SOLVERS),
        }
        own |= {"lambda_m": pick.choice((1.0, 1.2)), "rescale": pick.choice((0.0, 0.7))}
        own |= {"negative_prompt": pick.choice((None, "a star")), **pick.choice(shapes)}
        prompt = pick.choice(("a red circle", "a blue star moving left"))
        coming.append(Request(prompt, seed=seed, **own))
    scheduler, ticks, came = Scheduler(pipeline, max_batch=3), itertools.count(), threading.Event()
    made = scheduler._engine
    turn, frames = made.turn, made.frames

    def come():
        while coming and (pick.random() < 0.3 or len(jobs) == len(latents) + 1):
            jobs.append(scheduler.submit(coming.pop(0)))
            if pick.random() < 0.15:
                jobs[-1].cancel()
                latents[jobs[-1].request.seed] = None
        if not coming:
            came.set()
        return turn()

    def keep(clip):
        latents[clip.seed] = clip.latents
        return frames(clip)

    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(made, "turn", come)
    monkeypatch.setattr(made, "frames", keep)
    with scheduler._changed:
        jobs.append(scheduler.submit(coming.pop(0)))
    assert came.wait(WAIT)
    scheduler.close()
    assert {job.state for job in jobs} == {"done", "cancelled"}
    assert made.clips == [] and len(made._texts) == 1  # the null text
    done = [job for job in jobs if job.state == "done"]
    assert len(done) >= 9
    return [(job.request, job.result(), latents[job.request.seed]) for job in done]


def quieter(folder, dtype):
    """The pipeline, its latents within bounds, as those of random weights are not."""
    pipeline = GenTronPipeline.from_pretrained(folder, dtype)
    with torch.no_grad():
        pipeline.transformer.final.linear.weight.mul_(0.125)
    return pipeline


def test_clips_that_come_and_go_are_the_pipelines(tiny_pipeline_folder, monkeypatch):
    pipeline = quieter(tiny_pipeline_folder, torch.float32)
    for request, frames, latents in made_at_random(pipeline, monkeypatch):
        own = asdict(request)
        own["size"] = own.pop("height"), own.pop("width")
        own.pop("deadline")
        wanted = pipeline(own.pop("prompt"), progress=False, **own)
        assert relative(latents, wanted.latents) <= 1e-5
        assert (frames.int() - wanted.frames[0].int()).abs().max() <= 1


def test_clips_that_come_and_go_in_bf16_are_no_worse_than_plain_bf16(
    tiny_pipeline_folder, monkeypatch
):
    pipeline = quieter(tiny_pipeline_folder, torch.bfloat16)
    exact = quieter(tiny_pipeline_folder, torch.float64).transformer
    exact.load_state_dict(pipeline.transformer.state_dict())
    for block, rounded in zip(exact.blocks, pipeline.transformer.blocks, strict=True):
        block.temporal_attention.positions = rounded.temporal_attention.positions.double()

    @torch.no_grad()
    def plain(model, request):
        sampling, dtype = request.sampling(pipeline), model.patch_embed.weight.dtype
        text, null_text = (
            pipeline.encode(own).to(dtype=dtype) for own in (sampling.prompts, sampling.negatives)
        )
        scales = sampling.lambda_t[:, 0], sampling.lambda_m[:, 0]
        x, x0 = portable_noise(sampling.shape, sampling.seeds, 0).double(), None
        for step, timestep in enumerate(sampling.table.timesteps):
            noise = portable_noise(sampling.shape, sampling.seeds, step + 1)
            own = text, null_text, *(scale[step] for scale in scales), sampling.rescale
            guided = guided_prediction(model, x.to(dtype), timestep[None], *own)
            x, x0 = solver_step(sampling.table.rows[step], x, guided, x0, noise)
        return x

    errors = torch.zeros(2, dtype=torch.float64)
    for request, _, latents in made_at_random(pipeline, monkeypatch):
        wanted = plain(exact, request)
        of_plain = plain(pipeline.transformer, request)
        errors += torch.tensor([relative(latents, wanted), relative(of_plain, wanted)])
    assert 0 < errors[0] <= 1.1 * errors[1]


def test_a_long_clip_waits_for_no_short_one_and_keeps_none_waiting(pipeline, monkeypatch):
    """Shapes take turns; what is too large for the room left goes before what came after it."""
    memory = engine.Memory(clip=10, room=25, max_batch=2)
    with monkeypatch.context() as patch:
        patch.setattr("gentron_fast.serving.scheduler.measured", lambda pipeline: memory)
        scheduler, order = Scheduler(pipeline), []
    own = pipeline.default_frames  # four frames of 64 × 64: half of the room each
    first = scheduler.submit(Request("a star", steps=60, frames=1, height=32, width=32))
    large = Request("a star", steps=2, frames=2 * own, height=64, width=64)
    jobs = [scheduler.submit(large)]
    jobs += [scheduler.submit(Request("a star", **SMALL)) for _ in range(3)]
    for job in (first, *jobs):
        job.add_done_callback(order.append)
    scheduler.close()
    assert order == [first, *jobs]
    scheduler, order = Scheduler(pipeline, max_batch=2), []
    long = scheduler.submit(Request("a star", steps=200, frames=1, height=32, width=32))
    jobs = [scheduler.submit(Request("a star", seed=seed, **SMALL)) for seed in range(4)]
    for job in (long, *jobs):
        job.add_done_callback(order.append)
    scheduler.close()
    assert order == [*jobs, long]


def test_a_full_step_keeps_no_other_shape_waiting(pipeline):
    """Of either shape as many take a step as one does; who waits for a place in his own is passed
    by the other's, and by nobody of his own."""
    scheduler, order = Scheduler(pipeline, max_batch=2), []
    made, seen = scheduler._engine, []
    of_step = made.step

    def step(clips):
        shapes = [clip.denoiser.latent_shape for clip in made.clips]
        seen.append(tuple(sorted(shapes.count(shape) for shape in set(shapes))))
        of_step(clips)

    made.step = step
    with scheduler._changed:  # all are there before the first is begun
        wide = [Request("a star", seed=seed, **SMALL | {"steps": 20}) for seed in range(3)]
        jobs = [scheduler.submit(request) for request in wide]
        images = SMALL | {"steps": 2, "frames": 1}
        jobs += [scheduler.submit(Request("a star", seed=seed, **images)) for seed in range(3)]
    for job in jobs:
        job.add_done_callback(order.append)
    scheduler.close()
    assert order == [*jobs[3:], *jobs[:3]]
    assert seen[0] == (2, 2) and max(map(sum, seen)) == 4


def test_a_clip_waits_where_memory_is_short(pipeline):
    own = engine.Engine(pipeline, 2, engine.Memory(clip=10, room=25, max_batch=2))
    image, clip = (pipeline.sampling("", frames=frames).shape for frames in (1, 4))
    assert pipeline.default_frames == 4
    for frames in (4, 1, 1):
        own.join(pipeline.sampling("a star", steps=2, frames=frames))
    assert own.has_room(image) and not own.step_takes(image)
    assert not own.has_room(clip) and own.step_takes(clip)


def test_shapes_share_the_time_and_not_the_steps(pipeline, monkeypatch):
    """Two images, four times as fast as a clip, take four steps beside one of it."""
    own, now = engine.Engine(pipeline, 4), [0.0]
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    of_step = GuidedBatch.step

    def step(batch, latents, *args):
        now[0] += len(latents) * latents.shape[2]  # a second a frame
        return of_step(batch, latents, *args)

    monkeypatch.setattr(GuidedBatch, "step", step)
    for frames in (4, 1, 1):
        own.join(pipeline.sampling("a star", steps=50, frames=frames, size=32))
    turns = []
    for _ in range(15):
        clips = own.turn()
        own.step(clips)
        turns.append(len(clips))
    assert turns.count(1) == 3 and turns.count(2) == 12


def test_a_fault_in_a_batch_ends_one_clip(pipeline, monkeypatch):
    scheduler = Scheduler(pipeline, max_batch=3)
    step = scheduler._engine.step

    def faulty(clips):
        if any(clip.seed == 1 and clip.step == 1 for clip in clips):
            raise RuntimeError("a fault")
        step(clips)

    monkeypatch.setattr(scheduler._engine, "step", faulty)
    jobs = [scheduler.submit(Request("a star", seed=seed, **SMALL)) for seed in range(3)]
    scheduler.close()
    assert [job.state for job in jobs] == ["done", "failed", "done"]
    assert str(jobs[1].error) == "a fault"


@pytest.mark.parametrize("negative", [None, "a star"])
def test_shapes_that_come_and_go_starve_no_clip(pipeline, monkeypatch, negative):
    """Images of one step, each of another size than the one before, beside a long clip."""
    own = engine.Engine(pipeline, 4)
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    others = {"negative_prompt": None if negative else "a star"}
    long = own.join(pipeline.sampling("a star", negative_prompt=negative, steps=60, size=32))
    turns = []
    for number in range(12):
        image = {"frames": 1, "size": (32, 32 + 16 * (number % 2)), "steps": 1}
        if len(own.clips) == 1:
            own.join(pipeline.sampling("a star", **image, **others))
        (clip,) = own.turn()
        own.step([clip])
        turns.append(clip)
        if clip.is_done:
            own.leave(clip)
    assert turns.count(long) == 6


def test_a_fault_before_the_step_leaves_the_others_right(pipeline, monkeypatch):
    """The modulation rows of three clips are not made, once: each is made alone all the same."""
    scheduler = Scheduler(pipeline, max_batch=3)
    fill, failed = scheduler._engine._shared.fill, []

    def short_of_memory(*args):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("once")
        fill(*args)

    monkeypatch.setattr(scheduler._engine._shared, "fill", short_of_memory)
    with scheduler._changed:  # so that the three come together
        jobs = [scheduler.submit(Request("a star", seed=seed, **SMALL)) for seed in range(3)]
    scheduler.close()
    own = {"steps": 3, "frames": 2, "size": 32, "progress": False}
    for seed, job in enumerate(jobs):
        wanted = pipeline("a star", seed=seed, **own).frames[0]
        assert (job.result().int() - wanted.int()).abs().max() <= 1


def test_what_failed_holds_no_memory(pipeline, monkeypatch):
    """Neither while the clips of a failed batch are tried alone, nor as the error of a job."""
    scheduler, held, seen = Scheduler(pipeline, max_batch=3), [], []

    def fault(batch, latents, *args):
        seen.extend(part() for part in held)
        big = torch.empty(1)
        held.append(weakref.ref(big))
        raise RuntimeError("a fault")

    monkeypatch.setattr(GuidedBatch, "step", fault)
    with scheduler._changed:
        jobs = [scheduler.submit(Request("a star", seed=seed, **SMALL)) for seed in range(3)]
    scheduler.close()
    assert len(held) == 4 and seen == [None] * (1 + 2 + 3)
    for job in jobs:
        assert any(line.name == "fault" for line in traceback.extract_tb(job.error.__traceback__))


def test_what_cannot_join_gives_its_place_back(scheduler, monkeypatch):
    noise = engine.portable_noise
    monkeypatch.setattr(engine, "portable_noise", lambda *args: 1 / 0)
    broken = scheduler.submit(Request("a star", **SMALL))
    with pytest.raises(ZeroDivisionError):
        broken.result(WAIT)
    monkeypatch.setattr(engine, "portable_noise", noise)
    assert scheduler.submit(Request("a star", **SMALL)).result(WAIT).shape == (2, 32, 32, 3)


def test_what_other_threads_read_is_locked_and_forgotten_in_time(pipeline, monkeypatch):
    scheduler, locked = Scheduler(pipeline), []

    class Jobs(dict):
        def __setitem__(self, *item):
            locked.append(scheduler._changed._is_owned())
            super().__setitem__(*item)

        def pop(self, *key):
            locked.append(scheduler._changed._is_owned())
            return super().pop(*key)

    monkeypatch.setattr(scheduler, "_jobs", Jobs())
    monkeypatch.setattr("gentron_fast.serving.scheduler.WINDOW", 0.0)
    scheduler.submit(Request("a star", **SMALL))
    scheduler.close()
    assert locked == [True, True] and len(scheduler._recent) <= 1


def test_the_largest_batch_is_measured(pipeline, monkeypatch):
    def batch(free):
        monkeypatch.setattr(engine, "free_memory", lambda device: free)
        return engine.measured(pipeline).max_batch

    assert batch(1 << 40) == engine.MOST_CLIPS["cpu"] and batch(0) == 1
    held = iter((10, 30, 50))  # by the step of one clip, of two, and by decoding
    monkeypatch.setattr(engine, "held_at_most", lambda function, device: next(held))
    assert batch(200) == (0.8 * 200 - (50 - 20)) // 20
    held = iter((10, 50))
    monkeypatch.setattr(engine, "free_memory", lambda device: 19)
    assert engine.measured(pipeline).max_batch == 1  # 15 bytes: two clips are not tried
    one = torch.empty(1000)
    assert held_at_most(lambda: (one + 1).view(10, 100).sum(), one.device) in range(4000, 4100)
    kept = []
    assert held_at_most(lambda: kept.extend(one + i for i in range(3)), one.device) == 12000


def test_the_largest_batch_is_measured_with_the_longest_texts(pipeline, monkeypatch):
    longest = engine.longest_text(pipeline)
    for name, part in longest._asdict().items():
        assert part.tokens.shape[1] == pipeline.text_encoder.max_tokens(name)
    contexts = PreparedText.of(pipeline.transformer, longest).contexts
    texts = 2 * sum(part.nbytes for own in contexts for part in own if part is not None)
    monkeypatch.setattr(pipeline, "decode", lambda latents: latents)  # takes more than a step
    with_them = engine.measured(pipeline).clip
    monkeypatch.setattr(engine, "longest_text", lambda pipeline: pipeline.encode([""]))
    assert with_them > engine.measured(pipeline).clip + texts / 2


def test_a_clip_larger_than_memory_is_refused(pipeline, monkeypatch):
    monkeypatch.setattr(engine, "free_memory", lambda device: 200 << 20)
    scheduler = Scheduler(pipeline, max_batch=1)
    wanted = r"32 frames of 256x256 pixels take [\d.]+ GiB of memory, and there are 0.156"
    with pytest.raises(ValueError, match=wanted):
        scheduler.submit(Request("a star", frames=32, height=256, width=256))
    twice = scheduler.submit(Request("a star", steps=1, frames=2 * pipeline.default_frames))
    monkeypatch.setattr(engine, "free_memory", lambda device: 0)
    with_nothing = Scheduler(pipeline)
    smallest = with_nothing.submit(Request("a star", steps=1))
    scheduler.close()
    with_nothing.close()
    assert twice.state == smallest.state == "done"


def test_a_gpu_is_a_step_ahead_and_no_more(pipeline, monkeypatch):
    """Progress and turns go by what the device has made, not by what it was given to do."""
    own, waited = engine.Engine(pipeline, 2), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.number = len(waited)

        def synchronize(self):
            waited.append(self)

        def elapsed_time(self, end):
            return 3000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    own._ahead = 1
    clip = own.join(pipeline.sampling("a star", steps=3, frames=2, size=32))
    made = []
    while not clip.is_done:
        own.step(own.turn())
        made.append((clip.step, clip.made, len(waited)))
    assert made == [(1, 0, 0), (2, 1, 1), (3, 2, 2)] and own._turns == {(4, 2, 4, 4): 6.0}
    own.frames(clip)
    assert clip.made == 3
    own.step([own.join(pipeline.sampling("a star", steps=3, frames=2, size=32))])
    own.leave(own.clips[-1])
    assert own._launched[0][1] == []  # what has left is not kept


def broken(scheduler, jobs):
    scheduler._thread.join(WAIT)
    assert scheduler.is_broken and {job.state for job in jobs} == {"failed"}
    with pytest.raises(SchedulerClosed):
        scheduler.submit(Request("a star", **SMALL))
    scheduler.close()
    return sum(isinstance(job.error, SchedulerClosed) for job in jobs)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_makes_nothing_more_ends_the_scheduler(pipeline, monkeypatch):
    scheduler = Scheduler(pipeline, max_batch=2)

    def submit(count):
        with scheduler._changed:
            return [scheduler.submit(Request("a star", seed=i, **SMALL)) for i in range(count)]

    decode, faults = pipeline.decode, iter([RuntimeError("a fault")] * 4 + [None])

    def faulty(latents):
        if error := next(faults):
            raise error
        return decode(latents)

    monkeypatch.setattr(pipeline, "decode", faulty)
    for job in submit(4):
        assert isinstance(job.error or job._future.exception(WAIT), RuntimeError)
    assert submit(1)[0].result(WAIT) is not None  # one that is made: they are counted anew
    faults = iter([ValueError("of one clip alone")] * 6 + [RuntimeError("a fault")] * 5)
    assert broken(scheduler, submit(13)) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_gpu_that_failed_for_good_ends_the_scheduler_at_once(pipeline, monkeypatch):
    scheduler = Scheduler(pipeline, max_batch=2)

    def fault(*args):
        scheduler.pipeline = SimpleNamespace(device=torch.device("cuda"))
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: 1 / 0)
    monkeypatch.setattr(GuidedBatch, "step", fault)
    with scheduler._changed:
        jobs = [scheduler.submit(Request("a star", seed=i, **SMALL)) for i in range(4)]
    monkeypatch.setattr(Request, "sampling", lambda self, pipeline: jobs[0])
    scheduler._thread.join(WAIT)
    assert scheduler.is_broken
    assert sum(isinstance(job.error, SchedulerClosed) for job in jobs) == 3


def test_a_program_that_ends_beside_an_open_scheduler_ends_well(tiny_pipeline_folder):
    program = f"""
from gentron_fast import GenTronPipeline
from gentron_fast.commandline import silence_libraries
from gentron_fast.serving import Request, Scheduler
silence_libraries()
pipeline = GenTronPipeline.from_pretrained({str(tiny_pipeline_folder)!r})
scheduler = Scheduler(pipeline, max_batch=1)
job = scheduler.submit(Request("a star", steps=1000))
while not job.progress.step:
    pass
job.add_done_callback(lambda job: print(job.error))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "the scheduler was closed before the clip was made\n"


def test_a_full_queue_tells_when_to_come_again(scheduler, held):
    job, go = held
    assert job.state == "running"
    waiting = [scheduler.submit(Request("a star", seed=seed, **SMALL)) for seed in (1, 2)]
    assert [other.state for other in waiting] == ["queued"] * 2
    with pytest.raises(QueueFull, match="2 requests wait") as refusal:
        scheduler.submit(Request("a star", **SMALL))
    assert refusal.value.retry_after >= 1
    assert scheduler.stats()["rejected"] == 1
    go.set()
    assert all(other.result(WAIT).shape == (2, 32, 32, 3) for other in waiting)


def test_cancelling_ends_a_job_at_the_next_step(scheduler, held):
    job, go = held
    waiting = scheduler.submit(Request("a star", **SMALL))
    assert job.cancel() and waiting.cancel()
    go.set()
    for cancelled in (job, waiting):
        with pytest.raises(CancelledError):
            cancelled.result(WAIT)
        assert cancelled.state == "cancelled" and cancelled.error is None
    assert job.progress == (1, 3)
    after = scheduler.submit(Request("a star", **SMALL))
    assert after.result(WAIT).dtype == torch.uint8 and not after.cancel()


def test_a_deadline_ends_what_is_late(scheduler, held):
    _, go = held
    late = scheduler.submit(Request("a star", deadline=0.01, **SMALL))
    threading.Event().wait(0.02)
    go.set()
    with pytest.raises(DeadlinePassed, match="step 0 of 3"):
        late.result(WAIT)
    assert late.state == "failed" and scheduler.stats()["failed"] == 1


@pytest.mark.parametrize("asked,state", [("deadline", "failed"), ("cancel", "cancelled")])
def test_what_is_late_or_cancelled_while_it_is_decoded_is_not_done(
    scheduler, pipeline, monkeypatch, held, asked, state
):
    job, go = held
    late = scheduler.submit(Request("a star", deadline=600, **SMALL))
    decode = pipeline.decode

    def slow(latents):
        if scheduler._jobs and late in scheduler._jobs.values():
            if asked == "cancel":
                assert late.cancel()
            else:
                late.submitted -= 600
        return decode(latents)

    monkeypatch.setattr(pipeline, "decode", slow)
    go.set()
    with pytest.raises((DeadlinePassed, CancelledError)):
        late.result(WAIT)
    scheduler.close()
    assert late.state == state and job.state == "done" and scheduler.stats()[state] == 1


def test_closing_finishes_what_was_submitted(pipeline):
    scheduler = Scheduler(pipeline)
    jobs = [scheduler.submit(Request("a star", seed=seed, **SMALL)) for seed in range(3)]
    scheduler.close()
    assert [job.state for job in jobs] == ["done"] * 3
    with pytest.raises(SchedulerClosed):
        scheduler.submit(Request("a star", **SMALL))


def test_closing_in_time_gives_back_what_is_not_finished(scheduler, held):
    job, go = held
    waiting = scheduler.submit(Request("a star", **SMALL))
    threading.Timer(0.05, go.set).start()
    scheduler.close(0.01)
    for given_back in (job, waiting):
        assert given_back.state == "failed" and isinstance(given_back.error, SchedulerClosed)


def test_what_fails_ends_alone(scheduler, pipeline, monkeypatch):
    decode = pipeline.decode
    monkeypatch.setattr(pipeline, "decode", lambda latents: 1 / 0)
    broken = scheduler.submit(Request("a star", **SMALL))
    with pytest.raises(ZeroDivisionError):
        broken.result(WAIT)
    monkeypatch.setattr(pipeline, "decode", decode)
    assert scheduler.submit(Request("a star", **SMALL)).result(WAIT).shape == (2, 32, 32, 3)


@pytest.mark.parametrize(
    "wrong,told",
    [
        ({"prompt": 3}, "prompt must be one text"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text"),
        ({"seed": [1, 2]}, "seed must be a whole number"),
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"lambda_t": float("nan")}, "lambda_t must be a number"),
        ({"lambda_m": [1.0, 1.2]}, "lambda_m must be a number"),
        ({"rescale": 1.5}, r"rescale must be 0 … 1"),
        ({"frames": 33}, "frames must be a whole number from 1 to 32"),
        ({"width": None}, "give both or none"),
        ({"width": 33}, "size 32x33 does not fit"),
        ({"deadline": 0}, "deadline must be more than 0 seconds"),
    ],
    ids=str,
)
def test_a_wrong_request_is_refused_when_it_is_submitted(scheduler, wrong, told):
    with pytest.raises(ValueError, match=told):
        scheduler.submit(Request(**{"prompt": "a star"} | SMALL | wrong))
    assert scheduler.stats()["submitted"] == 0
