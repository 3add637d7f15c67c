"""Shards with whole and broken samples, models to encode them, and what was precomputed of them."""

import json
import tarfile

import pytest
import torch
from samples import BROKEN, CAPTION, CLIP, as_file, picture, video, write_tar

from gentron_fast.text import SUBFOLDERS, TextEncoder
from gentron_train.data.precompute import main as precompute_main
from gentron_train.small_world.architecture import small_text_encoder, small_vae
from gentron_train.small_world.renderer import vocabulary


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A pipeline folder's autoencoder and text encoders, untrained."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small_vae().save_pretrained(folder / "vae")
    small_text_encoder(vocabulary()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(models):
    parts = {name: [models / part for part in SUBFOLDERS[name]] for name in SUBFOLDERS}
    return TextEncoder.from_pretrained(**parts)


@pytest.fixture(scope="session")
def broken_samples(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Every kind of broken sample, by what is wrong with it."""
    whole, image = video(CLIP), as_file(picture(32, 32), "jpg")
    file = tmp_path_factory.mktemp("clip") / "index-first.mp4"
    start = video(CLIP, file=file, movflags="faststart")
    media = (
        {"mp4": whole[:-400]},
        {"mp4": start[: len(start) // 2]},
        {"mp4": bytes(500)},
        {"mp4": video(CLIP[:30])},
        {"jpg": image[: len(image) // 2]},
        {"png": b""},
        {"jpg": image},
        {"jpg": image, "txt": b" "},
        {},
    )
    captions = [{} if name == "no caption" else CAPTION for name in BROKEN]
    return {name: c | m for name, c, m in zip(BROKEN, captions, media, strict=True)}


@pytest.fixture(scope="session")
def shards(tmp_path_factory, broken_samples):
    """Two shards of images, one of them cut off, and one of clips, with broken samples in both."""
    folder = tmp_path_factory.mktemp("shards")
    broken = list(broken_samples.values())
    sides = [(32, 32), (32, 48), (40, 32)] * 4
    images = [
        {"png": as_file(picture(*size), "png"), "txt": f"image {n}".encode()}
        for n, size in enumerate(sides)
    ]
    write_tar(folder / "images-0.tar", [*images[:5], *broken[4:8], *images[5:7]])
    whole = write_tar(folder / "whole.tar", images[7:])
    with tarfile.open(whole) as tar:
        size = tar.getmembers()[6].offset_data + 30  # in the fourth picture
    (folder / "images-1.tar").write_bytes(whole.read_bytes()[:size])
    clips = [
        {"mp4": video(CLIP, size=sides[n]), "json": json.dumps({"caption": f"clip {n}"}).encode()}
        for n in range(5)
    ]
    write_tar(folder / "clips-0.tar", [*broken[:2], *clips, *broken[2:4], *broken[8:]])
    return folder


@pytest.fixture(scope="session")
def precomputed(shards, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("precomputed") / "new"
    command = [f"{shards}/{{images,clips}}-*.tar", str(folder), f"--pipeline={models}"]
    assert precompute_main([*command, "--size=32x32", "--workers=2", "--max-broken=1"]) == 0
    return folder
