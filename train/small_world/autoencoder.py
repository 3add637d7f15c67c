"""Train the small model's autoencoder on frames of the small world; one process, CPU or GPU.

    python -m gentron_train.small_world.autoencoder --out runs/vae

Faster: one with --levels 3 --out runs/vae-3 first, then --init runs/vae-3. What a decoder still
learns behind latents that stay is had by --init runs/vae --decoder-only.
"""

import argparse
import json
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from gentron_fast.commandline import (
    check_writable,
    refuse,
    run,
    usable_device,
    whole_number,
)
from gentron_fast.files import (
    LOCK_NAME,
    MARK,
    check_output_folder,
    lock_folder,
    whole_file,
    whole_folder,
)
from gentron_fast.threads import settle_threads
from gentron_fast.vae import VideoVAE
from gentron_train.data.broken import BrokenSample, broken_by
from gentron_train.data.decode import decode_clip, decode_image
from gentron_train.data.options import check_positive
from gentron_train.data.shards import Shard, check_any_sample, count, find_shards, read
from gentron_train.data.sources import seeded
from gentron_train.log import check_log
from gentron_train.small_world.architecture import VAE_CHANNELS, small_vae
from gentron_train.small_world.renderer import ensure_shards

# Shapes: B batch, H × W pixels.
NAME = "gentron_train.small_world.autoencoder"
KL_WEIGHT = 1e-4  # against an error of about 0.02 per pixel: keeps the latents near a normal
CHROMA_WEIGHT = 4.0  # objects cover a tenth of a frame and only have colour
SQUARE_WEIGHT = 2.0  # of the squared error beside the absolute one, which forgets small objects
CLIP_FRAMES = 4  # frames taken of each clip
WRITTEN = ("config.json", "diffusion_pytorch_model.safetensors")  # in the folder of --out
STATE_NAME = "state.safetensors"
STATE_FILES = (STATE_NAME, LOCK_NAME, ".state.*.part.safetensors")  # the last of killed runs
LOG_FIELDS = ("step", "seconds", "loss")


@dataclass(frozen=True)
class VaeTraining:
    """What one run of the autoencoder's training depends on."""

    steps: int = 5000
    batch: int = 8
    lr: float = 2e-3
    warmup: int = 100
    images: int = 8000
    clips: int = 1500
    seed: int = 0
    levels: int = len(VAE_CHANNELS)
    decoder_only: bool = False
    save_every: int = 500


def read_frames(data: Path, images: int, clips: int) -> Tensor:
    """Frames of the first images and of the first clips, CLIP_FRAMES each: uint8 (N, H, W, 3)."""
    frames = []
    for kind, limit in (("images", images), ("clips", clips)):
        shards = find_shards(f"{data}/{kind}-*.tar")
        check_any_sample(shards)
        with tqdm(total=limit, desc=kind, unit="sample", leave=False) as bar:
            for shard, number in islice(_places(shards), limit):
                try:
                    with broken_by("unreadable sample"):
                        _, files = read(shard, number)
                        if kind == "images":
                            frames.append(decode_image(files["png"])[None])
                        else:
                            clip = decode_clip(files["mp4"])[0]
                            frames.append(clip[:: len(clip) // CLIP_FRAMES][:CLIP_FRAMES])
                except BrokenSample as error:
                    tqdm.write(f"skipped sample {number} of {shard.url}: {error.cause}")
                bar.update()
    return torch.cat(frames)


def _places(shards: list[Shard]) -> Iterator[tuple[Shard, int]]:
    """Every sample's shard and number; a line tells of a shard that breaks off."""
    for shard in shards:
        samples, cut = count(shard)
        if cut:
            tqdm.write(f"{shard.url} breaks off {cut}")
        for number in range(samples):
            yield shard, number


def vae_loss(vae: VideoVAE, pixels: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Error of the pixels, coloured ones first, and KL divergence to a standard normal.

    pixels (B, 3, 1, H, W) in [-1, 1]; noise like the latents. Returns the loss and its parts.
    """
    mean, std = (part.float() for part in vae.encode(pixels))
    output = vae.decode(mean + std * noise, slice_frames=len(pixels), clamp=False).float()
    error = output - pixels
    chroma = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)
    weighted = (1 + CHROMA_WEIGHT * chroma) * (error.abs() + SQUARE_WEIGHT * error.square())
    kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
    loss = weighted.mean() + KL_WEIGHT * kl
    return loss, {"loss": loss, "square": error.square().mean(), "kl": kl}


def learning_rate(step: int, training) -> float:
    """Linear warm-up, then half a cosine to a hundredth; training has lr, warmup and steps."""
    if step < training.warmup:
        return training.lr * (step + 1) / training.warmup
    done = (step - training.warmup) / max(training.steps - training.warmup, 1)
    return training.lr * (0.01 + 0.99 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done)).item()))


def copy_levels(smaller: VideoVAE, vae: VideoVAE) -> None:
    """Start `vae` from an autoencoder with fewer levels: those at the pixels' end are shared.

    An encoder counts its levels from the pixels, a decoder towards them; what has no counterpart of
    its shape stays as it is.
    """
    levels = [len(v.autoencoder.config.block_out_channels) for v in (smaller, vae)]
    target = vae.state_dict()
    for name, value in smaller.state_dict().items():
        parts = name.split(".")
        if "up_blocks" in parts:
            level = parts.index("up_blocks") + 1
            parts[level] = str(int(parts[level]) + levels[1] - levels[0])
            name = ".".join(parts)
        if name in target and target[name].shape == value.shape:
            target[name].copy_(value)


def train(
    data: Path,
    out: Path,
    training: VaeTraining,
    device: str,
    resume: bool,
    init: Path | None = None,
) -> None:
    """Train, write OUT as a diffusers AutoencoderKL folder, and OUT.log.jsonl beside it.

    ValueError before any work where OUT, or what stands beside it, is not of such a training, or
    another process trains it.
    """
    check_output_folder(out, WRITTEN)
    torch.manual_seed(training.seed)
    vae = small_vae(VAE_CHANNELS[: training.levels])
    if init is not None:
        known = VideoVAE.from_pretrained(init, torch.float32)
        copy_levels(known, vae)
    vae = vae.to(device).train()
    if training.decoder_only:
        vae.autoencoder.register_to_config(scaling_factor=known.scaling_factor)
        for part in (vae.autoencoder.encoder, vae.autoencoder.quant_conv):
            part.requires_grad_(False)
    trained = [parameter for _, parameter in trained_parameters(vae)]
    optimizer = torch.optim.AdamW(trained, lr=training.lr, weight_decay=0.0)
    folder, log = open_beside(out)
    first = load_state(folder / STATE_NAME, vae, optimizer) if resume else 0
    frames = read_frames(data, training.images, training.clips)
    start = time.monotonic()
    with (
        tqdm(total=training.steps, initial=first, desc="vae", mininterval=5) as bar,
        open(log, "a" if first else "w") as lines,
    ):
        for step in range(first, training.steps):
            generator = seeded(training.seed, "vae", step)
            rows = torch.randint(len(frames), (training.batch,), generator=generator)
            pixels = frames[rows].movedim(-1, 1)[:, :, None].to(device).float() / 127.5 - 1
            side = pixels.shape[-1] // vae.factor
            noise = torch.randn(len(rows), vae.latent_channels, 1, side, side, generator=generator)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss, parts = vae_loss(vae, pixels, noise.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, training)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if (step + 1) % 20 == 0:
                values = {name: round(part.item(), 5) for name, part in parts.items()}
                bar.set_postfix(values)
                seconds = round(time.monotonic() - start, 1)
                lines.write(json.dumps({"step": step + 1, "seconds": seconds} | values) + "\n")
                lines.flush()
            if (step + 1) % training.save_every == 0:
                save_state(folder / STATE_NAME, vae, optimizer, step + 1)
    if not training.decoder_only:  # whose latents are --init's
        set_scaling(vae.eval(), frames, device)
    with whole_folder(out, WRITTEN) as partial:
        vae.cpu().half().save_pretrained(partial)  # as pipelines hold it
    remove_state(folder)


@torch.no_grad()
def set_scaling(vae: VideoVAE, frames: Tensor, device: str, sample: int = 2000) -> None:
    """Set the scaling factor to 1 / the latents' standard deviation (Rombach et al., 2022)."""
    rows = torch.linspace(0, len(frames) - 1, min(sample, len(frames))).long()
    pixels = frames[rows].movedim(-1, 1)[:, :, None].float() / 127.5 - 1
    means = [vae.encode(part.to(device))[0] for part in pixels.split(100)]
    vae.autoencoder.register_to_config(scaling_factor=round(1 / torch.cat(means).std().item(), 5))


def open_beside(out: Path) -> tuple[Path, Path]:
    """The folder of the state, locked, and the log, both beside OUT; ValueError where either is
    there and holds what no training wrote, or another process trains OUT."""
    folder, log = (out.with_name(f"{out.name}.{end}") for end in ("training", "log.jsonl"))
    check_log(log, LOG_FIELDS)
    held = sorted(folder.iterdir()) if folder.is_dir() else []
    foreign = [path.name for path in held if not any(map(path.match, STATE_FILES))]
    if held and (foreign or folder / LOCK_NAME not in held):
        raise ValueError(
            f"{folder} is for the state of a training, it holds "
            f"{', '.join((foreign or [path.name for path in held])[:3])}: move it"
        )
    lock_folder(folder)
    return folder, log


def remove_state(folder: Path) -> None:
    """Remove the files of a training's state, and the folder where it holds nothing else."""
    for pattern in STATE_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those that are not frozen, with their names."""
    return [(name, value) for name, value in module.named_parameters() if value.requires_grad]


def save_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and both AdamW moments in one safetensors file, written aside and renamed."""
    tensors = {}
    for name, parameter in trained_parameters(module):
        tensors[f"weight.{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"step": str(step)})


def load_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read what `save_state` wrote; returns the step to go on with, 0 if there is no state.

    ValueError for a damaged state, or one of other settings.
    """
    if not path.exists():
        return 0
    try:
        return _load(load_file(path), module, optimizer)
    except (SafetensorError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no state of this training: {reason}") from None


def _load(tensors: dict, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    steps = 0
    for name, parameter in trained_parameters(module):
        parameter.detach().copy_(tensors[f"weight.{name}"])
        moments = ("exp_avg", "exp_avg_sq", "step")
        optimizer.state[parameter] = {
            moment: tensors[f"{moment}.{name}"].to(parameter.device if moment != "step" else "cpu")
            for moment in moments
        }
        steps = int(tensors[f"step.{name}"])
    return steps


def add_training_options(parser: argparse.ArgumentParser, training) -> None:
    """The options of a part that is trained by itself; training: a class with their defaults."""
    parser.add_argument("--steps", type=whole_number(1), default=training.steps)
    parser.add_argument("--batch", type=whole_number(1), default=training.batch, help="a step")
    parser.add_argument("--lr", type=float, default=training.lr)
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=training.seed)
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=best)


def prepare_output(out: Path, written: Collection[str]) -> None:
    """The folder that OUT lies in; ValueError where OUT holds something else than what is
    `written`, or where it or what lies beside it cannot be written."""
    check_output_folder(out, written)
    beside = out.with_name(f"{out.name}.log.jsonl")
    check_writable([out / "config.json", beside])
    out.parent.mkdir(parents=True, exist_ok=True)


def is_finished(out: Path) -> bool:
    """Whether a training has written OUT and left no state to go on from."""
    state = out.with_name(f"{out.name}.training") / STATE_NAME
    return (out / MARK).exists() and not state.exists()


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, which is told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: command(argv), argv, "stopped; go on with --resume")


def command(argv: list[str]) -> None:
    """Train as a command line says; shards are made first if the data folder has none."""
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__.splitlines()[0])
    parser.error = refuse
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    parser.add_argument("--out", type=Path, default=Path("runs/vae"))
    add_training_options(parser, VaeTraining)
    parser.add_argument(
        "--levels", type=int, default=VaeTraining.levels, choices=range(2, len(VAE_CHANNELS) + 1)
    )
    parser.add_argument("--init", type=Path, help="autoencoder to start from, of fewer levels too")
    parser.add_argument(
        "--decoder-only", action="store_true", help="the latents stay those of --init"
    )
    args = parser.parse_args(argv)
    check_positive(args, "lr")
    if args.init is not None and not (args.init / WRITTEN[0]).is_file():
        raise FileNotFoundError(f"no autoencoder in {args.init}")
    if args.decoder_only and args.init is None:
        raise ValueError("--decoder-only needs --init FOLDER, whose latents stay")
    prepare_output(args.out, WRITTEN)
    if args.resume and is_finished(args.out):
        print(f"autoencoder in {args.out}, finished before")
        return
    ensure_shards(args.data)
    training = VaeTraining(
        args.steps,
        args.batch,
        args.lr,
        seed=args.seed,
        levels=args.levels,
        decoder_only=args.decoder_only,
    )
    settle_threads()
    train(args.data, args.out, training, args.device, args.resume, args.init)
    print(f"autoencoder in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
