"""Put a distilled model beside its teacher, where `generate --fast` takes it:

python -m gentron_train.add_fast TEACHER STUDENT [--steps 8]

Of the pipeline folder STUDENT, which train/distill.py makes, its transformer goes to TEACHER/fast;
all other parts are TEACHER's. Then gentron_train.few_steps TEACHER/fast fits timesteps to it.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from gentron_fast.commandline import described_parser, run, whole_number
from gentron_fast.config import SamplingDefaults
from gentron_fast.files import whole_folder, write_json
from gentron_fast.index import FAST, INDEX_NAME, SHARED_PARTS, read_index
from gentron_train.settings import stored_config
from gentron_train.teacher import SHARED_FIELDS

NAME = "gentron_train.add_fast"
STEPS = 8  # docs/decisions.md


def add_fast(teacher: Path, student: Path, steps: int = STEPS) -> None:
    """Make TEACHER/fast, or make it anew, with few steps by default. FileNotFoundError or
    ValueError where a folder is no pipeline, or the student's model not distilled; what is there
    then stays."""
    for folder in (teacher, student):
        if not (folder / INDEX_NAME).is_file():
            raise FileNotFoundError(f"{folder} is no whole pipeline: no {INDEX_NAME}")
    own, wanted = (stored_config(folder / "transformer") for folder in (student, teacher))
    if not own.guidance_embedding:
        raise ValueError(f"{student} is not distilled: train/distill.py --teacher {teacher}")
    if wanted.guidance_embedding:
        raise ValueError(f"{teacher} is distilled itself: name its teacher's folder")
    for name in SHARED_FIELDS:
        found, needed = getattr(own, name), getattr(wanted, name)
        if found != needed:
            raise ValueError(
                f"{student} has {name} {found}, {teacher} has {needed}: not its student"
            )
    index = read_index(student)
    defaults = replace(SamplingDefaults.from_index(index), steps=steps, solver="few-step")
    with whole_folder(teacher / FAST, (INDEX_NAME, "transformer")) as partial:
        shutil.copytree(student / "transformer", partial / "transformer")
        write_json(partial / INDEX_NAME, index | defaults.to_index() | {SHARED_PARTS: ".."})


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; the folder is as it was")


def _command(argv: list[str]) -> None:
    parser = described_parser(NAME, __doc__)
    parser.add_argument("teacher", type=Path, help="pipeline folder, which gets fast/")
    parser.add_argument("student", type=Path, help="pipeline folder of a distilled model")
    parser.add_argument(
        "--steps", type=whole_number(1, 1000), default=STEPS, help=f"by default ({STEPS})"
    )
    args = parser.parse_args(argv)
    add_fast(args.teacher, args.student, args.steps)
    print(f"wrote        {args.teacher / FAST}")


if __name__ == "__main__":
    sys.exit(main())
