"""Training data: what is drawn from it, in which order, and what happens to what is broken."""

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import av
import numpy
import pytest
import torch
from PIL import Image

from gentron_train.broken import BrokenSample
from gentron_train.data import DataSettings, Loader, Position, make_loader
from gentron_train.decode import Sampling, decode_image, pick_frames, read_caption, read_frames
from gentron_train.shapes import vocabulary, write_shards
from gentron_train.shards import find_shards
from gentron_train.small import small_text_encoder, small_vae
from gentron_train.sources import (
    LatentSet,
    MemorySource,
    encode_shards,
    latents_path,
    load_latents,
    seeded,
    select_tokens,
)

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


def video(times, time_base=Fraction(1, 24), size=(32, 32), **options) -> bytes:
    """An mp4 whose nth frame, shown at times[n], is a picture with blue at 5·n."""
    file = io.BytesIO()
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
    return file.getvalue()


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
