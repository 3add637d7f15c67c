"""What a run keeps in its folder: checkpoints to go on from, and the pipeline folder."""

from dataclasses import dataclass
from pathlib import Path

from torch import distributed as dist

from gentron_fast.files import check_output_folder, whole_folder
from gentron_fast.pipeline import PARTS
from gentron_fast.text import TextEncoder
from gentron_train.checkpoint import EXPORTED, Checkpoints, Resumed, step_name
from gentron_train.data.loader import Loader
from gentron_train.data.options import DTYPES
from gentron_train.ema import ShardedEMA
from gentron_train.export_pipeline import export_pipeline
from gentron_train.log import CURVE_NAME, LOG_NAME, check_log
from gentron_train.process import say
from gentron_train.settings import Settings, with_new_names


def check_run(run: Path) -> None:
    """ValueError where something that no run wrote stands where this one will write."""
    check_output_folder(run / EXPORTED, PARTS)
    check_log(run / LOG_NAME)
    if (run / CURVE_NAME).exists() and not (run / LOG_NAME).exists():
        raise ValueError(f"{run / CURVE_NAME} is there already and of no run: move it")


@dataclass
class RunState:
    """How far a run is; the same on every rank."""

    step: int = 0
    seconds: float = 0.0  # with those of earlier parts of a resumed run
    skipped: int = 0  # steps without a finite loss and gradient
    broken: int = 0  # samples, of all ranks


class Saver:
    """Checkpoints and exports of one run. Every method is collective."""

    def __init__(
        self,
        settings: Settings,
        state: RunState,
        checkpoints: Checkpoints,
        engine,
        ema: ShardedEMA,
        loader: Loader,
        trained_text: TextEncoder | None,
    ):
        """trained_text: the text encoder whose weights train, for its tokenizers and shape."""
        self.settings, self.state = settings, state
        self.engine, self.ema, self.loader = engine, ema, loader
        self.checkpoints = checkpoints
        self._trained_text = trained_text
        self._saved: Path | None = None  # the checkpoint of `_saved_step`, on every rank
        self._saved_step: int | None = None

    def save(self) -> str | None:
        """Write a checkpoint, if there is none of this step; why it could not be written, or None.

        The run goes on after one that failed: the checkpoints before are whole.
        """
        state = self.state
        if self._saved_step == state.step:
            return None
        name = step_name(state.step)
        info = {
            "step": state.step,
            "seconds": state.seconds,
            "skipped": state.skipped,
            "ema_updates": self.ema.updates,
            "settings": self.settings.to_dict(),
            "model": self.engine.module.config.to_dict(),
            "latents": list(self.loader.sizes),
        }
        place = self.loader.state_dict()
        failure = self.checkpoints.save(self.engine, self.ema, name, info, place, self._save_text)
        if failure:
            say(f"no checkpoint at step {state.step}: {failure}; whole ones stay as they are")
        else:
            self._saved, self._saved_step = self.checkpoints.folder / name, state.step
        return failure

    def _save_text(self, folder: Path) -> None:
        if self._trained_text is not None:
            self._trained_text.save_pretrained(folder / "text")

    def load(self, resumed: Resumed) -> None:
        """Go on where the run stood: engine, EMA, the place in the data, and the state."""
        folder, info = resumed.folder, resumed.info
        shards = [folder / f"ema-rank{rank}.safetensors" for rank in range(resumed.ranks)]
        try:
            self.checkpoints.load_engine(self.engine, folder, resumed.resharded)
            self.ema.load(shards, info["ema_updates"])
            self.loader.load_state_dict(self.checkpoints.load_state(folder, resumed.ranks))
        except Exception as error:  # whatever libraries raise for files that no run wrote
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{folder} cannot be read: {reason}") from error
        for name in ("step", "seconds", "skipped"):
            setattr(self.state, name, info[name])
        self._saved, self._saved_step = folder, self.state.step
        changed = _changes(with_new_names(info["settings"], str(folder)), self.settings.to_dict())
        if resumed.resharded:
            changed.append(f"ranks {resumed.ranks} → {dist.get_world_size()}")
        what = f" with {', '.join(changed)}" if changed else ""
        say(f"going on at step {self.state.step}{what}")

    def export(self) -> None:
        """Write the pipeline folder with the averaged weights, from a checkpoint of this step."""
        if failure := self.save():
            raise OSError(f"no export without a checkpoint: {failure}")
        if dist.get_rank() == 0:
            folder = self.settings.run / EXPORTED
            dtype = DTYPES[self.settings.export_dtype]
            with whole_folder(folder, PARTS) as partial:
                report = export_pipeline(self._saved, partial, ema=True, dtype=dtype)
            say(report.replace(str(partial), f"pipeline in {folder}"))
        self.checkpoints.barrier()


def _changes(before: dict, now: dict) -> list[str]:
    """Settings that are others than when the checkpoint was written."""
    return [
        f"{name} {before.get(name)} → {value}"
        for name, value in now.items()
        if before.get(name) != value and name != "resume"
    ]
