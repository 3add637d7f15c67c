"""What docs/predictions.md says of each kernel, confirmed or refuted: exactly its rows.

pytest bench/bench_predictions.py --benchmark-only
"""

import math
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import bench_guided_step as guided
import pytest
import torch
from bench_temporal_attention import values
from contest import DEVICE, OURS, Contender
from records import environment

from gentron_fast import PRESETS
from gentron_kernels.layernorm_modulate import (
    layernorm_modulate,
    layernorm_modulate_ref,
    residual_layernorm_modulate,
    residual_layernorm_modulate_ref,
)
from gentron_kernels.temporal_attention import temporal_attention, temporal_attention_ref

PAGE = Path(__file__).parents[1] / "docs/predictions.md"
COPY = 4300  # GB/s, from which the page reckons


class Prediction(NamedTuple):
    preset: str
    operator: str
    direction: str
    megabytes: int
    percent: int  # of a copy's speed


def predictions(page: str, triton: str | None) -> list[Prediction]:
    """The rows of the Triton that is here, or of the page's first."""
    of_version = dict(re.findall(r"^## Triton (\S+)\n(.*?)(?=^## )", page, re.M | re.S))
    found, preset = [], ""
    for line in of_version.get(triton or "", next(iter(of_version.values()))).splitlines():
        preset = line[4:].partition(",")[0] if line.startswith("### ") else preset
        if percent := re.search(r"\| \*\*(\d+)\*\* \|", line):
            title, megabytes = line.strip("| ").split(" | ")[:2]
            operator, _, direction = title.partition(": ")
            figures = int(megabytes), int(percent[1])
            found.append(Prediction(preset, operator, direction or "forward", *figures))
    return found


def case(operator: str, backward: bool, clip, config, device):
    """make, definition and ours of a row, and the bytes of an element that it must move."""
    shape, flags = (*clip, config.width), torch.zeros(clip.batch, dtype=torch.bool, device=device)

    def tokens(streams: int, rows: int):
        return lambda randn: (
            *(randn(*shape) for _ in range(streams)),
            *(randn(clip.batch, config.width) for _ in range(rows)),
        )

    def packed(randn):
        return (randn(*clip, 3, config.heads, config.head_size),)

    def attention(tensors, **options):
        ours = partial(temporal_attention, **options)
        return packed, partial(temporal_attention_ref, **options), ours, 2 * tensors

    match operator:
        case "residual, LayerNorm, modulation":
            both = residual_layernorm_modulate_ref, residual_layernorm_modulate
            return tokens(2, 3), *both, 2 * (6 if backward else 4)
        case "LayerNorm, modulation":
            both = layernorm_modulate_ref, layernorm_modulate
            return tokens(1, 2), *both, 2 * (3 if backward else 2)
        case "temporal attention":
            return attention(7 if backward else 4)
        case "temporal attention, with flags":
            return attention(7 if backward else 4, motion_free=flags)
        case "temporal attention, every sample motion-free":
            return packed, values, attention(2, motion_free=~flags)[2], 4
    raise ValueError(f"no such row: {operator}")


ROWS = predictions(PAGE.read_text(), environment(DEVICE)["triton"])


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row.preset} {row.operator} {row.direction}"
)
def test_prediction(measure, contest, clip, row):
    if contest.device != "cuda" and not contest.smoke:
        pytest.skip("the predictions are of an H200")
    config, backward = PRESETS[f"{row.preset}-T2V"], row.direction == "backward"
    if row.operator == "guided step":
        shape = guided.latents_shape(contest)
        make = partial(guided.inputs, shape=shape, device=contest.device)
        definition, ours, size = guided.plain, guided.ours, 5 * 4 + 3 * 2
    else:
        shape = *clip, config.width
        make, definition, ours, size = case(row.operator, backward, clip, config, contest.device)
    nbytes = size * math.prod(shape)
    if not contest.smoke:
        assert round(nbytes / 1e6) == row.megabytes, "the page is of other sizes"
    found = measure(
        f"predicted: {row.operator}",
        shape,
        torch.bfloat16,
        make=make,
        definition=definition,
        contenders=[Contender(OURS, ours)],
        nbytes=nbytes,
        backward=backward,
        preset=f"{row.preset}-T2V",
        predicted_percent=row.percent,
    )
    own = found["contenders"][OURS]
    print(
        f"\n{row.preset} {row.operator}, {row.direction}: predicted {row.percent} % of a copy, "
        f"measured {own['percent_of_copy']:.0f} ({100 * own['gbs'] / COPY:.0f} of {COPY} GB/s)"
    )
