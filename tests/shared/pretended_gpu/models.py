"""Models and texts for the tests; call them while a `Host` is entered."""

import torch

from gentron_fast import EncodedText, GenTron, GenTronConfig, TextCondition


def on_gpu(config: GenTronConfig, dtype: torch.dtype = torch.bfloat16) -> GenTron:
    """A model there. No memory is taken, whatever its size."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not by `to`: parameters do not change places with fake ones
    try:
        with torch.device("cuda"):
            return GenTron(config)
    finally:
        torch.set_default_dtype(before)


def texts(config: GenTronConfig, batch: int, clip: int = 20, t5: int = 120) -> TextCondition:
    """Random text of `batch` prompts without padding, on the CPU in fp32."""
    lengths, encoded = {"clip": clip, "t5": t5}, {}
    for name in config.encoders:
        width, length = config.text_width(name), lengths[name]
        mask = torch.ones(batch, length, dtype=torch.bool)
        encoded[name] = EncodedText(
            torch.rand(batch, length, width), mask, torch.rand(batch, width)
        )
    return TextCondition(**encoded)
