"""Training data: shards to VAE latents, once, and the stream of batches drawn from them.

A shard is a WebDataset tar: images as .png/.jpg/.webp + .txt, clips as .mp4 + .txt. Beside each one
lies a safetensors file with the posterior (mean and standard deviation) of its latents, so that
every read still samples the VAE; training itself decodes no pixels.
"""

import bisect
import functools
import glob
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from gentron_fast.model import TextCondition
from gentron_fast.text import Tokens
from gentron_fast.vae import VideoVAE

# Shapes: N samples, S starts of a clip, B batch, C channels, T frames, h × w latents.
IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp")
CLIP_ENDINGS = ("mp4",)
ENCODED_AT_ONCE = 64  # frames


@dataclass(frozen=True)
class Sampling:
    """How frames are taken from a clip. Paper: 8 frames at 4 FPS from clips at 24 FPS."""

    frames: int = 8
    fps: float = 4.0
    starts: int = 2  # random first frames of each clip, encoded once
    seed: int = 0


@dataclass(frozen=True)
class LatentSet:
    """Latent posteriors in memory: mean and std (N, S, C, T, h, w) in 16 bits, N captions."""

    mean: Tensor
    std: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def sample(self, index: int, start: int, draws: int, generator: torch.Generator) -> Tensor:
        """Draws (K, C, T, h, w) fp32 from the posterior of one sample."""
        mean, std = self.mean[index, start].float(), self.std[index, start].float()
        return mean + std * torch.randn((draws, *mean.shape), generator=generator)


def latents_path(shard: Path, vae_folder: Path, sampling: Sampling) -> Path:
    """Where a shard's latents lie: the name holds a digest of the VAE and of the sampling."""
    digest = hashlib.sha256(json.dumps(asdict(sampling), sort_keys=True).encode())
    for path in sorted([vae_folder / "config.json", *vae_folder.glob("*.safetensors")]):
        digest.update(path.read_bytes())
    return shard.with_name(f"{shard.stem}.latents-{digest.hexdigest()[:12]}.safetensors")


def precompute(
    shards: list[Path],
    vae_folder: Path,
    sampling: Sampling,
    rank: int = 0,
    ranks: int = 1,
    device: str | torch.device = "cpu",
) -> list[Path]:
    """Encode the shards whose latents are missing, this rank every `ranks`-th of them.

    Returns every shard's latents file; other ranks' may not be there yet. A run that was cut off
    goes on where it was.
    """
    paths = [latents_path(shard, vae_folder, sampling) for shard in shards]
    pairs = list(zip(shards, paths, strict=True))
    # Shared out before looking what is missing: ranks may look at different times.
    mine = [(shard, path) for shard, path in pairs[rank::ranks] if not path.exists()]
    if mine:
        vae = VideoVAE.from_pretrained(vae_folder).to(device)
        with tqdm(mine, desc="latents", unit="shard", disable=rank != 0) as bar:
            for shard, path in bar:
                _encode_shard(shard, path, vae, sampling, device)
    return paths


def load_latents(paths: list[Path]) -> LatentSet:
    """Join latents files of one kind, images or clips; ValueError if there are none."""
    if not paths:
        raise ValueError("no shards to train on")
    means, stds, captions = [], [], []
    for path in paths:
        with safe_open(path, "pt") as file:
            means.append(file.get_tensor("mean"))
            stds.append(file.get_tensor("std"))
            captions += json.loads(file.metadata()["captions"])
    return LatentSet(torch.cat(means), torch.cat(stds), captions)


def _encode_shard(shard: Path, path: Path, vae: VideoVAE, sampling: Sampling, device) -> None:
    pixels, posteriors, captions = [], [], []
    for index, sample in enumerate(_samples(shard)):
        generator = seeded(sampling.seed, index, shard.stem)
        pixels.append(_pixels(sample, sampling, generator, shard))
        if pixels[-1].shape != pixels[0].shape:
            raise ValueError(
                f"{sample['__key__']} in {shard.name} is {tuple(pixels[-1].shape[-2:])}, others "
                f"are {tuple(pixels[0].shape[-2:])}: one training run takes one size"
            )
        if "txt" not in sample:
            raise ValueError(f"{sample['__key__']} in {shard.name} has no caption (.txt)")
        captions.append(sample["txt"].decode())
        if sum(part.shape[0] * part.shape[2] for part in pixels) >= ENCODED_AT_ONCE:
            posteriors.append(_encode(vae, pixels, device))
            pixels = []
    if pixels:
        posteriors.append(_encode(vae, pixels, device))
    mean, std = (torch.cat(parts) for parts in zip(*posteriors, strict=True))
    part = path.with_name(f".{path.name}.part")
    save_file({"mean": mean, "std": std}, part, metadata={"captions": json.dumps(captions)})
    os.replace(part, path)


def _samples(shard: Path):
    """The samples of one shard, whatever the rank: shards are shared out before."""
    import webdataset

    return webdataset.WebDataset(str(shard), shardshuffle=False, nodesplitter=lambda shards: shards)


@torch.no_grad()
def _encode(vae: VideoVAE, pixels: list[Tensor], device) -> tuple[Tensor, Tensor]:
    """Samples of (S, 3, T, H, W) -> mean and std (N, S, C, T, h, w) fp16 on the CPU."""
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        posterior = vae.encode(torch.cat(pixels).to(device))
    return tuple(part.half().cpu().unflatten(0, (len(pixels), -1)) for part in posterior)


def _pixels(sample: dict, sampling: Sampling, generator, shard: Path) -> Tensor:
    """Pixels in [-1, 1] of one sample: (1, 3, 1, H, W) of an image, (S, 3, T, H, W) of a clip."""
    for ending in IMAGE_ENDINGS:
        if ending in sample:
            return _scale(decode_image(sample[ending])[None, None])
    for ending in CLIP_ENDINGS:
        if ending in sample:
            frames, fps = decode_clip(sample[ending])
            where = f"{sample['__key__']} in {shard.name}"
            picks = [
                pick_frames(len(frames), fps, sampling, generator, where)
                for _ in range(sampling.starts)
            ]
            return _scale(torch.stack([frames[pick] for pick in picks]))
    raise ValueError(f"{sample['__key__']} in {shard.name} holds neither an image nor a clip")


def _scale(frames: Tensor) -> Tensor:
    """uint8 (B, T, H, W, 3) -> (B, 3, T, H, W) in [-1, 1]."""
    return frames.movedim(-1, 1).float() / 127.5 - 1


def decode_image(content: bytes) -> Tensor:
    """An image file's bytes -> uint8 (H, W, 3)."""
    import numpy
    from PIL import Image

    return torch.from_numpy(numpy.array(Image.open(io.BytesIO(content)).convert("RGB")))


def decode_clip(content: bytes) -> tuple[Tensor, float]:
    """An mp4 file's bytes -> all frames, uint8 (T, H, W, 3), and frames per second."""
    import av

    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        # Threads and a new colour converter for each frame cost ten times a small clip's decoding.
        stream.codec_context.thread_count = 1
        converter = av.video.reformatter.VideoReformatter()
        frames = [
            torch.from_numpy(converter.reformat(frame, format="rgb24", threads=1).to_ndarray())
            for frame in container.decode(stream)
        ]
        return torch.stack(frames), float(stream.average_rate)


def pick_frames(
    length: int, fps: float, sampling: Sampling, generator: torch.Generator, where: str = "a clip"
) -> Tensor:
    """Indices of `sampling.frames` frames at `sampling.fps` from a random start: (T,) int64.

    From 24 FPS that is every 6th frame. ValueError for a clip that is too short: it is not padded.
    """
    offsets = (torch.arange(sampling.frames) * fps / sampling.fps).round().long()
    starts = length - int(offsets[-1])
    if starts < 1:
        raise ValueError(
            f"{where} has {length} frames at {fps:g} FPS; {sampling.frames} frames at "
            f"{sampling.fps:g} FPS need {int(offsets[-1]) + 1}"
        )
    return offsets + torch.randint(starts, (), generator=generator)


def seeded(*key: object) -> torch.Generator:
    """A generator whose stream depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class DataSettings:
    """What a run trains on. Shard patterns are globs or URLs that WebDataset reads, with braces."""

    kinds: tuple[str, ...] = ("images",)  # or ("images", "clips")
    images: str = "data/shapes/images-*.tar"
    clips: str = "data/shapes/clips-*.tar"
    size: tuple[int, int] | None = None  # pixels (H, W); None: as they are, all of one size
    buckets: tuple[tuple[int, int], ...] = ()  # sizes instead, the one nearest in aspect ratio
    frames: int = 8
    fps: float = 4.0
    starts: int = 2  # random first frames of each clip; 0: a new one at every reading
    crop: str = "center"  # or "random"
    batch: int = 32  # captions per rank and micro-step
    draws: int = 1  # noises and timesteps of each caption
    p_null: float = 0.1
    p_motion_free: float = 0.2
    seed: int = 0
    workers: int = 2  # decoding processes per rank
    in_memory: bool = False  # encode once, beside the shards, and hold the latents in memory
    max_broken: float = 0.05
    log: Path = Path("runs/broken.jsonl")  # names every broken sample

    def __post_init__(self):
        if not self.kinds or set(self.kinds) - {"images", "clips"}:
            raise ValueError(f"kinds is {self.kinds}, must name images, clips or both")
        for name in ("frames", "batch", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("starts", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must not be negative")
        for name in ("p_null", "p_motion_free", "max_broken"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be between 0 and 1")
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop is {self.crop!r}, must be center or random")

    @functools.cached_property
    def precomputed(self) -> bool:
        """Whether the shards hold latents and text embeddings instead of pixels and captions."""
        return False


class TooManyBroken(ValueError):
    """More than the set share of the samples is broken."""


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one micro-step: B captions, K noise draws of each.

    On the CPU; latents on the device where a VAE encodes them.
    """

    latents: Tensor  # (B·K, C, T, h, w) fp32, drawn from the posterior
    noise: Tensor  # the same shape
    timestep: Tensor  # (B·K,) int64
    motion_free: Tensor | None  # (B·K,) bool; None for images
    text: Tokens | TextCondition  # of B captions, the null text where they were dropped


class Position:
    """Which numbers of the endless order of samples a rank has taken and which come next.

    Micro-batch m of rank r of R is part m·R + r of the order. A rank that met broken samples is
    ahead of the others; on another number of ranks, `done` holds the numbers after `base` that were
    taken already.
    """

    def __init__(self, batch: int, rank: int = 0, ranks: int = 1):
        self.batch, self.rank, self.ranks = batch, rank, ranks
        self.base, self.taken = 0, 0
        self.done: list[int] = []
        self.waiting: list[int] = []  # taken, and in no batch yet

    def number(self, nth: int) -> int:
        """The number of this rank's nth sample since `base`."""
        part, row = divmod(nth, self.batch)
        free = (part * self.ranks + self.rank) * self.batch + row
        # done[i] has as many free numbers between base and itself:
        passed = bisect.bisect_right(
            range(len(self.done)), free, key=lambda i: self.done[i] - self.base - i
        )
        return self.base + free + passed

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, states: list[dict]) -> None:
        """Go on where the ranks of another run, or of this one, stood."""
        old = [Position(0) for _ in states]
        for position, state in zip(old, states, strict=True):
            vars(position).update(state)
        mine = old[self.rank] if self.rank < len(old) else None
        if mine and (mine.ranks, mine.batch) == (self.ranks, self.batch):
            vars(self).update(vars(mine))
            return
        self.base = min(position.number(position.taken) for position in old)
        taken = {
            number
            for position in old
            for nth in range(position.taken)
            if (number := position.number(nth)) > self.base
        }
        self.done = sorted(taken.union(n for n in old[0].done if n > self.base))
        self.taken = 0
        self.waiting = [n for position in old for n in position.waiting][self.rank :: self.ranks]


class Loader:
    """Endless micro-batches of one rank; sample g is a function of (seed, g) and nothing else.

    With clips, the fraction p_motion_free of the samples is images, repeated to T frames, spread
    evenly; each kind runs through its own permutations, one an epoch, so that an epoch sees each
    sample once. The texts are dropped with probability p_null. Each sample comes with `draws` pairs
    of timestep and noise, and as many draws of its posterior.
    """

    timesteps = 1000

    def __init__(self, data: DataSettings, sets: dict[str, LatentSet], tokenize, rank=0, ranks=1):
        self.data, self.sets = data, sets
        self.position = Position(data.batch, rank, ranks)
        self.p_image = 1.0 if "clips" not in sets else data.p_motion_free
        if "images" not in sets:
            self.p_image = 0.0
        captions, self._first_row = [""], {}
        for kind, latents in sets.items():
            self._first_row[kind] = len(captions)
            captions += latents.captions
        self.tokens = tokenize(captions)
        self._orders: dict[str, tuple[int, Tensor]] = {}

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        numbers = [self.position.number(self.position.taken + i) for i in range(self.data.batch)]
        self.position.taken += self.data.batch
        rows = [self._sample(number) for number in numbers]
        latents, noise, timestep, is_image, caption = zip(*rows, strict=True)
        motion_free = torch.tensor(is_image).repeat_interleave(self.data.draws)
        return Batch(
            torch.cat(latents),
            torch.cat(noise),
            torch.cat(timestep),
            motion_free if "clips" in self.sets else None,
            select_tokens(self.tokens, torch.tensor(caption)),
        )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Latents (C, T, h, w) of one sample; of the largest bucket, if there are several."""
        return tuple(self.sets[self.data.kinds[-1]].mean.shape[-4:])

    def state_dict(self) -> dict:
        """This rank's place in the data, between micro-steps; JSON-able."""
        return self.position.state_dict()

    def load_state_dict(self, states: list[dict]) -> None:
        """Go on where a run stood: `states` are those of all its ranks, in rank order."""
        self.position.load_state_dict(states)

    def broken(self) -> dict[str, int]:
        """Skipped samples by cause, since the start."""
        return {}

    def _sample(self, number: int) -> tuple[Tensor, Tensor, Tensor, bool, int]:
        # Of the first n samples exactly floor(p · n) are images.
        earlier_images = int(self.p_image * number)
        is_image = int(self.p_image * (number + 1)) > earlier_images
        generator = self._generator(number)
        kind = "images" if is_image else "clips"
        source = self.sets[kind]
        nth = earlier_images if is_image else number - earlier_images
        index = self._shuffled(kind, nth, len(source))
        keep = float(torch.rand((), generator=generator)) >= self.data.p_null
        start = int(torch.randint(source.mean.shape[1], (), generator=generator))
        timestep = torch.randint(self.timesteps, (self.data.draws,), generator=generator)
        latents = source.sample(index, start, self.data.draws, generator)
        if is_image and "clips" in self.sets:  # each draw of the posterior, repeated to T frames
            latents = latents.expand(-1, -1, self.data.frames, -1, -1)
        noise = torch.randn(latents.shape, generator=generator)
        return latents, noise, timestep, is_image, self._first_row[kind] + index if keep else 0

    def _generator(self, number: int) -> torch.Generator:
        # The CPU generator reads 32 bits of its seed; an odd multiplier keeps numbers distinct.
        return torch.Generator().manual_seed((self.data.seed * 0x9E3779B1 + number) & 0xFFFFFFFF)

    def _shuffled(self, kind: str, nth: int, length: int) -> int:
        epoch, place = divmod(nth, length)
        if self._orders.get(kind, (None,))[0] != epoch:
            order = torch.randperm(length, generator=seeded(self.data.seed, kind, epoch))
            self._orders[kind] = (epoch, order)
        return int(self._orders[kind][1][place])


def make_loader(
    data: DataSettings,
    vae: Path,
    tokenize: Callable[[list[str]], Tokens],
    *,
    rank: int = 0,
    ranks: int = 1,
    device: str | torch.device = "cpu",
) -> Loader:
    """The micro-batches of one rank; encodes what is missing first if they are kept in memory.

    Under torch.distributed the ranks share the encoding, and wait for each other.
    """
    sampling = Sampling(frames=data.frames, fps=data.fps, starts=data.starts)
    together = ranks > 1 and torch.distributed.is_initialized()
    share = (rank, ranks) if together else (0, 1)
    paths = {}
    for kind in data.kinds:
        shards = [Path(name) for name in sorted(glob.glob(getattr(data, kind)))]
        paths[kind] = precompute(shards, vae, sampling, *share, device)
    if together:
        # Encoding may take hours, in which the others wait: not to be taken for a frozen rank.
        patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=2))
        torch.distributed.barrier(patient)
    sets = {kind: load_latents(paths[kind]) for kind in data.kinds}
    return Loader(data, sets, tokenize, rank, ranks)


def select_tokens(
    tokens: dict[str, tuple[Tensor, Tensor]], rows: Tensor, multiple: int = 8
) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of tokenised captions, cut to the longest of them, rounded up to a multiple."""
    return {name: _cut(ids[rows], mask[rows], multiple) for name, (ids, mask) in tokens.items()}


def _cut(ids: Tensor, mask: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    longest = -(-int(mask.sum(1).max()) // multiple) * multiple
    return ids[:, :longest], mask[:, :longest]
