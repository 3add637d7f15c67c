"""docs/findings.md, made from the results alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gentron_train.findings import claims
from gentron_train.findings.claims import (
    FAILS,
    HOLDS,
    OPEN,
    Comparison,
    Finding,
    Verdict,
    verdicts_of,
)
from gentron_train.findings.pictures import (
    PICTURES,
    SHEET,
    SHEET_PROMPTS,
    loss_curve,
    picture_name,
)
from gentron_train.findings.scoring import (
    LAMBDA_M,
    LAMBDA_T,
    LAST,
    MEASURES,
    RESCALE,
    STEPS,
    prompts_of,
    result_name,
    sampling,
)
from gentron_train.findings.table import TABLE, Table
from gentron_train.flops import parameter_count
from gentron_train.small_world.evaluator import COLUMNS
from gentron_train.stages import ROOT

# Settings that say where a run lies, not what it is.
ELSEWHERE = {
    "run",
    "init",
    "vae",
    "text",
    "clip",
    "t5",
    "data",
    "cache",
    "seed",
    "resume",
    "workers",
}
_SHARED = {
    "device": lambda record: record["device"].split(":")[0],
    "folder of shards": lambda record: record["made_of"].get("shards"),
    "autoencoder": lambda record: record["made_of"].get("vae"),
    "CLIP": lambda record: record["made_of"].get("text_encoder"),
    "T5": lambda record: record["made_of"].get("text_encoder_2"),
}
DECISIONS = ROOT / "docs/decisions.md"
SECTION = "the-papers-findings-in-miniature"  # of it
BESIDE = {HOLDS: "ahead", FAILS: "behind", OPEN: OPEN}  # of what the sentence does not speak of
ROUNDING = 1e-5  # of fp32, a prediction's largest error over its largest value


@dataclass(frozen=True)
class Estimate:
    """Of the runs that the pilot has: hours with the seeds that count, and in the pilot, and the
    seconds of each."""

    hours: float
    pilot_hours: float
    seconds: dict[str, float]


def check_records(records: Sequence[dict], table: Table) -> None:
    """ValueError where a result was made or scored with other settings than the table has now, or
    some on another kind of device, or of other shards or parts, than the others."""
    for field, of in _SHARED.items():
        kinds = {str(of(record)) for record in records if of(record) is not None}
        if len(kinds) > 1:
            kinds = " and ".join(sorted(kinds))
            raise ValueError(
                f"results of another {field} are no pairs: move those of one of {kinds}"
            )
    prompts = table.prompts * len(COLUMNS)
    for record in records:
        name = result_name(record["run"], record["seed"], record["lambda_m"])
        if record["run"] not in table.runs:
            raise ValueError(f"{name} is of no run of the table: move it")
        found = record["sampling"], len(record["scores"]["psnr"])
        if found != (scoring := (sampling(record["lambda_m"]), prompts)):
            raise ValueError(
                f"{name} was scored with {found[0]} on {found[1]} prompts, here it is {scoring[0]} "
                f"on {scoring[1]}: move it"
            )
        wanted = table.runs[record["run"]].settings(table.config).on(1).to_dict()
        for field in (wanted.keys() & record["settings"].keys()) - ELSEWHERE:
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
            spent[key] = spent.get(key, 0) + _seconds(record)
    if not spent:
        return None
    names = dict.fromkeys(name for name, _ in spent)
    seconds = {name: min(v for (own, _), v in spent.items() if own == name) for name in names}
    hours = sum(seconds.values()) / 3600 * len(table.seeds)
    return Estimate(hours, sum(spent.values()) / 3600, seconds)


def page(records: Sequence[dict], table: Table, document: Path, results: Path) -> str:
    """docs/findings.md, as it stands at `document`, with links to what it names; clips of the runs,
    where they were drawn."""
    own, here = counted(records, table), document.parent
    parts = [_introduction(table, here), _models(table), *_starts(own, table), _spent(records)]
    parts.append(_pilot(records, table, here))
    numbered = list(enumerate(claims.findings(table), 1))
    parts += [_finding(number, one, own, table) for number, one in numbered]
    parts.append(_start(len(numbered) + 1, own))
    parts += [_sheet()] if (here / PICTURES / SHEET).exists() else []
    parts += [_results(records, table, os.path.relpath(results, here))]
    return "\n\n".join(parts) + "\n"


def counted(records: Sequence[dict], table: Table) -> list[dict]:
    """Those of the seeds that count."""
    return [record for record in records if record["seed"] in table.seeds]


def _introduction(table: Table, here: Path) -> str:
    kinds = ", ".join(COLUMNS)
    count = table.prompts * len(COLUMNS)
    runs, settings = (os.path.relpath(path, here) for path in (TABLE, table.config))
    decisions = os.path.relpath(DECISIONS, here)
    return f"""# The paper's findings, in miniature

What GenTron's authors report of models of a billion parameters, tried on models a thousandth of
that size in the small world, where what a picture shows is read back by rule. T2I is trained from
nothing, T2V from a T2I run; text encoders and autoencoder are those that shipped then (digests in
the results). Seeds {_listed(table.seeds)} change weights, order and noise, not the data. All are
scored on the same {count} prompts, {table.prompts} each of {kinds} (combinations of shape, colour
and motion that training shows, that it never shows, and two objects with a relation): {STEPS}
steps, λ_T {LAMBDA_T:g}, λ_M {LAMBDA_M:g}, guidance rescale {RESCALE:g}.

    make findings                 # trains what is missing, hours on two cores
    make findings DEVICE=cuda AGAIN=runs/again     # all of it anew, elsewhere
    python -m gentron_train.findings --plan | --pilot | --page

- *What was asked for*: the share of colour, shape and, of two objects, relation that is right, mean
  of the prompts. *Motion*: the share of clips that move as asked.
- *PSNR*: of the picture against the scene of the world that comes closest to it, whatever was
  asked for: how clean it is. *Broken*: below 15 dB.
- *One frame*: the middle frame of a clip, read as an image. *Jitter*: how far place, size and
  colour of an object stray from a smooth course. *Way*: along the direction that was asked for.
- *Loss*: of the training, mean of its last tenth.

A difference is of two runs with the same seed and the same prompts, and of images or of clips the
same noise. Its 95 % interval holds the spread over the seeds (Student's t) and over the prompts (a
bootstrap). "Holds" is said where the interval leaves out 0, of a difference of any size, "fails"
where it does so on the other side; else it cannot be told here. Each interval stands for itself:
where there is no difference, at most one in twenty leaves out 0. In the pictures a grey point is
the difference of one seed.

The settings were fixed before the first of these seeds was trained ([runs.yaml]({runs}),
[settings.yaml]({settings})). Later came, before any T2V result was looked at, the run both-on and
λ_M 1.3 for t2v-motion-free; and, when findings 1 to 3 had results, that the sentences speak of what
was asked for and of PSNR alone: the tables have every measure ([why]({decisions}#{SECTION}))."""


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


def _starts(records, table: Table) -> list[str]:
    """Which results of a seed are of different trainings of a run that others begin with: its own
    and theirs; a sentence each."""
    sentences = []
    for seed in table.seeds:
        for name in dict.fromkeys(run.start for run in table.runs.values() if run.start):
            trainings: dict[str | None, dict[str, None]] = {}  # runs by the digest of its model
            for record in records:
                part = "model" if record["run"] == name else "start"
                if record["seed"] == seed and name in (record["run"], _start_of(record, table)):
                    digest = record["made_of"].get(part)
                    trainings.setdefault(digest, {})[record["run"]] = None
            if len(trainings) > 1:
                first, *others = (_listed(runs) for runs in trainings.values())
                others = "; ".join(f"another to {runs}" for runs in others)
                sentences.append(
                    f"Seed {seed} of {name} was trained {len(trainings)} times, not to the same "
                    f"weights: one belongs to {first}; {others}."
                )
    if not sentences:
        return []
    sentences.append("A difference between results of two trainings has theirs in it too.")
    return [" ".join(sentences)]


def _start_of(record: dict, table: Table) -> str | None:
    return table.runs[record["run"]].start


def _spent(records) -> str:
    """Hours of all results."""
    if not records:
        return "Nothing has been trained yet."
    spent = sum(_seconds(record) for record in records) / 3600
    return f"All results here, the pilot's with them, took {spent:.1f} core hours together."


def _seconds(record: dict) -> float:
    """Of a result: a run's training counts once, however often it is scored."""
    training = record["train_seconds"] if record["lambda_m"] is None else 0
    return training + record["score_seconds"]


def _pilot(records, table: Table, here: Path) -> str:
    title = f"## The pilot\n\nSeeds {_listed(table.pilot)}, left out of all findings."
    hours = estimate(records, table)
    if hours is None:
        return f"{title} Not run yet."
    text = (
        f"{title} It has {len(hours.seconds)} of {len(table.runs)} runs, which took "
        f"{hours.pilot_hours:.1f} hours of one core; with the {len(table.seeds)} seeds that count "
        f"they take {hours.hours:.1f}."
    )
    if len(hours.seconds) < len(table.runs):
        text += (
            " The others were left out for time: of their comparisons there is no estimate "
            "beforehand. An earlier pilot, of shorter runs, had learnt colours alone, and its "
            f"results are left out ([why]({os.path.relpath(DECISIONS, here)}#loss-and-timesteps))."
        )
    lines = [
        f"{text} The smallest difference that is seen in 80 of 100 repetitions:",
        "",
        "| | smallest difference (*: by the prompts alone) |",
        "|---|---|",
    ]
    for finding in claims.findings(table):
        for comparison in finding.comparisons:
            cells = []
            for name in comparison.measures + comparison.others:
                least = claims.smallest(comparison, name, records, table)
                if least is not None:
                    measure, mark = MEASURES[name], "" if least[1] else "*"
                    shown = f"{least[0]:.{measure.digits}f} {measure.difference_unit}".strip()
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


def _finding(number: int, finding: Finding, records, table: Table) -> str:
    verdicts = verdicts_of(finding, records, table)
    wanted = sum(len(comparison.measures) for comparison in finding.comparisons)
    counting = [one for one in verdicts if one.counts]
    parts = [
        f"## {number}. {finding.title}",
        f"The paper: {finding.paper}",
        f"**{claims.sentence([*counting, *[None] * (wanted - len(counting))])}**",
        *([finding.note] if finding.note else []),
    ]
    if verdicts:
        parts += [f"![{finding.title}]({PICTURES}/{picture_name(number)})", _table(verdicts)]
        losses = [one.comparison for one in verdicts if one.measure == "loss"]
        parts += [_loss_by_flops(comparison, records) for comparison in losses]
    return "\n\n".join(parts)


def _table(verdicts: Sequence[Verdict]) -> str:
    lines = ["| | runs | in | means | difference, 95 % interval | |", "|---|---|---|---|---|---|"]
    for one in verdicts:
        measure, interval = MEASURES[one.measure], one.difference
        mean, low, high = (
            f"{value:+.{measure.digits}f}" for value in (interval.mean, interval.low, interval.high)
        )
        ahead, behind = (f"{value:.{measure.digits}f}" for value in one.means)
        unit = f" {measure.unit}" if measure.unit else ""
        lines.append(
            f"| {one.comparison.name} | {one.comparison.runs} | {measure.title} | "
            f"{ahead} against {behind}{unit} | {mean} ({low} … {high}) | "
            f"{one.says if one.counts else BESIDE[one.says]} |"
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


def _sheet() -> str:
    prompts = "; ".join(prompts_of(SHEET_PROMPTS)[0])
    return (
        "## Clips of the runs\n\nFirst, middle and last frame, an image three times; the same "
        f"noise in every row of clips and in every row of images. From left to right: {prompts}. "
        f"`python -m gentron_train.findings --sheet`\n\n![Clips]({PICTURES}/{SHEET})"
    )


def _results(records, table: Table, results: str) -> str:
    lines = [
        "## Every result",
        "",
        "A file holds the settings, the model's configuration and every prompt's figures; seeds "
        f"{_listed(table.pilot)} are the pilot's.",
        "",
        "| file | steps | seconds | trained at | scored at | on |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        name = result_name(record["run"], record["seed"], record["lambda_m"])
        lines.append(
            f"| [{name}]({results}/{name}) | {record['steps']:,} | "
            f"{record['train_seconds']:.0f} + {record['score_seconds']:.0f} | "
            f"{record['train_commit']} | {record['score_commit']} | {record['device']} |"
        )
    return "\n".join(lines if records else ["## Every result", "", "None yet."])


def _listed(values) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} and {last}" if others else last


def _loss_by_flops(comparison: Comparison, records) -> str:
    """The losses of both sides where the cheaper run ends, in one sentence."""
    curves = [loss_curve(side.run, records) for side in (comparison.ahead, comparison.behind)]
    end = min(spent[-1] for spent, _ in curves)
    last = np.linspace((1 - LAST) * end, end)
    ahead, behind = (np.interp(last, spent, loss).mean() for spent, loss in curves)
    return (
        f"For as many FLOPs, {end:.3g} TFLOP, the loss is {ahead:.4f} of {comparison.ahead.name} "
        f"and {behind:.4f} of {comparison.behind.name}: the cheaper run's rate has fallen to 0 "
        "there, the other's has not."
    )
