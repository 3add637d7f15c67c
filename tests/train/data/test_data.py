"""Training data: what is drawn from it, in which order, and what happens to what is broken."""

import gzip
import io
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from training import log_of
from webdataset import WebDataset

from gentron_fast import TextCondition
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule, diffusion_loss
from gentron_fast.text import SUBFOLDERS, TextEncoder
from gentron_fast.vae import VideoVAE
from gentron_train.data import loader as data_module
from gentron_train.data import shards as shards_module
from gentron_train.data.broken import Broken, BrokenLog, BrokenSample
from gentron_train.data.decode import Sampling, decode_image, pick_frames, read_caption, read_frames
from gentron_train.data.loader import (
    DataSettings,
    Loader,
    Order,
    Position,
    TooManyBroken,
    make_loader,
)
from gentron_train.data.precompute import Decoder
from gentron_train.data.precompute import main as precompute_main
from gentron_train.data.shards import count, find_shards, read
from gentron_train.data.sources import (
    LatentSet,
    MemorySource,
    Sample,
    encode_shards,
    latents_path,
    load_latents,
    seeded,
    select_tokens,
)
from gentron_train.small_world.architecture import small_text_encoder, small_vae
from gentron_train.small_world.renderer import vocabulary, write_shards

SIDE = 64 // small_vae().factor  # of the latents


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a few shards (data) and an untrained autoencoder (vae)."""
    folder = tmp_path_factory.mktemp("world")
    write_shards(folder / "data", images=12, clips=6, shard_size=6, processes=1, progress=False)
    torch.manual_seed(0)
    small_vae().save_pretrained(folder / "vae")
    return folder


def test_latents_beside_the_shards(world):
    data, sampling = world / "data", Sampling(starts=2)
    shards = find_shards(f"{data}/clips-*.tar")
    paths = encode_shards(shards, world / "vae", sampling)
    clips = load_latents(paths)
    assert clips.mean.shape == clips.std.shape == (6, 2, 4, 8, SIDE, SIDE)
    assert len(clips.captions) == 6
    assert (clips.std > 0).all()
    assert paths[0] != latents_path(shards[0].path, world / "vae", Sampling(starts=1))
    assert not list(data.glob(".*part"))
    before = [path.stat().st_mtime_ns for path in paths]
    assert encode_shards(shards, world / "vae", sampling) == paths
    assert [path.stat().st_mtime_ns for path in paths] == before
    with pytest.raises(ValueError, match="no shards"):
        load_latents([])


def test_ranks_that_look_at_different_times_encode_every_shard(world, tmp_path):
    write_shards(tmp_path, images=4, clips=0, shard_size=1, processes=1, progress=False)
    shards = find_shards(f"{tmp_path}/images-*.tar")
    for rank in range(2):  # rank 1 begins when rank 0 has finished
        paths = encode_shards(shards, world / "vae", Sampling(), rank, ranks=2)
    assert len(paths) == 4 and all(path.exists() for path in paths)


def picture(height: int, width: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom: a pixel says where it was."""
    rows, columns = numpy.mgrid[:height, :width]
    colours = (255 * columns / (width - 1), 255 * rows / (height - 1), 0 * rows)
    return Image.fromarray(numpy.stack(colours, -1).round().astype(numpy.uint8))


def as_file(image: Image.Image, ending: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, {"jpg": "jpeg"}.get(ending, ending), **options)
    return file.getvalue()


def video(times, time_base=Fraction(1, 24), size=(32, 32), file=None, **options) -> bytes:
    """An mp4 whose nth frame, shown at times[n], is a picture with blue at 5·n."""
    file = file or io.BytesIO()
    with av.open(file, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "1", "g": "12"})
        stream.height, stream.width = size
        stream.pix_fmt, stream.codec_context.time_base = "yuv444p", time_base
        for number, time in enumerate(times):
            pixels = numpy.array(picture(*size))
            pixels[..., 2] = 5 * number
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.read_bytes() if isinstance(file, Path) else file.getvalue()


def write_tar(path, samples: list[dict[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                entry = tarfile.TarInfo(f"{path.stem}-{number:04d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


RATES = [*map(Fraction, (24, 12, 30, 60)), Fraction(24000, 1001), Fraction(30000, 1001)]


def frame_times(rate) -> tuple[list[int], Fraction]:
    """Of 2.5 seconds; without a rate, at irregular moments."""
    if rate is None:
        gaps = numpy.random.default_rng(0).integers(200, 1200, 45)
        return [100, *(100 + numpy.cumsum(gaps)).tolist()], Fraction(1, 12288)
    return [n * rate.denominator for n in range(int(2.5 * rate))], Fraction(1, rate.numerator)


def expected_picks(times, base, start) -> list[int]:
    """For each quarter of a second the frame of the least distance in time, exact in integers."""
    moments = [4 * times[start] + n * base.denominator for n in range(8)]
    distances = [[abs(4 * time - moment) for time in times] for moment in moments]
    return [row.index(min(row)) for row in distances]


@pytest.mark.parametrize("rate", [*RATES, None], ids=str)
def test_frames_at_4_fps_from_any_rate(rate):
    times, base = frame_times(rate)
    end = times[-1] + (times[-1] - times[-2]) / 2
    possible = {n for n, time in enumerate(times) if time + 1.75 / base <= end + 1e-9}
    starts = set()
    for seed in range(200):
        picks = pick_frames(times, base, Sampling(), seeded(seed))
        if picks[0] not in starts:
            assert picks == expected_picks(times, base, picks[0])
        starts.add(picks[0])
    assert starts <= possible and len(starts) > 0.9 * len(possible)


def test_24_fps_takes_every_sixth():
    picks = pick_frames(list(range(43)), Fraction(1, 24), Sampling(), seeded(0))
    assert picks == [0, 6, 12, 18, 24, 30, 36, 42]


def test_short_clip_is_refused():
    with pytest.raises(BrokenSample, match=r"42 frames in 1.708 s.* 4 FPS need 1.750 s") as error:
        pick_frames(list(range(42)), Fraction(1, 24), Sampling(), seeded(0))
    assert error.value.cause == "short clip"


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(30000, 1001), None], ids=str)
def test_clip_shows_the_picked_frames(rate):
    times, base = (part[:50] if isinstance(part, list) else part for part in frame_times(rate))
    sample = {"mp4": video(times, base)}
    sampling = Sampling(starts=3, frames=4, fps=4.0)
    windows = read_frames(sample, sampling, seeded(1))
    assert windows.shape == (3, 4, 32, 32, 3)
    assert torch.equal(read_frames(sample, sampling, seeded(1), window=2), windows[2:])
    generator = seeded(1)
    for window in windows:
        picks = pick_frames(times, base, sampling, generator)
        assert (window[..., 2].float().mean((1, 2)) / 5).round().tolist() == picks


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("source, target", [((48, 80), (32, 32)), ((90, 60), (40, 32))])
def test_short_side_to_size_and_crop(source, target, crop):
    """The cut shows one part of the picture at one scale on both axes, of a clip as of an image."""
    scale = max(target[0] / source[0], target[1] / source[1])
    share = [part / (side * scale) for part, side in zip(target, source, strict=True)]
    sampling = Sampling(size=target, crop=crop, starts=6, frames=2)
    files = {"png": as_file(picture(*source), "png"), "mp4": video(range(20), size=source)}
    corners = set()
    for ending, content in files.items():
        windows = read_frames({ending: content}, sampling, seeded(0)).float() / 255
        assert windows.shape[2:] == (*target, 3)
        for frame in windows.flatten(0, 1):
            rows, columns = frame[:, :, 1].mean(1), frame[:, :, 0].mean(0)
            for line, part in ((rows, share[0]), (columns, share[1])):
                inner = line[2:-2]  # resampling bends the picture's own edges
                slope = float(inner[-1] - inner[0]) * len(line) / (len(inner) - 1)
                assert slope == pytest.approx(part, abs=0.05)
                if crop == "center":
                    assert float(line.mean()) == pytest.approx(0.5, abs=0.03)
            corners.add((round(float(rows.mean()), 1), round(float(columns.mean()), 1)))
    assert (len(corners) > 2) == (crop == "random")


def test_buckets_go_by_aspect_ratio():
    sampling = Sampling(buckets=((32, 32), (24, 48), (48, 24)))
    for size, bucket in (((100, 90), 0), ((70, 130), 1), ((50, 60), 0), ((400, 210), 2)):
        image = {"jpg": as_file(picture(*size), "jpg")}
        assert read_frames(image, sampling, seeded(0)).shape[2:4] == sampling.buckets[bucket]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_image_formats(ending):
    options = {"lossless": True} if ending == "webp" else {}
    image = picture(20, 30)
    pixels = decode_image(as_file(image, ending, **options)).float()
    assert (pixels - torch.from_numpy(numpy.array(image))).abs().mean() < 3
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    turned = decode_image(as_file(image.rotate(90, expand=True), ending, exif=exif, **options))
    assert (turned - pixels).abs().mean() < 4


@pytest.mark.parametrize(
    "files, caption",
    [
        ({"txt": "a réd circle\n".encode()}, "a réd circle\n"),
        ({"json": b'{"caption": "a"}'}, "a"),
        ({"json": b'{"text": "b"}', "jpg": b""}, "b"),
        ({"json": b'{"caption": "a"}', "txt": b"c"}, "c"),
        ({"png": b""}, "no caption"),
        ({"json": b"{}"}, "no caption"),
        ({"txt": b" \n"}, "empty caption"),
        ({"txt": b"\xff\xfe"}, "unreadable caption"),
        ({"json": b"{"}, "unreadable caption"),
        ({"json": b'{"caption": 3}'}, "unreadable caption"),
    ],
)
def test_captions(files, caption):
    if "caption" not in caption:
        assert read_caption(files) == caption
    else:
        with pytest.raises(BrokenSample) as error:
            read_caption(files)
        assert error.value.cause == caption


def latent_set(kind: str, count: int, frames: int) -> LatentSet:
    values = torch.arange(count).half()[:, None, None, None, None, None]
    mean = values.expand(count, 1, 4, frames, 2, 2)
    return LatentSet(mean, torch.zeros_like(mean), [f"{kind} {n}" for n in range(count)])


def count_words(captions):
    """A tokenizer whose one token is the caption's place in the list: 0 for the null text."""
    ids = torch.arange(len(captions))[:, None]
    return {"clip": (ids, torch.ones_like(ids, dtype=torch.bool))}


SETS = {"images": latent_set("image", 40, 1), "clips": latent_set("clip", 160, 8)}
BOTH = DataSettings(kinds=("images", "clips"), batch=10, seed=3)


def in_memory(settings, *ranks):
    """A loader over SETS, or those of them that the settings name."""
    sets = {kind: SETS[kind] for kind in settings.kinds}
    counts = {kind: [len(latents)] for kind, latents in sets.items()}
    return Loader(settings, MemorySource(sets, count_words), counts, *ranks)


def rows(batches):
    """Each sample of some batches as (caption, its latents, noise and so on)."""
    for batch in batches:
        texts = batch.text["clip"][0][:, 0].tolist()
        draws = len(batch.latents) // len(texts)
        for n, text in enumerate(texts):
            part = slice(n * draws, (n + 1) * draws)
            yield text, batch.latents[part], batch.noise[part], batch.timestep[part]


def equal(some, others) -> bool:
    some, others = list(some), list(others)
    return len(some) == len(others) and all(
        a[0] == b[0] and all(map(torch.equal, a[1:], b[1:]))
        for a, b in zip(some, others, strict=True)
    )


def test_two_ranks_see_what_one_with_twice_the_batch_sees():
    one = in_memory(replace(BOTH, batch=20, draws=2))
    two = [in_memory(replace(BOTH, draws=2), rank, 2) for rank in range(2)]
    for _ in range(4):
        assert equal(rows([next(one)]), rows([next(two[0]), next(two[1])]))


@pytest.mark.parametrize("ranks", [2, 1, 3])
def test_resume_on_any_number_of_ranks(ranks):
    old = [in_memory(BOTH, rank, 2) for rank in range(2)]
    for _ in range(3):
        [next(loader) for loader in old]
    states = json.loads(json.dumps([loader.state_dict() for loader in old]))
    new = [in_memory(BOTH, rank, ranks) for rank in range(ranks)]
    for loader in new:
        loader.load_state_dict(states)
    continued = [batch for _ in range(6) for batch in map(next, old)]
    resumed = [batch for _ in range(12 // ranks) for batch in map(next, new)]
    assert equal(rows(resumed), rows(continued))


def test_ranks_apart_join_without_loss():
    """Ranks that took different amounts: every number comes once, whatever the ranks."""
    old = [Position(4, rank, 3) for rank in range(3)]
    seen = []
    for position, taken, waiting in zip(old, (9, 30, 17), ([], [5], []), strict=True):
        seen += [position.number(nth) for nth in range(taken)]
        position.taken, position.waiting = taken, waiting
    seen.remove(5)
    for ranks in (2, 3):
        new = [Position(3, rank, ranks) for rank in range(ranks)]
        for position in new:
            position.load_state_dict([p.state_dict() for p in old])
        after = [n for p in new for n in (*p.waiting, *(p.number(k) for k in range(60)))]
        both = Counter(seen) + Counter(after)
        assert set(both.values()) == {1}
        assert set(range(max(seen) + 1)) <= set(both)


def test_epoch_sees_each_sample_once_and_text_fits():
    loader = in_memory(replace(BOTH, p_null=0.0))
    samples = list(rows(next(loader) for _ in range(20)))
    assert Counter(text for text, *_ in samples) == Counter(range(1, 201))
    for text, latents, *_ in samples:
        assert latents.shape == (1, 4, 8, 2, 2)
        assert (latents == float(text - 1 if text <= 40 else text - 41)).all()


def test_timesteps_within_their_range():
    loader = in_memory(replace(BOTH, batch=100, min_timestep=500, max_timestep=503))
    steps = torch.cat([next(loader).timestep for _ in range(2)])
    assert set(steps.tolist()) == {500, 501, 502, 503}
    loader.narrow = False
    assert next(loader).timestep.unique().numel() > 50
    for wrong in (
        {"min_timestep": -1},
        {"max_timestep": 1000},
        {"min_timestep": 999, "max_timestep": 9},
    ):
        with pytest.raises(ValueError, match="must be within 0 to 999"):
            replace(BOTH, **wrong)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.37, 1.0])
def test_shares(share):
    settings = replace(BOTH, p_motion_free=share, batch=100)
    loader = in_memory(settings)
    batches = [next(loader) for _ in range(20)]
    assert sum(int(batch.motion_free.sum()) for batch in batches) == int(share * 2000)
    samples = list(rows(batches))
    assert 0.07 < sum(text == 0 for text, *_ in samples) / 2000 < 0.13
    assert 400 < sum(float(timestep) for *_, timestep in samples) / 2000 < 600
    assert abs(float(torch.cat([batch.noise for batch in batches]).mean())) < 0.02


def test_images_alone_have_no_mask():
    loader = in_memory(DataSettings(batch=4))
    batch = next(loader)
    assert batch.motion_free is None
    assert batch.latents.shape == (4, 4, 1, 2, 2)


def test_loader_in_memory(world):
    encoder = small_text_encoder(vocabulary())
    settings = DataSettings(
        kinds=("images", "clips"),
        images=str(world / "data/images-*.tar"),
        clips=str(world / "data/clips-*.tar"),
        batch=5,
        in_memory=True,
    )
    loader = make_loader(settings, world / "vae", encoder.tokenize)
    batch = next(loader)
    assert loader.sizes == (4, 8, SIDE, SIDE)
    assert batch.latents.shape == (5, *loader.sizes)
    assert all(len(ids) == 5 for ids, _ in batch.text.values())


def test_select_tokens():
    tokens = small_text_encoder(vocabulary()).tokenize(["", "a red circle", "a circle " * 12])
    rows = torch.tensor([1, 0])
    chosen = select_tokens(tokens, rows, multiple=8)
    for name, (ids, mask) in chosen.items():
        longest = int(mask.sum(1).max())
        assert ids.shape == mask.shape and longest <= ids.shape[1] < longest + 8
        assert torch.equal(
            ids[mask], torch.cat([tokens[name][0][r][tokens[name][1][r]] for r in rows])
        )


CAPTION = {"txt": b"a red circle"}
CLIP = list(range(48))  # two seconds at 24 FPS


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pipeline folder's autoencoder and text encoders, untrained."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small_vae().save_pretrained(folder / "vae")
    small_text_encoder(vocabulary()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(models):
    parts = {name: [models / part for part in SUBFOLDERS[name]] for name in SUBFOLDERS}
    return TextEncoder.from_pretrained(**parts)


BROKEN = {
    "video without its index": "unreadable video",
    "video cut in the middle": "unreadable video",
    "video of nothing": "unreadable video",
    "short clip": "short clip",
    "image cut in the middle": "unreadable image",
    "image of nothing": "unreadable image",
    "no caption": "no caption",
    "empty caption": "empty caption",
    "caption alone": "no image or clip",
}


@pytest.fixture(scope="module")
def broken_samples(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Every kind of broken sample, by what is wrong with it."""
    whole, image = video(CLIP), as_file(picture(32, 32), "jpg")
    file = tmp_path_factory.mktemp("clip") / "index-first.mp4"
    start = video(CLIP, file=file, movflags="faststart")
    media = (
        {"mp4": whole[:-400]},
        {"mp4": start[: len(start) // 2]},
        {"mp4": bytes(500)},
        {"mp4": video(CLIP[:30])},
        {"jpg": image[: len(image) // 2]},
        {"png": b""},
        {"jpg": image},
        {"jpg": image, "txt": b" "},
        {},
    )
    captions = [{} if name == "no caption" else CAPTION for name in BROKEN]
    return {name: c | m for name, c, m in zip(BROKEN, captions, media, strict=True)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, broken_samples):
    """Two shards of images, one of them cut off, and one of clips, with broken samples in both."""
    folder = tmp_path_factory.mktemp("shards")
    broken = list(broken_samples.values())
    sides = [(32, 32), (32, 48), (40, 32)] * 4
    images = [
        {"png": as_file(picture(*size), "png"), "txt": f"image {n}".encode()}
        for n, size in enumerate(sides)
    ]
    write_tar(folder / "images-0.tar", [*images[:5], *broken[4:8], *images[5:7]])
    whole = write_tar(folder / "whole.tar", images[7:])
    with tarfile.open(whole) as tar:
        size = tar.getmembers()[6].offset_data + 30  # in the fourth picture
    (folder / "images-1.tar").write_bytes(whole.read_bytes()[:size])
    clips = [
        {"mp4": video(CLIP, size=sides[n]), "json": json.dumps({"caption": f"clip {n}"}).encode()}
        for n in range(5)
    ]
    write_tar(folder / "clips-0.tar", [*broken[:2], *clips, *broken[2:4], *broken[8:]])
    return folder


def settings(shards, log, **options) -> DataSettings:
    both = {"kinds": ("images", "clips"), "p_motion_free": 0.5, "p_null": 0.2, "size": (32, 32)}
    both |= {"images": f"{shards}/images-*.tar", "clips": f"{shards}/clips-*.tar"}
    both |= {"batch": 3, "workers": 0, "max_broken": 1.0, "log": log / "broken.jsonl"}
    return DataSettings(**both | options)


def assert_same(some, others):
    for name in ("latents", "noise", "timestep", "motion_free"):
        assert torch.equal(getattr(some, name), getattr(others, name)), name
    for name, (ids, mask) in some.text.items():
        assert torch.equal(ids, others.text[name][0]) and torch.equal(mask, others.text[name][1])


def test_broken_samples_are_skipped_counted_and_named(shards, models, encoder, tmp_path):
    """One epoch: 10 whole images, 5 whole clips; each whole one comes once, nothing else does."""
    data = settings(shards, tmp_path, batch=1, p_null=0.0, draws=2)
    loader = make_loader(replace(data, kinds=("images",)), models / "vae", encoder.tokenize)
    assert loader.broken() == {"shard cut off": 1}
    seen = Counter()
    for _ in range(10):
        seen += Counter(texts(encoder, next(loader)))
    assert seen == Counter(f"image {n}" for n in range(10))
    loader = make_loader(replace(data, kinds=("clips",)), models / "vae", encoder.tokenize)
    seen = Counter(text for _ in range(5) for text in texts(encoder, next(loader)))
    assert seen == Counter(f"clip {n}" for n in range(5))
    lines = [json.loads(line) for line in data.log.read_text().splitlines()]
    for line in lines:
        assert line["shard"].startswith(str(shards)) and line.keys() >= {"cause", "detail", "rank"}
    # The end of an epoch may be broken too, and then comes with the next.
    causes = Counter(line["cause"] for line in {line["sample"]: line for line in lines}.values())
    assert set(causes) <= {*BROKEN.values(), "shard cut off"} and causes.total() >= 8
    assert "whole-0002" in next(x["detail"] for x in lines if x["cause"] == "shard cut off")


def texts(encoder, batch) -> list[str]:
    ids, mask = batch.text["t5"]
    tokenizer = encoder.tokenizers["t5"]
    return [
        tokenizer.decode(row[kept], skip_special_tokens=True)
        for row, kept in zip(ids, mask, strict=True)
    ]


@pytest.mark.parametrize("ranks", [2, 1, 3])
def test_broken_counts_go_on_after_a_resume(shards, models, encoder, tmp_path, ranks):
    """The counts of two ranks are shared out among those that go on, none lost or counted twice."""
    data = settings(shards, tmp_path, batch=1)

    def loader(rank, ranks):
        return make_loader(data, models / "vae", encoder.tokenize, rank=rank, ranks=ranks)

    old = [loader(rank, 2) for rank in range(2)]
    for one in old:
        [next(one) for _ in range(5)]
    before = sum((Counter(one.broken()) for one in old), Counter())
    assert before["shard cut off"] == 1 and before.total() > 3
    states = json.loads(json.dumps([one.state_dict() for one in old]))
    new = [loader(rank, ranks) for rank in range(ranks)]
    for one in new:
        one.load_state_dict(states)
    assert sum((Counter(one.broken()) for one in new), Counter()) == before
    assert sum(one.log.seen for one in new) == sum(one.log.seen for one in old)
    if ranks == 2:
        assert [one.broken() for one in new] == [one.broken() for one in old]


@pytest.mark.parametrize("name", BROKEN)
def test_each_kind_of_broken_sample(broken_samples, name, tmp_path):
    shard = find_shards(str(write_tar(tmp_path / "a.tar", [broken_samples[name]])))[0]
    record, broken = Decoder(Sampling(size=(32, 32)))[shard, 0]
    assert (broken.cause, broken.sample) == (BROKEN[name], "a-0000") and "\n" not in broken.detail
    assert json.loads(record.files["broken.json"]) == [broken.cause, broken.detail]


def test_too_many_broken_stop_the_run(shards, models, encoder, tmp_path):
    data = settings(shards, tmp_path, kinds=("clips",), max_broken=0.2)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    with pytest.raises(TooManyBroken, match=r"3 of 10 samples .* 20.0%.*: \d .*broken.jsonl"):
        for _ in range(5):
            next(loader)
    assert len(data.log.read_text().splitlines()) == 3
    # Of many samples the share counts, not the number.
    log = BrokenLog(tmp_path / "log", 0.05, samples=10**6)
    for _ in range(50):
        log.add(Broken("a", "b", "c", "d"))
    log.seen = 1040
    log.add(Broken("a", "b", "c", "d"))
    with pytest.raises(TooManyBroken, match="53 of 1040"):
        log.add(Broken("a", "b", "c", "d"))
        log.add(Broken("a", "b", "c", "d"))


@pytest.mark.parametrize(
    "cut, samples", [(0, 3), (1, 3), (512, 3), (1024, 2), (1600, 2), (4000, 1)]
)
def test_shard_that_breaks_off(tmp_path, cut, samples):
    """3 samples of two files; each file takes 1024 bytes, the archive's end 512 or more."""
    path = write_tar(tmp_path / "a.tar", [{"jpg": b"x" * 300, "txt": b"y"}] * 3)
    content = path.read_bytes()[: 6 * 1024 + 512]
    path.write_bytes(content[: len(content) - cut])
    found, where = count(find_shards(str(path))[0])
    assert found == samples and bool(where) == (cut > 0)
    (tmp_path / "b.tar").write_bytes(b"no archive" * 100)
    assert count(find_shards(str(tmp_path / "b.tar"))[0])[0] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, models, encoder, tmp_path, workers):
    data = settings(shards, tmp_path, draws=2)
    alone = make_loader(data, models / "vae", encoder.tokenize)
    helped = make_loader(replace(data, workers=workers), models / "vae", encoder.tokenize)
    for _ in range(4):
        assert_same(next(alone), next(helped))
    assert alone.state_dict() == helped.state_dict() and alone.broken() == helped.broken()


def test_workers_leave_signals_to_the_trainer(precomputed, tmp_path):
    """A signal to the process group must not cost the checkpoint that the trainer still writes."""
    before = set(multiprocessing.active_children())
    loader = make_loader(settings(precomputed, tmp_path, workers=1, batch=2), None, None)
    next(loader)
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    for _ in range(10):
        next(loader)
    assert worker.is_alive()


def test_a_batch_by_hand(shards, models, encoder, tmp_path):
    """Latents, noise and timesteps from the files themselves, by PIL, the VAE and the seed."""
    data = settings(shards, tmp_path, kinds=("images",), draws=2, seed=5, batch=1)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    vae = VideoVAE.from_pretrained(models / "vae")
    first_numbers = []
    for _ in range(3):
        batch = next(loader)
        number = loader.position.number(loader.position.taken - 1)
        first_numbers.append(number)
        _, shard, place = loader.reader.order.locate(number)
        _, files = read(data.shards["images"][shard], place)
        image = Image.open(io.BytesIO(files["png"]))
        side = max(32 / image.width, 32 / image.height)
        image = image.resize((round(image.width * side), round(image.height * side)), 3)
        top, left = (image.height - 32) // 2, (image.width - 32) // 2
        pixels = numpy.array(image)[top : top + 32, left : left + 32]
        pixels = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None, :, None].float()
        with torch.no_grad():
            mean, std = (part.half().float() for part in vae.encode(pixels))
        generator = torch.Generator().manual_seed((5 * 0x9E3779B1 + number) & 0xFFFFFFFF)
        kept = torch.rand((), generator=generator) >= data.p_null
        assert texts(encoder, batch)[0] == (files["txt"].decode() if kept else "")
        torch.randint(1, (), generator=generator)
        assert torch.equal(batch.timestep, torch.randint(1000, (2,), generator=generator))
        expected = mean + std * torch.randn(2, *mean.shape[1:], generator=generator)
        torch.testing.assert_close(batch.latents, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(batch.noise, torch.randn(expected.shape, generator=generator))
    assert first_numbers == sorted(first_numbers)


def test_a_clip_by_hand(shards, models, encoder, tmp_path):
    """Frames from the file by PyAV, every sixth of 24 a second from the start that is drawn."""
    data = settings(shards, tmp_path, kinds=("clips",), draws=2, seed=5, batch=1, starts=2)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    vae = VideoVAE.from_pretrained(models / "vae")
    for _ in range(3):
        batch = next(loader)
        number = loader.position.number(loader.position.taken - 1)
        _, shard, place = loader.reader.order.locate(number)
        _, files = read(data.shards["clips"][shard], place)
        generator = torch.Generator().manual_seed((5 * 0x9E3779B1 + number) & 0xFFFFFFFF)
        kept = torch.rand((), generator=generator) >= data.p_null
        caption = json.loads(files["json"])["caption"]
        assert texts(encoder, batch)[0] == (caption if kept else "")
        window = int(torch.randint(2, (), generator=generator))
        starts = seeded(0, place, "clips-0")
        first = [int(torch.randint(6, (), generator=starts)) for _ in range(2)][window]
        with av.open(io.BytesIO(files["mp4"])) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)][first::6][:8]
        images = []
        for image in frames:
            side = max(32 / image.width, 32 / image.height)
            image = image.resize((round(image.width * side), round(image.height * side)), 3)
            top, left = (image.height - 32) // 2, (image.width - 32) // 2
            images.append(numpy.array(image)[top : top + 32, left : left + 32])
        pixels = torch.from_numpy(numpy.stack(images) / 127.5 - 1).permute(3, 0, 1, 2)[None].float()
        with torch.no_grad():
            mean, std = (part.half().float() for part in vae.encode(pixels))
        assert torch.equal(batch.timestep, torch.randint(1000, (2,), generator=generator))
        expected = mean + std * torch.randn(2, *mean.shape[1:], generator=generator)
        torch.testing.assert_close(batch.latents, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(batch.noise, torch.randn(expected.shape, generator=generator))
        assert batch.motion_free.tolist() == [False, False]


def test_motion_free_image_is_encoded_once_and_repeated(shards, models, encoder, tmp_path):
    data = settings(shards, tmp_path, draws=2, batch=6)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    frames, encode = [], loader.source.vae.encode
    loader.source.vae.encode = lambda x, **k: (
        frames.append(x.shape[0] * x.shape[2]) or encode(x, **k)
    )
    batch = next(loader)
    stills = batch.motion_free.view(6, 2)[:, 0]
    assert frames == [int(stills.sum()) + 8 * int((~stills).sum())]
    for latents, noise, still in zip(batch.latents, batch.noise, batch.motion_free, strict=True):
        assert still == (latents == latents[:, :1]).all()
        assert not (noise == noise[:, :1]).all()
    assert not torch.equal(*batch.latents[batch.motion_free][:2])  # two draws of the posterior


def losses(loader, encoder, model, count=4) -> list[float]:
    values = []
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    for _ in range(count):
        batch = next(loader)
        text = batch.text if isinstance(batch.text, TextCondition) else encoder(batch.text)
        text = text.repeat(len(batch.latents) // text.batch)
        noisy = schedule.add_noise(batch.latents, batch.noise, batch.timestep)
        with torch.no_grad():
            output = model(noisy, batch.timestep, text, batch.motion_free)
        values.append(float(diffusion_loss(output, batch.noise)))
    return values


@pytest.fixture(scope="module")
def precomputed(shards, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("precomputed") / "new"
    command = [f"{shards}/{{images,clips}}-*.tar", str(folder), f"--pipeline={models}"]
    assert precompute_main([*command, "--size=32x32", "--workers=2", "--max-broken=1"]) == 0
    return folder


def test_precomputed_gives_the_same_loss(
    shards, precomputed, models, encoder, make_model, tiny_config, tmp_path
):
    model = make_model(tiny_config, torch.float32)
    fresh = settings(shards, tmp_path, draws=2)
    loaders = [
        make_loader(fresh, models / "vae", encoder.tokenize),
        make_loader(settings(precomputed, tmp_path, draws=2, workers=2), Path("nowhere"), None),
        make_loader(replace(fresh, in_memory=True), models / "vae", encoder.tokenize),
    ]
    assert [loader.data.precomputed for loader in loaders] == [False, True, False]
    values = [losses(loader, encoder, model) for loader in loaders]
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert values[2] == pytest.approx(values[0], rel=1e-3)  # encoded in bf16
    assert len({round(value, 5) for value in values[0]}) == 4
    places = [loader.position.state_dict() for loader in loaders]
    assert places[0] == places[1] == places[2]
    assert len({loader.sizes for loader in loaders}) == 1 and loaders[0].sizes == (4, 8, 4, 4)


def test_precomputed_shards(precomputed, encoder):
    """Standard WebDataset files: mean, std, and the embeddings that the encoder gives."""
    names = sorted(path.name for path in precomputed.iterdir() if not path.name.startswith("."))
    assert names == ["broken.jsonl", "clips-0.tar", "images-0.tar", "images-1.tar"]
    samples = list(WebDataset(str(precomputed / "clips-0.tar"), shardshuffle=False))
    assert len(samples) == 10 and sum("broken.json" in sample for sample in samples) == 5
    whole = [sample for sample in samples if "safetensors" in sample]
    tensors = load(whole[1]["safetensors"])
    assert tensors["mean"].shape == tensors["std"].shape == (2, 4, 8, 4, 4)
    assert (tensors["std"] > 0).all() and not torch.equal(*tensors["mean"])
    text = encoder.encode([whole[1]["txt"].decode()])
    for name, encoded in text._asdict().items():
        for part, value in encoded._asdict().items():
            torch.testing.assert_close(tensors[f"{name}.{part}"], value[0], rtol=1e-4, atol=1e-5)
    causes = Counter(json.loads(line)["cause"] for line in (precomputed / "broken.jsonl").open())
    assert causes == {**Counter(BROKEN.values()), "shard cut off": 1}


def test_precomputed_needs_no_decoder_and_no_encoder(precomputed, tmp_path):
    code = f"""
import sys
from pathlib import Path
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "transformers", "av", "PIL", "deepspeed"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
from gentron_train.data.loader import DataSettings, make_loader
data = DataSettings(kinds=("images", "clips"), size=(32, 32), batch=2, workers=1, max_broken=1.0,
    images={str(precomputed / "images-*.tar")!r}, clips={str(precomputed / "clips-*.tar")!r},
    log=Path({str(tmp_path / "log")!r}))
batch = next(make_loader(data, Path("nowhere"), None))
assert batch.latents.shape == (2, 4, 8, 4, 4) and batch.text.t5.tokens.shape[2] == 128
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_on_precomputed_shards_needs_no_other_package(precomputed, tiny_t2i_folder, tmp_path):
    """Two steps to the transformer alone; the text encoders of --init are copied unopened."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "transformers", "av"):
            raise ModuleNotFoundError(name + " is blocked")
sys.meta_path.insert(0, Block())
from gentron_train.engine import run, train
run(lambda: train("t2i", "", sys.argv[1:]))
"""
    run = tmp_path / "run"
    options = [f"--data={precomputed}", f"--run={run}", f"--init={tiny_t2i_folder}", "--size=32"]
    options += ["--vae=nowhere", "--steps=2", "--batch=2", "--draws=1", "--max-broken=1"]
    options += ["--workers=0", "--no-in-memory", "--no-tensorboard", "--log-every=1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *options]
    result = subprocess.run(command, env=os.environ | rank, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    told = f"pipeline in {run / 'pipeline'}: no whole pipeline, no autoencoder in nowhere; training"
    assert told in result.stdout
    assert [row["step"] for row in log_of(run)] == [1, 2]
    names = {path.name for path in (run / "pipeline").iterdir()}
    assert names == {*("transformer", "scheduler"), *itertools.chain(*SUBFOLDERS.values())}


def test_latents_alone_leave_the_text_to_the_run(shards, models, encoder, tmp_path):
    command = [f"{shards}/clips-0.tar", str(tmp_path / "new"), f"--vae={models / 'vae'}"]
    options = ["--size=32x32", "--workers=0", "--max-broken=1", "--no-text"]
    assert precompute_main([*command, *options]) == 0
    data = settings(tmp_path / "new", tmp_path, kinds=("clips",))
    fresh = make_loader(
        settings(shards, tmp_path, kinds=("clips",)), models / "vae", encoder.tokenize
    )
    assert_same(next(make_loader(data, None, encoder.tokenize)), next(fresh))
    with pytest.raises(ValueError, match="holds no text embeddings"):
        make_loader(data, None, None)


def test_precompute_goes_on_where_it_was_cut_off(shards, models, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new"
    command = [f"{shards}/images-*.tar", f"{shards}/clips-*.tar", str(out)]
    command += [f"--pipeline={models}", "--size=32x32", "--workers=0", "--max-broken=1"]
    decode, left = Decoder.__getitem__, [13]

    def stop_after_13(self, place):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return decode(self, place)

    monkeypatch.setattr("gentron_train.data.precompute.ENCODED_AT_ONCE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__getitem__", stop_after_13)
        assert precompute_main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [path.name for path in out.glob("*.tar*")] == ["images-0.tar"]
    assert not list(out.glob(".*.part"))
    before = (out / "images-0.tar").stat()
    assert precompute_main(command) == 0
    assert len(list(out.glob("*.tar"))) == 3
    assert (out / "images-0.tar").stat().st_mtime_ns == before.st_mtime_ns
    # Ranks share the shards out, and the result is the same to the byte.
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert precompute_main([*command[:2], str(tmp_path / "ranks"), *command[3:]]) == 0
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "ranks" / path.name).read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert precompute_main([*command, "--starts=3"]) == 2
    assert "with other settings or models" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing-*.tar", "out", "--vae=v"], "no shards match nothing-*.tar"),
        (["nothing.tar", "out", "--vae=v"], "there is no shard nothing.tar"),
        (["SHARDS/clips-0.tar", "out"], "name an autoencoder"),
        (["SHARDS/clips-0.tar", "out", "--vae=v"], "name text encoders"),
        (["SHARDS/clips-0.tar", "out", "--vae=v", "--no-text"], "no autoencoder at v"),
        (["SHARDS/clips-0.tar", "out", "--size=32"], "'32', wanted HxW"),
        (["SHARDS/clips-0.tar", "out", "--starts=0"], "starts is 0"),
        (["SHARDS/clips-0.tar", "out", "--fps=0"], "fps is 0.0, must be above 0"),
        (["SHARDS/clips-0.tar", "out", "--size=30x30", "--pipeline=MODELS"], "size 30x30"),
        (["SHARDS/clips-0.tar", "SHARDS", "--pipeline=MODELS"], "over itself"),
        (["SHARDS/clips-0.tar", "OUT", "--pipeline=MODELS", "--size=32x32"], "clips: 5 of 10"),
        (["SHARDS/clips-0.tar"], "arguments are required: out"),
        (["a", "b", "--quick"], "unrecognized arguments: --quick"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_commands(shards, models, tmp_path, arguments, message, capsys):
    names = {"SHARDS": str(shards), "MODELS": str(models), "OUT": str(tmp_path / "new")}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    assert precompute_main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    message = "samples are broken, more than 5.0%" if "of 10" in message else message
    assert message in lines[-1] and lines[-1].startswith("gentron_train.precompute: error: ")


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit) as stop:
        precompute_main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 100


def test_shards_by_any_url(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PAUSES", (0, 0))
    pattern = f"pipe:cat {shards}/{{images-0,clips-0}}.tar"
    remote = find_shards(pattern, tmp_path / "cache")
    local = find_shards(f"file:{shards}/{{images-0,clips-0}}.tar")
    assert [shard.name for shard in remote] == [shard.name for shard in local]
    for one, other in zip(remote, local, strict=True):
        assert count(one) == count(other)
        assert read(one, 3) == read(other, 3)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    assert [shard.name for shard in find_shards(f"{shards}/*-0.tar")] == ["clips-0", "images-0"]
    with pytest.raises(ValueError, match="cannot read the shard pipe:false"):
        count(find_shards("pipe:false", tmp_path / "cache")[0])
    (tmp_path / "a.tar").write_bytes(gzip.compress(b"a"))
    with pytest.raises(ValueError, match="is compressed"):
        count(find_shards(str(tmp_path / "a.tar"))[0])


def test_a_shard_is_fetched_three_times_before_its_samples_are_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PAUSES", (0, 0))
    tried, path = tmp_path / "tried", write_tar(tmp_path / "a.tar", [{"txt": b"one"}])
    command = f"pipe:echo >> {tried}; test $(wc -l < {tried}) -ge 3 && cat {path}"
    shard = find_shards(command, tmp_path / "cache")[0]
    assert count(shard) == (1, None) and tried.read_text().count("\n") == 3
    tried.unlink()
    path.unlink()
    shard.path.unlink()  # as it goes to make room
    with pytest.raises(BrokenSample) as broken:
        read(shard, 0)
    assert broken.value.cause == "unreadable shard" and "cannot read" in broken.value.detail
    assert tried.read_text().count("\n") == 3


@pytest.mark.parametrize("name", ["_read_headers", "_keep"])
def test_a_copy_that_goes_while_it_is_counted_is_made_again(tmp_path, monkeypatch, name):
    path = write_tar(tmp_path / "a.tar", [{"txt": b"one"}, {"txt": b"two"}])
    shard = find_shards(f"pipe:cat {path}", tmp_path / "cache")[0]
    function, gone = getattr(shards_module, name), []

    def removed_once(*arguments):
        if not gone:
            gone.append(shard.path.unlink())
        return function(*arguments)

    monkeypatch.setattr(shards_module, name, removed_once)
    assert count(shard) == (2, None) and gone == [None]
    assert read(shard, 1)[1] == {"txt": b"two"}


def test_copies_of_shards_make_room_for_others(tmp_path):
    """Two of three copies fit; what was removed is counted without it, and copied again to read."""
    names, fetched = "abc", tmp_path / "fetched"
    for name in names:
        write_tar(tmp_path / f"{name}.tar", [{"txt": name.encode()}])
    room = 2 * (tmp_path / "a.tar").stat().st_size
    command = f"pipe:echo >> {fetched}; cat {tmp_path}/"
    shards = [find_shards(f"{command}{n}.tar", tmp_path / "cache", room)[0] for n in names]

    def fetches(contents):
        for shard, content in contents:
            assert read(shard, 0)[1] == {"txt": content.encode()}
            assert shard.path.exists()
            shards_module._open_files.pop(shard.path, None)  # as in a process that opens it anew
        return fetched.read_text().count("\n")

    a, b, c = zip(shards, names, strict=True)
    (tmp_path / "cache").mkdir()
    own = write_tar(tmp_path / "cache" / "images-0.tar", [{"txt": b"the user's own"}])
    assert fetches([a, b, a]) == 2
    assert fetches([c]) == 3  # b was longest not opened
    assert [shard.path.exists() for shard in shards] == [True, False, True]
    assert [count(shard) for shard in shards] == [(1, None)] * 3
    assert fetches([a]) == 3 and fetches([b]) == 4
    assert own.exists()


def test_index_follows_the_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", [{"txt": b"one"}])
    shard = find_shards(str(path))[0]
    assert count(shard) == (1, None)
    write_tar(path, [{"txt": b"one"}, {"txt": b"two"}])
    assert count(shard) == (2, None)


def test_buckets_make_batches_of_one_size_and_nothing_is_lost(shards, models, encoder, tmp_path):
    """Three sizes; a resume in the middle, on other ranks, still sees each image once."""
    data = settings(
        shards,
        tmp_path,
        kinds=("images",),
        size=None,
        buckets=((32, 32), (32, 48), (40, 32)),
        p_null=0.0,
        batch=2,
    )

    def load(rank, ranks):
        return make_loader(data, models / "vae", encoder.tokenize, rank=rank, ranks=ranks)

    old = [load(rank, 2) for rank in range(2)]
    before = [text for loader in old for text in texts(encoder, next(loader))]
    sizes = {tuple(next(loader).latents.shape[-2:]) for loader in old for _ in range(4)}
    assert sizes == {(4, 4), (4, 6), (5, 4)}
    assert old[0].sizes == (4, 1, 4, 6)

    old = [load(rank, 2) for rank in range(2)]
    for loader in old:
        next(loader)
    states = json.loads(json.dumps([loader.state_dict() for loader in old]))
    again = load(1, 2)
    again.load_state_dict(states)
    for _ in range(3):
        assert texts(encoder, next(again)) == texts(encoder, next(old[1]))
    one = load(0, 1)
    one.load_state_dict(states)
    after = [text for _ in range(9) for text in texts(encoder, next(one))]
    epoch, later = Counter(before), Counter()
    for text in after:
        (later if epoch[text] else epoch)[text] += 1
    assert epoch == Counter(f"image {n}" for n in range(10))
    assert max(later.values(), default=0) <= 2


def test_checkpoint_of_other_data_is_refused(shards, models, encoder, tmp_path):
    data = settings(shards, tmp_path)
    state = make_loader(data, models / "vae", encoder.tokenize).state_dict()
    other = make_loader(replace(data, seed=1), models / "vae", encoder.tokenize)
    with pytest.raises(ValueError, match="seed was 0 when the checkpoint was written, now 1"):
        other.load_state_dict([state])


def test_unlike_sizes_without_buckets_are_refused(shards, models, encoder, tmp_path):
    data = settings(shards, tmp_path, kinds=("images",), size=None)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    with pytest.raises(ValueError, match="set size or buckets"):
        [next(loader) for _ in range(4)]


@pytest.mark.parametrize("together", [1, 2, 64])
def test_every_epoch_sees_each_sample_once(together, monkeypatch):
    monkeypatch.setattr(data_module, "SHUFFLED_TOGETHER", together)
    counts = {"images": [3, 0, 5, 1], "clips": [4, 2]}
    order = Order(counts, 0.25, seed=1)
    places = [order.locate(number) for number in range(36 * 4)]
    for kind, lengths in counts.items():
        mine = [place[1:] for place in places if place[0] == kind]
        everything = {(s, n) for s, length in enumerate(lengths) for n in range(length)}
        epochs = [mine[i : i + sum(lengths)] for i in range(0, len(mine), sum(lengths))]
        whole = [epoch for epoch in epochs if len(epoch) == sum(lengths)]
        assert all(set(epoch) == everything for epoch in whole) and len(whole) > 2
        assert len(set(map(tuple, epochs))) > 0.7 * len(epochs) > 2
        if together == 1:  # shard after shard
            shards = [shard for shard, _ in epochs[0]]
            assert sum(a != b for a, b in pairwise(shards)) == len([n for n in lengths if n]) - 1


def test_windows_of_a_run_without_starts_are_new_at_every_reading(
    shards, models, encoder, tmp_path
):
    data = settings(shards, tmp_path, kinds=("clips",), starts=0, p_null=0.0, batch=1)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    means = {}
    for number in range(80):
        sample = loader.reader[number]
        if isinstance(sample, Sample):
            means.setdefault(sample.text, []).append(float(sample.pixels[0, ..., 2].float().mean()))
    assert all(len(set(values)) > 1 for values in means.values()) and len(means) == 5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kinds": ("pictures",)}, "kinds is"),
        ({"batch": 0}, "batch is 0, must be at least 1"),
        ({"workers": -1}, "workers is -1, must not be negative"),
        ({"p_motion_free": 1.5}, "p_motion_free is 1.5, must be between 0 and 1"),
        ({"crop": "left"}, "crop is 'left', must be center or random"),
        ({"size": (32, 0)}, "a size is"),
        ({"in_memory": True, "buckets": ((8, 8), (8, 16))}, "in_memory takes one size"),
    ],
    ids=str,
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        DataSettings(**options)
