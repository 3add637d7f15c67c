"""The small world rendered on demand against the shards that would hold it."""

import pytest
import torch

from gentron_train.data.loader import DataSettings, make_loader
from gentron_train.small_world import on_demand
from gentron_train.small_world.renderer import SHARD_SIZE, write_shards

IMAGES, CLIPS = 5, 3


@pytest.fixture
def loaders(world, tmp_path, monkeypatch):
    """Of shards in memory, and rendered: shards of two samples each."""
    monkeypatch.setattr(on_demand, "SHARD_SIZE", 2)
    write_shards(tmp_path, IMAGES, CLIPS, shard_size=2, processes=1, progress=False)
    patterns = {kind: str(tmp_path / f"{kind}-*.tar") for kind in ("images", "clips")}
    common = {"kinds": ("images", "clips"), "in_memory": True, "batch": 3, "draws": 2}
    common |= {
        "windows_per_clip": 2,
        "frames": 3,
        "p_motion_free": 0.5,
        "log": tmp_path / "broken.jsonl",
    }

    def tokenize(captions):
        table = torch.zeros(len(captions), 128, dtype=torch.long)
        for row, text in zip(table, captions, strict=True):
            row[: len(text)] = torch.tensor(list(text.encode()))
        return {"t5": (table, table > 0)}

    stored = make_loader(DataSettings(**common, **patterns), world / "vae", tokenize)
    counts = {"images": IMAGES, "clips": CLIPS}
    data = DataSettings(**common, rendered=True)
    return stored, on_demand.rendering_loader(data, counts, world / "vae", tokenize)


def test_the_same_batches_as_from_shards(loaders):
    """Three epochs: samples, windows, draws and texts; latents as near as bf16 has them."""
    stored, rendered = loaders
    assert stored.sizes == rendered.sizes
    for _ in range(8):
        theirs, ours = next(stored), next(rendered)
        for name in ("noise", "timestep", "motion_free"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        torch.testing.assert_close(ours.latents, theirs.latents, rtol=0.02, atol=0.02)
        width = min(ours.text["t5"][0].shape[1], theirs.text["t5"][0].shape[1])
        assert torch.equal(ours.text["t5"][0][:, :width], theirs.text["t5"][0][:, :width])
    assert rendered.state_dict() == stored.state_dict()


def test_each_sample_is_made_once(loaders, monkeypatch):
    _, rendered = loaders
    encoded, encode = [], on_demand.encode

    def counting(vae, pixels, *args, **options):
        encoded.extend(pixels)
        return encode(vae, pixels, *args, **options)

    monkeypatch.setattr(on_demand, "encode", counting)
    for _ in range(20):
        next(rendered)
    assert len(encoded) == len(rendered.source.kept) == IMAGES + 2 * CLIPS


def test_lengths_of_shards():
    assert on_demand.shard_lengths(2 * SHARD_SIZE + 1) == [SHARD_SIZE, SHARD_SIZE, 1]
    assert on_demand.shard_lengths(0) == []
