"""What moves fidelity most an hour: short runs that differ in one thing.

python -m gentron_train.trials      (make trials)

The runs of train/configs/trials/runs.yaml, trained JOBS at a time, scored on the same prompts and
written into docs/trials.md. Cut off, the same command goes on; RESULTS has a file of each run's
scores, and what is there is not trained again.
"""

import functools
import sys
from collections.abc import Sequence

import numpy as np

from gentron_fast.commandline import described_parser, run
from gentron_fast.files import whole_file
from gentron_train.findings.claims import figures
from gentron_train.findings.jobs import Place, add_arguments, missing_jobs, train_jobs
from gentron_train.findings.page import check_records
from gentron_train.findings.paired import differences, prompt_error
from gentron_train.findings.scoring import MEASURES, read_records, result_name
from gentron_train.findings.table import Table, read_table
from gentron_train.flops import parameter_count
from gentron_train.settings import CONFIGS
from gentron_train.stages import ROOT

NAME = "gentron_train.trials"
TABLE = CONFIGS / "trials" / "runs.yaml"
SHOWN = ("alignment", "shape", "psnr")


def page(records: Sequence[dict], table: Table) -> str:
    """docs/trials.md."""
    first, base = table.pilot[0], next(iter(table.runs.values()))
    minutes, size = base.settings(table.config).minutes, parameter_count(table.model(base))
    parts = [
        f"""# Trials: what moves fidelity most

Runs of {minutes:g} minutes on one core each, which differ from the first in one thing
([runs.yaml](../train/configs/trials/runs.yaml),
[settings.yaml](../train/configs/trials/settings.yaml)).
A model of {size / 1e6:.1f} million parameters stands for the one that ships, which would need
hours for a trial. Scored on {3 * table.prompts} prompts ({table.prompts} each of seen, unseen, two
objects), all with the same noise. A difference is to the first run; ± is twice the standard error
of the prompts alone, without the spread of seeds, which is below the table, and of the steps that a
run gets, which what else the machine does changes too. What images do beside the clips of T2V,
which binds motion only after hours, is told by [the findings](findings.md), in three runs each.
What came of it: [decisions](decisions.md#loss-and-timesteps).

    python -m gentron_train.trials        # trains what is missing; --page writes this page alone"""
    ]
    if rows := [row for name in table.runs if (row := _row(records, name, base.name, first))]:
        parts.append("\n".join([_head(), *rows]))
        wanted = table.jobs(pilot=True)
        known = {(record["run"], record["seed"]) for record in records}
        if missing := sum((run.name, seed) not in known for run, seed in wanted):
            parts.append(f"{missing} of {len(wanted)} runs are not trained yet.")
    parts += [line for name in table.again if (line := _spread(records, name, table.pilot))]
    return "\n\n".join(parts if records else [*parts, "Not run yet."]) + "\n"


def _head() -> str:
    cells = [f"{MEASURES[name].title}, {MEASURES[name].unit} | against" for name in SHOWN]
    line = f"| T2I | steps | {' | '.join(cells)} |"
    return f"{line}\n|{'---|' * (2 + 2 * len(cells))}"


def _row(records: Sequence[dict], name: str, base: str, seed: int) -> str:
    found = [r for r in records if (r["run"], r["seed"]) == (name, seed)]
    if not found:
        return ""
    cells = [f"[{name}](../bench/results/trials/{result_name(name, seed)})"]
    cells.append(f"{found[0]['steps']:,}")
    for measure in SHOWN:
        own, first = (figures(records, run, seed, measure) for run in (name, base))
        shown = MEASURES[measure]
        cells.append(shown.shown(np.nanmean(own)))
        if first is None or name == base:
            cells.append("")
            continue
        difference = np.nanmean(differences([own], [first])) * shown.scale
        error = 2 * prompt_error([own], [first]) * shown.scale
        cells.append(f"{difference:+.{shown.digits}f} ± {error:.{shown.digits}f}")
    return f"| {' | '.join(cells)} |"


def _spread(records: Sequence[dict], name: str, seeds: Sequence[int]) -> str:
    """Of a run that was trained with several seeds, each one's figures."""
    known = [seed for seed in seeds if any((r["run"], r["seed"]) == (name, seed) for r in records)]
    if len(known) < 2:
        return ""
    cells = []
    for measure in SHOWN:
        means = [
            MEASURES[measure].shown(np.nanmean(figures(records, name, seed, measure)))
            for seed in known
        ]
        cells.append(f"{MEASURES[measure].title} {', '.join(means)} {MEASURES[measure].unit}")
    return f"{name} with the seeds {', '.join(map(str, known))}: {'; '.join(cells)}."


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 where a run failed, told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; the same command goes on")


def _command(argv: list[str]) -> None:
    parser = described_parser(NAME, __doc__)
    parser.add_argument("--page", action="store_true", help="write the page of what is there")
    add_arguments(parser, "trials", TABLE)
    args = parser.parse_args(argv)
    table, place = read_table(args.table.absolute()), Place.of(args)
    if not table.pilot:
        raise ValueError(f"{args.table} must name pilot, the seeds")
    check_records(read_records(ROOT / place.results), table)
    place.check_writable()
    write = functools.partial(_write, place, table)
    if not args.page:
        jobs = table.jobs(pilot=True)
        train_jobs(missing_jobs(jobs, table, place.out, ROOT / place.results), table, place, write)
    write()


def _write(place: Place, table: Table) -> None:
    records = read_records(ROOT / place.results)
    check_records(records, table)
    text = page(records, table)
    with whole_file(ROOT / place.document) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"wrote        {place.document}")


if __name__ == "__main__":
    sys.exit(main())
