"""Ranks of a training run as forks of this process: the launcher's without its ten seconds."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(ranks: int, function: Callable, *args) -> list[int]:
    """Process ids of forks that call function(*args) under the launcher's environment."""
    port, pids = str(free_port()), []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        status = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
            function(*args)
            status = 0
        except SystemExit as leaving:
            status = leaving.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pids


def wait(pids: list[int]) -> list[int]:
    """Their exit statuses; below 0: the signal that ended them."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def on_ranks(folder: Path, ranks: int, function: Callable, *args) -> list:
    """What function(*args) returns on every rank, by way of files in `folder`."""

    def call() -> None:
        torch.save(function(*args), folder / f"result{os.environ['RANK']}.pt")

    statuses = wait(start(ranks, call))
    assert statuses == [0] * ranks, statuses
    return [torch.load(folder / f"result{rank}.pt") for rank in range(ranks)]
