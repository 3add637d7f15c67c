"""One training step, forward, backward and AdamW: plain torch, and ours.

pytest bench/bench_train.py --benchmark-only

Ours runs under DeepSpeed ZeRO-3 on one rank; where DeepSpeed is not installed, or its states do not
fit beside the others', ours takes the plain AdamW step, and its note says so. All contenders but
DeepSpeed's and Latte share one model and one optimizer, with a learning rate too small to move it.
On the CPU all of them gain what the trainer sets for its process: freed memory is kept.
"""

import gc
import importlib.util
import os
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_step import (
    latte_depths,
    latte_model,
    plain_operators,
    plainly,
    random_model,
    text_of,
)
from contest import DTYPES, OURS, Contender, absent, memory_bytes

from gentron_fast import PRESETS
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule, diffusion_loss
from gentron_train.flops import parameter_count, peak_flops, training_flops
from gentron_train.objective import Objective, checkpoint_activations

TOKENS = {"clip": 77, "t5": 120}
RATE = 1e-12
SCHEDULE = NoiseSchedule.from_config(SCHEDULER_CONFIG)
ZERO_NOTE = "DeepSpeed ZeRO-3, one rank"
STATE_BYTES = 18  # of a parameter under DeepSpeed: bf16, its gradient, master and moments


class TrainingStep:
    """The contenders of one model and batch, each (latents, noise) → the loss of a step."""

    def __init__(self, config, shape, dtype, device):
        self.config, self.shape, self.dtype, self.device = config, shape, dtype, device
        self.schedule = SCHEDULE if device == "meta" else SCHEDULE.to(device)
        self.model = random_model(config, torch.float32, device).train()
        self.objective = Objective(self.model, None, self.schedule, dtype)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, weight_decay=0.0, fused=device == "cuda"
        )
        batch, _, frames, *_ = shape
        self.text = text_of(config, TOKENS, torch.float32, device).repeat(batch)
        generator = torch.Generator().manual_seed(0)
        self.timestep = torch.randint(1000, (batch,), generator=generator).to(device)
        self.motion_free = None
        if frames > 1:  # a fifth of the clips are repeated images, as in training
            self.motion_free = (torch.arange(batch) % 5 == 4).to(device)

    def loss(self, objective, latents, noise):
        return objective(latents, self.timestep, self.text, self.motion_free, noise)

    def definition(self, latents, noise):
        """The loss in the dtype of the latents."""
        wide = random_model(self.config, latents.dtype, self.device)
        wide.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            noisy = SCHEDULE.add_noise(latents, noise, self.timestep)
            text = self.text.to(dtype=latents.dtype)
            prediction = wide(noisy, self.timestep, text, self.motion_free)
            return diffusion_loss(prediction, noise)

    @torch.enable_grad()
    def adamw(self, latents, noise, objective=None):
        """The step as a plain loop has it: loss, backward, clipping, AdamW."""
        loss = self.loss(objective or self.objective, latents, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def checkpointed(self, mode):
        def run(latents, noise):
            checkpoint_activations(self.model, mode)
            try:
                return self.adamw(latents, noise)
            finally:
                checkpoint_activations(self.model, "none")

        return run

    def eager(self, latents, noise):
        with plain_operators():
            return self.adamw(latents, noise)

    def compiled(self):
        model = torch.compile(self.objective, dynamic=False)

        def run(latents, noise):
            with plain_operators():
                return self.adamw(latents, noise, model)

        return run

    def ours(self) -> Contender:
        if importlib.util.find_spec("deepspeed") is None:
            return Contender(OURS, self.adamw, "plain AdamW step: no deepspeed here")
        needed = STATE_BYTES * parameter_count(self.model)
        if needed > memory_bytes(self.device) // 3:
            return Contender(OURS, self.adamw, "plain AdamW step: no room for two optimizers")
        return Contender(OURS, self.zero(), ZERO_NOTE)

    def zero(self):
        """The same weights under DeepSpeed, as train/assembly.py configures it."""
        from gentron_train.assembly import gather_persistent, zero_engine
        from gentron_train.process import start_distributed
        from gentron_train.settings import Settings

        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        threads = torch.get_num_threads()
        device = start_distributed(timeout=600)
        torch.set_num_threads(threads)
        model = random_model(self.config, torch.float32, self.device).train()
        model.load_state_dict(self.model.state_dict())
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        parameters = "fp32" if self.device == "cpu" else name
        settings = Settings(batch=self.shape[0], lr=RATE, dtype=name, parameters=parameters).on(1)
        objective = Objective(model, None, self.schedule, self.dtype)
        engine = zero_engine(objective, settings, device)

        @torch.enable_grad()
        def run(latents, noise):
            gather_persistent(engine)
            loss = self.loss(engine, latents, noise)
            engine.backward(loss)
            engine.step()
            return loss.detach()

        return run

    def latte(self, depth: int) -> Contender:
        """diffusers' Latte of equal width in a plain AdamW loop."""
        _, channels, frames, height, _ = self.shape
        model = latte_model(self.config, frames, height, depth, self.device)
        if model is None:
            return absent("Latte", "diffusers is not installed")
        if self.device != "meta":  # where FLOPs are counted
            optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        counts = self.device == "meta"
        dtypes = {"device_type": "cpu" if counts else self.device, "dtype": torch.bfloat16}
        autocast = self.dtype == torch.bfloat16 and not counts

        @torch.enable_grad()
        def run(latents, noise):
            noisy = SCHEDULE.add_noise(latents, noise, self.timestep)
            with torch.autocast(**dtypes, enabled=autocast):
                (prediction,) = model(noisy, self.timestep, self.text.t5.tokens, return_dict=False)
            loss = diffusion_loss(prediction[:, :channels], noise)
            loss.backward()
            if not counts:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            model.zero_grad()
            return loss.detach()

        return Contender("Latte", run, f"{depth} layers for {self.config.depth}", checked=False)


def nearest_latte(config, shape, flops: int) -> tuple[int, int]:
    """Layers of Latte whose step comes nearest to these FLOPs, and their count; 0, 0 without
    diffusers."""
    counted = TrainingStep(config, shape, torch.float32, "meta")
    counted.timestep = counted.timestep.to("meta")
    inputs = [torch.empty(shape, device="meta") for _ in range(2)]
    depths = latte_depths(counted, flops, inputs) or {0: 0}
    return min(depths.items(), key=lambda item: abs(item[1] - flops))


def compete(measure, contest, name, config, shape, dtype, modes=(), compiles=False):
    flops = shape[0] * training_flops(config, shape[1:], TOKENS)
    empty = memory_in_use(contest.device)
    step = TrainingStep(config, shape, dtype, contest.device)
    ours, peak = ours_that_fits(step, modes, empty)
    contenders = [ours, Contender("plain AdamW loop", step.eager)]
    if ours.run != step.adamw:
        contenders.append(Contender("ours, plain AdamW loop", step.adamw))
    for mode in modes:
        contenders.append(Contender(f"ours, checkpointing {mode}", step.checkpointed(mode)))
    if compiles and not contest.smoke:
        contenders.append(Contender("plain AdamW loop, torch.compile", step.compiled()))
    depth, latte_flops = nearest_latte(config, shape, flops)
    latte = f"Latte, {latte_flops / flops:.2f} × the FLOPs"
    latte = replace(step.latte(max(depth, 1)), name=latte, flops=latte_flops or None)
    row_of(measure, name, step, [*contenders, latte], flops, peak, latte_flops=latte_flops)


def row_of(measure, name, step: TrainingStep, contenders, flops, peak: float, **extra):
    """Measure the contenders of a step; tell samples a second and MFU of each."""
    shape, dtype = step.shape, step.dtype
    roof = peak_flops(torch.device(step.device), dtype) / 1e12
    row = measure(
        name,
        shape,
        dtype,
        make=lambda randn: tuple(randn(*shape, dtype=torch.float32) for _ in range(2)),
        definition=step.definition,
        contenders=contenders,
        times_launch=True,
        flops=flops,
        direction="training step",
        peak_tflops=roof,
        peak_memory_gib=peak,
        **extra,
    )
    for contender, entry in row["contenders"].items():
        if "ms" in entry:
            own = entry["flops"] or flops
            rate, mfu = 1e3 * shape[0] / entry["ms"], own / entry["ms"] / 1e9 / roof
            print(f"{name}: {contender:<32}{rate:9.2f} samples/s  {mfu:6.1%} MFU")
    print(f"{name}: {flops / 1e9:.1f} GFLOP; ours {peak:.2f} GiB")


def ours_that_fits(step: TrainingStep, modes, empty: float) -> tuple[Contender, float]:
    """Ours and GiB at its peak above what others hold; where memory is too small, the first of the
    checkpointed modes that fits. empty: GiB in use before the step was made."""
    makers = [step.ours]
    for mode in modes:
        note = f"plain AdamW step, checkpointing {mode}: no room without"
        makers.append(partial(Contender, OURS, step.checkpointed(mode), note))
    for last, make in enumerate(makers, 1 - len(makers)):
        others = memory_in_use(step.device)
        try:
            ours = make()
            peak = peak_memory(step.device, ours.run, step)
        except torch.OutOfMemoryError:
            if last == 0:
                raise
        else:
            return ours, peak - (others if ours.note == ZERO_NOTE else empty)
        ours = None  # or it would keep what it took
        step.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()


def peak_memory(device: str, run, step: TrainingStep) -> float:
    """GiB at the peak of one step: of the GPU, or of the process where there is none."""
    latents, noise = torch.randn(2, *step.shape, device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run(latents, noise)
        return torch.cuda.max_memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    run(latents, noise)
    return _process_gib("VmHWM")


def memory_in_use(device: str) -> float:
    """GiB: of the GPU, or of the process where there is none."""
    return torch.cuda.memory_allocated() / 2**30 if device == "cuda" else _process_gib("VmRSS")


def _process_gib(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 2**20


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", ["small", "small-T2V"])
def test_small(measure, contest, preset, dtype):
    """The small preset at its own size: 64 × 64 pixels, clips of 8 frames."""
    batch = 2 if contest.smoke else 64 if preset == "small" else 16
    shape = batch, 4, 8 if "T2V" in preset else 1, 8, 8
    compete(measure, contest, f"training step, {preset}", PRESETS[preset], shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slice(measure, contest, dtype):
    """Two blocks of XL/2-T2V: two clips of 8 frames at 128², on a GPU at 512²."""
    side = 4 if contest.smoke else 64 if contest.device == "cuda" else 16
    config = replace(PRESETS["XL/2-T2V"], depth=2)
    name = "training step, 2 blocks of XL/2-T2V"
    compete(measure, contest, name, config, (2, 4, 8, side, side), dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "preset, shape",
    [
        ("G/2-T2V", (2, 4, 8, 64, 64)),
        ("XL/2-T2V", (4, 4, 8, 64, 64)),
        ("G/2", (32, 4, 1, 32, 32)),
        ("XL/2", (64, 4, 1, 32, 32)),
        ("G/2", (8, 4, 1, 64, 64)),
        ("XL/2", (16, 4, 1, 64, 64)),
    ],
    ids=str,
)
def test_whole_model(measure, contest, preset, shape):
    """The paper's sizes in bf16, in micro-batches that one GPU holds."""
    name, modes = f"training step, {preset}", ("attention", "full")
    compete(measure, contest, name, PRESETS[preset], shape, torch.bfloat16, modes, compiles=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_checkpointed(measure, contest):
    """G/2-T2V in bf16, every block computed again, beside plain torch that does the same."""
    config, shape, dtype = PRESETS["G/2-T2V"], (2, 4, 8, 64, 64), torch.bfloat16
    empty = memory_in_use(contest.device)
    step = TrainingStep(config, shape, dtype, contest.device)
    ours = step.checkpointed("full")
    peak = peak_memory(contest.device, ours, step) - empty
    contenders = [
        Contender(OURS, ours, "plain AdamW step"),
        Contender("plain AdamW loop", plainly(ours)),
    ]
    flops = shape[0] * training_flops(config, shape[1:], TOKENS)
    name = "training step, G/2-T2V, blocks computed again"
    row_of(measure, name, step, contenders, flops, peak)
