"""A pipeline folder from a training checkpoint, tensor by tensor, without a GPU.

    python -m gentron_train.export_pipeline CKPT OUT [--ema] [--dtype fp16]

CKPT is a checkpoint, or a run folder, whose last one is taken; --ema exports the averaged weights.
Optimizer state is not read, and no more than one tensor of the transformer is in memory at a time.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gentron_fast.checkpoint import Spec, new_folder, write_tensors
from gentron_fast.config import GenTronConfig
from gentron_fast.convert import copy_parts
from gentron_fast.diffusion import SCHEDULER_CONFIG
from gentron_fast.model import CONFIG_NAME, WEIGHTS_NAME, write_json
from gentron_fast.pipeline import INDEX_NAME, SCHEDULER_PATH, model_index
from gentron_fast.text import SUBFOLDERS, TextEncoder
from gentron_fast.vae import VideoVAE
from gentron_train.checkpoint import latest_checkpoint, read_info, read_sharded
from gentron_train.config import EXPORT_DTYPES, Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZER_FILE = "*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
# Objects of DeepSpeed in its files, of which nothing is needed here.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
)


class _Ignored:
    def __init__(self, *args):
        pass


def averaged_weights(checkpoint: Path, info: dict) -> Callable[[str], Tensor]:
    """Name → the whole averaged parameter, fp32."""
    paths = [checkpoint / f"ema-rank{rank}.safetensors" for rank in range(info["ranks"])]
    return lambda name: read_sharded(paths, name, info["parameters"][name])


def master_weights(checkpoint: Path, info: dict) -> Callable[[str], Tensor]:
    """Name → the whole parameter, fp32, from DeepSpeed's masters: files are mapped, not read."""
    ranks = [_master_groups(checkpoint, rank) for rank in range(info["ranks"])]
    # A rank's masters lie one behind the other, each padded to a multiple of the ranks.
    places, end = {}, 0
    for name, shape in info["parameters"].items():
        size = -(-torch.Size(shape).numel() // info["ranks"])
        places[name] = end, end + size
        end += size

    def read(name: str) -> Tensor:
        shape = torch.Size(info["parameters"][name])
        whole = torch.cat([_between(groups, *places[name]) for groups in ranks])
        return whole[: shape.numel()].view(shape)

    return read


def _master_groups(checkpoint: Path, rank: int) -> list[Tensor]:
    files = list(checkpoint.glob(OPTIMIZER_FILE.format(rank=rank)))
    if len(files) != 1:
        raise FileNotFoundError(f"{checkpoint} has no optimizer file of rank {rank}")
    ignored = [(_Ignored, name) for name in DEEPSPEED_CLASSES]
    with torch.serialization.safe_globals(ignored):
        state = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
    return state["optimizer_state_dict"]["fp32_flat_groups"]


def _between(groups: list[Tensor], begin: int, end: int) -> Tensor:
    """Elements begin … end of tensors that follow each other."""
    parts, first = [], 0
    for group in groups:
        last = first + group.numel()
        if first < end and begin < last:
            parts.append(group[max(begin - first, 0) : end - first])
        first = last
    return torch.cat(parts)


def export_pipeline(
    checkpoint: Path, out: Path, *, ema: bool, dtype: torch.dtype = torch.float16
) -> str:
    """Write the pipeline of a checkpoint into the new folder `out`; weights in `dtype`.

    Text encoders and autoencoder come from where the run had them. Returns the line of a report.
    ValueError or FileNotFoundError, and no folder, where something is missing.
    """
    info = read_info(checkpoint)
    settings = Settings.from_dict(info["settings"])
    config = GenTronConfig.from_dict(info["model"])
    read = (averaged_weights if ema else master_weights)(checkpoint, info)
    prefix = "transformer."
    specs = {
        name.removeprefix(prefix): Spec(dtype, tuple(shape))
        for name, shape in info["parameters"].items()
        if name.startswith(prefix)
    }
    with new_folder(out) as folder:
        transformer = folder / "transformer"
        transformer.mkdir()
        write_tensors(transformer / WEIGHTS_NAME, specs, lambda name: read(prefix + name).to(dtype))
        write_json(transformer / CONFIG_NAME, {"_class_name": "GenTron"} | config.to_dict())
        has_text = _export_text(checkpoint, folder, settings, info, read, dtype)
        has_vae = (settings.vae / CONFIG_NAME).is_file()
        write_json(folder / SCHEDULER_PATH, SCHEDULER_CONFIG)
        if has_vae:
            vae = VideoVAE.from_pretrained(settings.vae, dtype)
            vae.save_pretrained(folder / "vae")
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors keeps its files from other users
        if not (has_text and has_vae):
            missing = "autoencoder" if has_text else "text encoders"
            return f"{out}: no whole pipeline, {missing} missing; training takes it as --init"
        size = [side * vae.factor for side in info["latents"][-2:]]
        write_json(folder / INDEX_NAME, model_index(config, settings.frames, size))
    return f"{out}: step {info['step']}, {'averaged' if ema else 'last'} weights"


def _export_text(checkpoint, folder, settings, info, read, dtype) -> bool:
    """The text encoders of a run into a pipeline folder; False where the run had none."""
    if (trained := checkpoint / "text").is_dir():
        pairs = {
            name: tuple(trained / part for part in parts)
            for name, parts in SUBFOLDERS.items()
            if (trained / parts[0]).is_dir()
        }
        encoder = TextEncoder.from_pretrained(**pairs)
        prefix = "text_encoder."
        weights = {
            name.removeprefix(prefix): read(name)
            for name in info["parameters"]
            if name.startswith(prefix)
        }
        # Tied weights have one name here and two in the encoder: not strict.
        surplus = encoder.load_state_dict(weights, strict=False).unexpected_keys
        assert not surplus, surplus
        encoder.to(dtype).save_pretrained(folder)
        return True
    if settings.init is not None and not (settings.clip or settings.t5):
        parts = [part for pair in SUBFOLDERS.values() for part in pair]
        found = {part: settings.init / part for part in parts if (settings.init / part).is_dir()}
        copy_parts(folder, found)
        return bool(found)
    if sources := settings.text_sources():
        TextEncoder.from_pretrained(**sources, dtype=dtype).save_pretrained(folder)
    return bool(sources)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gentron_train.export_pipeline", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="checkpoint or run folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--dtype", choices=EXPORT_DTYPES, default="fp16", help="of the weights")
    options = parser.parse_args(argv)
    try:
        checkpoint = latest_checkpoint(options.checkpoint) or options.checkpoint
        print(
            export_pipeline(checkpoint, options.out, ema=options.ema, dtype=DTYPES[options.dtype])
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
