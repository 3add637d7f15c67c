"""Where figures are kept: one JSON file a part, device and day, rewritten after every row."""

import json
import os
import re
import subprocess
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gentron_fast.files import whole_file
from gentron_fast.threads import processor

ROOT = Path(__file__).parents[1]
# What makes two rows the same measurement; a newer one takes the place of an older one.
IDENTITY = ("operator", "direction", "preset", "shape", "dtype", "device")


def environment(device: str) -> dict:
    """What a row says of where it was measured. device: "cpu" or "cuda"."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": commit(),
        "time": datetime.now().isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with its instruction set and the threads in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{processor()} ({instructions}, {told(torch.get_num_threads())})"


def told(threads: int) -> str:
    """A number of threads, in words."""
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


@cache
def commit() -> str:
    """The variable COMMIT, which a copy of a checkout needs; else the checkout's own commit, with
    "-dirty" behind it when tracked files differ."""
    if named := os.environ.get("COMMIT"):
        return named
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append_row(folder: str | Path, part: str, row: dict) -> Path:
    """Add a row to folder/PART-DEVICE-DATE.json at once, in place of an older one of the same kind.

    The file is written aside and renamed: a process that is killed leaves the rows before.
    """
    path = Path(folder) / f"{file_name(part, row['device'], row['time'][:10])}.json"
    rows = read_rows(path) if path.exists() else []
    rows = [old for old in rows if identity(old) != identity(row)]
    lines = ",\n".join(json.dumps(row) for row in [*rows, row])
    with whole_file(path) as partial:
        partial.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    return path


def file_name(part: str, device: str, day: str) -> str:
    """PART-DEVICE-DATE, without an ending."""
    return "-".join([*re.findall(r"[a-z0-9]+", f"{part} {device}".lower()), day])


def read_rows(path: Path) -> list[dict]:
    """The rows of a file; none if it is a JSON file of another kind."""
    content = json.loads(path.read_text())
    return content.get("rows", []) if isinstance(content, dict) else []


def identity(row: dict) -> tuple:
    return tuple(json.dumps(row.get(key)) for key in IDENTITY)


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
