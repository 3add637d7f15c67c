"""gentron_fast: the diffusion transformer GenTron, for images and video, with custom kernels."""

from importlib import import_module

from gentron_fast.config import PRESETS, GenTronConfig

__version__ = "0.2.0"

# Loaded when asked for: torch takes seconds, and the pipeline needs diffusers and transformers.
_LAZY = {
    "CompiledSampler": "compiled",
    "EncodedText": "model",
    "GenTron": "model",
    "GenTronPipeline": "pipeline",
    "TextCondition": "model",
}
__all__ = ["PRESETS", "GenTronConfig", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f"gentron_fast.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
