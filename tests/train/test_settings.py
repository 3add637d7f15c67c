"""Configuration files and the command line over them; batches that the ranks can make."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from gentron_fast import PRESETS
from gentron_fast.index import ASSETS
from gentron_fast.pipeline import stored_encoders
from gentron_train import shipped
from gentron_train.data.loader import DataSettings
from gentron_train.data.options import DataOptions, flag
from gentron_train.memory import model_config
from gentron_train.settings import (
    CONFIGS,
    RENAMED,
    Settings,
    load_config,
    parse_settings,
)

FILES = sorted(path for path in CONFIGS.glob("*.yaml") if path != shipped.CONFIG)


def refused(capsys, stage: str, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse_settings(stage, "", list(argv))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ": error: " in error
    return error


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_small_is_the_default():
    images, clips = (parse_settings(stage, "", []) for stage in ("t2i", "t2v"))
    assert images == parse_settings("t2i", "", ["--config", str(CONFIGS / "small.yaml")])
    assert (images.preset, images.run, images.init) == ("small", Path("runs/t2i"), None)
    assert (images.batch, images.draws, images.steps, images.lr) == (16, 4, 8300, 1e-3)
    assert (clips.batch, clips.draws, clips.steps) == (16, 1, 8000)
    defaults = load_config(CONFIGS / "small.yaml", "t2v")
    assert defaults["init"] == Path("runs/t2i/pipeline")


@pytest.mark.parametrize("stage", ["t2i", "t2v"])
def test_missing_parts_are_the_shipped_models(stage, tmp_path, monkeypatch, capsys):
    """Those that the file names; what the command line names is taken as it is."""
    monkeypatch.chdir(tmp_path)
    both, stored = ("clip", "t5"), stored_encoders(ASSETS)
    settings = parse_settings(stage, "", [])
    assert (settings.vae, settings.text) == (ASSETS / "vae", None)
    assert settings.text_sources(both) == stored
    assert settings.fresh_temporal == (stage == "t2v")
    told = capsys.readouterr().out.splitlines()
    if stage == "t2v":
        assert settings.init == ASSETS
        assert told == [
            "no T2I run in runs/t2i/pipeline: starting from the shared layers of the model that "
            "ships, temporal layers at zero"
        ]
    else:
        assert settings.init is None
        assert len(told) == 1 and told[0].startswith("no runs/vae and no runs/text: taking")
    assert parse_settings(stage, "", ["--vae=mine"]).vae == Path("mine")
    assert parse_settings(stage, "", ["--init=mine"]).init == Path("mine")
    nothing = parse_settings(stage, "", ["--no-shipped-parts"])
    assert nothing == Settings(
        **load_config(CONFIGS / "small.yaml", stage) | {"shipped_parts": False}
    )
    Path("runs/vae").mkdir(parents=True)
    Path("runs/text").mkdir()
    Path("runs/t2i/pipeline").mkdir(parents=True)
    there = parse_settings(stage, "", [])
    first, second = Path("runs/text"), Path("runs/t2i/pipeline")
    expected = (None, second) if stage == "t2v" else (first, None)
    assert there.vae == Path("runs/vae") and (there.text, there.init) == expected


@pytest.mark.parametrize(
    "arguments, there, rendered",
    [
        ([], None, True),
        (["--no-in-memory"], None, False),
        (["--images=a.tar"], None, False),
        (["--preset=XL/2"], None, False),
        ([], "index.json", False),
        ([], "images-00000.tar", False),
    ],
    ids=str,
)
def test_only_a_small_world_that_no_shard_holds_is_rendered(
    arguments, there, rendered, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if there:
        Path("data/shapes").mkdir(parents=True)
        Path("data/shapes", there).touch()
    settings = parse_settings("t2i", "", arguments)
    counts = {"images": 20000, "clips": 6000}
    assert settings.rendered_samples() == (counts if rendered else None)


def test_a_file_that_is_no_text_is_named(tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(b"lr: \xff")
    assert "run.yaml is not YAML: " in refused(capsys, "t2i", f"--config={tmp_path / 'run.yaml'}")


# Paper: size, samples a step, steps (none given for T2V).
@pytest.mark.parametrize(
    "name, stage, size, batch, steps",
    [
        ("t2i-256", "t2i", 256, 2048, 500_000),
        ("t2i-512", "t2i", 512, 784, 300_000),
        ("t2v-512", "t2v", 512, 128, None),
    ],
)
@pytest.mark.parametrize("preset", ["XL/2", "G/2"])
def test_the_papers_stages(name, stage, size, batch, steps, preset):
    path = CONFIGS / f"{name}.yaml"
    # What the file's head says of G/2.
    advice = re.search(r"for G/2 add (.*)", path.read_text())[1].rstrip(".").replace(" …", " X")
    extra = advice.split() if preset == "G/2" else []
    settings = parse_settings(stage, "", ["--config", str(path), *extra])
    assert settings.preset == preset
    height, width = settings.pixels()
    assert abs(height * width - size**2) < 0.05 * size**2
    assert settings.global_batch == batch and (steps is None or settings.steps == steps)
    assert (settings.lr, settings.warmup, settings.decay_ratio) == (1e-4, 0, 0.0)
    assert (settings.ema_decay, settings.max_loss_weight, settings.p_null) == (0.9999, 1.0, 0.1)
    assert (settings.frames, settings.fps, settings.p_motion_free) == (8, 4.0, 0.2)
    assert (settings.dtype, settings.parameters) == ("bf16", "bf16")
    for ranks in (8, 16):
        whole = settings.on(ranks) if batch % (settings.batch * ranks) == 0 else None
        if whole is not None:
            assert whole.batch * whole.accumulation * ranks == batch
    assert settings.on(8).accumulation >= 1
    expected = PRESETS[f"{preset}-T2V" if stage == "t2v" else preset]
    assert model_config(replace(settings, init=None), stage) == expected


def test_the_papers_last_stage_has_a_student_too():
    path = CONFIGS / "t2v-512.yaml"
    settings = Settings(**load_config(path, "distill"))
    assert (settings.p_motion_free, settings.init, settings.max_lambda_t) == (0, None, 8.0)
    assert settings.run != Settings(**load_config(path, "t2v")).run


def test_every_file_reads_and_names_all_that_it_sets():
    assert [path.stem for path in FILES] == ["small", "t2i-256", "t2i-512", "t2v-512"]
    for path in FILES:
        for stage in ("t2i", "t2v"):
            Settings(**load_config(path, stage))


def test_the_command_line_counts_over_the_file(tmp_path):
    config = written(tmp_path, "lr: 1e-4\nbatch: 3\nt2i: {batch: 5}\n")
    settings = parse_settings("t2i", "", [config, "--batch=7"])
    assert (settings.lr, settings.batch) == (1e-4, 7)
    assert parse_settings("t2i", "", [config]).batch == 5
    assert parse_settings("t2v", "", [config]).batch == 3


def test_commands_are_allowed_on_the_command_line_only(tmp_path, capsys):
    for text in ("allow_pipes: true\n", "t2i:\n  allow_pipes: true\n"):
        error = refused(capsys, "t2i", written(tmp_path, text))
        assert "run.yaml: that is for the command line, --allow-pipes" in error
    named = written(tmp_path, "images: pipe:cat a.tar\n")
    with pytest.raises(ValueError, match="runs a command in a shell"):
        _ = parse_settings("t2i", "", [named]).data_settings("t2i").shards
    allowed = parse_settings("t2i", "", [named, "--allow-pipes"]).data_settings("t2i")
    assert [shard.url for shard in allowed.shards["images"]] == ["pipe:cat a.tar"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate: 1", "unknown field learning_rate in "),
        ("t2v: {bach: 1}", "unknown field bach in "),
        ("batch: many", "batch in {} is 'many', wanted int"),
        ("batch: 1.5", "batch in {} is 1.5, wanted int"),
        ("in_memory: 1", "in_memory in {} is 1, wanted bool"),
        ("batch: true", "batch in {} is True, wanted int"),
        ("steps:", "steps in {} is None, wanted int"),
        ("lr: [1]", "lr in {} is [1], wanted float"),
        ("- lr", "must hold fields with values"),
        ("t2i: 3", "section t2i of {} must hold fields"),
        ("lr: [", "is not YAML"),
        ("dtype: fp8", "--dtype is 'fp8', must be one of fp32, bf16"),
        ("lr: " + "9" * 400, "lr in {} is 99999"),
        ("lr: " + "9" * 5000, "{} is not YAML: "),
        ("lr: " + "[" * 3000, "{} is not YAML: "),
        ("lr: 2001-99-99", "{} is not YAML: "),
        ("lr: !!timestamp x", "{} is not YAML: "),
        ("1: 2\nx: 3", "unknown field 1, x in {}"),
        ("lr: .inf", "--lr is inf, must be above 0 and finite"),
    ],
    ids=lambda value: value[:12],
)
def test_wrong_files(tmp_path, capsys, text, message):
    error = refused(capsys, "t2i", written(tmp_path, text))
    assert message.format(tmp_path / "run.yaml") in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "0"], "--batch is 0, must be at least 1"),
        (["--p-null", "1.5"], "--p-null is 1.5, must be in 0 … 1"),
        (["--min-timestep", "900", "--max-timestep", "1"], "must be a range within 0 … 999"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--no-such-option"], "unrecognized arguments"),
        (["--config", "nothing.yaml"], "no such configuration: nothing.yaml"),
        (["--size", "big"], "--size is 'big', wanted a side or HxW"),
        (["--dtype", "fp32", "--parameters", "bf16"], "--dtype fp32 needs --parameters fp32"),
        (["--lr", "0"], "--lr is 0.0, must be above 0"),
        (["--timeout", "inf"], "--timeout is inf, must be above 0 and finite"),
        (["--timeout", "1e300"], "--timeout is 1e+300, must be at most 10000000"),
        (["--cache-gib", "inf"], "--cache-gib is inf, must be above 0 and finite"),
        (["--config"], "argument --config: expected one argument"),
        (["--ema-decay", "1"], "--ema-decay is 1.0, must be at least 0 and below 1"),
        (["--model", "depth"], "--model takes NAME=VALUE of depth, width, heads, mlp_ratio, "),
        (["--model", "temporal=true"], "got 'temporal=true'"),
        (["--model", "depth=4", "none"], "got 'None'"),
        (["--model", ""], "got ''"),
        (["--model", "depth=4", "depth=4"], "--model names depth twice"),
        (["--model", "depth=:["], "--model depth=:[: depth is ':[', wanted a whole number from 1"),
        (["--model", "width=110"], "--model width=110: width 110 is not divisible by 4 heads"),
        (["--model", "encoders=bert"], "encoders must be some of ('clip', 't5'), got ('bert',)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_settings(arguments, message, capsys):
    assert message in refused(capsys, "t2i", *arguments)


@pytest.mark.parametrize(
    "changes, ranks, accumulation",
    [
        ({"global_batch": 2048, "batch": 32}, 8, 8),
        ({"global_batch": 784, "batch": 14}, 56, 1),
        ({"global_batch": 128, "batch": 2}, 64, 1),
        ({"global_batch": 64, "batch": 4, "draws": 2}, 2, 4),
        ({"global_batch": 64, "batch": 4, "accumulation": 8}, 2, 8),
        ({"batch": 4}, 2, 1),
        ({"batch": 4, "accumulation": 3}, 2, 3),
    ],
)
def test_accumulation(changes, ranks, accumulation):
    settings = Settings(**changes)
    assert settings.on(ranks).accumulation == accumulation
    total = changes.get("global_batch", 4 * ranks * accumulation)
    assert settings.batch_line(ranks).startswith(f"batch {total} = {settings.batch} per rank")


@pytest.mark.parametrize(
    "changes, ranks, message",
    [
        ({"global_batch": 784, "batch": 32}, 8, "784 is no multiple .*--batch 1 or 2 or 7 or 14"),
        ({"global_batch": 784, "batch": 14}, 64, "64 ranks × 1 draws do not divide it"),
        ({"global_batch": 8, "batch": 16}, 2, "--batch 1 or 2 or 4 fits"),
        ({"global_batch": 64, "batch": 4, "accumulation": 2}, 2, "that takes 8"),
    ],
)
def test_batches_that_cannot_be_made(changes, ranks, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes).on(ranks)


def test_parts_of_the_init_folder_count_over_the_file(tmp_path, tiny_t2i_folder, capsys):
    """A file's encoders and autoencoder give way to those in --init, these to the command line."""
    config = written(tmp_path, "vae: runs/vae\nclip: a/clip\nt5: a/t5\ntext: runs/text\n")
    init, bare = f"--init={tiny_t2i_folder}", tmp_path / "bare"
    both = ("clip", "t5")
    own = {
        "clip": (tiny_t2i_folder / "text_encoder", tiny_t2i_folder / "tokenizer"),
        "t5": (tiny_t2i_folder / "text_encoder_2", tiny_t2i_folder / "tokenizer_2"),
    }
    settings = parse_settings("t2v", "", [config, init])
    assert settings.vae == tiny_t2i_folder / "vae"
    assert settings.text_sources(both) == own
    assert settings.text_sources(("t5",)) == {"t5": own["t5"]}  # what is not read is not loaded
    settings = parse_settings("t2v", "", [config, init, "--vae=v", "--clip=c"])
    assert settings.vae == Path("v")
    assert settings.text_sources(both) == own | {"clip": ("c", "c")}
    settings = parse_settings("t2v", "", [config, init, "--text=words"])
    assert settings.text_sources(both)["t5"] == (Path("words/t5"), Path("words/t5"))
    bare.mkdir()
    settings = parse_settings("t2v", "", [config, f"--init={bare}"])
    assert settings.vae == Path("runs/vae")
    assert settings.text_sources(both) == {"clip": ("a/clip",) * 2, "t5": ("a/t5",) * 2}
    (bare / "text_encoder_2").mkdir()  # as of a PixArt
    settings = parse_settings("t2v", "", [config, f"--init={bare}"])
    assert settings.text_sources(both)["t5"] == (bare / "text_encoder_2", bare / "tokenizer_2")
    assert settings.text_sources(both)["clip"] == ("a/clip", "a/clip")
    assert parse_settings("t2v", "", [config, init]).preset == "small"  # of the file: no matter
    error = refused(capsys, "t2v", init, "--preset=XL/2")
    assert "--preset XL/2 is of depth, width, heads, patch_size [28, 1152, 16, 2]" in error
    assert f"{tiny_t2i_folder} holds [2, 48, 4, 2]" in error


def test_fields_of_a_preset_otherwise(tmp_path, tiny_t2i_folder, capsys):
    """On the command line and in a file, in what a run records, and held against --init."""
    words = ["depth=4", "width=112", "encoders=clip", "cross_attention=false", "mlp_ratio=6"]
    config = written(tmp_path, f"t2i: {{model: {' '.join(words)}}}\n")
    given = {"depth": 4, "width": 112, "encoders": ("clip",), "cross_attention": False}
    wanted = replace(PRESETS["small"], mlp_ratio=6.0, **given)
    for argv in ([config], ["--model", *words]):
        settings = parse_settings("t2i", "", argv)
        assert model_config(settings, "t2i") == wanted
        assert Settings.from_dict(settings.to_dict()) == settings
    assert parse_settings("t2i", "", [config, "--model", "none"]).model is None
    assert model_config(parse_settings("t2v", "", [config]), "t2v").depth == 6
    init = f"--init={tiny_t2i_folder}"
    stored = parse_settings("t2v", "", [init, "--model", "depth=2", "encoders=clip,t5"])
    assert model_config(stored, "t2v").width == 48
    error = refused(capsys, "t2v", init, "--model", "depth=4")
    assert f"--model depth=4: {tiny_t2i_folder} holds a model of depth 2" in error


def test_none_and_sizes_on_the_command_line(tmp_path, capsys):
    config = written(tmp_path, "buckets: 64x64,32x96\nminutes: 3\nclip: none\n")
    settings = parse_settings("t2i", "", [config])
    assert settings.pixels() == (64, 64) and settings.clip is None
    settings = parse_settings("t2i", "", [config, "--buckets=none", "--minutes=none"])
    assert settings.buckets is settings.minutes is None
    settings = parse_settings("t2i", "", [config, "--size=96"])
    assert settings.pixels() == (96, 96) and settings.data_settings("t2i").buckets == ()
    settings = parse_settings("t2i", "", [config, "--checkpoint-activations=none"])
    assert settings.checkpoint_activations == "none"
    assert "invalid float value: 'many'" in refused(capsys, "t2i", "--minutes=many")
    assert "invalid int value: 'none'" in refused(capsys, "t2i", "--batch=none")
    both = refused(capsys, "t2i", "--size=64", "--buckets=64x64,32x96")
    assert "--size 64 and --buckets 64x64,32x96: give one" in both


# Values that are no defaults, by the names that files, command lines and checkpoints had once.
FORMER = {"decay_last": 0.5, "narrow_first": 0.25, "weight_cap": 3.0, "keep": 9, "starts": 4}
FORMER |= {"clip_norm": 2.0, "ema": 0.5}


def test_former_names(tmp_path, capsys):
    """Read as the settings that they are now, and told in one line."""
    assert FORMER.keys() == RENAMED.keys()
    wanted = {RENAMED[name]: value for name, value in FORMER.items()}
    config = written(tmp_path, yaml.safe_dump(FORMER))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FORMER.items()]
    for argv in ([config], flags):
        settings = parse_settings("t2i", "", argv)
        assert {name: getattr(settings, name) for name in wanted} == wanted
        told = [line for line in capsys.readouterr().out.splitlines() if " is now " in line]
        assert len(told) == 1
        for name, new in RENAMED.items():
            old, now = (name, new) if argv == [config] else (flag(name), flag(new))
            assert f"{old} is now {now}" in told[0]
    assert parse_settings("t2i", "", ["--keep", "9"]).save_total_limit == 9
    stored = Settings(**wanted).to_dict()
    former = {new: name for name, new in RENAMED.items()}
    stored = {former.get(name, name): value for name, value in stored.items()}
    assert Settings.from_dict(stored) == Settings(**wanted)
    both = refused(capsys, "t2i", written(tmp_path, "keep: 1\nsave_total_limit: 2\n"))
    assert "keep and save_total_limit in " in both and "are one setting" in both


def test_the_loader_takes_the_settings_own_values():
    settings = Settings(frames=3, seed=7, p_null=0.5, windows_per_clip=2, in_memory=True)
    data = settings.data_settings("t2v")
    for item in fields(DataOptions):
        assert getattr(data, item.name) == getattr(settings, item.name)
        assert item.default == getattr(DataSettings(), item.name)


def test_settings_go_to_json_and_back():
    settings = parse_settings("t2v", "", ["--minutes=3", "--no-in-memory", "--buckets=64x64,32x96"])
    assert Settings.from_dict(settings.to_dict()) == settings
    assert settings.pixels() == (64, 64)
    assert settings.data_settings("t2v").buckets == ((64, 64), (32, 96))
    with pytest.raises(ValueError, match="unknown field nonsense"):
        Settings.from_dict(settings.to_dict() | {"nonsense": 1})
    assert all(item.metadata["help"] for item in fields(Settings))
