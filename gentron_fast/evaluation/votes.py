"""The votes of a study in SQLite: what was answered for is on the disk."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

QUESTIONS = ("quality", "text")  # which looks better; which fits the text better
ANSWERS = ("left", "equal", "right")

# A vote taken back stays, with the time: a late copy of it would count again if it were gone.
TABLES = """
CREATE TABLE IF NOT EXISTS votes (
    id TEXT PRIMARY KEY,
    rater TEXT NOT NULL,
    pair TEXT NOT NULL,
    quality TEXT NOT NULL CHECK (quality IN ('left', 'equal', 'right')),
    text TEXT NOT NULL CHECK (text IN ('left', 'equal', 'right')),
    voted_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    undone_at TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS one_vote_a_pair ON votes (rater, pair) WHERE undone_at IS NULL;
"""


class Vote(NamedTuple):
    """One rater's answers about one pair, as left and right were shown."""

    id: str
    rater: str
    pair: str
    quality: str
    text: str
    voted_at: str


class Votes:
    """The file of a study's votes, made where it is missing. Threads and processes may share it."""

    def __init__(self, path: Path):
        self.path = path
        with self._database() as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(TABLES)

    def add(self, vote_id: str, rater: str, pair: str, quality: str, text: str) -> None:
        """Keep a vote, unless one of this id, or another of this rater on this pair, is there."""
        with self._database() as database:
            database.execute(
                "INSERT INTO votes (id, rater, pair, quality, text) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT DO NOTHING",
                (vote_id, rater, pair, quality, text),
            )

    def undo(self, vote_id: str, rater: str) -> None:
        """Take a rater's vote back; nothing happens where it was or is not there."""
        with self._database() as database:
            database.execute(
                "UPDATE votes SET undone_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
                " WHERE id = ? AND rater = ? AND undone_at IS NULL",
                (vote_id, rater),
            )

    def standing(self, rater: str | None = None) -> list[Vote]:
        """The votes, of one rater or of all, in the order in which they came."""
        with self._database() as database:
            rows = database.execute(
                f"SELECT {', '.join(Vote._fields)} FROM votes"
                " WHERE undone_at IS NULL AND rater = coalesce(?, rater) ORDER BY rowid",
                (rater,),
            )
            return [Vote(*row) for row in rows]

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection with a transaction, kept at the end and on the disk by then."""
        try:
            with closing(sqlite3.connect(self.path, timeout=30)) as database, database:
                database.execute("PRAGMA synchronous = FULL")
                yield database
        except sqlite3.Error as error:
            raise ValueError(f"cannot use the votes in {self.path}: {error}") from error
