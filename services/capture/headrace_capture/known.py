"""The newest record of every key of a table, dead ones too, as the log has them: on disk (I10), read on as the log grows.

A row that is read again may be written only if no change of its key that is in the log is newer than the read (S7). The log itself knows
that: every record names its version and its transaction. So nothing has to be remembered while the stream runs; before a chunk is
written, what the log has gained since is read back.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from headrace.change import LSN_BITS, Version
from headrace.log import Log
from headrace.log.tail import BEGINNING, Tail, check_heard, end_of_partition, head
from headrace_capture.spool import paged, room

_BUNCH = 5_000
_Call = Callable[[], None]


class Newest(NamedTuple):
    """A key's newest record: its version, its transaction (0 when it was read and not streamed), and whether the key is live."""

    version: Version
    xid: int
    live: bool


class KnownKeys:
    """The newest records of one table's topic."""

    def __init__(self, log: Log, table: str) -> None:
        """Know nothing yet; `catch_up` reads. One thread at a time may use it."""
        self._settings = log.settings
        self._topic = log.topic_of(table)
        self._next: dict[int, int] = {}
        self._tail: Tail | None = None
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # a file without a name
        self._db.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;"
            "CREATE TABLE known (key BLOB PRIMARY KEY, version INTEGER, xid INTEGER, live INTEGER) WITHOUT ROWID"
        )

    def catch_up(self, ends: Sequence[int], tick: _Call, idle: _Call = lambda: None) -> None:
        """Read on to `ends`, partition by partition, as a checkpoint names them; `tick` is called when something came, else `idle`.

        Raises:
            Transient: `kafka-away`, when nothing comes for a minute; Misconfigured: `spool-full`.
        """
        tail = self._opened(len(ends)) if any(ends) else None
        heard = time.monotonic()
        while tail and any(self._next[partition] < end for partition, end in enumerate(ends)):
            rows = []
            messages = tail.poll(0.5)
            if not messages:
                check_heard(heard)
                idle()
                continue
            heard = time.monotonic()
            for message in messages:
                partition, offset, key, headers, live = head(message)
                if end_of_partition(message):
                    self._next[partition] = max(self._next[partition], offset)
                elif offset >= self._next[partition]:  # else it was fetched before `pass_over`
                    self._next[partition] = offset + 1
                    version = int(headers["epoch"]) << LSN_BITS | int(headers["lsn"])
                    rows.append((key, version, int(headers["xid"]), live))
            self._take(rows)
            tick()

    def pass_over(self, ends: Sequence[int]) -> None:
        """Read on from `ends` only: all that is before them has been noted."""
        for partition, end in enumerate(ends):
            self._next[partition] = max(self._next.get(partition, BEGINNING), end)
        if self._tail is None:
            self._tail = Tail(self._settings, self._places())
        else:
            self._tail.seek(self._places())

    def newest(self, key: bytes) -> Newest | None:
        """Return a key's newest record, None for a key that was never there."""
        with room():
            row = self._db.execute("SELECT version, xid, live FROM known WHERE key = ?", (key,)).fetchone()
        return Newest(Version.unpacked(row[0]), row[1], bool(row[2])) if row else None

    def note(self, keys: Sequence[bytes], version: Version) -> None:
        """Note what is being written: these keys are live at `version`, read and not streamed."""
        self._take([(key, version.packed(), 0, True) for key in keys])

    def older(self, version: Version, seal: _Call, tick: _Call) -> Iterator[tuple[bytes, Newest]]:
        """Yield the live keys whose newest record is older than `version`, in their order; `seal` is called before each look for some."""
        return self._live("version < ?", version, seal, tick)

    def at(self, version: Version, seal: _Call, tick: _Call) -> Iterator[tuple[bytes, Newest]]:
        """Yield the live keys whose newest record is of `version`, as `older` does."""
        return self._live("version = ?", version, seal, tick)

    def _live(self, which: str, bound: Version, seal: _Call, tick: _Call) -> Iterator[tuple[bytes, Newest]]:
        query = f"SELECT key, version, xid FROM known WHERE key > ? AND {which} AND live ORDER BY key LIMIT ?"
        for key, packed, xid in paged(self._db, query, bound.packed(), _BUNCH, seal, tick):
            yield key, Newest(Version.unpacked(packed), xid, live=True)

    def close(self) -> None:
        """Remove the file."""
        if self._tail is not None:
            self._tail.close()
        self._db.close()

    def _opened(self, partitions: int) -> Tail:
        if self._tail is None:
            self._next = dict.fromkeys(range(partitions), BEGINNING)
            self._tail = Tail(self._settings, self._places())
        return self._tail

    def _places(self) -> dict[tuple[str, int], int]:
        return {(self._topic, partition): at for partition, at in self._next.items()}

    def _take(self, rows: list[tuple[bytes, int, int, bool]]) -> None:
        with room():
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO known VALUES (?, ?, ?, ?)", rows)
            self._db.execute("COMMIT")
