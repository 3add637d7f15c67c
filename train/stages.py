"""Commands one after another, each once: what is done is noted, what was cut off goes on."""

import itertools
import reprlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from gentron_fast.files import LOCK_NAME, lock_folder, read_json, write_json
from gentron_fast.processes import signal_at_parents_end
from gentron_fast.schema import Kind, optional, several
from gentron_fast.threads import available_cores, processor
from gentron_train.checkpoint import EXPORTED, checkpoint_names
from gentron_train.settings import read_yaml
from gentron_train.small_world.renderer import INDEX_NAME as SHARDS_INDEX

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "python": sys.executable,
    "deepspeed": str(Path(sys.executable).with_name("deepspeed")),
}
STATE = "stages.json"
STAGE = Kind(
    "a stage with its command, seconds and commit",
    lambda stage: (
        isinstance(stage, dict)
        and all(isinstance(stage.get(name), str) for name in ("stage", "command", "commit"))
        and isinstance(stage.get("seconds"), int)
    ),
)
STATE_SCHEMA = {"done": several(STAGE, 0, 10_000), "begun": optional(STAGE)}
NOTED = 20.0  # seconds between two notes of how long a command has run
CODE = ("gentron_fast", "kernels", "csrc", "train")


def read_stages(path: Path, out: Path) -> dict[str, list[list[str]]]:
    """The commands of each stage, as words. FileNotFoundError or ValueError that names the file."""
    stages = read_yaml(path)
    if not isinstance(stages, dict) or not all(isinstance(v, list) for v in stages.values()):
        raise ValueError(f"{path} must hold stages, each a list of commands")
    return {name: [_words(line, out, path) for line in lines] for name, lines in stages.items()}


def _words(line: object, out: Path, path: Path) -> list[str]:
    try:
        words = shlex.split(line.format(out=shlex.quote(str(out))))
    except (AttributeError, LookupError, ValueError):
        words = []
    if not words or words[0] not in PROGRAMS:
        wanted = f"{' or '.join(PROGRAMS)} with arguments, and no braces but {{out}}"
        raise ValueError(f"{path} holds the command {reprlib.repr(line)}, wanted {wanted}")
    return words


def run_stages(
    stages: dict[str, list[list[str]]],
    out: Path,
    turn: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Run what is not done yet, each command in its own `turn`. ValueError where one fails, and the
    next run begins there, or where another process runs this.

    Noted is what a command took in all, and at which commits, however often it was cut off.
    """
    path = out / STATE
    held = {file.name for file in out.iterdir()} - {LOCK_NAME} if out.exists() else set()
    if held and STATE not in held:
        raise ValueError(f"{out} holds something that no run of this made: choose another folder")
    lock_folder(out)
    if not path.exists():
        write_json(path, {"done": []})
    done, begun = _read_state(path)
    lines = [(name, words) for name, commands in stages.items() for words in commands]
    if len(done) > len(lines):
        raise ValueError(
            f"{path} was made by other commands: {len(done)} are done, here are {len(lines)}; "
            "choose another folder"
        )
    for number, (name, words) in enumerate(lines):
        line = shlex.join(words)
        known = done[number] if number < len(done) else begun if number == len(done) else None
        if known is not None and known["command"] != line:
            raise ValueError(
                f"{path} was made by other commands: {known['command']} in the place of "
                f"{line}; choose another folder"
            )
        if number < len(done):
            continue
        print(f"stage        {number + 1} of {len(lines)}, {name}: {line}", flush=True)
        noted = known or {"stage": name, "command": line, "seconds": 0, "commit": commit()}
        noted["commit"] = listed([*commits_of(noted), commit()])
        noted["machine"] = listed([*machines_of(noted), machine()])
        with turn():
            start = time.monotonic() - noted["seconds"]

            def note(noted=noted, start=start) -> None:
                noted["seconds"] = round(time.monotonic() - start)
                write_json(path, {"done": done, "begun": noted})

            note()
            run_command(words, f"stage {name}", note)
            note()
        done.append(noted)
        begun = None
        write_json(path, {"done": done})


def commits_of(stage: dict) -> list[str]:
    """Of a stage that was begun at several."""
    return stage["commit"].split(", ")


def machines_of(stage: dict) -> list[str]:
    """Likewise; of a stage that was noted before machines were, none."""
    return stage["machine"].split(", ") if "machine" in stage else []


def listed(names: Iterable[str]) -> str:
    """Each name once, in one line."""
    return ", ".join(dict.fromkeys(names))


def _read_state(path: Path) -> tuple[list[dict], dict | None]:
    """What is done, and what was begun."""
    state = read_json(path, STATE_SCHEMA)
    if state.get("done") is None:
        raise ValueError(f"{path} names no stage that is done; choose another folder")
    return state["done"], state.get("begun")


def run_command(words: list[str], name: str, note: Callable[[], None]) -> None:
    """Run a command of PROGRAMS in the checkout; `note` is called now and then. ValueError that
    names it where it fails, lacks its data, or has not made what it says."""
    options = dict(itertools.pairwise(words))
    if "--data" in options and not (index := ROOT / options["--data"] / SHARDS_INDEX).is_file():
        raise ValueError(f"{name} needs the shards of an earlier stage, and {index} is gone")
    if code := _call(program(words), note):
        raise ValueError(f"{name} ended with exit code {code}: {shlex.join(words)}")
    # The deepspeed command takes the death of its launcher for success.
    if "--run" in options and not (made := ROOT / options["--run"] / EXPORTED).is_dir():
        raise ValueError(f"{name} ended without {made}: {shlex.join(words)}")


def _call(command: list[str], note: Callable[[], None]) -> int:
    """Run a command in the checkout; its exit code. It is asked to end where this ends."""
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=_end_with_parent) as process:
        try:
            while True:
                try:
                    return process.wait(NOTED)
                except subprocess.TimeoutExpired:
                    note()
        except BaseException:
            process.terminate()
            raise


def _end_with_parent() -> None:
    signal_at_parents_end(signal.SIGTERM)


def program(words: list[str]) -> list[str]:
    """A command of this Python's own environment, as it is called in the checkout; a training that
    was cut off is resumed."""
    command = [PROGRAMS[words[0]], *words[1:]]
    if words[0] == "deepspeed":
        command[1:1] = ["--master_port", str(_free_port())]  # two trainings may share a machine
    if "--run" in words and checkpoint_names(ROOT / words[words.index("--run") + 1])[0]:
        command.append("--resume")
    return command


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def machine() -> str:
    """The processor, and how many of its cores may be kept busy."""
    return f"{available_cores()} cores of {processor()}"


def commit() -> str:
    """The commit that is checked out, with -dirty where its code was changed since; "" outside a
    checkout."""
    head = _git("rev-parse", "--short", "HEAD")
    changed = head and _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return f"{head}-dirty" if changed else head


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
