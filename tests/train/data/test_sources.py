"""Latents in memory, on the fly and precomputed: where they lie, and that they agree."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from samples import SIDE, settings

from gentron_fast import TextCondition
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule, diffusion_loss
from gentron_train.data.decode import Sampling
from gentron_train.data.loader import make_loader
from gentron_train.data.shards import find_shards
from gentron_train.data.sources import encode_shards, latents_path, load_latents, select_tokens
from gentron_train.small_world.architecture import small_text_encoder
from gentron_train.small_world.renderer import vocabulary, write_shards


def test_latents_beside_the_shards(world):
    data, sampling = world / "data", Sampling(starts=2)
    shards = find_shards(f"{data}/clips-*.tar")
    paths = encode_shards(shards, world / "vae", sampling)
    clips = load_latents(paths)
    assert clips.mean.shape == clips.std.shape == (6, 2, 4, 8, SIDE, SIDE)
    assert len(clips.captions) == 6
    assert (clips.std > 0).all()
    assert paths[0] != latents_path(shards[0].path, world / "vae", Sampling(starts=1))
    assert not list(data.glob(".*part"))
    before = [path.stat().st_mtime_ns for path in paths]
    assert encode_shards(shards, world / "vae", sampling) == paths
    assert [path.stat().st_mtime_ns for path in paths] == before
    with pytest.raises(ValueError, match="no shards"):
        load_latents([])


def test_ranks_that_look_at_different_times_encode_every_shard(world, tmp_path):
    write_shards(tmp_path, images=4, clips=0, shard_size=1, processes=1, progress=False)
    shards = find_shards(f"{tmp_path}/images-*.tar")
    for rank in range(2):  # rank 1 begins when rank 0 has finished
        paths = encode_shards(shards, world / "vae", Sampling(), rank, ranks=2)
    assert len(paths) == 4 and all(path.exists() for path in paths)


def test_select_tokens():
    tokens = small_text_encoder(vocabulary()).tokenize(["", "a red circle", "a circle " * 12])
    rows = torch.tensor([1, 0])
    chosen = select_tokens(tokens, rows, multiple=8)
    for name, (ids, mask) in chosen.items():
        longest = int(mask.sum(1).max())
        assert ids.shape == mask.shape and longest <= ids.shape[1] < longest + 8
        assert torch.equal(
            ids[mask], torch.cat([tokens[name][0][r][tokens[name][1][r]] for r in rows])
        )


def losses(loader, encoder, model, count=4) -> list[float]:
    values = []
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    for _ in range(count):
        batch = next(loader)
        text = batch.text if isinstance(batch.text, TextCondition) else encoder(batch.text)
        text = text.repeat(len(batch.latents) // text.batch)
        noisy = schedule.add_noise(batch.latents, batch.noise, batch.timestep)
        with torch.no_grad():
            output = model(noisy, batch.timestep, text, batch.motion_free)
        values.append(float(diffusion_loss(output, batch.noise)))
    return values


def test_precomputed_gives_the_same_loss(
    shards, precomputed, models, encoder, make_model, tiny_config, tmp_path
):
    model = make_model(tiny_config, torch.float32)
    fresh = settings(shards, tmp_path, draws=2)
    loaders = [
        make_loader(fresh, models / "vae", encoder.tokenize),
        make_loader(settings(precomputed, tmp_path, draws=2, workers=2), Path("nowhere"), None),
        make_loader(replace(fresh, in_memory=True), models / "vae", encoder.tokenize),
    ]
    assert [loader.data.precomputed for loader in loaders] == [False, True, False]
    values = [losses(loader, encoder, model) for loader in loaders]
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert values[2] == pytest.approx(values[0], rel=1e-3)  # encoded in bf16
    assert len({round(value, 5) for value in values[0]}) == 4
    places = [loader.position.state_dict() for loader in loaders]
    assert places[0] == places[1] == places[2]
    assert len({loader.sizes for loader in loaders}) == 1 and loaders[0].sizes == (4, 8, 4, 4)
