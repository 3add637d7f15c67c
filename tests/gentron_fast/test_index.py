"""What a pipeline folder samples with: read from its index, told by --help and --verbose."""

import argparse
import json

import pytest

from gentron_fast.config import SamplingDefaults
from gentron_fast.index import ASSETS, FAST, chosen, in_force, sampling_defaults, told


def folder_of(path, **values):
    path.mkdir(parents=True)
    (path / "model_index.json").write_text(json.dumps(values))
    return path


def test_what_is_in_force_is_that_of_the_folder_that_is_named(tmp_path):
    model = folder_of(tmp_path / "model", default_lambda_t=2.5, default_steps=7)
    folder_of(model / FAST, default_steps=3, default_solver="few-step")
    own = {"lambda_t": "2.5", "steps": "7", "lambda_m": "1.2", "rescale": "0", "solver": "dpm++"}
    for words in ([str(model)], ["a prompt", "--model", str(model)], [f"--model={model}", ""]):
        assert in_force([*words, "--help"]) == own
    assert in_force([str(model), "--fast"])["solver"] == "few-step"
    ships = sampling_defaults(ASSETS)
    assert in_force(["--help"])["lambda_t"] == f"{ships.lambda_t:g}"


@pytest.mark.parametrize("content", ["{", '{"default_steps": 0}'])
def test_what_cannot_be_read_is_in_force_nowhere(content, tmp_path):
    (tmp_path / "model_index.json").write_text(content)
    assert set(in_force([str(tmp_path)]).values()) == {"?"}


def test_what_a_command_line_gives_comes_before_the_folder():
    given = argparse.Namespace(steps=None, solver=None, lambda_t=0.0, lambda_m=1.0, rescale=None)
    values = chosen(given, SamplingDefaults(steps=20))
    assert told(values) == "steps 20, solver dpm++, lambda_t 0, lambda_m 1, rescale 0"
