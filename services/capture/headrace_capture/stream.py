"""The stream: from Postgres's messages to cuts in the log.

The loop is `run`: read a message, handle it; when the socket has nothing more, seal; when there is nothing to seal, wait. Everything
else is one small method for each message. Two things are kept between messages: the transaction that is open (`_stamp`, `_ordinal`),
and, after a start from a `partial` checkpoint, the transaction that is already in the log up to some ordinal (`_half`, S5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from headrace.change import Version, format_lsn
from headrace.errors import Misconfigured, Poison
from headrace.log import Log
from headrace_capture import pgoutput
from headrace_capture.cut import LONGEST_SECONDS, Cut, Whole
from headrace_capture.live import LiveKeys
from headrace_capture.pgoutput import (
    UNCHANGED,
    Begin,
    Commit,
    Datums,
    Delete,
    Insert,
    Keepalive,
    Relation,
    Truncate,
    Update,
)
from headrace_capture.progress import Progress
from headrace_capture.relations import Relations
from headrace_capture.replication import Replication
from headrace_capture.tables import Stamp, Table
from headrace_capture.toast import WORTH_REMEMBERING, Filler

CREATE, UPDATE, DELETE = b"c", b"u", b"d"
NULL: Final = b"null"
_IDLE_SECONDS = 1.0
_LOOK_AT_CLOCK = 255
"""Inside a transaction the cut's age is looked at once in as many changes (a power of two, less one)."""
_LOOK_AT_CLOCK_COMMITS = 31
"""Between transactions: once in as many of them."""
_BUNCH = 256
"""Messages between two looks at everything else."""


class Stream:
    """Reads the stream of one replication connection into cuts, until it is told to stop or something fails."""

    def __init__(
        self, log: Log, cut: Cut, replication: Replication, relations: Relations, filler: Filler, progress: Progress
    ) -> None:
        """Go on from the cut's newest checkpoint, where `replication` was started."""
        self._log = log
        self._cut = cut
        self._writer = cut.writer
        self._replication = replication
        self._relations = relations
        self._tables = relations.by_oid
        self._filler = filler
        self._progress = progress
        self._stamp: Stamp | None = None
        self._ordinal = 0
        self._commits = 0
        self._size = 0
        self._skip = 0
        self._half = cut.sealed.partial
        self._sent_up_to = 0
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Begin: self._begin,
            Commit: self._commit,
            Relation: self._relation,
            Insert: self._insert,
            Update: self._update,
            Delete: self._delete,
            Truncate: self._truncate,
        }

    def run(self, stopped: Callable[[], bool]) -> None:
        """Capture until `stopped`; then what is whole is sealed, and what is not is left to be sent again.

        Raises:
            Transient: `postgres-away`, `kafka-away`, `cut-lost`, `reread-not-visible`: start again from the newest checkpoint.
            Misconfigured: `row-too-large`, `key-changed`, `slot-lost`, `partial-missing`.
            Poison: `bad-message`, `bad-value`, `value-not-found`.
        """
        read, take = self._replication.read, self._take
        while not stopped():
            self._progress.beat()
            for _ in range(_BUNCH):
                data = read()
                if data is None:
                    self._idle()
                    break
                take(data)
        if not self._between_transactions:
            self._writer.abort()
        elif self._cut.open:
            self._seal()

    @property
    def _between_transactions(self) -> bool:
        return self._stamp is None and self._half is None

    def _idle(self) -> None:
        """Nothing more to read: seal what there is, else confirm keepalives by an empty cut, else wait."""
        wait = _IDLE_SECONDS
        if self._between_transactions:
            if self._cut.open:
                self._seal()
                return
            wait = min(wait, self._cut.until_empty_cut(self._sent_up_to))
            if not wait:
                self._cut.seal_empty(self._sent_up_to)
                self._sealed()
                return
        self._replication.alive()
        self._replication.wait(wait)

    def _take(self, data: bytes) -> None:
        try:
            payload = pgoutput.unframe(data)
            if isinstance(payload, Keepalive):
                self._keepalive(payload)
                return
            message = pgoutput.parse(payload)
        except pgoutput.DecodeError as error:
            raise Poison(
                "bad-message",
                f"After {format_lsn(self._cut.sealed.version.lsn)} the stream has {error}.",
                "Report this as a defect.",
            ) from error
        self._size = len(data)
        handler = self._handlers.get(type(message))
        if handler is not None:  # types, origins and messages say nothing that is needed
            handler(message)

    def _keepalive(self, keepalive: Keepalive) -> None:
        # Inside a transaction, or with one half in the log, its end is still to come: only then may this LSN be confirmed.
        if self._between_transactions:
            self._sent_up_to = keepalive.wal_end
        elif self._half and self._stamp is None and keepalive.wal_end > self._half[0]:
            raise self._half_is_missing(keepalive.wal_end)
        if keepalive.reply:
            self._replication.tell()

    def _begin(self, begin: Begin) -> None:
        if self._half and begin.commit_lsn > self._half[0]:
            raise self._half_is_missing(begin.commit_lsn)
        self._stamp = Stamp(
            Version(self._cut.epoch, begin.commit_lsn), begin.xid, (begin.commit_ts, self._progress.now_ms())
        )
        self._ordinal = 0
        self._skip = self._half[1] if self._half and begin.commit_lsn == self._half[0] else 0

    def _half_is_missing(self, lsn: int) -> Misconfigured:
        assert self._half is not None
        return Misconfigured(
            "partial-missing",
            f"The log holds half of the transaction committed at {format_lsn(self._half[0])}; "
            f"Postgres went on to {format_lsn(lsn)} without it.",
            "Start again from zero: headrace teardown --topics, then setup and capture.",
        )

    def _commit(self, commit: Commit) -> None:
        stamp = self._open_stamp
        self._cut.whole = Whole(commit.end_lsn, commit.commit_ts, stamp.xid)
        if self._half and stamp.lsn == self._half[0]:
            self._half = None
        self._stamp = None
        self._commits += 1
        look = not self._commits & _LOOK_AT_CLOCK_COMMITS
        if self._half is None and (self._cut.full or (look and self._cut.old)):
            self._seal()

    def _relation(self, relation: Relation) -> None:
        self._relations.take(relation, self._open_stamp.xid)

    def _insert(self, insert: Insert) -> None:
        table = self._next(insert.oid)
        if table is None:
            return
        key = table.key(insert.new)
        if table.wide:
            self._filler.memory.changed(table, key, key, insert.new, self._size)
        if self._ordinal > self._skip:
            self._put(table, key, CREATE, table.row(insert.new))
            self._after_change()

    def _update(self, update: Update) -> None:
        table = self._next(update.oid)
        if table is None:
            return
        new, read, encode = update.new, None, table.row
        key = table.key(new) if update.old is None or UNCHANGED not in new else table.key(_filled(new, update.old))
        before = key if update.old is None else table.key(update.old)
        if self._ordinal <= self._skip:
            self._remember_skipped(table, (before, key), update)
            return
        if table.wide:
            if UNCHANGED in new:
                old = update.old if update.whole else None
                new, read = self._filler.fill(table, (before, key), new, old, self._open_stamp.xid, self._seal_partial)
                encode, self._size = table.row_of_any, WORTH_REMEMBERING
            self._filler.memory.changed(table, before, key, new, self._size)
        if before != key:
            self._put_delete(table, before)
        self._put(table, key, UPDATE if before == key else CREATE, encode(new), read)
        self._after_change()

    def _remember_skipped(self, table: Table, keys: tuple[bytes, bytes], update: Update) -> None:
        """A change that is in the log already still tells the values that a later one leaves alone."""
        row = list(update.new)
        self._filler.memory.recall(table, keys[0], row)
        if UNCHANGED in row:
            self._filler.memory.forget(table, keys[0])
        else:
            self._filler.memory.changed(table, *keys, row, WORTH_REMEMBERING)

    def _delete(self, delete: Delete) -> None:
        table = self._next(delete.oid)
        if table is None:
            return
        key = table.key(delete.old)
        self._filler.memory.forget(table, key)
        if self._ordinal > self._skip:
            self._put_delete(table, key)
            self._after_change()

    def _truncate(self, truncate: Truncate) -> None:
        """Delete every live key of each table; the log itself is the list of them (S11). All have one ordinal."""
        self._ordinal += 1
        tables = [table for table in map(self._tables.get, truncate.oids) if table is not None]
        for table in tables:
            self._filler.memory.forget_table(table)
        if self._ordinal <= self._skip:
            return
        for table in tables:
            self._seal_partial()
            with LiveKeys(self._log, table.name) as live:
                live.catch_up(self._tick)
                for key in live.each():
                    self._put_delete(table, key)
                    if self._cut.full:
                        self._seal_partial()
        self._after_change()

    def _next(self, oid: int) -> Table | None:
        """Count a change; return its table, None if that is left out."""
        self._ordinal += 1
        try:
            return self._tables[oid]
        except KeyError:
            raise Poison(
                "bad-message", f"A row of table {oid} came before its shape.", "Report this as a defect."
            ) from None

    @property
    def _open_stamp(self) -> Stamp:
        if self._stamp is None:
            raise Poison("bad-message", "A change came outside of a transaction.", "Report this as a defect.")
        return self._stamp

    def _put(self, table: Table, key: bytes, op: bytes, row: bytes, read: bytes | None = None) -> None:
        stamp, ordinal = self._open_stamp, self._ordinal
        self._writer.produce(
            table.topic, key, stamp.value(table, ordinal, op, row), stamp.headers(table, ordinal, read)
        )
        self._progress.changes += 1

    def _put_delete(self, table: Table, key: bytes) -> None:
        """Write the delete and its tombstone, next to each other in one cut (I4)."""
        self._put(table, key, DELETE, NULL)
        self._writer.produce(table.topic, key, None, self._open_stamp.headers(table, self._ordinal))

    def _after_change(self) -> None:
        """End the cut inside the transaction if it is too large or too old (S5)."""
        if self._cut.full or (not self._ordinal & _LOOK_AT_CLOCK and self._cut.age > LONGEST_SECONDS):
            self._cut.seal((self._open_stamp.lsn, self._ordinal))
            self._sealed()

    def _seal_partial(self) -> None:
        """Commit all that came before the change that is at hand."""
        if not self._writer.opened_at:
            return
        self._cut.seal((self._open_stamp.lsn, self._ordinal - 1))
        self._sealed()

    def _seal(self) -> None:
        self._cut.seal()
        self._sealed()

    def _sealed(self) -> None:
        self._replication.confirm(self._cut.sealed.version.lsn)

    def _tick(self) -> None:
        self._progress.beat()
        self._replication.alive()


def _filled(new: Datums, old: Datums) -> Datums:
    return [before if value is UNCHANGED else value for value, before in zip(new, old, strict=True)]
