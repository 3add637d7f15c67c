"""The small world's evaluator: shape, colour, position and motion read back from pixels by rule.

A model's text alignment and motion become numbers:

    python -m gentron_train.shapes_score PIPELINE --prompts 200 --out score.json

Everything of the world but its objects is neutral, so chroma finds the object and hue names its
colour. Seen in polar coordinates about its own centre and in units of its own radius, a rotation is
a shift: one correlation along the angle compares the outline with each shape at every rotation, and
another compares frame with frame for the spin.

Measured, single objects (200 seen_prompts, eight frames), shape / motion / all in %, colour and
direction being 100 throughout: clean renders 100 / 100 / 100; mp4 with blur and watermark 98.5 /
99.5 / 98; that with a Gaussian blur of 1 pixel and noise 98.5 / 98.5 / 97, of 1.5 pixels 95.5 /
98.5 / 94, of 2 pixels 68 / 92.5 / 65. Training clips, a quarter of them with two objects, both to
be right: shape 97.3, motion 100, relation 100.
"""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gentron_fast.commandline import refuse, usable_device
from gentron_fast.files import write_json
from gentron_train.small_world.renderer import (
    COLOURS,
    DIRECTIONS,
    FPS,
    MOTIONS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    render_clip,
    render_frame,
    seen_prompts,
    unseen_prompts,
)

LEAST_CHROMA = 50.0  # of 255; paler pictures hold no object
LEAST_AREA = 24.0  # pixels
TRAVEL = 7.0  # pixels from the first frame to the last; the world's least is 14
RATIO = 1.27  # last radius / first; the world's least is 1.6
TURN = 0.05  # by how much a turned frame must match its successor better than an unturned one

_ANGLES = 72
_SIZES = np.array([5.5, 6.5, 8.0, 10.5, 13.5])  # radii of the templates, pixels
_RINGS = np.arange(0.15, 1.85, 0.1, dtype=np.float32)  # in radii of the circle of equal area


@dataclass(frozen=True)
class Reading:
    """One object as read from pixels; motion is None for a single frame."""

    shape: str
    colour: str
    position: tuple[float, float]  # mean centre (x, y) in pixels, the frame's corner is (0, 0)
    radius: float  # mean radius of the circle of equal area, pixels
    motion: str | None = None


def _hue(rgb):
    """Hue in degrees of (..., 3)."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return np.degrees(np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue))


_HUES = _hue(np.array(list(COLOURS.values()), dtype=np.float32))


def _neighbours(mask, steps, combine):
    """`combine` of each pixel of (T, H, W) with its neighbours up to `steps` away, both ways."""
    _, height, width = mask.shape
    padded = np.pad(mask, ((0, 0), (steps, steps), (steps, steps)))
    padded = functools.reduce(combine, [padded[:, i : i + height] for i in range(2 * steps + 1)])
    return functools.reduce(combine, [padded[:, :, i : i + width] for i in range(2 * steps + 1)])


def _soft(chroma, level):
    """Object mask 0..1 of `chroma`, which is `level` inside; half of that in stripes and dots."""
    return np.clip((chroma / level - 0.12) / 0.3, 0, 1)


def _component(mask):
    """Soft mask (T, H, W) without what does not touch the densest spot of its frame."""
    rows, columns = (np.flatnonzero(mask.any(axes)) for axes in ((0, 2), (0, 1)))
    box = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    part = mask[box]
    solid = part > 0.5
    density = _neighbours(part, 3, np.add) * solid
    grown = np.zeros_like(solid)
    frame = np.arange(len(part))
    grown.reshape(len(part), -1)[frame, density.reshape(len(part), -1).argmax(1)] = True
    size = 0
    while (count := int(grown.sum())) != size:
        size = count
        grown = _neighbours(grown, 2, np.logical_or) & solid
    result = np.zeros_like(mask)
    result[box] = part * _neighbours(grown, 1, np.logical_or)
    return result


def _polar(field, x, y, radius):
    """field (T, H, W) on rings about (x, y), bilinear, 0 outside: (T, rings, angles)."""
    _, height, width = field.shape
    theta = np.arange(_ANGLES, dtype=np.float32) * (2 * math.pi / _ANGLES)
    scale = (_RINGS * radius[:, None])[..., None]
    # Pixel centres lie at half integers; one pixel of border keeps the outside zero.
    u = np.clip(x[:, None, None] + scale * np.cos(theta) + 0.5, 0, width + 0.999)
    v = np.clip(y[:, None, None] + scale * np.sin(theta) + 0.5, 0, height + 0.999)
    padded = np.pad(field, ((0, 0), (1, 1), (1, 1)))
    padded = np.pad(padded, ((0, 0), (0, 1), (0, 1)))
    column, row = u.astype(np.int64), v.astype(np.int64)
    u, v = u - column, v - row
    frame = np.arange(len(field))[:, None, None]
    top = padded[frame, row, column] * (1 - u) + padded[frame, row, column + 1] * u
    bottom = padded[frame, row + 1, column] * (1 - u) + padded[frame, row + 1, column + 1] * u
    return top * (1 - v) + bottom * v


def _correlate(a, b):
    """Correlation (..., angles) of polar fields along the angle, rings weighted by their length.

    At index s, b is compared with a turned by s steps.
    """
    product = np.fft.rfft(b) * np.conj(np.fft.rfft(a)) * _RINGS[:, None]
    return np.fft.irfft(product, _ANGLES).sum(-2)


def _measure(mask):
    """Centre x, y and radius of each frame of a soft mask (T, H, W)."""
    area = np.maximum(mask.sum((1, 2)), 1e-6)
    x = (mask.sum(1) * (np.arange(mask.shape[2]) + 0.5)).sum(1) / area
    y = (mask.sum(2) * (np.arange(mask.shape[1]) + 0.5)).sum(1) / area
    return x, y, np.sqrt(area / math.pi)


def _outline(mask, x, y, radius):
    """The mask in polar coordinates, with mean 0 and norm 1 over the disc: (T, rings, angles)."""
    polar = _polar(mask, x, y, radius)
    weight = _RINGS[:, None] / (_RINGS.sum() * _ANGLES)
    polar = polar - (polar * weight).sum((1, 2), keepdims=True)
    norm = np.sqrt((polar**2 * _RINGS[:, None]).sum((1, 2), keepdims=True))
    return polar / np.maximum(norm, 1e-6)


def _top(values, count):
    """Mean of the `count` largest of some values."""
    count = min(count, values.size)
    return np.partition(values, -count)[-count:].mean()


def _find(frames):
    """Soft masks (T, H, W) of the one or two objects with their colours, the larger first."""
    chroma = (frames.max(-1) - frames.min(-1)).astype(np.float32)
    count = len(frames) * int(LEAST_AREA)
    strongest = _top(chroma.ravel(), count)
    if strongest < LEAST_CHROMA:
        return []
    coloured = chroma > 0.04 * strongest
    turn = _hue(frames[coloured].astype(np.float32))[:, None] - _HUES
    nearest = np.full(chroma.shape, -1)
    nearest[coloured] = np.abs((turn + 180) % 360 - 180).argmin(-1)
    strong = chroma > 0.3 * strongest
    votes = np.bincount(nearest[strong], chroma[strong], minlength=len(COLOURS))
    first, second = np.argsort(-votes)[:2]
    found = []
    for colour, other in ((first, second), (second, first)):
        if votes[colour] < 0.25 * votes[first]:
            continue
        # Strays in any other hue stay with the object that they touch.
        rival = other if votes[other] >= 0.25 * votes[first] else None
        own = chroma if rival is None else chroma * (nearest != rival)
        mask = _component(_soft(own, _top(chroma[nearest == colour], count)))
        if np.median(mask.sum((1, 2))) >= LEAST_AREA:
            found.append((list(COLOURS)[colour], mask))
    return found


@functools.cache
def _templates():
    """Outlines (sizes, blurs, shapes, rings, angles) of the shapes as the world renders them.

    Compression, a VAE and a diffusion model round notches and corners, hence the blurs.
    """
    outlines = []
    for radius in _SIZES:
        things = [Thing(shape, "red", "plain", None, 32, 32, radius) for shape in SHAPES]
        frames = np.stack([render_frame(Scene((t,), "black", "still")) for t in things])
        for blur in range(3):
            soft = _neighbours(frames[..., 0].astype(np.float32), blur, np.add)
            mask = _soft(soft, soft.max((1, 2), keepdims=True))
            outlines.append(_outline(mask, *_measure(mask)))
    return np.stack(outlines).reshape(len(_SIZES), -1, *outlines[0].shape)


def _shape(mask, x, y, radius):
    size = np.abs(_SIZES - radius[:, None]).argmin(1)
    own = _outline(mask, x, y, radius)
    match = _correlate(_templates()[size], own[:, None, None]).max(-1)  # (T, blurs, shapes)
    return SHAPES[match.mean(0).max(0).argmax()]


def _slope(values):
    """Change from the first frame to the last by a straight-line fit."""
    time = np.arange(len(values)) - (len(values) - 1) / 2
    return float((time * values).sum() / (time**2).sum() * (len(values) - 1))


def _spins(frames, mask, x, y, radius):
    """Whether turning each frame by one common angle matches it better to a later one."""
    light = frames.astype(np.float32).mean(-1)
    mean = (light * mask).sum((1, 2)) / mask.sum((1, 2))
    texture = (light - mean[:, None, None]) / np.maximum(mean[:, None, None], 20) * mask
    lag = max(1, round((len(frames) - 1) / 7))
    total, energy = 0.0, 0.0
    for field in (mask, texture):
        polar = _polar(field, x, y, radius)
        polar = polar - polar.mean(-1, keepdims=True)
        total = total + _correlate(polar[:-lag], polar[lag:]).sum(0)
        power = (polar**2 * _RINGS[:, None]).sum((1, 2))
        energy = energy + np.sqrt(power[:-lag] * power[lag:]).sum()
    steps = np.arange(_ANGLES // 8 + 1)  # up to 45 degrees either way
    total = np.concatenate([total[-steps[:0:-1]], total[steps]])
    best = total.argmax() - steps[-1]
    still = total[steps[-1]]
    disc = (_RINGS.sum() * _ANGLES) * (len(frames) - lag)
    return abs(best) >= 2 and total.max() - still > TURN * energy and energy > 0.01 * disc


def _motion(frames, mask, x, y, radius):
    across, along, growth = _slope(x), _slope(y), _slope(np.log(radius))
    travel, change = math.hypot(across, along) / TRAVEL, abs(growth) / math.log(RATIO)
    if travel >= max(1, change):
        if abs(across) > abs(along):
            return "right" if across > 0 else "left"
        return "down" if along > 0 else "up"
    if change >= 1:
        return "growing" if growth > 0 else "shrinking"
    return "spinning" if _spins(frames, mask, x, y, radius) else "still"


def read_objects(frames: np.ndarray) -> list[Reading]:
    """The objects (at most two, of different colours, the larger first) in uint8 (T, H, W, 3)."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, must be uint8 (T, H, W, 3)")
    readings = []
    for colour, mask in _find(frames):
        full = mask.sum((1, 2)) >= LEAST_AREA / 2
        seen, mask = frames[full], mask[full]
        x, y, radius = _measure(mask)
        motion = _motion(seen, mask, x, y, radius) if len(seen) > 1 else None
        shape = _shape(mask, x, y, radius)
        position = float(x.mean()), float(y.mean())
        readings.append(Reading(shape, colour, position, float(radius.mean()), motion))
    return readings


def read_clip(frames: np.ndarray) -> Reading | None:
    """The larger object in uint8 (T, H, W, 3), or None where there is none."""
    return next(iter(read_objects(frames)), None)


def read_image(frame: np.ndarray) -> Reading | None:
    """The larger object in uint8 (H, W, 3), or None where there is none."""
    return read_clip(np.asarray(frame)[None])


def read_relation(first: Reading, second: Reading) -> str:
    """Where the first object lies, seen from the second: a key of RELATIONS."""
    dx, dy = (a - b for a, b in zip(first.position, second.position, strict=True))
    side = (int(math.copysign(1, dx)), 0) if abs(dx) > abs(dy) else (0, int(math.copysign(1, dy)))
    return next(name for name, direction in RELATIONS.items() if direction == side)


def judge(frames: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Whether uint8 (T, H, W, 3) is right in colour and shape; motion if T > 1; relation if two.

    An object is looked for by its colour. Where that is missing the larger one answers for it.
    """
    readings = read_objects(frames)
    by_colour = {reading.colour: reading for reading in readings}
    if len(scene.objects) == 1:
        by_colour = {reading.colour: reading for reading in readings[:1]}
    pairs = [(o, by_colour.get(o.colour, readings[0] if readings else None)) for o in scene.objects]
    right = {
        "colour": all(o.colour in by_colour for o in scene.objects),
        "shape": all(r is not None and r.shape == o.shape for o, r in pairs),
    }
    if len(frames) > 1:
        right["motion"] = all(r is not None and r.motion == scene.motion for _, r in pairs)
    if scene.relation:
        right["relation"] = (
            right["colour"] and read_relation(*(r for _, r in pairs)) == scene.relation
        )
    return right


def score(clips: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares of clips, uint8 (T, H, W, 3), that are right in colour, shape, motion, and all.

    "direction" is motion over the left, right, up and down scenes only, "motion NAME" over one
    class. Images (T = 1) have no motion. A share over no clips at all is absent.
    """
    if len(clips) != len(scenes) or not len(clips):
        raise ValueError(
            f"{len(clips)} clips and {len(scenes)} scenes, must be as many, at least 1"
        )
    shares: dict[str, list[bool]] = {}
    for clip, scene in zip(clips, scenes, strict=True):
        right = judge(clip, scene)
        right["all"] = all(right.values())
        if "motion" in right:
            right[f"motion {scene.motion}"] = right["motion"]
            if scene.motion in DIRECTIONS:
                right["direction"] = right["motion"]
        for name, value in right.items():
            shares.setdefault(name, []).append(value)
    classes = [f"motion {motion}" for motion in MOTIONS]
    order = ["colour", "shape", "motion", "direction", "relation", "all", *classes]
    return {name: float(np.mean(shares[name])) for name in order if name in shares}


def evaluate(
    pipeline, prompts: int = 200, seed: int = 0, batch: int = 16, progress: bool = True, **options
) -> dict[str, dict[str, float]]:
    """Scores of a GenTronPipeline on `prompts` seen and as many unseen prompts.

    Prompt k is sampled with seed + k; `options` go to the pipeline's call. A model without temporal
    layers makes images.
    """
    from tqdm import tqdm

    if prompts < 1 or batch < 1:
        raise ValueError(f"prompts is {prompts} and batch {batch}, must be at least 1")
    scores = {}
    for name, draw in (("seen", seen_prompts), ("unseen", unseen_prompts)):
        texts, scenes = zip(*draw(prompts, seed), strict=True)
        clips = []
        with tqdm(total=prompts, desc=name, unit="prompt", disable=not progress) as bar:
            for start in range(0, prompts, batch):
                part = list(texts[start : start + batch])
                seeds = [seed + start + k for k in range(len(part))]
                clips.extend(pipeline(part, seed=seeds, progress=False, **options).frames)
                bar.update(len(part))
        scores[name] = score(clips, scenes)
    return scores


def ceiling(pipeline, prompts: int = 200, seed: int = 0) -> dict[str, dict[str, float]]:
    """Scores of the prompts' own clean renders, encoded and decoded by the pipeline's VAE.

    No sample can score better than its autoencoder lets it.
    """
    import torch
    from tqdm import tqdm

    scores = {}
    for name, draw in (("seen", seen_prompts), ("unseen", unseen_prompts)):
        scenes = [scene for _, scene in draw(prompts, seed)]
        clips = []
        for scene in tqdm(scenes, desc=name, unit="clip"):
            frames = torch.from_numpy(render_clip(scene)[:: FPS // 4][: pipeline.default_frames])
            pixels = frames.permute(3, 0, 1, 2)[None].to(pipeline.device) / 127.5 - 1
            with torch.no_grad():
                pixels = pipeline.vae.decode(pipeline.vae.encode(pixels)[0])[0]
            frames = ((pixels.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255)
            clips.append(frames.byte().cpu().numpy())
        scores[name] = score(clips, scenes)
    return scores


def format_table(scores: dict[str, dict[str, float]]) -> str:
    """The scores of `evaluate` in per cent, one line a figure."""
    names = list(dict.fromkeys(name for column in scores.values() for name in column))
    lines = [" " * 18 + "".join(f"{title:>9}" for title in scores)]
    for name in names:
        shares = (column.get(name) for column in scores.values())
        cells = ("-" if share is None else f"{100 * share:.1f}" for share in shares)
        lines.append(f"{name:18}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 2 after wrong input, which is told in one line."""
    parser = argparse.ArgumentParser(
        prog="gentron_train.shapes_score", description="Score a pipeline in the small world."
    )
    parser.error = refuse
    parser.add_argument("pipeline", nargs="?", help="pipeline folder (the model that ships)")
    parser.add_argument("--prompts", type=int, default=200, help="seen, and as many unseen (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, help="frames a clip (the pipeline's)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", help="(the pipeline's)")
    parser.add_argument("--lambda-t", type=float, help="(the pipeline's)")
    parser.add_argument("--lambda-m", type=float, help="(the pipeline's)")
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument(
        "--ceiling", action="store_true", help="score its VAE on clean clips, and sample nothing"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    try:
        args = parser.parse_args(argv)
        if args.out and not args.out.absolute().parent.is_dir():
            raise ValueError(f"no folder {args.out.parent} for {args.out.name}")
        if args.prompts < 1 or args.batch < 1:
            raise ValueError("--prompts and --batch must be at least 1")
        if args.pipeline and not Path(args.pipeline).is_dir():
            raise ValueError(f"no pipeline folder {args.pipeline}")

        from gentron_fast import GenTronPipeline

        pipeline = GenTronPipeline.from_pretrained(args.pipeline, device=args.device)
        options = {"frames": args.frames, "steps": args.steps}
        for name in ("solver", "lambda_t", "lambda_m"):
            given = getattr(args, name)
            options[name] = getattr(pipeline.defaults, name) if given is None else given
        if args.ceiling:
            scores = ceiling(pipeline, args.prompts, args.seed)
        else:
            scores = evaluate(pipeline, args.prompts, args.seed, args.batch, **options)
        print(format_table(scores))
        if args.out:
            settings = {"prompts": args.prompts, "seed": args.seed, **options}
            write_json(args.out, {"settings": settings, "scores": scores})
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
