import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from gentron_fast.config import PRESETS
from gentron_fast.generate import HELP, file_name, main
from gentron_fast.index import ASSETS, in_force
from gentron_fast.media import read_video
from gentron_fast.solvers import SOLVERS
from gentron_fast.text import TextEncoder

PROMPT = "a red circle moving left"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def generate(tiny_pipeline_folder, tmp_path, capsys):
    """(*arguments) → (exit code, stdout, stderr), two steps with the tiny pipeline, in process."""
    disable_progress_bar()  # main does it by the environment, too late once transformers is there

    def run(*arguments, model=tiny_pipeline_folder, out=tmp_path / "out"):
        defaults = ["--model", model, "--steps", 2, "--device", "cpu", "--out", out]
        code = main([str(argument) for argument in (*defaults, *arguments)])
        return code, *capsys.readouterr()

    return run


def process(*arguments, **options):
    command = [sys.executable, "-m", "gentron_fast.generate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_refused(code, out, err, *words):
    assert (code, out) == (2, "")
    assert err.startswith("gentron_fast.generate: error: ") and err.count("\n") == 1, err
    for word in words:
        assert str(word) in err


def test_process_writes_a_clip_and_reports(tiny_pipeline_folder, tmp_path):
    arguments = [PROMPT, "--model", tiny_pipeline_folder, "--steps", 2, "--device", "cpu"]
    done = process(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    stem = "outputs/a-red-circle-moving-left-seed0"
    assert names(tmp_path / "outputs") == [os.path.basename(stem) + e for e in (".gif", ".mp4")]
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["wrote", f"{stem}.mp4,", f"{stem}.gif"]
    assert [line[:13].strip() for line in lines[1:]] == ["load time", "per clip", "peak memory"]
    frames, fps = read_video(tmp_path / f"{stem}.mp4")
    assert frames.shape == (4, 64, 64, 3) and fps == 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([PROMPT, "--solver", "euler"], ["euler", *SOLVERS]),
        ([PROMPT, "--model", "nowhere"], ["no pipeline in nowhere"]),
        ([PROMPT, "--lambda-t", "much"], ["--lambda-t", "'much'"]),
    ],
    ids=["solver", "model", "lambda"],
)
def test_process_refuses_in_one_line(tiny_pipeline_folder, tmp_path, arguments, words):
    done = process("--model", tiny_pipeline_folder, *arguments, cwd=tmp_path)
    assert_refused(done.returncode, done.stdout, done.stderr, *words)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_interrupt_leaves_no_half_file(signal_number, tiny_pipeline_folder, tmp_path):
    arguments = [PROMPT, "--model", str(tiny_pipeline_folder), "--steps", "1000", "--verbose"]
    running = subprocess.Popen(
        [sys.executable, "-m", "gentron_fast.generate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # A test run in the background ignores SIGINT, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stdout.readline().startswith("loaded")
    running.send_signal(signal_number)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 130
    assert err.count("\n") == 1 and "interrupted" in err
    assert not (tmp_path / "outputs").exists()


def test_help_fits_one_screen_and_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == HELP.format_map(in_force([])).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert all(solver in HELP for solver in SOLVERS)
    source = sys.modules[main.__module__].__loader__.get_source(main.__module__)
    options = [part.split('"')[0] for part in source.split('add_argument("--')[1:]]
    assert len(options) > 20 and all(f"--{option} " in HELP for option in options)


def test_words_that_the_small_model_has_never_seen_are_told(tmp_path, capsys):
    prompts = ["an orange circle moving left", "an orange white square", "a red circle moving left"]
    assert main([*prompts, "--steps", "1", "--image", "--out", f"{tmp_path}/"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "never seen" in line]
    assert [line.partition("seen: ")[2] for line in told] == ["an, orange"]
    assert len(list(tmp_path.iterdir())) == 3
    tokenizer = TextEncoder.tokenizers_alone({"clip": ASSETS / "tokenizer"})
    assert tokenizer.remarks(prompts[1]) == ["the model has never seen: an, orange"]


def test_reading_the_arguments_loads_no_torch():
    code = (
        "import sys, gentron_fast.generate as g; g.parse_arguments(['x']);"
        "sys.exit(bool({'torch', 'transformers', 'diffusers', 'av'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["a prompt is needed"]),
        (["  "], ["the prompt is empty"]),
        ([PROMPT, "--lambda-t", "nan"], ["--lambda-t", "'nan'"]),
        ([PROMPT, "--guidance-range", 0.5, 0.2], ["guidance range", "0.5", "0.2"]),
        ([PROMPT, "--lambda-m", "inf"], ["--lambda-m", "'inf'"]),
        ([PROMPT, "--lambda-m", ""], ["--lambda-m", "''"]),
        ([PROMPT, "--steps", 0], ["--steps", "at least 1", "'0'"]),
        ([PROMPT, "--steps", "1e3"], ["--steps", "'1e3'"]),
        ([PROMPT, "--steps", 1001], ["1001", "1000"]),
        ([PROMPT, "--frames", 0], ["--frames", "from 1 to 32", "'0'"]),
        ([PROMPT, "--frames", 33], ["--frames", "from 1 to 32", "'33'"]),
        ([PROMPT, "--frames", 8, "--image"], ["--image", "8"]),
        ([PROMPT, "--size", 64], ["--size"]),
        ([PROMPT, "--size", 64, 0], ["--size", "'0'"]),
        ([PROMPT, "--size", 100000000, 64], ["--size", "from 1 to 32768", "'100000000'"]),
        ([PROMPT, "--negative-prompt", "\udcff"], ["--negative-prompt", "wanted UTF-8 text"]),
        (["\udcff"], ["prompt", "wanted UTF-8 text"]),
        ([PROMPT, "--clips", 10**12], ["--clips", "from 1 to 100000"]),
        ([PROMPT, "--size", 60, 64], ["60x64", "multiples of"]),
        ([PROMPT, "--size", 64, 68], ["64x68", "multiples of"]),
        ([PROMPT, "--eta", 0.5], ["eta", "ddim"]),
        ([PROMPT, "--eta", 2, "--solver", "ddim"], ["eta", "0 to 1"]),
        ([PROMPT, "--seed", -1], ["--seed", "'-1'"]),
        ([PROMPT, "--seed", 2**64 - 1, "--clips", 2], ["--seed", "--clips 2", "2**64 - 1"]),
        ([PROMPT, "--clips", 0], ["--clips", "'0'"]),
        ([PROMPT, "--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        ([PROMPT, "--device", "abacus"], ["abacus", "cuda"]),
        ([PROMPT, "--device", "cuda:99"], ["cuda:99"]),
        ([PROMPT, "--shiny"], ["--shiny"]),
        ([PROMPT, "--out", "clip.avi"], [".avi", ".mp4"]),
        ([PROMPT, "--out", "clip.png"], ["--grid", "--image"]),
        ([PROMPT, "--out", "clip.gif", "--image"], [".gif", ".png"]),
        ([PROMPT, "--out", "clip.mp4", "--clips", 2], ["one file", "2 clips"]),
        ([PROMPT, "a blue square", "--out", "clip.mp4"], ["one file", "2 clips"]),
        ([PROMPT, "--prompts", "prompts.txt"], ["not both"]),
        (["--prompts", "prompts.txt"], ["no prompts file prompts.txt"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_refuses_wrong_arguments(generate, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(*generate(*arguments), *words)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["holds no prompt"]),
        (b"\n# only a comment\n  \n", ["holds no prompt"]),
        (b"\xff\xfe\x00", ["not UTF-8"]),
    ],
    ids=["empty", "comments", "binary"],
)
def test_refuses_prompts_files_without_prompts(generate, tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert_refused(*generate("--prompts", path), path, *words)


@pytest.mark.parametrize("out", ["file/clips/", "file/clip.mp4"])
def test_refuses_an_unwritable_folder_before_loading(generate, tmp_path, monkeypatch, out):
    (tmp_path / "file").touch()  # nothing can be written below a file, not even by root
    monkeypatch.setattr("gentron_fast.generate.load_pipeline", None)
    assert_refused(*generate(PROMPT, out=f"{tmp_path}/{out}"), "cannot write into", tmp_path)


def test_refuses_names_that_cannot_be_written_before_loading(generate, tmp_path, monkeypatch):
    monkeypatch.setattr("gentron_fast.generate.load_pipeline", None)
    for name in (f"{'a' * 252}.mp4", f"new/{'a' * 256}/clip.mp4"):
        assert_refused(*generate(PROMPT, out=f"{tmp_path}/{name}"), name[-9:])
    (tmp_path / "clip.png").mkdir()
    out = f"{tmp_path}/clip.mp4"
    assert_refused(*generate(PROMPT, "--grid", out=out), "clip.png: it is a folder")
    assert names(tmp_path) == ["clip.png"]


def damage_index(folder):
    (folder / "model_index.json").unlink()


def damage_config(folder):
    (folder / "transformer" / "config.json").write_text("{")


def damage_scheduler(folder):
    (folder / "scheduler" / "scheduler_config.json").unlink()


def damage_header(folder):
    (folder / WEIGHTS).write_bytes(b"no safetensors")


def damage_length(folder):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


def damage_text_encoder(folder):
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"no safetensors")


def damage_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer_2")


def damage_vae(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def edit_tensors(edit):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


@pytest.mark.parametrize(
    "damage, words",
    [
        (damage_index, ["model_index.json"]),
        (damage_config, ["config.json"]),
        (damage_scheduler, ["scheduler_config.json"]),
        (damage_header, [WEIGHTS]),
        (damage_length, [WEIGHTS]),
        (damage_text_encoder, ["text_encoder"]),
        (damage_tokenizer, ["tokenizer_2"]),
        (damage_vae, ["vae"]),
        (edit_tensors(lambda tensors: tensors.pop("patch_embed.bias")), ["patch_embed.bias"]),
        (edit_tensors(lambda tensors: tensors.update(extra=torch.zeros(1))), ["extra"]),
        (
            edit_tensors(lambda tensors: tensors.update({"patch_embed.bias": torch.zeros(7)})),
            ["patch_embed.bias", "(7,)", "(48,)"],
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_refuses_damaged_folders(generate, tiny_pipeline_folder, tmp_path, damage, words):
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline_folder, folder)
    damage(folder)
    assert_refused(*generate(PROMPT, model=folder), folder, *words)


def test_refuses_clips_of_an_image_model(generate, tiny_t2i_folder):
    assert_refused(*generate(PROMPT, "--frames", 8, model=tiny_t2i_folder), "makes images", 8)


def test_verbose_adds_the_traceback(generate):
    code, _, err = generate(PROMPT, "--verbose", "--solver", "euler")
    assert code == 2
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("gentron_fast.generate:")


def test_verbose_tells_the_branches(generate):
    code, out, _ = generate(PROMPT, "--verbose", "--guidance-range", 0, 0.5)
    line = next(line for line in out.splitlines() if line.startswith("guidance "))
    assert code == 0 and "1 steps of 3 branches; 1 steps of 1 branches" in line
    assert "null t5 constant" in line and "of the work saved" in line


def test_fast_takes_the_distilled_model_in_the_folder(
    generate, make_model, tiny_config, tiny_pipeline_folder, tmp_path
):
    assert_refused(*generate(PROMPT, "--fast"), "has no distilled model, fast/model_index.json")
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline_folder, folder)
    student = make_model(replace(tiny_config, guidance_embedding=True), torch.float32)
    student.save_pretrained(folder / "fast" / "transformer")
    index = json.loads((folder / "model_index.json").read_text())
    own = index | {"shared_parts": "..", "default_lambda_t": 2.5}
    (folder / "fast" / "model_index.json").write_text(json.dumps(own))
    code, out, _ = generate(PROMPT, "--fast", "--verbose", model=folder)
    assert code == 0 and "2 steps of one branch, distilled" in out and "lambda_t 2.5" in out
    assert_refused(*generate(PROMPT, "--negative-prompt", "x", model=folder / "fast"), "distilled")
    own["shared_parts"] = "/tmp"
    (folder / "fast" / "model_index.json").write_text(json.dumps(own))
    assert_refused(*generate(PROMPT, "--fast", model=folder), "shared_parts", "'/tmp'")


def test_image_model_writes_png(generate, tiny_t2i_folder, tmp_path):
    code, _, err = generate(PROMPT, model=tiny_t2i_folder)
    assert (code, err) == (0, "")
    assert names(tmp_path / "out") == ["a-red-circle-moving-left-seed0.png"]


def test_image_of_a_clip_model_in_one_file(generate, tmp_path):
    code, out, _ = generate(PROMPT, "--image", "--size", 32, 64, out=tmp_path / "new" / "one.PNG")
    assert code == 0 and "one.PNG" in out
    assert names(tmp_path / "new") == ["one.PNG"]
    assert Image.open(tmp_path / "new" / "one.PNG").size == (64, 32)


def test_grid_holds_all_frames(generate, tmp_path):
    assert generate(PROMPT, "--frames", 3, "--grid", out=tmp_path / "grid.png")[0] == 0
    assert generate(PROMPT, "--frames", 3, "--grid", out=tmp_path / "clip.gif")[0] == 0
    assert names(tmp_path) == ["clip.gif", "clip.png", "grid.png"]
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (3 * 64 + 2 * 2, 64)
    assert np.array_equal(np.asarray(grid), np.asarray(Image.open(tmp_path / "clip.png")))


def test_options_reach_the_pipeline(generate, tmp_path, monkeypatch):
    calls = []

    def call(pipeline, prompts, **options):
        calls.append((prompts, options | {"dtype": next(pipeline.vae.parameters()).dtype}))
        return type("Output", (), {"frames": torch.zeros(len(prompts), 5, 64, 64, 3).byte()})

    monkeypatch.setattr("gentron_fast.pipeline.GenTronPipeline.__call__", call)
    code, out, _ = generate(
        *["a", "b", "--clips", 2, "--batch", 3, "--seed", 7, "--negative-prompt", "c"],
        *["--frames", 5, "--size", 32, 64, "--steps", 9, "--solver", "ddim", "--eta", 0.5],
        *["--lambda-t", 3, "--lambda-m", 1, "--dtype", "bfloat16", "--fps", 8],
    )
    assert code == 0 and out.startswith("4 clips")
    assert [prompts for prompts, _ in calls] == [["a", "a", "b"], ["b"]]
    assert [options["seed"] for _, options in calls] == [[7, 8, 7], [8]]
    wanted = {"negative_prompt": "c", "frames": 5, "size": [32, 64], "steps": 9, "solver": "ddim"}
    wanted |= {"eta": 0.5, "lambda_t": 3.0, "lambda_m": 1.0, "dtype": torch.bfloat16}
    assert wanted.items() <= calls[0][1].items()
    stems = [f"{name}-seed{seed}" for name in "ab" for seed in (7, 8)]
    assert names(tmp_path / "out") == [stem + end for stem in stems for end in (".gif", ".mp4")]
    assert read_video(tmp_path / "out" / "a-seed7.mp4")[1] == 8


def test_a_clip_is_the_same_in_any_batch(generate, tmp_path):
    prompts = ["a red circle moving left", "a blue square"]
    assert generate(*prompts, "--image", "--batch", 2, out=tmp_path / "together/")[0] == 0
    assert generate(prompts[1], "--image", out=tmp_path / "alone/")[0] == 0
    together, alone = (
        np.asarray(Image.open(tmp_path / folder / "a-blue-square-seed0.png")).astype(int)
        for folder in ("together", "alone")
    )
    assert abs(together - alone).max() <= 1


def test_a_prompts_file_resumes(generate, tmp_path):
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    lines = (
        "# three, one of them twice\na red\u2028circle\r\n\n  a blue square  \na red\u2028circle\n"
    )
    path.write_text(lines, newline="")
    assert generate("--prompts", path, "--frames", 2)[0] == 0
    written = names(out)
    assert len(written) == 4
    first = {name: (out / name).stat().st_mtime_ns for name in written}

    (out / "a-blue-square-seed0.gif").unlink()
    code, stdout, err = generate("--prompts", path, "--frames", 2)
    assert (code, err) == (0, "") and names(out) == written
    assert stdout.splitlines()[0].split(maxsplit=1) == [
        "skipped",
        f"1 of 2 clips, already in {out}",
    ]
    changed = {name for name in written if (out / name).stat().st_mtime_ns != first[name]}
    assert changed == {"a-blue-square-seed0.gif", "a-blue-square-seed0.mp4"}

    code, stdout, _ = generate("--prompts", path, "--frames", 2)
    assert code == 0 and "2 of 2" in stdout and stdout.count("\n") == 1


def test_ranks_share_the_clips_of_a_prompts_file(generate, tmp_path, monkeypatch):
    path, out = tmp_path / "prompts.txt", tmp_path / "out"
    path.write_text("a red circle\na blue square\na green square\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in (("1", ["a-blue-square"]), ("0", ["a-blue-square", "a-green", "a-red"])):
        monkeypatch.setenv("RANK", rank)
        code, stdout, err = generate("--prompts", path, "--image")
        assert (code, err) == (0, "") and stdout.startswith(f"rank {rank} of 2: ")
        assert len(names(out)) == len(there)
        assert all(name.startswith(start) for name, start in zip(names(out), there, strict=True))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr("gentron_fast.generate.load_pipeline", None)
    assert_refused(*generate(PROMPT), "wanted 0 <= RANK < WORLD_SIZE")


def test_interrupt_in_process(generate, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gentron_fast.generate.write_clip", stop)
    code, _, err = generate(PROMPT, "--image")
    assert code == 130 and err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_told_in_one_line(generate, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("gentron_fast.pipeline.GenTronPipeline.__call__", fail)
    assert_refused(*generate(PROMPT), "too little memory: ", error)


def test_an_interrupt_that_a_library_makes_an_error_of_is_one(generate, monkeypatch):
    def stop(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(9)
        except KeyboardInterrupt:
            raise ImportError("half imported") from None

    monkeypatch.setattr("gentron_fast.generate.load_pipeline", stop)
    code, _, err = generate(PROMPT)
    assert code == 130 and err.count("\n") == 1


def test_file_names_tell_prompts_apart():
    assert file_name(PROMPT) == "a-red-circle-moving-left"
    prompts = [
        "a red circle",
        "A red circle",
        "a red circle.",
        "a red-circle",
        "...",
        "красный круг",
    ]
    prompts += ["a" * 300, "a" * 301, "круг" * 100]
    stems = [file_name(prompt) for prompt in prompts]
    assert len(set(stems)) == len(prompts)
    assert all(stem and len(f"{stem}-seed0.mp4".encode()) <= 255 for stem in stems)
    assert not any("/" in stem or stem.startswith((".", "-")) for stem in stems)


def test_the_default_model_is_the_one_that_ships(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("gentron_fast.generate.ASSETS", tmp_path)
    assert main([PROMPT]) == 2
    assert f"no pipeline in {tmp_path}" in capsys.readouterr().err


def test_a_config_of_another_family_is_named(generate, tiny_pipeline_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline_folder, folder)
    values = PRESETS["small"].to_dict() | {"rope": True}
    (folder / "transformer" / "config.json").write_text(json.dumps(values))
    assert_refused(*generate(PROMPT, model=folder), "describes no GenTron", "rope")
