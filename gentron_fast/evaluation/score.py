"""Scores of a run of T2I-CompBench, and the table beside the paper's rows."""

import argparse
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from gentron_fast.commandline import choose_device, number, refuse, whole_number
from gentron_fast.evaluation import rules
from gentron_fast.evaluation.layout import (
    CATEGORIES,
    COMPLEX_KINDS,
    IMAGES,
    Entry,
    compbench,
    list_entries,
    read_manifest,
    without_stop,
)
from gentron_fast.evaluation.results import (
    RESULT_NAME,
    SCORERS_NAME,
    Column,
    Result,
    check_entries,
    read_result,
    score_column,
)
from gentron_fast.files import whole_file, write_json
from gentron_fast.threads import settle_threads

NAME = "gentron_fast.evaluate score"
HELP = f"""\
usage: python -m {NAME} RUN --blip FOLDER --clip FOLDER --detector FOLDER
       python -m {NAME} RUN --from-official FOLDER

RUN                     T2I-CompBench's layout: CATEGORY/samples/PROMPT_000000.png
--blip FOLDER           BlipForQuestionAnswering: color, shape, texture, complex
--clip FOLDER           CLIPModel, officially ViT-B/32: non_spatial, complex
--detector FOLDER       any object detector of transformers: spatial, complex
--threshold X           the least confidence of a detection (0.5)
--from-official FOLDER  scores that the official code made, RUN or its like
--compbench FOLDER      prompt files, for a RUN that was not made here
--batch N --device D    images at once (16); cpu, cuda, cuda:1
--title TEXT            the table's row (the name of RUN)

What a scorer is missing for is told, and the rest is scored. Scores are kept
image by image: the same call goes on. RUN/table.md and RUN/scores.json.
"""
BLIP, CLIP, SPATIAL = "annotation_blip", "annotation_clip", "labels/annotation_obj_detection_2d"
THREE_IN_ONE = "annotation_3_in_1"
PARTS = {
    **dict.fromkeys(("color", "shape", "texture"), (BLIP,)),
    "spatial": (SPATIAL,),
    "non_spatial": (CLIP,),
    "complex": (BLIP, CLIP, SPATIAL),
}
OPTIONS = {BLIP: "--blip", CLIP: "--clip", SPATIAL: "--detector"}
# Published figures in per cent, in the order of CATEGORIES (arXiv 2312.04557).
PUBLISHED = {
    "SDXL": (63.69, 54.08, 56.37, 20.32, 31.10, 40.91),
    "PixArt-α": (68.86, 55.82, 70.44, 20.82, 31.79, 41.17),
    "GenTron XL/2, CLIP-L, adaLN-zero": (36.94, 42.06, 50.73, 9.41, 30.38, 36.41),
    "GenTron XL/2, CLIP-L": (73.91, 51.81, 68.76, 19.26, 31.80, 41.52),
    "GenTron XL/2, T5-XXL": (74.90, 55.40, 70.05, 20.52, 31.68, 41.01),
    "GenTron XL/2, CLIP-L and T5-XXL": (75.65, 55.74, 69.48, 20.67, 31.79, 41.44),
    "GenTron G/2, CLIP-L and T5-XXL": (76.74, 57.00, 71.50, 20.98, 32.02, 41.67),
}


def command(argv: list[str]) -> None:
    """Read the arguments, score and print the table. ValueError or OSError after wrong input."""
    parser = argparse.ArgumentParser(prog=NAME, allow_abbrev=False)
    parser.format_help = lambda: HELP
    parser.error = refuse
    parser.add_argument("run", type=Path)
    for name in (*OPTIONS.values(), "--from-official", "--compbench"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--threshold", type=number, default=0.5)
    parser.add_argument("--batch", type=whole_number(1), default=16)
    parser.add_argument("--device")
    parser.add_argument("--title")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_intermixed_args(argv)
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold is {args.threshold:g}, wanted 0 to 1")
    score(args)


def score(args: argparse.Namespace) -> dict[str, Result]:
    """Score what can be scored of a run, print and write the table. Results by category."""
    if not args.run.is_dir():
        raise ValueError(f"no run folder {args.run}")
    manifest = read_manifest(args.run)
    if args.compbench is not None:
        known = compbench(args.compbench).manifest()
        manifest = {**known, "count": IMAGES} | {
            name: manifest[name] for name in ("count", "renamed") if name in manifest
        }
    official = read_official(args.from_official, args.run) if args.from_official else {}
    entries = {name: list_entries(args.run, name, manifest.get("renamed", {})) for name in PARTS}
    if not any(entries.values()) and not official:
        raise ValueError(f"{args.run} holds no {CATEGORIES[0]}/samples, nor another category's")
    settle_threads()
    scorers = load_scorers(args, [name for name in PARTS if entries[name]])
    results = {}
    for category in CATEGORIES:
        result = score_category(args, category, entries[category], scorers, official, manifest)
        if result is not None:
            results[category] = result
    if not results:
        raise ValueError("nothing could be scored")
    title = args.title or args.run.resolve().name
    page = format_table(title, results)
    with whole_file(args.run / "table.md") as partial:
        partial.write_text(page)
    write_json(
        args.run / "scores.json",
        {
            category: {
                "mean": result.mean,
                "images": len(result.scores),
                "scorers": list(result.scorers),
                "official": result.is_official,
            }
            for category, result in results.items()
        },
    )
    print(page, end="")
    return results


def load_scorers(args: argparse.Namespace, categories: Sequence[str]) -> dict[tuple, object]:
    """The scorers that are named and needed, by their folder of results and whether they are for
    complex prompts; a line for each that is not named."""
    from gentron_fast.commandline import silence_libraries

    silence_libraries()
    needed = dict.fromkeys(part for category in categories for part in PARTS[category])
    folders = {part: getattr(args, option[2:]) for part, option in OPTIONS.items()}
    asked = [part for part in needed if folders[part] is not None]
    if not asked:
        return {}
    device = choose_device(args.device)
    from gentron_fast.evaluation.scorers import (
        BlipVqa,
        ClipSimilarity,
        Detector,
        Grammar,
        Spatial,
    )

    grammar = None
    if "complex" in categories or asked != [CLIP]:
        try:
            grammar = Grammar()
        except ValueError as error:
            if CLIP not in asked:
                raise
            warnings.warn(f"{error}; only non_spatial can be scored without", stacklevel=2)
            asked = [CLIP]

    def load(part: str) -> dict[tuple, object]:
        if part == BLIP:
            blip = BlipVqa(folders[part], device, grammar)
            return {(part, False): blip, (part, True): blip}
        if part == CLIP:
            plain = ClipSimilarity(folders[part], device)
            of_complex = {} if grammar is None else {(part, True): plain.with_grammar(grammar)}
            return {(part, False): plain} | of_complex
        detector = Detector(folders[part], device, args.threshold)
        return {(part, flag): Spatial(detector, grammar, flag) for flag in (False, True)}

    scorers: dict[tuple, object] = {}
    for part in asked:
        try:
            scorers |= load(part)
        except (OSError, ValueError) as error:
            if len(asked) == 1:
                raise
            warnings.warn(f"{OPTIONS[part]}: {error}", stacklevel=2)
            scorers |= {(part, False): None, (part, True): None}  # told already
    return scorers


def score_category(
    args: argparse.Namespace,
    category: str,
    entries: Sequence[Entry],
    scorers: Mapping[tuple, object],
    official: Mapping[tuple[str, str], Result],
    manifest: Mapping,
) -> Result | None:
    """A category's result; None, told in a line, where it cannot be scored."""
    is_complex = category == "complex"
    prompts, count = manifest.get("prompts", {}).get(category), manifest.get("count", IMAGES)
    if entries:
        check_entries(category, entries, prompts, count)
    elif prompts:  # official scores without their images
        texts = [without_stop(prompt) for prompt in prompts for _ in range(count)]
        entries = [Entry(Path(), text, i) for i, text in enumerate(texts)]
    given = {place: result for (name, place), result in official.items() if name == category}
    for place, result in list(given.items()):
        if entries and len(result.scores) != len(entries):
            warnings.warn(
                f"{category}/{place} has {len(result.scores)} scores, the run {len(entries)} "
                "images: left out",
                stacklevel=2,
            )
            del given[place]
    if THREE_IN_ONE in given:
        return given[THREE_IN_ONE]
    has_files = any(entry.path.name for entry in entries)
    if not has_files and not given:
        return None
    parts = PARTS[category]
    absent = [p for p in parts if p not in given and scorers.get((p, is_complex)) is None]
    missing = [
        OPTIONS[p]
        for p in absent
        if getattr(args, OPTIONS[p][2:]) is None or (p, is_complex) in scorers
    ]
    if absent or (not has_files and not set(parts) <= set(given)):
        wanted = " and ".join(missing) or ("images" if not has_files else "English grammar")
        warnings.warn(f"{category} is not scored: no {wanted}", stacklevel=2)
        return None
    own = {p: scorers[p, is_complex] for p in parts if p not in given}
    if not is_complex:
        column = Column(category, own)
    else:
        kinds = manifest.get("kinds", {})
        absent = [f"complex_val_{kind}.txt" for kind in COMPLEX_KINDS if kind not in kinds]
        if absent or not entries:
            absent = ", ".join(absent or ["complex_val.txt"])
            warnings.warn(f"complex is not scored: no {absent}: --compbench", stacklevel=2)
            return None
        lists = {kind: {rules.complex_key(p) for p in kinds[kind]} for kind in COMPLEX_KINDS}

        def combine(prompt: str, scores: Mapping[str, float]) -> float:
            values = scores[BLIP], scores[CLIP], scores[SPATIAL]
            return rules.three_in_one(prompt, *values, lists["spatial"], lists["action"])

        column = Column(category, own, combine, THREE_IN_ONE)
    return score_column(args.run / category, column, entries, given, args.batch)


def read_official(folder: Path, run: Path) -> dict[tuple[str, str], Result]:
    """The official code's results in a folder of categories, by category and folder of results;
    where it is the run itself, what was scored here lies among them and is passed over."""
    is_run = folder.resolve() == run.resolve()
    results = {}
    for category, parts in PARTS.items():
        for place in (*parts, *((THREE_IN_ONE,) if category == "complex" else ())):
            for found in (folder / category / place, folder / category / Path(place).name):
                if (found / RESULT_NAME).is_file():
                    if is_run and (found / SCORERS_NAME).is_file():
                        break
                    try:
                        results[category, place] = read_result(found)
                    except ValueError as error:
                        warnings.warn(f"left out: {error}", stacklevel=2)
                    break
    if not results:
        raise ValueError(f"{folder} has no {CATEGORIES[0]}/{BLIP}/{RESULT_NAME}, nor another one")
    return results


def format_table(title: str, results: Mapping[str, Result]) -> str:
    """Markdown: a run beside the published rows. What another scorer than the official one gave
    stands in a table of its own, with the scorer's name."""
    lines = [
        "# T2I-CompBench, per cent",
        "",
        _row(["model", *(category.replace("_", "-") for category in CATEGORIES)]),
        _row(["---"] * 7),
    ]
    lines += [_row([name, *(f"{v:.2f}" for v in row)]) for name, row in PUBLISHED.items()]
    cells = [
        f"{100 * results[name].mean:.2f}" if name in results and results[name].is_official else "–"
        for name in CATEGORIES
    ]
    lines += [_row([f"**{title}**", *cells]), ""]
    others = {name: result for name, result in results.items() if not result.is_official}
    if others:
        lines += [
            "By other scorers than the official ones, not to be compared with the rows above:",
            "",
            _row(["category", title, "scorers"]),
            _row(["---"] * 3),
        ]
        for name, result in others.items():
            figure = f"{100 * result.mean:.2f}"
            lines.append(_row([name.replace("_", "-"), figure, ", ".join(result.scorers)]))
        lines.append("")
    for name, result in results.items():
        scorers = ", ".join(result.scorers)
        lines.append(f"- {name.replace('_', '-')}: {len(result.scores)} images, {scorers}")
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
