"""Clips and images by HTTP, as OpenAI's clients ask for them: python -m gentron_fast.serve."""

import argparse
import importlib.util
import logging
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from gentron_fast.commandline import (
    check_ray,
    check_writable,
    choose_device,
    number,
    refuse,
    run,
    silence_libraries,
    utf8_text,
    whole_number,
)
from gentron_fast.config import MAX_FRAMES, MAX_SIDE
from gentron_fast.web import LOOPBACK, address, bind, choose_token

NAME = "gentron_fast.serve"
KEY_VARIABLE = "GENTRON_KEY"

HELP = f"""\
usage: python -m {NAME} [PIPELINE] [options]

PIPELINE            pipeline folder (the small model that ships)
--host HOST         whom it reaches: this machine (127.0.0.1), all (0.0.0.0)
--port N            8000; 0: any free one
--key TEXT          what clients must know; one is made where --host reaches
                    others. Better in the variable {KEY_VARIABLE}
--name NAME         of the model, for clients (the folder's name)
--device D          cpu, cuda, cuda:1
--dtype T           float32, bfloat16, float16
--max-batch N       clips made at a time (what the memory takes)
--ray ADDRESS       made by replicas on a Ray cluster, more while more is asked
                    for: auto, local or HOST:PORT
--cores N           of each replica, where there is no GPU (a node's)
--queue N           requests that wait; then 429 (64)
--max-frames N --max-steps N --max-side N
                    the most of one request ({MAX_FRAMES}, 200, twice the model's own)
--fps N             frames a second of the clips (4)
--out FOLDER        the finished clips (outputs/serve)
--keep HOURS        then a clip is removed (24)
--most N            clips kept, then the oldest is removed (10000)
--grace SECONDS     after SIGTERM, to finish what was begun (30)
--verbose           tell each request

/ is a page; /v1/videos and /v1/images as OpenAI's clients know them; /health
and /metrics for those who watch over it
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0 after SIGTERM or Ctrl-C, 2 after wrong input (told in one
    line), 130 where it was stopped before it served. RuntimeError where the scheduler failed."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: serve(parse_arguments(argv)), argv, "stopped", wrong=(ImportError,))


def serve(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ValueError, OSError or ImportError."""
    check_extra()
    name, key = "--key", args.key
    if key is None:
        name, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    token = choose_token(name, key, args.host)
    check_writable([args.out / "clip.mp4"])
    silence_libraries()
    from gentron_fast.serving.store import ClipStore

    listening = bind(args.host, args.port)
    store = ClipStore(args.out, 3600 * args.keep, args.most)
    with ExitStack() as until_the_end:
        _serve(args, listening, store, token, *load(args, until_the_end))


def _serve(args: argparse.Namespace, listening, store, token, model, scheduler) -> None:
    from gentron_fast.serving.app import application
    from gentron_fast.serving.fields import MOST_IMAGES, Limits
    from gentron_fast.serving.server import Server
    from gentron_fast.serving.service import Service

    limits = Limits(
        args.max_frames,
        args.max_steps,
        args.max_side or 2 * max(model.size),
        images=min(MOST_IMAGES, args.queue),
    )
    service = Service(scheduler, model, store, limits, args.fps)
    listening.listen()
    print(f"clips        {args.out}, each kept {args.keep:g} hours")
    print(f"open         {address(args.host, listening, token)}", flush=True)
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    Server(application(service, token), service, args.grace).run([listening])
    print("stopped", flush=True)
    if service.is_broken:
        raise RuntimeError("the scheduler ended by a fault of its own, told above")


def check_extra() -> None:
    """ImportError, in one line, where a package of the extra [serve] is not installed."""
    for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'the server needs {name}: pip install "gentron_fast[serve]"')


def load(args: argparse.Namespace, until_the_end: ExitStack):
    """What is served, and the scheduler that makes it, on Ray with --ray."""
    import torch

    from gentron_fast.index import ASSETS
    from gentron_fast.pipeline import GenTronPipeline
    from gentron_fast.serving import Scheduler
    from gentron_fast.serving.fields import ServedModel
    from gentron_fast.threads import settle_threads

    settle_threads()
    start, folder = time.perf_counter(), args.pipeline or ASSETS
    device = choose_device(args.device if args.ray is None else "cpu")
    try:
        pipeline = GenTronPipeline.from_pretrained(folder, getattr(torch, args.dtype), device)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load {folder}: {error}") from error
    name = args.name or (folder.resolve().name if args.pipeline else "gentron-small")
    if args.ray is None:
        scheduler = Scheduler(pipeline, queue_size=args.queue, max_batch=args.max_batch)
        where = str(device)
    else:
        from gentron_fast.on_ray import cluster, layout
        from gentron_fast.serving.replicas import replicas

        until_the_end.enter_context(cluster(args.ray))
        place = layout(None if args.device is None else args.device == "cuda", args.cores)
        application = f"gentron-{os.getpid()}"
        made = replicas(folder.absolute(), args.dtype, place, args.max_batch, application)
        engine = until_the_end.enter_context(made)
        for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
            part.to("meta")  # here it only checks what is asked for
        scheduler = Scheduler(pipeline, queue_size=args.queue, engine=engine)
        engine.watch(scheduler)
        where = f"1 to {place.actors} replicas by Ray, {place.device},"
    seconds = time.perf_counter() - start
    print(f"model        {name} on {where} in {args.dtype}, loaded in {seconds:.1f} s")
    return ServedModel.of(name, pipeline), scheduler


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises ValueError where argparse would print its usage and exit."""
    parser = argparse.ArgumentParser(prog=NAME, allow_abbrev=False)
    parser.format_help, parser.error = lambda: HELP, refuse
    parser.add_argument("pipeline", nargs="?", type=Path, metavar="PIPELINE")
    parser.add_argument("--host", default=LOOPBACK[0])
    parser.add_argument("--port", type=whole_number(0, 65535), default=8000)
    parser.add_argument("--key")
    parser.add_argument("--name", type=utf8_text)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--max-batch", type=whole_number(1, 4096))
    parser.add_argument("--ray")
    parser.add_argument("--cores", type=whole_number(1))
    parser.add_argument("--queue", type=whole_number(1, 100_000), default=64)
    parser.add_argument("--max-frames", type=whole_number(1, MAX_FRAMES), default=MAX_FRAMES)
    parser.add_argument("--max-steps", type=whole_number(1, 1000), default=200)
    parser.add_argument("--max-side", type=whole_number(1, MAX_SIDE))
    parser.add_argument("--fps", type=whole_number(1, 100), default=4)
    parser.add_argument("--out", type=Path, default=Path("outputs/serve"))
    parser.add_argument("--keep", type=number, default=24.0)
    parser.add_argument("--most", type=whole_number(1), default=10_000)
    parser.add_argument("--grace", type=whole_number(0, 86400), default=30)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args(argv)
    check_ray(args)
    if args.keep <= 0:
        raise ValueError(f"--keep is {args.keep:g}, wanted more than 0 hours")
    return args


if __name__ == "__main__":
    sys.exit(main())
