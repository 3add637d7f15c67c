"""Score a pipeline in the small world.

python -m gentron_train.shapes_score PIPELINE --prompts 200 --out score.json
python -m gentron_train.shapes_score --sweep lambda_t=2,3,5 rescale=0,0.7 --out sweep.json
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from gentron_fast.commandline import (
    check_writable,
    choose_device,
    number,
    refuse,
    run,
    usable_device,
    whole_number,
)
from gentron_fast.files import write_json
from gentron_fast.index import ASSETS, chosen, in_force
from gentron_train.small_world.evaluator import COLUMNS, ceiling, evaluate, format_table
from gentron_train.small_world.sweep import SWEPT, parse_grid, sweep, sweep_table

NAME = "gentron_train.shapes_score"


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, which is told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; a sweep goes on with its command")


def _command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description="Score a pipeline in the small world.")
    parser.error = refuse
    parser.add_argument("pipeline", nargs="?", help="pipeline folder (the model that ships)")
    parser.add_argument("--prompts", type=int, default=200, help="of each kind (200)")
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN",
        default=list(COLUMNS),
        choices=list(COLUMNS),
        help=f"kinds of prompts, of {', '.join(COLUMNS)} (all)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, help="frames a clip (the pipeline's)")
    types = {"steps": whole_number(1), "solver": str} | dict.fromkeys(SWEPT, number)
    for name, own in in_force(argv).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=types[name], help=f"({own}, the pipeline's)")
    parser.add_argument("--device", type=usable_device, help="(a GPU where there is one)")
    parser.add_argument(
        "--ceiling", action="store_true", help="score its VAE on clean clips, and sample nothing"
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="NAME=VALUE,…",
        help=f"every combination of values of {', '.join(SWEPT)}, seen and unseen, on prompts that "
        "published figures do not use; --out FILE.json is resumed, pictures are drawn beside it",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    if args.out and not args.out.absolute().parent.is_dir():
        raise ValueError(f"no folder {args.out.parent} for {args.out.name}")
    check_writable([args.out] if args.out else [])
    if args.prompts < 1 or args.batch < 1:
        raise ValueError("--prompts and --batch must be at least 1")
    if args.pipeline and not Path(args.pipeline).is_dir():
        raise ValueError(f"no pipeline folder {args.pipeline}")
    grid = parse_grid(args.sweep) if args.sweep else None
    if grid and args.out is None:
        raise ValueError("--sweep needs --out FILE.json, where its figures are kept")

    from gentron_fast import GenTronPipeline
    from gentron_fast.threads import settle_threads
    from gentron_train.data.sources import pipeline_digest

    settle_threads()
    device = args.device or choose_device(None)
    pipeline = GenTronPipeline.from_pretrained(args.pipeline, device=device)
    options = {"frames": args.frames} | chosen(args, pipeline.defaults)
    settings = {"prompts": args.prompts, "seed": args.seed, "frames": args.frames}
    if not args.ceiling:
        settings |= options
    if grid:
        model = {"model": pipeline_digest(Path(args.pipeline or ASSETS))}
        rows = sweep(pipeline, grid, args.out, model | settings, args.batch)
        print(sweep_table(rows))
        return
    if args.ceiling:
        scores = ceiling(pipeline, args.prompts, args.seed, args.columns, args.frames)
    else:
        scores = evaluate(
            pipeline, args.prompts, args.seed, args.batch, columns=args.columns, **options
        )
    print(format_table(scores))
    if args.out:
        columns = {name: asdict(column) for name, column in scores.items()}
        write_json(args.out, {"settings": settings, "scores": columns})


if __name__ == "__main__":
    sys.exit(main())
