"""Finished clips on disk, with what is told of them: ID.json and ID.mp4 of each, for a time."""

import re
import secrets
import threading
import time
import warnings
from pathlib import Path

from gentron_fast.files import lock_folder, read_json, whole_file, write_json
from gentron_fast.media import write_media
from gentron_fast.schema import OBJECT, TEXT, one_of, optional, real, several, whole

STATES = ("queued", "in_progress", "completed", "failed")
MOST_SECONDS = 10**12
# A record is what OpenAI calls a video object, with the settings that make the same clip again.
RECORD_SCHEMA = {
    "id": TEXT,
    "object": one_of("video"),
    "model": TEXT,
    "status": one_of(*STATES),
    "progress": whole(0, 100),
    "created_at": whole(0, MOST_SECONDS),
    "completed_at": optional(whole(0, MOST_SECONDS)),
    "expires_at": optional(whole(0, MOST_SECONDS)),
    "prompt": TEXT,
    "seconds": TEXT,
    "size": TEXT,
    "settings": OBJECT,
    "fps": real(0.01, 1000),
    "warnings": several(TEXT, 0, 1000),
    "error": optional(OBJECT),
}
# All that this folder gets from us, what a killed process left half-written among it.
OURS = re.compile(r"\.?(video|image)_[0-9a-f]{32}\.(?:\S+\.part)?\.?(json|mp4|png|jpeg|webp)")


class ClipStore:
    """The clips of a folder that this process alone serves. Any thread may call any method.

    A clip is there whole or not at all, under an id of 128 random bits, and goes after `keep`
    seconds, or where more than `most` are there, the oldest first; so do, apart from them, images
    and the records of what failed. What was not finished when an earlier process ended is told as
    failed. ValueError where another process serves the folder.
    """

    def __init__(self, folder: Path, keep: float, most: int):
        self.folder, self.keep, self.most = folder, keep, most
        self._lock = threading.Lock()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_folder(folder)
        for path in folder.glob(".*.part*"):
            if OURS.fullmatch(path.name):  # the lock is ours: whoever began it is dead
                path.unlink(missing_ok=True)
        found = [self._read(path) for path in folder.glob("video_*.json")]
        found = sorted(filter(None, found), key=lambda record: (record["created_at"], record["id"]))
        self._records: dict[str, dict] = {record["id"]: record for record in found}
        for record in found:
            whole_clip = self.path(record["id"]).is_file()
            if record["status"] in STATES[:2] or (
                record["status"] == "completed" and not whole_clip
            ):
                self.fail(record["id"], "server_stopped", "the server ended before it was done")
        for path in folder.glob("video_*.mp4"):
            # Only a removal that was cut short leaves a clip without a record; one whose record
            # cannot be read, or is another version's, may be all that its owner has.
            if OURS.fullmatch(path.name) and not path.with_suffix(".json").exists():
                path.unlink()
        self.sweep()

    def _read(self, path: Path) -> dict | None:
        """The record in a file, what other versions wrote into it too; None, and a warning, where
        it holds none."""
        if not OURS.fullmatch(path.name):
            return None
        try:
            record = {"warnings": []} | read_json(path, RECORD_SCHEMA)  # none in older ones
            if missing := RECORD_SCHEMA.keys() - record:
                raise ValueError(f"{path} has no {', '.join(sorted(missing))}")
            if record["id"] != path.stem:
                raise ValueError(f"{path} holds the record of {record['id']}")
        except (OSError, ValueError) as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            return None
        return record

    def path(self, clip_id: str) -> Path:
        return self.folder / f"{clip_id}.mp4"

    def add(self, **values) -> dict:
        """Begin a record; on disk before this returns. OSError where it cannot be written."""
        clip_id = f"video_{secrets.token_hex(16)}"
        record = {
            "id": clip_id,
            "object": "video",
            "status": "queued",
            "progress": 0,
            "created_at": int(time.time()),
            "completed_at": None,
            "expires_at": None,
            "error": None,
            "warnings": [],
            **values,
        }
        write_json(self.folder / f"{clip_id}.json", record)
        with self._lock:
            self._records[clip_id] = record
        return record

    def get(self, clip_id: str) -> dict | None:
        """A record, or None where there is none, or none any more."""
        with self._lock:
            record = self._records.get(clip_id)
        return record if record and not self._is_over(record) else None

    def finish(self, clip_id: str, frames, fps: float) -> None:
        """Write the clip of frames uint8 (T, H, W, 3); nothing where it was removed."""
        write_media(self.path(clip_id), frames, fps)
        self._end(clip_id, status="completed", progress=100)

    def fail(self, clip_id: str, code: str, message: str) -> None:
        error = {"code": code, "message": " ".join(message.split())}
        self._end(clip_id, status="failed", error=error)

    def _end(self, clip_id: str, **changes) -> None:
        now = time.time()
        changes |= {"completed_at": int(now), "expires_at": int(now + self.keep)}
        with self._lock:
            if record := self._records.get(clip_id):
                record = self._records[clip_id] = record | changes
                write_json(self.folder / f"{clip_id}.json", record)
                return
        self.path(clip_id).unlink(missing_ok=True)

    def remove(self, clip_id: str) -> bool:
        """Remove a clip and its record; False where there was none."""
        with self._lock:
            found = self._records.pop(clip_id, None)
            for path in (self.folder / f"{clip_id}.json", self.path(clip_id)):
                if found:
                    path.unlink(missing_ok=True)
        return found is not None

    def page(self, after: str | None, limit: int, newest_first: bool) -> tuple[list[dict], bool]:
        """Up to `limit` records behind the one called `after`, and whether there are more.

        KeyError where there is none of that name.
        """
        with self._lock:
            records = [record for record in self._records.values() if not self._is_over(record)]
        if newest_first:
            records.reverse()
        if after is not None:
            ids = [record["id"] for record in records]
            if after not in ids:
                raise KeyError(after)
            records = records[ids.index(after) + 1 :]
        return records[:limit], len(records) > limit

    def add_image(self, data: bytes, ending: str) -> str:
        """Write an image and return its name, which is as hard to guess as a clip's."""
        name = f"image_{secrets.token_hex(16)}.{ending}"
        with whole_file(self.folder / name) as partial:
            partial.write_bytes(data)
        return name

    def image(self, name: str) -> Path | None:
        """The file of an image of that name, None where it is not there."""
        path = self.folder / name
        is_ours = name.startswith("image_") and OURS.fullmatch(name)
        return path if is_ours and path.is_file() else None

    def sweep(self) -> None:
        """Remove what is too old, and the oldest of what is too much."""
        with self._lock:
            records = list(self._records.values())
        gone = [record for record in records if self._is_over(record)]
        for status in STATES[2:]:  # apart: requests that fail push out nobody's clips
            ended = [record for record in records if record["status"] == status]
            gone += ended[: max(len(ended) - self.most, 0)]
        for record in gone:
            self.remove(record["id"])
        images = [path for path in self.folder.glob("image_*") if OURS.fullmatch(path.name)]
        written = sorted((path.stat().st_mtime, path) for path in images)
        surplus = max(len(written) - self.most, 0)
        for number, (when, path) in enumerate(written):
            if number < surplus or when + self.keep < time.time():
                path.unlink(missing_ok=True)

    def _is_over(self, record: dict) -> bool:
        return bool(record["expires_at"]) and record["expires_at"] < time.time()
