"""The server's addresses, by OpenAI's own client and by hand, above a stand-in of the scheduler."""

import base64
import io
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai
from configurations import NUMBERS, OTHERS
from faults import FAULTS
from prometheus_client.parser import text_string_to_metric_families
from serving import MODEL, StandIn, call, make_service, served

from gentron_fast.media import read_video
from gentron_fast.serving import DeadlinePassed

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")  # openai's own, of its own models
KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def scheduler():
    return StandIn()


@pytest.fixture(scope="module")
def address(scheduler, tmp_path_factory):
    with served(make_service(tmp_path_factory.mktemp("clips"), scheduler)) as address:
        yield address


@pytest.fixture
def slow(scheduler):
    """The scheduler while nothing gets done unless the test says so."""
    scheduler.is_quick = False
    scheduler.jobs.clear()
    yield scheduler
    for job in scheduler.waiting():
        scheduler.end(job)
    scheduler.is_quick = True


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}v1", api_key="none", max_retries=0)


def wait(condition, seconds=20):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)
    return found


def test_a_clip_by_openais_client(client, tmp_path):
    clip = client.videos.create_and_poll(
        prompt="a red circle",
        seconds="2",
        size="32x64",
        extra_body={"seed": 7, "steps": 5, "lambda_t": 2.5, "negative_prompt": "blue"},
        poll_interval_ms=20,
    )
    assert (clip.status, clip.progress, clip.model, clip.error) == ("completed", 100, "tiny", None)
    assert (clip.seconds, clip.size, clip.prompt) == ("2", "32x64", "a red circle")
    assert clip.expires_at == clip.completed_at + 3600 and clip.created_at <= clip.completed_at
    assert clip.settings == {
        **{"seed": 7, "steps": 5, "solver": "dpm++", "lambda_t": 2.5, "lambda_m": 1.2},
        **{"rescale": 0.0, "frames": 8, "negative_prompt": "blue", "size": "32x64"},
    }
    client.videos.download_content(clip.id).write_to_file(tmp_path / "clip.mp4")
    frames, fps = read_video(tmp_path / "clip.mp4")
    assert frames.shape == (8, 64, 32, 3) and fps == 4
    assert np.abs(frames[:, 0, 0, 0] - (np.arange(8) * 8.0 + 7)).max() <= 2
    thumbnail = client.videos.download_content(clip.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (32, 64)
    sheet = client.videos.download_content(clip.id, variant="spritesheet").read()
    assert Image.open(io.BytesIO(sheet)).size[0] > 8 * 32
    # What it was made with makes the same again, what it was made without among it.
    for settings in (clip.settings, clip.settings | {"negative_prompt": None}):
        again = client.videos.create(prompt=clip.prompt, extra_body=settings)
        assert again.settings == settings
    assert clip.warnings == []
    unusual = client.videos.create(prompt="an orange circle")
    assert unusual.warnings == ["the model has never seen: orange"]
    assert client.videos.retrieve(unusual.id).warnings == unusual.warnings
    assert client.images.generate(prompt="an orange star").warnings == unusual.warnings
    assert client.videos.delete(clip.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(clip.id)


def test_clips_are_listed_by_pages(client):
    made = [client.videos.create(prompt=f"number {number}").id for number in range(5)]
    newest = [clip.id for clip in client.videos.list(limit=2)]  # the client asks for every page
    assert newest[:5] == made[::-1]
    page = client.videos.list(limit=2, after=made[3])
    assert [clip.id for clip in page.data] == [made[2], made[1]] and page.has_more
    oldest = [clip.id for clip in client.videos.list(order="asc", limit=100)]
    assert oldest == newest[::-1]
    assert len({clip.settings["seed"] for clip in client.videos.list().data}) > 1  # drawn


def test_images_by_openais_client(client, address):
    made = client.images.generate(prompt="a circle", n=2, size="64x32", extra_body={"seed": 3})
    for number, image in enumerate(made.data):
        picture = Image.open(io.BytesIO(base64.b64decode(image.b64_json)))
        assert picture.size == (64, 32) and picture.getpixel((0, 0)) == (3 + number,) * 3
        assert image.seed == 3 + number
    asked = {"output_format": "webp", "response_format": "url", "quality": "high", "user": "me"}
    image = client.images.generate(prompt="a circle", size="auto", **asked).data[0]
    assert image.url.startswith(address)
    status, headers, data = call(image.url)
    assert status == 200 and headers["Content-Type"] == "image/webp"
    assert Image.open(io.BytesIO(data)).size == (48, 64)
    assert call(image.url[:-8] + "000.webp")[0] == 404
    streamed = client.images.generate(prompt="a circle", stream=True, partial_images=2, n=2)
    events = list(streamed)
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    for event in events:
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size == (48, 64)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_progress_and_cancelling(client, slow):
    clip = client.videos.create(prompt="a circle")
    assert client.videos.retrieve(clip.id).status == "queued"
    (job,) = slow.jobs
    slow.advance(job, 4)
    now = client.videos.retrieve(clip.id)
    assert (now.status, now.progress) == ("in_progress", 40)
    with pytest.raises(openai.NotFoundError, match="the video is in_progress"):
        client.videos.download_content(clip.id)
    client.videos.delete(clip.id)
    assert job.state == "cancelled"
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(clip.id)


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (ValueError("the latents of step 3\nare not finite"), "generation_failed", "step 3 are"),
        (DeadlinePassed("the deadline of 2 s passed"), "deadline_passed", "of 2 s"),
    ],
)
def test_a_failure_is_told(client, slow, outcome, code, message, caplog):
    clip = client.videos.create(prompt="a circle", extra_body={"deadline": 2})
    assert slow.jobs[0].request.deadline == 2
    slow.end(slow.jobs[0], outcome)
    clip = client.videos.poll(clip.id, poll_interval_ms=20)
    assert (clip.status, clip.error.code) == ("failed", code) and message in clip.error.message


def test_a_fault_is_logged_and_not_shown(client, slow, caplog):
    clip = client.videos.create(prompt="a circle")
    slow.end(slow.jobs[0], RuntimeError("CUDA error in /srv/model"))
    clip = client.videos.poll(clip.id, poll_interval_ms=20)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(client.images.generate, prompt="a circle", extra_body={"seed": 3})
        wait(lambda: len(slow.jobs) == 2)
        slow.end(slow.jobs[1], RuntimeError("CUDA error in /srv/model"))
        error = asked.exception()
    assert isinstance(error, openai.InternalServerError) and error.code == "generation_failed"
    for told in (clip.error.message, str(error)):
        assert "which its log tells" in told and "CUDA" not in told
    for what in (f"the clip {clip.id} failed", "an image of seed 3 failed"):
        (record,) = [record for record in caplog.records if record.message == what]
        assert "CUDA error" in str(record.exc_info[1])


def test_who_no_longer_waits_for_images_frees_their_place(address, slow):
    body = json.dumps({"prompt": "a circle", "n": 2}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", int(address[:-1].rpartition(":")[2]))) as gone:
        gone.sendall(f"{head}\r\n\r\n".encode() + body)
        wait(lambda: len(slow.jobs) == 2)
    wait(lambda: {job.state for job in slow.jobs} == {"cancelled"})


def test_a_full_queue_is_429_and_takes_no_part_of_a_request(client, address, slow):
    for _ in range(3):
        client.videos.create(prompt="a circle")
    with pytest.raises(openai.RateLimitError, match="the queue is full") as caught:
        client.images.generate(prompt="a circle", n=2)
    assert caught.value.code == "queue_full"
    assert caught.value.response.headers["Retry-After"] == "7"  # of 6.2 seconds
    assert len(slow.waiting()) == 3
    # Its own client comes again by itself.
    patient = openai.OpenAI(base_url=f"{address}v1", api_key="none", max_retries=1)
    client.videos.create(prompt="a circle")
    patient._calculate_retry_timeout = lambda *_: slow.end(slow.jobs[0]) or 0
    assert patient.videos.create(prompt="a circle").status == "queued"


WRONG = [
    ({}, "prompt", "a prompt is needed"),
    ({"prompt": "  "}, "prompt", "a prompt is needed"),
    ({"prompt": 3}, "prompt", "wanted text of 1 to 100 characters"),
    ({"prompt": "x" * 101}, "prompt", "wanted text of 1 to 100 characters"),
    ({"prompt": "\ud800"}, "prompt", "wanted text of 1 to 100 characters"),
    ({"negative_prompt": "x" * 101}, "negative_prompt", "0 to 100 characters"),
    ({"steps": 21}, "steps", "steps is 21, wanted a whole number from 1 to 20"),
    ({"steps": 2.0}, "steps", "whole number"),
    ({"steps": True}, "steps", "whole number"),
    ({"frames": 17}, "frames", "from 1 to 16"),
    ({"frames": "many"}, "frames", "'many', wanted a whole number"),
    ({"seconds": "12"}, "seconds", "wanted at most 4, 16 frames at 4 a second"),
    ({"seconds": "1", "frames": 5}, "seconds", "1 seconds are not 5 frames"),
    ({"seconds": "soon"}, "seconds", "wanted a number of seconds"),
    ({"size": "97x64"}, "size", "each at most 96"),
    ({"size": "64"}, "size", "wanted WIDTHxHEIGHT"),
    ({"size": "33x64"}, "size", "even sides"),
    ({"size": "40x64"}, None, "multiples of 16"),
    ({"seed": -1}, "seed", "from 0 to 18446744073709551615"),
    ({"seed": 2**64}, "seed", "from 0 to"),
    ({"lambda_t": float("nan")}, "lambda_t", "wanted a number"),
    ({"lambda_m": 1e300}, "lambda_m", "wanted a number"),
    ({"rescale": 1.5}, "rescale", "wanted a number from 0 to 1"),
    ({"solver": "euler"}, "solver", "wanted one of ddpm, ddim, dpm++, few-step"),
    ({"lamda_t": 3}, "lamda_t", "there is no field 'lamda_t' here; wanted some of lambda_t"),
    ({"model": "sora-2"}, "model", "there is no model 'sora-2', only tiny"),
    ({"input_reference": {"image_url": "x"}}, "input_reference", "no clip starts from a picture"),
]
WRONG_IMAGES = [
    ({"n": 5}, "n", "from 1 to 4"),  # as many as the queue takes
    ({"frames": 2}, "frames", "there is no field"),
    ({"stream": "yes"}, "stream", "wanted true or false"),
    ({"output_format": "gif"}, "output_format", "one of png, jpeg, webp"),
    ({"background": "transparent"}, "background", "one of auto, opaque"),
    ({"seed": 2**64 - 1, "n": 2}, "seed", "goes beyond 2**64 - 1"),
]


@pytest.mark.parametrize(
    ("path", "fields", "name", "message"),
    [("videos", *row) for row in WRONG] + [("images/generations", *row) for row in WRONG_IMAGES],
)
def test_wrong_input_is_one_line_that_names_it(address, scheduler, path, fields, name, message):
    before = len(scheduler.jobs)
    body = ({"prompt": "a circle"} if fields else {}) | fields
    status, _, answer = call(f"{address}v1/{path}", body)
    error = answer["error"]
    assert status == (404 if name == "model" else 400)
    assert (error["param"], error["type"]) == (name, "invalid_request_error")
    assert message in error["message"] and "\n" not in error["message"]
    assert len(scheduler.jobs) == before


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "v1/videos", b"{", 400, "the body is not JSON"),
        ("POST", "v1/videos", b"[" * 1900, 400, "the body is not JSON"),
        ("POST", "v1/videos", b"[1]", 400, "must be a JSON object, it is a list"),
        ("POST", "v1/videos", b"x" * 2001, 413, "larger than 2000 bytes"),
        ("GET", "v1/videos?limit=0", None, 400, "limit is '0'"),
        ("GET", "v1/videos?order=up", None, 400, "order is 'up'"),
        ("GET", "v1/videos?after=video_0", None, 400, "there is no video 'video_0'"),
        ("GET", "v1/videos/..%2f..%2fetc", None, 404, "Not Found"),
        ("GET", "v1/videos/video_0", None, 404, "there is no video"),
        ("DELETE", "v1/videos/video_0", None, 404, "there is no video"),
        ("GET", "v1/images/..%2fpasswd", None, 404, "Not Found"),
        ("GET", "v1/images/.lock", None, 404, "there is no image"),
        ("GET", "docs", None, 404, "Not Found: GET /docs"),
        ("PUT", "v1/videos", b"{}", 405, "Method Not Allowed"),
    ],
)
def test_wrong_requests_are_one_line(address, method, path, body, status, message):
    kind = {"Content_Type": "application/json"} if body else {}
    found, headers, answer = call(f"{address}{path}", body, method, **kind)
    assert found == status and message in answer["error"]["message"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_body_without_an_end_is_cut_off(address):
    port = int(address[:-1].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as endless:
        head = "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        endless.sendall(head.encode() + b"400\r\n" + b"x" * 1024 + b"\r\n")
        endless.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert endless.recv(100).startswith(b"HTTP/1.1 413")


def test_a_slow_body_is_given_up(address, monkeypatch):
    monkeypatch.setattr("gentron_fast.serving.app.BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", int(address[:-1].rpartition(":")[2]))) as slow:
        slow.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        slow.settimeout(20)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: local"])
def test_who_asks_for_nothing_is_given_up(address, monkeypatch, begun):
    monkeypatch.setattr("gentron_fast.serving.server.HEAD_SECONDS", 0.3)
    port = int(address[:-1].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as idle:
        idle.sendall(begun)
        assert idle.recv(100) == b""  # closed
    with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
        for part in (
            b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n",
            b"Content-Length: 1\r\n\r\n",
        ):
            slow.sendall(part)
            time.sleep(0.2)
        time.sleep(0.3)  # once the head is there it is the body's time that counts
        slow.sendall(b"{")
        assert slow.recv(100).startswith(b"HTTP/1.1 400")


@pytest.mark.faults
def test_any_body_is_taken_or_refused_in_one_line(address, scheduler, tally):
    names = sorted({name for fields, *_ in WRONG + WRONG_IMAGES for name in fields} | {"n", "x"})
    values = NUMBERS + OTHERS + ["auto", "64x64", "ddim", "png", 4, 8, 2.5, "a circle", "x" * 99]
    for seed in range(150 * FAULTS):
        chance = random.Random(seed)
        body = {name: chance.choice(values) for name in chance.sample(names, chance.randint(0, 4))}
        body = {"prompt": "a circle"} | body if chance.random() < 0.9 else body
        path = chance.choice(["v1/videos", "v1/images/generations"])
        status, _, answer = call(f"{address}{path}", body)
        if status == 200:
            tally("ended well")
            continue
        assert status in (400, 404, 413), (body, answer)
        assert "\n" not in answer["error"]["message"] and len(answer["error"]["message"]) < 400
        tally("refused")
    scheduler.jobs.clear()


def test_only_this_machines_pages_may_ask_without_a_key(address):
    port = address[:-1].rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", "localhost"):
        assert call(f"{address}health", Host=host)[0] == 200
    status, _, answer = call(f"{address}v1/videos", Host=f"elsewhere.example:{port}")
    assert status == 403 and "not 'elsewhere.example" in answer["error"]["message"]
    form = b"prompt=a+circle"
    kind = "application/x-www-form-urlencoded"
    url = f"{address}v1/videos"
    elsewhere = call(url, form, Content_Type=kind, Origin="https://elsewhere.example")
    assert elsewhere[0] == 403 and "may not ask" in elsewhere[2]["error"]["message"]
    assert call(url, form, Content_Type=kind, Origin=address[:-1])[0] == 200


def test_a_key_is_asked_for(tmp_path):
    service = make_service(tmp_path)
    with served(service, KEY) as address:
        for path in ("v1/videos", "v1/models", "metrics", "v1/videos/video_0/content"):
            for headers in ({}, {"Authorization": "Bearer guess"}, {"Authorization": KEY}):
                status, _, answer = call(f"{address}{path}", **headers)
                assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert call(f"{address}health")[0] == 200
        page = call(address)
        assert page[0] == 200 and "default-src 'none'" in page[1]["Content-Security-Policy"]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}v1", api_key="wrong").videos.create(prompt="x")
        client = openai.OpenAI(base_url=f"{address}v1", api_key=KEY)
        assert client.videos.create(prompt="a circle").status == "queued"
        assert call(f"{address}metrics", Authorization=f"Bearer {KEY}")[0] == 200


def test_a_model_of_images_makes_no_clips(tmp_path):
    with served(make_service(tmp_path, model=replace(MODEL, makes_video=False))) as address:
        client = openai.OpenAI(base_url=f"{address}v1", api_key="none")
        with pytest.raises(openai.NotFoundError, match="tiny makes images: ask /v1/images"):
            client.videos.create(prompt="a circle")
        assert len(client.images.generate(prompt="a circle").data) == 1


def test_what_prometheus_reads(client, address, slow):
    clip = client.videos.create(prompt="a circle")
    slow.advance(slow.jobs[0], 4)
    client.videos.create(prompt="a circle")

    def figures():
        families = text_string_to_metric_families(call(f"{address}metrics")[2].decode())
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }

    found = figures()
    assert found["gentron_queue_length",] == found["gentron_batch",] == 1
    assert found["gentron_steps_total",] == 4 and found["gentron_memory_bytes",] == 2**20
    assert found["process_resident_memory_bytes",] > 2**20
    assert found["gentron_http_responses_total", "200"] >= 2
    before = found.get(("gentron_latency_seconds_count", "video"), 0)
    slow.end(slow.jobs[0])
    client.videos.poll(clip.id, poll_interval_ms=20)
    wait(lambda: figures().get(("gentron_latency_seconds_count", "video")) == before + 1)


def test_while_it_stops_what_is_there_is_given_out_and_nothing_taken(tmp_path):
    scheduler = StandIn(is_quick=False)
    service = make_service(tmp_path, scheduler)
    with served(service) as address:
        client = openai.OpenAI(base_url=f"{address}v1", api_key="none", max_retries=0)
        done, begun = (client.videos.create(prompt=name) for name in ("done", "begun"))
        scheduler.end(scheduler.jobs[0])
        client.videos.poll(done.id, poll_interval_ms=20)
        service.is_stopping = scheduler.is_closed = True  # in the middle of its grace
        with pytest.raises(openai.InternalServerError, match="the server was stopped") as caught:
            client.videos.create(prompt="late")
        assert caught.value.response.headers["Retry-After"]
        assert call(f"{address}health")[::2] == (503, {"status": "stopping"})
        assert client.videos.download_content(done.id).read()
        scheduler.is_closed = False
        asked = ThreadPoolExecutor(1).submit(client.images.generate, prompt="waits")
        wait(lambda: len(scheduler.jobs) == 3)
        service.stop(0)
        with pytest.raises(openai.InternalServerError, match="the server was stopped"):
            asked.result(20)
        wait(lambda: service.is_stopped)
    assert service.video(begun.id)["error"]["code"] == "server_stopped"


def test_a_disk_that_hangs_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("gentron_fast.serving.service.WRITE_SECONDS", 0.2)
    service, go = make_service(tmp_path), threading.Event()
    monkeypatch.setattr(service.store, "finish", lambda *_: go.wait(30))
    service.make_video({"prompt": "a circle"})
    service.stop(5)
    try:
        wait(lambda: service.is_stopped, 5)
    finally:
        go.set()


def test_a_scheduler_that_fails_ends_the_server(tmp_path):
    scheduler = StandIn(is_quick=False)
    service = make_service(tmp_path, scheduler)
    with served(service) as address:
        client = openai.OpenAI(base_url=f"{address}v1", api_key="none", max_retries=0)
        begun = client.videos.create(prompt="a circle")
        assert call(f"{address}health")[::2] == (200, {"status": "ok"})
        service.is_stopping = scheduler.is_broken = True  # so that it stays to be asked
        assert call(f"{address}health")[::2] == (503, {"status": "broken"})
        service.is_stopping = False
        scheduler.close(0)
        wait(lambda: service.is_stopped)
    assert service.is_broken and service.video(begun.id)["error"]["code"] == "server_stopped"


def test_a_fault_of_ours_is_one_line_and_counted(tmp_path, monkeypatch):
    service = make_service(tmp_path)
    monkeypatch.setattr(service, "videos", lambda *_: 1 // 0)
    with served(service) as address:
        clip = call(f"{address}v1/videos", {"prompt": "a circle"})[2]["id"]
        wait(lambda: service.video(clip)["status"] == "completed")
        service.store.path(clip).unlink()  # by another hand, or since its record was read
        for variant in ("video", "thumbnail"):
            assert call(f"{address}v1/videos/{clip}/content?variant={variant}")[0] == 404
        status, _, answer = call(f"{address}v1/videos")
        assert status == 500 and answer["error"]["type"] == "server_error"
        assert 'status="500"} 1.0' in call(f"{address}metrics")[2].decode()


def test_what_is_too_old_goes_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("gentron_fast.serving.app.SWEEP_SECONDS", 0.1)
    service = make_service(tmp_path, keep=0.5)
    with served(service) as address:
        clip = call(f"{address}v1/videos", {"prompt": "a circle"})[2]["id"]
        wait(lambda: service.store.path(clip).exists())
        wait(lambda: not list(tmp_path.glob("video_*")))
        assert call(f"{address}v1/videos/{clip}")[0] == 404
