"""Files and folders that are there whole or not at all, and JSON."""

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gentron_fast.schema import Schema, check

RENAME_EXCHANGE = 2  # of Linux's renameat2
AT_FDCWD = -100
LOCK_NAME = ".lock"
MARK = ".gentron"  # in a folder that was written here: a JSON of the files written
LONG_NAME = 100  # bytes, which leaves room for what a partial name adds


def read_json(path: Path, schema: Schema | None = None) -> dict:
    """A JSON object from a file; FileNotFoundError or ValueError that names the file.

    schema: what the fields that are there must be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(values).__name__}")
    check(values, schema or {}, str(path))
    return values


def write_json(path: Path, values: dict) -> None:
    """A JSON object into a file, there whole or not at all; the folder is made."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")


def read_json_lines(path: Path) -> list[dict]:
    """The lines of a .jsonl file; one that a full disk or a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path`, with its ending, that takes its place at the end of the block.

    The name is this call's own, so that two processes do not write one file. Where the block fails
    it is removed; what a killed process left is removed by the next one that writes `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path, ours: Collection[str] = ()) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end of the block.

    `folder` may be missing, empty, or what an earlier call wrote (`check_output_folder`); then the
    two are exchanged and the old one is removed. The exchange is one step of the system; where the
    system has none, a process killed in it leaves the old folder under another hidden name, and the
    next call for `folder` puts it back. ValueError before any work where `folder` holds something
    else; a link is followed. Where the block fails nothing is left, no parent that was made for it
    either.
    """
    folder = folder.resolve()
    _recover(folder)
    check_output_folder(folder, ours)
    made = [parent for parent in folder.parents if not parent.exists()]
    partial = partial_path(folder)
    try:
        partial.mkdir(parents=True)
        yield partial
        write_json(partial / MARK, {"files": sorted(_files(partial))})
        check_output_folder(folder, ours)  # what has come since the start
        if folder.exists() and any(folder.iterdir()):
            _exchange(partial, folder)
        else:
            os.replace(partial, folder)
        shutil.rmtree(partial, ignore_errors=True)
    except BaseException:
        _recover(folder)
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, for this user alone, that is gone after the block.

    What a killed process left is removed by the next call for `path`.
    """
    folder = partial_path(path)
    folder.mkdir(0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_output_folder(folder: Path, ours: Collection[str] = ()) -> None:
    """ValueError where `folder` is no folder, or holds something that `whole_folder` did not write:
    a file that no mark there lists, or an entry that is not named in `ours`."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is there already: wanted a new folder")
    if not folder.is_dir():
        return
    foreign = {path.name for path in folder.iterdir()} - {MARK, *ours} or _foreign_files(folder)
    if foreign:
        raise ValueError(
            f"{folder} is there already: wanted a new folder, it holds "
            f"{', '.join(sorted(foreign)[:3])}: choose another, or move it"
        )


def _files(folder: Path) -> set[str]:
    """What a folder holds, its mark left out: names relative to it, links among them."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in found} - {MARK}


def _foreign_files(folder: Path) -> set[str]:
    """The files of a folder that its mark does not list."""
    try:
        listed = set(read_json(folder / MARK)["files"])
    except (OSError, ValueError, KeyError, TypeError):  # no mark, or one of another
        listed = set()
    return _files(folder) - listed


def partial_path(path: Path) -> Path:
    """A hidden name of this call's own beside `path`; those of dead processes are removed."""
    host, stem = re.sub(r"\W", "-", socket.gethostname()), _short(path.stem)
    ours = re.compile(rf"\.{re.escape(stem)}\.{re.escape(host)}\.(\d+)\.[0-9a-f]{{12}}\.part.*")
    for old in path.parent.glob(f".{_escaped(stem)}.{_escaped(host)}.*.part*"):
        found = ours.fullmatch(old.name)
        if found and not _is_alive(int(found[1])):
            shutil.rmtree(old, ignore_errors=True)
            with suppress(OSError):
                old.unlink()
    unique = uuid.uuid4().hex[:12]
    return path.with_name(f".{stem}.{host}.{os.getpid()}.{unique}.part{path.suffix}")


def lock_folder(folder: Path) -> None:
    """Keep a folder for this process, until it ends however it ends; the folder is made.

    ValueError that names the process that has it. The lock is one of records, which a fork of this
    process does not share. A file system without locks: a warning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise ValueError(f"{folder} is in use by {holder or 'another process'}") from None
    except OSError as error:
        warnings.warn(f"{folder} cannot be locked: {error.strerror}", stacklevel=2)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def claim(path: Path, wait: bool = False) -> Callable[[], None] | None:
    """The right to make `path`, which one process has at a time: a function that gives it back, or
    None where another process has it, for which `wait` waits.

    The system takes it from a process that dies. A file system without locks gives it to all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError:
            pass
        # The one before may have removed it, and another have made it anew.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), lock.stat()):
                break
        os.close(file)

    def give_back() -> None:
        lock.unlink(missing_ok=True)
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not, where a process was forked since
        os.close(file)

    return give_back


def _short(name: str) -> str:
    """A name or, of one that has no room for what is added to it, its digest."""
    if len(os.fsencode(name)) > LONG_NAME:
        return hashlib.sha256(os.fsencode(name)).hexdigest()
    return name


def _escaped(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _exchange(new: Path, old: Path) -> None:
    """Exchange two folders' names in one step, or where the system cannot, in three, between which
    `_recover` finds the old one."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(new), os.fsencode(old)
    exchange = getattr(libc, "renameat2", None)
    if exchange is not None and not exchange(
        AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE
    ):
        return
    aside = _aside(old)
    os.replace(old, aside)
    os.replace(new, old)
    os.replace(aside, new)


def _aside(folder: Path) -> Path:
    """Where a folder stands while a new one takes its name, in steps."""
    return folder.with_name(f".{_short(folder.name)}.gentron-old")


def _recover(folder: Path) -> None:
    """End an exchange that broke off: the old folder is put back, or removed beside the new one."""
    aside = _aside(folder)
    if not aside.is_dir() or _foreign_files(aside):
        return
    with suppress(OSError):  # another process recovers too
        if not os.path.lexists(folder):
            os.replace(aside, folder)
        else:
            old = partial_path(folder)
            os.replace(aside, old)
            shutil.rmtree(old, ignore_errors=True)


def replace_section(path: Path, begin: str, end: str, text: str) -> None:
    """Write `text` into a file between its lines `begin` and `end`. ValueError where it lacks
    them."""
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{path} must hold the lines {begin!r} and {end!r}")
    with whole_file(path) as partial:
        partial.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", encoding="utf-8")
