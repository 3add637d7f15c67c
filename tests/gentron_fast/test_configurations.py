"""One change of a type or value in one JSON file of a folder: it ends well or in one line.

`make faults` makes FAULTS times as many changes.
"""

import copy
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from transformers.utils.logging import disable_progress_bar

from gentron_fast import GenTron, GenTronPipeline
from gentron_fast.generate import main

TRIALS = 150 * int(os.environ.get("FAULTS", "1"))
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


def too_long(number, frame):
    raise AssertionError(f"it hangs after {SECONDS} s")


@pytest.fixture
def one_line(capfd):
    """(main, arguments, what) → what is wrong with how the command ended, or None."""
    disable_progress_bar()

    def run(main, arguments, what):
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        try:
            code = main([str(argument) for argument in arguments])
        except BaseException as error:  # a panic of a library is no Exception
            return f"{what}: {type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
        err = capfd.readouterr().err
        told = re.fullmatch(r"gentron_[\w.]+: error: [^\n]+\n", err) if code == 2 else code == 0
        if not told or "Traceback" in err or "panicked" in err:
            return f"{what}: exit code {code}: {err}"
        codes.append(code)
        return None

    codes = run.codes = []
    return run


def test_a_changed_configuration_ends_well_or_in_one_line(tiny_pipeline_folder, tmp_path, one_line):
    folder = copied(tiny_pipeline_folder, tmp_path / "model")
    arguments = ["a", "--model", folder, "--steps", 1, "--frames", 1, "--size", 16, 16]
    arguments += ["--device", "cpu", "--out", tmp_path / "out/"]
    files = sorted(folder.rglob("*.json"))
    wrong = []
    for seed in range(TRIALS):
        chance = random.Random(seed)
        file = files[seed % len(files)]
        content = file.read_bytes()
        if chance.random() < 0.1:
            new, what = damaged(content, chance)
        else:
            values, what = changed(json.loads(content), chance)
            new = json.dumps(values).encode()
        file.write_bytes(new)
        what = f"seed {seed}: {file.relative_to(folder)}: {what}"
        wrong.append(one_line(main, arguments, what))
        file.write_bytes(content)
    assert not any(wrong), "\n".join(filter(None, wrong))
    assert set(one_line.codes) == {0, 2}


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("transformer/config.json", {"depth": 10**9}, "from 1 to 1024"),
        ("transformer/config.json", {"heads": 0}, "heads is 0"),
        ("transformer/config.json", {"heads": -4}, "heads is -4"),
        ("transformer/config.json", {"patch_size": -2}, "patch_size is -2"),
        ("transformer/config.json", {"position_base_size": 0}, "position_base_size is 0"),
        ("transformer/config.json", {"position_interpolation": 0}, "position_interpolation is 0"),
        ("model_index.json", {"default_size": [64]}, "a list of 2, each a whole number"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("text_encoder_2/config.json", {"d_ff": 2**20}, "parameters, its weights hold"),
        ("text_encoder/config.json", {"hidden_act": "none"}, "text_encoder: KeyError: 'none'"),
        ("vae/config.json", {"block_out_channels": [2**16] * 4}, "parameters, its weights hold"),
        ("vae/config.json", {"scaling_factor": "0.18215"}, "scaling_factor"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "77"}, "model_max_length"),
        (
            "tokenizer_2/tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["code.py", None]}},
            "code of its own to be run",
        ),
        ("vae/config.json", {"auto_map": {}}, "code of its own to be run"),
    ],
    ids=lambda value: str(value)[:48],
)
def test_what_is_out_of_range_is_named_with_its_file(
    name, change, words, tiny_pipeline_folder, tmp_path
):
    folder = copied(tiny_pipeline_folder, tmp_path / "model")
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        GenTronPipeline.from_pretrained(folder)
    assert str(path.parent) in str(caught.value)


@pytest.mark.parametrize("shards", [None, {"a": "../../x"}, {"a": 1}, []], ids=str)
def test_an_index_leads_to_files_beside_it(shards, tiny_pipeline_folder, tmp_path):
    folder = copied(tiny_pipeline_folder, tmp_path / "model") / "transformer"
    weights = next(folder.glob("*.safetensors"))
    weights.rename(folder / "shard.safetensors")
    index = {} if shards is None else {"weight_map": shards}
    (folder / f"{weights.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no weight_map of tensors to files beside it"):
        GenTron.from_pretrained(folder)
