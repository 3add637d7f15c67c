"""Checkpoints: resumed by as many ranks, by fewer and by more; kept whole; exported."""

import contextlib
import errno
import io
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from deepspeed import comm as dist
from faults import FAULTS
from safetensors.torch import load_file, save_file
from training import log_of

from gentron_fast import GenTron, GenTronPipeline
from gentron_train import assembly, export_pipeline, process, trainer
from gentron_train import checkpoint as checkpoint_module
from gentron_train.checkpoint import (
    FILES,
    INFO_NAME,
    check_digests,
    file_digests,
    latest_checkpoint,
    read_info,
    read_sharded,
    shard_of,
    write_info,
)
from gentron_train.data.sources import folder_digest

# Eight samples a step on one rank as on two.
OPTIONS = ("--global-batch=8", "--batch=2", "--draws=2", "--steps=6", "--save-every=2")
OPTIONS += (
    "--windows-per-clip=1",
    "--log-every=1",
    "--no-tensorboard",
    "--warmup=1",
    "--save-total-limit=3",
)
OPTIONS += ("--dtype=fp32", "--parameters=fp32", "--decay-ratio=0")


def train(world: Path, init: Path, run: Path, *options: str) -> None:
    argv = [f"--data={world / 'data'}", f"--vae={world / 'vae'}", f"--init={init}", f"--run={run}"]
    process.run(lambda: trainer.train("t2i", "", [*argv, *OPTIONS, *options]))


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in log_of(run)]


def averages(run: Path, weights=export_pipeline.averaged_weights) -> dict:
    """The averaged weights of the last checkpoint, whole."""
    checkpoint = latest_checkpoint(run)
    info = read_info(checkpoint)
    read = weights(checkpoint, info)
    return {name: read(name) for name in info["parameters"]}


def load_whole(checkpoint: Path) -> dict:
    """The averaged weights of a checkpoint's transformer."""
    info = read_info(checkpoint)
    read, prefix = export_pipeline.averaged_weights(checkpoint, info), "transformer."
    return {n.removeprefix(prefix): read(n) for n in info["parameters"] if n.startswith(prefix)}


def masters(run: Path) -> dict:
    return averages(run, export_pipeline.master_weights)


def distance(weights: dict, reference: dict) -> float:
    """‖weights - reference‖ / ‖reference‖ over all tensors that have a gradient: the bias of k has
    none but rounding, of which Adam makes steps."""
    names = [name for name in reference if not name.endswith(("kv.bias", "k_proj.bias"))]
    ours, theirs = (
        torch.cat([tensors[name].flatten() for name in names]) for tensors in (weights, reference)
    )
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def whole_run(ranks, world, tiny_t2i_folder, tmp_path_factory):
    """Six fp32 steps on two ranks, with checkpoints at 2, 4 and 6."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert ranks.wait(ranks.start(2, train, world, tiny_t2i_folder, run)) == [0, 0]
    return run


def cut(run: Path, copy: Path) -> Path:
    """The run as it was after its first checkpoint."""
    shutil.copytree(run, copy)
    for step in (4, 6):
        shutil.rmtree(copy / "checkpoints" / f"step-0000000{step}")
    (copy / "checkpoints" / "latest").write_text("step-00000002\n")
    return copy


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_resume_to_the_bit(
    ranks, world, tiny_t2i_folder, tmp_path, whole_run, monkeypatch, sharded
):
    if sharded:  # another run, of a model that is never whole
        monkeypatch.setattr(assembly, "WHOLE_MODEL", 0)
        whole_run = tmp_path / "whole"
        pids = ranks.start(2, train, world, tiny_t2i_folder, whole_run)
        assert ranks.wait(pids) == [0, 0]
    assert names(whole_run) == ["latest", "step-00000002", "step-00000004", "step-00000006"]
    resumed = cut(whole_run, tmp_path / "run")
    shutil.rmtree(resumed / "pipeline")
    pids = ranks.start(2, train, world, tiny_t2i_folder, resumed, "--resume")
    assert ranks.wait(pids) == [0, 0]
    assert losses(resumed) == losses(whole_run) and len(losses(resumed)) == 6
    for name in ("ema-rank0", "ema-rank1", "state-rank0", "state-rank1"):
        ours, theirs = (
            load_file(latest_checkpoint(run) / f"{name}.safetensors")
            for run in (resumed, whole_run)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    ours, theirs = masters(resumed), masters(whole_run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for path in (whole_run / "pipeline").rglob("*.safetensors"):
        again = resumed / path.relative_to(whole_run)
        assert again.read_bytes() == path.read_bytes(), path


def test_another_number_of_ranks_resumes(ranks, world, tiny_t2i_folder, tmp_path, whole_run):
    """Two ranks to step 2, one to step 4, two to step 6."""
    run = cut(whole_run, tmp_path / "run")
    for count, steps in ((1, 4), (2, 6)):
        options = ("--resume", f"--steps={steps}", "--export-dtype=fp32")
        pids = ranks.start(count, train, world, tiny_t2i_folder, run, *options)
        assert ranks.wait(pids) == [0] * count
        assert read_info(latest_checkpoint(run))["ranks"] == count
    assert losses(run) == pytest.approx(losses(whole_run), rel=1e-6)
    assert distance(averages(run), averages(whole_run)) < 1e-6
    assert names(run) == names(whole_run)  # nothing of the conversion is left


def test_a_finished_run_exports_again(ranks, world, tiny_t2i_folder, tmp_path, whole_run):
    """As one that was killed between its last checkpoint and its export."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "pipeline")
    pids = ranks.start(2, train, world, tiny_t2i_folder, run, "--resume")
    assert ranks.wait(pids) == [0, 0]
    assert losses(run) == losses(whole_run) and names(run) == names(whole_run)
    for path in (whole_run / "pipeline").rglob("*.safetensors"):
        assert (run / path.relative_to(whole_run)).read_bytes() == path.read_bytes(), path


def test_a_damaged_checkpoint_is_left_for_the_one_before(
    ranks, world, tiny_t2i_folder, tmp_path, whole_run, capfd
):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    optimizer = next(checkpoint_of(run, 6).glob("*rank_1_*optim_states.pt"))
    flip(optimizer)
    (run / "checkpoints" / ".step-00000006.host.1.0.part").mkdir()
    pids = ranks.start(2, train, world, tiny_t2i_folder, run, "--resume")
    assert ranks.wait(pids) == [0, 0]
    told = f"{optimizer} is damaged: taking step-00000004, 2 steps lost\n"
    assert capfd.readouterr().out.count(told) == 1
    assert names(run) == names(whole_run)
    assert losses(run) == losses(whole_run)
    ours, theirs = masters(run), masters(whole_run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rotation_counts_whole_checkpoints(
    ranks, world, tiny_t2i_folder, tmp_path, whole_run, capfd
):
    """Three are kept: the damaged one is none of them. A `latest` that leads outside is told."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    flip(checkpoint_of(run, 4) / "ema-rank0.safetensors")
    (run / "checkpoints" / "latest").write_text("../../elsewhere\n")
    pids = ranks.start(2, train, world, tiny_t2i_folder, run, "--resume", "--steps=8")
    assert ranks.wait(pids) == [0, 0]
    told = "latest names no checkpoint: taking step-00000006, 0 steps lost\n"
    assert told in capfd.readouterr().out
    kept = [f"step-0000000{step}" for step in (2, 4, 6, 8)]
    assert names(run) == ["latest", *kept] and latest_checkpoint(run).name == kept[-1]


@pytest.mark.faults
@pytest.mark.parametrize("trial", range(FAULTS))
def test_a_run_folder_has_one_training(
    ranks, world, tiny_t2i_folder, tmp_path, capfd, tally, trial
):
    """Whose lock is free once it is killed, while it saves most often."""
    run, more = tmp_path / "run", ("--steps=100000", "--save-every=1")
    first = ranks.start(2, train, world, tiny_t2i_folder, run, *more)
    try:
        deadline = time.monotonic() + 120
        while latest_checkpoint(run) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = ranks.start(2, train, world, tiny_t2i_folder, run, "--resume")
        assert ranks.wait(second) == [2, 2]
        tally("refused")
        time.sleep(random.Random(trial).uniform(0, 1))
    finally:
        for pid in first:
            os.kill(pid, signal.SIGKILL)
    ranks.wait(first)
    refused = f"error: {run} is in use by process {first[0]} on "
    errors = capfd.readouterr().err
    assert errors.count(refused) == 2 and "Traceback" not in errors
    steps = read_info(latest_checkpoint(run))["step"] + 1
    third = ranks.start(2, train, world, tiny_t2i_folder, run, "--resume", f"--steps={steps}")
    assert ranks.wait(third) == [0, 0]
    assert not list((run / "checkpoints").glob(".*"))
    for name in names(run)[1:]:
        checkpoint = run / "checkpoints" / name
        check_digests(checkpoint, read_info(checkpoint)[FILES])
    tally("recovered")


POINTERS = [b"", b"\n", b"../../elsewhere", b"/etc", b"step-00000099\n", b"step-2", b"\xff\0" * 99]


def damage(run: Path, chance: random.Random) -> list[str]:
    """Damage some of a run's three checkpoints, and in one case of four `latest`; those that are
    whole, the newest first."""
    steps = [6, 4, 2]
    for step in chance.sample(steps, chance.choice([0, 1, 1, 1, 2, 2, 3])):
        folder = checkpoint_of(run, step)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        file, action = chance.choice(files), chance.randrange(8)
        if action == 0:
            file.unlink()
        elif action == 1:
            shutil.rmtree(folder)
        elif action == 2:
            shutil.copy(file, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
        else:
            content = file.read_bytes()
            place = chance.randrange(len(content))
            bit = bytes([content[place] ^ 1 << chance.randrange(8)])
            new = (
                content[:place] + bit + content[place + 1 :],
                content[:place],
                content + chance.randbytes(9),
                content[:place] + bytes(len(content) - place),
                chance.randbytes(len(content)),
            )[action - 3]
            file.write_bytes(new)
            if new == content or (file.name == INFO_NAME and content.strip() == new.strip()):
                continue  # zeros in place of zeros, a line's end that is no more
        steps.remove(step)
    if chance.random() < 0.25:
        pointer = run / "checkpoints" / "latest"
        pointer.unlink()
        if chance.random() < 0.8:
            pointer.write_bytes(chance.choice(POINTERS))
    return [f"step-{step:08d}" for step in steps]


def opened(whole: Path, run: Path, seeds: range) -> list[tuple]:
    """For each seed: the whole checkpoints of a damaged run, the one that two ranks take, and the
    line that tells of the others or refuses."""
    process.start_distributed(40)
    checkpoints, trials = checkpoint_module.Checkpoints(run, 2, torch.device("cpu")), []
    for seed in seeds:
        expected = None
        if checkpoints.is_main:
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(whole, run)
            expected = damage(run, random.Random(seed))
        checkpoints.barrier()
        try:
            resumed, line = checkpoints.open(True)
            trials.append((expected, resumed.folder.name, line))
        except ValueError as error:
            trials.append((expected, None, str(error)))
        checkpoints.barrier()
        if checkpoints.is_main:
            exported(run, whole)
    return trials


def exported(run: Path, whole: Path) -> None:
    """Export a damaged run: weights that one of the checkpoints had, or one line."""
    out, told = run.with_name("out"), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = export_pipeline.main([str(run), str(out), "--ema"])
    if code == 0:
        step = int(re.search(r": step (\d+), averaged", told.getvalue())[1])
        ours = GenTron.from_pretrained(out / "transformer").state_dict()
        theirs = load_whole(checkpoint_of(whole, step))
        assert all(torch.equal(ours[name], theirs[name].half().float()) for name in ours)
        shutil.rmtree(out)
    else:
        assert code == 2 and re.fullmatch(r"[\w.]+: error: [^\n]+\n", told.getvalue()), (
            told.getvalue()
        )
        assert not out.exists()


@pytest.mark.faults
def test_seeded_damage_is_never_taken(ranks, tmp_path, whole_run, tally):
    for first in range(0, 20 * FAULTS, 100):  # as many in one pair of processes
        seeds = range(first, min(first + 100, 20 * FAULTS))
        ours, others = ranks.call(2, opened, whole_run, tmp_path / "run", seeds)
        for seed, (whole, taken, line), (_, others_taken, others_line) in zip(
            seeds, ours, others, strict=True
        ):
            assert (taken, line) == (others_taken, others_line), seed
            assert taken == next(iter(whole), None), (seed, line)
            assert line is None or "\n" not in line, (seed, line)
            tally("refused" if taken is None else "recovered" if line else "ended well")


class MakesFolder:
    """What an unpickler would make a folder for."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("count", [2, 1], ids=["as-many-ranks", "resharded"])
def test_a_checkpoint_runs_no_code(
    ranks, world, tiny_t2i_folder, tmp_path, whole_run, capfd, count
):
    """Of a stranger, who made the digests right."""
    run, made = tmp_path / "run", tmp_path / "made"
    shutil.copytree(whole_run, run)
    checkpoint = latest_checkpoint(run)
    info, files = read_info(checkpoint), list(checkpoint.glob("*rank_0_*optim_states.pt"))
    torch.save({"optimizer_state_dict": MakesFolder(made)}, files[0])
    info[FILES] |= file_digests(checkpoint, [files[0].name])
    write_info(checkpoint / INFO_NAME, info)
    pids = ranks.start(count, train, world, tiny_t2i_folder, run, "--resume")
    assert ranks.wait(pids) == [2] * count
    errors = capfd.readouterr().err
    # A rank that still waits for the one that refused it tells that this is gone.
    told = errors.count(f"error: {checkpoint} cannot be read:")
    assert told and told + errors.count("error: another rank is gone") == count, errors
    assert "Traceback" not in errors and not made.exists()


def test_export_reads_masters_and_averages(tmp_path, whole_run, tiny_t2i_folder):
    checkpoint = latest_checkpoint(whole_run)
    for path in checkpoint.glob("*model_states.pt"):
        path.rename(path.with_suffix(".away"))  # not needed
    models = {}
    for flags in ((), ("--ema",)):
        out = tmp_path / "-".join(("out", *flags))
        arguments = [str(whole_run), str(out), "--dtype", "fp32", *flags]
        assert export_pipeline.main(arguments) == 0
        models[flags] = GenTron.from_pretrained(out / "transformer").state_dict()
        assert (out / "model_index.json").exists() and (out / "text_encoder").is_dir()
    for path in checkpoint.glob("*.away"):
        path.rename(path.with_suffix(".pt"))
    expected = averages(whole_run)
    assert all(torch.equal(models["--ema",][n], expected[f"transformer.{n}"]) for n in models[()])
    start = GenTron.from_pretrained(tiny_t2i_folder / "transformer").state_dict()
    # Six steps of at most 1e-3 each lead from the start to the masters.
    gap = max(float((models[()][name] - start[name]).abs().max()) for name in start)
    assert 1e-3 < gap < 6.1e-3
    assert distance(models[()], models["--ema",]) > 1e-6


def test_export_copies_what_is_stored_as_wanted(tmp_path, whole_run, world, monkeypatch):
    """Text encoders of the export's dtype are copied unopened, others loaded; the autoencoder is
    copied, for the latents that were computed with it."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    path = latest_checkpoint(run) / INFO_NAME
    info = read_info(path.parent)
    info["settings"] |= {"init": None, "text": str(world / "text")}
    write_info(path, info)
    loaded, load = [], export_pipeline.TextEncoder.from_pretrained
    monkeypatch.setattr(
        export_pipeline.TextEncoder,
        "from_pretrained",
        lambda **sources: loaded.append(set(sources)) or load(**sources),
    )
    assert export_pipeline.main([str(run), str(tmp_path / "fp32"), "--dtype=fp32"]) == 0
    assert not loaded
    assert export_pipeline.main([str(run), str(tmp_path / "fp16"), "--dtype=fp16"]) == 0
    assert loaded == [{"clip", "dtype"}, {"t5", "dtype"}]
    for kind in ("fp32", "fp16"):
        assert folder_digest(tmp_path / kind / "vae") == folder_digest(world / "vae")
        assert GenTronPipeline.from_pretrained(tmp_path / kind).default_size == (64, 64)
    shutil.rmtree(tmp_path / "fp32")
    info["settings"] |= {"text": str(tmp_path / "nowhere")}
    write_info(path, info)
    line = export_pipeline.export_pipeline(path.parent, tmp_path / "fp32", ema=True)
    assert "no whole pipeline, no clip text encoder at" in line
    assert not (tmp_path / "fp32" / "model_index.json").exists()


@pytest.mark.parametrize(
    "field, value",
    [
        *((field, None) for field in (FILES, "settings", "model", "ranks", "parameters")),
        (FILES, []),
        ("settings", {"lr": "much"}),
        ("model", {"depth": 1}),
        ("ranks", 10**9),
        ("ranks", 3),
        ("latents", 5),
        ("parameters", {"a": "b"}),
    ],
    ids=str,
)
def test_a_checkpoint_that_says_what_no_run_writes(
    field, value, tmp_path, whole_run, capsys, monkeypatch
):
    """Its own digest is right: the one before is taken; alone it is one line."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    last = latest_checkpoint(run)
    info = read_info(last) | {field: value}
    if value is None:
        del info[field]
    write_info(last / INFO_NAME, info)
    monkeypatch.setattr(export_pipeline, "_export", lambda checkpoint, *_: checkpoint.name)
    assert export_pipeline.main([str(run), str(tmp_path / "out"), "--ema"]) == 0
    told, taken = capsys.readouterr().out.splitlines()
    assert str(last / INFO_NAME) in told and taken == "step-00000004"
    assert export_pipeline.main([str(last), str(tmp_path / "out"), "--ema"]) == 2
    error = capsys.readouterr().err
    assert str(last / INFO_NAME) in error and error.count("\n") == 1


def test_export_of_what_is_no_checkpoint(tmp_path, capsys):
    assert export_pipeline.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "checkpoint.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def disk_full(world: Path, init: Path, run: Path, rank: int, *options: str) -> None:
    """A run of which one rank finds the disk full at step 4."""
    save = checkpoint_module.torch.save

    def limited(state, path) -> None:
        if dist.get_rank() == rank and "step-00000004" in str(path):
            Path(path).write_bytes(b"half of")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(state, path)

    checkpoint_module.torch.save = limited
    train(world, init, run, *options)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    ranks, world, tiny_t2i_folder, tmp_path, whole_run, capfd, rank
):
    run, options = tmp_path / "run", ("--steps=4",)
    pids = ranks.start(2, disk_full, world, tiny_t2i_folder, run, rank, *options)
    assert ranks.wait(pids) == [2, 2]
    captured = capfd.readouterr()
    assert f"no checkpoint at step 4: rank {rank}: [Errno 28] No space left" in captured.out
    assert "the last checkpoint could not be written" in captured.err
    assert names(run) == ["latest", "step-00000002"]
    assert latest_checkpoint(run).name == "step-00000002"
    before = latest_checkpoint(whole_run).with_name("step-00000002")
    for name in ("ema-rank0", "ema-rank1"):
        ours, theirs = (
            load_file(folder / f"{name}.safetensors") for folder in (latest_checkpoint(run), before)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("size, count", [(10, 1), (10, 3), (7, 2), (1, 4)])
def test_shards(tmp_path, size, count):
    whole = torch.arange(1.0, size + 1).view(size)
    part = -(-size // count)
    paths = [tmp_path / f"{rank}.safetensors" for rank in range(count)]
    for rank, path in enumerate(paths):
        save_file({"weight": shard_of(whole, part, rank)}, path)
    assert torch.equal(read_sharded(paths, "weight", (size, 1)), whole[:, None])


def test_another_ranks_partial_file_may_be_renamed_meanwhile(tmp_path, monkeypatch):
    for name in ("own", ".partial-of-another"):
        (tmp_path / name).touch()
    opened, opens = [], os.open

    def renamed(path, *args, **kwargs):
        if Path(path).name == ".partial-of-another":
            raise FileNotFoundError(path)
        opened.append(Path(path).name)
        return opens(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", renamed)
    checkpoint_module._sync(tmp_path)
    assert sorted(opened) == sorted(["own", tmp_path.name])
    with pytest.raises(FileNotFoundError):
        checkpoint_module._sync(tmp_path / ".partial-of-another")
