"""FLOPs of a guided step's blocks, with what the branches share done once and without."""

from gentron_fast.config import GenTronConfig
from gentron_fast.guidance.contexts import ConstantContext, FoldedContext
from gentron_fast.guidance.steps import Branches


def step_flops(
    config: GenTronConfig,
    latent_shape: tuple[int, int, int, int],
    branches: Branches,
    contexts: list[tuple],
    separate: bool = False,
) -> int:
    """FLOPs of the blocks in one step with these branches, for one sample.

    latent_shape (C, T, H, W); contexts: of each block the null text's and the text's. separate: as
    separate forwards, unpadded, the identity mask among them as a mask.
    """
    _, frames, height, width = latent_shape
    d, patches, count = config.width, height * width // config.patch_size**2, sum(branches)
    total = 0
    for null_context, text_context in contexts:
        texts = (branches[0] + branches[1], null_context), (branches[2], text_context)
        total += count * (8 * d + 4 * patches + int(4 * config.mlp_ratio * d))
        total += sum(n * _cross_flops(config, context, separate) for n, context in texts)
        if config.temporal:
            motion_free = count if frames == 1 else 0 if separate else int(branches[0])
            total += motion_free * (4 if separate else 2) * d
            total += (count - motion_free) * (8 * d + 4 * frames)
    return total * d * frames * patches


def _cross_flops(config: GenTronConfig, context, separate: bool) -> int:
    """FLOPs a token and channel of one cross-attention, in the context's form or as plain."""
    d = config.width
    if context is None:
        return 0
    if isinstance(context, ConstantContext):
        return 4 * d + 4 if separate else 0
    if isinstance(context, FoldedContext):
        rows = context.keys.shape[1]
        return 4 * d + 4 * rows // config.heads if separate else 4 * rows
    return 4 * d + 4 * context.k.shape[1]
