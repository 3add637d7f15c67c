"""Compiled samplers from the command line.

python -m gentron_fast.export PIPELINE --out clip.gentron

The file is machine code: load only what you trust.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import torch

from gentron_fast.commandline import (
    check_writable,
    choose_device,
    number,
    refuse,
    run,
    silence_libraries,
    whole_number,
)
from gentron_fast.compiled import CompiledSampler, export_sampler
from gentron_fast.compiled.compilation import check_temporary_folder, check_toolkit
from gentron_fast.compiled.exporter import MAX_BATCH, MOST_BATCH
from gentron_fast.compiled.package import part_digests
from gentron_fast.config import MAX_FRAMES, MAX_SIDE
from gentron_fast.index import ASSETS, chosen, in_force, parts_folder, told
from gentron_fast.text import SUBFOLDERS
from gentron_fast.threads import settle_threads

__all__ = ["CompiledSampler", "export", "export_sampler", "main"]

NAME = "gentron_fast.export"

HELP = f"""\
usage: python -m {NAME} [PIPELINE] --out FILE [options]

PIPELINE                pipeline folder (the small model that ships)
--out FILE              the compiled sampler, such as clip.gentron
--frames N              frames a clip (the pipeline's own)
--size H [W]            in pixels (the pipeline's own)
--steps N --solver S    {{steps}}, {{solver}} (the pipeline's); ddpm, ddim, dpm++, few-step
--eta X                 noise of ddim, 0 to 1 (0)
--lambda-t X            text guidance if a run gives none ({{lambda_t}}, the pipeline's)
--lambda-m X            motion guidance likewise ({{lambda_m}}, the pipeline's)
--rescale X             guidance rescale likewise ({{rescale}}, the pipeline's)
--batch N               the most clips at once, 2 or more ({MAX_BATCH})
--whole                 text encoders and VAE too: token ids in, frames out
--device D --dtype T    cpu or cuda (cpu); float32, bfloat16, float16
--verbose               tell the values in force, each graph; tracebacks

The file holds machine code for this kind of machine and this torch.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 after wrong input (told in one line), 130 after SIGINT."""
    argv = sys.argv[1:] if argv is None else argv
    interrupted = "interrupted; nothing was written"
    return run(NAME, lambda: export(_parse_arguments(argv)), argv, interrupted, (RuntimeError,))


def export(args: argparse.Namespace) -> None:
    """Load the pipeline and write the compiled sampler that the arguments ask for."""
    from gentron_fast.pipeline import GenTronPipeline

    silence_libraries()
    device = choose_device(args.device)
    check_temporary_folder()
    check_toolkit(device)
    check_writable([args.out])
    settle_threads()
    pipeline = GenTronPipeline.from_pretrained(args.pipeline, getattr(torch, args.dtype), device)
    frames = pipeline.default_frames if args.frames is None else args.frames
    size = pipeline.default_size if args.size is None else (args.size * 2)[:2]
    pipeline.vae.check_size(*size, pipeline.transformer.config.patch_size)
    text_encoder = pipeline.text_encoder
    dtype = pipeline.transformer.patch_embed.weight.dtype
    distilled = pipeline.transformer.config.guidance_embedding
    sampling = chosen(args, pipeline.defaults)
    if args.verbose:
        print(f"sampling     {told(sampling)}", flush=True)
    latent_size = tuple(side // pipeline.vae.factor for side in size)
    shape = (pipeline.transformer.config.in_channels, frames, *latent_size)
    pipeline.warn_of(shape, sampling["lambda_t"], sampling["lambda_m"])
    parts = [*(SUBFOLDERS[name][0] for name in pipeline.transformer.config.encoders), "vae"]
    export_sampler(
        args.out,
        pipeline.transformer,
        None if distilled else text_encoder.encode([""]).to(device, dtype),
        pipeline.scheduler,
        frames=frames,
        latent_size=latent_size,
        eta=args.eta,
        **sampling,
        max_batch=args.batch,
        max_tokens={name: text_encoder.max_tokens(name) for name in text_encoder.tokenizers},
        factor=pipeline.vae.factor,
        whole=(text_encoder, pipeline.vae) if args.whole else None,
        learnt=pipeline.learnt,
        parts=part_digests(parts_folder(args.pipeline or ASSETS), parts),
        on_graph=(lambda name: print(f"compiling    {name}", flush=True)) if args.verbose else None,
    )
    with args.out.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"wrote        {args.out}, {args.out.stat().st_size / 2**20:.1f} MiB")
    print(f"sha256       {digest}")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=NAME, allow_abbrev=False)
    parser.format_help = lambda: HELP.format_map(in_force(argv))
    parser.error = refuse
    parser.add_argument("pipeline", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=whole_number(1, MAX_FRAMES))
    parser.add_argument("--size", type=whole_number(1, MAX_SIDE), nargs="+")
    parser.add_argument("--steps", type=whole_number(1))
    parser.add_argument("--solver")
    parser.add_argument("--eta", type=number, default=0.0)
    parser.add_argument("--lambda-t", type=number)
    parser.add_argument("--lambda-m", type=number)
    parser.add_argument("--rescale", type=number)
    parser.add_argument("--batch", type=whole_number(2, MOST_BATCH), default=MAX_BATCH)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_intermixed_args(argv)
    if args.size is not None and len(args.size) > 2:
        raise ValueError(f"--size takes a height and a width, got {len(args.size)} numbers")
    return args


if __name__ == "__main__":
    sys.exit(main())
