"""One guided sampling step, text and motion: what a user would run today, and ours.

pytest bench/bench_step.py --benchmark-only
"""

import contextlib
from copy import deepcopy
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from contest import DTYPES, OPENVINO, OURS, ZENTORCH, Contender, absent
from engines import engine, openvino_forward
from records import told
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gentron_fast import PRESETS, EncodedText, GenTron, TextCondition, layers
from gentron_fast.diffusion import SCHEDULER_CONFIG
from gentron_fast.guidance import GuidedDenoiser, guidance_weights, guided_prediction
from gentron_fast.solvers import make_table, solver_step
from gentron_kernels.layernorm_modulate import join_parts
from gentron_kernels.temporal_attention import temporal_attention_ref

LAMBDA_T, LAMBDA_M = 7.5, 1.2
PROMPT, NULL = {"clip": 20, "t5": 40}, {"clip": 2, "t5": 1}  # tokens
TABLE = make_table("dpm++", SCHEDULER_CONFIG, 50)
STEP = 25
EAGER = "three eager forwards"
PEERS = ("compiled", "engines", "Latte")
WHOLE_DEPTH = 12  # blocks, up to which torch.compile gets a model as one graph


def plain_chain(x, y=None, gate=None, shift=None, scale=None):
    """The chain between two sub-layers as DiT's code has it, in x's own dtype."""

    def rows(value):
        value = value[0][value[1]] if isinstance(value, tuple) else value
        leading = x.shape[:1] if len(value) == len(x) else x.shape[:2]
        return value.reshape(*leading, *(1,) * (x.ndim - 1 - len(leading)), -1)

    if isinstance(y, tuple):
        y = join_parts(x, y)
    if y is not None:
        x = x + (y if gate is None else rows(gate) * y)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    if scale is not None:
        h = h * (1 + rows(scale))
    return x, h if shift is None else h + rows(shift)


def plain_linear(x, weight, bias, gelu=False):
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


def plain_spatial(qkv):
    """From the packed projection, as a user would write it."""
    q, k, v = (part.flatten(0, 1).transpose(1, 2) for part in qkv.unbind(3))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*qkv.shape[:3], -1)


PLAIN = {
    "spatial_attention": plain_spatial,
    "residual_layernorm_modulate": plain_chain,
    "temporal_attention": temporal_attention_ref,
    "linear": plain_linear,
}


@contextlib.contextmanager
def plain_operators():
    """The model on eager torch operators only, as it would be written without this engine."""
    with contextlib.ExitStack() as stack:
        for name, operator in PLAIN.items():
            stack.enter_context(mock.patch.object(layers, name, operator))
        yield


def plainly(function):
    def run(*inputs):
        with plain_operators():
            return function(*inputs)

    return run


def tensors_of(text: TextCondition) -> list[torch.Tensor]:
    """What a text holds, encoder by encoder."""
    return [tensor for part in text for tensor in part or () if tensor is not None]


class PlainBranches(nn.Module):
    """The forward of the three branches that other engines get, of tensors alone: x (3, C, T, H, W)
    and timestep (3,), then `tensors_of` a text of three, which says what is in them."""

    def __init__(self, model: GenTron, text: TextCondition):
        super().__init__()
        self.model, self.text = model, text
        device = model.patch_embed.weight.device
        self.register_buffer("flags", torch.tensor([True, False, False], device=device))

    def forward(self, x, timestep, *tensors):
        tensors = iter(tensors)
        return self.model(x, timestep, self.text.map(lambda _: next(tensors)), self.flags)


def text_of(config, lengths, dtype, device) -> TextCondition:
    generator = torch.Generator().manual_seed(sum(lengths.values()))

    def encoded(length, width):
        tokens = torch.randn(1, length, width, generator=generator)
        # On the meta device, where FLOPs are counted, no mask can be looked at.
        mask = None if device == "meta" else torch.ones(1, length, dtype=torch.bool)
        return EncodedText(tokens, mask, tokens.mean(1))

    parts = {name: encoded(lengths[name], config.text_width(name)) for name in config.encoders}
    return TextCondition(**parts).to(device, dtype)


def new_model(config, dtype, device) -> GenTron:
    """Made where it runs and in its dtype: a large one takes minutes and memory otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return GenTron(config).eval()
    finally:
        torch.set_default_dtype(before)


def random_model(config, dtype, device) -> GenTron:
    """A model with no zero weights: a fresh one skips half of its arithmetic."""
    torch.manual_seed(0)
    model = new_model(config, dtype, device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
    return model


class Step:
    """The contenders of one model and shape, each (latents, x0 of the step before) → the next.

    The model and its texts are random unless given; step: which one of the table, unless told.
    """

    def __init__(self, config, shape, dtype, device, model=None, texts=None, table=TABLE):
        self.model = model or random_model(config, dtype, device)
        self.dtype, self.device, self.shape, self.table = dtype, device, shape, table
        self.text, self.null_text = texts or (
            text_of(config, lengths, dtype, device) for lengths in (PROMPT, NULL)
        )
        self.compiled = torch.compile(self.stacked, dynamic=False)

    def copy(self, dtype: torch.dtype) -> GenTron:
        """The model once more; in its own dtype it shares the weights."""
        model = new_model(self.model.config, dtype, self.device)
        model.load_state_dict(self.model.state_dict(), assign=dtype == self.dtype)
        return model

    def denoiser(self, **options) -> GuidedDenoiser:
        texts = self.text, self.null_text
        scales = LAMBDA_T, LAMBDA_M
        return GuidedDenoiser(self.model, *texts, self.table, *scales, self.shape[1:], **options)

    def timestep(self, step: int) -> torch.Tensor:
        return self.table.timesteps[step : step + 1].to(self.device)

    def definition(self, latents, x0_previous, step=STEP):
        """Three forwards in the dtype of the latents, and the solver's step."""
        model = self.model if latents.dtype == self.dtype else self.copy(latents.dtype)
        texts = (part.to(dtype=latents.dtype) for part in (self.text, self.null_text))
        with torch.no_grad():
            inputs = model, latents, self.timestep(step), *texts
            noise = guided_prediction(*inputs, LAMBDA_T, LAMBDA_M)
        return solver_step(self.table.rows[step], latents, noise, x0_previous)

    def separate(self, latents, x0_previous, step=STEP):
        """Three forwards, one behind the other."""
        mask = torch.ones(1, dtype=torch.bool, device=self.device)
        x = latents.to(self.dtype)
        runs = (self.null_text, mask), (self.null_text, None), (self.text, None)
        with torch.no_grad():
            parts = [self.model(x, self.timestep(step), text, flags) for text, flags in runs]
        return self.update(latents, parts, x0_previous, step)

    def branch_texts(self) -> TextCondition:
        """The texts of the three branches, padded to one length and masked."""
        return TextCondition.cat([self.null_text, self.null_text, self.text])

    def stacked(self, x, timestep, text, flags):
        return self.model(x, timestep, text, flags)

    def batched(self, latents, x0_previous, step=STEP, forward=None):
        """One forward of the three branches, texts padded to one length and masked."""
        flags = torch.tensor([True, False, False], device=self.device)
        x = latents.to(self.dtype).repeat(3, 1, 1, 1, 1)
        with torch.no_grad():
            inputs = x, self.timestep(step).expand(3), self.branch_texts(), flags
            parts = (forward or self.stacked)(*inputs).split(1)
        return self.update(latents, parts, x0_previous, step)

    def batched_compiled(self, latents, x0_previous, step=STEP):
        return self.batched(latents, x0_previous, step, self.compiled)

    def batched_blocks_compiled(self, model=None, **options):
        """`batched` of the same weights in a model whose blocks are compiled: all of a large model
        as one graph is minutes of compilation. model: whose weights are not shared."""
        model = self.copy(self.dtype) if model is None else model
        model.compile_blocks(**options)
        return partial(self.batched, forward=model)

    def batched_openvino(self):
        """`batched` by OpenVINO, and the threads it takes: the plain forward converted for texts of
        these lengths, which are inputs, with the same weights."""
        model = self.copy(torch.float32)
        text = self.branch_texts().to(dtype=torch.float32)
        x = torch.zeros(3, *self.shape[1:])
        inputs = x, self.timestep(0).expand(3).clone(), *tensors_of(text)
        with plain_operators():
            run, threads = openvino_forward(PlainBranches(model, text), inputs, self.dtype)

        def forward(x, timestep, text, flags):
            return run(x.float(), timestep, *tensors_of(text.to(dtype=torch.float32)))

        return partial(self.batched, forward=forward), threads

    def engines(self, around=lambda step: step) -> list[Contender]:
        """`batched` by engines of others; around: what makes a contender of a step."""

        def openvino():
            run, threads = self.batched_openvino()
            return around(run), told(threads)

        def zentorch():
            from torch._inductor import config as inductor_config

            # Block by block: of the timestep's embedding in fp64 it makes no graph. A copy: it
            # lays the weights out anew where they are.
            own = deepcopy(self.model)
            run = plainly(around(self.batched_blocks_compiled(own, backend="zentorch")))

            def alone(*inputs):
                # What it tells Inductor at its first call would change others' compilations.
                with inductor_config.patch(joint_custom_post_pass=None):
                    return run(*inputs)

            return alone, f"{told(torch.get_num_threads())}, block by block"

        return [engine(OPENVINO, openvino), engine(ZENTORCH, zentorch)]

    def update(self, latents, parts, x0_previous, step):
        weights = guidance_weights(LAMBDA_T, LAMBDA_M)
        noise = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        return solver_step(self.table.rows[step], latents, noise, x0_previous)

    def ours(self, cuda_graph=False, **options):
        """cuda_graph is never left to the denoiser: for a small model it would be a graph."""
        denoiser = self.denoiser(cuda_graph=cuda_graph, **options)
        return lambda latents, x0_previous, step=STEP: denoiser.step(latents, step, x0_previous)

    def ours_compiled(self):
        """The same weights in a model whose blocks are compiled."""
        model = self.copy(self.dtype)
        model.compile_blocks()
        plain, self.model = self.model, model
        ours, self.model = self.ours(), plain
        return ours

    def latte(self, depth: int) -> Contender:
        """diffusers' text-to-video transformer of equal width, and as many branches."""
        config, (_, _, frames, height, _) = self.model.config, self.shape
        model = latte_model(config, frames, height, depth, self.device)
        if model is None:
            return absent("Latte", "diffusers is not installed")
        model = model.eval().to(self.dtype)
        tokens = self.text.t5.tokens.repeat(3, 1, 1)

        def run(latents, x0_previous, step=STEP):
            x = latents.to(self.dtype).repeat(3, 1, 1, 1, 1)
            with torch.no_grad():
                timestep = self.timestep(step).expand(3)
                parts = model(x, timestep, tokens, return_dict=False)[0].split(1)
            return self.update(latents, parts, x0_previous, step)

        note = f"{depth} layers for {config.depth}"
        return Contender("Latte", run, note, checked=False)


def latte_model(config, frames: int, height: int, depth: int, device):
    """diffusers' LatteTransformer3DModel as wide as `config`; None without diffusers."""
    try:
        from diffusers import LatteTransformer3DModel
    except ImportError:
        return None
    torch.manual_seed(0)
    with torch.device(device):
        return LatteTransformer3DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_size,
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            num_layers=depth,
            cross_attention_dim=config.width,
            attention_bias=True,
            sample_size=height,
            patch_size=config.patch_size,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=config.t5_width,
            video_length=frames,
        )


def flops_of(run, *inputs) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*inputs)
    return counter.get_total_flops()


def latte_depths(counted: Step, flops: int, inputs) -> dict[int, int]:
    """Layers of Latte and their FLOPs, those just below `flops`, or one, and one more; nothing
    without diffusers."""
    if counted.latte(1).run is None:
        return {}
    one, two = (flops_of(counted.latte(depth).run, *inputs) for depth in (1, 2))
    below = max(1, 1 + (flops - one) // (two - one))
    return {depth: one + (depth - 1) * (two - one) for depth in (below, below + 1)}


def at_equal_flops(row: dict, flops: int) -> float | None:
    """How many times as long as ours Latte would take with these FLOPs, on the line through its two
    depths; None where it was absent."""
    entries = [e for name, e in row["contenders"].items() if name.startswith("Latte") and "ms" in e]
    if len(entries) < 2:
        return None
    (x0, y0), (x1, y1) = ((entry["flops"], entry["ms"]) for entry in entries)
    return (y0 + (flops - x0) * (y1 - y0) / (x1 - x0)) / row["contenders"][OURS]["ms"]


def compete(measure, contest, name, config, shape, dtype, peers=PEERS, eager=True):
    """One row; peers: which of PEERS take part; eager: whether plain forwards do, and our graph."""
    counted = Step(config, shape, dtype, "meta")
    ours = counted.ours()
    inputs = [torch.empty(shape, device="meta") for _ in range(2)]
    ours(*inputs)  # makes the modulation rows of all steps
    with plain_operators():
        plain, shared = flops_of(counted.separate, *inputs), flops_of(ours, *inputs)
        batched = flops_of(counted.batched, *inputs)
    depths = latte_depths(counted, plain, inputs) if "Latte" in peers else {}

    step = Step(config, shape, dtype, contest.device)
    contenders = [Contender(OURS, step.ours())]
    if eager:
        contenders += [
            Contender(EAGER, plainly(step.separate), flops=plain),
            Contender("one batched forward", plainly(step.batched), flops=batched),
        ]
    if eager and contest.device == "cuda":
        contenders.append(Contender("ours, CUDA graph", step.ours(cuda_graph=True)))
    if "compiled" in peers and contest.smoke:
        contenders.append(absent("batched, torch.compile", "not compiled in a dry run"))
        contenders.append(absent("ours, compiled", "not compiled in a dry run"))
    elif "compiled" in peers:
        by_block = config.depth > WHOLE_DEPTH
        compiled = step.batched_blocks_compiled() if by_block else step.batched_compiled
        note = "block by block" if by_block else "one graph"
        contenders.append(
            Contender("batched, torch.compile", plainly(compiled), note, flops=batched)
        )
        contenders.append(Contender("ours, compiled", step.ours_compiled()))
    if "engines" in peers and contest.device == "cpu":
        contenders += contest.engines(step.engines)
    for depth, latte_flops in depths.items():
        label = f"Latte, {latte_flops / plain:.2f} × three forwards' FLOPs"
        contenders.append(replace(step.latte(depth), name=label, flops=latte_flops))
    if "Latte" in peers and not depths:
        contenders.append(step.latte(1))
    # Through many random blocks bf16 strays by more than a row may: there ours is held against
    # plain torch's own error, once the row is written.
    is_exact = dtype == torch.float32 or config.depth <= WHOLE_DEPTH
    contenders = [replace(contender, exact=is_exact) for contender in contenders]
    row = measure(
        name,
        shape,
        dtype,
        make=lambda randn: tuple(randn(*shape, dtype=torch.float32) for _ in range(2)),
        definition=step.definition,
        contenders=contenders,
        times_launch=True,
        flops=shared,
        preset=None,
        plain_flops=plain,
        latte_flops=list(depths.values()),
        amdahl_ceiling=plain / shared,
        work=step.denoiser().describe(),
    )
    latte = at_equal_flops(row, plain)
    print(
        f"\n{name}: {plain / 1e9:.1f} GFLOP plain, {shared / 1e9:.1f} ours; "
        f"ceiling {row['amdahl_ceiling']:.3f}; Latte at equal FLOPs, by its two depths: "
        f"{'absent' if latte is None else f'{latte:.2f} x'}\n{row['work']}"
    )
    if eager and not is_exact:
        ours, plain = (row["contenders"][name]["error"] for name in (OURS, EAGER))
        assert ours <= 1.1 * plain, f"ours is off by {ours:.1e}, plain torch by {plain:.1e}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "peers", [(), ("compiled",), ("Latte",)], ids=["eager", "compiled", "Latte"]
)
def test_whole_model(measure, contest, peers):
    """G/2-T2V, 8 frames at 512², bf16; a row each for peers that may fail or take long, in which
    nothing of the first row is measured again but ours."""
    name = " beside ".join(("guided step, G/2-T2V", *peers))
    shape = 1, 4, 8, 64, 64
    config, eager = PRESETS["G/2-T2V"], not peers
    compete(measure, contest, name, config, shape, torch.bfloat16, peers, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small(measure, contest, dtype):
    """The small preset at its own size: 8 frames of 64 × 64 pixels."""
    shape, peers = (1, 4, 8, 8, 8), () if contest.brief else PEERS
    compete(measure, contest, "guided step, small", PRESETS["small-T2V"], shape, dtype, peers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slice(measure, contest, dtype):
    """Four blocks of XL/2-T2V: 8 frames at 128², on a GPU at 512²."""
    side = 4 if contest.smoke else 64 if contest.device == "cuda" else 16
    config = replace(PRESETS["XL/2-T2V"], depth=2 if contest.smoke else 4)
    name = "guided step, 4 blocks of XL/2-T2V"
    compete(measure, contest, name, config, (1, 4, 8, side, side), dtype)
