"""What a run is scored by, prompt by prompt, and the file that keeps it.

Alignment is what the rules read back from the pixels (small_world.reading), fidelity the PSNR
against the closest scene of the world (small_world.fidelity). Of clips the middle frame is scored
by itself too, as an image of T2I is.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gentron_fast.commandline import choose_device
from gentron_fast.files import read_json, read_json_lines, whole_file, write_json
from gentron_fast.schema import OBJECT, TEXT, each, optional, real, several, whole
from gentron_train.checkpoint import EXPORTED, latest_checkpoint, read_info
from gentron_train.data.sources import folder_digest
from gentron_train.findings.table import Run, Table
from gentron_train.flops import parameter_count, training_flops
from gentron_train.log import LOG_NAME
from gentron_train.small_world.evaluator import COLUMNS, judge
from gentron_train.small_world.fidelity import BROKEN, fit_scene
from gentron_train.small_world.renderer import DIRECTIONS, Scene
from gentron_train.small_world.renderer import INDEX_NAME as SHARDS_INDEX
from gentron_train.stages import STATE, commit

PROMPT_SEED = 1000  # of the scored prompts: not the evaluator's, by which settings were chosen
NOISE_SEEDS = 10_000  # apart, those of two training seeds
STEPS = 20
LAMBDA_T, LAMBDA_M, RESCALE = 3.0, 1.0, 0.7
LAST = 0.1  # share of a run whose mean loss counts
BATCH = 25
FIGURE = real(-1e9, 1e9)
ROUNDING = 1e-5  # of fp32, a prediction's largest error over its largest value


@dataclass(frozen=True)
class Measure:
    """A figure of a prompt, or of a run where `of_run`; scale: to the unit that is shown.
    higher_is_better: None where neither is."""

    title: str
    unit: str = "%"
    scale: float = 100.0
    higher_is_better: bool | None = True
    digits: int = 1
    of_run: bool = False

    def shown(self, value: float) -> str:
        return f"{value * self.scale:.{self.digits}f}"

    @property
    def difference_unit(self) -> str:
        """Of a difference of two shares: points."""
        return "points" if self.unit == "%" else self.unit


MEASURES = {
    "alignment": Measure("what was asked for"),  # the mean of colour, shape and relation
    "colour": Measure("colour"),
    "shape": Measure("shape"),
    "relation": Measure("relation"),
    "motion": Measure("motion"),
    "psnr": Measure("PSNR", "dB", 1.0, digits=2),
    "broken": Measure("broken", higher_is_better=False),
    "frame alignment": Measure("what was asked for in one frame"),
    "frame psnr": Measure("PSNR of one frame", "dB", 1.0, digits=2),
    "frame broken": Measure("broken frames", higher_is_better=False),
    "place jitter": Measure("jitter of place", "px", 1.0, False, 2),
    "size jitter": Measure("jitter of size", "%", 1.0, False, 2),
    "colour jitter": Measure("jitter of colour", "of 255", 1.0, False, 2),
    "travel": Measure("way along the direction asked for", "px", 1.0, None),
    "loss": Measure("loss", "", 1.0, False, 4, of_run=True),
}
SCHEMA = {
    **dict.fromkeys(("run", "stage", "train_commit", "score_commit", "device"), TEXT),
    **dict.fromkeys(("seed", "steps", "parameters", "flops"), whole(0, 2**62)),
    **dict.fromkeys(("train_seconds", "score_seconds"), real(0, 1e9)),
    "lambda_m": optional(FIGURE),
    **dict.fromkeys(("settings", "model", "sampling", "made_of"), OBJECT),
    "loss": FIGURE,
    "curve": several(several(FIGURE, 2, 2), 1, 10**6),
    "start": optional(real(0, 1e9)),
    "scores": each(several(optional(FIGURE), 1, 10**6)),
}


def prompts_of(count: int) -> tuple[list[str], list[Scene]]:
    """The fixed prompts, `count` of each kind, and a scene of each."""
    pairs = [pair for draw in COLUMNS.values() for pair in draw(count, PROMPT_SEED)]
    texts, scenes = zip(*pairs, strict=True)
    return list(texts), list(scenes)


def score_clip(clip: np.ndarray, scene: Scene) -> dict[str, float]:
    """The figures of uint8 (T, 64, 64, 3) by the names of MEASURES; what a prompt does not ask for
    is left out."""
    figures = _looks(clip, scene)
    if len(clip) == 1:
        return figures
    middle = _looks(clip[len(clip) // 2][None], scene)
    figures |= {f"frame {name}": middle[name] for name in ("alignment", "psnr", "broken")}
    return figures


def _looks(clip: np.ndarray, scene: Scene) -> dict[str, float]:
    right, fit = judge(clip, scene), fit_scene(clip)
    asked = [right[name] for name in ("colour", "shape", "relation") if name in right]
    figures = {name: float(value) for name, value in right.items()}
    figures |= {"alignment": float(np.mean(asked)), "psnr": fit.psnr}
    figures["broken"] = float(fit.psnr < BROKEN)
    figures |= {f"{name} jitter": value for name, value in fit.jitter().items()}
    if len(clip) > 1 and scene.motion in DIRECTIONS and len(fit.poses):
        places = fit.poses[0, :2]
        figures["travel"] = float((places[:, -1] - places[:, 0]) @ DIRECTIONS[scene.motion])
    return figures


def sample_and_score(
    pipeline, count: int, seed: int, lambda_m: float | None, progress: bool = True
) -> dict[str, list[float | None]]:
    """The figures of every prompt, a list each by name, None where one has none."""
    from tqdm import tqdm

    texts, scenes = prompts_of(count)
    rows = []
    with tqdm(total=len(texts), desc="scoring", unit="prompt", disable=not progress) as bar:
        for first in range(0, len(texts), BATCH):
            part = texts[first : first + BATCH]
            seeds = [NOISE_SEEDS * seed + first + k for k in range(len(part))]
            clips = pipeline(part, seed=seeds, progress=False, **sampling(lambda_m)).frames
            rows += map(score_clip, np.asarray(clips), scenes[first : first + len(part)])
            bar.update(len(part))
    names = [name for name in MEASURES if any(name in row for row in rows)]
    return {name: [_rounded(row.get(name)) for row in rows] for name in names}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def sampling(lambda_m: float | None) -> dict:
    """How the prompts are sampled; None: as all runs are compared."""
    fixed = {"steps": STEPS, "lambda_t": LAMBDA_T, "rescale": RESCALE}
    return fixed | {"lambda_m": lambda_of(lambda_m)}


def lambda_of(scale: float | None) -> float:
    """The λ_M of a result; None: that at which all runs are compared."""
    return LAMBDA_M if scale is None else scale


def start_difference(pipeline) -> float:
    """The largest difference between what a T2V model predicts before its first step, of clips and
    of motion-free ones, and the T2I model frame by frame, over the largest prediction."""
    import torch

    from gentron_fast.model import GenTron

    image_model, device = pipeline.transformer, pipeline.device
    clip_model = GenTron.from_t2i(image_model).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, image_model.config.in_channels, 8, 8, 8, generator=generator)
    latents, timestep = latents.to(device), torch.tensor([20, 300, 600, 980], device=device)
    text = pipeline.text_encoder.encode(["", *prompts_of(1)[0]]).to(device)
    motion_free = torch.tensor([False, True, False, True], device=device)
    with torch.no_grad():
        clips = clip_model(latents, timestep, text, motion_free)
        frames = [image_model(latents[:, :, [t]], timestep, text) for t in range(8)]
    frames = torch.cat(frames, 2)
    return float((clips - frames).abs().max() / frames.abs().max())


def starts_of(records: Sequence[dict]) -> dict[str, list[float]]:
    """The `start_difference` of each T2I run, a seed each."""
    own = [record for record in records if record["start"] is not None]
    names = dict.fromkeys(record["run"] for record in own)
    return {name: [one["start"] for one in own if one["run"] == name] for name in names}


def made_of(trained: Path) -> dict:
    """What a run was trained on: its shards' index, digests of the parts that it was given and of
    its model, and what `note_start` noted."""
    pipeline, shards = trained / EXPORTED, trained.parent.parent / "shapes"
    parts = {name: pipeline / name for name in ("vae", "text_encoder", "text_encoder_2")}
    parts["model"] = pipeline / "transformer"
    digests = {name: folder_digest(part) for name, part in parts.items() if part.is_dir()}
    begun = start_note(trained)
    start = read_json(begun) if begun.exists() else {}
    return {"shards": read_json(shards / SHARDS_INDEX)} | digests | start


def start_note(trained: Path) -> Path:
    """The file that tells what the run of a folder began with, beside the folder above it."""
    return trained.parent.with_name(f"{trained.parent.name}.json")


def note_start(trained: Path, start: Path) -> None:
    """Note the digest of the model that a run is about to begin with, the pipeline `start`'s."""
    write_json(start_note(trained), {"start_model": folder_digest(start / "transformer")})


def record(
    table: Table, run: Run, seed: int, trained: Path, lambda_m: float | None, device: str
) -> dict:
    """What is kept of a run that `run_stages` trained first, in the folder above `trained`."""
    from gentron_fast import GenTronPipeline

    began = time.monotonic()
    info = read_info(latest_checkpoint(trained))
    pipeline = GenTronPipeline.from_pretrained(trained / EXPORTED, device=choose_device(device))
    config, settings = pipeline.transformer.config, run.settings(table.config)
    lengths = {
        name: ids.shape[1]
        for name, (ids, _) in pipeline.text_encoder.tokenize(prompts_of(2)[0]).items()
    }
    flops = training_flops(config, info["latents"], lengths, settings.draws)
    rows = [row for row in read_json_lines(trained / LOG_NAME) if row["loss"] is not None]
    last = [row["loss"] for row in rows if row["step"] > (1 - LAST) * info["step"]]
    scores = sample_and_score(pipeline, table.prompts, seed, lambda_m)
    is_start = run.stage == "t2i" and lambda_m is None
    return {
        "run": run.name,
        "stage": run.stage,
        "seed": seed,
        "lambda_m": lambda_m,
        "device": str(pipeline.device),
        "train_commit": read_json(trained.parent / STATE)["done"][0]["commit"],
        "score_commit": commit(),
        "steps": info["step"],
        "parameters": parameter_count(config),
        "flops": flops * settings.batch * settings.draws,
        "settings": {name: v for name, v in info["settings"].items() if name != "cache"},
        "model": info["model"],
        "sampling": sampling(lambda_m),
        "made_of": made_of(trained),
        "loss": float(np.mean(last)),
        "curve": [[row["step"], round(row["loss"], 5)] for row in rows],
        "start": start_difference(pipeline) if is_start else None,
        "train_seconds": rows[-1]["seconds"],
        "score_seconds": round(time.monotonic() - began, 1),
        "scores": scores,
    }


def result_name(run: str, seed: int, lambda_m: float | None = None) -> str:
    """The file of a run's scores."""
    return f"{run}-seed{seed}{'' if lambda_m is None else f'-lambda{lambda_m:g}'}.json"


def write_record(path: Path, values: dict) -> None:
    """A field a line: the lists of a file would be thousands of lines."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    with whole_file(path) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read_records(folder: Path) -> list[dict]:
    """All results of a folder; ValueError that names a file that is none."""
    records = []
    for path in sorted(folder.glob("*-seed*.json")):
        values = read_json(path, SCHEMA)
        if missing := sorted(SCHEMA.keys() - values.keys()):
            raise ValueError(f"{path} lacks {', '.join(missing[:3])}")
        if path.name != result_name(values["run"], values["seed"], values["lambda_m"]):
            raise ValueError(f"{path} holds run {values['run']} of seed {values['seed']}")
        records.append(values)
    return records
