"""A model with a guidance embedding: λ_T and λ_M are inputs, and one branch gives the guided noise,
in the definition, the denoiser, a batch, the pipeline, the engine and a compiled sampler."""

import warnings
from dataclasses import replace

import pytest
import torch
from compiled_files import embeddings, error, run_program
from families import relative
from safetensors.torch import save_file

from gentron_fast import GenTron, GenTronConfig, GenTronPipeline
from gentron_fast.compiled import CompiledPipeline, CompiledSampler
from gentron_fast.compiled.graphs import branch_sets
from gentron_fast.diffusion import SCHEDULER_CONFIG
from gentron_fast.export import main as export
from gentron_fast.guidance import (
    GuidedBatch,
    GuidedDenoiser,
    SharedWork,
    guidance_schedule,
    guidance_weights,
    guided_prediction,
)
from gentron_fast.pipeline import model_index
from gentron_fast.serving.engine import Engine, measured
from gentron_fast.serving.fields import ServedModel
from gentron_fast.solvers import make_table, solver_step

TABLE = make_table("dpm++", SCHEDULER_CONFIG, 4)
SHAPE = (4, 3, 8, 8)


@pytest.fixture(scope="module")
def config(tiny_config) -> GenTronConfig:
    return replace(tiny_config, guidance_embedding=True)


@pytest.fixture(scope="module")
def model(config, make_model) -> GenTron:
    return make_model(config)


def inputs_of(model, make_text, batch=2, shape=SHAPE):
    latents = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(5)).double()
    return latents, make_text(model.config, batch)


def test_a_student_starts_as_its_teachers_text_branch(tiny_config, make_model, make_text):
    teacher = make_model(tiny_config)
    student = GenTron.from_teacher(teacher).double()
    own = {key for key in student.state_dict() if key not in teacher.state_dict()}
    assert own == {
        f"guidance_embed.{scale}.mlp.{layer}.{part}"
        for scale in ("text", "motion")
        for layer in (0, 2)
        for part in ("weight", "bias")
    }
    latents, text = inputs_of(teacher, make_text)
    timestep = torch.tensor([40, 800])
    wanted = teacher(latents, timestep, text)
    for scales in ([1.0, 1.0], [7.5, 1.2]):
        guidance = torch.tensor(scales).expand(2, 2)
        assert torch.equal(student(latents, timestep, text, guidance=guidance), wanted)
    with pytest.raises(ValueError, match="distilled already"):
        GenTron.from_teacher(student)


def test_both_scales_are_inputs_and_of_an_image_the_texts_alone(model, make_text):
    latents, text = inputs_of(model, make_text)
    timestep = torch.tensor([40, 800])

    def guided(x, *scales):
        return guided_prediction(model, x, timestep, text, text, *scales)

    assert relative(guided(latents, 3.0, 1.0), guided(latents, 4.0, 1.0)) > 1e-3
    assert relative(guided(latents, 3.0, 1.0), guided(latents, 3.0, 1.3)) > 1e-3
    one = latents[:, :, :1]
    assert torch.equal(guided(one, 3.0, 1.3), guided(one, 3.0, 1.0))
    assert relative(guided(one, 3.0, 1.0), guided(one, 4.0, 1.0)) > 1e-3


def test_guidance_of_another_shape_and_of_another_model_is_refused(model, make_model, make_text):
    latents, text = inputs_of(model, make_text)
    timestep = torch.tensor([40, 800])
    with pytest.raises(ValueError, match=r"guidance must be \(2, 2\), got none"):
        model(latents, timestep, text)
    with pytest.raises(ValueError, match=r"guidance must be \(2, 2\), got \(2,\)"):
        model(latents, timestep, text, guidance=torch.ones(2))
    plain = make_model(replace(model.config, guidance_embedding=False))
    with pytest.raises(ValueError, match=r"embeds no guidance, got \(2, 2\)"):
        plain(latents, timestep, text, guidance=torch.ones(2, 2))


@pytest.mark.parametrize(
    "lambda_t, lambda_m, clips",
    [
        (3.0, 1.0, 1),
        (torch.tensor([1.5, 5.0, 3.0, 2.0]), torch.tensor([1.0, 1.3, 1.1, 1.2]), 2),
        (guidance_schedule(4.0, 4, 0.0, 0.5), guidance_schedule(torch.tensor([1.0, 1.2]), 4), 1),
    ],
    ids=["numbers", "one a sample of two clips a prompt", "schedules"],
)
@pytest.mark.parametrize("frames", [3, 1])
@pytest.mark.parametrize("options", [{}, {"size_embedding": True}, {"final_table": True}], ids=str)
def test_the_denoiser_is_the_definition(
    config, make_model, make_text, lambda_t, lambda_m, clips, frames, options
):
    model = make_model(replace(config, **options))
    shape = 4, frames, 8, 8
    text = make_text(model.config)
    batch = 2 * clips
    latents = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(5)).double()
    denoiser = GuidedDenoiser(model, text, None, TABLE, lambda_t, lambda_m, shape, clips=clips)
    repeated, x0 = text.repeat(clips), None
    for step, timestep in enumerate(TABLE.timesteps):
        own = [
            scale[step] if isinstance(scale, torch.Tensor) and scale.ndim == 2 else scale
            for scale in (lambda_t, lambda_m)
        ]
        noise = guided_prediction(model, latents, timestep.expand(batch), repeated, None, *own)
        expected = solver_step(TABLE.rows[step], latents, noise, x0)
        latents, x0 = denoiser.step(latents, step, x0)
        for got, wanted in zip((latents, x0), expected, strict=True):
            assert relative(got, wanted) < 1e-10
    assert "4 steps of one branch, distilled" in denoiser.describe()


def test_denoisers_in_one_batch_have_guidance_of_their_own(model, make_text):
    shared = SharedWork(model, 1, 4, 3)
    scales = (3.0, 1.0), (6.0, 1.3), (1.5, 1.1)
    inputs = [
        (model, make_text(model.config, 1, 3 + 7 * i, seed=i), None, TABLE, *own, SHAPE)
        for i, own in enumerate(scales)
    ]
    batch = GuidedBatch([GuidedDenoiser(*one, shared=shared) for one in inputs])
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5)).double()
    steps = 0, 2, 0
    got, _ = batch.step(latents, steps, latents)
    for i, one in enumerate(inputs):
        own = latents[i : i + 1]
        expected, _ = GuidedDenoiser(*one).step(own, steps[i], own)
        assert relative(got[i : i + 1], expected) < 1e-10


def test_what_a_distilled_model_has_no_branch_for_is_refused(model, make_text):
    text = make_text(model.config)
    inputs = TABLE, 3.0, 1.0, SHAPE
    with pytest.raises(ValueError, match="null_text must be None"):
        GuidedDenoiser(model, text, text, *inputs)
    with pytest.raises(
        ValueError, match=r"nothing to rescale by: the rescale must be 0, got \[0.7"
    ):
        GuidedDenoiser(model, text, None, *inputs, rescale=0.7)
    with pytest.raises(ValueError, match="none to reuse: got 2"):
        GuidedDenoiser(model, text, None, *inputs, reuse=2)
    with pytest.raises(ValueError, match="nothing to rescale by"):
        latents, _ = inputs_of(model, make_text)
        guided_prediction(model, latents, torch.tensor([1, 2]), text, None, 3.0, 1.0, 0.5)
    plain = replace(model.config, guidance_embedding=False)
    with pytest.raises(ValueError, match="the empty or the negative prompt, got None"):
        GuidedDenoiser(GenTron(plain), text, None, *inputs)
    assert guidance_weights(3.0, 1.3, distilled=True) == (0, 0, 1)


@pytest.fixture(scope="module")
def folder(config, make_model, tiny_pipeline_folder, tmp_path_factory):
    """The tiny pipeline with a distilled model of random weights."""
    pipeline = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.transformer = make_model(config, torch.float32)
    pipeline.learnt = {"lambda_t": (1.0, 6.0), "lambda_m": (1.0, 1.3)}
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("distilled"))
    assert model_index(config, 4, (64, 64), pipeline.defaults)["default_rescale"] == 0
    return folder


@pytest.mark.parametrize(
    "options, told",
    [
        ({"lambda_t": 6.0, "lambda_m": 1.3}, []),
        ({"lambda_t": [2.0, 7.5], "clips": 2}, ["lambda_t from 1 to 6, and may not know 7.5"]),
        ({"lambda_m": 0.5}, ["lambda_m from 1 to 1.3, and may not know 0.5"]),
        ({"lambda_m": 0.5, "frames": 1}, []),  # nothing moves
    ],
    ids=str,
)
def test_guidance_that_was_not_learnt_is_told(folder, options, told):
    pipeline = GenTronPipeline.from_pretrained(folder)
    options = {"steps": 4, "frames": 2, "lambda_t": 3.0, "lambda_m": 1.0} | options
    told = [f"the model was distilled with {words}" for words in told]
    assert pipeline.remarks(pipeline.sampling("a star", **options)) == told
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline("a star", progress=False, output_type="latent", **options)
    assert [str(warning.message) for warning in caught] == told


def test_the_pipeline_takes_scales_of_each_clip_and_no_negative_prompt(folder, config):
    pipeline = GenTronPipeline.from_pretrained(folder)
    assert pipeline.transformer.config == config
    options = {"steps": 2, "frames": 2, "size": 32, "progress": False, "output_type": "latent"}
    both = pipeline("a star", clips=2, lambda_t=[2.0, 5.0], lambda_m=[1.0, 1.3], **options)
    assert "distilled" in both.guidance
    for clip, scales in enumerate(((2.0, 1.0), (5.0, 1.3))):
        options |= dict(zip(("lambda_t", "lambda_m"), scales, strict=True))
        alone = pipeline("a star", seed=clip, **options).latents
        assert relative(both.latents[clip : clip + 1], alone) < 1e-5
    refused = (
        ({"negative_prompt": "a red square"}, "no negative prompt, got 'a red square'"),
        ({"rescale": 0.5}, "nothing to rescale by"),
        ({"reuse": 2}, "none to reuse"),
    )
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            pipeline("a star", **options, **wrong)


def test_the_engine_makes_what_the_pipeline_makes(folder):
    pipeline = GenTronPipeline.from_pretrained(folder)
    engine, kinds = Engine(pipeline, 2), ((2.0, 1.0, 3), (5.0, 1.3, 2))
    options = {"frames": 2, "size": 32}
    clips = []
    for seed, (lambda_t, lambda_m, steps) in enumerate(kinds):
        own = {"lambda_t": lambda_t, "lambda_m": lambda_m, "steps": steps, "seed": seed}
        clips.append((engine.join(pipeline.sampling("a star", **own, **options)), own))
        engine.step(engine.clips)  # the second joins when the first is a step ahead
    engine.step([clips[1][0]])
    engine.step([clips[0][0]])
    for clip, own in clips:
        expected = pipeline("a star", **own, **options, progress=False, output_type="latent")
        assert relative(clip.latents, expected.latents) < 1e-5
    assert measured(pipeline).clips >= 1
    assert ServedModel.of("fast", pipeline).distilled  # the page shows nothing that is refused


def test_the_compiled_sampler_is_the_pipeline(folder, tmp_path):
    path = tmp_path / "distilled.gentron"
    command = [str(folder), "--out", str(path), "--frames", "2", "--size", "32"]
    assert export([*command, "--steps", "3", "--batch", "3"]) == 0
    sampler, pipeline = CompiledSampler.load(path), GenTronPipeline.from_pretrained(folder)
    metadata = sampler.metadata
    assert metadata["branches"] == branch_sets(True, True) == ["001"]
    assert metadata["model"]["guidance_embedding"]
    compiled = CompiledPipeline(sampler, folder)
    prompts = ["a red circle", "a star"]
    scales = {"lambda_t": 4.0, "lambda_m": 1.3, "guidance_range": (0.0, 0.5)}
    options = {"steps": 3, "frames": 2, "size": (32, 32), "progress": False, "seed": [1, 2]}
    wanted = pipeline(prompts, **scales, **options)
    got = compiled(prompts, seed=[1, 2], **scales)
    assert error(got.latents, wanted.latents) <= 1e-4
    other = compiled(prompts, seed=[1, 2], **scales | {"lambda_m": 1.0})
    assert error(other.latents, wanted.latents) > 1e-3
    own = torch.tensor([[4.0, 2.0]]).double().expand(3, 2)
    plan = sampler._runtime.plan(own, torch.tensor(1.3), torch.tensor(0.0), 2)
    wanted = torch.tensor([[4.0, 1.3], [4.0, 1.3], [2.0, 1.3]]).expand(3, 3, 2)
    assert torch.allclose(plan["guidance"], wanted)  # its first row stands for no sample
    one = sampler(pipeline.encode(["a star"]), lambda_t=torch.tensor(4.0))
    assert one.latents.isfinite().all()
    assert "of one branch, distilled" in got.guidance
    words = "the model was distilled with lambda_t from 1 to 6, and may not know 7.5"
    with pytest.warns(UserWarning, match=words):
        compiled(prompts, seed=[1, 2], **scales | {"lambda_t": 7.5})
    save_file(embeddings(pipeline.encode(["a star"])), tmp_path / "text.safetensors")
    own = path, "--embeddings", tmp_path / "text.safetensors", "--out", tmp_path / "out.npy"
    assert run_program(*own, "--lambda-t", 6, "--lambda-m", 1).stderr == ""
    assert run_program(*own, "--lambda-t", 7.5).stderr == f"gentron-sample: {words}\n"
    with pytest.raises(ValueError, match="a distilled model takes no negative prompt"):
        compiled(prompts, negative_prompt="a star", seed=0)
    with pytest.raises(ValueError, match="the rescale must be 0"):
        sampler(pipeline.encode(["a star"]), rescale=torch.tensor(0.5))
