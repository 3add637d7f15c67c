"""Scores of a run, image by image: resumable, as the official result files, and their means."""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gentron_fast.evaluation.layout import Entry, without_stop
from gentron_fast.evaluation.scorers import Scorer
from gentron_fast.files import read_json, whole_file, write_json
from gentron_fast.media import read_video

RESULT_NAME = "vqa_result.json"  # the official name, whatever the scorer
SCORERS_NAME = "scorers.json"  # beside it where it was written here


@dataclass(frozen=True)
class Column:
    """How a category is scored: parts, a scorer for each folder of results; combine: (prompt, score
    of each part) → the image's score, which goes to the folder `combined` where there are several.
    """

    category: str
    parts: Mapping[str, Scorer]
    combine: Callable[[str, Mapping[str, float]], float] | None = None
    combined: str | None = None


@dataclass(frozen=True)
class Result:
    """A category's scores by the place of their image in the run, and whose they are."""

    scores: Mapping[int, float]
    scorers: Sequence[str]
    is_official: bool

    @property
    def mean(self) -> float:
        """The category's figure, 0 to 1."""
        return float(np.mean(list(self.scores.values())))


def score_column(
    folder: Path,
    column: Column,
    entries: Sequence[Entry],
    known: Mapping[str, Result] | None = None,
    batch: int = 16,
) -> Result | None:
    """The scores of a category's images, whose results lie in `folder`.

    known: results of parts that are scored already. None where no image has a score.
    """
    results = dict(known or {})
    for place, scorer in column.parts.items():
        if place not in results:
            results[place] = _score(folder / place, column.category, scorer, entries, batch)
    names = list(dict.fromkeys(name for result in results.values() for name in result.scorers))
    is_official = all(result.is_official for result in results.values())
    common = set.intersection(*(set(result.scores) for result in results.values()))
    if not common:
        return None
    if column.combine is None:
        return next(iter(results.values()))
    scores = {
        i: column.combine(
            entries[i].prompt, {place: result.scores[i] for place, result in results.items()}
        )
        for i in sorted(common)
    }
    result = Result(scores, names, is_official)
    if column.combined is not None:
        write_result(folder / column.combined, result)
    return result


def _score(
    folder: Path, category: str, scorer: Scorer, entries: Sequence[Entry], batch: int
) -> Result:
    """One scorer's scores of the entries, those of its journal among them."""
    from tqdm import tqdm

    journal = Journal(folder, scorer)
    missing = [entry for entry in entries if journal.score(entry) is None]
    broken: list[str] = []
    with tqdm(
        total=len(entries),
        initial=len(entries) - len(missing),
        desc=f"{category}: {scorer.name}"[:60],
        unit="image",
        leave=False,
        disable=None,
    ) as bar:
        for start in range(0, len(missing), batch):
            part, media = [], []
            for entry in missing[start : start + batch]:
                try:
                    media.append(read_media(entry.path))
                    part.append(entry)
                except (OSError, ValueError) as error:
                    broken.append(f"{entry.path.name} ({' '.join(str(error).split())})")
            if part:
                scores = scorer(media, [entry.prompt for entry in part])
                journal.add(part, scores, [frames.shape[1:3] for frames in media])
            bar.update(len(missing[start : start + batch]))
    if broken:
        some = ", ".join(broken[:3])
        warnings.warn(f"{category}: {len(broken)} unreadable, left out: {some}", stacklevel=2)
    sizes = Counter(size for entry in entries if (size := journal.size(entry)))
    if len(sizes) > 1:
        told = ", ".join(f"{n} of {h} x {w}" for (h, w), n in sizes.most_common())
        warnings.warn(f"{category}: images of several sizes: {told}", stacklevel=2)
    side = getattr(scorer, "side_of_rules", None)
    if side and len(sizes) == 1 and (side, side) not in sizes:
        ((height, width),) = sizes
        warnings.warn(
            f"{category}: images of {height} x {width}, where the rules count "
            f"{side} x {side} pixels",
            stacklevel=2,
        )
    scores = {i: score for i, e in enumerate(entries) if (score := journal.score(e)) is not None}
    result = Result(scores, [scorer.name], scorer.is_official)
    if scores:
        write_result(folder, result)
    return result


class Journal:
    """The scores that a scorer has given, a line each, written as soon as they are there.

    A score is an image's as it was: its size and time of change are kept beside it.
    """

    def __init__(self, folder: Path, scorer: Scorer):
        check = hashlib.sha256(scorer.key.encode()).hexdigest()[:12]
        self.path = folder / f"scores-{check}.jsonl"
        self._records: dict[tuple, dict] = {}
        content = self.path.read_text(errors="replace") if self.path.is_file() else ""
        self._is_torn = bool(content) and not content.endswith("\n")
        for line in content.splitlines():
            try:
                record = json.loads(line)
                self._records[tuple(record["of"])] = record
            except (ValueError, TypeError, KeyError):
                continue  # a line that a killed process left

    def score(self, entry: Entry) -> float | None:
        """The entry's score; None where it has none yet."""
        record = self._records.get(_identity(entry))
        return None if record is None else record["score"]

    def size(self, entry: Entry) -> tuple[int, ...] | None:
        """Height and width of an entry that has a score."""
        record = self._records.get(_identity(entry))
        return None if record is None else tuple(record["size"])

    def add(self, entries: Sequence[Entry], scores: Sequence[float], sizes) -> None:
        """Write scores of entries."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            if self._is_torn:
                file.write("\n")
                self._is_torn = False
            for entry, score, size in zip(entries, scores, sizes, strict=True):
                record = {"of": _identity(entry), "score": float(score), "size": list(size)}
                self._records[tuple(record["of"])] = record
                file.write(json.dumps(record) + "\n")


def _identity(entry: Entry) -> tuple:
    found = os.stat(entry.path)
    return entry.path.name, entry.prompt, found.st_size, found.st_mtime_ns


def read_media(path: Path) -> np.ndarray:
    """An image or clip as uint8 (T, H, W, 3). OSError or ValueError where it cannot be read."""
    if path.suffix == ".mp4":
        return read_video(path)[0]
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))[None]
    except (SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, of damaged files
        raise ValueError(str(error)) from error


def write_result(folder: Path, result: Result) -> None:
    """The official result file and, beside it, whose scores they are.

    A result file that was not written here is left as it is and told.
    """
    path = folder / RESULT_NAME
    if path.exists() and not _is_written_here(folder):
        warnings.warn(
            f"{path} was made elsewhere and stays as it is; --from-official reads it", stacklevel=2
        )
        return
    answers = [{"question_id": i, "answer": score} for i, score in result.scores.items()]
    text = json.dumps(answers)
    # The mark first: a run that is cut off between the two leaves the old scores to be told.
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_json(folder / SCORERS_NAME, {"scorers": list(result.scorers), "sha256": digest})
    with whole_file(path) as partial:
        partial.write_text(text)


def _is_written_here(folder: Path) -> bool:
    """Whether the result file in a folder is the one that `write_result` marked."""
    try:
        marked = read_json(folder / SCORERS_NAME).get("sha256")
    except (OSError, ValueError):
        return False
    return marked == hashlib.sha256((folder / RESULT_NAME).read_bytes()).hexdigest()


def read_result(folder: Path) -> Result:
    """The official result file in a folder that the official code made."""
    path = folder / RESULT_NAME
    if path.exists() and _is_written_here(folder):
        raise ValueError(f"{path} is not the official code's: {SCORERS_NAME} beside it tells whose")
    try:
        answers = json.loads(path.read_text())
        scores = {int(answer["question_id"]): float(answer["answer"]) for answer in answers}
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is no list of question_id and answer: {error}") from None
    if sorted(scores) != list(range(len(answers))):
        raise ValueError(f"{path} must number its {len(answers)} answers from 0 on, each once")
    if not scores or not all(np.isfinite(list(scores.values()))):
        raise ValueError(f"{path} holds no scores, or some that are no numbers")
    return Result(scores, ["the official code"], True)


def check_entries(
    category: str, entries: Sequence[Entry], prompts: Sequence[str] | None, count: int
) -> None:
    """Tell in a line each which prompts have no image, too few or too many, or are not known.

    prompts: those of the category, None where they are not known.
    """
    found = Counter(entry.prompt for entry in entries)
    if prompts is not None:
        wanted = Counter(without_stop(prompt) for prompt in prompts)
        absent = [prompt for prompt in wanted if prompt not in found]
        unknown = [prompt for prompt in found if prompt not in wanted]
        _tell(category, absent, f"of {len(wanted)} prompts have no image")
        _tell(category, unknown, "prompts of images are none of the benchmark's")
    else:
        wanted = Counter(found.keys())
    wrong = [p for p, n in found.items() if p in wanted and n != count * wanted[p]]
    _tell(category, wrong, f"prompts have another number of images than {count}")


def _tell(category: str, prompts: Sequence[str], words: str) -> None:
    if prompts:
        some = ", ".join(map(repr, prompts[:2])) + (", …" if len(prompts) > 2 else "")
        warnings.warn(f"{category}: {len(prompts)} {words}: {some}", stacklevel=3)
