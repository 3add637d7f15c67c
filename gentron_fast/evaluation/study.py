"""The side-by-side study, as the paper made it: what is shown, and the command.

A study is a folder: study.json, which alone knows whose file is whose; media/, the files under
random names; votes.sqlite, from the first serve on; and what report writes.
"""

import argparse
import random
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from gentron_fast.commandline import check_writable, refuse, run, utf8_text, whole_number
from gentron_fast.evaluation.votes import Votes
from gentron_fast.files import read_json, write_json
from gentron_fast.schema import OBJECT, TEXT, check_fields, optional, several, whole
from gentron_fast.web import LOOPBACK, choose_token

NAME = "gentron_fast.study"
STUDY_NAME, MEDIA_NAME, VOTES_NAME = "study.json", "media", "votes.sqlite"
MOST_PAIRS = 100_000

HELP = f"""\
usage: python -m {NAME} make A B --prompts FILE --out STUDY [options]
       python -m {NAME} serve STUDY [options]
       python -m {NAME} report STUDY [--out FOLDER]

make                 pairs the images or clips of two folders by their names;
                     nothing is written where a file is broken or alone
A B                  folders; names as of T2I-CompBench, VBench or generate,
                     or the prompts' numbers
--prompts FILE       PartiPrompts.tsv, or one prompt a line
--out STUDY          a new folder
--names A B          of the models, in the report (the folders)
--seed N             draws left and right, and each rater's order (0)

serve                the page where people vote, until Ctrl-C
--host HOST          whom it reaches: this machine alone (127.0.0.1), all (0.0.0.0)
--port N             8000; 0: any free one
--token TEXT         what raters from elsewhere must know (one is made)

report               win, draw, lose of A against B, as text, JSON and picture;
                     the votes as CSV
--out FOLDER         for the four files (STUDY)
"""

PAIR_SCHEMA = {
    "id": TEXT,
    "name": TEXT,
    "prompt": TEXT,
    "category": optional(TEXT),
    "challenge": optional(TEXT),
    "media": several(TEXT, 2, 2),
    "left": whole(0, 1),
}
STUDY_SCHEMA = {
    "seed": whole(0, 2**64 - 1),
    "names": several(TEXT, 2, 2),
    "pairs": several(OBJECT, 1, MOST_PAIRS),
}


@dataclass(frozen=True)
class ShownPair:
    """One pair of a study: the files of models A and B, and which of them (0, 1) is on the left."""

    id: str
    name: str
    prompt: str
    category: str | None
    challenge: str | None
    media: list[str]
    left: int

    def winner(self, answer: str) -> int:
        """0, 1 or 2: A wins, draw, A loses, of an answer as the rater saw the two sides."""
        if answer == "equal":
            return 1
        return 0 if (answer == "left") == (self.left == 0) else 2


@dataclass(frozen=True)
class Study:
    """What is judged: pairs, and the models' names."""

    folder: Path
    seed: int
    names: list[str]
    pairs: list[ShownPair]

    @classmethod
    def read(cls, folder: Path) -> "Study":
        """The study in a folder. ValueError, FileNotFoundError where it is none, or not whole."""
        path = folder / STUDY_NAME
        values = read_json(path)
        check_fields(values, STUDY_SCHEMA, str(path))
        for pair in values["pairs"]:
            check_fields(pair, PAIR_SCHEMA, f"a pair in {path}")
            for name in pair["media"]:
                if Path(name).name != name or not (folder / MEDIA_NAME / name).is_file():
                    raise ValueError(f"{path} names {name!r}, which {MEDIA_NAME}/ does not hold")
        pairs = [ShownPair(**pair) for pair in values["pairs"]]
        return cls(folder, values["seed"], values["names"], pairs)

    def votes(self) -> Votes:
        return Votes(self.folder / VOTES_NAME)

    def order(self, rater: str) -> list[ShownPair]:
        """The pairs as one rater gets them: shuffled, and the same at every visit."""
        pairs = list(self.pairs)
        random.Random(f"{self.seed} {rater}").shuffle(pairs)
        return pairs


def make_study(
    a: Path, b: Path, prompts: Path, out: Path, names: list[str] | None = None, seed: int = 0
) -> Study:
    """Make the folder of a study of two folders of images or clips; there whole or not at all."""
    from gentron_fast.evaluation.pairs import pair_folders, read_prompts
    from gentron_fast.files import check_output_folder, whole_folder

    if a.resolve() == b.resolve():
        raise ValueError(f"{a} and {b} are one folder: wanted those of two models")
    ours = (STUDY_NAME, MEDIA_NAME)  # a study that was served holds votes, and is not replaced
    check_output_folder(out, ours)
    check_writable([out / STUDY_NAME])
    pairs = pair_folders(a, b, read_prompts(prompts))
    # Half of the pairs have A on the left: one who always answers "left" makes neither win.
    sides = [index % 2 for index in range(len(pairs))]
    random.Random(seed).shuffle(sides)
    shown = []
    with whole_folder(out, ours) as folder:
        (folder / MEDIA_NAME).mkdir()
        for pair, left in zip(pairs, sides, strict=True):
            media = [secrets.token_hex(8) + path.suffix.lower() for path in pair.files]
            for path, name in zip(pair.files, media, strict=True):
                shutil.copyfile(path, folder / MEDIA_NAME / name)
            prompt, category, challenge = pair.prompt
            shown.append(
                {
                    "id": secrets.token_hex(8),
                    "name": pair.name,
                    "prompt": prompt,
                    "category": category,
                    "challenge": challenge,
                    "media": media,
                    "left": left,
                }
            )
        names = names or [str(a), str(b)]
        write_json(folder / STUDY_NAME, {"seed": seed, "names": names, "pairs": shown})
    return Study.read(out)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 after wrong input (told in one line), 130 after SIGINT."""
    argv = sys.argv[1:] if argv is None else argv
    command = {"make": make, "serve": serve, "report": report}

    def work() -> None:
        args = parse_arguments(argv)
        command[args.command](args)

    return run(NAME, work, argv, "stopped", wrong=(ImportError,))


def make(args: argparse.Namespace) -> None:
    study = make_study(args.a, args.b, args.prompts, args.out, args.names, args.seed)
    prompts = {pair.prompt for pair in study.pairs}
    print(f"pairs        {len(study.pairs)}, of {len(prompts)} prompts")
    print(f"next         python -m {NAME} serve {args.out}")


def serve(args: argparse.Namespace) -> None:
    from gentron_fast.evaluation.server import serve_study

    token = choose_token("--token", args.token, args.host)
    study = Study.read(args.folder)
    check_writable([args.folder / VOTES_NAME])
    serve_study(study, args.host, args.port, token)


def report(args: argparse.Namespace) -> None:
    from gentron_fast.evaluation.study_report import FILES, is_report, write_report

    out = args.out or args.folder
    study = Study.read(args.folder)
    if not (args.folder / VOTES_NAME).is_file():
        raise ValueError(f"{args.folder} has no votes yet: python -m {NAME} serve {args.folder}")
    check_writable([out / name for name in FILES])
    there = [name for name in FILES if (out / name).exists()]
    if there and args.folder.resolve() != out.resolve() and not is_report(out):
        raise ValueError(f"{out} holds {', '.join(there)} of no study: choose another folder")
    print(write_report(study, study.votes().standing(), out), end="")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises ValueError where argparse would print its usage and exit."""
    parser = argparse.ArgumentParser(prog=NAME, allow_abbrev=False)
    parser.format_help, parser.error = lambda: HELP, refuse
    commands = parser.add_subparsers(dest="command", required=True, metavar="make|serve|report")
    options = {}
    for command in ("make", "serve", "report"):
        options[command] = commands.add_parser(command, allow_abbrev=False)
        options[command].format_help, options[command].error = lambda: HELP, refuse
        options[command].add_argument("--verbose", action="store_true")
    options["make"].add_argument("a", type=Path, metavar="A")
    options["make"].add_argument("b", type=Path, metavar="B")
    options["make"].add_argument("--prompts", type=Path, required=True)
    options["make"].add_argument("--out", type=Path, required=True)
    options["make"].add_argument("--names", nargs=2, type=utf8_text)
    options["make"].add_argument("--seed", type=whole_number(0, 2**64 - 1), default=0)
    options["serve"].add_argument("folder", type=Path, metavar="STUDY")
    options["serve"].add_argument("--host", default=LOOPBACK[0])
    options["serve"].add_argument("--port", type=whole_number(0, 65535), default=8000)
    options["serve"].add_argument("--token")
    options["report"].add_argument("folder", type=Path, metavar="STUDY")
    options["report"].add_argument("--out", type=Path)
    return parser.parse_args(argv)
