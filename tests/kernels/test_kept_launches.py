"""A call like one before goes straight to its launch: the same launch, and as the operator's, and
at the cost of the plain calls that it replaces."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gentron_kernels import launch, layernorm_modulate, temporal_attention
from gentron_kernels.layernorm_modulate import residual_layernorm_modulate

pytest.importorskip("triton")
MODULES = layernorm_modulate, temporal_attention
LIMIT = 1.2  # of the time of the plain chain's eight calls


def chain_inputs(dtype=torch.bfloat16, width=192):
    x, y = torch.randn(2, 1, 4, width).to(dtype), torch.randn(2, 1, 4, width).to(dtype)
    gate, scale = torch.randn(2, 6, width).to(dtype).unbind(1)[:2]
    return x, y, gate, (torch.randn(3, width).to(dtype), torch.tensor([2, 0])), scale


def qkv_inputs(flags=True):
    qkv = torch.randn(2, 4, 3, 3, 2, 48, dtype=torch.bfloat16)
    return qkv, torch.tensor([True, False]) if flags else None


def through_the_operator(function, inputs):
    """The same call with nothing kept."""
    find, launch.Kept.find = launch.Kept.find, lambda *_: (None, None)
    try:
        return function(*inputs)
    finally:
        launch.Kept.find = find


def comparable(noted, known: dict):
    """A launch with names of the tensors for its pointers; what it made itself is 'new', and flags
    are their bytes, which the operator copies."""
    names = {tensor.data_ptr(): name for name, tensor in known.items()}

    def named(value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.uint8:
            return value.tolist()
        return names.get(value.data_ptr(), "new")

    return noted.grid, noted.kernel, [named(value) for value in noted.arguments]


def cases():
    x, y, gate, shift, scale = chain_inputs()
    layernorm = layernorm_modulate.layernorm_modulate
    yield "chain", residual_layernorm_modulate, (x, y, gate, shift, scale)
    yield "one update a sample", residual_layernorm_modulate, (x, y[:, 0, 0].contiguous(), gate)
    yield "in parts", residual_layernorm_modulate, (x, (y[:1].clone(), y[1:, 0, 0]), gate)
    yield "layernorm", layernorm, (x, shift, scale)
    yield "layernorm alone", layernorm, (x,)
    yield "temporal", temporal_attention.temporal_attention, qkv_inputs()
    yield "temporal without flags", temporal_attention.temporal_attention, qkv_inputs(flags=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for the GPU that there is")
@pytest.mark.parametrize("name, function, inputs", list(cases()), ids=[case[0] for case in cases()])
def test_a_kept_launch_is_the_operators(name, function, inputs):
    from stubbed_launches import stubbed_launches

    flat = [t for value in inputs for t in (value if isinstance(value, tuple) else (value,))]
    known = {str(place): tensor for place, tensor in enumerate(flat) if tensor is not None}
    with stubbed_launches(*MODULES) as launches:
        through_the_operator(function, inputs)
        function(*inputs)
        function(*inputs)
    noted = [comparable(launched, known) for launched in launches]
    each = len(noted) // 3
    assert each == (2 if name == "in parts" else 1)
    assert noted == noted[:each] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for the GPU that there is")
def test_what_a_launch_depends_on_makes_another():
    from stubbed_launches import stubbed_launches

    x, y, gate, shift, scale = chain_inputs()
    longer = torch.zeros(x.numel() + 4, dtype=x.dtype)
    with stubbed_launches(*MODULES) as launches:
        residual_layernorm_modulate(x, y, gate, shift, scale)
        for arguments in (
            (x.float(), y.float(), gate.float(), None, scale.float()),
            (x, y, gate, shift, scale, 1e-5),
            (x[:1], y[:1], gate[:1], (shift[0], shift[1][:1]), scale[:1]),
            (longer[4:].view_as(x), y, gate, shift, scale),  # 8 bytes off
            (x, y, gate.contiguous(), shift, scale),
        ):
            count = len(layernorm_modulate._CHAIN_CALLS._calls)
            residual_layernorm_modulate(*arguments)
            assert len(layernorm_modulate._CHAIN_CALLS._calls) == count + 1
        with pytest.raises(ValueError, match="scale must be"):
            residual_layernorm_modulate(x, y, gate, shift, scale[:, :8])
        with FakeTensorMode():  # a mode that is to see every call
            assert launch.Kept().find(x) == (None, None)
        assert launch.Kept().find(x.to("meta")) == (None, None)
        count = len(layernorm_modulate._CHAIN_CALLS._calls)
        residual_layernorm_modulate(x.float(), y, gate, shift, scale)  # converted first
        assert len(layernorm_modulate._CHAIN_CALLS._calls) == count
    assert len(launches) == 7


def test_gradients_through_a_kept_launch(backend, device, monkeypatch):
    """Under the interpreter, and on a GPU: the operator's outputs and gradients, bit for bit."""
    if backend != "cuda":
        return
    monkeypatch.setattr(launch, "LAUNCHES_ON", device)
    for _, function, inputs in cases():
        results = []
        for call in (lambda f, i: f(*i), lambda f, i: f(*i), through_the_operator):
            made = [
                tuple(t.to(device) for t in value) if isinstance(value, tuple)
                else None if value is None else value.to(device)
                for value in inputs
            ]  # fmt: skip
            flat = [t for value in made for t in (value if isinstance(value, tuple) else (value,))]
            leaves = [t.requires_grad_() for t in flat if t is not None and t.is_floating_point()]
            out = call(function, made)
            out = out if isinstance(out, tuple) else (out,)
            total = sum((tensor.float() ** 2).sum() for tensor in out)
            results.append([*out, *torch.autograd.grad(total, leaves)])
        for found in results[:2]:
            assert all(torch.equal(a, b) for a, b in zip(found, results[2], strict=True))


def test_triton_interpreted(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for the GPU that there is")
def test_the_host_cost_is_that_of_the_plain_calls():
    """In this thread's own time, and the least of many rounds: others may be at work."""
    from bench_host import least_seconds
    from plain import residual_modulated
    from stubbed_launches import stubbed_launches

    x, y, gate, (shift, _), scale = chain_inputs(torch.float32)
    chain = x, y, gate, shift[:2], scale
    qkv = qkv_inputs()
    contenders = {
        "plain": (residual_modulated, chain),
        "chain": (residual_layernorm_modulate, chain),
        "temporal": (temporal_attention.temporal_attention, qkv),
    }
    with stubbed_launches(*MODULES, note=False), torch.inference_mode():
        least = least_seconds(contenders)
    assert least["chain"] <= LIMIT * least["plain"], least
    assert least["chain"] <= 40e-6 and least["temporal"] <= 60e-6, least
