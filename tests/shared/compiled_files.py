"""What the tests of compiled samplers share: package files, gentron-sample, and errors."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load, save

from gentron_fast import export
from gentron_fast.compiled.package import MAGIC, WEIGHTS

# GENTRON_RUNTIME is a folder with another build of the runtime and of the program.
RUNTIME = Path(os.environ.get("GENTRON_RUNTIME", Path(export.__file__).parent))
PROGRAM = RUNTIME / "gentron-sample"
PROMPT = "a red circle moving left"
LONG = "a large yellow triangle moving slowly down and to the left on a white background"
STEPS = 20
SANITIZER_OPTIONS = {k: v for k, v in os.environ.items() if k.endswith("SAN_OPTIONS")}
PREFIX = len(MAGIC) + 8 + 32


def run_program(*arguments):
    """gentron-sample in an environment with no trace of Python, on as many threads as this has."""
    command = [PROGRAM, *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())} | SANITIZER_OPTIONS
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def embeddings(text, prefix=""):
    named = {name: part for name, part in text._asdict().items() if part is not None}
    return {
        f"{prefix}{name}.{field}": tensor.contiguous()
        for name, part in named.items()
        for field, tensor in part._asdict().items()
    }


def read_package(path):
    data = path.read_bytes()
    size = int.from_bytes(data[8:16], "little")
    return json.loads(data[PREFIX : PREFIX + size]), data[PREFIX + size :]


def write_package(path, header, body):
    """A package whose checksums are right."""
    text = json.dumps(header).encode()
    digest = hashlib.sha256(text).digest()
    path.write_bytes(MAGIC + len(text).to_bytes(8, "little") + digest + text + body)
    return path


def write_changed(path, package, name, change):
    """The package with one of its weights changed, its checksums right."""
    header, body = read_package(package)
    entries = header["sections"]
    content = {name: body[e["offset"] :][: e["size"]] for name, e in entries.items()}
    tensors = load(content[WEIGHTS])
    tensors[name] = change(tensors[name]).contiguous()
    content[WEIGHTS] = save(tensors)
    offset = 0
    for section, data in content.items():
        digest = hashlib.sha256(data).hexdigest()
        entries[section] = {"offset": offset, "size": len(data), "sha256": digest}
        offset += len(data)
    return write_package(path, header, b"".join(content.values()))
