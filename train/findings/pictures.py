"""The pictures of docs/findings.md, made from the results alone."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gentron_fast.files import whole_file
from gentron_train.findings import claims
from gentron_train.findings.claims import Finding, verdicts_of
from gentron_train.findings.paired import Interval
from gentron_train.findings.scoring import MEASURES, ROUNDING, lambda_of, starts_of
from gentron_train.findings.table import Table
from gentron_train.small_world.picture import strip

PICTURES = "findings"  # folder beside the page
SHEET = "clips.png"
SHEET_PROMPTS = 2  # of each kind
MADE_OF = "Comment"  # of a picture: the digest of what it shows
SMALL = 7  # points
WIDE = 6  # times as far from 0 as all others: such an interval has a logarithmic axis
TICKS = 0.05, 0.1, 0.2, 0.5, 1, 2, 5


def picture_name(number: int) -> str:
    return f"finding-{number}.png"


def digest(number: int, records: Sequence[dict], table: Table) -> str:
    """Of all that a finding's picture is drawn from."""
    if number > len(claims.findings(table)):
        return hashlib.sha256(json.dumps(starts_of(records)).encode()).hexdigest()
    finding = claims.findings(table)[number - 1]
    runs = {side.run for c in finding.comparisons for side in (c.ahead, c.behind)}
    names = ("run", "seed", "lambda_m", "parameters", "flops", "loss", "curve", "scores")
    own = [[r[name] for name in names] for r in records if r["run"] in runs]
    return hashlib.sha256(f"{finding}{json.dumps(own)}".encode()).hexdigest()


def draw(records: Sequence[dict], table: Table, folder: Path) -> list[Path]:
    """The pictures of the findings that have figures, from the results of the seeds that count."""
    findings = claims.findings(table)
    figures = {n: _figure(finding, records, table) for n, finding in enumerate(findings, 1)}
    figures[len(findings) + 1] = _figure_of_starts(records)
    paths = []
    for number, figure in figures.items():
        if figure is None:
            continue
        path = folder / picture_name(number)
        about = {"Software": None, MADE_OF: digest(number, records, table)}
        with whole_file(path) as partial:
            figure.savefig(partial, format="png", dpi=110, metadata=about)
        paths.append(path)
    return paths


def _figure(finding: Finding, records, table: Table):
    """A panel for each measure; None where nothing was measured."""
    from matplotlib.figure import Figure

    verdicts = verdicts_of(finding, records, table)
    if not verdicts:
        return None
    names = list(dict.fromkeys(one.measure for one in verdicts))
    extra = _extra(finding, records, table)
    panels = len(names) + bool(extra)
    columns = 2 if panels == 4 else min(panels, 3)
    lines = [names[first : first + columns] for first in range(0, panels, columns)]
    rows = [
        list(dict.fromkeys(one.comparison for one in verdicts if one.measure in line))
        for line in lines
    ]
    heights = [1.1 + 0.42 * max(len(own), 3) for own in rows]
    size = max(2.7 * columns + 1.8, 5), max(sum(heights), 2.6)
    figure = Figure(figsize=size, layout="constrained")
    ratios = {"height_ratios": heights}
    axes = figure.subplots(len(lines), columns, squeeze=False, gridspec_kw=ratios).flatten()
    for place, (axis, name) in enumerate(zip(axes, names, strict=False)):
        own = {one.comparison: one for one in verdicts if one.measure == name}
        line, column = divmod(place, columns)
        _draw_differences(axis, rows[line], own, name, is_named=column == 0)
    if extra:
        extra(axes[panels - 1])
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure


def draw_sheet(
    table: Table,
    seed: int,
    sample: Callable[[str, float], np.ndarray],
    models: dict[str, str],
    path: Path,
) -> None:
    """A row for each of `sheet_rows`, with the first, middle and last frame of every prompt's clip:
    what a person sees of it.

    sample: from a run and a λ_M the clips, uint8 (P, T, H, W, 3), of the seed. models: the digest
    of each run's model, which the picture names.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    strips = []
    for run, scale in sheet_rows(table):
        frames = sample(run, scale)
        shown = frames[:, [0, frames.shape[1] // 2, -1]]
        guided = f", lambda_m {scale:g}" if table.runs[run].stage == "t2v" else ""
        strips.append(strip(shown, f"{run}, seed {seed}, model {models.get(run)}{guided}"))
    about = PngInfo()
    about.add_text(MADE_OF, json.dumps({"seed": seed, "models": models}))
    with whole_file(path) as partial:
        Image.fromarray(np.concatenate(strips)).save(partial, format="png", pnginfo=about)


def sheet_models(picture: Path) -> dict:
    """Of a picture that `draw_sheet` made: its seed, and each run's digest, `models`."""
    from PIL import Image

    with Image.open(picture) as sheet:
        return json.loads(sheet.info[MADE_OF])


def sheet_rows(table: Table) -> list[tuple[str, float]]:
    """The runs that the findings compare clips of, or compare them with, and the λ_M of each.
    ValueError for a table that lacks one."""
    compared = [c for finding in claims.findings(table) for c in finding.comparisons]
    sides = [side for c in compared for side in (c.behind, c.ahead)]
    if missing := sorted({side.run for side in sides} - {*table.runs}):
        raise ValueError(f"the table lacks {', '.join(missing)}, which are compared")
    clips = {c.behind.run for c in compared if table.runs[c.behind.run].stage == "t2v"}
    runs = clips | {c.ahead.run for c in compared if c.behind.run in clips}
    scales = {(s.run, scale) for s in sides if s.run in runs for scale in s.scales}
    rows = [(run, lambda_of(scale)) for run, scale in scales]
    return sorted(rows, key=lambda row: (list(table.runs).index(row[0]), row[1]))


def _draw_differences(axis, rows, verdicts: dict, measure: str, is_named: bool) -> None:
    """A row for each comparison, empty where it has no such figure."""
    for place, comparison in enumerate(reversed(rows)):
        if (one := verdicts.get(comparison)) is None:
            continue
        mean, low, high = one.difference.mean, one.difference.low, one.difference.high
        colour = "C0" if one.counts or one.is_beside else "C7"
        axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", c=colour, capsize=3)
        axis.plot(one.by_seed, [place - 0.25] * len(one.by_seed), ".", color="grey", markersize=5)
    names = [f"{row.ahead.name} −\n{row.behind.name}" for row in reversed(rows)]
    axis.set_yticks(range(len(rows)), names if is_named else [""] * len(rows), fontsize=SMALL)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.axvline(0, color="grey", linewidth=0.8)
    shown = MEASURES[measure]
    unit = f", {shown.difference_unit}" if shown.unit else ""
    sides = {True: " (right is better)", False: " (left is better)", None: ""}
    axis.set_title(f"{shown.title}{unit}{sides[shown.higher_is_better]}", fontsize=SMALL)
    _spread_out(axis, [verdicts[row].difference for row in rows if row in verdicts])
    axis.tick_params(axis="x", labelsize=SMALL)


def _spread_out(axis, intervals: Sequence[Interval]) -> None:
    """A logarithmic axis beyond what all intervals but one reach, where that reaches far."""
    *others, widest = sorted(max(abs(one.low), abs(one.high)) for one in intervals)
    if others and widest > WIDE * others[-1] > 0:
        inner, outer = _rounded_up(others[-1]), _rounded_up(widest)
        axis.set_xscale("symlog", linthresh=inner)
        axis.set_title(f"{axis.get_title()},\nlogarithmic beyond {inner:g}", fontsize=SMALL)
        axis.set_xticks([-outer, -inner, 0, inner, outer], minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlim(-1.2 * outer, 1.2 * outer)
    else:
        axis.locator_params(axis="x", nbins=5)


def _rounded_up(value: float) -> float:
    """To one digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit) * unit


def _extra(finding: Finding, records, table: Table):
    """What draws one more panel of a finding, or None."""
    measures = {name for one in finding.comparisons for name in one.shown}
    if "loss" in measures:
        sides = [side for one in finding.comparisons for side in (one.behind, one.ahead)]
        runs = list(dict.fromkeys(side.run for side in sides))
        return lambda axis: _draw_losses(axis, runs, records)
    if "travel" in measures:
        return lambda axis: _draw_scales(axis, records, table)
    return None


def loss_curve(run: str, records) -> tuple[np.ndarray, np.ndarray]:
    """TFLOP spent and the loss there, the mean of a run's seeds at the steps that all of them
    have."""
    own = [record for record in records if record["run"] == run and record["lambda_m"] is None]
    curves = [dict(record["curve"]) for record in own]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    loss = np.mean([[curve[step] for step in steps] for curve in curves], 0)
    return np.array(steps) * own[0]["flops"] / 1e12, loss


def _draw_losses(axis, runs: Sequence[str], records) -> None:
    for run in runs:
        own = [record for record in records if record["run"] == run]
        if own:
            label = f"{own[0]['parameters'] / 1e6:.1f} M parameters"
            axis.loglog(*loss_curve(run, records), label=label, linewidth=1)
    axis.set_yticks(TICKS, map(str, TICKS), minor=False)
    axis.set_yticks([], minor=True)
    axis.set_ylim(0.08, 2)
    axis.grid(alpha=0.3)
    axis.set_title("loss by training, TFLOP", fontsize=SMALL)
    axis.legend(fontsize=SMALL)
    axis.tick_params(labelsize=SMALL)


def _draw_scales(axis, records, table: Table) -> None:
    """Fidelity against the strength of motion, a point a λ_M: the mean, and in grey each seed."""
    scales, lines = claims.by_scale(records, table, ("travel", "psnr"))
    for points in lines:
        axis.plot(*points.T, "-", color="grey", linewidth=0.6)
    if lines:
        mean = np.mean(lines, 0)
        axis.plot(*mean.T, "o-", ms=4)
        for index, (scale, point) in enumerate(zip(scales, mean, strict=True)):
            place = (3, -11 if index % 2 else 4)  # neighbours may lie close together
            axis.annotate(
                f"{scale:g}", point, xytext=place, textcoords="offset points", fontsize=SMALL
            )
    axis.set_xlabel("way, px", fontsize=SMALL)
    axis.set_ylabel("PSNR, dB", fontsize=SMALL)
    axis.set_title("at each λ_M", fontsize=SMALL)
    axis.tick_params(labelsize=SMALL)


def _figure_of_starts(records):
    """A row for each T2I run, a point a seed, and what rounding alone may make of equal sums; None
    where nothing was measured."""
    from matplotlib.figure import Figure

    starts = starts_of(records)
    if not starts:
        return None
    figure = Figure((5, 2.6), layout="constrained")
    axis = figure.subplots()
    for place, values in enumerate(reversed(starts.values())):
        axis.plot(values, [place] * len(values), "o", c="C0")
    axis.set_yticks(range(len(starts)), list(reversed(starts)), fontsize=SMALL)
    axis.axvline(ROUNDING, color="grey", linewidth=0.8, linestyle=":", label="rounding")
    axis.set_xlim(-ROUNDING / 10, 1.2 * max(ROUNDING, *map(max, starts.values())))
    title = "largest difference between T2V before its first step and T2I, of the largest value"
    axis.set_title(title, fontsize=SMALL)
    axis.legend(fontsize=SMALL)
    axis.tick_params(labelsize=SMALL)
    return figure
