"""The cores of this machine, which long runs and measurements of speed take in turn."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gentron_fast.files import claim

CORES = Path(tempfile.gettempdir()) / f"gentron-cores-{os.getuid()}"


@contextmanager
def all_cores(path: Path | None = None) -> Iterator[None]:
    """Have the cores to oneself, as far as others ask for them too, after those who have them now,
    which is told in a line. The system takes them back from a process that dies."""
    path = CORES if path is None else path
    give_back = claim(path)
    if give_back is None:
        print("waiting       for the cores: a benchmark or another run has them", flush=True)
        give_back = claim(path, wait=True)
    try:
        yield
    finally:
        give_back()
