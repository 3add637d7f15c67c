"""Compiled samplers: the pipeline's result, from Python and without, and every refusal.

The model that ships is exported once; nothing else is compiled.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled_files import (
    LONG,
    PROMPT,
    STEPS,
    embeddings,
    error,
    read_package,
    run_program,
    write_package,
)
from safetensors.torch import save_file
from torch._inductor import config as inductor_config

from gentron_fast import GenTronPipeline, export, generate
from gentron_fast.compiled import (
    CompiledPipeline,
    CompiledSampler,
    export_sampler,
    exporter,
    graphs,
)
from gentron_fast.diffusion import SCHEDULER_CONFIG, portable_noise
from gentron_fast.export import HELP
from gentron_fast.guidance import GuidedDenoiser, guidance_weights
from gentron_fast.guidance.steps import branch_conditions
from gentron_fast.index import in_force
from gentron_fast.media import read_video
from gentron_fast.model import TextCondition
from gentron_fast.solvers import make_table

LONGEST = " and then ".join([PROMPT] * 12)  # more than 77 and 256 tokens, and cut


@pytest.mark.parametrize(
    "prompts, lambda_t, lambda_m, rescale",
    [
        ([PROMPT], 7.5, 1.2, 0.0),
        ([PROMPT], 7.5, 1.0, 0.7),
        ([PROMPT], 1.0, 1.0, None),
        ([PROMPT, LONG], 5.0, [1.0, 1.3], [0.0, 1.0]),
        ([LONG], 4.0, 4.0, 0.0),
        ([PROMPT, LONG, LONGEST], 7.5, 1.2, 0.5),
    ],
    ids=["three branches", "two", "one", "two clips", "a branch of weight 0", "the most"],
)
@pytest.mark.filterwarnings("ignore:a prompt of .* was cut")
def test_the_same_as_the_pipeline(pipeline, sampler, prompts, lambda_t, lambda_m, rescale):
    seeds = [7 + i for i in range(len(prompts))]
    options = {"seed": seeds, "lambda_t": lambda_t, "lambda_m": lambda_m, "rescale": rescale}
    wanted = pipeline(prompts, steps=STEPS, progress=False, **options)
    options |= {"lambda_m": torch.tensor(lambda_m, dtype=torch.float64)}
    if rescale is not None:
        options |= {"rescale": torch.tensor(rescale, dtype=torch.float64)}
    got = sampler(prompts, **options)
    assert error(got.latents, wanted.latents) <= 1e-4
    assert got.frames.shape == wanted.frames.shape and got.frames.dtype == torch.uint8
    assert (got.frames.int() - wanted.frames.int()).abs().max() <= 1
    assert not torch.equal(sampler(prompts, **options | {"seed": 1}).latents, got.latents)


@pytest.mark.parametrize(
    "lambda_t, lambda_m, rescale",
    [
        (7.5, 1.2, 0.7),
        (7.5, 1.0, 0.0),
        (1.0, 1.0, 0.0),
        (5.0, [1.0, 1.3], [0.0, 1.0]),
        (0.0, 1.2, 0.0),
        (0.0, 1.2, 0.5),
        (4.0, 4.0, 0.0),
    ],
    ids=str,
)
def test_one_plan_three_users(pipeline, sampler, lambda_t, lambda_m, rescale):
    """The definition's weights, the denoiser's and the runtime's; the same branches, rows of the
    modulation and steps a chunk. gentron-sample is the same runtime."""
    model, metadata, batch = pipeline.transformer, sampler.metadata, 2
    scales = [
        torch.as_tensor(scale, dtype=torch.float64).expand(batch)
        for scale in (lambda_t, lambda_m, rescale)
    ]
    *scales, shares = scales
    text, null_text = (pipeline.text_encoder.encode(p) for p in ([PROMPT, LONG], [""]))
    table = make_table(metadata["solver"], pipeline.scheduler, STEPS)
    shape = metadata["latent_shape"]
    denoiser = GuidedDenoiser(model, text, null_text, table, *scales, shape, rescale=shares)
    plan = sampler._runtime.plan(*scales, shares, batch)
    assert torch.equal(plan["rescale"], shares.expand(STEPS, batch))
    defined = torch.stack(guidance_weights(*scales, model.config.temporal), -1)
    assert torch.equal(plan["weights"], defined.expand(STEPS, batch, 3))
    assert torch.equal(denoiser._weights, plan["weights"])
    assert plan["chunk"] == denoiser._chunk
    sets = metadata["branches"]
    for active, chosen in zip(denoiser._active, plan["branches"], strict=True):
        wanted = [
            name
            for name in sets
            if all(a <= b for a, b in zip(active, graphs.branches_of(name), strict=True))
        ]
        assert chosen == wanted[0]
    for name in sets:
        runs = [k for k, is_run in enumerate(graphs.branches_of(name)) if is_run]
        rows = torch.cat([branch_conditions(k, batch, 1, batch) for k in runs])
        assert torch.equal(plan["conditions"][name], rows)
    # A graph copies what does not begin at a multiple of 16 bytes, at every step.
    assert torch.equal(torch.stack(plan["step_weights"]), plan["weights"])
    assert torch.equal(torch.stack(plan["step_rescale"]), plan["rescale"])
    assert torch.equal(torch.stack(plan["step_coefficients"]).cpu(), table.rows)
    assert len(plan["step_bounds"]) == (STEPS if denoiser.learns_range else 0)
    parts = ("step_weights", "step_rescale", "step_coefficients", "step_bounds")
    assert all(row.data_ptr() % 16 == 0 for part in parts for row in plan[part])


def test_a_negative_prompt_and_a_schedule_of_guidance(pipeline, sampler):
    options = {"seed": 3, "lambda_t": 6.0, "lambda_m": 1.2, "rescale": 0.7}
    wanted = pipeline(
        [PROMPT],
        negative_prompt=LONG,
        guidance_range=(0.0, 0.5),
        steps=STEPS,
        progress=False,
        **options,
    )
    compiled = CompiledPipeline(sampler, None)
    got = compiled([PROMPT], negative_prompt=LONG, guidance_range=(0.0, 0.5), **options)
    assert error(got.latents, wanted.latents) <= 1e-4


@pytest.fixture(scope="module")
def image_package(tiny_t2i_folder, tmp_path_factory):
    """The tiny image model in bf16 without its text encoders and VAE, by a solver that draws noise;
    for short texts, which take fewer graphs."""
    path = tmp_path_factory.mktemp("export") / "image.gentron"
    arguments = [str(tiny_t2i_folder), "--out", str(path), "--solver", "ddpm", "--steps", "4"]
    arguments += ["--size", "64", "32", "--dtype", "bfloat16"]
    with (
        inductor_config.patch("aot_inductor.compile_wrapper_opt_level", "O0"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(exporter, "MAX_TOKENS", {"clip": 8, "t5": 8})
        assert export.main([*arguments, "--batch", "2"]) == 0
    return path


def test_a_file_without_encoders_in_bfloat16_with_noise_at_every_step(
    image_package, tiny_t2i_folder, tmp_path
):
    """Its error against fp32 is at most 1.2 times the bf16 pipeline's."""
    exact, plain = (
        GenTronPipeline.from_pretrained(tiny_t2i_folder, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    prompts, options = ["a red", "blue"], {"seed": [1, 2], "lambda_t": 3.0, "size": (64, 32)}
    fixed = options | {"steps": 4, "progress": False}
    reference, other = (exact(prompts, solver=s, **fixed).latents for s in ("ddpm", "ddim"))
    assert error(other, reference) > 0.1  # the noise matters
    wanted = plain(prompts, solver="ddpm", **fixed)
    bound = 1.2 * error(wanted.latents, reference)
    assert 1e-4 < bound < 0.02

    sampler = CompiledSampler.load(image_package)
    got = CompiledPipeline(sampler, tiny_t2i_folder)(prompts, **options)
    assert error(got.latents, reference) <= bound
    assert got.frames.shape == (2, 1, 64, 32, 3)
    assert (got.frames.float() - wanted.frames.float()).abs().mean() <= 1

    text = plain.text_encoder.encode(prompts)
    save_file(embeddings(text), tmp_path / "text.safetensors")
    arguments = ["--embeddings", tmp_path / "text.safetensors", "--seed", "1,2", "--lambda-t", 3]
    done = run_program(image_package, *arguments, "--out", tmp_path / "latents.npy")
    assert (done.returncode, done.stderr) == (0, "")
    assert error(torch.from_numpy(np.load(tmp_path / "latents.npy")), reference) <= bound
    done = run_program(image_package, "--tokens", "clip=1", "--out", tmp_path / "other.npy")
    assert done.returncode == 2 and "takes --embeddings" in done.stderr


def test_a_file_of_other_encoders_is_not_run_with_these(image_package, tmp_path, capsys):
    """Without --model the encoders and the VAE are those that ship."""
    assert generate.main([PROMPT, "--compiled", str(image_package), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "text_encoder is not what the compiled sampler was made" in err
    header, body = read_package(image_package)
    header["metadata"]["parts"] = {}
    path = write_package(tmp_path / "of-none.gentron", header, body)
    assert generate.main([PROMPT, "--compiled", str(path), "--out", str(tmp_path)]) == 2
    assert "no text encoders and no VAE: --model names them" in capsys.readouterr().err


def test_noise_is_drawn_alike():
    from gentron_fast._runtime import portable_noise as drawn

    for seed, step, sample in ((0, 0, 0), (2**64 - 1, 50, 3), (123456789012345, 2**32 - 1, 0)):
        wanted = portable_noise((3, 333), [seed], step, [sample])[0].flatten()
        got = drawn(seed, step, sample, 999)
        assert (got == wanted).float().mean() > 0.999 and (got - wanted).abs().max() <= 1e-6


def test_what_the_file_was_not_made_for_is_refused(pipeline, sampler):
    text = pipeline.text_encoder.encode([PROMPT])
    narrow = TextCondition(text.clip._replace(tokens=text.clip.tokens[..., :7]), text.t5)
    long = TextCondition(text.clip.pad(78)._replace(mask=torch.ones(1, 78).bool()), text.t5)
    for refused, words in (
        (lambda: sampler(PROMPT, frames=4), "made for frames 8, not 4"),
        (lambda: sampler(PROMPT, frames="8"), "frames must be a whole number"),
        (lambda: sampler(PROMPT, size=32), "made for size 64 × 64, not 32 × 32"),
        (lambda: sampler(PROMPT, seed=1.5), "seed must be one or many in a row, got 1.5"),
        (lambda: sampler(b"a star"), "a prompt must be one or many in a row"),
        (lambda: sampler(PROMPT, size=(64, 32)), "made for size 64 × 64, not 64 × 32"),
        (lambda: sampler(narrow), r"clip tokens must be \(1, S, 128\)"),
        (lambda: sampler(long), "78 clip tokens, 77 are the most"),
        (lambda: sampler(TextCondition(text.clip, None)), "lacks the encoder t5"),
        (lambda: sampler(TextCondition()), "the text is empty, wanted that of clip and t5"),
        (lambda: sampler(text, negative=TextCondition()), "the text is empty"),
        (lambda: sampler(text, negative=text.repeat(2)), "null text's clip tokens must be"),
        (lambda: sampler([PROMPT] * 4), "1 to 3 clips at once, not 4"),
        (lambda: sampler([PROMPT] * 2, seed=[1]), "1 seeds for 2 clips"),
        (lambda: sampler(PROMPT, seed=-1), "seed must be"),
        (lambda: sampler(PROMPT, lambda_t=float("nan")), "lambda_t must be a number"),
        (lambda: sampler(PROMPT, lambda_m=torch.ones(5)), "lambda_m must be a number"),
    ):
        with pytest.raises(ValueError, match=words) as refusal:
            refused()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "latents, words",
    [
        (torch.zeros(4, 8, 8, 8), r"latents must be Float \[B, 4, 8, 8, 8\], got Float \[4, 8"),
        (torch.zeros(1, 4, 8, 8, 4), "got Float"),
        (torch.zeros(()), "got Float"),
        (torch.zeros(1, 4, 8, 8, 8, dtype=torch.float64), "got Double"),
        (torch.zeros(4, 4, 8, 8, 8), "1 to 3 clips at once, not 4"),
        (torch.zeros(0, 4, 8, 8, 8), "1 to 3 clips at once, not 0"),
    ],
    ids=["rank", "shape", "number", "dtype", "batch", "none"],
)
def test_latents_that_are_none_are_refused(sampler, latents, words):
    with pytest.raises(ValueError, match=words):
        sampler._runtime.decode(latents)


def test_generate_takes_a_compiled_sampler(package, sampler, pipeline, tmp_path, capsys):
    arguments = [PROMPT, "--compiled", str(package), "--out", str(tmp_path / "clip.mp4")]
    assert generate.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line[:13].strip() for line in out] == ["wrote", "load time", "per clip", "peak memory"]
    assert read_video(tmp_path / "clip.mp4")[0].shape == (8, 64, 64, 3)
    assert generate.main([*arguments, "--verbose", "--lambda-t", "2.5"]) == 0
    told = capsys.readouterr().out.splitlines()[1]
    own = sampler.defaults
    assert told.startswith(f"sampling     steps {own.steps}, solver {own.solver}, lambda_t 2.5,")
    for refused, words in (
        (["--steps", "20"], "--steps is fixed in a compiled sampler"),
        (["--frames", "4"], "made for frames 8, not 4"),
        (["--image", "--frames", "8"], "--image is one frame, --frames asks for 8"),
        (["--sha256", "0" * 64], "wanted 000"),
        (["--sha256", ""], "64 hexadecimal digits"),
        (["--device", "abacus"], "abacus"),
    ):
        assert generate.main([*arguments, *refused]) == 2
        assert words in capsys.readouterr().err


def test_generate_takes_what_a_file_lacks_from_the_folder(sampler, pipeline):
    metadata = sampler.metadata | {"whole": False}
    partial = CompiledSampler(sampler._runtime)
    partial.metadata = metadata
    with pytest.raises(ValueError, match="no text encoders"):
        partial(PROMPT)
    compiled = CompiledPipeline(partial, Path(export.__file__).parent / "assets")
    frames = compiled([PROMPT], seed=[5]).frames
    wanted = pipeline([PROMPT], steps=STEPS, seed=5, progress=False).frames
    assert (frames.int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--out"),
        (["nowhere", "--out", "x.gentron"], "nowhere"),
        (["--out", "x.gentron", "--size", "60"], "multiples of"),
        (["--out", "x.gentron", "--size", "64", "64", "64"], "--size"),
        (["--out", "x.gentron", "--frames", "33"], "--frames"),
        (["--out", "x.gentron", "--batch", "1"], "--batch"),
        (["--out", "x.gentron", "--solver", "euler"], "euler"),
        (["--out", "x.gentron", "--device", "abacus"], "abacus"),
        (["--out", "x.gentron", "--eta", "0.5"], "eta"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_exporter_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert export.main(arguments) == 2
    err = capsys.readouterr().err
    # Libraries that an earlier test imported with their bars on show them before it.
    *bars, line = err.splitlines()
    assert line.startswith("gentron_fast.export: error: ") and "Traceback" not in "".join(bars)
    assert words in err and not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_file(pipeline, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "compile_all", fail)
    path = tmp_path / "clip.gentron"
    path.write_text("old")
    null_text = pipeline.text_encoder.encode([""])
    with pytest.raises(KeyboardInterrupt):
        export_sampler(
            path,
            pipeline.transformer,
            null_text,
            pipeline.scheduler,
            frames=2,
            latent_size=(4, 4),
        )
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["weights.safetensors", "embed.pt2", "package"])
def test_the_files_name_is_free(make_model, make_text, tiny_config, tmp_path, monkeypatch, name):
    """Though the parts are written aside in one folder with it."""

    def compile_none(graphs, folder, _):
        for graph in graphs:
            (folder / f"{graph.name}.pt2").write_text(graph.name)

    monkeypatch.setattr(exporter, "compile_all", compile_none)
    model = make_model(tiny_config, torch.float32)
    null_text = make_text(tiny_config, batch=1, dtype=torch.float32)
    shape = {"frames": 2, "latent_size": (4, 4)}
    export_sampler(tmp_path / name, model, null_text, SCHEDULER_CONFIG, **shape)
    header, body = read_package(tmp_path / name)
    for section, entry in header["sections"].items():
        content = body[entry["offset"] :][: entry["size"]]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert section == "weights.safetensors" or section == f"graphs/{content.decode()}"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_help_fits_one_screen_and_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        export.main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == HELP.format_map(in_force([])).splitlines()
    for screen in (lines, run_program("--help").stdout.splitlines()):
        assert len(screen) <= 24 and max(map(len, screen)) <= 80
    source = Path(export.__file__).read_text()
    options = [part.split('"')[0] for part in source.split('add_argument("--')[1:]]
    assert len(options) > 10 and all(f"--{option} " in HELP for option in options)


@pytest.mark.parametrize("solver", ["ddpm", "dpm++"])
def test_a_learned_range_takes_the_same_step(make_model, make_text, tiny_config, solver):
    """The last graph of a step, uncompiled, against the denoiser, which the pipeline runs."""
    config = replace(tiny_config, learned_range=True)
    model = make_model(config, torch.float32)
    text = make_text(config, batch=2, dtype=torch.float32)
    null_text = make_text(config, batch=1, clip=2, t5=1, dtype=torch.float32, seed=2)
    table = make_table(solver, SCHEDULER_CONFIG | {"variance_type": "learned_range"}, 10)
    shape, step = (4, 3, 4, 4), 4
    denoiser = GuidedDenoiser(model, text, null_text, table, 7.5, 1.2, shape)
    latents, x0, noise = torch.randn(3, 2, *shape, generator=torch.Generator().manual_seed(0))
    draws = bool((table.rows[:, -1] != 0).any())
    wanted = denoiser.step(latents, step, x0, noise if draws else None)
    captured = []
    final = model.final.forward
    model.final.forward = lambda *inputs: captured.append(inputs) or final(*inputs)
    denoiser.step(latents, step, x0, noise if draws else None)
    model.final.forward = final
    weights = torch.tensor([[1 - 1.2, 1.2 - 7.5, 7.5]] * 2, dtype=torch.float64)
    rest = [noise] * draws
    if table.log_variance is not None:
        rest.append(table.log_variance[step].float())
    with torch.no_grad():
        got = graphs._step(
            *(model, *captured[0], latents, weights, torch.zeros(2).double()),
            *(table.rows[step], x0, *rest),
            branches=(True, True, True),
            draws=draws,
        )
    assert all(error(a, b) <= 1e-6 for a, b in zip(got, wanted, strict=True))


def test_loading_and_the_first_call_compile_nothing(package, pipeline, tmp_path):
    """They import neither Inductor's compiler nor transformers or diffusers, and find no g++."""
    text = pipeline.text_encoder.encode([PROMPT])
    save_file(embeddings(text), tmp_path / "text.safetensors")
    code = (
        "import sys; from safetensors.torch import load_file\n"
        "from gentron_fast import EncodedText, TextCondition\n"
        "from gentron_fast.export import CompiledSampler\n"
        f"sampler, t = CompiledSampler.load({str(package)!r}), load_file('text.safetensors')\n"
        "parts = 'tokens', 'mask', 'pooled'\n"
        "encoded = [EncodedText(*(t[f'{e}.{p}'] for p in parts)) for e in ('clip', 't5')]\n"
        "assert sampler(TextCondition(*encoded), seed=5).frames.any()\n"
        "sys.exit(bool({'torch._inductor.compile_fx', 'transformers', 'diffusers'}"
        "& set(sys.modules)))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PATH", "CXX")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0
