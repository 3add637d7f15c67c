"""A training run's settings: a configuration file, and over it the command line."""

import argparse
import dataclasses
import re
import reprlib
import sys
import types
import typing
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from gentron_fast.commandline import refuse
from gentron_fast.config import PRESETS, GenTronConfig
from gentron_fast.index import ASSETS
from gentron_fast.model import CONFIG_NAME
from gentron_fast.pipeline import shared_folder, stored_encoders
from gentron_fast.text import SUBFOLDERS
from gentron_train.data.loader import DataSettings
from gentron_train.data.options import (
    DTYPES,
    DataOptions,
    check_choices,
    check_least,
    check_positive,
    check_share,
    flag,
    option,
    parse_sizes,
)
from gentron_train.entry import is_main
from gentron_train.small_world.renderer import INDEX_NAME as SHARDS_INDEX

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_CONFIG = CONFIGS / "small.yaml"
STAGES = ("t2i", "t2v", "distill")
LARGEST = 1000  # guidance, or steps of a trajectory
MOST_SECONDS = 10**7  # of a timeout: process groups hold it as nanoseconds
CHECKPOINTING = ("none", "attention", "full")
# Former names of settings, which files, command lines and checkpoints still hold.
RENAMED = {
    "clip_norm": "max_grad_norm",
    "decay_last": "decay_ratio",
    "ema": "ema_decay",
    "keep": "save_total_limit",
    "narrow_first": "timestep_range_portion",
    "starts": "windows_per_clip",
    "weight_cap": "max_loss_weight",
}
SIZE_FIELDS = ("depth", "width", "heads", "patch_size")  # what the name of a preset stands for


# ruff: noqa: RUF009 (each default is a dataclasses.field)
@dataclass(frozen=True)
class Settings(DataOptions):
    """A training run. Each field is a command-line option, and a field of a configuration file.

    Raises ValueError, naming the option, for a value out of range or for two that do not fit.
    """

    run: Path = option(Path("runs/t2i"), "folder of this run")
    init: Path | None = option(None, "pipeline to start from; its parts count over a file's")
    fresh_temporal: bool = option(False, "T2V takes --init's shared layers, no temporal one")
    preset: str = option("small", "model size", choices=[n for n in PRESETS if "T2V" not in n])
    model: str | None = option(
        None, "the preset's fields otherwise: depth=4 heads=4 encoders=clip …", nargs="+"
    )
    vae: Path = option(Path("runs/vae"), "autoencoder folder; the small one is trained if missing")
    clip: str | None = option(None, "pretrained CLIP, frozen: folder or hub name")
    t5: str | None = option(None, "pretrained T5, frozen: folder or hub name")
    text: Path | None = option(None, "the small text encoders' folder; they are trained if missing")
    train_text: bool = option(True, "train the small text encoders on, in T2I")
    shipped_parts: bool = option(
        False,
        "of the small model, where a file's init, vae and text are not there: those that ship",
    )

    teacher: Path | None = option(None, "distillation: pipeline whose guided noise is learnt")
    teacher_rescale: float | None = option(None, "guidance rescale in it; else the teacher's own")
    min_lambda_t: float = option(1.0, "smallest text guidance that is learnt")
    max_lambda_t: float = option(6.0, "largest text guidance that is learnt")
    min_lambda_m: float = option(1.0, "smallest motion guidance that is learnt")
    max_lambda_m: float = option(1.3, "largest motion guidance that is learnt")
    p_trajectory: float = option(
        0.5, "share of latents along the teacher's own sampling; the rest is noised data"
    )
    min_trajectory_steps: int = option(10, "fewest steps of such a sampling")
    max_trajectory_steps: int = option(50, "most steps of such a sampling")

    data: Path = option(Path("data/shapes"), "folder of shards images-*.tar, clips-*.tar")
    images: str | None = option(None, "shards of images: glob, or URLs as WebDataset reads them")
    clips: str | None = option(None, "shards of clips, likewise")
    make_images: int = option(20000, "images of the small world if the folder has no shards")
    make_clips: int = option(6000, "clips of the small world if the folder has no shards")
    size: str | None = option(None, "pixels, 256 or HxW; without, as the data is, all of one size")
    buckets: str | None = option(None, "sizes HxW, HxW … instead: the nearest in aspect ratio")
    timestep_range_portion: float = option(
        1.0, "first portion of the run with timesteps in that range; then all are drawn"
    )
    max_loss_weight: float = option(
        1.0, "cap on a timestep's loss weight 1 / ᾱ, that of the v loss; 1: the plain ε loss"
    )
    min_snr_gamma: float | None = option(
        None, "weight min(SNR, γ) / SNR in its place (min-SNR, arXiv 2303.09556: 5)"
    )

    steps: int = option(500_000, "optimizer steps")
    minutes: float | None = option(None, "stop, with checkpoint and export, after this time")
    global_batch: int | None = option(None, "samples a step over all ranks; sets the accumulation")
    accumulation: int | None = option(None, "micro-steps a step (1 without --global-batch)")
    lr: float = option(1e-4, "AdamW learning rate")
    warmup: int = option(0, "steps of linear warm-up")
    decay_ratio: float = option(0.0, "last share of the run, in which the rate falls linearly to 0")
    max_grad_norm: float = option(1.0, "largest gradient norm")
    ema_decay: float = option(0.9999, "decay of the weights' moving average")
    dtype: str = option("bf16", "what is computed in", choices=["fp32", "bf16"])
    parameters: str = option(
        "bf16",
        "what ranks exchange; fp32 with --dtype bf16 is autocast; masters are fp32 always",
        choices=["fp32", "bf16"],
    )
    checkpoint_activations: str = option(
        "none",
        "what the backward pass recomputes: nothing, blocks but their attention, whole blocks",
        choices=list(CHECKPOINTING),
    )

    log_every: int = option(20, "steps between log lines")
    tensorboard: bool = option(True, "write TensorBoard files, where it is installed")
    wandb: bool = option(False, "write a Weights & Biases run, offline")
    sample_every: int = option(0, "steps between sample pictures; 0: none")
    prompts: Path | None = option(None, "prompts of the samples, one a line")
    save_every: int = option(500, "steps between checkpoints")
    save_total_limit: int = option(2, "checkpoints to keep")
    export_every: int = option(0, "steps between exports; 0: at the end only")
    export_dtype: str = option("fp16", "weights of the exported pipeline", choices=list(DTYPES))
    resume: bool = option(False, "go on from the last checkpoint of this run")
    timeout: float = option(40.0, "seconds that a rank waits for another before the run ends")
    dry_run: bool = option(False, "print the batch and the memory of 1, 8 and 64 GPUs, and end")
    gpu_memory: float | None = option(None, "GiB of a GPU, for --dry-run; else this machine's")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, 1, "steps", "log_every", "save_every", "save_total_limit")
        check_least(self, 1, "global_batch", "accumulation", "min_trajectory_steps")
        check_least(self, 0, "warmup", "sample_every", "export_every", "make_images", "make_clips")
        for name in ("size", "buckets"):
            if getattr(self, name) is not None:
                parse_sizes(flag(name), getattr(self, name))
        check_share(self, "decay_ratio", "timestep_range_portion", "p_trajectory")
        if self.teacher_rescale is not None:
            check_share(self, "teacher_rescale")
        for name in ("lambda_t", "lambda_m", "trajectory_steps"):
            low, high = (f"{end}_{name}" for end in ("min", "max"))
            if not -LARGEST <= getattr(self, low) <= getattr(self, high) <= LARGEST:
                raise ValueError(
                    f"{flag(low)} {getattr(self, low)} and {flag(high)} {getattr(self, high)} must "
                    f"be a range within ±{LARGEST}"
                )
        positive = "lr", "timeout", "max_grad_norm", "minutes", "gpu_memory", "min_snr_gamma"
        check_positive(self, *positive)
        if self.timeout > MOST_SECONDS:
            raise ValueError(f"--timeout is {self.timeout}, must be at most {MOST_SECONDS}")
        if not self.max_loss_weight >= 1:
            raise ValueError(f"--max-loss-weight is {self.max_loss_weight}, must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema-decay is {self.ema_decay}, must be at least 0 and below 1")
        if self.dtype == "fp32" and self.parameters != "fp32":
            raise ValueError("--dtype fp32 needs --parameters fp32")
        choices = [i.name for i in dataclasses.fields(self) if "choices" in i.metadata]
        check_choices(self, *choices)
        self.fresh_model()

    def fresh_model(self) -> GenTronConfig:
        """The preset with the fields of --model, for images. ValueError for one that is none."""
        fields = {} if self.model is None else parse_fields(self.model)
        try:
            return replace(PRESETS[self.preset], **fields)
        except ValueError as error:
            raise ValueError(f"--model {self.model}: {error}") from None

    def on(self, ranks: int) -> "Settings":
        """The same with the accumulation that makes the global batch on so many ranks.

        ValueError where micro-batch × draws × ranks does not divide it, or --accumulation says
        something else.
        """
        if self.global_batch is None:
            return replace(self, accumulation=self.accumulation or 1)
        once = self.batch * self.draws * ranks
        micro_steps, rest = divmod(self.global_batch, once)
        if rest or not micro_steps:
            share, uneven = divmod(self.global_batch, self.draws * ranks)
            fitting = [str(n) for n in range(1, min(share, 256) + 1) if share % n == 0]
            advice = (
                f"--batch {' or '.join(fitting)} fits"
                if share and not uneven
                else f"{ranks} ranks × {self.draws} draws do not divide it: take others"
            )
            raise ValueError(
                f"a batch of {self.global_batch} is no multiple of {self.batch} per rank × "
                f"{self.draws} draws × {ranks} ranks; {advice}"
            )
        if self.accumulation not in (None, micro_steps):
            raise ValueError(
                f"--accumulation {self.accumulation} × {once} is not the batch of "
                f"{self.global_batch}: that takes {micro_steps}"
            )
        return replace(self, accumulation=micro_steps)

    def pixels(self) -> tuple[int, int] | None:
        """Height and width of a sample, of the largest bucket where there are several."""
        sizes = [parse_sizes("--size", value) for value in (self.buckets, self.size) if value]
        return max(sizes[0], key=lambda size: size[0] * size[1]) if sizes else None

    def text_sources(self, encoders: tuple[str, ...]) -> dict[str, tuple[str | Path, str | Path]]:
        """Model and tokenizer of those of the text encoders that are named: by --clip and --t5,
        else by --text, else by --teacher or --init; with --shipped-parts and neither, those that
        ship."""
        stored = stored_encoders(ASSETS) if self.shipped_parts else {}
        if (folder := self.teacher or self.init) is not None:
            stored = stored_encoders(folder)
        sources = {}
        for name in encoders:
            if (source := getattr(self, name)) is not None:
                sources[name] = source, source
            elif self.text is not None:
                sources[name] = self.text / name, self.text / name
            elif name in stored:
                sources[name] = stored[name]
        return sources

    def rendered_samples(self) -> dict[str, int] | None:
        """How many samples of each kind are rendered as they are asked for: those of the small
        world, held in memory, where no shards are named and none are there or begun."""
        named = self.images is not None or self.clips is not None
        if self.preset != "small" or not self.in_memory or named:
            return None
        if (self.data / SHARDS_INDEX).exists() or any(self.data.glob("*.tar")):
            return None
        return {"images": self.make_images, "clips": self.make_clips}

    def data_settings(self, stage: str) -> DataSettings:
        """What the loader of a stage takes."""
        has_clips = stage == "t2v"
        if stage == "distill":
            has_clips = stored_config(self.teacher / "transformer").temporal
        has_images = not has_clips or self.p_image > 0 or self.p_motion_free > 0
        return DataSettings(
            kinds=("images",) * has_images + ("clips",) * has_clips,
            images=self.images or str(self.data / "images-*.tar"),
            clips=self.clips or str(self.data / "clips-*.tar"),
            size=None if self.size is None else parse_sizes("--size", self.size)[0],
            buckets=() if self.buckets is None else parse_sizes("--buckets", self.buckets),
            log=self.run / "broken.jsonl",
            rendered=self.rendered_samples() is not None,
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(DataOptions)},
        )

    def batch_line(self, ranks: int) -> str:
        """The global batch and what it is made of, in one line."""
        settings = self.on(ranks)
        total = settings.batch * settings.draws * settings.accumulation * ranks
        draws = f" × {settings.draws} draws" if settings.draws > 1 else ""
        return (
            f"batch {total} = {settings.batch} per rank{draws} × {settings.accumulation} "
            f"micro-steps × {ranks} rank{'s' if ranks > 1 else ''}"
        )

    def to_dict(self) -> dict:
        """Every field as JSON and YAML have it."""
        values = dataclasses.asdict(self)
        return {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict) -> "Settings":
        """The inverse of `to_dict`; unknown fields, and values of another type: ValueError."""
        return cls(**converted(values, "these settings"))


def parse_fields(text: str) -> dict[str, object]:
    """Fields of a GenTronConfig from words like "width=128 encoders=clip,t5 cross_attention=false".

    ValueError that names --model.
    """
    known = {item.name: item.type for item in dataclasses.fields(GenTronConfig)}
    for name in ("temporal", "guidance_embedding"):  # the stage says it
        del known[name]
    result = {}
    for word in text.split() or [""]:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--model takes NAME=VALUE of {', '.join(known)}; got {word!r}")
        if name in result:
            raise ValueError(f"--model names {name} twice: {text}")
        if name == "encoders":
            result[name] = () if value == "none" else tuple(value.split(","))
            continue
        result[name] = yaml.safe_load(value) if re.fullmatch(r"[-+.\w]+", value) else value
    return result


def stored_config(transformer: Path) -> GenTronConfig:
    """The configuration of a saved model."""
    return GenTronConfig.read(transformer / CONFIG_NAME)


def _kind(item: dataclasses.Field) -> tuple[type, bool]:
    """A field's type without None, and whether it takes None."""
    if isinstance(item.type, types.UnionType):
        kinds = [kind for kind in typing.get_args(item.type) if kind is not types.NoneType]
        return kinds[0], True
    return item.type, False


def with_new_names(values: dict, where: str) -> dict:
    """Settings by name, former names replaced; ValueError where a setting is there by both."""
    for name in values.keys() & RENAMED.keys():
        if RENAMED[name] in values:
            raise ValueError(f"{name} and {RENAMED[name]} in {where} are one setting: give one")
    return {RENAMED.get(name, name): value for name, value in values.items()}


def _argv_with_new_names(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """A command line with former options replaced, and by which these were."""
    options = {flag(name): flag(new) for name, new in RENAMED.items()}
    result, found = [], {}
    for word in argv:
        option, equals, value = word.partition("=")
        if option in options:
            found[option] = options[option]
        result.append(options.get(option, option) + equals + value)
    return result, found


def converted(values: dict, where: str) -> dict:
    """Fields of Settings in the types they have; YAML reads 1e-4 as text, and paths are text."""
    known = {item.name: item for item in dataclasses.fields(Settings)}
    values = with_new_names(values, where)
    if unknown := sorted(set(values) - set(known), key=str):
        raise ValueError(f"unknown field {', '.join(map(str, unknown))} in {where}")
    result = {}
    for name, value in values.items():
        kind, optional = _kind(known[name])
        wrong = ValueError(f"{name} in {where} is {reprlib.repr(value)}, wanted {kind.__name__}")
        if optional and value in (None, "none"):
            result[name] = None
        else:
            fits = isinstance(value, str | int | float) and isinstance(value, bool) == (
                kind is bool
            )
            if not fits or (kind is int and isinstance(value, float)):
                raise wrong
            try:
                result[name] = kind(value)
            except (TypeError, ValueError, OverflowError):
                raise wrong from None
    return result


def read_yaml(path: Path) -> object:
    """What a YAML file holds, plain values only. FileNotFoundError or ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"no such configuration: {path}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # PyYAML's constructors raise whatever a value makes them
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML: {reason or type(error).__name__}") from None


def load_config(path: Path, stage: str) -> dict:
    """Fields of Settings from a YAML file: its own, then those of its section `stage`.

    FileNotFoundError or ValueError that names the file.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold fields with values, it holds {reprlib.repr(values)}")
    sections = {name: values.pop(name, None) or {} for name in STAGES}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"section {name} of {path} must hold fields with values")
    parts = (values, *sections.values())
    former = [name for part in parts for name in part if name in RENAMED]
    _tell_renamed({name: RENAMED[name] for name in former}, str(path))
    own = [converted(part, str(path)) for part in parts]
    if any(part.get("allow_pipes") for part in own):
        raise ValueError(f"allow_pipes in {path}: that is for the command line, --allow-pipes")
    return own[0] | own[1 + STAGES.index(stage)]


def parse_settings(stage: str, description: str, argv: list[str] | None = None) -> Settings:
    """Settings of a stage, one of STAGES; wrong input ends with one line and exit code 2.

    The command line overrides the parts that lie in the --init folder, these override the file that
    --config names (default: configs/small.yaml), that over Settings' own defaults.
    """
    parser = argparse.ArgumentParser(
        description=f"{description} An option that may be None takes the word none.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse
    argv, former = _argv_with_new_names(sys.argv[1:] if argv is None else argv)
    _tell_renamed(former, "command line")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="file of these fields")
    try:
        chosen, _ = _config_parser().parse_known_args(argv)
        defaults = Settings(**load_config(chosen.config, stage))
        own = DataOptions.__dataclass_fields__.keys()
        data = parser.add_argument_group("data")
        for item in dataclasses.fields(Settings):
            group = data if item.name in own else parser
            keywords, (kind, optional) = dict(item.metadata), _kind(item)
            if kind is bool:
                keywords["action"] = argparse.BooleanOptionalAction
            else:
                keywords["type"] = _or_none(kind) if optional else kind
            default = getattr(defaults, item.name)
            group.add_argument(flag(item.name), default=default, **keywords)
        # argparse sets a default where there is no value yet: what stays a mark was not given.
        marks = {item.name: parser for item in dataclasses.fields(Settings)}
        values = vars(parser.parse_args(argv, argparse.Namespace(**marks)))
        if isinstance(words := values["model"], list):
            values["model"] = None if words == [None] else " ".join(str(word) for word in words)
        given = {name: values[name] for name in marks if values[name] is not parser}
        return _combined(defaults, given)
    except (ValueError, OSError) as error:
        if is_main():
            print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _or_none(kind: type) -> typing.Callable[[str], object]:
    """The type of an option that may be None, by that word."""

    def convert(text: str) -> object:
        return None if text == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


def _combined(defaults: Settings, given: dict) -> Settings:
    """The settings of a file with the options that were given, and between them what the --init
    folder holds."""
    init, found = given.get("init", defaults.init), {}
    teacher = given.get("teacher", defaults.teacher)
    if init is None and teacher is not None:
        init = teacher  # what the student starts as
        given = given | {"init": teacher}
    source = teacher or init  # of its other parts
    if source is not None and (vae := shared_folder(source) / "vae" / CONFIG_NAME).is_file():
        found["vae"] = vae.parent
    if source is not None and (encoders := stored_encoders(source)):
        found |= dict.fromkeys([*encoders, "text"])  # None, for text_sources to take them
    if given.get("text") is not None:
        found |= dict.fromkeys(SUBFOLDERS)
    if init is not None and "preset" in given and (init / "transformer" / CONFIG_NAME).is_file():
        stored, preset = stored_config(init / "transformer"), PRESETS[given["preset"]]
        wanted, sizes = ([getattr(c, name) for name in SIZE_FIELDS] for c in (preset, stored))
        if wanted != sizes:
            names = ", ".join(SIZE_FIELDS)
            raise ValueError(
                f"--preset {given['preset']} is of {names} {wanted}, {init} holds {sizes}"
            )
    for name, other in (("size", "buckets"), ("buckets", "size")):
        if given.get(name) is not None:
            found[other] = None
    settings = _with_shipped_parts(replace(defaults, **found | given), given)
    _check_stored_model(settings)
    if settings.size is not None and settings.buckets is not None:
        raise ValueError(f"--size {settings.size} and --buckets {settings.buckets}: give one")
    return settings


def _check_stored_model(settings: Settings) -> None:
    """ValueError where the model of --init has other fields than --model names."""
    if settings.model is None or settings.init is None:
        return
    if not (settings.init / "transformer" / CONFIG_NAME).is_file():
        return
    stored = stored_config(settings.init / "transformer").to_dict()
    wanted = settings.fresh_model().to_dict()
    for name in parse_fields(settings.model):
        if wanted[name] != stored[name]:
            raise ValueError(
                f"--model {settings.model}: {settings.init} holds a model of {name} "
                f"{stored[name]}; take --model none"
            )


def _with_shipped_parts(settings: Settings, given: dict) -> Settings:
    """The settings with the parts that ship in the place of those that a file names, not the
    command line, and that are not there; a line tells it."""
    if not settings.shipped_parts or settings.preset != "small":
        return settings
    absent = []
    for name in ("init", "vae", "text"):
        folder = getattr(settings, name)
        if name not in given and folder is not None and not folder.exists():
            absent.append(name)
    changes = {"text": None} if "text" in absent else {}
    if "init" in absent:
        tell(
            f"no T2I run in {settings.init}: starting from the shared layers of the model that "
            "ships, temporal layers at zero"
        )
        changes = {"init": ASSETS, "fresh_temporal": True} | (
            {} if "text" in given else dict.fromkeys(("clip", "t5", "text"))
        )
    elif absent:
        folders = " and no ".join(str(getattr(settings, name)) for name in absent)
        tell(
            f"no {folders}: taking what is missing of the model that ships "
            "(--no-shipped-parts trains it first)"
        )
    if "vae" not in given and ("vae" in absent or "init" in absent):
        changes["vae"] = ASSETS / "vae"
    return replace(settings, **changes)


def _tell_renamed(names: dict[str, str], where: str) -> None:
    if names:
        tell(f"{where}: " + ", ".join(f"{name} is now {now}" for name, now in names.items()))


def tell(line: str) -> None:
    """A line for the terminal, before the ranks have met: of the first one."""
    if is_main():
        print(line, flush=True)


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    return parser
