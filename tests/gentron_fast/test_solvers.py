"""Solver tables, step by step against diffusers and against an exactly known solution."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule
from gentron_fast.solvers import (
    SOLVERS,
    fitted_timesteps,
    learned_range_d,
    make_table,
    solver_step,
)

# numpy's, about diffusers' use of torch tensors in numpy.array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DIFFUSERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "few-step": DPMSolverMultistepScheduler,
}
SPACINGS = ("linspace", "leading", "trailing")
STEPS = (1, 2, 5, 10, 20, 50, 250)


def diffusers_scheduler(solver, config, steps, exact=False):
    """diffusers' scheduler set to these steps; exact: on float64 noise levels, not its float32."""
    scheduler = DIFFUSERS[solver].from_config({"clip_sample": False} | config)
    schedule = NoiseSchedule.from_config(config)
    if exact:
        scheduler.alphas_cumprod = schedule.alphas_cumprod
        if solver == "ddim" and not config.get("set_alpha_to_one", True):
            scheduler.final_alpha_cumprod = schedule.alphas_cumprod[0]
    fitted = fitted_timesteps(config, steps) if solver == "few-step" else None
    scheduler.set_timesteps(**{"timesteps": fitted} if fitted else {"num_inference_steps": steps})
    if exact and solver in ("dpm++", "few-step"):
        ratio = schedule.sigma / schedule.alpha
        final = ratio[:1] if config.get("final_sigmas_type") == "sigma_min" else torch.zeros(1)
        scheduler.sigmas = torch.cat([ratio[scheduler.timesteps], final])
    return scheduler


def gaussian_eps(row, x, std=0.5):
    """Exact noise prediction for data ~ N(0, std^2)."""
    alpha, sigma = row[:2].tolist()
    return sigma * x / (alpha**2 * std**2 + sigma**2)


def largest_error(solver, config, steps, eta=0.0, exact=False):
    """Largest relative error of a step over a whole walk, every step from diffusers' own x."""
    table = make_table(solver, config, steps, eta)
    scheduler = diffusers_scheduler(solver, config, steps, exact)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    dtype = torch.float64 if exact else torch.float32
    x = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x0, largest = None, 0.0
    for step, (timestep, row) in enumerate(zip(table.timesteps, table.rows, strict=True)):
        eps = gaussian_eps(row, x) + 0.05 * torch.sin(3 * x)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step), dtype=dtype)
        arguments = {"generator": torch.Generator().manual_seed(step)}
        if solver == "ddim":
            arguments["eta"] = eta
        expected = scheduler.step(eps, timestep, x, **arguments).prev_sample.to(dtype)
        x_next, x0 = solver_step(row, x, eps, x0, noise)
        largest = max(largest, ((x_next - expected).norm() / expected.norm()).item())
        x = expected
    return largest


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("solver", "eta"), [("ddpm", 0), ("ddim", 0), ("ddim", 1), ("dpm++", 0)])
def test_steps_match_diffusers(solver, eta, spacing, steps):
    config = SCHEDULER_CONFIG | {"timestep_spacing": spacing}
    # DPMSolverMultistepScheduler computes in float32 whatever it is given.
    assert largest_error(solver, config, steps, eta, exact=True) < (
        1e-6 if solver == "dpm++" else 1e-11
    )
    # DDPMScheduler's own float32 tables are off by more than 1e-5 near t = 0 at 250 steps.
    if not (solver == "ddpm" and steps == 250):
        assert largest_error(solver, config, steps, eta) < 1e-5


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_match_diffusers_on_other_schedules(solver, beta_schedule):
    config = SCHEDULER_CONFIG | {"beta_schedule": beta_schedule}
    assert largest_error(solver, config, 20, exact=True) < 1e-6


@pytest.mark.parametrize("steps", [2, 14, 15, 20])
@pytest.mark.parametrize(
    "change",
    [
        {"solver_order": 1},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"few_step_timesteps": [[959, 200], [999, 850, 40, 0], list(range(900, 200, -50))]},
    ],
    ids=str,
)
@pytest.mark.parametrize("solver", ["dpm++", "few-step"])
def test_dpm_settings_match_diffusers(solver, change, steps):
    assert largest_error(solver, SCHEDULER_CONFIG | change, steps, exact=True) < 1e-6


@pytest.mark.parametrize(
    ("solver", "change"),
    [
        ("ddpm", {"variance_type": "fixed_large"}),
        ("ddpm", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("ddim", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("ddim", {"timestep_spacing": "leading", "set_alpha_to_one": False}),
    ],
)
def test_ddpm_and_ddim_settings_match_diffusers(solver, change):
    config = SCHEDULER_CONFIG | change
    eta = 0.5 if solver == "ddim" else 0.0
    assert largest_error(solver, config, 20, eta, exact=True) < 1e-12


def test_fitted_timesteps_are_those_of_few_step_alone():
    config = SCHEDULER_CONFIG | {"few_step_timesteps": [[959, 200], [3]]}
    assert make_table("few-step", config, 2).timesteps.tolist() == [959, 200]
    for solver in ("ddim", "ddpm", "dpm++"):
        fitted, without = (make_table(solver, own, 2) for own in (config, SCHEDULER_CONFIG))
        assert torch.equal(fitted.rows, without.rows)
    fallen_back, plain = (make_table(solver, config, 3) for solver in ("few-step", "dpm++"))
    assert torch.equal(fallen_back.rows, plain.rows)
    for wrong, message in (
        ([[200, 959]], "each smaller than the one before"),
        ([[1000, 3]], "wanted timesteps below 1000"),
        ([[-1, 3]], "few_step_timesteps is .*, wanted a list of"),
        ([5], "few_step_timesteps is .*, wanted a list of"),
    ):
        with pytest.raises(ValueError, match=message):
            make_table("few-step", SCHEDULER_CONFIG | {"few_step_timesteps": wrong}, 2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_absent_keys_take_the_defaults_of_diffusers(solver):
    assert largest_error(solver, {}, 20, exact=True) < 1e-6


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_timesteps_match_diffusers(solver, spacing):
    config = SCHEDULER_CONFIG | {"timestep_spacing": spacing}
    scheduler = DIFFUSERS[solver].from_config(config)
    for steps in (*range(1, 130), 201, 333, 400, 998):
        scheduler.set_timesteps(steps)
        # At some counts, 61 the first, diffusers' trailing spacing ends in a surplus timestep -1.
        expected = [t for t in scheduler.timesteps.tolist() if t >= 0]
        assert make_table(solver, config, steps).timesteps.tolist() == expected


@pytest.mark.parametrize("spacing", SPACINGS)
def test_learned_range_matches_diffusers(spacing):
    config = {"variance_type": "learned_range", "timestep_spacing": spacing}
    table = make_table("ddpm", config, 10)
    scheduler = diffusers_scheduler("ddpm", config, 10, exact=True)
    generator = torch.Generator().manual_seed(0)
    for step, (timestep, row) in enumerate(zip(table.timesteps, table.rows, strict=True)):
        x, eps, v = torch.randn(3, 2, 4, 3, 3, generator=generator, dtype=torch.float64)
        v = v.tanh()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step), dtype=x.dtype)
        expected = scheduler.step(
            torch.cat([eps, v], dim=1), timestep, x, torch.Generator().manual_seed(step)
        ).prev_sample
        d = learned_range_d(table, step, v)
        torch.testing.assert_close(solver_step(row, x, eps, None, noise, d)[0], expected)


def test_learned_range_lies_between_the_fixed_variances():
    tables = [
        make_table("ddpm", SCHEDULER_CONFIG | {"variance_type": kind}, 20)
        for kind in ("fixed_small", "learned_range", "fixed_large")
    ]
    assert torch.equal(tables[0].rows, tables[1].rows)  # d of a model that predicts no variance
    edges = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    for step in range(20):
        bounds = torch.stack([tables[0].rows[step, 5], tables[2].rows[step, 5]])
        torch.testing.assert_close(learned_range_d(tables[1], step, edges), bounds)
    with pytest.raises(ValueError, match="learned_range"):
        learned_range_d(tables[0], 0, edges)


def test_ddim_with_eta_1_is_ddpm():
    ddpm, ddim = (make_table(s, SCHEDULER_CONFIG, 50, eta=s == "ddim") for s in ("ddpm", "ddim"))
    torch.testing.assert_close(ddim.rows, ddpm.rows, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_default_table_starts_at_pure_noise_and_ends_clean(solver):
    table = make_table(solver, SCHEDULER_CONFIG, 50)
    assert table.timesteps.dtype == torch.int64 and table.rows.dtype == torch.float64
    assert table.timesteps[0] == 999 and table.rows.shape == (50, 6)
    torch.testing.assert_close(table.rows[-1, 2:5], torch.tensor([0.0, 1.0, 0.0]).double())
    assert table.rows[0, 4] == 0
    assert bool(table.rows[:, 5].any()) == (solver == "ddpm")


def flow_error(solver, config, steps, std=0.5):
    """Error of x at the end, from 1, against the exact probability flow of data ~ N(0, std^2).

    There x follows the standard deviation of its noise level, sqrt(alpha^2 std^2 + sigma^2).
    """
    table = make_table(solver, config, steps)
    signal = NoiseSchedule.from_config(config).alphas_cumprod
    x, x0 = torch.ones(1, dtype=torch.float64), None
    for row in table.rows:
        x, x0 = solver_step(row, x, gaussian_eps(row, x, std), x0)
    deviation = (signal * std**2 + 1 - signal).sqrt()
    end = deviation[0] if config["final_sigmas_type"] == "sigma_min" else std
    return abs(x - end / deviation[table.timesteps[0]]).item()


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++", 2)])
def test_order_of_convergence(solver, order):
    # Evenly spaced log SNR from 6 to -6 and an end short of clean: the grid the orders are
    # proved on. On the linear schedule the last steps widen in log SNR and blur them.
    signal = torch.sigmoid(torch.linspace(6, -6, 4097, dtype=torch.float64))
    betas = 1 - signal[1:] / torch.cat([torch.ones(1), signal[1:-1]])
    config = SCHEDULER_CONFIG | {
        "trained_betas": betas.tolist(),
        "num_train_timesteps": len(betas),
        "final_sigmas_type": "sigma_min",
        "set_alpha_to_one": False,
    }
    errors = [flow_error(solver, config, steps) for steps in (32, 64, 128, 256)]
    for error, halved in pairwise(errors):
        assert math.log2(error / halved) == pytest.approx(order, abs=0.05)


def test_second_order_is_nearer_on_the_default_schedule():
    # Twenty steps of the second order land nearer than forty of the first.
    assert flow_error("dpm++", SCHEDULER_CONFIG, 20) < flow_error("ddim", SCHEDULER_CONFIG, 40)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_solver_step_precision(dtype, computed):
    row = torch.tensor([0.8, 0.6, 0.5, 0.25, -0.125, 0.75], dtype=torch.float64)
    x, eps, x0_previous, noise = torch.randn(4, 2, 4, 3, 3).to(dtype)
    x_next, x0 = solver_step(row, x, eps, x0_previous, noise)
    assert x_next.dtype == x0.dtype == computed
    x, eps, x0_previous, noise = (t.to(computed) for t in (x, eps, x0_previous, noise))
    torch.testing.assert_close(x0, (x - 0.6 * eps) / 0.8)
    torch.testing.assert_close(x_next, 0.5 * x + 0.25 * x0 - 0.125 * x0_previous + 0.75 * noise)


def test_solver_step_names_what_is_missing():
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="needs x0_previous"):
        solver_step(make_table("dpm++", SCHEDULER_CONFIG, 20).rows[1], x, x)
    with pytest.raises(ValueError, match="needs noise"):
        solver_step(make_table("ddpm", SCHEDULER_CONFIG, 20).rows[0], x, x)


@pytest.mark.parametrize(
    ("solver", "change", "message"),
    [
        ("euler", {}, r"unknown solver 'euler'; known: ddpm, ddim, dpm\+\+"),
        ("dpm++", {"use_karras_sigmas": True}, "use_karras_sigmas is not supported"),
        ("ddim", {"clip_sample": True}, "clip_sample is not supported"),
        ("ddpm", {"thresholding": True}, "thresholding is not supported"),
        ("ddpm", {"variance_type": "learned"}, "unknown variance_type 'learned'"),
        ("ddim", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ("ddim", {"timestep_spacing": "even"}, "unknown timestep_spacing 'even'"),
        ("dpm++", {"final_sigmas_type": "one"}, "unknown final_sigmas_type 'one'"),
        ("dpm++", {"solver_order": 3}, "solver_order 3 is not supported"),
        ("dpm++", {"solver_type": "heun"}, "solver_type 'heun'"),
        ("dpm++", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type 'sde-dpmsolver"),
        ("dpm++", {"lambda_min_clipped": -5.1}, "lambda_min_clipped is not supported"),
    ],
)
def test_make_table_refuses_settings(solver, change, message):
    with pytest.raises(ValueError, match=message):
        make_table(solver, SCHEDULER_CONFIG | change, 10)


@pytest.mark.parametrize(
    ("solver", "steps", "eta", "spacing", "message"),
    [
        ("ddpm", 0, 0, "trailing", "0 steps asked for; between 1 and 1000"),
        ("ddpm", 1001, 0, "trailing", "1001 steps asked for"),
        ("dpm++", 1000, 0, "linspace", "1000 steps do not fit 1000 timesteps"),
        ("ddim", 10, 1.5, "trailing", "eta is 1.5"),
        ("dpm++", 10, 0.5, "trailing", "eta is 0.5"),
    ],
)
def test_make_table_refuses_numbers(solver, steps, eta, spacing, message):
    with pytest.raises(ValueError, match=message):
        make_table(solver, SCHEDULER_CONFIG | {"timestep_spacing": spacing}, steps, eta)
