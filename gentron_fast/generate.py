"""Clips and images from prompts: python -m gentron_fast.generate "a red circle moving left"."""

import argparse
import os
import re
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gentron_fast.commandline import (
    check_ray,
    check_writable,
    choose_device,
    number,
    rank_and_world,
    refuse,
    run,
    share,
    silence_libraries,
    utf8_text,
    whole_number,
)
from gentron_fast.config import MAX_FRAMES, MAX_SIDE, MOST_CLIPS, GenTronConfig, SamplingDefaults
from gentron_fast.index import (
    ASSETS,
    FAST,
    INDEX_NAME,
    chosen,
    in_force,
    parts_folder,
    sampling_defaults,
    told,
)

# torch and the modules that need it are imported inside the functions, after the arguments have
# been read: --help and most refusals answer at once.

NAME = "gentron_fast.generate"
CLIP_ENDINGS = (".mp4", ".gif")
IMAGE_ENDINGS = (".png",)
FIXED = (
    "--steps",
    "--solver",
    "--eta",
    "--reuse",
    "--dtype",
    "--compile",
    "--fp8",
    "--offload",
    "--fast",
)  # in a compiled sampler
SEEN_AFTER = 60  # seconds after which a file that a node wrote must be seen on the others
NAME_LENGTH = 48  # letters of the prompt in a file name: 4 bytes each stay below the usual 255

HELP = f"""\
usage: python -m {NAME} PROMPT... [options]
       python -m {NAME} --prompts FILE [options]

PROMPT...               one or many prompts, each in quotes
--prompts FILE          one a line, # comments; what is written is skipped
--negative-prompt TEXT  what to keep away from
--frames N --image      frames a clip, 1 to {MAX_FRAMES}; one frame, written as .png
--size H W              in pixels
--clips N --batch N     clips per prompt (1), clips made at once (1)
--seed N                of the first clip of each prompt (0)
--model FOLDER --fast   pipeline folder (what ships); its model of few steps
--compiled FILE --sha256 D   a compiled sampler in its place; its digest
--steps N --solver S    {{steps}}, {{solver}} (the model's); ddpm, ddim, dpm++, few-step
--lambda-t X            text guidance ({{lambda_t}}, the model's; in the paper 7.5)
--lambda-m X            motion guidance ({{lambda_m}}, the model's; in the paper 1 to 1.3)
--rescale X             guidance rescale, 0 to 1 ({{rescale}}, the model's)
--guidance-range A B    guide only in this part of the steps (0 1)
--eta X --reuse N       noise of ddim (0); approximate: guide each Nth step (1)
--device D --dtype T    cpu, cuda, cuda:1; float32, bfloat16, float16
--compile --fp8         torch.compile; fp8 products, by torchao on a GPU
--offload               encode first; each part on the device while it runs
--out PATH --grid       a folder (outputs/) or one file; also a .png of frames
--fps N --verbose       frames a second (4); tell the values in force, each file
--ray ADDRESS --cores N  on Ray: auto, local or HOST:PORT; cores a process
"""


class Clip(NamedTuple):
    """One clip or image to make, and the files that it becomes."""

    prompt: str
    seed: int
    paths: list[Path]

    @property
    def is_written(self) -> bool:
        return all(path.exists() for path in self.paths)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 after wrong input (told in one line), 130 after SIGINT."""
    argv = sys.argv[1:] if argv is None else argv
    interrupted = "interrupted; the files that are there are whole"
    return run(NAME, lambda: generate(parse_arguments(argv)), argv, interrupted)


def generate(args: argparse.Namespace) -> None:
    """Make, write and report what the arguments ask for. Raises ValueError or OSError."""
    prompts = read_prompts(args)
    silence_libraries()
    rank_and_world()  # checks the launcher's variables before any work
    if args.fast:
        args.model = fast_folder(args.model or ASSETS)
    folder = args.model or ASSETS
    if args.compiled is not None:
        return generate_compiled(args, prompts, folder)
    frames = choose_frames(args, folder)
    clips = plan_clips(args, prompts, is_image=frames == 1)
    take_defaults(args, sampling_defaults(folder))
    check_sampling(args, folder)
    if args.ray is not None:
        if clips := clips_to_make(args, clips):
            make_on_ray(args, clips, frames)
        return
    device = choose_device(args.device)
    clips = clips_to_make(args, clips)
    if clips:
        load_and_make(args, folder, device, clips, frames)


def load_and_make(args, folder: Path, device, clips: list[Clip], frames: int | None) -> None:
    """Load the pipeline in the folder, make and write the clips, and report."""
    from gentron_fast.memory import peak_memory
    from gentron_fast.threads import settle_threads

    start = time.perf_counter()
    settle_threads()
    pipeline = load_pipeline(args, folder, device)
    load_seconds = time.perf_counter() - start
    if args.offload:
        pipeline.encode_ahead([args.negative_prompt or "", *(clip.prompt for clip in clips)])
    clip_seconds = make_clips(pipeline, args, clips, frames)
    report(clips, load_seconds, clip_seconds, peak_memory(device))


class RayWorker:
    """An actor on a Ray cluster: a pipeline, and the clips (prompt, seed, paths) it makes, those
    that are written left out. Tells of each whether it was made."""

    def __init__(self, args: argparse.Namespace, frames: int | None, device: str):
        import torch

        silence_libraries()
        self.args, self.frames = args, frames
        self.pipeline = load_pipeline(args, args.model or ASSETS, torch.device(device))

    def __call__(self, pieces: list) -> list:
        clips = [Clip(prompt, seed, [Path(p) for p in paths]) for prompt, seed, paths in pieces]
        missing = [clip for clip in clips if not clip.is_written]
        if missing:
            make_clips(self.pipeline, self.args, missing, self.frames)
        return [clip in missing for clip in clips]


def make_on_ray(args: argparse.Namespace, clips: list[Clip], frames: int | None) -> None:
    """Make and write the clips by a Ray cluster, --batch of them at a time on each GPU or set of
    cores, and report. ValueError where what a node writes is not seen here."""
    from tqdm import tqdm

    from gentron_fast.generate import RayWorker  # not of __main__, which other nodes do not have
    from gentron_fast.on_ray import cluster, on_all

    start, is_seen = time.perf_counter(), False
    where = argparse.Namespace(**vars(args))
    where.model = args.model and args.model.absolute()
    pieces = [[c.prompt, c.seed, [str(path.absolute()) for path in c.paths]] for c in clips]
    gpus = None if args.device is None else args.device == "cuda"
    work = partial(RayWorker, where, frames)
    with cluster(args.ray), tqdm(total=len(clips), unit="clip", leave=False, disable=None) as bar:
        for (_, _, paths), _ in on_all(
            work, pieces, gpus=gpus, cores=args.cores, at_once=args.batch
        ):
            if not is_seen:
                wait_for([Path(path) for path in paths])
                is_seen = True
            bar.update()
        wait_for([path for clip in clips for path in clip.paths])
    seconds = time.perf_counter() - start
    print(f"{f'{len(clips)} clips':<12} {common_folder(clips)}")
    print(f"on Ray       {seconds:.2f} s, {seconds / len(clips):.2f} s a clip")


def wait_for(paths: list[Path]) -> None:
    """Wait until files that another node wrote are seen here, as a network's file system may take
    its time; ValueError where they are not."""
    for path in paths:
        end = time.monotonic() + SEEN_AFTER
        while not path.exists():
            if time.monotonic() > end:
                raise ValueError(
                    f"{path} was written by a node and is not seen here: --out must lie on a file "
                    "system that all nodes share"
                )
            time.sleep(0.2)


def generate_compiled(args: argparse.Namespace, prompts: list[str], folder: Path) -> None:
    """`generate` with a compiled sampler; the text encoders and VAE it lacks are the folder's."""
    from gentron_fast.compiled import CompiledPipeline, CompiledSampler
    from gentron_fast.guidance import guidance_schedule
    from gentron_fast.memory import peak_memory
    from gentron_fast.threads import settle_threads

    start = time.perf_counter()
    settle_threads()
    sampler = CompiledSampler.load(args.compiled, device=args.device, sha256=args.sha256)
    sampler.check_shape(1 if args.image else args.frames, args.size)
    metadata = sampler.metadata
    take_defaults(args, sampler.defaults)
    guidance_schedule(1.0, args.steps, *args.guidance_range)
    if args.model is None and not metadata["whole"] and not metadata["parts"]:
        raise ValueError(f"{args.compiled} has no text encoders and no VAE: --model names them")
    args.batch = min(args.batch, metadata["max_batch"])
    frames = metadata["frames"][0]
    clips = clips_to_make(args, plan_clips(args, prompts, is_image=frames == 1))
    if not clips:
        return
    device = choose_device(args.device or metadata["device"])
    parts = None if metadata["whole"] else parts_folder(folder)
    pipeline = CompiledPipeline(sampler, parts, device)
    if args.verbose:
        print(f"loaded       {args.compiled} on {device} in {metadata['dtype']}", flush=True)
        tell_sampling(args)
    load_seconds = time.perf_counter() - start
    clip_seconds = make_clips(pipeline, args, clips, frames)
    report(clips, load_seconds, clip_seconds, peak_memory(device))


def clips_to_make(args: argparse.Namespace, clips: list[Clip]) -> list[Clip]:
    """The clips of this rank, without those of a prompts file that are written; the folder can be
    written."""
    check_writable(path for clip in clips for path in clip.paths)
    clips = share(clips, "clips")
    return clips if args.prompts is None else leave_out_written(clips)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises ValueError where argparse would print its usage and exit."""
    parser = argparse.ArgumentParser(prog=NAME, allow_abbrev=False)
    parser.format_help = lambda: HELP.format_map(in_force(argv))
    parser.error = refuse
    parser.add_argument("prompt", nargs="*", type=utf8_text)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--image", action="store_true")
    parser.add_argument("--clips", type=whole_number(1, MOST_CLIPS), default=1)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--compiled", type=Path)
    parser.add_argument("--sha256")
    parser.add_argument("--out", default="outputs/")
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--ray")
    parser.add_argument("--cores", type=whole_number(1))
    add_sampling_options(parser)
    args = parser.parse_intermixed_args(argv)
    if args.image and args.frames not in (None, 1):
        raise ValueError(f"--image is one frame, --frames asks for {args.frames}")
    given = {word.partition("=")[0] for word in argv}
    if args.compiled is None and args.sha256 is not None:
        raise ValueError("--sha256 is for the file of --compiled, and there is none")
    check_precision(args)
    check_work_on_ray(args)
    if args.compiled is not None and (fixed := sorted(given & set(FIXED))):
        raise ValueError(f"{fixed[0]} is fixed in a compiled sampler: leave it out")
    return args


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options of `generate` that say how a pipeline samples, wherever the prompts come from."""
    parser.add_argument("--negative-prompt", type=utf8_text)
    parser.add_argument("--frames", type=whole_number(1, MAX_FRAMES))
    parser.add_argument("--size", type=whole_number(1, MAX_SIDE), nargs=2)
    parser.add_argument("--seed", type=whole_number(0, 2**64 - 1), default=0)
    parser.add_argument("--steps", type=whole_number(1))
    parser.add_argument("--solver")
    parser.add_argument("--lambda-t", type=number)
    parser.add_argument("--lambda-m", type=number)
    parser.add_argument("--rescale", type=number)
    parser.add_argument("--guidance-range", type=number, nargs=2, default=(0.0, 1.0))
    parser.add_argument("--eta", type=number, default=0.0)
    parser.add_argument("--reuse", type=whole_number(1), default=1)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=whole_number(1), default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--fps", type=whole_number(1, 100), default=4)
    parser.add_argument("--verbose", action="store_true")


def check_work_on_ray(args: argparse.Namespace) -> None:
    """ValueError where --ray stands beside what it does not go with."""
    check_ray(args)
    if args.ray is None:
        return
    if args.prompts is None:
        raise ValueError("--ray makes the clips of a file: --prompts FILE")
    for name in ("compiled", "offload"):
        if getattr(args, name):
            raise ValueError(f"--ray does not go with --{name}")


def check_precision(args: argparse.Namespace) -> None:
    """ValueError where --fp8 stands beside what it does not go with."""
    if args.fp8 and args.dtype != "bfloat16":
        raise ValueError(f"--fp8 goes with --dtype bfloat16, not {args.dtype}")
    if args.fp8 and args.offload:
        raise ValueError("--fp8 keeps the transformer on the GPU, --offload does not: give one")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts, each once, of the command line or of the file of --prompts."""
    if args.prompts is None:
        if not args.prompt:
            raise ValueError("a prompt is needed: PROMPT, or --prompts FILE")
        prompts = [prompt.strip() for prompt in args.prompt]
        if not all(prompts):
            raise ValueError("the prompt is empty")
        return list(dict.fromkeys(prompts))
    if args.prompt:
        raise ValueError("give PROMPT or --prompts FILE, not both")
    return list(dict.fromkeys(read_prompts_file(args.prompts)))


def read_prompts_file(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines and # comments are left out."""
    if not path.is_file():
        raise ValueError(f"no prompts file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"the prompts file {path} is not UTF-8 text") from None
    # Not splitlines: a prompt may hold U+2028 and its like.
    prompts = [line.strip() for line in text.split("\n")]
    prompts = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
    if not prompts:
        raise ValueError(f"the prompts file {path} holds no prompt")
    return prompts


def choose_frames(args: argparse.Namespace, folder: Path) -> int | None:
    """Frames a clip: 1 is an image, None the pipeline's own number."""
    config = read_model_config(folder)
    if not config.temporal and args.frames not in (None, 1):
        raise ValueError(f"the model in {folder} makes images, --frames asks for {args.frames}")
    return 1 if args.image or not config.temporal else args.frames


def read_model_config(folder: Path) -> GenTronConfig:
    """The configuration of the model in a pipeline folder, without loading the model."""
    if not (folder / INDEX_NAME).is_file():
        raise ValueError(f"no pipeline in {folder}: it has no {INDEX_NAME}")
    return GenTronConfig.read(folder / "transformer" / "config.json")


def plan_clips(args: argparse.Namespace, prompts: list[str], is_image: bool) -> list[Clip]:
    """Every clip with its seed and its files: --clips of each prompt, in the folder --out or in
    the one file --out."""
    out, ending = Path(args.out), Path(args.out).suffix.lower()
    if args.seed + args.clips > 2**64:
        raise ValueError(f"--seed {args.seed} with --clips {args.clips} goes beyond 2**64 - 1")
    wanted = [(prompt, args.seed + i) for prompt in prompts for i in range(args.clips)]
    if args.out.endswith(("/", os.sep)) or not ending or out.is_dir():
        endings = IMAGE_ENDINGS if is_image else CLIP_ENDINGS
        if args.grid and not is_image:
            endings += (".png",)
        return [
            Clip(prompt, seed, [out / f"{file_name(prompt)}-seed{seed}{end}" for end in endings])
            for prompt, seed in wanted
        ]
    if ending not in CLIP_ENDINGS + IMAGE_ENDINGS:
        raise ValueError(
            f"--out {out} ends in {ending}: wanted .mp4, .gif, .png or a folder ({out}/)"
        )
    if len(wanted) > 1:
        raise ValueError(f"--out {out} is one file, wanted a folder for {len(wanted)} clips")
    if is_image and ending not in IMAGE_ENDINGS:
        raise ValueError(f"--out {out} ends in {ending}, an image is written as .png")
    if not is_image and ending in IMAGE_ENDINGS and not args.grid:
        raise ValueError(f"--out {out} is one picture of a clip: add --grid or --image")
    paths = [out, out.with_suffix(".png")] if args.grid and ending != ".png" else [out]
    return [Clip(*wanted[0], paths)]


def file_name(prompt: str) -> str:
    """The prompt as a file name: a-red-circle-moving-left.

    What the letters do not tell (case, punctuation, the end of a long prompt) goes into a checksum
    behind them, so that different prompts have different names.
    """
    name = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:NAME_LENGTH]
    if name.replace("-", " ") == prompt:
        return name
    return f"{name}-{zlib.crc32(prompt.encode()):08x}".lstrip("-")


def fast_folder(folder: Path) -> Path:
    """Of a pipeline folder that of its distilled model. ValueError where there is none."""
    if not (folder / FAST / INDEX_NAME).is_file():
        raise ValueError(
            f"--fast: {folder} has no distilled model, {FAST}/{INDEX_NAME}; train/distill.py makes "
            "one, gentron_train.add_fast puts it there"
        )
    return folder / FAST


def take_defaults(args: argparse.Namespace, defaults: SamplingDefaults) -> None:
    """Steps, solver and guidance that the command line leaves out are the model's own."""
    vars(args).update(chosen(args, defaults))


def check_sampling(args: argparse.Namespace, folder: Path) -> None:
    """Raise ValueError unless solver, steps, eta and guidance range go with the noise schedule, and
    what is asked of the guidance with the model."""
    import torch

    from gentron_fast.diffusion import SCHEDULER_SCHEMA
    from gentron_fast.files import read_json
    from gentron_fast.guidance import check_one_branch, check_rescale, guidance_schedule
    from gentron_fast.pipeline import SCHEDULER_PATH
    from gentron_fast.solvers import make_table

    scheduler = read_json(parts_folder(folder) / SCHEDULER_PATH, SCHEDULER_SCHEMA)
    make_table(args.solver, scheduler, args.steps, args.eta)
    guidance_schedule(args.lambda_t, args.steps, *args.guidance_range)
    if read_model_config(folder).guidance_embedding:
        check_one_branch([args.negative_prompt], args.reuse)
        check_rescale(torch.as_tensor(args.rescale), distilled=True)


def leave_out_written(clips: list[Clip]) -> list[Clip]:
    """The clips that are still to make; tells in one line how many are there already."""
    missing = [clip for clip in clips if not clip.is_written]
    if len(missing) < len(clips):
        done = len(clips) - len(missing)
        print(f"skipped      {done} of {len(clips)} clips, already in {common_folder(clips)}")
    return missing


def common_folder(clips: list[Clip]) -> str:
    """The folder that all files of the clips lie under."""
    return os.path.commonpath([clip.paths[0].parent for clip in clips])


def load_pipeline(args: argparse.Namespace, folder: Path, device):
    """The pipeline in the folder, on its device. A damaged folder is a ValueError."""
    import torch

    from gentron_fast.pipeline import GenTronPipeline

    dtype = getattr(torch, args.dtype)
    start_device = "cpu" if args.offload else device
    try:
        pipeline = GenTronPipeline.from_pretrained(folder, dtype, start_device)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load {folder}: {error}") from error
    if args.fp8:
        from gentron_fast.fp8 import use_fp8

        use_fp8(pipeline.transformer)
    if args.offload:
        pipeline.enable_offload(device)
    if args.compile:
        pipeline.transformer.compile_blocks()
    if args.verbose:
        print(f"loaded       {folder} on {device} in {args.dtype}", flush=True)
        tell_sampling(args)
    return pipeline


def tell_sampling(args: argparse.Namespace) -> None:
    """In one line the steps, solver and guidance that are in force."""
    print(f"sampling     {told(chosen(args, SamplingDefaults()))}", flush=True)


def make_clips(pipeline, args: argparse.Namespace, clips: list[Clip], frames: int | None) -> float:
    """Make the clips, --batch of them at a time, and write each batch as soon as it is there.

    Returns the seconds per clip from prompt to frames; writing is not counted.
    """
    from tqdm import tqdm

    seconds = 0.0
    batches = [clips[i : i + args.batch] for i in range(0, len(clips), args.batch)]
    quiet = True if rank_and_world()[0] else None  # None: away from a terminal
    with tqdm(total=len(batches) * args.steps, unit="step", leave=False, disable=quiet) as bar:
        for batch in batches:
            bar.set_description(batch[0].prompt[:40])
            start = time.perf_counter()
            output = pipeline(
                [clip.prompt for clip in batch],
                negative_prompt=args.negative_prompt,
                frames=frames,
                size=args.size,
                steps=args.steps,
                solver=args.solver,
                eta=args.eta,
                reuse=args.reuse,
                lambda_t=args.lambda_t,
                lambda_m=args.lambda_m,
                rescale=args.rescale,
                guidance_range=tuple(args.guidance_range),
                seed=[clip.seed for clip in batch],
                callback_on_step_end=lambda step, timestep, latents: bar.update(1),
                progress=False,
            )
            seconds += time.perf_counter() - start
            if args.verbose:
                bar.write(f"guidance     {output.guidance}")
            for clip, pictures in zip(batch, output.frames, strict=True):
                write_clip(clip, pictures, args.fps)
                if args.verbose:
                    bar.write(f"wrote        {', '.join(map(str, clip.paths))}")
    return seconds / len(clips)


def write_clip(clip: Clip, frames, fps: int) -> None:
    """Write frames, uint8 (T, H, W, 3), to each file of the clip; a .png of many is a grid."""
    from gentron_fast.media import contact_sheet, write_media

    for path in clip.paths:
        is_grid = path.suffix.lower() == ".png" and len(frames) > 1
        write_media(path, contact_sheet([frames])[None] if is_grid else frames, fps)


def report(clips: list[Clip], load_seconds: float, clip_seconds: float, memory: int) -> None:
    """Print where the clips are, and what they took."""
    where = common_folder(clips)
    if len(clips) == 1:
        where = ", ".join(map(str, clips[0].paths))
    print(f"{'wrote' if len(clips) == 1 else f'{len(clips)} clips':<12} {where}")
    print(f"load time    {load_seconds:.2f} s")
    print(f"per clip     {clip_seconds:.2f} s")
    print(f"peak memory  {memory / 2**20:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
