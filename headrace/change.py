"""The words that every part shares: versions, columns, changes, checkpoints, positions.

Plain values without behaviour of their own, so that capture, the readers, the stores and verify mean the same by them.
LSNs are integers here and in every record; people see them as Postgres prints them (`format_lsn`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from headrace.errors import Misconfigured

__all__ = ["NOWHERE", "Change", "Checkpoint", "Column", "Position", "Row", "Source", "TableSchema", "Version"]

Row = dict[str, Any]
"""A row in the codec's form: column name to the natural JSON value (see docs/formats.md)."""

CREATE, UPDATE, DELETE, READ = "c", "u", "d", "r"

LSN_BITS = 48


class Version(NamedTuple):
    """What orders states: the epoch first, then the commit LSN (S1, S2)."""

    epoch: int
    lsn: int

    def packed(self) -> int:
        """Return one 63-bit integer for stores that compare versions: the epoch in the top 15 bits.

        48 bits of LSN are 256 TiB of WAL.
        """
        if self.lsn >> LSN_BITS or self.epoch >> 15:
            raise Misconfigured("version-overflow", f"{self} does not fit in 15 bits of epoch and 48 bits of LSN.")
        return self.epoch << LSN_BITS | self.lsn

    def before(self) -> Version:
        """Return the version just below: up to there is everything but what came at this one."""
        return Version(self.epoch, max(self.lsn - 1, 0))

    @classmethod
    def unpacked(cls, packed: int) -> Version:
        """Undo `packed`."""
        return cls(packed >> LSN_BITS, packed & ((1 << LSN_BITS) - 1))

    def __str__(self) -> str:
        """Return the version as people see it, e.g. ``1@0/17ABA90``."""
        return f"{self.epoch}@{format_lsn(self.lsn)}"


NOWHERE = Version(0, 0)
"""Before every state: the version of a generation that is loading."""


_XIDS = 1 << 32
_FAR = 4 * (_XIDS // 2)
"""Bytes of WAL, within which half of all transaction ids cannot be used up: each leaves four in it at least, as a subtransaction."""


class Snapshot(NamedTuple):
    """What one statement of Postgres sees: ids of transactions, as `pg_current_snapshot()` prints them."""

    xmax: int
    running: frozenset[int]

    @classmethod
    def parsed(cls, text: str) -> Snapshot:
        """Return the snapshot that Postgres prints so, e.g. ``100:110:100,105``."""
        _, xmax, running = text.split(":")
        return cls(int(xmax), frozenset(map(int, filter(None, running.split(",")))))

    def sees(self, xid: int, since: int = 0) -> bool:
        """Whether it sees the commit of `xid`, which the stream and the log name by its low 32 bits. 0 is no transaction.

        Of the ids with those bits the one nearest to the snapshot's end is meant. Where more WAL than `_FAR` came since the commit
        that may be another one: then only a transaction that is running by that name is not seen.

        Args:
            xid: The transaction.
            since: Bytes of WAL from its commit to the snapshot.
        """
        if xid == 0:
            return True
        near = self.xmax - self.xmax % _XIDS + xid
        full = min((near - _XIDS, near, near + _XIDS), key=lambda candidate: abs(candidate - self.xmax))
        return full not in self.running and (full < self.xmax or since > _FAR)


def format_lsn(lsn: int) -> str:
    """Return an LSN as Postgres prints it, e.g. ``0/17ABA90``."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """Undo `format_lsn`. Raises ValueError."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def source_of(topic: str) -> str:
    """Return the source of a table's topic: its name may have dots, those of schema and table have none (`headrace.log.topics.escape`)."""
    return topic.rsplit(".", 2)[0]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a captured table.

    `type` is Postgres's name of it with modifiers, as `format_type` gives it: ``numeric(10,2)``, ``text[]``. `base` is the type
    below the domains in it, without modifiers: ``integer`` for a domain over integer; empty where no domain is in it.
    """

    name: str
    type: str
    nullable: bool = True
    base: str = ""


@dataclass(frozen=True, slots=True)
class TableSchema:
    """One immutable version of a table's shape (S13). `table` is ``schema.name``; `key` names the key's columns in order."""

    table: str
    version: int
    columns: tuple[Column, ...]
    key: tuple[str, ...]


UNKNOWN_SCHEMA: Final = 0
"""What a delete names where the table's shape is not known yet (S28), below every version; no batch has such a schema."""


class Change(NamedTuple):
    """One record of a table's topic, decoded.

    A tombstone and the `d` record before it are the same delete; a reader hands out one of them.
    `row` is the whole row after the change, None for a delete. `key` is the record's key: canonical JSON bytes.
    """

    table: str
    op: str
    key: bytes
    row: Row | None
    version: Version
    ordinal: int
    xid: int
    schema: int
    partition: int
    offset: int
    read: str | None = None
    """How the row was read if not from the stream: ``snapshot``; ``resnapshot``, with its table or key read again; ``reread``, a TOAST
    value was (S7)."""

    def repeats(self, before: Change | None) -> bool:
        """Whether it is the tombstone of the `d` record just before it in its partition."""
        return before is not None and self.op == before.op == DELETE and before[2:7] == self[2:7]


@dataclass(frozen=True, slots=True)
class Source:
    """Which server, timeline, database and slot a log came from: positions of another one are refused [I12]."""

    system_id: str
    timeline: int
    database: str
    slot: str
    publication: str

    def same_but_timeline(self, other: Source) -> bool:
        """Whether both are one database of one server, perhaps before and after a failover."""
        return replace(self, timeline=0) == replace(other, timeline=0)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The last record of a cut: everything below `ends` is the state of Postgres at `version.lsn`.

    `version.lsn` is the *end* LSN of the last transaction wholly in the log.

    Attributes:
        ends: For each topic, for each partition, the offset after the last record that belongs to the cut.
        commit_ts: When that transaction committed, in ms since the Unix epoch; for an empty cut, when it was made.
        xid: Its transaction id, 0 for an empty cut.
        partial: ``(commit_lsn, ordinal)`` of the last change in the log of a transaction that is not wholly there (S5).
        inexact: Tables whose topic is not known to equal Postgres at this LSN (S12).
        snapshot: None once streaming; ``running`` or ``complete`` in the checkpoints of the initial snapshot (S6); ``chunked`` while
            the stream runs and the initial snapshot is read beside it.
        base: LSN of the checkpoint whose `ends` this one's record goes on from, its own when the record names every topic (S16).
        offset: Where the record stands in the checkpoints topic; -1 before it is written.
        appended: The broker's timestamp of the record, in ms since the Unix epoch; 0 before it is written.
        approximate: Tables of which values were read again, each with an LSN: in states before it these may be of a later moment (S7).
    """

    version: Version
    commit_ts: int
    xid: int
    ends: dict[str, list[int]]
    source: Source
    partial: tuple[int, int] | None = None
    inexact: tuple[str, ...] = ()
    snapshot: str | None = None
    base: int = 0
    offset: int = -1
    appended: int = 0
    approximate: dict[str, int] = field(default_factory=dict)

    def end(self, topic: str, partition: int) -> int:
        """Return where a partition ends; 0 in one that it does not name."""
        return self.ends[topic][partition] if topic in self.ends else 0

    @property
    def complete(self) -> bool:
        """Whether `ends` is a state that Postgres had: no half transaction, no half snapshot."""
        return self.partial is None and self.snapshot not in {"running", "chunked"}


@dataclass(slots=True)
class Position:
    """What a generation has durably applied; it lives in the view's own store [I6].

    Attributes:
        offsets: For each topic, for each partition, the next offset to read.
        topics: The Kafka topic id of each topic in `offsets`: a topic made again under its name is another topic [I12].
        version: The last complete, exact checkpoint that the view shows; NOWHERE while loading.
        source: The source of that log, None before the first checkpoint was seen.
        appended: The broker's timestamp of the checkpoint at `version`, ms; while loading, when the build began, pauses included.
            Older than `delete.retention.ms` is refused (S19).
        inexact: Tables of the view that are not known to equal Postgres at `version` (S12).
        held: What is parked or delayed holds tokens back to here (S25), None when nothing is.
        parked: Collections of which something is parked: they are not what Postgres had at `version` either.
        approximate: Tables of the view of which values at `version` may be of a later moment (S7).
        retention: How long tombstones stayed when it was fed last, ms; 0 where that was not noted.
        told: When a view of documents was told so, ms by the clock of who did, always later than before; 0 where that was not noted. Of
            local rows that are loading, what the view had then, or when it was found empty. It tells apart what is written at one state,
            and is no part of where the view is.
    """

    offsets: dict[str, list[int]] = field(default_factory=dict)
    topics: dict[str, str] = field(default_factory=dict)
    version: Version = NOWHERE
    source: Source | None = None
    appended: int = 0
    inexact: tuple[str, ...] = ()
    held: Version | None = None
    parked: tuple[str, ...] = ()
    approximate: tuple[str, ...] = ()
    retention: int = 0
    told: int = field(default=0, compare=False)

    def copy(self) -> Position:
        """Return one that the other's reader does not move."""
        offsets = {topic: list(offsets) for topic, offsets in self.offsets.items()}
        return replace(self, offsets=offsets, topics=dict(self.topics))

    def tombstones_stay(self, setting: int) -> int:
        """Return how long tombstones that it has not seen stay, ms: a setting that was raised since brings none back (S19)."""
        return min(self.retention or setting, setting)

    @property
    def reached(self) -> Version:
        """Return the version up to which readers see everything: what a token waits for (S25)."""
        return self.version if self.held is None else min(self.version, self.held)

    def continued_by(self, version: Version, source: Source | None) -> bool:
        """Whether a log that is at `version` of `source` may be the one that this position belongs to.

        One log has records of one source until a new epoch begins: capture lets nothing else into it. Within an epoch the timeline may
        change, by a failover that lost nothing (S2). The topics' ids, which are compared as well, tell whether it is this log.
        """
        if self.source is None or source is None or self.source == source or version.epoch > self.version.epoch:
            return True
        return self.source.same_but_timeline(source)

    @property
    def loading(self) -> bool:
        """Whether the view has not yet reached a state that Postgres had."""
        return self.version == NOWHERE
