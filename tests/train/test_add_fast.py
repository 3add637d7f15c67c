"""A distilled model beside its teacher: what `generate --fast` then takes, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest

from gentron_fast import GenTron, GenTronPipeline
from gentron_fast.index import FAST
from gentron_train.add_fast import main


@pytest.fixture
def folders(tiny_pipeline_folder, tmp_path):
    """A teacher's folder, and its student's."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(tiny_pipeline_folder, teacher)
    pipeline = GenTronPipeline.from_pretrained(teacher)
    pipeline.transformer = GenTron.from_teacher(pipeline.transformer)
    pipeline.defaults = replace(pipeline.defaults, lambda_t=2.0, rescale=0.0)
    pipeline.save_pretrained(student)
    return teacher, student


def test_the_student_has_its_teachers_parts_and_few_steps(folders):
    teacher, student = folders
    for options, steps in (([], 8), (["--steps", "4"], 4)):  # the second takes its place
        assert main([str(teacher), str(student), *options]) == 0
        fast = GenTronPipeline.from_pretrained(teacher / FAST)
        assert fast.transformer.config.guidance_embedding
        own = fast.defaults
        assert (own.lambda_t, own.steps, own.solver) == (2.0, steps, "few-step")
    assert not (teacher / FAST / "vae").exists()
    assert (student / "vae").is_dir()


def test_a_folder_of_somebody_elses_stays(folders, capsys):
    teacher, student = folders
    (teacher / FAST).mkdir()
    (teacher / FAST / "mine.txt").write_text("mine")
    assert main([str(teacher), str(student)]) == 2
    assert "holds mine.txt" in capsys.readouterr().err
    assert [path.name for path in (teacher / FAST).iterdir()] == ["mine.txt"]


def test_what_is_no_pair_is_refused_and_nothing_written(folders, tmp_path, capsys):
    teacher, student = folders
    for pair, words in (
        ((teacher, tmp_path), "is no whole pipeline: no model_index.json"),
        ((tmp_path / "none", student), "is no whole pipeline"),
        ((teacher, teacher), "is not distilled: train/distill.py --teacher"),
        ((student, student), "is distilled itself: name its teacher's folder"),
    ):
        assert main(list(map(str, pair))) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    path = student / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 16}))
    assert main([str(teacher), str(student)]) == 2
    assert "has in_channels 16" in capsys.readouterr().err
    assert not (teacher / FAST).exists() and not (student / FAST).exists()
