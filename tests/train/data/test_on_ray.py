"""Clips and latents on a Ray cluster of two nodes: what dies is made again, and nothing is there
that one process would not have made, to the byte.

`make ray` (RAY_PROMPTS=200) makes as many clips by the model that ships, and all tests.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from serving import call, served_process

from gentron_fast import GenTronPipeline, serve
from gentron_fast.generate import main as generate
from gentron_fast.media import read_video, write_media
from gentron_fast.serving import Request
from gentron_fast.serving.replicas import AUTOSCALING
from gentron_train.data.precompute import main as precompute
from gentron_train.small_world.renderer import seen_prompts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
FULL = "RAY_PROMPTS" in os.environ
PROMPTS = int(os.environ.get("RAY_PROMPTS", 14))
STORE = 100 * 2**20  # bytes
in_full = pytest.mark.skipif(not FULL, reason="make ray")


class TwoNodes:
    """A cluster on this machine: two nodes of one core each."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self.node = {"num_cpus": 1, "object_store_memory": STORE}
        self.cluster = Cluster(True, head_node_args=self.node | {"include_dashboard": False})
        self.second = None
        self.address = self.cluster.address

    def complete(self) -> None:
        if self.second is None:
            self.second = self.cluster.add_node(**self.node)

    def kill_node(self, kind: str = "MapWorker") -> bool:
        """The second one: its raylet and its workers, by SIGKILL. False before an actor is at work
        there, up to which those of the first one are held still, for they would do it all."""
        raylet = self.second.all_processes["raylet"][0].process
        second = self.workers(kind, psutil.Process(raylet.pid))
        first = [worker for worker in self.workers(kind) if worker not in second]
        if not any(title(worker).endswith(".submit") for worker in second):
            for worker in first:
                worker.send_signal(signal.SIGSTOP)
            return False
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None
        for worker in first:
            worker.send_signal(signal.SIGCONT)
        return True

    def workers(self, kind: str, root: psutil.Process | None = None) -> list[psutil.Process]:
        """The processes of actors, of all nodes or below `root`."""
        children = (root or psutil.Process()).children(recursive=True)
        return [process for process in children if kind in title(process)]

    def kill_worker(self, kind: str = "MapWorker") -> bool:
        """An actor's process; False while there is none."""
        workers = self.workers(kind)
        if workers:
            workers[0].send_signal(signal.SIGKILL)
        return bool(workers)


def title(process: psutil.Process) -> str:
    """What Ray names a process: the actor, and the call that it is at."""
    try:
        return "".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def cluster():
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_AUTO_CONNECT"):
        os.environ[name] = "0"
    nodes = TwoNodes()
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture
def nodes(cluster):
    cluster.complete()
    return cluster


@pytest.fixture(autouse=True)
def one_thread():
    """Bit for bit the same takes as many threads here as an actor has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def killed_after(folder: Path, pattern: str, count: int, kill):
    """Call `kill`, which tells whether it did, once so many files are there."""
    killed = []

    def watch():
        while not killed:
            if len(list(folder.glob(pattern))) >= count and kill():
                killed.append(len(list(folder.glob(pattern))))
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    yield killed
    assert killed, "all was made before anything was killed"


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


@pytest.mark.parametrize("kind", ["worker", pytest.param("node", marks=in_full)])
def test_what_dies_loses_no_shard(kind, nodes, shards, models, tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    copies = 40 if kind == "node" else 1  # both nodes are at work, of which one takes a while
    for path in shards.glob("*-?.tar"):
        for number in range(copies):
            os.link(path, raw / f"{path.stem}-{number}.tar")
    options = [f"--pipeline={models}", "--size=32x32", "--workers=0", "--max-broken=1"]
    command = [f"{raw}/*.tar"]
    assert precompute([*command, str(tmp_path / "one"), *options]) == 0
    alone = capsys.readouterr().out
    out = tmp_path / "ray"
    with killed_after(out, "*.tar", copies, getattr(nodes, f"kill_{kind}")):
        assert precompute([*command, str(out), *options, f"--ray={nodes.address}"]) == 0
    told = capsys.readouterr()
    assert kind == "worker" or "lost with their actors: once more" in told.err
    assert contents(out, "*.tar") == contents(tmp_path / "one", "*.tar")
    broken = [
        (folder / "broken.jsonl").read_text().splitlines() for folder in (out, tmp_path / "one")
    ]
    names = [
        sorted(f"{line['shard']} {line['sample']}" for line in map(json.loads, lines))
        for lines in broken
    ]
    assert names[0] == names[1]
    counts = [set(re.findall(r"\d [a-z ]+", text)) for text in (alone, told.out)]
    assert counts[0] == counts[1] and "shard cut off" in str(counts[0])


def test_a_replica_that_dies_loses_no_request(nodes, tiny_pipeline_folder):
    wanted = [Request("a red circle", seed=seed, steps=40, solver="ddim") for seed in range(4)]
    options = [str(tiny_pipeline_folder), f"--ray={nodes.address}", "--max-batch=2", "--queue=5"]
    with ExitStack() as until_the_end:
        model, scheduler = serve.load(serve.parse_arguments(options), until_the_end)
        assert (model.frames, scheduler.stats()["max_batch"]) == (4, 4)
        with pytest.raises(ValueError, match="steps must be a whole number"):
            scheduler.submit(Request("a red circle", steps=0))
        long = scheduler.submit(Request("a red circle", steps=1000))
        late = scheduler.submit(Request("a red circle", steps=1000, deadline=0.5))
        jobs = [scheduler.submit(request) for request in wanted]
        while not jobs[0].progress.step:
            assert jobs[0].state in ("queued", "running")
            time.sleep(0.05)
        assert nodes.kill_worker("ServeReplica:gentron")
        long.cancel()
        made = [job.result(120) for job in jobs]
        assert (long.state, late.state) == ("cancelled", "failed")
        stats = scheduler.stats()
        assert (stats["done"], stats["submitted"], stats["queue_length"]) == (4, 6, 0)
        assert all(job.progress == (40, 40) for job in jobs)
        scheduler.close(5)
    pipeline = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    for request, frames in zip(wanted, made, strict=True):
        asked = {"seed": request.seed, "steps": 40, "solver": "ddim", "progress": False}
        alone = pipeline("a red circle", **asked).frames[0]
        assert (frames.int() - alone.int()).abs().max() <= 1


@in_full
def test_a_second_replica_comes_by_need_and_goes(nodes, tiny_pipeline_folder, monkeypatch):
    """Clips that were begun on the first one are not lost by it, and those of both are right."""
    monkeypatch.setitem(AUTOSCALING, "downscale_delay_s", 5)
    options = [str(tiny_pipeline_folder), f"--ray={nodes.address}", "--max-batch=2", "--queue=64"]
    wanted = [Request("a red circle", seed=seed, steps=1000, solver="ddim") for seed in range(64)]

    def replicas():
        return len(nodes.workers("ServeReplica:gentron"))

    def wait_for(count, seconds=90):
        end = time.monotonic() + seconds
        while replicas() != count:
            assert time.monotonic() < end, f"{replicas()} replicas after {seconds} s"
            time.sleep(0.2)

    with ExitStack() as until_the_end:
        _, scheduler = serve.load(serve.parse_arguments(options), until_the_end)
        assert replicas() == 1
        jobs = [scheduler.submit(request) for request in wanted]
        wait_for(2)
        started = sum(job.state != "queued" for job in jobs)
        for job in jobs[started + 8 :]:  # the next eight are begun beside both
            job.cancel()
        made = {job.request.seed: job.result(180) for job in jobs[: started + 8]}
        wait_for(1)
        last = scheduler.submit(Request("a red circle", seed=0, steps=2)).result(60)
        assert len(last) == 4
        scheduler.close(5)
    pipeline = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    for seed in (0, 1, started, started + 3, started + 7):
        asked = {"seed": seed, "steps": 1000, "solver": "ddim", "progress": False}
        alone = pipeline("a red circle", **asked).frames[0]
        assert (made[seed].int() - alone.int()).abs().max() <= 1


@pytest.fixture(scope="module")
def by_one_process(tiny_pipeline_folder, tmp_path_factory):
    """The options of a command that makes PROMPTS different clips, and the folder with them."""
    folder = tmp_path_factory.mktemp("clips")
    prompts = list(dict.fromkeys(prompt for prompt, _ in seen_prompts(2 * PROMPTS)))[:PROMPTS]
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    model = ["--steps=8"] if FULL else ["--steps=20", f"--model={tiny_pipeline_folder}"]
    options = [f"--prompts={folder}/prompts.txt", "--device=cpu", "--grid", *model]
    torch.set_num_threads(1)
    assert generate([*options, f"--out={folder / 'one'}/"]) == 0
    assert len(contents(folder / "one", "*.mp4")) == PROMPTS
    return options, folder / "one"


@pytest.mark.parametrize("kind", [pytest.param("worker", marks=in_full), "node"])
def test_what_dies_loses_no_clip(kind, by_one_process, nodes, tmp_path, capsys):
    options, one = by_one_process
    out = tmp_path / "ray"
    capsys.readouterr()
    with killed_after(out, "*.png", PROMPTS // 3, getattr(nodes, f"kill_{kind}")):
        assert generate([*options, f"--out={out}/", f"--ray={nodes.address}"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[0].split() == [str(PROMPTS), "clips", str(out)]
    assert "lost with their actors: once more" in told.err
    assert contents(out, "[!.]*") == contents(one, "[!.]*")
    assert len(contents(out, "[!.]*")) == 3 * PROMPTS


@in_full
def test_a_server_with_replicas_answers(tmp_path):
    from soak import MOST_APART, apart

    with served_process("--ray", "local", "--out", str(tmp_path)) as (process, address):
        asked = {"prompt": "a red circle moving left", "seed": 5, "steps": 8}
        clip = call(f"{address}v1/videos", asked)[2]
        while clip["status"] in ("queued", "in_progress"):
            time.sleep(0.2)
            clip = call(f"{address}v1/videos/{clip['id']}")[2]
        assert clip["status"] == "completed", clip["error"]
        sent = call(f"{address}v1/videos/{clip['id']}/content")[2]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    one = GenTronPipeline.from_pretrained()
    frames = one(asked["prompt"], seed=5, steps=8, progress=False).frames[0]
    write_media(tmp_path / "one.mp4", frames, 4)
    (tmp_path / "sent.mp4").write_bytes(sent)
    shown = [read_video(tmp_path / f"{name}.mp4")[0] for name in ("one", "sent")]
    assert apart(*shown) < MOST_APART


def test_what_a_worker_raises_is_told_in_one_line(nodes, tiny_pipeline_folder, tmp_path, capsys):
    prompts, model = tmp_path / "prompts.txt", tmp_path / "model"
    prompts.write_text("a red circle\n")
    os.system(f"cp -r {tiny_pipeline_folder} {model}")
    (model / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"no safetensors")
    options = [f"--prompts={prompts}", f"--model={model}", "--steps=2", f"--out={tmp_path}/out/"]
    assert generate([*options, f"--ray={nodes.address}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"cannot load {model}" in err and "(node " in err
    for wrong, words in (("--cores=99", "has 99 cores"), ("--device=cuda", "cluster has no GPU")):
        assert generate([*options, f"--ray={nodes.address}", wrong]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["a red circle", "--ray", "auto"], "--prompts FILE"),
        (["a red circle", "--cores", "2"], "--cores is for --ray"),
        (["--prompts", "FILE", "--ray", "auto", "--offload"], "--ray does not go with --offload"),
        (["--prompts", "FILE", "--ray", "auto", "--device", "cuda:1"], "cpu or cuda, got 'cuda:1'"),
        (["--prompts", "FILE", "--ray", "127.0.0.1:1"], "no Ray cluster at '127.0.0.1:1'"),
        (["--prompts", "FILE", "--ray", "here"], "no Ray cluster at 'here': wanted auto, local"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_commands(arguments, words, tiny_pipeline_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = [str(tmp_path / "prompts.txt") if word == "FILE" else word for word in arguments]
    assert generate([*given, f"--model={tiny_pipeline_folder}", f"--out={tmp_path}/out/"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err


def test_without_ray_it_is_told_what_to_install(
    shards, models, tiny_pipeline_folder, tmp_path, capsys, monkeypatch
):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    model = ["--model", str(tiny_pipeline_folder), "--out", f"{tmp_path}/out/"]
    assert generate(["--prompts", str(tmp_path / "prompts.txt"), "--ray", "auto", *model]) == 2
    command = [f"{shards}/clips-0.tar", str(tmp_path / "new"), f"--pipeline={models}"]
    assert precompute([*command, "--ray=auto"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("--ray needs Ray: pip install 'gentron_fast[ray]'" in line for line in lines)
