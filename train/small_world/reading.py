"""What is in a picture of the small world, by rule: shape, colour, position and motion from pixels.

Everything of the world but its objects is neutral, so chroma finds the object and hue names its
colour. Seen in polar coordinates about its own centre and in units of its own radius, a rotation is
a shift: one correlation along the angle compares the outline with each shape at every rotation, and
another compares frame with frame for the spin.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gentron_train.small_world.renderer import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    render_frame,
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


def measure(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre x, y and radius of the circle of equal area, in pixels, of a soft mask (T, H, W)."""
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


def find_objects(frames: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Colours and soft masks (T, H, W), 0 to 1, of the one or two objects, the larger first."""
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
            outlines.append(_outline(mask, *measure(mask)))
    return np.stack(outlines).reshape(len(_SIZES), -1, *outlines[0].shape)


class Outlines(NamedTuple):
    """How well each shape matches an object's outline: match (shapes,), and the angle (T, shapes)
    in radians at which it does best in each frame."""

    match: np.ndarray
    angles: np.ndarray


def match_outlines(mask: np.ndarray, x, y, radius) -> Outlines:
    """Of a soft mask (T, H, W) and its measures (T,)."""
    size = np.abs(_SIZES - radius[:, None]).argmin(1)
    own = _outline(mask, x, y, radius)
    match = _correlate(_templates()[size], own[:, None, None])  # (T, blurs, shapes, angles)
    best = match.max(-1).mean(0)
    blur = best.argmax(0)
    angles = match[:, blur, np.arange(len(SHAPES))].argmax(-1) * (2 * math.pi / _ANGLES)
    return Outlines(best.max(0), angles)


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
    for colour, mask in find_objects(frames):
        full = mask.sum((1, 2)) >= LEAST_AREA / 2
        seen, mask = frames[full], mask[full]
        x, y, radius = measure(mask)
        motion = _motion(seen, mask, x, y, radius) if len(seen) > 1 else None
        shape = SHAPES[match_outlines(mask, x, y, radius).match.argmax()]
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
