"""Samples that cannot be trained on: skipped, counted by cause, named in a log; too many stop."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

FEW_SAMPLES = 1000  # the broken ones among fewer are no share yet


class BrokenSample(ValueError):
    """A sample that cannot be trained on: its cause, in the words of the counts, and the detail."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail


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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(broken) | {"rank": self.rank}, ensure_ascii=False) + "\n"
        # One write: ranks share the file. A name in a tar may be no text.
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line)
        total = self.causes.total()
        among = max(self.seen, self._at_least, total)
        if total > self.max_share * among:
            raise TooManyBroken(
                f"{total} of {among} samples are broken, more than {self.max_share:.1%}: "
                f"{in_words(self.causes)}; {self.path} names them, the last one is "
                f"{broken.sample or 'all'} of {broken.shard} ({broken.detail or broken.cause})"
            )
