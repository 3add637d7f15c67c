"""Spatial and cross attention: no kernel of our own, the best there is for the device at hand.

flash4  flash-attn 4 (flash_attn.cute)        flash3  flash-attn 3 (flash_attn_interface)
flash2  flash-attn 2 (flash_attn)             cudnn   PyTorch's cuDNN attention
sdpa    PyTorch's scaled_dot_product_attention, which picks among its own kernels

GENTRON_ATTENTION, read at import, forces one of them wherever there is no mask.
"""

# Shapes: B batch, L queries, S keys, H heads, Dh head size.

import functools
import importlib
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gentron_kernels import launch

BACKENDS = ("flash4", "flash3", "flash2", "cudnn", "sdpa")
FORCED = os.environ.get("GENTRON_ATTENTION")

# Best first, by the device's major compute capability. cuDNN before flash-attn 2 on Hopper and
# Blackwell is PyTorch's own order there.
_ORDER = {
    8: ("flash2", "sdpa"),
    9: ("flash3", "flash4", "cudnn", "flash2", "sdpa"),
    10: ("flash4", "cudnn", "flash2", "sdpa"),
    11: ("flash4", "sdpa"),
    12: ("flash2", "sdpa"),
}
_MODULES = {
    "flash4": "flash_attn.cute",
    "flash3": "flash_attn_interface",
    "flash2": "flash_attn.flash_attn_interface",
}
_CUDNN_FIXED = 91501  # before, sequences that 128 does not divide go wrong
_HEAD_SIZES = {"flash4": 128, "flash3": 256, "flash2": 256, "cudnn": 128}
_GRID = 65535  # CUDA's limit where a kernel's grid counts sequences


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention over the keys that the mask keeps.

    q (B, L, H, Dh); k, v (B, S, H, Dh); mask (B, S) bool, True where a key is real, at least one
    in each row, or None. Returns (B, L, H · Dh). ValueError for what does not fit, and where
    GENTRON_ATTENTION forces a backend that is not installed or does not suit the input.
    """
    chosen = chosen_backend(q, k, v, mask)
    if chosen in _FLASH:
        return _FLASH[chosen](q, k, v).flatten(2)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mask = None if mask is None else mask[:, None, None, :]
    if chosen == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = sdpa(q, k, v, mask)
    return out.transpose(1, 2).flatten(2)


def chosen_backend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str:
    """The one of BACKENDS that `attention` takes for this input; arguments and errors as there.

    A mask always goes to sdpa, forced or not: flash-attn takes none. So does what torch.export
    traces, unless something else is forced, which is then an error: flash-attn's operators are
    Python, and a package runs without.
    """
    _check(q, k, v, mask)
    if FORCED and FORCED not in BACKENDS:
        raise ValueError(f"GENTRON_ATTENTION is {FORCED!r}; known: {', '.join(BACKENDS)}")
    if mask is not None:
        return "sdpa"
    if FORCED:
        if unsuitable := _unsuitable(FORCED, q, k, v):
            raise ValueError(f"GENTRON_ATTENTION is {FORCED!r}, but {unsuitable}")
        return FORCED
    if q.device.type != "cuda":
        return "sdpa"
    order = _ORDER.get(_capability(q.device.index), ("sdpa",))
    return next(name for name in order if _unsuitable(name, q, k, v) is None)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """scaled_dot_product_attention on (B, H, L, Dh), in fp32 where the CPU's gradient wants it.

    The CPU's bf16 backward takes 4 to 9 times as long as its fp32 one (16 to 128 queries). On CUDA
    a batch of more than 65,535 sequences and heads, past which kernels fail, is taken in parts.
    ValueError where torch.export traces a batch that may pass it with one head alone.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            q, k, v = (tensor.float() for tensor in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).bfloat16()
    if q.device.type == "cuda" and isinstance(q.shape[0], torch.SymInt):
        return _sdpa_by_heads(q, k, v, mask)
    if q.device.type == "cuda" and q.shape[0] * q.shape[1] > _GRID:
        return _sdpa_in_parts(q, k, v, mask, max(1, _GRID // q.shape[1]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _sdpa_in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, size: int) -> Tensor:
    parts = [tensor.split(size) for tensor in (q, k, v)]
    masks = [None] * len(parts[0]) if mask is None else mask.split(size)
    return torch.cat(
        [
            F.scaled_dot_product_attention(*part, attn_mask=part_mask)
            for *part, part_mask in zip(*parts, masks, strict=True)
        ]
    )


def _sdpa_by_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`sdpa` of a batch known by its range alone: as few parts of the heads, whose number is known,
    as fit the grid at the range's end. A comparison with the batch would narrow the range."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    batch, heads = q.shape[:2]
    for parts in range(1, heads + 1):
        if statically_known_true(batch * -(-heads // parts) <= _GRID):
            break
    else:
        raise ValueError(
            f"a batch of more than {_GRID:,} sequences, frames of all clips and branches, is more "
            "than attention on CUDA takes: allow fewer clips"
        )
    chunks = (tensor.chunk(parts, 1) for tensor in (q, k, v))
    outs = [
        F.scaled_dot_product_attention(*part, attn_mask=mask) for part in zip(*chunks, strict=True)
    ]
    return outs[0] if parts == 1 else torch.cat(outs, 1)


def _unsuitable(name: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why a backend cannot take this input, or None."""
    if name == "sdpa":
        return None
    if torch.compiler.is_exporting():
        return "an exported program holds sdpa only"
    if q.device.type != "cuda":
        return f"it runs on CUDA, and q is on {q.device.type}"
    if not _installed(name):
        return "it is not installed, or too old"
    major = _capability(q.device.index)
    if name not in _ORDER.get(major, ()):
        return f"it does not run on compute capability {major}.x"
    if torch.are_deterministic_algorithms_enabled():
        return "its gradient is not deterministic, and deterministic algorithms are asked for"
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v must be fp16 or bf16, all three; q is {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > _HEAD_SIZES[name]:
        return f"its head sizes are multiples of 8 up to {_HEAD_SIZES[name]}, not {q.shape[3]}"
    if q.shape[0] * q.shape[2] > _GRID:
        return f"{q.shape[0]} sequences of {q.shape[2]} heads are more than its grid holds, {_GRID}"
    if name == "cudnn" and k.shape[1] == 1:
        return "it needs more than one key"
    return None


@functools.cache
def _import(name: str) -> bool:
    if name == "cudnn":
        return (
            torch.backends.cudnn.is_available() and torch.backends.cudnn.version() >= _CUDNN_FIXED
        )
    try:
        return hasattr(importlib.import_module(_MODULES[name]), "flash_attn_func")
    except ImportError:
        return False


@launch.constant
def _installed(name: str) -> bool:
    return _import(name)


@launch.constant
def _capability(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0]


def _flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.flash_attn_interface import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5)
    return out[0] if isinstance(out, tuple) else out  # its first releases return the sums too


# flash-attn 4 launches its kernels through a DSL that torch.compile cannot trace.
@torch.library.custom_op("gentron::flash4", mutates_args=())
def _flash4_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out like q, and the logarithm of the softmax's sums (B, H, L) fp32."""
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=q.shape[-1] ** -0.5, return_lse=True)


@_flash4_forward.register_fake
def _(q, k, v):
    batch, length, heads, _ = q.shape
    sums = q.new_empty((batch, heads, length), dtype=torch.float32)
    return q.new_empty(q.shape), sums


@torch.library.custom_op("gentron::flash4_backward", mutates_args=())
def _flash4_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    gradients = _flash_attn_bwd(q, k, v, out, d_out, sums, softmax_scale=q.shape[-1] ** -0.5)
    return tuple(gradients[:3])


@_flash4_backward.register_fake
def _(d_out, q, k, v, out, sums):
    return tuple(torch.empty_like(tensor) for tensor in (q, k, v))


def _flash4_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _flash4_gradient(ctx, d_out, _):
    return _flash4_backward(d_out.contiguous(), *ctx.saved_tensors)


_flash4_forward.register_autograd(_flash4_gradient, setup_context=_flash4_save)


def _flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _flash4_forward(q, k, v)[0]


_FLASH = {"flash4": _flash4, "flash3": _flash3, "flash2": _flash2}


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    launch.check_tensors(q=q, k=k, v=v, **({} if mask is None else {"mask": mask}))
    if q.ndim != 4:
        raise ValueError(f"q must be (B, L, H, Dh), got {tuple(q.shape)}")
    batch, _, heads, size = q.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.ndim != 4 or tensor.shape != (batch, k.shape[1], heads, size):
            raise ValueError(
                f"{name} must be ({batch}, S, {heads}, {size}) for q {tuple(q.shape)}, S that of "
                f"k {tuple(k.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {tensor.device}")
        if tensor.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise ValueError(f"{name} must be {q.dtype} like q, got {tensor.dtype}")
    if mask is not None and (
        mask.dtype != torch.bool or mask.shape != (batch, k.shape[1]) or mask.device != q.device
    ):
        raise ValueError(
            f"mask must be bool ({batch}, {k.shape[1]}) on {q.device}, "
            f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )
