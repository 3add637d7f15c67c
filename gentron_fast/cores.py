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
        wait_no_more = claim(_waits(path, str(os.getpid())), wait=True)
        try:
            give_back = claim(path, wait=True)
        finally:
            wait_no_more()
    try:
        yield
    finally:
        give_back()


def is_waited_for(path: Path | None = None) -> bool:
    """Whether another process waits for the cores, for the one that has them to ask: two who ask
    at once could take each other for such a process."""
    path = CORES if path is None else path
    names = path.parent.glob(f".{_waits(path, '*').name}.lock")
    waits = [claim(name.with_name(name.name[1 : -len(".lock")])) for name in names]
    for give_back in waits:
        if give_back is not None:  # of a process that died
            give_back()
    return None in waits


def _waits(path: Path, who: str) -> Path:
    """What a process claims as long as it waits."""
    return path.with_name(f"{path.name}-waits-{who}")
