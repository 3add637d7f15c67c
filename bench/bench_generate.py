"""The model that ships, piece by piece: one guided step by branches, one clip decoded.

pytest bench/ --benchmark-only
"""

import pytest
import torch

from gentron_fast import GenTronPipeline
from gentron_fast.guidance import guided_prediction

# λ_M = 1 is plain classifier-free guidance with two branches, λ_T = λ_M = 1 the text's branch.
BRANCHES = {3: (7.5, 1.2), 2: (7.5, 1.0), 1: (1.0, 1.0)}


@pytest.fixture(scope="module")
def pipeline():
    return GenTronPipeline.from_pretrained()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("branches", BRANCHES)
def test_guided_step(benchmark, pipeline, branches, dtype):
    pipeline.to(dtype=dtype)
    text = pipeline.text_encoder.encode(["a red circle moving left"])
    null_text = pipeline.text_encoder.encode([""])
    side = pipeline.default_size[0] // pipeline.vae.factor
    channels = pipeline.transformer.config.in_channels
    latents = torch.randn(1, channels, pipeline.default_frames, side, side, dtype=dtype)
    inputs = pipeline.transformer, latents, torch.tensor([500]), text, null_text
    with torch.no_grad():
        benchmark(guided_prediction, *inputs, *BRANCHES[branches])


def test_decode_clip(benchmark, pipeline):
    pipeline.to(dtype=torch.float32)
    side = pipeline.default_size[0] // pipeline.vae.factor
    latents = torch.randn(1, pipeline.vae.latent_channels, pipeline.default_frames, side, side)
    with torch.no_grad():
        benchmark(pipeline.vae.decode, latents)
