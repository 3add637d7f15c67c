"""Make the model that ships, from nothing, in one run that can be cut off anywhere.

python -m gentron_train.shipped      (make train)

The stages of configs/shipped.yaml in order: the small world's shards, autoencoder, text encoders,
T2I, T2V, a sweep over guidance that chooses the defaults, a distilled model, figures and a
picture. What is done is noted in OUT/stages.json; started again, the run goes on where it was. At
the end OUT/pipeline is a pipeline folder, and OUT/MODEL.md tells how it was made.
"""

import argparse
import reprlib
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from gentron_fast.commandline import check_writable, refuse, run
from gentron_fast.config import SamplingDefaults
from gentron_fast.files import read_json, whole_file, whole_folder, write_json
from gentron_fast.pipeline import INDEX_NAME, PARTS
from gentron_fast.schema import Kind, several
from gentron_train.checkpoint import checkpoint_names
from gentron_train.settings import read_yaml
from gentron_train.small_world.evaluator import Scores, format_table
from gentron_train.small_world.sweep import SWEPT, choose, sweep_table

CONFIG = Path(__file__).parent / "configs" / "shipped.yaml"
ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "python": sys.executable,
    "deepspeed": str(Path(sys.executable).with_name("deepspeed")),
}
STATE = "stages.json"
DONE = several(
    Kind(
        "a stage with its command, seconds and commit",
        lambda stage: (
            isinstance(stage, dict)
            and all(isinstance(stage.get(name), str) for name in ("stage", "command", "commit"))
            and isinstance(stage.get("seconds"), int)
        ),
    ),
    *(0, 10_000),
)
NAME = "gentron_train.shipped"


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


def run_stages(stages: dict[str, list[list[str]]], out: Path) -> None:
    """Run what is not done yet. ValueError where a command fails; the next run begins there."""
    path = out / STATE
    if out.exists() and any(out.iterdir()) and not path.exists():
        raise ValueError(f"{out} holds something that no run of this made: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, {"done": []})
    done = _read_done(path)
    lines = [(name, words) for name, commands in stages.items() for words in commands]
    for number, (name, words) in enumerate(lines):
        line = shlex.join(words)
        if number < len(done):
            if done[number]["command"] != line:
                raise ValueError(
                    f"{path} was made by other commands: {done[number]['command']} in the place of "
                    f"{line}; choose another folder"
                )
            continue
        print(f"stage        {number + 1} of {len(lines)}, {name}: {line}", flush=True)
        start = time.monotonic()
        run_command(words, f"stage {name}")
        seconds = round(time.monotonic() - start)
        done.append({"stage": name, "command": line, "seconds": seconds, "commit": commit()})
        write_json(path, {"done": done})


def _read_done(path: Path) -> list[dict]:
    done = read_json(path, {"done": DONE}).get("done")
    if done is None:
        raise ValueError(f"{path} names no stage that is done; choose another folder")
    return done


def run_command(words: list[str], name: str) -> None:
    """Run a command of PROGRAMS in the checkout. ValueError that names it where it fails."""
    if code := _call(program(words)):
        raise ValueError(f"{name} ended with exit code {code}: {shlex.join(words)}")


def _call(command: list[str]) -> int:
    """Run a command in the checkout; its exit code. One that is interrupted ends before this."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            raise


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


def commit() -> str:
    """The commit that is checked out, "" outside a checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def assemble(out: Path) -> None:
    """OUT/pipeline: what T2V made, with the defaults that the sweep chooses."""
    sweep = read_json(out / "sweep.json")
    chosen = choose(sweep["rows"])
    guidance = {name: chosen[name] for name in SWEPT}
    with whole_folder(out / "pipeline", PARTS) as partial:
        shutil.copytree(out / "t2v" / "pipeline", partial, dirs_exist_ok=True)
        index = read_json(partial / INDEX_NAME)
        defaults = replace(SamplingDefaults.from_index(index), **guidance)
        write_json(partial / INDEX_NAME, index | defaults.to_index())


def model_page(out: Path) -> str:
    """MODEL.md: the commands with their times, the sweep, the figures."""
    done = read_json(out / STATE)["done"]
    sweep = read_json(out / "sweep.json")
    score, fast, ceiling = (read_json(out / f"{n}.json") for n in ("score", "fast", "ceiling"))
    tables = [
        format_table({name: Scores(**column) for name, column in part["scores"].items()})
        for part in (score, fast, ceiling)
    ]
    hours = sum(stage["seconds"] for stage in done) / 3600
    commits = ", ".join(dict.fromkeys(stage["commit"] for stage in done))
    commands = [f"    {stage['command']}    # {stage['seconds']} s" for stage in done]
    rows = sweep_table(sweep["rows"]).splitlines()
    parts = [
        "# The small model that ships",
        f"Made by `make train` in {hours:.1f} hours at {commits}:",
        "\n".join(commands).replace(str(out), "OUT"),
        f"Guidance, on {sweep['settings']['prompts']} prompts a column of another seed:",
        "\n".join(f"    {row}" for row in rows),
        f"{score['settings']['prompts']} prompts a column; shares in % with 95 % intervals:",
        "\n".join(f"    {line}" for line in tables[0].splitlines()),
        f"The distilled model, `--fast`, in {fast['settings']['steps']} steps of one branch:",
        "\n".join(f"    {line}" for line in tables[1].splitlines()),
        "Clean clips through the autoencoder, the most that can be reached:",
        "\n".join(f"    {line}" for line in tables[2].splitlines()),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 where a stage failed, told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; the same command goes on")


def _command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__)
    parser.error = refuse
    parser.add_argument("--out", type=Path, default=Path("runs/shipped"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--assemble", action="store_true", help=argparse.SUPPRESS)  # a stage
    args = parser.parse_args(argv)
    out = args.out.absolute()
    if args.assemble:
        assemble(out)
        return
    stages = read_stages(args.config, out)
    check_writable([out / STATE])
    run_stages(stages, out)
    with whole_file(out / "MODEL.md") as partial:
        partial.write_text(model_page(out), encoding="utf-8")
    print(f"wrote        {out / 'pipeline'}")


if __name__ == "__main__":
    sys.exit(main())
