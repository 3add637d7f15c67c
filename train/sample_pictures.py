"""Pictures of fixed prompts, drawn while a model trains, as its pipeline will sample by default."""

import numpy as np
import torch
from torch import Tensor

from gentron_fast.diffusion import portable_noise
from gentron_fast.generate import read_prompts_file
from gentron_fast.guidance import guided_prediction
from gentron_fast.media import contact_sheet
from gentron_fast.solvers import make_table, solver_step
from gentron_fast.text import TextEncoder
from gentron_fast.vae import VideoVAE, check_finite, to_frames
from gentron_train.assembly import gather_persistent
from gentron_train.settings import Settings
from gentron_train.teacher import exported_defaults, exported_scheduler

PROMPTS = ("a red circle moving left", "a large blue star", "a green square above a yellow cross")


class SamplePictures:
    """A row a prompt, as the weights of a step draw it."""

    def __init__(
        self,
        settings: Settings,
        shape: tuple[int, int, int, int],
        text_encoder: TextEncoder | None,
        frozen: bool,
        device: torch.device,
    ):
        """shape: latents (C, T, h, w); frozen: the text encoder is no part of the engine."""
        self.settings, self.shape, self.device = settings, shape, device
        self.text_encoder, self.frozen = text_encoder, frozen

    @property
    def possible(self) -> bool:
        """Text encoders and autoencoder are there, which precomputed data needs not."""
        return self.text_encoder is not None and (self.settings.vae / "config.json").exists()

    @torch.no_grad()
    def latents(self, engine) -> Tensor:
        """(B, C, T, h, w) of the prompts; collective, for ZeRO-3 shares the weights out."""
        settings = self.settings
        prompts = PROMPTS if settings.prompts is None else read_prompts_file(settings.prompts)
        count = len(prompts)
        texts = [self.text_encoder.tokenize(list(part)) for part in (prompts, [""] * count)]
        if self.frozen:
            texts = [self.text_encoder(tokens) for tokens in texts]
        state = torch.get_rng_state()
        engine.eval()
        gather_persistent(engine)
        defaults = exported_defaults(settings)
        table = make_table(defaults.solver, exported_scheduler(settings), defaults.steps)
        seeds = [settings.seed + row for row in range(count)]
        x, x0 = portable_noise(self.shape, seeds, 0).to(self.device), None
        timesteps = table.timesteps.to(self.device)
        for step, (row, timestep) in enumerate(zip(table.rows, timesteps, strict=True)):
            eps = guided_prediction(
                *(engine.module, x, timestep.expand(count), *texts),
                *(defaults.lambda_t, defaults.lambda_m, defaults.rescale),
            )
            draws = row[-1] != 0
            noise = portable_noise(self.shape, seeds, step + 1).to(self.device) if draws else None
            x, x0 = solver_step(row, x, eps[:, : self.shape[0]], x0, noise)
        engine.train()
        torch.set_rng_state(state)
        return x

    @torch.no_grad()
    def picture(self, latents: Tensor) -> np.ndarray:
        """One picture, uint8 (H, W, 3), of latents (B, C, T, h, w); ValueError where they, or the
        pixels, are not finite."""
        check_finite(latents, "the latents are")
        vae = VideoVAE.from_pretrained(self.settings.vae).to(self.device)
        pixels = vae.decode(latents, clamp=False)
        check_finite(pixels, "the pixels are")
        return contact_sheet(list(to_frames(pixels).cpu()))
