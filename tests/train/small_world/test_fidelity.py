"""Fidelity: the fitted scene is the scene, and each kind of damage moves its figure."""

from dataclasses import replace

import numpy as np
import pytest

from gentron_fast.index import ASSETS
from gentron_fast.vae import VideoVAE
from gentron_train.small_world import fidelity, renderer
from gentron_train.small_world.fidelity import (
    BROKEN,
    features,
    fit_scene,
    fit_scenes,
    frechet_distance,
    summarize,
)
from gentron_train.small_world.renderer import quiet_pool


def clip_of(scene):
    return renderer.render_clip(scene, every=6)


@pytest.fixture(scope="module")
def scenes():
    return [renderer.sample_scene(np.random.default_rng([5, k])) for k in range(12)]


@pytest.fixture(scope="module")
def clips(scenes):
    return [clip_of(scene) for scene in scenes]


@pytest.fixture(scope="module")
def clean(clips):
    return summarize([fit_scene(clip) for clip in clips])


def blurred(clip):
    return sum(np.roll(clip.astype(np.float32), k, axis) for k in (-2, 0, 2) for axis in (1, 2)) / 6


def noisy(clip):
    return clip + np.random.default_rng(0).normal(0, 30, clip.shape)


def striped(clip):
    return clip + 60.0 * (np.arange(64) % 6 < 3)[:, None]


def jerky(clip):
    """Every other frame four pixels to the right."""
    return np.stack([np.roll(frame, 4 * (k % 2), 1) for k, frame in enumerate(clip)])


def flickering(clip):
    return np.stack([frame * (1 - 0.2 * (k % 2)) for k, frame in enumerate(clip)])


def changed(scene, grown=1.0, **change):
    """The scene with other objects: `grown` times as large, other fields as given."""
    things = (replace(thing, radius=grown * thing.radius, **change) for thing in scene.objects)
    return replace(scene, objects=tuple(things))


def damaged(clips, damage):
    return [np.clip(damage(clip), 0, 255).astype(np.uint8) for clip in clips]


def test_the_scene_is_found_and_rendered(scenes, clips):
    for scene, clip in zip(scenes, clips, strict=True):
        fit = fit_scene(clip)
        assert fit.psnr > 35
        assert fit.scene.background == scene.background
        found = {(thing.shape, thing.colour, thing.fill) for thing in fit.scene.objects}
        assert found == {(thing.shape, thing.colour, thing.fill) for thing in scene.objects}
        times = np.arange(8) / 4
        for thing, pose in zip(fit.scene.objects, fit.poses, strict=True):
            own = next(o for o in scene.objects if o.colour == thing.colour)
            for value, wanted in zip(pose[:3], own.pose(times)[:3], strict=True):
                assert np.abs(value - wanted).max() < 0.3


def test_many_are_fitted_on_all_cores(clips, monkeypatch):
    alone = list(fit_scenes(clips[:6]))
    monkeypatch.setattr(fidelity, "EACH", 3)
    monkeypatch.setattr(fidelity, "available_cores", lambda: 2)
    pools = []
    monkeypatch.setattr(fidelity, "quiet_pool", lambda n: pools.append(n) or quiet_pool(n))
    assert [fit.psnr for fit in fit_scenes(clips[:6])] == [fit.psnr for fit in alone]
    assert pools == [2]


def test_clean_clips_are_steady(clean):
    assert clean["psnr"] > 50 and clean["broken"] == 0
    assert clean["place jitter"] < 0.05 and clean["size jitter"] < 0.5
    assert clean["colour jitter"] < 2


@pytest.mark.parametrize("damage", [noisy, blurred, striped], ids=lambda f: f.__name__)
def test_damage_lowers_the_psnr(clips, clean, damage):
    figures = summarize([fit_scene(clip) for clip in damaged(clips[:4], damage)])
    assert figures["psnr"] < clean["psnr"] - 20
    stronger = lambda clip: clip + 2.5 * (damage(clip) - clip)  # noqa: E731
    assert summarize([fit_scene(c) for c in damaged(clips[:4], stronger)])["psnr"] < figures["psnr"]


def test_what_jumps_is_not_steady(clips, clean):
    def figures(damage):
        return summarize([fit_scene(clip) for clip in damaged(clips[:4], damage)])

    assert figures(jerky)["place jitter"] > clean["place jitter"] + 3
    assert figures(flickering)["colour jitter"] > clean["colour jitter"] + 5


def test_what_pulses_is_not_steady(scenes, clips, clean):
    larger = [clip_of(changed(scene, grown=1.2)) for scene in scenes[:4]]
    pulsing = [pair[0].copy() for pair in zip(clips, larger, strict=False)]
    for clip, other in zip(pulsing, larger, strict=True):
        clip[1::2] = other[1::2]
    figures = summarize([fit_scene(clip) for clip in pulsing])
    assert figures["size jitter"] > clean["size jitter"] + 5


def test_a_clip_of_no_scene_is_broken():
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    fit = fit_scene(noise)
    assert fit.psnr < BROKEN and summarize([fit])["broken"] == 1


def test_an_empty_picture_is_its_background():
    fit = fit_scene(np.full((1, 64, 64, 3), 130, dtype=np.uint8))
    assert fit.scene.background == "grey" and not fit.scene.objects
    assert fit.psnr == 60 and not fit.jitter()


def test_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"float32 \(2, 64, 64, 3\), must be uint8 \(T, 64, 64, 3"):
        fit_scene(np.zeros((2, 64, 64, 3), dtype=np.float32))


def test_the_frechet_distance_is_heusels():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 6)), rng.normal(0.5, 2, size=(300, 6)) @ rng.normal(size=(6, 6))
    a, b = a / b.std(0), b / b.std(0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum()
    wanted += np.trace(first + second)
    # The trace of a root is the sum of the eigenvalues' roots.
    wanted -= 2 * np.sqrt(np.linalg.eigvals(first @ second).real).sum()
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(a, a) < 1e-9


def test_damage_is_far_from_real_clips():
    def some(seed):
        rng = np.random.default_rng(seed)
        return [clip_of(renderer.sample_scene(rng)) for _ in range(100)]

    def seen(clips):
        return features(clips, vae)

    vae = VideoVAE.from_pretrained(ASSETS / "vae").eval()
    real, other = seen(some(1)), some(2)
    floor = frechet_distance(seen(other), real)
    assert seen(other[:2]).shape == (2, 64)
    for damage in (noisy, blurred, striped, jerky, flickering):
        assert frechet_distance(seen(damaged(other, damage)), real) > 1.5 * floor
    rng = np.random.default_rng(2)
    scenes = [renderer.sample_scene(rng) for _ in range(100)]
    wrong = [clip_of(changed(scene, shape="circle")) for scene in scenes]  # all else the same
    # It tells damage more than what is shown: that the rules of small_world.reading tell.
    assert frechet_distance(seen(wrong), real) > 1.2 * floor
