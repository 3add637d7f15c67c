"""PixArt-α and DiT checkpoints in, PixArt-α out."""

from gentron_fast.convert.pipelines import convert_dit, convert_pixart, export_diffusers, main

__all__ = ["convert_dit", "convert_pixart", "export_diffusers", "main"]
