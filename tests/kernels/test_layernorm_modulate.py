"""LayerNorm + modulation and the chain: the definition against its equations in fp64, the
implementations against the definition."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from torch._dynamo.testing import CompileCounterWithBackend

from gentron_kernels import launch
from gentron_kernels.layernorm_modulate import (
    add_residual_ref,
    layernorm_modulate,
    layernorm_modulate_ref,
    residual_layernorm_modulate,
    residual_layernorm_modulate_ref,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROWS = "none", "one", "sample", "frame", "token", "indexed"
LARGE = (
    ((2, 8, 3, 1152), (1, 3, 63, 1664)) if not INTERPRETED else ((1, 3, 1, 1152), (2, 1, 3, 1664))
)
OPTIONS = {
    "shape": ((1, 1, 1, 8), (2, 3, 5, 72), *LARGE),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "y": ("none", "tokens", "one", "sample", "frame"),
    "gate": ROWS,
    "shift": ROWS,
    "scale": ROWS,
    "wide_rows": (False, True),
    "strided": (False, True),
    "wanted": ("all", "stream", "rows", "gate"),
    "used": ("both", "stream", "out"),
}


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    y: str = "tokens"
    gate: str = "sample"
    shift: str = "indexed"
    scale: str = "frame"
    wide_rows: bool = False
    strided: bool = False
    wanted: str = "all"
    used: str = "both"

    def __str__(self):
        return "-".join(str(value).replace("torch.", "") for value in vars(self).values())


def rand(*shape, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def make(case: Case, device: str = "cpu") -> dict[str, torch.Tensor | None]:
    """The tensors of a case: x, y, and table and index of gate, shift and scale."""
    batch, frames, tokens, width = case.shape
    counts = {"one": 1, "sample": batch, "frame": batch * frames, "indexed": batch * frames}
    counts["token"] = batch * frames * tokens
    row_dtype = torch.promote_types(case.dtype, torch.float32) if case.wide_rows else case.dtype

    def tensor(*shape, seed, dtype):
        if not case.strided:
            return rand(*shape, seed=seed, dtype=dtype, device=device)
        if len(shape) == 2:  # one of the rows that a projection packs
            return rand(shape[0], 3, shape[1], seed=seed, dtype=dtype, device=device)[:, 1]
        return rand(*shape[::-1], seed=seed, dtype=dtype, device=device).permute(3, 2, 1, 0)

    tensors = {"x": 2 * tensor(*case.shape, seed=1, dtype=case.dtype) + 1}
    y_shape = case.shape if case.y == "tokens" else (counts.get(case.y), width)
    tensors["y"] = None if case.y == "none" else tensor(*y_shape, seed=2, dtype=case.dtype)
    for seed, name in enumerate(("gate", "shift", "scale"), 3):
        kind = getattr(case, name)
        if name == "gate" and case.y == "none":
            kind = "none"
        rows = 5 if kind == "indexed" else counts.get(kind)
        tensors[name] = None if kind == "none" else tensor(rows, width, seed=seed, dtype=row_dtype)
        if kind == "indexed":
            generator = torch.Generator().manual_seed(seed)
            index = torch.randint(0, 4, (counts[kind],), generator=generator)
            tensors[f"{name}_index"] = index.to(device)
    wanted = {
        "all": ("x", "y", "gate", "shift", "scale"),
        "stream": ("x", "y"),
        "rows": ("gate", "shift", "scale"),
        "gate": ("gate", "x"),
    }[case.wanted]
    for name in wanted:
        if tensors[name] is not None:
            tensors[name] = tensors[name].detach().requires_grad_()
    return tensors


def rows(tensors, name):
    index = tensors.get(f"{name}_index")
    return tensors[name] if index is None else (tensors[name], index)


def call(function, tensors):
    operands = (rows(tensors, name) for name in ("gate", "shift", "scale"))
    return function(tensors["x"], tensors["y"], *operands)


def plain(x, y, gate, shift, scale):
    """What a PyTorch user writes, in the dtype of x throughout."""

    def spread(operand):
        if isinstance(operand, tuple):
            operand = operand[0][operand[1]]
        return (
            operand.to(x.dtype).repeat_interleave(x[..., 0].numel() // len(operand), 0).view_as(x)
        )

    if y is not None:
        y = y if y.shape == x.shape else spread(y)
        x = x + (y if gate is None else spread(gate) * y)
    out = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    if scale is not None:
        out = out * (1 + spread(scale))
    return x, out if shift is None else out + spread(shift)


def evaluate(function, tensors, used="both") -> tuple[dict, dict]:
    """Outputs and gradients of one fixed scalar of the outputs that are used."""
    stream, out = call(function, tensors)
    kept = {"both": (stream, out), "stream": (stream,), "out": (out,)}[used]
    weights = [rand(*x.shape, seed=9 + i, device=x.device) for i, x in enumerate(kept)]
    scalar = sum((x.double() * w).sum() for x, w in zip(kept, weights, strict=True))
    wanted = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    gradients = {}
    if wanted and scalar.requires_grad:
        found = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(wanted, found, strict=True) if g is not None}
    return {"stream": stream.detach(), "out": out.detach()}, gradients


def copy(tensors, dtype):
    return {
        name: x.detach().to(dtype).requires_grad_(x.requires_grad)
        if x is not None and x.is_floating_point()
        else x
        for name, x in tensors.items()
    }


def error(value, exact) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check(case: Case, device: str, function=residual_layernorm_modulate):
    tensors = make(case, device)
    found = evaluate(function, tensors, case.used)
    exact = evaluate(residual_layernorm_modulate_ref, copy(tensors, torch.float64), case.used)
    usual = evaluate(plain, copy(tensors, case.dtype), case.used)
    for values, exacts, usuals, limit in zip(found, exact, usual, (1e-5, 1e-4), strict=True):
        for name, value in values.items():
            if name not in exacts:  # shift and scale, where only the stream is used
                assert not value.any()
                continue
            measured = error(value, exacts[name])
            if case.dtype == torch.float64:
                bound = 1e-12
            elif case.dtype == torch.float32:
                bound = limit
            else:
                bound = 1.1 * error(usuals[name], exacts[name])
                if value.numel() < 1000:  # few roundings: let one of each be unlucky
                    bound = max(bound, torch.finfo(case.dtype).eps)
            assert measured <= bound, f"{name}: {measured:.2e} > {bound:.2e}"
            assert value.isfinite().all()
    gradient_of = found[1]
    for name in gradient_of:
        assert gradient_of[name].shape == tensors[name].shape
        assert gradient_of[name].dtype == tensors[name].dtype
    assert found[0]["out"].dtype == case.dtype
    assert gradient_of.keys() >= exact[1].keys()


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 63, 72), (3, 2, 5, 24)], ids=str)
def test_definition_is_its_equation(shape):
    x = rand(*shape)
    shift, scale = (rand(shape[0], shape[-1], seed=s) for s in (1, 2))
    at = (slice(None), *(None,) * (len(shape) - 2))
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(layernorm_modulate_ref(x), normed)
    torch.testing.assert_close(
        layernorm_modulate_ref(x, shift, scale), normed * (1 + scale[at]) + shift[at]
    )
    torch.testing.assert_close(
        layernorm_modulate_ref(x[(0,) * (len(shape) - 1)]), normed.flatten(0, -2)[0]
    )


def test_definition_serves_consecutive_tokens_by_a_row():
    x, y = rand(2, 3, 5, 24), rand(2, 24, seed=1)
    gate, table = rand(6, 24, seed=2), rand(4, 24, seed=3)
    index = torch.tensor([0, 1, 3, 3, 1, 0])
    stream, out = residual_layernorm_modulate_ref(x, y, gate, (table, index))
    for b, t in itertools.product(range(2), range(3)):
        expected = x[b, t] + gate[3 * b + t] * y[b]
        torch.testing.assert_close(stream[b, t], expected)
        normed = F.layer_norm(expected, (24,), eps=1e-6)
        torch.testing.assert_close(out[b, t], normed + table[index[3 * b + t]])
    torch.testing.assert_close(add_residual_ref(x, y, gate), stream)
    assert add_residual_ref(x, None) is x


@pytest.mark.parametrize("case", [Case(**case) for case in pairwise(OPTIONS)], ids=str)
def test_values_and_gradients(backend, device, case):
    check(case, device)


@pytest.mark.parametrize("kind", ["none", "one", "token"])
def test_fp64(backend, device, kind):
    if backend != "cuda":
        check(Case((2, 3, 5, 72), gate=kind, scale=kind, shift=kind), device)


def test_layernorm_alone(backend, device):
    """Without an update the stream is x itself, and the operator is the one without a residual."""
    for shape in (2, 3, 5, 72), (1, 1, 3, 1664):
        case = Case(shape, torch.float32, y="none", gate="none")
        tensors = make(case, device)
        assert call(residual_layernorm_modulate, tensors)[0] is tensors["x"]
        check(
            case, device, lambda x, y, gate, shift, scale: (x, layernorm_modulate(x, shift, scale))
        )


@pytest.mark.parametrize("kind", ["one", "indexed"])
@pytest.mark.parametrize("shape", [(0, 3, 5, 24), (2, 3, 0, 24)], ids=str)
def test_no_tokens(backend, device, shape, kind):
    case = Case(shape, torch.float32, gate=kind, scale=kind)
    tensors = make(case, device)
    outputs, gradients = evaluate(residual_layernorm_modulate, tensors)
    assert all(out.shape == shape for out in outputs.values())
    assert not any(gradient.any() for gradient in gradients.values())


def test_a_mean_far_from_zero(backend, device):
    low = (rand(2, 4, 1664) * 3 + 50).bfloat16().to(device)
    exact = layernorm_modulate_ref(low.double())
    assert error(layernorm_modulate(low), exact) < 3e-3


@pytest.mark.parametrize("width", [1152, 1664])
@pytest.mark.parametrize("updated", [False, True])
def test_rows_that_start_unlike_the_rest(backend, device, width, updated):
    """Moments about a row's own beginning lose a few bits at worst, however far off that lies."""
    x = rand(4, 1, 3, width)
    x[0, ..., :32] += 1e4
    x[1, ..., 0] = -1e6
    x[2] += 30
    x[3] *= 1e-3
    x = x.float().to(device)
    y = rand(4, 1, 3, width, seed=1).float().to(device) if updated else None
    (_, out), (_, exact) = (
        function(argument, None if y is None else y.to(argument.dtype))
        for function, argument in (
            (residual_layernorm_modulate, x),
            (residual_layernorm_modulate_ref, x.double()),
        )
    )
    assert all(error(out[i], exact[i]) < 1e-5 for i in range(4))
    rest = out[:2, ..., 32:], exact[:2, ..., 32:]  # results near 0, beside others of 30
    assert error(*rest) < 1e-5


@pytest.mark.parametrize("place", [5, 500])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_not_hidden(backend, device, place, value):
    x = rand(1, 1, 3, 1152).float().to(device)
    expected = layernorm_modulate(x)
    x[0, 0, 1, place] = value
    out = layernorm_modulate(x)
    assert out[0, 0, 1].isnan().all() and torch.equal(out[0, 0, ::2], expected[0, 0, ::2])


def test_width_beyond_one_warp_a_token(backend, device):
    check(Case((1, 2, 3, 5000), torch.float32), device)


@pytest.mark.skipif(INTERPRETED, reason="an interpreter's hour")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "width, y", [(1152, "tokens"), (1152, "one"), (1152, "none"), (1100, "tokens")]
)
def test_results_beyond_the_caches(backend, device, dtype, width, y):
    """They are stored past the caches where whole lines can be, from 8 MB on."""
    tokens = -(-(9 << 20) // (width * dtype.itemsize))
    check(Case((1, 1, tokens, width), dtype, y, gate="one", shift="one", scale="one"), device)


def test_rows_of_another_dtype_are_widened(backend, device):
    x, shift = rand(2, 5, 24, dtype=torch.float32, device=device), rand(2, 24, device=device)
    expected = layernorm_modulate_ref(x, shift.bfloat16().float())
    torch.testing.assert_close(layernorm_modulate(x, shift.bfloat16()), expected)
    low = x.bfloat16()
    y = rand(2, 5, 24, seed=1, dtype=torch.float32, device=device)
    stream, _ = residual_layernorm_modulate(low, y, shift)
    assert stream.dtype == torch.bfloat16
    torch.testing.assert_close(stream, add_residual_ref(low, y.bfloat16(), shift))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("y", ["rows", "rows and tokens", "tokens"])
def test_an_update_in_parts_is_the_whole_one(backend, device, y, kind):
    """As values and, where gradients are wanted, in these too; each part by a launch of its own."""
    tensors = make(Case((3, 2, 5, 72), torch.float32, gate=kind, shift=kind, scale=kind), device)
    sizes = 1, 2
    parts = list(tensors["y"].detach().split(sizes))
    for place in {"rows": (0, 1), "rows and tokens": (0,), "tokens": ()}[y]:
        parts[place] = parts[place][:, 0, 0].clone()
    whole = [part.view(-1, 1, 1, 72) if part.ndim == 2 else part for part in parts]
    whole = torch.cat([part.expand(-1, 2, 5, 72) for part in whole])
    operands = [rows(tensors, name) for name in ("gate", "shift", "scale")]
    with torch.no_grad():
        found = residual_layernorm_modulate(tensors["x"], tuple(parts), *operands)
        wanted = residual_layernorm_modulate(tensors["x"], whole, *operands)
    for part, as_whole in zip(found, wanted, strict=True):
        torch.testing.assert_close(part, as_whole, rtol=1e-5, atol=1e-5)
    for part in parts:
        part.requires_grad_()
    _, out = residual_layernorm_modulate(tensors["x"], tuple(parts), *operands)
    torch.testing.assert_close(out.detach(), wanted[1], rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert all(part.grad.abs().sum() > 0 for part in parts)


def test_gradients_do_not_depend_on_the_run(backend, device):
    tensors = make(Case((1, 2, 200, 24), torch.float32, shift="one", scale="indexed"), device)
    threads = torch.get_num_threads()
    _, first = evaluate(residual_layernorm_modulate, tensors)
    torch.set_num_threads(1 if threads > 1 else 2)
    _, second = evaluate(residual_layernorm_modulate, tensors)
    torch.set_num_threads(threads)
    if backend != "ref":
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_under_autocast(backend, device):
    tensors = make(Case((2, 3, 5, 72), torch.float32, shift="indexed"), device)
    expected = evaluate(residual_layernorm_modulate_ref, tensors)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = evaluate(residual_layernorm_modulate, tensors)
    for part, exact in zip(found, expected, strict=True):
        for name in exact:
            torch.testing.assert_close(part[name], exact[name], rtol=1e-4, atol=1e-4)


def test_an_index_outside_the_table_is_not_followed(backend, device):
    x, table = rand(2, 5, 24, dtype=torch.float32, device=device), rand(3, 24, device=device)
    index = torch.tensor([0, 3], device=device)
    if backend == "cuda":
        assert layernorm_modulate(x, (table.float(), index))[1].isnan().all()
    else:
        with pytest.raises(IndexError):
            layernorm_modulate(x, (table, index))


GRADCHECKED = (
    Case((2, 2, 3, 8)),
    Case((2, 3, 1, 8), gate="one", shift="token", scale="indexed"),
    Case((1, 2, 2, 8), y="one", gate="frame"),
    Case((1, 2, 2, 8), y="frame", gate="none", shift="none", scale="one"),
    Case((2, 2, 3, 8), gate="none", shift="sample", scale="none"),
)


@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
def test_gradcheck(backend, case):
    if backend == "cuda":
        return  # the kernels compute in fp32
    tensors = make(case)
    names = [name for name, x in tensors.items() if x is not None and x.requires_grad]

    def function(*values):
        return call(residual_layernorm_modulate, tensors | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, [tensors[name] for name in names])


def operator_arguments(case: Case, device: str = "cpu") -> list:
    tensors = make(case, device)
    names = [n for o in ("gate", "shift", "scale") for n in (o, f"{o}_index")]
    return [tensors["x"], tensors["y"], *(tensors.get(name) for name in names), 1e-6]


@pytest.mark.parametrize("case", [GRADCHECKED[1], GRADCHECKED[2]], ids=str)
def test_opcheck(case):
    arguments = operator_arguments(case)
    ops = torch.ops.gentron
    torch.library.opcheck(ops.residual_layernorm_modulate_cpu, arguments)
    x, y, gate, gate_index, shift, shift_index, scale, scale_index, eps = arguments
    torch.library.opcheck(
        ops.layernorm_modulate_cpu, (x, shift, shift_index, scale, scale_index, eps)
    )
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    x, y, gate, gate_index, _, _, scale, scale_index, eps = detached
    counts = (
        y.numel() // 8,
        len(gate),
        x.numel() // 8,
        len(scale_index if scale_index is not None else scale),
    )
    for d_residual, flags in (x, (True, *counts)), (None, (False, 0, 0, 0, 1)):
        torch.library.opcheck(
            ops.residual_layernorm_modulate_backward_cpu,
            (d_residual, x, x, y, gate, gate_index, scale, scale_index, eps, *flags),
        )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_whole(compiler):
    """One graph, forward and backward, that new values and rows do not compile again."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(residual_layernorm_modulate, fullgraph=True, backend=counter)
    for y in "tokens", "sample":
        tensors = make(Case((2, 3, 5, 72), torch.float32, y=y))
        expected = evaluate(residual_layernorm_modulate, tensors)
        for found in evaluate(compiled, tensors), evaluate(compiled, copy(tensors, torch.float32)):
            for part, exact in zip(found, expected, strict=True):
                torch.testing.assert_close(part, exact)
    assert counter.frame_count == 2


def test_one_graph_for_all_batches():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        residual_layernorm_modulate, fullgraph=True, dynamic=True, backend=counter
    )
    compilations = []
    for batch in 2, 3, 4:
        tensors = make(Case((batch, 3, 5, 72), torch.float32))
        expected = evaluate(residual_layernorm_modulate, tensors)
        for part, exact in zip(evaluate(compiled, tensors), expected, strict=True):
            torch.testing.assert_close(part, exact)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


class Chain(torch.nn.Module):
    def forward(self, x, y, gate, table, index):
        return residual_layernorm_modulate(x, y, gate, (table, index))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_export(device):
    """The exported graph holds the operator of the device; CUDA's is traced without a device."""
    from torch._subclasses import FakeTensorMode

    if device == "cuda":
        pytest.importorskip("triton")
    mode = FakeTensorMode() if device == "cuda" else torch.no_grad()
    with mode:
        tensors = [
            torch.randn(*s, device=device) for s in ((2, 3, 5, 72), (2, 3, 5, 72), (2, 72), (4, 72))
        ]
        index = torch.arange(6, device=device) % 3
        program = torch.export.export(Chain(), (*tensors, index))
    names = [str(node.target) for node in program.graph.nodes]
    assert f"gentron.residual_layernorm_modulate_{device}.default" in names
    if device == "cpu":
        found, expected = program.module()(*tensors, index), Chain()(*tensors, index)
        torch.testing.assert_close(found, expected)


WRONG = {
    "x must be floating": lambda x, row: layernorm_modulate(x.long()),
    r"shift must be \(R, 24\).*got \(3, 24\)": lambda x, row: layernorm_modulate(x, rand(3, 24)),
    r"scale must be \(R, 24\).*got \(2, 8\)": lambda x, row: layernorm_modulate(x, row, rand(2, 8)),
    "shift must be floating": lambda x, row: layernorm_modulate(x, row.long()),
    "scale must be on x's device cpu, got meta": lambda x, row: layernorm_modulate(
        x, row, row.to("meta")
    ),
    r"y must be x's shape \(2, 5, 24\) or \(R, 24\)": lambda x, row: residual_layernorm_modulate(
        x, rand(2, 4, 24)
    ),
    r"parts of y must be samples .*got \[\(1, 5, 24\), \(2, 24\)\]": (
        lambda x, row: residual_layernorm_modulate(x, (x[:1], row))
    ),
    "y must be floating": lambda x, row: residual_layernorm_modulate(x, x.int()),
    "gate must be None where y is None": lambda x, row: residual_layernorm_modulate(x, None, row),
    r"gate's table must be \(P, 24\)": lambda x, row: residual_layernorm_modulate(
        x, x, (rand(3, 8), torch.zeros(2).long())
    ),
    r"gate's index must be \(R,\) int64": lambda x, row: residual_layernorm_modulate(
        x, x, (row, torch.zeros(2))
    ),
    "gate's index must hold R entries": lambda x, row: residual_layernorm_modulate(
        x, x, (row, torch.zeros(3).long())
    ),
    r"gate must be rows or \(table, index\)": lambda x, row: residual_layernorm_modulate(
        x, x, (row,)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(backend, message):
    with pytest.raises(ValueError, match=message):
        WRONG[message](rand(2, 5, 24), rand(2, 24))


def test_operators_refuse_what_they_cannot_read():
    """The C++ operators, called without the public function's checks, raise and do not crash."""
    x, row = rand(2, 5, 24, dtype=torch.float32), rand(2, 24, dtype=torch.float32)
    modulate = torch.ops.gentron.layernorm_modulate_cpu
    index = torch.zeros(3, dtype=torch.int64)
    for arguments in (
        (x.half(), None, None, None, None),
        (x.transpose(1, 2), None, None, None, None),
        (x, row.double(), None, None, None),
        (x, row[:, :8], None, None, None),
        (x, row.repeat(2, 1)[:3], None, None, None),
        (x, row, index, None, None),
        (x, row, index.int()[:2], None, None),
    ):
        with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
            modulate(*arguments, 1e-6)
    chain = torch.ops.gentron.residual_layernorm_modulate_cpu
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        chain(x, x.double(), *(None,) * 6, 1e-6)
    backward = torch.ops.gentron.residual_layernorm_modulate_backward_cpu
    for flags in (True, 10, 3, 0, 0), (True, 0, 0, 0, 7), (True, -1, 0, 0, 0):
        with pytest.raises((ValueError, RuntimeError)):
            backward(None, x, x, x, None, None, None, None, 1e-6, *flags)


def test_meta_tensors_get_the_definition():
    out = layernorm_modulate(torch.empty(2, 5, 24, device="meta"))
    assert out.shape == (2, 5, 24) and launch.backend(out) == "ref"


def test_triton_interpreted(run_interpreted):
    run_interpreted(__file__)


def test_kernels_compile_without_spills():
    pytest.importorskip("triton")
    aot = Path(__file__).with_name("aot.py")
    command = [sys.executable, aot, "--json", "layernorm_modulate"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout, result.stderr
    rows = json.loads(result.stdout)
    assert {row["arch"] for row in rows} == {80, 90, 100} and len(rows) == 78
    for row in rows:
        assert row["spills"] <= row["spill_limit"] and row["shared"] <= row["limit"], row
