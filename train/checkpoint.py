"""Checkpoints: written aside by all ranks and renamed, resumed by as many ranks or by others.

RUN/checkpoints/latest               the name of the last whole checkpoint
RUN/checkpoints/step-00000500/       DeepSpeed's files of optimizer and masters, and
    checkpoint.json                  step, settings, model configuration, shapes
    ema-rankR.safetensors            rank R's shards of the averaged weights
    state-rankR.safetensors          its random generators and its place in the data
    text/                            configuration and tokenizers of text encoders that train
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import Enum
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from gentron_fast.files import read_json, write_json

INFO_NAME = "checkpoint.json"
PATIENCE = timedelta(days=2)  # for work in which the others wait and are not frozen


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def latest_checkpoint(run: Path) -> Path | None:
    """The last whole checkpoint of a run folder."""
    pointer = checkpoints_folder(run) / "latest"
    return checkpoints_folder(run) / pointer.read_text().strip() if pointer.exists() else None


def check_run_folder(run: Path, resume: bool) -> None:
    """Raise ValueError, before any work, unless `resume` and the run folder go together."""
    latest = latest_checkpoint(run)
    if resume and latest is None:
        raise ValueError(f"no checkpoint in {run} to resume from")
    if latest is not None and not resume:
        raise ValueError(f"{run} holds checkpoints: add --resume, or name another --run folder")


def shard_of(whole: Tensor, size: int, rank: int) -> Tensor:
    """A rank's ZeRO-3 shard of a tensor, flat and padded with zeros to `size` elements."""
    part = whole.flatten()[rank * size : (rank + 1) * size]
    return torch.cat([part, part.new_zeros(size - part.numel())])


def read_sharded(paths: list[Path], name: str, shape: Sequence[int]) -> Tensor:
    """A whole tensor from safetensors files of all ranks' shards, in rank order."""
    parts = []
    for path in paths:
        with safe_open(path, "pt") as file:
            parts.append(file.get_tensor(name))
    return torch.cat(parts)[: math.prod(shape)].view(*shape)


def read_info(checkpoint: Path) -> dict:
    """What checkpoint.json says; FileNotFoundError or ValueError where it is no checkpoint."""
    return read_json(checkpoint / INFO_NAME)


class Writes:
    """The writes of one rank: an error is kept and not raised, for a rank that leaves the others
    in a collective would keep them waiting."""

    def __init__(self):
        self.failure: Exception | None = None

    def __call__(self, write: Callable, *args, into: Path | None = None) -> None:
        """Call `write`, unless an earlier one failed; what it wrote `into` a file or a folder is
        on the disk then."""
        if self.failure is None:
            try:
                write(*args)
                if into is not None:
                    _sync(into)
            except (OSError, RuntimeError, SafetensorError) as error:
                self.failure = error


def _sync(path: Path, deep: bool = True) -> None:
    """Bring a file, or a folder and, if deep, all that is in it, to the disk."""
    for part in (*path.rglob("*"), path) if deep else (path,):
        try:
            descriptor = os.open(part, os.O_RDONLY)
        except FileNotFoundError:
            if part == path:
                raise
            continue  # another rank's partial file, renamed by now: that rank brings it to the disk
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Checkpoints:
    """The checkpoints of one run. Every method is collective."""

    def __init__(self, run: Path, keep: int, device: torch.device):
        self.folder, self.keep, self.device = checkpoints_folder(run), keep, device
        self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0

    def barrier(self) -> None:
        """Wait for all ranks, however long one of them works."""
        dist.barrier(self._patient)

    def save(self, engine, ema, name: str, info: dict, place: dict, extra: Callable) -> str | None:
        """Write checkpoint `name`; then `latest` names it, and those too old are removed.

        info goes into checkpoint.json; place: this rank's place in the data; extra(folder): what
        rank 0 writes beside. Returns None, or why it could not be written: the checkpoints before
        are whole then.
        """
        aside, rank, writes = self.folder / ".partial", dist.get_rank(), Writes()
        if self.is_main:
            writes(_fresh_folder, aside / name)
        self.barrier()
        for state, path in _deepspeed_files(engine, aside, name):
            writes(torch.save, state, path, into=Path(path))
        for save, file, *more in (
            (ema.save, aside / name / f"ema-rank{rank}.safetensors"),
            (self._save_state, aside / name / f"state-rank{rank}.safetensors", place),
        ):
            writes(save, file, *more, into=file)
        if self.is_main:
            info |= {"ranks": dist.get_world_size(), "parameters": ema.shapes()}
            writes(write_json, aside / name / INFO_NAME, info, into=aside / name / INFO_NAME)
            writes(extra, aside / name, into=aside / name)
        failures: list[str | None] = [None] * dist.get_world_size()
        own = None if writes.failure is None else f"rank {rank}: {writes.failure}"
        dist.all_gather_object(failures, own, self._patient)
        failure = next(filter(None, failures), None)
        if self.is_main:
            if failure is None:
                writes(self._publish, aside, name)
                failure = None if writes.failure is None else str(writes.failure)
            shutil.rmtree(aside, ignore_errors=True)
        outcome = [failure]
        dist.broadcast_object_list(outcome, 0, self._patient)
        return outcome[0]

    def _publish(self, aside: Path, name: str) -> None:
        if (self.folder / name).exists():  # of a run that ended before it was named
            shutil.rmtree(self.folder / name)
        os.replace(aside / name, self.folder / name)
        pointer = aside / "latest"
        pointer.write_text(name + "\n")
        _sync(pointer)
        _sync(self.folder, deep=False)  # the checkpoint is there before `latest` says so
        os.replace(pointer, self.folder / "latest")
        _sync(self.folder, deep=False)
        whole = sorted(path for path in self.folder.glob("step-*") if path.name <= name)
        for old in whole[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _save_state(self, path: Path, place: dict) -> None:
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        save_file(generators, path, metadata={"place": json.dumps(place)})

    def load_state(self, checkpoint: Path, ranks: int) -> list[dict]:
        """Restore this rank's generators, where as many ranks wrote them; the places in the data of
        all ranks that wrote the checkpoint."""
        places = []
        for rank in range(ranks):
            with safe_open(checkpoint / f"state-rank{rank}.safetensors", "pt") as file:
                places.append(json.loads(file.metadata()["place"]))
                if rank == dist.get_rank() and ranks == dist.get_world_size():
                    torch.set_rng_state(file.get_tensor("cpu"))
                    if self.device.type == "cuda" and "cuda" in file.keys():  # noqa: SIM118
                        torch.cuda.set_rng_state(file.get_tensor("cuda"), self.device)
        return places

    def load_engine(self, engine, checkpoint: Path, resharded: bool) -> None:
        """Masters and optimizer into an engine; resharded: written by another number of ranks.

        The engine must have been made with load_universal as `resharded` says.
        """
        if not resharded:
            engine.load_checkpoint(str(self.folder), tag=checkpoint.name)
            return
        universal = self.folder / f".{checkpoint.name}.universal"
        failure = [None]
        if self.is_main:
            try:
                _convert(checkpoint, universal)
            except (OSError, subprocess.CalledProcessError) as error:
                failure = [f"{checkpoint} cannot be resharded: {error}"]
        dist.broadcast_object_list(failure, 0, self._patient)
        if failure[0]:
            raise OSError(failure[0])
        engine.load_checkpoint(str(self.folder), tag=universal.name)
        self.barrier()
        if self.is_main:
            shutil.rmtree(universal)
            (self.folder / "latest_universal").unlink(missing_ok=True)


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)


def _deepspeed_files(engine, folder: Path, name: str) -> list[tuple[dict, str]]:
    """What DeepSpeed would write on this rank. It is written here instead: DeepSpeed has barriers
    among its writes, at which ranks would wait for one whose disk is full."""
    files, writer = [], engine.checkpoint_engine
    save, recovery = writer.save, engine._copy_recovery_script
    writer.save = lambda state_dict, path: files.append((_without_enums(state_dict), path))
    engine._copy_recovery_script = lambda path: None
    try:
        engine.save_checkpoint(str(folder), tag=name, save_latest=False)
    finally:
        writer.save, engine._copy_recovery_script = save, recovery
    return files


def _without_enums(value):
    """The same with the values of enumerations in their place: Python before 3.11.4 pickles one as
    a call of getattr, which no weights_only reading allows."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _without_enums(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_enums, value))
    return value


def _convert(checkpoint: Path, universal: Path) -> None:
    shutil.rmtree(universal, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(universal)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
