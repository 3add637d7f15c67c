"""PixArt-α and DiT checkpoints in, PixArt-α out: python -m gentron_fast.convert pixart PATH OUT."""

import argparse
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gentron_fast.commandline import refuse, run, whole_number
from gentron_fast.config import GenTronConfig, SamplingDefaults
from gentron_fast.convert.layouts import (
    CLASSES,
    DIT,
    LEFT_OUT,
    PIXART,
    Recipe,
    Source,
    check_exportable,
    check_positions,
    check_tensors,
    dit_config,
    dit_embedders,
    make_recipes,
    pixart_config,
    pixart_json,
    tensor_shape,
    wanted_of,
)
from gentron_fast.convert.tensors import (
    Checkpoint,
    Spec,
    copy_weights,
    open_safetensors,
    open_torch,
    open_weights,
    without_prefix,
    write_tensors,
)
from gentron_fast.diffusion import SCHEDULER_CONFIG, SCHEDULER_SCHEMA, NoiseSchedule
from gentron_fast.files import read_json, whole_folder, write_json
from gentron_fast.index import INDEX_NAME
from gentron_fast.model import CONFIG_NAME, WEIGHTS_NAME
from gentron_fast.parts import read_part_config
from gentron_fast.pipeline import SCHEDULER_PATH, model_index
from gentron_fast.schema import TEXT
from gentron_fast.text import (
    LOWER_AND_STRIP,
    SUBFOLDERS,
    TOKENIZER_CONFIG,
    read_encoder_config,
    read_tokenizer_config,
    write_tokenizer_config,
)
from gentron_fast.vae import VAE_SCHEMA
from gentron_fast.weights import SAFETENSORS

NAME = "gentron_fast.convert"
PIXART_DEFAULTS = SamplingDefaults(lambda_t=4.5)  # diffusers' PixArtAlphaPipeline
HELP = f"""\
usage: python -m {NAME} pixart PATH OUT [options]
       python -m {NAME} dit PATH OUT [options]
       python -m {NAME} export-diffusers PATH OUT

pixart            PixArt-α to GenTron: the same function, to sample from and to train on
dit               DiT to GenTron: an initialisation, equal to DiT without a class
export-diffusers  a GenTron of PixArt's kind to PixArtTransformer2DModel

PATH              a folder in the diffusers layout, pipeline or transformer (.safetensors or
                  .bin, sharded or not), or a file in the original layout (.pth, .pt or
                  .safetensors); for export-diffusers a GenTron folder
OUT               the folder to write; it must not be there yet
--t5 FOLDER       T5 with its tokenizer, where PATH has none, or in place of PATH's
--clip FOLDER     dit: CLIP with its tokenizer; without --t5 and --clip the model takes both
--vae FOLDER      AutoencoderKL, where PATH has none, or in place of PATH's
--size N          original layout: the side in pixels of the images it was trained on
--heads N         original layout: attention heads, where the width does not tell
--no-ema          original layout: the last weights, where the file has averaged ones too
--seed N          dit: seed of what starts fresh (0)
--verbose         a traceback where something fails
"""

STEMS = {"vae": ("diffusion_pytorch_model",), "text": ("model", "pytorch_model")}
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
)
PIXART_PARTS = {"text_encoder_2": "text_encoder", "tokenizer_2": "tokenizer", "vae": "vae"}
# Tokens to which the pipelines of PixArt-α and, by its class, PixArt-Σ cut a prompt.
CAPTION_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
# A block's adaLN bias is the sum of PixArt's shared bias and the block's table. The two are kept
# beside the model, for the way back.
TABLES_STEM = "pixart_tables"
PIXELS_PER_LATENT = 8  # Stable Diffusion's autoencoder, where no other is at hand


def convert_pixart(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    t5: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    size: int | None = None,
    heads: int | None = None,
    ema: bool = True,
) -> list[str]:
    """Write PixArt-α (arXiv 2310.00426) as a GenTron pipeline folder: the same function.

    path: a diffusers folder or a file in the original layout; t5, vae: folders to take in place of
    the pipeline's own; size (side in pixels) and heads: what an original file does not tell; ema:
    of such a file the averaged weights, where it has them beside others.
    Returns the lines of a report. Raises ValueError or OSError in one line, and leaves no folder.
    """
    source = open_source(Path(path), ema)
    parts = find_parts(source, PIXART_PARTS, {"t5": t5}, vae)
    config = pixart_config(source, vae_factor(parts), size, heads)
    recipes = make_recipes(config, PIXART, source.layout)
    tables = {recipe.added: (6, config.width) for recipe in recipes.values() if recipe.added}
    check_tensors(source.checkpoint, wanted_of(recipes) | tables)
    if source.config is None and not config.size_embedding:
        check_positions(source.checkpoint, config)
    check_parts(parts, config)
    scheduler = find_scheduler(source.root)
    tokenizing = {"model_max_length": caption_tokens(source), LOWER_AND_STRIP: True}
    with whole_folder(Path(out)) as folder:
        # The parts first: of the model a file of torch.save stays mapped where it was read.
        state = write_pipeline(folder, config, parts, scheduler, tokenizing, PIXART_DEFAULTS)
        write_model(folder / "transformer", config, recipes, source.checkpoint)
        keep_tables(folder / "transformer", config, recipes, source.checkpoint)
    left_out = ", ".join(sorted(LEFT_OUT & source.checkpoint.specs.keys()))
    return [
        f"wrote        {out}: {config.depth} blocks of width {config.width}",
        *source.checkpoint.notes,
        *group("converted", recipes),
        *([f"left out     {left_out}"] if left_out else []),
        state,
    ]


def convert_dit(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    t5: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    size: int | None = None,
    heads: int | None = None,
    ema: bool = True,
    seed: int = 0,
) -> list[str]:
    """Write a GenTron that starts as DiT (arXiv 2212.09748) without a class, whatever the text.

    path, vae, size, heads, ema, errors: as for `convert_pixart`; t5, clip: the encoders the model
    is made for, both in their usual widths when neither is given. Cross-attention and pooled text,
    which DiT lacks, start fresh from the seed with an output of zero. Returns a report's lines.
    """
    source = open_source(Path(path), ema)
    parts = find_parts(source, {"vae": "vae"}, {"clip": clip, "t5": t5}, vae)
    widths = {
        name: text_width(parts[model]) for name, (model, _) in SUBFOLDERS.items() if model in parts
    }
    config = dit_config(source, widths, vae_factor(parts), size, heads)
    recipes = make_recipes(config, DIT, source.layout)
    embedders, copies = dit_embedders(source, config, recipes)
    check_tensors(source.checkpoint, wanted_of(recipes) | embedders)
    for copy, name in copies.items():
        if not torch.equal(source.checkpoint.read(copy), source.checkpoint.read(name)):
            raise ValueError(f"tensor {copy} in {path} differs from {name}, of which it is a copy")
    if source.config is None:
        check_positions(source.checkpoint, config)
    check_parts(parts, config)
    scheduler = find_scheduler(source.root)
    with whole_folder(Path(out)) as folder:
        state = write_pipeline(folder, config, parts, scheduler, {}, SamplingDefaults())
        write_model(folder / "transformer", config, recipes, source.checkpoint, seed)
    null = embedders[CLASSES[source.layout]][0] - 1
    return [
        f"wrote        {out}: {config.depth} blocks of width {config.width}",
        *source.checkpoint.notes,
        *group("copied", {key: recipe for key, recipe in recipes.items() if recipe.sources}),
        *group("fresh", {key: recipe for key, recipe in recipes.items() if not recipe.sources}),
        f"folded       class {null}, the null class, into the bias of time_embed.mlp.2",
        f"left out     classes 0 to {null - 1}",
        state,
    ]


def export_diffusers(path: str | os.PathLike, out: str | os.PathLike) -> list[str]:
    """Write a GenTron as PixArtTransformer2DModel: a pipeline folder becomes a PixArtAlphaPipeline.

    What `convert_pixart` made gives PixArt's tensors back as they were. Returns a report's lines.
    ValueError says what stands in the way, where PixArt has no place for something.
    """
    path = Path(path)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    name = read_json(folder / CONFIG_NAME).get("_class_name")
    if name != "GenTron":
        raise ValueError(f"{folder} holds a {name}, wanted a GenTron")
    config = GenTronConfig.read(folder / CONFIG_NAME)
    check_exportable(config, path)
    checkpoint = open_weights(folder, WEIGHTS_NAME.removesuffix(".safetensors"))
    recipes = make_recipes(config, PIXART, 0)
    check_tensors(checkpoint, {key: recipe.shape for key, recipe in recipes.items()})
    check_shared_adaln(checkpoint, config)
    specs, read = split_tensors(checkpoint, config, recipes)
    parts = {theirs: path / ours for ours, theirs in PIXART_PARTS.items() if (path / ours).is_dir()}
    scheduler = find_scheduler(path)
    index = pixart_index(parts, scheduler) if len(parts) == len(PIXART_PARTS) else None
    with whole_folder(Path(out)) as aside:
        target = aside / folder.relative_to(path)
        target.mkdir(exist_ok=True)
        write_tensors(target / WEIGHTS_NAME, specs, read)
        write_json(target / CONFIG_NAME, pixart_json(config))
        state = "transformer  no pipeline: text encoder, tokenizer or VAE is not there"
        copy_parts(aside, parts)
        if index is not None:
            write_json(aside / SCHEDULER_PATH, scheduler)
            write_json(aside / INDEX_NAME, index)
            state = "pipeline     for PixArtAlphaPipeline.from_pretrained"
    return [f"wrote        {out}: PixArtTransformer2DModel, {config.depth} blocks", state]


def open_source(path: Path, ema: bool = True) -> Source:
    """The model in a folder or a file, of whose averaged weights `ema` takes those.

    FileNotFoundError or ValueError where there is none.
    """
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        config = read_json(folder / CONFIG_NAME)
        if config.get("_class_name") == "GenTron":
            raise ValueError(f"{folder} is a GenTron already")
        checkpoint = open_weights(folder, *STEMS["vae"])
        return Source(checkpoint, config, path if folder != path else None)
    if not path.is_file():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.suffix == SAFETENSORS:
        checkpoint = open_safetensors(path, [path])
    else:
        checkpoint = open_torch(path, [path], ema)
    checkpoint = without_prefix(checkpoint)
    if "pos_embed.proj.weight" in checkpoint.specs:
        raise ValueError(f"{path} is in the diffusers layout: give its folder, with {CONFIG_NAME}")
    return Source(checkpoint, None, None)


def initial(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """What DiT lacks: initialised as GenTron does, the last layer before the sum at zero."""
    tensor = torch.zeros(shape)
    if key.endswith(".weight") and not re.search(r"cross_attention\.out|pooled_embed\.\w+\.2", key):
        nn.init.xavier_uniform_(tensor, generator=generator)
    return tensor


def write_model(
    folder: Path,
    config: GenTronConfig,
    recipes: dict[str, Recipe],
    checkpoint: Checkpoint,
    seed: int = 0,
) -> None:
    """The folder of the transformer, tensor by tensor."""
    generator = torch.Generator().manual_seed(seed)
    fresh = recipes["patch_embed.weight"].dtype(checkpoint.specs)
    specs = {
        key: Spec(recipe.dtype(checkpoint.specs) if recipe.sources else fresh, recipe.shape)
        for key, recipe in recipes.items()
    }

    def make(key: str) -> Tensor:
        if recipes[key].sources:
            return recipes[key].make(checkpoint)
        return initial(key, recipes[key].shape, generator).to(fresh)

    folder.mkdir()
    write_tensors(folder / WEIGHTS_NAME, specs, make)
    write_json(folder / CONFIG_NAME, {"_class_name": "GenTron"} | config.to_dict())


def keep_tables(
    folder: Path, config: GenTronConfig, recipes: dict[str, Recipe], checkpoint: Checkpoint
) -> None:
    """The shared adaLN's bias and the blocks' tables, under diffusers' names."""
    theirs = make_recipes(config, PIXART, 0)
    where = {}
    for key, recipe in recipes.items():
        if recipe.added:
            where |= zip(theirs[key].sources, recipe.sources, strict=True)
            where[theirs[key].added] = recipe.added
    specs = {name: checkpoint.specs[source] for name, source in where.items()}
    write_tensors(
        folder / f"{TABLES_STEM}.safetensors", specs, lambda name: checkpoint.read(where[name])
    )


def split_tensors(
    checkpoint: Checkpoint, config: GenTronConfig, recipes: dict[str, Recipe]
) -> tuple[dict[str, Spec], Callable[[str], Tensor]]:
    """The specs and a reader of PixArt's tensors, in diffusers' names, from those of a GenTron."""
    pieces = {
        name: (key, index, shape)
        for key, recipe in recipes.items()
        for index, (name, shape) in enumerate(recipe.sources.items())
    }
    tables = read_tables(checkpoint, config, recipes)
    specs = {
        name: Spec(checkpoint.specs[key].dtype, shape) for name, (key, _, shape) in pieces.items()
    }
    specs |= {name: Spec(table.dtype, tuple(table.shape)) for name, table in tables.items()}

    def read(name: str) -> Tensor:
        if name in tables:
            return tables[name]
        key, index, shape = pieces[name]
        return checkpoint.read(key).chunk(len(recipes[key].sources))[index].reshape(shape)

    return specs, read


def read_tables(
    checkpoint: Checkpoint, config: GenTronConfig, recipes: dict[str, Recipe]
) -> dict[str, Tensor]:
    """The shared adaLN's bias and the blocks' tables: those that were kept, where their sums are
    the model's still; else a bias of zero, and the blocks' own biases as their tables."""
    sums = {key: recipe for key, recipe in recipes.items() if recipe.added}
    tables = {recipe.added: (6, config.width) for recipe in sums.values()}
    (bias,) = wanted_of(sums)
    if (checkpoint.path / f"{TABLES_STEM}.safetensors").is_file():
        kept = open_weights(checkpoint.path, TABLES_STEM)
        check_tensors(kept, wanted_of(sums) | tables)
        if all(
            torch.equal(recipe.make(kept).to(checkpoint.specs[key].dtype), checkpoint.read(key))
            for key, recipe in sums.items()
        ):
            return {name: kept.read(name) for name in kept.specs}
    own = {
        recipe.added: checkpoint.read(key).reshape(tables[recipe.added])
        for key, recipe in sums.items()
    }
    return own | {bias: torch.zeros_like(next(iter(own.values()))).flatten()}


def check_shared_adaln(checkpoint: Checkpoint, config: GenTronConfig) -> None:
    """Raise ValueError unless all blocks have one adaLN weight, as PixArt's."""
    first = "blocks.0.adaln.weight"
    for block in range(1, config.depth):
        name = f"blocks.{block}.adaln.weight"
        if not torch.equal(checkpoint.read(name), checkpoint.read(first)):
            raise ValueError(
                f"{checkpoint.path} cannot be a PixArt, whose blocks share one adaLN weight: "
                f"{name} differs from {first}, as after training"
            )


def find_parts(source: Source, carried: dict, encoders: dict, vae) -> dict[str, Path]:
    """Our subfolder → where its content is: a folder the user names, else the pipeline's own.

    carried: our subfolder → the pipeline's; encoders: "clip" or "t5" → a folder or None.
    """
    named = {sub: folder for name, folder in encoders.items() for sub in SUBFOLDERS[name]}
    named = {sub: Path(folder) for sub, folder in (named | {"vae": vae}).items() if folder}
    for folder in named.values():
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
    if source.root is None:
        return named
    own = {ours: source.root / theirs for ours, theirs in carried.items()}
    return {sub: folder for sub, folder in own.items() if folder.is_dir()} | named


def find_scheduler(root: Path | None) -> dict:
    """The scheduler's configuration of a pipeline, else ours. ValueError where we cannot use it."""
    path = None if root is None else root / SCHEDULER_PATH
    if path is None or not path.is_file():
        return SCHEDULER_CONFIG
    scheduler = read_json(path, SCHEDULER_SCHEMA)
    NoiseSchedule.from_config(scheduler)
    return scheduler


def check_parts(parts: dict[str, Path], config: GenTronConfig) -> None:
    """Raise ValueError or FileNotFoundError where a part lacks files or does not fit the model."""
    for name, folder in parts.items():
        if not name.startswith("tokenizer"):
            open_weights(folder, *stems(name))
        elif not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise FileNotFoundError(f"no tokenizer in {folder}: wanted {TOKENIZER_FILES[0]}")
        else:
            tokenizer_config(folder)
    for encoder in config.encoders:
        model, tokenizer = SUBFOLDERS[encoder]
        if model not in parts:
            continue
        if tokenizer not in parts:
            raise FileNotFoundError(f"no tokenizer beside {parts[model]}")
        wanted, width = config.text_width(encoder), text_width(parts[model])
        if width != wanted:
            raise ValueError(
                f"the {encoder} text encoder in {parts[model]} is {width} wide, "
                f"the transformer takes {wanted}"
            )
    if "vae" in parts:
        channels = vae_config(parts["vae"]).get("latent_channels")
        if channels != config.in_channels:
            raise ValueError(
                f"the VAE in {parts['vae']} makes {channels} latent channels, "
                f"the transformer takes {config.in_channels}"
            )


def stems(part: str) -> tuple[str, ...]:
    """What the files of a part's weights are called, without ending."""
    return STEMS["vae" if part == "vae" else "text"]


def text_width(folder: Path) -> int:
    """Width of a text encoder's tokens, by its config.json; a whole CLIP's has a text_config."""
    config = read_encoder_config(folder)
    config = config.get("text_config", config)
    width = config.get("d_model", config.get("hidden_size"))
    if width is None:
        raise ValueError(f"{folder / CONFIG_NAME} is of no text encoder: it has no width")
    return width


def vae_factor(parts: dict[str, Path]) -> int:
    """Pixels per latent along each side."""
    if "vae" not in parts:
        return PIXELS_PER_LATENT
    channels = vae_config(parts["vae"]).get("block_out_channels")
    if channels is None:
        raise ValueError(
            f"{parts['vae'] / CONFIG_NAME} is of no autoencoder: no block_out_channels"
        )
    return 2 ** (len(channels) - 1)


def vae_config(folder: Path) -> dict:
    """An autoencoder's configuration."""
    return read_part_config(folder / CONFIG_NAME, VAE_SCHEMA)


def copy_parts(folder: Path, parts: dict[str, Path]) -> None:
    """The parts' files into subfolders."""
    for name, source in parts.items():
        target = folder / name
        target.mkdir()
        if name.startswith("tokenizer"):
            for file in TOKENIZER_FILES:
                if (source / file).is_file():
                    shutil.copyfile(source / file, target / file)
        else:
            shutil.copyfile(source / CONFIG_NAME, target / CONFIG_NAME)
            copy_weights(source, target, *stems(name))


def caption_tokens(source: Source) -> int:
    """Tokens to which prompts of a PixArt are cut: an original's null caption is as long."""
    if "y_embedder.y_embedding" in source.checkpoint.specs:
        return tensor_shape(source, "y_embedder.y_embedding", 2)[0]
    path = None if source.root is None else source.root / INDEX_NAME
    known = path is not None and path.is_file()
    index = read_json(path, {"_class_name": TEXT}) if known else {}
    return CAPTION_TOKENS.get(index.get("_class_name"), CAPTION_TOKENS["PixArtAlphaPipeline"])


def tokenizer_config(folder: Path) -> dict:
    """A tokenizer's configuration; what does not tell its class is a T5Tokenizer."""
    return {"tokenizer_class": "T5Tokenizer"} | read_tokenizer_config(folder)


def write_pipeline(
    folder: Path,
    config: GenTronConfig,
    parts: dict[str, Path],
    scheduler: dict,
    tokenizing: dict,
    defaults: SamplingDefaults,
) -> str:
    """What stands beside the transformer, and model_index.json where nothing is missing.

    tokenizing: fields for the configuration of T5's tokenizer; defaults: of the pipeline's calls.
    Returns the line of the report.
    """
    copy_parts(folder, parts)
    tokenizer = SUBFOLDERS["t5"][1]
    if tokenizer in parts:
        fields = tokenizer_config(parts[tokenizer]) | tokenizing
        write_tokenizer_config(folder / tokenizer / TOKENIZER_CONFIG, fields)
    write_json(folder / SCHEDULER_PATH, scheduler)
    needed = [SUBFOLDERS[name][0] for name in config.encoders] + ["vae"]
    missing = [name for name in needed if name not in parts]
    if missing:
        return (
            f"transformer  no pipeline: {', '.join(missing)} missing; training takes it as --init"
        )
    side = config.position_base_size * config.patch_size * config.pixels_per_latent
    write_json(folder / INDEX_NAME, model_index(config, 1, (side, side), defaults))
    return f"pipeline     with {', '.join(needed)}; {side} x {side} pixels"


def pixart_index(parts: dict[str, Path], scheduler: dict) -> dict:
    """The model_index.json of a PixArtAlphaPipeline."""
    return {
        "_class_name": "PixArtAlphaPipeline",
        "scheduler": ["diffusers", scheduler.get("_class_name", SCHEDULER_CONFIG["_class_name"])],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", tokenizer_config(parts["tokenizer"])["tokenizer_class"]],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def group(word: str, recipes: dict[str, Recipe]) -> list[str]:
    """A report's lines of modules and their parameters, the blocks together."""
    counts = {}
    for key, recipe in recipes.items():
        module = re.sub(r"^blocks\.\d+\.", "blocks.*.", key)
        module = ".".join(module.split(".")[: 3 if "*" in module else 1])
        counts[module] = counts.get(module, 0) + math.prod(recipe.shape)
    return [f"{word:<12} {name:<26} {count:>13,}" for name, count in counts.items()]


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 after wrong input (told in one line), 130 after SIGINT."""
    argv = sys.argv[1:] if argv is None else argv
    interrupted = "interrupted; nothing was written"
    return run(NAME, lambda: print("\n".join(convert(parse_arguments(argv)))), argv, interrupted)


def convert(args: argparse.Namespace) -> list[str]:
    """Do what the arguments ask for; the lines of the report. Raises ValueError or OSError."""
    if args.command == "export-diffusers":
        return export_diffusers(args.path, args.out)
    options = {name: getattr(args, name) for name in ("t5", "vae", "size", "heads", "ema")}
    if args.command == "pixart":
        return convert_pixart(args.path, args.out, **options)
    return convert_dit(args.path, args.out, **options, clip=args.clip, seed=args.seed)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises ValueError where argparse would print its usage and exit."""
    parser = argparse.ArgumentParser(prog=NAME, allow_abbrev=False)
    parser.format_help, parser.error = lambda: HELP, refuse
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in ("pixart", "dit", "export-diffusers"):
        options = commands.add_parser(command, allow_abbrev=False)
        options.format_help, options.error = lambda: HELP, refuse
        options.add_argument("path", type=Path, metavar="PATH")
        options.add_argument("out", type=Path, metavar="OUT")
        options.add_argument("--verbose", action="store_true")
        if command == "export-diffusers":
            continue
        options.add_argument("--t5", type=Path)
        options.add_argument("--vae", type=Path)
        options.add_argument("--size", type=whole_number(1))
        options.add_argument("--heads", type=whole_number(1))
        options.add_argument("--no-ema", action="store_false", dest="ema")
        if command == "dit":
            options.add_argument("--clip", type=Path)
            options.add_argument("--seed", type=whole_number(0, 2**64 - 1), default=0)
    return parser.parse_args(argv)
