"""A teacher's stored sampling: what is kept is what it gives there, and a student learns it."""

import io
import json
import shutil
import tarfile
from dataclasses import replace

import pytest
import torch
from families import relative
from safetensors.torch import load
from test_teacher import CPU, settings  # noqa: F401
from training import finish, launch, log_of

from gentron_fast import GenTronPipeline
from gentron_fast.guidance import guided_prediction
from gentron_train.assembly import build_parts
from gentron_train.data.loader import make_loader
from gentron_train.data.precompute import main as precompute
from gentron_train.data.shards import Shard, count, read, read_facts
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
    options = ["--frames=3", "--workers=0", "--size=64x64"]
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
        for share, fresh in ((0.5, 2), (0.8, 1), (0.1, 4)):
            mixed = make_teacher(replace(on_stored, p_trajectory=share), facts, CPU)
            part = mixed.targets(batch, batch.text)
            assert torch.equal(part.noise[fresh:], own.noise[fresh:])
            assert torch.equal(part.timestep[:fresh], batch.timestep[:fresh])
            assert len(part.noise) == len(part.guidance) == part.text.batch == 4
    assert 0 < nulls < 16 and len(seen) > 3


def rows(count):
    return [slice(row, row + 1) for row in range(count)]


def test_what_is_there_is_kept_and_the_batch_changes_no_draw(
    latents, stored, tiny_pipeline_folder, tmp_path
):
    out, command = tmp_path / "out", [f"{latents}/*.tar"]
    out.mkdir()
    first, *others = sorted(stored.glob("*.tar"))
    shutil.copy(first, out)
    options = [f"--teacher={tiny_pipeline_folder}", *OPTIONS, "--p-null=0.3"]
    assert main([*command, str(out), *options, "--batch=5"]) == 0
    assert (out / first.name).read_bytes() == first.read_bytes()
    for path in others:
        for ours, theirs in zip(*map(tensors_of, (out / path.name, path)), strict=True):
            for name, tensor in ours.items():
                sampled = name in ("trajectory.latents", "trajectory.noise")
                most = 1e-2 if sampled else 0
                assert (tensor.float() - theirs[name].float()).abs().max() <= most


def tensors_of(path):
    shard = Shard(str(path), path)
    return [load(read(shard, row)[1]["safetensors"]) for row in range(count(shard)[0])]


def test_damaged_samples_stay_as_they_are(latents, tiny_pipeline_folder, tmp_path):
    source = sorted(latents.glob("*.tar"))[0]
    with tarfile.open(source) as old, tarfile.open(tmp_path / source.name, "w") as new:
        for number, member in enumerate(old.getmembers()):
            content = old.extractfile(member).read()
            if number == 1:
                content = content[: len(content) // 2]
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    command = [str(tmp_path / source.name), str(tmp_path / "out"), *OPTIONS]
    assert main([*command, f"--teacher={tiny_pipeline_folder}"]) == 0
    made, old = (
        Shard(str(path), path) for path in (tmp_path / "out" / source.name, tmp_path / source.name)
    )
    assert count(made) == count(old)
    same = [read(made, row)[1] == read(old, row)[1] for row in range(count(made)[0])]
    assert same == [True] + [False] * (len(same) - 1)


def test_a_student_learns_from_what_is_stored(stored, tiny_pipeline_folder, tmp_path, world):
    options = (f"--teacher={tiny_pipeline_folder}", "--max-lambda-t=8", "--size=64x64")
    options += (f"--vae={tiny_pipeline_folder}/vae", f"--init={tiny_pipeline_folder}")
    options += ("--batch=4", "--frames=3", "--p-motion-free=0", "--p-image=0.25", "--p-null=0")
    options += (
        "--teacher-rescale=0.7",
        "--no-in-memory",
        "--windows-per-clip=2",
        "--p-trajectory=1",
        "--draws=1",
    )
    run = tmp_path / "run"
    data = (f"--images={stored}/images-*.tar", f"--clips={stored}/clips-*.tar")
    command = launch("train/distill.py", world, run, *options, *data, "--steps=3", "--minutes=5")
    assert "own sampling in 3 to 4 steps (100%, stored)" in finish(command)
    assert [row["step"] for row in log_of(run)][-1] == 3
    made = GenTronPipeline.from_pretrained(run / "pipeline")
    assert made.transformer.config.guidance_embedding


def test_what_does_not_fit_is_one_line(
    on_stored, latents, stored, world, tiny_pipeline_folder, tmp_path, capsys
):
    facts = on_stored.data_settings("distill").trajectories
    with pytest.raises(ValueError, match=r"--p-null is 0.1, must be 0: captions were dropped"):
        make_teacher(replace(on_stored, p_null=0.1), facts, CPU)
    for changes, words in (
        ({"teacher_rescale": 0.3}, "--teacher-rescale 0.7, this run has 0.3"),
        ({"max_lambda_t": 9.0}, "--max-lambda-t 8.0, this run has 9.0"),
    ):
        with pytest.raises(ValueError, match=words):
            make_teacher(replace(on_stored, **changes), facts, CPU)
    mixed = replace(on_stored, images=f"{latents}/images-*.tar", p_image=0.25)
    mixed = mixed.data_settings("distill")
    with pytest.raises(ValueError, match="of images and of clips were not made alike"):
        make_loader(mixed, on_stored.vae, None)
    other = replace(on_stored, teacher=None, init=tiny_pipeline_folder, p_trajectory=0.5)
    with pytest.raises(ValueError, match="for which 30% of their captions were dropped"):
        build_parts(other, "t2v", other.data_settings("t2v"), CPU)
    with pytest.raises(ValueError, match="are not of"):
        make_teacher(on_stored, facts | {"teacher": "another"}, CPU)
    out, teacher = tmp_path / "out", f"--teacher={tiny_pipeline_folder}"
    wrong = (
        ([f"{world}/data/*.tar", str(out), teacher, *OPTIONS], "holds no text embeddings"),
        ([f"{latents}/*.tar", str(stored), teacher, *OPTIONS], "was made otherwise"),
        ([f"{latents}/*.tar", str(latents), teacher, *OPTIONS], "over itself"),
        ([f"{stored}/*.tar", str(out), teacher, *OPTIONS], "holds trajectories: name what it was"),
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
