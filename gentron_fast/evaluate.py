"""Benchmarks: python -m gentron_fast.evaluate generate … and score …"""

import sys

from gentron_fast.commandline import run

NAME = "gentron_fast.evaluate"
HELP = f"""\
usage: python -m {NAME} generate PIPELINE --compbench FOLDER --out RUN [options]
       python -m {NAME} generate PIPELINE --vbench PROMPTS --out RUN [options]
       python -m {NAME} score RUN --blip FOLDER --clip FOLDER --detector FOLDER

Each has --help. T2I-CompBench is scored here, VBench by its own tool.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 after wrong input (told in one line), 130 after SIGINT."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["--help"], ["-h"]):
        print(HELP, end="")
        return 0
    return run(NAME, lambda: _command(argv), argv, "interrupted; what is written is whole")


def _command(argv: list[str]) -> None:
    if argv[:1] == ["generate"]:
        from gentron_fast.commandline import silence_libraries
        from gentron_fast.evaluation.generate import command

        silence_libraries()
        return command(argv[1:])
    if argv[:1] == ["score"]:
        from gentron_fast.evaluation.score import command

        return command(argv[1:])
    raise ValueError(f"wanted generate or score, got {' '.join(argv[:1]) or 'nothing'}: --help")


if __name__ == "__main__":
    sys.exit(main())
