"""WebDataset shards read at any place: where each sample's files lie in the tar.

An index is made once for each shard, by reading the tar's headers, and kept beside it where the
folder can be written. A shard that is no local file is copied to a folder first, through
WebDataset's own opener; where the folder may hold so much and no more, the copy that was longest
not opened goes.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import tarfile
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gentron_fast.files import whole_file
from gentron_train.data.broken import BrokenSample, broken_by

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "gentron"
PRECOMPUTED = "__precomputed__"  # a member of ours; WebDataset skips names of this form
DIGITS = 16  # of a copy's name
FORMAT = 2  # of an index that is kept
KEPT = 128  # indexes and open files a process holds
# What reading a kept index or digest raises where it is missing or damaged: it is made anew then.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
PAUSES = (1, 3)  # seconds before a shard is fetched once more


@dataclass(frozen=True)
class Index:
    """The samples of a shard in its order: key, and place (offset, size) of each file by ending.

    cut says where the shard breaks off, if it does; facts is the place of the member PRECOMPUTED;
    scattered are the samples, by number, whose files do not follow one another.
    """

    samples: list[tuple[str, dict[str, tuple[int, int]]]]
    cut: str | None = None
    facts: tuple[int, int] | None = None
    scattered: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Shard:
    """One tar: its name without folder and ending, which random draws go by, and its local file.

    room: bytes of copies that the folder of a shard that is no local file may hold, None for any.
    """

    url: str
    path: Path
    room: int | None = None

    @property
    def is_remote(self) -> bool:
        return Path(self.url) != self.path

    @property
    def name(self) -> str:
        if not self.is_remote:
            return self.path.stem
        found = re.findall(r"([^/\s?:]+)\.tar", self.url)  # a URL may be a whole command
        return found[-1] if found else Path(self.url).stem


def find_shards(
    pattern: str, cache: Path = CACHE, room: int | None = None, allow_pipes: bool = False
) -> list[Shard]:
    """The shards that a glob, a path or a URL with braces names, in order.

    cache: where copies of shards that are no local files go, at most `room` bytes of them.
    allow_pipes: also URLs pipe:COMMAND, whose command a shell runs.

    Raises ValueError if there are none, or one of them is not there.
    """
    shards = []
    for url in [pattern] if os.path.exists(pattern) else pattern.split("::"):
        url = url.removeprefix("file:")
        folder = _folder_there(url)
        if folder or os.path.exists(url) or not _is_remote(url):
            shards += [Shard(path, Path(path)) for path in _matching(url, folder)]
            continue
        if url.lower().startswith("pipe:") and not allow_pipes:
            raise ValueError(f"{url} runs a command in a shell: --allow-pipes allows it")
        for name in _expand(url):
            shards.append(Shard(name, cache / _copy_name(name), room))
    if not shards:
        raise ValueError(f"no shards match {pattern}")
    for shard in shards:
        if not shard.is_remote and not shard.path.is_file():
            raise ValueError(f"there is no shard {shard.path}")
    return shards


def _copy_name(url: str) -> str:
    return f"{hashlib.sha256(url.encode()).hexdigest()[:DIGITS]}.tar"


def _source_path(copy: Path) -> Path:
    """The file beside a copy that holds the URL it is of."""
    return copy.with_name(f".{copy.name}.source")


def _expand(url: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    return expand_urls(url)


def _matching(pattern: str, folder: str) -> list[str]:
    """The files that a glob with braces names, in order; `folder`, its beginning, is no glob."""
    found = []
    for name in [pattern] if os.path.exists(pattern) else _expand(pattern[len(folder) :]):
        path = name if name == pattern else folder + name
        if os.path.exists(path) or not glob.has_magic(name):
            found.append(path)
        else:
            found += [folder + one for one in sorted(glob.glob(name, root_dir=folder or None))]
    return found


def _folder_there(path: str) -> str:
    """The folder that is there and with which a path begins, whatever signs its name holds."""
    ends = [slash.end() for slash in re.finditer("/", path)]
    return next((path[:end] for end in reversed(ends) if os.path.isdir(path[:end])), "")


def fetch(shard: Shard) -> None:
    """Copy a shard that is no local file, unless the copy is there; ValueError where that fails
    three times, with pauses."""
    if shard.path.exists() or not shard.is_remote:
        return
    from webdataset.gopen import gopen

    for pause in (*PAUSES, None):
        try:
            with whole_file(_source_path(shard.path)) as partial:
                partial.write_text(shard.url)
            with (
                whole_file(shard.path) as partial,
                gopen(shard.url) as source,
                open(partial, "wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
            break
        except Exception as error:  # each scheme raises its own
            if pause is None:
                raise ValueError(f"cannot read the shard {shard.url}: {error}") from error
            time.sleep(pause)
    if shard.room is not None:
        _make_room(shard)


def _make_room(shard: Shard) -> None:
    """Remove copies beside a shard's, the longest not opened first, until they fit its room.

    What `fetch` did not copy, the user's own shards among it, is left alone.
    """
    copies = []
    for path in shard.path.parent.glob("[0-9a-f]" * DIGITS + ".tar"):
        # Without a source it is no copy, and other processes make room too.
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            if _copy_name(_source_path(path).read_text()) != path.name:
                continue
            copies.append((path.stat().st_atime_ns, path.stat().st_size, path))
    surplus = sum(size for _, size, _ in copies) - shard.room
    for _, size, path in sorted(copies):
        if surplus > 0 and path != shard.path:
            path.unlink(missing_ok=True)
            surplus -= size


def count(shard: Shard) -> tuple[int, str | None]:
    """Samples of a shard, broken ones among them, and where it breaks off; makes its index."""
    with contextlib.suppress(*UNREADABLE), open(_kept_index(shard.path)) as file:
        head = json.loads(file.readline())
        number, cut, stamp = head["count"], head["cut"], head["stamp"]
        with contextlib.suppress(FileNotFoundError):  # its samples are broken when they are read
            stamp = _stamp(shard.path)
        if stamp == head["stamp"] and head["format"] == FORMAT and type(number) is int:
            return number, cut
    index = _make_index(shard)
    return len(index.samples), index.cut


def _make_index(shard: Shard) -> Index:
    while True:
        fetch(shard)
        with _may_be_removed(shard):
            index = _read_headers(shard.path)
            _keep(index, shard.path)
            return index


@contextlib.contextmanager
def _may_be_removed(shard: Shard):
    """Goes on where a copy of a shard is gone: another process may have made room with it."""
    try:
        yield
    except FileNotFoundError:
        if not shard.is_remote:
            raise


@lru_cache(maxsize=KEPT)
def index(shard: Shard) -> Index:
    """The index of a shard: the one kept beside it, or made now."""
    count(shard)  # makes it anew where the shard is another
    with contextlib.suppress(*UNREADABLE), open(_kept_index(shard.path)) as file:
        head, body = json.loads(file.readline()), json.loads(file.readline())
        samples = [
            (key, {e: (offset, size) for e, (offset, size) in files.items()})
            for key, files in body["samples"]
        ]
        if len(samples) == head["count"]:
            return Index(samples, head["cut"], body["facts"], frozenset(body["scattered"]))
    return _make_index(shard)


def read(shard: Shard, number: int) -> tuple[str, dict[str, bytes]]:
    """Key and files, by ending, of one sample.

    BrokenSample where the tar has them apart, or is not there any more.
    """
    contents = index(shard)
    key, files = contents.samples[number]
    if number in contents.scattered:
        raise BrokenSample(
            "files apart in the tar (tar --sort=name puts them together)",
            f"{', '.join(sorted(files))} of {key}",
        )
    with broken_by("unreadable shard"):
        return key, {ending: _read_at(shard, *place) for ending, place in files.items()}


def check_any_sample(shards: list[Shard]) -> None:
    """ValueError where none of the shards holds a sample."""
    found = [count(shard) for shard in shards]
    if not any(samples for samples, _ in found):
        more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
        cuts = [f": {cut}" for _, cut in found if cut]
        raise ValueError(f"no samples in {shards[0].url}{more}{''.join(cuts[:1])}")


def digest(shard: Shard) -> str:
    """Digest of a shard's content, kept beside it as its index is."""
    kept = shard.path.with_name(f".{shard.path.name}.digest")
    with contextlib.suppress(*UNREADABLE):
        stored = json.loads(kept.read_text())
        value, stamp = stored["digest"], stored["stamp"]
        with _may_be_removed(shard):
            stamp = _stamp(shard.path)
        if stamp == stored["stamp"]:
            return value
    while True:
        fetch(shard)
        with _may_be_removed(shard):
            stamp = _stamp(shard.path)
            with open(shard.path, "rb") as file:
                value = hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]
            with contextlib.suppress(OSError), whole_file(kept) as partial:
                partial.write_text(json.dumps({"digest": value, "stamp": stamp}))
            return value


def read_facts(shard: Shard) -> bytes | None:
    """What `precompute` noted in a shard; None for a shard of images or clips."""
    place = index(shard).facts
    return None if place is None else _read_at(shard, *place)


def _is_remote(url: str) -> bool:
    scheme = url.partition(":")[0]
    return scheme != url and scheme.isalnum()


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _kept_index(path: Path) -> Path:
    return path.with_name(f".{path.name}.index")


def _keep(index: Index, path: Path) -> None:
    kept = _kept_index(path)
    head = {"count": len(index.samples), "cut": index.cut, "stamp": _stamp(path), "format": FORMAT}
    body = {"samples": index.samples, "facts": index.facts, "scattered": sorted(index.scattered)}
    # A folder that cannot be written: the headers are read again.
    with contextlib.suppress(OSError), whole_file(kept) as partial:
        partial.write_text(json.dumps(head) + "\n" + json.dumps(body) + "\n")


def _read_headers(path: Path) -> Index:
    from webdataset.tariterators import base_plus_ext

    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    numbers: dict[str, int] = {}
    scattered = set()
    facts = cut = before = None
    length, end = path.stat().st_size, 0
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise ValueError(f"{path} is compressed: only plain tars can be read at any place")
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                place = member.offset_data, member.size
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not member.isfile():
                    continue
                if member.offset_data + member.size > length:
                    cut = f"in {member.name}"
                    break
                if member.name == PRECOMPUTED:
                    facts = place
                key, ending = base_plus_ext(member.name)
                if key is None:
                    continue
                ending = ending.lower()
                if key != before:
                    # The same file again is another sample of that name, as WebDataset has it.
                    if key in numbers and ending not in samples[numbers[key]][1]:
                        scattered.add(numbers[key])
                    else:
                        numbers[key] = len(samples)
                        samples.append((key, {}))
                samples[numbers[key]][1][ending] = place
                before = key
    except (tarfile.TarError, ValueError, OverflowError) as error:  # these of numbers too large
        cut = str(error)
    if cut is None:
        cut = _broken_end(path, end, length)
    # The last sample may miss files that came after the cut.
    if cut and samples and samples[-1][1].keys() != samples[0][1].keys():
        samples.pop()
    where = cut and f"after {samples[-1][0] if samples else 'nothing'}: {cut}"
    return Index(samples, where, facts, frozenset(scattered))


def _broken_end(path: Path, end: int, length: int) -> str | None:
    """What is wrong behind the last member, where a whole tar has empty blocks and no more."""
    if length < end + tarfile.BLOCKSIZE:
        return "no end of archive"
    with open(path, "rb") as file:
        file.seek(end)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                return "a damaged header"
    return None


_open_files: OrderedDict[Path, int] = OrderedDict()


def _read_at(shard: Shard, offset: int, size: int) -> bytes:
    # pread, not seek: forked workers share a file's position.
    path = shard.path
    if path not in _open_files:
        _open_files[path] = _open(shard)
        if len(_open_files) > KEPT:
            os.close(_open_files.popitem(last=False)[1])
    _open_files.move_to_end(path)
    content = os.pread(_open_files[path], size, offset)
    if len(content) < size:
        raise BrokenSample("shard cut off", f"{path.name} ends before {offset + size}")
    return content


def _open(shard: Shard) -> int:
    """A file descriptor, which outlives the file's removal; BrokenSample where there is no more
    copy of a shard and none can be had."""
    while True:
        try:
            fetch(shard)
        except ValueError as error:
            raise BrokenSample("unreadable shard", str(error)) from error
        try:
            descriptor = os.open(shard.path, os.O_RDONLY)
        except FileNotFoundError:
            if not shard.is_remote:
                raise
            continue  # another process made room between the two
        if shard.room is not None:
            with contextlib.suppress(FileNotFoundError):
                os.utime(shard.path, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
        return descriptor
