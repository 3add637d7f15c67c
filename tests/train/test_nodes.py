"""Training over two nodes: namespaces of this machine with a network, a host name and processes of
their own, sshd in each, started by `deepspeed --hostfile`.

`make nodes` runs it; it takes root, which no other test does.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training import ROOT, free_port, log_of

STEPS, SAVE_EVERY = 50, 10
NAMES = ("node1", "node2")
PROGRAMS = ("ip", "nsenter", "pdsh", "ssh-keygen", "sshd", "unshare")
SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def reason_to_skip() -> str:
    if "NODES" not in os.environ:
        return "make nodes runs it"
    if os.geteuid():
        return "two nodes on one machine need root, for network namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (openssh-server, pdsh, iproute2, util-linux)"
    alone = ["unshare", "--net", "--pid", "--uts", "--mount", "--fork", "true"]
    if subprocess.run(alone, capture_output=True).returncode:
        return "this system allows no namespaces"
    return ""


pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "-")

# What each node has of its own. DeepSpeed and pdsh find the other by name, as ssh does.
SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
PermitRootLogin yes
"""
SSH = """\
IdentityFile {folder}/user_key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ServerAliveInterval 5
ServerAliveCountMax 2
"""
START = """\
set -e
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
hostname {name}
ip link set lo up
ip addr add {address}/32 dev lo
exec $(command -v sshd) -D -f {folder}/sshd_config
"""


class Node:
    """A node by its number: 1 has the address 10.77.0.1."""

    def __init__(self, number: int, folder: Path):
        self.name, self.address = f"node{number}", f"10.77.0.{number}"
        start = START.format(folder=folder, name=self.name, address=self.address)
        namespaces = ["unshare", "--net", "--pid", "--uts", "--mount", "--mount-proc"]
        self.holder = subprocess.Popen([*namespaces, "--fork", "--kill-child", "bash", "-c", start])
        while not (children := psutil.Process(self.holder.pid).children()):
            assert self.holder.poll() is None
            time.sleep(0.01)
        self.first = children[0].pid  # of its processes: all others end with it

    def command(self, *words: object) -> list[str]:
        """That runs a command inside."""
        inside = ["nsenter", f"--target={self.first}", "--net", "--pid", "--uts", "--mount"]
        return [*inside, "--", *map(str, words)]

    def cut_power(self) -> None:
        """End all its processes; nobody hears of it, since its network is gone first."""
        subprocess.run(self.command("ip", "link", "set", "wire", "down"), check=True)
        self.holder.kill()
        self.holder.wait()


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", SEARCHED)
    for key in ("host_key", "user_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key]
        subprocess.run(keygen, check=True)
    hosts = "".join(f"10.77.0.{n + 1} {name}\n" for n, name in enumerate(NAMES))
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
    (tmp_path / "ssh_config").write_text(SSH.format(folder=tmp_path))
    (tmp_path / "sshd_config").write_text(SSHD.format(folder=tmp_path))
    nodes = [Node(number, tmp_path) for number in (1, 2)]
    try:
        wire = ["ip", "link", "add", "wire", "netns", str(nodes[0].first), "type", "veth"]
        subprocess.run([*wire, "peer", "wire", "netns", str(nodes[1].first)], check=True)
        for node in nodes:
            for words in (["addr", "add", f"{node.address}/24", "dev"], ["link", "set", "up"]):
                subprocess.run(node.command("ip", *words, "wire"), check=True)
        yield nodes
    finally:
        for node in nodes:
            node.holder.kill()
            node.holder.wait()


def start(node: Node, world: Path, folder: Path, names, *options: str) -> subprocess.Popen:
    """The `deepspeed` command on a node, over the nodes of these names, one rank each."""
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in names))
    # What the ranks need of the environment: ssh hands none on.
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    command = ["env", "-C", folder, "OMP_NUM_THREADS=1"]
    command += [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile=hostfile"]
    command += [f"--master_port={free_port()}", ROOT / "train/t2i.py", f"--run={folder / 'run'}"]
    command += [f"--{part}={world / part}" for part in ("data", "vae", "text")]
    command += [
        "--batch=4",
        "--draws=2",
        "--global-batch=16",
        f"--steps={STEPS}",
        f"--save-every={SAVE_EVERY}",
    ]
    command += ["--warmup=1", "--log-every=1", "--windows-per-clip=1", "--timeout=20"]
    with open(folder / "output", "ab") as output:
        return subprocess.Popen(node.command(*command, *options), stdout=output, stderr=output)


def test_a_node_is_lost_and_the_other_goes_on(world, nodes, tmp_path):
    run = tmp_path / "run"
    running = start(nodes[0], world, tmp_path, NAMES)
    output = tmp_path / "output"
    while not (run / "log.jsonl").exists() or len(log_of(run)) < SAVE_EVERY * 2 + 3:
        assert running.poll() is None, output.read_text()[-4000:]
        time.sleep(0.05)
    assert "batch 16 = 4 per rank × 2 draws × 1 micro-steps × 2 ranks" in output.read_text()
    assert "node2: " in output.read_text()
    nodes[1].cut_power()
    lost = time.monotonic()
    assert running.wait(timeout=120) != 0
    print(f"\nthe run ended {time.monotonic() - lost:.0f} s after the node")
    told = [line for line in output.read_text().splitlines() if "another rank is gone" in line]
    assert len(told) == 1 and told[0].startswith("node1: rank 0: error: "), told
    assert len(log_of(run)) < STEPS and "Traceback" not in output.read_text()

    alone = start(nodes[0], world, tmp_path, NAMES[:1], "--resume")
    assert alone.wait(timeout=240) == 0, output.read_text()[-4000:]
    assert "going on at step 20 with accumulation 1 → 2, ranks 2 → 1" in output.read_text()
    assert "batch 16 = 4 per rank × 2 draws × 2 micro-steps × 1 rank" in output.read_text()
    rows = log_of(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["captions"] == 8 * row["step"] for row in rows)
    assert (run / "pipeline/model_index.json").exists()
