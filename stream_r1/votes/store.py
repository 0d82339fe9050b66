"""Votes in SQLite: each on the disk before the rater is told so, none twice."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stream_r1.votes.plan import Item

_TABLES = """
CREATE TABLE IF NOT EXISTS raters (rater TEXT PRIMARY KEY, began REAL NOT NULL);
CREATE TABLE IF NOT EXISTS votes (
    rater TEXT NOT NULL REFERENCES raters (rater),
    item TEXT NOT NULL,
    question TEXT NOT NULL,
    prompt INTEGER NOT NULL,
    left TEXT NOT NULL,
    right TEXT NOT NULL,
    answer TEXT NOT NULL CHECK (answer IN ('left', 'right', 'tie')),
    at REAL NOT NULL,
    seconds REAL,
    PRIMARY KEY (rater, item, question)
);
"""


class UnknownRaterError(ValueError):
    """Nobody of this name has begun."""


class OtherVoteError(ValueError):
    """The rater has voted on this pair already, and otherwise."""


@dataclass(frozen=True)
class Vote:
    """One answer; `left` and `right` are the models that were shown there."""

    rater: str
    item: str
    question: str
    prompt: int
    left: str
    right: str
    answer: str

    @property
    def winner(self) -> str | None:
        """The model that was preferred; None: a tie."""
        return None if self.answer == "tie" else getattr(self, self.answer)


class VoteStore:
    """The database of a comparison; any number of threads and processes may use it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.executescript(_TABLES)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction of its own: committed, and on the disk, when the context ends well."""
        database = sqlite3.connect(self.path, timeout=30)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute("PRAGMA foreign_keys = ON")
            with database:
                yield database
        finally:
            database.close()

    def begin(self, rater: str) -> None:
        """A new rater."""
        with self._open() as database:
            database.execute("INSERT INTO raters VALUES (?, ?)", (rater, time.time()))

    def voted(self, rater: str) -> set[str]:
        """The items that a rater has voted on.

        Raises:
            UnknownRaterError: there is no such rater.
        """
        with self._open() as database:
            if database.execute("SELECT 1 FROM raters WHERE rater = ?", (rater,)).fetchone() is None:
                raise UnknownRaterError(f"no rater {rater!r}")
            rows = database.execute("SELECT DISTINCT item FROM votes WHERE rater = ?", (rater,))
            return {item for (item,) in rows}

    def add(self, rater: str, item: Item, answers: Mapping[str, str], seconds: float | None) -> None:
        """All answers on a pair, or none. The same ones again change nothing.

        Raises:
            UnknownRaterError: there is no such rater.
            OtherVoteError: the rater's answers on this pair were others.
        """
        now = time.time()
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")  # what is there is read and written as one
            if database.execute("SELECT 1 FROM raters WHERE rater = ?", (rater,)).fetchone() is None:
                raise UnknownRaterError(f"no rater {rater!r}")
            rows = database.execute(
                "SELECT question, answer FROM votes WHERE rater = ? AND item = ?", (rater, item.key)
            )
            if there := dict(rows.fetchall()):
                if there != dict(answers):
                    raise OtherVoteError(f"the rater has voted on this pair: {there}")
                return
            database.executemany(
                "INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (rater, item.key, question, item.index, item.left, item.right, answer, now, seconds)
                    for question, answer in answers.items()
                ],
            )

    def votes(self) -> list[Vote]:
        """All of them, in the order in which they came."""
        with self._open() as database:
            rows = database.execute(
                "SELECT rater, item, question, prompt, left, right, answer FROM votes ORDER BY at, rowid"
            )
            return [Vote(*row) for row in rows]
