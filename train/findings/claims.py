"""What the paper says, as comparisons of runs, and what the results say of each."""

import functools
import itertools
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
from gentron_train.findings.scoring import MEASURES, lambda_of, prompts_of
from gentron_train.findings.table import Table
from gentron_train.settings import Settings, load_config
from gentron_train.small_world.renderer import DIRECTIONS

BEST = (1.0, 1.3)  # λ_M, as the paper has it
FEWEST_SEEDS = 3
SIZES = "smaller", "both", "larger"
HOLDS, FAILS, OPEN = "holds", "fails", "cannot be told"
Records = Sequence[dict]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a run, at one λ_M or at the mean of several; None is 1."""

    name: str
    run: str
    scales: tuple[float | None, ...] = (None,)

    @property
    def at(self) -> str:
        """Its λ_M, where it is not that of all."""
        if self.scales == (None,):
            return ""
        scales = ", ".join(f"{lambda_of(scale):g}" for scale in self.scales)
        return f" (λ_M {scales})"


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
    about. besides: of these a second sentence speaks; others: of these none."""

    ahead: Side
    behind: Side
    measures: tuple[str, ...]
    besides: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.ahead.name} ahead of {self.behind.name}"

    @property
    def runs(self) -> str:
        """Those that are compared."""
        return " − ".join(f"{side.run}{side.at}" for side in (self.ahead, self.behind))

    @property
    def shown(self) -> tuple[str, ...]:
        """All its measures."""
        return self.measures + self.besides + self.others


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

    @property
    def is_beside(self) -> bool:
        """Whether the second sentence is about it."""
        return self.measure in self.comparison.besides


MAIN = ("alignment", "psnr")
IMAGES = ("colour", "shape", "relation", "broken")
FRAMES = ("frame alignment", "frame psnr")
STEADINESS = ("motion", "place jitter", "size jitter", "colour jitter")
CLIPS = STEADINESS, ("frame broken",)
SWEPT = ("motion", "travel", "place jitter", "size jitter", "broken")


def findings(table: Table) -> list[Finding]:
    """The paper's, in the order of the page; all but that of the start, which has one figure."""
    adaln, clip = Side("adaLN-zero", "adaln"), Side("cross-attention", "clip")
    one, other, both = Side("CLIP", "clip"), Side("T5", "t5"), Side("both encoders", "both")
    smaller, middle = Side("the smaller model", "smaller"), Side("the middle model", "both")
    larger = Side("the larger model", "larger")
    image, longer = Side("T2I not trained longer", "both"), Side("T2I trained longer", "both-on")
    alone, images = Side("clips alone", "t2v-clips"), Side("clips + images", "t2v-images")
    still, joint = Side("clips + motion-free", "t2v-motion-free"), Side("all three", "t2v-both")
    guided = Side("clips + motion-free at λ_M 1.3", "t2v-motion-free", (1.3,))
    scales = _swept(table)
    inside = tuple(scale for scale in scales if BEST[0] <= lambda_of(scale) <= BEST[1])
    best = Side("λ_M 1.0 … 1.3", table.sweep_run, inside)
    outside = [Side(f"λ_M {s:g}", table.sweep_run, (s,)) for s in scales if s not in inside]
    return [
        Finding(
            "Cross-attention against adaLN-zero",
            "Cross-attention is far ahead of adaLN-zero for free text (table 4).",
            (Comparison(clip, adaln, MAIN, others=IMAGES),),
            "What favours adaLN-zero here: the text encoders were trained to tell all that a "
            "caption says from one pooled vector, captions are short, and its wider MLP takes a "
            "tenth more FLOPs a step. What favours cross-attention: rate, batch and loss weight "
            "were found with a model that has it.",
        ),
        Finding(
            "Both text encoders against one",
            "CLIP and T5 together, interleaved, are ahead of either alone.",
            (
                Comparison(both, one, MAIN, others=IMAGES),
                Comparison(both, other, MAIN, others=IMAGES),
                Comparison(one, other, (), others=MAIN),
            ),
            "CLIP and T5 are small ones here, both trained on the small world's captions: they "
            "differ in how they read a text, by words and by letters, and not, as the paper's, in "
            "what they have learnt. Both together have 2 % more parameters, for the second one's "
            "projection, and are what rate, batch and loss weight were found with.",
        ),
        Finding(
            "Size",
            "The larger model is ahead of the smaller one after as many steps.",
            (
                Comparison(middle, smaller, MAIN, others=("loss",)),
                Comparison(larger, middle, MAIN, others=("loss",)),
            ),
            "The middle model is the run both; all three have the learning rate that was found "
            f"for it. {_steps_of_size(table)} From XL/2 to G/2, the paper's two, the depth grows "
            "1.7 times and the width 1.44.",
        ),
        Finding(
            "Clips, images and motion-free samples",
            "Training on clips alone harms a frame's quality; images beside the clips and "
            "motion-free samples bring it back.",
            (
                Comparison(image, alone, FRAMES),
                Comparison(longer, alone, FRAMES),
                Comparison(images, alone, FRAMES, *CLIPS),
                Comparison(still, alone, FRAMES, *CLIPS),
                Comparison(guided, alone, FRAMES, *CLIPS),
                Comparison(joint, alone, FRAMES, *CLIPS),
                Comparison(image, joint, (), others=FRAMES),
                Comparison(longer, images, (), others=FRAMES),
                Comparison(longer, joint, (), others=FRAMES),
            ),
            "T2I not trained longer ends where T2V begins, so that clips alone are ahead of it by "
            "their steps: that tells nothing of clips. T2I trained longer does: it has as many "
            "steps more as T2V has, of as many noised images as T2V has frames, at the same "
            "rate, timesteps and loss weights. T2V has a sixth more parameters, its temporal "
            "layers, a quarter more FLOPs a step, and a frame is denoised with seven others; its "
            f"{table.clips:,} clips are seen more often than T2I's {table.images:,} images. "
            "Images and motion-free samples take the place of clips: of 10 samples 10 are clips in "
            "clips alone, 8 with one of them and 6 with both; and an image is one noised frame, "
            "where a clip and a motion-free sample are eight. Clips here are blurred, compressed "
            "and carry a mark at the bottom, images are clean.",
        ),
        Finding(
            "The guidance scale of motion",
            "λ_M from 1.0 to 1.3 is best.",
            tuple(Comparison(best, side, MAIN, others=SWEPT) for side in outside),
            "λ_M 1 is sampling without motion-free guidance; at 0 guidance begins at the "
            "motion-free branch, and that of the text still has motion in it. "
            f"The world's own way for these prompts is {own_way(table):.1f} px. The run is that of "
            "all three, which has learnt motion from the fewest clips.",
        ),
    ]


def _steps_of_size(table: Table) -> str:
    """How depth and width, and with it the MLP, grow from one size to the next."""
    models = [table.model(table.runs[n]) for n in SIZES if n in table.runs]
    steps = [(b.depth / a.depth, b.width / a.width) for a, b in itertools.pairwise(models)]
    if not steps:
        return ""
    depth, width = ([f"{value:.3g}" for value in part] for part in zip(*steps, strict=True))
    return (
        f"Depth grows {in_words(depth)} times, width, and with it the MLP, {in_words(width)} times."
    )


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
        for name in comparison.shown
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


def by_scale(
    records: Records, table: Table, measures: Sequence[str]
) -> tuple[list[float], list[np.ndarray]]:
    """The λ_M of the swept run, and of each seed that has results at all of them the means of
    `measures`, (λ_M, measure)."""
    scales, rows = _swept(table), []
    for seed in table.seeds:
        found = [
            [figures(records, table.sweep_run, seed, name, (scale,)) for name in measures]
            for scale in scales
        ]
        if all(part is not None for own in found for part in own):
            rows.append(np.array([[np.nanmean(part) for part in own] for own in found]))
    return [lambda_of(scale) for scale in scales], rows


def _swept(table: Table) -> list[float | None]:
    """What the swept run is scored at, from the least λ_M on."""
    run = table.runs.get(table.sweep_run)
    return [] if run is None else sorted(table.scales(run), key=lambda_of)


def sentence(verdicts: Sequence[Verdict | None]) -> str:
    """What holds, what does not, and what cannot be told, from the figures that the paper's
    sentence is about; None: not measured."""
    known = [one for one in verdicts if one is not None and one.counts]
    if not known:
        return "Not measured yet."
    parts = []
    for says, words, last in (
        (HOLDS, "it holds", "and"),
        (FAILS, "it fails, the opposite is seen", "and"),
        (OPEN, "it cannot be told", "or"),
    ):
        if any(one.says == says for one in known):
            parts.append(f"{words}: {_grouped(known, says, last)}")
    if len(parts) > 1:
        parts[0] = f"in part {parts[0]}"
    if None in verdicts:
        parts.append("the rest is not measured yet")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def beside(verdicts: Sequence[Verdict]) -> str:
    """What is told of the measures that a finding has besides those of the paper's sentence: who
    is ahead of whom; "" where there are none."""
    known = [one for one in verdicts if one.is_beside]
    if not known:
        return ""
    parts = [part for says in (HOLDS, FAILS) if (part := _grouped(known, says, "and"))]
    if any(one.says == OPEN for one in known):
        parts.append("the rest cannot be told" if parts else "nothing can be told")
    titles = in_words([MEASURES[name].title for name in dict.fromkeys(o.measure for o in known)])
    return f"Besides, of {titles}: {'; '.join(parts)}."


def _grouped(verdicts: Sequence[Verdict], says: str, last: str) -> str:
    """Who is ahead of whom in those that say so, and in which measures: unsaid where it is open in
    all."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for one in verdicts:
        if one.says == says:
            pairs.setdefault(_seen(one), []).append(_told(one))
    whole = {
        _seen(one)
        for one in verdicts
        if says == OPEN and all(o.says == OPEN for o in verdicts if o.comparison == one.comparison)
    }
    groups: dict[str, list[str]] = {}
    by_ahead = len({ahead for ahead, _ in pairs}) <= len({behind for _, behind in pairs})
    for (ahead, behind), told in pairs.items():
        detail = "" if (ahead, behind) in whole else f" ({', '.join(told)})"
        if by_ahead:
            groups.setdefault(f"{ahead} ahead of ", []).append(f"{behind}{detail}")
        else:
            groups.setdefault(f" ahead of {behind}", []).append(f"{ahead}{detail}")
    parts = [
        f"{key}{in_words(own, last)}" if by_ahead else f"{in_words(own, last)}{key}"
        for key, own in groups.items()
    ]
    return ", ".join(parts)


def in_words(values: Sequence, last: str = "and") -> str:
    """Values in words: a, b and c."""
    *others, final = map(str, values)
    return f"{', '.join(others)} {last} {final}" if others else final


def _seen(one: Verdict) -> tuple[str, str]:
    """Who is ahead of whom, as it was measured, or where that is open as the paper has it."""
    ahead, behind = one.comparison.ahead.name, one.comparison.behind.name
    return (behind, ahead) if one.says == FAILS else (ahead, behind)


def _told(one: Verdict) -> str:
    """The measure, and where it is told the difference of the side that is ahead."""
    measure = MEASURES[one.measure]
    if one.says == OPEN:
        return measure.title
    value = one.difference.mean * (-1 if one.says == FAILS else 1)
    return f"{measure.title} {value:+.{measure.digits}f} {measure.difference_unit}".rstrip()
