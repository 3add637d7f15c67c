"""Timesteps for a few steps, fitted to a model (as Sabour et al. 2024, arXiv 2404.14507, fit them):

python -m gentron_train.few_steps PIPELINE [--steps 4 8] [--prompts FILE]

A few steps of DPM-Solver++ end elsewhere than many do, and how far off depends on where they look.
For each number of steps the timesteps are moved until the latents, from the same noise and at the
folder's own guidance, come as close as they can to those of many steps. What was found goes into
the folder's scheduler_config.json, where the solver few-step takes it; that of fast/ is its
teacher's, for both.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from gentron_fast.commandline import (
    check_writable,
    choose_device,
    described_parser,
    run,
    silence_libraries,
    usable_device,
    whole_number,
)
from gentron_fast.diffusion import NoiseSchedule
from gentron_fast.files import read_json, write_json
from gentron_fast.generate import read_prompts_file
from gentron_fast.index import parts_folder
from gentron_fast.pipeline import SCHEDULER_PATH, GenTronPipeline
from gentron_fast.solvers import make_table
from gentron_fast.threads import settle_threads

NAME = "gentron_train.few_steps"
KEY = "few_step_timesteps"
MOST = 20  # steps: beyond, what evenly spaced ones lose is hardly seen
PROMPTS, PROMPT_SEED = 32, 777
LAST_MOVE = 4  # timesteps, of 1000
GAIN = 0.999  # a move is kept where the distance falls below so much of itself


def fit_timesteps(
    distance: Callable[[list[int]], float], timesteps: Sequence[int], trained: int
) -> tuple[list[int], float]:
    """Descending timesteps below `trained` at which `distance` has a minimum, and the distance:
    from `timesteps`, one is moved at a time, by less and less."""
    best, found = list(timesteps), distance(list(timesteps))
    move = max(1, trained // (4 * len(best)))
    while True:
        before = found
        for place in range(len(best)):
            for change in (move, -move):
                tried = [t + change * (n == place) for n, t in enumerate(best)]
                ends = [trained, *tried, -1]
                if all(a > b for a, b in pairwise(ends)):
                    value = distance(tried)
                    if value < GAIN * found:
                        best, found = tried, value
                        break
        if found == before:
            if move <= max(1, LAST_MOVE * trained // 1000):
                return best, found
            move //= 2


def latents_of(
    pipeline: GenTronPipeline,
    prompts: list[str],
    batch: int,
    steps: int,
    timesteps: list[int] | None,
) -> Tensor:
    """(N, C, T, h, w), of seeds 0, 1, …; timesteps None: evenly spaced."""
    pipeline.scheduler[KEY] = [] if timesteps is None else [timesteps]
    options = {"steps": steps, "solver": "few-step", "output_type": "latent", "progress": False}
    seeds, parts = list(range(len(prompts))), []
    for first in range(0, len(prompts), batch):
        own = slice(first, first + batch)
        parts.append(pipeline(prompts[own], seed=seeds[own], **options).latents.float())
    return torch.cat(parts)


def fit(
    pipeline: GenTronPipeline, prompts: list[str], batch: int, steps: int, wanted: Tensor
) -> tuple[list[int], float, float]:
    """Timesteps for `steps` steps, how far their latents are from those wanted, and how far those
    of evenly spaced ones: mean squares, over the mean square of what is wanted."""
    with tqdm(desc=f"{steps} steps", unit="try") as bar:

        def distance(timesteps: list[int]) -> float:
            latents = latents_of(pipeline, prompts, batch, steps, timesteps)
            bar.update()
            return float((latents - wanted).square().mean() / wanted.square().mean())

        pipeline.scheduler[KEY] = []
        even = make_table("dpm++", pipeline.scheduler, steps).timesteps.tolist()
        before = distance(even)
        trained = len(NoiseSchedule.from_config(pipeline.scheduler))
        fitted, after = fit_timesteps(distance, even, trained)
    return fitted, after, before


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; the folder is as it was")


def _command(argv: list[str]) -> None:
    parser = described_parser(NAME, __doc__)
    parser.add_argument("pipeline", type=Path, help="pipeline folder")
    parser.add_argument(
        "--steps", type=whole_number(1, MOST), nargs="+", default=[4, 8], help="default: 4 8"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help=f"file, a prompt a line; without it {PROMPTS} of the small world",
    )
    parser.add_argument(
        "--many", type=whole_number(2, 1000), default=50, help="steps of the aim (50)"
    )
    parser.add_argument("--batch", type=whole_number(1), default=32, help="prompts at a time (32)")
    parser.add_argument("--device", type=usable_device, help="cpu or cuda; a GPU if any")
    args = parser.parse_args(argv)
    if args.many <= max(args.steps):
        raise ValueError(f"--many is {args.many}, must be more than --steps {max(args.steps)}")
    path = parts_folder(args.pipeline) / SCHEDULER_PATH
    check_writable([path])
    prompts = _small_world() if args.prompts is None else read_prompts_file(args.prompts)
    settle_threads()
    silence_libraries()
    pipeline = GenTronPipeline.from_pretrained(
        args.pipeline, device=args.device or choose_device(None)
    )
    pipeline.encode_ahead(prompts)
    wanted = latents_of(pipeline, prompts, args.batch, args.many, None)
    found = []
    for steps in sorted(set(args.steps)):
        fitted, after, before = fit(pipeline, prompts, args.batch, steps, wanted)
        found.append(fitted)
        print(f"{steps:2} steps      {100 * before:.1f} % away from {args.many} steps before,")
        print(f"              {100 * after:.1f} % at {' '.join(map(str, fitted))}")
    values = read_json(path)
    others = [own for own in values.get(KEY) or [] if len(own) not in args.steps]
    write_json(path, values | {KEY: sorted(others + found, key=len)})
    print(f"wrote         {path}")


def _small_world() -> list[str]:
    """Prompts that no published figure is of."""
    from gentron_train.small_world.evaluator import SINGLE, drawn_prompts, published_prompts

    without = published_prompts()
    draws = [drawn_prompts(name, PROMPTS // 2, PROMPT_SEED, without) for name in SINGLE]
    return [prompt for drawn in draws for prompt, _ in drawn]


if __name__ == "__main__":
    sys.exit(main())
