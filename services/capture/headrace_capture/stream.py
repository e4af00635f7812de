"""The stream: from Postgres's messages to cuts in the log.

The loop is `run`: read a message, handle it; when the socket has nothing more, seal; when there is nothing to seal, wait. Everything
else is one small method for each message. Two things are kept between messages: the transaction that is open (`_stamp`, `_ordinal`),
and, after a start from a `partial` checkpoint, the transaction that is already in the log up to some ordinal (`_half`, S5).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from headrace.change import Version, format_lsn
from headrace.errors import Misconfigured, Poison
from headrace.log import Log
from headrace_capture import pgoutput
from headrace_capture.append_only import position_key
from headrace_capture.cut import FULL_BYTES, LONGEST_SECONDS, Cut, Whole
from headrace_capture.live import LiveKeys
from headrace_capture.pgoutput import (
    UNCHANGED,
    Begin,
    Commit,
    Datums,
    Delete,
    Insert,
    Keepalive,
    Message,
    Relation,
    Truncate,
    Update,
)
from headrace_capture.progress import Progress
from headrace_capture.relations import Relations
from headrace_capture.replication import MEND, Replication, Stopped, check
from headrace_capture.tables import Stamp, Table
from headrace_capture.toast import WORTH_REMEMBERING, Filler, Nowhere, with_old

if TYPE_CHECKING:
    from headrace_capture.resnapshot import Resnapshot

CREATE, UPDATE, DELETE, READ = b"c", b"u", b"d", b"r"
NULL: Final = b"null"
_IDLE_SECONDS = 1.0
_MANY, _REST_SECONDS, _NAP_SECONDS = 64, 0.02, 0.002
"""Where so many changes came in one go, more will: the cut stays open for a moment, and we read what comes after naps. Else, as fast as
Postgres can send, each change would be a packet, a wake-up and nearly a cut of its own."""
_DATA, _KIND, _MALFORMED = pgoutput.DATA, pgoutput.HEADER, pgoutput.MALFORMED


class Stream:
    """Reads the stream of one replication connection into cuts, until it is told to stop or something fails."""

    def __init__(
        self,
        log: Log,
        cut: Cut,
        replication: Replication,
        relations: Relations,
        filler: Filler,
        beside: Resnapshot,
        progress: Progress,
    ) -> None:
        """Go on from the cut's newest checkpoint, where `replication` was started."""
        self._log = log
        self._cut = cut
        self._writer = cut.writer
        self._replication = replication
        self._relations = relations
        self._tables = relations.by_oid
        self._filler = filler
        self._beside = beside
        self._progress = progress
        self._stamp: Stamp | None = None
        self._ordinal = 0
        self._size = 0
        self._now = 0
        self._most = cut.most
        self._epoch = cut.epoch
        self._skip = 0
        self._half = cut.sealed.partial
        self._sent_up_to = 0
        self._stopped: Callable[[], bool] = lambda: False
        handlers: dict[bytes, Callable[[Any], None]] = {
            b"B": self._begin,
            b"C": self._commit,
            b"R": self._relation,
            b"I": self._insert,
            b"U": self._update,
            b"D": self._delete,
            b"T": self._truncate,
            b"M": self._message,
        }
        self._handlers = {kind[0]: (pgoutput.PARSERS[kind[0]], handler) for kind, handler in handlers.items()}

    def run(self, stopped: Callable[[], bool]) -> None:
        """Capture until `stopped`; then what is whole is sealed, and what is not is left to be sent again.

        Raises:
            Transient: `postgres-away`, `kafka-away`, `cut-lost`, `reread-not-visible`: start again from the newest checkpoint.
            Misconfigured: `row-too-large`, `key-changed`, `slot-lost`, `partial-missing`.
            Poison: `bad-message`, `bad-value`.
        """
        self._stopped = stopped
        with suppress(Stopped):  # amid a TRUNCATE, or a table that is read again: its cuts so far are in the log
            self._read_on()
        if not self._between_transactions:
            if not self._writer.broke():  # else the session looks first what that takes away
                self._writer.abort()
        elif self._cut.open:
            self._seal()

    def _read_on(self) -> None:
        read, take = self._replication.read, self._take
        while not self._stopped():
            self._progress.beat()
            self._now = self._progress.now_ms()
            for message in read():
                take(message)
            if self._replication.drained:
                self._idle()
                continue
            self._look_at_clock()
            if self._between_transactions:
                self._beside.look()

    @property
    def _between_transactions(self) -> bool:
        return self._stamp is None and self._half is None

    def _idle(self) -> None:
        """Nothing more to read: seal what there is (amid a transaction: what is old), else confirm keepalives by empty cuts, else wait."""
        wait = _IDLE_SECONDS
        if self._between_transactions:
            self._beside.look()
            if self._cut.open:
                if self._writer.open_records >= _MANY and self._cut.age < _REST_SECONDS:
                    time.sleep(_NAP_SECONDS)
                else:
                    self._seal()
                return
            wait = min(wait, self._cut.until_empty_cut(self._sent_up_to))
            if not wait:
                self._cut.seal_empty(self._sent_up_to)
                self._sealed()
                return
        else:
            self._look_at_clock()
        self._replication.alive()
        self._replication.wait(wait)

    def _take(self, data: bytes) -> None:
        try:
            parse, handle = self._handlers[data[_KIND] if data[0] == _DATA else 0]
            message = parse(data)
        except _MALFORMED:
            self._take_other(data)
        else:
            self._size = len(data)
            handle(message)
            writer = self._writer
            if writer.open_records >= self._most or writer.open_bytes >= FULL_BYTES:
                self._seal_here()

    def _take_other(self, data: bytes) -> None:
        """Take what is not a change: a keepalive, or a message that says nothing that is needed (a type, an origin); refuse the rest."""
        try:
            frame = pgoutput.unframe(data)
            if isinstance(frame, Keepalive):
                self._keepalive(frame)
            else:
                pgoutput.parse(frame)
        except pgoutput.DecodeError as error:
            raise Poison(
                "bad-message",
                f"After {format_lsn(self._cut.sealed.version.lsn)} the stream has {error}.",
                "Report this as a defect.",
            ) from error

    def _keepalive(self, keepalive: Keepalive) -> None:
        # Inside a transaction, or with one half in the log, its end is still to come: only then may this LSN be confirmed.
        if self._between_transactions:
            self._sent_up_to = keepalive.wal_end
        elif self._half and self._stamp is None and keepalive.wal_end > self._half[0]:
            raise self._half_is_missing(keepalive.wal_end)
        if keepalive.reply:
            self._replication.tell()

    def _begin(self, begin: Begin) -> None:
        half = self._half
        if half and begin.commit_lsn != half[0]:  # nothing lies between the checkpoint and the half one
            raise self._half_is_missing(begin.commit_lsn)
        commit_lsn, commit_ts, xid = begin
        self._stamp = Stamp(Version(self._epoch, commit_lsn), xid, (commit_ts, self._now))
        self._ordinal = 0
        self._skip = half[1] if half else 0

    def _half_is_missing(self, lsn: int) -> Misconfigured:
        assert self._half is not None
        return Misconfigured(
            "partial-missing",
            f"The log holds half of the transaction committed at {format_lsn(self._half[0])}; "
            f"Postgres goes on at {format_lsn(lsn)} without it.",
            MEND,
        )

    def _commit(self, commit: Commit) -> None:
        stamp = self._open_stamp
        self._cut.whole = Whole(commit.end_lsn, commit.commit_ts, stamp.xid)
        if self._half and stamp.lsn == self._half[0]:
            self._half = None
        self._stamp = None

    def _message(self, message: Message) -> None:
        if self._stamp is not None:
            self._beside.heard(message, self._stamp.lsn, self._seal_message)

    def _seal_message(self) -> None:
        """Commit all that came before the message that is at hand, or was written for it so far; go no further when asked to stop."""
        if self._writer.opened_at:
            self._seal_here()
        check(self._stopped)

    def _relation(self, relation: Relation) -> None:
        self._tick()  # the catalogue is asked, and one bunch may bring as many of these as there are tables
        before = self._tables.get(relation.oid)
        table = self._relations.take(relation, self._open_stamp.lsn, self._ordinal)
        if table is not None and (before is None or (before.shape, before.wide) != (table.shape, table.wide)):
            self._filler.memory.forget_table(table)  # what is remembered goes by the places of columns

    def _insert(self, insert: Insert) -> None:
        oid, new = insert
        self._ordinal += 1
        table = self._tables[oid]
        if table is None:
            return
        key = table.key(new) if table.key_at else position_key(self._open_stamp.lsn, self._ordinal)
        if table.wide:
            self._filler.memory.changed(table, key, key, new, self._size)
        if self._ordinal > self._skip:
            try:
                row = table.row(new)
            except Poison:
                if UNCHANGED not in new:
                    raise
                # An update that moved the row into the row filter: it leaves out what it left alone.
                if found := self._whole(table, (key, key), new):
                    self._put(table, key, CREATE, *found)
            else:
                self._put(table, key, CREATE, row)

    def _update(self, update: Update) -> None:
        oid, old, _, new = update
        self._ordinal += 1
        table = self._tables[oid]
        if table is None:
            return
        # `wide` is of now, the change perhaps of before, and a value that is out of line stays so under SET STORAGE PLAIN.
        if UNCHANGED in new or (table.wide and self._ordinal <= self._skip):
            self._update_of_wide(table, update)
            return
        key = before = table.key(new)
        if old is not None and not table.same_key(old, new):
            before = table.key(old)
        if table.wide:
            self._filler.memory.changed(table, before, key, new, self._size)
        if self._ordinal > self._skip:
            self._put_update(table, before, key, table.row(new))

    def _update_of_wide(self, table: Table, update: Update) -> None:
        """Take an update that left large values alone, or one that is in the log already and tells them to later ones."""
        new = with_old(table, update)
        key = table.key(new)
        before = key if update.old is None else table.key(update.old)
        if self._ordinal <= self._skip:
            self._filler.memory.skipped(table, before, key, new)
            return
        if found := self._whole(table, (before, key), new):
            self._put_update(table, before, key, *found)
        elif before != key:
            self._put_delete(table, before)
        self._look_at_clock()

    def _whole(self, table: Table, keys: tuple[bytes, bytes], new: Datums) -> tuple[bytes, bytes | None] | None:
        """Return the row filled up, and how it was read; None where a value is nowhere: then the table is to be read again."""
        try:
            row, read = self._filler.fill(table, keys, new, self._open_stamp.xid, self._seal_partial)
        except Nowhere as error:
            for key in keys:
                self._filler.memory.forget(table, key)
            self._beside.left_out(table.name, str(error))
            return None
        self._filler.memory.changed(table, *keys, row, WORTH_REMEMBERING, read)
        return table.row_of_any(row), read

    def _put_update(self, table: Table, before: bytes, key: bytes, row: bytes, read: bytes | None = None) -> None:
        if before == key:
            self._put(table, key, UPDATE, row, read)
        else:
            self._put_delete(table, before)
            self._put(table, key, CREATE, row, read)

    def _delete(self, delete: Delete) -> None:
        self._ordinal += 1
        table = self._tables[delete.oid]
        if table is None:
            return
        key = table.key(delete.old)
        self._filler.memory.forget(table, key)
        if self._ordinal > self._skip:
            self._put_delete(table, key)

    def _truncate(self, truncate: Truncate) -> None:
        """Delete every live key of each table; the log itself is the list of them (S11). All have one ordinal."""
        self._relations.truncated(self._ordinal)
        self._ordinal += 1
        tables = [table for table in map(self._tables.get, truncate.oids) if table is not None]
        for table in tables:
            self._filler.memory.forget_table(table)
        if self._ordinal <= self._skip:
            return
        for table in tables:
            ends = self._seal_partial()
            with LiveKeys(self._log, table.name) as live:
                live.catch_up(ends.get(table.topic, []), self._tick, partial(check, self._stopped))
                for key in live.each(self._tick):
                    self._put_delete(table, key)
                    if self._cut.full or self._cut.age >= LONGEST_SECONDS:
                        self._seal_partial()
                        self._tick()

    @property
    def _open_stamp(self) -> Stamp:
        if self._stamp is None:
            raise Poison("bad-message", "A change came outside of a transaction.", "Report this as a defect.")
        return self._stamp

    def _put(self, table: Table, key: bytes, op: bytes, row: bytes, read: bytes | None = None) -> None:
        stamp = self._stamp or self._open_stamp
        value, headers = stamp.record(table, self._ordinal, op, row, read)
        self._writer.produce(table.topic, key, value, headers)

    def _put_delete(self, table: Table, key: bytes) -> None:
        """Write the delete and its tombstone, next to each other in one cut (I4)."""
        self._put(table, key, DELETE, NULL)
        self._writer.produce(table.topic, key, None, self._open_stamp.headers(table, self._ordinal))

    def _look_at_clock(self) -> None:
        """End a cut that is too old: sooner between transactions than inside one."""
        if self._cut.age >= (LONGEST_SECONDS if self._stamp else self._cut.longest):
            self._seal_here()

    def _seal_here(self) -> None:
        """End the cut after the last message, which may be inside a transaction (S5)."""
        if self._between_transactions:
            self._seal()
            self._beside.look()
        elif self._stamp is not None:
            self._seal((self._stamp.lsn, max(self._ordinal, self._skip)))  # what is skipped is in the log

    def _seal_partial(self) -> dict[str, list[int]]:
        """Commit all that came before the change that is at hand; return where the log ends by then."""
        if self._writer.opened_at:
            self._seal((self._open_stamp.lsn, self._ordinal - 1))
        return self._cut.sealed.ends

    def _seal(self, partial: tuple[int, int] | None = None) -> None:
        self._beside.note()
        self._cut.seal(partial)
        self._sealed()

    def _sealed(self) -> None:
        self._progress.changes = self._writer.records
        self._replication.confirm(self._cut.sealed.version.lsn)

    def _tick(self) -> None:
        check(self._stopped)
        self._progress.beat()
        self._replication.alive()
