"""One change of a type or value in one JSON file of a folder: it ends well or in one line.

`make faults` makes FAULTS times as many changes.
"""

import json
import re

import pytest
from configurations import changes, copied, ending
from faults import EXIT_CODES, FAULTS

from gentron_fast import GenTron, GenTronPipeline
from gentron_fast.generate import main

TRIALS = 150 * FAULTS


@pytest.mark.faults
def test_a_changed_configuration_ends_well_or_in_one_line(
    tiny_pipeline_folder, tmp_path, capfd, tally
):
    folder = copied(tiny_pipeline_folder, tmp_path / "model")
    arguments = ["a", "--model", folder, "--steps", 1, "--frames", 1, "--size", 16, 16]
    arguments += ["--device", "cpu", "--out", tmp_path / "out/"]
    endings = {what: ending(main, arguments, capfd) for what in changes(folder, range(TRIALS))}
    wrong = {what: told for what, (_, told) in endings.items() if told}
    assert not wrong, json.dumps(wrong, indent=1)
    assert {code for code, _ in endings.values()} == {0, 2}
    for code, _ in endings.values():
        tally(EXIT_CODES[code])


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
        ("model_index.json", {"default_lambda_t": 10**400}, "default_lambda_t of"),
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
