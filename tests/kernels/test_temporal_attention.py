"""temporal_attention against its equations in fp64, and what the compiler makes of its kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from torch._subclasses.fake_tensor import FakeTensorMode

from gentron_kernels import launch
from gentron_kernels.launch import tl
from gentron_kernels.temporal_attention import (
    _tile,
    merge_values,
    temporal_attention,
    temporal_attention_ref,
    temporal_values,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
OPTIONS = {
    "batch": (1, 3),
    "frames": (1, 3, 8, 31),
    "tokens": (1, 3, 63),
    "heads": (1, 2),
    "size": (8, 32, 72, 104, 128),
    "dtype": (FP32, FP16, BF16),
    "motion_free": ("none", "some", "all"),
    "contiguous": (True, False),
}


def is_slow(case: dict) -> bool:
    """The interpreter takes minutes for these."""
    return case.get("frames") == 31 and (case.get("tokens") == 63 or case.get("batch") == 3)


CASES = [tuple(case.values()) for case in pairwise(OPTIONS, is_slow)]


def rand(*shape, seed=0, dtype=FP64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FP64).to(dtype).to(device)


def exact(qkv, flags=None):
    """The equations, by einsum, in qkv's dtype."""
    q, k, v = qkv.unbind(3)
    weights = torch.einsum("btnhd,bsnhd->bnhts", q, k).div(qkv.shape[-1] ** 0.5).softmax(-1)
    out = torch.einsum("bnhts,bsnhd->btnhd", weights, v)
    if flags is not None:
        out = torch.where(flags[:, None, None, None, None], v, out)
    return out.flatten(3)


def plain(qkv, flags):
    """What PyTorch offers at qkv's precision: SDPA of (B · N, H, T, Dh), and a choice by sample."""
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1).transpose(1, 2) for tensor in qkv.unbind(3))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    out = out.unflatten(0, qkv.shape[:3:2]).transpose(1, 2)
    if flags is not None:
        out = torch.where(flags[:, None, None, None, None], qkv[:, :, :, 2], out)
    return out.flatten(3)


def motion_free(batch, samples, device="cpu"):
    counts = {"some": (batch + 1) // 2, "all": batch}
    return None if samples == "none" else torch.arange(batch, device=device) < counts[samples]


def value_and_gradient(function, qkv, flags, d_out):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, flags)
    return out.detach(), torch.autograd.grad(out, qkv, d_out)[0]


def error(tensor, reference):
    return ((tensor.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_temporal_attention(case, backend, device, poisoned_memory):
    batch, frames, tokens, heads, size, dtype, samples, contiguous = case
    qkv = rand(batch, frames, tokens, 3, heads, size, dtype=dtype, device=device)
    d_out = rand(batch, frames, tokens, heads * size, seed=1, dtype=dtype, device=device)
    flags = motion_free(batch, samples, device)
    if not contiguous:
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
        d_out = d_out.mT.contiguous().mT
    reference = value_and_gradient(exact, qkv.double(), flags, d_out.double())
    results = value_and_gradient(temporal_attention, qkv, flags, d_out)
    common = value_and_gradient(plain, qkv, flags, d_out)
    for ours, theirs, expected, limit in zip(results, common, reference, (1e-5, 1e-4), strict=True):
        assert ours.dtype == dtype
        assert error(ours, expected) <= (limit if dtype == FP32 else 1.1 * error(theirs, expected))


def test_sizes_of_the_presets_in_fp64(backend, device):
    for frames, size in (3, 72), (32, 104):
        qkv = rand(2, frames, 2, 3, 2, size, device=device)
        d_out = rand(2, frames, 2, 2 * size, seed=1, device=device)
        flags = motion_free(2, "some", device)
        for ours, expected in zip(
            value_and_gradient(temporal_attention, qkv, flags, d_out),
            value_and_gradient(exact, qkv, flags, d_out),
            strict=True,
        ):
            assert error(ours, expected) <= 1e-12


def test_motion_free_samples_are_copied(backend, device, poisoned_memory):
    """q and k are not read, and a frame's output is its own value and nothing else."""
    qkv = rand(3, 8, 5, 3, 2, 32, dtype=FP32, device=device)
    d_out = rand(3, 8, 5, 64, seed=1, dtype=FP32, device=device)
    flags = torch.tensor([True, False, True], device=device)
    out, gradient = value_and_gradient(temporal_attention, qkv, flags, d_out)
    assert torch.equal(out[flags], qkv[flags, :, :, 2].flatten(3))
    assert torch.equal(gradient[flags][:, :, :, 2].flatten(3), d_out[flags])
    assert not gradient[flags][:, :, :, :2].any()
    assert (gradient[1].abs().amax((0, 1, 3, 4)) > 0).all()

    if backend != "ref":  # the definition multiplies by 0 what it does not choose
        poisoned = qkv.clone()
        poisoned[flags, :, :, :2] = torch.nan
        results = value_and_gradient(temporal_attention, poisoned, flags, d_out)
        assert torch.equal(results[0], out) and torch.equal(results[1], gradient)
    changed = qkv.clone()
    changed[:, 3] += 1
    changed_out = temporal_attention(changed, flags)
    same = (changed_out == out)[flags].flatten(2).all(2)
    assert not same[:, 3].any() and same[:, [0, 1, 2, 4, 5, 6, 7]].all()
    assert not (changed_out == out)[1].flatten(1).all(1).any()


def test_one_bool_for_the_whole_batch(backend, device):
    qkv = rand(2, 8, 3, 3, 2, 32, dtype=FP32, device=device).requires_grad_()
    values = qkv[:, :, :, 2].flatten(3)
    out = temporal_attention(qkv, True)
    assert torch.equal(out, values)
    out.sum().backward()
    assert torch.equal(qkv.grad[:, :, :, 2], torch.ones_like(qkv[:, :, :, 2]))
    assert not qkv.grad[:, :, :, :2].any()
    everything = torch.ones(2, dtype=torch.bool, device=device)
    assert torch.equal(temporal_attention(qkv, everything), values)
    nothing = temporal_attention(qkv, False)
    assert torch.equal(nothing, temporal_attention(qkv))
    assert torch.equal(nothing, temporal_attention(qkv, ~everything))
    single = rand(1, 1, 1, 3, 1, 8, device=device)
    assert temporal_attention(single).data_ptr() != single[..., 2, :, :].data_ptr()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("size", [72, 104])
def test_cpu_stores_large_results_as_it_does_small_ones(dtype, size):
    """What is stored past the caches is the same to the last bit, of a motion-free sample too."""
    tokens = (8 << 20) // (8 * 16 * size * dtype.itemsize) // 2 + 1  # of a sample: 8 MB in both
    qkv = torch.randn(2, 8, tokens, 3, 16, size).to(dtype)
    d_out = torch.randn(2, 8, tokens, 16 * size).to(dtype)
    flags = torch.tensor([False, True])
    whole = value_and_gradient(temporal_attention, qkv, flags, d_out)
    pieces = zip(qkv.split(tokens // 4, 2), d_out.split(tokens // 4, 2), strict=True)
    parts = [value_and_gradient(temporal_attention, part, flags, d) for part, d in pieces]
    for found, small in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(found, torch.cat(small, 2))


def test_extreme_scores(backend, device):
    """Scores of thousands neither overflow nor underflow to 0 / 0."""
    qkv = 60 * rand(2, 7, 3, 3, 2, 32, dtype=FP32, device=device)
    qkv[0, :, :, 0] = -qkv[0, :, :, 1].sign() * 100  # most scores far below 0
    out = temporal_attention(qkv)
    assert out.isfinite().all() and error(out, exact(qkv.double())) < 1e-4


def test_results_do_not_change_from_run_to_run(backend, device):
    qkv = rand(1, 8, 7, 3, 2, 72, dtype=BF16, device=device)
    d_out = rand(1, 8, 7, 144, seed=1, dtype=BF16, device=device)
    first, second = (value_and_gradient(temporal_attention, qkv, None, d_out) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_an_empty_batch(backend, device):
    if backend == "ref":
        pytest.skip("einops divides by the batch")
    for shape in (0, 8, 3, 3, 2, 32), (2, 8, 0, 3, 2, 32):
        qkv = torch.zeros(shape, device=device, requires_grad=True)
        out = temporal_attention(qkv)
        assert out.shape == (*shape[:3], 64)
        out.sum().backward()
        assert qkv.grad.shape == shape


def test_kernels_run_by_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@launch.jit
def _addresses_kernel(
    out_ptr, tokens, T: tl.constexpr, H: tl.constexpr, DH: tl.constexpr, ROWS: tl.constexpr
):
    _, _, _, rows, out_rows, inside = _tile(tokens, T, H, DH, ROWS)
    lane = tl.arange(0, ROWS)
    tl.store(out_ptr + lane, tl.where(inside, rows, -1))
    tl.store(out_ptr + ROWS + lane, tl.where(inside, out_rows, -1))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter runs one tile of a grid")
def test_addresses_beyond_32_bits(backend, monkeypatch):
    """Of the last tile of the second sample, one sequence of 8 of which is real."""
    from triton.runtime.interpreter import InterpreterBuilder

    tokens, frames, heads, size = 4_000_003, 8, 3, 104
    tiles = -(-tokens * heads // 8)
    monkeypatch.setattr(
        InterpreterBuilder,
        "set_grid_idx",
        lambda self, x, y, z: setattr(self, "grid_idx", (2 * tiles - 1, y, z)),
    )
    addresses = torch.empty(2, 8, 8, dtype=torch.int64)
    _addresses_kernel[(1,)](addresses, tokens, frames, heads, size, 64)
    real = tokens * heads - (tiles - 1) * 8
    assert 0 < real < 8 and (addresses[:, :, real:] == -1).all()
    first = (tiles - 1) * 8
    for frame in range(frames):
        for sequence in range(real):
            token, head = divmod(first + sequence, heads)
            token += (frames + frame) * tokens
            assert addresses[0, frame, sequence] == (token * 3 * heads + head) * size
            assert addresses[1, frame, sequence] == (token * heads + head) * size
    assert addresses[0, 0, 0] > 2**31


def test_more_sequences_than_a_grid_axis_takes():
    qkv = rand(1, 2, 70_000, 3, 1, 8, dtype=FP32)
    d_out = rand(1, 2, 70_000, 8, seed=1, dtype=FP32)
    reference = value_and_gradient(exact, qkv.double(), None, d_out.double())
    results = value_and_gradient(temporal_attention, qkv, None, d_out)
    assert error(results[0], reference[0]) <= 1e-5 and error(results[1], reference[1]) <= 1e-4


@pytest.mark.parametrize("samples", ["none", "some"])
def test_the_cpu_operator_keeps_the_rules_of_operators(samples):
    qkv = rand(2, 3, 2, 3, 2, 8, dtype=FP32).requires_grad_()
    flags = motion_free(2, samples)
    torch.library.opcheck(torch.ops.gentron.temporal_attention_cpu.default, (qkv, flags))
    torch.library.opcheck(
        torch.ops.gentron.temporal_attention_backward_cpu.default,
        (rand(2, 3, 2, 16, dtype=FP32), qkv.detach(), flags),
    )


@pytest.mark.parametrize("samples", ["none", "some"])
@pytest.mark.parametrize("function", [temporal_attention, temporal_attention_ref])
def test_gradient_by_differences(function, samples):
    qkv = rand(2, 3, 2, 3, 1, 5).requires_grad_()
    assert torch.autograd.gradcheck(function, (qkv, motion_free(2, samples)))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(compiler):
    """One graph, the same for new values of qkv and of the flags."""
    torch._dynamo.reset()
    compiled = torch.compile(temporal_attention, fullgraph=True, backend=compiler)
    d_out = rand(2, 8, 3, 48, seed=9, dtype=FP32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            qkv = rand(2, 8, 3, 3, 2, 24, seed=seed, dtype=FP32)
            flags = torch.tensor([seed == 0, seed == 1])
            expected = value_and_gradient(temporal_attention, qkv, flags, d_out)
            results = value_and_gradient(compiled, qkv, flags, d_out)
            for result, reference in zip(results, expected, strict=True):
                torch.testing.assert_close(result, reference, rtol=0, atol=0)


def test_exported():
    class Attention(torch.nn.Module):
        def forward(self, qkv, flags):
            return temporal_attention(qkv, flags)

    qkv, flags = rand(2, 8, 3, 3, 2, 24, dtype=FP32), torch.tensor([True, False])
    dynamic = {0: torch.export.Dim("batch"), 2: torch.export.Dim("tokens")}
    program = torch.export.export(
        Attention(), (qkv, flags), dynamic_shapes=(dynamic, {0: dynamic[0]}), strict=True
    )
    assert "gentron.temporal_attention_cpu" in program.graph_module.code
    qkv, flags = rand(3, 8, 5, 3, 2, 24, dtype=FP32), torch.tensor([True, False, True])
    assert torch.equal(program.module()(qkv, flags), temporal_attention(qkv, flags))


def test_cuda_tensors_get_the_triton_kernels():
    """Shapes alone: fake tensors have no values, and no CUDA device is needed."""
    pytest.importorskip("triton")
    backward = torch.ops.gentron.temporal_attention_backward_cuda
    with FakeTensorMode():
        qkv = torch.empty(2, 8, 4, 3, 2, 72, dtype=BF16, device="cuda")
        flags = torch.empty(2, dtype=torch.bool, device="cuda")
        for mask in flags, None:
            out = temporal_attention(qkv, mask)
            assert out.shape == (2, 8, 4, 144) and out.dtype == BF16 and out.is_cuda
            gradient = backward(out, qkv, mask)
            assert gradient.shape == qkv.shape and gradient.dtype == BF16


def test_meta_tensors_have_shapes():
    qkv = torch.empty(2, 8, 4, 3, 2, 72, device="meta")
    assert temporal_attention(qkv).shape == (2, 8, 4, 144)


@pytest.mark.parametrize(
    "qkv,flags,message",
    [
        (torch.zeros(2, 4, 3, 2, 8), None, r"qkv must be floating \(B, T, N, 3, H, Dh\), got"),
        (torch.zeros(2, 4, 3, 2, 2, 8), None, r"got torch.float32 \(2, 4, 3, 2, 2, 8\)"),
        (torch.zeros(2, 4, 3, 3, 2, 8, dtype=torch.int32), None, "got torch.int32"),
        (torch.zeros(2, 4, 3, 3, 2, 8), torch.zeros(2), r"bool tensor of shape \(2,\), got"),
        (torch.zeros(2, 4, 3, 3, 2, 8), torch.zeros(3, dtype=torch.bool), r"got torch.bool \(3,\)"),
        (torch.zeros(2, 4, 3, 3, 2, 8), [True, False], r"a bool or None, got \[True, False\]"),
        (
            torch.zeros(2, 4, 3, 3, 2, 8),
            torch.zeros(2, dtype=torch.bool, device="meta"),
            "on qkv's device, cpu, got meta",
        ),
    ],
)
def test_wrong_input_is_named(qkv, flags, message):
    with pytest.raises(ValueError, match=message):
        temporal_attention(qkv, flags)


def test_the_cpu_operator_refuses_what_it_cannot_read():
    forward = torch.ops.gentron.temporal_attention_cpu
    backward = torch.ops.gentron.temporal_attention_backward_cpu
    qkv = torch.zeros(2, 4, 3, 3, 2, 8)
    with pytest.raises(ValueError, match="qkv must be"):
        forward(qkv[0], None)
    with pytest.raises(ValueError, match="motion_free must be a bool tensor"):
        forward(qkv, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="d_out must be"):
        backward(torch.zeros(2, 4, 3, 15), qkv, None)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=str)
def test_temporal_values(dtype):
    """Two products, or one with the merged matrix, are the layer under the identity mask."""
    x = rand(2, 4, 3, 48)
    weights = [
        rand(48, 48, seed=1) / 7,
        rand(48, seed=2),
        rand(48, 48, seed=3) / 7,
        rand(48, seed=4),
    ]
    expected = (x @ weights[0].mT + weights[1]) @ weights[2].mT + weights[3]
    x, *weights = (tensor.to(dtype).requires_grad_() for tensor in (x, *weights))
    limit = {FP64: 1e-12, FP32: 1e-5, BF16: 1e-2}[dtype]
    merged = merge_values(*weights)
    assert all(tensor.dtype == dtype for tensor in merged)
    for out in temporal_values(x, *weights), temporal_values(x, *weights, merged):
        assert out.dtype == dtype and error(out.detach(), expected) < limit
    wide = [tensor.detach().to(torch.promote_types(dtype, FP32)) for tensor in weights]
    for tensor, made in zip(merged, merge_values(*wide), strict=True):
        assert torch.equal(tensor, made.to(dtype))
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(merge_values(*weights)[0], merged[0])
    if dtype == FP64:
        assert torch.autograd.gradcheck(temporal_values, (x[:1, :1, :1], *weights))


def test_wrong_projections_are_named():
    x, square, row = rand(2, 4, 3, 8), rand(8, 8), rand(8)
    with pytest.raises(
        ValueError, match=r"out_bias must be \(8,\) for x \(2, 4, 3, 8\), got \(9,\)"
    ):
        temporal_values(x, square, row, square, rand(9))
    with pytest.raises(ValueError, match=r"value_weight must be \(8, 8\)"):
        temporal_values(x, rand(8, 9), row, square, row)
    with pytest.raises(ValueError, match=r"merged weight must be \(8, 8\)"):
        temporal_values(x, square, row, square, row, (row, row))
    with pytest.raises(ValueError, match="merged bias must be on cpu like x, got meta"):
        temporal_values(x, square, row, square, row, (square, row.to("meta")))


def test_kernels_compile_without_spills():
    pytest.importorskip("triton")
    command = [sys.executable, Path(__file__).with_name("aot.py"), "--json", "temporal_attention"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout, result.stderr
    rows = json.loads(result.stdout)
    assert {row["arch"] for row in rows} == {80, 90, 100} and len(rows) == 72
    for row in rows:
        assert row["spills"] == 0 and 0 < row["shared"] <= row["limit"], row
