"""The teacher of a distillation against the definition of guidance, and a student's run."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from families import relative
from safetensors.torch import load_file
from training import finish, launch, log_of, settings_of

from gentron_fast import GenTron, GenTronPipeline
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule
from gentron_fast.guidance import GuidedDenoiser, guided_prediction
from gentron_train.assembly import check_start, load_text_encoder
from gentron_train.data.loader import make_loader
from gentron_train.memory import model_config
from gentron_train.objective import Objective
from gentron_train.settings import Settings
from gentron_train.sharding import stored_weights
from gentron_train.teacher import Teacher

CPU = torch.device("cpu")


@pytest.fixture
def settings(world, tiny_pipeline_folder, tmp_path) -> Settings:
    changes = dict.fromkeys(("teacher", "init"), tiny_pipeline_folder)
    changes |= {"vae": tiny_pipeline_folder / "vae", "draws": 1}
    changes |= {"batch": 4, "p_null": 0.0, "p_motion_free": 0.0, "p_image": 0.0}
    torch.manual_seed(0)
    changes |= {
        "max_lambda_t": 8.0,
        "min_trajectory_steps": 3,
        "max_trajectory_steps": 4,
        "teacher_rescale": 0.7,
    }
    made = settings_of(world, tiny_pipeline_folder, tmp_path / "run", "t2v", frames=3)
    return replace(made, **changes, in_memory=False, windows_per_clip=0, workers=0)


class Batches:
    """Micro-batches of the world and their text."""

    def __init__(self, settings: Settings):
        config = model_config(settings, "distill")
        self.encoder = load_text_encoder(settings, config, torch.float32).eval()
        data = settings.data_settings("distill")
        self.loader = make_loader(data, settings.vae, self.encoder.tokenize)

    @torch.no_grad()
    def __next__(self):
        batch = next(self.loader)
        return batch, self.encoder(batch.text)


@pytest.fixture
def batches(settings) -> Batches:
    return Batches(settings)


@pytest.mark.parametrize("p_trajectory", [0.0, 0.5, 1.0])
def test_targets_are_the_guided_noise_of_each_sample(settings, batches, p_trajectory):
    teacher = Teacher.from_pretrained(replace(settings, p_trajectory=p_trajectory), CPU)
    null_text = batches.encoder.encode([""])
    scales = []
    for _ in range(3):
        batch, text = next(batches)
        own = teacher.targets(batch, text)
        wanted = guided_prediction(
            *(teacher.model, own.latents, own.timestep, own.text, null_text.repeat(4)),
            *own.guidance.unbind(1),
            0.7,
        )
        assert relative(own.noise, wanted) < 1e-4
        scales += own.guidance.tolist()
        fresh = 4 - round(4 * p_trajectory)
        timestep = batch.timestep[:fresh]
        assert torch.equal(own.timestep[:fresh], timestep)
        noisy = NoiseSchedule.from_config(SCHEDULER_CONFIG).add_noise(
            batch.latents[:fresh], batch.noise[:fresh], timestep
        )
        torch.testing.assert_close(own.latents[:fresh], noisy)
    lambda_t, lambda_m = zip(*scales, strict=True)
    assert 1 <= min(lambda_t) < 3 < max(lambda_t) <= 8 and 1 <= min(lambda_m) < max(lambda_m) <= 1.3


def test_a_run_is_the_teachers_own_sampling(settings, batches, monkeypatch):
    teacher = Teacher.from_pretrained(replace(settings, p_trajectory=1.0), CPU)
    begun, begin = [], teacher._begun

    def watched(text, latents, noise, anywhere):
        run = begin(text, latents, noise, anywhere)
        begun.append((run, noise.clone(), anywhere))
        return run

    monkeypatch.setattr(teacher, "_begun", watched)
    teacher.targets(*next(batches))
    assert [anywhere for *_, anywhere in begun] == 4 * [True]
    assert len({run.step for run, *_ in begun}) > 1  # they are not all in step
    for _ in range(9):
        teacher.targets(*next(batches))
    assert max(map(len, teacher._runs.values())) <= 4
    null_text, checked = batches.encoder.encode([""]), 0
    for run, noise, anywhere in begun:
        table = run.denoiser.table
        if anywhere or run.step < len(table.timesteps):
            continue
        alone = GuidedDenoiser(
            *(teacher.model, run.text, null_text, table, *run.guidance.double().T, noise.shape),
            rescale=0.7,
        )
        latents, x0 = noise[None], None
        for step in range(len(table.timesteps)):
            latents, x0 = alone.step(latents, step, x0)
        assert relative(run.latents, latents) < 1e-3
        checked += 1
    assert checked > 3


@pytest.mark.parametrize("batch, share", [(1, 0.5), (2, 0.5), (3, 0.25)])
def test_a_share_is_kept_whatever_the_batch(settings, batches, monkeypatch, batch, share):
    teacher = Teacher.from_pretrained(replace(settings, p_trajectory=share), CPU)
    begun, begin = [], teacher._begun

    def counted(*sample, anywhere):
        begun.append(anywhere)
        return begin(*sample, anywhere)

    monkeypatch.setattr(teacher, "_begun", counted)
    whole, text = next(batches)
    names = "latents", "noise", "timestep"
    few = replace(whole, **{name: getattr(whole, name)[:batch] for name in names})
    along = 0
    for _ in range(24):
        targets = teacher.targets(few, text.select(slice(batch)))
        assert len(targets.latents) == batch
        along += int((targets.timestep != few.timestep).sum())
    assert abs(along - 24 * batch * share) <= 2
    # All but those of the first micro-batch begin with noise.
    assert begun.count(False) > 3 * begun.count(True) > 0


def test_without_guidance_a_fresh_student_has_nothing_to_learn(settings, batches):
    settings = replace(settings, max_lambda_t=1.0, max_lambda_m=1.0)
    teacher = Teacher.from_pretrained(settings, CPU)
    student = GenTron.from_teacher(teacher.model)
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    objective = Objective(student, None, schedule, torch.float32, 10)

    def loss(teacher) -> float:
        own = teacher.targets(*next(batches))
        inputs = own.latents, own.timestep, own.text
        return float(objective(*inputs, guidance=own.guidance, target=own.noise))

    assert loss(teacher) < 1e-9
    assert loss(Teacher.from_pretrained(replace(settings, max_lambda_t=6.0), CPU)) > 1e-4


def test_what_does_not_fit_is_refused(settings, tiny_t2i_folder, tmp_path):
    check_start(settings, "distill")
    other = tmp_path / "other"
    shutil.copytree(settings.teacher, other)
    for folder in ("vae", "text_encoder", "text_encoder_2"):
        with (other / folder / "config.json").open("a") as config:
            config.write("\n")
    (other / "text").mkdir()
    for name, folder in (("clip", "text_encoder"), ("t5", "text_encoder_2")):
        shutil.copytree(other / folder, other / "text" / name)
    wrong = (
        ({"teacher": None}, "distill", "needs --teacher PIPELINE"),
        ({}, "t2v", "--teacher is for distillation, not t2v"),
        ({"teacher": tmp_path}, "distill", "no whole pipeline: no model_index.json"),
        ({"p_motion_free": 0.2}, "distill", "--p-motion-free is 0.2, must be 0"),
        ({"draws": 2}, "distill", "--draws is 2, must be 1"),
        ({"fresh_temporal": True}, "distill", "--fresh-temporal would take its teacher's motion"),
        ({"init": tiny_t2i_folder}, "distill", "has temporal False, its teacher .* True"),
        ({"vae": other / "vae"}, "distill", "is another vae than that of the teacher"),
        ({"text": other / "text"}, "distill", "is another text_encoder.* than that of the teacher"),
        ({"max_lambda_t": 6.0}, "distill", r"samples at lambda_t 7.5 .* --max-lambda-t 6.0"),
    )
    for changes, stage, message in wrong:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            check_start(replace(settings, **changes), stage)
    for changes in ({"min_lambda_t": 9.0}, {"max_lambda_m": 1e9}, {"min_trajectory_steps": 60}):
        with pytest.raises(ValueError, match="must be a range within"):
            replace(settings, **changes)
    student = tmp_path / "student"
    config = replace(model_config(settings, "t2v"), guidance_embedding=True)
    GenTron(config).save_pretrained(student / "transformer")
    (student / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="student is distilled, its guidance an input"):
        check_start(replace(settings, teacher=None, init=student), "t2v")
    with pytest.raises(ValueError, match="distilled already: a teacher has three branches"):
        check_start(replace(settings, teacher=student), "distill")
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.01}))
    with pytest.raises(ValueError, match="is another noise schedule than that of training"):
        check_start(replace(settings, teacher=other, vae=other / "vae", init=other), "distill")
    images = replace(settings, teacher=tiny_t2i_folder, init=tiny_t2i_folder)
    assert images.data_settings("distill").kinds == ("images",)
    assert settings.data_settings("distill").kinds == ("clips",)
    assert replace(settings, p_image=0.1).data_settings("distill").kinds == ("images", "clips")
    assert model_config(images, "distill").guidance_embedding


def test_a_model_that_no_rank_holds_whole_starts_as_its_teacher(settings):
    folder = settings.teacher / "transformer"
    wanted = GenTron.from_teacher(GenTron.from_pretrained(folder)).state_dict()
    for part, tensors in stored_weights(folder, model_config(settings, "distill"), 0)():
        for name, tensor in tensors.items():
            if not (part == "guidance_embed" and ".0." in name):  # drawn anew
                assert torch.equal(tensor, wanted[f"{part}.{name}"])


def test_a_run_is_resumed_and_exported_as_a_pipeline(world, tiny_pipeline_folder, tmp_path):
    options = (f"--teacher={tiny_pipeline_folder}", f"--init={tiny_pipeline_folder}")
    options += (f"--vae={tiny_pipeline_folder}/vae",)
    options += ("--max-lambda-t=8",)
    options += ("--batch=4", "--frames=3", "--p-motion-free=0", "--p-image=0.25", "--save-every=4")
    run = tmp_path / "run"
    finish(launch("train/distill.py", world, run, *options, "--steps=4", "--minutes=5"))
    output = finish(launch("train/distill.py", world, run, *options, "--steps=6", "--resume"))
    assert "going on at step 4" in output
    assert "its teacher's own sampling in 10 to 50 steps (50%, sampled beside it)" in output
    assert [row["step"] for row in log_of(run)][-1] == 6
    pipeline = GenTronPipeline.from_pretrained(run / "pipeline")
    teacher = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    assert pipeline.transformer.config.guidance_embedding
    assert pipeline.defaults == replace(teacher.defaults, rescale=0.0)
    assert pipeline.learnt == {"lambda_t": (1.0, 8.0), "lambda_m": (1.0, 1.3)}
    moved = load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert moved["guidance_embed.text.mlp.2.weight"].abs().max() > 0
    output = pipeline("a star", steps=2, frames=2, size=64, progress=False)
    assert output.frames.shape == (1, 2, 64, 64, 3) and "distilled" in output.guidance
