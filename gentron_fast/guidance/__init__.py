"""Guidance: its definition, and the denoiser that shares the branches' work."""

from gentron_fast.guidance.definition import (
    check_rescale,
    guidance_schedule,
    guidance_weights,
    guided_prediction,
)
from gentron_fast.guidance.denoiser import GuidedDenoiser

__all__ = [
    "GuidedDenoiser",
    "check_rescale",
    "guidance_schedule",
    "guidance_weights",
    "guided_prediction",
]
