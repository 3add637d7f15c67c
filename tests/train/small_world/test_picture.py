"""The README's picture: every fixed prompt is there, by the pipeline's own defaults."""

import numpy as np
from PIL import Image

from gentron_train.small_world.picture import COLUMNS, LINE, PROMPTS, main, picture


def test_every_clip_has_its_place():
    frames = np.zeros((len(PROMPTS), 3, 8, 8, 3), np.uint8)
    frames[5] = (200, 10, 10)
    sheet = picture(frames)
    height = sheet.shape[0] // (len(PROMPTS) // COLUMNS)
    red = (sheet == (200, 10, 10)).all(-1)
    rows, columns = np.nonzero(red)
    assert red.sum() == 3 * 8 * 8
    assert rows.min() // height == rows.max() // height == 2 and rows.min() % height >= LINE
    assert columns.min() >= sheet.shape[1] // COLUMNS


def test_the_command(tiny_pipeline_folder, tmp_path, capsys):
    assert main([str(tiny_pipeline_folder), "--out", str(tmp_path / "clips.png")]) == 0
    assert Image.open(tmp_path / "clips.png").size[0] > 8 * 64
    assert [path.name for path in tmp_path.iterdir()] == ["clips.png"]
