"""Writing a chunk into the log at its high watermark: which rows may be written, and which keys are dead (S7, I4).

The rule. Everything up to the high watermark is in the log when a chunk is written. A row that was read may be written unless its key's
newest record in the log

- is newer than the low watermark: the stream has the row already, as new or newer; or
- is of a transaction that the read's snapshot does not see: it committed before, became visible later, and is the newer one (S7).

The version of what is written is the commit LSN of the low watermark: above all that the read may replace, below all that comes after.

Dead keys. When a pass over a table is at its end, a key of the log whose newest record is older than the pass was in no chunk, so it is
gone from Postgres; unless that record's transaction is one that the first chunk's snapshot did not see. (A key that a chunk
had but did not write, for either reason above, has a record newer than the pass or of such a transaction.) Records of an earlier epoch name
transactions of another server or slot: for them the pass's floor has vouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from headrace.change import Version
from headrace.log import CutWriter
from headrace_capture.chunks import Chunk
from headrace_capture.known import KnownKeys, Newest
from headrace_capture.stream import DELETE, NULL
from headrace_capture.tables import Stamp, Table
from headrace_capture.watermarks import sees

READ: Final = b"r"
RESNAPSHOT: Final = b"resnapshot"
"""The header `read` of rows and deletes that are written here."""
_LOOK_AROUND = 1_024


@dataclass(frozen=True, slots=True)
class Rewriting:
    """Writes into one cut after another.

    Attributes:
        writer: Of cuts.
        known: The newest records of the table, up to the high watermark.
        table: In the shape of what was read.
        low: Epoch and commit LSN of the low watermark.
        now: ms since the Unix epoch.
        breathe: Called now and then: seals a full cut, and says that capture lives, as `tick` does.
    """

    writer: CutWriter
    known: KnownKeys
    table: Table
    low: Version
    now: int
    breathe: Callable[[], None]
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
        self.known.note(written, self.low)
        return len(written)

    def absent(self, key: bytes, chunk: Chunk) -> int:
        """Write the delete of a key that was looked for and not found, if the log has it alive; return how many that were."""
        newest = self.known.newest(key)
        if newest is None or not newest.live or not self._may_replace(newest, chunk.snapshot):
            return 0
        self._delete(key)
        return 1

    def vanished(self, first: int, seen: str) -> int:
        """Write the deletes of the keys that no chunk had; return how many.

        Args:
            first: Commit LSN of the pass's first low watermark.
            seen: The snapshot of its first chunk.
        """
        count = 0
        for key, newest in self.known.older(Version(self.low.epoch, first), self.tick):
            if not self._unseen(newest, seen):
                self._delete(key)
                count += 1
                if not count % _LOOK_AROUND:
                    self.breathe()
        return count

    def _may_replace(self, newest: Newest | None, snapshot: str) -> bool:
        return newest is None or (newest.version <= self.low and not self._unseen(newest, snapshot))

    def _unseen(self, newest: Newest, snapshot: str) -> bool:
        return newest.version.epoch == self.low.epoch and bool(newest.xid) and not sees(snapshot, newest.xid)

    def _stamp(self) -> tuple[Stamp, list[tuple[str, bytes]]]:
        stamp = Stamp(self.low, 0, (self.now, self.now), snapshot=True)
        return stamp, stamp.headers(self.table, 0, RESNAPSHOT)

    def _delete(self, key: bytes) -> None:
        stamp, headers = self._stamp()
        self.writer.produce(self.table.topic, key, stamp.value(self.table, 0, DELETE, NULL), headers)
        self.writer.produce(self.table.topic, key, None, headers)
