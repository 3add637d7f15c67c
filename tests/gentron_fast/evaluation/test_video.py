"""Measures of clips against values by hand, and their command."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from gentron_fast.evaluation.video import (
    block_motion,
    first_frame_psnr,
    main,
    temporal_flickering,
)
from gentron_fast.media import write_media
from gentron_train.small_world.renderer import DIRECTIONS, FPS, render_clip, seen_prompts


def texture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def moving(dy, dx, frames=4, size=64):
    """A window that goes over a texture: what it shows moves by (dy, dx) a frame."""
    whole, middle = texture(3 * size, 3 * size), size
    tops = [middle - dy * t for t in range(frames)], [middle - dx * t for t in range(frames)]
    return np.stack([whole[y : y + size, x : x + size] for y, x in zip(*tops, strict=True)])


def test_temporal_flickering():
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    assert temporal_flickering(frames) == 1
    frames[1] = 51  # differences of 51 and of 51 - 0: a fifth of 255
    assert temporal_flickering(frames) == pytest.approx(0.8)
    frames[2, 0] = 255  # 51 and then (204 + 51) / 2
    assert temporal_flickering(frames) == pytest.approx(1 - (51 + 127.5) / 2 / 255)


@pytest.mark.parametrize("step", [(0, 0), (0, 3), (0, -3), (5, 0), (-4, 3), (8, -8)], ids=str)
def test_block_motion_of_what_moves_as_a_whole(step):
    speed, share = block_motion(moving(*step))
    assert speed == pytest.approx(math.hypot(*step)) and share == (step != (0, 0))


def test_block_motion_of_a_patch():
    frames = np.repeat(texture(64, 64)[None], 4, 0)
    patch = texture(16, 16, seed=1)
    for index in range(4):
        frames[index, 24:40, 8 + 8 * index : 24 + 8 * index] = patch
    # Two rows of two blocks, of 6 × 6 that count.
    assert block_motion(frames) == (pytest.approx(8), pytest.approx(4 / 36))


def test_block_motion_of_the_small_world():
    scenes = [scene for _, scene in seen_prompts(60) if scene.motion in DIRECTIONS][:8]
    every = 6  # four frames a second
    for scene in scenes:
        true = every * math.hypot(*scene.objects[0].velocity) / FPS
        assert block_motion(render_clip(scene, every=every)).speed == pytest.approx(true, rel=0.3)


def test_noise_of_a_plain_picture_is_no_motion():
    noise = np.random.default_rng(0).integers(0, 2, (4, 64, 64, 3), np.uint8)
    assert block_motion(128 + noise) == (0, 0)


def test_first_frame_psnr():
    one, other = np.zeros((2, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 5, np.uint8)
    assert first_frame_psnr(one, other) == pytest.approx(20 * math.log10(255 / 5))
    assert first_frame_psnr(one, one[:1]) == math.inf
    with pytest.raises(ValueError, match="4 x 4 and 4 x 2 pixels"):
        first_frame_psnr(one, other[:, :, :2])


def test_the_command(tmp_path, capsys):
    still, shifting = np.full((4, 64, 64, 3), 90, np.uint8), moving(0, 4)
    write_media(tmp_path / "clips/still.mp4", still, 4)
    write_media(tmp_path / "clips/shifting.gif", shifting, 4)
    (tmp_path / "images").mkdir()
    Image.fromarray(still[0]).save(tmp_path / "images/still.png")
    Image.fromarray(shifting[0] // 2).save(tmp_path / "images/shifting.png")
    command = [str(tmp_path / "clips"), "--against", str(tmp_path / "images")]
    assert main([*command, "--out", str(tmp_path / "video.json")]) == 0
    values = json.loads((tmp_path / "video.json").read_text())
    assert values["still"]["temporal_flickering"] == 1 and values["still"]["block_speed"] == 0
    assert values["shifting"]["block_speed"] == pytest.approx(4, abs=0.1)
    assert 5 < values["shifting"]["first_frame_psnr"] < 15
    out = capsys.readouterr().out
    assert (
        "clips                2" in out
        and "block motion         2.00 pixels a frame, 50.0 % of blocks" in out
    )


@pytest.mark.parametrize(
    ("name", "frames", "told"),
    [
        ("a.gif", 1, "a clip of 1 frame shows no motion"),
        ("a.png", 1, "a.png, which is no clip"),
        ("b.mp4", 4, "has no 'b'"),
    ],
)
def test_wrong_folders_are_told(tmp_path, capsys, name, frames, told):
    write_media(tmp_path / "clips" / name, np.zeros((frames, 32, 32, 3), np.uint8), 4)
    write_media(tmp_path / "other/a.mp4", np.zeros((4, 32, 32, 3), np.uint8), 4)
    assert main([str(tmp_path / "clips"), "--against", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
