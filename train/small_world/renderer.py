"""The small world: captioned 64x64 images and clips of moving shapes, as WebDataset shards.

A scene holds one or two objects (shape, colour, size, fill), a neutral background and one motion.
Images are clean. Clips carry motion blur, H.264 compression and a watermark, as real video data
does, unless clean ones are asked for. One combination of shape x colour x motion in ten never
occurs in training. What a caption leaves out has its usual value: plain, on white, of medium size
(small, where there are two). A sample depends on (seed, kind, index) and the options alone.

    python -m gentron_train.shapes OUT --images 20000 --clips 6000 --seed 0
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import reprlib
import signal
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gentron_fast.commandline import refuse, run
from gentron_fast.files import read_json, whole_file, write_json
from gentron_fast.schema import FLAG, check, real, whole
from gentron_fast.threads import available_cores

SIZE = 64  # pixels, both ways
FPS = 24
FRAMES = 48  # two seconds
NAME = "gentron_train.shapes"
INDEX_NAME = "index.json"  # of a folder's shards
PAIRS = 0.25  # share of the training scenes with two objects, before held-out ones are left out
SPINNING = 1 / 8  # share of those with one that spin: as many as of any other motion
INDEX_SCHEMA = {
    **dict.fromkeys(("images", "clips"), whole(0, 10**7)),
    "seed": whole(0, 2**63 - 1),
    "shard_size": whole(1, 10**6),
    "pairs": real(0, 1),
    "spinning": real(SPINNING, 1),
    "clean": FLAG,
}
SINCE = {
    "pairs": PAIRS,
    "spinning": SPINNING,
    "clean": False,
}  # what an index.json of before does not say
CLEAN = 12, "yuv444p"  # of clean clips: 43 dB, where usual ones lose most by their colours (32)
SHARD_SIZE = 500  # samples
WORLD = 2  # its edition: samples of another one are others
SPAN = (FRAMES - 1) / FPS  # seconds from the first frame to the last
TEXT_BYTES = 110  # no caption is longer

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 70, 230),
    "yellow": (235, 215, 30),
    "purple": (175, 35, 205),
    "cyan": (30, 200, 215),
}
RADII = {"small": (7.5, 8.5), "medium": (10.0, 11.0), "large": (12.5, 13.5)}  # pixels
FILLS = ("plain", "striped", "dotted")
BACKGROUNDS = {"white": (240, 240), "grey": (130, 130), "black": (15, 15), "gradient": (60, 200)}
USUAL = {"size": "medium", "fill": "plain", "background": "white"}  # what is left unsaid
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
MOTIONS = ("still", *DIRECTIONS, "spinning", "growing", "shrinking")

PHRASES = {
    "still": ("standing still", "not moving", "staying still", "at rest"),
    "left": ("moving left", "moving to the left", "going left", "sliding to the left"),
    "right": ("moving right", "moving to the right", "going right", "sliding to the right"),
    "up": ("moving up", "moving upwards", "going up", "rising"),
    "down": ("moving down", "moving downwards", "going down", "falling"),
    "spinning": ("spinning", "rotating", "turning around", "spinning in place"),
    "growing": ("growing", "getting bigger", "growing larger", "becoming larger"),
    "shrinking": ("shrinking", "getting smaller", "becoming smaller", "shrinking in place"),
}
RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
SENTENCES = (
    "{thing} {motion}",
    "{thing} {motion}",  # twice as often
    "{thing} is {motion}",
    "there is {thing} {motion}",
)
PLACES = ("{sentence} on a {background} background", "on a {background} background, {sentence}")

# Farthest point of each shape from its centre, in radii. A circle has radius 1; the others have
# much the same area, a little less where equal area would outgrow the frame.
REACH = {"circle": 1.0, "square": 1.253, "triangle": 1.4, "star": 1.4, "cross": 1.18}
MARGIN = 1.5  # pixels between an object and the frame's edge
SHADE = 0.5  # stripes and dots are the object's colour times this

_WATERMARK = np.array(
    [
        [int(c) for c in row]
        for row in (
            "011101110100010111010001110",
            "100001001110110100110001000",
            "011001111101010111010001100",
            "000101001100010100010001000",
            "111001001100010100011101110",
        )
    ],
    dtype=np.float32,
)


@dataclass(frozen=True)
class Thing:
    """One object: what it is, where it is, how it moves. Pixels, seconds, radians; y down."""

    shape: str
    colour: str
    fill: str
    size: str | None  # None where the radius changes
    x: float  # centre at time 0
    y: float
    radius: float
    angle: float = 0.0
    velocity: tuple[float, float] = (0.0, 0.0)  # pixels a second
    spin: float = 0.0  # radians a second
    growth: float = 0.0  # pixels of radius a second

    def pose(self, time):
        """x, y, radius and angle at `time` (seconds, a number or an array)."""
        vx, vy = self.velocity
        return (
            self.x + vx * time,
            self.y + vy * time,
            self.radius + self.growth * time,
            self.angle + self.spin * time,
        )


@dataclass(frozen=True)
class Scene:
    """One or two objects, one motion, a neutral background. The first is `relation` the second."""

    objects: tuple[Thing, ...]
    background: str
    motion: str
    relation: str | None = None
    tilt: float = 0.0  # direction of the gradient background, radians


@functools.cache
def held_out() -> frozenset[tuple[str, str, str]]:
    """The 24 of 240 (shape, colour, motion) that training never shows: three for each motion."""

    def rank(triple):
        return hashlib.blake2b(" ".join(triple).encode(), digest_size=8).digest()

    chosen = set()
    for motion in MOTIONS:
        triples = ((shape, colour, motion) for shape in SHAPES for colour in COLOURS)
        # The README's example is a seen one.
        ranked = sorted((t for t in triples if t != ("circle", "red", "left")), key=rank)
        chosen.update(ranked[:3])
    return frozenset(chosen)


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Whether this combination never occurs in training, as an image or as a clip."""
    return (shape, colour, motion) in held_out()


def _pick(rng, choices):
    choices = tuple(choices)
    return choices[rng.integers(len(choices))]


def _uniform(rng, low, high):
    return float(rng.uniform(low, max(low, high)))


def _pick_value(rng, what, choices, usual):
    """The usual value of "size", "fill" or "background" with probability `usual`, or any other."""
    others = [choice for choice in choices if choice != USUAL[what]]
    is_usual = USUAL[what] in choices and rng.random() < usual
    return USUAL[what] if is_usual else _pick(rng, others)


def _thing(rng, shape, colour, motion, usual) -> Thing:
    """An object that stays within the frame for the whole clip while it moves by `motion`."""
    # A plain circle that spins would look still.
    fills = FILLS[1:] if motion == "spinning" and shape == "circle" else FILLS
    fill = _pick_value(rng, "fill", fills, usual)
    size = _pick_value(rng, "size", RADII, usual)
    radius = _uniform(rng, *RADII[size])
    angle, spin, growth, largest = _uniform(rng, -0.12, 0.12), 0.0, 0.0, radius
    if motion == "spinning":
        angle = _uniform(rng, 0, 2 * math.pi)
        spin = math.radians(_uniform(rng, 60, 120)) * _pick(rng, (-1, 1))
    elif motion in ("growing", "shrinking"):
        # 1.85 over the clip leaves 1.6 between the first and the last of eight sampled frames.
        least = _uniform(rng, 5.5, 7.5)
        size, largest = None, _uniform(rng, 1.85 * least, 16)
        radius, growth = (least, (largest - least) / SPAN)
        if motion == "shrinking":
            radius, growth = largest, -growth
    low, high = REACH[shape] * largest + MARGIN, SIZE - REACH[shape] * largest - MARGIN
    position, velocity = [_uniform(rng, low, high), _uniform(rng, low, high)], [0.0, 0.0]
    if motion in DIRECTIONS:
        axis, sign = _axis(DIRECTIONS[motion])
        travel = _uniform(rng, 17, min(high - low, 34))
        # Start on the far side: an image of "moving left" shows its object on the right.
        start = _uniform(rng, max(low + travel, SIZE / 2 + 2), high)
        position[axis] = start if sign < 0 else SIZE - start
        velocity[axis] = sign * travel / SPAN
    return Thing(shape, colour, fill, size, *position, radius, angle, tuple(velocity), spin, growth)


def _axis(direction):
    axis = 0 if direction[0] else 1
    return axis, direction[axis]


def _pair(rng, shapes, colours, motion, relation, usual) -> tuple[Thing, Thing]:
    """Two small objects side by side that stand still or move the same way, and never touch."""
    # Small enough to travel 14 px between eight sampled frames even along the line they stand on.
    radii = [_uniform(rng, 6.8, 7.5) for _ in shapes]
    reach = [REACH[shape] * radius for shape, radius in zip(shapes, radii, strict=True)]
    axis, sign = _axis(RELATIONS[relation])
    gap = reach[0] + reach[1] + _uniform(rng, 1.0, 2.0)
    offset = [0.0, 0.0]  # of the second object from the first
    offset[axis], offset[1 - axis] = -sign * gap, _uniform(rng, -3, 3)
    low = [max(reach[0], reach[1] - o) + MARGIN for o in offset]
    high = [SIZE - MARGIN - max(reach[0], reach[1] + o) for o in offset]
    velocity = [0.0, 0.0]
    if motion in DIRECTIONS:
        way, side = _axis(DIRECTIONS[motion])
        travel = _uniform(rng, min(16, high[way] - low[way]), min(high[way] - low[way], 30))
        velocity[way] = side * travel / SPAN
        if side < 0:
            low[way] += travel
        else:
            high[way] -= travel
    first = [_uniform(rng, a, b) for a, b in zip(low, high, strict=True)]
    second = [a + o for a, o in zip(first, offset, strict=True)]
    return tuple(
        Thing(
            shape=shape,
            colour=colour,
            fill=_pick_value(rng, "fill", FILLS, usual),
            size="small",
            x=position[0],
            y=position[1],
            radius=radius,
            angle=_uniform(rng, -0.12, 0.12),
            velocity=tuple(velocity),
        )
        for shape, colour, position, radius in zip(
            shapes, colours, (first, second), radii, strict=True
        )
    )


def make_scene(rng, shape: str, colour: str, motion: str, usual: float = 0.5) -> Scene:
    """A scene with one object of this shape, colour and motion; the rest is drawn from `rng`.

    usual: how often size, fill and background each have their usual value. Raises ValueError for a
    word that the small world does not know.
    """
    for word, known in ((shape, SHAPES), (colour, COLOURS), (motion, MOTIONS)):
        if word not in known:
            raise ValueError(f"{word!r} is not one of {', '.join(known)}")
    return _scene(rng, (_thing(rng, shape, colour, motion, usual),), motion, None, usual)


def make_pair(rng, shapes, colours, motion: str, relation: str, usual: float = 0.5) -> Scene:
    """A scene of two objects; motion "still" or one of DIRECTIONS. As `make_scene` else."""
    things = _pair(rng, shapes, colours, motion, relation, usual)
    return _scene(rng, things, motion, relation, usual)


def _scene(rng, things, motion, relation, usual) -> Scene:
    background = _pick_value(rng, "background", BACKGROUNDS, usual)
    return Scene(things, background, motion, relation, _uniform(rng, 0, 2 * math.pi))


def sample_scene(rng, pairs: float = PAIRS, spinning: float = SPINNING) -> Scene:
    """A scene of the training set: one object, which spins in about the share `spinning`, or two in
    about the share `pairs` (a held-out one is drawn again, and single objects are more often); none
    held out."""
    more = (spinning - SPINNING) / (1 - SPINNING)
    while True:
        if rng.random() < 1 - pairs:
            shape, colour, motion = (_pick(rng, words) for words in (SHAPES, COLOURS, MOTIONS))
            if more and rng.random() < more:  # no draw at the usual share: scenes stay as they were
                motion = "spinning"
            if not is_held_out(shape, colour, motion):
                return make_scene(rng, shape, colour, motion)
        else:
            return _sample_pair(rng)


def _sample_pair(rng) -> Scene:
    """Two objects of different colours, none held out."""
    while True:
        shapes = [_pick(rng, SHAPES) for _ in range(2)]
        colours = [str(c) for c in rng.choice(tuple(COLOURS), 2, replace=False)]
        motion = _pick(rng, ("still", *DIRECTIONS))
        relation = _pick(rng, RELATIONS)
        pairs = zip(shapes, colours, strict=True)
        if not any(is_held_out(*pair, motion) for pair in pairs):
            return make_pair(rng, shapes, colours, motion, relation)


def _says(rng, what, value, detail):
    return value != USUAL[what] or rng.random() < detail


def _noun(rng, thing, detail, alone):
    words = ["a"]
    # Two objects are always small, or they would not fit.
    if thing.size and (_says(rng, "size", thing.size, detail) if alone else rng.random() < detail):
        words.append(thing.size)
    if _says(rng, "fill", thing.fill, detail):
        words.append(thing.fill)
    return " ".join([*words, thing.colour, thing.shape])


def caption(scene: Scene, rng, motion: bool = True, detail: float = 0.4) -> str:
    """One of the phrasings that are true of `scene`, in words of `vocabulary()`, at most 110 bytes.

    motion: name the motion. detail: how often size, fill and background are each mentioned where
    they are the usual ones; others always are.
    """
    alone = len(scene.objects) == 1
    while True:
        things = [_noun(rng, thing, detail, alone) for thing in scene.objects]
        phrase = _pick(rng, PHRASES[scene.motion])
        if len(things) == 2:
            thing = f"{things[0]} {_pick(rng, RELATION_PHRASES[scene.relation])} {things[1]}"
            text = f"{thing}, both {phrase}" if motion else thing
        elif motion:
            text = _pick(rng, SENTENCES).format(thing=things[0], motion=phrase)
        else:
            text = things[0]
        if _says(rng, "background", scene.background, detail):
            text = _pick(rng, PLACES).format(sentence=text, background=scene.background)
        if len(text) <= TEXT_BYTES:
            return text


def vocabulary() -> list[str]:
    """All words of all captions, sorted; the comma is none of them."""
    tables = itertools.chain(
        SHAPES, COLOURS, RADII, FILLS, BACKGROUNDS, SENTENCES, PLACES, ("a", ", both"),
        *PHRASES.values(), *RELATION_PHRASES.values(),
    )  # fmt: skip
    words = " ".join(tables).replace(",", " ").split()
    return sorted({word for word in words if not word.startswith("{")})


def _distance(shape, u, v):
    """Signed distance to the edge of `shape` at (u, v), all in radii; negative inside."""
    if shape == "circle":
        return np.sqrt(u * u + v * v) - 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.886)
    if shape == "triangle":
        side = np.float32(0.8660254) * np.abs(u) - np.float32(0.5) * v
        return np.maximum(side, v) - np.float32(REACH["triangle"] / 2)
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.maximum(np.maximum(a, b) - np.float32(1.1), np.minimum(a, b) - np.float32(0.42))
    # Star: fold the plane into one half point, then the distance to its edge from tip to notch.
    cos, sin = np.float32(math.cos(math.radians(36))), np.float32(math.sin(math.radians(36)))
    u, v = np.abs(u), -v
    lift = 2 * np.maximum(cos * u - sin * v, 0)
    u, v = u - lift * cos, v + lift * sin
    lift = 2 * np.maximum(-cos * u - sin * v, 0)
    u, v = np.abs(u + lift * cos), v + lift * sin
    notch = 0.45 * REACH["star"]
    edge = np.array([notch * sin, notch * cos - REACH["star"]], dtype=np.float32)
    edge /= np.hypot(*edge)
    return -edge[1] * u + edge[0] * (v - np.float32(REACH["star"]))


def _brightness(fill, u, v, pixel):
    """Factor on the object's colour at (u, v); `pixel` is a pixel's width in radii."""
    if fill == "striped":
        period = 0.7
        wave = np.abs((v / period) % 1 - np.float32(0.5)) - np.float32(0.25)
        ink = np.clip(0.5 - wave * period / pixel, 0, 1)
    else:
        spacing = 0.8
        du = u - spacing * np.round(u / spacing)
        dv = v - spacing * np.round(v / spacing)
        ink = np.clip(0.5 - (np.sqrt(du * du + dv * dv) - np.float32(0.25)) / pixel, 0, 1)
    return 1 - (1 - SHADE) * ink


def _render(scene, times) -> np.ndarray:
    """Frames (T, 64, 64, 3) float32 in 0..255, each the mean over its row of `times` (T, S)."""
    times = np.asarray(times, dtype=np.float32)
    return paint(scene, [thing.pose(times) for thing in scene.objects], times.shape)


def paint(scene: Scene, poses, shape: tuple[int, int]) -> np.ndarray:
    """The scene with its objects in other poses: (T, 64, 64, 3) float32 in 0..255.

    poses: of each object x, y, radius and angle, numbers or arrays of `shape` (T, S); a frame is
    the mean over its S poses.
    """
    centres = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
    low, high = BACKGROUNDS[scene.background]
    slope = math.cos(scene.tilt) * (centres - SIZE / 2) + math.sin(scene.tilt) * (
        centres[:, None] - SIZE / 2
    )
    ground = low + (high - low) * (slope / (SIZE * math.sqrt(2)) + 0.5)
    frames = np.empty((shape[0], SIZE, SIZE, 3), dtype=np.float32)
    frames[:] = ground[..., None]
    for thing, pose in zip(scene.objects, poses, strict=True):
        x, y, radius, angle = (
            np.broadcast_to(np.asarray(a, np.float32), shape)[..., None, None] for a in pose
        )
        reach = REACH[thing.shape] * radius + 1
        rows = slice(max(int((y - reach).min()), 0), int((y + reach).max()) + 1)
        columns = slice(max(int((x - reach).min()), 0), int((x + reach).max()) + 1)
        dx, dy = centres[columns] - x, centres[rows, None] - y
        cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        cover = np.clip(0.5 - _distance(thing.shape, u, v) * radius, 0, 1)
        lit = cover if thing.fill == "plain" else cover * _brightness(thing.fill, u, v, 1 / radius)
        window = frames[:, rows, columns]
        window *= 1 - cover.mean(1)[..., None]
        window += lit.mean(1)[..., None] * np.array(COLOURS[thing.colour], dtype=np.float32)
    return frames


def _to_uint8(frames):
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)


def render_frame(scene: Scene, time: float = 0.0) -> np.ndarray:
    """The scene at `time` seconds, clean: uint8 (64, 64, 3)."""
    return _to_uint8(_render(scene, [[time]]))[0]


def render_clip(scene: Scene, clean: bool = True, rng=None, every: int = 1) -> np.ndarray:
    """The scene's two seconds, each `every`-th frame of 48: uint8 (T, 64, 64, 3).

    clean=False adds motion blur and a watermark drawn from `rng`; compression is `encode_mp4`'s.
    """
    times = np.arange(0, FRAMES, every)[:, None] / FPS
    if clean:
        return _to_uint8(_render(scene, times))
    if rng is None:
        raise ValueError("a clip that is not clean needs an rng for its blur and watermark")
    # Open for longer than a frame lasts: at these speeds a real shutter's blur would not show.
    shutter = rng.uniform(1 / 12, 1 / 6)
    frames = _render(scene, times + shutter * (np.arange(4) - 1.5) / 4)
    height, width = _WATERMARK.shape
    top, left = _pick(rng, (2, SIZE - height - 2)), _pick(rng, (2, SIZE - width - 2))
    alpha = (rng.uniform(0.3, 0.5) * _WATERMARK)[..., None]
    window = frames[:, top : top + height, left : left + width]
    ink = 50.0 if window[0].mean() > 150 else 230.0
    window += alpha * (ink - window)
    return _to_uint8(frames)


def encode_mp4(frames: np.ndarray, crf: int, pixels: str = "yuv420p") -> bytes:
    """uint8 (T, H, W, 3) as H.264 at 24 FPS; crf 0 (best) to 51 is its quality. pixels: yuv420p
    has a quarter of the colours, as most video, yuv444p all."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def make_sample(
    seed: int,
    kind: str,
    index: int,
    pairs: float = PAIRS,
    spinning: float = SPINNING,
    clean: bool = False,
) -> dict[str, bytes]:
    """Sample `index` of `kind` ("images" or "clips"): {"png" or "mp4", "txt", "json": bytes}.

    An image whose caption names its motion shows the motion's first frame; the others any moment.
    Of images about the share `pairs` has two objects, of clips PAIRS; of clips of one object about
    the share `spinning` spins, of images SPINNING. Of the same clip with `clean` and without, the
    scene and the caption are the same.
    """
    from PIL import Image

    rng = np.random.default_rng([seed, ("images", "clips").index(kind), index])
    scene = sample_scene(rng, pairs) if kind == "images" else sample_scene(rng, PAIRS, spinning)
    named = kind == "clips" or rng.random() < 0.5
    text = caption(scene, rng, motion=named)
    facts = asdict(scene) | {"named": named}
    if kind == "clips":
        clip = render_clip(scene, clean, rng)
        how = CLEAN if clean else (rng.integers(22, 30),)
        media = {"mp4": encode_mp4(clip, *how)}
    else:
        facts["time"] = 0.0 if named else _uniform(rng, 0, SPAN)
        file = io.BytesIO()
        Image.fromarray(render_frame(scene, facts["time"])).save(file, "png")
        media = {"png": file.getvalue()}
    return media | {"txt": text.encode(), "json": json.dumps(facts).encode()}


def _prompts(n, seed, unseen):
    rng = np.random.default_rng([seed, 2 + unseen])
    triples = [
        triple
        for triple in itertools.product(SHAPES, COLOURS, MOTIONS)
        if is_held_out(*triple) == unseen
    ]
    for _ in range(n):
        scene = make_scene(rng, *_pick(rng, triples))
        yield caption(scene, rng, detail=0.0), scene


def seen_prompts(n: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """n short prompts of one object, whose combinations occur in training, and a scene of each."""
    return list(_prompts(n, seed, unseen=False))


def unseen_prompts(n: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """n short prompts of one object, whose combinations training never shows, and scenes."""
    return list(_prompts(n, seed, unseen=True))


def pair_prompts(n: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """n short prompts of two objects and their relation, and a scene of each."""
    rng = np.random.default_rng([seed, 4])
    scenes = [_sample_pair(rng) for _ in range(n)]
    return [(caption(scene, rng, detail=0.0), scene) for scene in scenes]


def _write_shard(job) -> int:
    path, seed, kind, start, stop, *options = job
    with whole_file(path) as partial, tarfile.open(partial, "w") as tar:
        for index in range(start, stop):
            for ending, content in make_sample(seed, kind, index, *options).items():
                entry = tarfile.TarInfo(f"{kind}{index:07d}.{ending}")
                entry.size, entry.mode = len(content), 0o644
                tar.addfile(entry, io.BytesIO(content))
    return stop - start


def quiet_pool(processes: int):
    """Processes that leave Ctrl-C to this one."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    try:
        # Spawned, not forked: the caller may hold torch's threads.
        context = multiprocessing.get_context("spawn")
        return context.Pool(processes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def write_shards(
    out,
    images: int = 20000,
    clips: int = 6000,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    processes: int | None = None,
    progress: bool = True,
    pairs: float = PAIRS,
    spinning: float = SPINNING,
    clean: bool = False,
) -> list[Path]:
    """Write OUT/images-00000.tar ... and OUT/clips-00000.tar ... and return their paths.

    pairs: the share of images with two objects, spinning: of clips of one object that spins, as
    `sample_scene` has them; clean: clips without blur and watermark, hardly compressed. Shards
    that are there already are kept, so a run that was cut off goes on. index.json holds the
    parameters; a folder made with others raises ValueError.
    """
    from tqdm import tqdm

    counts = {"images": images, "clips": clips, "seed": seed, "shard_size": shard_size}
    options = {"pairs": pairs, "spinning": spinning, "clean": clean}
    counts |= options
    wanted = counts | {"world": WORLD}
    check(counts, INDEX_SCHEMA)
    if processes is not None and processes < 1:
        raise ValueError(f"processes is {processes}, must be at least 1")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    index = out / INDEX_NAME
    if index.exists():
        found = SINCE | read_json(index)
        if found != wanted:
            names = [n for n in wanted | found if found.get(n) != wanted.get(n)]
            theirs, ours = ({n: one[n] for n in names if n in one} for one in (found, wanted))
            raise ValueError(
                f"{out} holds shards of {reprlib.repr(theirs)}, not {ours}; choose another folder"
            )
    else:
        write_json(index, wanted)
    jobs = [
        (out / f"{kind}-{number:05d}.tar", seed, kind, start, min(start + shard_size, total))
        for kind, total in (("images", images), ("clips", clips))
        for number, start in enumerate(range(0, total, shard_size))
    ]
    jobs = [(*job, *options.values()) for job in jobs]
    missing = [job for job in jobs if not job[0].exists()]
    processes = min(processes or available_cores(), len(missing))
    bar = tqdm(total=sum(j[4] - j[3] for j in missing), unit="sample", disable=not progress)
    with bar:
        if processes > 1:
            with quiet_pool(processes) as pool:
                for count in pool.imap_unordered(_write_shard, missing):
                    bar.update(count)
        else:
            for job in missing:
                bar.update(_write_shard(job))
    return [job[0] for job in jobs]


def ensure_shards(folder, images: int = 20000, clips: int = 6000) -> None:
    """Make a folder's shards if it has none, or finish those that `write_shards` began.

    A folder of other shards, without our index.json, is left as it is. ValueError that names an
    index.json that cannot be read.
    """
    index = Path(folder) / INDEX_NAME
    if index.exists():
        found = SINCE | read_json(index, INDEX_SCHEMA)
        if found.keys() >= INDEX_SCHEMA.keys():  # else another tool's, of the same name
            write_shards(folder, **{name: found[name] for name in INDEX_SCHEMA})
    elif not list(Path(folder).glob("*.tar")):
        write_shards(folder, images, clips)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, which is told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; the same command goes on")


def _command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description="Write the small world's shards.")
    parser.error = refuse
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pairs", type=float, default=PAIRS, help="share of images with two objects"
    )
    parser.add_argument(
        "--spinning",
        type=float,
        default=SPINNING,
        help="share of clips of one object that spin, 1/8 to 1",
    )
    parser.add_argument(
        "--clean", action="store_true", help="clips without motion blur, watermark and artefacts"
    )
    parser.add_argument("--shard-size", type=int, default=SHARD_SIZE, help="samples in a shard")
    parser.add_argument("--processes", type=int, help="default: one a core")
    args = parser.parse_args(argv)
    paths = write_shards(**vars(args))
    print(f"{len(paths)} shards in {args.out}")
