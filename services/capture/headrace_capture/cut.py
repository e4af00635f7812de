"""The open cut: what has gone into the log, up to which end LSN, and when it is time to seal.

A cut is sealed when the socket has nothing more to read, or when it is old or large. Between transactions its checkpoint names the
end of the last whole one; inside a transaction it keeps that LSN and adds `partial` (S5).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from headrace.change import Checkpoint, Source, Version
from headrace.log import CutWriter
from headrace.settings import Settings

LONGEST_SECONDS = 10.0
"""The longest a cut stays open inside a transaction: well below half of Kafka's transaction.timeout.ms (S5)."""
FULL_BYTES = 64 * 1024 * 1024
"""Bytes of rows that fill a cut: Kafka takes them well within the time of a transaction."""
EMPTY_CUT_SECONDS = 0.1


class Whole(NamedTuple):
    """The last transaction that is wholly in the log: its end LSN, when it committed (ms), its id."""

    lsn: int
    commit_ts: int
    xid: int


class Cut:
    """Counts what the open cut holds, and seals it.

    Attributes:
        sealed: The newest committed checkpoint: nothing beyond it may be confirmed to Postgres (S4).
        inexact: Tables whose topic is not known to equal Postgres (S12); named in every checkpoint.
        approximate: Tables of which a value was read again, and up to which LSN (S7): named until a checkpoint is there.
        whole: The last transaction that is wholly in the cut.
        most: Records that fill a cut.
        longest: Seconds that it stays open between transactions though more waits to be read.
        snapshot: ``chunked`` until an initial snapshot in chunks is complete, then None.
    """

    def __init__(
        self, writer: CutWriter, settings: Settings, sealed: Checkpoint, sealing: Callable[[Checkpoint], None]
    ) -> None:
        """Go on after `sealed`; `sealing` is called with each checkpoint once it is committed."""
        self.writer = writer
        self.sealed = sealed
        self.inexact = set(sealed.inexact)
        self.approximate = dict(sealed.approximate)
        self.most = settings.cut_records
        self.longest = settings.cut_ms / 1000
        self.snapshot = sealed.snapshot
        self._sealing = sealing
        self.whole = Whole(sealed.version.lsn, sealed.commit_ts, sealed.xid)
        self._sealed_at = 0.0

    @property
    def source(self) -> Source:
        """Return the source that every checkpoint names."""
        return self.sealed.source

    @property
    def epoch(self) -> int:
        """Return the epoch of everything that is written now."""
        return self.sealed.version.epoch

    @property
    def full(self) -> bool:
        """Whether it holds as many records or bytes as a cut may."""
        return self.writer.open_records >= self.most or self.writer.open_bytes >= FULL_BYTES

    @property
    def age(self) -> float:
        """Return for how many seconds it has been open, 0 when it is empty."""
        return time.monotonic() - self.writer.opened_at if self.writer.opened_at else 0.0

    @property
    def open(self) -> bool:
        """Whether there is anything that the newest checkpoint does not cover."""
        return bool(self.writer.opened_at) or self.whole.lsn > self.sealed.version.lsn

    def seal(self, partial: tuple[int, int] | None = None) -> None:
        """Commit the cut with its checkpoint."""
        whole = self.whole
        for table in [table for table, until in self.approximate.items() if until <= whole.lsn]:
            del self.approximate[table]
        sealed = self.writer.seal(
            version=Version(self.epoch, whole.lsn),
            commit_ts=whole.commit_ts,
            xid=whole.xid,
            source=self.source,
            partial=partial,
            inexact=tuple(sorted(self.inexact)),
            snapshot=self.snapshot,
            approximate=self.approximate,
        )
        self.sealed = sealed
        self._sealed_at = time.monotonic()
        self._sealing(sealed)

    def until_empty_cut(self, lsn: int) -> float:
        """Return in how many seconds an empty cut up to `lsn` may be made; 0 for now, a minute when none is needed."""
        if lsn <= self.sealed.version.lsn:
            return 60.0
        return max(0.0, self._sealed_at + EMPTY_CUT_SECONDS - time.monotonic())

    def seal_empty(self, lsn: int) -> None:
        """Write a checkpoint alone: Postgres has sent everything up to `lsn`, and nothing of it was captured (S4)."""
        self.whole = Whole(lsn, int(time.time() * 1000), 0)
        self.seal()
