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
    in_words,
    verdicts_of,
)
from gentron_train.findings.pictures import (
    PICTURES,
    SHEET,
    SHEET_PROMPTS,
    loss_curve,
    picture_name,
    sheet_models,
)
from gentron_train.findings.scoring import (
    LAMBDA_M,
    LAMBDA_T,
    LAST,
    MEASURES,
    RESCALE,
    ROUNDING,
    STEPS,
    prompts_of,
    result_name,
    sampling,
    starts_of,
)
from gentron_train.findings.table import TABLE, Run, Table
from gentron_train.flops import parameter_count
from gentron_train.small_world.evaluator import COLUMNS
from gentron_train.small_world.renderer import COLOURS, RELATIONS, SHAPES, SINCE
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
    "folder of shards": lambda record: _shards(record["made_of"].get("shards")),
    "autoencoder": lambda record: record["made_of"].get("vae"),
    "CLIP": lambda record: record["made_of"].get("text_encoder"),
    "T5": lambda record: record["made_of"].get("text_encoder_2"),
}
PUBLISHED = ROOT / "bench/results/findings"
DECISIONS = ROOT / "docs/decisions.md"
SECTION = "the-papers-findings-in-miniature"  # of it
NOTED = "†"  # a result of which its made_of has a note
SCALED = ("travel", "motion", "alignment", "psnr", "place jitter", "size jitter", "broken")
# Of what the sentence does not speak of, and of what is neither better nor worse.
BESIDE = {HOLDS: "ahead", FAILS: "behind", OPEN: OPEN}
NEUTRAL = {HOLDS: "more", FAILS: "less", OPEN: OPEN}


def _shards(index: dict | None) -> dict | None:
    return None if index is None else SINCE | index


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
    numbered = list(enumerate(claims.findings(table), 1))
    findings = [_finding(number, one, own, table) for number, one in numbered]
    said = [one for _, finding in numbered for one in verdicts_of(finding, own, table)]
    parts = [_introduction(table, here, sum(one.counts or one.is_beside for one in said))]
    parts += [_models(table), _spent(records)]
    parts += [_history(here)] if results == PUBLISHED else []
    parts += [_pilot(records, table, here), *findings]
    parts.append(_start(len(numbered) + 1, own))
    sheet = here / PICTURES / SHEET
    parts += [_sheet(sheet, records)] if sheet.exists() else []
    parts += [_results(records, table, os.path.relpath(results, here))]
    return "\n\n".join(parts) + "\n"


def counted(records: Sequence[dict], table: Table) -> list[dict]:
    """Those of the seeds that count."""
    return [record for record in records if record["seed"] in table.seeds]


def _introduction(table: Table, here: Path, told: int) -> str:
    """told: of how many figures the findings' sentences speak."""
    kinds = ", ".join(COLUMNS)
    count = table.prompts * len(COLUMNS)
    runs, settings = (os.path.relpath(path, here) for path in (TABLE, table.config))
    return f"""# The paper's findings, in miniature

What GenTron's authors report of models of a billion parameters, tried on models a thousandth of
that size in the small world, where what a picture shows is read back by rule. T2I is trained from
nothing, T2V from a T2I run; text encoders and autoencoder are those that shipped then (digests in
the results). Seeds {in_words(table.seeds)} change weights, order and noise, not the data. All are
scored on the same {count} prompts, {table.prompts} each of {kinds} (combinations of shape, colour
and motion that training shows, that it never shows, and two objects with a relation): {STEPS}
steps, λ_T {LAMBDA_T:g}, λ_M {LAMBDA_M:g}, guidance rescale {RESCALE:g}.

    make findings                 # trains what is missing, hours on two cores
    make findings DEVICE=cuda AGAIN=runs/again     # all of it anew, elsewhere
    python -m gentron_train.findings --plan | --pilot | --page

- *T2I* makes images, *T2V* clips: T2I's layers and temporal ones. λ_T is the guidance scale of the
  text, λ_M that of motion. *Motion-free samples* are images repeated as a clip's frames, of which
  each attends to itself alone: λ_M above 1 leads away from what T2V predicts so, below 1 to it.
- *What was asked for*: the share of colour, shape and, of two objects, relation that is right, mean
  of the prompts. *Motion*: the share of clips that move as asked. Of two objects both must be
  right, and a relation only counts where both colours are. A guess has the colour of an object
  right in one of {len(COLOURS)}, its shape in one of {len(SHAPES)}, both shapes of two in one of
  {len(SHAPES) ** 2}, and a relation between the right colours in one of {len(RELATIONS)}.
- *PSNR*: of the picture against the scene of the world that comes closest to it, whatever was
  asked for: how clean it is. *Broken*: below 15 dB.
- *One frame*: the middle frame of a clip, read as an image. *Jitter*: how far place, size and
  colour of an object stray from a smooth course. *Way*: along the direction that was asked for.
- *Loss*: of the training, mean of its last tenth, of samples seen before: the column epochs has
  how often.

A difference is of two runs with the same seed and the same prompts. Two runs of images, or two of
clips, have the same noise too; an image and a clip do not. The 95 % interval of a difference holds
the spread over the seeds (Student's t) and over the prompts (a bootstrap). "Holds" is said where
the interval lies on the better side of 0, however small the difference, "fails" where it lies on
the other; else it cannot be told here. Of loss, jitter and broken less is better. Of what no such
sentence speaks the tables say ahead and behind, of the way more and less. Each interval stands for
itself: of the {told} of which the sentences here speak, at most {told / 20:.1f} would leave out 0
by chance if there were no difference anywhere. In the pictures these are blue, others grey, and the
small points below are single seeds. Whether longer training changes what findings 1 to 3 say was
not tried. The runs are those of [runs.yaml]({runs}), by [settings.yaml]({settings}); the files of
results have every measure of every run."""


def _history(here: Path) -> str:
    """Of the results that are published with the code: what was settled when."""
    return f"""The settings were fixed before the first of these seeds was trained. Three things
came later ([why]({os.path.relpath(DECISIONS, here)}#{SECTION})):

- before any T2V result was looked at, the run both-on and λ_M 1.3 for t2v-motion-free;
- when findings 1 to 3 had results, that their sentences speak of what was asked for and of PSNR;
- when most had results, the sentence on motion and steadiness, and the rows CLIP ahead of T5, T2I
  trained longer ahead of clips + images and of all three, and all of finding 5 but what was asked
  for, PSNR, motion and way.

At most 24 core hours were planned. Runs that were lost or repeated, and what was tried before the
pilot, are not counted here."""


def _models(table: Table) -> str:
    lines = ["| run | stage | parameters | epochs | differs by |", "|---|---|---|---|---|"]
    for run in table.runs.values():
        changes = " ".join(f"{name}: {value}" for name, value in run.changes.items())
        start = f"from {run.start}; " if run.start else ""
        lines.append(
            f"| {run.name} | {run.stage} | {parameter_count(table.model(run)):,} | "
            f"{_epochs(run, table)} | {start}{changes} |"
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


def _epochs(run: Run, table: Table) -> str:
    """How often a run sees each sample; of a clip one of its windows."""
    settings = run.settings(table.config)
    still = settings.p_image + settings.p_motion_free if run.stage == "t2v" else 1.0
    shares = {"images": (still, table.images), "clips": (1 - still, table.clips)}
    samples = settings.steps * settings.batch
    seen = {name: samples * share / count for name, (share, count) in shares.items() if share}
    return ", ".join(f"{times:.1f} of {name}" for name, times in seen.items())


def _spent(records) -> str:
    """Hours of all results."""
    if not records:
        return "Nothing has been trained yet."
    spent = sum(_seconds(record) for record in records) / 3600
    hours = "core hours" if all(record["device"] == "cpu" for record in records) else "hours"
    return f"All results here, the pilot's with them, took {spent:.1f} {hours} together."


def _seconds(record: dict) -> float:
    """Of a result: a run's training counts once, however often it is scored."""
    training = record["train_seconds"] if record["lambda_m"] is None else 0
    return training + record["score_seconds"]


def _pilot(records, table: Table, here: Path) -> str:
    title = f"## The pilot\n\nSeeds {in_words(table.pilot)}, left out of all findings."
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
            "beforehand, and their intervals tell what could be seen. An earlier pilot, of "
            "shorter runs, had learnt colours alone, and its results are left out "
            f"([why]({os.path.relpath(DECISIONS, here)}#loss-and-timesteps))."
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
            for name in comparison.shown:
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
            f"\nThe spread over seeds is that of the runs trained with several, {in_words(names)}, "
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
        *([f"**{told}**"] if (told := claims.beside(verdicts)) else []),
        *([finding.note] if finding.note else []),
        *_mixed(finding, records, table),
    ]
    if verdicts:
        parts += [f"![{finding.title}]({PICTURES}/{picture_name(number)})", _table(verdicts)]
        losses = [one.comparison for one in verdicts if one.measure == "loss"]
        parts += [_loss_by_flops(comparison, records) for comparison in losses]
        if any(one.measure == "travel" for one in verdicts):
            parts += _by_scale(records, table)
    return "\n\n".join(parts)


def _by_scale(records, table: Table) -> list[str]:
    """What each λ_M of the sweep gives, the mean of the seeds, and what that comes to."""
    scales, rows = claims.by_scale(records, table, SCALED)
    if not rows:
        return []
    means = np.mean(rows, 0) * [MEASURES[name].scale for name in SCALED]
    names = [f"{MEASURES[name].title}, {MEASURES[name].unit}" for name in SCALED]
    lines = [f"| λ_M | {' | '.join(names)} |", f"|{'---|' * (1 + len(SCALED))}"]
    for scale, row in zip(scales, means, strict=True):
        cells = [f"{v:.{MEASURES[n].digits}f}" for n, v in zip(SCALED, row, strict=True)]
        lines.append(f"| {scale:g} | {' | '.join(cells)} |")
    column = dict(zip(SCALED, means.T, strict=True))
    way, jitter = column["travel"], column["place jitter"]
    told = (
        f"From λ_M {scales[0]:g} to {scales[-1]:g} the way goes from {way[0]:.1f} to {way[-1]:.1f} "
        f"px and the jitter of place from {jitter[0]:.1f} to {jitter[-1]:.1f} px."
    )
    return [told, "\n".join(lines)]


def _mixed(finding: Finding, records, table: Table) -> list[str]:
    """The comparisons whose sides belong to different trainings of the run that both begin with."""
    told = []
    for comparison in finding.comparisons:
        sides = comparison.ahead.run, comparison.behind.run
        seeds = [
            seed
            for seed in table.seeds
            if _are_apart(*(_origin(run, seed, records, table) for run in sides))
        ]
        if seeds:
            word = "seed" if len(seeds) == 1 else "seeds"
            told.append(f"{comparison.name} ({word} {in_words(seeds)})")
    if not told:
        return []
    return [
        "T2I was trained more than once with some seeds, not to the same weights. In these "
        "comparisons the two sides come from different trainings, whose difference is in theirs: "
        f"{'; '.join(told)}."
    ]


def _origin(run: str, seed: int, records, table: Table) -> tuple[str, str | None]:
    """The T2I run that one begins with, or itself, and the digest of that training's model."""
    own = [r["made_of"] for r in records if (r["run"], r["seed"]) == (run, seed)]
    start = table.runs[run].start if own else None
    return start or run, own[0].get("start_model" if start else "model") if own else None


def _are_apart(one: tuple[str, str | None], other: tuple[str, str | None]) -> bool:
    """Whether two are known to be of different trainings of one run."""
    return one[0] == other[0] and None not in (one[1], other[1]) and one != other


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
            f"{_says(one)} |"
        )
    return "\n".join(lines)


def _says(one: Verdict) -> str:
    """Of one line of the table: more than ahead or behind is said of what the sentence is about."""
    if one.counts:
        return one.says
    return (NEUTRAL if MEASURES[one.measure].higher_is_better is None else BESIDE)[one.says]


def _start(number: int, records) -> str:
    text = [
        f"## {number}. The start of T2V",
        "The paper: temporal layers at zero start exactly as the T2I model.",
    ]
    starts = [value for own in starts_of(records).values() for value in own]
    if not starts:
        return "\n\n".join([*text, "**Not measured yet.**"])
    most = max(starts)
    says = "holds" if most < ROUNDING else "fails"
    differ = f"differ by at most {most:.1e} of the largest one" if most else "are equal to the bit"
    text += [
        f"**It {says}: over {len(starts)} T2I models, of clips and of motion-free samples, the "
        f"predictions {differ} in fp32.**",
        f"![The start of T2V]({PICTURES}/{picture_name(number)})",
    ]
    return "\n\n".join(text)


def _sheet(picture: Path, records) -> str:
    prompts, sheet = "; ".join(prompts_of(SHEET_PROMPTS)[0]), sheet_models(picture)
    scored = {
        record["run"]: record["made_of"].get("model")
        for record in records
        if record["seed"] == sheet["seed"]
    }
    others = [run for run, model in sheet["models"].items() if scored.get(run) not in (None, model)]
    told = f" Of {in_words(others)} the tables score another training." if others else ""
    return (
        f"## Clips of the runs\n\nOf seed {sheet['seed']}, each row with its model's digest.{told} "
        "First, middle and last frame, an image three times; the same noise in "
        f"every row of clips and in every row of images. From left to right: {prompts}. "
        f"`python -m gentron_train.findings --sheet`\n\n![Clips]({PICTURES}/{SHEET})"
    )


def _results(records, table: Table, results: str) -> str:
    lines = [
        "## Every result",
        "",
        "A file holds the settings, the model's configuration and every prompt's figures; seeds "
        f"{in_words(table.pilot)} are the pilot's.",
        "",
        "| file | steps | seconds | trained at | scored at | on |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        name = result_name(record["run"], record["seed"], record["lambda_m"])
        lines.append(
            f"| [{name}]({results}/{name}) | {record['steps']:,} | "
            f"{record['train_seconds']:.0f} + {record['score_seconds']:.0f} | "
            f"{record['train_commit']}{NOTED if record['made_of'].get('note') else ''} | "
            f"{record['score_commit']} | {record['device']} |"
        )
    notes = dict.fromkeys(r["made_of"]["note"] for r in records if r["made_of"].get("note"))
    lines += [f"\n{NOTED} {note}." for note in notes]
    return "\n".join(lines if records else ["## Every result", "", "None yet."])


def _loss_by_flops(comparison: Comparison, records) -> str:
    """The losses of both sides where the cheaper run ends, in one sentence."""
    curves = [loss_curve(side.run, records) for side in (comparison.ahead, comparison.behind)]
    end = min(spent[-1] for spent, _ in curves)
    last = np.linspace((1 - LAST) * end, end)
    ahead, behind = (np.interp(last, spent, loss).mean() for spent, loss in curves)
    return (
        f"For as many FLOPs, {end:.3g} TFLOP, the loss of {comparison.ahead.name} is {ahead:.4f}, "
        f"that of {comparison.behind.name} {behind:.4f}; but the cheaper run's rate has fallen to "
        "0 there, the other's has not."
    )
