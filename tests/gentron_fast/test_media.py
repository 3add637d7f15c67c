import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gentron_fast import media
from gentron_fast.media import contact_sheet, read_video, write_media


def make_frames(count=8, height=32, width=48):
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([x * 5, y * 7, np.full_like(x, 25 * index)], axis=-1) for index in range(count)
    ]
    return np.stack(frames).astype(np.uint8)


@pytest.mark.parametrize("fps", [4, 24, 30000 / 1001])
def test_mp4_round_trip(tmp_path, fps):
    frames = make_frames()
    write_media(tmp_path / "clip.mp4", frames, fps)
    read, read_fps = read_video(tmp_path / "clip.mp4")
    assert read.dtype == np.uint8
    assert read.shape == frames.shape
    assert read_fps == pytest.approx(fps, rel=1e-6)
    assert np.abs(read.astype(int) - frames).mean() < 5


def test_the_same_frames_become_the_same_file(tmp_path):
    frames, noise, found = make_frames(height=64, width=64), np.random.default_rng(0), set()
    kept = []
    for _ in range(40):
        kept.append(noise.bytes(int(noise.integers(1_000, 300_000))))  # other memory each time
        write_media(tmp_path / "clip.mp4", frames, 4)
        found.add((tmp_path / "clip.mp4").read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("fps", [4, 24, 30])
def test_gif_keeps_frames_and_total_time(tmp_path, fps):
    frames = make_frames(count=6)
    write_media(tmp_path / "clip.gif", frames, fps)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 6
        assert image.info["loop"] == 0
        durations = []
        for index in range(6):
            image.seek(index)
            durations.append(image.info["duration"])
            difference = np.asarray(image.convert("RGB")).astype(int) - frames[index]
            assert np.abs(difference).mean() < 12
    assert max(durations) - min(durations) <= 10
    assert abs(sum(durations) - 6000 / fps) <= 10


def test_png_is_lossless_and_holds_one_frame(tmp_path):
    frames = make_frames(count=1)
    write_media(tmp_path / "frame.PNG", frames, fps=4)
    with Image.open(tmp_path / "frame.PNG") as image:
        assert np.array_equal(np.asarray(image), frames[0])
    with pytest.raises(ValueError, match="a png holds one frame, not 2"):
        write_media(tmp_path / "frame.png", make_frames(count=2), fps=4)


@pytest.mark.parametrize("ending", ["mp4", "gif", "png"])
def test_torch_and_non_contiguous_frames_give_the_same_file(tmp_path, ending):
    frames = make_frames(count=1)
    strided = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()).permute(0, 2, 3, 1)
    write_media(tmp_path / f"a.{ending}", frames, fps=4)
    write_media(str(tmp_path / f"b.{ending}"), strided, fps=4)
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


@pytest.mark.parametrize("ending", ["mp4", "gif", "png"])
def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    for name in (f"12:30/clip.{ending}", f"http:{ending}.{ending}", f"%03d.{ending}"):
        write_media(name, make_frames(count=1), fps=4)
        assert (tmp_path / name).is_file()
        if ending == "mp4":
            assert len(read_video(name)[0]) == 1


def test_missing_folders_are_made(tmp_path):
    write_media(tmp_path / "new" / "deep" / "clip.gif", make_frames(), fps=4)
    assert (tmp_path / "new" / "deep" / "clip.gif").is_file()


@pytest.mark.parametrize("ending", ["mp4", "gif", "png"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, ending):
    path = tmp_path / f"clip.{ending}"
    path.write_bytes(b"old")

    def fail_half_way(name, *_):
        with open(name, "wb") as file:
            file.write(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(media, f"_write_{ending}", fail_half_way)
    with pytest.raises(RuntimeError, match="disk full"):
        write_media(path, make_frames(count=1), fps=4)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_wrong_input_is_refused(tmp_path):
    frames = make_frames()
    with pytest.raises(ValueError, match=r"'clip\.avi': its ending must be \.mp4, \.gif or \.png"):
        write_media("clip.avi", frames, fps=4)
    for wrong in (frames[0], frames[:0], frames[..., :2], frames.astype(np.float32)):
        with pytest.raises(ValueError, match=r"frames must be uint8 \(T, H, W, 3\), not "):
            write_media(tmp_path / "clip.gif", wrong, fps=4)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps must be a positive number"):
            write_media(tmp_path / "clip.gif", frames, fps)
    with pytest.raises(ValueError, match="an mp4 takes even sizes, not 31x48"):
        write_media(tmp_path / "clip.mp4", frames[:, :31], fps=4)
    assert not list(tmp_path.iterdir())


def test_read_video_refuses_what_is_no_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video at"):
        read_video(tmp_path / "nothing.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match="is no readable video"):
        read_video(tmp_path / "text.mp4")


def test_without_pyav_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        write_media(tmp_path / "clip.mp4", make_frames(), fps=4)
    write_media(tmp_path / "clip.gif", make_frames(), fps=4)


def test_contact_sheet_places_every_frame_and_pads_with_white():
    long, short = make_frames(count=3), make_frames(count=2)[:, ::-1]
    sheet = contact_sheet([long, torch.from_numpy(short.copy())], padding=2)
    assert sheet.shape == (2 * 32 + 2, 3 * 48 + 4, 3)
    expected = np.full_like(sheet, 255)
    for row, clip in enumerate((long, short)):
        for column, frame in enumerate(clip):
            expected[34 * row : 34 * row + 32, 50 * column : 50 * column + 48] = frame
    assert np.array_equal(sheet, expected)


def test_contact_sheet_folds_a_single_long_clip():
    assert contact_sheet([make_frames(count=8)], padding=0).shape == (32, 8 * 48, 3)
    frames = make_frames(count=10)
    sheet = contact_sheet([frames], padding=0)
    assert sheet.shape == (3 * 32, 4 * 48, 3)
    assert np.array_equal(sheet[64:, 48:96], frames[9])
    assert (sheet[64:, 96:] == 255).all()


def test_contact_sheet_refuses_nothing_and_mixed_sizes():
    with pytest.raises(ValueError, match="at least one clip"):
        contact_sheet([])
    with pytest.raises(ValueError, match=r"one size .*\(16, 48\), \(32, 48\)"):
        contact_sheet([make_frames(), make_frames()[:, :16]])
