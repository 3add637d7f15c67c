"""The guided prediction against the paper's formula, and the denoiser that shares its work against
the guided prediction."""

from dataclasses import replace

import pytest
import torch
from families import FAMILY, relative
from pairwise import pairwise
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from gentron_fast import PRESETS, EncodedText, GenTron, TextCondition
from gentron_fast.diffusion import SCHEDULER_CONFIG, portable_noise
from gentron_fast.guidance import (
    GuidedDenoiser,
    guidance_schedule,
    guidance_weights,
    guided_prediction,
    steps,
)
from gentron_fast.solvers import learned_range_d, make_table, solver_step
from gentron_kernels.guided_step import rescaled_noise


@pytest.fixture
def case(tiny_config, make_model, make_text):
    """Model, latents (2, 4, 3, 8, 8), timestep, text and null text."""
    latents = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(5)).double()
    null_text = make_text(tiny_config, clip=2, t5=1, seed=2)
    return (
        make_model(tiny_config),
        latents,
        torch.tensor([40, 800]),
        make_text(tiny_config),
        null_text,
    )


def count_calls(model):
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(args[2:]))
    return calls


@pytest.mark.parametrize("lambda_m", [1.2, torch.tensor([1.0, 1.3], dtype=torch.float64)], ids=str)
def test_three_branches_as_the_paper_combines_them(case, lambda_m):
    model, latents, timestep, text, null_text = case
    neither = model(latents, timestep, null_text, True)
    motion = model(latents, timestep, null_text, False)
    both = model(latents, timestep, text, False)
    scale = torch.as_tensor(lambda_m, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    expected = neither + 7.5 * (both - motion) + scale * (motion - neither)
    guided = guided_prediction(model, *case[1:], 7.5, lambda_m)
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "lambda_t,lambda_m,runs",
    [(7.5, 1.2, 3), (7.5, 1.0, 2), (1.0, 1.0, 1), (0.0, 0.0, 1), (0.0, 1.3, 2), (1.3, 1.3, 2)],
)
def test_branches_of_weight_zero_do_not_run(case, lambda_t, lambda_m, runs):
    calls = count_calls(case[0])
    guided_prediction(*case, lambda_t, lambda_m)
    assert len(calls) == runs


def test_one_frame_and_image_models_run_two_branches(case, make_model, tiny_config):
    model, latents, timestep, text, null_text = case
    image_model = make_model(replace(tiny_config, temporal=False))
    for candidate, x in ((model, latents[:, :, :1]), (image_model, latents)):
        null, cond = (candidate(x, timestep, t) for t in (null_text, text))
        calls = count_calls(candidate)
        guided = guided_prediction(candidate, x, timestep, text, null_text, 7.5, 1.2)
        assert len(calls) == 2
        torch.testing.assert_close(guided, null + 7.5 * (cond - null), rtol=1e-12, atol=1e-12)


def test_learned_range_keeps_the_texts_variance(tiny_config, make_model, make_text):
    config = replace(tiny_config, learned_range=True)
    model, text, null_text = make_model(config), make_text(config), make_text(config, seed=9)
    latents, timestep = torch.randn(2, 4, 3, 8, 8).double(), torch.tensor([3, 4])
    guided = guided_prediction(model, latents, timestep, text, null_text, 7.5, 1.2)
    assert guided.shape == (2, 8, 3, 8, 8)
    assert torch.equal(guided[:, 4:], model(latents, timestep, text, False)[:, 4:])


def test_weights_add_up_to_one():
    for has_motion in (True, False):
        assert sum(guidance_weights(7.5, 1.2, has_motion)) == pytest.approx(1)


TABLE = make_table("dpm++", SCHEDULER_CONFIG, 4)
OPTIONS = {
    "family": tuple(FAMILY),
    "frames": (1, 2, 8, 16),
    "batch": (1, 3),
    "clip": (2, 20, 77),
    "t5": (1, 2, 20, 40, 256),
    "lambda_t": (0.0, 1.0, 7.5),
    "lambda_m": (1.0, 1.2),
}
CASES = [tuple(case.values()) for case in pairwise(OPTIONS)]


def guided(denoiser, latents, step=1):
    """The guided noise of a denoiser's branches."""
    weights = denoiser._weights[step]
    channels = latents.shape[1]
    return sum(
        weight.reshape(-1, 1, 1, 1, 1) * branch[:, :channels].to(weight.dtype)
        for weight, branch in zip(weights.unbind(1), denoiser.branches(latents, step), strict=True)
        if branch is not None
    )


def pad(text, row, places):
    """The condition with the last `places` tokens of one prompt made padding."""
    parts = []
    for part in text:
        if part is not None and places < part.tokens.shape[1]:
            mask = part.mask.clone()
            mask[row, -places:] = False
            part = part._replace(mask=mask)
        parts.append(part)
    return TextCondition(*parts)


@pytest.mark.parametrize("dtype,limit", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_denoiser_is_the_definition(tiny_config, make_model, make_text, case, dtype, limit):
    family, frames, batch, clip, t5, lambda_t, lambda_m = case
    config = replace(tiny_config, **FAMILY[family])
    model = make_model(config, dtype)
    latents = torch.randn(batch, 4, frames, 8, 4, generator=torch.Generator().manual_seed(3))
    latents = latents.to(dtype)
    text = pad(make_text(config, batch, clip, t5, dtype), batch - 1, 3)
    timestep = TABLE.timesteps[1].expand(batch)
    for null_batch in {1, batch}:
        null_text = make_text(config, null_batch, 2, 1, dtype, seed=2)
        repeated = null_text.repeat(batch // null_batch)
        expected = guided_prediction(model, latents, timestep, text, repeated, lambda_t, lambda_m)[
            :, :4
        ]
        denoiser = GuidedDenoiser(
            model, text, null_text, TABLE, lambda_t, lambda_m, latents.shape[1:]
        )
        assert relative(guided(denoiser, latents), expected) <= limit


@pytest.mark.parametrize("clip,t5", [(5, 9), (20, 1)])
@pytest.mark.parametrize("nulls", [1, 2])
def test_clips_of_one_prompt_share_its_text(tiny_config, make_model, make_text, clip, t5, nulls):
    model = make_model(tiny_config)
    latents = torch.randn(6, 4, 2, 8, 4, generator=torch.Generator().manual_seed(0)).double()
    text = make_text(tiny_config, 2, clip, t5)
    null_text = make_text(tiny_config, nulls, 2, 3, seed=2)
    shape = latents.shape[1:]
    denoiser = GuidedDenoiser(model, text, null_text, TABLE, 7.5, 1.2, shape, clips=3)
    for null_context, text_context in denoiser._contexts:
        assert (null_context[0].shape[0], text_context[0].shape[0]) == (nulls, 2)
    timestep = TABLE.timesteps[1].expand(6)
    texts = text.repeat(3), null_text.repeat(6 // nulls)
    expected = guided_prediction(model, latents, timestep, *texts, 7.5, 1.2)
    assert relative(guided(denoiser, latents), expected) <= 1e-12


def test_negative_prompts_and_a_scale_for_each_sample(tiny_config, make_model, make_text):
    model = make_model(tiny_config)
    latents = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    text = make_text(tiny_config, 3, 20, 5)
    negative = pad(make_text(tiny_config, 3, 9, 30, seed=5), 1, 4)
    scales = torch.tensor([[7.5, 1.0, 4.0], [1.2, 1.0, 1.0]], dtype=torch.float64)
    lambda_t, lambda_m = scales
    timestep = TABLE.timesteps[1].expand(3)
    expected = guided_prediction(model, latents, timestep, text, negative, lambda_t, lambda_m)
    denoiser = GuidedDenoiser(model, text, negative, TABLE, lambda_t, lambda_m, latents.shape[1:])
    assert relative(guided(denoiser, latents), expected) <= 1e-12


@pytest.mark.parametrize(
    "lambda_t,lambda_m,runs",
    [
        (7.5, 1.2, (True, True, True)),
        (7.5, 1.0, (False, True, True)),
        (1.0, 1.0, (False, False, True)),
        (1.2, 1.2, (True, False, True)),
        (0.0, 1.2, (True, True, False)),
        (0.0, 1.0, (False, True, False)),
        (0.0, 0.0, (True, False, False)),
    ],
)
def test_every_subset_of_branches(case, lambda_t, lambda_m, runs):
    model, latents, _, text, null_text = case
    denoiser = GuidedDenoiser(model, text, null_text, TABLE, lambda_t, lambda_m, latents.shape[1:])
    branches = denoiser.branches(latents, 1)
    assert tuple(branch is not None for branch in branches) == runs
    timestep = TABLE.timesteps[1].expand(2)
    expected = guided_prediction(model, latents, timestep, text, null_text, lambda_t, lambda_m)
    assert relative(guided(denoiser, latents), expected) <= 1e-12


@pytest.mark.parametrize(
    "family,frames,batch,lambda_m,null_tokens",
    [
        ("both encoders", 4, 1, 1.2, (2, 1)),
        ("both encoders", 8, 1, 1.0, (2, 1)),
        ("both encoders", 2, 3, (1.2, 1.0, 1.3), (9, 30)),
        ("clip", 1, 1, 1.2, (2, 1)),
        ("adaLN-zero", 4, 1, 1.2, (2, 1)),
        ("PixArt", 1, 3, 1.0, (2, 1)),
    ],
    ids=str,
)
def test_bf16_is_no_worse_than_plain_bf16(make_text, family, frames, batch, lambda_m, null_tokens):
    config = replace(PRESETS["small-T2V"], depth=3, **FAMILY[family])
    lambda_m = torch.tensor(lambda_m, dtype=torch.float64)
    timestep = TABLE.timesteps[1:2].expand(batch)
    torch.manual_seed(0)
    model = GenTron(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.normal_(std=scale)
    model = model.bfloat16()
    exact = GenTron(config).double().eval()
    exact.load_state_dict(model.state_dict())
    for block, rounded in zip(exact.blocks, model.blocks, strict=True):
        if config.temporal:
            positions = rounded.temporal_attention.positions
            block.temporal_attention.positions = positions.double()
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(batch, 4, frames, 8, 8, generator=generator).bfloat16()
        text = make_text(config, batch, 20, 40, torch.bfloat16, seed)
        null_text = make_text(config, 1, *null_tokens, torch.bfloat16, seed + 50)
        texts = text, null_text.repeat(batch)
        wide = [part.to(dtype=torch.float64) for part in texts]
        scales = 7.5, lambda_m
        expected = guided_prediction(exact, latents.double(), timestep, *wide, *scales)[:, :4]
        plain = guided_prediction(model, latents, timestep, *texts, *scales)[:, :4]
        denoiser = GuidedDenoiser(model, text, null_text, TABLE, *scales, latents.shape[1:])
        shared = guided(denoiser, latents)
        errors += torch.tensor([relative(shared, expected), relative(plain, expected)])
    assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("solver", ["dpm++", "ddpm"])
def test_a_whole_sample_is_the_definitions(tiny_config, make_model, make_text, solver):
    config = replace(tiny_config, learned_range=solver == "ddpm")
    scheduler = SCHEDULER_CONFIG | {"variance_type": "learned_range"} if solver == "ddpm" else {}
    table = make_table(solver, SCHEDULER_CONFIG | scheduler, 20)
    model = make_model(config, torch.float32)
    with torch.no_grad():  # weights at random would let the latents grow without bound
        model.final.linear.weight.mul_(0.1)
    text = make_text(config, 2, 20, 9, torch.float32)
    null_text = make_text(config, 1, 2, 1, torch.float32, seed=2)
    shape = (4, 4, 8, 8)
    latents = plain = portable_noise(shape, [1, 2], 0)
    x0 = x0_plain = None
    denoiser = GuidedDenoiser(model, text, null_text, table, 7.5, 1.2, shape)
    for step, timestep in enumerate(table.timesteps):
        noise = portable_noise(shape, [1, 2], step + 1)
        latents, x0 = denoiser.step(latents, step, x0, noise)
        prediction = guided_prediction(
            model, plain, timestep.expand(2), text, null_text.repeat(2), 7.5, 1.2
        )
        d = learned_range_d(table, step, prediction[:, 4:]) if config.learned_range else None
        plain, x0_plain = solver_step(
            table.rows[step], plain, prediction[:, :4], x0_plain, noise, d
        )
    assert relative(latents, plain) <= 1e-4


@pytest.mark.parametrize("learned_range", [False, True])
@pytest.mark.parametrize("lambda_t,lambda_m", [(7.5, 1.2), (7.5, 1.0), (0.0, 1.2), (1.0, 1.0)])
@pytest.mark.parametrize("rescale", [0.7, torch.tensor([0.0, 1.0])], ids=["one", "each"])
def test_a_rescaled_step_is_the_definitions(
    tiny_config, make_model, make_text, rescale, lambda_t, lambda_m, learned_range
):
    """Also where the text's weight is 0: the deviation is the text branch's all the same."""
    config = replace(tiny_config, learned_range=learned_range)
    scheduler = SCHEDULER_CONFIG | {"variance_type": "learned_range"} if learned_range else {}
    table = make_table("ddpm" if learned_range else "ddim", SCHEDULER_CONFIG | scheduler, 4)
    model, text = make_model(config), make_text(config)
    null_text = make_text(config, clip=2, t5=1, seed=2)
    latents, noise = torch.randn(2, 2, 4, 3, 8, 8, dtype=torch.float64).unbind()
    inputs = text, null_text, lambda_t, lambda_m, rescale
    prediction = guided_prediction(model, latents, table.timesteps[1].expand(2), *inputs)
    d = learned_range_d(table, 1, prediction[:, 4:]) if learned_range else None
    expected = solver_step(table.rows[1], latents, prediction[:, :4], None, noise, d)
    shape = latents.shape[1:]
    denoiser = GuidedDenoiser(
        model, text, null_text, table, lambda_t, lambda_m, shape, rescale=rescale
    )
    for own, wanted in zip(denoiser.step(latents, 1, None, noise), expected, strict=True):
        assert relative(own, wanted) <= 1e-12


def test_rescale_brings_the_texts_deviation(case):
    model, latents, timestep, text, null_text = case
    of_text = model(latents, timestep, text, False).flatten(1).std(1)
    full = guided_prediction(model, latents, timestep, text, null_text, 7.5, 1.2, 1.0)
    torch.testing.assert_close(full.flatten(1).std(1), of_text)
    for wrong in (1.1, -0.1, torch.nan, torch.tensor([0.5, 2.0])):
        with pytest.raises(ValueError, match="rescale must be 0 … 1, got"):
            guided_prediction(model, latents, timestep, text, null_text, 7.5, 1.2, wrong)


def test_modulation_in_chunks_changes_nothing(case, monkeypatch):
    model, latents, _, text, null_text = case
    inputs = model, text, null_text, TABLE, 7.5, 1.2, latents.shape[1:]
    whole = [guided(GuidedDenoiser(*inputs), latents, step) for step in range(4)]
    row = (6 * model.config.depth + 2) * model.config.width * 8
    monkeypatch.setattr(steps, "MODULATION_BYTES", 2 * row * 4)
    denoiser = GuidedDenoiser(*inputs)
    assert denoiser._chunk == 2
    for step in (0, 3, 1, 2):  # chunks are made again where steps go back
        assert relative(guided(denoiser, latents, step), whole[step]) <= 1e-12


def test_guidance_inside_a_range_of_the_steps(case):
    model, latents, _, text, null_text = case
    schedules = [guidance_schedule(scale, 4, 0.25, 0.75) for scale in (7.5, 1.2)]
    assert schedules[0].flatten().tolist() == [1, 7.5, 7.5, 1]
    denoiser = GuidedDenoiser(model, text, null_text, TABLE, *schedules, latents.shape[1:])
    runs = [sum(b is not None for b in denoiser.branches(latents, step)) for step in range(4)]
    assert runs == [1, 3, 3, 1]
    with pytest.raises(ValueError, match="guidance range must be 0 ≤ start ≤ stop ≤ 1"):
        guidance_schedule(7.5, 4, 0.8, 0.2)


def test_compiled_blocks_serve_every_prompt_step_and_scale(tiny_config, make_model, make_text):
    config = replace(tiny_config, depth=4)
    model, plain = (make_model(config, torch.float32) for _ in range(2))
    counter = CompileCounter()
    model.compile_blocks(backend=counter)
    null_text = make_text(config, 1, 2, 1, torch.float32, seed=2)
    shape, kinds = (4, 3, 8, 8), []
    for clip, t5, lambda_t, lambda_m in ((5, 8, 7.5, 1.2), (7, 10, 7.5, 1.2), (9, 6, 4.0, 1.1)):
        text = make_text(config, 1, clip, t5, torch.float32)
        latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(clip))
        inputs = text, null_text, TABLE, lambda_t, lambda_m, shape
        compiled, eager = (GuidedDenoiser(one, *inputs) for one in (model, plain))
        for step in (0, 2):
            assert relative(guided(compiled, latents, step), guided(eager, latents, step)) <= 1e-6
        kinds.append(counter.frame_count)
    assert kinds == [3, 3, 3]  # the first block, the blocks of either encoder


def test_a_steps_results_may_be_written_to(tiny_config, make_model, make_text):
    """Blocks run in inference mode on the CPU; nothing made there leaves."""
    model = make_model(tiny_config, torch.float32)
    texts = (make_text(tiny_config, 1, *lengths, torch.float32) for lengths in ((5, 8), (2, 1)))
    denoiser = GuidedDenoiser(model, *texts, TABLE, 7.5, 1.2, (4, 3, 8, 8))
    latents = torch.randn(1, 4, 3, 8, 8)
    results = *denoiser.step(latents, 0), *denoiser.branches(latents, 0)
    assert len(results) == 5
    for result in results:
        assert not result.is_inference()
        result.mul_(2)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_reused_differences(case, rescale):
    model, latents, _, text, null_text = case
    inputs = model, text, null_text, TABLE, 7.5, 1.2, latents.shape[1:]
    denoiser, whole = (GuidedDenoiser(*inputs, rescale=rescale, reuse=k) for k in (2, 1))
    after, _ = denoiser.step(latents, 0)
    assert torch.equal(after, whole.step(latents, 0)[0])
    of_text = whole.branches(latents, 0)[2]
    shares = torch.full((2,), rescale, dtype=torch.float64)
    difference = rescaled_noise(guided(whole, latents, 0), of_text, shares) - of_text
    calls = count_calls(model.blocks[0])
    reused, _ = denoiser.step(after, 1, latents)
    assert len(calls) == 1
    noise = whole.branches(after, 1)[2] + difference
    expected, _ = solver_step(TABLE.rows[1], after, noise, latents)
    torch.testing.assert_close(reused, expected)
    torch.testing.assert_close(denoiser.step(after, 2, latents), whole.step(after, 2, latents))
    with pytest.raises(ValueError, match="reuse must be at least 1 step, got 0"):
        GuidedDenoiser(*inputs, reuse=0)


@pytest.mark.gpu
@pytest.mark.parametrize("frames", [1, 3])
def test_the_cuda_graph_is_the_forward(tiny_config, make_model, make_text, frames):
    model = make_model(tiny_config, torch.float32).cuda()
    text, null_text = (
        make_text(tiny_config, 2, clip, t5, torch.float32, seed).to("cuda")
        for clip, t5, seed in ((9, 20, 1), (2, 1, 2))
    )
    inputs = model, text, null_text, TABLE, 7.5, 1.2, (4, frames, 8, 8)
    replayed, plain = (GuidedDenoiser(*inputs, cuda_graph=graph) for graph in (True, False))
    latents = torch.randn(2, 4, frames, 8, 8, device="cuda")
    for step in (0, 1, 3):  # captured, then replayed on other inputs
        found, expected = replayed.step(latents, step), plain.step(latents, step)
        torch.testing.assert_close(found, expected)
        latents = expected[0]


def test_wrong_input_is_named(case):
    model, latents, _, text, null_text = case
    inputs = model, text, null_text, TABLE
    with pytest.raises(ValueError, match="null_text has 3 prompts, not 1 or 2"):
        GuidedDenoiser(model, text, null_text.repeat(2).select(slice(3)), TABLE, 7.5, 1.2, (4,) * 4)
    with pytest.raises(ValueError, match=r"a guidance scale must be a number, \(2,\)"):
        GuidedDenoiser(*inputs, torch.ones(3), 1.2, latents.shape[1:])
    for shape, message in (((4, 33, 8, 8), "frames must be 1 … 32"), ((4, 3, 8, 7), "divide")):
        with pytest.raises(ValueError, match=message):
            GuidedDenoiser(*inputs, 7.5, 1.2, shape)
    denoiser = GuidedDenoiser(*inputs, 7.5, 1.2, latents.shape[1:])
    with pytest.raises(ValueError, match=r"latents must be \(2, 4, 3, 8, 8\)"):
        denoiser.branches(latents[:, :, :2], 0)


def flops_of(function):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("preset", ["XL/2-T2V", "G/2-T2V"])
@pytest.mark.parametrize("lambda_m,goal", [(1.2, 0.12), (1.0, 0.38)])
def test_flops_saved(preset, lambda_m, goal):
    """8 frames at 512², prompt of 20 CLIP and 40 T5 tokens, counted by torch on meta tensors."""
    config = replace(PRESETS[preset], depth=2)  # one block of each encoder: the rest repeats them

    def text(clip, t5):
        lengths = {"clip": clip, "t5": t5}
        return TextCondition(
            **{
                name: EncodedText(
                    torch.empty(1, length, config.text_width(name)),
                    None,
                    torch.empty(1, config.text_width(name)),
                )
                for name, length in lengths.items()
            }
        )

    with torch.device("meta"):
        model = GenTron(config).eval()
        prompt, null_text = text(20, 40), text(2, 1)
        latents = torch.empty(1, 4, 8, 64, 64)
        timestep, mask = torch.empty(1), torch.ones(1, dtype=torch.bool)
        runs = (null_text, mask), (null_text, None), (prompt, None)
    plain = sum(flops_of(lambda run=run: model(latents, timestep, *run)) for run in runs)
    denoiser = GuidedDenoiser(model, prompt, null_text, TABLE, 7.5, lambda_m, latents.shape[1:])
    shared = flops_of(lambda: denoiser.branches(latents, 0))
    saved = 1 - shared / plain
    print(f"{preset} λ_M {lambda_m}: {saved:.4f} saved of {plain / 1e12:.2f} TFLOP")
    assert saved >= goal
    assert denoiser.work_saved() == pytest.approx(saved, abs=0.003)
