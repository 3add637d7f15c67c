"""Make the model that ships, from nothing, in one run that can be cut off anywhere.

python -m gentron_train.shipped      (make train)

The stages of configs/shipped.yaml in order: the small world's shards, autoencoder, text encoders,
T2I, T2V, a sweep over guidance that chooses the defaults, a distilled model, figures and a
picture. What is done is noted in OUT/stages.json; started again, the run goes on where it was.
Measurements of speed wait until the command at hand is over. At the end OUT/pipeline is a pipeline
folder, and OUT/MODEL.md tells how it was made.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from gentron_fast.commandline import check_writable, refuse, run
from gentron_fast.config import SamplingDefaults
from gentron_fast.cores import all_cores
from gentron_fast.files import (
    MARK,
    read_json,
    replace_section,
    whole_file,
    whole_folder,
    write_json,
)
from gentron_fast.index import ASSETS, FAST, INDEX_NAME, read_index
from gentron_fast.pipeline import PARTS
from gentron_train.flops import parameter_count
from gentron_train.settings import stored_config
from gentron_train.small_world.evaluator import Scores, format_table, share_of
from gentron_train.small_world.sweep import SWEPT, VISIBLE, choose, sweep_table
from gentron_train.stages import (
    ROOT,
    STATE,
    commits_of,
    listed,
    machines_of,
    read_stages,
    run_stages,
)

CONFIG = Path(__file__).parent / "configs" / "shipped.yaml"
NAME = "gentron_train.shipped"
PAGE = "MODEL.md"
# What was aimed at before the training: column, figure, least (or at most), unit.
AIMS = (
    ("seen", "colour", 99, "%"),
    ("seen", "shape", 97, "%"),
    ("seen", "direction", 99, "%"),
    ("seen", "motion", 95, "%"),
    ("seen", "motion spinning", 80, "%"),
    ("seen", "all", 93, "%"),
    ("unseen", "all", 88, "%"),
    ("pairs", "all", 85, "%"),
    ("seen", "psnr", 24, "dB"),
    ("seen", "broken", 1, "%"),
)
AT_MOST = ("broken",)
BOUND = "colour", "shape", "motion"  # of 16 prompts, which a test reads back
# Where what a run makes stands in the checkout.
SHIPS_AS = {
    "score.json": ROOT / "bench/results/judge-small-t2v.json",
    "fast.json": ROOT / "bench/results/judge-small-fast.json",
    "ceiling.json": ROOT / "bench/results/judge-small-ceiling.json",
    "sweep.json": ROOT / "bench/results/judge-small-sweep.json",
    "distilled.json": ROOT / "bench/results/judge-small-distilled.json",
    "corners.json": ROOT / "bench/results/judge-small-corners.json",
    "fast-corners.json": ROOT / "bench/results/judge-small-fast-corners.json",
    "columns.json": ROOT / "bench/results/columns-small-t2v.json",
    "t2v/loss.png": ROOT / "docs/loss.png",
    "distilled.png": ROOT / "docs/distilled.png",
    "distilled-clips.png": ROOT / "docs/distilled-clips.png",
    "sweep.png": ROOT / "docs/sweep.png",
    "sweep-clips.png": ROOT / "docs/sweep-clips.png",
    "clips.png": ROOT / "docs/clips.png",
    PAGE: ASSETS / PAGE,  # last: it tells of all others
}
README = ROOT / "README.md"
BEGIN = "<!-- figures begin: `gentron_train.shipped --ship` writes what stands between -->"
END = "<!-- figures end -->"
# README's lines of the model that ships, and what else tells its figures.
README_ROWS = {
    "colour": "colour",
    "shape": "shape",
    "motion": "motion, all eight kinds",
    "motion spinning": "spinning",
    "relation": "relation",
    "all": "all right",
}
TOLD_IN = "README.md, docs/training.md, docs/evaluation.md, docs/decisions.md, CHANGELOG.md"


def assemble(out: Path) -> None:
    """OUT/pipeline: what T2V made, with the guidance that the sweep chooses and its steps."""
    sweep = read_json(out / "sweep.json")
    chosen = choose(sweep["rows"]) | {"steps": sweep["settings"]["steps"]}
    sampling = {name: chosen[name] for name in (*SWEPT, "steps")}
    with whole_folder(out / "pipeline", PARTS) as part:
        shutil.copytree(out / "t2v" / "pipeline", part, dirs_exist_ok=True)
        index = read_index(part)
        defaults = replace(SamplingDefaults.from_index(index), **sampling)
        write_json(part / INDEX_NAME, index | defaults.to_index())


def model_page(out: Path) -> str:
    """MODEL.md: the commands with their times, the sweep, the figures beside what was aimed at."""
    done = read_json(out / STATE)["done"]
    sweep = read_json(out / "sweep.json")
    score, fast, ceiling = (read_json(out / f"{n}.json") for n in ("score", "fast", "ceiling"))
    few = {"prompts": "score-16.json", "by --fast": "fast-16.json"}
    bounds = {name: read_json(out / file)["scores"]["seen"] for name, file in few.items()}
    hours = sum(stage["seconds"] for stage in done) / 3600
    commits = listed(commit for stage in done for commit in commits_of(stage))
    machines = listed(name for stage in done for name in machines_of(stage))
    commands = [f"    {stage['command']}    # {_time(stage['seconds'])}" for stage in done]
    settings, pipeline = score["settings"], out / "pipeline"
    sampling = f"{settings['steps']} steps of {settings['solver']}, λ_T {settings['lambda_t']:g}"
    sampling += f", λ_M {settings['lambda_m']:g}, rescale {settings['rescale']:g}"
    parts = [
        "# The small model that ships",
        f"{_size(pipeline)}; `fast/`, its distilled model, {_size(pipeline / FAST)}.",
        f"Made by `make train` in {hours:.1f} hours on {machines}, at {commits}:",
        "\n".join(commands).replace(str(out), "OUT"),
        f"Guidance, on {sweep['settings']['prompts']} prompts a column that no figure below is of; "
        f"chosen is, of the points within {VISIBLE:g} dB of the best PSNR, the most often right:",
        _indented(sweep_table(sweep["rows"])),
        f"{settings['prompts']} prompts a column, {sampling}; shares in % with 95 % intervals:",
        _figures(score),
        "What was aimed at before the training, and whether the figures above reach it:",
        "\n".join(_aims(score)),
        f"The distilled model, `--fast`, in {fast['settings']['steps']} steps of one branch:",
        _figures(fast),
        "Clean clips through the autoencoder, the most that can be reached:",
        _figures(ceiling),
        "\n".join(
            f"16 {name}: " + " ".join(f"{n} {100 * column['shares'][n]:.0f}" for n in BOUND)
            for name, column in bounds.items()
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _time(seconds: int) -> str:
    return f"{seconds} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _size(folder: Path) -> str:
    """What model a pipeline folder holds, and its bytes, without a distilled model's inside."""
    config = stored_config(folder / "transformer")
    files = [folder / path for path in _files(folder) if FAST not in path.parts]
    size = sum(path.stat().st_size for path in files)
    return (
        f"GenTron of {config.depth} blocks, width {config.width}, "
        f"{parameter_count(config) / 1e6:.2f} M parameters, {size / 2**20:.1f} MiB"
    )


def _files(folder: Path) -> Iterator[Path]:
    """Those of a folder, relative to it, without our marks."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARK:
            yield path.relative_to(folder)


def _figures(content: dict) -> str:
    scores = {name: Scores(**column) for name, column in content["scores"].items()}
    return _indented(format_table(scores))


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def readme_table(score: dict, ceiling: dict) -> str:
    """README's table: shares with 95 % intervals, PSNR, and the ceiling's beside them."""
    columns = ("seen", "unseen", "pairs")

    def cells(content: dict, cell: Callable[[Scores], str]) -> list[str]:
        scores = {name: Scores(**column) for name, column in content["scores"].items()}
        return [cell(scores[name]) if name in scores else "-" for name in columns]

    heads = [f"per cent of {score['settings']['prompts']} prompts, 95 % interval"]
    heads += ["seen", "unseen", "two objects", "ceiling: clean clips through the VAE"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, title in README_ROWS.items():
        one = partial(share_of, name=name, digits=0)
        own = cells(score, one)
        most = [cell.partition(" ")[0] for cell in cells(ceiling, one)]
        lines.append(f"| {title} | {' | '.join(own)} | {' / '.join(most)} |")
    psnr = [cells(c, lambda column: f"{column.fidelity['psnr']:.1f}") for c in (score, ceiling)]
    title = "PSNR against the best scene, median, dB"
    lines.append(f"| {title} | {' | '.join(psnr[0])} | {' / '.join(psnr[1])} |")
    return "\n".join(lines) + "\n"


def _aims(score: dict) -> list[str]:
    lines = ["| | aim | reached | |", "|---|---|---|---|"]
    for column, name, bound, unit in AIMS:
        figures = score["scores"].get(column, {"shares": {}, "fidelity": {}})
        found = (figures["shares"] | figures["fidelity"]).get(name)
        if found is None:
            lines.append(f"| {column}, {name} | {bound} {unit} | not measured | |")
            continue
        value = found * 100 if unit == "%" else found
        at_most = name in AT_MOST
        is_met = value <= bound if at_most else value >= bound
        lines.append(
            f"| {column}, {name} | {'≤' if at_most else '≥'} {bound} {unit} | {value:.1f} {unit} | "
            f"{'met' if is_met else 'not met'} |"
        )
    return lines


def ship(out: Path) -> None:
    """Put what a run that is over made in the places of what ships, and its figures into README's
    table. Files that it has no other of stay as they are; version control tells what changed, and
    the same again finishes what was cut off."""
    pipeline = out / "pipeline"
    copies = {pipeline / name: ASSETS / name for name in _files(pipeline)}
    copies |= {out / name: place for name, place in SHIPS_AS.items()}
    if missing := [str(source) for source in copies if not source.is_file()]:
        raise ValueError(f"{out} is not made to its end: {', '.join(missing[:3])} lacks")
    for source, place in copies.items():
        with whole_file(place) as part:
            shutil.copyfile(source, part)
        print(f"wrote        {place.relative_to(ROOT)}")
    score, ceiling = (read_json(out / f"{name}.json") for name in ("score", "ceiling"))
    replace_section(README, BEGIN, END, readme_table(score, ceiling))
    print(f"wrote        {README.relative_to(ROOT)}'s table")
    for place in sorted({ASSETS / name for name in _files(ASSETS)} - set(copies.values())):
        print(f"left         {place.relative_to(ROOT)}, which {out} has no other of")
    print(f"left to tell {TOLD_IN} and docs/study.md tell of the model before in their text")


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 where a stage failed, told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; the same command goes on")


def _command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__)
    parser.error = refuse
    parser.add_argument("--out", type=Path, default=Path("runs/shipped"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ship", action="store_true", help="put what OUT holds in its place here")
    what.add_argument("--assemble", action="store_true", help=argparse.SUPPRESS)  # a stage
    args = parser.parse_args(argv)
    out = args.out.absolute()
    if args.assemble or args.ship:
        (assemble if args.assemble else ship)(out)
        return
    stages = read_stages(args.config, out)
    check_writable([out / STATE])
    run_stages(stages, out, all_cores)
    with whole_file(out / PAGE) as part:
        part.write_text(model_page(out), encoding="utf-8")
    print(f"wrote        {out / 'pipeline'}")


if __name__ == "__main__":
    sys.exit(main())
