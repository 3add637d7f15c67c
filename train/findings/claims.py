"""What the paper says, as comparisons of runs, and what the results say of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gentron_train.findings.paired import (
    Interval,
    paired_interval,
    prompt_error,
    seed_spread,
    smallest_difference,
)
from gentron_train.findings.scoring import LAMBDA_M, MEASURES
from gentron_train.findings.table import Table

BEST = (1.0, 1.3)  # λ_M, as the paper has it
FEWEST_SEEDS = 3
HOLDS, FAILS, OPEN = "holds", "fails", "cannot be told"
Records = Sequence[dict]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a run, at one λ_M or at the mean of several; None is 1."""

    name: str
    run: str
    scales: tuple[float | None, ...] = (None,)

    def figures(self, records: Records, seed: int, measure: str) -> np.ndarray | None:
        """(P,) of a seed, NaN where a prompt has none; None where a result is missing."""
        found = [
            record
            for record in records
            if (record["run"], record["seed"]) == (self.run, seed)
            and record["lambda_m"] in self.scales
        ]
        columns = [_column(record, measure) for record in found]
        if len(found) < len(self.scales) or any(column is None for column in columns):
            return None
        return np.mean(np.array(columns, dtype=np.float64), 0)


def _column(record: dict, measure: str) -> list | None:
    """A record's figures. An image is its own frame."""
    if MEASURES[measure].of_run:
        return [record[measure]]
    name = measure.removeprefix("frame ") if record["stage"] == "t2i" else measure
    return record["scores"].get(name)


@dataclass(frozen=True)
class Comparison:
    """That `ahead` is better than `behind`, in each of some measures."""

    ahead: Side
    behind: Side
    measures: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.ahead.name} ahead of {self.behind.name}"


@dataclass(frozen=True)
class Finding:
    """What the paper says in one sentence, and the comparisons it comes to."""

    title: str
    paper: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Verdict:
    """Of one comparison in one measure: the two means, their difference with its interval and that
    of each seed, in the measure's unit, and what it says of the paper's sentence."""

    comparison: Comparison
    measure: str
    by_seed: tuple[float, ...]
    means: tuple[float, float]
    difference: Interval
    says: str


IMAGES = ("alignment", "colour", "shape", "relation", "psnr", "broken")
FRAMES = ("frame psnr", "frame alignment")
CLIPS = (*FRAMES, "motion", "place jitter", "size jitter", "colour jitter")
MAIN = ("alignment", "psnr")  # of the findings in which most figures would say the same twice


def findings(table: Table) -> list[Finding]:
    """The paper's, in the order of the page; all but that of the start, which has one figure."""
    adaln, clip = Side("adaLN-zero", "adaln"), Side("cross-attention", "clip")
    one, other, both = Side("CLIP", "clip"), Side("T5", "t5"), Side("both encoders", "both")
    smaller, middle = Side("the smaller model", "smaller"), Side("the middle one", "both")
    larger = Side("the larger one", "larger")
    image = Side("T2I", "both")
    alone, images = Side("clips alone", "t2v-clips"), Side("with images", "t2v-images")
    still, joint = Side("with motion-free", "t2v-motion-free"), Side("with both", "t2v-both")
    scales = [None if scale == LAMBDA_M else scale for scale in table.lambda_m]
    inside = tuple(s for s in scales if BEST[0] <= (LAMBDA_M if s is None else s) <= BEST[1])
    best = Side("λ_M 1.0 … 1.3", table.sweep_run, inside)
    outside = [Side(f"λ_M {s:g}", table.sweep_run, (s,)) for s in scales if s not in inside]
    return [
        Finding(
            "Cross-attention against adaLN-zero",
            "Cross-attention is far ahead of adaLN-zero for free text (table 4).",
            (Comparison(clip, adaln, IMAGES),),
        ),
        Finding(
            "Both text encoders against one",
            "CLIP and T5 together, interleaved, are ahead of either alone.",
            (Comparison(both, one, IMAGES), Comparison(both, other, IMAGES)),
        ),
        Finding(
            "Size",
            "The larger model is ahead of the smaller one after as many steps.",
            (
                Comparison(middle, smaller, (*MAIN, "loss")),
                Comparison(larger, middle, (*MAIN, "loss")),
            ),
        ),
        Finding(
            "Clips, images and motion-free samples",
            "Training on clips alone harms a frame's quality; images beside the clips and "
            "motion-free samples bring it back.",
            (
                Comparison(image, alone, FRAMES),
                Comparison(images, alone, CLIPS),
                Comparison(still, alone, CLIPS),
                Comparison(joint, alone, CLIPS),
            ),
        ),
        Finding(
            "The guidance scale of motion",
            "λ_M from 1.0 to 1.3 is best.",
            tuple(Comparison(best, side, ("psnr", "alignment", "motion")) for side in outside),
        ),
    ]


def verdict(
    comparison: Comparison, measure: str, records: Records, seeds: Sequence[int]
) -> Verdict | None:
    """None where fewer than three seeds have results of both sides."""
    pairs = _pairs(comparison, measure, records, seeds)
    if len(pairs) < FEWEST_SEEDS:
        return None
    ahead, behind = (np.array(part) for part in zip(*pairs, strict=True))
    scale, difference = MEASURES[measure].scale, paired_interval(ahead, behind)
    means = tuple(float(np.nanmean(part, 1).mean()) * scale for part in (ahead, behind))
    better = difference.scaled(1 if MEASURES[measure].higher_is_better else -1)
    says = HOLDS if better.low > 0 else FAILS if better.high < 0 else OPEN
    by_seed = tuple((np.nanmean(ahead - behind, 1) * scale).tolist())
    return Verdict(comparison, measure, by_seed, means, difference.scaled(scale), says)


def _pairs(comparison, measure, records, seeds) -> list[tuple[np.ndarray, np.ndarray]]:
    sides = comparison.ahead, comparison.behind
    rows = [[side.figures(records, seed, measure) for side in sides] for seed in seeds]
    whole = [tuple(row) for row in rows if all(part is not None for part in row)]
    return [(a, b) for a, b in whole if not np.isnan(a - b).all()]


def smallest(
    comparison: Comparison, measure: str, records: Records, table: Table
) -> tuple[float, bool] | None:
    """The smallest difference that the planned seeds and prompts can show, from the pilot, in the
    measure's unit; and whether it holds the spread over the seeds, else the prompts alone. None
    where the pilot has no results of it, or nothing to tell a spread by."""
    pairs = _pairs(comparison, measure, records, table.pilot[:1])
    if not pairs:
        return None
    ahead, behind = (np.array(part) for part in zip(*pairs, strict=True))
    error = 0.0 if ahead.shape[1] == 1 else prompt_error(ahead, behind)
    spread = pilot_spread(measure, records, table)
    if spread is None and not error:
        return None
    least = smallest_difference(spread or 0.0, error, len(table.seeds))
    return least * MEASURES[measure].scale, spread is not None


def pilot_spread(measure: str, records: Records, table: Table) -> float | None:
    """The deviation of a difference from seed to seed, from the runs that the pilot trained with
    several; None where there are none, or they have no such figure."""
    rows = [
        [Side("", name).figures(records, seed, measure) for seed in table.pilot]
        for name in repeated(records, table)
    ]
    rows = [row for row in rows if all(part is not None for part in row)]
    if not rows:
        return None
    return seed_spread([[float(np.nanmean(part)) for part in row] for row in rows])


def repeated(records: Records, table: Table) -> list[str]:
    """The runs that the pilot has with all its seeds, where it has several."""
    known = {(record["run"], record["seed"]) for record in records}
    if len(table.pilot) < 2:
        return []
    return [name for name in table.again if known >= {(name, seed) for seed in table.pilot}]


def sentence(verdicts: Sequence[Verdict | None], count: int) -> str:
    """What holds, what does not, and what cannot be told, from the figures; `count` verdicts were
    wanted."""
    known = [one for one in verdicts if one is not None]
    if not known:
        return "Not measured yet."
    say: dict[str, Callable[[Verdict], str]] = {
        HOLDS: lambda one: f"{_measured(one)} ({_signed(one)})",
        FAILS: lambda one: f"{_measured(one)} ({_signed(one)})",
        OPEN: lambda one: f"{_measured(one)} (less than {_half(one)} would not show)",
    }
    parts = []
    for says, words in (
        (HOLDS, "It holds for"),
        (FAILS, "it fails, the opposite is seen, for"),
        (OPEN, "it cannot be told for"),
    ):
        own = [one for one in known if one.says == says]
        if own:
            parts.append(f"{words} {_grouped(own, say[says])}")
    if len(known) < count:
        parts.append(f"{count - len(known)} of {count} comparisons are not measured yet")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _grouped(verdicts: Sequence[Verdict], say: Callable[[Verdict], str]) -> str:
    names = dict.fromkeys(one.comparison.name for one in verdicts)
    return ", and for ".join(
        f"{name} in {', '.join(say(one) for one in verdicts if one.comparison.name == name)}"
        for name in names
    )


def _measured(one: Verdict) -> str:
    return MEASURES[one.measure].title


def _signed(one: Verdict) -> str:
    measure = MEASURES[one.measure]
    return f"{one.difference.mean:+.{measure.digits}f} {measure.unit}".strip()


def _half(one: Verdict) -> str:
    measure = MEASURES[one.measure]
    return f"{one.difference.half_width:.{measure.digits}f} {measure.unit}".strip()
