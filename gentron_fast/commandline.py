"""What the command lines share: how they end, number types, and checks before the work begins."""

import argparse
import logging
import math
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

# How launchers tell a process its number and of how many: torchrun and deepspeed, and Slurm in a
# step (srun). A batch script by itself is no step, and has the second one's SLURM_PROCID alone.
RANK_VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "SLURM_LOCALID")


def run(
    name: str, command: Callable[[], None], argv: Sequence[str], interrupted: str, wrong=()
) -> int:
    """Call a command line's work. Returns 0, 2 after wrong input (told in one line, with --verbose
    in argv behind a traceback), 130 after Ctrl-C or SIGTERM, of which `interrupted` tells.

    Wrong input is OSError, ValueError, too little memory, and the errors of `wrong`.
    """
    stopped = []

    def stop(number, frame):
        stopped.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"{name}: {message}", file=sys.stderr)
            command()
    except SystemExit:  # --help
        raise
    except BaseException as error:
        # A library that was interrupted while it was imported may raise something else.
        if stopped or isinstance(error, KeyboardInterrupt):
            print(f"{name}: {interrupted}", file=sys.stderr)
            return 130
        reason = " ".join(str(error).split())
        if _is_lack_of_memory(error):
            reason = f"too little memory: {reason or type(error).__name__}"
        elif not isinstance(error, (OSError, ValueError, *wrong)):
            raise
        if "--verbose" in argv:
            traceback.print_exc()
        print(f"{name}: error: {reason}", file=sys.stderr)
        return 2
    return 0


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether Python, a CUDA device, or torch on the CPU, which has no class for it, tells so."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def refuse(message: str):
    raise ValueError(message)


def described_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Of a command whose --help shows its description as it is written."""
    parser = argparse.ArgumentParser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = refuse
    return parser


def whole_number(low: int, high: int | None = None):
    """The argparse type of whole numbers from `low` to `high`."""
    wanted = f"of at least {low}" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?\d+", text) else None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"wanted a whole number {wanted}, got {text!r}")
        return value

    return read


def utf8_text(text: str) -> str:
    """The argparse type of prompts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"wanted UTF-8 text, got {text!a}") from None
    return text


def number(text: str) -> float:
    """The argparse type of finite numbers."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"wanted a number, got {text!r}")
    return value


def rank_and_world() -> tuple[int, int]:
    """This process's number and of how many that share the work, by its launcher's variables; 0 of
    1 without them. ValueError where they do not go together."""
    for rank_name, world_name in RANK_VARIABLES:
        rank, world = os.environ.get(rank_name, ""), os.environ.get(world_name, "")
        if not world and (not rank or rank_name != "RANK"):
            continue
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise ValueError(
                f"{rank_name} is {rank!r} of {world_name} {world!r}: "
                f"wanted 0 <= {rank_name} < {world_name}"
            )
        return int(rank), int(world)
    return 0, 1


def share(work: Sequence, noun: str) -> Sequence:
    """What this rank has to do of the work, told in one line where there are others. It goes by
    number and not by what is missing, which another rank may be making now."""
    rank, world = rank_and_world()
    mine = work[rank::world]
    if world > 1:
        print(f"rank {rank} of {world}: {len(mine)} of {len(work)} {noun}", flush=True)
    return mine


def choose_device(name: str | None):
    """The torch.device of that name, tried out; without a name CUDA where there is one: of several
    GPUs the one of this process's number on its machine."""
    import torch

    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        numbers = (os.environ.get(name, "") for name in LOCAL_RANK_VARIABLES)
        local = next((int(number) for number in numbers if number.isdecimal()), None)
        return torch.device("cuda", None if local is None else local % torch.cuda.device_count())
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"unknown device {name!r}: wanted cpu, cuda or cuda:N")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name} here: {str(error).splitlines()[0]}") from error


def check_ray(args: argparse.Namespace) -> None:
    """ValueError where --cores or --device do not go with --ray, or with its absence."""
    if args.ray is None:
        if args.cores is not None:
            raise ValueError("--cores is for --ray, and there is none")
    elif str(args.device) not in ("None", "cpu", "cuda"):
        raise ValueError(f"--ray goes with --device cpu or cuda, got {str(args.device)!r}")


def usable_device(text: str):
    """The argparse type of devices, each tried out."""
    try:
        return choose_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_writable(paths: Iterable[Path]) -> None:
    """ValueError where one of these files cannot be written; before the work, and nothing stays."""
    paths = list(paths)
    for folder in dict.fromkeys(path.absolute().parent for path in paths):
        there = next(one for one in (folder, *folder.parents) if os.path.exists(one))
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
            longest = os.pathconf(there, "PC_NAME_MAX")
        except OSError as error:
            raise ValueError(f"cannot write into {folder}: {error.strerror}") from error
        for path in paths:
            if any(len(os.fsencode(part)) > longest for part in path.parts):
                raise ValueError(
                    f"cannot write {path}: a name in it is longer than {longest} bytes"
                )
    for path in paths:
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder")


def silence_libraries() -> None:
    """Keep the libraries' advice and bars away from ours; our own warnings are shown."""
    warnings.filterwarnings("ignore", module="(?!gentron_fast)")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("transformers", "diffusers"):  # where one was imported before
        logging.getLogger(library).setLevel(logging.ERROR)
