"""Small studies for tests: two folders of pictures or clips, served by the command itself."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
from PIL import Image

from gentron_fast.evaluation.study import make_study
from gentron_fast.media import write_media

PROMPTS = [f"a red circle number {number}" for number in range(1, 5)]
ROWS = [("Arts", "Basic"), ("Arts", "Basic"), ("Animals", "Basic"), ("People", "Complex")]
TABLE = "Prompt\tCategory\tChallenge\tNote\n" + "".join(
    f"{prompt}\t{category}\t{challenge}\t\n"
    for prompt, (category, challenge) in zip(PROMPTS, ROWS, strict=True)
)


def pictures(folder, shade: int, names=PROMPTS, number="_000000") -> None:
    """One picture of a single grey for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (32, 24), (shade,) * 3).save(folder / f"{name}{number}.png")


def clips(folder, frames: int, fps: int = 8) -> None:
    """One clip for each prompt, that grows brighter."""
    ramp = np.linspace(0, 255, frames).astype(np.uint8)
    video = np.broadcast_to(ramp[:, None, None, None], (frames, 32, 32, 3))
    for prompt in PROMPTS:
        write_media(folder / f"{prompt}-0.mp4", video, fps)


def small_study(folder, make=pictures, sizes=(60, 200)):
    """A study of two folders that `make` fills: A with sizes[0], B with sizes[1]."""
    (folder / "prompts.tsv").write_text(TABLE)
    for name, size in zip("ab", sizes, strict=True):
        make(folder / name, size)
    return make_study(
        folder / "a", folder / "b", folder / "prompts.tsv", folder / "study", ["ours $_$", "theirs"]
    )


@contextmanager
def served(folder, *options):
    """`serve` of a study in a process of its own; yields it and its address."""
    command = [sys.executable, "-m", "gentron_fast.study", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        yield process, process.stdout.readline().split()[1]
    finally:
        process.kill()
        process.wait()


def call(address, path, body=None, token=None, kind="application/json"):
    """The status and the JSON of one request."""
    headers = {"Content-Type": kind} if body is not None else {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text
