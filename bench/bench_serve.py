"""Mixed requests that come at random, made one at a time, in batches, and by the scheduler.

python bench/bench_serve.py [--requests N] [--rounds N]      RESULTS=DIR keeps the row

Half of the requests are clips and half images, of 8 to 50 steps, with λ_M 1 or 1.2, on the model
that ships. First all come at once: how many are done a minute. Then they come as a Poisson process
at half of what the scheduler made, the same for all: how long each takes. The ways are measured in
turn, several rounds of it.

one at a time   a call of the pipeline for each
equal requests  a call for all that wait with as many steps and frames as the one that waits longest
static batches  all that wait with as many frames, each with its own steps, by the same denoisers as
                the scheduler; what comes meanwhile waits for the longest of them
scheduler       they join and leave at every step
"""

import argparse
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from records import append_row, environment

from gentron_fast import GenTronPipeline
from gentron_fast.cores import all_cores
from gentron_fast.serving import Request, Scheduler
from gentron_fast.serving.engine import Engine, measured
from gentron_fast.threads import release_workers

PROMPTS = ("a red circle moving left", "a small blue star spinning", "a green square")
STEPS = (8, 15, 25, 50)
WARM_UP = 12  # requests before each measurement: libraries choose their kernels by shape
Serve = Callable[[Sequence[Request], Sequence[float]], list[float]]


def requests(count: int, frames: int, seed: int) -> list[Request]:
    pick = random.Random(seed)
    return [
        Request(
            pick.choice(PROMPTS),
            seed=pick.randrange(2**32),
            steps=pick.choice(STEPS),
            frames=pick.choice((1, frames)),
            lambda_m=pick.choice((1.0, 1.2)),
        )
        for _ in range(count)
    ]


def by_the_pipeline(pipeline: GenTronPipeline, most: int) -> Serve:
    """Calls of the pipeline, each of up to `most` requests of as many steps and frames."""

    def make(batch):
        pipeline(
            [request.prompt for request in batch],
            steps=batch[0].steps,
            frames=batch[0].frames,
            lambda_m=[request.lambda_m for request in batch],
            seed=[request.seed for request in batch],
            progress=False,
        )

    return in_batches(make, most, lambda request: (request.steps, request.frames))


def by_static_batches(pipeline: GenTronPipeline, most: int) -> Serve:
    engine = Engine(pipeline, most)

    def make(batch):
        clips = [engine.join(request.sampling(pipeline)) for request in batch]
        while running := [clip for clip in clips if not clip.is_done]:
            engine.step(running)
        for clip in clips:
            engine.frames(clip)
            engine.leave(clip)

    return in_batches(make, most, lambda request: request.frames)


def in_batches(make: Callable, most: int, kind: Callable) -> Serve:
    """One batch after the other: of the request that waits longest and those of its kind."""

    def serve(wanted, arrivals):
        start, waiting, seconds = time.perf_counter(), deque(), {}
        coming = deque(enumerate(arrivals))
        while waiting or coming:
            if not waiting:
                time.sleep(max(0, coming[0][1] - (time.perf_counter() - start)))
            while coming and coming[0][1] <= time.perf_counter() - start:
                waiting.append(coming.popleft()[0])
            if not waiting:
                continue
            own = kind(wanted[waiting[0]])
            batch = [i for i in waiting if kind(wanted[i]) == own][:most]
            make([wanted[i] for i in batch])
            for i in batch:
                waiting.remove(i)
                seconds[i] = time.perf_counter() - start - arrivals[i]
        return [seconds[i] for i in range(len(wanted))]

    return serve


@contextmanager
def by_the_scheduler(pipeline: GenTronPipeline, queue: int, most: int | None) -> Iterator[Serve]:
    scheduler = Scheduler(pipeline, queue_size=queue, max_batch=most)

    def serve(wanted, arrivals):
        start, seconds, done = time.perf_counter(), [0.0] * len(wanted), threading.Semaphore(0)

        def finished(number):
            def note(job):
                seconds[number] = time.perf_counter() - start - arrivals[number]
                done.release()

            return note

        jobs = []
        for number, (request, arrival) in enumerate(zip(wanted, arrivals, strict=True)):
            time.sleep(max(0, arrival - (time.perf_counter() - start)))
            jobs.append(scheduler.submit(request))
            jobs[-1].add_done_callback(finished(number))
        for job in jobs:
            done.acquire()
            job.result()
        return seconds

    yield serve
    scheduler.close()


@contextmanager
def in_this_thread(serve: Serve) -> Iterator[Serve]:
    """Without workers left behind that would slow down who is measured next."""
    yield serve
    release_workers()


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=32, help="of a round")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement")
    parser.add_argument("--batch", type=int, help="the largest batch (default: as measured)")
    args = parser.parse_args()
    with all_cores():
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Serve the same requests in each way, in turn, and print how long they take."""
    pipeline = GenTronPipeline.from_pretrained()
    most, frames = args.batch or measured(pipeline).max_batch, pipeline.default_frames
    queue, warm_up = max(args.requests, WARM_UP), requests(WARM_UP, frames, seed=0)
    ways = {
        "one at a time": partial(in_this_thread, by_the_pipeline(pipeline, 1)),
        "equal requests": partial(in_this_thread, by_the_pipeline(pipeline, most)),
        "static batches": partial(in_this_thread, by_static_batches(pipeline, most)),
        "scheduler": partial(by_the_scheduler, pipeline, queue, most),
    }
    release_workers()
    at_once = dict.fromkeys(ways, 0.0)  # seconds
    processor = dict(at_once)
    for number in range(args.rounds):  # in turn, so that a slow minute of the machine is everyone's
        wanted = requests(args.requests, frames, seed=1 + number)
        for name, way in ways.items():
            with way() as serve:
                serve(warm_up, [0.0] * WARM_UP)
                start = time.process_time()
                at_once[name] += max(serve(wanted, [0.0] * len(wanted)))
                processor[name] += time.process_time() - start
    count = args.rounds * args.requests
    figures = {
        name: {"a_minute": 60 * count / at_once[name], "processor_seconds": processor[name] / count}
        for name in ways
    }
    for name, own in figures.items():
        print(f"{name:<15} {own['a_minute']:7.1f} a minute", end="")
        print(f"   {1000 * own['processor_seconds']:6.0f} ms of processor time each", flush=True)

    rate = figures["scheduler"]["a_minute"] / 60 / 2
    longest = Request(PROMPTS[0], seed=0, steps=max(STEPS), frames=frames, lambda_m=1.2)
    seconds, alone = {name: [] for name in ways}, {name: [] for name in ways}
    for number in range(args.rounds):
        pick, arrivals = random.Random(number), [0.0]
        while len(arrivals) < args.requests:
            arrivals.append(arrivals[-1] + pick.expovariate(rate))
        wanted = requests(args.requests, frames, seed=1001 + number)
        for name, way in ways.items():
            with way() as serve:
                serve(warm_up, [0.0] * WARM_UP)
                alone[name] += serve([longest], [0.0])
                seconds[name] += serve(wanted, arrivals)
    for name, own in figures.items():
        own["longest_alone"] = percentile(alone[name], 0.50)
        own |= {f"p{100 * share:.0f}": percentile(seconds[name], share) for share in (0.50, 0.95)}
        print(f"{name:<15} {own['p50']:6.2f} s p50 {own['p95']:6.2f} s p95", end="")
        print(f"   the longest alone {own['longest_alone']:.2f} s", flush=True)
    ours, single, static = (figures[n] for n in ("scheduler", "one at a time", "static batches"))
    print(
        f"scheduler: {ours['a_minute'] / single['a_minute']:.2f} × one at a time; p95 "
        f"{ours['p95'] / static['p95']:.2f} × static batches; at most {most} at a time"
    )
    if os.environ.get("RESULTS"):
        row = {"operator": "serving, small", "direction": "", "preset": None, "dtype": "float32"}
        shapes = [list(pipeline.sampling("", frames=n).shape) for n in (1, frames)]
        row |= {"shape": shapes, "served": figures, "max_batch": most, "requests": count}
        row |= {"arrivals_a_minute": 60 * rate, "command": "python bench/bench_serve.py"}
        append_row(os.environ["RESULTS"], "serve", row | environment("cpu"))


if __name__ == "__main__":
    main()
