"""Graphs into machine code, in as many processes as there are cores."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from gentron_fast.compiled.graphs import Graph


def compile_all(graphs: list[Graph], folder: Path, on_graph: Callable | None) -> None:
    """Compile every graph to folder/NAME.pt2, for the CPU in as many processes as it has cores:
    nearly all of the time is the C++ compiler's."""
    is_cpu = graphs[0].inputs[0].device.type == "cpu"
    jobs = min(len(os.sched_getaffinity(0)), 8, len(graphs)) if is_cpu else 1
    if jobs == 1:
        _compile_share(graphs, folder, on_graph)
        return
    fork = multiprocessing.get_context("fork")
    shares = [
        fork.Process(target=_forked_share, args=(graphs[i::jobs], folder, on_graph))
        for i in range(jobs)
    ]
    try:
        with warnings.catch_warnings(action="ignore"):  # of threads, which the shares leave alone
            for share in shares:
                share.start()
        for share in shares:
            share.join()
    finally:
        for share in shares:
            if share.pid is not None:
                share.kill()
                share.join()
    missing = [graph.name for graph in graphs if not (folder / f"{graph.name}.pt2").exists()]
    if missing:
        raise ValueError(f"the compilation of {missing[0]} failed; its error is above")


def _forked_share(*share) -> None:
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interrupt, signal.SIG_DFL)  # the parent tells, and cleans up
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    _compile_share(*share)


def _compile_share(graphs: list[Graph], folder: Path, on_graph: Callable | None) -> None:
    from torch._inductor import config

    options = {}
    if graphs[0].inputs[0].device.type == "cpu":
        # The code takes as many threads as there are where it runs; the number makes it parallel.
        threads_there = max(2, len(os.sched_getaffinity(0)))
        options = {"cpp.threads": threads_there, "cpp.dynamic_threads": True, "compile_threads": 1}
    with config.patch(options), warnings.catch_warnings(action="ignore"):
        for graph in graphs:
            if on_graph is not None:
                on_graph(graph.name)
            graph.compile(folder / f"{graph.name}.pt2")
