"""Checkpoints: written aside by all ranks and renamed, resumed by as many ranks or by others.

RUN/.lock                            locked while a run trains here
RUN/checkpoints/latest               the name of the last checkpoint
RUN/checkpoints/step-00000500/       DeepSpeed's files of optimizer and masters, and
    checkpoint.json                  step, settings, model configuration, shapes, and the SHA-256 of
                                     every other file and of what it says itself
    ema-rankR.safetensors            rank R's shards of the averaged weights
    state-rankR.safetensors          its random generators and its place in the data
    text/                            configuration and tokenizers of text encoders that train
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from gentron_fast.config import GenTronConfig
from gentron_fast.files import lock_folder, partial_path, read_json, write_json
from gentron_fast.schema import MOST_TOKENS, OBJECT, TEXT, check, each, real, several, whole

INFO_NAME = "checkpoint.json"
EXPORTED = "pipeline"  # a run's folder beside its checkpoints
FILES, OWN_DIGEST = "files", "sha256"  # in checkpoint.json
_COUNT = whole(0, 2**62)
SCHEMA = {
    **dict.fromkeys(("step", "skipped", "ema_updates"), _COUNT),
    "seconds": real(0, 1e12),
    "ranks": whole(1, 2**16),
    "settings": OBJECT,
    "model": OBJECT,
    "latents": several(whole(1, MOST_TOKENS), 4, 4),
    "parameters": each(several(whole(0, 2**40), 0, 8)),
    FILES: each(TEXT),
}
STEP_NAME = re.compile(r"step-(\d{8,18})")
LOSS_SCALER = "loss_scaler"  # in DeepSpeed's states
PATIENCE = timedelta(days=2)  # for work in which the others wait and are not frozen


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_names(run: Path) -> tuple[list[str], list[str]]:
    """A run's checkpoints, whole or not: the one that `latest` names, then the newest first; and
    what is wrong with `latest`."""
    folder = checkpoints_folder(run)
    found = [path.name for path in folder.glob("step-*") if STEP_NAME.fullmatch(path.name)]
    found.sort(key=_step_of, reverse=True)
    try:
        with (folder / "latest").open("rb") as file:
            last = file.read(100).strip().decode("ascii", "replace")
    except OSError:
        last = ""
    if not STEP_NAME.fullmatch(last):
        return found, [f"{folder / 'latest'} names no checkpoint"]
    return [last, *(name for name in found if name != last)], []


def _step_of(name: str) -> int:
    return int(STEP_NAME.fullmatch(name)[1])


def latest_checkpoint(run: Path) -> Path | None:
    """The last checkpoint of a run folder, unread."""
    names, _ = checkpoint_names(run)
    return checkpoints_folder(run) / names[0] if names else None


def newest_whole(
    run: Path, names: Sequence[str], wrong: Sequence[str], read: Callable[[Path], dict]
) -> tuple[Path, dict, str | None]:
    """The first whole one of a run's checkpoints, what `read` returns of it, and a line that tells
    why it is not the last one.

    names, wrong: of `checkpoint_names`; read: raises OSError or ValueError for one that is damaged.
    ValueError where none is whole.
    """
    reasons = list(wrong)
    for name in names:
        try:
            info = read(checkpoints_folder(run) / name)
        except (OSError, ValueError) as error:
            reasons.append(str(error))
            continue
        lost = max(map(_step_of, names)) - _step_of(name)
        line = f"{'; '.join(reasons)}: taking {name}, {lost} steps lost" if reasons else None
        return checkpoints_folder(run) / name, info, line
    raise ValueError(f"no whole checkpoint in {run}: {'; '.join(reasons)}")


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
    """What checkpoint.json says; OSError or ValueError where it is no checkpoint, is not as it was
    written, says what no run writes, or lies beside files that would be read and that no run wrote.
    """
    path = checkpoint / INFO_NAME
    try:
        info = read_json(path)
    except ValueError:
        raise ValueError(f"{path} is damaged") from None
    if OWN_DIGEST not in info:
        raise ValueError(f"{path} has no digests: an earlier version's, or damaged")
    if info[OWN_DIGEST] != _own_digest(info):
        raise ValueError(f"{path} is damaged")
    check(info, SCHEMA, str(path))
    wanted = [f"ema-rank{rank}.safetensors" for rank in range(info.get("ranks", 0))]
    if missing := [name for name in (*SCHEMA, *wanted) if name not in (info | info.get(FILES, {}))]:
        raise ValueError(f"{path} lacks {', '.join(missing[:3])}")
    try:
        GenTronConfig.from_dict(info["model"])
    except ValueError as error:
        raise ValueError(f"model of {path}: {error}") from None
    for file in checkpoint.rglob("*"):
        read = file.suffix == ".pt" or file.parent != checkpoint
        if read and not file.is_dir() and str(file.relative_to(checkpoint)) not in info[FILES]:
            raise ValueError(f"{file} is not of this checkpoint")
    return info


def write_info(path: Path, info: dict) -> None:
    """checkpoint.json, with the digest of what it says."""
    write_json(path, info | {OWN_DIGEST: _own_digest(info)})


def _own_digest(info: dict) -> str:
    said = {key: value for key, value in info.items() if key != OWN_DIGEST}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def file_digests(folder: Path, names: Collection[str]) -> dict[str, str]:
    """The SHA-256 of files by name, hashed in threads."""

    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def check_digests(checkpoint: Path, files: dict[str, str]) -> None:
    """ValueError or OSError unless these files are there, each with its digest."""
    for name in files:
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint / name} is missing")
    for name, digest in file_digests(checkpoint, files).items():
        if digest != files[name]:
            raise ValueError(f"{checkpoint / name} is damaged")


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from."""

    folder: Path
    info: dict

    @property
    def ranks(self) -> int:
        """How many wrote it."""
        return self.info["ranks"]

    @property
    def resharded(self) -> bool:
        return self.ranks != dist.get_world_size()

    def check_model(self, config: GenTronConfig) -> None:
        """ValueError where the checkpoint is of another model than the run's."""
        model = GenTronConfig.from_dict(self.info["model"])
        if model != config:
            raise ValueError(f"{self.folder} holds another model than this run's: {model}")


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
        self.run, self.folder = run, checkpoints_folder(run)
        self.keep, self.device = keep, device
        self._whole: dict[str, bool] = {}  # which of them are, as far as this rank knows
        self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0

    def barrier(self) -> None:
        """Wait for all ranks, however long one of them works."""
        dist.barrier(self._patient)

    def on_main(self, work: Callable, *args):
        """What work(*args) returns on rank 0, on every rank, however long it takes; its OSError or
        ValueError is a ValueError on every rank."""
        outcome = [None, None]
        if self.is_main:
            try:
                outcome[0] = work(*args)
            except (OSError, ValueError) as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, 0, self._patient)
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        return outcome[0]

    def _from_all(self, value) -> list:
        """Every rank's value, by rank."""
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, self._patient)
        return values

    def open(self, resume: bool) -> tuple[Resumed | None, str | None]:
        """Lock the run folder; with `resume`, the newest whole checkpoint to go on from, and a line
        that tells where it is not the last one.

        ValueError where another process trains here, where `resume` and the run folder do not go
        together, and where no checkpoint is whole.
        """
        names, wrong = self.on_main(self._lock, resume)
        if not resume:
            return None, None
        folder, info, line = newest_whole(self.run, names, wrong, self._read_whole)
        return Resumed(folder, info), line

    def _lock(self, resume: bool) -> tuple[list[str], list[str]]:
        if resume and not checkpoint_names(self.run)[0]:  # before a mistyped folder is made
            raise ValueError(f"no checkpoint in {self.run} to resume from")
        lock_folder(self.run)
        names, wrong = checkpoint_names(self.run)
        if names and not resume:
            raise ValueError(
                f"{self.run} holds checkpoints: add --resume, or name another --run folder"
            )
        for partial in self.folder.glob(".step-*"):  # of killed runs, as the lock says
            shutil.rmtree(partial, ignore_errors=True)
        return names, wrong

    def _read_whole(self, checkpoint: Path) -> dict:
        """checkpoint.json of a whole checkpoint; every rank hashes its share of the files."""
        self._whole[checkpoint.name] = False
        info, own = self.on_main(read_info, checkpoint), None
        share = list(info[FILES].items())[dist.get_rank() :: dist.get_world_size()]
        try:
            check_digests(checkpoint, dict(share))
        except (OSError, ValueError) as error:
            own = str(error)
        if damage := next(filter(None, self._from_all(own)), None):
            raise ValueError(damage)
        self._whole[checkpoint.name] = True
        return info

    def save(self, engine, ema, name: str, info: dict, place: dict, extra: Callable) -> str | None:
        """Write checkpoint `name`; then `latest` names it, and those too old are removed.

        info goes into checkpoint.json; place: this rank's place in the data; extra(folder): what
        rank 0 writes into folders beside. Returns None, or why it could not be written: the
        checkpoints before are whole then.
        """
        rank, writes, digests = dist.get_rank(), Writes(), {}
        aside = self.on_main(partial_path, self.folder / name)
        folder = aside / name
        if self.is_main:
            writes(folder.mkdir, 0o777, True)
        self.barrier()
        written = []
        for write, *values, file in (
            *((torch.save, state, file) for state, file in _deepspeed_files(engine, aside, name)),
            (ema.save, folder / f"ema-rank{rank}.safetensors"),
            (self._save_state, place, folder / f"state-rank{rank}.safetensors"),
        ):
            writes(write, *values, file, into=file)
            written.append(file)
        if self.is_main:
            writes(extra, folder, into=folder)
            written += (file for file in folder.glob("*/**/*") if file.is_file())
        written = [str(file.relative_to(folder)) for file in written]
        writes(lambda: digests.update(file_digests(folder, written)))
        failure = None if writes.failure is None else f"rank {rank}: {writes.failure}"
        failures, parts = zip(*self._from_all((failure, digests)), strict=True)
        failure = next(filter(None, failures), None)
        if self.is_main:
            if failure is None:
                files = {file: digest for part in parts for file, digest in part.items()}
                info |= {"ranks": len(parts), "parameters": ema.shapes(), FILES: files}
                writes(write_info, folder / INFO_NAME, info, into=folder / INFO_NAME)
                writes(self._publish, aside, name)
                failure = None if writes.failure is None else str(writes.failure)
            shutil.rmtree(aside, ignore_errors=True)
        return self.on_main(lambda: failure)

    def _publish(self, aside: Path, name: str) -> None:
        if (self.folder / name).exists():  # damaged, or of a run that ended before it was named
            shutil.rmtree(self.folder / name)
        os.replace(aside / name, self.folder / name)
        pointer = aside / "latest"
        pointer.write_text(name + "\n")
        _sync(pointer)
        _sync(self.folder, deep=False)  # the checkpoint is there before `latest` says so
        os.replace(pointer, self.folder / "latest")
        _sync(self.folder, deep=False)
        self._whole[name] = True
        whole = 0
        for old in checkpoint_names(self.run)[0]:
            if _step_of(old) > _step_of(name):  # of a run that went on from an earlier one
                continue
            if whole == self.keep:
                shutil.rmtree(self.folder / old, ignore_errors=True)
            else:
                whole += self._is_whole(old)

    def _is_whole(self, name: str) -> bool:
        """Whether a checkpoint is whole; hashed by this rank where that is not known yet."""
        if name not in self._whole:
            try:
                check_digests(self.folder / name, read_info(self.folder / name)[FILES])
                self._whole[name] = True
            except (OSError, ValueError):
                self._whole[name] = False
        return self._whole[name]

    def _save_state(self, place: dict, path: Path) -> None:
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
        with _weights_only(engine):
            if not resharded:
                engine.load_checkpoint(str(self.folder), tag=checkpoint.name)
                return
            universal = self.on_main(_convert, checkpoint)
            engine.load_checkpoint(str(self.folder), tag=universal.name)
        self.barrier()
        if self.is_main:
            shutil.rmtree(universal)
            (self.folder / "latest_universal").unlink(missing_ok=True)


@contextmanager
def _weights_only(engine) -> Iterator[None]:
    """DeepSpeed and its commands unpickle nothing but tensors and plain values; the loss scaler, an
    object, stays the engine's."""
    reader, variable = engine.checkpoint_engine, "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    load, before = reader.load, os.environ.get(variable)

    def load_beside_scaler(path, *args, **kwargs):
        state = load(path, *args, **kwargs)
        state.get("optimizer_state_dict", {})[LOSS_SCALER] = engine.optimizer.loss_scaler
        return state

    reader.load, os.environ[variable] = load_beside_scaler, "1"
    try:
        yield
    finally:
        reader.load = load
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def _deepspeed_files(engine, folder: Path, name: str) -> list[tuple[dict, Path]]:
    """What DeepSpeed would write on this rank. It is written here instead: DeepSpeed has barriers
    among its writes, at which ranks would wait for one whose disk is full."""
    files, writer = [], engine.checkpoint_engine
    save, recovery = writer.save, engine._copy_recovery_script
    writer.save = lambda state_dict, path: files.append((_plain(state_dict), Path(path)))
    engine._copy_recovery_script = lambda path: None
    try:
        engine.save_checkpoint(str(folder), tag=name, save_latest=False)
    finally:
        writer.save, engine._copy_recovery_script = save, recovery
    return files


def _plain(value):
    """The same with the values of enumerations in their place and without the loss scaler: what is
    left is read without unpickling objects."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items() if key != LOSS_SCALER}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


def _convert(checkpoint: Path) -> Path:
    """The universal checkpoint made of one, in a folder of its own beside it."""
    universal = partial_path(checkpoint)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(universal)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"it cannot be resharded: {reason}")
    return universal
