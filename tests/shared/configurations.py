"""Seeded changes of the JSON files in a folder, and how a command line ends after each."""

import copy
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

SECONDS = 60  # nothing hangs
NUMBERS = [0, 1, 2, 3, -1, -4, 77, 10**9, 10**18, 10**400, 0.5, -0.5, 1e-9, 1e308, 1e999, -1e999]
OTHERS = [None, True, False, "", "x", "1", "../../x", "\ud800", [], {}, [1], {"a": 1}, [[0]]]


def places(value, place=()):
    """The places of all values in a JSON document."""
    if place:
        yield place
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from places(part, (*place, key))


def changed(values, chance: random.Random):
    """The document with another value in one place, and which."""
    # Long lists, such as a vocabulary, do not drown the rest: first how deep, then where.
    by_depth = {}
    for place in places(values):
        by_depth.setdefault(len(place), []).append(place)
    *path, last = chance.choice(by_depth[chance.choice(list(by_depth))])
    values = part = copy.deepcopy(values)
    for key in path:
        part = part[key]
    action = chance.choice(["number", "number", "other", "scaled", "gone", "new"])
    if action == "gone":
        del part[last]
    elif action == "new" and isinstance(part, dict):
        part[chance.choice(["auto_map", "quantization_config", "a"])] = chance.choice(OTHERS)
    elif action == "scaled" and type(part[last]) in (int, float):
        part[last] = part[last] * chance.choice([-1, 0.5, 2, 3]) + chance.choice([0, 1, -1])
    else:
        part[last] = chance.choice(NUMBERS if action == "number" else OTHERS)
    return values, f"{action} at {[*path, last]}"


def damaged(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """The file cut, with another byte, or with something else in it."""
    place = chance.randrange(len(content))
    kinds = {
        "cut": content[:place],
        "byte": content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :],
        "deep": b"[" * 200_000,
        "deep object": b'{"a":' * 200_000,
        "list": b"[]",
        "object": b"{}",
    }
    kind = chance.choice(list(kinds))
    return kinds[kind], f"{kind} at {place}"


def copied(folder: Path, target: Path) -> Path:
    """The folder with new JSON files; the others are the same files."""
    copy_file = lambda a, b: shutil.copy(a, b) if a.endswith(".json") else os.link(a, b)  # noqa: E731
    return Path(shutil.copytree(folder, target, copy_function=copy_file))


def changes(folder: Path, seeds: range) -> Iterator[str]:
    """One change of one JSON file in the folder for each seed, in words; undone after it."""
    files = sorted(folder.rglob("*.json"))
    for seed in seeds:
        chance = random.Random(seed)
        file = files[seed % len(files)]
        content = file.read_bytes()
        if chance.random() < 0.1:
            new, what = damaged(content, chance)
        else:
            values, what = changed(json.loads(content), chance)
            new = json.dumps(values).encode()
        file.write_bytes(new)
        yield f"seed {seed}: {file.relative_to(folder)}: {what}"
        file.write_bytes(content)


def _too_long(number, frame):
    raise AssertionError(f"it hangs after {SECONDS} s")


def ending(main, arguments: list, capfd) -> tuple[int | None, str]:
    """The exit code of a command line, and what is wrong with how it ended: 0 is well, 2 is one
    line, and nothing else is right."""
    disable_progress_bar()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        code = main([str(argument) for argument in arguments])
    except BaseException as error:  # a panic of a library is no Exception
        return None, f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    err = capfd.readouterr().err
    right = code == 0 or (code == 2 and re.fullmatch(r"[\w.]+: error: [^\n]+\n", err))
    if right and "Traceback" not in err and "panicked" not in err:
        return code, ""
    return code, f"exit code {code}: {err}"
