"""GenTron: the diffusion transformer, its text condition, and its file format."""

import inspect
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from gentron_fast.config import MAX_FRAMES, GenTronConfig
from gentron_fast.files import whole_file, write_json
from gentron_fast.layers import (
    Block,
    FinalLayer,
    GuidanceEmbedder,
    Mlp,
    SizeEmbedder,
    TemporalAttention,
    TimestepEmbedder,
    frame_numbers,
    patch_positions,
)
from gentron_fast.transfer import on_device
from gentron_fast.weights import find_weights

CONFIG_NAME = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
WEIGHTS_NAME = f"{WEIGHTS_STEM}.safetensors"
COMPILED_KINDS = 64  # of blocks, before torch.compile gives up


class EncodedText(NamedTuple):
    """One encoder's view of the text.

    tokens (B, S, W); mask (B, S) bool, True on real tokens, or None where all are; pooled (B, P) or
    None.
    """

    tokens: Tensor
    mask: Tensor | None
    pooled: Tensor | None = None

    def pad(self, length: int) -> "EncodedText":
        """The same text in `length` token places; the mask covers the new ones."""
        extra = length - self.tokens.shape[1]
        mask = self.mask
        if mask is None:
            mask = self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.bool)
        return self._replace(
            tokens=F.pad(self.tokens, (0, 0, 0, extra)), mask=F.pad(mask, (0, extra))
        )

    def trim(self) -> "EncodedText":
        """The same text without the token places that are padding in every row."""
        if self.mask is None:
            return self
        length = int(self.mask.sum(1).max())
        return self._replace(tokens=self.tokens[:, :length], mask=self.mask[:, :length])


class TextCondition(NamedTuple):
    """What the text encoders say of a batch of prompts; an encoder that is not used is None."""

    clip: EncodedText | None = None
    t5: EncodedText | None = None

    @property
    def batch(self) -> int:
        return next(encoded.tokens.shape[0] for encoded in self if encoded is not None)

    def map(self, function) -> "TextCondition":
        """Apply a function to every tensor."""
        return TextCondition(
            *(
                encoded and EncodedText(*(t if t is None else function(t) for t in encoded))
                for encoded in self
            )
        )

    def to(self, device=None, dtype=None) -> "TextCondition":
        """Move, and cast what is floating point; the masks stay bool."""

        def move(tensor: Tensor) -> Tensor:
            kind = dtype if tensor.is_floating_point() else None
            return tensor.to(kind) if device is None else on_device(tensor, device, kind)

        return self.map(move)

    def repeat(self, times: int) -> "TextCondition":
        """Each prompt `times` times in a row."""
        return self.map(lambda t: t.repeat_interleave(times, 0))

    def select(self, index) -> "TextCondition":
        """The prompts that an index, slice or bool mask of the batch picks."""
        return self.map(lambda t: t[index])

    def split(self) -> "list[TextCondition]":
        """Each prompt by itself, without padding, in memory of its own; `cat` joins them again."""
        ones = [self.select(slice(nth, nth + 1)) for nth in range(self.batch)]
        return [
            TextCondition(*(part and part.trim() for part in one)).map(torch.clone) for one in ones
        ]

    @staticmethod
    def cat(parts: "list[TextCondition]") -> "TextCondition":
        """One batch of several, texts padded to the longest."""
        return TextCondition(*(_cat_encoded(list(column)) for column in zip(*parts, strict=True)))


def _cat_encoded(parts: list[EncodedText | None]) -> EncodedText | None:
    if any(part is None for part in parts):
        if any(part is not None for part in parts):
            raise ValueError("text conditions of different encoders cannot be joined")
        return None
    length = max(part.tokens.shape[1] for part in parts)
    tokens, mask, pooled = zip(*(part.pad(length) for part in parts), strict=True)
    return EncodedText(
        torch.cat(tokens), torch.cat(mask), None if pooled[0] is None else torch.cat(pooled)
    )


class GenTron(nn.Module):
    """GenTron (CVPR 2024, arXiv 2312.04557): text-to-image, and text-to-video with `temporal`."""

    def __init__(self, config: GenTronConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.checkpoint_contexts = noop_context_fn  # may say what checkpointing keeps
        width = config.width
        self.patch_embed = nn.Linear(config.in_channels * config.patch_size**2, width)
        self.time_embed = TimestepEmbedder(width, config.timestep_cos_first)
        if config.size_embedding:
            self.size_embed = SizeEmbedder(width, config.timestep_cos_first)
        if config.guidance_embedding:
            self.guidance_embed = GuidanceEmbedder(width, config.timestep_cos_first)
        pooled = config.encoders if config.pooled_text else ()
        self.pooled_embed = nn.ModuleDict(
            {name: Mlp(w := config.text_width(name), w, width, nn.SiLU()) for name in pooled}
        )
        projected = config.encoders if config.caption_projection else ()
        self.caption_projection = nn.ModuleDict(
            {
                name: Mlp(config.text_width(name), width, width, nn.GELU(approximate="tanh"))
                for name in projected
            }
        )
        self.blocks = nn.ModuleList(
            Block(config, config.block_encoder(index)) for index in range(config.depth)
        )
        self.final = FinalLayer(config)
        self._initialise()

    def _initialise(self) -> None:
        """DiT's initialisation: xavier linears, zero where a branch must start as nothing."""
        if self.patch_embed.weight.is_meta:  # normal_ of nothing would import 400 modules of torch
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        zeroed = [self.final.linear]
        if not self.config.final_table:
            zeroed.append(self.final.adaln)
        if self.config.guidance_embedding:
            zeroed += [self.guidance_embed.text.mlp[2], self.guidance_embed.motion.mlp[2]]
        for block in self.blocks:
            zeroed.append(block.adaln)
            if block.encoder is not None:
                zeroed.append(block.cross_attention.out)
            if block.temporal_attention is not None:
                zeroed.append(block.temporal_attention.out)
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.config.final_table:
            nn.init.normal_(self.final.table, std=self.config.width**-0.5)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: TextCondition,
        motion_free: Tensor | bool | None = None,
        size: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise in the latents; with a guidance embedding, the guided noise.

        latents (B, C, T, H, W), an image is T = 1; timestep (B,) in 0 … 999, fractions allowed;
        text of B prompts, or of fewer, each for as many latents in a row; motion_free (B,) bool,
        True where the temporal mask is the identity, one bool for the whole batch, or None as
        False; size (B, 2) pixel height and width for models with a size embedding, taken from the
        latents when None; guidance (B, 2), λ_T and λ_M, for models with a guidance embedding.
        Returns (B, C, T, H, W), 2·C channels with learned-range variance.
        """
        self.check(latents, timestep, text, motion_free)
        self._check_guidance(guidance, len(latents))
        if size is None and self.config.size_embedding:
            size = self.pixel_size(latents)
        c, time = self.condition(timestep, text, size, guidance)
        text = self.project_captions(text)
        x, y, gate = self.embed(latents), None, None
        frames = frame_numbers(*x.shape[:2], x.device) if self.config.temporal else None
        for block in self.blocks:
            modulation, context = block.modulation(c), block.context(text)
            inputs = x, y, gate, modulation, context, motion_free, frames
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, y, gate = checkpoint(
                    block, *inputs, use_reentrant=False, context_fn=self.checkpoint_contexts
                )
            else:
                x, y, gate = block(*inputs)
        patches = self.final(x, y, gate, self.final.modulation(c, time))
        return self.unpatchify(patches, *latents.shape[-2:])

    def compile_blocks(self, **options) -> None:
        """torch.compile each block in place, with its options: blocks of one kind share one
        compilation."""
        # Kinds: first block or not, by encoder, by the branches that run, by the form of the text.
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options["recompile_limit"] = COMPILED_KINDS
        else:  # torch before 2.13 has one limit for the process
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, COMPILED_KINDS)
        for block in self.blocks:
            block.compile(fullgraph=True, **options)

    def pixel_size(self, latents: Tensor, device=None) -> Tensor:
        """Pixel height and width of every sample of latents (B, ..., H, W): (B, 2)."""
        # Filled there, not copied there.
        sides = [side * self.config.pixels_per_latent for side in latents.shape[-2:]]
        device = device or latents.device
        return torch.stack(
            [torch.full(latents.shape[:1], side, device=device) for side in sides], 1
        )

    def condition(
        self,
        timestep: Tensor,
        text: TextCondition,
        size: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The adaLN condition c = time + size + guidance + pooled text, and the part without text:
        (B, D).

        text of B prompts, or of fewer, as in `forward`; size (B, 2) in pixels and guidance (B, 2)
        for models that embed them.
        """
        time = self.time_embed(timestep)
        if self.config.size_embedding:
            time = time + self.size_embed(size)
        if self.config.guidance_embedding:
            time = time + self.guidance_embed(guidance)
        c = time
        for name, mlp in self.pooled_embed.items():
            pooled = mlp(getattr(text, name).pooled)
            # shape, not len: torch.export takes len for a constant.
            c = (c.view(pooled.shape[0], -1, c.shape[1]) + pooled[:, None]).flatten(0, 1)
        return c, time

    def project_captions(self, text: TextCondition) -> TextCondition:
        """Text tokens through the caption projection, where the model has one."""
        projected = {
            name: getattr(text, name)._replace(tokens=mlp(getattr(text, name).tokens))
            for name, mlp in self.caption_projection.items()
        }
        return text._replace(**projected)

    def embed(self, latents: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) → patches with their positions, (B, T, N, D).

        positions (N, D): what `positions` makes of the latents' shape, where it is at hand.
        """
        p = self.config.patch_size
        patches = rearrange(latents, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)
        if positions is None:
            positions = self.positions(*latents.shape[-2:])
        x = self.patch_embed(patches)
        return x + positions.to(x.dtype)

    def positions(self, height: int, width: int) -> Tensor:
        """Positions of the patches of height × width latents, (N, D) in the weights' dtype."""
        like, p = self.patch_embed.weight, self.config.patch_size
        return patch_positions(height // p, width // p, self.config, like.device).to(like.dtype)

    def unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """(B, T, N, p² · C) → (B, C, T, height, width); channels are the fastest, as in DiT."""
        p = self.config.patch_size
        return rearrange(
            patches, "b t (h w) (p q c) -> b c t (h p) (w q)", h=height // p, w=width // p, p=p, q=p
        )

    def check(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: TextCondition,
        motion_free: Tensor | bool | None = None,
    ) -> None:
        """ValueError, in one line, for what `forward` does not take."""
        if latents.ndim != 5 or latents.shape[1] != self.config.in_channels:
            raise ValueError(
                f"latents must be (B, {self.config.in_channels}, T, H, W), "
                f"got {tuple(latents.shape)}"
            )
        batch, _, frames, height, width = latents.shape
        p = self.config.patch_size
        if height % p or width % p:
            raise ValueError(f"latent size {height}×{width} does not divide by the patch size {p}")
        if not 1 <= frames <= MAX_FRAMES:
            raise ValueError(f"frames must be 1 … {MAX_FRAMES}, got {frames}")
        if timestep.shape != (batch,):
            raise ValueError(f"timestep must be ({batch},), got {tuple(timestep.shape)}")
        for name in self.config.encoders:
            if getattr(text, name) is None:
                raise ValueError(f"the model reads {name} text, and the condition has none")
        if batch % text.batch:
            raise ValueError(f"{text.batch} prompts for {batch} latents")
        if isinstance(motion_free, Tensor) and motion_free.shape != (batch,):
            raise ValueError(f"motion_free must be ({batch},), got {tuple(motion_free.shape)}")

    def _check_guidance(self, guidance: Tensor | None, batch: int) -> None:
        given = None if guidance is None else tuple(guidance.shape)
        wanted = (batch, 2) if self.config.guidance_embedding else None
        if given != wanted:
            wanted = f"guidance must be {wanted}" if wanted else "the model embeds no guidance"
            raise ValueError(f"{wanted}, got {given or 'none'}")

    @classmethod
    def from_teacher(cls, model: "GenTron") -> "GenTron":
        """A model that takes λ_T and λ_M as inputs, and starts as the text's branch of `model`.

        What is not the guidance embedding is copied; its last layers are zero (Meng et al. 2023,
        arXiv 2210.03142, section 3.1).
        """
        if model.config.guidance_embedding:
            raise ValueError("the model is distilled already: it takes guidance as an input")
        student = cls(replace(model.config, guidance_embedding=True)).to(model.patch_embed.weight)
        missing, _ = student.load_state_dict(model.state_dict(), strict=False)
        assert all(key.startswith("guidance_embed.") for key in missing)
        return student

    @classmethod
    def from_t2i(cls, model: "GenTron") -> "GenTron":
        """A T2V model that starts exactly as the T2I model on every frame (paper, section 3.3).

        Shared layers are copied; the temporal output projections are zero.
        """
        if model.config.temporal:
            raise ValueError("the model already has temporal layers")
        config = GenTronConfig.from_dict(model.config.to_dict() | {"temporal": True})
        video = cls(config).to(model.patch_embed.weight)
        missing, _ = video.load_state_dict(model.state_dict(), strict=False)
        assert all(".temporal_attention." in key for key in missing)
        return video

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json and the safetensors file, each aside and then renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "GenTron"} | self.config.to_dict()
        tensors = {key: tensor.contiguous() for key, tensor in self.state_dict().items()}
        with whole_file(folder / WEIGHTS_NAME) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
        write_json(folder / CONFIG_NAME, config)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, dtype: torch.dtype | None = None, device="cpu"
    ) -> "GenTron":
        """Read a folder that `save_pretrained` wrote; weights may be sharded with an index.

        dtype None keeps the stored one. FileNotFoundError for a missing file; ValueError for a
        missing, surplus or misshapen tensor (named, with both shapes) or a damaged file.
        """
        folder = Path(folder)
        config = GenTronConfig.read(folder / CONFIG_NAME)
        with torch.device("meta"):
            model = cls(config)
        tensors = _read_tensors(folder, model.state_dict(), dtype, device)
        model.load_state_dict(tensors, assign=True)
        for module in model.modules():
            if isinstance(module, TemporalAttention):
                module.positions = torch.empty_like(module.positions, device=device)
                module.reset_positions()
        return model.to(device, dtype or next(iter(tensors.values())).dtype).eval()


def _read_tensors(folder: Path, expected: dict[str, Tensor], dtype, device) -> dict[str, Tensor]:
    tensors = {}
    for path in find_weights(folder, (WEIGHTS_STEM,)):
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(key)
                    tensors[key] = tensor.to(dtype) if dtype else tensor
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    missing, surplus = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or surplus:
        raise ValueError(
            f"the tensors in {folder} do not fit its config.json: "
            f"missing {sorted(missing)[:4] or 'none'}, surplus {sorted(surplus)[:4] or 'none'}"
        )
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"tensor {key} in {folder} has shape {tuple(tensor.shape)}, "
                f"wanted {tuple(expected[key].shape)}"
            )
    return tensors
