"""The guided prediction against the paper's formula, and which branches run."""

from dataclasses import replace

import pytest
import torch

from gentron_fast.guidance import guidance_weights, guided_prediction


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
