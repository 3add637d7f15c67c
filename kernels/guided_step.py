"""Guidance and solver update in one pass over the latents, two with guidance rescale.

eps = w1 · eps(∅,∅) + w2 · eps(∅,c_M) + w3 · eps(c_T,c_M)
eps = (phi · std(eps(c_T,c_M)) / std(eps) + 1 - phi) · eps, where a sample has a rescale phi
x0 = (x - sigma · eps) / alpha;  x' = a · x + b · x0 + c · x0_previous + d · noise
"""

# Shapes: B batch, C channels, T frames, H × W latents, P = T · H · W.

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gentron_kernels import launch
from gentron_kernels.launch import tl

BLOCK = 1024
NUM_WARPS = 4


def guided_step(
    latents: Tensor,
    branches: Iterable[Tensor | None],
    weights: Tensor,
    row: Tensor,
    x0_previous: Tensor | None = None,
    noise: Tensor | None = None,
    d: Tensor | None = None,
    rescale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Combine the branches' predictions and take one solver step: (latents at the next level, x0).

    latents (B, C, T, H, W); branches: the noise predicted for the null text with the identity mask,
    the null text with motion, the text with motion, each like latents and of any floating dtype,
    or None where absent, at least one present; views are read in place where (T, H, W) is
    contiguous. weights (3,) or (B, 3) and row (6,) or (B, 6): alpha, sigma, a, b, c, d, fp32 or
    fp64, on the latents' device: their values may change from step to step without recompilation.
    x0_previous, noise: like latents; None counts as 0, and so does whatever meets c = 0 or d = 0,
    sample by sample. d: like latents, in place of the row's, where that is not 0 (learned range).
    rescale: phi of each sample, (B,) like weights, 0 (none) to 1: the guided noise is brought to
    the standard deviation of the text's branch, which must be there, by this share (Lin et al.
    2024, arXiv 2305.08891, section 3.4).
    Returned in fp32, or fp64 for fp64 latents. It has no backward: ValueError under grad mode if an
    input requires a gradient, as for every input that does not fit.
    Source: GenTron (arXiv 2312.04557), section 3.3; the row as in gentron_fast.solvers.
    """
    branches = () if branches is None else tuple(branches)
    _check(latents, branches, weights, row, x0_previous, noise, d, rescale)
    present = [branch for branch in branches if branch is not None]
    backend = launch.backend(latents, *present)
    dtype = _wide(latents)
    latents, x0_previous, noise, d = (
        None if tensor is None else tensor.to(dtype) for tensor in (latents, x0_previous, noise, d)
    )
    if backend == "ref":
        return guided_step_ref(latents, branches, weights, row, x0_previous, noise, d, rescale)
    operators = torch.ops.gentron.guided_step_cuda, torch.ops.gentron.rescaled_weights_cuda
    if backend == "cpu":
        operators = torch.ops.gentron.guided_step_cpu, torch.ops.gentron.rescaled_weights_cpu
    step, rescaled_weights = operators
    if any(branch.dtype != present[0].dtype for branch in present):
        common = functools.reduce(torch.promote_types, (branch.dtype for branch in present))
        branches = [None if branch is None else branch.to(common) for branch in branches]
    branches = [None if branch is None else _planes(branch) for branch in branches]
    weights = weights.expand(latents.shape[0], 3)
    if rescale is not None:
        weights = rescaled_weights(*branches, weights, rescale)
    x_next, x0 = step(
        _planes(latents).contiguous(),
        *branches,
        weights,
        row,
        *(
            None if tensor is None else _planes(tensor).contiguous()
            for tensor in (x0_previous, noise, d)
        ),
    )
    return x_next.reshape(latents.shape), x0.reshape(latents.shape)


def guided_step_ref(
    latents: Tensor,
    branches: Sequence[Tensor | None],
    weights: Tensor,
    row: Tensor,
    x0_previous: Tensor | None = None,
    noise: Tensor | None = None,
    d: Tensor | None = None,
    rescale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `guided_step`."""
    dtype = _wide(latents)
    x = latents.to(dtype)
    per_sample = weights.to(dtype).expand(x.shape[0], 3)[..., None, None, None, None]
    eps = sum(
        weight * branch.to(dtype)
        for weight, branch in zip(per_sample.unbind(1), branches, strict=True)
        if branch is not None
    )
    if rescale is not None:
        eps = rescaled_noise(eps, branches[2].to(dtype), rescale)
    per_sample = row.to(dtype).expand(x.shape[0], 6)[..., None, None, None, None]
    alpha, sigma, a, b, c, row_d = per_sample.unbind(1)
    x0 = (x - sigma * eps) / alpha
    x_next = a * x + b * x0
    if x0_previous is not None:
        x_next = x_next + torch.where(c != 0, c * x0_previous.to(dtype), 0)
    if noise is not None:
        drawn = (row_d if d is None else d.to(dtype)) * noise.to(dtype)
        x_next = x_next + torch.where(row_d != 0, drawn, 0)
    return x_next, x0


def rescaled_noise(guided: Tensor, text: Tensor, rescale: Tensor) -> Tensor:
    """The guided noise at the standard deviation of the text's branch, by the share `rescale`.

    guided, text (B, C, T, H, W); rescale (B,), 0 to 1. A guided noise that is constant stays as it
    is. Source: Lin et al. 2024 (arXiv 2305.08891), section 3.4.
    """
    of_text, of_guided = (x.flatten(1).std(1, correction=0) for x in (text, guided))
    ratio = torch.where(of_guided > 0, of_text / of_guided, 1)
    factor = rescale.to(guided) * ratio + (1 - rescale.to(guided))
    return factor.reshape(-1, 1, 1, 1, 1) * guided


@launch.jit
def _guided_noise(
    weights_ptr,
    weights_branch,
    null_still_ptr,
    null_motion_ptr,
    text_ptr,
    offsets,
    inside,
    HAS_NULL_STILL: tl.constexpr,
    HAS_NULL_MOTION: tl.constexpr,
    HAS_TEXT: tl.constexpr,
):
    """The weighted sum of the branches, and the text's branch or 0; pointers at one plane."""
    eps = tl.zeros_like(offsets).to(tl.float64)
    text = eps
    if HAS_NULL_STILL:
        weight = tl.load(weights_ptr).to(tl.float64)
        eps += weight * tl.load(null_still_ptr + offsets, inside, 0).to(tl.float64)
    if HAS_NULL_MOTION:
        weight = tl.load(weights_ptr + weights_branch).to(tl.float64)
        eps += weight * tl.load(null_motion_ptr + offsets, inside, 0).to(tl.float64)
    if HAS_TEXT:
        weight = tl.load(weights_ptr + 2 * weights_branch).to(tl.float64)
        text = tl.load(text_ptr + offsets, inside, 0).to(tl.float64)
        eps += weight * text
    return eps, text


# fp64 throughout: at the noisiest step x0 divides the rounding of x and sigma · eps by
# alpha = 0.006. The pass stays bound by memory where fp64 runs at half the rate of fp32.
# I/O: read x, the branches, x0_previous, noise and d that are there; write x', x0.
@launch.jit(do_not_specialize_on_alignment=["weights_ptr", "row_ptr"])
def _guided_step_kernel(
    latents_ptr,
    null_still_ptr,
    null_motion_ptr,
    text_ptr,
    weights_ptr,
    row_ptr,
    x0_previous_ptr,
    noise_ptr,
    d_ptr,
    x_next_ptr,
    x0_ptr,
    channels,
    size,
    null_still_batch,
    null_still_channel,
    null_motion_batch,
    null_motion_channel,
    text_batch,
    text_channel,
    weights_batch,
    weights_branch,
    row_batch,
    row_stride,
    HAS_NULL_STILL: tl.constexpr,
    HAS_NULL_MOTION: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_X0_PREVIOUS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = (size + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    sample, channel = plane // channels, plane % channels
    offsets = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size

    eps, _ = _guided_noise(
        weights_ptr + sample * weights_batch,
        weights_branch,
        null_still_ptr + sample * null_still_batch + channel * null_still_channel,
        null_motion_ptr + sample * null_motion_batch + channel * null_motion_channel,
        text_ptr + sample * text_batch + channel * text_channel,
        offsets,
        inside,
        HAS_NULL_STILL,
        HAS_NULL_MOTION,
        HAS_TEXT,
    )
    row_ptr += sample * row_batch
    alpha = tl.load(row_ptr).to(tl.float64)
    sigma = tl.load(row_ptr + row_stride).to(tl.float64)
    a = tl.load(row_ptr + 2 * row_stride).to(tl.float64)
    b = tl.load(row_ptr + 3 * row_stride).to(tl.float64)
    start = plane * size
    x = tl.load(latents_ptr + start + offsets, inside, 0).to(tl.float64)
    x0 = (x - sigma * eps) * (1 / alpha)
    tl.store(x0_ptr + start + offsets, x0, inside)
    x_next = a * x + b * x0
    if HAS_X0_PREVIOUS:
        c = tl.load(row_ptr + 4 * row_stride).to(tl.float64)
        read = offsets < tl.where(c != 0, size, 0)
        previous = tl.load(x0_previous_ptr + start + offsets, read, 0)
        x_next += c * previous.to(tl.float64)
    if HAS_NOISE:
        d = tl.load(row_ptr + 5 * row_stride).to(tl.float64)
        read = offsets < tl.where(d != 0, size, 0)
        noise = tl.load(noise_ptr + start + offsets, read, 0).to(tl.float64)
        if HAS_D:
            noise *= tl.load(d_ptr + start + offsets, read, 0).to(tl.float64)
        else:
            noise *= d
        x_next += noise
    tl.store(x_next_ptr + start + offsets, x_next, inside)


@launch.triton_op("gentron::guided_step_cuda")
def _guided_step_cuda(
    latents: Tensor,
    null_still: Tensor | None,
    null_motion: Tensor | None,
    text: Tensor | None,
    weights: Tensor,
    row: Tensor,
    x0_previous: Tensor | None,
    noise: Tensor | None,
    d: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """latents (B, C, P) contiguous, weights (B, 3); the rest as in `guided_step`, flattened."""
    x_next, x0 = torch.empty_like(latents), torch.empty_like(latents)
    batch, channels, size = latents.shape
    if latents.numel() == 0:
        return x_next, x0
    row = row.expand(batch, 6)
    optional = null_still, null_motion, text, x0_previous, noise, d
    # An absent tensor is never read; any pointer stands in for it.
    branches = [latents if branch is None else branch for branch in optional[:3]]
    rest = [latents if tensor is None else tensor for tensor in optional[3:]]
    with launch.device_of(latents):
        launch.launcher(_guided_step_kernel)[(batch * channels * -(-size // BLOCK),)](
            latents,
            *branches,
            weights,
            row,
            *rest,
            x_next,
            x0,
            channels,
            size,
            *(stride for branch in branches for stride in branch.stride()[:2]),
            *weights.stride(),
            *row.stride(),
            *(tensor is not None for tensor in optional),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return x_next, x0


# I/O: read the branches of samples with a rescale; the moments and weights are small.
@launch.jit(do_not_specialize_on_alignment=["weights_ptr", "rescale_ptr"])
def _moments_kernel(
    null_still_ptr,
    null_motion_ptr,
    text_ptr,
    weights_ptr,
    rescale_ptr,
    moments_ptr,
    channels,
    size,
    null_still_batch,
    null_still_channel,
    null_motion_batch,
    null_motion_channel,
    text_batch,
    text_channel,
    weights_batch,
    weights_branch,
    rescale_stride,
    HAS_NULL_STILL: tl.constexpr,
    HAS_NULL_MOTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum and sum of squares of the guided noise and of the text's branch, of each program."""
    blocks = (size + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    plane = program // blocks
    sample, channel = plane // channels, plane % channels
    offsets = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    rescale = tl.load(rescale_ptr + sample * rescale_stride)
    eps, text = _guided_noise(
        weights_ptr + sample * weights_batch,
        weights_branch,
        null_still_ptr + sample * null_still_batch + channel * null_still_channel,
        null_motion_ptr + sample * null_motion_batch + channel * null_motion_channel,
        text_ptr + sample * text_batch + channel * text_channel,
        offsets,
        offsets < tl.where(rescale != 0, size, 0),
        HAS_NULL_STILL,
        HAS_NULL_MOTION,
        True,
    )
    moments_ptr += program * 4
    tl.store(moments_ptr, tl.sum(eps))
    tl.store(moments_ptr + 1, tl.sum(eps * eps))
    tl.store(moments_ptr + 2, tl.sum(text))
    tl.store(moments_ptr + 3, tl.sum(text * text))


@launch.jit(do_not_specialize_on_alignment=["weights_ptr", "rescale_ptr"])
def _rescaled_weights_kernel(
    moments_ptr,
    weights_ptr,
    rescale_ptr,
    out_ptr,
    programs,
    elements,
    weights_batch,
    weights_branch,
    rescale_stride,
    BLOCK: tl.constexpr,
):
    """The weights of one sample, times what its guided noise is rescaled by."""
    sample = tl.program_id(0).to(tl.int64)
    moments_ptr += sample * programs * 4
    eps = tl.zeros((BLOCK,), tl.float64)
    eps_squared, text, text_squared = eps, eps, eps
    for start in range(0, programs, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < programs
        eps += tl.load(moments_ptr + place * 4, inside, 0)
        eps_squared += tl.load(moments_ptr + place * 4 + 1, inside, 0)
        text += tl.load(moments_ptr + place * 4 + 2, inside, 0)
        text_squared += tl.load(moments_ptr + place * 4 + 3, inside, 0)
    # The mean is small beside the standard deviation, and fp64 has digits to spare.
    eps_sum, text_sum = tl.sum(eps), tl.sum(text)
    of_guided = tl.maximum(tl.sum(eps_squared) - eps_sum * eps_sum / elements, 0)
    of_text = tl.maximum(tl.sum(text_squared) - text_sum * text_sum / elements, 0)
    ratio = tl.where(of_guided > 0, tl.sqrt(of_text / of_guided), 1)
    rescale = tl.load(rescale_ptr + sample * rescale_stride).to(tl.float64)
    factor = rescale * ratio + (1 - rescale)
    for branch in range(3):
        weight = tl.load(weights_ptr + sample * weights_batch + branch * weights_branch)
        tl.store(out_ptr + sample * 3 + branch, factor * weight.to(tl.float64))


@launch.triton_op("gentron::rescaled_weights_cuda")
def _rescaled_weights_cuda(
    null_still: Tensor | None,
    null_motion: Tensor | None,
    text: Tensor,
    weights: Tensor,
    rescale: Tensor,
) -> Tensor:
    """Branches (B, C, P), weights (B, 3), rescale (B,) → (B, 3) fp64, as in `guided_step`."""
    batch, channels, size = text.shape
    out = torch.empty(batch, 3, dtype=torch.float64, device=text.device)
    if text.numel() == 0:
        return out
    programs = channels * -(-size // BLOCK)
    moments = out.new_empty(batch, programs, 4)
    branches = [text if branch is None else branch for branch in (null_still, null_motion, text)]
    with launch.device_of(text):
        launch.launcher(_moments_kernel)[(batch * programs,)](
            *branches,
            weights,
            rescale,
            moments,
            channels,
            size,
            *(stride for branch in branches for stride in branch.stride()[:2]),
            *weights.stride(),
            rescale.stride(0),
            null_still is not None,
            null_motion is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
        launch.launcher(_rescaled_weights_kernel)[(batch,)](
            moments,
            weights,
            rescale,
            out,
            programs,
            channels * size,
            *weights.stride(),
            rescale.stride(0),
            BLOCK=128,
            num_warps=NUM_WARPS,
        )
    return out


def compile_cases():
    """For compilation ahead of time: (name, kernel, signature, constants, num_warps)."""
    # Latents only set the shape, and it is no constant: one kernel for XL/2 and G/2.
    for name, absent in (("all", ()), ("DDIM", ("X0_PREVIOUS", "NOISE", "D"))):
        yield _compile_case(name, _guided_step_kernel, BLOCK, absent)
    yield _compile_case("rescale", _moments_kernel, BLOCK)
    yield _compile_case("rescale", _rescaled_weights_kernel, 128)


def _compile_case(name: str, kernel, block: int, absent: Sequence[str] = ()) -> tuple:
    integers = [argument for argument in kernel.arg_names if argument.islower()]
    signature = dict.fromkeys(integers, "i32")
    signature |= dict.fromkeys((name for name in integers if name.endswith("_ptr")), "*fp32")
    signature |= dict.fromkeys(("null_still_ptr", "null_motion_ptr", "text_ptr"), "*bf16")
    wide = "weights_ptr", "row_ptr", "rescale_ptr", "moments_ptr", "out_ptr"
    signature |= dict.fromkeys(wide, "*fp64")
    flags = [argument for argument in kernel.arg_names if argument.startswith("HAS_")]
    constants = {flag: flag.removeprefix("HAS_") not in absent for flag in flags}
    signature = {argument: signature[argument] for argument in integers}
    return name, kernel, signature, constants | {"BLOCK": block}, NUM_WARPS


if launch.cpu_library():

    @torch.library.register_fake("gentron::guided_step_cpu")
    def _(latents, null_still, null_motion, text, weights, row, x0_previous, noise, d):
        return torch.empty_like(latents), torch.empty_like(latents)

    @torch.library.register_fake("gentron::rescaled_weights_cpu")
    def _(null_still, null_motion, text, weights, rescale):
        return weights.new_empty(weights.shape, dtype=torch.float64)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _planes(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, C, P), a view where the last three are contiguous."""
    x = x.flatten(2)
    return x if x.stride(2) == 1 else x.contiguous()


def _check(latents, branches, weights, row, x0_previous, noise, d, rescale) -> None:
    launch.check_tensors(latents=latents, weights=weights, row=row)
    if latents.ndim != 5 or not latents.dtype.is_floating_point:
        raise ValueError(
            f"latents must be floating (B, C, T, H, W), got {latents.dtype} {tuple(latents.shape)}"
        )
    if len(branches) != 3 or all(branch is None for branch in branches):
        absent = sum(branch is None for branch in branches)
        raise ValueError(
            "branches must be three predictions, at least one of them not None, "
            f"got {len(branches)} of which {absent} are None"
        )
    names = "null still branch", "null motion branch", "text branch", "x0_previous", "noise", "d"
    like_latents = dict(zip(names, (*branches, x0_previous, noise, d), strict=True))
    given = {"rescale": rescale, **like_latents}
    launch.check_tensors(**{name: tensor for name, tensor in given.items() if tensor is not None})
    for name, tensor in like_latents.items():
        if tensor is not None and (
            tensor.shape != latents.shape or not tensor.dtype.is_floating_point
        ):
            raise ValueError(
                f"{name} must be floating and of the latents' shape {tuple(latents.shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    wide = torch.float32, torch.float64
    # Not `in` a tuple of both: under torch.export that would ask whether the batch is 3.
    for name, tensor, count in (("weights", weights, 3), ("row", row, 6)):
        wanted = (count,) if tensor.ndim == 1 else (latents.shape[0], count)
        if tensor.dtype not in wide or tensor.shape != wanted:
            raise ValueError(
                f"{name} must be ({count},) or ({latents.shape[0]}, {count}) in fp32 or fp64, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if rescale is not None:
        if rescale.dtype not in wide or rescale.shape != (latents.shape[0],):
            raise ValueError(
                f"rescale must be ({latents.shape[0]},) in fp32 or fp64, "
                f"got {rescale.dtype} {tuple(rescale.shape)}"
            )
        if branches[2] is None:
            raise ValueError("a rescale needs the text branch, got None")
    everything = {"latents": latents, **like_latents, "weights": weights, "row": row}
    everything["rescale"] = rescale
    for name, tensor in everything.items():
        if tensor is None:
            continue
        if tensor.device != latents.device:
            raise ValueError(
                f"{name} must be on the latents' device, {latents.device}, got {tensor.device}"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"guided_step has no backward and {name} requires a gradient; "
                "call it under torch.no_grad()"
            )
