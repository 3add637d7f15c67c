"""Where samples come from: pixels encoded on the fly, precomputed latents, latents in memory.

Each source reads one sample (in a background process, but for latents in memory), then turns a list
of them into posteriors and texts (in the training process). All draw a sample's windows alike and
hold posteriors in fp16, so that the same seed gives the same loss from any of them; but latents in
memory are encoded in bf16, which a CPU does in a fraction of the time.
"""
# Shapes: N samples, S windows, B batch, C channels, T frames, h × w latents, H × W pixels.

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor
from tqdm import tqdm

from gentron_fast.files import whole_file
from gentron_fast.index import parts_folder
from gentron_fast.model import EncodedText, TextCondition
from gentron_fast.pipeline import SCHEDULER_PATH
from gentron_fast.text import SUBFOLDERS, Tokens
from gentron_fast.vae import VideoVAE, check_finite
from gentron_train.data.broken import BROKEN, BrokenSample, broken_by, in_words
from gentron_train.data.decode import ENDINGS, Sampling, read_caption, read_frames
from gentron_train.data.shards import Shard, count, digest, index, read, read_facts

ENCODED_AT_ONCE = 64  # frames
FORMAT = 1  # of precomputed shards
READ_AT_ONCE = 2**24  # bytes
EMBEDDED_AT_ONCE = 16  # captions
MOST_EMBEDDED = 2**31  # bytes of texts' embeddings in memory
POINT = "trajectory."  # before the names of a stored trajectory's tensors
Posterior = tuple[Tensor, Tensor]  # mean and standard deviation, fp16


class Point(NamedTuple):
    """Where a teacher's sampling passed: latents and its guided noise for them, each (C, T, h, w),
    timestep () and guidance (2,), λ_T and λ_M."""

    latents: Tensor
    noise: Tensor
    timestep: Tensor
    guidance: Tensor


@dataclass
class Sample:
    """One sample as read: pixels, uint8 (T, H, W, 3), or a posterior, each (C, T, h, w).

    text is the caption, the row of it among all, or its embeddings (a TextCondition of one).
    """

    text: str | int | TextCondition
    pixels: Tensor | None = None
    posterior: Posterior | None = None
    point: Point | None = None  # one of a trajectory that was stored with it

    @property
    def size(self) -> tuple[int, int]:
        """H × W, or h × w: samples of one size make a batch."""
        return tuple(self.pixels.shape[1:3] if self.posterior is None else self.mean.shape[-2:])

    @property
    def mean(self) -> Tensor:
        return self.posterior[0]


def seeded(*key: object) -> torch.Generator:
    """A generator whose stream depends on the key only."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def window_generator(sampling: Sampling, shard: str, number: int) -> torch.Generator:
    """What the windows of sample `number` of a shard are drawn from."""
    return seeded(sampling.seed, number, shard)


def read_pixels(
    shard: Shard,
    number: int,
    sampling: Sampling,
    multiple: int,
    kind: str | None = None,
    window: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[str, Tensor]:
    """Caption and frames (S, T, H, W, 3) of sample `number` of a shard, as `read_frames` has them.

    H and W must be multiples of `multiple`. Without a generator the windows are those that belong
    to the sample. Raises BrokenSample.
    """
    _, files = read(shard, number)
    caption = read_caption(files)
    if generator is None:
        generator = window_generator(sampling, shard.name, number)
    frames = read_frames(files, sampling, generator, window, kind)
    height, width = frames.shape[2:4]
    if height % multiple or width % multiple:
        raise BrokenSample(
            "size that does not fit (--size makes it fit)",
            f"{height}x{width} pixels, wanted multiples of {multiple}",
        )
    return caption, frames


def other_size(size: Sequence[int], usual: Sequence[int]) -> BrokenSample:
    """That a sample is of another (H, W), or (h, w), than the others."""
    return BrokenSample(
        "another size than others (--size or --buckets makes them fit)",
        f"{'x'.join(map(str, size))}, others are {'x'.join(map(str, usual))}",
    )


def kinds_in(shard: Shard) -> set[str]:
    """What a shard of pixels holds: "images", "clips", both or neither."""
    endings = {ending for _, files in index(shard).samples for ending in files}
    return {kind for kind, known in ENDINGS.items() if endings & set(known)}


def check_kinds(shards: dict[str, list[Shard]]) -> None:
    """ValueError where a kind's first shard of pixels with samples holds only the other kind."""
    for kind, named in shards.items():
        first = next((shard for shard in named if count(shard)[0]), None)
        found = first and kinds_in(first)
        if found and kind not in found:
            raise ValueError(_other_kind(kind, first))


def _other_kind(kind: str, shard: Shard) -> str:
    (other,) = ENDINGS.keys() - {kind}
    return f"--{kind} names {shard.url}, which holds {other} and no {kind}"


@torch.no_grad()
def encode(
    vae: VideoVAE, pixels: list[Tensor], device: str | torch.device, bf16: bool = False
) -> list[Posterior]:
    """Frames, uint8 (T, H, W, 3) of one H × W and any T each, to posteriors (C, T, h, w).

    In fp32 what is encoded together changes less than the fp16 of the result shows. ValueError
    where numbers come out that are none: pixels cannot be the reason.
    """
    lengths = [len(frames) for frames in pixels]
    frames = torch.cat(pixels).movedim(-1, 1)[:, :, None].to(device).float() / 127.5 - 1
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        posterior = vae.encode(frames, slice_frames=ENCODED_AT_ONCE)
    halves = [part.half()[:, :, 0] for part in posterior]
    for part in halves:
        check_finite(part, "the autoencoder's latents, in fp16, are")
    means, stds = (part.split(lengths) for part in halves)
    return [(m.movedim(0, 1), s.movedim(0, 1)) for m, s in zip(means, stds, strict=True)]


class PixelSource:
    """Shards of images and clips, decoded in the background and encoded as they come."""

    in_background = True

    def __init__(
        self,
        shards: dict[str, list[Shard]],
        sampling: Sampling,
        vae: Path,
        tokenize: Callable[[list[str]], Tokens],
        device: torch.device,
        patch: int = 1,
    ):
        self.shards, self.sampling, self.tokenize, self.device = shards, sampling, tokenize, device
        self.vae = VideoVAE.from_pretrained(vae).to(device)
        self.multiple = self.vae.factor * patch
        for size in sampling.buckets or ([sampling.size] if sampling.size else []):
            self.vae.check_size(*size, patch)

    def windows(self, kind: str) -> int:
        return self.sampling.windows(kind)

    def read(self, kind: str, shard: int, number: int, window: int, position: int) -> Sample:
        shard, generator = self.shards[kind][shard], None
        if not self.sampling.starts:
            generator = seeded(self.sampling.seed, "window", position)
        caption, frames = read_pixels(
            shard, number, self.sampling, self.multiple, kind, window, generator
        )
        return Sample(caption, pixels=frames[0])

    def posteriors(self, samples: list[Sample]) -> list[Posterior]:
        return encode(self.vae, [sample.pixels for sample in samples], self.device)

    def text(self, samples: list[Sample], keep: list[bool]) -> Tokens:
        return self.tokenize(
            [sample.text if kept else "" for sample, kept in zip(samples, keep, strict=True)]
        )

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of H × W pixels."""
        height, width = (side // self.vae.factor for side in size)
        return self.vae.latent_channels, height, width


@dataclass(frozen=True)
class Facts:
    """What a precomputed shard says of itself, beside the null text's embeddings."""

    sampling: dict  # of Sampling, what matters to the shard's kind
    channels: int  # of the latents
    factor: int  # pixels per latent along each side
    vae: str  # digest of its folder
    format: int = FORMAT
    source: str = ""  # digest of the shard that it was made of; earlier versions have none
    # With trajectories: their teacher's digest, and the settings that they were sampled with.
    trajectories: dict | None = None


class LatentSource:
    """Precomputed shards: posteriors and, unless they were left out, text embeddings; with
    `trajectories` (of Facts), a point of each sample's too, in shards that say the same of them."""

    in_background = True

    def __init__(
        self,
        shards: dict[str, list[Shard]],
        sampling: Sampling,
        tokenize: Callable[[list[str]], Tokens] | None,
        patch: int = 1,
        trajectories: dict | None = None,
    ):
        self.shards, self.tokenize, self.sampling, self.patch = shards, tokenize, sampling, patch
        self.trajectories = trajectories
        self._said = functools.cache(self._trajectories_of)
        for kind, named in shards.items():
            nth = next((n for n, shard in enumerate(named) if count(shard)[0]), 0)
            first = named[nth]
            content = read_facts(first)
            if content is None:
                raise ValueError(f"{first.url} is not precomputed, other shards of this run are")
            self.facts, self.null = load_facts(content, first.url)
            if not self._holds(kind, nth):
                raise ValueError(_other_kind(kind, first))
            _check_sampling(sampling, self.facts, first.url)
        if self.null is None and tokenize is None:
            raise ValueError(f"{first.url} holds no text embeddings, and there is no text encoder")

    def _holds(self, kind: str, shard: int) -> bool:
        """False where the latents of a shard are all of the other kind."""
        if (kind == "clips") == ("frames" in self.facts.sampling):
            return True
        causes = set()
        for number in range(count(self.shards[kind][shard])[0]):
            try:
                self.read(kind, shard, number, 0, 0)
                return True
            except BrokenSample as error:
                causes.add(error.cause)
        return f"no {kind[:-1]}" not in causes

    def windows(self, kind: str) -> int:
        return self.sampling.windows(kind)

    def read(self, kind: str, shard: int, number: int, window: int, position: int) -> Sample:
        _, files = read(self.shards[kind][shard], number)
        with broken_by("unreadable latents"):
            if BROKEN in files:
                raise BrokenSample.from_file(files[BROKEN])
            tensors = load(files["safetensors"])
            posterior = tensors["mean"][window].clone(), tensors["std"][window].clone()
            self._check(kind, *posterior)
            if self.null is None:
                return Sample(read_caption(files), posterior=posterior)
            text = unpack_text(tensors)
            TextCondition.cat([text, self.null])  # as it will be in a batch
            if self.trajectories is None:
                return Sample(text, posterior=posterior)
            if self._said(kind, shard) != self.trajectories:
                raise BrokenSample("no trajectories, or others than the first shard's")
            point = _one_point(tensors, seeded(self.sampling.seed, "point", position))
            self._check(kind, point.latents, point.noise)
            return Sample(text, posterior=posterior, point=point)

    def _trajectories_of(self, kind: str, shard: int) -> dict | None:
        named = self.shards[kind][shard]
        content = read_facts(named)
        return None if content is None else load_facts(content, named.url)[0].trajectories

    def _check(self, kind: str, mean: Tensor, std: Tensor) -> None:
        """BrokenSample where latents do not fit others of their kind, or the model."""
        channels, frames, height, width = mean.shape
        if mean.shape != std.shape or channels != self.facts.channels:
            raise BrokenSample("unreadable latents", f"{tuple(mean.shape)}, {tuple(std.shape)}")
        if frames != (1 if kind == "images" else self.sampling.frames):
            raise BrokenSample(f"no {kind[:-1]}", f"latents of {frames} frames")
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise BrokenSample("latents that are not finite")
        sizes = self.sampling.buckets or filter(None, [self.sampling.size])
        wanted = [tuple(side // self.facts.factor for side in size) for size in sizes]
        if wanted and (height, width) not in wanted:
            detail = f"latents of {height}x{width}, wanted {wanted}"
            raise BrokenSample("another size than this run has", detail)
        if height % self.patch or width % self.patch:
            detail = f"latents of {height}x{width}, wanted multiples of {self.patch}"
            raise BrokenSample("size that does not fit", detail)

    def posteriors(self, samples: list[Sample]) -> list[Posterior]:
        return [sample.posterior for sample in samples]

    def text(self, samples: list[Sample], keep: list[bool]) -> Tokens | TextCondition:
        if self.null is None:
            return PixelSource.text(self, samples, keep)
        pairs = zip(samples, keep, strict=True)
        return TextCondition.cat([sample.text if kept else self.null for sample, kept in pairs])

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int, int]:
        height, width = (side // self.facts.factor for side in size)
        return self.facts.channels, height, width


def _check_sampling(wanted: Sampling, facts: Facts, url: str) -> None:
    if facts.format != FORMAT:
        raise ValueError(f"{url} is of format {facts.format}, this version reads {FORMAT}")
    given = json.loads(json.dumps(asdict(wanted)))
    for name, value in facts.sampling.items():
        if given[name] != value:
            raise ValueError(
                f"{url} was precomputed with {name} {value}, this run has {given[name]}"
            )


def relevant_sampling(sampling: Sampling, shard: Shard) -> dict:
    """The fields of `sampling` that the latents of a shard depend on."""
    fields = json.loads(json.dumps(asdict(sampling)))
    if "clips" not in kinds_in(shard):
        del fields["frames"], fields["fps"]
        if sampling.crop == "center":
            del fields["starts"]
    return fields


def pack_facts(facts: Facts, null: TextCondition | None) -> bytes:
    """The content of a shard's member PRECOMPUTED."""
    values = {name: value for name, value in asdict(facts).items() if value not in ("", None)}
    tensors = {"facts": torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)}
    return save(tensors | (pack_text(null) if null is not None else {}))


def load_facts(content: bytes, url: str) -> tuple[Facts, TextCondition | None]:
    """A precomputed shard's facts and null text."""
    try:
        tensors = load(content)
        facts = Facts(**json.loads(bytes(tensors["facts"].tolist())))
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{url} is no shard of precomputed latents: {error}") from error
    return facts, unpack_text(tensors) if len(tensors) > 1 else None


def pack_text(text: TextCondition) -> dict[str, Tensor]:
    """A TextCondition of one caption as tensors without the batch axis and without padding."""
    tensors = {}
    for name, encoded in text._asdict().items():
        if encoded is not None:
            tokens, mask, pooled = encoded.trim()
            tensors |= {f"{name}.tokens": tokens[0], f"{name}.mask": mask[0]}
            tensors |= {} if pooled is None else {f"{name}.pooled": pooled[0]}
    return {key: value.contiguous().cpu() for key, value in tensors.items()}


def unpack_text(tensors: dict[str, Tensor]) -> TextCondition:
    """What `pack_text` made, as a TextCondition of one caption."""
    encoders = {}
    for name in TextCondition._fields:
        if f"{name}.tokens" in tensors:
            parts = (tensors.get(f"{name}.{part}") for part in EncodedText._fields)
            encoders[name] = EncodedText(*(None if p is None else p[None].clone() for p in parts))
    return TextCondition(**encoders)


def pack_points(points: list[Point]) -> dict[str, Tensor]:
    """Points of one trajectory as tensors, latents and noise in fp16."""
    columns = (torch.stack(column) for column in zip(*points, strict=True))
    tensors = dict(zip(Point._fields, columns, strict=True))
    for name in ("latents", "noise"):
        tensors[name] = tensors[name].half()
        check_finite(tensors[name], f"a teacher's {name}, in fp16, are")
    return {f"{POINT}{name}": tensor for name, tensor in tensors.items()}


def _one_point(tensors: dict[str, Tensor], generator: torch.Generator) -> Point:
    """One of those that `pack_points` packed."""
    columns = [tensors[f"{POINT}{name}"] for name in Point._fields]
    number = int(torch.randint(len(columns[0]), (), generator=generator))
    return Point(*(column[number].clone() for column in columns))


@dataclass(frozen=True)
class LatentSet:
    """Posteriors in memory, one kind's: mean and std (N, S, C, T, h, w) in 16 bits, N captions.

    counts: samples of each shard; broken: cause, key and detail of rows that hold nothing.
    """

    mean: Tensor
    std: Tensor
    captions: list[str]
    counts: list[int] = field(default_factory=list)
    broken: dict[int, tuple[str, str, str]] = field(default_factory=dict)

    def __post_init__(self):
        if not self.counts:
            self.counts.append(len(self.captions))

    def __len__(self) -> int:
        return len(self.captions)


class MemorySource:
    """Latents in memory; each caption is tokenised once, and with `embed` encoded once."""

    in_background = False

    def __init__(self, sets: dict[str, LatentSet], tokenize: Callable[[list[str]], Tokens]):
        self.sets = sets
        rows = {"": 0}  # the null text's is the first
        self.rows = {
            kind: [rows.setdefault(caption, len(rows)) for caption in latents.captions]
            for kind, latents in sets.items()
        }
        self.tokens = tokenize(list(rows))
        self.embeddings: list[TextCondition] | None = None
        self.offsets = {
            kind: [sum(latents.counts[:n]) for n in range(len(latents.counts))]
            for kind, latents in sets.items()
        }

    def windows(self, kind: str) -> int:
        return self.sets[kind].mean.shape[1]

    def read(self, kind: str, shard: int, number: int, window: int, position: int) -> Sample:
        row, latents = self.offsets[kind][shard] + number, self.sets[kind]
        if row in latents.broken:
            cause, _, detail = latents.broken[row]
            raise BrokenSample(cause, detail)
        posterior = latents.mean[row, window], latents.std[row, window]
        return Sample(self.rows[kind][row], posterior=posterior)

    def posteriors(self, samples: list[Sample]) -> list[Posterior]:
        return [sample.posterior for sample in samples]

    @torch.no_grad()
    def embed(self, encode: Callable[[Tokens], TextCondition], hidden: bool = False) -> None:
        """Have each text encoded now, once, and its embeddings in the batches; not where all would
        take more than MOST_EMBEDDED bytes. hidden: without a progress bar."""
        lengths = sum(mask.sum(1) for _, mask in self.tokens.values())
        order = lengths.argsort(descending=True, stable=True)
        embeddings = [TextCondition()] * len(order)
        batches = order.split(EMBEDDED_AT_ONCE)
        for rows in tqdm(batches, desc="texts", unit="batch", leave=False, disable=hidden):
            batch = encode(select_tokens(self.tokens, rows)).to("cpu")
            size = sum(
                tensor.nbytes for part in batch if part for tensor in part if tensor is not None
            )
            if size * int(lengths.sum()) > MOST_EMBEDDED * int(lengths[rows].sum()):
                return
            for row, text in zip(rows.tolist(), batch.split(), strict=True):
                embeddings[row] = text
        self.embeddings = embeddings

    def text(self, samples: list[Sample], keep: list[bool]) -> Tokens | TextCondition:
        pairs = zip(samples, keep, strict=True)
        rows = [sample.text if kept else 0 for sample, kept in pairs]
        if self.embeddings is not None:
            return TextCondition.cat([self.embeddings[row] for row in rows])
        return select_tokens(self.tokens, torch.tensor(rows))


def select_tokens(tokens: Tokens, rows: Tensor, multiple: int = 8) -> Tokens:
    """Rows of tokenised captions, cut to the longest of them, rounded up to a multiple."""
    return {name: _cut(ids[rows], mask[rows], multiple) for name, (ids, mask) in tokens.items()}


def _cut(ids: Tensor, mask: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    longest = -(-int(mask.sum(1).max()) // multiple) * multiple
    return ids[:, :longest], mask[:, :longest]


def folder_digest(folder: Path, start: bytes = b"") -> str:
    """Digest of a model folder's configuration and weights."""
    digest = hashlib.sha256(start)
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            while part := file.read(READ_AT_ONCE):
                digest.update(part)
    return digest.hexdigest()[:12]


def pipeline_digest(folder: Path) -> str:
    """Digest of all that a pipeline folder's clips depend on, but for steps and guidance."""
    parts = parts_folder(folder)
    texts = [parts / model for model, _ in SUBFOLDERS.values()]
    models = [folder / "transformer", parts / "vae", *(text for text in texts if text.is_dir())]
    digests = [folder_digest(model).encode() for model in models]
    digest = hashlib.sha256(b"".join([*digests, (parts / SCHEDULER_PATH).read_bytes()]))
    return digest.hexdigest()[:12]


def latents_path(
    shard: Path, vae_folder: Path, sampling: Sampling, kind: str | None = None
) -> Path:
    """Where a shard's latents lie: the name holds a digest of the VAE and of the sampling, and of
    the kind where the shard holds both."""
    facts, plain = asdict(sampling), asdict(Sampling())
    for name in ("size", "buckets", "crop"):
        if facts[name] == plain[name]:
            del facts[name]
    facts |= {"kind": kind} if kind else {}
    name = folder_digest(vae_folder, json.dumps(facts, sort_keys=True).encode())
    return shard.with_name(f"{shard.stem}.latents-{name}.safetensors")


def encode_shards(
    shards: list[Shard],
    vae_folder: Path,
    sampling: Sampling,
    rank: int = 0,
    ranks: int = 1,
    device: str | torch.device = "cpu",
    kind: str | None = None,
) -> list[Path]:
    """Encode the "images" or "clips" of the shards whose latents are missing or of another shard of
    that name, this rank every `ranks`-th of them.

    Returns every shard's latents file; other ranks' may not be there yet. A run that was cut off
    goes on where it was.
    """
    paths = [
        latents_path(shard.path, vae_folder, sampling, kind if len(kinds_in(shard)) > 1 else None)
        for shard in shards
    ]
    pairs = list(zip(shards, paths, strict=True))
    # Shared out before looking what is missing: ranks may look at different times.
    mine = [(shard, path) for shard, path in pairs[rank::ranks] if not _are_latents_of(path, shard)]
    if mine:
        vae = VideoVAE.from_pretrained(vae_folder).to(device)
        with tqdm(mine, desc="latents", unit="shard", disable=rank != 0) as bar:
            for shard, path in bar:
                _encode_shard(shard, path, vae, sampling, device, kind)
    return paths


def _are_latents_of(path: Path, shard: Shard) -> bool:
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        source = file.metadata().get("source")  # earlier versions wrote none
    return source is None or source == digest(shard)


def _encode_shard(
    shard: Shard, path: Path, vae: VideoVAE, sampling: Sampling, device, kind: str | None
) -> None:
    pixels, captions, broken = {}, [], {}
    for number in range(count(shard)[0]):
        key, _ = index(shard).samples[number]
        try:
            caption, pixels[number] = read_pixels(shard, number, sampling, vae.factor, kind)
        except BrokenSample as error:
            broken[number] = (error.cause, key, error.detail)
            caption = ""
        captions.append(caption)
    shape = _usual_shape(windows.shape for windows in pixels.values())
    for number, windows in list(pixels.items()):
        if windows.shape != shape:
            key, error = index(shard).samples[number][0], other_size(windows.shape[2:4], shape[2:4])
            broken[number] = (error.cause, key, error.detail)
            del pixels[number]
    posteriors = []
    for group in _groups(list(pixels.values())):
        parts = encode(vae, [w for windows in group for w in windows], device, bf16=True)
        posteriors += [tuple(part.cpu() for part in pair) for pair in parts]
    rows = torch.tensor(list(pixels))
    # Of a shard without a whole sample the shape is that of others.
    tensors = {name: torch.zeros(len(captions)) for name in ("mean", "std")}
    for name, parts in zip(tensors, zip(*posteriors, strict=True), strict=False):
        whole = torch.stack(parts).unflatten(0, (len(pixels), -1))
        tensors[name] = whole.new_zeros(len(captions), *whole.shape[1:]).index_copy_(0, rows, whole)
    facts = {"captions": json.dumps(captions), "broken": json.dumps(broken)}
    facts["source"] = digest(shard)
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=facts)


def _usual_shape(shapes: Iterable[torch.Size]) -> torch.Size | None:
    return next((shape for shape, _ in Counter(shapes).most_common(1)), None)


def _groups(pixels: list[Tensor]):
    """As many samples at a time as ENCODED_AT_ONCE frames allow."""
    if pixels:
        size = max(1, ENCODED_AT_ONCE // (pixels[0].shape[0] * pixels[0].shape[1]))
        for first in range(0, len(pixels), size):
            yield pixels[first : first + size]


def load_latents(paths: list[Path]) -> LatentSet:
    """Join latents files of one kind, images or clips; ValueError if there are none."""
    if not paths:
        raise ValueError("no shards to train on")
    means, stds, captions, counts, broken = [], [], [], [], {}
    for path in paths:
        with safe_open(path, "pt") as file:
            means.append(file.get_tensor("mean"))
            stds.append(file.get_tensor("std"))
            facts = file.metadata()
        for row, reason in json.loads(facts.get("broken", "{}")).items():
            broken[len(captions) + int(row)] = tuple(reason)
        counts.append(len(means[-1]))
        captions += json.loads(facts["captions"])
    shape = _usual_shape(row.shape for mean in means if mean.ndim > 1 for row in mean)
    if shape is None:
        causes = in_words(Counter(cause for cause, *_ in broken.values()))
        raise ValueError(f"no sample of {paths[0]} or another can be read: {causes}")
    first = 0
    for mean in means:
        if mean.ndim > 1 and mean.shape[1:] != shape:
            error = other_size(mean.shape[-2:], shape[-2:])
            for row in range(first, first + len(mean)):
                broken.setdefault(row, (error.cause, "", error.detail))
        first += len(mean)

    def joined(parts: list[Tensor]) -> Tensor:
        like = next(part for part in parts if part.shape[1:] == shape)
        return torch.cat(
            [p if p.shape[1:] == shape else like.new_zeros(len(p), *shape) for p in parts]
        )

    return LatentSet(joined(means), joined(stds), captions, counts, broken)
