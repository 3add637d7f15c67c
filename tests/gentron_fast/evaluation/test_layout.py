import json

import numpy as np
import pytest
from PIL import Image

from gentron_fast.evaluate import main
from gentron_fast.evaluation.layout import compbench, list_entries, tell_renamed, vbench
from gentron_fast.index import ASSETS

LONG = "a bird " * 50


@pytest.fixture
def prompts(tmp_path):
    """A folder of prompt files: two categories, and the lists of complex prompts."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "color_val.txt").write_text("a red car and a blue cup\r\na green bench.\r\n")
    complex_prompts = ["The hat was on top of the rack.", "an either/or sign", "a file_name", LONG]
    (folder / "complex_val.txt").write_text("\n".join(complex_prompts))
    (folder / "complex_val_spatial.txt").write_text("The hat was on top of the rack.\n")
    (folder / "complex_val_action.txt").write_text("a file_name\n")
    return folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*[34g]"))


def test_official_names_of_images(prompts):
    with pytest.warns(UserWarning, match="has no shape_val.txt, texture_val.txt"):
        layout = compbench(prompts)
    names = [sample.name for sample in layout.samples]
    assert len(names) == len(set(names)) == 2 * 10 + 4 * 10
    assert names[:2] == [f"color/samples/a red car and a blue cup_00000{i}.png" for i in (0, 1)]
    assert names[10] == "color/samples/a green bench_000010.png"  # its full stop is left out
    assert layout.samples[10].prompt == "a green bench."  # and the model reads it
    assert names[30] == "complex/samples/an either or sign_000010.png"
    assert all(len(name.rpartition("/")[2].encode()) <= 255 for name in names)
    assert {*layout.renamed.values()} == {"an either/or sign", "a file_name", LONG.strip()}
    assert len(list(tell_renamed(layout))) == 3
    assert layout.kinds["action"] == ["a file_name"]


def test_official_names_of_clips(tmp_path):
    (tmp_path / "temporal_flickering.txt").write_text("a still lake\n")
    (tmp_path / "scene.txt").write_text("a park\na/b\na still lake\n")
    layout = vbench(tmp_path)
    names = [sample.name for sample in layout.samples]
    assert len(names) == len(set(names)) == 5 + 5 + 25
    assert "videos/a park-4.mp4" in names and "videos/a still lake-24.mp4" in names
    assert list(layout.renamed.values()) == ["a/b"] * 5
    assert len(vbench(tmp_path / "scene.txt").samples) == 15


@pytest.fixture
def evaluate(capsys):
    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_generate_resumes_image_by_image_over_ranks(
    evaluate, prompts, tiny_t2i_folder, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    arguments = ["generate", tiny_t2i_folder, "--compbench", prompts, "--out", run, "--count", 2]
    arguments += ["--first", 2, "--steps", 1, "--batch", 4, "--device", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, out, err = evaluate(*arguments)
    assert code == 0, err
    half = files(run)
    assert half == [
        "color/samples/a green bench_000003.png",
        "color/samples/a red car and a blue cup_000001.png",
        "complex/samples/The hat was on top of the rack_000001.png",
        "complex/samples/an either or sign_000003.png",
    ]
    monkeypatch.setenv("RANK", "0")
    code, out, err = evaluate(*arguments)
    assert code == 0 and "maps an either or sign_000002.png to it" in err
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    everything = files(run)
    assert len(everything) == 8
    entries = list_entries(
        run, "complex", json.loads((run / "manifest.json").read_text())["renamed"]
    )
    assert [entry.prompt for entry in entries] == [
        *["The hat was on top of the rack"] * 2,
        *["an either/or sign"] * 2,
    ]
    lost = run / everything[3]
    before = np.asarray(Image.open(lost)).astype(int)
    lost.unlink()
    code, out, err = evaluate(*arguments)
    assert (code, files(run)) == (0, everything) and f"7 of 8 clips, already in {run}\n" in out
    # The same seed, alone as in a batch.
    assert np.abs(np.asarray(Image.open(lost)) - before).max() <= 1
    code, out, err = evaluate(*arguments, "--seed", 7)
    assert code == 2 and "begun with seed 0, this call has 7" in err


def test_generate_writes_clips(evaluate, tiny_pipeline_folder, tmp_path):
    (tmp_path / "scene.txt").write_text("a park\n")
    run = tmp_path / "run"
    arguments = ["--vbench", tmp_path / "scene.txt", "--out", run, "--count", 2, "--device", "cpu"]
    code, _, err = evaluate("generate", tiny_pipeline_folder, *arguments, "--steps", 1)
    assert (code, files(run)) == (0, ["videos/a park-0.mp4", "videos/a park-1.mp4"]), err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "wanted generate or score"),
        (["generate", "here", "--out", "run"], "--compbench FOLDER or --vbench PROMPTS"),
        (["generate", "here", "--compbench", "nowhere", "--out", "run"], "no color_val.txt in"),
        (["generate", "here", "--vbench", "nowhere", "--out", "run"], "no prompt file nowhere"),
    ],
    ids=["nothing", "no benchmark", "no folder", "no file"],
)
def test_refused_in_one_line(evaluate, arguments, words):
    code, out, err = evaluate(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--negative-prompt", "x"], "takes no negative prompt, got 'x'"),
        (["--rescale", 0.5], "nothing to rescale by"),
        (["--reuse", 2], "none to reuse: got 2"),
    ],
    ids=str,
)
def test_what_a_distilled_model_refuses_begins_no_run(evaluate, prompts, tmp_path, options, words):
    arguments = ["generate", ASSETS / "fast", "--compbench", prompts, "--out", tmp_path / "run"]
    code, _, err = evaluate(*arguments, "--device", "cpu", *options)
    assert code == 2 and words in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_ranks_that_do_not_fit(evaluate, prompts, tiny_t2i_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = tmp_path / "run"
    code, _, err = evaluate("generate", tiny_t2i_folder, "--compbench", prompts, "--out", run)
    assert code == 2 and "wanted 0 <= RANK < WORLD_SIZE" in err and not run.exists()
