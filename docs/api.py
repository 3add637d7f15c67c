"""Write docs/api.md, the public interface, from the docstrings: python docs/api.py (make api)."""

from pathlib import Path

import griffe
from griffe2md import render_object_docs

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/api.md"
INTRODUCTION = """\
# Public interface

Written by `make api` from the docstrings; a test holds it against the code.

What may be relied on: the names on this page, the command lines (`--help` of each), the files that
they write, and the keys of a model's state dict. A change to any of them is in
[CHANGELOG.md](../CHANGELOG.md), and what an older version wrote is still read. Everything else may
change without notice. Shapes: B batch, C channels, T frames, H × W latents or pixels, N tokens, D
width.
"""
# Title → objects, with the members that are shown; of a function, none.
SECTIONS = {
    "Model: `gentron_fast`": {
        "gentron_fast.config.GenTronConfig": ["head_size", "text_width", "block_encoder"],
        "gentron_fast.config.PRESETS": [],
        "gentron_fast.model.GenTron": ["forward", "from_pretrained", "save_pretrained", "from_t2i"],
        "gentron_fast.model.TextCondition": [],
        "gentron_fast.model.EncodedText": [],
    },
    "Sampling: `gentron_fast`": {
        "gentron_fast.pipeline.GenTronPipeline": [
            *("from_pretrained", "__call__", "encode_ahead", "to", "enable_offload"),
            "save_pretrained",
        ],
        "gentron_fast.pipeline.PipelineOutput": [],
        "gentron_fast.compiled.sampler.CompiledSampler": ["load", "__call__"],
    },
    "Guidance: `gentron_fast.guidance`": {
        "gentron_fast.guidance.definition.guided_prediction": [],
        "gentron_fast.guidance.definition.guidance_weights": [],
        "gentron_fast.guidance.definition.guidance_schedule": [],
        "gentron_fast.guidance.denoiser.GuidedDenoiser": ["step", "branches"],
        "gentron_fast.guidance.batch.GuidedBatch": ["step"],
        "gentron_fast.guidance.contexts.PreparedText": ["of"],
        "gentron_fast.guidance.shared.SharedWork": [],
    },
    "Serving: `gentron_fast.serving`": {
        "gentron_fast.serving.request.Request": [],
        "gentron_fast.serving.scheduler.Scheduler": ["submit", "stats", "close"],
        "gentron_fast.serving.job.Job": ["cancel", "result", "add_done_callback"],
        "gentron_fast.serving.scheduler.QueueFull": [],
        "gentron_fast.serving.scheduler.SchedulerClosed": [],
        "gentron_fast.serving.job.DeadlinePassed": [],
    },
    "Noise and solvers: `gentron_fast.diffusion`, `gentron_fast.solvers`": {
        "gentron_fast.diffusion.NoiseSchedule": [],
        "gentron_fast.diffusion.portable_noise": [],
        "gentron_fast.solvers.make_table": [],
        "gentron_fast.solvers.solver_step": [],
    },
    "Operators: `gentron_kernels`": {
        "gentron_kernels.layernorm_modulate.layernorm_modulate": [],
        "gentron_kernels.layernorm_modulate.residual_layernorm_modulate": [],
        "gentron_kernels.temporal_attention.temporal_attention": [],
        "gentron_kernels.temporal_attention.temporal_values": [],
        "gentron_kernels.guided_step.guided_step": [],
        "gentron_kernels.attention.attention": [],
        "gentron_kernels.spatial_attention.spatial_attention": [],
        "gentron_kernels.linear.linear": [],
    },
    "Conversion: `gentron_fast.convert`": {
        "gentron_fast.convert.pipelines.convert_pixart": [],
        "gentron_fast.convert.pipelines.convert_dit": [],
        "gentron_fast.convert.pipelines.export_diffusers": [],
    },
}
FOLDERS = {"gentron_fast": "gentron_fast", "gentron_kernels": "kernels"}
OPTIONS = {
    "heading_level": 3,
    "merge_init_into_class": True,
    "show_root_full_path": False,
    "show_object_full_path": False,
    "show_signature_annotations": False,
    "separate_signature": True,
    "show_bases": False,
    "summary": False,
    "line_length": 100,
}


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, objects in SECTIONS.items():
        parts.append(f"## {title}\n")
        for path, members in objects.items():
            rendered = render_object_docs(
                _definition(path), OPTIONS | {"members": members or False}
            )
            parts.append(rendered.strip() + "\n")
    return "\n".join(parts)


def _definition(path: str):
    """What stands at a dotted path, read from the sources and not imported."""
    package, *modules, name = path.split(".")
    file = ROOT.joinpath(FOLDERS[package], *modules).with_suffix(".py")
    return griffe.visit(".".join([package, *modules]), filepath=file, code=file.read_text())[name]


if __name__ == "__main__":
    PAGE.write_text(page())
