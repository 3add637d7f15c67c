"""Independent pieces of work on a Ray cluster, by Ray Data: one actor for each GPU or set of cores,
which loads once and makes one piece after another."""

import json
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from gentron_fast import __version__
from gentron_fast.threads import settle_threads

ADVICE = "pip install 'gentron_fast[ray]'"
LOCAL_STORE = 200 * 2**20  # bytes: rows of a few hundred bytes are all that it holds
MOST_BLOCKS = 10_000  # a block is what an actor gets at once, and what is lost with it
# A worker: results, of plain values, for some pieces of work, of plain values.
Worker = Callable[[list], list]


class Actor:
    """What Ray Data makes for each GPU or set of cores, and calls with a block of work."""

    def __init__(self, make: Callable[[str], Worker], device: str, cores: int, version: str):
        import torch

        torch.set_num_threads(cores)
        settle_threads()
        self.worker, self.wrong = None, ""
        try:
            if version != __version__:
                raise ValueError(f"gentron_fast {__version__} is installed, wanted {version}")
            self.worker = make(device)
        except Exception as error:
            self.wrong = _told(error)

    def __call__(self, block: dict) -> dict:
        results, wrong = [""] * len(block["work"]), self.wrong
        if not wrong:
            try:
                made = self.worker([json.loads(piece) for piece in block["work"]])
                results = [json.dumps(result) for result in made]
            except Exception as error:
                wrong = _told(error)
        return {"work": block["work"], "result": results, "wrong": [wrong] * len(results)}


def _told(error: Exception) -> str:
    """An error for the driver. What a worker raises is no loss of it, and would come again."""
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return f"{kind}{error} (node {os.uname().nodename})"


def check_installed() -> None:
    """ValueError without Ray."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--ray needs Ray: {ADVICE} ({error})") from error


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """A connection to a cluster: auto, the one that runs here or that RAY_ADDRESS names;
    HOST:PORT; or local, one of this machine's cores for the time of the block.

    ValueError without Ray, and where there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a late thread starts a cluster
    check_installed()
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    if address not in ("auto", "local"):
        _check_address(address)
    options = {"include_dashboard": False, "object_store_memory": LOCAL_STORE}
    options = options if address == "local" else {}
    try:
        with _no_standard_error():  # Ray's C++ tells of its log level there
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no Ray cluster at {address!r}: wanted auto, local or HOST:PORT ({reason})"
        ) from error
    signal.signal(signal.SIGTERM, handler)  # Ray's own would end without a word
    # Ray tells of every actor that dies on standard output, in many lines; its debugger's switch.
    ray._private.worker._worker_logs_enabled = False
    try:
        yield
    finally:
        ray.shutdown()
        ray._private.worker._worker_logs_enabled = True


def _check_address(address: str) -> None:
    """ValueError where nothing answers there, for which Ray would wait 20 seconds."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = f"no Ray cluster at {address!r}: wanted auto, local or HOST:PORT ({error})"
        raise ValueError(reason) from None


@contextmanager
def _no_standard_error() -> Iterator[None]:
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def on_all(
    make: Callable[[str], Worker],
    work: Sequence,
    *,
    gpus: bool | None = None,
    cores: int | None = None,
    at_once: int = 1,
) -> Iterator[tuple[object, object]]:
    """(piece, result) for every piece of work, each once, as they are made on the cluster.

    make(device): the worker of an actor, made once in it; it gets `at_once` pieces a call, which
    must be different, and may get one again whose actor died, so that making twice must be the
    same as once. gpus, cores: as of `layout`. ValueError for what the worker raises as OSError or
    ValueError, and where actors die without anything made.
    """
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    # What is lost with an actor is made in the next round, by those that are there then. Ray's own
    # retries would wait for the actor to come back, for ever where its node does not.
    context.max_errored_blocks = -1
    for name in ("ray", "ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    left = {json.dumps(piece): piece for piece in work}
    while left:
        device, cores_each, actors = layout(gpus, cores)
        before = len(left)
        blocks = min(-(-len(left) // at_once), MOST_BLOCKS)
        rows = ray.data.from_items([{"work": text} for text in left], override_num_blocks=blocks)
        pool = ray.data.ActorPoolStrategy(
            min_size=1,
            initial_size=min(actors, blocks),
            max_size=blocks,
            max_tasks_in_flight_per_actor=2,
        )
        with warnings.catch_warnings(action="ignore"):  # of an option that goes with Ray 2.64
            rows = rows.map_batches(
                Actor,
                fn_constructor_args=(make, device, cores_each, __version__),
                batch_size=at_once,
                compute=pool,
                num_cpus=cores_each,
                num_gpus=int(device == "cuda"),
                ray_remote_args_fn=lambda: {"max_task_retries": 0},
            )
        why = "their actors died"
        try:
            for row in rows.iter_rows():
                if row["wrong"]:
                    raise ValueError(row["wrong"])
                piece = left.pop(row["work"], None)
                if piece is not None:
                    yield piece, json.loads(row["result"])
        except ray.exceptions.RayError as error:
            why = str(error).partition("\n")[0]
        if len(left) == before:
            raise ValueError(f"{len(left)} of {len(work)} are not made: {why}")
        if left:
            print(f"{len(left)} were lost with their actors: once more", file=sys.stderr)


class Layout(NamedTuple):
    """An actor's device, cpu or cuda, its cores, and how many a cluster has room for."""

    device: str
    cores: int
    actors: int


def layout(gpus: bool | None, cores: int | None) -> Layout:
    """As the cluster is now: an actor for each GPU (None: where it has one), or for each `cores`
    cores (None: all of the smallest node). ValueError where it has no room for one."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    if gpus is None:
        gpus = count["GPU"] >= 1
    if gpus and count["GPU"] < 1:
        raise ValueError("the Ray cluster has no GPU: --device cpu")
    unit = "GPU" if gpus else "CPU"
    useful = [node for node in nodes if node.get("CPU") and node.get(unit)]
    if not useful:
        raise ValueError("the Ray cluster has no node with cores to work on")
    shares = [int(node["CPU"] // node["GPU"] if gpus else node["CPU"]) for node in useful]
    most = int(max(node["CPU"] for node in useful))
    if cores is None:
        cores = max(1, min(shares))
    elif cores > most:
        raise ValueError(f"no node of the Ray cluster has {cores} cores, the largest has {most}")
    room = [
        min(node["CPU"] // cores, node["GPU"] if gpus else node["CPU"] // cores) for node in useful
    ]
    return Layout("cuda" if gpus else "cpu", cores, max(1, int(sum(room))))
