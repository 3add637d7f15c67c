"""One rank's process: its launcher, signals, the process group, and what is said."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import deepspeed
import psutil
import torch

from gentron_fast.threads import available_cores, settle_threads
from gentron_train.allocator import keep_freed_memory

REASON_LENGTH = 300  # letters of a library's message


class Launcher:
    """The process that started this rank, looked at before anything that takes long.

    SIGTERM to the `deepspeed` command leaves deepspeed.launcher.launch and the ranks running.
    """

    def __init__(self):
        launcher = psutil.Process(os.getppid())
        under_deepspeed = any("deepspeed.launcher.launch" in part for part in launcher.cmdline())
        self._launcher = launcher if under_deepspeed else None
        self._started_by = launcher.ppid()

    def ended(self) -> bool:
        """Whether the launcher's own launcher was ended since."""
        if self._launcher is None:
            return False
        try:
            return self._launcher.ppid() != self._started_by
        except psutil.NoSuchProcess:
            return True

    def end(self) -> None:
        """Kill the launcher once the `deepspeed` command is gone, as a signal to all of them leaves
        it: 30 seconds after the signal it would kill ranks that still write.

        A command that goes on waits for the launcher, and would take its death for success.
        """
        for _ in range(100):
            if self.ended():
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._launcher.kill()
                return
            time.sleep(0.1)

    def end_ranks(self) -> None:
        """Kill the other ranks of this node: the launcher gives a frozen one 30 seconds."""
        ranks = [] if self._launcher is None else self._launcher.children()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                if rank.pid != os.getpid():
                    rank.kill()


class StopRequest:
    """Whether SIGTERM or Ctrl-C came, or the launcher's own launcher was ended."""

    def __init__(self, launcher: Launcher):
        self._launcher, self._signalled = launcher, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, frame) -> None:
        if not self._signalled:
            threading.Thread(target=self._launcher.end, daemon=True).start()
        self._signalled = True

    def __bool__(self) -> bool:
        return self._signalled or self._launcher.ended()


def start_distributed(timeout: float) -> torch.device:
    """Join the process group of the `deepspeed` launcher; returns the device of this rank.

    timeout: seconds after which a rank that waits for another ends the run.
    """
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("start this with the launcher: deepspeed train/t2i.py")
    limit = timedelta(seconds=timeout)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        deepspeed.init_distributed("nccl", timeout=limit)
        return device
    keep_freed_memory()
    with _no_operator_builds():
        deepspeed.init_distributed("gloo", timeout=limit)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // int(os.environ["LOCAL_SIZE"])))
    settle_threads()
    return torch.device("cpu")


@contextlib.contextmanager
def _no_operator_builds() -> Iterator[None]:
    """DeepSpeed builds none of its own operators, for minutes, to join a group on the CPU."""
    names, key = vars(deepspeed.ops), "__compatible_ops__"
    before = {key: names[key]} if key in names else {}
    names[key] = {}
    try:
        yield
    finally:
        del names[key]
        names |= before


def say(text: str) -> None:
    """A line for the terminal, of rank 0."""
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)


def run(main: Callable[[], None]) -> None:
    """Call an entry point; wrong input, and a rank that is gone, end it with one line and exit code
    2."""
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error)
        if isinstance(error, torch.distributed.DistError) or "/gloo/" in reason:
            reason = " ".join(reason.rpartition("] ")[2].split())[:REASON_LENGTH]
            reason = f"another rank is gone ({reason}); go on with --resume"
        elif isinstance(error, RuntimeError):
            raise
        print(f"rank {os.environ.get('RANK', 0)}: error: {reason}", file=sys.stderr, flush=True)
        sys.exit(2)
