"""A guided text-to-image step of a converted PixArt-α XL/2, beside diffusers' own: same weights.

pytest bench/bench_convert.py --benchmark-only

256 × 256 pixels, a prompt of 20 tokens, the empty prompt as null text. diffusers' step is that of
its PixArtAlphaPipeline: both branches in one batch, the texts padded to 120 tokens under a mask.
Two blocks of the full width stand for all 28, which --full measures.
"""

from copy import deepcopy

import pytest
import torch
from contest import DTYPES, OURS, Contender
from diffusers import PixArtTransformer2DModel

from gentron_fast.convert import convert_pixart
from gentron_fast.guidance import guided_prediction
from gentron_fast.model import EncodedText, GenTron, TextCondition

SIDE, CHANNELS = 32, 4  # of the latents
TOKENS, NULL_TOKENS, PADDED = 20, 1, 120
SCALE = 4.5  # PixArtAlphaPipeline's guidance
XL2 = {"cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": SIDE}
TINY = {"num_attention_heads": 4, "attention_head_dim": 12, "sample_size": SIDE}
TINY |= {"cross_attention_dim": 48, "caption_channels": 32}


@pytest.fixture(scope="module", params=[2, pytest.param(28, marks=pytest.mark.full)])
def models(request, tmp_path_factory):
    """diffusers' model with random weights, and ours, converted from it through files."""
    size = TINY if request.config.getoption("benchmark_disable") else XL2
    torch.manual_seed(0)
    theirs = PixArtTransformer2DModel(num_layers=request.param, **size).eval()
    folder = tmp_path_factory.mktemp("pixart")
    theirs.save_pretrained(folder / "in", max_shard_size="1GB")
    convert_pixart(folder / "in", folder / "out")
    return theirs, GenTron.from_pretrained(folder / "out" / "transformer")


def guided_by_diffusers(model):
    """As in PixArtAlphaPipeline: latents (1, C, H, W), tokens (2, PADDED, W), null text first."""

    def step(latents, tokens):
        prediction = model(
            torch.cat([latents] * 2),
            encoder_hidden_states=tokens,
            encoder_attention_mask=(
                torch.arange(PADDED, device=tokens.device)
                < torch.tensor([[NULL_TOKENS], [TOKENS]], device=tokens.device)
            ),
            timestep=torch.tensor([500, 500], device=tokens.device),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        null, text = prediction[:, :CHANNELS].chunk(2)
        return null + SCALE * (text - null)

    return step


def guided_by_us(model):
    def encoded(tokens) -> TextCondition:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return TextCondition(t5=EncodedText(tokens, mask))

    def step(latents, tokens):
        null_text, text = encoded(tokens[:1, :NULL_TOKENS]), encoded(tokens[1:, :TOKENS])
        timestep = torch.tensor([500], device=tokens.device)
        frames = latents[:, :, None]
        guided = guided_prediction(model, frames, timestep, text, null_text, SCALE, 1.0)
        return guided[:, :CHANNELS, 0]

    return step


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guided_step(measure, contest, models, dtype, compiled):
    if compiled and contest.smoke:
        pytest.skip("not compiled in a dry run")
    theirs, ours = models if dtype == torch.float32 else deepcopy(models)
    theirs, ours = theirs.to(contest.device, dtype), ours.to(contest.device, dtype)
    exact = guided_by_diffusers(theirs if dtype == torch.float32 else deepcopy(theirs).float())
    captions = theirs.config.caption_channels
    if compiled:
        theirs, ours = torch.compile(theirs), torch.compile(ours)
    blocks = len(models[1].blocks)
    measure(
        f"guided step of PixArt-α XL/2, {'compiled' if compiled else 'eager'}, {blocks} blocks",
        (1, CHANNELS, SIDE, SIDE),
        dtype,
        make=lambda randn: (randn(1, CHANNELS, SIDE, SIDE), randn(2, PADDED, captions)),
        definition=lambda *inputs: exact(*(tensor.float() for tensor in inputs)),
        contenders=[
            Contender(OURS, guided_by_us(ours)),
            Contender("diffusers", guided_by_diffusers(theirs)),
        ],
    )
