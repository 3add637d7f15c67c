"""A teacher's own sampling, stored beside precomputed latents, for a distillation to learn from:

python -m gentron_train.trajectories "latents/*.tar" trajectories/ --teacher PIPELINE
deepspeed train/distill.py --teacher PIPELINE --data trajectories --p-trajectory 1 --p-null 0

Of each sample that `precompute` wrote the teacher samples the caption once, from noise, with a
number of steps, λ_T and λ_M drawn from ranges; points on the way are kept, each the latents and the
guided noise that the teacher gave for them, in fp16. A shard that is there is kept: the same
command goes on where it was cut off, and two at a time, or ranks, share the work.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from gentron_fast.commandline import (
    check_writable,
    choose_device,
    described_parser,
    number,
    rank_and_world,
    run,
    silence_libraries,
    usable_device,
    whole_number,
)
from gentron_fast.files import claim
from gentron_fast.model import TextCondition
from gentron_fast.parts import told_as
from gentron_fast.threads import settle_threads
from gentron_train.data.broken import BrokenSample, broken_by
from gentron_train.data.options import DTYPES
from gentron_train.data.precompute import new_paths, new_shard
from gentron_train.data.shards import (
    PRECOMPUTED,
    Shard,
    count,
    digest,
    find_shards,
    index,
    read,
    read_facts,
)
from gentron_train.data.sources import (
    folder_digest,
    load_facts,
    pack_facts,
    pack_points,
    pack_text,
    seeded,
    unpack_text,
)
from gentron_train.settings import Settings
from gentron_train.teacher import LAMBDAS, Teacher, check_teacher, own_rescale

NAME = "gentron_train.trajectories"
OPTIONS = *LAMBDAS, "min_trajectory_steps", "max_trajectory_steps", "teacher_rescale", "dtype"
Files = dict[str, bytes]


class Sampler:
    """Adds to samples of precomputed shards, by their files, what the teacher does with them."""

    def __init__(self, teacher: Teacher, points: int, p_null: float, seed: int, batch: int):
        self.teacher, self.points, self.p_null = teacher, points, p_null
        self.seed, self.batch = seed, batch

    def __call__(
        self, shard: Shard, samples: Iterable[tuple[str, Files]], null: TextCondition
    ) -> Iterator[tuple[str, Files]]:
        """Samples of a shard, in order; broken ones as they are. null: the null text's embeddings,
        which stand for the captions that are dropped."""
        numbered = iter(enumerate(samples))
        while part := list(islice(numbered, self.batch)):
            groups: dict[tuple[int, ...], list[int]] = {}
            tensors: dict[int, dict[str, Tensor]] = {}
            for row, (place, (_, files)) in enumerate(part):
                if "safetensors" in files:
                    # One that cannot be read stays as it is, for training to count.
                    with suppress(BrokenSample), broken_by("unreadable latents"):
                        own, shape = _read(files["safetensors"])
                        draws = seeded(self.seed, shard.name, place)
                        if float(torch.rand((), generator=draws)) < self.p_null:
                            own = _latents_alone(own) | pack_text(null)
                        tensors[row] = own
                        groups.setdefault(shape, []).append(row)
            for shape, rows in groups.items():
                keys = [(self.seed, shard.name, part[row][0], "run") for row in rows]
                seeds = [seeded(*key).initial_seed() for key in keys]
                texts = [unpack_text(tensors[row]) for row in rows]
                made = self.teacher.sample(texts, shape, seeds, self.points)
                for row, points in zip(rows, made, strict=True):
                    with told_as(f"{shard.url}, sample {part[row][1][0]}"):
                        tensors[row] |= pack_points(points)
            for row, (_, (key, files)) in enumerate(part):
                if row in tensors:
                    files = files | {"safetensors": save(tensors[row])}
                yield key, files


def _sample(shard: Shard, place: int) -> tuple[str, Files]:
    """Key and files, as `precompute` has those of a broken one."""
    try:
        return read(shard, place)
    except BrokenSample as error:
        return index(shard).samples[place][0], error.as_files()


def _read(content: bytes) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """A sample's tensors, and the shape (C, T, h, w) of its latents."""
    tensors = load(content)
    _, *shape = tensors["mean"].shape
    unpack_text(tensors)
    return tensors, tuple(shape)


def _latents_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ("mean", "std")}


class Store:
    """Shards of latents, and the new ones with trajectories."""

    def __init__(self, shards: list[Shard], out: Path, made_by: dict):
        """ValueError for a shard that breaks off or holds no text embeddings, and where a new one
        is there that was made otherwise."""
        self.made_by = made_by
        self.contents: dict[Shard, tuple[bytes, TextCondition]] = {}
        pairs = list(zip(shards, new_paths(shards, out), strict=True))
        self.left = [(shard, path) for shard, path in pairs if not self._is_made(shard, path)]

    def fill(self, sampler: Sampler, bar: tqdm) -> None:
        """Write what is missing, each shard by one process."""
        for shard, path in self._claimed():
            content, null = self._content(shard)
            samples = (_sample(shard, place) for place in range(count(shard)[0]))
            with new_shard(path) as add:
                add(PRECOMPUTED, content)
                for key, files in sampler(shard, samples, null):
                    for ending, file in files.items():
                        add(f"{key}.{ending}", file)
                    bar.update()

    def _claimed(self) -> Iterator[tuple[Shard, Path]]:
        """What is to be made here; in the end what another process makes, if it does not."""
        others = []
        for wait in (False, True):
            for shard, path in others if wait else self.left:
                if wait:
                    tqdm.write(f"waiting for {path}, which another process makes", file=sys.stderr)
                give_back = claim(path, wait)
                if give_back is None:
                    others.append((shard, path))
                    continue
                try:
                    if not self._is_made(shard, path):
                        yield shard, path
                finally:
                    give_back()

    def _is_made(self, shard: Shard, path: Path) -> bool:
        content, _ = self._content(shard)
        if path.exists() and read_facts(Shard(str(path), path)) != content:
            raise ValueError(
                f"{path} was made otherwise, or of another shard: name another folder, or remove it"
            )
        return path.exists()

    def _content(self, shard: Shard) -> tuple[bytes, TextCondition]:
        """What a new shard says of itself, and the null text."""
        if shard not in self.contents:
            content, (_, cut) = read_facts(shard), count(shard)
            facts, null = (None, None) if content is None else load_facts(content, shard.url)
            if null is None or cut:
                raise ValueError(
                    f"{shard.url} {f'breaks off {cut}' if cut else 'holds no text embeddings'}: "
                    "python -m gentron_train.precompute makes whole shards that hold them"
                )
            if facts.trajectories is not None:
                raise ValueError(f"{shard.url} holds trajectories: name what it was made of")
            own = replace(facts, source=digest(shard), trajectories=self.made_by)
            self.contents[shard] = pack_facts(own, null), null
        return self.contents[shard]


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; the same command goes on")


def _parser() -> argparse.ArgumentParser:
    parser = described_parser(NAME, __doc__)
    add = parser.add_argument
    add("shards", nargs="+", help="globs or URLs of precomputed shards, with text embeddings")
    add("out", type=Path, help="folder for the new shards")
    add("--teacher", type=Path, required=True, help="pipeline folder that is distilled")
    add("--points", type=whole_number(1, 1000), default=4, help="kept of a sampling (4)")
    add("--p-null", type=number, default=0.05, help="share of captions that are dropped (0.05)")
    add("--batch", type=whole_number(1), default=16, help="samplings at a time (16)")
    add("--seed", type=whole_number(0), default=0)
    add("--allow-pipes", action="store_true", help="URLs pipe:COMMAND, which run in a shell")
    add("--device", type=usable_device, help="cpu or cuda; a GPU if any")
    defaults = {item.name: item for item in fields(Settings)}
    for name in OPTIONS:  # as of train/distill.py
        item = defaults[name]
        kind = whole_number(1) if name.endswith("steps") else number
        keywords = {"choices": list(DTYPES)} if name == "dtype" else {"type": kind}
        told = f"{item.metadata['help']} ({item.default})"
        add(f"--{name.replace('_', '-')}", default=item.default, help=told, **keywords)
    return parser


def _command(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    if not 0 <= args.p_null <= 1:
        raise ValueError(f"--p-null is {args.p_null}, must be from 0 to 1")
    options = {name: getattr(args, name) for name in OPTIONS}
    parameters = {"parameters": "fp32"} if args.dtype == "fp32" else {}
    settings = Settings(
        teacher=args.teacher, batch=args.batch, p_motion_free=0.0, **options, **parameters
    )
    check_teacher(settings)
    rank, ranks = rank_and_world()
    pipes = args.allow_pipes
    shards = [s for pattern in args.shards for s in find_shards(pattern, allow_pipes=pipes)]
    made_by = options | {"teacher_rescale": own_rescale(settings), "points": args.points}
    made_by |= {"p_null": args.p_null, "seed": args.seed}
    made_by |= {"teacher": folder_digest(args.teacher / "transformer")}
    new_paths(shards, args.out)  # of all: two ranks would not see that theirs are one
    # Shared out before looking what is missing: ranks may look at different times.
    store = Store(shards[rank::ranks], args.out, made_by)
    check_writable([path for _, path in store.left])
    if store.left:
        settle_threads()
        silence_libraries()
        teacher = Teacher.from_pretrained(settings, args.device or choose_device(None))
        sampler = Sampler(teacher, args.points, args.p_null, args.seed, args.batch)
        total = sum(count(shard)[0] for shard, _ in store.left)
        with tqdm(total=total, unit="sample", disable=rank != 0) as bar:
            store.fill(sampler, bar)
    print(f"{len(shards)} shards in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
