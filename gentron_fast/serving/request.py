"""What a client asks for: one clip or image, with everything that it is sampled with."""

from dataclasses import dataclass

from gentron_fast import arguments
from gentron_fast.pipeline import GenTronPipeline, Sampling


@dataclass(frozen=True)
class Request:
    """One clip, or an image where frames is 1. What is None is the pipeline folder's own.

    prompt; negative_prompt, in the place of the null text; seed 0 … 2**64 - 1; steps; solver: ddpm,
    ddim, dpm++ or few-step, with eta, the noise of ddim; lambda_t, lambda_m: guidance of text and
    of motion, within guidance_range of the steps; rescale 0 … 1; frames; height and width in
    pixels, both or none. deadline: seconds from its submission within which the clip must be there,
    None for no limit. As in a call of the pipeline, which tells more of each.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    solver: str | None = None
    lambda_t: float | None = None
    lambda_m: float | None = None
    rescale: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    deadline: float | None = None
    guidance_range: tuple[float, float] = (0.0, 1.0)
    eta: float = 0.0

    def sampling(self, pipeline: GenTronPipeline) -> Sampling:
        """What the pipeline samples for it. ValueError, in one line, where it is wrong."""
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "prompt"):
                raise ValueError(f"{name} must be one text, got {value!r}")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height {self.height} and width {self.width}: give both or none")
        if self.deadline is not None and arguments.real("deadline", self.deadline) <= 0:
            raise ValueError(f"deadline must be more than 0 seconds, got {self.deadline}")
        for name in ("lambda_t", "lambda_m", "rescale"):
            if (value := getattr(self, name)) is not None:
                arguments.real(name, value)
        return pipeline.sampling(
            self.prompt,
            negative_prompt=self.negative_prompt,
            frames=self.frames,
            size=None if self.height is None else (self.height, self.width),
            steps=self.steps,
            solver=self.solver,
            lambda_t=self.lambda_t,
            lambda_m=self.lambda_m,
            rescale=self.rescale,
            guidance_range=self.guidance_range,
            eta=self.eta,
            seed=arguments.whole("seed", self.seed, 0, 2**64 - 1),
        )
