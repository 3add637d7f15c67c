"""Memory: no more than the largest shard."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from published import WEIGHTS, original_pixart, same_tensors
from safetensors.torch import load_file, save_file

MEASURE = """
import sys
from pathlib import Path
from gentron_fast import convert

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))

for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    options = ["--heads", "8"] if path.endswith(".pth") else []
    options += ["--t5", "t5"] if path != "shards" else []
    assert convert.main(["pixart", path, path + "-out", *options]) == 0
    print("grew by", status("VmHWM") - before)
"""


def to_torch(folder, out, stem):
    """The safetensors shards of a folder as shards of torch.save."""
    out.mkdir()
    where = {}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        torch.save(tensors, out / f"{file.stem}.bin")
        where |= dict.fromkeys(tensors, f"{file.stem}.bin")
    (out / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": where}))
    if (folder / "config.json").exists():
        shutil.copyfile(folder / "config.json", out / "config.json")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_stays_under_the_largest_shard(tmp_path):
    """A PixArt of 133 MiB in two shards, in two shards of torch.save and as one .pth; the latter
    with a T5 in two shards of torch.save."""
    options = {"num_attention_heads": 8, "attention_head_dim": 72, "num_layers": 6}
    options |= {"cross_attention_dim": 576, "caption_channels": 256, "sample_size": 32}
    reference = PixArtTransformer2DModel(**options)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="80MB")
    shards = [file.stat().st_size for file in (tmp_path / "shards").glob("*.safetensors")]
    torch.save(original_pixart(reference, 1), tmp_path / "pixart.pth")
    whole = (tmp_path / "pixart.pth").stat().st_size
    to_torch(tmp_path / "shards", tmp_path / "bin", WEIGHTS[:-12])
    for part, names in (("1", "ac"), ("2", "bd")):  # the names take turns
        tensors = {name: torch.zeros(10_000_000) for name in names}
        save_file(tensors, tmp_path / f"model-{part}.safetensors")
    to_torch(tmp_path, tmp_path / "t5", "pytorch_model")
    (tmp_path / "t5" / "config.json").write_text('{"d_model": 256}')
    (tmp_path / "t5" / "spiece.model").touch()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "shards", "bin", "pixart.pth"],
        check=True, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    grown = [int(line.split()[2]) for line in done.stdout.splitlines() if "grew by" in line]
    assert len(shards) == 2 and max(grown[:2]) < 1.3 * max(shards) and grown[2] < 1.3 * whole
    same_tensors(tmp_path / "bin-out" / "transformer", tmp_path / "shards-out" / "transformer")
    same_tensors(tmp_path / "bin-out" / "text_encoder_2", tmp_path)
