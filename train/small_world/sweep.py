"""What guidance does: the evaluator's alignment and fidelity over a grid of its values.

The default of a pipeline is chosen from them by one rule, `choose`.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gentron_fast.commandline import number
from gentron_fast.config import SamplingDefaults
from gentron_fast.files import read_json, whole_file, write_json
from gentron_train.small_world.evaluator import (
    PUBLISHED,
    SINGLE,
    Scores,
    evaluate,
    published_prompts,
)
from gentron_train.small_world.picture import strip

SWEPT = ("lambda_t", "lambda_m", "rescale")
VISIBLE = 0.5  # dB of PSNR, below which nobody tells two clips apart
SHEET_PROMPTS = "a red circle moving left", "a blue star rotating", "a dotted green square growing"
FIGURES = {
    "all": "all, %",
    "shape": "shape, %",
    "motion": "motion, %",
    "psnr": "PSNR, dB",
    "broken": "broken, %",
    "fréchet": "Fréchet",
}
LABELS = {"lambda_t": "λ_T", "lambda_m": "λ_M", "rescale": "φ"}


def parse_grid(words: Sequence[str]) -> list[dict[str, float]]:
    """Every combination of "lambda_t=2,3" "rescale=0,0.7". ValueError for anything else."""
    values = {}
    for word in words:
        name, _, listed = word.partition("=")
        if name not in SWEPT or name in values or not listed:
            raise ValueError(f"--sweep takes NAME=VALUE,… of {', '.join(SWEPT)}, got {word!r}")
        try:
            values[name] = [number(value) for value in listed.split(",")]
        except argparse.ArgumentTypeError:
            raise ValueError(f"--sweep {name} takes numbers, got {listed!r}") from None
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


def sweep(
    pipeline, grid: Sequence[dict[str, float]], out: Path, settings: dict, batch: int = 16
) -> list[dict]:
    """Score every point of the grid; rows that `out` holds for the same settings are kept.

    settings: "model", a digest of the pipeline, "prompts" and "seed" of `evaluate`, and what else
    its calls take, the grid's values coming over them. `published_prompts` are left out. Beside out
    (.json) stand a picture and a contact sheet (.png, -clips.png).
    """
    pictures = pictures_beside(out)
    options = {k: v for k, v in settings.items() if k not in ("model", "prompts", "seed")}
    rows, kept = [], settings | {"apart_from": PUBLISHED}
    without = published_prompts()
    if out.exists():
        found = read_json(out)
        if found.get("settings") != kept:
            raise ValueError(f"{out} holds a sweep of other settings; choose another file")
        rows = found["rows"]
    for point in grid:
        if any(all(row[name] == value for name, value in point.items()) for row in rows):
            continue
        scores = evaluate(
            pipeline,
            settings["prompts"],
            settings["seed"],
            batch,
            columns=SINGLE,
            without=without,
            **options | point,
        )
        rows.append({name: (options | point)[name] for name in SWEPT} | figures_of(scores))
        write_json(out, {"settings": kept, "rows": rows})
    _draw(rows, pictures[0])
    _draw_sheet(pipeline, rows, options, pictures[1])
    return rows


def figures_of(scores: dict[str, Scores]) -> dict[str, float]:
    """Shares and fidelity of all columns by names such as "seen all"."""
    return {
        f"{name} {figure}": value
        for name, column in scores.items()
        for figure, value in (column.shares | column.fidelity).items()
    }


def pictures_beside(out: Path) -> tuple[Path, Path]:
    """Where a plot and a contact sheet of the figures in `out` are drawn. ValueError where it is no
    .json, or where they are there without it."""
    if out.suffix != ".json":
        raise ValueError(f"{out} does not end in .json: pictures are drawn beside its figures")
    pictures = out.with_suffix(".png"), out.with_name(f"{out.stem}-clips.png")
    if not out.exists() and (there := [str(path) for path in pictures if path.exists()]):
        raise ValueError(
            f"{' and '.join(there)} would be drawn over; choose another file or move it"
        )
    return pictures


def alignment(row: dict) -> float:
    """The share of clips right in everything, over seen and unseen prompts."""
    return _mean(row, "all")


def psnr(row: dict) -> float:
    return _mean(row, "psnr")


def _mean(row: dict, figure: str) -> float | None:
    """Over seen and unseen prompts; None of what was not measured, as of images the motion."""
    own = [row.get(f"{name} {figure}") for name in SINGLE]
    return None if None in own else sum(own) / len(own)


def choose(rows: Sequence[dict]) -> dict:
    """The rule for a pipeline's defaults: of all points that look as good as the best, within
    VISIBLE dB of its PSNR, the one of highest alignment, and of equal ones that of most motion."""
    best = max(psnr(row) for row in rows)
    as_good = [row for row in rows if psnr(row) >= best - VISIBLE]
    return max(as_good, key=lambda row: (alignment(row), _mean(row, "motion") or 0.0))


def sweep_table(rows: Sequence[dict]) -> str:
    """A line a point, means over seen and unseen prompts, and the point that `choose` takes."""
    titles = [*(LABELS[name] for name in SWEPT), *FIGURES.values()]
    lines = ["".join(f"{title:>10}" for title in titles)]
    for row in rows:
        cells = [f"{row[name]:g}" for name in SWEPT]
        for figure, title in FIGURES.items():
            mean = _mean(row, figure)
            cells.append("-" if mean is None else f"{100 * mean if '%' in title else mean:.2f}")
        lines.append("".join(f"{cell:>10}" for cell in cells))
    chosen = choose(rows)
    values = ", ".join(f"{LABELS[name]} {chosen[name]:g}" for name in SWEPT)
    return "\n".join([*lines, f"chosen: {values}"])


def _draw(rows: Sequence[dict], path: Path) -> None:
    """Alignment against PSNR, a line for each λ_M and φ, the paper's values marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    paper = SamplingDefaults()
    for key in dict.fromkeys((row["lambda_m"], row["rescale"]) for row in rows):
        line = [row for row in rows if (row["lambda_m"], row["rescale"]) == key]
        line.sort(key=lambda row: row["lambda_t"])
        points = [(psnr(row), 100 * alignment(row)) for row in line]
        axes.plot(*zip(*points, strict=True), "o-", ms=4, label=f"λ_M {key[0]:g}, φ {key[1]:g}")
        for row, point in zip(line, points, strict=True):
            axes.annotate(f"{row['lambda_t']:g}", point, xytext=(3, 3), textcoords="offset points")
            if (row["lambda_t"], row["lambda_m"]) == (paper.lambda_t, paper.lambda_m):
                axes.plot(*point, "s", ms=11, mfc="none", mec="black")
    axes.set_xlabel("PSNR against the best scene, median, dB")
    axes.set_ylabel("right in colour, shape and motion, %")
    values = f"λ_T {paper.lambda_t:g} and λ_M {paper.lambda_m:g}"
    axes.set_title(f"λ_T at each point; the paper's {values} squared")
    axes.legend(fontsize="small")
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _draw_sheet(pipeline, rows: Sequence[dict], options: dict, path: Path) -> None:
    """A row a point."""
    strips = []
    for row in rows:
        own = options | {name: row[name] for name in SWEPT}
        strips.append(("   ".join(f"{name} {row[name]:g}" for name in SWEPT), pipeline, own))
    draw_sheet(strips, path)


def draw_sheet(ways: Sequence[tuple], path: Path) -> None:
    """A row of clips of SHEET_PROMPTS, all of seed 0, for each (title, pipeline, options)."""
    from PIL import Image

    strips, prompts = [], list(SHEET_PROMPTS)
    for title, pipeline, options in ways:
        clips = pipeline(prompts, seed=[0] * len(prompts), progress=False, **options)
        strips.append(strip(np.asarray(clips.frames), title))
    with whole_file(path) as partial:
        Image.fromarray(np.concatenate(strips)).save(partial, format="png")
