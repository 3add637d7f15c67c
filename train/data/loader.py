"""The stream of training batches: which samples, in which order, on which rank.

A shard is a WebDataset tar of images or clips, by the endings in decode.py, with captions (.txt or
.json), or what gentron_train.precompute made of one. Sample g of the endless order, its window, its
noise and its timestep are a function of (seed, g) only, whatever the number of ranks and workers.
"""

import functools
import itertools
import multiprocessing.util
import signal
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, chain, islice
from pathlib import Path

import torch
from torch import Tensor

from gentron_fast.model import TextCondition
from gentron_fast.text import Tokens
from gentron_train.data.broken import (
    FEW_SAMPLES,
    Broken,
    BrokenLog,
    BrokenSample,
    TooManyBroken,
)
from gentron_train.data.decode import Sampling
from gentron_train.data.options import TIMESTEPS, DataOptions
from gentron_train.data.packing import packed, unpacked
from gentron_train.data.shards import Shard, check_any_sample, count, find_shards, index, read_facts
from gentron_train.data.sources import (
    Facts,
    LatentSource,
    MemorySource,
    PixelSource,
    Point,
    Sample,
    check_kinds,
    encode_shards,
    folder_digest,
    load_facts,
    load_latents,
    other_size,
    seeded,
)

# Shapes: B batch, K draws, C channels, T frames, h × w latents.
__all__ = ["Batch", "DataSettings", "Loader", "TooManyBroken", "make_loader"]
SHUFFLED_TOGETHER = 64  # shards
FEW_SIZES = 16  # samples of which two of one size are sought


@dataclass(frozen=True)
class DataSettings(DataOptions):
    """What a run trains on. A pattern of shards is a glob, or URLs that WebDataset reads."""

    kinds: tuple[str, ...] = ("images",)  # or ("images", "clips")
    images: str = "data/shapes/images-*.tar"
    clips: str = "data/shapes/clips-*.tar"
    size: tuple[int, int] | None = None  # pixels (H, W); None: as they are, all of one size
    buckets: tuple[tuple[int, int], ...] = ()  # sizes instead: the one nearest in aspect ratio
    log: Path = Path("runs/broken.jsonl")  # names every broken sample
    rendered: bool = False  # the small world's samples instead, which no shards hold

    def __post_init__(self):
        super().__post_init__()
        if not self.kinds or set(self.kinds) - {"images", "clips"}:
            raise ValueError(f"kinds is {self.kinds}, must name images, clips or both")
        for size in (*self.buckets, *([self.size] if self.size else [])):
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"a size is {size}, must be (height, width) in pixels")
        if self.in_memory and (self.buckets or not self.windows_per_clip):
            raise ValueError(
                "in_memory takes one size, no buckets, and at least one of windows_per_clip"
            )

    @property
    def sampling(self) -> Sampling:
        sizes = (
            tuple(self.size) if self.size and not self.buckets else None,
            tuple(map(tuple, self.buckets)),
        )
        return Sampling(self.frames, self.fps, self.windows_per_clip, 0, *sizes, self.crop)

    @functools.cached_property
    def shards(self) -> dict[str, list[Shard]]:
        """The shards of each kind; ValueError where a pattern names none."""
        if self.rendered:
            return {kind: [] for kind in self.kinds}
        room = None if self.cache_gib is None else int(self.cache_gib * 2**30)
        where = self.cache, room, self.allow_pipes
        return {kind: find_shards(getattr(self, kind), *where) for kind in self.kinds}

    @functools.cached_property
    def precomputed(self) -> bool:
        """Whether the shards hold latents in place of pixels: the first one says it."""
        return not self.rendered and read_facts(self.shards[self.kinds[0]][0]) is not None

    @functools.cached_property
    def has_text(self) -> bool:
        """Whether they hold the texts' embeddings too."""
        return self.precomputed and self._first_facts(self.kinds[0])[1] is not None

    @property
    def trajectories(self) -> dict | None:
        """What the shards say of the trajectories that are stored in them, None where they hold
        none. ValueError where those of images and of clips do not say the same."""
        if not self.precomputed:
            return None
        first, *others = (self._first_facts(kind)[0].trajectories for kind in self.kinds)
        if any(other != first for other in others):
            raise ValueError("the trajectories of images and of clips were not made alike")
        return first

    def _first_facts(self, kind: str) -> tuple[Facts, TextCondition | None]:
        first = self.shards[kind][0]
        return load_facts(read_facts(first), first.url)


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
    points: list[Point] | None = None  # of the samples' stored trajectories


class Position:
    """Which numbers of the endless order of samples a rank has taken and which come next.

    Micro-batch m of rank r of R is part m·R + r of the order. A rank that met broken samples is
    ahead of the others; on another number of ranks, `done` holds the numbers after `base` that were
    taken already, ascending, and `waiting` is dealt out anew.
    """

    def __init__(self, batch: int, rank: int = 0, ranks: int = 1):
        self.batch, self.rank, self.ranks = batch, rank, ranks
        self.base, self.taken = 0, 0
        self.done: list[int] = []
        self.waiting: list[int] = []  # taken, not broken, and in no batch yet

    def number(self, nth: int) -> int:
        """The number of this rank's nth sample since `base`."""
        part, row = divmod(nth, self.batch)
        free = (part * self.ranks + self.rank) * self.batch + row
        # Between base and done[i] lie done[i] - base - i numbers that are not done.
        passed = bisect_right(
            range(len(self.done)), free, key=lambda i: self.done[i] - self.base - i
        )
        return self.base + free + passed

    def state_dict(self) -> dict:
        return {
            name: list(value) if isinstance(value, list) else value
            for name, value in vars(self).items()
        }

    def load_state_dict(self, states: list[dict]) -> None:
        """Go on where the ranks of another run, or of this one, stood."""
        old = [Position(0) for _ in states]
        for position, state in zip(old, states, strict=True):
            vars(position).update({name: state[name] for name in vars(position)})
        mine = old[self.rank] if self.rank < len(old) else None
        if mine and (mine.ranks, mine.batch) == (self.ranks, self.batch):
            vars(self).update(vars(mine))
            return
        self.base = min(position.number(position.taken) for position in old)
        done = {number for number in old[0].done if number > self.base}
        for position in old:
            for nth in reversed(range(position.taken)):
                number = position.number(nth)
                if number < self.base:
                    break
                done.add(number)
        self.done = sorted(done)
        self.taken = 0
        self.waiting = [n for position in old for n in position.waiting][self.rank :: self.ranks]


class Order:
    """Where number g of the endless order lies: its kind, shard and place.

    The fraction p_motion_free + p_image of the numbers is images, spread evenly; of these as evenly
    the share of p_image is of one frame, the rest motion-free. Each kind runs through epochs that
    see each sample once: the shards are shuffled, then the samples of 64 shards at a time, so that
    no more are open at once.
    """

    def __init__(
        self, counts: dict[str, list[int]], p_motion_free: float, seed: int, p_image: float = 0.0
    ):
        self.counts, self.seed = counts, seed
        self.totals = {kind: sum(lengths) for kind, lengths in counts.items()}
        for kind, total in self.totals.items():
            if not total:
                raise ValueError(f"the shards of {kind} hold no samples")
        both = "clips" in counts and "images" in counts
        self.p_images = p_motion_free + p_image if both else float("clips" not in counts)
        self.p_single = p_image / self.p_images if both and p_image else 0.0
        self.locate = functools.lru_cache(maxsize=4096)(self._locate)
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffle_shards)
        self._group = functools.lru_cache(maxsize=4)(self._shuffle_samples)

    def _locate(self, number: int) -> tuple[str, int, int]:
        """Kind, shard and place in the shard of sample `number`."""
        # Of the first n samples exactly floor(p · n) are images.
        images = int(self.p_images * number)
        if int(self.p_images * (number + 1)) > images:
            kind, nth = "images", images
        else:
            kind, nth = "clips", number - images
        epoch, place = divmod(nth, self.totals[kind])
        ends, _ = self._epoch(kind, epoch)
        group = bisect_right(ends, place)
        shards, places = self._group(kind, epoch, group)
        nth = place - (ends[group - 1] if group else 0)
        return kind, int(shards[nth]), int(places[nth])

    def is_single(self, number: int) -> bool:
        """Whether sample `number` is an image among clips that stays one frame."""
        images = int(self.p_images * number)
        is_image = int(self.p_images * (number + 1)) > images
        return is_image and int(self.p_single * (images + 1)) > int(self.p_single * images)

    def _shuffle_shards(self, kind: str, epoch: int) -> tuple[list[int], list[list[int]]]:
        """After how many samples each group of shards ends, and the shards of each."""
        lengths = self.counts[kind]
        order = torch.randperm(len(lengths), generator=seeded(self.seed, kind, epoch)).tolist()
        step = SHUFFLED_TOGETHER
        groups = [order[first : first + step] for first in range(0, len(order), step)]
        return list(accumulate(sum(lengths[s] for s in group) for group in groups)), groups

    def _shuffle_samples(self, kind: str, epoch: int, group: int) -> tuple[Tensor, Tensor]:
        shards = self._epoch(kind, epoch)[1][group]
        lengths = torch.tensor([self.counts[kind][shard] for shard in shards])
        owners = torch.tensor(shards).repeat_interleave(lengths)
        places = torch.cat([torch.arange(length) for length in lengths.tolist()])
        generator = seeded(self.seed, kind, epoch, group)
        order = torch.randperm(len(owners), generator=generator)
        return owners[order], places[order]


class Reader:
    """Sample `number` of the order as a source has it, or why it is broken: a torch Dataset."""

    def __init__(self, source, order: Order, data: DataSettings):
        self.source, self.order, self.data = source, order, data
        self.size: tuple[int, int] | None = None  # that all samples must have

    def draw(self, number: int) -> tuple[torch.Generator, bool, int]:
        """What else is random of a sample: the generator, whether the text stays, the window."""
        kind, _, _ = self.order.locate(number)
        # The CPU generator reads 32 bits of its seed; an odd multiplier keeps numbers distinct.
        seed = (self.data.seed * 0x9E3779B1 + number) & 0xFFFFFFFF
        generator = torch.Generator().manual_seed(seed)
        keep = float(torch.rand((), generator=generator)) >= self.data.p_null
        window = int(torch.randint(self.source.windows(kind), (), generator=generator))
        return generator, keep, window

    def __getitem__(self, number: int) -> Sample | Broken:
        kind, shard, place = self.order.locate(number)
        _, _, window = self.draw(number)
        try:
            sample = self.source.read(kind, shard, place, window, number)
            if self.size and sample.size != self.size:
                raise other_size(sample.size, self.size)
            return sample
        except BrokenSample as error:
            where = self.data.shards[kind][shard]
            return Broken(error.cause, index(where).samples[place][0], where.url, error.detail)


class Loader:
    """Endless micro-batches of one rank.

    Texts are dropped with probability p_null. Each sample comes with `draws` pairs of timestep and
    noise, and as many draws of its posterior; with clips, images are repeated to T frames, or are
    the batches of one frame that p_image asks for. Samples of one size and length make a batch:
    until there are enough, they wait; without `size` and `buckets` all
    must be of one, and any other is broken. Broken ones are skipped, counted
    and logged; more than the share max_broken raise TooManyBroken. Timesteps come from min_timestep
    … max_timestep, and once `narrow` is False from all.
    """

    def __init__(
        self,
        data: DataSettings,
        source,
        counts: dict[str, list[int]],
        rank: int = 0,
        ranks: int = 1,
    ):
        self.data, self.source = data, source
        order = Order(counts, data.p_motion_free, data.seed, data.p_image)
        self.reader = Reader(source, order, data)
        self.position = Position(data.batch, rank, ranks)
        samples = sum(self.reader.order.totals.values())
        self.log = BrokenLog(data.log, data.max_broken, samples, rank)
        # By size, and whether they are single images among clips.
        self._buckets: dict[tuple[tuple[int, int], bool], list[tuple[int, Sample]]] = {}
        self._incoming: Iterator | None = None
        self.narrow = True

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        if self._incoming is None:
            self._incoming = self._read_ahead()
        while True:
            number, sample, is_new = next(self._incoming)
            if is_new:
                self.position.taken += 1
                self.log.seen += 1
                if isinstance(sample, Sample):
                    self.position.waiting.append(number)
            if isinstance(sample, Broken):
                self.log.add(sample)
                continue
            key = sample.size, self.reader.order.is_single(number)
            bucket = self._buckets.setdefault(key, [])
            bucket.append((number, sample))
            if len(bucket) == self.data.batch:
                batch = self._batch(bucket)
                taken = {number for number, _ in bucket}
                self.position.waiting = [n for n in self.position.waiting if n not in taken]
                bucket.clear()
                return batch

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """Latents (C, T, h, w) of one sample; of the largest bucket, if there are several."""
        sampling = self.data.sampling
        if sampling.buckets:
            size = max(sampling.buckets, key=lambda size: size[0] * size[1])
        else:
            size = sampling.size
        frames = self.data.frames if "clips" in self.data.kinds else 1
        if size is not None and not self.data.in_memory:
            channels, height, width = self.source.latent_size(size)
            return channels, frames, height, width
        if self._usual is None:
            raise ValueError(f"none of the first {FEW_SAMPLES} samples can be read")
        ((mean, _),) = self.source.posteriors([self._usual])
        return mean.shape[0], frames, *mean.shape[-2:]

    @functools.cached_property
    def _usual(self) -> Sample | None:
        """A sample of the size that the others have, too: the first, in the order of all ranks, of
        which there are two. None where there is none to be read."""
        numbers = range(min(FEW_SAMPLES, sum(self.reader.order.totals.values())))
        samples = map(Reader(self.source, self.reader.order, self.data).__getitem__, numbers)
        first: dict[tuple[int, int], Sample] = {}
        for sample in islice((s for s in samples if isinstance(s, Sample)), FEW_SIZES):
            if sample.size in first:
                return sample
            first[sample.size] = sample
        return next(iter(first.values()), None)

    def state_dict(self) -> dict:
        """This rank's place in the data, between micro-steps; JSON-able.

        Samples that wait for a batch of their size are read again.
        """
        return {
            "order": self._fingerprint(),
            "position": self.position.state_dict(),
            "broken": self.broken(),
            "seen": self.log.seen,
        }

    def load_state_dict(self, states: list[dict]) -> None:
        """Go on where a run stood: `states` are those of all its ranks, in rank order.

        Other ranks, or another batch, may go on: no sample of the epoch is lost or seen twice.
        """
        # Checkpoints of earlier versions have no p_image.
        given = {"p_image": 0.0} | states[0]["order"]
        if not given["p_motion_free"] + given["p_image"]:  # they counted images that none reads
            counted, read = given["samples"], self.reader.order.totals
            given["samples"] = {kind: n for kind, n in counted.items() if kind in read}
        for name, value in self._fingerprint().items():
            if given[name] != value:
                raise ValueError(
                    f"{name} was {given[name]} when the checkpoint was written, now {value}"
                )
        self.position.load_state_dict([state["position"] for state in states])
        # This rank's share of the counts; checkpoints of earlier versions have none.
        mine = states[self.position.rank :: self.position.ranks]
        if all("broken" in state for state in states):
            counts = [Counter(state["broken"]) for state in mine]
            self.log.causes = sum(counts, Counter())
            self.log.seen = sum(state["seen"] for state in mine)
        self._buckets, self._incoming = {}, None

    def broken(self) -> dict[str, int]:
        """This rank's skipped samples by cause, since the start of the run."""
        return dict(self.log.causes)

    def _fingerprint(self) -> dict:
        """What the order of samples depends on."""
        order = self.reader.order
        single = order.p_images * order.p_single
        return {
            "samples": order.totals,
            "seed": order.seed,
            "p_motion_free": order.p_images - single,
            "p_image": single,
        }

    def _read_ahead(self) -> Iterator[tuple[int, Sample | Broken, bool]]:
        """Samples in this rank's order, those that wait first; decoded in the background."""
        if self.data.size is None and not self.data.buckets and self._usual is not None:
            self.reader.size = self._usual.size
        waiting, first = list(self.position.waiting), self.position.taken

        def numbers() -> Iterator[int]:
            return chain(waiting, map(self.position.number, itertools.count(first)))

        workers = self.data.workers if self.source.in_background else 0
        ahead = max(2, 2 * self.data.batch // max(workers, 1))
        samples = background(self.reader, numbers(), workers, ahead)
        # numbers() is read ahead of the samples, this one beside them.
        for nth, (number, sample) in enumerate(zip(numbers(), samples, strict=False)):
            yield number, sample, nth >= len(waiting)

    def _batch(self, bucket: list[tuple[int, Sample]]) -> Batch:
        samples = [sample for _, sample in bucket]
        latents, noises, timesteps, keeps, stills = [], [], [], [], []
        posteriors = self.source.posteriors(samples)
        for (number, _), (mean, std) in zip(bucket, posteriors, strict=True):
            generator, keep, _ = self.reader.draw(number)
            data, draws = self.data, self.data.draws
            between = (data.min_timestep, data.max_timestep + 1) if self.narrow else (0, TIMESTEPS)
            timesteps.append(torch.randint(*between, (draws,), generator=generator))
            shape = draws, *mean.shape
            noise = torch.randn(shape, generator=generator).to(mean.device)
            drawn = mean.float() + std.float() * noise
            still = self.reader.order.locate(number)[0] == "images"
            single = self.reader.order.is_single(number)
            if still and not single and "clips" in self.data.kinds:  # each draw, to T frames
                drawn = drawn.expand(-1, -1, self.data.frames, -1, -1)
            latents.append(drawn)
            noises.append(torch.randn(drawn.shape, generator=generator))
            keeps.append(keep)
            stills.append(still)
        motion_free = torch.tensor(stills).repeat_interleave(self.data.draws)
        points = [sample.point for sample in samples]
        return Batch(
            torch.cat(latents),
            torch.cat(noises),
            torch.cat(timesteps),
            motion_free if "clips" in self.data.kinds else None,
            self.source.text(samples, keeps),
            None if None in points else points,
        )


def make_loader(
    data: DataSettings,
    vae: Path | None,
    tokenize: Callable[[list[str]], Tokens] | None,
    *,
    rank: int = 0,
    ranks: int = 1,
    device: str | torch.device = "cpu",
    patch: int = 1,
) -> Loader:
    """The micro-batches of one rank, in whichever way the shards and `in_memory` say.

    vae: an autoencoder's folder, which precomputed shards do without; where it is there, it must be
    theirs. tokenize may be None where they hold the texts' embeddings. patch: the model's patch
    size, which latents must be multiples of. Under torch.distributed the ranks share the work of
    the start, and wait for each other.
    """
    together = ranks if ranks > 1 and torch.distributed.is_initialized() else 1
    everything = [(kind, shard) for kind in data.kinds for shard in data.shards[kind]]
    for _, shard in everything[rank % together :: together]:
        count(shard)
    if together > 1:
        _wait_for_all()
    counts, cuts = {kind: [] for kind in data.kinds}, []
    for kind, shard in everything:
        samples, cut = count(shard)
        counts[kind].append(samples)
        if cut:
            cuts.append(
                Broken("shard cut off" if samples else "unreadable shard", "", shard.url, cut)
            )
    for kind in data.kinds:
        if not sum(counts[kind]):
            check_any_sample(data.shards[kind])
    if not data.precomputed:
        check_kinds(data.shards)
    if data.precomputed:
        source = LatentSource(data.shards, data.sampling, tokenize, patch, data.trajectories)
        is_there = vae is not None and (Path(vae) / "config.json").exists()
        if is_there and folder_digest(Path(vae)) != source.facts.vae:
            raise ValueError(f"the shards were precomputed by another autoencoder than {vae}")
    elif data.in_memory:
        source = MemorySource(_load_sets(data, Path(vae), rank, together, device), tokenize)
        for kind, latents in source.sets.items():
            if latents.counts != counts[kind]:
                raise ValueError(f"{kind} changed since they were encoded: remove their latents")
    else:
        source = PixelSource(data.shards, data.sampling, Path(vae), tokenize, device, patch)
    loader = Loader(data, source, counts, rank, ranks)
    if cuts and rank == 0:
        first = f"{cuts[0].shard} breaks off {cuts[0].detail}"
        print(f"{len(cuts)} of {len(everything)} shards break off: {first}", flush=True)
    for broken in cuts[rank::ranks]:
        loader.log.add(broken)
    return loader


def _load_sets(data: DataSettings, vae: Path, rank: int, ranks: int, device):
    paths = {
        kind: encode_shards(
            data.shards[kind], vae, data.sampling, rank % ranks, ranks, device, kind
        )
        for kind in data.kinds
    }
    if ranks > 1:
        _wait_for_all()
    return {kind: load_latents(paths[kind]) for kind in data.kinds}


def _wait_for_all() -> None:
    # What precedes may take hours, in which the others wait: not to be taken for a frozen rank.
    patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=2))
    torch.distributed.barrier(patient)


def background(dataset, places: Iterable, workers: int, ahead: int) -> Iterator:
    """dataset[place] for each place, in order, read by worker processes `ahead` places each; with
    no workers, here, when asked for."""
    if not workers:
        return map(dataset.__getitem__, places)
    reader = torch.utils.data.DataLoader(
        dataset,
        sampler=places,
        batch_size=None,
        num_workers=workers,
        collate_fn=packed,
        worker_init_fn=_leave_signals_to_the_parent,
        multiprocessing_context="fork",  # the dataset is shared, not copied
        prefetch_factor=ahead,
    )
    samples = iter(reader)
    # At its end Python would send the workers SIGTERM and wait for them.
    multiprocessing.util.Finalize(None, _kill, [samples._workers], exitpriority=10)
    return map(unpacked, samples)


def _kill(workers: list) -> None:
    for worker in workers:
        worker.kill()


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the process group is the trainer's: it still writes a checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
