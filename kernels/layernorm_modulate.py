"""LayerNorm + adaLN modulation, and the chain that joins every two sub-layers of a block.

layernorm_modulate             y = LN(x) · (1 + scale) + shift
residual_layernorm_modulate    x' = x + gate · y,   h = LN(x') · (1 + scale) + shift

gate, shift and scale are rows: R of them, R the product of the first dimensions of x (one for all
of x, one a sample, one a frame, ...), each serving tokens / R consecutive tokens. They are given as
(R, D), or as a table (P, D) and an index (R,) into it.
"""

# Shapes: D width; R rows, P rows of a table, each operand with its own.

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron_kernels import launch
from gentron_kernels.launch import tl

EPS = 1e-6
Rows = Tensor | tuple[Tensor, Tensor]
REDUCED = 128  # columns of a program that adds row gradients
MAX_WIDTH = 8192  # of the Triton kernels, which hold a token in registers


def layernorm_modulate_ref(
    x: Tensor, shift: Rows | None = None, scale: Rows | None = None, eps: float = EPS
) -> Tensor:
    """The definition of `layernorm_modulate`."""
    out = F.layer_norm(_wide(x), x.shape[-1:], eps=eps)
    if scale is not None:
        out = out * (1 + _broadcast(scale, x))
    if shift is not None:
        out = out + _broadcast(shift, x)
    return out.to(x.dtype)


def residual_layernorm_modulate_ref(
    x: Tensor,
    y: Tensor | None = None,
    gate: Rows | None = None,
    shift: Rows | None = None,
    scale: Rows | None = None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """The definition of `residual_layernorm_modulate`."""
    residual = add_residual_ref(x, y, gate)
    return residual, layernorm_modulate_ref(residual, shift, scale, eps)


def add_residual_ref(x: Tensor, y: Tensor | None, gate: Rows | None = None) -> Tensor:
    """x + gate · y in x's dtype; x, y and gate as in `residual_layernorm_modulate`."""
    _check(x, y, gate=gate)
    if y is None:
        return x
    y = y.to(x.dtype)
    update = _wide(y) if y.shape == x.shape else _broadcast(y, x)
    if gate is not None:
        update = update * _broadcast(gate, x)
    return (_wide(x) + update).to(x.dtype)


def _broadcast(rows: Rows, x: Tensor) -> Tensor:
    """Rows → (..., 1, ..., D), to broadcast over the tokens of x."""
    if isinstance(rows, tuple):
        rows = rows[0][rows[1]]
    leading = _leading(rows.shape[0], x)
    return _wide(rows).reshape(*x.shape[:leading], *(1,) * (x.ndim - 1 - leading), x.shape[-1])


def _leading(rows: int, x: Tensor) -> int | None:
    """How many first dimensions of x multiply to `rows`; None where none do."""
    for dims in range(x.ndim):
        if math.prod(x.shape[:dims]) == rows:
            return dims
    return None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


# On CUDA the forward gives a token to one warp at the widths of the presets: the statistics need no
# barrier, every lane moves 16 bytes at a time, and the token stays in registers between its passes.

# GATE, SHIFT, SCALE: 0 where absent, 1 for rows, 2 for rows by index.


@launch.jit
def _row_start(token, span, index_ptr, stride, table_rows, KIND: tl.constexpr):
    """Where the row that serves a token starts, and whether the table has it."""
    row = token // span
    if KIND == 2:
        row = tl.load(index_ptr + row)
    return row.to(tl.int64) * stride, (row >= 0) & (row < table_rows)


@launch.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    gate_index_ptr,
    shift_ptr,
    shift_index_ptr,
    scale_ptr,
    scale_index_ptr,
    residual_ptr,
    out_ptr,
    first,
    tokens,
    y_span,
    gate_span,
    gate_stride,
    gate_table,
    shift_span,
    shift_stride,
    shift_table,
    scale_span,
    scale_stride,
    scale_table,
    eps,
    D: tl.constexpr,
    HAS_Y: tl.constexpr,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    # A last program that overruns repeats the last token, and writes the same values again.
    token = tl.minimum(tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tokens - 1)[:, None]
    if HAS_Y:
        y_start = (token // y_span).to(tl.int64) * D
    if first is not None:  # the tokens are those of a part, and y is its own
        token += first
    start = token.to(tl.int64) * D
    columns = tl.arange(0, CHUNK)[None, :]
    if GATE > 0:
        gate_start, gate_valid = _row_start(
            token, gate_span, gate_index_ptr, gate_stride, gate_table, GATE
        )

    # Every load of the token before the first store: a store, which may alias, holds loads back.
    stream, updates, gates = (), (), ()
    for c in tl.static_range(CHUNKS):
        column = columns + c * CHUNK
        inside = column < D
        stream = stream + (tl.load(x_ptr + start + column, mask=inside, other=0),)  # noqa: RUF005
        if HAS_Y:
            update = tl.load(y_ptr + y_start + column, mask=inside, other=0)
            updates = updates + (update,)  # noqa: RUF005
        if GATE > 0:
            gate = tl.load(
                gate_ptr + gate_start + column, mask=inside & gate_valid, other=float("nan")
            )
            gates = gates + (gate,)  # noqa: RUF005

    if HAS_Y:
        summed = ()
        for c in tl.static_range(CHUNKS):
            update = updates[c].to(tl.float32)
            if GATE > 0:
                update *= gates[c].to(tl.float32)
            value = (stream[c].to(tl.float32) + update).to(x_ptr.dtype.element_ty)
            column = columns + c * CHUNK
            value = tl.where(column < D, value, 0).to(x_ptr.dtype.element_ty)
            summed = summed + (value,)  # noqa: RUF005
            tl.store(residual_ptr + start + column, value, mask=column < D)
        stream = summed

    total = tl.zeros((TOKENS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        total += stream[c].to(tl.float32)
    mean = tl.sum(total, 1, keep_dims=True) / D
    # Two passes: E[x²] - E[x]² cancels.
    square = tl.zeros((TOKENS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        centred = tl.where(columns + c * CHUNK < D, stream[c].to(tl.float32) - mean, 0)
        square += centred * centred
    rstd = tl.rsqrt(tl.sum(square, 1, keep_dims=True) / D + tl.cast(eps, tl.float32))

    if SHIFT > 0:
        shift_start, shift_valid = _row_start(
            token, shift_span, shift_index_ptr, shift_stride, shift_table, SHIFT
        )
    if SCALE > 0:
        scale_start, scale_valid = _row_start(
            token, scale_span, scale_index_ptr, scale_stride, scale_table, SCALE
        )
    shifts, scales = (), ()
    for c in tl.static_range(CHUNKS):
        column = columns + c * CHUNK
        if SCALE > 0:
            valid = (column < D) & scale_valid
            scale = tl.load(scale_ptr + scale_start + column, mask=valid, other=float("nan"))
            scales = scales + (scale,)  # noqa: RUF005
        if SHIFT > 0:
            valid = (column < D) & shift_valid
            shift = tl.load(shift_ptr + shift_start + column, mask=valid, other=float("nan"))
            shifts = shifts + (shift,)  # noqa: RUF005
    for c in tl.static_range(CHUNKS):
        column = columns + c * CHUNK
        out = (stream[c].to(tl.float32) - mean) * rstd
        if SCALE > 0:
            out *= 1 + scales[c].to(tl.float32)
        if SHIFT > 0:
            out += shifts[c].to(tl.float32)
        tl.store(out_ptr + start + column, out.to(out_ptr.dtype.element_ty), mask=column < D)


# The backward gives a program some consecutive tokens that the same rows serve, and launches as
# many programs as run at once. Each holds those rows and the sums of the row gradients in
# registers, has the next tokens fetched while it computes, and stores its sums once;
# `_reduce_kernel` adds them.


@launch.jit
def _sums(a, b):
    """The sums of two blocks, in one trip through shared memory."""
    return tl.split(tl.sum(tl.join(a, b), 0))


@launch.jit
def _added(sums, place: tl.constexpr, value):
    """The tuple with a value added at one place."""
    return sums[:place] + (sums[place] + value,) + sums[place + 1 :]  # noqa: RUF005


@launch.jit
def _backward_kernel(
    d_residual_ptr,
    d_out_ptr,
    residual_ptr,
    y_ptr,
    gate_ptr,
    gate_index_ptr,
    scale_ptr,
    scale_index_ptr,
    dx_ptr,
    dy_ptr,
    sums_ptr,
    span,
    length,
    per_row,
    y_span,
    y_step,
    gate_span,
    gate_stride,
    gate_table,
    scale_span,
    scale_stride,
    scale_table,
    eps,
    D: tl.constexpr,
    HAS_D_RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
    DX: tl.constexpr,
    DY: tl.constexpr,
    DY_SUM: tl.constexpr,
    DGATE: tl.constexpr,
    DSHIFT: tl.constexpr,
    DSCALE: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    first = program % per_row * length
    token0 = program // per_row * span + first
    count = tl.minimum(length, span - first)
    columns = tl.arange(0, CHUNK)
    y_start = (token0 // y_span).to(tl.int64) * D - y_step
    gates, scales, sums = (), (), ()
    if GATE > 0:
        gate_start, gate_valid = _row_start(
            token0, gate_span, gate_index_ptr, gate_stride, gate_table, GATE
        )
    if SCALE > 0:
        scale_start, scale_valid = _row_start(
            token0, scale_span, scale_index_ptr, scale_stride, scale_table, SCALE
        )
    for c in tl.static_range(CHUNKS):
        column = columns + c * CHUNK
        inside = column < D
        if GATE > 0:
            gate = tl.load(gate_ptr + gate_start + column, inside & gate_valid, float("nan"))
            gates = gates + (tl.where(inside, gate.to(tl.float32), 0),)  # noqa: RUF005
        if SCALE > 0:
            scale = tl.load(scale_ptr + scale_start + column, inside & scale_valid, float("nan"))
            scales = scales + (tl.where(inside, 1 + scale.to(tl.float32), 0),)  # noqa: RUF005
        sums = sums + (tl.zeros((CHUNK,), tl.float32),)  # noqa: RUF005
    dy_sums, dgates, dshifts, dscales = sums, sums, sums, sums

    for i in tl.range(0, count, num_stages=STAGES):
        token = (token0 + i).to(tl.int64)
        start = token * D
        y_start += y_step
        values, d_outs, d_residuals, ys = (), (), (), ()
        total = tl.zeros((CHUNK,), tl.float32)
        d_total = tl.zeros((CHUNK,), tl.float32)
        for c in tl.static_range(CHUNKS):
            column = columns + c * CHUNK
            inside = column < D
            value = tl.load(residual_ptr + start + column, inside, 0).to(tl.float32)
            d_out = tl.load(d_out_ptr + start + column, inside, 0).to(tl.float32)
            if HAS_D_RESIDUAL:
                d_residual = tl.load(d_residual_ptr + start + column, inside, 0)
                d_residuals = d_residuals + (d_residual,)  # noqa: RUF005
            if DGATE:
                y = tl.load(y_ptr + y_start + column, inside, 0)
                ys = ys + (y,)  # noqa: RUF005
            values = values + (value,)  # noqa: RUF005
            d_outs = d_outs + (d_out,)  # noqa: RUF005
            total += value
            d_total += d_out * scales[c] if SCALE > 0 else d_out
        sum_value, sum_d = _sums(total, d_total)
        square = tl.zeros((CHUNK,), tl.float32)
        product = tl.zeros((CHUNK,), tl.float32)
        for c in tl.static_range(CHUNKS):
            centred = tl.where(columns + c * CHUNK < D, values[c] - sum_value / D, 0)
            square += centred * centred
            product += centred * (d_outs[c] * scales[c] if SCALE > 0 else d_outs[c])
        sum_square, sum_product = _sums(square, product)
        rstd = tl.rsqrt(sum_square / D + tl.cast(eps, tl.float32))
        for c in tl.static_range(CHUNKS):
            column = columns + c * CHUNK
            inside = column < D
            normed = (values[c] - sum_value / D) * rstd
            d_normed = d_outs[c] * scales[c] if SCALE > 0 else d_outs[c]
            d_stream = rstd * (d_normed - sum_d / D - normed * (sum_product * rstd / D))
            if HAS_D_RESIDUAL:
                d_stream += d_residuals[c]
            if DX:
                d_x = d_stream.to(dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + start + column, d_x, inside)
            if DGATE:
                dgates = _added(dgates, c, d_stream * ys[c].to(tl.float32))
            if DSHIFT:
                dshifts = _added(dshifts, c, d_outs[c])
            if DSCALE:
                dscales = _added(dscales, c, d_outs[c] * normed)
            if DY or DY_SUM:
                d_update = d_stream * gates[c] if GATE > 0 else d_stream
                if DY:
                    d_y = d_update.to(dy_ptr.dtype.element_ty)
                    tl.store(dy_ptr + start + column, d_y, inside)
                if DY_SUM:
                    dy_sums = _added(dy_sums, c, d_update)

    # The program's rows of dy, gate, shift and scale, those that are wanted, one below another.
    start = program.to(tl.int64) * D * (DY_SUM + DGATE + DSHIFT + DSCALE)
    for c in tl.static_range(CHUNKS):
        column = columns + c * CHUNK
        at = sums_ptr + start + column
        inside = column < D
        if DY_SUM:
            tl.store(at, dy_sums[c], inside)
        if DGATE:
            tl.store(at + DY_SUM * D, dgates[c], inside)
        if DSHIFT:
            tl.store(at + (DY_SUM + DGATE) * D, dshifts[c], inside)
        if DSCALE:
            tl.store(at + (DY_SUM + DGATE + DSHIFT) * D, dscales[c], inside)


@launch.jit
def _reduce(mine, sums_ptr, out_ptr, programs, group, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """Row r of the result: the sum of the rows r · group, ..., r · group + group - 1."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < D)[None, :]
    total = tl.zeros((16, BLOCK), tl.float32)
    if mine & (row * group < programs):
        for first in range(0, group, 16):
            place = first + tl.arange(0, 16)[:, None]
            at = (row * group + place).to(tl.int64) * stride + column[None, :]
            total += tl.load(sums_ptr + at, inside & (place < group), 0)
        out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row.to(tl.int64) * D + column, out, column < D)


# I/O: read the sums of every program, which the L2 cache still holds; write the row gradients.
@launch.jit
def _reduce_kernel(
    sums_ptr,
    dy_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    programs,
    dy_group,
    dgate_group,
    dshift_group,
    dscale_group,
    D: tl.constexpr,
    DY_SUM: tl.constexpr,
    DGATE: tl.constexpr,
    DSHIFT: tl.constexpr,
    DSCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    stride = D * (DY_SUM + DGATE + DSHIFT + DSCALE)
    place = tl.program_id(2)
    sums_ptr += place * D
    if DY_SUM:
        _reduce(place == 0, sums_ptr, dy_ptr, programs, dy_group, stride, D, BLOCK)
    if DGATE:
        mine = place == DY_SUM
        _reduce(mine, sums_ptr, dgate_ptr, programs, dgate_group, stride, D, BLOCK)
    if DSHIFT:
        mine = place == DY_SUM + DGATE
        _reduce(mine, sums_ptr, dshift_ptr, programs, dshift_group, stride, D, BLOCK)
    if DSCALE:
        mine = place == DY_SUM + DGATE + DSHIFT
        _reduce(mine, sums_ptr, dscale_ptr, programs, dscale_group, stride, D, BLOCK)


def _forward_shape(width: int, itemsize: int) -> dict[str, int]:
    lanes = 512 // itemsize  # a warp's columns, 16 bytes a lane
    warps = 1  # of a token: no lane holds more than 64 of its values
    while width > 2048 * warps:
        warps *= 2
    chunk = min(lanes * warps, _power_of_2(width))
    return {"TOKENS": max(1, 4 * lanes // chunk), "CHUNK": chunk, "num_warps": 4}


def _backward_shape(width: int, itemsize: int) -> dict[str, int]:
    warps = 1  # of a program: no lane holds more than 16 columns, of the widest 8
    while width > 512 * warps:
        warps *= 2
    warps = 32 if warps > 8 else warps
    widest = 32 * warps * 16 // itemsize  # 16 bytes a lane
    # The chunk that pads the width least, of those the largest.
    chunk = min((widest, widest // 2), key=lambda chunk: -(-width // chunk) * chunk)
    # A stage ahead holds four rows in shared memory, of which the smallest GPU has 163 KiB a block.
    stages = 3 if 2 * 4 * width * itemsize <= 160 << 10 else 2
    return {"CHUNK": chunk, "STAGES": stages, "num_warps": warps}


def _backward_programs(shape: dict[str, int], width: int) -> int:
    """How many of a backward's programs a multiprocessor runs at once: by their registers."""
    lanes = 32 * shape["num_warps"]
    columns = -(-width // shape["CHUNK"]) * shape["CHUNK"] // lanes
    return max(1, min(8, 65536 // ((8 + 10 * columns) * lanes)))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _kernel_rows(name: str, table: Tensor | None, index: Tensor | None, x: Tensor) -> dict:
    """What the kernels take for one operand, but for its pointers."""
    arguments = {
        "span": _tokens(x) // _count(table, index),
        "stride": 0 if table is None else table.stride(0),
        "table": 0 if table is None else table.shape[0],
    }
    kind = 0 if table is None else 1 if index is None else 2
    return {f"{name}_{key}": value for key, value in arguments.items()} | {name.upper(): kind}


def _count(table: Tensor | None, index: Tensor | None) -> int:
    """R of an operand, 1 for one that is absent."""
    if table is None:
        return 1
    return table.shape[0] if index is None else index.shape[0]


def _forward_cuda(x, *operands):
    """(residual, out) of `_forward_launches`' arguments; the residual is x itself without y."""
    residual, out, pointers = _forward_pointers(x, *operands[:-1])
    if x.numel() != 0:
        launches = _forward_launches(x, *operands)
        for own, (grid, constants) in zip(pointers, launches, strict=True):
            with launch.device_of(x):
                launch.launcher(_forward_kernel)[grid](*own, **constants)
    return residual, out


def _forward_pointers(x, y, *rows):
    """(residual, out, each launch's pointers); x stands in for those that are not followed."""
    residual = x if y is None else torch.empty_like(x)
    out = torch.empty_like(x)
    rows = [x if t is None else t for t in rows]
    parts = [x if y is None else y] if not isinstance(y, Sequence) else y
    return residual, out, [(x, part, *rows, residual, out) for part in parts]


def _forward_launches(
    x, y, gate, gate_index, shift, shift_index, scale, scale_index, eps
) -> Iterator[tuple[tuple, dict]]:
    """(grid, constants) of each launch of the forward: one, or one a part of y."""
    width = int(x.shape[-1])  # a constant of the kernel
    shape = _forward_shape(width, x.element_size())
    constants = {
        **_kernel_rows("gate", gate, gate_index, x),
        **_kernel_rows("shift", shift, shift_index, x),
        **_kernel_rows("scale", scale, scale_index, x),
        "eps": eps,
        "D": width,
        "HAS_Y": y is not None,
        **shape,
    }
    first, in_parts = 0, isinstance(y, Sequence)
    for part in y if in_parts else [y]:
        tokens = part.shape[0] * math.prod(x.shape[1:-1]) if in_parts else _tokens(x)
        own = {
            "first": first or None,  # of a kernel that is compiled without it
            "tokens": tokens,
            "y_span": 1 if part is None else tokens * width // part.numel(),
        }
        yield (-(-tokens // shape["TOKENS"]),), own | constants
        first += tokens


@launch.triton_op("gentron::layernorm_modulate_cuda")
def _layernorm_modulate_cuda(
    x: Tensor,
    shift: Tensor | None,
    shift_index: Tensor | None,
    scale: Tensor | None,
    scale_index: Tensor | None,
    eps: float,
) -> Tensor:
    return _forward_cuda(x, None, None, None, shift, shift_index, scale, scale_index, eps)[1]


@launch.triton_op("gentron::residual_layernorm_modulate_cuda")
def _residual_layernorm_modulate_cuda(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    gate_index: Tensor | None,
    shift: Tensor | None,
    shift_index: Tensor | None,
    scale: Tensor | None,
    scale_index: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _forward_cuda(x, y, gate, gate_index, shift, shift_index, scale, scale_index, eps)


@launch.triton_op("gentron::joined_residual_layernorm_modulate_cuda")
def _joined_residual_layernorm_modulate_cuda(
    x: Tensor,
    y: Sequence[Tensor],
    gate: Tensor | None,
    gate_index: Tensor | None,
    shift: Tensor | None,
    shift_index: Tensor | None,
    scale: Tensor | None,
    scale_index: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y in parts of the batch, each read where it is: to join them first would copy it whole."""
    return _forward_cuda(x, y, gate, gate_index, shift, shift_index, scale, scale_index, eps)


@launch.triton_op("gentron::residual_layernorm_modulate_backward_cuda")
def _residual_layernorm_modulate_backward_cuda(
    d_residual: Tensor | None,
    d_out: Tensor,
    residual: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_index: Tensor | None,
    scale: Tensor | None,
    scale_index: Tensor | None,
    eps: float,
    dx: bool,
    dy_rows: int,
    dgate_rows: int,
    dshift_rows: int,
    dscale_rows: int,
    narrow_gate: bool,
    narrow_shift: bool,
    narrow_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, y, gate, shift and scale, each empty where its flag or count is 0.

    dx and dy are in the residual's dtype; the others are fp32, or in the residual's dtype where
    narrow: a row for each of an operand's R, to be summed over an index by the caller.
    """
    tokens, width = _tokens(residual), int(residual.shape[-1])
    dy_tokenwise = dy_rows == tokens
    sums = 0 if dy_tokenwise else dy_rows, dgate_rows, dshift_rows, dscale_rows
    narrow = True, narrow_gate, narrow_shift, narrow_scale
    d_x = residual.new_empty(residual.shape if dx else (0,))
    d_rows = [
        residual.new_empty(count, width, dtype=residual.dtype if is_narrow else torch.float32)
        for count, is_narrow in zip(sums, narrow, strict=True)
    ]
    d_y = torch.empty_like(residual) if dy_tokenwise else d_rows[0]
    if residual.numel() == 0:
        return d_x, d_y, *(rows.zero_() for rows in d_rows[1:])

    # A program's tokens are served by the same rows. All programs run at once, if there are as many
    # tokens.
    shape = _backward_shape(width, residual.element_size())
    y_tokenwise = y is None or y.numel() == residual.numel()
    rows = 1 if y_tokenwise else y.shape[0]
    for count in (_count(gate, gate_index), _count(scale, scale_index), *sums):
        rows = torch.sym_max(rows, count)
    span = tokens // rows
    at_once = _backward_programs(shape, width) * launch.multiprocessors(residual.device)
    wanted = -(-tokens // at_once)
    per_row = -(-span // torch.sym_min(span, wanted))
    length = -(-span // per_row)
    programs = rows * per_row
    kinds = sum(count != 0 for count in sums)
    partial = residual.new_empty((programs, kinds, width), dtype=torch.float32)
    flags = {
        name: count != 0
        for name, count in zip(("DY_SUM", "DGATE", "DSHIFT", "DSCALE"), sums, strict=True)
    }
    with launch.device_of(residual):
        launch.launcher(_backward_kernel)[(programs,)](
            d_residual_ptr=residual if d_residual is None else d_residual,
            d_out_ptr=d_out,
            residual_ptr=residual,
            y_ptr=residual if y is None else y,
            dx_ptr=d_x,
            dy_ptr=d_y,
            sums_ptr=partial,
            span=span,
            length=length,
            per_row=per_row,
            y_span=1 if y is None else residual.numel() // y.numel(),
            y_step=width if y_tokenwise else 0,
            gate_ptr=residual if gate is None else gate,
            gate_index_ptr=residual if gate_index is None else gate_index,
            scale_ptr=residual if scale is None else scale,
            scale_index_ptr=residual if scale_index is None else scale_index,
            **_kernel_rows("gate", gate, gate_index, residual),
            **_kernel_rows("scale", scale, scale_index, residual),
            eps=eps,
            D=width,
            HAS_D_RESIDUAL=d_residual is not None,
            DX=dx,
            DY=dy_tokenwise,
            **flags,
            **shape,
        )
        if kinds:
            names = "dy", "dgate", "dshift", "dscale"
            counts = [torch.sym_max(count, 1) for count in sums]
            launch.launcher(_reduce_kernel)[(rows, -(-width // REDUCED), kinds)](
                sums_ptr=partial,
                **{f"{name}_ptr": out for name, out in zip(names, d_rows, strict=True)},
                programs=programs,
                **{f"{n}_group": programs // count for n, count in zip(names, counts, strict=True)},
                D=width,
                **flags,
                BLOCK=REDUCED,
                num_warps=4,
            )
    return d_x, d_y, *d_rows[1:]


def compile_cases():
    """For compilation ahead of time: (name, kernel, signature, constants, num_warps)."""
    for preset, width in ("XL/2", 1152), ("G/2", 1664), ("widest", MAX_WIDTH):
        for dtype, itemsize in ("bf16", 2), ("fp32", 4):
            forward, backward = _forward_shape(width, itemsize), _backward_shape(width, itemsize)
            reduced = {"BLOCK": REDUCED, "num_warps": 4}
            cases = [(_forward_kernel, forward, ()), (_backward_kernel, backward, ("DY_SUM",))]
            cases.append((_reduce_kernel, reduced, ("DY_SUM",)))
            if preset != "widest":
                cases.append((_forward_kernel, forward, ("HAS_Y", "GATE")))
                without = "DY_SUM", "HAS_D_RESIDUAL", "GATE"
                cases.append((_backward_kernel, backward, without))
            for kernel, shape, absent in cases:
                integers = [name for name in kernel.arg_names if name.islower()]
                signature = {
                    name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in integers
                }
                strides = (name for name in integers if name.endswith(("_stride", "_step")))
                signature |= dict.fromkeys(strides, "i32:16")
                signature.pop("y_span", None)
                signature.pop("first", None)
                fp32 = (name for name in ("sums_ptr",) if name in signature)
                indices = (name for name in integers if name.endswith("index_ptr"))
                signature |= dict.fromkeys(fp32, "*fp32") | dict.fromkeys(indices, "*i64")
                signature["eps"] = "fp32"
                shape = shape.copy()
                num_warps = shape.pop("num_warps")
                flags = [name for name in kernel.arg_names if name.isupper()]
                constants = {name: int(name not in absent) for name in flags} | shape
                # An indexed table beside plain rows: the temporal position beside the gate.
                constants |= {"D": width} | ({"SHIFT": 2} if "SHIFT" in flags else {})
                whole = {"first": None, "y_span": 1}
                constants |= {name: value for name, value in whole.items() if name in integers}
                what = " ".join(absent).lower()
                name = f"{preset} {dtype}" + (f" without {what}" if absent else "")
                yield name, kernel, signature, constants, num_warps


def _setup_layernorm(ctx, inputs, output) -> None:
    x, shift, shift_index, scale, scale_index, eps = inputs
    ctx.save_for_backward(x, shift, shift_index, scale, scale_index)
    ctx.eps = eps


def _setup_chain(ctx, inputs, output) -> None:
    _, y, gate, gate_index, shift, shift_index, scale, scale_index, eps = inputs
    ctx.set_materialize_grads(False)
    ctx.y_shape = y.shape
    saved_y = y if ctx.needs_input_grad[2] else None  # for the gate's gradient only
    ctx.save_for_backward(
        output[0], saved_y, gate, gate_index, shift, shift_index, scale, scale_index
    )
    ctx.eps = eps


def _layernorm_gradients(operator, casts, ctx, d_out):
    x, shift, shift_index, scale, scale_index = ctx.saved_tensors
    needs_x, needs_shift, _, needs_scale, *_ = ctx.needs_input_grad
    d_x, _, _, d_shift, d_scale = operator(
        None, d_out.contiguous(), x, None, None, None, scale, scale_index, ctx.eps, needs_x, 0, 0,
        _count(shift, shift_index) if needs_shift else 0,
        _count(scale, scale_index) if needs_scale else 0,
        *(_narrow(x, (None, None), (shift, shift_index), (scale, scale_index)) if casts else ()),
    )  # fmt: skip
    return (
        d_x if needs_x else None,
        _table_gradient(d_shift, shift, shift_index) if needs_shift else None,
        None,
        _table_gradient(d_scale, scale, scale_index) if needs_scale else None,
        None,
        None,
    )


def _chain_gradients(operator, casts, ctx, d_residual, d_out):
    residual, y, gate, gate_index, shift, shift_index, scale, scale_index = ctx.saved_tensors
    needs_x, needs_y, needs_gate, _, needs_shift, _, needs_scale, *_ = ctx.needs_input_grad
    # Without a gate an update of its own for every token has x's gradient.
    shared = needs_y and gate is None and math.prod(ctx.y_shape) == residual.numel()
    dy_rows = math.prod(ctx.y_shape[:-1]) if needs_y and not shared else 0
    d_x, d_y, d_gate, d_shift, d_scale = operator(
        None if d_residual is None else d_residual.contiguous(),
        torch.zeros_like(residual) if d_out is None else d_out.contiguous(),
        residual, y, gate, gate_index, scale, scale_index, ctx.eps, needs_x or shared, dy_rows,
        _count(gate, gate_index) if needs_gate else 0,
        _count(shift, shift_index) if needs_shift else 0,
        _count(scale, scale_index) if needs_scale else 0,
        *(
            _narrow(residual, (gate, gate_index), (shift, shift_index), (scale, scale_index))
            if casts else ()
        ),
    )  # fmt: skip
    if needs_y:
        d_y = (d_x if shared else d_y).view(ctx.y_shape).to(residual.dtype)
    return (
        d_x if needs_x else None,
        d_y if needs_y else None,
        _table_gradient(d_gate, gate, gate_index) if needs_gate else None,
        None,
        _table_gradient(d_shift, shift, shift_index) if needs_shift else None,
        None,
        _table_gradient(d_scale, scale, scale_index) if needs_scale else None,
        None,
        None,
    )


def _narrow(x: Tensor, *operands: tuple[Tensor | None, Tensor | None]) -> list[bool]:
    """Of each (table, index): whether its rows' gradient is wanted in x's dtype. Over an index it
    is summed first."""
    return [t is not None and index is None and t.dtype == x.dtype for t, index in operands]


def _table_gradient(d_rows: Tensor, table: Tensor, index: Tensor | None) -> Tensor:
    """Sum over the rows that read each row of the table, by a product: always in one order."""
    if index is not None:
        places = torch.arange(table.shape[0], device=index.device)[:, None]
        with torch.autocast(d_rows.device.type, enabled=False):
            d_rows = (places == index).to(d_rows.dtype) @ d_rows
    return d_rows.to(table.dtype)


def _register(device: str) -> None:
    backward = getattr(torch.ops.gentron, f"residual_layernorm_modulate_backward_{device}")
    for name, gradients, setup in (
        ("layernorm_modulate", _layernorm_gradients, _setup_layernorm),
        ("residual_layernorm_modulate", _chain_gradients, _setup_chain),
    ):
        torch.library.register_autograd(
            f"gentron::{name}_{device}",
            functools.partial(gradients, backward, device == "cuda"),
            setup_context=setup,
        )


_register("cuda")

if launch.cpu_library():
    _register("cpu")

    @torch.library.register_fake("gentron::layernorm_modulate_cpu")
    def _(x, shift, shift_index, scale, scale_index, eps):
        return torch.empty_like(x)

    @torch.library.register_fake("gentron::residual_layernorm_modulate_cpu")
    def _(x, y, gate, gate_index, shift, shift_index, scale, scale_index, eps):
        return torch.empty_like(x), torch.empty_like(x)

    @torch.library.register_fake("gentron::residual_layernorm_modulate_backward_cpu")
    def _(
        d_residual, d_out, residual, y, gate, gate_index, scale, scale_index, eps, dx, *row_counts
    ):
        dtype = torch.promote_types(residual.dtype, torch.float32)
        d_x = residual.new_empty(residual.shape if dx else (0,))
        d_y, *d_rows = (
            residual.new_empty(count, residual.shape[-1], dtype=dtype) for count in row_counts
        )
        tokenwise = row_counts[0] == _tokens(residual)
        return d_x, torch.empty_like(residual) if tokenwise else d_y, *d_rows


def layernorm_modulate(
    x: Tensor, shift: Rows | None = None, scale: Rows | None = None, eps: float = EPS
) -> Tensor:
    """Normalise over the width, then modulate: LN(x) · (1 + scale) + shift.

    x (..., D); shift and scale: rows (R, D), or (table (P, D), index (R,) int64), or None, where R
    is the product of x's first dimensions up to one of them, 1 for all of x; each row serves
    tokens / R consecutive tokens. Rows may be in another floating dtype than x. Returns x's shape
    and dtype. Statistics and products are taken in fp32 (fp64 for fp64 input).
    ValueError for an operand that does not fit. Source: adaLN of DiT (arXiv 2212.09748).
    """
    key, call = _LAYERNORM_CALLS.find(x, shift, scale, eps)
    if call is not None:
        return call(x, None, None, shift, scale)[1]
    _check(x, shift=shift, scale=scale)
    backend = _backend(x)
    if key is not None and backend == "cuda":
        call = _forward_call(x, None, None, shift, scale, eps)
        if call is not None:
            _LAYERNORM_CALLS.keep(key, call)
            return call(x, None, None, shift, scale)[1]
    if backend == "ref":
        return layernorm_modulate_ref(x, shift, scale, eps)
    operator = torch.ops.gentron.layernorm_modulate_cuda
    if backend == "cpu":
        operator = torch.ops.gentron.layernorm_modulate_cpu
    return operator(x.contiguous(), *_operand(shift, x), *_operand(scale, x), eps)


def residual_layernorm_modulate(
    x: Tensor,
    y: Tensor | tuple[Tensor, ...] | None = None,
    gate: Rows | None = None,
    shift: Rows | None = None,
    scale: Rows | None = None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """Add a sub-layer's output to the residual stream and prepare the next sub-layer's input.

    x (..., D); y like x, or rows (R, D) that serve tokens / R consecutive tokens each, taken in x's
    dtype, None at the first sub-layer, or a tuple of parts along the batch, each like its samples
    of x or a row (D,) of each; gate, shift and scale: rows as in `layernorm_modulate`, each with an
    R of its own. Returns (x + gate · y, LN(x + gate · y) · (1 + scale) + shift), both in x's shape
    and dtype; the sum is rounded to x's dtype first. Without y the sum is x itself.
    ValueError for an operand that does not fit, or a gate without y.
    """
    if y is None and gate is None:
        return x, layernorm_modulate(x, shift, scale, eps)
    key, call = _CHAIN_CALLS.find(x, y, gate, shift, scale, eps)
    if call is not None:
        return call(x, y, gate, shift, scale)
    _check(x, y, gate=gate, shift=shift, scale=scale)
    backend = _backend(x)
    is_whole = not isinstance(y, tuple)
    if not is_whole and (backend != "cuda" or launch.wants_gradient(x, y, gate, shift, scale)):
        key, y, is_whole = None, join_parts(x, y), True
    if key is not None and backend == "cuda":
        call = _forward_call(x, y, gate, shift, scale, eps)
        if call is not None:
            _CHAIN_CALLS.keep(key, call)
            return call(x, y, gate, shift, scale)
    if backend == "ref":
        return residual_layernorm_modulate_ref(x, y, gate, shift, scale, eps)
    operator = torch.ops.gentron.residual_layernorm_modulate_cuda
    if backend == "cpu":
        operator = torch.ops.gentron.residual_layernorm_modulate_cpu
    rows = *_operand(gate, x), *_operand(shift, x), *_operand(scale, x)
    if not is_whole:
        y = [part.to(x.dtype).contiguous() for part in y]
        operator = torch.ops.gentron.joined_residual_layernorm_modulate_cuda
        return operator(x.contiguous(), y, *rows, eps)
    y = y.to(x.dtype)
    if _tokens(y) == _tokens(x):
        y = y.reshape(x.shape)
    return operator(x.contiguous(), y.contiguous(), *rows, eps)


_LAYERNORM_CALLS, _CHAIN_CALLS = launch.Kept(), launch.Kept()


def _forward_call(x, y, gate, shift, scale, eps):
    """The forward on CUDA for tensors like these; None where one must be converted first."""
    rows = gate, shift, scale
    as_given = [tensor for operand in rows for tensor in _pair(operand)]
    converted = [tensor for operand in rows for tensor in _operand(operand, x)]
    is_ready = x.is_contiguous() and x.numel() != 0
    parts = y if isinstance(y, tuple) else () if y is None else (y,)
    is_ready = is_ready and all(p.is_contiguous() and p.dtype == x.dtype for p in parts)
    if not is_ready or any(a is not b for a, b in zip(as_given, converted, strict=True)):
        return None
    launches = _forward_launches(x, y, *as_given, eps)
    pointers = _forward_pointers(x, y, *as_given)[-1]
    again = [
        launch.prepare(_forward_kernel, grid, own, constants)
        for own, (grid, constants) in zip(pointers, launches, strict=True)
    ]

    def forward(*operands):
        residual, out, pointers = _forward_pointers(*operands)
        for launch_again, own in zip(again, pointers, strict=True):
            launch_again(own)
        return residual, out

    def call(x, y, gate, shift, scale):
        operands = x, y, *_pair(gate), *_pair(shift), *_pair(scale)
        if not launch.wants_gradient(*operands):
            return forward(*operands)
        if isinstance(y, tuple):
            return residual_layernorm_modulate(x, join_parts(x, y), gate, shift, scale, eps)
        if y is None:
            return x, _Layernorm.apply(x, *operands[4:], eps, forward)
        return _Chain.apply(*operands, eps, forward)

    return call


class _Layernorm(torch.autograd.Function):
    """`layernorm_modulate_cuda` and its gradient, by a launch that was kept."""

    @staticmethod
    def forward(x, shift, shift_index, scale, scale_index, eps, forward):
        return forward(x, None, None, None, shift, shift_index, scale, scale_index)[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_layernorm(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx, *gradients):
        backward = torch.ops.gentron.residual_layernorm_modulate_backward_cuda
        return *_layernorm_gradients(backward, True, ctx, *gradients), None


class _Chain(torch.autograd.Function):
    """`residual_layernorm_modulate_cuda` and its gradient, by a launch that was kept."""

    @staticmethod
    def forward(*operands):
        return operands[-1](*operands[:-2])

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_chain(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx, *gradients):
        backward = torch.ops.gentron.residual_layernorm_modulate_backward_cuda
        return *_chain_gradients(backward, True, ctx, *gradients), None


def _pair(rows: Rows | None) -> tuple[Tensor | None, Tensor | None]:
    return rows if isinstance(rows, tuple) else (rows, None)


def _backend(x: Tensor) -> str:
    backend = launch.backend(x)
    if backend == "cuda" and (x.dtype == torch.float64 or x.shape[-1] > MAX_WIDTH):
        return "ref"
    return backend


def _operand(rows: Rows | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(table, index) as the operators take them: x's dtype or the one it is computed in."""
    if rows is None:
        return None, None
    table, index = _pair(rows)
    wide = torch.promote_types(x.dtype, torch.float32)
    if table.dtype not in (x.dtype, wide):
        table = table.to(wide)
    if table.stride(-1) != 1:
        table = table.contiguous()
    return table, None if index is None else index.contiguous()


def join_parts(x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    """Parts of an update as one: rows (B, D) where all are, else like x."""
    if not all(part.ndim == 2 for part in parts):
        rows = (-1, *(1,) * (x.ndim - 2), x.shape[-1])
        parts = [
            part.view(rows).expand(-1, *x.shape[1:]) if part.ndim == 2 else part for part in parts
        ]
    return torch.cat(parts)


def _check_parts(parts: tuple[Tensor, ...], x: Tensor) -> None:
    for part in parts:
        _check_tensor("a part of y", part, x)
    shapes = [tuple(part.shape) for part in parts]
    fit = all(part.shape[1:] in (x.shape[1:], x.shape[-1:]) for part in parts)
    if x.ndim < 2 or not fit or sum(part.shape[0] for part in parts) != x.shape[0]:
        raise ValueError(
            f"the parts of y must be samples of x {tuple(x.shape)}, or a row of each, got {shapes}"
        )


def _check(
    x: Tensor, y: Tensor | tuple[Tensor, ...] | None = None, **operands: Rows | None
) -> None:
    launch.check_tensors(x=x)
    if x.ndim == 0 or x.shape[-1] == 0 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating (..., D), got {x.dtype} {tuple(x.shape)}")
    if y is None and operands.get("gate") is not None:
        raise ValueError("gate must be None where y is None: it scales y")
    if isinstance(y, tuple):
        _check_parts(y, x)
    elif y is not None:
        _check_tensor("y", y, x)
    if isinstance(y, Tensor) and y.shape != x.shape:
        _check_rows("y", y, x, f"x's shape {tuple(x.shape)} or ")
    for name, rows in operands.items():
        if isinstance(rows, tuple):
            if len(rows) != 2:
                raise ValueError(f"{name} must be rows or (table, index), got {len(rows)} tensors")
            table, index = rows
            _check_tensor(name, table, x)
            launch.check_tensors(**{f"{name}'s index": index})
            if table.ndim != 2 or table.shape[-1] != x.shape[-1]:
                raise ValueError(
                    f"{name}'s table must be (P, {x.shape[-1]}), got {tuple(table.shape)}"
                )
            if index.ndim != 1 or index.dtype != torch.int64 or index.device != x.device:
                raise ValueError(
                    f"{name}'s index must be (R,) int64 on {x.device}, "
                    f"got {index.dtype} {tuple(index.shape)} on {index.device}"
                )
            if _leading(index.shape[0], x) is None:
                raise ValueError(
                    f"{name}'s index must hold R entries, R the product of the first dimensions "
                    f"of x {tuple(x.shape)}, got {index.shape[0]}"
                )
        elif rows is not None:
            _check_tensor(name, rows, x)
            _check_rows(name, rows, x)


def _check_tensor(name: str, tensor: Tensor, x: Tensor) -> None:
    launch.check_tensors(**{name: tensor})
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _check_rows(name: str, rows: Tensor, x: Tensor, or_else: str = "") -> None:
    if rows.ndim != 2 or rows.shape[1] != x.shape[-1] or _leading(rows.shape[0], x) is None:
        raise ValueError(
            f"{name} must be {or_else}(R, {x.shape[-1]}), R the product of the first dimensions of "
            f"x {tuple(x.shape)}, got {tuple(rows.shape)}"
        )
