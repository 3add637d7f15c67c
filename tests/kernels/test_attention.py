"""Which backend attention takes, what it hands it, and what comes of it."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from gentron_kernels import attention as module
from gentron_kernels.attention import attention, chosen_backend

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def rand(*shape, seed=0, dtype=FP64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FP64).to(dtype)


def expected(q, k, v, mask=None):
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("blhd,bshd->bhls", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v).flatten(2)


@pytest.fixture
def machine(monkeypatch):
    """(compute capability, what is installed, forced) → attention believes in that machine."""

    def pretend(capability=9, installed=module.BACKENDS, forced=None):
        monkeypatch.setattr(module, "_capability", lambda _: capability)
        monkeypatch.setattr(module, "_installed", lambda name: name in installed)
        monkeypatch.setattr(module, "FORCED", forced)

    return pretend


def on_cuda(batch=2, length=16, keys=16, heads=4, size=72, dtype=BF16, mask=False):
    """q, k, v and a mask that say they are on CUDA and hold nothing."""
    with FakeTensorMode():
        q, k, v = (
            torch.empty(batch, rows, heads, size, dtype=dtype, device="cuda")
            for rows in (length, keys, keys)
        )
        return q, k, v, torch.ones(batch, keys, dtype=torch.bool, device="cuda") if mask else None


@pytest.mark.parametrize("dtype, tolerance", [(FP64, 1e-12), (FP32, 1e-5), (BF16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 8), (2, 63, 5, 3, 72), (3, 3, 63, 2, 104)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_values(dtype, tolerance, shape, masked):
    batch, length, keys, heads, size = shape
    q = rand(batch, length, heads, size, dtype=dtype)
    k, v = (rand(batch, keys, heads, size, seed=seed, dtype=dtype) for seed in (1, 2))
    mask = torch.arange(keys) < torch.arange(1, batch + 1)[:, None] if masked else None
    out = attention(q, k, v, mask)
    assert out.shape == (batch, length, heads * size) and out.dtype == dtype
    reference = expected(q, k, v, mask)
    assert (out - reference).norm() / reference.norm() < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(FP32, 1e-5), (FP16, 2e-3), (BF16, 1e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_of_a_packed_projection(dtype, tolerance, masked):
    """Strided inputs; what a mask hides may be anything finite."""
    q, k, v = rand(2, 9, 3, 2, 72, dtype=dtype).unbind(2)
    mask = torch.arange(9) < torch.tensor([[4], [9]]) if masked else None
    wanted = expected(q, k, v, mask)
    if masked:
        k[0, 4:], v[0, 4:] = 100.0, -100.0
    assert not q.is_contiguous()
    out = attention(q, k, v, mask)
    assert (out - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize(
    "capability, installed, chosen",
    [
        (8, module.BACKENDS, "flash2"),
        (8, ("cudnn",), "sdpa"),
        (9, module.BACKENDS, "flash3"),
        (9, ("flash4", "flash2", "cudnn"), "flash4"),
        (9, ("flash2", "cudnn"), "cudnn"),
        (9, ("flash2",), "flash2"),
        (10, module.BACKENDS, "flash4"),
        (10, ("flash3", "flash2", "cudnn"), "cudnn"),
        (12, module.BACKENDS, "flash2"),
        (7, module.BACKENDS, "sdpa"),
        (9, (), "sdpa"),
    ],
)
def test_the_best_that_is_there_is_chosen(machine, capability, installed, chosen):
    machine(capability, installed)
    assert chosen_backend(*on_cuda()) == chosen


@pytest.mark.parametrize(
    "input, chosen",
    [
        ({"dtype": FP16, "size": 104}, "flash4"),
        ({"mask": True}, "sdpa"),
        ({"dtype": FP32}, "sdpa"),
        ({"size": 12}, "sdpa"),
        ({"size": 136}, "flash2"),
        ({"size": 264}, "sdpa"),
        ({"batch": 65536, "heads": 1}, "sdpa"),
        ({"batch": 4096, "heads": 16}, "sdpa"),
        ({"batch": 4095, "heads": 16}, "flash4"),
    ],
)
def test_what_does_not_suit_is_passed_over(machine, input, chosen):
    machine(10)
    assert chosen_backend(*on_cuda(**input)) == chosen
    machine(10, forced=chosen)
    assert chosen_backend(*on_cuda(**input)) == chosen


def test_cudnn_takes_more_than_one_key(machine):
    machine(9, ("cudnn",))
    assert chosen_backend(*on_cuda(keys=2)) == "cudnn"
    assert chosen_backend(*on_cuda(keys=1)) == "sdpa"


def test_deterministic_algorithms_leave_sdpa(machine):
    machine(9)
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen_backend(*on_cuda()) == "sdpa"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "capability, installed, forced, input, message",
    [
        (9, (), "flash3", {}, "'flash3', but it is not installed"),
        (8, module.BACKENDS, "flash4", {}, r"does not run on compute capability 8\.x"),
        (9, module.BACKENDS, "flash2", {"dtype": FP32}, "must be fp16 or bf16"),
        (9, module.BACKENDS, "cudnn", {"size": 20}, "multiples of 8 up to 128, not 20"),
        (9, module.BACKENDS, "flash3", {"batch": 70000}, "more than its grid holds, 65535"),
        (9, module.BACKENDS, "flash5", {}, "; known: flash4, flash3"),
    ],
)
def test_what_is_forced_and_cannot_be_is_an_error(
    machine, capability, installed, forced, input, message
):
    machine(capability, installed, forced)
    with pytest.raises(ValueError, match=f"GENTRON_ATTENTION is .*{message}"):
        chosen_backend(*on_cuda(**input))


def test_a_forced_one_runs_on_its_own_device(machine):
    machine(forced="flash2")
    q, k, v = (rand(2, 3, 2, 8, seed=seed, dtype=BF16) for seed in range(3))
    with pytest.raises(ValueError, match="'flash2', but it runs on CUDA, and q is on cpu"):
        attention(q, k, v)
    assert chosen_backend(q, k, v, torch.ones(2, 3, dtype=torch.bool)) == "sdpa"


@pytest.fixture
def flash(monkeypatch):
    """The three releases of flash-attn as modules that record their calls; SDPA's values."""
    calls = []

    def attend(q, k, v, softmax_scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)

    def record(name, returned):
        def flash_attn_func(q, k, v, *, softmax_scale, **options):
            calls.append((name, q.shape, k.shape, softmax_scale, options))
            return returned(attend(q, k, v, softmax_scale).contiguous(), q)

        return flash_attn_func

    def sums(out, q):
        return out, torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    def backward(q, k, v, out, d_out, sums, softmax_scale):
        calls.append(("backward", q.shape, k.shape, softmax_scale, {}))
        scores = softmax_scale * torch.einsum("blhd,bshd->bhls", q, k)
        weights = scores.softmax(-1)
        d_weights = torch.einsum("blhd,bshd->bhls", d_out, v)
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
        dq = softmax_scale * torch.einsum("bhls,bshd->blhd", d_scores, k)
        dk = softmax_scale * torch.einsum("bhls,blhd->bshd", d_scores, q)
        return dq, dk, torch.einsum("bhls,blhd->bshd", weights, d_out)

    functions = {
        "flash_attn": {},
        "flash_attn.flash_attn_interface": {"flash_attn_func": record("2", lambda out, _: out)},
        "flash_attn_interface": {"flash_attn_func": record("3", sums)},
        "flash_attn.cute": {"flash_attn_func": record("4", sums)},
        "flash_attn.cute.interface": {"_flash_attn_bwd": backward},
    }
    for name, contents in functions.items():
        fake = ModuleType(name)
        fake.__path__ = []
        vars(fake).update(contents)
        monkeypatch.setitem(sys.modules, name, fake)
    return calls


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4"])
def test_flash_attn_is_called_in_its_own_layout(monkeypatch, flash, name, compiled):
    monkeypatch.setattr(module, "chosen_backend", lambda *_: name)
    torch._dynamo.reset()
    run = torch.compile(attention, fullgraph=True, backend="aot_eager") if compiled else attention
    inputs = [rand(2, rows, 3, 8, seed=rows, dtype=FP32) for rows in (5, 7, 7)]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = run(*inputs)
    reference = expected(*exact)
    torch.testing.assert_close(out, reference.float())
    out.square().sum().backward()
    reference.square().sum().backward()
    for x, double in zip(inputs, exact, strict=True):
        torch.testing.assert_close(x.grad, double.grad.float())
    if name != "flash4" and compiled:
        return  # traced through: the call stands in the graph
    called = [call for call in flash if call[0] == name[-1]]
    options = {"return_lse": True} if name == "flash4" else {}
    assert called == [(name[-1], (2, 5, 3, 8), (2, 7, 3, 8), 8**-0.5, options)]
    assert (name == "flash4") == any(call[0] == "backward" for call in flash)


def test_an_installed_release_is_found(monkeypatch, flash):
    module._import.cache_clear()
    assert all(module._installed(name) for name in ("flash4", "flash3", "flash2"))
    module._import.cache_clear()
    monkeypatch.delattr(sys.modules["flash_attn.cute"], "flash_attn_func")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert not module._installed("flash4") and not module._installed("flash3")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91400)
    assert not module._installed("cudnn")
    module._import.cache_clear()


def test_cudnn_runs_alone(monkeypatch):
    monkeypatch.setattr(module, "chosen_backend", lambda *_: "cudnn")
    seen = []

    def recorded(q, k, v):
        seen.append((q.shape, torch.nn.attention._cur_sdpa_kernel_backends()))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    out = attention(*(rand(2, 5, 3, 8, seed=seed) for seed in range(3)))
    assert seen == [((2, 3, 5, 8), [SDPBackend.CUDNN_ATTENTION])] and out.shape == (2, 5, 24)


def test_large_batches_are_taken_in_parts(monkeypatch):
    q, k, v = (rand(7, 2, rows, 8, seed=rows) for rows in (3, 5, 5))
    mask = torch.arange(5) < torch.arange(1, 8)[:, None, None, None]
    for mask_or_none in (None, mask):
        out = module._sdpa_in_parts(q, k, v, mask_or_none, 3)
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_or_none)
        torch.testing.assert_close(out, wanted)
        with monkeypatch.context() as patched:
            patched.setattr(module, "_GRID", 7)  # one of the two heads
            torch.testing.assert_close(module._sdpa_by_heads(q, k, v, mask_or_none), wanted)
            patched.setattr(module, "_GRID", 6)
            with pytest.raises(ValueError, match="more than 6 sequences"):
                module._sdpa_by_heads(q, k, v, mask_or_none)
    taken = []
    monkeypatch.setattr(module, "_sdpa_in_parts", lambda *arguments: taken.append(arguments[4]))
    with FakeTensorMode():
        large = [torch.empty(4096, 16, 4, 72, device="cuda") for _ in range(3)]
        module.sdpa(*large)
        module.sdpa(*(x.narrow(0, 0, 4095) for x in large))
    assert taken == [4095]


class Attention(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return attention(q, k, v, mask)


def test_compiled_and_exported():
    q, k, v = (rand(2, rows, 3, 8, seed=rows, dtype=FP32) for rows in (5, 7, 7))
    mask = torch.arange(7) < torch.tensor([[7], [2]])
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, mask), attention(q, k, v, mask))
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    for strict in (False, True):
        program = torch.export.export(Attention(), (q, k, v, mask), strict=strict)
        torch.testing.assert_close(program.module()(q, k, v, mask), attention(q, k, v, mask))


def test_an_exported_program_holds_sdpa(machine, monkeypatch):
    machine()
    with monkeypatch.context() as exporting:
        exporting.setattr(torch.compiler, "_is_exporting_flag", True)
        assert chosen_backend(*on_cuda()) == "sdpa"
        machine(forced="flash3")
        with pytest.raises(ValueError, match="an exported program holds sdpa only"):
            chosen_backend(*on_cuda())


def test_the_environment_is_read_once(monkeypatch):
    monkeypatch.setenv("GENTRON_ATTENTION", "flash9")
    assert attention(*(rand(1, 2, 1, 8, seed=seed) for seed in range(3))).shape == (1, 2, 8)
    source = importlib.util.find_spec(module.__name__)
    fresh = importlib.util.module_from_spec(source)
    with pytest.MonkeyPatch.context() as patch:
        # The operators of flash-attn 4 are registered once a process.
        patch.setattr(torch.library, "custom_op", lambda *_, **__: lambda f: _Registered(f))
        source.loader.exec_module(fresh)
    assert fresh.FORCED == "flash9"


class _Registered:
    def __init__(self, function):
        self.function = function

    def register_fake(self, function):
        return function

    def register_autograd(self, function, setup_context):
        return function


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, lambda q: q[0], r"q must be \(B, L, H, Dh\), got \(5, 3, 8\)"),
        (1, lambda k: k[:, :, :1], r"k must be \(2, S, 3, 8\) .* got \(2, 7, 1, 8\)"),
        (2, lambda v: v[:, :6], r"v must be \(2, S, 3, 8\) .* got \(2, 6, 3, 8\)"),
        (1, torch.Tensor.float, "k must be torch.float64 like q, got torch.float32"),
        (2, lambda v: v.to("meta"), "v must be on cpu like q, got meta"),
        (3, torch.Tensor.int, r"mask must be bool \(2, 7\) on cpu, got torch.int32 \(2, 7\)"),
        (3, lambda mask: mask[:1], r"mask must be bool \(2, 7\) .* \(1, 7\)"),
    ],
)
def test_wrong_input_is_named(index, value, message):
    inputs = [rand(2, rows, 3, 8) for rows in (5, 7, 7)] + [torch.ones(2, 7, dtype=torch.bool)]
    inputs[index] = value(inputs[index])
    with pytest.raises(ValueError, match=message):
        attention(*inputs)


def test_bf16_gradient_is_as_exact_as_fp32_attention_allows():
    inputs = [rand(2, 5, 3, 8, seed=s, dtype=torch.bfloat16).requires_grad_() for s in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = attention(*inputs)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    attention(*exact).square().sum().backward()
    for tensor, reference in zip(inputs, exact, strict=True):
        error = (tensor.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert tensor.grad.dtype == torch.bfloat16 and error < 1e-2


def test_attention_sees_only_what_the_mask_keeps():
    q, k, v = rand(2, 5, 3, 8), rand(2, 7, 3, 8, seed=1), rand(2, 7, 3, 8, seed=2)
    mask = torch.arange(7) < torch.tensor([[7], [2]])
    out = attention(q, k, v, mask)
    torch.testing.assert_close(out[:1], attention(q[:1], k[:1], v[:1]))
    torch.testing.assert_close(out[1:], attention(q[1:], k[1:, :2], v[1:, :2]))
