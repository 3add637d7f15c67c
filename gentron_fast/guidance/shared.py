"""What the denoisers of one model share: merged projections, positions, modulation rows."""

# Shapes: D width, T frames, H × W latents.

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gentron_fast.guidance.contexts import merged_values
from gentron_fast.guidance.steps import modulation_chunk, modulation_row_bytes
from gentron_fast.model import GenTron, TextCondition


class Conditions(NamedTuple):
    """What modulation rows are made of, one a row of `places` in the table.

    timesteps (R,); text of R prompts; size (R, 2) and guidance (R, 2) for models that embed them.
    """

    places: range
    timesteps: Tensor
    text: TextCondition
    size: Tensor | None
    guidance: Tensor | None


class SharedWork:
    """What denoisers of one model share, so that it is there once.

    merged: of each block the value and output projection as one, None without temporal layers.
    rows (R, depth, 6, D) and final_rows (R, 2, D): the modulation rows of all of them, one table.
    A denoiser has a place of `chunk` steps of `conditions` rows in it until it is released.
    """

    @torch.no_grad()
    def __init__(self, model: GenTron, conditions: int, steps: int, places: int = 1):
        """For `places` denoisers at a time, each of `conditions` null texts and texts and, unless
        the table would pass `steps.MODULATION_BYTES`, with the rows of `steps` steps ahead."""
        self.model, self.conditions, weight = model, conditions, model.patch_embed.weight
        self.merged = [
            merged_values(block.temporal_attention) if model.config.temporal else None
            for block in model.blocks
        ]
        row_bytes = modulation_row_bytes(model.config, weight.dtype)
        self.chunk = modulation_chunk(row_bytes, conditions * places)
        self._place_rows = min(self.chunk, steps) * conditions
        count = places * self._place_rows
        self.rows = weight.new_empty(count, len(model.blocks), 6, model.config.width)
        self.final_rows = weight.new_empty(count, 2, model.config.width)
        self._free = list(range(places))
        self._positions: dict[tuple[int, int], Tensor] = {}

    def claim(self, owner) -> tuple[int, Callable[[], None]]:
        """The first row of a place that is the owner's until it is deleted, or the function that
        comes with it is called. RuntimeError where no place is free."""
        if not self._free:
            raise RuntimeError("the table of modulation rows has no place for another denoiser")
        place = self._free.pop()
        release = weakref.finalize(owner, self._free.append, place)
        return place * self._place_rows, release

    def positions(self, height: int, width: int) -> Tensor:
        """Positions of the patches of height × width latents, (N, D)."""
        if (height, width) not in self._positions:
            self._positions[height, width] = self.model.positions(height, width)
        return self._positions[height, width]

    def fill(self, parts: Sequence[Conditions]) -> None:
        """Make the rows of several places, in one go."""
        places, timesteps, texts, sizes, guidance = zip(*parts, strict=True)
        text = texts[0] if len(texts) == 1 else TextCondition.cat(list(texts))
        size, guidance = (
            None if column[0] is None else torch.cat(column) for column in (sizes, guidance)
        )
        c, time = self.model.condition(torch.cat(timesteps), text, size, guidance)
        final_rows, start = self.model.final.modulation(c, time), 0
        rows_of = []
        for place in places:
            rows_of.append((slice(place.start, place.stop), slice(start, start + len(place))))
            start += len(place)
        for index, block in enumerate(self.model.blocks):
            rows = block.modulation(c)
            for target, source in rows_of:
                self.rows[target, index] = rows[source]
        for target, source in rows_of:
            self.final_rows[target] = final_rows[source]
