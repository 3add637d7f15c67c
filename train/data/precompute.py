"""VAE latents and text embeddings of WebDataset shards, once, into shards that training reads.

Each shard of images or clips becomes one of the same name in OUT: mean and standard deviation of
the latents, and of each text encoder the tokens' embeddings, their mask and the pooled vector, in
safetensors. Shards that are there are kept: the same command goes on where it was cut off. With
RANK and WORLD_SIZE set, as torchrun does, each process makes its part of the shards.

    python -m gentron_train.precompute "raw/clips-*.tar" latents/ --pipeline runs/t2i/pipeline
"""

import argparse
import json
import os
import sys
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from gentron_fast.commandline import refuse
from gentron_fast.files import whole_file
from gentron_fast.model import TextCondition
from gentron_fast.text import SUBFOLDERS, TextEncoder
from gentron_fast.vae import VideoVAE
from gentron_train.data.broken import Broken, BrokenLog, BrokenSample
from gentron_train.data.decode import Sampling, read_caption, read_frames
from gentron_train.data.loader import DataSettings, background
from gentron_train.data.shards import PRECOMPUTED, Shard, count, find_shards, read, read_facts
from gentron_train.data.sources import (
    ENCODED_AT_ONCE,
    Facts,
    encode,
    folder_digest,
    pack_facts,
    pack_text,
    relevant_sampling,
    window_generator,
)

# Shapes: S windows of a sample, T frames, H × W pixels.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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

    def __init__(self, sampling: Sampling):
        self.sampling = sampling

    def __getitem__(self, place: tuple[Shard, int]) -> tuple[Record, Broken | None]:
        shard, number = place
        key, files = read(shard, number)
        try:
            caption = read_caption(files)
            generator = window_generator(self.sampling, shard.name, number)
            pixels = read_frames(files, self.sampling, generator)
            return Record(shard, key, caption, pixels), None
        except BrokenSample as error:
            # Kept in its place, so that the order of all others is that of the original.
            content = json.dumps([error.cause, error.detail]).encode()
            record = Record(shard, key, files={"broken.json": content})
            return record, Broken(error.cause, key, shard.url, error.detail)


class Encoder:
    """Records to the files of precomputed samples, several at a time."""

    def __init__(self, vae: VideoVAE, text_encoder: TextEncoder | None, device: str):
        self.vae, self.text_encoder, self.device = vae, text_encoder, device
        self.null = None if text_encoder is None else self._texts([""])[0]

    def _texts(self, captions: list[str]) -> list[TextCondition]:
        texts = self.text_encoder.encode(captions)
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
    """The same records in the same order, each with its files; those of one size are encoded
    together."""
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


def precompute(
    shards: list[Shard],
    out: Path,
    vae_folder: Path,
    text_encoder: TextEncoder | None,
    sampling: Sampling,
    *,
    workers: int = 2,
    device: str = "cpu",
    max_broken: float = 0.05,
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, int]:
    """Encode the shards that `out` lacks, this rank every `ranks`-th; without a text encoder the
    captions only are kept beside the latents.

    Returns the broken samples by cause; out/broken.jsonl names them. Raises ValueError where `out`
    holds other shards, TooManyBroken as training does.
    """
    paths = [out / f"{shard.name}.tar" for shard in shards]
    for shard, path in zip(shards, paths, strict=True):
        if paths.count(path) > 1 or path.resolve() == shard.path.resolve():
            raise ValueError(f"{shard.url} would be written to {path} with another, or over itself")
    vae = VideoVAE.from_pretrained(vae_folder).to(device)
    for size in sampling.buckets or ([sampling.size] if sampling.size else []):
        vae.check_size(*size, patch=1)
    if text_encoder is not None:
        text_encoder = text_encoder.to(device).eval()
    encoder, digest = Encoder(vae, text_encoder, device), folder_digest(vae_folder)
    # Shared out before looking what is missing: ranks may look at different times.
    mine = list(zip(shards, paths, strict=True))[rank::ranks]
    missing = [(shard, path) for shard, path in mine if not path.exists()]
    counts = [count(shard) for shard, _ in mine]
    facts = [
        pack_facts(
            Facts(relevant_sampling(sampling, shard), vae.latent_channels, vae.factor, digest),
            encoder.null,
        )
        for shard, _ in mine
    ]
    for (shard, path), expected in zip(mine, facts, strict=True):
        if path.exists() and read_facts(Shard(str(path), path)) != expected:
            raise ValueError(
                f"{path} was made from {shard.name} with other settings or models: "
                "name another folder"
            )
    jobs = [job for job in zip(mine, counts, facts, strict=True) if job[0] in missing]
    log = BrokenLog(
        out / "broken.jsonl", max_broken, sum(samples for _, (samples, _), _ in jobs), rank
    )
    for (shard, _), (samples, cut), _ in jobs:
        if cut:
            log.add(Broken("shard cut off" if samples else "unreadable shard", "", shard.url, cut))
    places = [(shard, n) for (shard, _), (samples, _), _ in jobs for n in range(samples)]
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(places), unit="sample", disable=rank != 0) as bar:

        def decoded() -> Iterator[Record]:
            for record, broken in background(Decoder(sampling), places, workers, ahead=4):
                log.seen += 1
                if broken:
                    log.add(broken)
                    bar.set_postfix(broken=log.causes.total())
                yield record

        records = encode_in_order(decoded(), encoder)
        for (_, path), (samples, _), content in jobs:
            with new_shard(path) as add:
                add(PRECOMPUTED, content)
                for record in islice(records, samples):
                    for ending, file in record.files.items():
                        add(f"{record.key}.{ending}", file)
                    bar.update()
    return dict(log.causes)


def load_models(args: argparse.Namespace) -> tuple[Path, TextEncoder | None]:
    """The autoencoder's folder, and the text encoders unless --no-text."""
    folder = args.vae or (args.pipeline and args.pipeline / "vae")
    if folder is None:
        raise ValueError("name an autoencoder: --vae, or --pipeline")
    if args.no_text:
        return folder, None
    pairs = {name: (source, source) for name in SUBFOLDERS if (source := getattr(args, name))}
    if not pairs and args.pipeline:
        folders = {n: [args.pipeline / part for part in SUBFOLDERS[n]] for n in SUBFOLDERS}
        pairs = {name: tuple(pair) for name, pair in folders.items() if pair[0].exists()}
    if not pairs:
        raise ValueError("name text encoders, --clip and --t5 or --pipeline, or give --no-text")
    return folder, TextEncoder.from_pretrained(**pairs, dtype=DTYPES[args.dtype])


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """ "HEIGHTxWIDTH", or several with commas between them."""
    try:
        return tuple(
            (int(height), int(width))
            for height, width in (part.split("x") for part in text.split(","))
        )
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}, wanted HxW or several: 512x512,384x640"
        ) from None


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, which is told in one line; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="gentron_train.precompute",
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
    add("--size", type=parse_sizes, metavar="HxW,…", help="pixels; of several the nearest in shape")
    add("--frames", type=int, default=8, help="frames of a clip")
    add("--fps", type=float, default=4.0, help="frames a second that are taken")
    add("--windows-per-clip", "--starts", type=int, default=2, help="random ones, that are encoded")
    add("--crop", default="center", choices=["center", "random"], help="which part is cut out")
    add("--workers", type=int, default=os.cpu_count(), help="processes that decode")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that encodes")
    add("--max-broken", type=float, default=0.05, help="share of broken samples that stops it")
    try:
        args = parser.parse_args(argv)
        sizes = args.size or ()
        settings = DataSettings(  # checks the values
            size=sizes[0] if len(sizes) == 1 else None,
            buckets=sizes if len(sizes) > 1 else (),
            frames=args.frames,
            fps=args.fps,
            windows_per_clip=args.windows_per_clip,
            crop=args.crop,
            workers=args.workers,
            max_broken=args.max_broken,
        )
        if args.windows_per_clip < 1:
            raise ValueError(f"--windows-per-clip is {args.windows_per_clip}, must be at least 1")
        shards = [shard for pattern in args.shards for shard in find_shards(pattern)]
        broken = precompute(
            shards,
            args.out,
            *load_models(args),
            settings.sampling,
            workers=args.workers,
            device=args.device,
            max_broken=args.max_broken,
            rank=int(os.environ.get("RANK", 0)),
            ranks=int(os.environ.get("WORLD_SIZE", 1)),
        )
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; the same command goes on", file=sys.stderr)
        return 130
    causes = ", ".join(f"{number} {cause}" for cause, number in broken.items())
    print(f"{len(shards)} shards in {args.out}" + (f"; broken: {causes}" if causes else ""))
    return 0
