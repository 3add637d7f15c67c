"""Attention over the frames of a clip, read from the (b t) n layout, with the identity-mask path.

Under motion-free guidance a sample's mask is the T × T identity: each token attends to itself
alone, softmax over one key is 1, and the attention returns v.
"""

# Shapes: B batch, T frames, N tokens of a frame, H heads, Dh head size. A sequence is one head of
# one token along the frames: N · H of them in a sample.

import torch
from einops import rearrange
from torch import Tensor

from gentron_kernels import launch
from gentron_kernels.attention import sdpa
from gentron_kernels.launch import tl
from gentron_kernels.linear import linear

TILE_ROWS = 64  # of a tile, and so the most frames that a kernel takes
MAX_SIZE = 128  # of a head, in the Triton kernels
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def temporal_attention(qkv: Tensor, motion_free: Tensor | bool | None = None) -> Tensor:
    """Attention along T for every (sample, token).

    qkv (B, T, N, 3, H, Dh), the packed projection; motion_free (B,) bool, True where the mask is
    the identity, or one bool for the whole batch, None as False. Returns (B, T, N, H · Dh).
    Where the mask is the identity q and k are not read, and their gradient is zero.
    Source: GenTron (arXiv 2312.04557), section 3.3 and its motion-free guidance.
    """
    key, call = _CALLS.find(qkv, motion_free)
    if call is not None:
        return call(qkv, motion_free)
    _check(qkv, motion_free)
    frames, size = qkv.shape[1], qkv.shape[5]
    if frames == 1 or motion_free is True:
        return qkv[:, :, :, 2].clone(memory_format=torch.contiguous_format).flatten(3)
    flags = motion_free if isinstance(motion_free, Tensor) else None
    backend = launch.backend(qkv)
    if backend == "cpu":
        return torch.ops.gentron.temporal_attention_cpu(qkv, flags)
    if backend == "cuda" and frames <= TILE_ROWS and size <= MAX_SIZE and qkv.dtype in CUDA_DTYPES:
        call = None if key is None else _forward_call(qkv, flags)
        if call is not None:
            _CALLS.keep(key, call)
            return call(qkv, flags)
        return torch.ops.gentron.temporal_attention_cuda(qkv, flags)
    return temporal_attention_ref(qkv, flags)


def temporal_values(
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    merged: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The temporal layer under the identity mask: value and output projections, no attention.

    x (..., D); weights (D, D) and biases (D,) of nn.Linear; merged: (weight, bias) of
    `merge_values`, which replace all four and make one product of the two. Returns x's shape.
    """
    weights = (value_weight, value_bias, out_weight, out_bias) if merged is None else merged
    _check_values(x, weights)
    if merged is not None:
        return linear(x, *merged)
    return linear(linear(x, value_weight, value_bias), out_weight, out_bias)


def merge_values(
    value_weight: Tensor, value_bias: Tensor, out_weight: Tensor, out_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """(W_o · W_v, W_o · b_v + b_o), made in fp32 (fp64 for fp64) and cast once, to W_o's dtype."""
    dtype = torch.promote_types(out_weight.dtype, torch.float32)
    device = out_weight.device.type
    with torch.autocast(device if device != "meta" else "cpu", enabled=False):
        out_wide = out_weight.to(dtype)
        weight = out_wide @ value_weight.to(dtype)
        bias = torch.addmv(out_bias.to(dtype), out_wide, value_bias.to(dtype))
    return weight.to(out_weight.dtype), bias.to(out_bias.dtype)


def temporal_attention_ref(qkv: Tensor, motion_free: Tensor | bool | None = None) -> Tensor:
    """The definition of `temporal_attention`."""
    values = qkv[:, :, :, 2].flatten(3)
    if qkv.shape[1] == 1 or motion_free is True:
        return values
    q, k, v = rearrange(qkv, "b t n three h d -> three (b n) h t d")
    out = sdpa(q, k, v)
    out = rearrange(out, "(b n) h t d -> b t n (h d)", b=qkv.shape[0])
    if motion_free is None or motion_free is False:
        return out
    return torch.where(motion_free[:, None, None, None], values, out)


# A tile is 64 or 32 rows of one sample: the frames of ROWS // T neighbouring sequences, frame by
# frame, so that the rows of a frame are contiguous in memory and the tensor cores' tiles are full.
# A mask keeps the sequences apart. A head is one or two blocks of columns, each a power of two: 72
# = 64 + 8 of 16 costs 80 columns of tensor-core work and not 128. Padding is in registers only.


@launch.jit
def _tile(tokens, T: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, ROWS: tl.constexpr):
    """The program's tile: its sample, and each row's sequence in the tile, frame, address in qkv
    and in out, and whether there is such a row."""
    SEQUENCES: tl.constexpr = ROWS // T
    tiles = tl.cdiv(tokens * H, SEQUENCES)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.arange(0, ROWS)
    frame, sequence = row // SEQUENCES, row % SEQUENCES
    index = (tl.program_id(0) % tiles) * SEQUENCES + sequence
    token = (sample * T + frame) * tokens + index // H
    column = index % H * DH
    inside = (frame < T) & (index < tokens * H)
    return sample, sequence, frame, token * 3 * H * DH + column, token * H * DH + column, inside


@launch.jit
def _program(
    motion_free_ptr,
    tokens,
    HAS_FLAGS: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The program's tile, whether its sample is motion-free, and the rows that are read if not."""
    sample, sequence, frame, rows, out_rows, inside = _tile(tokens, T, H, DH, ROWS)
    motion_free = 0
    attended = inside
    if HAS_FLAGS:
        motion_free = tl.load(motion_free_ptr + sample)
        attended = inside & (motion_free == 0)
    return sequence, frame, rows, out_rows, inside, motion_free, attended


@launch.jit
def _load(pointer, rows, inside, START: tl.constexpr, BLOCK: tl.constexpr, DH: tl.constexpr):
    column = START + tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < DH)[None, :]
    return tl.load(pointer + rows[:, None] + column[None, :], mask, 0)


@launch.jit
def _store(
    pointer, rows, inside, value, START: tl.constexpr, BLOCK: tl.constexpr, DH: tl.constexpr
):
    column = START + tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < DH)[None, :]
    tl.store(pointer + rows[:, None] + column[None, :], value.to(pointer.dtype.element_ty), mask)


@launch.jit
def _dot(a, b, total=None):
    # fp32 as it is: one TF32 product would lose 13 of its 23 bits, and three of them, which keep
    # them, spill hundreds of bytes a thread. No effect on 16 bits.
    return tl.dot(a, b, total, input_precision="ieee")


@launch.jit
def _softmax(scores, sequence, frame, T: tl.constexpr, DH: tl.constexpr):
    """The numerators, along the keys of each row's own sequence, and one over their sum, in fp32.
    A row that is none stays finite."""
    own = (sequence[:, None] == sequence[None, :]) & (frame < T)[None, :]
    scores = tl.where(own, scores * (1.4426950408889634 / DH**0.5), -float("inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights, 1 / tl.sum(weights, 1)[:, None]


# I/O: read q, k, v; write out. Motion-free: read v, write out.
@launch.jit
def _temporal_attention_fwd_kernel(
    qkv_ptr,
    motion_free_ptr,
    out_ptr,
    tokens,
    HAS_FLAGS: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    DH: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    sequence, frame, rows, out_rows, inside, motion_free, attended = _program(
        motion_free_ptr, tokens, HAS_FLAGS, T, H, DH, ROWS
    )
    k_ptr, v_ptr = qkv_ptr + H * DH, qkv_ptr + 2 * H * DH
    # Under a mask and not in the branch, where none but v would be under way before the flag is
    # looked at. How many are before the first is used, ptxas decides: docs/predictions.md.
    q = _load(qkv_ptr, rows, attended, 0, BLOCK, DH)
    k = _load(k_ptr, rows, attended, 0, BLOCK, DH)
    if REST:
        q_rest = _load(qkv_ptr, rows, attended, BLOCK, REST, DH)
        k_rest = _load(k_ptr, rows, attended, BLOCK, REST, DH)
    v = _load(v_ptr, rows, inside, 0, BLOCK, DH)
    if REST:
        v_rest = _load(v_ptr, rows, inside, BLOCK, REST, DH)
    if motion_free != 0:
        _store(out_ptr, out_rows, inside, v, 0, BLOCK, DH)
        if REST:
            _store(out_ptr, out_rows, inside, v_rest, BLOCK, REST, DH)
    else:
        scores = _dot(q, tl.trans(k))
        if REST:
            scores = _dot(q_rest, tl.trans(k_rest), scores)
        weights, inverse = _softmax(scores, sequence, frame, T, DH)
        weights = weights.to(v.dtype)  # before the division: the largest is 1, and exact
        _store(out_ptr, out_rows, inside, _dot(weights, v) * inverse, 0, BLOCK, DH)
        if REST:
            _store(out_ptr, out_rows, inside, _dot(weights, v_rest) * inverse, BLOCK, REST, DH)


# I/O: read d_out, q, k, v; write dq, dk, dv. Motion-free: read d_out, write dq = dk = 0 and dv.
@launch.jit
def _temporal_attention_bwd_kernel(
    d_out_ptr,
    qkv_ptr,
    motion_free_ptr,
    d_qkv_ptr,
    tokens,
    HAS_FLAGS: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    DH: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    sequence, frame, rows, out_rows, inside, motion_free, attended = _program(
        motion_free_ptr, tokens, HAS_FLAGS, T, H, DH, ROWS
    )
    k_ptr, v_ptr = qkv_ptr + H * DH, qkv_ptr + 2 * H * DH
    dk_ptr, dv_ptr = d_qkv_ptr + H * DH, d_qkv_ptr + 2 * H * DH
    d_out = _load(d_out_ptr, out_rows, inside, 0, BLOCK, DH)
    if REST:
        d_rest = _load(d_out_ptr, out_rows, inside, BLOCK, REST, DH)
    q = _load(qkv_ptr, rows, attended, 0, BLOCK, DH)
    k = _load(k_ptr, rows, attended, 0, BLOCK, DH)
    v = _load(v_ptr, rows, attended, 0, BLOCK, DH)
    if REST:
        q_rest = _load(qkv_ptr, rows, attended, BLOCK, REST, DH)
        k_rest = _load(k_ptr, rows, attended, BLOCK, REST, DH)
        v_rest = _load(v_ptr, rows, attended, BLOCK, REST, DH)
    if motion_free != 0:
        zeros = tl.zeros((ROWS, BLOCK), tl.float32)
        _store(d_qkv_ptr, rows, inside, zeros, 0, BLOCK, DH)
        _store(dk_ptr, rows, inside, zeros, 0, BLOCK, DH)
        _store(dv_ptr, rows, inside, d_out, 0, BLOCK, DH)
        if REST:
            zeros = tl.zeros((ROWS, REST), tl.float32)
            _store(d_qkv_ptr, rows, inside, zeros, BLOCK, REST, DH)
            _store(dk_ptr, rows, inside, zeros, BLOCK, REST, DH)
            _store(dv_ptr, rows, inside, d_rest, BLOCK, REST, DH)
    else:
        scores = _dot(q, tl.trans(k))
        dp = _dot(d_out, tl.trans(v))
        if REST:
            scores = _dot(q_rest, tl.trans(k_rest), scores)
            dp = _dot(d_rest, tl.trans(v_rest), dp)
        weights, inverse = _softmax(scores, sequence, frame, T, DH)
        p = weights * inverse
        ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * (1 / DH**0.5)
        ds = ds.to(q.dtype)
        _store(d_qkv_ptr, rows, inside, _dot(ds, k), 0, BLOCK, DH)
        if REST:
            _store(d_qkv_ptr, rows, inside, _dot(ds, k_rest), BLOCK, REST, DH)
        ds = tl.trans(ds)
        _store(dk_ptr, rows, inside, _dot(ds, q), 0, BLOCK, DH)
        if REST:
            _store(dk_ptr, rows, inside, _dot(ds, q_rest), BLOCK, REST, DH)
        p = tl.trans(p.to(q.dtype))
        _store(dv_ptr, rows, inside, _dot(p, d_out), 0, BLOCK, DH)
        if REST:
            _store(dv_ptr, rows, inside, _dot(p, d_rest), BLOCK, REST, DH)


@launch.triton_op("gentron::temporal_attention_cuda")
def _temporal_attention_cuda(qkv: Tensor, motion_free: Tensor | None) -> Tensor:
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])
    if qkv.numel() == 0:
        return out
    grid, options = _launch_options(qkv, motion_free)
    pointers = qkv.contiguous(), _flags(qkv, motion_free), out
    with launch.device_of(qkv):
        launch.launcher(_temporal_attention_fwd_kernel)[grid](*pointers, qkv.shape[2], **options)
    return out


def _flags(qkv: Tensor, motion_free: Tensor | None) -> Tensor:
    # Not a view: what Inductor makes of one reads bits, and compiles for no GPU.
    return qkv if motion_free is None else motion_free.to(torch.uint8)


def _flag_bytes(qkv: Tensor, motion_free: Tensor | None) -> Tensor:
    """`_flags` without a kernel, where nothing is traced."""
    return qkv if motion_free is None else motion_free.view(torch.uint8)


_CALLS = launch.Kept()


def _forward_call(qkv: Tensor, motion_free: Tensor | None):
    """The forward for tensors like these; None where they must be made contiguous first."""
    if not qkv.is_contiguous() or qkv.numel() == 0:
        return None
    shape = *qkv.shape[:3], qkv.shape[4] * qkv.shape[5]
    grid, options = _launch_options(qkv, motion_free)
    pointers = qkv, _flag_bytes(qkv, motion_free), qkv.new_empty(shape)
    constants = {"tokens": qkv.shape[2], **options}
    launch_again = launch.prepare(_temporal_attention_fwd_kernel, grid, pointers, constants)

    def forward(qkv: Tensor, flags: Tensor | None) -> Tensor:
        out = qkv.new_empty(shape)
        launch_again((qkv, _flag_bytes(qkv, flags), out))
        return out

    def call(qkv: Tensor, motion_free: Tensor | bool | None) -> Tensor:
        flags = motion_free if isinstance(motion_free, Tensor) else None
        if launch.wants_gradient(qkv):
            return _Attention.apply(qkv, flags, forward)
        return forward(qkv, flags)

    return call


class _Attention(torch.autograd.Function):
    """`temporal_attention_cuda` and its gradient, by a launch that was kept."""

    @staticmethod
    def forward(qkv, flags, forward):
        return forward(qkv, flags)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1])

    @staticmethod
    def backward(ctx, d_out):
        return _temporal_attention_backward_cuda(d_out, *ctx.saved_tensors), None, None


@launch.triton_op("gentron::temporal_attention_backward_cuda")
def _temporal_attention_backward_cuda(
    d_out: Tensor, qkv: Tensor, motion_free: Tensor | None
) -> Tensor:
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if qkv.numel() == 0:
        return d_qkv
    grid, options = _launch_options(qkv, motion_free, backward=True)
    pointers = d_out.contiguous(), qkv.contiguous(), _flags(qkv, motion_free), d_qkv
    with launch.device_of(qkv):
        launch.launcher(_temporal_attention_bwd_kernel)[grid](*pointers, qkv.shape[2], **options)
    return d_qkv


def _launch_options(qkv: Tensor, motion_free: Tensor | None, backward: bool = False):
    batch, frames, tokens, _, heads, size = qkv.shape
    # Constants of the kernel: a compiled graph is one for these, and not for B and N.
    frames, heads, size = int(frames), int(heads), int(size)
    constants = _constants(frames, heads, size, motion_free is not None, qkv.itemsize, backward)
    grid = (batch * -(-(tokens * heads) // (constants["ROWS"] // frames)),)
    return grid, constants | {"num_warps": _num_warps(constants, qkv.itemsize, backward)}


def _constants(
    frames: int, heads: int, size: int, has_flags: bool, itemsize: int, backward: bool
) -> dict[str, int]:
    # A tile holds rows // T sequences of T frames. fp32 is computed outside the tensor cores, where
    # every row of a tile is work, and a large tile does not fit the registers.
    rows = TILE_ROWS if itemsize < 4 else max(16, 1 << (frames - 1).bit_length())
    whole = max(16, 1 << (size - 1).bit_length())  # 16: the least that a tensor core takes
    block = 1 << (size.bit_length() - 1)
    rest = max(16, 1 << (size - block - 1).bit_length())
    if block < 16 or block + rest >= whole:
        block, rest = whole, 0
    if itemsize < 4 and backward and block > 64 and frames <= TILE_ROWS // 4:
        rows = TILE_ROWS // 2  # three times as many programs fit a multiprocessor at once
    names = "HAS_FLAGS", "T", "H", "DH", "BLOCK", "REST", "ROWS"
    return dict(zip(names, (has_flags, frames, heads, size, block, rest, rows), strict=True))


def _num_warps(constants: dict[str, int], itemsize: int, backward: bool) -> int:
    is_wide = constants["BLOCK"] > 64
    if itemsize < 4:
        return 8 if backward and is_wide and constants["ROWS"] == TILE_ROWS else 4
    if constants["ROWS"] == 16:
        return 4
    return 16 if is_wide else 8


def compile_cases():
    """For compilation ahead of time: (name, kernel, signature, constants, num_warps)."""
    variants = [(frames, "bf16", True) for frames in (8, 16, 32)]
    variants += [(8, "bf16", False), (8, "fp32", True), (32, "fp32", True)]
    for preset, size in ("XL/2", 72), ("G/2", 104):
        for frames, dtype, has_flags in variants:
            itemsize = 4 if dtype == "fp32" else 2
            name = f"{preset} t = {frames} {dtype}" + ", no flags" * (not has_flags)
            for kernel in _temporal_attention_fwd_kernel, _temporal_attention_bwd_kernel:
                backward = kernel is _temporal_attention_bwd_kernel
                constants = _constants(frames, 16, size, has_flags, itemsize, backward)
                signature = {a: f"*{dtype}" for a in kernel.arg_names if a.endswith("_ptr")}
                signature |= {"motion_free_ptr": "*u8"} if has_flags else {}
                signature["tokens"] = "i32"
                yield name, kernel, signature, constants, _num_warps(constants, itemsize, backward)


def _register(operator, backward_operator) -> None:
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, d_out):
        return backward_operator(d_out, *ctx.saved_tensors), None

    torch.library.register_autograd(operator, backward, setup_context=setup_context)


_register("gentron::temporal_attention_cuda", _temporal_attention_backward_cuda)

if launch.cpu_library():
    _register("gentron::temporal_attention_cpu", torch.ops.gentron.temporal_attention_backward_cpu)

    @torch.library.register_fake("gentron::temporal_attention_cpu")
    def _(qkv, motion_free):
        return qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])

    @torch.library.register_fake("gentron::temporal_attention_backward_cpu")
    def _(d_out, qkv, motion_free):
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _check_values(x: Tensor, weights: tuple[Tensor, ...]) -> None:
    names = ("value_weight", "value_bias", "out_weight", "out_bias")
    names = names if len(weights) == 4 else ("merged weight", "merged bias")
    for name, weight in zip(names, weights, strict=True):
        wanted = x.shape[-1:] * (2 if name.endswith("weight") else 1)
        if weight.shape != wanted:
            raise ValueError(
                f"{name} must be {tuple(wanted)} for x {tuple(x.shape)}, got {tuple(weight.shape)}"
            )
        if weight.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {weight.device}")


def _check(qkv: Tensor, motion_free: Tensor | bool | None) -> None:
    launch.check_tensors(qkv=qkv)
    if qkv.ndim != 6 or qkv.shape[3] != 3 or not qkv.dtype.is_floating_point:
        raise ValueError(
            f"qkv must be floating (B, T, N, 3, H, Dh), got {qkv.dtype} {tuple(qkv.shape)}"
        )
    if motion_free is None or isinstance(motion_free, bool):
        return
    if not isinstance(motion_free, Tensor):
        raise ValueError(f"motion_free must be a tensor, a bool or None, got {motion_free!r}")
    if motion_free.shape != qkv.shape[:1] or motion_free.dtype != torch.bool:
        raise ValueError(
            f"motion_free must be a bool tensor of shape ({qkv.shape[0]},), "
            f"got {motion_free.dtype} {tuple(motion_free.shape)}"
        )
    if motion_free.device != qkv.device:
        raise ValueError(
            f"motion_free must be on qkv's device, {qkv.device}, got {motion_free.device}"
        )
