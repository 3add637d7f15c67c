"""Solvers as tables: DDPM, DDIM and DPM-Solver++ 2M, the last also at timesteps fitted to a model;
one row of six coefficients a step.

x0 = (x - sigma * eps) / alpha;  x' = a * x + b * x0 + c * x0_previous + d * noise
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gentron_fast.diffusion import NoiseSchedule, learned_range_log_variance

# Shapes: B batch, C channels, S sampling steps.

SOLVERS = ("ddpm", "ddim", "dpm++", "few-step")

# What no table can hold, or what latents must not meet; each is refused when true.
_REFUSED = (
    "clip_sample",
    "thresholding",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)


@dataclass(frozen=True, eq=False)
class SolverTable:
    """A solver, complete: the timestep the model sees and the update after it, step by step.

    timesteps (S,) int64; rows (S, 6) float64: alpha, sigma, a, b, c, d; log_variance (S, 2)
    float64: bounds between which a learned-range model chooses d (learned_range_d), else None.
    A step draws noise exactly where its d is not 0.
    """

    timesteps: Tensor
    rows: Tensor
    log_variance: Tensor | None = None


def make_table(solver: str, scheduler_config: dict, steps: int, eta: float = 0.0) -> SolverTable:
    """The table that walks `steps` steps as diffusers does with this scheduler_config.json.

    solver: one of SOLVERS, whatever class the configuration names; keys it lacks take the defaults
    of the solver's own diffusers class, but clip_sample is false. few-step is dpm++ at timesteps
    that were fitted to the model (gentron_train.few_steps; the idea is Sabour et al. 2024, arXiv
    2404.14507): the list of as many steps in few_step_timesteps, a key of ours that diffusers
    passes over; where there is none, dpm++ as it is. eta: noise of DDIM, 0 (none) to 1 (DDPM's).
    Raises ValueError for an unknown solver, an unsupported setting, too many steps.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    for key in _REFUSED:
        if scheduler_config.get(key):
            raise ValueError(f"{key} is not supported; set it to false")
    if not 0 <= eta <= (solver == "ddim"):
        raise ValueError(f"eta is {eta}; ddim takes 0 to 1, every other solver 0")
    schedule = NoiseSchedule.from_config(scheduler_config)
    fitted = fitted_timesteps(scheduler_config, steps) if solver == "few-step" else None
    solver = "dpm++" if solver == "few-step" else solver
    timesteps = _timesteps(solver, scheduler_config, steps, len(schedule), fitted)

    # Where each step ends; below 0 is the end. diffusers' DDIM goes down T // S at any spacing.
    ends = timesteps.roll(-1)
    ends[-1] = -1
    if solver == "ddim":
        ends = timesteps - len(schedule) // steps
    signal = schedule.alphas_cumprod[timesteps]
    final = _final_signal(solver, scheduler_config, schedule)
    signal_next = torch.where(ends < 0, final, schedule.alphas_cumprod[ends.clamp(min=0)])
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    alpha_next, sigma_next = signal_next.sqrt(), (1 - signal_next).sqrt()

    # All three are x' = alpha' * x0 + sqrt(sigma'^2 - drawn) * eps + sqrt(drawn) * noise (DDIM,
    # arXiv 2010.02502, eq. 12), written in x and x0; DPM-Solver++ adds a slope to x0.
    beta = 1 - signal / signal_next
    posterior = (1 - signal_next) / (1 - signal) * beta
    drawn = posterior * {"ddpm": 1.0, "ddim": eta**2, "dpm++": 0.0}[solver]
    a = (sigma_next**2 - drawn).sqrt() / sigma
    b = alpha_next - a * alpha
    c = torch.zeros_like(a)
    d = drawn.sqrt()
    log_variance = None
    if solver == "ddpm":
        d, log_variance = _ddpm_noise(scheduler_config, timesteps, posterior, beta)
    if solver == "dpm++":
        log_snr, log_snr_next = (alpha / sigma).log(), (alpha_next / sigma_next).log()
        second = slice(1, _second_order_stop(scheduler_config, steps))
        ratio = (log_snr_next - log_snr)[second] / log_snr.diff()[: second.stop - 1]
        c[second] = -0.5 * b[second] * ratio
        b = b - c
    return SolverTable(timesteps, torch.stack([alpha, sigma, a, b, c, d], dim=1), log_variance)


def solver_step(
    row: Tensor,
    x: Tensor,
    eps: Tensor,
    x0_previous: Tensor | None = None,
    noise: Tensor | None = None,
    d: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step: x at the next noise level, and this step's x0, the next step's x0_previous.

    row (6,) of a table; x, eps, x0_previous, noise (B, C, ...); x0_previous may be None where c is
    0, noise where d is 0. d: a tensor in place of the row's (learned_range_d). Computed and
    returned in float32, or float64 for a float64 x: latents kept in bf16 would lose small steps.
    """
    alpha, sigma, a, b, c, row_d = row.tolist()
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    x0 = (x - sigma * eps.to(dtype)) / alpha
    x_next = a * x + b * x0
    if c != 0:
        if x0_previous is None:
            raise ValueError("this step needs x0_previous, the x0 of the step before")
        x_next = x_next + c * x0_previous.to(dtype)
    if row_d != 0:
        if noise is None:
            raise ValueError("this step needs noise")
        x_next = x_next + (row_d if d is None else d.to(dtype)) * noise.to(dtype)
    return x_next, x0


def learned_range_d(table: SolverTable, step: int, variance_channels: Tensor) -> Tensor:
    """d (B, C, ...) of a DDPM step from the model's variance channels (B, C, ...) in [-1, 1].

    Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 15. float32, or float64 for float64 channels.
    """
    if table.log_variance is None:
        raise ValueError("this table was not made for DDPM with variance_type 'learned_range'")
    v = variance_channels.to(torch.promote_types(variance_channels.dtype, torch.float32))
    if table.timesteps[step] == 0:
        return torch.zeros_like(v)
    low, high = table.log_variance[step].tolist()
    return torch.exp(0.5 * learned_range_log_variance(v, low, high))


def fitted_timesteps(config: dict, steps: int) -> list[int] | None:
    """Those of a scheduler_config.json's few_step_timesteps for so many steps."""
    found = (own for own in config.get("few_step_timesteps") or () if len(own) == steps)
    return next(found, None)


def _timesteps(
    solver: str, config: dict, steps: int, trained: int, fitted: list[int] | None
) -> Tensor:
    """Descending timesteps (steps,) int64 in diffusers' arithmetic, ties of rounding included, or
    those that were fitted."""
    if not 1 <= steps <= trained:
        raise ValueError(f"{steps} steps asked for; between 1 and {trained} are possible")
    if fitted is not None:
        if any(high <= low for high, low in pairwise([trained, *fitted])):
            raise ValueError(
                f"few_step_timesteps holds {fitted}, wanted timesteps below {trained}, each "
                "smaller than the one before"
            )
        return torch.tensor(fitted)
    spacing = config.get("timestep_spacing", "linspace" if solver == "dpm++" else "leading")
    skip = 1 if solver == "dpm++" else 0  # its grid has one more point, where the last step ends
    if spacing == "linspace":
        width = (trained - 1) / max(steps + skip - 1, 1)
        ascending = [round(i * width) for i in range(skip, steps + skip)]
    elif spacing == "leading":
        width = trained // (steps + skip)
        offset = config.get("steps_offset", 0)
        ascending = [i * width + offset for i in range(skip, steps + skip)]
    elif spacing == "trailing":
        width = trained - (trained - trained / steps)  # rounded as numpy.arange rounds it
        ascending = [round(trained - i * width) - 1 for i in reversed(range(steps))]
    else:
        known = "linspace, leading, trailing"
        raise ValueError(f"unknown timestep_spacing {spacing!r}; known: {known}")
    if ascending[-1] >= trained or len(set(ascending)) < steps:
        raise ValueError(
            f"{steps} steps do not fit {trained} timesteps with spacing {spacing!r}; take fewer"
        )
    return torch.tensor(ascending[::-1])


def _final_signal(solver: str, config: dict, schedule: NoiseSchedule) -> Tensor:
    """alphas_cumprod where the last step ends: 1 (clean), or the first training timestep's."""
    if solver == "dpm++":
        kind = config.get("final_sigmas_type", "zero")
        if kind not in ("zero", "sigma_min"):
            raise ValueError(f"unknown final_sigmas_type {kind!r}; known: zero, sigma_min")
        clean = kind == "zero"
    else:
        clean = solver == "ddpm" or config.get("set_alpha_to_one", True)
    return torch.ones((), dtype=torch.float64) if clean else schedule.alphas_cumprod[0]


def _ddpm_noise(
    config: dict, timesteps: Tensor, posterior: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor | None]:
    """d (S,) of DDPM, and the bounds of its learned range. As in diffusers, 0 only at t = 0."""
    kind = config.get("variance_type") or "fixed_small"
    if kind not in ("fixed_small", "fixed_large", "learned_range"):
        known = "fixed_small, fixed_large, learned_range"
        raise ValueError(f"unknown variance_type {kind!r}; known: {known}")
    small = posterior.clamp(min=1e-20)  # a step that ends clean has 0, and no logarithm
    d = (beta if kind == "fixed_large" else small).sqrt() * (timesteps > 0)
    bounds = torch.stack([small.log(), beta.log()], dim=1) if kind == "learned_range" else None
    return d, bounds


def _second_order_stop(config: dict, steps: int) -> int:
    """Rows 1 to here are second order: the first has no x0_previous, the last may not want it."""
    algorithm = config.get("algorithm_type", "dpmsolver++")
    kind, order = config.get("solver_type", "midpoint"), config.get("solver_order", 2)
    if algorithm != "dpmsolver++" or kind != "midpoint" or order not in (1, 2):
        raise ValueError(
            f"algorithm_type {algorithm!r}, solver_type {kind!r}, solver_order {order} is not"
            " supported; dpm++ is 'dpmsolver++', 'midpoint', 1 or 2"
        )
    if config.get("lambda_min_clipped", -math.inf) > -math.inf:
        raise ValueError("lambda_min_clipped is not supported; set it to -Infinity")
    if order == 1:
        return 1
    first_order_last = (
        config.get("final_sigmas_type", "zero") == "zero"
        or config.get("euler_at_final", False)
        or (config.get("lower_order_final", True) and steps < 15)
    )
    return max(1, steps - 1 if first_order_last else steps)
