"""The noise schedule, the training losses and portable noise."""

import math
import struct

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from gentron_fast.diffusion import (
    SCHEDULER_CONFIG,
    NoiseSchedule,
    diffusion_loss,
    philox4x32,
    portable_noise,
    vlb_loss,
)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedule_matches_diffusers(kind):
    config = {"beta_schedule": kind, "num_train_timesteps": 100}
    schedule = NoiseSchedule.from_config(config)
    reference = DDPMScheduler.from_config(config)
    torch.testing.assert_close(schedule.betas.float(), reference.betas, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        schedule.alphas_cumprod.float(), reference.alphas_cumprod, rtol=1e-4, atol=1e-8
    )
    unit = schedule.alpha.square() + schedule.sigma.square()
    torch.testing.assert_close(unit, torch.ones_like(unit), rtol=0, atol=1e-15)


def test_schedule_defaults_and_given_betas():
    schedule = NoiseSchedule.from_config({})
    assert len(schedule) == 1000 and schedule.betas.dtype == torch.float64
    assert schedule.betas[0].item() == 1e-4 and schedule.betas[-1].item() == 0.02
    given = NoiseSchedule.from_config({"trained_betas": [0.1, 0.2, 0.5]})
    torch.testing.assert_close(
        given.alphas_cumprod, torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
        ({"beta_schedule": "sigmoid"}, "known: linear, scaled_linear, squaredcos_cap_v2"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1], "num_train_timesteps": 2}, "1 values for 2 timesteps"),
        ({"beta_end": 1.5}, "beta_end is 1.5, wanted a number from 0 to 1"),
        ({"beta_start": 0}, "between 0 and 1"),
    ],
)
def test_schedule_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(config)


def test_scheduler_config_is_one_of_diffusers():
    settings = {key: value for key, value in SCHEDULER_CONFIG.items() if key != "_class_name"}
    assert SCHEDULER_CONFIG["_class_name"] == DPMSolverMultistepScheduler.__name__
    config = DPMSolverMultistepScheduler(**settings).config  # a setting it lacks is a TypeError
    assert config.items() >= settings.items()


def test_add_noise_matches_diffusers():
    x0, noise = torch.randn(2, 3, 4, 2, 5, 5)
    timestep = torch.tensor([0, 500, 999])
    noisy = NoiseSchedule.from_config(SCHEDULER_CONFIG).add_noise(x0, noise, timestep)
    torch.testing.assert_close(noisy, DDPMScheduler().add_noise(x0, noise, timestep))


def test_add_noise_keeps_dtype_and_rounds_once():
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    x0, noise = torch.randn(2, 1, 4, 8, 8).bfloat16()
    timestep = torch.tensor([300])
    noisy = schedule.add_noise(x0, noise, timestep)
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(noisy, schedule.add_noise(x0.float(), noise.float(), timestep).bfloat16())


def test_sampled_timesteps_follow_the_generator():
    schedule = NoiseSchedule.from_config({"num_train_timesteps": 10})
    first = schedule.sample_timesteps(1000, torch.Generator().manual_seed(3))
    again = schedule.sample_timesteps(1000, torch.Generator().manual_seed(3))
    assert first.dtype == torch.int64 and torch.equal(first, again)
    assert first.unique().tolist() == list(range(10))


def test_diffusion_loss():
    prediction, noise = torch.randn(3, 8, 2, 4, 4), torch.randn(3, 4, 2, 4, 4)
    error = (prediction[:, :4] - noise).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(diffusion_loss(prediction, noise), error.mean())
    torch.testing.assert_close(diffusion_loss(prediction[:, :4], noise), error.mean())
    weight = torch.tensor([0.0, 1.0, 3.0])
    torch.testing.assert_close(
        diffusion_loss(prediction, noise, weight), (error[1] + 3 * error[2]) / 3
    )
    assert diffusion_loss(prediction.bfloat16(), noise.bfloat16()).dtype == torch.float32


def posterior_kl(schedule, prediction, x0, x_t, t):
    """KL of the posterior from the model in bits per element, by the means of DDPM's eq. 7."""
    signal, beta = schedule.alphas_cumprod, schedule.betas
    a, a_next, beta = signal[t], signal[t - 1], beta[t]
    eps, variance = prediction.chunk(2)
    low, high = ((1 - a_next) / (1 - a) * beta).log(), beta.log()

    def mean(clean):
        kept = (1 - beta).sqrt() * (1 - a_next) / (1 - a) * x_t
        return kept + a_next.sqrt() * beta / (1 - a) * clean

    guess = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
    log_variance = (variance + 1) / 2 * high + (1 - variance) / 2 * low
    model = Normal(mean(guess), (log_variance / 2).exp())
    true = Normal(mean(x0), (low / 2).exp())
    return kl_divergence(true, model).mean() / math.log(2)


def test_vlb_loss_is_the_posterior_divergence():
    torch.manual_seed(0)
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    x0, noise, error = torch.randn(3, 3, 4, 2, 4, 4, dtype=torch.float64)
    variance = torch.rand(3, 4, 2, 4, 4, dtype=torch.float64) * 2 - 1
    prediction = torch.cat([noise + 0.1 * error, variance], dim=1)
    timestep = torch.tensor([1, 200, 999])
    x_t = schedule.add_noise(x0, noise, timestep)
    expected = torch.stack(
        [
            posterior_kl(schedule, *sample)
            for sample in zip(prediction, x0, x_t, timestep, strict=True)
        ]
    ).mean()
    torch.testing.assert_close(vlb_loss(schedule, prediction, noise, timestep), expected)


def test_vlb_loss_at_the_last_timestep_is_a_density():
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    noise = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    prediction = torch.cat([noise + 0.3, torch.ones_like(noise)], dim=1)  # variance 1: beta
    gap = 0.3 * schedule.sigma[0] / schedule.alpha[0]
    expected = -Normal(0.0, schedule.betas[0].sqrt()).log_prob(gap) / math.log(2)
    loss = vlb_loss(schedule, prediction, noise, torch.tensor([0]))
    torch.testing.assert_close(loss, expected)


def test_vlb_loss_trains_the_variance_alone():
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    prediction = torch.randn(2, 8, 4, 4, requires_grad=True)
    vlb_loss(schedule, prediction, torch.randn(2, 4, 4, 4), torch.tensor([0, 700])).backward()
    assert not prediction.grad[:, :4].any()
    assert prediction.grad[:, 4:].all()
    with pytest.raises(ValueError, match="needs 8 predicted channels, got 4"):
        vlb_loss(schedule, prediction[:, :4], torch.randn(2, 4, 4, 4), torch.tensor([0, 700]))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known-answer vectors
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_known_answers(counter, key, words):
    parse = [tuple(torch.tensor(int(w, 16)) for w in text.split()) for text in (counter, key)]
    assert " ".join(f"{w.item():08x}" for w in philox4x32(*parse)) == words


def rounded(value):
    """value in fp32, as a Python float."""
    return struct.unpack("f", struct.pack("f", value))[0]


def portable_normal(seed, sample, step, element):
    """One element of portable noise written from its description, in Python's own integers."""
    c = [element // 4, step, sample, 0]
    k = [seed % 2**32, seed >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q % 2**32, p >> 32 ^ c[3] ^ k[1], p % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    first, second = c[:2] if element % 4 < 2 else c[2:]
    u, v = ((first >> 8) + 1) / 2**24, (second >> 8) / 2**24
    radius = rounded(math.sqrt(-2 * rounded(math.log(u))))
    angle = rounded(rounded(2 * math.pi) * v)
    wave = math.cos(angle) if element % 2 == 0 else math.sin(angle)
    return rounded(radius * rounded(wave))


def test_portable_noise_is_its_description():
    seeds, samples, step = [0, 1, 2**64 - 1, 0x0123456789ABCDEF], [0, 7, 2**32 - 1, 2], 5
    noise = portable_noise((3, 5, 7), seeds, step, samples)
    assert noise.shape == (4, 3, 5, 7) and noise.dtype == torch.float32
    expected = [
        [portable_normal(seed, sample, step, element) for element in range(105)]
        for seed, sample in zip(seeds, samples, strict=True)
    ]
    assert noise.flatten(1).tolist() == expected


FROZEN = [  # fp32 bit patterns
    ["3f7dbb34", "bf6cb6ad", "bf1e1ba1", "bef6d1ac", "be1d534e", "3e392a6c"],
    ["3e9e091c", "3f453053", "bf0c5c4d", "be3ff45e", "bdaf0ef0", "401c6ad9"],
]


def test_portable_noise_is_frozen():
    noise = portable_noise((2, 3), [0, 2**40 + 17], 0)
    bits = noise.view(torch.int32).flatten(1).tolist()
    assert [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in bits] == FROZEN


def test_portable_noise_knows_no_neighbours():
    noise = portable_noise((4, 2, 8, 8), [11, 12, 13], 3)
    assert torch.equal(noise[1:2], portable_noise((4, 2, 8, 8), [12], 3))
    assert torch.equal(noise.flip(0), portable_noise((4, 2, 8, 8), [13, 12, 11], 3))


def test_portable_noise_streams_differ():
    draws = [
        portable_noise((4096,), [seed], step, [sample])[0]
        for seed in (0, 1, 1 << 32)
        for step in (0, 1)
        for sample in (0, 1)
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.08  # 5 standard deviations of 4096 independent pairs


def test_portable_noise_moments():
    noise = portable_noise((4, 64, 64), range(16), 1).double().flatten()
    assert abs(noise.mean()) < 0.008
    assert abs(noise.var() - 1) < 0.012
    assert abs((noise**3).mean()) < 0.02 and abs((noise**4).mean() - 3) < 0.08
    within = (noise.abs() < 1).double().mean()
    assert abs(within - math.erf(math.sqrt(0.5))) < 0.004
    assert abs((noise[:-1] * noise[1:]).mean()) < 0.008


def test_portable_noise_in_a_plain_fp32_library_is_close(monkeypatch):
    noise = portable_noise((4, 64, 64), range(4), 0)
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: tensor)
    plain = portable_noise((4, 64, 64), range(4), 0)
    assert ((plain - noise).abs() <= 1e-6 * noise.abs()).all()


@pytest.mark.parametrize(
    ("seeds", "step", "samples", "message"),
    [
        ([-1], 0, None, "seed -1"),
        ([2**64], 0, None, "seed 18446744073709551616"),
        ([0], -1, None, "-1 is not between"),
        ([0], 0, [2**32], "4294967296 is not between"),
        ([0, 1], 0, [0], "1 sample indices for 2 seeds"),
    ],
)
def test_portable_noise_refuses(seeds, step, samples, message):
    with pytest.raises(ValueError, match=message):
        portable_noise((4,), seeds, step, samples)


class WholeTables(TorchDispatchMode):
    """The operators that make something of a whole table of the schedule."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.found = length, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and self.length in out.shape:
            self.found.append(str(function))
        return out


def test_the_tables_stay_where_they_are():
    """After the first step no table is copied, cast or made again, only looked up."""
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG).to("cpu")
    noise, timestep = torch.randn(2, 4, 3), torch.tensor([0, 700])
    prediction = torch.randn(2, 8, 3)
    for found in (True, False):
        with WholeTables(len(schedule)) as mode:
            schedule.add_noise(noise, noise, timestep)
            vlb_loss(schedule, prediction, noise, timestep)
        assert bool(mode.found) == found, mode.found
