"""Guided step against its equations in fp64, and against the solvers' own step."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from gentron_fast.solvers import make_table, solver_step
from gentron_kernels import guided_step as module
from gentron_kernels.guided_step import guided_step

ROW = torch.tensor([0.006, 0.99998, 0.7, 0.4, -0.3, 0.2], dtype=torch.float64)
WEIGHTS = torch.tensor([-0.2, -6.3, 7.5])
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def rand(*shape, seed=0, dtype=FP32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FP64).to(dtype)


def inputs(
    shape,
    dtype=FP32,
    branch_dtype=BF16,
    absent="",
    per_sample=False,
    row_dtype=FP64,
    device="cpu",
    rescale=False,
):
    """Arguments of guided_step; branches are views: batch slices, of twice the channels.

    absent: digits of branches, "p" for x0_previous, "n" for noise; with "d" there is a d.
    """
    batch, channels = shape[:2]

    def like(seed):
        return rand(*shape, seed=seed, dtype=dtype).to(device)

    shape_of_all = 3 * batch, 2 * channels, *shape[2:]
    prediction = rand(*shape_of_all, seed=1, dtype=branch_dtype).to(device)
    branches = [
        None if str(i) in absent else part[:, :channels]
        for i, part in enumerate(prediction.chunk(3))
    ]
    weights = WEIGHTS * (1 + torch.arange(batch))[:, None] if per_sample else WEIGHTS
    previous = None if "p" in absent else like(2)
    noise = None if "n" in absent else like(3)
    d = like(4) if "d" in absent else None
    arguments = [like(0), branches, weights.to(device), ROW.to(device, row_dtype), previous, noise]
    shares = torch.linspace(0, 1, batch + 1)[1:].to(device) if rescale else None
    return *arguments, d, shares


def rescale_noise_cfg(noise_cfg, noise_pred_text, guidance_rescale):
    """diffusers' own."""
    name = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
    module = pytest.importorskip(name)
    return module.rescale_noise_cfg(noise_cfg, noise_pred_text, guidance_rescale)


def expected(latents, branches, weights, row, x0_previous=None, noise=None, d=None, rescale=None):
    """The equations, sample by sample, in fp64."""
    alpha, sigma, a, b, c, row_d = row.tolist()
    outs = []
    for i, x in enumerate(latents.double()):
        of_sample = (weights if weights.ndim == 1 else weights[i]).tolist()
        present = [k for k in range(3) if branches[k] is not None]
        eps = torch.stack([of_sample[k] * branches[k][i].double() for k in present]).sum(0)
        if rescale is not None:
            text = branches[2][i].double()
            eps = rescale_noise_cfg(eps[None], text[None], rescale[i].item())[0]
        x0 = (x - sigma * eps) / alpha
        x_next = a * x + b * x0
        if x0_previous is not None and c != 0:
            x_next = x_next + c * x0_previous[i].double()
        if noise is not None and row_d != 0:
            x_next = x_next + (row_d if d is None else d[i].double()) * noise[i].double()
        outs.append((x_next, x0))
    return tuple(torch.stack(out) for out in zip(*outs, strict=True))


def error(out, reference):
    return ((out.double() - reference).norm() / reference.norm()).item()


# Pairwise: sizes × dtypes × what is absent × weights × row.
@pytest.mark.parametrize(
    "shape, dtype, branch_dtype, absent, per_sample, row_dtype",
    [
        ((1, 1, 1, 1, 1), FP32, BF16, "", False, FP64),
        ((1, 4, 1, 3, 1), FP32, FP32, "pn", True, FP64),
        ((3, 2, 7, 3, 3), FP32, BF16, "1", False, FP32),
        ((2, 4, 3, 19, 63), FP32, FP32, "d", False, FP32),
        ((2, 3, 1, 32, 32), FP32, BF16, "02p", True, FP64),
        ((2, 4, 2, 16, 33), FP64, FP64, "n", True, FP64),
        ((1, 4, 8, 4, 4), FP64, BF16, "01d", False, FP32),
        ((2, 1, 3, 5, 1), FP32, FP64, "0", False, FP64),
        ((1, 2, 5, 7, 9), BF16, BF16, "2d", True, FP64),
        ((2, 2, 2, 3, 5), FP16, BF16, "", False, FP32),
        ((0, 2, 2, 3, 5), FP32, BF16, "", False, FP64),
    ],
    ids=str,
)
def test_values(device, poisoned_memory, shape, dtype, branch_dtype, absent, per_sample, row_dtype):
    arguments = inputs(shape, dtype, branch_dtype, absent, per_sample, row_dtype, device)
    outs = guided_step(*arguments)
    wide = FP64 if arguments[0].dtype == FP64 else FP32
    for out in outs:
        assert out.shape == shape and out.dtype == wide and out.is_contiguous()
    if shape[0]:
        for out, reference in zip(outs, expected(*arguments), strict=True):
            assert error(out, reference) < (1e-12 if wide == FP64 else 1e-6)
    given = [arguments[0], *arguments[1], *arguments[2:]]
    given = [x for x in given if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr() for x in given if x is not None and x.numel()}
    assert not storages & {out.untyped_storage().data_ptr() for out in outs if out.numel()}


@pytest.mark.parametrize("absent", ["", "0", "01pn", "1d"])
@pytest.mark.parametrize("branch_dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 2, 19, 63), (2, 1, 1, 3, 1)], ids=str)
def test_rescale_is_diffusers_own(device, poisoned_memory, shape, branch_dtype, absent):
    arguments = inputs(shape, FP32, branch_dtype, absent, True, device=device, rescale=True)
    for out, reference in zip(guided_step(*arguments), expected(*arguments), strict=True):
        assert error(out, reference) < 1e-6


def test_without_a_rescale_a_sample_is_as_before(device):
    """Beside one that has a rescale; and a guided noise without deviation stays as it is."""
    *arguments, _ = inputs((2, 4, 3, 5, 7), per_sample=True, device=device)
    shares = torch.tensor([0.0, 0.7], device=device)
    for out, plain in zip(guided_step(*arguments, shares), guided_step(*arguments), strict=True):
        assert torch.equal(out[0], plain[0]) and not torch.equal(out[1], plain[1])
    arguments[1] = [torch.zeros_like(branch) for branch in arguments[1]]
    for out, plain in zip(guided_step(*arguments, shares), guided_step(*arguments), strict=True):
        assert torch.equal(out, plain)


def test_the_noisiest_step_keeps_fp32(backend, device):
    """Where the branches nearly agree, x - sigma · eps cancels and 1 / alpha lifts what is left."""
    if backend == "ref":
        pytest.skip("the definition rounds eps to fp32")
    clean, noise = rand(2, 4, 2, 8, 8, dtype=FP64), rand(2, 4, 2, 8, 8, seed=1)
    latents = (ROW[0] * clean + ROW[1] * noise).float()
    branches = [noise + 1e-3 * rand(2, 4, 2, 8, 8, seed=seed) for seed in (2, 3, 4)]
    branches = [branch.to(device) for branch in branches]
    arguments = latents.to(device), branches, WEIGHTS.to(device), ROW.to(device)
    for out, reference in zip(guided_step(*arguments), expected(*arguments), strict=True):
        assert error(out, reference) < 1e-7


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++"])
def test_the_step_is_the_solvers_own(solver):
    config = {"num_train_timesteps": 1000, "beta_schedule": "linear", "clip_sample": False}
    table = make_table(solver, config, steps=4, eta=0.5 if solver == "ddim" else 0.0)
    x = reference = rand(2, 4, 2, 3, 5, dtype=FP64)
    previous = reference_previous = torch.full_like(x, torch.nan)  # the first step reads none
    for step, row in enumerate(table.rows):
        branches = [rand(*x.shape, seed=10 * step + k, dtype=FP64) for k in range(3)]
        noise = rand(*x.shape, seed=100 + step, dtype=FP64)
        noise = noise if row[5] != 0 else torch.full_like(x, torch.nan)
        eps = sum(w * branch for w, branch in zip(WEIGHTS.double(), branches, strict=True))
        x, previous = guided_step(x, branches, WEIGHTS.double(), row, previous, noise)
        reference, reference_previous = solver_step(row, reference, eps, reference_previous, noise)
        assert error(x, reference) < 1e-12 and error(previous, reference_previous) < 1e-12


def test_what_meets_a_zero_coefficient_is_not_read(device):
    latents, branches, weights, row, *_ = inputs((2, 2, 2, 3, 5), device=device)
    row = torch.cat([row[:4], torch.zeros_like(row[4:])])
    absent = torch.full_like(latents, torch.nan)
    outs = guided_step(latents, branches, weights, row, absent, absent, absent)
    for out, plain in zip(outs, guided_step(latents, branches, weights, row), strict=True):
        assert torch.equal(out, plain)


def test_what_is_absent_counts_for_nothing(device):
    """Whatever stands in the tables for it."""
    latents, (_, _, text), weights, row, *_ = inputs((2, 2, 2, 3, 5), device=device)
    branches = None, None, text
    expected = guided_step(latents, branches, weights, row)
    weights, row = weights.clone(), row.clone()
    weights[..., :2] = torch.nan
    row[4:] = torch.inf
    for out, plain in zip(guided_step(latents, branches, weights, row), expected, strict=True):
        assert torch.equal(out, plain)


@pytest.mark.parametrize("each", [False, True], ids=["one row", "a row each"])
def test_samples_do_not_depend_on_their_neighbours(device, each):
    arguments = inputs((5, 3, 3, 19, 21), per_sample=True, device=device, rescale=True)
    x, branches, weights, row, previous, noise, _, rescale = arguments
    rows = row.expand(5, 6)
    if each:  # a step and a solver of its own: what one does not draw is not read
        row = rows = rows * torch.linspace(0.5, 1.5, 5, device=device, dtype=FP64)[:, None]
        rows[0, 4] = rows[1, 5] = 0
        previous[0] = noise[1] = torch.nan
    whole = guided_step(x, branches, weights, row, previous, noise, None, rescale)
    for i in range(5):
        chosen = slice(i, i + 1)
        one = [branch[chosen] for branch in branches]
        own = (tensor[chosen] for tensor in (previous, noise))
        alone = guided_step(x[chosen], one, weights[chosen], rows[i], *own, None, rescale[chosen])
        for out, part in zip(whole, alone, strict=True):
            assert torch.equal(out[chosen], part)


def test_views_are_read_in_place_and_the_rest_is_copied(backend, device):
    x, branches, *rest = inputs((2, 4, 3, 4, 5), device=device)
    for branch in branches:
        assert not branch.is_contiguous()
        assert module._planes(branch).data_ptr() == branch.data_ptr()
    turned = [branch.transpose(2, 4).contiguous().transpose(2, 4) for branch in branches]
    spread = [branch.repeat_interleave(2, 4)[..., ::2] for branch in branches]
    mixed = [branches[0].float(), turned[1], spread[2]]
    for views in (turned, spread, mixed):
        outs = guided_step(x.transpose(3, 4).contiguous().transpose(3, 4), views, *rest)
        for out, plain in zip(outs, guided_step(x, branches, *rest), strict=True):
            assert torch.equal(out, plain) or backend == "ref"
            assert error(out, plain.double()) < 1e-6


def test_compiled_without_a_break_and_once_for_every_step():
    torch._dynamo.reset()
    compiled = torch.compile(guided_step, fullgraph=True)
    x, branches, weights, row, previous, noise, _, shares = inputs((2, 4, 2, 3, 5), rescale=True)
    rows = torch.stack([row, row * 0.9, row * 1.1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            arguments = x + step, branches, weights * step, rows[step], previous, noise, None
            arguments += (shares / (1 + step),)
            for out, eager in zip(compiled(*arguments), guided_step(*arguments), strict=True):
                assert torch.equal(out, eager)


class Step(torch.nn.Module):
    def forward(self, x, branches, weights, row, previous, noise, rescale):
        return guided_step(x, branches, weights, row, previous, noise, None, rescale)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    *arguments, _, shares = inputs((2, 4, 2, 3, 5), per_sample=True, rescale=True)
    arguments.append(shares)
    program = torch.export.export(Step(), tuple(arguments), strict=strict)
    arguments[3] = arguments[3] * 1.1
    for out, eager in zip(program.module()(*arguments), Step()(*arguments), strict=True):
        assert torch.equal(out, eager)


def operator_arguments(**options):
    x, branches, weights, row, *rest, _ = inputs((2, 4, 2, 3, 5), **options)
    flat = [None if t is None else t.flatten(2) for t in (x, *branches, *rest)]
    return *flat[:4], weights.expand(2, 3), row, *flat[4:]


@pytest.mark.parametrize("absent", ["", "0pn", "2d"])
def test_opcheck(absent):
    arguments = operator_arguments(absent=absent)
    torch.library.opcheck(torch.ops.gentron.guided_step_cpu.default, arguments)
    if "2" not in absent:
        shares = torch.tensor([0.3, 1.0])
        operator = torch.ops.gentron.rescaled_weights_cpu.default
        torch.library.opcheck(operator, (*arguments[1:5], shares))


def test_the_cuda_operator_traces_as_its_kernel(monkeypatch):
    """What Inductor makes of it: one launch, which writes its two outputs alone."""
    triton = pytest.importorskip("triton")
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)

    def on_cuda(x):
        if x is None:
            return None
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    arguments = operator_arguments(absent="1")
    with FakeTensorMode():
        operator = dispatch_functionalize(torch.ops.gentron.guided_step_cuda.default)
        graph = make_fx(operator)(*(on_cuda(x) for x in arguments)).graph
        operator = dispatch_functionalize(torch.ops.gentron.rescaled_weights_cuda.default)
        shares = torch.ones(2)
        scaled = make_fx(operator)(*(on_cuda(x) for x in (*arguments[1:5], shares))).graph
    (launched,) = (node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target))
    assert sorted(launched.kwargs["tensors_to_clone"]) == ["x0_ptr", "x_next_ptr"]
    assert launched.kwargs["kwargs"]["HAS_NULL_MOTION"] is False
    launched = [node for node in scaled.nodes if "triton_kernel_wrapper" in str(node.target)]
    written = [node.kwargs["tensors_to_clone"] for node in launched]
    assert written == [["moments_ptr"], ["out_ptr"]]


def test_the_operator_refuses_what_it_cannot_read():
    x, *rest = operator_arguments()
    with pytest.raises(ValueError, match=r"latents must be contiguous \(B, C, P\)"):
        torch.ops.gentron.guided_step_cpu(x.transpose(0, 1), *rest)
    with pytest.raises(ValueError, match="noise must be like latents"):
        torch.ops.gentron.guided_step_cpu(x, *rest[:6], rest[6][:, :1], None)
    with pytest.raises(ValueError, match="of one dtype"):
        torch.ops.gentron.guided_step_cpu(x, rest[0].double(), *rest[1:])
    with pytest.raises(ValueError, match=r"rescale must be \(2,\) on the CPU"):
        torch.ops.gentron.rescaled_weights_cpu(*rest[:4], torch.ones(3))


def changed(index, value):
    arguments = list(inputs((2, 4, 2, 3, 5), rescale=True))
    arguments[index] = value(arguments[index])
    return arguments


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, lambda x: x[0], r"latents must be floating \(B, C, T, H, W\), got .*\(4, 2, 3, 5\)"),
        (0, torch.Tensor.long, "latents must be floating .* got torch.int64"),
        (1, lambda b: [None] * 3, "branches must be three .* got 3 of which 3 are None"),
        (1, lambda b: b[:2], "branches must be three .* got 2"),
        (1, lambda b: [b[0], b[1][:, :1], b[2]], r"null motion branch must be .*\(2, 1, 2, 3, 5\)"),
        (2, lambda w: w.repeat(3, 1), r"weights must be \(3,\) or \(2, 3\) .*\(3, 3\)"),
        (2, torch.Tensor.bfloat16, "weights must be .* got torch.bfloat16"),
        (3, lambda row: row[:5], r"row must be \(6,\) .* got torch.float64 \(5,\)"),
        (3, lambda row: row.expand(3, 6), r"row must be \(6,\) or \(2, 6\) .*\(3, 6\)"),
        (3, lambda row: row.to("meta"), "row must be on the latents' device, cpu, got meta"),
        (4, lambda x: x[:1], r"x0_previous must be .* got torch.float32 \(1, 4"),
        (5, torch.Tensor.int, "noise must be floating"),
        (7, lambda x: x[:1], r"rescale must be \(2,\) .* got torch.float32 \(1,\)"),
        (1, lambda b: [*b[:2], None], "a rescale needs the text branch"),
    ],
)
def test_wrong_input_is_named(index, value, message):
    with pytest.raises(ValueError, match=message):
        guided_step(*changed(index, value))


def test_a_gradient_is_refused():
    arguments = changed(1, lambda b: [b[0].clone().requires_grad_(), *b[1:]])
    with pytest.raises(ValueError, match="no backward and null still branch requires a gradient"):
        guided_step(*arguments)
    with torch.no_grad():
        assert not guided_step(*arguments)[0].requires_grad


def test_the_kernel_interpreted(run_interpreted):
    run_interpreted(__file__)


def test_the_kernel_compiled_ahead_of_time():
    pytest.importorskip("triton")
    command = [sys.executable, Path(__file__).with_name("aot.py"), "--json", "guided_step"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(result.stdout)
    assert {row["arch"] for row in rows} == {80, 90, 100} and len(rows) == 12
    for row in rows:
        # 128 threads of 96 registers: five blocks and more hold loads in flight.
        assert row["spills"] == 0 and row["shared"] <= row["limit"] and row["registers"] <= 96
