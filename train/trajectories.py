"""A teacher's own sampling, stored beside precomputed latents, for a distillation to learn from:

python -m gentron_train.trajectories "latents/clips-*.tar" trajectories/ --teacher PIPELINE
deepspeed train/distill.py --teacher PIPELINE --data trajectories --p-trajectory 1 --p-null 0

Of each sample that `precompute` wrote the teacher samples the caption once, from noise, with a
number of steps, λ_T and λ_M drawn from ranges; points on the way are kept, each the latents and the
guided noise that the teacher gave for them, in fp16. A shard that is there is kept: the same
command goes on where it was cut off, and two at a time, or ranks, share the work.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
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
    number,
    rank_and_world,
    refuse,
    run,
    silence_libraries,
    usable_device,
    whole_number,
)
from gentron_fast.files import claim
from gentron_fast.model import TextCondition
from gentron_fast.threads import settle_threads
from gentron_train.data.options import DTYPES
from gentron_train.data.precompute import new_paths, new_shard
from gentron_train.data.shards import PRECOMPUTED, Shard, count, find_shards, read, read_facts
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
from gentron_train.teacher import Teacher, check_teacher, own_rescale

NAME = "gentron_train.trajectories"
OPTIONS = "min_lambda_t", "max_lambda_t", "min_lambda_m", "max_lambda_m"
OPTIONS += "min_trajectory_steps", "max_trajectory_steps", "teacher_rescale", "dtype"
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
            tensors = {}
            for row, (_, (_, files)) in enumerate(part):
                if "safetensors" in files:
                    tensors[row] = load(files["safetensors"])
                    groups.setdefault(tuple(tensors[row]["mean"].shape[1:]), []).append(row)
            for shape, rows in groups.items():
                keys = [(self.seed, shard.name, part[row][0]) for row in rows]
                self._sample([tensors[row] for row in rows], shape, keys, null)
            for row, (_, (key, files)) in enumerate(part):
                if row in tensors:
                    files = files | {"safetensors": save(tensors[row])}
                yield key, files

    def _sample(
        self, samples: list[dict[str, Tensor]], shape: tuple, keys: list, null: TextCondition
    ) -> None:
        """Fill in the points of samples of one shape; keys: what each one's draws depend on."""
        texts, noise = [], []
        for tensors, key in zip(samples, keys, strict=True):
            generator = seeded(*key)
            if float(torch.rand((), generator=generator)) < self.p_null:
                tensors |= pack_text(null)
            texts.append(unpack_text(tensors))
            noise.append(torch.randn(shape, generator=generator))
        # The teacher draws steps, λ and what is kept from here.
        torch.manual_seed(int(torch.randint(2**62, (), generator=seeded(*keys[0], "teacher"))))
        made = self.teacher.sample(texts, noise, self.points)
        for tensors, points in zip(samples, made, strict=True):
            tensors |= pack_points(points)


def missing(shards: list[Shard], out: Path, made_by: dict) -> list[tuple[Shard, Path]]:
    """Shards with the new ones that `out` lacks. ValueError for one that holds no text embeddings,
    or whose new shard is there and was made otherwise."""
    pairs = list(zip(shards, new_paths(shards, out), strict=True))
    return [(shard, path) for shard, path in pairs if not _is_made(shard, path, made_by)]


def store(
    left: list[tuple[Shard, Path]],
    sampler: Sampler,
    made_by: dict,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Write new shards, each by one process."""
    for wait in (False, True):  # what another process makes is waited for in the end
        others = []
        for shard, path in left:
            give_back = claim(path, wait)
            if give_back is None:
                others.append((shard, path))
                continue
            try:
                _store_one(shard, path, sampler, made_by)
            finally:
                give_back()
            advance(count(shard)[0])
        left = others


def _store_one(shard: Shard, path: Path, sampler: Sampler, made_by: dict) -> None:
    if _is_made(shard, path, made_by):  # by the process that was waited for
        return
    content, null = _content(shard, made_by)
    samples = (read(shard, row) for row in range(count(shard)[0]))
    with new_shard(path) as add:
        add(PRECOMPUTED, content)
        for key, files in sampler(shard, samples, null):
            for ending, file in files.items():
                add(f"{key}.{ending}", file)


def _is_made(shard: Shard, path: Path, made_by: dict) -> bool:
    content, _ = _content(shard, made_by)
    if path.exists() and read_facts(Shard(str(path), path)) != content:
        raise ValueError(
            f"{path} was made otherwise, or of another shard: name another folder, or remove it"
        )
    return path.exists()


def _content(shard: Shard, made_by: dict) -> tuple[bytes, TextCondition]:
    """What a new shard says of itself, and the null text."""
    content = read_facts(shard)
    facts, null = (None, None) if content is None else load_facts(content, shard.url)
    if null is None:
        raise ValueError(
            f"{shard.url} holds no text embeddings: python -m gentron_train.precompute makes "
            "shards that do"
        )
    return pack_facts(replace(facts, trajectories=made_by), null), null


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; the same command goes on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = refuse
    add = parser.add_argument
    add("shards", nargs="+", help="globs or URLs of precomputed shards, with text embeddings")
    add("out", type=Path, help="folder for the new shards")
    add("--teacher", type=Path, required=True, help="pipeline folder that is distilled")
    add("--points", type=whole_number(1, 1000), default=4, help="kept of a sampling (4)")
    add("--p-null", type=number, default=0.05, help="share of captions that are dropped (0.05)")
    add("--batch", type=whole_number(1), default=16, help="samplings at a time (16)")
    add("--seed", type=whole_number(0), default=0)
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
    shards = [shard for pattern in args.shards for shard in find_shards(pattern)]
    made_by = options | {"teacher_rescale": own_rescale(settings), "points": args.points}
    made_by |= {"p_null": args.p_null, "seed": args.seed}
    made_by |= {"teacher": folder_digest(args.teacher / "transformer")}
    # Shared out before looking what is missing: ranks may look at different times.
    left = missing(shards[rank::ranks], args.out, made_by)
    check_writable([path for _, path in left])
    if left:
        settle_threads()
        silence_libraries()
        teacher = Teacher.from_pretrained(settings, args.device or choose_device(None))
        sampler = Sampler(teacher, args.points, args.p_null, args.seed, args.batch)
        total = sum(count(shard)[0] for shard, _ in left)
        with tqdm(total=total, unit="sample", disable=rank != 0) as bar:
            store(left, sampler, made_by, bar.update)
    print(f"{len(shards)} shards in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
