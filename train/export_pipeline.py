"""A pipeline folder from a training checkpoint, tensor by tensor, without a GPU.

    python -m gentron_train.export_pipeline CKPT OUT [--ema] [--dtype fp16]

CKPT is a checkpoint, or a run folder, whose last one is taken; --ema exports the averaged weights.
Optimizer state is not read, and no more than one tensor of the transformer is in memory at a time.
"""

import argparse
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from gentron_fast.commandline import check_writable, refuse, run
from gentron_fast.config import GenTronConfig
from gentron_fast.convert.pipelines import copy_parts, vae_factor
from gentron_fast.convert.tensors import Spec, write_tensors
from gentron_fast.files import check_output_folder, read_json, whole_folder, write_json
from gentron_fast.index import INDEX_NAME
from gentron_fast.model import CONFIG_NAME, WEIGHTS_NAME
from gentron_fast.pipeline import SCHEDULER_PATH, model_index, stored_encoders
from gentron_fast.text import MODEL_CLASSES, SUBFOLDERS, TextEncoder
from gentron_train.checkpoint import (
    FILES,
    INFO_NAME,
    check_digests,
    checkpoint_names,
    newest_whole,
    read_info,
    read_sharded,
)
from gentron_train.data.options import DTYPES
from gentron_train.settings import Settings
from gentron_train.teacher import exported_defaults, exported_scheduler, learnt_guidance

NAME = "gentron_train.export_pipeline"
OPTIMIZER_FILE = "*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


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

    Text encoders and autoencoder come from where the run had them, the autoencoder as it is, for
    latents that were computed with it. Without them, or the packages that load them, the
    transformer is written only. Returns the line of a report. ValueError or FileNotFoundError, and
    no folder, where a file of the checkpoint that is read is missing or damaged.
    """
    return _export(checkpoint, read_whole(checkpoint, ema), out, ema, dtype)


def read_whole(checkpoint: Path, ema: bool) -> dict:
    """checkpoint.json; OSError or ValueError where it, or what an export reads, is damaged."""
    info = read_info(checkpoint)
    wanted = "ema-rank*" if ema else OPTIMIZER_FILE.format(rank="*")
    files = {
        name: digest
        for name, digest in info[FILES].items()
        if fnmatch(name, wanted) or name.startswith("text/")
    }
    check_digests(checkpoint, files)
    try:
        Settings.from_dict(info["settings"])
    except ValueError as error:
        raise ValueError(f"settings of {checkpoint / INFO_NAME}: {error}") from None
    return info


def _export(checkpoint: Path, info: dict, out: Path, ema: bool, dtype: torch.dtype) -> str:
    settings = Settings.from_dict(info["settings"])
    config = GenTronConfig.from_dict(info["model"])
    read = (averaged_weights if ema else master_weights)(checkpoint, info)
    prefix = "transformer."
    specs = {
        name.removeprefix(prefix): Spec(dtype, tuple(shape))
        for name, shape in info["parameters"].items()
        if name.startswith(prefix)
    }
    with whole_folder(out) as folder:
        transformer = folder / "transformer"
        transformer.mkdir()
        write_tensors(transformer / WEIGHTS_NAME, specs, lambda name: read(prefix + name).to(dtype))
        write_json(transformer / CONFIG_NAME, {"_class_name": "GenTron"} | config.to_dict())
        write_json(folder / SCHEDULER_PATH, exported_scheduler(settings))
        vae, missing = {"vae": settings.vae}, []
        if (settings.vae / CONFIG_NAME).is_file():
            copy_parts(folder, vae)
        else:
            missing.append(f"no autoencoder in {settings.vae}")
        try:
            if (checkpoint / "text").is_dir():
                _export_trained_text(checkpoint / "text", folder, info, read, dtype)
            else:
                _export_text(folder, settings, config.encoders, dtype)
        except (FileNotFoundError, ImportError) as error:
            missing.append(str(error))
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors keeps its files from other users
        if missing:
            reasons = "; ".join(missing)
            return f"{out}: no whole pipeline, {reasons}; training takes it as --init"
        size = [side * vae_factor(vae) for side in info["latents"][-2:]]
        own = exported_defaults(settings), learnt_guidance(settings)
        write_json(folder / INDEX_NAME, model_index(config, settings.frames, size, *own))
    return f"{out}: step {info['step']}, {'averaged' if ema else 'last'} weights"


def _export_trained_text(trained: Path, folder: Path, info: dict, read, dtype) -> None:
    """Text encoders that trained, of whose weights `trained` has none, into a pipeline folder."""
    encoder = TextEncoder.from_pretrained(**stored_encoders(trained))
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


def _export_text(folder: Path, settings: Settings, encoders: tuple[str, ...], dtype) -> None:
    """The frozen text encoders of a run into a pipeline folder: copied where they come from --init
    or are stored in `dtype`. FileNotFoundError where one is missing."""
    sources = settings.text_sources(encoders)
    for name in encoders:
        if name not in sources:
            raise FileNotFoundError(f"no {name} text encoder named")
        model, tokenizer = sources[name]
        if Path(model).parent == settings.init or _is_stored_as(Path(model), name, dtype):
            parts = map(Path, (model, tokenizer))
            copy_parts(folder, dict(zip(SUBFOLDERS[name], parts, strict=True)))
        else:
            TextEncoder.from_pretrained(**{name: sources[name]}, dtype=dtype).save_pretrained(
                folder
            )


def _is_stored_as(folder: Path, name: str, dtype: torch.dtype) -> bool:
    """Whether a local folder holds the encoder "clip" or "t5", no more than it, in this dtype."""
    if not (folder / CONFIG_NAME).is_file():
        return False
    config = read_json(folder / CONFIG_NAME)
    stored = config.get("dtype", config.get("torch_dtype"))
    names = str(dtype).removeprefix("torch."), [MODEL_CLASSES[name]]
    return (stored, config.get("architectures")) == names


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, which is told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    interrupted = "stopped; nothing was written"
    return run(NAME, lambda: _command(argv), argv, interrupted, wrong=[SafetensorError])


def _command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__.partition("\n")[0])
    parser.error = refuse
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="checkpoint or run folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16", help="of the weights")
    options = parser.parse_args(argv)
    check_output_folder(options.out)
    check_writable([options.out / INDEX_NAME])
    checkpoint, read, line = options.checkpoint, partial(read_whole, ema=options.ema), None
    names, wrong = checkpoint_names(checkpoint)
    if names:
        checkpoint, info, line = newest_whole(checkpoint, names, wrong, read)
    else:
        info = read(checkpoint)
    if line is not None:
        print(line)
    print(_export(checkpoint, info, options.out, options.ema, DTYPES[options.dtype]))


if __name__ == "__main__":
    sys.exit(main())
