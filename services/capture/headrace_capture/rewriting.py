"""Writing a chunk into the log at its high watermark: which rows may be written, and which keys are dead (S7, I4).

The rule. Everything up to the high watermark is in the log when a chunk is written. A row that was read may be written unless its key's
newest record in the log

- is newer than the low watermark: the stream has the row already, as new or newer; or
- is of a transaction that the read's snapshot does not see: it committed before, became visible later, and is the newer one (S7).

The version of what is written is the commit LSN of the low watermark: above all that the read may replace, below all that comes after.

Rows without a key (S10) cannot be held against the log one by one, so all that the log has of the table gives way to what was read, but for
rows of transactions that the snapshot does not see. Their version is the commit LSN of the high watermark, above all that gives way, and
their keys that LSN and numbers below zero: no row of the stream has one, for the transaction is the watermark's own.

Dead keys. When a pass over a table is at its end, a key of the log whose newest record is older than the pass was in no chunk, so it is
gone from Postgres; unless that record's transaction is one that the first chunk's snapshot did not see. (A key that a chunk
had but did not write, for either reason above, has a record newer than the pass or of such a transaction.) Records of an earlier epoch name
transactions of another server or slot: for them the pass's floor has vouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from headrace.change import Snapshot, Version
from headrace.log import CutWriter
from headrace_capture.append_only import position_key
from headrace_capture.chunks import Chunk
from headrace_capture.known import KnownKeys, Newest
from headrace_capture.stream import DELETE, NULL, READ
from headrace_capture.tables import Stamp, Table

RESNAPSHOT: Final = b"resnapshot"
"""The header `read` of rows and deletes that are written here."""
_LOOK_AROUND = 1_024
_parsed = lru_cache(8)(Snapshot.parsed)


@dataclass(frozen=True, slots=True)
class Rewriting:
    """Writes into one cut after another.

    Attributes:
        writer: Of cuts.
        known: The newest records of the table, up to the high watermark.
        table: In the shape of what was read.
        version: Epoch and commit LSN of the low watermark; of the high one for a table without a key.
        now: ms since the Unix epoch.
        breathe: Called now and then: seals a cut that is full or old, and says that capture lives, as `tick` does.
        seal: Commits what is written, before work that takes long and writes nothing.
    """

    writer: CutWriter
    known: KnownKeys
    table: Table
    version: Version
    now: int
    breathe: Callable[[], None]
    seal: Callable[[], None]
    tick: Callable[[], None]

    def rows(self, chunk: Chunk) -> int:
        """Write the rows that may be written; return how many. Raises Poison (`bad-value`), Misconfigured (`row-too-large`)."""
        stamp, headers = self._stamp()
        written: list[bytes] = []
        for count, row in enumerate(chunk.rows, start=1):
            key = self.table.key(row)
            if self._may_replace(self.known.newest(key), chunk.snapshot):
                self.writer.produce(
                    self.table.topic, key, stamp.value(self.table, 0, READ, self.table.row(row)), headers
                )
                written.append(key)
            if not count % _LOOK_AROUND:
                self.breathe()
        self.known.note(written, self.version)
        return len(written)

    def anew(self, rows: Iterable[list[Any]]) -> None:
        """Write all rows of a table without a key. Raises as `rows`; `undo` takes them back."""
        stamp, headers = self._stamp()
        for number, row in enumerate(rows, start=1):
            value = stamp.value(self.table, 0, READ, self.table.row(row))
            self.writer.produce(self.table.topic, position_key(self.version.lsn, -number), value, headers)
            if not number % _LOOK_AROUND:
                self.breathe()

    def undo(self) -> None:
        """Write the deletes of what `anew` has written and `known` knows of."""
        self._delete(key for key, _ in self.known.at(self.version, self.seal, self.tick))

    def absent(self, key: bytes, chunk: Chunk) -> int:
        """Write the delete of a key that was looked for and not found, if the log has it alive; return how many that were."""
        newest = self.known.newest(key)
        if newest is None or not newest.live or not self._may_replace(newest, chunk.snapshot):
            return 0
        return self._delete([key])

    def vanished(self, first: int, seen: str) -> int:
        """Write the deletes of the keys that no chunk had; return how many.

        Args:
            first: Commit LSN of the pass's first low watermark; for a table without a key, of its high one.
            seen: The snapshot of its first chunk.
        """
        older = self.known.older(Version(self.version.epoch, first), self.seal, self.tick)
        return self._delete(key for key, newest in older if not self._unseen(newest, seen, first))

    def _may_replace(self, newest: Newest | None, snapshot: str) -> bool:
        return newest is None or (newest.version <= self.version and not self._unseen(newest, snapshot))

    def _unseen(self, newest: Newest, snapshot: str, taken: int = 0) -> bool:
        since = (taken or self.version.lsn) - newest.version.lsn  # to where this snapshot was taken
        return newest.version.epoch == self.version.epoch and not _parsed(snapshot).sees(newest.xid, since)

    def _stamp(self) -> tuple[Stamp, list[tuple[str, bytes]]]:
        stamp = Stamp(self.version, 0, (self.now, self.now), snapshot=True)
        return stamp, stamp.headers(self.table, 0, RESNAPSHOT)

    def _delete(self, keys: Iterable[bytes]) -> int:
        stamp, headers = self._stamp()
        value = stamp.value(self.table, 0, DELETE, NULL)
        count = 0
        for count, key in enumerate(keys, start=1):
            self.writer.produce(self.table.topic, key, value, headers)
            self.writer.produce(self.table.topic, key, None, headers)
            if not count % _LOOK_AROUND:
                self.breathe()
        return count
