"""Chunks: some rows of a table in key order, read beside the stream between two watermarks; of an append-only table all rows at once (S10).

One thread with a connection of its own does it, so that a read that takes long never holds up the stream: low watermark, the rows in one
snapshot, high watermark. The table is locked (ACCESS SHARE, as every SELECT does) *before* the snapshot is taken: a table that is written
anew by DDL would look empty to an older snapshot. The high watermark is of the reading transaction itself, so that the lock is held up to
it: a TRUNCATE in between would delete only what the log has by then, and what was read would come after it. The values are the stream's
text, for the same converters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from headrace.errors import Misconfigured
from headrace.settings import Settings
from headrace_capture import append_only, catalog, fingerprints, watermarks
from headrace_capture.fingerprints import Fingerprint
from headrace_capture.jobs import JOINED, Job
from headrace_capture.operators import operators
from headrace_capture.published import row_filters
from headrace_capture.replication import Stopped, postgres_errors
from headrace_capture.spool import Spool
from headrace_capture.tables import copy_fields

MOST_BYTES = 8 * 1024 * 1024
"""A chunk ends with the row that reaches this many bytes (I10)."""
_CLOSE_SECONDS = 5.0
_CANCEL_SECONDS = 0.2
_LOCK_SECONDS = 1.0
"""A table that is locked for longer is tried again later, for others wait to be read."""
_LOCK = sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE")
_BEGIN = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"


class Ask(NamedTuple):
    """What to read: the rows of `table` after the key `after`, at most `most`; or the row of one `key`, texts by column.

    `leaves` are the table's that are known (see `fingerprints.read`). Before all that `floor` sees is over (`_over`), nothing is read.
    `appended`: the log has the table as append-only. `again`: it could not be read the last time.
    """

    mark: str
    table: str
    after: Sequence[str]
    key: dict[str, str] | None
    most: int
    leaves: frozenset[int]
    floor: str
    appended: bool
    again: bool


class Chunk(NamedTuple):
    """What was read.

    Attributes:
        snapshot: `pg_current_snapshot()` of the read.
        floor: What had to be covered; for `JOINED` what that came to.
        covered: Whether it was, before the low watermark; if not, nothing was read. `JOINED` never is (`_over`).
        exists: Whether there is such a table at all.
        table: As the catalogue has it; None when it is gone, is not published any more, or has no key and is not append-only.
        print: Its fingerprint, None when it is not published.
        rows: The published columns of each row.
        last: Whether the table has no more rows after these.
        hidden: Why its key is not all sent, if that is why there is no table, and what to do.
        wanted: The values of the key that was asked for, in the key's order, as Postgres writes them.
        spool: All rows of an append-only table; whoever takes the chunk closes it.
    """

    snapshot: str
    floor: str
    covered: bool
    exists: bool
    table: catalog.Table | None
    print: Fingerprint | None
    rows: list[list[Any]]
    last: bool
    hidden: tuple[str, str] | None = None
    wanted: list[bytes] | None = None
    spool: Spool | None = None

    def close(self) -> None:
        """Remove what is on disk."""
        if self.spool is not None:
            self.spool.close()


@dataclass(slots=True)
class Reading:
    """The chunk that is being read.

    Attributes:
        job: What it is for.
        mark: Of its watermarks.
        future: The chunk.
        known: The table's fingerprint that was known when it began.
        low: The commit LSN of its low watermark, 0 before.
        stale: Whether what it is for has changed meanwhile.
    """

    job: Job
    mark: str
    future: Future[Chunk]
    known: Fingerprint | None
    low: int = 0
    stale: bool = False


class ChunkReader:
    """Reads chunks, one at a time, in a thread."""

    def __init__(self, settings: Settings) -> None:
        """Connect to nothing yet."""
        self._settings = settings
        self._connection: catalog.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="resnapshot")
        self._newest: Future[Chunk] | None = None
        self._ended = False

    def begin(self, ask: Ask, before: Callable[[Callable[[], None]], None]) -> Future[Chunk]:
        """Begin to read, in the thread; `before` is done there first, and gets what to call now and then.

        The future's errors are ours: Transient (`table-locked`, `postgres-away`, …), Misconfigured (`postgres-rights`, …); or Stopped.
        """
        self._newest = self._thread.submit(self._run, ask, before)
        return self._newest

    def close(self) -> None:
        """End; what waits is cancelled, and what is asked after it too: whether each of several new partitions is empty."""
        self._ended = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        newest, until = self._newest, time.monotonic() + _CLOSE_SECONDS
        while newest is not None and not newest.done() and time.monotonic() < until:
            self._cancel()
            wait([newest], timeout=_CANCEL_SECONDS)
        if newest is None or newest.done():
            self._disconnect()

    def _cancel(self) -> None:
        connection = self._connection
        if connection is not None:
            with suppress(psycopg.Error):
                connection.cancel_safe(timeout=2.0)

    def _run(self, ask: Ask, before: Callable[[Callable[[], None]], None]) -> Chunk:
        try:
            if ask.floor != JOINED and (not ask.again or self._can_go_on(ask)):  # for JOINED no row is read yet
                before(self._check)
            with postgres_errors(f"reading {ask.table} again"):
                connection = self._connected()
                over = _over(connection, ask.floor)
                watermarks.emit(connection, watermarks.LOW, ask.mark)
                connection.execute(_BEGIN)
                chunk = self._chunk(connection, ask, covered=over)
                watermarks.emit(connection, watermarks.HIGH, ask.mark)
                connection.execute("COMMIT")
                return chunk
        except BaseException:
            self._disconnect()
            raise
        finally:
            if self._ended:
                self._disconnect()

    def _check(self) -> None:
        if self._ended:
            raise Stopped

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self) -> catalog.Connection:
        if self._connection is None:
            dsn, name = self._settings.dsn, "headrace resnapshot"
            self._connection = catalog.connect(dsn, name=name, timeout_s=0, lock_s=_LOCK_SECONDS)
            self._connection.execute("SET synchronous_commit = local")
        return self._connection

    def _can_go_on(self, ask: Ask) -> bool:
        """Whether a table that had to wait need not any more; before, nothing of what the log has of it is read back."""
        with postgres_errors(f"reading {ask.table} again"):
            connection = self._connected()
            connection.execute(_BEGIN)
            try:
                connection.execute(_LOCK.format(sql.Identifier(*ask.table.split(".", 1))))
                return _over(connection, ask.floor)
            except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
                return True
            finally:
                connection.execute("ROLLBACK")

    def _chunk(self, connection: catalog.Connection, ask: Ask, *, covered: bool) -> Chunk:
        name = sql.Identifier(*ask.table.split(".", 1))
        try:
            connection.execute(_LOCK.format(name))
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            connection.execute("ROLLBACK")
            connection.execute(_BEGIN)
            none = _nothing(connection, ask, covered=covered, exists=False)
            gone = connection.execute("SELECT to_regclass(%s) IS NULL", [name.as_string()]).fetchone() == (True,)
            return none if gone else none._replace(covered=False)  # it was made anew: its rows may be in the log
        return self._locked(connection, ask, covered=covered)

    def _locked(self, connection: catalog.Connection, ask: Ask, *, covered: bool) -> Chunk:
        publication = self._settings.publication
        none = _nothing(connection, ask, covered=covered, exists=True)
        none = none._replace(print=fingerprints.read(connection, publication, ask.leaves, ask.table).get(ask.table))
        self._check()  # what was cancelled may have been a question whether a partition is empty
        if not none.covered:
            return none
        table = next(iter(catalog.published_tables(connection, publication, only=ask.table)), None)
        if table is not None and not table.key and (ask.appended or _is_named(connection, publication, ask.table)):
            return none._replace(table=table, spool=self._spooled(connection, table, ask))
        if table is None or not table.key:
            return none._replace(hidden=table.hidden() if table and table.unsent else None)
        if ask.after and len(ask.after) != len(table.key):  # changed in the middle of the pass: the fingerprint tells
            return none._replace(covered=False)
        wanted = _wanted(connection, table, ask.key) if ask.key is not None else None
        rows, last = _rows(connection, _query(connection, publication, table, ask, wanted), ask.most)
        return none._replace(table=table, rows=rows, last=last, wanted=wanted)

    def _spooled(self, connection: catalog.Connection, table: catalog.Table, ask: Ask) -> Spool:
        """Copy all rows of an append-only table to disk."""
        append_only.check(table)
        if ask.key is not None:
            raise Misconfigured("bad-key", f"{ask.table} is append-only: its rows have no key.", "Leave --key out.")
        query = sql.SQL("COPY ({}) TO STDOUT").format(_select(connection, self._settings.publication, table))
        spool = Spool()
        try:
            with connection.cursor().copy(query) as copy:
                for line in copy:
                    spool.add(bytes(line))
            spool.end()
        except BaseException:
            spool.close()
            raise
        return spool


def _is_named(connection: catalog.Connection, publication: str, table: str) -> bool:
    return table in append_only.named(connection, publication)


def _over(connection: catalog.Connection, floor: str) -> bool:
    """Whether all that `floor` sees is over by now. Asked before the low watermark: what commits later counts as newer than what is read.

    What `JOINED` comes to is known only once the fingerprint was read: until then the catalogue may change beside whoever writes.
    """
    return floor != JOINED and (not floor or watermarks.covers(_snapshot(connection), floor))


def _snapshot(connection: catalog.Connection) -> str:
    row = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
    assert row is not None
    return str(row[0])


def _nothing(connection: catalog.Connection, ask: Ask, *, covered: bool, exists: bool) -> Chunk:
    """Return the chunk of the transaction's snapshot, without rows."""
    snapshot = _snapshot(connection)
    floor = watermarks.settled(snapshot) if ask.floor == JOINED else ask.floor
    return Chunk(snapshot, floor, covered, exists, None, None, [], last=True)


def _rows(connection: catalog.Connection, query: sql.Composed, most: int) -> tuple[list[list[Any]], bool]:
    """Return rows up to so many or so many bytes, and whether there are no more.

    A COPY that is not read to its end is cancelled, which it is only by an exception; the savepoint keeps the transaction whole.
    """
    rows: list[list[Any]] = []
    size = 0
    with connection.transaction(), connection.cursor().copy(query) as copy:
        for line in copy:
            rows.append(copy_fields(bytes(line)[:-1]))
            size += len(line)
            if size > MOST_BYTES:
                raise psycopg.Rollback
    return rows, size <= MOST_BYTES and len(rows) < most


def _query(
    connection: catalog.Connection, publication: str, table: catalog.Table, ask: Ask, wanted: list[bytes] | None = None
) -> sql.Composed:
    """Return the COPY of the rows that are asked for, in the key's order; of one key by the values that are `wanted`.

    What is not found is deleted from the log as that: a domain may have made other values of those that were given.
    """
    keys = sql.SQL(", ").join(map(sql.Identifier, table.key))
    if wanted is not None:
        where = _compared(connection, table, [value.decode() for value in wanted], "=")
    elif ask.after:
        where = _compared(connection, table, ask.after, ">")
    else:
        where = sql.SQL("true").format()
    rows = _select(connection, publication, table)
    return sql.SQL("COPY ({} AND {} ORDER BY {} LIMIT {}) TO STDOUT").format(rows, where, keys, sql.Literal(ask.most))


def _compared(connection: catalog.Connection, table: catalog.Table, texts: Sequence[str], how: str) -> sql.Composed:
    """Return the comparison of the key with these values, by the operators of the order that ORDER BY takes.

    A bare one of an extension's type is looked for where our search_path has none: it would be that of text (citext), or missing. The
    values have no domain's type: its collation would be at odds with one that the column has of its own. Nor has the column: the
    operators of enums take no domain.
    """
    by_name = {column.name: column for column in table.columns}
    key = [by_name[name] for name in table.key]
    operands = [
        sql.SQL("{}::{}").format(sql.Identifier(column.name), _plain(column))
        if column.below
        else sql.Identifier(column.name)
        for column in key
    ]
    values = [
        sql.SQL("{}::{}").format(sql.Literal(text), _plain(column)) for text, column in zip(texts, key, strict=True)
    ]
    signs = operators(connection, [column.base for column in key])
    if all(schema == "pg_catalog" for each in signs for schema, _ in each.values()):
        keys = sql.SQL(", ").join(operands)
        return sql.SQL("({}) {} ({})").format(keys, sql.SQL(how), sql.SQL(", ").join(values))
    columns = list(zip(operands, values, signs, strict=True))

    def one(place: int, sign: str) -> sql.Composed:
        operand, value, named = columns[place]
        operator = sql.SQL("OPERATOR({}.{})").format(sql.Identifier(named[sign][0]), sql.SQL(named[sign][1]))
        return sql.SQL("{} {} {}").format(operand, operator, value)

    if how == "=":
        return sql.SQL(" AND ").join(one(place, "=") for place in range(len(columns)))
    beyond = one(len(columns) - 1, ">")
    for place in reversed(range(len(columns) - 1)):
        beyond = sql.SQL("({} AND ({} OR {}))").format(one(place, ">="), one(place, ">"), beyond)
    return beyond


def _select(connection: catalog.Connection, publication: str, table: catalog.Table) -> sql.Composed:
    """Return the SELECT of what the stream would send: its columns, its row filter, an ordinary table's own rows."""
    columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.published)
    source = table.identifier if table.kind == "p" else sql.SQL("ONLY {}").format(table.identifier)
    only = sql.SQL(row_filters(connection, publication, table.oid).get(table.oid, "true"))
    return sql.SQL("SELECT {} FROM {} WHERE ({})").format(columns, source, only)


def _plain(column: catalog.TableColumn) -> sql.Composable:
    """Return a column's type, or what is below its domain."""
    if not column.below:
        return sql.SQL(column.type)
    return sql.SQL(column.base) if "." in column.base else sql.Identifier("pg_catalog", column.base)


def _wanted(connection: catalog.Connection, table: catalog.Table, key: dict[str, str]) -> list[bytes]:
    """Return a key's values as Postgres writes them."""
    if key.keys() != set(table.key):
        raise Misconfigured(
            "bad-key",
            f"The key of {table.full_name} is ({', '.join(table.key)}), not ({', '.join(key)}).",
            "See --key.",
        )
    types = {column.name: column.type for column in table.columns}
    values = [sql.SQL("{}::{}").format(sql.Literal(key[name]), sql.SQL(types[name])) for name in table.key]
    query = sql.SQL("COPY (SELECT {}) TO STDOUT").format(sql.SQL(", ").join(values))
    with connection.cursor().copy(query) as copy:
        (line,) = list(copy)
    return copy_fields(bytes(line)[:-1])
