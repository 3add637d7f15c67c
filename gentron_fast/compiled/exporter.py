"""`export_sampler`: the guided sampling of one shape, compiled into one file."""

# Shapes: B clips, C channels, T frames, h × w latents.

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gentron_fast.compiled.compilation import check_temporary_folder, check_toolkit, compile_all
from gentron_fast.compiled.graphs import branch_sets, learns_range, sampling_graphs, whole_graphs
from gentron_fast.compiled.package import WEIGHTS, describe_machine, write_package
from gentron_fast.config import LEARNT, MAX_FRAMES, SamplingDefaults
from gentron_fast.files import scratch_folder, whole_file
from gentron_fast.guidance.contexts import merged_values
from gentron_fast.guidance.definition import check_rescale, guidance_coefficients
from gentron_fast.guidance.steps import modulation_chunk, modulation_row_bytes
from gentron_fast.model import GenTron, TextCondition
from gentron_fast.solvers import make_table
from gentron_fast.text import MAX_TOKENS, SUBFOLDERS, TextEncoder
from gentron_fast.vae import VideoVAE
from gentron_kernels import launch

MAX_BATCH = 16
MOST_BATCH = 1024  # csrc/runtime/metadata.cpp takes no more


def export_sampler(
    path: str | os.PathLike,
    model: GenTron,
    null_text: TextCondition | None,
    scheduler: dict,
    *,
    frames: int,
    latent_size: tuple[int, int],
    steps: int = SamplingDefaults.steps,
    solver: str = SamplingDefaults.solver,
    eta: float = 0.0,
    lambda_t: float = SamplingDefaults.lambda_t,
    lambda_m: float = SamplingDefaults.lambda_m,
    rescale: float = SamplingDefaults.rescale,
    max_batch: int = MAX_BATCH,
    max_tokens: dict[str, int] | None = None,
    factor: int | None = None,
    whole: tuple[TextEncoder, VideoVAE] | None = None,
    parts: dict[str, str] | None = None,
    learnt: Mapping[str, Sequence[float]] | None = None,
    on_graph: Callable[[str], None] | None = None,
) -> None:
    """Compile the guided sampling of clips of one shape, for the model's device and dtype.

    null_text: the encoded empty prompt, None for a distilled model; latent_size (h, w); max_tokens:
    the longest text by encoder, 77 of CLIP and 256 of T5 unless told otherwise, at least 8; factor:
    pixels per latent along each side (the model's pixels_per_latent); whole: the text encoder and
    the VAE, on the same device; parts: the `part_digests` of those that a file without them needs;
    learnt: of a distilled model the lowest and highest lambda_t and lambda_m of its training.
    on_graph is told the name of each graph before it is compiled. The file is written aside and
    renamed. ValueError for what does not fit.
    """
    config, weight = model.config, model.patch_embed.weight
    check_temporary_folder()
    check_toolkit(weight.device)
    if not 1 <= frames <= MAX_FRAMES or (frames > 1 and not config.temporal):
        raise ValueError(f"frames must be 1, or up to {MAX_FRAMES} of a video model, got {frames}")
    if any(side < 1 or side % config.patch_size for side in latent_size):
        raise ValueError(f"latent size {latent_size} must divide by the patch {config.patch_size}")
    if not 2 <= max_batch <= MOST_BATCH:
        raise ValueError(f"the most clips at once must be 2 to {MOST_BATCH}, got {max_batch}")
    if weight.device.type == "cpu" and not launch.cpu_library():
        raise ValueError("the C++ operators are not built: python setup.py build_ext --inplace")
    check_rescale(torch.tensor(rescale), config.guidance_embedding)
    table = make_table(solver, scheduler, steps, eta)
    shape = (config.in_channels, frames, *latent_size)
    tensors = _file_tensors(model, null_text)
    max_tokens = {name: (max_tokens or MAX_TOKENS)[name] for name in config.encoders}
    most = max(max_batch, 3)  # of the graphs, whose examples are 3 clips; the runtime takes fewer
    graphs = list(sampling_graphs(model, shape, table, most, max_tokens))
    factor = factor or config.pixels_per_latent
    kind = config.temporal and frames > 1, config.guidance_embedding
    metadata = {
        "frames": [frames],
        "size": [side * factor for side in latent_size],
        "latent_shape": list(shape),
        "branches": branch_sets(*kind),
        "guidance_coefficients": guidance_coefficients(*kind),
        "max_batch": max_batch,
        "max_tokens": max_tokens,
        # Steps whose modulation rows are made at once, for 1, 2, … clips and the null text.
        "modulation_chunks": [
            modulation_chunk(modulation_row_bytes(config, weight.dtype), 1 + batch)
            for batch in range(1, max_batch + 1)
        ],
        "solver": solver,
        "eta": eta,
        "lambda_t": lambda_t,
        "lambda_m": lambda_m,
        "rescale": rescale,
        "timesteps": table.timesteps.tolist(),
        "rows": table.rows.tolist(),
        "log_variance": table.log_variance.tolist() if learns_range(model, table) else None,
        "model": config.to_dict(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "whole": whole is not None,
        "parts": parts or {},
    } | describe_machine(weight.device)
    metadata |= {LEARNT[name]: [list(ends)] for name, ends in (learnt or {}).items()}
    path = Path(path)
    with scratch_folder(path) as folder:
        sections = {}
        if whole is not None:
            text_encoder, vae = whole
            graphs += whole_graphs(text_encoder, vae, shape, most, max_tokens)
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
        metadata["graphs"] = {graph.name: graph.describe() for graph in graphs}
        compile_all(graphs, folder, on_graph)
        sections |= {f"graphs/{graph.name}": folder / f"{graph.name}.pt2" for graph in graphs}
        sections |= {WEIGHTS: folder / WEIGHTS}
        with whole_file(path) as partial:
            write_package(partial, metadata, sections)


def _file_tensors(model: GenTron, null_text: TextCondition | None) -> dict[str, Tensor]:
    """The model's weights, what is made of them ahead, and the null text."""
    tensors = dict(model.named_parameters())
    for index, block in enumerate(model.blocks):
        if block.temporal_attention is not None:
            tensors["temporal_positions"] = block.temporal_attention.positions
            names = f"blocks.{index}.merged_weight", f"blocks.{index}.merged_bias"
            tensors |= dict(zip(names, merged_values(block.temporal_attention), strict=True))
    for name in model.config.encoders if null_text is not None else ():
        parts = getattr(null_text, name)._asdict().items()
        tensors |= {f"null.{name}.{part}": t for part, t in parts if t is not None}
    return tensors
