"""The live keys of a table, as its topic in the log has them, listed on disk (I10).

Strategy: a temporary SQLite file maps each live key to where its newest record stands. It is filled by reading the topic from
offset 0 and kept up by reading on from there, so asking twice costs only what came between. Three rules need it: TRUNCATE deletes
exactly these keys (S11), a snapshot that started again deletes those which it did not write (S6), and a value kept out of line can be
had from the key's newest record (S7). Rows are not kept: one that is wanted is read again from its offset.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from headrace.change import Version
from headrace.log import Log
from headrace.log.tail import BEGINNING, Record, read_to_end
from headrace_capture.spool import paged, room

_BUNCH = 2_000


class LiveKeys:
    """The live keys of one table. Only committed records count: seal the open cut before asking."""

    def __init__(self, log: Log, table: str) -> None:
        """Make an empty list; `catch_up` fills it."""
        self._settings = log.settings
        topic = log.topic_of(table)
        self._next = {(topic, partition): BEGINNING for partition in range(log.partitions([topic])[topic])}
        self._topic = topic
        self._db = sqlite3.connect(
            "", isolation_level=None
        )  # a file without a name: nothing is left of it after a kill
        self._db.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;"
            "CREATE TABLE live (key BLOB PRIMARY KEY, version INTEGER, partition INTEGER, at INTEGER) WITHOUT ROWID"
        )

    def __enter__(self) -> Self:
        """Return the list itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the file."""
        self.close()

    def catch_up(self, ends: Sequence[int], tick: Callable[[], None], idle: Callable[[], None]) -> None:
        """Read the topic on to its end, at least to `ends`, as the newest checkpoint names them.

        `tick` is called when much has come, `idle` while nothing does: capture does not come on then, and must not say that it lives (S15).

        Raises:
            Transient: `kafka-away`; Misconfigured: `spool-full`.
        """
        bunch: list[Record] = []
        wanted = {(self._topic, partition): end for partition, end in enumerate(ends)}
        for record in read_to_end(self._settings, dict(self._next), wanted, idle=idle):
            bunch.append(record)
            if len(bunch) >= _BUNCH:
                self._take(bunch)
                bunch.clear()
                tick()
        self._take(bunch)

    def each(
        self, tick: Callable[[], None], below: Version | None = None, seal: Callable[[], None] = lambda: None
    ) -> Iterator[bytes]:
        """Yield the live keys in their order; only those whose newest record is older than `below`, if given (see `spool.paged`)."""
        query = "SELECT key FROM live WHERE key > ? AND version < ? ORDER BY key LIMIT ?"
        bound = (1 << 63) - 1 if below is None else below.packed()
        return (key for (key,) in paged(self._db, query, bound, _BUNCH, seal, tick))

    def newest(self, key: bytes) -> Record | None:
        """Return the key's newest record, None when the key is not live."""
        with room():
            row = self._db.execute("SELECT partition, at FROM live WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        place = self._topic, row[0]
        records = read_to_end(self._settings, {place: row[1]}, {place: row[1] + 1})
        try:
            return next(record for record in records if record.key == key)
        finally:
            records.close()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Remove the file."""
        self._db.close()

    def _take(self, records: list[Record]) -> None:
        with room():
            self._note(records)

    def _note(self, records: list[Record]) -> None:
        self._db.execute("BEGIN")
        for record in records:
            if record.value is None:
                self._db.execute("DELETE FROM live WHERE key = ?", (record.key,))
            else:
                headers = dict(record.headers)
                version = Version(int(headers["epoch"]), int(headers["lsn"])).packed()
                row = (record.key, version, record.partition, record.offset)
                self._db.execute("INSERT OR REPLACE INTO live VALUES (?, ?, ?, ?)", row)
            self._next[record.topic, record.partition] = record.offset + 1
        self._db.execute("COMMIT")
