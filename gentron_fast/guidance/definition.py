"""Classifier-free and motion-free guidance, as the paper defines it.

    ε̃ = ε(∅,∅) + λ_T · (ε(c_T,c_M) - ε(∅,c_M)) + λ_M · (ε(∅,c_M) - ε(∅,∅))

and, with guidance rescale φ (Lin et al. 2024, arXiv 2305.08891, section 3.4), ε̃ times
φ · std(ε(c_T,c_M)) / std(ε̃) + 1 - φ. c_T is the text and c_M the motion: full temporal attention,
where ∅ is the identity mask.
"""

# Shapes: B batch, C channels, T frames, H × W latents, S sampling steps.

from collections.abc import Iterable

import torch
from torch import Tensor

from gentron_fast.model import GenTron, TextCondition
from gentron_kernels.guided_step import rescaled_noise

# Weights of ε(∅,∅), ε(∅,c_M) and ε(c_T,c_M): a constant, and coefficients of λ_T and λ_M.
COEFFICIENTS = ((1, 0, -1), (0, -1, 1), (0, 1, 0))
# Without motion ε(∅,c_M) is ε(∅,∅): their weights are added, and the second is 0.
COEFFICIENTS_WITHOUT_MOTION = ((1, -1, 0), (0, 0, 0), (0, 1, 0))
# A distilled model gives ε̃ itself, of the λ that it takes as inputs (Meng et al. 2023, arXiv
# 2210.03142): the text's branch alone.
COEFFICIENTS_DISTILLED = ((0, 0, 0), (0, 0, 0), (1, 0, 0))


def guidance_coefficients(
    has_motion: bool, distilled: bool = False
) -> tuple[tuple[int, int, int], ...]:
    """Of each branch's weight: constant, coefficient of λ_T, coefficient of λ_M."""
    if distilled:
        return COEFFICIENTS_DISTILLED
    return COEFFICIENTS if has_motion else COEFFICIENTS_WITHOUT_MOTION


def guidance_weights(
    lambda_t: float | Tensor,
    lambda_m: float | Tensor,
    has_motion: bool = True,
    distilled: bool = False,
) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
    """Weights of ε(∅,∅), ε(∅,c_M) and ε(c_T,c_M); they add up to 1 (paper, section 3.3).

    lambda_t, lambda_m: numbers, or one a sample (B,). Without motion (one frame, or a model without
    temporal layers) ε(∅,c_M) is ε(∅,∅): their weights are added and the second is 0. distilled: of
    a model with a guidance embedding, whose one branch is ε̃.
    """
    return tuple(
        constant + of_text * lambda_t + of_motion * lambda_m
        for constant, of_text, of_motion in guidance_coefficients(has_motion, distilled)
    )


def guidance_inputs(lambda_t: Tensor, lambda_m: Tensor, has_motion: bool) -> Tensor:
    """What a distilled model takes of the scales, (..., 2) fp32 of tensors (...): λ_T, and λ_M or,
    where there is no motion to guide, 1."""
    if not has_motion:
        lambda_m = torch.ones_like(lambda_m)
    return torch.stack([lambda_t, lambda_m], -1).float()


def check_one_branch(negative_prompts: Iterable[str] = (), reuse: int = 1) -> None:
    """ValueError for what a distilled model, which has no branch but the text's, cannot take."""
    if refused := next(filter(None, negative_prompts), None):
        raise ValueError(
            "this model is distilled, with the empty prompt as what to keep away from: it takes "
            f"no negative prompt, got {refused!r}"
        )
    if reuse > 1:
        raise ValueError(f"a distilled model has one branch, none to reuse: got {reuse}")


def check_rescale(rescale: Tensor, distilled: bool = False) -> Tensor:
    """The rescale φ of samples. ValueError unless each is 0 … 1, and 0 for a distilled model."""
    if not ((rescale >= 0) & (rescale <= 1)).all():
        raise ValueError(f"the rescale must be 0 … 1, got {rescale.flatten().tolist()}")
    if distilled and rescale.any():
        raise ValueError(
            "a distilled model's one branch has nothing to rescale by: the rescale must be 0, got "
            f"{rescale.flatten().tolist()}"
        )
    return rescale


def guided_prediction(
    model: GenTron,
    latents: Tensor,
    timestep: Tensor,
    text: TextCondition,
    null_text: TextCondition,
    lambda_t: float | Tensor,
    lambda_m: float | Tensor,
    rescale: float | Tensor = 0.0,
) -> Tensor:
    """The guided noise ε̃, (B, C, T, H, W) fp32 (fp64 for fp64 latents).

    latents (B, C, T, H, W); timestep (B,); text and null_text of B prompts each, null_text the
    empty or the negative prompt; lambda_t, lambda_m and rescale, 0 to 1, numbers or (B,). A branch
    whose weight is 0 does not run, but the text's does where there is a rescale; of a distilled
    model (`guidance_embedding`) the text's alone, which takes the scales and is ε̃. Learned-range
    variance channels are those of the last branch that a sample needs, the text's where it does
    (DiT practice), and come behind the noise: (B, 2 · C, T, H, W).
    """
    has_motion = model.config.temporal and latents.shape[2] > 1
    distilled, guidance = model.config.guidance_embedding, None
    weights = guidance_weights(lambda_t, lambda_m, has_motion, distilled)
    if distilled:
        scales = (torch.as_tensor(scale, device=latents.device) for scale in (lambda_t, lambda_m))
        guidance = guidance_inputs(*(s.expand(len(latents)) for s in scales), has_motion)
    branches = (null_text, True), (null_text, False), (text, False)
    channels = model.config.in_channels
    rescale = check_rescale(torch.as_tensor(rescale, dtype=torch.float64), distilled)
    rescale = rescale.expand(len(latents))
    guided = noise = variance = None
    for weight, (condition, motion_free) in zip(weights, branches, strict=True):
        weight = torch.as_tensor(weight, dtype=torch.float64)
        needed = (weight != 0) | ((rescale != 0) & (condition is text))
        if not needed.any():
            continue
        prediction = model(latents, timestep, condition, motion_free, guidance=guidance)
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        noise, own_variance = prediction[:, :channels], prediction[:, channels:]
        needed = needed.to(noise.device).reshape(-1, 1, 1, 1, 1)
        variance = own_variance if variance is None else own_variance.where(needed, variance)
        weighted = weight.to(noise).reshape(-1, 1, 1, 1, 1) * noise
        guided = weighted if guided is None else guided + weighted
    if rescale.any():
        guided = rescaled_noise(guided, noise, rescale.to(guided.device))
    return torch.cat([guided, variance], dim=1)


def guidance_schedule(
    scale: float | Tensor, steps: int, start: float = 0.0, stop: float = 1.0
) -> Tensor:
    """A guidance scale within a range of the steps and 1, no guidance, outside: (S, B) float64.

    scale a number or one a sample (B,); start and stop in 0 … 1 of the steps, from the noisiest on
    (Kynkäänniemi et al. 2024, arXiv 2404.07724).
    """
    if not 0 <= start <= stop <= 1:
        raise ValueError(f"the guidance range must be 0 ≤ start ≤ stop ≤ 1, got {start}, {stop}")
    place = torch.arange(steps, dtype=torch.float64)[:, None] / steps
    scale = torch.as_tensor(scale, dtype=torch.float64).reshape(1, -1)
    return torch.where((place >= start) & (place < stop), scale, 1.0)
