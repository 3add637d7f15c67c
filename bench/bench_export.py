"""A clip by the model that ships: compiled sampler, compiled pipeline, eager pipeline.

pytest bench/bench_export.py --benchmark-only --full

The package is made, and run in fresh processes, from Python and by gentron-sample, before anything
is timed: on CUDA that is the test of the Triton kernels inside it. Without the C++ runtime it is
built in place.

The row keeps seconds: of export; of load, in a process that has imported all; and of cold starts,
each a whole process with empty caches from its start to its end with the clip's latents written,
Python and its imports among them. Text encoders and VAE take no part.
"""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from contest import DTYPES, OURS, Contender, absent
from records import append_row, environment
from safetensors.torch import load_file, save_file
from torch._inductor import config as inductor_config

import gentron_fast
from gentron_fast import EncodedText, GenTron, TextCondition
from gentron_fast.compiled import CompiledSampler, export_sampler
from gentron_fast.diffusion import SCHEDULER_CONFIG, portable_noise
from gentron_fast.guidance import GuidedDenoiser
from gentron_fast.solvers import make_table

ROOT = Path(__file__).parents[1]
MODEL = Path(gentron_fast.__file__).parent / "assets" / "transformer"
SHAPE, STEPS, SEED = (4, 8, 8, 8), 20, 0
# At 7.5 text that is random lets fp32's rounding grow to 3 % of a clip; the work is the same.
LAMBDA_T, LAMBDA_M = 3.0, 1.2
PROMPT, NULL = {"clip": 7, "t5": 25}, {"clip": 2, "t5": 1}  # tokens
TABLE = make_table("dpm++", SCHEDULER_CONFIG, STEPS)
LOAD_LIMIT = 10.0  # seconds
PROGRAM = Path(gentron_fast.__file__).with_name("gentron-sample")

COLD = """
import sys
sys.path.insert(0, {bench!r})
import bench_export as bench
import torch
from safetensors.torch import load_file, save_file
kind, dtype, folder = sys.argv[1:]
dtype, text = getattr(torch, dtype), bench.text_of(load_file(f"{{folder}}/text.safetensors"))
make = bench.load_compiled if kind == "package" else bench.compiled_pipeline
sample = make(f"{{folder}}/clip.gentron", dtype)
save_file({{"latents": sample(text).cpu()}}, f"{{folder}}/{{kind}}.safetensors")
"""


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def text_of(tensors: dict) -> TextCondition:
    """One prompt's text of its tokens; nothing is padding."""
    parts = {}
    for name, tokens in tensors.items():
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        parts[name] = EncodedText(tokens, mask, tokens.mean(1))
    return TextCondition(**parts)


def random_text(lengths: dict, width: int = 128) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(1, n, width, generator=generator) for name, n in lengths.items()}


def load_model(dtype: torch.dtype) -> GenTron:
    return GenTron.from_pretrained(MODEL, dtype, device())


def pipeline_of(model: GenTron):
    """The pipeline's loop: text → latents. Eager: a CUDA graph is captured anew at every call."""
    weight = model.patch_embed.weight
    null_text = text_of(random_text(NULL)).to(weight.device, weight.dtype)

    @torch.no_grad()
    def sample(text: TextCondition):
        text = text.to(weight.device, weight.dtype)
        scales = LAMBDA_T, LAMBDA_M
        inputs = model, text, null_text, TABLE, *scales, SHAPE
        denoiser = GuidedDenoiser(*inputs, cuda_graph=False)
        latents, x0 = portable_noise(SHAPE, [SEED], 0).to(weight.device), None
        for step in range(STEPS):
            latents, x0 = denoiser.step(latents, step, x0)
        return latents

    return sample


def compiled_pipeline(_, dtype: torch.dtype):
    model = load_model(dtype)
    model.compile_blocks()
    return pipeline_of(model)


def load_compiled(path, _):
    sampler = CompiledSampler.load(path)
    return lambda text: sampler(text, seed=SEED, lambda_t=LAMBDA_T, lambda_m=LAMBDA_M).latents


def cold(kind: str, dtype: torch.dtype, folder: Path) -> tuple[float, torch.Tensor]:
    """Seconds of a fresh Python process with empty caches that makes one clip, and the clip."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/{kind}", "TRITON_CACHE_DIR": f"{folder}/triton"}
    code = COLD.format(bench=str(ROOT / "bench"))
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-c", code, kind, name, str(folder)]
    seconds = run(command, os.environ | caches)
    return seconds, load_file(folder / f"{kind}.safetensors")["latents"]


def cold_program(folder: Path) -> tuple[float, torch.Tensor]:
    """`cold` of gentron-sample."""
    tensors = {}
    for name, own in text_of(load_file(folder / "text.safetensors"))._asdict().items():
        tensors |= {f"{name}.tokens": own.tokens, f"{name}.pooled": own.pooled}
    save_file(tensors, folder / "embeddings.safetensors")
    command = [PROGRAM, folder / "clip.gentron", "--embeddings", folder / "embeddings.safetensors"]
    command += ["--seed", SEED, "--lambda-t", LAMBDA_T, "--lambda-m", LAMBDA_M]
    seconds = run([*command, "--out", folder / "program.npy"], dict(os.environ))
    return seconds, torch.from_numpy(np.load(folder / "program.npy"))


def run(command: list, environment: dict) -> float:
    """The seconds that the command takes."""
    start = time.perf_counter()
    done = subprocess.run(map(str, command), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start


@pytest.fixture(scope="module", autouse=True)
def runtime():
    if find_spec("gentron_fast._runtime") is None or not PROGRAM.exists():
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.fail(f"the C++ runtime cannot be built: {done.stderr.splitlines()[-1:]}")


def keep(seconds: dict, dtype: torch.dtype, contest) -> None:
    """A row of the seconds so far: the step may end before its own row."""
    if os.environ.get("RESULTS") and not contest.smoke:
        row = {"operator": "seconds of a compiled sampler, small", "shape": [1, *SHAPE]}
        row |= {"dtype": str(dtype).removeprefix("torch."), **environment(device())}
        append_row(os.environ["RESULTS"], "export", row | {"seconds": dict(seconds)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip(measure, contest, tmp_path, dtype):
    """One clip of 8 frames of 64 × 64 pixels, without the text encoders and the VAE."""
    model, path = load_model(dtype), tmp_path / "clip.gentron"
    null_text = text_of(random_text(NULL)).to(device(), dtype)
    save_file(random_text(PROMPT), tmp_path / "text.safetensors")
    # For CUDA the graphs are compiled one behind the other: where minutes count, the C++ around
    # the kernels unoptimised, which halves its compiler's time.
    level = {"aot_inductor.compile_wrapper_opt_level": "O0"} if contest.brief else {}
    start = time.perf_counter()
    with inductor_config.patch(level):
        export_sampler(
            *(path, model, null_text, SCHEDULER_CONFIG),
            frames=SHAPE[1],
            latent_size=SHAPE[2:],
            steps=STEPS,
            lambda_t=LAMBDA_T,
            lambda_m=LAMBDA_M,
            max_batch=2,
            max_tokens={"clip": 40, "t5": 40},  # shorter than a head: one form of text
        )
    seconds = {"export": time.perf_counter() - start}
    keep(seconds, dtype, contest)
    eager = pipeline_of(model)
    wanted = eager(text_of(random_text(PROMPT))).cpu()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    seconds["cold"], latents = cold("package", dtype, tmp_path)
    assert (latents - wanted).norm() <= tolerance * wanted.norm()
    keep(seconds, dtype, contest)
    seconds["cold gentron-sample"], latents = cold_program(tmp_path)
    assert (latents - wanted).norm() <= tolerance * wanted.norm()
    keep(seconds, dtype, contest)
    start = time.perf_counter()
    ours = load_compiled(path, dtype)
    seconds["load"] = time.perf_counter() - start
    assert seconds["load"] <= LOAD_LIMIT
    if contest.smoke or contest.brief:
        compiled = absent("compiled pipeline", "not compiled in a short run")
    else:
        seconds["cold torch.compile"], _ = cold("pipeline", dtype, tmp_path)
        sample = compiled_pipeline(None, dtype)
        compiled = Contender("compiled pipeline", lambda *tokens: sample(of(tokens)))

    def of(tokens):
        return text_of(dict(zip(PROMPT, tokens, strict=True)))

    row = measure(
        f"clip of {STEPS} steps, small",
        (1, *SHAPE),
        dtype,
        make=lambda randn: tuple(randn(1, n, 128) for n in PROMPT.values()),
        definition=lambda *tokens: pipeline_of(load_model(tokens[0].dtype))(of(tokens)),
        contenders=[
            Contender(
                OURS, lambda *tokens: ours(of(tokens)), "its C++ unoptimised" if level else ""
            ),
            compiled,
            Contender("eager pipeline", lambda *tokens: eager(of(tokens))),
        ],
        times_launch=True,
        seconds=seconds,
        steps=STEPS,
    )
    print("\n" + json.dumps(seconds))
    if compiled.run is not None:
        speedups = {name: own.get("speedup") for name, own in row["contenders"].items()}
        print(json.dumps(speedups))
