"""The command: clips by the real scheduler, SIGTERM, kill -9, and what it refuses at once."""

import base64
import importlib.util
import io
import json
import os
import signal
import socket
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai
from serving import call, served_process
from soak import MOST_APART, apart

from gentron_fast import GenTronPipeline, serve
from gentron_fast.media import read_video, write_media
from gentron_fast.web import bind

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")  # openai's own, of its own models
LONG = {"steps": 200, "solver": "ddim"}


KEY = "from-the-environment"


def test_clips_are_the_pipelines_and_outlive_kill_9_and_sigterm(
    tiny_pipeline_folder, tmp_path, monkeypatch
):
    out = tmp_path / "clips"
    options = (str(tiny_pipeline_folder), "--out", str(out), "--max-batch", "2", "--grace", "2")
    options += ("--queue", "9")
    with served_process(*options) as (process, address):
        client = openai.OpenAI(base_url=f"{address}v1", api_key="none")
        made = client.images.generate(prompt="a red circle", extra_body={"seed": 5, "steps": 4})
        clip = client.videos.create_and_poll(
            prompt="a red circle", extra_body={"seed": 5, "steps": 4}, poll_interval_ms=50
        )
        assert clip.status == "completed", clip.error
        with pytest.raises(openai.BadRequestError, match="wanted a whole number from 1 to 9"):
            client.images.generate(prompt="a red circle", n=10)  # more than the queue takes
        begun = [client.videos.create(prompt="a blue square", extra_body=LONG) for _ in range(3)]
        while client.videos.retrieve(begun[0].id).status == "queued":
            time.sleep(0.02)
        # One folder is one server's.
        assert serve.main(["--out", str(out), "--port", "0"]) == 2
        process.send_signal(signal.SIGKILL)
    monkeypatch.setenv("GENTRON_KEY", KEY)
    with served_process(*options, "--host", "0.0.0.0") as (process, address):
        assert address.endswith(f"/#{KEY}")
        address = address.partition("#")[0].replace("0.0.0.0", "127.0.0.1")
        assert call(f"{address}v1/videos")[0] == 401
        client = openai.OpenAI(base_url=f"{address}v1", api_key=KEY)
        states = {video.id: video.status for video in client.videos.list()}
        assert states == {clip.id: "completed"} | {video.id: "failed" for video in begun}
        assert client.videos.retrieve(begun[1].id).error.code == "server_stopped"
        client.videos.download_content(clip.id).write_to_file(tmp_path / "clip.mp4")

        short = client.videos.create(prompt="a red circle", extra_body={"steps": 4})
        longs = [
            client.videos.create(prompt="a red circle", extra_body=LONG | {"frames": 32})
            for _ in range(6)
        ]
        assert longs[0].warnings == ["the model may not know 32 frames, where its own are 4"]
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert process.stdout.readline() == "stopped\n"
        assert time.monotonic() - start < 2 + 8  # its grace and a step, on a busy machine
        assert process.wait(30) == 0
    records = {video.id: json.loads((out / f"{video.id}.json").read_text()) for video in longs}
    assert json.loads((out / f"{short.id}.json").read_text())["status"] == "completed"
    assert records[longs[-1].id]["error"]["code"] == "server_stopped"
    assert not [name for name in os.listdir(out) if ".part" in name]

    pipeline = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    asked = {"seed": 5, "steps": 4, "progress": False}
    frames = pipeline("a red circle", **asked).frames[0].numpy()
    sent, fps = read_video(tmp_path / "clip.mp4")
    write_media(tmp_path / "alone.mp4", frames, 4)
    alone, _ = read_video(tmp_path / "alone.mp4")
    assert sent.shape == frames.shape and fps == 4
    assert apart(sent, alone) < MOST_APART  # a pixel may differ by rounding
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))))
    alone = pipeline("a red circle", frames=1, **asked).frames[0, 0].numpy()
    assert np.abs(image.astype(int) - alone).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--key", "sh$rt"], "--key has 5 characters, wanted 8 or more letters"),
        (["--key", ""], "--key has 0 characters, wanted 8 or more letters"),
        (["--port", "70000"], "wanted a whole number from 0 to 65535"),
        (["--keep", "0"], "--keep is 0, wanted more than 0 hours"),
        (["--host", "nowhere.invalid"], "cannot serve on nowhere.invalid, port 8000"),
        (["nowhere", "--port", "0"], "cannot load nowhere"),
        (["--device", "tpu", "--port", "0"], "unknown device 'tpu'"),
        (["--out", "/dev/null/x"], "cannot write into /dev/null/x"),
    ],
)
def test_wrong_options_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert serve.main(options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "sh$rt" not in error


def test_a_wrong_key_of_the_variable_is_not_shown(monkeypatch, capsys):
    monkeypatch.setenv("GENTRON_KEY", "a secret")
    assert serve.main([]) == 2
    error = capsys.readouterr().err
    assert "GENTRON_KEY has 8 characters, wanted" in error and "a secret" not in error


def test_clients_are_refused_until_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]

    def load(*_):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        raise ValueError("no model")

    monkeypatch.setattr(serve, "load", load)
    options = ["--out", str(tmp_path), "--port", str(port)]
    assert serve.main(options) == 2
    assert "no model" in capsys.readouterr().err
    with bind("127.0.0.1", port) as other:
        other.listen()
        assert serve.main(options) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    find = importlib.util.find_spec
    absent = lambda name, *_: None if name == "uvicorn" else find(name, *_)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    assert serve.main([]) == 2
    error = capsys.readouterr().err
    assert error == (
        'gentron_fast.serve: error: the server needs uvicorn: pip install "gentron_fast[serve]"\n'
    )


def test_the_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        serve.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
