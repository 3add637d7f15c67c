"""docs/findings.md and its pictures, made from the results alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gentron_fast.files import whole_file
from gentron_train.findings import claims
from gentron_train.findings.claims import Comparison, Finding, Verdict
from gentron_train.findings.scoring import (
    LAMBDA_M,
    LAMBDA_T,
    LAST,
    MEASURES,
    RESCALE,
    STEPS,
    result_name,
)
from gentron_train.findings.table import Table
from gentron_train.flops import parameter_count
from gentron_train.small_world.evaluator import COLUMNS

# Settings that say where a run lies, not what it is.
PLACES = {"run", "init", "vae", "text", "clip", "t5", "data", "cache", "seed", "resume", "workers"}
ROUNDING = 1e-5  # of fp32, a prediction's largest error over its largest value


@dataclass(frozen=True)
class Estimate:
    """Of the runs that the pilot has: hours with the seeds that count, and in the pilot, and the
    seconds of each."""

    hours: float
    pilot_hours: float
    seconds: dict[str, float]


def check_records(records: Sequence[dict], table: Table) -> None:
    """ValueError where a result was made with other settings than the table has now."""
    for record in records:
        name = result_name(record["run"], record["seed"], record["lambda_m"])
        if record["run"] not in table.runs:
            raise ValueError(f"{name} is of no run of the table: move it")
        wanted = table.runs[record["run"]].settings(table.config).on(1).to_dict()
        for field in (wanted.keys() & record["settings"].keys()) - PLACES:
            if record["settings"][field] != wanted[field]:
                raise ValueError(
                    f"{name} was made with {field} {record['settings'][field]}, the table says "
                    f"{wanted[field]}: move it, or put the table back"
                )


def estimate(records: Sequence[dict], table: Table) -> Estimate | None:
    """Each run as long for every seed as its fastest of the pilot, beside which least else ran;
    None without any time."""
    spent: dict[tuple[str, int], float] = {}
    for record in records:
        if record["seed"] in table.pilot:
            key = record["run"], record["seed"]
            training = record["train_seconds"] if record["lambda_m"] is None else 0
            spent[key] = spent.get(key, 0) + training + record["score_seconds"]
    if not spent:
        return None
    names = dict.fromkeys(name for name, _ in spent)
    seconds = {name: min(v for (own, _), v in spent.items() if own == name) for name in names}
    hours = sum(seconds.values()) / 3600 * len(table.seeds)
    return Estimate(hours, sum(spent.values()) / 3600, seconds)


def page(records: Sequence[dict], table: Table, pictures: str) -> str:
    """docs/findings.md; pictures: the folder of its pictures, as the page links to it."""
    own = [record for record in records if record["seed"] in table.seeds]
    parts = [_introduction(table), _models(table), _pilot(records, table)]
    numbered = list(enumerate(claims.findings(table), 1))
    parts += [_finding(number, one, own, table, pictures) for number, one in numbered]
    parts += [_start(len(numbered) + 1, own), _results(records)]
    return "\n\n".join(parts) + "\n"


def _introduction(table: Table) -> str:
    kinds = ", ".join(COLUMNS)
    count = table.prompts * len(COLUMNS)
    return f"""# The paper's findings, in miniature

What GenTron's authors report of models of a billion parameters, tried on models a thousandth of
that size in the small world, where what a picture shows is read back by rule. Each run is trained
from nothing, but for text encoders and autoencoder, which are those that ship, with the seeds
{_listed(table.seeds)}, and scored on the same {count} prompts ({table.prompts} each of {kinds}):
{STEPS} steps, λ_T {LAMBDA_T:g}, λ_M {LAMBDA_M:g}, rescale {RESCALE:g}. A difference is of two runs
with the same seed and the same prompts and noise; its 95 % interval holds
the spread over the seeds (Student's t) and over the prompts (a bootstrap). "Holds" and "fails" are
of intervals that leave out 0; what is neither cannot be told here. In the pictures a grey point is
the difference of one seed.

    make findings                 # trains what is missing, hours on two cores; DEVICE=cuda
    python -m gentron_train.findings --plan | --pilot | --page

The settings were fixed before the first of these seeds was trained
([runs.yaml](../train/configs/findings/runs.yaml),
[settings.yaml](../train/configs/findings/settings.yaml)). What the small world cannot say: its
captions are short and their encoders were trained to tell all that they say from one pooled vector,
which favours adaLN-zero; seeds change weights, order and noise, not the data."""


def _models(table: Table) -> str:
    lines = ["| run | stage | parameters | differs by |", "|---|---|---|---|"]
    for run in table.runs.values():
        changes = " ".join(f"{name}: {value}" for name, value in run.changes.items())
        start = f"from {run.start}; " if run.start else ""
        lines.append(
            f"| {run.name} | {run.stage} | {parameter_count(table.model(run)):,} | "
            f"{start}{changes} |"
        )
    if table.runs.keys() >= {"adaln", "clip"}:
        adaln, cross = (
            parameter_count(table.model(table.runs[name])) for name in ("adaln", "clip")
        )
        share = 100 * (adaln / cross - 1)
        lines.append(
            f"\nadaLN-zero has {abs(share):.1f} % {'more' if share > 0 else 'fewer'} parameters "
            "than cross-attention."
        )
    return "\n".join(lines)


def _pilot(records, table: Table) -> str:
    title = f"## The pilot\n\nSeeds {_listed(table.pilot)}, left out of all that follows."
    hours = estimate(records, table)
    if hours is None:
        return f"{title} Not run yet."
    lines = [
        f"{title} It has {len(hours.seconds)} of {len(table.runs)} runs; by their times these take "
        f"{hours.hours:.1f} hours with the {len(table.seeds)} seeds that count, and took "
        f"{hours.pilot_hours:.1f} in the pilot. The smallest difference that is seen in 80 of 100 "
        "repetitions:",
        "",
        "| | smallest difference (*: by the prompts alone) |",
        "|---|---|",
    ]
    for finding in claims.findings(table):
        for comparison in finding.comparisons:
            cells = []
            for name in comparison.measures:
                least = claims.smallest(comparison, name, records, table)
                if least is not None:
                    measure, mark = MEASURES[name], "" if least[1] else "*"
                    shown = f"{least[0]:.{measure.digits}f} {measure.unit}".strip()
                    cells.append(f"{measure.title} {shown}{mark}")
            if cells:
                lines.append(f"| {comparison.name} | {', '.join(cells)} |")
    lines += ["", "| run | steps a second | minutes of training and scoring |", "|---|---|---|"]
    for name, seconds in hours.seconds.items():
        own = [r for r in records if r["run"] == name and r["seed"] in table.pilot]
        rate = max(r["steps"] / max(r["train_seconds"], 1e-9) for r in own)
        lines.append(f"| {name} | {rate:.2f} | {seconds / 60:.1f} |")
    if names := claims.repeated(records, table):
        freedom = len(names) * (len(table.pilot) - 1)
        lines.append(
            f"\nThe spread over seeds is that of the runs trained with several, {_listed(names)}, "
            f"from {freedom} degrees of freedom, as if two runs with one seed had nothing in "
            "common."
        )
    return "\n".join(lines)


def _finding(number: int, finding: Finding, records, table: Table, pictures: str) -> str:
    wanted = [(c, name) for c in finding.comparisons for name in c.measures]
    verdicts = [claims.verdict(c, name, records, table.seeds) for c, name in wanted]
    parts = [
        f"## {number}. {finding.title}",
        f"The paper: {finding.paper}",
        f"**{claims.sentence(verdicts, len(wanted))}**",
    ]
    known = [one for one in verdicts if one is not None]
    if known:
        parts += [f"![{finding.title}]({pictures}/{picture_name(number)})", _table(known)]
        parts += [_loss_by_flops(one.comparison, records) for one in known if one.measure == "loss"]
    return "\n\n".join(parts)


def picture_name(number: int) -> str:
    return f"finding-{number}.png"


def _table(verdicts: Sequence[Verdict]) -> str:
    lines = ["| | in | means | difference, 95 % interval | seeds | |", "|---|---|---|---|---|---|"]
    for one in verdicts:
        measure, interval = MEASURES[one.measure], one.difference
        mean, low, high = (
            f"{value:+.{measure.digits}f}" for value in (interval.mean, interval.low, interval.high)
        )
        ahead, behind = (f"{value:.{measure.digits}f}" for value in one.means)
        unit = f" {measure.unit}" if measure.unit else ""
        lines.append(
            f"| {one.comparison.name} | {measure.title} | {ahead} against {behind}{unit} | "
            f"{mean} ({low} … {high}) | {len(one.by_seed)} | {one.says} |"
        )
    return "\n".join(lines)


def _start(number: int, records) -> str:
    starts = [record for record in records if record["start"] is not None]
    text = [
        f"## {number}. The start of T2V",
        "The paper: temporal layers at zero start exactly as the T2I model.",
    ]
    if not starts:
        return "\n\n".join([*text, "**Not measured yet.**"])
    most = max(record["start"] for record in starts)
    says = "holds" if most < ROUNDING else "fails"
    differ = f"differ by at most {most:.1e} of the largest one" if most else "are equal to the bit"
    text.append(
        f"**It {says}: over {len(starts)} T2I models, of clips and of motion-free samples, the "
        f"predictions {differ} in fp32.**"
    )
    return "\n\n".join(text)


def _results(records) -> str:
    lines = [
        "## Every result",
        "",
        "The file holds the settings, the model's configuration and every prompt's figures.",
        "",
        "| file | steps | seconds | trained at | scored at | on |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        name = result_name(record["run"], record["seed"], record["lambda_m"])
        lines.append(
            f"| [{name}](../bench/results/findings/{name}) | {record['steps']:,} | "
            f"{record['train_seconds']:.0f} + {record['score_seconds']:.0f} | "
            f"{record['train_commit']} | {record['score_commit']} | {record['device']} |"
        )
    return "\n".join(lines if records else ["## Every result", "", "None yet."])


def _listed(values) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} and {last}" if others else last


def draw(records: Sequence[dict], table: Table, folder: Path) -> list[Path]:
    """The pictures of the findings that have figures."""
    from matplotlib.figure import Figure

    own, paths = [record for record in records if record["seed"] in table.seeds], []
    for number, finding in enumerate(claims.findings(table), 1):
        verdicts = [
            one
            for comparison in finding.comparisons
            for name in comparison.measures
            if (one := claims.verdict(comparison, name, own, table.seeds)) is not None
        ]
        if not verdicts:
            continue
        names = list(dict.fromkeys(one.measure for one in verdicts))
        extra = _extra(finding, own, table)
        panels = len(names) + bool(extra)
        rows = len({one.comparison.name for one in verdicts})
        columns = 2 if panels == 4 else min(panels, 3)
        lines = -(-panels // columns)
        size = max(3.3 * columns, 5), max((1.3 + 0.45 * rows) * lines, 2.5)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for axis, name in zip(axes, names, strict=False):
            _draw_differences(axis, [one for one in verdicts if one.measure == name])
        if extra:
            extra(axes[panels - 1])
        for axis in axes[panels:]:
            axis.set_axis_off()
        path = folder / picture_name(number)
        with whole_file(path) as partial:
            figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
        paths.append(path)
    return paths


def _draw_differences(axis, verdicts: Sequence[Verdict]) -> None:
    measure = MEASURES[verdicts[0].measure]
    for place, one in enumerate(reversed(verdicts)):
        mean, low, high = one.difference.mean, one.difference.low, one.difference.high
        axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3)
        axis.plot(one.by_seed, [place - 0.25] * len(one.by_seed), ".", color="grey", markersize=5)
    names = [f"{one.comparison.ahead.name} −\n{one.comparison.behind.name}" for one in verdicts]
    axis.set_yticks(range(len(names)), names[::-1], fontsize=7)
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.axvline(0, color="grey", linewidth=0.8)
    better = "" if measure.higher_is_better else " (less is better)"
    unit = f", {measure.unit}" if measure.unit else ""
    axis.set_title(f"{measure.title}{unit}{better}", fontsize=8)
    axis.locator_params(axis="x", nbins=5)
    axis.tick_params(axis="x", labelsize=7)


def _extra(finding: Finding, records, table: Table):
    """What draws one more panel of a finding, or None."""
    measures = {name for comparison in finding.comparisons for name in comparison.measures}
    sides = [
        side for comparison in finding.comparisons for side in (comparison.ahead, comparison.behind)
    ]
    if "loss" in measures:
        runs = list(dict.fromkeys(side.run for side in sides))
        return lambda axis: _draw_losses(axis, runs, records)
    if any(side.scales != (None,) for side in sides):
        return lambda axis: _draw_scales(axis, records, table)
    return None


def _loss_by_flops(comparison: Comparison, records) -> str:
    """The losses of both sides where the cheaper run ends, in one sentence."""
    curves = [_loss_curve(side.run, records) for side in (comparison.ahead, comparison.behind)]
    end = min(spent[-1] for spent, _ in curves)
    last = np.linspace((1 - LAST) * end, end)
    ahead, behind = (np.interp(last, spent, loss).mean() for spent, loss in curves)
    return (
        f"For as many FLOPs, {end:.3g} TFLOP, the loss is {ahead:.4f} of {comparison.ahead.name} "
        f"and {behind:.4f} of {comparison.behind.name}: the cheaper run's rate has fallen to 0 "
        "there, the other's has not."
    )


def _loss_curve(run: str, records) -> tuple[np.ndarray, np.ndarray]:
    """TFLOP spent and the loss there, the mean of a run's seeds."""
    own = [record for record in records if record["run"] == run and record["lambda_m"] is None]
    curves = [record["curve"] for record in own]
    length = min(map(len, curves))
    steps = np.array([step for step, _ in curves[0][:length]])
    loss = np.mean([[value for _, value in curve[:length]] for curve in curves], 0)
    return steps * own[0]["flops"] / 1e12, loss


def _draw_losses(axis, runs: Sequence[str], records) -> None:
    for run in runs:
        own = [record for record in records if record["run"] == run]
        if own:
            label = f"{own[0]['parameters'] / 1e6:.1f} M"
            axis.loglog(*_loss_curve(run, records), label=label, linewidth=1)
    axis.set_title("loss against TFLOP", fontsize=8)
    axis.legend(fontsize=7)
    axis.tick_params(labelsize=7)


def _draw_scales(axis, records, table: Table) -> None:
    """Fidelity against the strength of motion, a point a λ_M."""
    points = []
    for scale in table.lambda_m:
        side = claims.Side("", table.sweep_run, (None if scale == LAMBDA_M else scale,))
        pairs = [
            [side.figures(records, seed, name) for name in ("travel", "psnr")]
            for seed in table.seeds
        ]
        pairs = [pair for pair in pairs if all(part is not None for part in pair)]
        if pairs:
            points.append((scale, *np.mean([[np.nanmean(p) for p in pair] for pair in pairs], 0)))
    if points:
        axis.plot([way for _, way, _ in points], [psnr for *_, psnr in points], "o-", ms=3)
    for scale, way, psnr in points:
        axis.annotate(f"{scale:g}", (way, psnr), fontsize=7)
    axis.set_title("PSNR, dB, against the way moved, px, by λ_M", fontsize=8)
    axis.tick_params(labelsize=7)
