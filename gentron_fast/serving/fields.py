"""The fields of a request, OpenAI's and ours beside them: checked one by one, and made complete."""

import json
import re
import secrets
from dataclasses import dataclass, replace

from gentron_fast.config import DEFAULTS_SCHEMA, SamplingDefaults
from gentron_fast.schema import FLAG, TEXT, Kind, check, one_of, real, text, whole
from gentron_fast.serving.request import Request
from gentron_fast.solvers import SOLVERS

MOST_IMAGES = 10  # of one request, as OpenAI has it
IMAGE_FORMATS = ("png", "jpeg", "webp")
# Fields of OpenAI that say nothing to this model: they are taken, so that its clients need no
# change, and make no difference.
UNUSED = {
    "video": ("user", "safety_identifier"),
    "image": ("user", "safety_identifier", "quality", "style", "moderation", "complexity"),
}


class WrongField(ValueError):
    """A field is not as wanted; name: which, None where it is all of them together."""

    def __init__(self, name: str | None, message: str):
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for: frames, steps, pixels of a side, letters of a prompt,
    bytes of a body, and images, which must have room in the queue."""

    frames: int
    steps: int
    side: int
    prompt: int = 2000
    body: int = 2**16
    images: int = MOST_IMAGES


@dataclass(frozen=True)
class ServedModel:
    """What the fields that a request leaves out are filled with. size: height, width in pixels;
    distilled: it takes no negative prompt and no rescale."""

    name: str
    makes_video: bool
    frames: int
    size: tuple[int, int]
    defaults: SamplingDefaults
    distilled: bool = False

    @classmethod
    def of(cls, name: str, pipeline) -> "ServedModel":
        config, size = pipeline.transformer.config, tuple(pipeline.default_size)
        own = pipeline.default_frames, size, pipeline.defaults
        return cls(name, config.temporal, *own, config.guidance_embedding)


@dataclass(frozen=True)
class Wanted:
    """A checked request: what the scheduler takes, and the settings that make the same again.

    images: how many, of the seeds from the request's on; form: how they are sent.
    """

    request: Request
    settings: dict
    images: int = 1
    form: dict | None = None

    def requests(self) -> list[Request]:
        seed = self.request.seed
        return [replace(self.request, seed=seed + number) for number in range(self.images)]


def read_json_fields(body: bytes) -> dict:
    """The fields of a JSON body. WrongField where it is none."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WrongField(None, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise WrongField(None, f"the body must be a JSON object, it is a {kind}")
    return values


def read_form_fields(form: dict) -> dict:
    """The fields of a form, in which numbers are text too, and null is empty."""

    def value(name, given):
        if name not in NUMBERS or not isinstance(given, str):
            return given
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return given

    return {name: value(name, given) for name, given in form.items() if given != ""}


NUMBERS = ("seed", "steps", "lambda_t", "lambda_m", "rescale", "frames", "deadline")
NUMBERS += ("n", "output_compression", "stream", "partial_images")


def wanted_video(values: dict, model: ServedModel, limits: Limits, fps: int) -> Wanted:
    """One clip. WrongField, in one line, for the first field that is wrong."""
    if not model.makes_video:
        raise WrongField("model", f"{model.name} makes images: ask /v1/images/generations")
    schema = _schema(limits) | {"frames": whole(1, limits.frames), "seconds": SECONDS}
    values = _checked(values, schema, "video", model)
    frames = values.get("frames", model.frames)
    if "seconds" in values:
        asked = float(values["seconds"]) * fps
        if "frames" in values and asked != frames:
            raise WrongField("seconds", f"{values['seconds']} seconds are not {frames} frames")
        if not 1 <= asked <= limits.frames or asked % 1:
            most = f"{limits.frames / fps:g}, {limits.frames} frames at {fps} a second"
            raise WrongField("seconds", f"seconds is {values['seconds']}, wanted at most {most}")
        frames = int(asked)
    return Wanted(*_complete(values, model, limits, frames))


def wanted_images(values: dict, model: ServedModel, limits: Limits) -> Wanted:
    """Images. WrongField, in one line, for the first field that is wrong."""
    schema = _schema(limits) | {
        "n": whole(1, limits.images),
        "response_format": one_of("b64_json", "url"),
        "output_format": one_of(*IMAGE_FORMATS),
        "output_compression": whole(0, 100),
        "background": one_of("auto", "opaque"),
        "stream": FLAG,
        "partial_images": whole(0, 3),  # how many at most: none is sent
    }
    values = _checked(values, schema, "image", model)
    form = {
        "output_format": values.get("output_format", IMAGE_FORMATS[0]),
        "output_compression": values.get("output_compression", 100),
        "response_format": values.get("response_format", "b64_json"),
        "stream": values.get("stream", False),
    }
    images = values.get("n", 1)
    request, settings = _complete(values, model, limits, 1)
    if request.seed + images > 2**64:
        raise WrongField("seed", f"seed {request.seed} with n {images} goes beyond 2**64 - 1")
    return Wanted(request, settings, images, form)


SECONDS = Kind(
    "a number of seconds",
    lambda value: type(value) in (int, float) or bool(re.fullmatch(r"\d{1,4}(\.\d+)?", str(value))),
)


def _schema(limits: Limits) -> dict[str, Kind]:
    """Of what clips and images have in common."""
    numbers = {
        name: DEFAULTS_SCHEMA[f"default_{name}"] for name in ("lambda_t", "lambda_m", "rescale")
    }
    return numbers | {
        "prompt": text(1, limits.prompt),
        "negative_prompt": text(0, limits.prompt),
        "model": TEXT,
        "size": TEXT,
        "seed": whole(0, 2**64 - 1),
        "steps": whole(1, limits.steps),
        "solver": one_of(*SOLVERS),
        "deadline": real(0.001, 1e6),
    }


def _checked(values: dict, schema: dict[str, Kind], kind: str, model: ServedModel) -> dict:
    """The fields that are given, each as the schema has it; null is not given."""
    values = {name: value for name, value in values.items() if value is not None}
    for name, value in values.items():
        if name not in schema and name not in UNUSED[kind]:
            known = ", ".join([*schema, *UNUSED[kind]])
            raise WrongField(name, f"there is no field {name[:64]!r} here; wanted some of {known}")
        try:
            check({name: value}, schema)
        except ValueError as error:
            raise WrongField(name, str(error)) from None
    if not values.get("prompt", "").strip():
        raise WrongField("prompt", "a prompt is needed: the field prompt is missing or empty")
    if values.get("model", model.name) != model.name:
        raise WrongField("model", f"there is no model {values['model'][:64]!r}, only {model.name}")
    return values


def _complete(
    values: dict, model: ServedModel, limits: Limits, frames: int
) -> tuple[Request, dict]:
    """The request, and its settings with nothing left out."""
    height, width = model.size
    if values.get("size", "auto") != "auto":
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", values["size"])
        width, height = map(int, found.groups()) if found else (0, 0)
        if not (1 <= width <= limits.side and 1 <= height <= limits.side):
            raise WrongField(
                "size",
                f"size is {values['size'][:64]!r}, wanted WIDTHxHEIGHT, each at most {limits.side}",
            )
    if frames > 1 and (height % 2 or width % 2):
        raise WrongField("size", f"size is {width}x{height}, a clip takes even sides")
    defaults = model.defaults
    sampled = {
        "seed": values.get("seed", secrets.randbelow(2**32)),
        **{name: values.get(name, getattr(defaults, name)) for name in vars(defaults)},
        "frames": frames,
        "negative_prompt": values.get("negative_prompt"),
    }
    request = Request(
        prompt=values["prompt"],
        height=height,
        width=width,
        deadline=values.get("deadline"),
        **sampled,
    )
    return request, sampled | {"size": f"{width}x{height}"}
