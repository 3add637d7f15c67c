"""The images or clips of a benchmark by a pipeline: resumable one by one, shared out over ranks."""

import argparse
import warnings
from pathlib import Path

from gentron_fast import generate as sampling
from gentron_fast.commandline import (
    check_writable,
    choose_device,
    rank_and_world,
    refuse,
    share,
    whole_number,
)
from gentron_fast.evaluation.layout import (
    IMAGES,
    Layout,
    compbench,
    tell_renamed,
    vbench,
    write_manifest,
)
from gentron_fast.index import sampling_defaults

NAME = "gentron_fast.evaluate generate"
HELP = f"""\
usage: python -m {NAME} PIPELINE --compbench FOLDER --out RUN [options]
       python -m {NAME} PIPELINE --vbench PROMPTS --out RUN [options]

PIPELINE                pipeline folder
--compbench FOLDER      T2I-CompBench's prompt files: color_val.txt and so on
--vbench PROMPTS        a prompt file of VBench, or a folder of them
--out RUN               folder for the benchmark's layout; what is there is kept
--count N               images or clips a prompt (10; 5, and 25 for flicker)
--first N               the first N prompts of each file (all)

What is sampled how: --seed, --steps, --size and the other options of
python -m gentron_fast.generate --help. Image k of a category and clip k of a
VBench run have seed + k.
Under torchrun, deepspeed or srun every rank makes its share.
"""
# How fast, and not what: a run may go on with other ones.
NOT_OF_THE_RUN = ("device", "batch", "compile", "offload", "verbose")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`, and how a pipeline samples."""
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--compbench", type=Path)
    parser.add_argument("--vbench", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=whole_number(1, 1000))
    parser.add_argument("--first", type=whole_number(1))
    sampling.add_sampling_options(parser)


def command(argv: list[str]) -> None:
    """Read the arguments, make what is missing. ValueError or OSError after wrong input."""
    parser = argparse.ArgumentParser(prog=NAME, allow_abbrev=False)
    parser.format_help = lambda: HELP
    parser.error = refuse
    add_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    sampling.check_precision(args)
    if (args.compbench is None) == (args.vbench is None):
        raise ValueError("give --compbench FOLDER or --vbench PROMPTS, one of them")
    if args.compbench is not None:
        is_image, layout = True, compbench(args.compbench, args.count or IMAGES, args.first)
    else:
        is_image, layout = False, vbench(args.vbench, args.count, args.first)
    generate(args, layout, is_image)


def generate(args: argparse.Namespace, layout: Layout, is_image: bool) -> None:
    """Make what RUN (args.out) lacks of a layout, by args.pipeline as the sampling options say."""
    rank, _ = rank_and_world()
    if is_image and args.frames not in (None, 1):
        raise ValueError(f"the benchmark takes images, --frames asks for {args.frames}")
    args.image = is_image
    frames = sampling.choose_frames(args, args.pipeline)
    if not is_image and frames == 1:
        raise ValueError(f"the benchmark takes clips, {args.pipeline} would make images")
    if args.seed + len(layout.samples) > 2**64:
        raise ValueError(f"--seed {args.seed} with {len(layout.samples)} samples exceeds 2**64 - 1")
    sampling.take_defaults(args, sampling_defaults(args.pipeline))
    sampling.check_sampling(args, args.pipeline)
    device = choose_device(args.device)
    clips = [
        sampling.Clip(sample.prompt, args.seed + sample.number, [args.out / sample.name])
        for sample in layout.samples
    ]
    check_writable(path for clip in clips for path in clip.paths)
    write_manifest(args.out, layout, run_settings(args))
    if rank == 0:
        for line in tell_renamed(layout):
            warnings.warn(line, stacklevel=2)
    missing = sampling.leave_out_written(share(clips, "samples"))
    if missing:
        sampling.load_and_make(args, args.pipeline, device, missing, frames)


def run_settings(args: argparse.Namespace) -> dict:
    """What decides the samples of a run, for its manifest."""
    parser = argparse.ArgumentParser()
    sampling.add_sampling_options(parser)
    names = [name for name in vars(parser.parse_args([])) if name not in NOT_OF_THE_RUN]
    values = {name: getattr(args, name) for name in names}
    values["guidance_range"] = list(args.guidance_range)
    return {"pipeline": str(args.pipeline.resolve()), **values}
