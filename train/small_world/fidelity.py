"""How good a picture of the small world looks, apart from what was asked for.

PSNR of a clip against its own best scene: what the rules read in it (shape, colour, fill,
background), fitted frame by frame in place, radius and angle, and rendered. Steadiness: how much
place, radius and colour jump where the world moves evenly. And the Fréchet distance between clips
and real ones, in features of the scored pipeline's own encoder.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gentron_fast.intervals import median_interval
from gentron_fast.threads import available_cores
from gentron_train.small_world.reading import find_objects, match_outlines, measure
from gentron_train.small_world.renderer import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    paint,
    quiet_pool,
)

BROKEN = 15.0  # dB; a clip below it shows no scene of the world
HIGHEST = 60.0  # dB, of a clip that is its scene to the bit
GOOD = 26.0  # dB, from which on no second shape is tried
EACH = 40  # clips, below which no process more pays
TURNS = {"circle": 12, "square": 2, "triangle": 3, "star": 5, "cross": 2}  # starts of the angle

_STEPS = np.array([0.25, 0.25, 0.25, 0.05], dtype=np.float32)  # of x, y, radius, angle
_ROUNDS = 6


@dataclass(frozen=True)
class Fit:
    """The best scene of a clip.

    poses (objects, 4, T): x, y, radius in pixels and angle in radians of each object, frame by
    frame; psnr in dB, over all frames; colour (objects, T, 3), the clip's own mean colour where the
    fitted object is.
    """

    scene: Scene
    poses: np.ndarray
    psnr: float
    colour: np.ndarray

    def jitter(self) -> dict[str, float]:
        """What a steady clip has none of, of the first object: second differences of the place in
        pixels, and of the radius in % of it; the colour's deviation over the frames, of 255."""
        if not len(self.poses) or self.poses.shape[-1] < 3:
            return {}
        x, y, radius, _ = self.poses[0]
        jumps = np.hypot(np.diff(x, 2), np.diff(y, 2))
        return {
            "place": float(np.sqrt((jumps**2).mean())),
            "size": float(100 * np.sqrt((np.diff(radius, 2) ** 2).mean()) / radius.mean()),
            "colour": float(self.colour[0].std(0).mean()),
        }


def fit_scene(frames: np.ndarray) -> Fit:
    """The scene of the small world that comes closest to uint8 (T, 64, 64, 3)."""
    if frames.dtype != np.uint8 or frames.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, must be uint8 (T, 64, 64, 3)")
    found = find_objects(frames)
    target = frames.astype(np.float32)
    scene = _background(target, [mask for _, mask in found])
    fitted: list[tuple[Thing, np.ndarray]] = []
    for colour, mask in found:
        fitted.append(_fit_object(target, scene, fitted, colour, mask))
    if len(fitted) == 2:  # the first was fitted without the second
        thing, pose = fitted[0]
        fitted[0] = thing, _refine(target, scene, [*fitted[1:]], thing, pose)
    scene = replace(scene, objects=tuple(thing for thing, _ in fitted))
    poses = np.array([pose for _, pose in fitted]).reshape(len(fitted), 4, len(frames))
    painted = _paint(scene, fitted)
    error = ((np.clip(painted, 0, 255) - target) ** 2).mean()
    psnr = min(HIGHEST, 10 * math.log10(255**2 / max(error, 1e-9)))
    return Fit(scene, poses, psnr, np.array([_mean_colour(target, scene, f) for f in fitted]))


def fit_scenes(clips: Sequence[np.ndarray]) -> Iterator[Fit]:
    """`fit_scene` of each; of many, on all cores."""
    processes = min(available_cores(), len(clips) // EACH)
    if processes < 2:
        yield from map(fit_scene, clips)
        return
    with quiet_pool(processes) as pool:
        yield from pool.imap(fit_scene, clips, chunksize=4)


def _paint(scene, fitted) -> np.ndarray:
    things = tuple(thing for thing, _ in fitted)
    poses = [pose[:, :, None] for _, pose in fitted]
    count = poses[0].shape[1] if poses else 1
    return paint(replace(scene, objects=things), poses, (count, 1))


def _background(target, masks) -> Scene:
    """The background that comes closest to the pixels outside the objects."""
    free = np.ones(target.shape[:3], dtype=bool)
    for mask in masks:
        free &= mask < 0.02
    light = target.mean(-1)
    weight = free.sum(0).astype(np.float32)
    mean = (light * free).sum(0) / np.maximum(weight, 1)
    ramp = (np.arange(SIZE) + 0.5 - SIZE / 2) / SIZE
    plane = np.stack(np.broadcast_arrays(1.0, ramp, ramp[:, None]), -1).reshape(-1, 3)
    rooted = np.sqrt(weight).reshape(-1, 1)
    _, across, along = np.linalg.lstsq(plane * rooted, (mean.reshape(-1, 1) * rooted), None)[0]
    tilt = math.atan2(float(along[0]), float(across[0]))
    scenes = [Scene((), name, "still", None, tilt) for name in BACKGROUNDS]
    grounds = [paint(scene, [], (1, 1))[0, ..., 0] for scene in scenes]
    errors = [(weight * (ground - mean) ** 2).sum() for ground in grounds]
    return scenes[int(np.argmin(errors))]


def _fit_object(target, scene, others, colour, mask) -> tuple[Thing, np.ndarray]:
    """The object behind a soft mask, and its pose (4, T)."""
    x, y, radius = measure(mask)
    outlines = match_outlines(mask, x, y, radius)
    best = None
    for index in np.argsort(-outlines.match)[:2]:
        shape = SHAPES[index]
        for fill in FILLS:
            thing = Thing(shape, colour, fill, None, 0, 0, 0)
            start = np.stack([x, y, radius, outlines.angles[:, index]]).astype(np.float32)
            if fill != "plain":  # the outline leaves open how stripes and dots lie
                starts = np.repeat(start[None], TURNS[shape], 0)
                period = math.pi if shape in ("circle", "square", "cross") else 2 * math.pi
                starts[:, 3] += np.arange(TURNS[shape])[:, None] * (period / TURNS[shape])
                errors = np.stack([_errors(target, scene, others, thing, s) for s in starts])
                start = starts[errors.argmin(0), :, np.arange(len(target))].T
            pose = _refine(target, scene, others, thing, start)
            error = _errors(target, scene, others, thing, pose).mean()
            if best is None or error < best[0]:
                best = error, thing, pose
        if best[0] < 255**2 / 10 ** (GOOD / 10):
            break
    return best[1], best[2]


def _errors(target, scene, others, thing, pose) -> np.ndarray:
    """Mean squared error of each frame (T,)."""
    painted = _paint(scene, [*others, (thing, pose)])
    return ((painted - target) ** 2).mean((1, 2, 3))


def _refine(target, scene, others, thing, pose) -> np.ndarray:
    """The pose (4, T) that comes closest, by damped Gauss-Newton steps in every frame at once."""
    count = len(target)
    repeated = [(other, np.tile(own, 5)) for other, own in others]
    damping = np.full(count, 1e-2, dtype=np.float32)
    error = _errors(target, scene, others, thing, pose)
    for _ in range(_ROUNDS):
        moved = np.concatenate([pose, *(pose + step for step in np.diag(_STEPS)[..., None])], 1)
        painted = _paint(scene, [*repeated, (thing, moved)]).reshape(5, count, -1)
        slopes = (painted[1:] - painted[0]) / _STEPS[:, None, None]
        rest = target.reshape(count, -1) - painted[0]
        normal = np.einsum("itp,jtp->tij", slopes, slopes)
        pull = np.einsum("itp,tp->ti", slopes, rest)
        diagonal = np.einsum("tii->ti", normal)
        damped = normal + np.eye(4) * (damping[:, None] * diagonal + 1e-3)[:, None]
        step = np.linalg.solve(damped, pull[..., None])[..., 0].T
        step = np.clip(step, -8 * _STEPS[:, None], 8 * _STEPS[:, None])
        tried = pose + step.astype(np.float32)
        tried[:2] = np.clip(tried[:2], 0, SIZE)
        tried[2] = np.clip(tried[2], 3, SIZE / 2)
        new = _errors(target, scene, others, thing, tried)
        better = new < error
        pose, error = np.where(better, tried, pose), np.where(better, new, error)
        damping = np.where(better, damping * 0.3, damping * 10)
        if not better.any():
            break
    return pose


def _mean_colour(target, scene, fitted) -> np.ndarray:
    """The clip's mean colour in each frame where a fitted object is, (T, 3)."""
    thing, pose = fitted
    black = replace(scene, background="black")
    plain = replace(thing, fill="plain")
    lit = _paint(black, [(plain, pose)]).max(-1)
    cover = lit > 0.9 * max(COLOURS[thing.colour])
    weight = np.maximum(cover.sum((1, 2)), 1)[:, None]
    return (target * cover[..., None]).sum((1, 2)) / weight


def summarize(fits: Sequence[Fit]) -> dict[str, float]:
    """Of clips' fits: the median PSNR in dB with the ends of its 95 % interval, the share of broken
    clips, the median jitters."""
    psnr = np.array([fit.psnr for fit in fits])
    low, high = median_interval(psnr.tolist())
    figures = {"psnr": float(np.median(psnr)), "psnr low": low, "psnr high": high}
    figures["broken"] = float((psnr < BROKEN).mean())
    jitters = [jitter for fit in fits if (jitter := fit.jitter())]
    for name in jitters[0] if jitters else ():
        figures[f"{name} jitter"] = float(np.median([jitter[name] for jitter in jitters]))
    return figures


def features(clips: Sequence[np.ndarray], vae, batch: int = 64) -> np.ndarray:
    """Features (N, F) of clips, uint8 (T, 64, 64, 3), from the encoder of a VideoVAE: of the
    channels of its second stage the logarithms of their deviation over a frame and, where there are
    several frames, of their change from one to the next.

    Means would tell little but how bright the backgrounds are. Distances by different autoencoders
    are not to be compared.
    """
    import torch

    encoder = vae.autoencoder.encoder
    weight, rows = encoder.conv_in.weight, []
    with torch.no_grad():
        for start in range(0, len(clips), batch):
            frames = torch.from_numpy(np.stack(clips[start : start + batch])).to(weight.device)
            count, length = frames.shape[:2]
            pixels = frames.flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1
            seen = encoder.conv_in(pixels.to(weight.dtype))
            for stage in encoder.down_blocks[:2]:
                seen = stage(seen)
            seen = seen.unflatten(0, (count, length)).flatten(3)  # (N, T, C, places)
            parts = [seen.std(-1).mean(1)]
            if length > 1:
                parts.append(seen.diff(dim=1).abs().mean((1, 3)))
            rows.append(torch.cat(parts, 1).double().clamp(min=1e-3).log())
    return torch.cat(rows).cpu().numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between normal distributions fitted to features (N, F) and those of reference (M, F), all in
    deviations of the reference (Heusel et al. 2017, arXiv 1706.08500, eq. 6)."""
    a, b = a / b.std(0), b / b.std(0)
    means = [x.mean(0) for x in (a, b)]
    first, second = (np.cov(x, rowvar=False) for x in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    distance = ((means[0] - means[1]) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * shared
    return float(max(distance, 0.0))
