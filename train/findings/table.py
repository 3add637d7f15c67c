"""The table of runs, configs/findings/runs.yaml: what is trained, with which seeds and settings."""

import re
import reprlib
from dataclasses import dataclass
from pathlib import Path

from gentron_fast.config import GenTronConfig
from gentron_fast.schema import OBJECT, TEXT, Kind, check, several, whole
from gentron_train.data.options import flag
from gentron_train.memory import model_config
from gentron_train.settings import (
    CONFIGS,
    STAGES,
    Settings,
    converted,
    load_config,
    read_yaml,
)

FOLDER = CONFIGS / "findings"
SETTINGS = FOLDER / "settings.yaml"
TABLE = FOLDER / "runs.yaml"
# Settings that a command gives, or that would make runs no pairs.
FIXED = {"run", "init", "data", "seed", "resume", "minutes", "dry_run"}
_SEEDS = several(whole(0, 2**31), 1, 1000)
_SCALES = several(Kind("a number", lambda value: type(value) in (int, float)), 1, 100)
SCHEMA = {
    "seeds": _SEEDS,
    "pilot": _SEEDS,
    "again": several(TEXT, 0, 1000),
    **dict.fromkeys(("images", "clips"), whole(1, 10**7)),
    "prompts": whole(1, 10**5),
    "lambda_m": OBJECT,
    "runs": OBJECT,
}


EMPTY = {"seeds": (), "pilot": (), "again": (), "lambda_m": {}}  # where a table lacks them


@dataclass(frozen=True)
class Run:
    """One line of the table. start: the T2I run whose pipeline this one begins with; changes: the
    settings that differ from settings.yaml."""

    name: str
    stage: str
    start: str | None
    changes: dict

    def settings(self, config: Path) -> Settings:
        """Of settings.yaml with the changes, without folders and seed."""
        return Settings(**load_config(config, self.stage) | converted(self.changes, self.name))

    def words(self) -> list[str]:
        """The changes as options of a command line."""
        result = []
        for name, value in self.changes.items():
            if isinstance(value, bool):
                result.append(flag(name) if value else flag(f"no_{name}"))
            else:
                result += [flag(name), *str(value).split()]
        return result


@dataclass(frozen=True)
class Table:
    """All runs and how they are scored; the fields are those of runs.yaml. lambda_m: the values
    that a run is scored at beside 1; those of the first are swept."""

    seeds: tuple[int, ...]
    pilot: tuple[int, ...]
    again: tuple[str, ...]
    images: int
    clips: int
    prompts: int
    lambda_m: dict[str, tuple[float, ...]]
    runs: dict[str, Run]
    config: Path = SETTINGS

    def model(self, run: Run) -> GenTronConfig:
        """What a run trains; one that starts from another has its shape."""
        first = run if run.start is None else self.runs[run.start]
        return model_config(first.settings(self.config), run.stage)

    def jobs(self, pilot: bool) -> list[tuple[Run, int]]:
        """Runs with their seeds, in order: all seeds of a run; or of the pilot its first seed of
        all runs, then its others of those of `again`."""
        runs = self.runs.values()
        if not pilot:
            return [(run, seed) for run in runs for seed in self.seeds]
        first, *others = self.pilot
        return [(run, first) for run in runs] + [
            (run, seed) for seed in others for run in runs if run.name in self.again
        ]

    def scales(self, run: Run) -> list[float | None]:
        """The λ_M a run is scored at: None is what all are compared at, 1."""
        return [None, *(scale for scale in self.lambda_m.get(run.name, ()) if scale != 1)]

    @property
    def sweep_run(self) -> str:
        """The run whose λ_M is swept; "" without one."""
        return next(iter(self.lambda_m), "")


def read_table(path: Path = TABLE) -> Table:
    """FileNotFoundError or ValueError, naming the file, where it is no table of runs that a
    training would take."""
    values = read_yaml(path)
    wanted = SCHEMA.keys() - EMPTY.keys()
    if not isinstance(values, dict) or not wanted <= values.keys() <= SCHEMA.keys():
        raise ValueError(f"{path} must hold {', '.join(SCHEMA)}; {', '.join(EMPTY)} may be absent")
    check(values, SCHEMA, str(path))
    values = EMPTY | values
    scales = values["lambda_m"]
    check(scales, dict.fromkeys(scales, _SCALES), str(path))
    runs = {name: _run(name, fields, path) for name, fields in values["runs"].items()}
    table = Table(
        **{name: tuple(values[name]) for name in ("seeds", "pilot", "again")},
        **{name: values[name] for name in ("images", "clips", "prompts")},
        lambda_m={name: tuple(map(float, own)) for name, own in scales.items()},
        runs=runs,
        config=path.with_name(SETTINGS.name),
    )
    seeds = (*table.seeds, *table.pilot)
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"{path}: a seed is there twice, or in the pilot too: {seeds}")
    if unknown := {*table.again, *table.lambda_m} - runs.keys():
        raise ValueError(f"{path}: again and lambda_m name {', '.join(sorted(unknown))}, no run")
    places = list(runs)
    for run in runs.values():
        if run.stage == "t2v" and run.start is None:
            raise ValueError(f"{path}: run {run.name}: T2V starts `from` a run")
        before = places[: places.index(run.name)]
        if run.start is not None:
            start = runs[run.start] if run.start in before else None
            if start is None or start.stage != "t2i" or start.start is not None:
                wanted = "no T2I run from nothing above it"
                raise ValueError(f"{path}: run {run.name} starts from {run.start}, {wanted}")
            if "model" in run.changes:
                raise ValueError(
                    f"{path}: run {run.name} has the model of {run.start}, and `model`"
                )
        try:
            table.model(run)
            run.settings(table.config)
        except ValueError as error:
            raise ValueError(f"{path}: run {run.name}: {error}") from None
    return table


def _run(name: str, fields: object, path: Path) -> Run:
    if not (isinstance(name, str) and re.fullmatch(r"[a-z0-9-]+", name)):
        raise ValueError(f"{path}: a run is named {name!r}, wanted small letters, digits and -")
    if not isinstance(fields, dict) or fields.get("stage") not in STAGES:
        raise ValueError(f"{path}: run {name} is {reprlib.repr(fields)}, wanted a stage and fields")
    changes = {key: value for key, value in fields.items() if key not in ("stage", "from")}
    if fixed := sorted(changes.keys() & FIXED):
        raise ValueError(f"{path}: run {name} sets {', '.join(fixed)}, which are not a run's own")
    return Run(name, fields["stage"], fields.get("from"), changes)
