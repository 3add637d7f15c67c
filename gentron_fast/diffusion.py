"""Noise: the schedule, the training loss, and noise that any machine and language draws alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gentron_fast.schema import (
    FLAG,
    MOST_TIMESTEPS,
    TEXT,
    Kind,
    check,
    optional,
    real,
    several,
    whole,
)

# Shapes: B batch, C channels, T training timesteps, S sampling steps.

# A diffusers scheduler_config.json. "trailing" starts every solver at the last training timestep,
# the one whose input is the pure noise that sampling starts from ("leading" starts 5 steps at
# t = 800), and is the spacing at which DDPM, DDIM and DPM-Solver++ agree on where a step ends
# whenever the steps divide 1000. The last step lands on the clean latents ("zero").
SCHEDULER_CONFIG = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "trailing",
    "steps_offset": 0,
}
_BETA = real(0, 1)
SCHEDULER_SCHEMA = dict.fromkeys(("beta_start", "beta_end"), _BETA)
SCHEDULER_SCHEMA |= dict.fromkeys(("beta_schedule", "prediction_type", "timestep_spacing"), TEXT)
SCHEDULER_SCHEMA |= dict.fromkeys(("algorithm_type", "solver_type", "final_sigmas_type"), TEXT)
SCHEDULER_SCHEMA |= dict.fromkeys(("lower_order_final", "euler_at_final", "set_alpha_to_one"), FLAG)
SCHEDULER_SCHEMA |= {
    "num_train_timesteps": whole(1, MOST_TIMESTEPS),
    "trained_betas": optional(several(_BETA, 1, MOST_TIMESTEPS)),
    "steps_offset": whole(0, MOST_TIMESTEPS),
    "few_step_timesteps": optional(several(several(whole(0, MOST_TIMESTEPS), 1, 100), 0, 100)),
    "solver_order": whole(1, 3),
    "variance_type": optional(TEXT),
    "lambda_min_clipped": Kind("a number", lambda value: type(value) in (int, float)),
}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Variance-preserving diffusion: x_t = alpha_t * x0 + sigma_t * noise, in float64.

    betas (T,): variance added at each training timestep, each in (0, 1).
    """

    betas: Tensor

    def __post_init__(self):
        if not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise ValueError("every beta of a noise schedule must lie between 0 and 1")

    @classmethod
    def from_config(cls, config: dict) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler_config.json; absent keys take diffusers' defaults.

        Betas are float64 as in DiT; diffusers rounds them to float32. Raises ValueError for a
        model that does not predict noise, a schedule of an unknown kind, or a value out of range.
        """
        check(config, SCHEDULER_SCHEMA)
        prediction = config.get("prediction_type", "epsilon")
        if prediction != "epsilon":
            raise ValueError(f"prediction_type is {prediction!r}; only 'epsilon' is supported")
        if config.get("rescale_betas_zero_snr"):
            raise ValueError("rescale_betas_zero_snr is not supported; set it to false")
        trained = config.get("trained_betas")
        steps = config.get("num_train_timesteps", 1000 if trained is None else len(trained))
        start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        kind = config.get("beta_schedule", "linear")
        if trained is not None:
            if len(trained) != steps:
                raise ValueError(f"trained_betas holds {len(trained)} values for {steps} timesteps")
            betas = torch.as_tensor(trained, dtype=torch.float64)
        elif kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        elif kind == "squaredcos_cap_v2":
            time = torch.arange(steps + 1, dtype=torch.float64) / steps
            remaining = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - remaining[1:] / remaining[:-1]).clamp(max=0.999)
        else:
            known = "linear, scaled_linear, squaredcos_cap_v2"
            raise ValueError(f"unknown beta_schedule {kind!r}; known: {known}")
        return cls(betas)

    def __len__(self) -> int:
        return len(self.betas)

    def to(self, device: str | torch.device) -> "NoiseSchedule":
        """The same with its tables on a device, where nothing of them is copied at each step."""
        return NoiseSchedule(self.betas.to(device))

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def alpha(self) -> Tensor:
        return self.alphas_cumprod.sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        return (1 - self.alphas_cumprod).sqrt()

    @cached_property
    def betas_log(self) -> Tensor:
        return self.betas.log()

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """Of x_{t-1} given x_t and x0; at t = 0, where it is -inf, that of t = 1."""
        posterior = (1 - self._alphas_cumprod_next) / (1 - self.alphas_cumprod) * self.betas
        posterior[0] = posterior[1]
        return posterior.log()

    @cached_property
    def posterior_mean_scale(self) -> Tensor:
        """By how much an error of the noise shifts the posterior's mean: that of x0, sigma / alpha
        times as large, times x0's coefficient."""
        return self._alphas_cumprod_next.sqrt() * self.betas / (self.sigma * self.alpha)

    @cached_property
    def _alphas_cumprod_next(self) -> Tensor:
        return torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])

    def sample_timesteps(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Uniform training timesteps (batch,) int64 on the generator's device."""
        device = None if generator is None else generator.device
        return torch.randint(len(self), (batch,), generator=generator, device=device)

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t of x0 and noise (B, C, ...) at timestep (B,) int64, in x0's dtype."""
        # The coefficients stay float32: in bf16 they would shift the noise level by up to 0.4 %.
        alpha = _per_sample(self.alpha, timestep, x0)
        sigma = _per_sample(self.sigma, timestep, x0)
        return (alpha * x0 + sigma * noise).to(x0.dtype)


def diffusion_loss(prediction: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of the predicted noise, averaged over each sample, then the batch.

    prediction (B, C or 2C, ...): of 2C channels, the variance half is left out; noise (B, C, ...);
    weight (B,) scales each sample's error. Returns a float32 (float64 for float64) scalar.
    """
    dtype = torch.promote_types(noise.dtype, torch.float32)
    eps = prediction[:, : noise.shape[1]].to(dtype)
    error = (eps - noise.to(dtype)).square().flatten(1).mean(1)
    return (error if weight is None else error * weight).mean()


def vlb_loss(
    schedule: NoiseSchedule, prediction: Tensor, noise: Tensor, timestep: Tensor
) -> Tensor:
    """Variational bound that trains the learned-range variance, its mean frozen; bits per element.

    prediction (B, 2C, ...): noise, then variance channels; noise (B, C, ...); timestep (B,). Add it
    to diffusion_loss for the hybrid loss of Nichol & Dhariwal 2021 (arXiv 2102.09672), whose weight
    0.001 * T is 1 at 1000 timesteps, as in DiT. At t = 0 it is the negative log density:
    latents are continuous, so the 8-bit bins that DiT inherited have no meaning here.
    """
    channels = noise.shape[1]
    if prediction.shape[1] != 2 * channels:
        raise ValueError(
            f"vlb_loss needs {2 * channels} predicted channels, got {prediction.shape[1]}"
        )
    low = _per_sample(schedule.posterior_log_variance, timestep, noise)
    high = _per_sample(schedule.betas_log, timestep, noise)

    eps, variance = prediction.to(low.dtype).split(channels, dim=1)
    log_variance = learned_range_log_variance(variance, low, high)
    scale = _per_sample(schedule.posterior_mean_scale, timestep, noise)
    gap = scale * (eps.detach() - noise)
    squared = gap.square() * torch.exp(-log_variance)
    divergence = 0.5 * (log_variance - low + torch.exp(low - log_variance) - 1 + squared)
    density = 0.5 * (math.log(2 * math.pi) + log_variance + squared)
    first = (timestep == 0).view(-1, *[1] * (noise.ndim - 1))
    return torch.where(first, density, divergence).mean() / math.log(2)


def learned_range_log_variance(
    variance: Tensor, low: Tensor | float, high: Tensor | float
) -> Tensor:
    """Log variance of channels in [-1, 1]: -1 means low (the posterior's), 1 high (beta's)."""
    fraction = (variance + 1) / 2
    return fraction * high + (1 - fraction) * low


def _per_sample(values: Tensor, timestep: Tensor, like: Tensor) -> Tensor:
    """values (T,) at timestep (B,) as (B, 1, ...), float32 or like's float64."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    picked = values.to(timestep.device)[timestep].to(dtype)
    return picked.view(-1, *[1] * (like.ndim - 1))


# Portable noise, to the bit. One sample's element e (row-major over its shape) comes from
#   Philox4x32-10: key     = (seed mod 2**32, seed div 2**32)
#                  counter = (e div 4, step, sample, 0)          -> 32-bit words w0, w1, w2, w3
#   e mod 4 = 0, 1: cosine, sine of (w0, w1);   e mod 4 = 2, 3: cosine, sine of (w2, w3)
#   Box-Muller:    u = ((w0 >> 8) + 1) * 2**-24   in (0, 1]      both exact in fp32
#                  v =  (w1 >> 8)      * 2**-24   in [0, 1)
#                  radius = sqrt(-2 * log(u));  angle = TURN * v;  radius * cos(angle), * sin(angle)
# Every operation rounds to fp32 (to nearest, ties to even). log, sqrt, cos and sin are evaluated in
# fp64 at their fp32 argument and then rounded, for fp32 libraries differ from CPU to CPU (torch's
# fp32 sqrt is not always correctly rounded): two implementations then differ, by a last bit, in
# fewer than one element in 10**7. An implementation that takes a fp32 library instead, right
# within 2 ulp, stays within 1e-6 * |value| of this one (|value| <= 5.77).
STREAM = 0
TURN = 6.2831854820251465  # 2 * pi in fp32
_WORD = 0xFFFFFFFF


def portable_noise(
    shape: Sequence[int], seeds: Sequence[int], step: int, samples: Sequence[int] | None = None
) -> Tensor:
    """Standard normal noise of each sample from its own (seed, sample index, step).

    It depends on nothing else, neither batch neighbours nor device; drawn on the CPU.
    shape: of one sample; seeds: one in [0, 2**64) for each; samples: index of each among those of
    the same seed, all 0 when None. step 0 is the initial latents; sampling step i (from 0)
    draws step i + 1. Returns (B, *shape) float32. Raises ValueError for numbers out of range.
    """
    samples = [0] * len(seeds) if samples is None else samples
    if not seeds or len(samples) != len(seeds):
        raise ValueError(f"{len(samples)} sample indices for {len(seeds)} seeds")
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed} is not between 0 and 2**64 - 1")
    for number in (step, *samples):
        if not 0 <= number <= _WORD:
            raise ValueError(f"step or sample index {number} is not between 0 and 2**32 - 1")
    size = math.prod(shape)
    draws = [
        _sample_noise(size, seed, step, sample) for seed, sample in zip(seeds, samples, strict=True)
    ]
    return torch.stack(draws).reshape(len(seeds), *shape)


def _sample_noise(size: int, seed: int, step: int, sample: int) -> Tensor:
    """One sample's elements (size,)."""
    blocks = torch.arange(math.ceil(size / 4))
    counter = (blocks, torch.tensor(step), torch.tensor(sample), torch.tensor(STREAM))
    key = (torch.tensor(seed & _WORD), torch.tensor(seed >> 32))
    words = torch.stack(philox4x32(counter, key), dim=1) >> 8  # (blocks, 4)
    u = (words[:, 0::2] + 1).float() * 2.0**-24
    v = words[:, 1::2].float() * 2.0**-24
    radius = (-2 * u.double().log().float()).double().sqrt().float()
    angle = (TURN * v).double()
    pair = torch.stack([angle.cos().float(), angle.sin().float()], dim=2)  # (blocks, 2, 2)
    return (radius.unsqueeze(2) * pair).flatten()[:size]


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3").

    Words are int64 tensors holding 32-bit values, broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, in 16-bit halves: int64 holds only 63 bits."""
    upper, lower = (constant >> 16) * word, (constant & 0xFFFF) * word
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _WORD
