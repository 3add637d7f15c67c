"""The README's picture: every fixed prompt is there, by the pipeline's own defaults."""

import numpy as np
import pytest
from PIL import Image

from gentron_train.small_world.picture import COLUMNS, LINE, NAME, PROMPTS, main, picture


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere"),
        (["nowhere", "--out", "/dev/null/x.png"], "cannot write into /dev/null: Not a directory"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
    ids=str,
)
def test_wrong_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith(f"{NAME}: error: ")
    assert not any(tmp_path.iterdir())


def test_the_command(tiny_pipeline_folder, tmp_path, capsys):
    assert main([str(tiny_pipeline_folder), "--out", str(tmp_path / "clips.png")]) == 0
    assert Image.open(tmp_path / "clips.png").size[0] > 8 * 64
    assert [path.name for path in tmp_path.iterdir()] == ["clips.png"]
