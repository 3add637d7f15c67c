"""Six columns for a pipeline in the small world, by the commands that score T2I-CompBench.

python -m gentron_train.shapes_table PIPELINE --out RUN --prompts 50
python -m gentron_train.shapes_table --clean --out CLEAN      # the prompts' own scenes: the ceiling

Clips lie in RUN/COLUMN/samples, one a prompt, and are scored by the rules that read them back. Both
go on where they stopped.
"""

import argparse
import hashlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gentron_fast import generate as sampling
from gentron_fast.commandline import refuse, run, silence_libraries, whole_number
from gentron_fast.evaluation.generate import generate
from gentron_fast.evaluation.layout import Layout, image_layout, list_entries, write_manifest
from gentron_fast.evaluation.results import Column, Result, score_column
from gentron_fast.files import whole_file, write_json
from gentron_fast.intervals import wilson_interval
from gentron_fast.media import write_media
from gentron_train.small_world import evaluator, fidelity, reading
from gentron_train.small_world.evaluator import judge
from gentron_train.small_world.fidelity import fit_scene
from gentron_train.small_world.renderer import (
    FPS,
    Scene,
    pair_prompts,
    render_clip,
    seen_prompts,
)

NAME = "gentron_train.shapes_table"
COLUMNS = ("colour", "shape", "fill", "relation", "motion", "complex")
CLIP_FPS = 4


class Judge:
    """A scorer of one column: 1 where the rules read in a clip what its prompt says, else 0.

    "complex" is all of colour, shape, fill, relation and motion at once.
    """

    is_official = True

    def __init__(self, aspect: str, scenes: Mapping[str, Scene]):
        self.aspect, self.scenes, self.name = aspect, scenes, f"rules for {aspect}"
        sources = [Path(module.__file__).read_bytes() for module in (evaluator, fidelity, reading)]
        self.key = f"{aspect}-{hashlib.sha256(b''.join(sources)).hexdigest()}"

    def __call__(self, media: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        return [
            float(self._is_right(frames, self.scenes[prompt]))
            for frames, prompt in zip(media, prompts, strict=True)
        ]

    def _is_right(self, frames: np.ndarray, scene: Scene) -> bool:
        if self.aspect == "fill":
            return read_fills(frames, scene)
        right = judge(frames, scene)
        if self.aspect == "complex":
            return all(right.values()) and read_fills(frames, scene)
        return right[self.aspect]


def read_fills(frames: np.ndarray, scene: Scene) -> bool:
    """Whether each object of uint8 (T, 64, 64, 3), looked for by its colour, has its fill."""
    fills = {thing.colour: thing.fill for thing in fit_scene(frames).scene.objects}
    return all(fills.get(thing.colour) == thing.fill for thing in scene.objects)


def draw_prompts(column: str, count: int, seed: int) -> list[tuple[str, Scene]]:
    """Prompts of a column and a scene of each. Each column has its own."""
    own = seed * len(COLUMNS) + COLUMNS.index(column)
    if column in ("relation", "complex"):
        return pair_prompts(count, own)
    if column == "fill":  # striped or dotted: what is plain is not said
        drawn = seen_prompts(10 * count + 10, own)
        told = ((text, scene) for text, scene in drawn if scene.objects[0].fill in text)
        return list(itertools.islice(told, count))
    return seen_prompts(count, own)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 after wrong input (told in one line), 130 after SIGINT."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "interrupted; what is written is whole")


def _command(argv: list[str]) -> None:
    from gentron_fast.index import ASSETS

    parser = argparse.ArgumentParser(prog=NAME, description="Six columns in the small world.")
    parser.error = refuse
    parser.add_argument("pipeline", type=Path, nargs="?", default=ASSETS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--prompts", type=whole_number(1, 10**5), default=50, help="a column (50)")
    parser.add_argument("--clean", action="store_true", help="the prompts' own scenes instead")
    parser.add_argument("--json", type=Path, help="file for the figures")
    sampling.add_sampling_options(parser)
    args = parser.parse_intermixed_args(argv)
    silence_libraries()
    sampling.check_precision(args)
    is_image = not (args.clean or sampling.read_model_config(args.pipeline).temporal)
    columns = [name for name in COLUMNS if not (is_image and name == "motion")]
    drawn = {name: draw_prompts(name, args.prompts, args.seed) for name in columns}
    prompts = {name: [text for text, _ in pairs] for name, pairs in drawn.items()}
    layout = image_layout("small world", prompts, 1, ".png" if is_image else ".mp4")
    scenes = dict(itertools.chain.from_iterable(drawn.values()))
    if args.clean:
        write_manifest(args.out, layout, {"pipeline": "clean renders"})
        _render(args.out, layout, scenes)
    else:
        generate(args, layout, is_image)
    results = score_run(args.out, columns, scenes)
    page = format_table(args.out.resolve().name, results)
    with whole_file(args.out / "table.md") as partial:
        partial.write_text(page)
    print(page, end="")
    if args.json:
        figures = {name: result.mean for name, result in results.items()}
        write_json(args.json, {"prompts": args.prompts, "seed": args.seed, "scores": figures})


def _render(out: Path, layout: Layout, scenes: Mapping[str, Scene]) -> None:
    """Write the scene of each prompt itself, clean, where it is missing."""
    for sample in layout.samples:
        path = out / sample.name
        if not path.exists():
            write_media(path, render_clip(scenes[sample.prompt], every=FPS // CLIP_FPS), CLIP_FPS)


def score_run(out: Path, columns: Sequence[str], scenes: Mapping[str, Scene]) -> dict[str, Result]:
    """The result of each column of a run."""
    results = {}
    for name in columns:
        column = Column(name, {"annotation_rules": Judge(name, scenes)})
        entries = list_entries(out, name, {})
        if entries and (result := score_column(out / name, column, entries)):
            results[name] = result
    return results


def format_table(title: str, results: Mapping[str, Result]) -> str:
    """Markdown: a row of per cents with their 95 % intervals."""
    cells = []
    for result in results.values():
        count = len(result.scores)
        low, high = wilson_interval(round(result.mean * count), count)
        cells.append(f"{100 * result.mean:.1f} ({100 * low:.0f}–{100 * high:.0f})")
    count = max(len(result.scores) for result in results.values())
    lines = [[f"per cent of {count} prompts", *results], ["---"] * (len(results) + 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [*lines, [title, *cells]])


if __name__ == "__main__":
    sys.exit(main())
