"""What the tests marked `faults` share."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FAULTS = int(os.environ.get("FAULTS", "1"))  # how many times as many trials
EXIT_CODES = {0: "ended well", 2: "refused"}  # of a command line, as tally has them
HOLDER = """
import os, sys, time
from pathlib import Path
from gentron_fast.files import lock_folder
lock_folder(Path(sys.argv[1]))
if fork := os.fork():
    print(fork, flush=True)
time.sleep(60)
"""


@contextmanager
def cut_off_at_its_first_state(training) -> Iterator[None]:
    """A training module whose run is interrupted behind the first state that it saves."""

    def save_and_stop(*args):
        save_state(*args)
        raise KeyboardInterrupt

    save_state, training.save_state = training.save_state, save_and_stop
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        training.save_state = save_state


@contextmanager
def holder_of(folder: Path) -> Iterator[subprocess.Popen]:
    """A process that has locked a folder, beside a fork of it that outlives it."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    fork = int(holder.stdout.readline())
    try:
        yield holder
    finally:
        os.kill(fork, signal.SIGKILL)
        holder.kill()
        holder.communicate()
