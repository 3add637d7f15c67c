"""The paper's findings in the small world: train what is missing, score it, write the page.

python -m gentron_train.findings      (make findings)

Runs are trained JOBS at a time, all seeds of one before the next, and can be cut off anywhere: the
same command goes on. RESULTS has a file of each run's scores; what is there is not trained again.
"""

import argparse
import functools
import sys

from gentron_fast.commandline import choose_device, described_parser, run
from gentron_fast.config import GenTronConfig
from gentron_fast.files import whole_file
from gentron_train.checkpoint import EXPORTED
from gentron_train.data.sources import folder_digest
from gentron_train.findings import page as pages
from gentron_train.findings.jobs import (
    Place,
    add_arguments,
    missing_jobs,
    train_jobs,
    train_one,
    trained_folder,
)
from gentron_train.findings.pictures import (
    PICTURES,
    SHEET,
    SHEET_PROMPTS,
    draw,
    draw_sheet,
    sheet_rows,
)
from gentron_train.findings.scoring import prompts_of, read_records, sampling
from gentron_train.findings.table import TABLE, Run, Table, read_table
from gentron_train.flops import parameter_count, training_flops
from gentron_train.stages import ROOT

NAME = "gentron_train.findings"
# What two cores of an AMD EPYC take, before a pilot has told: a step with next to no model, FLOP/s,
# and one scoring. Of a caption's tokens.
STEP_SECONDS, RATE = 0.1, 150e9
SCORE_SECONDS = {"t2i": 40, "t2v": 150}
LENGTHS = {"clip": 16, "t5": 64}


def plan(table: Table, jobs: list[tuple[Run, int]], records: list[dict]) -> list[str]:
    """What would be run, with an estimate: of the pilot's times, or before it by the FLOPs."""
    told = pages.estimate(records, table)
    known = {} if told is None else told.seconds
    lines = [f"{'run':18}{'stage':7}{'parameters':>11}{'steps':>8}{'minutes':>9}  seeds"]
    total = 0.0
    for name in dict.fromkeys(job.name for job, _ in jobs):
        own, seeds = table.runs[name], [seed for job, seed in jobs if job.name == name]
        seconds = known.get(name) or rough_seconds(own, table)
        total += seconds * len(seeds)
        mark = "" if name in known else "~"
        lines.append(
            f"{name:18}{own.stage:7}{parameter_count(table.model(own)):>11,}"
            f"{own.settings(table.config).steps:>8,}{mark + format(seconds / 60, '.1f'):>9}  "
            f"{', '.join(map(str, seeds))}"
        )
    how = "by the pilot's times, ~ by their FLOPs" if known else "~ by their FLOPs, before a pilot"
    lines.append(f"{len(jobs)} runs, {total / 3600:.1f} hours of one core, {how}")
    return lines


def rough_seconds(own: Run, table: Table) -> float:
    """A run's training and scoring, by what it computes."""
    settings, config = own.settings(table.config), table.model(own)
    latents = config.in_channels, settings.frames if own.stage == "t2v" else 1, 8, 8
    flops = _flops(config, latents, settings.draws)
    step = STEP_SECONDS + flops * settings.batch * settings.draws / RATE
    return step * settings.steps + SCORE_SECONDS[own.stage] * len(table.scales(own))


@functools.cache
def _flops(config: GenTronConfig, latents: tuple[int, ...], draws: int) -> int:
    """Of a sample; several runs train one model."""
    return training_flops(config, latents, LENGTHS, draws)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 where a run failed, told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; the same command goes on")


def _parser() -> argparse.ArgumentParser:
    parser = described_parser(NAME, __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pilot", action="store_true", help="the seeds that are left out instead")
    what.add_argument("--plan", action="store_true", help="print what would be run, and how long")
    what.add_argument("--page", action="store_true", help="write the page of what is there")
    what.add_argument("--sheet", action="store_true", help="draw clips of the runs of one seed")
    what.add_argument("--one", help=argparse.SUPPRESS)  # a run, trained and scored: a job's own
    parser.add_argument("--seed", type=int, help="of --sheet (the first that counts)")
    add_arguments(parser, "findings", TABLE)
    return parser


def _command(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    table = read_table(args.table.absolute())
    place = Place.of(args)
    if args.seed is not None and args.one is None and not args.sheet:
        raise ValueError("--seed is of --sheet alone: the table names the seeds of runs")
    if args.one is not None:
        if args.one not in table.runs or args.seed is None:
            raise ValueError(f"--one takes a run of {', '.join(table.runs)}, and --seed")
        train_one(table.runs[args.one], args.seed, table, place)
        return
    if not (table.seeds and table.pilot and table.lambda_m):
        raise ValueError(f"{args.table} must name seeds, pilot and lambda_m")
    records = read_records(ROOT / place.results)
    pages.check_records(records, table)
    jobs = table.jobs(pilot=True) if args.pilot else table.jobs(pilot=False)
    jobs = missing_jobs(jobs, table, place.out, ROOT / place.results)
    if args.plan:
        pilot = missing_jobs(table.jobs(pilot=True), table, place.out, ROOT / place.results)
        for title, own in (("the pilot", pilot), ("the findings", jobs)):
            print("\n".join([f"{title}:", *plan(table, own, records)]))
        return
    place.check_writable()
    if args.sheet:
        _draw_sheet(place, table, table.seeds[0] if args.seed is None else args.seed)
    write = functools.partial(_write, place, table)
    if not (args.page or args.sheet):
        train_jobs(jobs, table, place, write)
    write()


def _draw_sheet(place: Place, table: Table, seed: int) -> None:
    """Clips of the runs of a seed, all of the same noise, beside the page's pictures."""
    from gentron_fast import GenTronPipeline

    texts, _ = prompts_of(SHEET_PROMPTS)
    runs = dict.fromkeys(run for run, _ in sheet_rows(table))
    folders = {run: ROOT / trained_folder(place.out, run, seed) / EXPORTED for run in runs}
    if missing := [run for run, folder in folders.items() if not folder.is_dir()]:
        raise ValueError(
            f"{', '.join(missing)} of seed {seed} are not trained here: no {folders[missing[0]]}"
        )

    def sample(run: str, scale: float):
        pipeline = GenTronPipeline.from_pretrained(folders[run], device=choose_device(place.device))
        seeds = list(range(len(texts)))
        return pipeline(texts, seed=seeds, progress=False, **sampling(scale)).frames.numpy()

    models = {run: folder_digest(folder / "transformer") for run, folder in folders.items()}
    path = (ROOT / place.document).parent / PICTURES / SHEET
    draw_sheet(table, seed, sample, models, path)


def _write(place: Place, table: Table) -> None:
    """The page and its pictures."""
    records, document = read_records(ROOT / place.results), ROOT / place.document
    pages.check_records(records, table)
    text = pages.page(records, table, document, ROOT / place.results)
    draw(pages.counted(records, table), table, document.parent / PICTURES)
    with whole_file(document) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"wrote        {place.document}")


if __name__ == "__main__":
    sys.exit(main())
