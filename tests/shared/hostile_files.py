"""Packages and safetensors whose checksums are right and whose contents are not, by seed.

python tests/shared/hostile_files.py GENTRON-FUZZ [MUTATIONS]

gives them to csrc/fuzz/main.cpp, which `make fuzz` builds with sanitizers.
"""

import contextlib
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from gentron_fast import EncodedText, GenTron, GenTronConfig, TextCondition
from gentron_fast.compiled import export_sampler, exporter
from gentron_fast.compiled.package import MAGIC, WEIGHTS
from gentron_fast.diffusion import SCHEDULER_CONFIG

VALUES = [
    *(0, -1, 1, 2, 3, 64, 2**16, 2**31, 2**53, 2**60, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(1e308, -1e-308, 0.5, -0.0, None, True, False, [], {}, [0], [[]], {"": 0}, [None] * 9),
    *("", "x", "001", "110", "111", "*", "**", "../x", "a\nb", "é", "\ud800", "\0", "x" * 5000),
    *("float32", "int64", "bool", "cpu", "cuda", "clip", "t5", [1, 2, 3], ["001", "111"]),
]
TINY = GenTronConfig(depth=2, width=8, heads=2, clip_width=8, t5_width=8, temporal=True)


def plain_packages() -> list[bytes]:
    """Packages of tiny models, complete but for the code of their graphs."""

    def compile_none(graphs, folder, _):
        for graph in graphs:
            (folder / f"{graph.name}.pt2").write_text(graph.name)

    still = replace(TINY, temporal=False, encoders=("clip",))
    packages = []
    for config, frames, eta in (
        (TINY, 2, 0.0),
        (replace(still, learned_range=True), 1, 1.0),
        (replace(still, cross_attention=False), 1, 0.0),
    ):
        text = {
            name: EncodedText(torch.ones(1, 2, 8), torch.ones(1, 2).bool(), torch.ones(1, 8))
            for name in config.encoders
        }
        learned = {"variance_type": "learned_range"} if config.learned_range else {}
        solver = "ddim" if eta else "dpm++"
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(exporter, "compile_all", compile_none),
        ):
            path = Path(folder, "tiny.gentron")
            model = GenTron(config)
            options = {"steps": 3, "solver": solver, "eta": eta, "max_batch": 3}
            shape = {"frames": frames, "latent_size": (4, 4)}
            scheduler = SCHEDULER_CONFIG | learned
            export_sampler(path, model, TextCondition(**text), scheduler, **shape, **options)
            packages.append(path.read_bytes())
    return packages


def mutations(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """("p", a package) or ("s", safetensors), each with one to three things altered; the same for
    the same seed."""
    packages = [_taken_apart(data) for data in plain_packages()]
    rng = random.Random(seed)
    for _ in range(count):
        header, content = rng.choice(packages)
        header, content = json.loads(json.dumps(header)), dict(content)
        if rng.random() < 0.15:
            yield "s", _altered_safetensors(rng, content[WEIGHTS])
            continue
        if rng.random() < 0.15:
            content[WEIGHTS] = _altered_safetensors(rng, content[WEIGHTS])
        else:
            for _ in range(rng.choice((1, 1, 2, 3))):
                _alter(rng, header["metadata"])
        if rng.random() < 0.1:
            content[rng.choice(list(content))] = b""
        yield "p", _put_together(rng, header, content)


def _taken_apart(data: bytes) -> tuple[dict, dict[str, bytes]]:
    size = int.from_bytes(data[8:16], "little")
    header, body = json.loads(data[48 : 48 + size]), data[48 + size :]
    sections = header["sections"].items()
    return header, {name: body[e["offset"] :][: e["size"]] for name, e in sections}


def _put_together(rng: random.Random, header: dict, content: dict[str, bytes]) -> bytes:
    sections, offset = {}, 0
    for name, data in content.items():
        digest = hashlib.sha256(data).hexdigest()
        sections[name] = {"offset": offset, "size": len(data), "sha256": digest}
        offset += len(data)
    header["sections"] = sections
    if rng.random() < 0.1:
        _alter(rng, rng.choice([header, header["sections"]]))
    text = _altered_text(rng, json.dumps(header).encode())
    prefix = MAGIC if rng.random() < 0.98 else MAGIC[:-1] + bytes([rng.randrange(256)])
    size = len(text) if rng.random() < 0.98 else rng.choice([0, 1, len(text) + 9, 2**63, 2**64 - 1])
    digest = hashlib.sha256(text).digest()
    return prefix + size.to_bytes(8, "little") + digest + text + b"".join(content.values())


def _altered_safetensors(rng: random.Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    _alter(rng, header)
    text = _altered_text(rng, json.dumps(header).encode())
    size = len(text) if rng.random() < 0.95 else rng.choice([0, 1, len(text) + 9, 2**63, 2**64 - 1])
    return size.to_bytes(8, "little") + text + body


def _alter(rng: random.Random, tree: dict | list) -> None:
    """One value, key or item below `tree` is changed."""
    parent = tree
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            break
        key = rng.choice(keys)
        child = parent[key]
        if isinstance(child, (dict, list)) and child and rng.random() < 0.85:
            parent = child
            continue
        break
    if not keys:
        return
    kind = rng.random()
    if kind < 0.5:
        parent[key] = json.loads(json.dumps(rng.choice(VALUES)))
    elif kind < 0.6 and isinstance(child, (int, float)):
        parent[key] = child + rng.choice((-1, 1))
    elif kind < 0.7:
        del parent[key]
    elif kind < 0.8 and isinstance(parent, list):
        parent.extend(json.loads(json.dumps(parent * rng.choice((1, 2, 20)))))
    elif kind < 0.9 and isinstance(parent, dict):
        parent[rng.choice(["", "x", "a\nb", *keys])] = parent.pop(key)
    else:
        other = rng.choice(keys)
        parent[key], parent[other] = parent[other], parent[key]


def _altered_text(rng: random.Random, text: bytes) -> bytes:
    kind, where = rng.random(), rng.randrange(len(text))
    if kind < 0.05:
        return text[:where] + bytes([rng.randrange(256)]) + text[where + rng.randrange(2) :]
    if kind < 0.06:
        return text[:where]
    if kind < 0.07:
        depth = rng.choice((60, 70, 5000))
        return b'{"x": ' + b"[" * depth + b"]" * depth + b"," + text[1:]
    if kind < 0.075:
        return b'{"x": [' + b"[]," * 300_000 + b"1]," + text[1:]
    return text


def main(program: str, count: int) -> int:
    """Give them to gentron-fuzz, and tell what it made of them. 1 where it ended."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([program], **options) as process:

        def feed():
            with contextlib.suppress(BrokenPipeError), process.stdin as out:
                for kind, data in mutations(count):
                    out.write(kind.encode() + len(data).to_bytes(8, "little") + data)

        threading.Thread(target=feed, daemon=True).start()
        lines = Counter(line.decode(errors="replace").strip() for line in process.stdout)
    told = sum(lines.values())
    print(f"{told} of {count} files: {lines['accepted']} accepted, {len(lines)} different answers")
    if told < count:
        print(f"number {told} (from 0) of seed 0 ended it, with {process.returncode}")
    return int(told < count or process.returncode != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100_000))
