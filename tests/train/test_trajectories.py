"""A teacher's stored sampling: what is kept is what it gives there, and a student learns it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from families import relative
from test_teacher import CPU, settings  # noqa: F401
from training import finish, launch, log_of

from gentron_fast import GenTronPipeline
from gentron_fast.guidance import guided_prediction
from gentron_train.data.loader import make_loader
from gentron_train.data.precompute import main as precompute
from gentron_train.data.shards import Shard, count, read_facts
from gentron_train.data.sources import load_facts
from gentron_train.teacher import StoredTeacher, Teacher, make_teacher
from gentron_train.trajectories import main

OPTIONS = ["--points=2", "--min-trajectory-steps=3", "--max-trajectory-steps=4", "--batch=4"]
OPTIONS += ["--max-lambda-t=8", "--teacher-rescale=0.7", "--dtype=fp32", "--device=cpu"]


@pytest.fixture(scope="module")
def latents(world, tiny_pipeline_folder, tmp_path_factory):
    """Precomputed shards of the world, with text embeddings."""
    folder = tmp_path_factory.mktemp("latents")
    command = [f"{world}/data/*.tar", str(folder), f"--pipeline={tiny_pipeline_folder}"]
    options = [f"--vae={world}/vae", "--frames=3", "--workers=0", "--size=64x64"]
    assert precompute(command + options) == 0
    return folder


@pytest.fixture(scope="module")
def stored(latents, tiny_pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories")
    command = [f"{latents}/*.tar", str(folder), f"--teacher={tiny_pipeline_folder}"]
    assert main([*command, *OPTIONS, "--p-null=0.3"]) == 0
    return folder


@pytest.fixture
def on_stored(settings, stored):  # noqa: F811
    return replace(settings, data=stored, size="64x64", windows_per_clip=2, p_trajectory=1.0)


def test_points_are_the_guided_noise_of_their_prompts(on_stored):
    data = on_stored.data_settings("distill")
    facts = data.trajectories
    assert (facts["points"], facts["teacher_rescale"], facts["p_null"]) == (2, 0.7, 0.3)
    source, null = make_loader(data, on_stored.vae, None), None
    teacher = Teacher.from_pretrained(on_stored, CPU)
    given = make_teacher(on_stored, facts, CPU)
    assert isinstance(given, StoredTeacher)
    null, nulls, seen = source.source.null, 0, set()
    for _ in range(4):
        batch = next(source)
        own = given.targets(batch, batch.text)
        wanted = guided_prediction(
            *(teacher.model, own.latents, own.timestep, own.text, null.repeat(4)),
            *own.guidance.unbind(1),
            0.7,
        )
        assert relative(own.noise, wanted) < 1e-2  # kept in fp16
        seen |= set(own.timestep.tolist())
        nulls += sum(int(row.clip.mask.sum()) == 2 for row in map(own.text.select, rows(4)))
        mixed = Teacher.from_pretrained(replace(on_stored, p_trajectory=0.5), CPU)
        half = mixed.targets(batch, batch.text)
        assert torch.equal(half.noise[2:], own.noise[2:])
        assert torch.equal(half.timestep[:2], batch.timestep[:2])
    assert 0 < nulls < 16 and len(seen) > 3


def rows(count):
    return [slice(row, row + 1) for row in range(count)]


def test_a_run_is_cut_off_anywhere_and_goes_on(latents, stored, tiny_pipeline_folder, tmp_path):
    out, command = tmp_path / "out", [f"{latents}/*.tar"]
    out.mkdir()
    first = sorted(stored.glob("*.tar"))[0]
    shutil.copy(first, out)
    options = [f"--teacher={tiny_pipeline_folder}", *OPTIONS]
    assert main([*command, str(out), *options, "--p-null=0.3"]) == 0
    for path in stored.glob("*.tar"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_student_learns_from_what_is_stored(stored, tiny_pipeline_folder, tmp_path, world):
    options = (f"--teacher={tiny_pipeline_folder}", "--max-lambda-t=8", "--size=64x64")
    options += ("--batch=4", "--frames=3", "--p-motion-free=0", "--p-image=0.25", "--p-null=0")
    options += ("--no-in-memory", "--windows-per-clip=2", "--p-trajectory=1", "--draws=1")
    run = tmp_path / "run"
    data = (f"--images={stored}/images-*.tar", f"--clips={stored}/clips-*.tar")
    finish(launch("train/distill.py", world, run, *options, *data, "--steps=3", "--minutes=5"))
    assert [row["step"] for row in log_of(run)][-1] == 3
    made = GenTronPipeline.from_pretrained(run / "pipeline")
    assert made.transformer.config.guidance_embedding


def test_what_does_not_fit_is_one_line(
    on_stored, latents, stored, world, tiny_pipeline_folder, tmp_path, capsys
):
    facts = on_stored.data_settings("distill").trajectories
    with pytest.raises(ValueError, match=r"--p-null is 0.1, must be 0: captions were dropped"):
        make_teacher(replace(on_stored, p_null=0.1), facts, CPU)
    with pytest.raises(ValueError, match="are not of"):
        make_teacher(on_stored, facts | {"teacher": "another"}, CPU)
    out, teacher = tmp_path / "out", f"--teacher={tiny_pipeline_folder}"
    wrong = (
        ([f"{world}/data/*.tar", str(out), teacher, *OPTIONS], "holds no text embeddings"),
        ([f"{latents}/*.tar", str(stored), teacher, *OPTIONS], "was made otherwise"),
        ([f"{latents}/*.tar", str(latents), teacher, *OPTIONS], "over itself"),
        ([f"{latents}/*.tar", str(out), f"--teacher={tmp_path}", *OPTIONS], "no whole pipeline"),
        ([f"{latents}/*.tar", str(out), teacher, *OPTIONS, "--p-null=2"], "--p-null is 2.0"),
        ([f"{latents}/*.tar", str(out), teacher, "--points=0"], "wanted a whole number"),
    )
    capsys.readouterr()
    for command, words in wrong:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert not list(out.glob("*")) if out.exists() else True


def test_older_shards_say_nothing_of_trajectories(latents):
    path = sorted(latents.glob("*.tar"))[0]
    shard = Shard(str(path), path)
    assert load_facts(read_facts(shard), "")[0].trajectories is None and count(shard)[0]
    assert b"trajectories" not in json.dumps(str(read_facts(shard))).encode()
