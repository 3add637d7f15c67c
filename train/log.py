"""What a run tells: the terminal, RUN/log.jsonl, TensorBoard, Weights & Biases, and pictures."""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from gentron_fast.files import read_json_lines, whole_file
from gentron_fast.media import write_media

LOG_NAME = "log.jsonl"
CURVE_NAME = "loss.png"
FIELDS = ("step", "loss", "mfu", "skipped")  # some of those that each row has


@contextlib.contextmanager
def _writing(what: object):
    """A full disk ends no run."""
    try:
        yield
    except OSError as error:
        print(f"{what} could not be written: {error}", file=sys.stderr)


def check_log(path: Path, fields: Collection[str] = FIELDS) -> None:
    """ValueError where a file is there whose lines are no rows with these fields: no log of a
    training. Rows may be cut short."""
    if not path.exists():
        return
    try:
        lines, rows = path.read_text().splitlines(), read_json_lines(path)
        ours = all(line.startswith("{") for line in lines) and bool(rows or not lines)
        ours = ours and all(row.keys() >= set(fields) for row in rows)
    except UnicodeDecodeError:
        ours = False
    if not ours:
        raise ValueError(f"{path} is there already and no log of a training: move it")


class RunLog:
    """The log of rank 0; that of every other rank does nothing.

    tensorboard: files under RUN/tensorboard, where the package is installed; wandb: an offline run
    under RUN/wandb, ValueError where the package is not; resumed_at: steps after this one will run
    again, and their lines are removed. ValueError where the file is there and no log of a run.
    """

    def __init__(
        self,
        run: Path,
        settings: dict,
        *,
        main: bool,
        tensorboard: bool,
        wandb: bool,
        resumed_at: int | None = None,
    ):
        if wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError("--wandb needs the package wandb, which is not installed")
        self.path = run / LOG_NAME
        self.main = main
        self._tensorboard = self._wandb = None
        if not main:
            return
        run.mkdir(parents=True, exist_ok=True)
        check_log(self.path)
        if resumed_at is not None and self.path.exists():
            kept = [row for row in read_json_lines(self.path) if row["step"] <= resumed_at]
            with whole_file(self.path) as partial:
                partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        elif resumed_at is None:
            self.path.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            purged = None if resumed_at is None else resumed_at + 1
            self._tensorboard = SummaryWriter(run / "tensorboard", purge_step=purged)
        if wandb:
            os.environ.setdefault("WANDB_MODE", "offline")
            import wandb as client

            self._wandb = client.init(project="gentron_fast", dir=run, config=settings)

    def step(self, steps: int, values: dict) -> str:
        """Keep the figures of a step; returns the line for the terminal."""
        if self.main:
            with _writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        if self._tensorboard is not None:
            with _writing("TensorBoard's file"):
                for name, value in values.items():
                    if name != "step" and value is not None:
                        self._tensorboard.add_scalar(name, value, values["step"])
                self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=values["step"])
        unit = "clips" if "clips_per_s" in values else "samples"
        parts = [
            f"step {values['step']}/{steps}",
            f"loss {values['loss']:.4f}" if values["loss"] is not None else "loss not finite",
            f"gradient {values['grad_norm']:.3f}" if values["grad_norm"] is not None else "",
            f"{values[f'{unit}_per_s']:.1f} {unit}/s",
            f"{100 * values['mfu']:.1f} % MFU",
            f"{values['memory_gib']:.2f} GiB",
            f"{values['skipped']} skipped" if values["skipped"] else "",
            f"{values['broken']} broken" if values["broken"] else "",
            f"{values['minutes_left']:.1f} min left",
        ]
        return "  ".join(filter(None, parts))

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Keep a picture, uint8 (H, W, 3), as RUN/NAME/step-STEP.png."""
        if not self.main:
            return
        path = self.path.parent / name / f"step-{step:08d}.png"
        with _writing(path):
            write_media(path, picture[None], fps=1)
        if self._tensorboard is not None:
            with _writing("TensorBoard's file"):
                self._tensorboard.add_image(name, picture, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb as client

            self._wandb.log({name: client.Image(picture)}, step=step)

    def close(self) -> None:
        """End the log with the loss curve as RUN/loss.png, where matplotlib is installed."""
        if not self.main:
            return
        if self._tensorboard is not None:
            with _writing("TensorBoard's file"):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self.path.exists() and importlib.util.find_spec("matplotlib") is not None:
            curve = self.path.with_name(CURVE_NAME)
            with _writing(curve):
                draw_curve(self.path, curve)


def draw_curve(log: Path, picture: Path) -> None:
    """The loss over the steps of a log.jsonl, as a picture."""
    from matplotlib.figure import Figure

    rows = [row for row in read_json_lines(log) if row["loss"] is not None]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1)
    axes.grid(alpha=0.3, which="both")
    with whole_file(picture) as partial:
        figure.savefig(partial, format="png", dpi=120)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: the GPU's, or the process' where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
