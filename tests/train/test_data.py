"""Training data: what is drawn from it, in which order, and what happens to what is broken."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from gentron_train.data import (
    DataSettings,
    Loader,
    Position,
    make_loader,
)
from gentron_train.decode import Sampling
from gentron_train.shapes import vocabulary, write_shards
from gentron_train.shards import find_shards
from gentron_train.small import small_text_encoder, small_vae
from gentron_train.sources import (
    LatentSet,
    MemorySource,
    encode_shards,
    latents_path,
    load_latents,
    select_tokens,
)

SIDE = 64 // small_vae().factor  # of the latents


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a few shards (data) and an untrained autoencoder (vae)."""
    folder = tmp_path_factory.mktemp("world")
    write_shards(folder / "data", images=12, clips=6, shard_size=6, processes=1, progress=False)
    torch.manual_seed(0)
    small_vae().save_pretrained(folder / "vae")
    return folder


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


def latent_set(kind: str, count: int, frames: int) -> LatentSet:
    values = torch.arange(count).half()[:, None, None, None, None, None]
    mean = values.expand(count, 1, 4, frames, 2, 2)
    return LatentSet(mean, torch.zeros_like(mean), [f"{kind} {n}" for n in range(count)])


def count_words(captions):
    """A tokenizer whose one token is the caption's place in the list: 0 for the null text."""
    ids = torch.arange(len(captions))[:, None]
    return {"clip": (ids, torch.ones_like(ids, dtype=torch.bool))}


SETS = {"images": latent_set("image", 40, 1), "clips": latent_set("clip", 160, 8)}
BOTH = DataSettings(kinds=("images", "clips"), batch=10, seed=3)


def in_memory(settings, *ranks):
    """A loader over SETS, or those of them that the settings name."""
    sets = {kind: SETS[kind] for kind in settings.kinds}
    counts = {kind: [len(latents)] for kind, latents in sets.items()}
    return Loader(settings, MemorySource(sets, count_words), counts, *ranks)


def rows(batches):
    """Each sample of some batches as (caption, its latents, noise and so on)."""
    for batch in batches:
        texts = batch.text["clip"][0][:, 0].tolist()
        draws = len(batch.latents) // len(texts)
        for n, text in enumerate(texts):
            part = slice(n * draws, (n + 1) * draws)
            yield text, batch.latents[part], batch.noise[part], batch.timestep[part]


def equal(some, others) -> bool:
    some, others = list(some), list(others)
    return len(some) == len(others) and all(
        a[0] == b[0] and all(map(torch.equal, a[1:], b[1:]))
        for a, b in zip(some, others, strict=True)
    )


def test_two_ranks_see_what_one_with_twice_the_batch_sees():
    one = in_memory(replace(BOTH, batch=20, draws=2))
    two = [in_memory(replace(BOTH, draws=2), rank, 2) for rank in range(2)]
    for _ in range(4):
        assert equal(rows([next(one)]), rows([next(two[0]), next(two[1])]))


@pytest.mark.parametrize("ranks", [2, 1, 3])
def test_resume_on_any_number_of_ranks(ranks):
    old = [in_memory(BOTH, rank, 2) for rank in range(2)]
    for _ in range(3):
        [next(loader) for loader in old]
    states = json.loads(json.dumps([loader.state_dict() for loader in old]))
    new = [in_memory(BOTH, rank, ranks) for rank in range(ranks)]
    for loader in new:
        loader.load_state_dict(states)
    continued = [batch for _ in range(6) for batch in map(next, old)]
    resumed = [batch for _ in range(12 // ranks) for batch in map(next, new)]
    assert equal(rows(resumed), rows(continued))


def test_ranks_apart_join_without_loss():
    """Ranks that took different amounts: every number comes once, whatever the ranks."""
    old = [Position(4, rank, 3) for rank in range(3)]
    seen = []
    for position, taken, waiting in zip(old, (9, 30, 17), ([], [5], []), strict=True):
        seen += [position.number(nth) for nth in range(taken)]
        position.taken, position.waiting = taken, waiting
    seen.remove(5)
    for ranks in (2, 3):
        new = [Position(3, rank, ranks) for rank in range(ranks)]
        for position in new:
            position.load_state_dict([p.state_dict() for p in old])
        after = [n for p in new for n in (*p.waiting, *(p.number(k) for k in range(60)))]
        both = Counter(seen) + Counter(after)
        assert set(both.values()) == {1}
        assert set(range(max(seen) + 1)) <= set(both)


def test_epoch_sees_each_sample_once_and_text_fits():
    loader = in_memory(replace(BOTH, p_null=0.0))
    samples = list(rows(next(loader) for _ in range(20)))
    assert Counter(text for text, *_ in samples) == Counter(range(1, 201))
    for text, latents, *_ in samples:
        assert latents.shape == (1, 4, 8, 2, 2)
        assert (latents == float(text - 1 if text <= 40 else text - 41)).all()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.37, 1.0])
def test_shares(share):
    settings = replace(BOTH, p_motion_free=share, batch=100)
    loader = in_memory(settings)
    batches = [next(loader) for _ in range(20)]
    assert sum(int(batch.motion_free.sum()) for batch in batches) == int(share * 2000)
    samples = list(rows(batches))
    assert 0.07 < sum(text == 0 for text, *_ in samples) / 2000 < 0.13
    assert 400 < sum(float(timestep) for *_, timestep in samples) / 2000 < 600
    assert abs(float(torch.cat([batch.noise for batch in batches]).mean())) < 0.02


def test_images_alone_have_no_mask():
    loader = in_memory(DataSettings(batch=4))
    batch = next(loader)
    assert batch.motion_free is None
    assert batch.latents.shape == (4, 4, 1, 2, 2)


def test_loader_in_memory(world):
    encoder = small_text_encoder(vocabulary())
    settings = DataSettings(
        kinds=("images", "clips"),
        images=str(world / "data/images-*.tar"),
        clips=str(world / "data/clips-*.tar"),
        batch=5,
        in_memory=True,
    )
    loader = make_loader(settings, world / "vae", encoder.tokenize)
    batch = next(loader)
    assert loader.sizes == (4, 8, SIDE, SIDE)
    assert batch.latents.shape == (5, *loader.sizes)
    assert all(len(ids) == 5 for ids, _ in batch.text.values())


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
