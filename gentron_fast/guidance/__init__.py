"""Guidance: its definition, the denoiser that shares the branches' work, and many of them."""

from gentron_fast.guidance.batch import GuidedBatch
from gentron_fast.guidance.contexts import PreparedText
from gentron_fast.guidance.definition import (
    check_one_branch,
    check_rescale,
    guidance_schedule,
    guidance_weights,
    guided_prediction,
)
from gentron_fast.guidance.denoiser import GuidedDenoiser
from gentron_fast.guidance.shared import SharedWork

__all__ = [
    "GuidedBatch",
    "GuidedDenoiser",
    "PreparedText",
    "SharedWork",
    "check_one_branch",
    "check_rescale",
    "guidance_schedule",
    "guidance_weights",
    "guided_prediction",
]
