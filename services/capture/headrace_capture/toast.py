"""Whole rows: the values that an update left alone and Postgres therefore did not send (I3, S7).

Where such a value comes from, in this order:

1. the old row, where REPLICA IDENTITY FULL sends it;
2. *memory*: the key's newest row in the stream, of this transaction or an earlier one, if its large values are still remembered;
   the log holds the same. A bounded number of bytes is kept, the least recently seen key is forgotten first (I10), and all of a table
   when it comes in another shape;
3. Postgres, read again in a statement of its own, believed only if that statement's snapshot sees the change's transaction. It may show
   a later value, which the stream brings as well: the record is marked ``read=reread``, the table is approximate until then. One of a
   type that is another by now is no value of this record's schema version. It is remembered with its mark;
4. the log: when the row is gone by now or has another key or type, its delete is still to come, or that it is read again, and the key's
   newest record is exactly the row before this change, or has a value of another type, which is none either. The open cut is sealed
   first, so that the log has all that came before. So too when the table is locked, for the stream waits for nobody; but not while it
   is to be read again, as then the log may have an older value than Postgres.

What has no mark is exact. No placeholder is ever written: a change whose value is nowhere (the topic lacks the row, as it
is just being read for the first time) is left out, and the table is read again.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from psycopg import errors, sql

from headrace.change import Snapshot, TableSchema, parse_lsn
from headrace.errors import Transient
from headrace.log import Log
from headrace_capture import catalog
from headrace_capture.fingerprints import widened
from headrace_capture.live import LiveKeys
from headrace_capture.operators import operators
from headrace_capture.pgoutput import UNCHANGED, Datum, Datums, Update
from headrace_capture.replication import postgres_errors
from headrace_capture.tables import REREAD, Json, Table

REMEMBERED_BYTES = 64 * 1024 * 1024
WORTH_REMEMBERING = 1_000
"""Postgres moves values out of line in rows above about 2 000 bytes; in their text they may be shorter."""
_REREAD_SECONDS = 5.0
_LOCKED_SECONDS = 5.0
"""For so long a table that was locked is not asked again: each time costs what the connection waits for a lock."""


class Nowhere(Exception):
    """A value cannot be had any more. The row is gone by now, or the table is locked or has another shape, and its topic lacks rows: it
    must be read again; until then this change is left out, for no placeholder is ever written (I3)."""


class _Locked(Exception):
    """A transaction of the application holds the table."""


Row = tuple[Datums, bytes | None]
"""The values, and how they were read if not from the stream."""


class Memory:
    """The newest rows with large values, by table and key, up to a number of bytes."""

    def __init__(self, most: int = REMEMBERED_BYTES) -> None:
        """Remember nothing yet, and never more than about `most` bytes."""
        self._most = most
        self._bytes = 0
        self._rows: OrderedDict[tuple[str, bytes], tuple[int, list[Datum], bytes | None]] = OrderedDict()

    def changed(
        self, table: Table, before: bytes, key: bytes, row: Datums, size: int, read: bytes | None = None
    ) -> None:
        """Keep the wide values of a row's newest state, unless they are small or from the log; forget those of its last one.

        Args:
            table: The row's table.
            before: Its key until now.
            key: Its key from now on.
            row: The whole row.
            size: About the bytes that came for it: nothing of a smaller message is worth remembering.
            read: How it was read if not from the stream: so is what is taken from it.
        """
        if self._rows:
            self.forget(table, before)
            self.forget(table, key)
        if size >= WORTH_REMEMBERING:
            self._remember(table, key, row, read)

    def _remember(self, table: Table, key: bytes, row: Datums, read: bytes | None) -> None:
        wide = [row[at] for at in table.wide]
        size = sum(len(value) for value in wide if isinstance(value, bytes))
        if size < WORTH_REMEMBERING or any(isinstance(value, Json) for value in wide):
            return
        self._rows[table.name, key] = (size, wide, read)
        self._bytes += size
        while self._bytes > self._most:
            self._bytes -= self._rows.popitem(last=False)[1][0]

    def forget(self, table: Table, key: bytes) -> None:
        """Forget a key: it is gone, or has a newer row."""
        if self._rows:
            self._bytes -= self._rows.pop((table.name, key), (0,))[0]

    def forget_table(self, table: Table) -> None:
        """Forget all of a table's keys: it was truncated, or has another shape."""
        self.forget_named(table.name)

    def forget_named(self, table: str) -> None:
        """The same, by ``schema.table``."""
        for name, key in [place for place in self._rows if place[0] == table]:
            self._bytes -= self._rows.pop((name, key))[0]

    def recall(self, table: Table, key: bytes, row: list[Datum]) -> bytes | None:
        """Fill what is missing in `row` from the key's newest row, if it is remembered: then with the columns of now.

        Return how that was read if not from the stream.
        """
        found, read = self._rows.get((table.name, key)), None
        if found is None:
            return None
        self._rows.move_to_end((table.name, key))
        for at, value in zip(table.wide, found[1], strict=True):
            if row[at] is UNCHANGED:
                row[at], read = value, found[2]
        return read

    def skipped(self, table: Table, before: bytes, key: bytes, row: list[Datum]) -> None:
        """Let an update that is in the log already tell, as `changed`, what a later one leaves alone."""
        self.recall(table, before, row)
        if UNCHANGED in row:
            self.forget(table, before)
        else:
            self.changed(table, before, key, row, WORTH_REMEMBERING)


def with_old(table: Table, update: Update) -> list[Datum]:
    """Return the new row with what the old one has of it: all of it under FULL, else the key, which may be out of line, too."""
    old, new = update.old, list(update.new)
    if old is not None:
        for at in range(len(new)) if update.whole else table.key_at:
            if new[at] is UNCHANGED:
                new[at] = old[at]
    return new


class _Read(NamedTuple):
    """What one statement saw: its snapshot, the row of a key if there is one, and an LSN that has all that the snapshot sees."""

    snapshot: str
    lsn: int
    row: list[Datum] | None


class Filler:
    """Fills updated rows up. One for each stream.

    Attributes:
        doubted: Whether what the log has of a table may not be what Postgres has.
    """

    def __init__(
        self,
        log: Log,
        connection: catalog.Connection,
        versions: Mapping[tuple[str, int], TableSchema],
        approximate: dict[str, int],
        tick: Callable[[], None],
        idle: Callable[[], None],
    ) -> None:
        """Read again by `connection`; `versions` are the schema versions of all tables; for `tick` and `idle` see `LiveKeys.catch_up`.

        `approximate` is told up to which LSN a table's values were read again: they may be of a later moment than their rows (S7).
        """
        self.memory = Memory()
        self._approximate = approximate
        self.doubted: Callable[[str], bool] = lambda _table: True
        self._log = log
        self._connection = connection
        self._versions = versions
        self._tick = tick
        self._idle = idle
        self._live: dict[str, LiveKeys] = {}
        self._locked_until: dict[str, float] = {}
        self._operators: dict[str, str] = {}

    def fill(
        self,
        table: Table,
        keys: tuple[bytes, bytes],
        row: Datums,
        xid: int,
        seal: Callable[[], dict[str, list[int]]],
    ) -> Row:
        """Return the whole row.

        Args:
            table: The table.
            keys: The key before the change, and after it.
            row: The new row, with what the old one has of it.
            xid: The change's transaction.
            seal: Commits what the log has been given before this change; returns where its topics end by then.

        Raises:
            Transient: `reread-not-visible`.
            Nowhere: a value is in none of them.
        """
        whole = list(row)
        read = self.memory.recall(table, keys[0], whole)
        if UNCHANGED not in whole:
            return whole, read
        try:
            again = self._reread(table, whole, xid)
        except _Locked as error:
            if self.doubted(table.name):
                raise Nowhere(f"a value of {table.name} was not in the stream, and the table is locked") from error
            again = None
        if again is not None:
            return [then if value is UNCHANGED else value for value, then in zip(whole, again, strict=True)], REREAD
        taken, marked = self._from_log(table, keys[0], whole, seal().get(table.topic, []))
        return taken, read or marked

    def close(self) -> None:
        """Remove the files of live keys."""
        for live in self._live.values():
            live.close()

    def _reread(self, table: Table, row: list[Datum], xid: int) -> list[Datum] | None:
        """Return the row as Postgres shows it to a snapshot that sees `xid`, None if it has none of that key or shape.

        Raises:
            _Locked: the table is locked, or was a moment ago.
            Transient: `reread-not-visible`, `postgres-away`.
        """
        if time.monotonic() < self._locked_until.get(table.name, 0.0):
            raise _Locked
        deadline = time.monotonic() + _REREAD_SECONDS
        while True:
            self._tick()
            late = time.monotonic() > deadline
            try:
                read = self._read(table, row)
            except _Locked:
                if late or not self.doubted(table.name):
                    self._locked_until[table.name] = time.monotonic() + _LOCKED_SECONDS
                    raise
                continue
            if read is None or Snapshot.parsed(read.snapshot).sees(xid):
                if read and read.row:
                    self._approximate[table.name] = read.lsn
                return read and read.row
            if late:
                raise _not_visible(table, xid)
            time.sleep(0.005)

    def _read(self, table: Table, row: list[Datum]) -> _Read | None:
        """Return what one statement sees, and the row of that key in it; None if the table is gone or has another shape. Raises Nowhere."""
        with postgres_errors(f"reading a row of {table.name} again"):
            try:
                result = self._connection.execute(_reread_query(table, row, self._schemas(table))).pgresult
            except _INCOMPARABLE:
                self._check_undoubted(table)
                return None
            except errors.LockNotAvailable as error:
                raise _Locked from error
        assert result is not None
        snapshot, lsn, same = ((result.get_value(0, at) or b"").decode() for at in range(3))
        if same == "f":
            self._check_undoubted(table)
            return None
        found: list[Datum] = [result.get_value(0, at + 3) for at in range(len(row))]
        return _Read(snapshot, parse_lsn(lsn), found if same else None)

    def _schemas(self, table: Table) -> list[str]:
        """Return where the operators of the key's columns are; those built in must do where we may not look at a type's schema."""
        columns = [table.columns[at].column for at in table.key_at]
        types = [column.base or column.type for column in columns]
        new = [type_ for type_ in types if type_ not in self._operators]
        if new:
            try:
                found = [signs["="][0] for signs in operators(self._connection, new)]
            except errors.InsufficientPrivilege:
                found = ["pg_catalog"] * len(new)
            self._operators |= zip(new, found, strict=True)
        return [self._operators[type_] for type_ in types]

    def _check_undoubted(self, table: Table) -> None:
        """Refuse to take from the log what may be older than in Postgres, where the table has another shape. Raises Nowhere."""
        if self.doubted(table.name):
            raise Nowhere(f"a value of {table.name} was not in the stream, and its table has another shape by now")

    def _from_log(self, table: Table, key: bytes, row: list[Datum], ends: list[int]) -> Row:
        if table.name not in self._live:
            self._live[table.name] = LiveKeys(self._log, table.name)
        self._live[table.name].catch_up(ends, self._tick, self._idle)
        found = self._live[table.name].newest(key)
        headers = dict(found.headers) if found else {}
        version = int(headers.get("schema", 0))
        known = self._log.values.members(found.value, table.name, version) if found and found.value else {}
        shape = self._versions.get((table.name, version))
        types = {column.name: column.type for column in shape.columns} if shape else {}
        for at, plan in enumerate(table.columns):
            if row[at] is UNCHANGED:
                name, type_ = plan.column.name, plan.column.type
                if name not in known or not widened(types.get(name, ""), type_):
                    raise Nowhere(
                        f"column {name} of {table.name} was neither in the stream nor in Postgres, nor in the log as {type_}"
                    )
                row[at] = Json(known[name])
        return row, REREAD if headers.get("read") == REREAD else None


def _not_visible(table: Table, xid: int) -> Transient:
    return Transient(
        "reread-not-visible",
        f"A change of {table.name} by transaction {xid} is in the stream but not yet visible: its commit waits, for a standby perhaps.",
        "See synchronous_standby_names; capture tries again.",
    )


_INCOMPARABLE = (
    errors.UndefinedTable,
    errors.UndefinedColumn,
    errors.UndefinedFunction,
    errors.DataError,
    errors.FeatureNotSupported,
)
"""The key's text may be none of its column's type by now; one of a composite type is compared with nothing."""


def _reread_query(table: Table, row: list[Datum], operators: list[str]) -> sql.Composed:
    """Return the statement: a row, and whether its key and what is missing have the types that they had in the stream.

    `operators`: the schemas of those that compare the key. Rows of partitions are the table's own, those of other tables that inherit from
    it are not. Its values are literals: beside parameters a % in a name would be one.
    """
    schema, _, name = table.name.partition(".")
    columns = [sql.Identifier(plan.column.name) for plan in table.columns]
    key = [(columns[at], sql.Literal(row[at].decode())) for at in table.key_at]  # type: ignore[union-attr]
    own = sql.SQL("(r.tableoid = {}::regclass OR (SELECT relispartition FROM pg_class WHERE oid = r.tableoid))").format(
        sql.Literal(sql.Identifier(schema, name).as_string())
    )
    equal = [sql.SQL("OPERATOR({}.=)").format(sql.Identifier(schema)) for schema in operators]
    same_key = [sql.SQL("{} {} {}").format(name, how, value) for (name, value), how in zip(key, equal, strict=True)]
    where = sql.SQL(" AND ").join([*same_key, own])
    asked = {*table.key_at, *(at for at, value in enumerate(row) if value is UNCHANGED)}
    plans = [table.columns[at] for at in sorted(asked)]
    types = [sql.SQL("({}, {}, {})").format(plan.column.name, *plan.sent) for plan in plans]
    same = sql.SQL(
        "(SELECT count(*) = {} FROM pg_attribute a WHERE a.attrelid = r.tableoid AND (a.attname, a.atttypid, a.atttypmod) IN ({}))"
    ).format(len(plans), sql.SQL(", ").join(types))
    return sql.SQL(
        "SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text, t.* "
        "FROM (SELECT) one LEFT JOIN (SELECT {}, {} FROM {} r WHERE {}) t ON true"
    ).format(same, sql.SQL(", ").join(columns), sql.Identifier(schema, name), where)
