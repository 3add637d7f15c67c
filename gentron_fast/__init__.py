"""gentron_fast: the diffusion transformer GenTron, for images and video, with custom kernels."""

from gentron_fast.config import PRESETS, GenTronConfig
from gentron_fast.model import EncodedText, GenTron, TextCondition

__all__ = [
    "PRESETS",
    "EncodedText",
    "GenTron",
    "GenTronConfig",
    "GenTronPipeline",
    "TextCondition",
]


def __getattr__(name: str):
    if name == "GenTronPipeline":  # loaded when asked for: it needs diffusers and transformers
        from gentron_fast.pipeline import GenTronPipeline

        return GenTronPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
