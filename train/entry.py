"""The start of a rank, before anything that takes long is imported."""

import os
import signal


def start(stage: str, description: str) -> None:
    """The whole of train/t2i.py, train/t2v.py and train/distill.py on one rank.

    SIGTERM or Ctrl-C before the first step ends it with one line and exit code 130.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    if is_main():
        print(f"{stage}: loading torch and DeepSpeed", flush=True)
    from gentron_train.process import run
    from gentron_train.trainer import train

    run(lambda: train(stage, description))


def _leave(number, frame) -> None:
    if is_main():
        print("stopped before the first step", flush=True)
    # Not by an exception: an import that is half done would tell of it in many lines.
    os._exit(130)


def is_main() -> bool:
    """Whether this process is the first rank, before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"
