"""The model that ships: its size, its text file, and the evaluator's score on 16 prompts."""

import re
from pathlib import Path

import pytest

import gentron_fast
from gentron_fast import GenTronPipeline
from gentron_fast.index import FAST

ASSETS = Path(gentron_fast.__file__).parent / "assets"
BOUND = r"^{}: colour (\d+) shape (\d+) motion (\d+)$"


def test_it_fits_in_sixteen_megabytes():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    fast = [path for path in files if path.is_relative_to(ASSETS / FAST)]
    sizes = [sum(path.stat().st_size for path in some) for some in (files, fast)]
    assert sizes[0] - sizes[1] <= 16_000_000 and sizes[1] <= 12 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("folder, line", [(ASSETS, "16 prompts"), (ASSETS / FAST, "16 by --fast")])
def test_it_scores_as_its_text_file_says(folder, line):
    from gentron_train.small_world.evaluator import evaluate

    stated = re.search(BOUND.format(line), (ASSETS / "MODEL.md").read_text(), re.MULTILINE)
    pipeline = GenTronPipeline.from_pretrained(folder)
    scores = evaluate(pipeline, 16, seed=0, columns=("seen",), progress=False)["seen"].shares
    for name, percent in zip(("colour", "shape", "motion"), stated.groups(), strict=True):
        # One clip in 16 is 6 %: another machine's rounding may turn one of them.
        assert 100 * scores[name] >= int(percent) - 7, (name, scores)
