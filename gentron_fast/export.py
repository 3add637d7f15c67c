"""Compiled samplers: one file that samples, with or without Python.

python -m gentron_fast.export PIPELINE --out clip.gentron

The file is machine code: load only what you trust.
"""

# Shapes: B clips, k branches of a step, R rows, T frames, N tokens of a frame, S text tokens,
# D width, H × W pixels, h × w latents.

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gentron_fast.commandline import (
    check_writable,
    choose_device,
    number,
    refuse,
    run,
    silence_libraries,
    whole_number,
)
from gentron_fast.config import MAX_FRAMES
from gentron_fast.diffusion import learned_range_log_variance
from gentron_fast.guidance import MODULATION_BYTES, guidance_schedule
from gentron_fast.layers import BranchContexts, CrossContext, FoldedContext, LeadingMotionFree
from gentron_fast.model import EncodedText, GenTron, TextCondition
from gentron_fast.solvers import SolverTable, make_table
from gentron_fast.text import MAX_TOKENS, SUBFOLDERS, TextEncoder
from gentron_fast.vae import VideoVAE, to_frames
from gentron_kernels import launch
from gentron_kernels.guided_step import guided_step

NAME = "gentron_fast.export"
MAGIC = b"GENTRON\x01"  # csrc/runtime/package.h describes the file
WEIGHTS = "weights.safetensors"
MAX_BATCH = 16
# The instruction sets that -march=native may choose, as Linux names them.
CPU_FLAGS = re.compile(
    "avx|amx|s?sse|fma|bmi|adx|v?aes|gfni|f16c|movbe|popcnt|v?pclmul"  # x86
    "|asimd|sve|fphp|bf16|i8mm|atomics"  # Arm
)

HELP = f"""\
usage: python -m {NAME} [PIPELINE] --out FILE [options]

PIPELINE                pipeline folder (the small model that ships)
--out FILE              the compiled sampler, such as clip.gentron
--frames N              frames a clip (the pipeline's own)
--size H [W]            in pixels (the pipeline's own)
--steps N --solver S    denoising steps (50), ddpm, ddim or dpm++ (dpm++)
--eta X                 noise of ddim, 0 to 1 (0)
--lambda-t X            text guidance unless a run says otherwise (7.5)
--lambda-m X            motion guidance likewise (1.2)
--batch N               the most clips at once, 2 or more ({MAX_BATCH})
--whole                 text encoders and VAE too: token ids in, frames out
--device D --dtype T    cpu or cuda (cpu); float32, bfloat16, float16
--verbose               name each graph; tracebacks

The file holds machine code for this kind of machine and this torch.
"""


class CompiledOutput(NamedTuple):
    """As PipelineOutput: frames uint8 (B, T, H, W, 3), None where the file has no VAE; latents fp32
    (B, C, T, h, w); guidance, in one line."""

    frames: Tensor | None
    latents: Tensor
    guidance: str


class CompiledSampler:
    """A compiled sampler in this process: the C++ runtime, with no compilation and no pipeline."""

    def __init__(self, runtime):
        self._runtime = runtime
        self.metadata = json.loads(runtime.header)["metadata"]
        self._tokenizers: TextEncoder | None = None

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, device: str | None = None, sha256: str | None = None
    ) -> "CompiledSampler":
        """Load a file of `export_sampler`. It is machine code: load only what you trust.

        sha256: the digest that the whole file must have; without it the file's own checksums tell
        damage, not authorship. ValueError, in one line, for a file that is damaged, or made for
        another kind of machine, device or torch; it is then not run.
        """
        try:
            from gentron_fast._runtime import Sampler
        except ImportError as error:
            raise ValueError(f"the C++ runtime is not built: {error}") from error
        if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
            raise ValueError(f"a SHA-256 has 64 hexadecimal digits, got {sha256!r}")
        launch.cpu_library()
        pinned = "" if sha256 is None else sha256.lower()
        try:
            return cls(Sampler.load(os.fspath(path), pinned, str(device or ""), ""))
        except RuntimeError as error:  # torch's own, such as for an unknown device
            raise ValueError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error

    def __call__(
        self,
        text: str | Sequence[str] | TextCondition,
        *,
        negative: str | TextCondition | None = None,
        seed: int | Sequence[int] = 0,
        lambda_t: float | Tensor | None = None,
        lambda_m: float | Tensor | None = None,
        frames: int | None = None,
        size: Sequence[int] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> CompiledOutput:
        """Sample one clip of each prompt.

        text: prompts, for a file with text encoders, or what encoders made of them; negative
        likewise, one for all clips, in place of the empty prompt. seed: one a clip, or a number
        for all. lambda_t, lambda_m: numbers, one a clip (B,), or a schedule (S, 1) or (S, B); None
        are the file's. frames and size (pixels) are refused unless the file was made for them.
        ValueError for what does not fit.
        """
        self.check_shape(frames, size)
        text = self._encoded(text)
        batch = next(iter(text.values()))[0].shape[0]
        seeds = [seed] * batch if isinstance(seed, int) else list(seed)
        if len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds for {batch} clips")
        if not all(0 <= seed < 2**64 for seed in seeds):
            raise ValueError(f"a seed must be between 0 and 2**64 - 1, got {seeds}")
        null_text = {} if negative is None else self._encoded(negative)
        scales = [
            torch.as_tensor(
                self.metadata[name] if scale is None else scale, dtype=torch.float64, device="cpu"
            )
            for name, scale in (("lambda_t", lambda_t), ("lambda_m", lambda_m))
        ]
        latents = self._runtime.sample(text, null_text, seeds, *scales, on_step)
        frames = self._runtime.decode(latents) if self.metadata["whole"] else None
        steps, solver = len(self.metadata["timesteps"]), self.metadata["solver"]
        return CompiledOutput(frames, latents, f"{steps} compiled steps of {solver}")

    def check_shape(self, frames: int | None = None, size: Sequence[int] | None = None) -> None:
        """ValueError where the file was made for other frames or another size."""
        for name, asked in (("frames", frames), ("size", size)):
            asked = [asked] if isinstance(asked, int) else asked
            if asked is not None and list(asked) != (made := self.metadata[name]):
                wanted, got = (" × ".join(map(str, values)) for values in (made, asked))
                raise ValueError(f"the compiled sampler was made for {name} {wanted}, not {got}")

    def _encoded(self, text) -> dict[str, tuple]:
        if isinstance(text, TextCondition):
            encoded = {name: tuple(e) for name, e in text._asdict().items() if e is not None}
            if not encoded:
                raise ValueError(f"the text is empty, wanted that of {' and '.join(self.encoders)}")
            return encoded
        if not self.metadata["whole"]:
            raise ValueError("this compiled sampler has no text encoders: give a TextCondition")
        if self._tokenizers is None:
            self._tokenizers = self._load_tokenizers()
        prompts = [text] if isinstance(text, str) else list(text)
        return self._runtime.encode(self._tokenizers.tokenize(prompts))

    def _load_tokenizers(self) -> TextEncoder:
        own = "|".join(SUBFOLDERS[name][1] for name in self.encoders)
        with tempfile.TemporaryDirectory() as folder:
            for name in self.metadata["tokenizers"]:
                if not re.fullmatch(rf"({own})/\w[\w.-]*", name):
                    raise ValueError(f"the compiled sampler names no tokenizer's file: {name!r}")
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(self._runtime.section(name))
            folders = {name: Path(folder, SUBFOLDERS[name][1]) for name in self.encoders}
            return TextEncoder.tokenizers_alone(folders)

    @property
    def encoders(self) -> list[str]:
        return self.metadata["model"]["encoders"]


class CompiledPipeline:
    """A compiled sampler, called as a GenTronPipeline is.

    folder: the pipeline folder with the text encoders and the VAE, for a file that has none;
    ValueError where they are others than those the file was made for.
    """

    def __init__(
        self, sampler: CompiledSampler, folder: Path | None, device: torch.device | str = "cpu"
    ):
        self.sampler, self.text_encoder, self.vae = sampler, None, None
        if folder is not None:
            wanted = sampler.metadata["parts"]
            for part, digest in part_digests(folder, wanted).items():
                if digest != wanted[part]:
                    raise ValueError(
                        f"{folder / part} is not what the compiled sampler was made for: "
                        "wanted the pipeline folder that it was exported from"
                    )
            dtype = getattr(torch, sampler.metadata["dtype"])
            folders = {
                name: tuple(folder / part for part in SUBFOLDERS[name]) for name in sampler.encoders
            }
            self.text_encoder = TextEncoder.from_pretrained(**folders, dtype=dtype).to(device)
            self.vae = VideoVAE.from_pretrained(folder / "vae", dtype).to(device)

    @torch.no_grad()
    def __call__(
        self,
        prompts: list[str],
        *,
        negative_prompt: str | None = None,
        frames: int | None = None,
        size: Sequence[int] | None = None,
        lambda_t: float | None = None,
        lambda_m: float | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
        seed: Sequence[int] | int = 0,
        callback_on_step_end: Callable[[int, int, Tensor | None], None] | None = None,
        **fixed,
    ) -> CompiledOutput:
        """`GenTronPipeline.__call__`; `fixed`, such as steps, is what the file has decided. The
        callback gets None for the latents."""
        metadata = self.sampler.metadata
        timesteps = metadata["timesteps"]
        scales = {
            name: guidance_schedule(
                metadata[name] if scale is None else scale, len(timesteps), *guidance_range
            )
            for name, scale in (("lambda_t", lambda_t), ("lambda_m", lambda_m))
        }

        def step_done(step: int) -> None:
            if callback_on_step_end is not None:
                callback_on_step_end(step, timesteps[step], None)

        if self.text_encoder is None:
            text, negative = prompts, negative_prompt or None
        else:
            text = self.text_encoder.encode(prompts)
            negative = self.text_encoder.encode([negative_prompt]) if negative_prompt else None
        output = self.sampler(
            text,
            negative=negative,
            seed=seed,
            frames=frames,
            size=size,
            on_step=step_done,
            **scales,
        )
        if self.vae is None:
            return output
        pixels = self.vae.decode(output.latents.to(self.vae.dtype))
        return output._replace(frames=to_frames(pixels).cpu())


def export_sampler(
    path: str | os.PathLike,
    model: GenTron,
    null_text: TextCondition,
    scheduler: dict,
    *,
    frames: int,
    latent_size: tuple[int, int],
    steps: int = 50,
    solver: str = "dpm++",
    eta: float = 0.0,
    lambda_t: float = 7.5,
    lambda_m: float = 1.2,
    max_batch: int = MAX_BATCH,
    max_tokens: dict[str, int] | None = None,
    factor: int | None = None,
    whole: tuple[TextEncoder, VideoVAE] | None = None,
    parts: dict[str, str] | None = None,
    on_graph: Callable[[str], None] | None = None,
) -> None:
    """Compile the guided sampling of clips of one shape, for the model's device and dtype.

    null_text: the encoded empty prompt; latent_size (h, w); max_tokens: the longest text by
    encoder, 77 of CLIP and 256 of T5 unless told otherwise, at least 8; factor: pixels per latent
    along each side (the model's pixels_per_latent); whole: the text encoder and the VAE, on the
    same device; parts: the `part_digests` of those that a file without them needs. on_graph is told
    the name of each graph before it is compiled. The file is written aside and renamed. ValueError
    for what does not fit.
    """
    config, weight = model.config, model.patch_embed.weight
    if not 1 <= frames <= MAX_FRAMES or (frames > 1 and not config.temporal):
        raise ValueError(f"frames must be 1, or up to {MAX_FRAMES} of a video model, got {frames}")
    if any(side < 1 or side % config.patch_size for side in latent_size):
        raise ValueError(f"latent size {latent_size} must divide by the patch {config.patch_size}")
    if max_batch < 2:
        raise ValueError(f"the most clips at once must be 2 or more, got {max_batch}")
    if weight.device.type == "cpu" and not launch.cpu_library():
        raise ValueError("the C++ operators are not built: python setup.py build_ext --inplace")
    table = make_table(solver, scheduler, steps, eta)
    shape = (config.in_channels, frames, *latent_size)
    tensors = _file_tensors(model, null_text)
    max_tokens = {name: (max_tokens or MAX_TOKENS)[name] for name in config.encoders}
    most = max(max_batch, 3)  # of the graphs, whose examples are 3 clips; the runtime takes fewer
    graphs = list(_sampling_graphs(model, shape, table, most, max_tokens))
    factor = factor or config.pixels_per_latent
    metadata = {
        "frames": [frames],
        "size": [side * factor for side in latent_size],
        "latent_shape": list(shape),
        "has_motion": config.temporal and frames > 1,
        "branches": _branch_sets(config.temporal and frames > 1),
        "max_batch": max_batch,
        "max_tokens": max_tokens,
        "modulation_bytes": MODULATION_BYTES,
        "solver": solver,
        "eta": eta,
        "lambda_t": lambda_t,
        "lambda_m": lambda_m,
        "timesteps": table.timesteps.tolist(),
        "rows": table.rows.tolist(),
        "log_variance": table.log_variance.tolist() if _learns_range(model, table) else None,
        "model": config.to_dict(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "whole": whole is not None,
        "parts": parts or {},
    } | _machine(weight.device)
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        folder = Path(folder)
        sections = {}
        if whole is not None:
            text_encoder, vae = whole
            graphs += _whole_graphs(text_encoder, vae, shape, most, max_tokens)
            metadata["vocabulary"] = {
                name: text_encoder.encoders[name].get_input_embeddings().num_embeddings
                for name in config.encoders
            }
            for prefix, part in (("text_encoder", text_encoder), ("vae", vae)):
                tensors |= {f"{prefix}.{name}": p for name, p in part.named_parameters()}
            for name in config.encoders:
                text_encoder.save_tokenizer(name, target := folder / SUBFOLDERS[name][1])
                sections |= {f"{target.name}/{file.name}": file for file in target.iterdir()}
            metadata["tokenizers"] = list(sections)
        used = {name for graph in graphs for name in graph.weights.values()}
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in tensors.items()
            if name in used or name.startswith(("blocks.", "null."))
        }
        save_file(tensors, folder / WEIGHTS)
        metadata["graphs"] = {
            graph.name: {"weights": list(graph.weights.values()), "per_block": graph.per_block}
            for graph in graphs
        }
        _compile_all(graphs, folder, on_graph)
        sections |= {f"graphs/{graph.name}": folder / f"{graph.name}.pt2" for graph in graphs}
        sections |= {WEIGHTS: folder / WEIGHTS}
        _write_package(folder / "package", metadata, sections)
        os.replace(folder / "package", path)


def part_digests(folder: Path, parts: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of configuration and weights of parts of a pipeline folder, such as vae."""
    digests = {}
    for part in parts:
        paths = [*(folder / part).glob("config.json"), *(folder / part).glob("*.safetensors")]
        if not paths:
            raise FileNotFoundError(f"no {part} in {folder}: it has no config.json and no weights")
        digest = hashlib.sha256()
        for path in sorted(paths):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        digests[part] = digest.hexdigest()
    return digests


def _write_package(path: Path, metadata: dict, sections: dict[str, Path]) -> None:
    entries, offset = {}, 0
    for name, source in sections.items():
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[name] = {"offset": offset, "size": source.stat().st_size, "sha256": digest}
        offset += entries[name]["size"]
    header = json.dumps({"metadata": metadata, "sections": entries}).encode()
    with path.open("wb") as out:
        out.write(MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest())
        out.write(header)
        for source in sections.values():
            with source.open("rb") as file:
                shutil.copyfileobj(file, out)


def _machine(device: torch.device) -> dict:
    """What the code runs on: the runtime refuses another."""
    info = Path("/proc/cpuinfo")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else ()
    return {
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "device": device.type,
        "machine": platform.machine(),
        "cpu_flags": _cpu_flags(info.read_text() if info.exists() else ""),
        "capability": ".".join(map(str, capability)),
    }


def _cpu_flags(info: str) -> list[str]:
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE)
    return sorted(filter(CPU_FLAGS.match, flags[1].split() if flags else []))


def _file_tensors(model: GenTron, null_text: TextCondition) -> dict[str, Tensor]:
    """The model's weights, what is made of them ahead, and the null text."""
    tensors = dict(model.named_parameters())
    for index, block in enumerate(model.blocks):
        if block.temporal_attention is not None:
            tensors["temporal_positions"] = block.temporal_attention.positions
            names = f"blocks.{index}.merged_weight", f"blocks.{index}.merged_bias"
            tensors |= dict(zip(names, block.temporal_attention.merged(), strict=True))
    for name in model.config.encoders:
        parts = getattr(null_text, name)._asdict().items()
        tensors |= {f"null.{name}.{part}": t for part, t in parts if t is not None}
    return tensors


def _learns_range(model: GenTron, table: SolverTable) -> bool:
    return table.log_variance is not None and model.config.learned_range


def _branch_sets(has_motion: bool) -> list[str]:
    """The branches that a compiled step may run, ε(∅,∅), ε(∅,c_M), ε(c_T,c_M), fewest first."""
    return ["001", "011", "111"] if has_motion else ["001", "101"]


class _Method(nn.Module):
    """A function of a module as the forward of a module, for functional_call."""

    def __init__(self, module: nn.Module, run: Callable):
        super().__init__()
        self.module, self.run = module, run

    def forward(self, *inputs):
        return self.run(self.module, *inputs)


class _WithWeights(nn.Module):
    """forward(inputs, weights). The module is hidden: torch.export would keep its parameters, and
    as inputs they are one copy for all graphs, and one graph serves every block."""

    def __init__(self, module: nn.Module, run: Callable, names: list[str]):
        super().__init__()
        self._hidden = (_Method(module, run),)
        self._names = [f"module.{name}" for name in names]

    def forward(self, inputs, weights):
        named = dict(zip(self._names, weights, strict=True))
        return torch.func.functional_call(self._hidden[0], named, inputs)


class _Graph(NamedTuple):
    """A function of tensors and of a module's weights, to be compiled.

    run(module, *inputs); dims: the dynamic dimensions of each input; weights: the tensors of the
    module that it reads, with their names in the file, "*" standing for the block's number.
    """

    name: str
    module: nn.Module
    run: Callable
    inputs: tuple[Tensor, ...]
    dims: tuple[dict, ...]
    weights: dict[str, str]

    @property
    def per_block(self) -> bool:
        return any("*" in name for name in self.weights.values())

    def compile(self, path: Path) -> None:
        """Through torch.export and AOTInductor into a .pt2 file."""
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        weights = tuple(tensors[name].detach() for name in self.weights)
        with torch.no_grad():
            program = torch.export.export(
                _WithWeights(self.module, self.run, list(self.weights)),
                # Clones: torch.export takes two inputs that are one tensor for one input.
                (tuple(tensor.clone() for tensor in self.inputs), weights),
                dynamic_shapes=(self.dims, (None,) * len(weights)),
            )
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _compile_all(graphs: list[_Graph], folder: Path, on_graph: Callable | None) -> None:
    """Compile every graph to folder/NAME.pt2, for the CPU in as many processes as it has cores:
    nearly all of the time is the C++ compiler's."""
    is_cpu = graphs[0].inputs[0].device.type == "cpu"
    jobs = min(len(os.sched_getaffinity(0)), 8, len(graphs)) if is_cpu else 1
    if jobs == 1:
        _compile_share(graphs, folder, on_graph)
        return
    fork = multiprocessing.get_context("fork")
    shares = [
        fork.Process(target=_forked_share, args=(graphs[i::jobs], folder, on_graph))
        for i in range(jobs)
    ]
    try:
        with warnings.catch_warnings(action="ignore"):  # of threads, which the shares leave alone
            for share in shares:
                share.start()
        for share in shares:
            share.join()
    finally:
        for share in shares:
            if share.pid is not None:
                share.kill()
                share.join()
    missing = [graph.name for graph in graphs if not (folder / f"{graph.name}.pt2").exists()]
    if missing:
        raise ValueError(f"the compilation of {missing[0]} failed; its error is above")


def _forked_share(*share) -> None:
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interrupt, signal.SIG_DFL)  # the parent tells, and cleans up
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    _compile_share(*share)


def _compile_share(graphs: list[_Graph], folder: Path, on_graph: Callable | None) -> None:
    from torch._inductor import config

    options = {}
    if graphs[0].inputs[0].device.type == "cpu":
        # The code takes as many threads as there are where it runs; the number makes it parallel.
        threads_there = max(2, len(os.sched_getaffinity(0)))
        options = {"cpp.threads": threads_there, "cpp.dynamic_threads": True, "compile_threads": 1}
    with config.patch(options), warnings.catch_warnings(action="ignore"):
        for graph in graphs:
            if on_graph is not None:
                on_graph(graph.name)
            graph.compile(folder / f"{graph.name}.pt2")


class _BlockWithMerged(nn.Module):
    """A block and its temporal layer's merged projections, which are made ahead."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        if block.temporal_attention is not None:
            weight, bias = block.temporal_attention.merged()
            self.register_buffer("merged_weight", weight)
            self.register_buffer("merged_bias", bias)

    def motion_free(self, count: int) -> LeadingMotionFree | None:
        if self.block.temporal_attention is None:
            return None
        return LeadingMotionFree(count, (self.merged_weight, self.merged_bias))

    def weights(self) -> dict[str, str]:
        """As `_Graph` takes them; the modulation and the context are made by other graphs."""
        names = {
            f"block.{name}": f"blocks.*.{name}"
            for name, _ in self.block.named_parameters()
            if not name.startswith(("adaln.", "cross_attention.kv."))
        }
        if self.block.temporal_attention is not None:
            names |= {f"merged_{part}": f"blocks.*.merged_{part}" for part in ("weight", "bias")}
            names["block.temporal_attention.positions"] = "temporal_positions"
        return names


def _named(module: nn.Module, prefixes: str | tuple[str, ...] = "", file: str = "") -> dict:
    """The parameters below the prefixes, as `_Graph.weights`; `file` comes before their names."""
    names = [name for name, _ in module.named_parameters() if name.startswith(prefixes)]
    return {name: file + name for name in names}


def _condition(model: GenTron, timesteps: Tensor, *pooled: Tensor, pixels: tuple[int, int]):
    """Timesteps (R,), pooled texts (R, P) → the condition c (R, D), final rows (R, 2, D)."""
    encoders = model.config.encoders if pooled else ()
    text = {name: EncodedText(None, None, own) for name, own in zip(encoders, pooled, strict=True)}
    size = None
    if model.config.size_embedding:
        size = torch.tensor(pixels, device=timesteps.device).expand(timesteps.shape[0], 2)
    c, time = model.condition(timesteps, TextCondition(**text), size)
    return c, model.final.modulation(c, time)


def _modulation(block: nn.Module, c: Tensor) -> tuple[Tensor]:
    return (block.modulation(c),)


def _embed(model: GenTron, latents: Tensor) -> tuple[Tensor]:
    return (model.embed(latents.to(model.patch_embed.weight.dtype)),)


def _caption(mlp: nn.Module, tokens: Tensor) -> tuple[Tensor]:
    return (mlp(tokens),)


def _fold(block: nn.Module, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return tuple(block.cross_attention.fold(tokens, mask)[:3])


def _project(block: nn.Module, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in block.cross_attention.project(tokens, mask)[:2])


def _block(module: _BlockWithMerged, x, y, gate, modulation, *contexts, branches: str, form: str):
    """One block of a step. contexts: the null text's, folded, where one of its branches runs, then
    the text's in its form; none without cross-attention."""
    block, nulls = module.block, branches.count("1") - 1
    batch = x.shape[0] // (nulls + 1)
    context = None
    if contexts:
        out_bias = block.cross_attention.out.bias
        own = contexts[-3:]
        context = FoldedContext(*own, out_bias) if form == "folded" else CrossContext(*own)
        if nulls:
            null_context = FoldedContext(*contexts[:3], out_bias)
            context = BranchContexts((nulls * batch, batch), (null_context, context))
    motion_free = module.motion_free(batch if branches[0] == "1" else 0)
    x, y, gate = block(x, y, gate, modulation, context, motion_free)
    return x, y, gate.contiguous()


def _step(model, x, y, gate, final_rows, latents, weights, row, x0, *rest, branches, draws):
    """The final layer, guidance and the solver's update. rest: the noise, where the solver draws
    any, and the bounds (2,) of a learned range."""
    prediction = model.unpatchify(model.final(x, y, gate, final_rows), *latents.shape[-2:])
    runs = iter(prediction.split([latents.shape[0]] * branches.count("1")))
    predictions = [next(runs) if needed == "1" else None for needed in branches]
    d, channels = None, latents.shape[1]
    if len(rest) > draws:
        variance = _last_used(predictions, weights)[:, channels:].float()
        d = torch.exp(0.5 * learned_range_log_variance(variance, *rest[-1].unbind()))
    predictions = [p if p is None else p[:, :channels] for p in predictions]
    return guided_step(latents, predictions, weights, row, x0, rest[0] if draws else None, d)


def _last_used(predictions: list[Tensor | None], weights: Tensor) -> Tensor:
    """The last prediction that some clip gives a weight, whose variance the pipeline takes."""
    last = None
    for prediction, used in zip(predictions, (weights != 0).any(0).unbind(), strict=True):
        if prediction is not None:
            last = prediction if last is None else torch.where(used, prediction, last)
    return last


def _encode(text_encoder: TextEncoder, *ids_and_masks: Tensor, encoders: Sequence[str]):
    pairs = zip(ids_and_masks[::2], ids_and_masks[1::2], strict=True)
    text = text_encoder(dict(zip(encoders, pairs, strict=True)))
    return tuple(part for name in encoders for part in getattr(text, name)[::2])


def _decode(vae: VideoVAE, latents: Tensor) -> tuple[Tensor]:
    """One clip's latents (1, C, T, h, w) → frames (T, H, W, 3) uint8."""
    return (to_frames(vae.decode(latents.to(vae.dtype)))[0].contiguous(),)


def _sampling_graphs(
    model: GenTron,
    shape: tuple[int, ...],
    table: SolverTable,
    max_batch: int,
    max_tokens: dict[str, int],
) -> Iterator[_Graph]:
    """The graphs that sample latents of `shape` (C, T, h, w)."""
    Dim = torch.export.Dim
    config, weight, blocks = model.config, model.patch_embed.weight, model.blocks
    batch, rows = Dim("batch", min=1, max=max_batch), Dim("rows", min=2, max=1 << 24)
    b, s, r = 3, 5, 7  # of the examples

    def some(*sizes: int, dtype: torch.dtype = weight.dtype) -> Tensor:
        return torch.ones(sizes, dtype=dtype, device=weight.device)

    pooled = config.encoders if config.pooled_text else ()
    inputs = some(r, dtype=torch.int64), *(some(r, config.text_width(name)) for name in pooled)
    pixels = tuple(side * config.pixels_per_latent for side in shape[2:])
    yield _Graph(
        *("condition", model, functools.partial(_condition, pixels=pixels)),
        *(inputs, ({0: rows},) * len(inputs)),
        _named(model, ("time_embed", "size_embed", "pooled_embed", "final.adaln", "final.table")),
    )
    inputs, names = (some(r, config.width),), _named(blocks[0], "adaln", "blocks.*.")
    yield _Graph("modulation", blocks[0], _modulation, inputs, ({0: rows},), names)
    latents = some(b, *shape, dtype=torch.float32)
    names = _named(model, "patch_embed")
    yield _Graph("embed", model, _embed, (latents,), ({0: batch},), names)

    encoders = config.encoders if config.cross_attention else ()
    longest = max((max_tokens[name] for name in encoders), default=0)
    forms = ["folded", "projected"][: 1 + (longest >= config.head_size)] if encoders else [""]
    length = {0: batch, 1: Dim("length", min=2, max=longest)} if encoders else {}
    widths = {config.text_width(name): i for i, name in enumerate(encoders)}
    if config.caption_projection:
        for name in encoders:
            mlp, tokens = model.caption_projection[name], some(b, s, config.text_width(name))
            names = _named(mlp, file=f"caption_projection.{name}.")
            yield _Graph(f"caption-{name}", mlp, _caption, (tokens,), (length,), names)
        widths = {config.width: 0}
    for wide, index in widths.items() if encoders else ():  # encoders of one width share graphs
        inputs, block = (some(b, s, wide), some(b, s, dtype=torch.bool)), blocks[index]
        names = _named(block, "cross_attention", "blocks.*.")
        yield _Graph(f"fold-{wide}", block, _fold, inputs, (length, length), names)
        if "projected" in forms:
            names = _named(block, "cross_attention.kv", "blocks.*.")
            yield _Graph(f"project-{wide}", block, _project, inputs, (length, length), names)

    module, heads, width = _BlockWithMerged(blocks[0]), config.heads, config.width
    patches = shape[2] * shape[3] // config.patch_size**2
    for branches in _branch_sets(config.temporal and shape[1] > 1):
        k = branches.count("1")
        stream, all_rows = some(k * b, shape[1], patches, width), {0: k * batch if k > 1 else batch}
        stack = stream, stream, some(k * b, width)
        for form in forms:
            inputs, dims = [*stack, some(k * b, 6, width)], [all_rows] * 4
            if form and k > 1:
                own = Dim("null_length", min=2, max=longest)
                inputs += _folded_example(some, 1, s, heads, width)
                dims += [{1: heads * own}] * 3
            if form:
                own = length[1]
                if form == "folded":
                    inputs += _folded_example(some, b, s + 1, heads, width)
                    dims += [{0: batch, 1: heads * own}] * 3
                else:
                    keys = some(b, s + 1, heads, config.head_size)
                    inputs += [keys, keys, some(b, s + 1, dtype=torch.bool)]
                    dims += [{0: batch, 1: own}] * 3
            name = "-".join(filter(None, ("block", branches, form)))
            run = functools.partial(_block, branches=branches, form=form)
            yield _Graph(name, module, run, tuple(inputs), tuple(dims), module.weights())

        draws = bool((table.rows[:, -1] != 0).any())
        inputs = [*stack, some(k * b, 2, width), latents]
        inputs += [some(b, 3, dtype=torch.float64), some(6, dtype=torch.float64)]
        inputs += [latents] * (1 + draws)
        dims = [all_rows] * 4 + [{0: batch}] * 2 + [{}] + [{0: batch}] * (1 + draws)
        if _learns_range(model, table):
            inputs, dims = [*inputs, some(2, dtype=torch.float32)], [*dims, {}]
        run = functools.partial(_step, branches=branches, draws=draws)
        names = _named(model, "final.linear")
        yield _Graph(f"step-{branches}", model, run, tuple(inputs), tuple(dims), names)


def _folded_example(some: Callable, batch: int, length: int, heads: int, width: int) -> list:
    keys = some(batch, heads * length, width)
    return [keys, some(batch, heads * length), keys]


def _whole_graphs(
    text_encoder: TextEncoder,
    vae: VideoVAE,
    shape: tuple[int, ...],
    max_batch: int,
    max_tokens: dict[str, int],
) -> Iterator[_Graph]:
    """Token ids to text, and latents to frames."""
    Dim = torch.export.Dim
    device, batch = next(vae.parameters()).device, Dim("batch", min=1, max=max_batch)
    inputs, dims = [], []
    for name, most in max_tokens.items():
        length = Dim(f"{name}_length", min=2, max=most)
        ids = torch.ones(3, 5 + len(inputs), dtype=torch.int64, device=device)
        inputs += [ids, ids.bool()]
        dims += [{0: batch, 1: length}] * 2
    run = functools.partial(_encode, encoders=tuple(max_tokens))
    names = _named(text_encoder, file="text_encoder.")
    yield _Graph("encode", text_encoder, run, tuple(inputs), tuple(dims), names)
    latents = torch.ones(1, *shape, device=device)
    names = _named(vae, ("autoencoder.decoder", "autoencoder.post_quant_conv"), "vae.")
    yield _Graph("decode", vae, _decode, (latents,), ({},), names)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 after wrong input (told in one line), 130 after SIGINT."""
    argv = sys.argv[1:] if argv is None else argv
    interrupted = "interrupted; nothing was written"
    return run(NAME, lambda: export(_parse_arguments(argv)), argv, interrupted, (RuntimeError,))


def export(args: argparse.Namespace) -> None:
    """Load the pipeline and write the compiled sampler that the arguments ask for."""
    from gentron_fast.pipeline import ASSETS, GenTronPipeline

    silence_libraries()
    device = choose_device(args.device)
    check_writable(args.out.parent)
    if args.out.is_dir():
        raise ValueError(f"{args.out} is a folder, --out names a file")
    pipeline = GenTronPipeline.from_pretrained(args.pipeline, getattr(torch, args.dtype), device)
    frames = pipeline.default_frames if args.frames is None else args.frames
    size = pipeline.default_size if args.size is None else (args.size * 2)[:2]
    pipeline.vae.check_size(*size, pipeline.transformer.config.patch_size)
    dtype = pipeline.transformer.patch_embed.weight.dtype
    parts = [*(SUBFOLDERS[name][0] for name in pipeline.transformer.config.encoders), "vae"]
    export_sampler(
        args.out,
        pipeline.transformer,
        pipeline.text_encoder.encode([""]).to(device, dtype),
        pipeline.scheduler,
        frames=frames,
        latent_size=tuple(side // pipeline.vae.factor for side in size),
        steps=args.steps,
        solver=args.solver,
        eta=args.eta,
        lambda_t=args.lambda_t,
        lambda_m=args.lambda_m,
        max_batch=args.batch,
        factor=pipeline.vae.factor,
        whole=(pipeline.text_encoder, pipeline.vae) if args.whole else None,
        parts=part_digests(args.pipeline or ASSETS, parts),
        on_graph=(lambda name: print(f"compiling    {name}", flush=True)) if args.verbose else None,
    )
    with args.out.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"wrote        {args.out}, {args.out.stat().st_size / 2**20:.1f} MiB")
    print(f"sha256       {digest}")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=NAME, allow_abbrev=False)
    parser.format_help = lambda: HELP
    parser.error = refuse
    parser.add_argument("pipeline", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=whole_number(1, MAX_FRAMES))
    parser.add_argument("--size", type=whole_number(1), nargs="+")
    parser.add_argument("--steps", type=whole_number(1), default=50)
    parser.add_argument("--solver", default="dpm++")
    parser.add_argument("--eta", type=number, default=0.0)
    parser.add_argument("--lambda-t", type=number, default=7.5)
    parser.add_argument("--lambda-m", type=number, default=1.2)
    parser.add_argument("--batch", type=whole_number(2, 1024), default=MAX_BATCH)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_intermixed_args(argv)
    if args.size is not None and len(args.size) > 2:
        raise ValueError(f"--size takes a height and a width, got {len(args.size)} numbers")
    return args


if __name__ == "__main__":
    sys.exit(main())
