"""The small world's evaluator: text alignment and fidelity of a pipeline, by rule.

    python -m gentron_train.shapes_score PIPELINE --prompts 200 --out score.json

Alignment is what gentron_train.small_world.reading reads back from the pixels, fidelity what
gentron_train.small_world.fidelity measures, whatever was asked for.

Measured, single objects (200 seen_prompts, eight frames), shape / motion / all in %, colour and
direction being 100 throughout: clean renders 100 / 100 / 100; mp4 with blur and watermark 98.5 /
99.5 / 98; that with a Gaussian blur of 1 pixel and noise 98.5 / 98.5 / 97, of 1.5 pixels 95.5 /
98.5 / 94, of 2 pixels 68 / 92.5 / 65. Training clips, a quarter of them with two objects, both to
be right: shape 97.3, motion 100, relation 100.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from gentron_fast.intervals import wilson_interval
from gentron_train.small_world.fidelity import features, fit_scenes, frechet_distance, summarize
from gentron_train.small_world.reading import read_objects, read_relation
from gentron_train.small_world.renderer import (
    DIRECTIONS,
    FPS,
    MOTIONS,
    Scene,
    pair_prompts,
    render_clip,
    seen_prompts,
    unseen_prompts,
)

COLUMNS = {"seen": seen_prompts, "unseen": unseen_prompts, "pairs": pair_prompts}
SINGLE = ("seen", "unseen")  # columns of one object
PUBLISHED = {"prompts": 500, "seed": 0}  # of each column, what figures of what ships are of


@dataclass(frozen=True)
class Scores:
    """Of the clips of one kind of prompts.

    shares: those that are right, by name, and counts, of how many clips; fidelity:
    `fidelity.summarize`, and the Fréchet distance to real clips with that between real clips, its
    floor.
    """

    shares: dict[str, float]
    counts: dict[str, int]
    fidelity: dict[str, float]


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
    """Shares of the clips that are right, by the names of `rights_of`."""
    return {name: float(np.mean(values)) for name, values in rights_of(clips, scenes).items()}


def rights_of(clips: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, list[bool]]:
    """Which clips, uint8 (T, H, W, 3), are right in colour, shape, motion, and all.

    "direction" is motion over the left, right, up and down scenes only, "motion NAME" over one
    class. Images (T = 1) have no motion. What concerns no clip at all is absent.
    """
    if len(clips) != len(scenes) or not len(clips):
        raise ValueError(
            f"{len(clips)} clips and {len(scenes)} scenes, must be as many, at least 1"
        )
    rights: dict[str, list[bool]] = {}
    for clip, scene in zip(clips, scenes, strict=True):
        right = judge(clip, scene)
        right["all"] = all(right.values())
        if "motion" in right:
            right[f"motion {scene.motion}"] = right["motion"]
            if scene.motion in DIRECTIONS:
                right["direction"] = right["motion"]
        for name, value in right.items():
            rights.setdefault(name, []).append(bool(value))
    classes = [f"motion {motion}" for motion in MOTIONS]
    order = ["colour", "shape", "motion", "direction", "relation", "all", *classes]
    return {name: rights[name] for name in order if name in rights}


def evaluate(
    pipeline,
    prompts: int = 200,
    seed: int = 0,
    batch: int = 16,
    progress: bool = True,
    columns: Sequence[str] = tuple(COLUMNS),
    without: Collection[str] = (),
    **options,
) -> dict[str, Scores]:
    """Scores of a GenTronPipeline on `prompts` prompts of each column of COLUMNS.

    Prompt k is sampled with seed + k; captions of `without` are left out; `options` go to the
    pipeline's call. A model without temporal layers makes images.
    """
    from tqdm import tqdm

    if prompts < 1 or batch < 1:
        raise ValueError(f"prompts is {prompts} and batch {batch}, must be at least 1")
    scores = {}
    for name in columns:
        texts, scenes = zip(*drawn_prompts(name, prompts, seed, without), strict=True)
        clips = []
        with tqdm(total=prompts, desc=name, unit="prompt", disable=not progress) as bar:
            for start in range(0, prompts, batch):
                part = list(texts[start : start + batch])
                seeds = [seed + start + k for k in range(len(part))]
                output = pipeline(part, seed=seeds, progress=False, **options)
                clips.extend(np.asarray(output.frames))
                bar.update(len(part))
        real = [real_clips(name, prompts, seed + k, len(clips[0])) for k in (1, 2)]
        scores[name] = _scores(clips, scenes, real, pipeline.vae, progress)
    return scores


def drawn_prompts(
    column: str, count: int, seed: int, without: Collection[str] = ()
) -> list[tuple[str, Scene]]:
    """The first prompts of a column whose captions `without` lacks, and a scene of each. ValueError
    where hardly any are left."""
    drawn = COLUMNS[column](2 * count + len(without) if without else count, seed)
    left = [pair for pair in drawn if pair[0] not in without]
    if len(left) < count:
        raise ValueError(f"{len(left)} prompts of {column} are left, wanted {count}")
    return left[:count]


def published_prompts() -> set[str]:
    """The captions that figures of the model that ships are of: what is chosen for it, guidance or
    timesteps, is chosen on others."""
    drawn = (drawn_prompts(name, PUBLISHED["prompts"], PUBLISHED["seed"]) for name in SINGLE)
    return {text for text, _ in itertools.chain.from_iterable(drawn)}


def _scores(clips, scenes, real, vae, progress) -> Scores:
    from tqdm import tqdm

    rights = rights_of(clips, scenes)
    bar = {"desc": "fidelity", "unit": "clip", "leave": False, "disable": not progress}
    fidelity = summarize(list(tqdm(fit_scenes(clips), total=len(clips), **bar)))
    if len(clips) > 1:  # one clip has no deviation
        own, other, third = (features(part, vae) for part in (clips, *real))
        fidelity["fréchet"] = frechet_distance(own, other)
        fidelity["floor"] = frechet_distance(third, other)
    shares = {name: float(np.mean(values)) for name, values in rights.items()}
    return Scores(shares, {name: len(values) for name, values in rights.items()}, fidelity)


def real_clips(column: str, prompts: int, seed: int, frames: int) -> list[np.ndarray]:
    """Clean renders of the scenes behind a column's prompts, uint8 (frames, H, W, 3)."""
    scenes = [scene for _, scene in COLUMNS[column](prompts, seed)]
    return [render_clip(scene, every=FPS // 4)[:frames] for scene in scenes]


def ceiling(
    pipeline,
    prompts: int = 200,
    seed: int = 0,
    columns: Sequence[str] = tuple(COLUMNS),
    frames: int | None = None,
) -> dict[str, Scores]:
    """Scores of the prompts' own clean renders, encoded and decoded by the pipeline's VAE.

    No sample can score better than its autoencoder lets it.
    """
    import torch
    from tqdm import tqdm

    from gentron_fast.vae import check_finite, to_frames

    scores = {}
    for name in columns:
        frames = frames or pipeline.default_frames
        clips = []
        for clip in tqdm(real_clips(name, prompts, seed, frames), desc=name, unit="clip"):
            pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].to(pipeline.device)
            with torch.no_grad():
                pixels = pipeline.vae.decode(pipeline.vae.encode(pixels / 127.5 - 1)[0])
            check_finite(pixels, "the autoencoder's pixels are")
            clips.append(to_frames(pixels)[0].cpu().numpy())
        real = [real_clips(name, prompts, seed + k, frames) for k in (1, 2)]
        scenes = [scene for _, scene in COLUMNS[name](prompts, seed)]
        scores[name] = _scores(clips, scenes, real, pipeline.vae, progress=True)
    return scores


UNITS = {
    "psnr": ("PSNR, median, dB", 1),
    "broken": ("broken, %", 100),
    "place jitter": ("jitter of place, px", 1),
    "size jitter": ("jitter of size, %", 1),
    "colour jitter": ("jitter of colour", 1),
    "fréchet": ("Fréchet distance", 1),
    "floor": ("  real to real", 1),
}


def format_table(scores: dict[str, Scores]) -> str:
    """A line a figure: shares in per cent with their 95 % intervals, and of how many where these
    are not all clips; then fidelity."""
    columns, rows = list(scores.values()), [["", *scores]]
    for name in dict.fromkeys(name for column in columns for name in column.shares):
        cells = []
        for column in columns:
            count = column.counts.get(name)
            of = "" if count in (None, max(column.counts.values())) else f" of {count}"
            cells.append(share_of(column, name) + of)
        rows.append([name, *cells])
    for name, (title, scale) in UNITS.items():
        if any(name in column.fidelity for column in columns):
            rows.append([title, *(_figure(column, name, scale) for column in columns)])
    titles, width = max(len(row[0]) for row in rows), max(len(c) for row in rows for c in row[1:])
    return "\n".join(
        f"{row[0]:{titles}}  {'  '.join(f'{c:>{width}}' for c in row[1:])}" for row in rows
    )


def share_of(column: Scores, name: str, digits: int = 1) -> str:
    """In per cent, with its 95 % interval to so many digits; "-" where it was not measured."""
    if name not in column.shares:
        return "-"
    return _share(column.shares[name], column.counts[name], digits)


def _share(share: float, count: int, digits: int = 1) -> str:
    low, high = (100 * end for end in wilson_interval(round(share * count), count))
    return f"{100 * share:.1f} ({low:.{digits}f}–{high:.{digits}f})"


def _figure(column: Scores, name: str, scale: float) -> str:
    if (value := column.fidelity.get(name)) is None:
        return "-"
    if name == "broken" and column.counts:
        return _share(value, max(column.counts.values()))
    ends = [column.fidelity.get(f"{name} {end}") for end in ("low", "high")]
    interval = "" if None in ends else f" ({scale * ends[0]:.2f}–{scale * ends[1]:.2f})"
    return f"{scale * value:.2f}{interval}"
