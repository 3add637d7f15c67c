"""Samples that cannot be trained on: skipped, counted by cause, named in a log; too many stop."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

FEW_SAMPLES = 1000  # the broken ones among fewer are no share yet
BROKEN = "broken.json"  # in a precomputed shard, in the place of a sample's files


class BrokenSample(ValueError):
    """A sample that cannot be trained on: its cause, in the words of the counts, and the detail."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail

    def as_files(self) -> dict[str, bytes]:
        """What stands for it in a precomputed shard, in its place."""
        return {BROKEN: json.dumps([self.cause, self.detail]).encode()}

    @classmethod
    def from_file(cls, content: bytes) -> "BrokenSample":
        """The inverse of `as_files`, by the content of its file."""
        return cls(*map(str, json.loads(content)))


@contextmanager
def broken_by(cause: str) -> Iterator[None]:
    """A BrokenSample of this cause in the place of whatever a damaged file raises."""
    try:
        yield
    except BrokenSample:
        raise
    except Exception as error:
        text = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))  # another in every process
        raise BrokenSample(cause, " ".join(text.split()) or type(error).__name__) from error


class TooManyBroken(ValueError):
    """More than the set share of the samples is broken."""


@dataclass(frozen=True)
class Broken:
    """A sample that was skipped; of a shard that breaks off, without a key."""

    cause: str
    sample: str
    shard: str
    detail: str


def in_words(causes: Counter[str]) -> str:
    """Counts by cause, the most frequent first: "3 unreadable image, 1 no caption"."""
    return ", ".join(f"{count} {cause}" for cause, count in causes.most_common())


def check_share(
    causes: Counter[str], samples: int, max_share: float, path: Path, more: str = ""
) -> None:
    """TooManyBroken where these are more than a share of the samples; path: of the log."""
    total = causes.total()
    among = max(samples, total)
    if total > max_share * among:
        raise TooManyBroken(
            f"{total} of {among} samples are broken, more than {max_share:.1%}: "
            f"{in_words(causes)}; {path} names them{more}"
        )


class BrokenLog:
    """Counts broken samples by cause and names them in a file, a line of JSON each.

    The share counts among the samples seen, and at first among the first thousand or all `samples`,
    whichever is less. A shard that holds none counts as one.
    """

    def __init__(self, path: Path, max_share: float, samples: int, rank: int = 0):
        self.path, self.max_share, self.rank = path, max_share, rank
        self.causes: Counter[str] = Counter()
        self.seen = 0
        self._at_least = min(samples, FEW_SAMPLES)

    def add(self, broken: Broken) -> None:
        """Note one more; TooManyBroken if that makes too many."""
        self.causes[broken.cause] += 1
        self.write(json.dumps(asdict(broken) | {"rank": self.rank}, ensure_ascii=False) + "\n")
        last = f"{broken.sample or 'all'} of {broken.shard} ({broken.detail or broken.cause})"
        among = max(self.seen, self._at_least)
        check_share(self.causes, among, self.max_share, self.path, f", the last one is {last}")

    def write(self, lines: str) -> None:
        """Add to the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write: ranks share the file. A name in a tar may be no text.
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)


class HeldLog(BrokenLog):
    """A BrokenLog whose lines wait for `release`: work that dies and is done again is told once."""

    held = ""

    def write(self, lines: str) -> None:
        self.held += lines

    def release(self) -> None:
        """Write what was held."""
        lines, self.held = self.held, ""
        if lines:
            super().write(lines)
