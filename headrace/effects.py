"""Consumers that keep no view but do something for each change: call a webhook, purge a cache.

What they do may be done again after a crash, so it must be harmless to repeat: a purge is; for a webhook there is `idempotency_key`. The
position is the only thing that is kept, in a file of SQLite; where the file is lost the consumer begins anew.

A consumer begins with the first state that it meets: what was there before is history, and nobody is told of it. So a rebuild does
nothing but begin again from now.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar

from headrace import codec
from headrace.change import Change, Position
from headrace.consumer import Batch, Cursor, Generation, ViewRow, no_progress
from headrace.settings import Settings

_TABLES = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS generations (number INTEGER PRIMARY KEY, fingerprint TEXT, live INTEGER DEFAULT 0, position BLOB);
"""


def idempotency_key(change: Change) -> str:
    """Return what names a change for ever, however often it is told: epoch, commit LSN, ordinal, table."""
    return f"{change.version.epoch}-{change.version.lsn:X}-{change.ordinal}-{change.table}"


class EffectConsumer:
    """Does something for each change. Subclass it, name the `tables` and write `effect`.

    Class attributes:
        name: Names the consumer; by default the entry point's name.
        tables: ``schema.table`` of each table that it reads, or ALL.
    """

    name: str = ""
    tables: Collection[str] = ()
    mirrors_rows: ClassVar[bool] = False
    progress: Callable[[int, int], None]

    def __init__(self, settings: Settings, name: str) -> None:
        """Open the file of the position."""
        self.settings = settings
        self.name = name
        self.progress = no_progress
        self._number = 0
        path = settings.path(f"{name}-effects.sqlite")
        self._db = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
        self._db.executescript(_TABLES)

    def effect(self, changes: Sequence[Change]) -> None:
        """Do what is to be done for some changes, in their order; all of it is done when this returns.

        Raises:
            Transient: try again later, the same changes and perhaps more.
        """
        raise NotImplementedError

    def generations(self) -> list[Generation]:
        """Return those that the file holds."""
        found = self._db.execute("SELECT number, fingerprint, live FROM generations ORDER BY number")
        return [Generation(self.name, number, fingerprint, bool(live)) for number, fingerprint, live in found]

    def open(self, generation: Generation) -> Position | None:
        """Return where the generation stands."""
        self._number = generation.number
        made = (generation.number, generation.fingerprint)
        self._db.execute("INSERT OR IGNORE INTO generations (number, fingerprint) VALUES (?, ?)", made)
        query = "SELECT position FROM generations WHERE number = ?"
        (position,) = self._db.execute(query, (self._number,)).fetchone()
        return codec.decode_position(position) if position else None

    def apply(self, batch: Batch) -> None:
        """Do it for each change, if this generation is the live one; then keep the position."""
        if not batch.loading and self._is_live():
            self.effect(batch.changes)
        position = (codec.encode_position(batch.position), self._number)
        self._db.execute("UPDATE generations SET position = ? WHERE number = ?", position)

    def promote(self) -> None:
        """Let this generation do it from now on, and the others no longer."""
        self._db.execute("UPDATE generations SET live = (number = ?)", (self._number,))

    def drop(self) -> None:
        """Forget this generation."""
        self._db.execute("DELETE FROM generations WHERE number = ?", (self._number,))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def scan(self, after: Cursor | None, limit: int) -> Sequence[ViewRow]:  # noqa: ARG002  see there
        """See `Consumer.scan`: there is nothing to read."""
        return []

    def _is_live(self) -> bool:
        """Whether it is this generation's turn: it is live, or none is yet."""
        live = [number for (number,) in self._db.execute("SELECT number FROM generations WHERE live")]
        return live in ([], [self._number])
