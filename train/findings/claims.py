"""What the paper says, as comparisons of runs, and what the results say of each."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gentron_train.findings.paired import (
    Interval,
    paired_interval,
    prompt_error,
    seed_spread,
    smallest_difference,
)
from gentron_train.findings.scoring import LAMBDA_M, MEASURES, prompts_of
from gentron_train.findings.table import Table
from gentron_train.settings import Settings, load_config
from gentron_train.small_world.renderer import DIRECTIONS

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


def figures(
    records: Records,
    run: str,
    seed: int,
    measure: str,
    scales: Sequence[float | None] = (None,),
) -> np.ndarray | None:
    """(P,) of a run's seed, at the mean of `scales`, NaN where a prompt has none; None where a
    result is missing."""
    found = [
        record
        for record in records
        if (record["run"], record["seed"]) == (run, seed) and record["lambda_m"] in scales
    ]
    columns = [_column(record, measure) for record in found]
    if len(found) < len(scales) or any(column is None for column in columns):
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
    """That `ahead` is better than `behind`, in each of the measures that the paper's sentence is
    about. others: what is shown beside them, and nothing is said of."""

    ahead: Side
    behind: Side
    measures: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.ahead.name} ahead of {self.behind.name}"

    @property
    def runs(self) -> str:
        """Those that are compared."""
        return f"{self.ahead.run} − {self.behind.run}"


@dataclass(frozen=True)
class Finding:
    """What the paper says in one sentence, the comparisons it comes to, and what a reader has to
    know of them."""

    title: str
    paper: str
    comparisons: tuple[Comparison, ...]
    note: str = ""


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

    @property
    def counts(self) -> bool:
        """Whether the paper's sentence is about it."""
        return self.measure in self.comparison.measures


MAIN = ("alignment", "psnr")
IMAGES = ("colour", "shape", "relation", "broken")
FRAMES = ("frame alignment", "frame psnr")
CLIPS = ("frame broken", "motion", "place jitter", "size jitter", "colour jitter")


def findings(table: Table) -> list[Finding]:
    """The paper's, in the order of the page; all but that of the start, which has one figure."""
    adaln, clip = Side("adaLN-zero", "adaln"), Side("cross-attention", "clip")
    one, other, both = Side("CLIP", "clip"), Side("T5", "t5"), Side("both encoders", "both")
    smaller, middle = Side("the smaller model", "smaller"), Side("the middle model", "both")
    larger = Side("the larger model", "larger")
    image, longer = Side("T2I", "both"), Side("T2I trained on", "both-on")
    alone, images = Side("clips alone", "t2v-clips"), Side("clips + images", "t2v-images")
    still, joint = Side("clips + motion-free", "t2v-motion-free"), Side("all three", "t2v-both")
    guided = Side("clips + motion-free, λ_M 1.3", "t2v-motion-free", (1.3,))
    steps = Settings(**load_config(table.config, "t2i")).steps
    early = f"All are compared after {steps:,} steps; finding 4 has T2I trained on."
    swept = table.lambda_m.get(table.sweep_run, ())
    scales = [None if scale == LAMBDA_M else scale for scale in swept]
    inside = tuple(s for s in scales if BEST[0] <= (LAMBDA_M if s is None else s) <= BEST[1])
    best = Side("λ_M 1.0 … 1.3", table.sweep_run, inside)
    outside = [Side(f"λ_M {s:g}", table.sweep_run, (s,)) for s in scales if s not in inside]
    return [
        Finding(
            "Cross-attention against adaLN-zero",
            "Cross-attention is far ahead of adaLN-zero for free text (table 4).",
            (Comparison(clip, adaln, MAIN, IMAGES),),
            "What favours adaLN-zero here: the text encoders were trained to tell all that a "
            "caption says from one pooled vector, captions are short, and its wider MLP takes a "
            "tenth more FLOPs a step. What favours cross-attention: rate, batch and loss weight "
            f"were found with a model that has it. {early}",
        ),
        Finding(
            "Both text encoders against one",
            "CLIP and T5 together, interleaved, are ahead of either alone.",
            (
                Comparison(both, one, MAIN, IMAGES),
                Comparison(both, other, MAIN, IMAGES),
                Comparison(one, other, (), MAIN),
            ),
            "CLIP and T5 are small ones here, both trained on the small world's captions: they "
            "differ in how they read a text, by words and by letters, and not, as the paper's, in "
            "what they have learnt. Both together have 2 % more parameters, for the second one's "
            f"projection, and are what rate, batch and loss weight were found with. {early}",
        ),
        Finding(
            "Size",
            "The larger model is ahead of the smaller one after as many steps.",
            (
                Comparison(middle, smaller, MAIN, ("loss",)),
                Comparison(larger, middle, MAIN, ("loss",)),
            ),
            "The middle model is the run both; all three have the learning rate that was found "
            f"for it. {early}",
        ),
        Finding(
            "Clips, images and motion-free samples",
            "Training on clips alone harms a frame's quality; images beside the clips and "
            "motion-free samples bring it back.",
            (
                Comparison(longer, alone, FRAMES),
                Comparison(images, alone, FRAMES, CLIPS),
                Comparison(still, alone, FRAMES, CLIPS),
                Comparison(guided, alone, FRAMES, CLIPS),
                Comparison(joint, alone, FRAMES, CLIPS),
                Comparison(longer, images, (), FRAMES),
                Comparison(longer, joint, (), FRAMES),
                Comparison(image, alone, (), FRAMES),
                Comparison(image, joint, (), FRAMES),
            ),
            "Whether clips harm is for T2I trained on to tell: it has as many steps more than T2I "
            "as T2V has, of as many noised images as T2V has frames, at the same rate, timesteps "
            "and loss weights. T2V has a sixth more parameters, its temporal layers, a quarter "
            "more FLOPs a step, and a frame is denoised with seven others. T2I itself ends where "
            "T2V begins; it is shown, and tells nothing of clips. Images and motion-free samples "
            "take the place of clips: of 10 samples 10 are clips in clips alone, 8 with one of "
            "them and 6 with both; and an image is one noised frame, where a clip and a "
            "motion-free sample are eight. Clips here are blurred, compressed and carry a mark at "
            "the bottom, images are clean.",
        ),
        Finding(
            "The guidance scale of motion",
            "λ_M from 1.0 to 1.3 is best.",
            tuple(Comparison(best, side, MAIN, ("motion", "travel", "broken")) for side in outside),
            "λ_M 1 is sampling without motion-free guidance, 0 asks the motion-free branch alone. "
            f"The world's own way for these prompts is {own_way(table):.1f} px. The run is that of "
            "all three, which has learnt motion from the fewest clips.",
        ),
    ]


def own_way(table: Table) -> float:
    """Pixels that what moves along a direction moves, from the first frame that T2V has to the
    last, in the mean of the scored prompts."""
    settings = Settings(**load_config(table.config, "t2v"))
    return (settings.frames - 1) / settings.fps * _mean_speed(table.prompts)


@functools.cache
def _mean_speed(prompts: int) -> float:
    """Pixels a second of what moves along a direction; 0 where nothing does."""
    _, scenes = prompts_of(prompts)
    speeds = [math.hypot(*s.objects[0].velocity) for s in scenes if s.motion in DIRECTIONS]
    return float(np.mean(speeds)) if speeds else 0.0


def verdict(
    comparison: Comparison, measure: str, records: Records, seeds: Sequence[int]
) -> Verdict | None:
    """None where fewer than three seeds have results of both sides."""
    pairs = _pairs(comparison, measure, records, seeds)
    if len(pairs) < FEWEST_SEEDS:
        return None
    ahead, behind = (np.array(part) for part in zip(*pairs, strict=True))
    scale, difference = MEASURES[measure].scale, paired_interval(ahead, behind)
    there = np.where(np.isnan(ahead - behind), np.nan, 1)  # of the prompts that both have
    means = tuple(float(np.nanmean(part * there, 1).mean()) * scale for part in (ahead, behind))
    better = difference.scaled(-1 if MEASURES[measure].higher_is_better is False else 1)
    says = HOLDS if better.low > 0 else FAILS if better.high < 0 else OPEN
    by_seed = tuple((np.nanmean(ahead - behind, 1) * scale).tolist())
    return Verdict(comparison, measure, by_seed, means, difference.scaled(scale), says)


def verdicts_of(finding: Finding, records: Records, table: Table) -> list[Verdict]:
    """Of every comparison in every measure that has results."""
    found = [
        verdict(comparison, name, records, table.seeds)
        for comparison in finding.comparisons
        for name in comparison.measures + comparison.others
    ]
    return [one for one in found if one is not None]


def _pairs(comparison, measure, records, seeds) -> list[tuple[np.ndarray, np.ndarray]]:
    sides = comparison.ahead, comparison.behind
    rows = [[figures(records, s.run, seed, measure, s.scales) for s in sides] for seed in seeds]
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
    stage = table.runs[comparison.behind.run].stage
    ahead, behind = (np.array(part) for part in zip(*pairs, strict=True))
    error = 0.0 if ahead.shape[1] == 1 else prompt_error(ahead, behind)
    spread = pilot_spread(measure, stage, records, table)
    if spread is None and not error:
        return None
    least = smallest_difference(spread or 0.0, error, len(table.seeds))
    return least * MEASURES[measure].scale, spread is not None


def pilot_spread(measure: str, stage: str, records: Records, table: Table) -> float | None:
    """The deviation of a difference from seed to seed, from the runs of a stage that the pilot
    trained with several; None where there are none, or they have no such figure."""
    rows = [
        [figures(records, name, seed, measure) for seed in table.pilot]
        for name in repeated(records, table)
        if table.runs[name].stage == stage
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


def sentence(verdicts: Sequence[Verdict | None]) -> str:
    """What holds, what does not, and what cannot be told, from the figures that the paper's
    sentence is about; None: not measured."""
    known = [one for one in verdicts if one is not None and one.counts]
    if not known:
        return "Not measured yet."
    parts = []
    for says, words in (
        (HOLDS, "it holds"),
        (FAILS, "it fails, the opposite is seen"),
        (OPEN, "it cannot be told"),
    ):
        own = [one for one in known if one.says == says]
        if own:
            parts.append(f"{words}: {_grouped(own)}")
    is_whole = None not in verdicts
    if len(parts) > 1:
        parts[0] = f"in part {parts[0]}"
    if not is_whole:
        parts.append("the rest is not measured yet")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _grouped(verdicts: Sequence[Verdict]) -> str:
    groups: dict[str, list[str]] = {}
    for one in verdicts:
        groups.setdefault(_seen(one), []).append(_told(one))
    told = [f"{name} ({', '.join(own)})" for name, own in groups.items()]
    return " and ".join(told) if len(told) < 3 else ", ".join(told)


def _seen(one: Verdict) -> str:
    """Which side is ahead, as it was measured, or where that is open as the paper has it."""
    ahead, behind = one.comparison.ahead, one.comparison.behind
    if one.says == FAILS:
        ahead, behind = behind, ahead
    return f"{ahead.name} ahead of {behind.name}"


def _told(one: Verdict) -> str:
    """The measure, and where it is told the difference of the side that is ahead."""
    measure = MEASURES[one.measure]
    if one.says == OPEN:
        return measure.title
    value = one.difference.mean * (-1 if one.says == FAILS else 1)
    return f"{measure.title} {value:+.{measure.digits}f} {measure.difference_unit}".rstrip()
