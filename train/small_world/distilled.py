"""A distilled model beside its teacher: what is right, how it looks and how long a clip takes.

python -m gentron_train.small_world.distilled --out FILE.json [--prompts N]

Both read the same prompts with the same seeds, each at the guidance of the teacher's folder. What
FILE.json holds is not scored again; beside it stand a plot and a contact sheet.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gentron_fast.commandline import (
    check_writable,
    number,
    refuse,
    run,
    silence_libraries,
    whole_number,
)
from gentron_fast.files import read_json, whole_file, write_json
from gentron_fast.intervals import wilson_interval
from gentron_train.small_world.evaluator import SINGLE, evaluate
from gentron_train.small_world.sweep import (
    SHEET_PROMPTS,
    alignment,
    draw_sheet,
    figures_of,
    pictures_beside,
    psnr,
)

NAME = "gentron_train.small_world.distilled"
TEACHER, STUDENT = "teacher", "student"
POINTS = tuple((model, steps) for model in (TEACHER, STUDENT) for steps in (50, 20, 8, 4))
SOLVER = "few-step"  # of 50 and 20 steps none are fitted: dpm++
ROUNDS = 5  # of single clips that are timed, the ways taking turns
FIGURES = "all", "shape", "motion"
TICKS = 0.1, 0.2, 0.5, 1, 2, 5  # seconds


def compare(
    pipelines: dict, points: Sequence[tuple[str, int]], settings: dict, out: Path
) -> list[dict]:
    """Score every (model, steps); rows of `out` for the same settings are kept.

    settings: "prompts" and "seed" of `evaluate`, lambda_t and lambda_m, and whatever else tells one
    comparison from another.
    """
    pictures, rows = pictures_beside(out), []
    if out.exists():
        found = read_json(out)
        if found.get("settings") != settings:
            raise ValueError(f"{out} holds figures of other settings; choose another file")
        rows = found["rows"]
    guidance = {name: settings[name] for name in ("lambda_t", "lambda_m")}
    for model, steps in points:
        if any((row["model"], row["steps"]) == (model, steps) for row in rows):
            continue
        scores = evaluate(
            pipelines[model],
            settings["prompts"],
            settings["seed"],
            columns=SINGLE,
            steps=steps,
            **guidance,
            solver=SOLVER,
        )
        rows.append({"model": model, "steps": steps} | figures_of(scores))
        write_json(out, {"settings": settings, "rows": rows})
    for row, seconds in zip(rows, _seconds(pipelines, rows, guidance), strict=True):
        row["seconds"] = seconds
    write_json(out, {"settings": settings, "rows": rows})
    _draw(rows, settings["prompts"], pictures[0])
    _draw_sheet(pipelines, rows, guidance, pictures[1])
    return rows


def _seconds(pipelines: dict, rows: list[dict], guidance: dict) -> list[float]:
    """Median seconds of one clip, from prompt to frames, of every row's way."""
    spent: list[list[float]] = [[] for _ in rows]
    for _ in range(ROUNDS):
        for row, own in zip(rows, spent, strict=True):
            start = time.perf_counter()
            options = {"steps": row["steps"], "solver": SOLVER, "progress": False}
            pipelines[row["model"]](SHEET_PROMPTS[0], **options, **guidance)
            own.append(time.perf_counter() - start)
    return [float(np.median(own)) for own in spent]


def table(rows: list[dict], prompts: int) -> str:
    """A line a row: means over seen and unseen prompts, the interval of what is all right."""
    lines = [
        f"{'':13}{'all':>19}{'shape':>8}{'motion':>8}{'PSNR':>8}{'Fréchet':>9}{'s a clip':>10}"
    ]
    for row in rows:
        low, high = _interval(row, prompts)
        cells = f"{100 * alignment(row):6.1f} ({100 * low:4.1f}–{100 * high:4.1f})"
        means = [np.mean([row[f"{c} {name}"] for c in SINGLE]) for name in FIGURES[1:]]
        distance = np.mean([row[f"{c} fréchet"] for c in SINGLE])
        lines.append(
            f"{row['model']} {row['steps']:>4} {cells:>19}"
            + "".join(f"{100 * mean:8.1f}" for mean in means)
            + f"{psnr(row):8.2f}{distance:9.2f}{row['seconds']:10.3f}"
        )
    return "\n".join(lines)


def _interval(row: dict, prompts: int) -> tuple[float, float]:
    """The share that is all right of both kinds of prompts, 95 %."""
    return wilson_interval(round(alignment(row) * 2 * prompts), 2 * prompts)


def _draw(rows: list[dict], prompts: int, path: Path) -> None:
    """Alignment with its intervals, and PSNR, against the seconds of a clip."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = list(
        zip(
            figure.subplots(1, 2),
            (lambda row: 100 * alignment(row), psnr),
            ("right in colour, shape and motion, %", "PSNR against the best scene, median, dB"),
            strict=True,
        )
    )
    for axes, value, label in panels:
        for model in (TEACHER, STUDENT):
            own = sorted((r for r in rows if r["model"] == model), key=lambda r: r["seconds"])
            points = [(row["seconds"], value(row)) for row in own]
            (line,) = axes.plot(*zip(*points, strict=True), "o-", ms=4, label=model)
            if axes is panels[0][0]:
                ends = np.array([_interval(row, prompts) for row in own]).T
                errors = np.abs(100 * ends - [y for _, y in points])
                axes.errorbar(
                    *zip(*points, strict=True),
                    yerr=errors,
                    fmt="none",
                    capsize=2,
                    color=line.get_color(),
                )
            height = 4 if model == TEACHER else -11
            for row, point in zip(own, points, strict=True):
                place = {"xytext": (3, height), "textcoords": "offset points"}
                axes.annotate(f"{row['steps']} steps", point, **place)
        axes.set_xscale("log")
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.minorticks_off()
        axes.set_xlabel("seconds a clip")
        axes.set_xlim(0.8 * min(r["seconds"] for r in rows), 2.3 * max(r["seconds"] for r in rows))
        axes.set_ylabel(label)
        axes.legend(fontsize="small")
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _draw_sheet(pipelines: dict, rows: list[dict], guidance: dict, path: Path) -> None:
    """A row a way: its steps, times the branches of each."""
    ways = []
    for row in rows:
        branches = 1 if row["model"] == STUDENT else 2 + (guidance["lambda_m"] != 1)
        title = f"{row['model']}, {row['steps']} x {branches}, {row['seconds']:.2f} s a clip"
        options = guidance | {"steps": row["steps"], "solver": SOLVER}
        ways.append((title, pipelines[row["model"]], options))
    draw_sheet(ways, path)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, which is told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; the same command goes on")


def _command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__.partition("\n")[0])
    parser.error = refuse
    parser.add_argument("--teacher", type=Path, help="pipeline folder (the model that ships)")
    parser.add_argument("--student", type=Path, help="of a distilled model (the teacher's fast/)")
    parser.add_argument("--prompts", type=whole_number(1), default=100, help="seen, and unseen")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--lambda-m", type=number, help="(the teacher's own)")
    parser.add_argument("--lambda-t", type=number, help="(the teacher's own)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    args = parser.parse_args(argv)
    pictures_beside(args.out)
    check_writable([args.out])
    silence_libraries()
    from gentron_fast import GenTronPipeline
    from gentron_fast.index import ASSETS, FAST
    from gentron_fast.threads import settle_threads
    from gentron_train.data.sources import pipeline_digest

    settle_threads()
    teacher = args.teacher or ASSETS
    folders = {TEACHER: teacher, STUDENT: args.student or teacher / FAST}
    pipelines = {name: GenTronPipeline.from_pretrained(path) for name, path in folders.items()}
    own, settings = pipelines[TEACHER].defaults, {"prompts": args.prompts, "seed": args.seed}
    for name in ("lambda_t", "lambda_m"):
        given = getattr(args, name)
        settings[name] = getattr(own, name) if given is None else given
    settings |= {name: pipeline_digest(folder) for name, folder in folders.items()}
    settings |= {"rescale": own.rescale, "solver": SOLVER}
    print(table(compare(pipelines, POINTS, settings, args.out), args.prompts))


if __name__ == "__main__":
    sys.exit(main())
