"""Compiled samplers: one file that samples, with or without Python."""

from gentron_fast.compiled.exporter import export_sampler
from gentron_fast.compiled.sampler import CompiledOutput, CompiledPipeline, CompiledSampler

__all__ = ["CompiledOutput", "CompiledPipeline", "CompiledSampler", "export_sampler"]
