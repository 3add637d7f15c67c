"""Frames and captions of a sample: which, how large, cut where."""

import io
import struct
from contextlib import contextmanager
from fractions import Fraction
from zlib import compress, crc32

import av
import numpy
import pytest
import torch
from PIL import Image
from samples import as_file, picture, video

from gentron_fast.media import read_video, write_media
from gentron_train.data import decode
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
        assert shown_numbers(window) == picks


def shown_numbers(frames) -> list[int]:
    """The numbers of the frames of a clip that `video` made."""
    return (frames[..., 2].float().mean((-2, -1)) / 5).round().int().tolist()


@pytest.mark.parametrize(
    "ending, container, codec",
    [
        ("avi", "avi", "libx264"),  # holds no time of reordered frames
        ("mkv", "matroska", "libx264"),
        ("webm", "webm", "libvpx-vp9"),
        ("mov", "mov", "libx264"),
        ("gif", None, None),
    ],
)
def test_clips_of_any_container_show_the_picked_frames(ending, container, codec, tmp_path):
    if container:
        content = video(range(50), container=container, codec=codec)
    else:
        frames = numpy.zeros((50, 32, 32, 3), numpy.uint8)
        frames[..., 2] = 5 * numpy.arange(50)[:, None, None]
        write_media(tmp_path / "clip.gif", frames, 24)
        content = (tmp_path / "clip.gif").read_bytes()
    windows = read_frames({ending: content}, Sampling(), seeded(1))
    for numbers in shown_numbers(windows):
        gaps = numpy.diff(numbers)
        # Milliseconds, or hundredths of a second, are not exactly a 24th.
        assert numbers[0] <= 8 and abs(gaps - 6).max() <= 1 and numbers[-1] - numbers[0] == 42
    for cut in (content[: len(content) // 2], content[:-20]):
        with pytest.raises(BrokenSample) as error:
            read_frames({ending: cut}, Sampling(), seeded(1))
        assert error.value.cause == "unreadable video"


def cut_before(content: bytes, seconds: float) -> bytes:
    """An mp4's frames from there on, as `ffmpeg -ss -c copy` cuts: with those that they depend on,
    which an edit list hides."""
    file = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(file, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                shift = int(seconds / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                target.mux(packet)
    return file.getvalue()


def test_a_clip_cut_without_encoding_shows_what_is_left():
    content = cut_before(video(range(51), gop=48), 5 / 24)
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].frames == 51
    windows = read_frames({"mp4": content}, Sampling(starts=8), seeded(1))
    numbers = shown_numbers(windows)
    assert {tuple(numpy.diff(row)) for row in numbers} == {(6,) * 7}
    assert {row[0] for row in numbers} <= {5, 6, 7, 8} and len({row[0] for row in numbers}) > 1


def test_a_header_that_counts_a_dropped_frame_is_right():
    """As recorders write an AVI: the packet of a frame that was dropped is empty."""
    times = [n for n in range(51) if n != 25]
    content = video(times, container="avi", codec="ffv1")
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].frames == 51
    for numbers in shown_numbers(read_frames({"avi": content}, Sampling(starts=4), seeded(1))):
        shown = [times[number] for number in numbers]
        moments = range(shown[0], shown[0] + 48, 6)
        wanted = [24 if moment == 25 else moment for moment in moments]  # the earlier neighbour
        assert shown == wanted


def with_matrix(content: bytes, *matrix: int) -> bytes:
    """An mp4 with another display matrix: a b c d, the others as they are."""

    def row(a, b, c, d):
        values = (a << 16, b << 16, 0, c << 16, d << 16)
        return b"".join(value.to_bytes(4, "big", signed=True) for value in values)

    at = content.index(row(1, 0, 0, 1), content.index(b"tkhd"))
    return content[:at] + row(*matrix) + content[at + 20 :]


@pytest.mark.parametrize(
    "matrix, turns, mirrored",
    [
        ((0, 1, -1, 0), 3, False),
        ((-1, 0, 0, -1), 2, False),
        ((0, -1, 1, 0), 1, False),
        ((-1, 0, 0, 1), 0, True),
        ((0, 1, 1, 0), 1, True),
    ],
    ids=str,
)
def test_video_is_turned_as_it_is_shown(matrix, turns, mirrored, tmp_path):
    """Quarter turns to the left of a picture that is mirrored left to right first, or not."""
    content, sampling = video(range(48), size=(32, 64)), Sampling(starts=1)
    lying = read_frames({"mp4": content}, sampling, seeded(1))[0]
    turned = with_matrix(content, *matrix)
    expected = torch.rot90(lying.flip(2) if mirrored else lying, turns, (1, 2))
    assert torch.equal(read_frames({"mp4": turned}, sampling, seeded(1))[0], expected)
    wide = Sampling(starts=1, buckets=((32, 64), (64, 32)))
    shape = read_frames({"mp4": turned}, wide, seeded(1)).shape[2:4]
    assert shape == ((64, 32) if turns % 2 else (32, 64))
    (tmp_path / "clip.mp4").write_bytes(turned)
    assert read_video(tmp_path / "clip.mp4")[0].shape[1:3] == shape


@pytest.mark.parametrize("aspect, size", [("4/3", (30, 64)), ("1/2", (60, 48))])
def test_pixels_of_video_are_square(aspect, size):
    content = video(range(48), size=(30, 48), aspect=Fraction(aspect))
    frames = read_frames({"mp4": content}, Sampling(starts=1), seeded(1))[0]
    assert frames.shape[1:3] == size
    red, green = frames[0, ..., 0].float().mean(0), frames[0, ..., 1].float().mean(1)
    for line in (red, green):  # from edge to edge still
        assert float(line[0]) < 12 and float(line[-1]) > 243


def test_a_thumbnail_is_not_the_clip():
    files = {"jpg": as_file(picture(32, 32), "jpg"), "mp4": video(range(48))}
    shapes = {None: (2, 8), "clips": (2, 8), "images": (1, 1)}
    for kind, shape in shapes.items():
        assert read_frames(files, Sampling(), seeded(0), kind=kind).shape[:2] == shape
    for kind, ending in (("images", "mp4"), ("clips", "jpg")):
        with pytest.raises(BrokenSample) as error:
            read_frames({ending: files[ending]}, Sampling(), seeded(0), kind=kind)
        assert error.value.cause == f"no {kind[:-1]}"


def test_windows_far_apart_are_decoded_alone(monkeypatch):
    """Of 600 frames with a keyframe every twelve: what lies between the windows is not decoded."""
    content, decoded, sampling = video(range(600)), [], Sampling()
    generator = seeded(4)
    picks = [pick_frames(list(range(600)), Fraction(1, 24), sampling, generator) for _ in range(2)]
    assert abs(picks[0][0] - picks[1][0]) > 300
    open_clip = decode._open_clip

    class Counted:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.pts)
                yield frame

    @contextmanager
    def counting(content):
        with open_clip(content) as (container, stream):
            yield Counted(container), stream

    monkeypatch.setattr(decode, "_open_clip", counting)
    windows = read_frames({"mp4": content}, sampling, seeded(4))
    blue = windows[..., 2].float().mean((-2, -1))
    assert (blue - 5 * torch.tensor(picks) % 256).abs().max() < 3
    assert len(decoded) < 150


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


def test_what_is_transparent_is_white(tmp_path):
    """Whatever colour is hidden, in modes of images as in a clip."""
    shown = numpy.zeros((8, 8, 4), numpy.uint8)
    shown[:4] = 255, 0, 0, 0
    shown[4:] = 0, 0, 200, 127
    image = Image.fromarray(shown)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    grey = Image.new("LA", (8, 8), (7, 0))
    files = [as_file(image, "png"), as_file(image, "webp", lossless=True, exact=True)]
    mixed = torch.tensor([128, 128, 228], dtype=torch.uint8)
    for content in files:
        pixels = decode.decode_image(content)
        assert (pixels[:4] == 255).all() and (pixels[4:] == mixed).all()
    for content in (as_file(palette, "png", transparency=1), as_file(grey, "png")):
        assert (decode.decode_image(content) == 255).all()
    file = tmp_path / "clip.mkv"
    with av.open(file, "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = 8, 8, "bgra"
        for _ in range(48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, "rgba")))
        container.mux(stream.encode())
    frames = read_frames({"mkv": file.read_bytes()}, Sampling(), seeded(0))
    assert (frames[..., :4, :, :] == 255).all() and (frames[..., 4:, :, :] == mixed).all()


def test_grey_of_16_bits_keeps_its_high_ones():
    ramp = numpy.arange(0, 65536, 64, numpy.uint16).reshape(32, 32)
    pixels = decode.decode_image(as_file(Image.fromarray(ramp), "png"))
    assert torch.equal(pixels, torch.from_numpy(ramp >> 8).byte()[..., None].expand(-1, -1, 3))


def png(depth: int, colour: int, row: bytes, hidden: bytes) -> bytes:
    """A PNG of four equal rows of four pixels, one of its colours transparent."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc32(name + data))

    header = struct.pack(">IIBBBBB", 4, 4, depth, colour, 0, 0, 0)
    parts = {b"IHDR": header, b"tRNS": hidden, b"IDAT": compress((b"\0" + row) * 4), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())


@pytest.mark.parametrize(
    "depth, colour, row, hidden, second",
    [
        (16, 0, struct.pack(">4H", 4660, 4661, 4660, 4660), [4660], 18),
        (8, 0, b"\x33\x34\x33\x33", [0x33], 0x34),
        (4, 0, b"\x34\x33", [3], 0x44),
        (2, 0, b"\x65", [1], 170),
        (16, 2, struct.pack(">12H", *[32768] * 3, *[512] * 3, *[32768] * 6), [32768] * 3, 2),
    ],
)
def test_a_colour_that_a_png_names_transparent_is_white(depth, colour, row, hidden, second):
    pixels = decode.decode_image(png(depth, colour, row, struct.pack(f">{len(hidden)}H", *hidden)))
    assert pixels[0, :2].tolist() == [[255] * 3, [second] * 3]
    assert (pixels[:, 2:] == 255).all()


def test_a_line_of_pixels_does_not_fill_the_memory():
    with pytest.raises(BrokenSample, match="extreme size"):
        read_frames(
            {"png": as_file(Image.new("RGB", (20000, 1)), "png")},
            Sampling(size=(512, 512)),
            seeded(0),
        )


@pytest.mark.parametrize(
    "files, caption",
    [
        ({"txt": b"\xef\xbb\xbfa"}, "a"),
        ({"json": b'\xef\xbb\xbf{"caption": null, "text": "b"}'}, "b"),
        ({"json": b'{"caption": " ", "text": "b"}'}, "b"),
        ({"json": b'{"caption": 5, "text": "b"}'}, "b"),
        ({"json": rb'{"caption": "\ud800", "text": "b"}'}, "b"),
        ({"json": b'{"caption": " ", "text": 5}'}, "empty caption"),
        ({"json": b'{"caption": null, "text": null}'}, "no caption"),
        ({"json": b"[" * 100_000}, "unreadable caption"),
        ({"json": b'{"caption": ' + b"9" * 5000 + b"}"}, "unreadable caption"),
        ({"json": b'"caption"'}, "unreadable caption"),
        ({"json": rb'{"caption": "\ud800"}'}, "unreadable caption"),
        ({"txt": "a réd circle\n".encode()}, "a réd circle\n"),
        ({"json": b'{"caption": "a"}'}, "a"),
        ({"json": b'{"text": "b"}', "jpg": b""}, "b"),
        ({"json": b'{"caption": "a"}', "txt": b"c"}, "c"),
        ({"png": b""}, "no caption"),
        ({"0.png": b"", "0.txt": b"a"}, "no caption (a sample's name ends at its first dot)"),
        ({"png": b"", "seg.tar": b""}, "no caption"),
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
