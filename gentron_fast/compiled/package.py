"""The file of a compiled sampler, and what it says of the machine that it is for."""

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

MAGIC = b"GENTRON\x03"  # csrc/runtime/package.h describes the file
WEIGHTS = "weights.safetensors"
# The instruction sets that -march=native may choose, as Linux names them.
CPU_FLAGS = re.compile(
    "avx|amx|s?sse|fma|bmi|adx|v?aes|gfni|f16c|movbe|popcnt|v?pclmul"  # x86
    "|asimd|sve|fphp|bf16|i8mm|atomics"  # Arm
)


def part_digests(folder: Path, parts: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of configuration and weights of parts of a pipeline folder, such as vae."""
    digests = {}
    for part in parts:
        paths = [*(folder / part).glob("config.json"), *(folder / part).glob("*.safetensors")]
        if not paths:
            raise FileNotFoundError(f"no {part} in {folder}: it has no config.json and no weights")
        digest = hashlib.sha256()
        for path in sorted(paths):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        digests[part] = digest.hexdigest()
    return digests


def write_package(path: Path, metadata: dict, sections: dict[str, Path]) -> None:
    entries, offset = {}, 0
    for name, source in sections.items():
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[name] = {"offset": offset, "size": source.stat().st_size, "sha256": digest}
        offset += entries[name]["size"]
    header = json.dumps({"metadata": metadata, "sections": entries}).encode()
    with path.open("wb") as out:
        out.write(MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest())
        out.write(header)
        for source in sections.values():
            with source.open("rb") as file:
                shutil.copyfileobj(file, out)


def describe_machine(device: torch.device) -> dict:
    """What the code runs on: the runtime refuses another."""
    info = Path("/proc/cpuinfo")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else ()
    return {
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "device": device.type,
        "machine": platform.machine(),
        "cpu_flags": _cpu_flags(info.read_text() if info.exists() else ""),
        "capability": ".".join(map(str, capability)),
    }


def _cpu_flags(info: str) -> list[str]:
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE)
    return sorted(filter(CPU_FLAGS.match, flags[1].split() if flags else []))
