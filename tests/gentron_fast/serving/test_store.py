"""Clips on disk: their ages, their number, and what a killed process leaves."""

import json
import os
import time

import pytest
import torch

from gentron_fast.serving.store import ClipStore

FRAMES = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
VALUES = {"model": "tiny", "prompt": "x", "seconds": "1", "size": "32x32", "settings": {}, "fps": 4}


def store_in(folder, keep=3600.0, most=100):
    return ClipStore(folder, keep, most)


def made(store):
    clip = store.add(**VALUES)["id"]
    store.finish(clip, FRAMES, 4)
    return clip


def test_what_a_killed_process_leaves(tmp_path):
    store = store_in(tmp_path)
    finished, begun, lost = made(store), store.add(**VALUES)["id"], made(store)
    store.fail(failed := store.add(**VALUES)["id"], "cancelled", "x")
    store.path(lost).unlink()
    orphan = tmp_path / f"video_{'0' * 32}.mp4"
    partial = tmp_path / f".{begun}.{os.uname().nodename}.{os.getpid()}.0123456789ab.part.mp4"
    mine = [tmp_path / name for name in ("video_mine.mp4", ".video.part.mp4", "notes.json")]
    for path in (orphan, partial, *mine):
        path.write_text("x")
    again = store_in(tmp_path)  # the folder's lock is one of processes: this one has it still
    states = {clip: again.get(clip)["status"] for clip in (finished, begun, lost, failed)}
    assert states == {finished: "completed", begun: "failed", lost: "failed", failed: "failed"}
    assert again.get(begun)["error"]["code"] == again.get(lost)["error"]["code"] == "server_stopped"
    assert again.get(failed)["error"]["code"] == "cancelled"
    assert not orphan.exists() and not partial.exists()
    assert all(path.read_text() == "x" for path in mine)


@pytest.mark.parametrize("damage", ["{", "{}", '{"id": 3}', "other"])
def test_a_damaged_record_is_left_out_and_left_alone(tmp_path, damage):
    store = store_in(tmp_path)
    bad, good = made(store), made(store)
    path = tmp_path / f"{bad}.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"id": good}) if damage == "other" else damage)
    before = path.read_text()
    with pytest.warns(UserWarning, match=f"left out: .*{bad}"):
        store = store_in(tmp_path)
    assert store.get(bad) is None and store.get(good)
    assert path.read_text() == before and store.path(bad).is_file()


def test_a_record_of_another_version_is_taken(tmp_path):
    store = store_in(tmp_path)
    clip = made(store)
    path = tmp_path / f"{clip}.json"
    record = json.loads(path.read_text()) | {"of_tomorrow": [1]}
    assert record.pop("warnings") == []  # older versions had none
    path.write_text(json.dumps(record))
    record = store_in(tmp_path).get(clip)
    assert record["of_tomorrow"] == [1] and record["warnings"] == []


def test_clips_go_by_age_and_by_number(tmp_path):
    store = store_in(tmp_path, keep=3600, most=2)
    clips = [made(store) for _ in range(3)]
    begun = store.add(**VALUES)["id"]
    images = [store.add_image(b"x", "png") for _ in range(3)]
    os.utime(tmp_path / images[1], (0, 0))
    store.sweep()
    assert [bool(store.get(clip)) for clip in (*clips, begun)] == [False, True, True, True]
    assert sum(store.image(name) is not None for name in images) == 2
    assert store.image(images[1]) is None
    failed = [store.add(**VALUES)["id"] for _ in range(3)]
    for clip in failed:
        store.fail(clip, "deadline_passed", "x")
    store.sweep()
    assert [bool(store.get(clip)) for clip in (*clips, *failed)] == [False, True, True] * 2
    store = store_in(tmp_path, keep=0.5)
    late = made(store)
    time.sleep(2)
    assert store.get(late) is None and store.page(None, 10, True)[0][0]["id"] != late
    store.sweep()
    assert not store.path(late).exists() and store.path(clips[1]).exists()


def test_what_was_removed_is_not_written(tmp_path):
    store = store_in(tmp_path)
    clip = store.add(**VALUES)["id"]
    assert store.remove(clip) and not store.remove(clip)
    store.finish(clip, FRAMES, 4)
    store.fail(clip, "cancelled", "x")
    assert not list(tmp_path.glob("video_*"))
