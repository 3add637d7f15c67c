"""The stream of batches: its order, its randomness, and what happens to corrupt samples."""

import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import av
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from samples import (
    BROKEN,
    CAPTION,
    SIDE,
    as_file,
    assert_same,
    picture,
    settings,
    texts,
    video,
    write_tar,
)

from gentron_fast.vae import VideoVAE
from gentron_train.data import loader as data_module
from gentron_train.data.broken import Broken, BrokenLog
from gentron_train.data.loader import (
    DataSettings,
    Loader,
    Order,
    Position,
    TooManyBroken,
    make_loader,
)
from gentron_train.data.shards import read
from gentron_train.data.sources import LatentSet, MemorySource, Sample, seeded
from gentron_train.small_world.architecture import small_text_encoder
from gentron_train.small_world.renderer import vocabulary


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


def test_texts_encoded_ahead_are_those_that_each_batch_would_encode(encoder, monkeypatch):
    """Of texts that differ in length, one of them twice, and dropped ones."""
    captions = ["a red circle", "a small plain purple cross below a striped green triangle"] * 20
    sets = {"images": replace(SETS["images"], captions=captions)}
    settings = replace(BOTH, kinds=("images",), p_null=0.3)

    def loader():
        return Loader(settings, MemorySource(sets, encoder.tokenize), {"images": [40]})

    plain, ahead = loader(), loader()
    ahead.source.embed(encoder, hidden=True)
    assert len(ahead.source.embeddings) == 3  # two and the null text
    for _ in range(3):
        tokens, texts = next(plain).text, next(ahead).text
        with torch.no_grad():
            wanted = encoder(tokens)
        for one, other in zip(texts, wanted, strict=True):
            torch.testing.assert_close(one.trim(), other.trim(), atol=1e-5, rtol=1e-5)

    monkeypatch.setattr("gentron_train.data.sources.MOST_EMBEDDED", 1000)
    large = loader()
    large.source.embed(encoder, hidden=True)
    assert isinstance(next(large).text, dict)


def test_timesteps_within_their_range():
    loader = in_memory(replace(BOTH, batch=100, min_timestep=500, max_timestep=503))
    steps = torch.cat([next(loader).timestep for _ in range(2)])
    assert set(steps.tolist()) == {500, 501, 502, 503}
    loader.narrow = False
    assert next(loader).timestep.unique().numel() > 50
    for wrong in (
        {"min_timestep": -1},
        {"max_timestep": 1000},
        {"min_timestep": 999, "max_timestep": 9},
    ):
        with pytest.raises(ValueError, match="must be a range within 0 … 999"):
            replace(BOTH, **wrong)


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


@pytest.mark.parametrize("motion_free, single", [(0.0, 0.2), (0.2, 0.2), (0.1, 0.3)])
def test_single_images_are_batches_of_one_frame(motion_free, single):
    """As many as asked for, the rest repeated; a resumed run goes on with the same batches."""
    settings = replace(BOTH, p_motion_free=motion_free, p_image=single, batch=10)
    loader = in_memory(settings)
    batches = [next(loader) for _ in range(99)]
    place = json.loads(json.dumps(loader.state_dict()))
    batches.append(next(loader))
    images = [batch for batch in batches if batch.latents.shape[2] == 1]
    clips = [batch for batch in batches if batch.latents.shape[2] != 1]
    assert len(images) == pytest.approx(single * 100, abs=1.5)
    assert all(batch.motion_free.all() and len(batch.latents) == 10 for batch in images)
    repeated = sum(int(batch.motion_free.sum()) for batch in clips)
    assert repeated == pytest.approx(motion_free * 1000, abs=10)
    again = in_memory(settings)
    again.load_state_dict([place])
    assert equal(rows([next(again)]), rows(batches[-1:]))
    with pytest.raises(ValueError, match="when the checkpoint was written"):
        in_memory(
            replace(settings, p_image=0.0, p_motion_free=motion_free + single)
        ).load_state_dict([place])


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
        windows_per_clip=2,
        in_memory=True,
    )
    loader = make_loader(settings, world / "vae", encoder.tokenize)
    batch = next(loader)
    assert loader.sizes == (4, 8, SIDE, SIDE)
    assert batch.latents.shape == (5, *loader.sizes)
    assert all(len(ids) == 5 for ids, _ in batch.text.values())


def test_broken_samples_are_skipped_counted_and_named(shards, models, encoder, tmp_path, capsys):
    """One epoch: 10 whole images, 5 whole clips; each whole one comes once, nothing else does."""
    data = settings(shards, tmp_path, batch=1, p_null=0.0, draws=2)
    loader = make_loader(replace(data, kinds=("images",)), models / "vae", encoder.tokenize)
    assert loader.broken() == {"shard cut off": 1}
    assert f"1 of 2 shards break off: {shards}/images-1.tar " in capsys.readouterr().out
    seen = Counter()
    for _ in range(10):
        seen += Counter(texts(encoder, next(loader)))
    assert seen == Counter(f"image {n}" for n in range(10))
    loader = make_loader(replace(data, kinds=("clips",)), models / "vae", encoder.tokenize)
    seen = Counter(text for _ in range(5) for text in texts(encoder, next(loader)))
    assert seen == Counter(f"clip {n}" for n in range(5))
    lines = [json.loads(line) for line in data.log.read_text().splitlines()]
    for line in lines:
        assert line["shard"].startswith(str(shards)) and line.keys() >= {"cause", "detail", "rank"}
    # The end of an epoch may be broken too, and then comes with the next.
    causes = Counter(line["cause"] for line in {line["sample"]: line for line in lines}.values())
    kinds = {"no image", "no clip", "shard cut off"}
    assert set(causes) <= {*BROKEN.values(), *kinds} and causes.total() >= 8
    assert "whole-0002" in next(x["detail"] for x in lines if x["cause"] == "shard cut off")


@pytest.mark.parametrize("ranks", [2, 1, 3])
def test_broken_counts_go_on_after_a_resume(shards, models, encoder, tmp_path, ranks):
    """The counts of two ranks are shared out among those that go on, none lost or counted twice."""
    data = settings(shards, tmp_path, batch=1)

    def loader(rank, ranks):
        return make_loader(data, models / "vae", encoder.tokenize, rank=rank, ranks=ranks)

    old = [loader(rank, 2) for rank in range(2)]
    for one in old:
        [next(one) for _ in range(5)]
    before = sum((Counter(one.broken()) for one in old), Counter())
    assert before["shard cut off"] == 1 and before.total() > 3
    states = json.loads(json.dumps([one.state_dict() for one in old]))
    new = [loader(rank, ranks) for rank in range(ranks)]
    for one in new:
        one.load_state_dict(states)
    assert sum((Counter(one.broken()) for one in new), Counter()) == before
    assert sum(one.log.seen for one in new) == sum(one.log.seen for one in old)
    if ranks == 2:
        assert [one.broken() for one in new] == [one.broken() for one in old]


def test_too_many_broken_stop_the_run(shards, models, encoder, tmp_path):
    data = settings(shards, tmp_path, kinds=("clips",), max_broken=0.2)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    with pytest.raises(TooManyBroken, match=r"3 of 10 samples .* 20.0%.*: \d .*broken.jsonl"):
        for _ in range(5):
            next(loader)
    assert len(data.log.read_text().splitlines()) == 3
    # Of many samples the share counts, not the number.
    log = BrokenLog(tmp_path / "log", 0.05, samples=10**6)
    for _ in range(50):
        log.add(Broken("a", "b", "c", "d"))
    log.seen = 1040
    log.add(Broken("a", "b", "c", "d"))
    with pytest.raises(TooManyBroken, match="53 of 1040"):
        log.add(Broken("a", "b", "c", "d"))
        log.add(Broken("a", "b", "c", "d"))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, models, encoder, tmp_path, workers):
    data = settings(shards, tmp_path, draws=2)
    alone = make_loader(data, models / "vae", encoder.tokenize)
    helped = make_loader(replace(data, workers=workers), models / "vae", encoder.tokenize)
    for _ in range(4):
        assert_same(next(alone), next(helped))
    assert alone.state_dict() == helped.state_dict() and alone.broken() == helped.broken()


def test_workers_leave_signals_to_the_trainer(precomputed, tmp_path):
    """A signal to the process group must not cost the checkpoint that the trainer still writes."""
    before = set(multiprocessing.active_children())
    loader = make_loader(settings(precomputed, tmp_path, workers=1, batch=2), None, None)
    next(loader)
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    for _ in range(10):
        next(loader)
    assert worker.is_alive()


def test_a_batch_by_hand(shards, models, encoder, tmp_path):
    """Latents, noise and timesteps from the files themselves, by PIL, the VAE and the seed."""
    data = settings(shards, tmp_path, kinds=("images",), draws=2, seed=5, batch=1)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    vae = VideoVAE.from_pretrained(models / "vae")
    first_numbers = []
    for _ in range(3):
        batch = next(loader)
        number = loader.position.number(loader.position.taken - 1)
        first_numbers.append(number)
        _, shard, place = loader.reader.order.locate(number)
        _, files = read(data.shards["images"][shard], place)
        image = Image.open(io.BytesIO(files["png"]))
        side = max(32 / image.width, 32 / image.height)
        image = image.resize((round(image.width * side), round(image.height * side)), 3)
        top, left = (image.height - 32) // 2, (image.width - 32) // 2
        pixels = numpy.array(image)[top : top + 32, left : left + 32]
        pixels = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None, :, None].float()
        with torch.no_grad():
            mean, std = (part.half().float() for part in vae.encode(pixels))
        generator = torch.Generator().manual_seed((5 * 0x9E3779B1 + number) & 0xFFFFFFFF)
        kept = torch.rand((), generator=generator) >= data.p_null
        assert texts(encoder, batch)[0] == (files["txt"].decode() if kept else "")
        torch.randint(1, (), generator=generator)
        assert torch.equal(batch.timestep, torch.randint(1000, (2,), generator=generator))
        expected = mean + std * torch.randn(2, *mean.shape[1:], generator=generator)
        torch.testing.assert_close(batch.latents, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(batch.noise, torch.randn(expected.shape, generator=generator))
    assert first_numbers == sorted(first_numbers)


def test_a_clip_by_hand(shards, models, encoder, tmp_path):
    """Frames from the file by PyAV, every sixth of 24 a second from the start that is drawn."""
    data = settings(
        shards, tmp_path, kinds=("clips",), draws=2, seed=5, batch=1, windows_per_clip=2
    )
    loader = make_loader(data, models / "vae", encoder.tokenize)
    vae = VideoVAE.from_pretrained(models / "vae")
    for _ in range(3):
        batch = next(loader)
        number = loader.position.number(loader.position.taken - 1)
        _, shard, place = loader.reader.order.locate(number)
        _, files = read(data.shards["clips"][shard], place)
        generator = torch.Generator().manual_seed((5 * 0x9E3779B1 + number) & 0xFFFFFFFF)
        kept = torch.rand((), generator=generator) >= data.p_null
        caption = json.loads(files["json"])["caption"]
        assert texts(encoder, batch)[0] == (caption if kept else "")
        window = int(torch.randint(2, (), generator=generator))
        starts = seeded(0, place, "clips-0")
        first = [int(torch.randint(6, (), generator=starts)) for _ in range(2)][window]
        with av.open(io.BytesIO(files["mp4"])) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)][first::6][:8]
        images = []
        for image in frames:
            side = max(32 / image.width, 32 / image.height)
            image = image.resize((round(image.width * side), round(image.height * side)), 3)
            top, left = (image.height - 32) // 2, (image.width - 32) // 2
            images.append(numpy.array(image)[top : top + 32, left : left + 32])
        pixels = torch.from_numpy(numpy.stack(images) / 127.5 - 1).permute(3, 0, 1, 2)[None].float()
        with torch.no_grad():
            mean, std = (part.half().float() for part in vae.encode(pixels))
        assert torch.equal(batch.timestep, torch.randint(1000, (2,), generator=generator))
        expected = mean + std * torch.randn(2, *mean.shape[1:], generator=generator)
        torch.testing.assert_close(batch.latents, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(batch.noise, torch.randn(expected.shape, generator=generator))
        assert batch.motion_free.tolist() == [False, False]


def test_motion_free_image_is_encoded_once_and_repeated(shards, models, encoder, tmp_path):
    data = settings(shards, tmp_path, draws=2, batch=6)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    frames, encode = [], loader.source.vae.encode
    loader.source.vae.encode = lambda x, **k: (
        frames.append(x.shape[0] * x.shape[2]) or encode(x, **k)
    )
    batch = next(loader)
    stills = batch.motion_free.view(6, 2)[:, 0]
    assert frames == [int(stills.sum()) + 8 * int((~stills).sum())]
    for latents, noise, still in zip(batch.latents, batch.noise, batch.motion_free, strict=True):
        assert still == (latents == latents[:, :1]).all()
        assert not (noise == noise[:, :1]).all()
    assert not torch.equal(*batch.latents[batch.motion_free][:2])  # two draws of the posterior


def test_buckets_make_batches_of_one_size_and_nothing_is_lost(shards, models, encoder, tmp_path):
    """Three sizes; a resume in the middle, on other ranks, still sees each image once."""
    data = settings(
        shards,
        tmp_path,
        kinds=("images",),
        size=None,
        buckets=((32, 32), (32, 48), (40, 32)),
        p_null=0.0,
        batch=2,
    )

    def load(rank, ranks):
        return make_loader(data, models / "vae", encoder.tokenize, rank=rank, ranks=ranks)

    old = [load(rank, 2) for rank in range(2)]
    before = [text for loader in old for text in texts(encoder, next(loader))]
    sizes = {tuple(next(loader).latents.shape[-2:]) for loader in old for _ in range(4)}
    assert sizes == {(4, 4), (4, 6), (5, 4)}
    assert old[0].sizes == (4, 1, 4, 6)

    old = [load(rank, 2) for rank in range(2)]
    for loader in old:
        next(loader)
    states = json.loads(json.dumps([loader.state_dict() for loader in old]))
    again = load(1, 2)
    again.load_state_dict(states)
    for _ in range(3):
        assert texts(encoder, next(again)) == texts(encoder, next(old[1]))
    one = load(0, 1)
    one.load_state_dict(states)
    after = [text for _ in range(9) for text in texts(encoder, next(one))]
    epoch, later = Counter(before), Counter()
    for text in after:
        (later if epoch[text] else epoch)[text] += 1
    assert epoch == Counter(f"image {n}" for n in range(10))
    assert max(later.values(), default=0) <= 2


def test_clips_and_images_exchanged_are_told_at_the_start(
    shards, precomputed, models, encoder, tmp_path
):
    for folder in (shards, precomputed):
        other = {"images": f"{folder}/clips-*.tar", "clips": f"{folder}/images-*.tar"}
        for kinds in (("images", "clips"), ("images",), ("clips",)):
            with pytest.raises(ValueError, match=r"--(images|clips) names .* which holds "):
                data = settings(folder, tmp_path, kinds=kinds, **other)
                make_loader(data, models / "vae", encoder.tokenize)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_clip_and_its_thumbnail_are_a_clip_and_an_image(models, encoder, tmp_path, in_memory):
    both = {"jpg": as_file(picture(32, 32), "jpg"), "mp4": video(range(48))} | CAPTION
    still = {name: content for name, content in both.items() if name != "mp4"}
    path = write_tar(tmp_path / "both.tar", [both, both, still])
    data = settings(tmp_path, tmp_path, images=str(path), clips=str(path), batch=4)
    data = replace(data, in_memory=in_memory)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    batches = [next(loader) for _ in range(3)]
    for batch in batches:
        for latents, still in zip(batch.latents, batch.motion_free, strict=True):
            assert still == (latents == latents[:, :1]).all()
    assert loader.broken() in ({"no clip": 1}, {"no clip": 2})


def test_latents_in_memory_are_of_the_shard_that_is_there(models, encoder, tmp_path):
    """Not of one that lay there under the same name, with as many samples."""
    losses = []
    for shade in (0, 255):
        image = {"png": as_file(Image.new("RGB", (32, 32), (shade,) * 3), "png")} | CAPTION
        write_tar(tmp_path / "images-0.tar", [image])
        data = settings(tmp_path, tmp_path, kinds=("images",), in_memory=True, batch=1)
        for _ in range(2):
            source = make_loader(data, models / "vae", encoder.tokenize).source
            losses.append(float(source.sets["images"].mean.float().mean()))
    assert losses[0] == losses[1] != losses[2] == losses[3]


def test_a_shard_of_broken_samples_only_is_no_end_in_memory(models, encoder, tmp_path):
    image = {"png": as_file(picture(32, 32), "png")} | CAPTION
    write_tar(tmp_path / "images-0.tar", [CAPTION] * 2)
    write_tar(tmp_path / "images-1.tar", [image] * 3)
    data = settings(tmp_path, tmp_path, kinds=("images",), in_memory=True, batch=3)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    next(loader), next(loader)
    assert set(loader.broken()) == {"no image"}
    (tmp_path / "images-1.tar").unlink()
    with pytest.raises(ValueError, match="can be read: 2 no image"):
        make_loader(replace(data), models / "vae", encoder.tokenize)


def test_a_size_that_does_not_fit_names_sample_and_option(models, encoder, tmp_path):
    images = [{"png": as_file(picture(*size), "png")} | CAPTION for size in ((32, 32), (41, 50))]
    write_tar(tmp_path / "images-0.tar", images)
    data = settings(tmp_path, tmp_path, kinds=("images",), size=None, batch=1)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    next(loader), next(loader)
    assert set(loader.broken()) == {"size that does not fit (--size makes it fit)"}
    strict = make_loader(replace(data, max_broken=0.0), models / "vae", encoder.tokenize)
    wanted = "--size.*the last one is images-0-0001 of .*41x50 pixels, wanted multiples of 8"
    with pytest.raises(TooManyBroken, match=wanted):
        next(strict), next(strict)
    with pytest.raises(ValueError, match=r"size 40x40 does not fit: .* patch 2"):
        make_loader(replace(data, size=(40, 40)), models / "vae", encoder.tokenize, patch=2)


def test_damaged_latents_are_broken_samples(precomputed, tmp_path):
    """Whatever a precomputed shard holds: others are trained on."""
    with tarfile.open(precomputed / "images-0.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    whole = next(load(content) for name, content in members[1:] if name.endswith("safetensors"))
    wrong = [
        b"no latents",
        save(whole | {"mean": whole["mean"][..., :-1].contiguous()}),
        save(whole | {"mean": whole["mean"][0]}),
        save(whole | {name: whole[name].repeat(1, 1, 8, 1, 1) for name in ("mean", "std")}),
        save(whole | {"t5.tokens": whole["t5.tokens"][:, :-1].contiguous()}),
        save({name: whole[name] for name in ("mean", "std")}),
        save(whole | {"std": whole["std"] * torch.nan}),
        save(whole | {name: whole[name].repeat(1, 1, 1, 1, 2) for name in ("mean", "std")}),
    ]
    contents = [{"safetensors": save(whole)}, *({"safetensors": one} for one in wrong)]
    contents += [{"broken.json": b"[" * 9999}, {"broken.json": b"1"}]
    path = write_tar(tmp_path / "images-0.tar", contents)
    with tarfile.open(path, "a") as tar:
        entry = tarfile.TarInfo(members[0][0])
        entry.size = len(members[0][1])
        tar.addfile(entry, io.BytesIO(members[0][1]))
    loader = make_loader(settings(tmp_path, tmp_path, kinds=("images",), batch=2), None, None)
    next(loader)
    assert set(loader.broken()) == {
        "unreadable latents",
        "no image",
        "latents that are not finite",
        "another size than this run has",
    }
    assert sum(loader.broken().values()) >= 10


def test_a_name_that_is_no_text_is_logged(tmp_path):
    log = BrokenLog(tmp_path / "log", 1.0, samples=1)
    log.add(Broken("a", "b\udcff", "c", "d"))
    assert json.loads((tmp_path / "log").read_text())["sample"] == "b\udcff"
    with pytest.raises(TooManyBroken, match=r"1 of 1 samples .* all of c"):
        BrokenLog(tmp_path / "log", 0.05, samples=0).add(Broken("unreadable shard", "", "c", ""))


def test_checkpoint_of_other_data_is_refused(shards, models, encoder, tmp_path):
    data = settings(shards, tmp_path)
    state = make_loader(data, models / "vae", encoder.tokenize).state_dict()
    other = make_loader(replace(data, seed=1), models / "vae", encoder.tokenize)
    with pytest.raises(ValueError, match="seed was 0 when the checkpoint was written, now 1"):
        other.load_state_dict([state])


def test_a_run_of_clips_goes_on_without_the_images_that_it_once_counted(
    shards, models, encoder, tmp_path
):
    both = settings(shards, tmp_path, p_motion_free=0.0)
    counted = make_loader(both, models / "vae", encoder.tokenize)
    assert counted.state_dict()["order"]["samples"]["images"] > 0
    next(counted)
    clips = make_loader(replace(both, kinds=("clips",)), models / "vae", encoder.tokenize)
    clips.load_state_dict([counted.state_dict()])
    assert_same(next(clips), next(counted))
    read = settings(shards, tmp_path, p_motion_free=0.5)
    state = make_loader(read, models / "vae", encoder.tokenize).state_dict()
    with pytest.raises(ValueError, match=r"samples was .* when the checkpoint was written"):
        clips.load_state_dict([state])


def test_unlike_sizes_without_buckets_are_broken_samples(shards, models, encoder, tmp_path):
    data = settings(shards, tmp_path, kinds=("images",), size=None, max_broken=0.05)
    loader = make_loader(replace(data, max_broken=0.2), models / "vae", encoder.tokenize)
    wanted = r"another size than others \(--size or --buckets .*images-.* of .*, others are \d+x\d+"
    with pytest.raises(TooManyBroken, match=wanted):
        [next(loader) for _ in range(4)]


@pytest.mark.parametrize("in_memory", [False, True])
def test_one_sample_of_another_size_is_a_broken_one(models, encoder, tmp_path, in_memory):
    """Wherever it lies, alone in its shard, too."""
    cause = "another size than others (--size or --buckets makes them fit)"
    for odd in range(5):
        (folder := tmp_path / str(odd)).mkdir()
        sizes = [(48, 32) if number == odd else (32, 32) for number in range(5)]
        images = [{"png": as_file(picture(*size), "png")} | CAPTION for size in sizes]
        write_tar(folder / "images-0.tar", images[:4])
        write_tar(folder / "images-1.tar", images[4:])
        data = settings(folder, tmp_path, kinds=("images",), size=None, batch=1, workers=odd == 0)
        data = replace(data, in_memory=in_memory)
        loader = make_loader(data, models / "vae", encoder.tokenize)
        assert loader.sizes == (4, 1, 4, 4)
        assert all(next(loader).latents.shape[-2:] == (4, 4) for _ in range(5))
        assert loader.broken() in ({cause: 1}, {cause: 2})
    with pytest.raises(TooManyBroken, match=r"6x4|48x32"):
        loader = make_loader(replace(data, max_broken=0.0), models / "vae", encoder.tokenize)
        [next(loader) for _ in range(5)]


def test_sizes_end_where_no_sample_can_be_read(models, encoder, tmp_path):
    write_tar(tmp_path / "images-0.tar", [{"png": b""} | CAPTION] * 2)
    data = settings(tmp_path, tmp_path, kinds=("images",), size=None, max_broken=0.05)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    with pytest.raises(ValueError, match="can be read"):
        loader.sizes  # noqa: B018
    with pytest.raises(TooManyBroken, match="1 of 2 samples"):
        next(loader)


@pytest.mark.parametrize("in_memory", [False, True])
def test_latents_that_are_not_finite_are_an_error(models, encoder, tmp_path, in_memory):
    image = {"png": as_file(picture(32, 32), "png")} | CAPTION
    write_tar(tmp_path / "images-0.tar", [image])
    vae = VideoVAE.from_pretrained(models / "vae")
    vae.autoencoder.encoder.conv_in.bias.data.fill_(torch.nan)
    vae.save_pretrained(tmp_path / "vae")
    data = settings(tmp_path, tmp_path, kinds=("images",), in_memory=in_memory, batch=1)
    with pytest.raises(ValueError, match=r"^the autoencoder's latents, in fp16, are not finite"):
        next(make_loader(data, tmp_path / "vae", encoder.tokenize))
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("together", [1, 2, 64])
def test_every_epoch_sees_each_sample_once(together, monkeypatch):
    monkeypatch.setattr(data_module, "SHUFFLED_TOGETHER", together)
    counts = {"images": [3, 0, 5, 1], "clips": [4, 2]}
    order = Order(counts, 0.25, seed=1)
    places = [order.locate(number) for number in range(36 * 4)]
    for kind, lengths in counts.items():
        mine = [place[1:] for place in places if place[0] == kind]
        everything = {(s, n) for s, length in enumerate(lengths) for n in range(length)}
        epochs = [mine[i : i + sum(lengths)] for i in range(0, len(mine), sum(lengths))]
        whole = [epoch for epoch in epochs if len(epoch) == sum(lengths)]
        assert all(set(epoch) == everything for epoch in whole) and len(whole) > 2
        assert len(set(map(tuple, epochs))) > 0.7 * len(epochs) > 2
        if together == 1:  # shard after shard
            shards = [shard for shard, _ in epochs[0]]
            assert sum(a != b for a, b in pairwise(shards)) == len([n for n in lengths if n]) - 1


def test_windows_of_a_run_without_starts_are_new_at_every_reading(
    shards, models, encoder, tmp_path
):
    data = settings(shards, tmp_path, kinds=("clips",), windows_per_clip=0, p_null=0.0, batch=1)
    loader = make_loader(data, models / "vae", encoder.tokenize)
    means = {}
    for number in range(80):
        sample = loader.reader[number]
        if isinstance(sample, Sample):
            means.setdefault(sample.text, []).append(float(sample.pixels[0, ..., 2].float().mean()))
    assert all(len(set(values)) > 1 for values in means.values()) and len(means) == 5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kinds": ("pictures",)}, "kinds is"),
        ({"batch": 0}, "--batch is 0, must be at least 1"),
        ({"workers": -1}, "--workers is -1, must be at least 0"),
        ({"p_motion_free": 0.6, "p_image": 0.5}, "must be at most 1 together"),
        ({"p_motion_free": 1.5}, "--p-motion-free is 1.5, must be in 0 … 1"),
        ({"crop": "left"}, "--crop is 'left', must be one of center, random"),
        ({"size": (32, 0)}, "a size is"),
        ({"in_memory": True, "buckets": ((8, 8), (8, 16))}, "in_memory takes one size"),
    ],
    ids=str,
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        DataSettings(**options)
