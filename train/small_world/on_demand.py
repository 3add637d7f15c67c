"""The small world as a source of samples, rendered and encoded when they are first asked for.

A run trains from its first minute on, on the samples and in the order of the shards that
`write_shards` would write, and each is made once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gentron_fast.text import Tokens
from gentron_fast.vae import VideoVAE
from gentron_train.data.decode import Sampling, read_caption, read_frames
from gentron_train.data.loader import DataSettings, Loader
from gentron_train.data.sources import PixelSource, Posterior, Sample, encode, window_generator
from gentron_train.small_world.renderer import SHARD_SIZE, SIZE, make_sample

Key = tuple[str, int, int]  # kind, number among all of the kind, window


@dataclass
class RenderedSample(Sample):
    """A sample whose pixels are there until it is encoded."""

    key: Key = ("", 0, 0)
    size = (SIZE, SIZE)  # before and after


class RenderedSource:
    """Posteriors of the small world's samples, fp16 in memory once they were asked for."""

    in_background = False
    text = PixelSource.text

    def __init__(
        self,
        sampling: Sampling,
        vae: Path,
        tokenize: Callable[[list[str]], Tokens],
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        self.sampling, self.tokenize, self.device, self.seed = sampling, tokenize, device, seed
        self.vae = VideoVAE.from_pretrained(vae).to(device)
        self.kept: dict[Key, tuple[str, Posterior]] = {}

    def windows(self, kind: str) -> int:
        return self.sampling.windows(kind)

    def read(self, kind: str, shard: int, number: int, window: int, position: int) -> Sample:
        key = kind, shard * SHARD_SIZE + number, window
        if key in self.kept:
            caption, posterior = self.kept[key]
            return RenderedSample(caption, posterior=posterior, key=key)
        files = make_sample(self.seed, *key[:2])
        generator = window_generator(self.sampling, f"{kind}-{shard:05d}", number)
        frames = read_frames(files, self.sampling, generator, window, kind)[0]
        return RenderedSample(read_caption(files), pixels=frames, key=key)

    def posteriors(self, samples: list[Sample]) -> list[Posterior]:
        # One sample may stand in a batch twice.
        fresh = {s.key: s for s in samples if s.posterior is None and s.key not in self.kept}
        if fresh:
            pixels = [sample.pixels for sample in fresh.values()]
            encoded = encode(self.vae, pixels, self.device, bf16=True)
            for (key, sample), pair in zip(fresh.items(), encoded, strict=True):
                self.kept[key] = sample.text, tuple(part.cpu() for part in pair)
        return [self.kept[sample.key][1] for sample in samples]


def shard_lengths(samples: int) -> list[int]:
    """How many samples each shard of so many would hold."""
    return [min(SHARD_SIZE, samples - first) for first in range(0, samples, SHARD_SIZE)]


def rendering_loader(
    data: DataSettings,
    counts: dict[str, int],
    vae: Path,
    tokenize: Callable[[list[str]], Tokens],
    *,
    rank: int = 0,
    ranks: int = 1,
    device: str | torch.device = "cpu",
) -> Loader:
    """The micro-batches of one rank from `counts` images and clips that no shard holds."""
    source = RenderedSource(data.sampling, vae, tokenize, device)
    lengths = {kind: shard_lengths(counts[kind]) for kind in data.kinds}
    return Loader(data, source, lengths, rank, ranks)
