"""VAE latents and text embeddings of WebDataset shards, once, into shards that training reads.

Each shard of images or clips becomes one of the same name in OUT: mean and standard deviation of
the latents, and of each text encoder the tokens' embeddings, their mask and the pooled vector, in
safetensors. Shards that are there are kept: the same command goes on where it was cut off, and two
at a time share the work. Under torchrun, deepspeed or srun each process makes its part of the
shards; with --ray each GPU of a cluster, or set of cores, makes one shard after another.

    python -m gentron_train.precompute "raw/clips-*.tar" latents/ --pipeline runs/t2i/pipeline
"""

import argparse
import sys
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from gentron_fast.commandline import (
    check_ray,
    check_writable,
    choose_device,
    rank_and_world,
    refuse,
    run,
    usable_device,
    whole_number,
)
from gentron_fast.files import claim, whole_file
from gentron_fast.model import TextCondition
from gentron_fast.on_ray import cluster, on_all
from gentron_fast.pipeline import shared_folder, stored_encoders
from gentron_fast.text import SUBFOLDERS, TextEncoder
from gentron_fast.threads import available_cores, settle_threads
from gentron_fast.vae import VideoVAE, check_finite
from gentron_train.data.broken import (
    BROKEN,
    FEW_SAMPLES,
    Broken,
    BrokenLog,
    BrokenSample,
    HeldLog,
    TooManyBroken,
    check_share,
    in_words,
)
from gentron_train.data.decode import Sampling
from gentron_train.data.loader import DataSettings, background
from gentron_train.data.options import DTYPES, parse_sizes
from gentron_train.data.shards import (
    PRECOMPUTED,
    Shard,
    check_any_sample,
    count,
    digest,
    find_shards,
    index,
    read,
    read_facts,
)
from gentron_train.data.sources import (
    ENCODED_AT_ONCE,
    Facts,
    encode,
    folder_digest,
    load_facts,
    pack_facts,
    pack_text,
    read_pixels,
    relevant_sampling,
)

# Shapes: S windows of a sample, T frames, H × W pixels.
NAME = "gentron_train.precompute"
MOST_WAITING = 256  # records held back by one of a rare size


@dataclass
class Record:
    """One sample on its way: pixels, uint8 (S, T, H, W, 3), then the files to be written."""

    shard: Shard
    key: str
    caption: str = ""
    pixels: Tensor | None = None
    files: dict[str, bytes] | None = None


class Decoder:
    """Sample (shard, number) with all its windows, or why it is broken: a torch Dataset."""

    def __init__(self, sampling: Sampling, multiple: int = 1):
        self.sampling, self.multiple = sampling, multiple

    def __getitem__(self, place: tuple[Shard, int]) -> tuple[Record, Broken | None]:
        shard, number = place
        key, _ = index(shard).samples[number]
        try:
            caption, pixels = read_pixels(shard, number, self.sampling, self.multiple)
            return Record(shard, key, caption, pixels), None
        except BrokenSample as error:
            # Kept in its place, so that the order of all others is that of the original.
            record = Record(shard, key, files=error.as_files())
            return record, Broken(error.cause, key, shard.url, error.detail)


class Encoder:
    """Records to the files of precomputed samples, several at a time."""

    def __init__(self, vae: VideoVAE, text_encoder: TextEncoder | None, device: str):
        self.vae, self.text_encoder, self.device = vae, text_encoder, device
        self.null = None if text_encoder is None else self._texts([""])[0]

    def _texts(self, captions: list[str]) -> list[TextCondition]:
        texts = self.text_encoder.encode(captions)
        for name, encoded in texts._asdict().items():
            if encoded is not None:
                check_finite(encoded.tokens, f"the tokens of the {name} encoder are")
        return [texts.select(slice(n, n + 1)) for n in range(len(captions))]

    def __call__(self, records: list[Record]) -> None:
        """Fill in the files of records of one size."""
        pixels = [window for record in records for window in record.pixels]
        posteriors = iter(encode(self.vae, pixels, self.device))
        captions = [record.caption for record in records]
        texts = self._texts(captions) if self.text_encoder else [None] * len(captions)
        for record, text in zip(records, texts, strict=True):
            windows = [next(posteriors) for _ in record.pixels]
            mean, std = (torch.stack(parts).cpu() for parts in zip(*windows, strict=True))
            tensors = {"mean": mean, "std": std} | (pack_text(text) if text else {})
            record.files = {"safetensors": save(tensors), "txt": record.caption.encode()}
            record.pixels = None


def encode_in_order(records: Iterator[Record], encoder: Encoder) -> Iterator[Record]:
    """The same records in the same order, each with its files.

    What is encoded together differs in the last bits from what is encoded alone, so that no samples
    of two shards are: a new shard is the same whatever is made before and behind it.
    """
    for _, own in groupby(records, key=lambda record: record.shard):
        yield from encode_shard(own, encoder)


def encode_shard(records: Iterator[Record], encoder: Encoder) -> Iterator[Record]:
    """Those of one size are encoded together."""
    waiting: deque[Record] = deque()
    groups: dict[torch.Size, list[Record]] = {}
    for record in records:
        waiting.append(record)
        if record.files is None:
            shape = record.pixels.shape
            group = groups.setdefault(shape, [])
            group.append(record)
            if len(group) * shape[0] * shape[1] >= ENCODED_AT_ONCE:
                encoder(groups.pop(shape))
        if len(waiting) > MOST_WAITING and waiting[0].files is None:
            encoder(groups.pop(waiting[0].pixels.shape))
        while waiting and waiting[0].files is not None:
            yield waiting.popleft()
    for group in groups.values():
        encoder(group)
    yield from waiting


@contextmanager
def new_shard(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    """A function that adds a file to a new tar, which gets its name when it is whole."""

    def add(name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), 0o644
        tar.addfile(entry, BytesIO(content))

    with whole_file(path) as partial, tarfile.open(partial, "w") as tar:
        yield add


@dataclass(frozen=True)
class Job:
    """A shard to be encoded: how many samples, and what the new one at `path` says of itself but
    for its source."""

    shard: Shard
    path: Path
    samples: int
    cut: str | None
    facts: Facts
    null: TextCondition | None

    def cut_cause(self) -> str | None:
        """What the counts call a shard that breaks off."""
        return self.cut and ("shard cut off" if self.samples else "unreadable shard")

    def content(self) -> bytes:
        """Of the new shard's member PRECOMPUTED."""
        return pack_facts(replace(self.facts, source=digest(self.shard)), self.null)

    def check_made(self) -> None:
        """ValueError where the new shard is there and was made otherwise, or of another source."""
        found = read_facts(Shard(str(self.path), self.path))
        # Earlier versions did not note the source.
        if found in (pack_facts(self.facts, self.null), self.content()):
            return
        what = "with other settings or models"
        if found is not None:
            facts, _ = load_facts(found, str(self.path))
            if facts.source != digest(self.shard) and replace(facts, source="") == self.facts:
                what = "when its content was another"
        raise ValueError(
            f"{self.path} was made from {self.shard.name} {what}: name another folder, or remove it"
        )


def new_paths(shards: list[Shard], out: Path) -> list[Path]:
    """Where the new shards lie; ValueError where two would be one, or one would be its source."""
    paths = [out / f"{shard.name}.tar" for shard in shards]
    taken = Counter(paths)
    for shard, path in zip(shards, paths, strict=True):
        if taken[path] > 1 or path.resolve() == shard.path.resolve():
            raise ValueError(f"{shard.url} would be written to {path} with another, or over itself")
    return paths


class ShardEncoder:
    """Models that are loaded once, and the new shards that they make."""

    def __init__(
        self,
        vae_folder: Path,
        text_encoder: TextEncoder | None,
        sampling: Sampling,
        *,
        workers: int = 2,
        device: str | torch.device = "cpu",
    ):
        vae = VideoVAE.from_pretrained(vae_folder).to(device)
        for size in sampling.buckets or ([sampling.size] if sampling.size else []):
            vae.check_size(*size, patch=1)
        if text_encoder is not None:
            text_encoder = text_encoder.to(device).eval()
        self.encoder, self.models = Encoder(vae, text_encoder, device), folder_digest(vae_folder)
        self.sampling, self.workers, self.vae = sampling, workers, vae

    def job(self, shard: Shard, path: Path) -> Job:
        """Of a new shard at `path`; makes the index of its source."""
        sampling = relevant_sampling(self.sampling, shard)
        facts = Facts(sampling, self.vae.latent_channels, self.vae.factor, self.models)
        return Job(shard, path, *count(shard), facts, self.encoder.null)

    def make(self, jobs: list[Job], log: BrokenLog, bar: tqdm) -> None:
        """Make what is missing; ValueError where what is there was made otherwise."""

        def decoded(places: Iterator[tuple[Shard, int]]) -> Iterator[Record]:
            decoder = Decoder(self.sampling, self.vae.factor)
            for record, broken in background(decoder, places, self.workers, ahead=4):
                log.seen += 1
                if broken:
                    log.add(broken)
                    bar.set_postfix(broken=log.causes.total())
                bar.update()
                yield record

        def encoded(places: Iterator[tuple[Shard, int]]) -> Iterator[Record]:
            return encode_in_order(decoded(places), self.encoder)

        begun = _make(jobs, encoded, log)
        for job in begun:  # one by one: who waits holds nothing that others wait for
            tqdm.write(f"waiting for {job.path}, which another process makes", file=sys.stderr)
            _make([job], encoded, log, wait=True)


def precompute(
    shards: list[Shard],
    out: Path,
    vae_folder: Path,
    text_encoder: TextEncoder | None,
    sampling: Sampling,
    *,
    workers: int = 2,
    device: str | torch.device = "cpu",
    max_broken: float = 0.05,
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, int]:
    """Encode the shards that `out` lacks, this rank every `ranks`-th; without a text encoder the
    captions only are kept beside the latents. Each is encoded by one process: what another one that
    runs at the same time has begun is waited for in the end.

    Returns the broken samples by cause; out/broken.jsonl names them. Raises ValueError where `out`
    holds other shards, TooManyBroken as training does.
    """
    paths = new_paths(shards, out)
    encoder = ShardEncoder(vae_folder, text_encoder, sampling, workers=workers, device=device)
    # Shared out before looking what is missing: ranks may look at different times.
    jobs = [encoder.job(*pair) for pair in list(zip(shards, paths, strict=True))[rank::ranks]]
    if not any(job.samples for job in jobs):
        check_any_sample(shards)
    for job in jobs:
        if job.path.exists():
            job.check_made()
    jobs = [job for job in jobs if not job.path.exists()]
    total = sum(job.samples for job in jobs)
    log = BrokenLog(out / "broken.jsonl", max_broken, total, rank)
    with tqdm(total=total, unit="sample", disable=rank != 0) as bar:
        encoder.make(jobs, log, bar)
    return dict(log.causes)


class RayWorker:
    """An actor on a Ray cluster: makes new shards of (url, path, room, new path), and tells their
    samples, and the broken ones by cause, as the new shard has them."""

    def __init__(self, args: argparse.Namespace, sampling: Sampling, device: str):
        models = load_models(args)
        workers = torch.get_num_threads() if args.workers is None else args.workers
        self.encoder = ShardEncoder(*models, sampling, workers=workers, device=device)
        self.log = HeldLog(args.out / "broken.jsonl", args.max_broken, FEW_SAMPLES)

    def __call__(self, pieces: list) -> list:
        results = []
        for url, path, room, new in pieces:
            job = self.encoder.job(Shard(url, Path(path), room), Path(new))
            if job.path.exists():
                job.check_made()
            try:
                with tqdm(disable=True) as bar:
                    self.encoder.make([job], self.log, bar)
            except TooManyBroken:
                self.log.release()
                raise
            self.log.release()
            results.append([job.samples, _broken_in(job)])
        return results


def _broken_in(job: Job) -> Counter[str]:
    """The broken samples of a shard that is made, by cause."""
    made = Shard(str(job.path), job.path)
    marked = [n for n, (_, files) in enumerate(index(made).samples) if BROKEN in files]
    found = [BrokenSample.from_file(read(made, number)[1][BROKEN]) for number in marked]
    causes = [broken.cause for broken in found]
    return Counter(causes + ([cause] if (cause := job.cut_cause()) else []))


def precompute_on_ray(
    shards: list[Shard], args: argparse.Namespace, sampling: Sampling
) -> dict[str, int]:
    """`precompute` by a Ray cluster, one shard after another on each GPU or set of cores.

    args: of the command line. Returns the broken samples by cause, those of shards that are there
    already among them. Raises as `precompute` does; TooManyBroken also at the end, by the samples
    of all shards.
    """
    args = argparse.Namespace(**vars(args))
    for name in ("pipeline", "vae", "out"):
        path = getattr(args, name)
        setattr(args, name, path and path.absolute())
    pieces = []
    for shard, new in zip(shards, new_paths(shards, args.out), strict=True):
        path = shard.path.absolute()
        pieces.append(
            [shard.url if shard.is_remote else str(path), str(path), shard.room, str(new)]
        )
    causes, seen, log = Counter(), 0, args.out / "broken.jsonl"
    gpus = None if args.device is None else args.device.type == "cuda"
    make = partial(RayWorker, args, sampling)
    with cluster(args.ray), tqdm(total=len(pieces), unit="shard") as bar:
        for _, (samples, broken) in on_all(make, pieces, gpus=gpus, cores=args.cores):
            seen, causes = seen + samples, causes + Counter(broken)
            bar.set_postfix(samples=seen, broken=causes.total())
            bar.update()
            check_share(causes, max(seen, FEW_SAMPLES), args.max_broken, log)
    if not seen:
        check_any_sample(shards)
    check_share(causes, seen, args.max_broken, log)
    return dict(causes)


def _make(
    jobs: list[Job],
    encoded: Callable[[Iterator[tuple[Shard, int]]], Iterator[Record]],
    log: BrokenLog,
    wait: bool = False,
) -> list[Job]:
    """Write the new shards of the jobs, but for those that another process is writing: these are
    returned, or, with `wait`, waited for."""
    claimed: deque[tuple[Job, Callable[[], None]]] = deque()
    others = []

    def places() -> Iterator[tuple[Shard, int]]:
        for job in jobs:
            give_back = claim(job.path, wait)
            if give_back is None:
                others.append(job)
                continue
            claimed.append((job, give_back))
            if job.path.exists():
                job.check_made()
                continue
            if cause := job.cut_cause():
                log.add(Broken(cause, "", job.shard.url, job.cut))
            yield from ((job.shard, number) for number in range(job.samples))

    def write(job: Job, records: Iterable[Record]) -> None:
        if job.path.exists():
            return
        with new_shard(job.path) as add:
            add(PRECOMPUTED, job.content())
            for record in records:
                for ending, file in record.files.items():
                    add(f"{record.key}.{ending}", file)

    def write_up_to(shard: Shard | None, records: Iterable[Record] = ()) -> None:
        """The claimed ones up to a shard's, to which the records belong: those before are empty."""
        while claimed:
            job, give_back = claimed[0]
            write(job, records if job.shard == shard else ())
            claimed.popleft()
            give_back()
            if job.shard == shard:
                return

    try:
        for shard, records in groupby(encoded(places()), key=lambda record: record.shard):
            write_up_to(shard, records)
        write_up_to(None)
    finally:
        for _, give_back in claimed:
            give_back()
    return others


def load_models(args: argparse.Namespace) -> tuple[Path, TextEncoder | None]:
    """The autoencoder's folder, and the text encoders unless --no-text."""
    folder = args.vae or (args.pipeline and shared_folder(args.pipeline) / "vae")
    if folder is None:
        raise ValueError("name an autoencoder: --vae, or --pipeline")
    if args.no_text:
        return folder, None
    pairs = {name: (source, source) for name in SUBFOLDERS if (source := getattr(args, name))}
    if not pairs and args.pipeline:
        pairs = stored_encoders(args.pipeline)
    if not pairs:
        raise ValueError("name text encoders, --clip and --t5 or --pipeline, or give --no-text")
    return folder, TextEncoder.from_pretrained(**pairs, dtype=DTYPES[args.dtype])


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, which is told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    interrupted = "stopped; the same command goes on"
    return run(NAME, lambda: _precompute(_parse_arguments(argv)), argv, interrupted)


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Write VAE latents and text embeddings of WebDataset shards to shards in OUT.",
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, width=100),
    )
    parser.error = refuse
    add = parser.add_argument
    add("shards", nargs="+", help="globs or URLs that WebDataset reads, of images and of clips")
    add("out", type=Path, help="folder for the new shards")
    add("--pipeline", type=Path, help="pipeline folder with autoencoder and text encoders")
    add("--vae", type=Path, help="autoencoder folder")
    add("--clip", help="CLIP: folder or hub name")
    add("--t5", help="T5: folder or hub name")
    add("--no-text", action="store_true", help="latents and captions only, no embeddings")
    add("--dtype", default="fp32", choices=list(DTYPES), help="of text encoders and embeddings")
    add("--size", metavar="HxW,…", help="pixels, 256 or HxW; of several the nearest in shape")
    add("--frames", type=int, default=8, help="frames of a clip")
    add("--fps", type=float, default=4.0, help="frames a second that are taken")
    add("--windows-per-clip", "--starts", type=int, default=2, help="random ones, that are encoded")
    add("--crop", default="center", choices=["center", "random"], help="which part is cut out")
    add("--workers", type=int, help="processes that decode, one a core without it")
    add("--device", type=usable_device, help="that encodes: cpu, cuda or cuda:N; a GPU if any")
    add("--ray", metavar="ADDRESS", help="on a Ray cluster: auto, local or HOST:PORT")
    add("--cores", type=whole_number(1), help="of each process on Ray, without GPUs a node's")
    add("--allow-pipes", action="store_true", help="URLs pipe:COMMAND, which run in a shell")
    add("--max-broken", type=float, default=0.05, help="share of broken samples that stops it")
    return parser.parse_args(argv)


def _precompute(args: argparse.Namespace) -> None:
    """Check the arguments, encode what is missing, and tell what there is."""
    sizes = () if args.size is None else parse_sizes("--size", args.size)
    check_ray(args)
    settle_threads()
    workers = available_cores() if args.workers is None else args.workers
    settings = DataSettings(  # checks the values
        size=sizes[0] if len(sizes) == 1 else None,
        buckets=sizes if len(sizes) > 1 else (),
        frames=args.frames,
        fps=args.fps,
        windows_per_clip=args.windows_per_clip,
        crop=args.crop,
        workers=workers,
        max_broken=args.max_broken,
    )
    rank, ranks = rank_and_world()
    if args.windows_per_clip < 1:
        raise ValueError(f"--windows-per-clip is {args.windows_per_clip}, must be at least 1")
    pipes = args.allow_pipes
    shards = [s for pattern in args.shards for s in find_shards(pattern, allow_pipes=pipes)]
    check_writable(new_paths(shards, args.out))
    if args.ray is not None:
        broken = precompute_on_ray(shards[rank::ranks], args, settings.sampling)
    else:
        broken = precompute(
            shards,
            args.out,
            *load_models(args),
            settings.sampling,
            workers=workers,
            device=args.device or choose_device(None),
            max_broken=args.max_broken,
            rank=rank,
            ranks=ranks,
        )
    causes = in_words(Counter(broken))
    print(f"{len(shards)} shards in {args.out}" + (f"; broken: {causes}" if causes else ""))
