"""Frames and captions of a sample: which, how large, cut where."""

from fractions import Fraction

import numpy
import pytest
import torch
from PIL import Image
from samples import as_file, picture, video

from gentron_train.data.broken import BrokenSample
from gentron_train.data.decode import Sampling, decode_image, pick_frames, read_caption, read_frames
from gentron_train.data.sources import seeded

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
