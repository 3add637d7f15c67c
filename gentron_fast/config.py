"""GenTronConfig and PRESETS: every size of the paper and the options of its family."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from gentron_fast.files import read_json
from gentron_fast.schema import (
    FLAG,
    MOST_LAYERS,
    MOST_TIMESTEPS,
    MOST_WIDTH,
    TEXT,
    check,
    optional,
    real,
    several,
    whole,
)

ENCODERS = ("clip", "t5")
MAX_FRAMES = 32
MAX_SIDE = 2**15  # pixels
MOST_CLIPS = 100_000  # of a prompt
SCALE = real(-1e6, 1e6)  # of guidance
# Of a distilled model: the ranges of λ_T and λ_M that it was trained with, as a model_index.json
# and a compiled sampler name them.
LEARNT = {"lambda_t": "learnt_lambda_t", "lambda_m": "learnt_lambda_m"}
DEFAULTS_SCHEMA = {
    "default_steps": whole(1, MOST_TIMESTEPS),
    "default_solver": TEXT,
    "default_lambda_t": SCALE,
    "default_lambda_m": SCALE,
    "default_rescale": real(0, 1),
}


@dataclass(frozen=True)
class SamplingDefaults:
    """What a call samples with where it says nothing; model_index.json holds each as default_NAME.

    lambda_t and lambda_m are the paper's (section 3.3), which has no rescale: a model of another
    size or other data may want others. ValueError for what no call takes.
    """

    steps: int = 50
    solver: str = "dpm++"
    lambda_t: float = 7.5
    lambda_m: float = 1.2
    rescale: float = 0.0

    def __post_init__(self):
        check(self.to_index(), DEFAULTS_SCHEMA)

    @classmethod
    def from_index(cls, index: dict) -> "SamplingDefaults":
        """Of a model_index.json; what it lacks is the paper's."""
        names = [item.name for item in fields(cls)]
        return cls(**{n: index[f"default_{n}"] for n in names if f"default_{n}" in index})

    def to_index(self) -> dict:
        """As model_index.json holds them."""
        return {f"default_{name}": value for name, value in asdict(self).items()}


_WIDTH = whole(1, MOST_WIDTH)
CONFIG_SCHEMA = {
    "depth": whole(1, MOST_LAYERS),
    "encoders": several(TEXT, 0, len(ENCODERS)),
    "mlp_ratio": real(1 / 64, 64),
    "patch_size": whole(1, 64),
    "pixels_per_latent": whole(1, 1024),
    "position_base_size": optional(_WIDTH),
    "position_interpolation": real(1e-6, 1e6),
}
CONFIG_SCHEMA |= dict.fromkeys(("width", "heads", "in_channels", "clip_width", "t5_width"), _WIDTH)
CONFIG_SCHEMA |= dict.fromkeys(("learned_range", "temporal", "cross_attention"), FLAG)
CONFIG_SCHEMA |= dict.fromkeys(("pooled_text", "caption_projection", "cross_norm"), FLAG)
CONFIG_SCHEMA |= dict.fromkeys(("timestep_cos_first", "final_table", "size_embedding"), FLAG)
CONFIG_SCHEMA |= {"guidance_embedding": FLAG}


@dataclass(frozen=True)
class GenTronConfig:
    """The shape of a GenTron model. Sizes: paper, tables 1 and 5; the options: DiT and PixArt-α.

    Raises ValueError for a field out of range and when two do not fit each other.
    """

    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    patch_size: int = 2
    in_channels: int = 4
    learned_range: bool = False  # predicts the variance too: 2 · in_channels channels come out
    temporal: bool = False  # temporal self-attention in every block: text to video
    # Text. With two encoders block i attends to encoder i mod 2 (interleaved cross-attention).
    encoders: tuple[str, ...] = ENCODERS
    clip_width: int = 768
    t5_width: int = 4096
    cross_attention: bool = True  # False: adaLN-zero conditioning, all text through c
    pooled_text: bool = True  # the pooled text joins the time embedding
    caption_projection: bool = False  # text goes through an MLP to the width before K and V
    cross_norm: bool = True  # LayerNorm before cross-attention
    # Timestep, positions, size.
    timestep_cos_first: bool = False
    final_table: bool = False  # final shift and scale: table + time embedding, no SiLU, no linear
    position_base_size: int | None = None  # None: positions count patches; else scaled to this grid
    position_interpolation: float = 1.0
    size_embedding: bool = False  # pixel size and aspect ratio join the time embedding
    pixels_per_latent: int = 8  # for the size embedding
    guidance_embedding: bool = False  # λ_T and λ_M are inputs: a distilled model, one branch a step

    def __post_init__(self):
        check(vars(self), CONFIG_SCHEMA)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not divisible by 4 (2-D sin-cos positions)")
        if self.size_embedding and self.width % 3:
            raise ValueError(f"width {self.width} is not divisible by 3 (size embedding)")
        unknown = set(self.encoders) - set(ENCODERS)
        if unknown or len(set(self.encoders)) != len(self.encoders):
            raise ValueError(f"encoders must be some of {ENCODERS}, got {self.encoders}")
        if not self.encoders and self.cross_attention:
            raise ValueError("cross-attention needs at least one text encoder")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learned_range else 1)

    def text_width(self, encoder: str) -> int:
        """Width of an encoder's tokens, "clip" or "t5"."""
        return {"clip": self.clip_width, "t5": self.t5_width}[encoder]

    def block_encoder(self, block: int) -> str | None:
        """The encoder that block number `block`, counted from 0, attends to."""
        return self.encoders[block % len(self.encoders)] if self.cross_attention else None

    def to_dict(self) -> dict:
        return asdict(self) | {"encoders": list(self.encoders)}

    @classmethod
    def from_dict(cls, values: dict) -> "GenTronConfig":
        """The inverse of `to_dict`; keys that begin with "_" are left out. Unknown: ValueError."""
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown configuration fields {unknown}; known are {sorted(known)}")
        if missing := sorted({"depth", "width", "heads"} - set(values)):
            raise ValueError(f"the configuration lacks {missing}")
        encoders = values.get("encoders", ENCODERS)
        return cls(
            **values | {"encoders": tuple(encoders) if isinstance(encoders, list) else encoders}
        )

    @classmethod
    def read(cls, path: Path) -> "GenTronConfig":
        """Of a model's config.json. FileNotFoundError or ValueError that names the file."""
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path} describes no GenTron: {error}") from None


_XL = GenTronConfig(depth=28, width=1152, heads=16)
_T2I = {
    "XL/2-CLIP-adaLN-zero": replace(_XL, encoders=("clip",), cross_attention=False),
    "XL/2-CLIP": replace(_XL, encoders=("clip",)),
    "XL/2-T5": replace(_XL, encoders=("t5",)),
    "XL/2": _XL,
    "G/2": GenTronConfig(depth=48, width=1664, heads=16),
    "small": GenTronConfig(depth=6, width=192, heads=4, clip_width=128, t5_width=128),
}
PRESETS = _T2I | {f"{name}-T2V": replace(config, temporal=True) for name, config in _T2I.items()}
