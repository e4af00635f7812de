"""The rows of a snapshot: which queries read them, and how they come.

Where the types of a table allow it, Postgres makes each row's JSON itself (`row_to_json` over casts), byte for byte what the
converters of `values` make of the stream: it does so several times as fast. A type is named here only if that holds for each of its
values; a table with a column of any other type comes as text, and goes through the converters. Large tables are cut into ranges of
pages, so that several connections share them.

A query that has to wait for a lock is given up after a while, and tried again on another connection. A connection holds the lock of each
table that it has read to the end of the snapshot. If the application waits for that (ALTER TABLE), every other connection queues behind
the application, and the snapshot, which ends when all is read, would wait for itself for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

import psycopg
from psycopg import pq, sql

from headrace_capture import catalog

PAGES = 4096
"""Pages of a table that are read by one query: 32 MiB."""

_NUMBERS: Final = ("bool", "int2", "int4", "int8", "float4", "float8")
_TIMES: Final = ("date", "time", "timetz", "timestamp", "timestamptz", "interval")
_TEXTS: Final = ("text", "varchar", "uuid")
_OTHERS: Final = ("bpchar", "inet", "cidr", "macaddr", "money", "bit", "varbit")
_CASTS: Final = dict.fromkeys((*_NUMBERS, *_TIMES, *_TEXTS, *_OTHERS), "{}") | {
    "oid": "{}::int8",
    "numeric": "{}::text",
    "bytea": "translate(encode({}, 'base64'), chr(10), '')",
}
_ELEMENTS: Final = dict.fromkeys((*_NUMBERS, *_TIMES, *_TEXTS), "{}") | {"numeric": "{}::text[]"}
_NOT_CANONICAL: Final = frozenset({"float4", "float8"})
"""Types of which two texts are one key: see `values.key_converter`."""

_HEADER: Final = 19
"""Bytes before the first row of a binary COPY: signature, flags, an extension without length."""
_TRAILER: Final = b"\xff\xff"
_FIELD: Final = Struct(">hi").unpack_from
_LOCKED: Final = b"55P03"


class Piece(NamedTuple):
    """A query and the share of all pages that it reads; `native`: each row is (key's JSON, row's JSON) in binary."""

    table: catalog.Table
    query: sql.Composed
    native: bool
    pages: int


class Copy:
    """One query that is being read, without waiting for it.

    Attributes:
        piece: What it reads.
        done: Whether everything of it was taken.
        locked: Whether nothing of it could be read, for it waited for a lock as long as the connection does; it is done then.
    """

    def __init__(self, connection: catalog.Connection, piece: Piece) -> None:
        """Begin. The connection is in the snapshot, and reads nothing else until this is done."""
        self.piece = piece
        self.done = self.locked = self._begun = False
        self._pg = connection.pgconn
        self._after = _HEADER if piece.native else 0
        self._result(self._pg.exec_(b"SAVEPOINT piece"), pq.ExecStatus.COMMAND_OK)
        self._pg.send_query(piece.query.as_bytes(connection))

    @property
    def socket(self) -> int:
        """Return what to wait for when `take` gives nothing."""
        return self._pg.socket

    def take(self, most: int) -> list[bytes]:
        """Return up to `most` rows of those that are there now, each in the form of the piece."""
        rows: list[bytes] = []
        if not self._begun and not self._begin():
            return rows
        get = self._pg.get_copy_data
        while len(rows) < most:
            size, data = get(1)
            if not size:
                self._pg.consume_input()
                size, data = get(1)
            if size < 1:
                if size:
                    self._end()
                break
            rows.append(bytes(data))
        if rows and self._after:
            rows[0], self._after = rows[0][self._after :], 0
        if rows and self.piece.native and rows[-1] == _TRAILER:
            rows.pop()
        return rows

    def _begin(self) -> bool:
        """Return whether rows may come by now."""
        self._pg.flush()
        self._pg.consume_input()
        if self._pg.is_busy():
            return False
        result = self._pg.get_result()
        if result is not None and result.error_field(pq.DiagnosticField.SQLSTATE) == _LOCKED:
            self.locked = True
            self._over(b"ROLLBACK TO SAVEPOINT piece; RELEASE SAVEPOINT piece")
            return False
        self._result(result, pq.ExecStatus.COPY_OUT)
        self._begun = True
        return True

    def _end(self) -> None:
        self._result(self._pg.get_result(), pq.ExecStatus.COMMAND_OK)
        self._over(b"RELEASE SAVEPOINT piece")

    def _over(self, command: bytes) -> None:
        self.done = True
        while self._pg.get_result():
            pass
        self._result(self._pg.exec_(command), pq.ExecStatus.COMMAND_OK)

    def _result(self, result: pq.abc.PGresult | None, wanted: pq.ExecStatus) -> None:
        if result is None or result.status != wanted:
            raise psycopg.errors.error_from_result(result) if result else psycopg.OperationalError("no result")


def pieces(connection: catalog.Connection, table: catalog.Table, only: str | None) -> Iterator[Piece]:
    """Yield the queries whose rows are the table's in the connection's snapshot, each row in one of them.

    Args:
        connection: In a transaction.
        table: As published.
        only: The publication's row filter, in Postgres's own text.
    """
    columns = native(connection, table)
    sizes = _sizes(connection, [leaf.oid for leaf in table.leaves])
    for leaf in table.leaves:
        source = sql.SQL("ONLY {}").format(sql.Identifier(leaf.schema, leaf.name))
        size = sizes.get(leaf.oid) or 0  # none of one that was dropped since
        for first in range(0, max(size, 1), PAGES):
            last = first + PAGES if first + PAGES < size else None
            where = [f"({only})"] if only else []
            where += [f"ctid >= '({first},0)'"] if first else []
            where += [f"ctid < '({last},0)'"] if last else []
            condition = sql.SQL(f" WHERE {' AND '.join(where)}" if where else "")
            rest = source + condition
            query = _native(table, columns, rest) if columns else _text(table, rest)
            yield Piece(table, query, columns is not None, min(PAGES, size - first))


def _sizes(connection: catalog.Connection, oids: list[int]) -> dict[int, int]:
    """Return the pages of each table; while one is locked, as many as they had when they were analyzed last."""
    try:
        with connection.transaction():
            return dict(connection.execute(_SIZES, [oids]).fetchall())
    except psycopg.errors.LockNotAvailable:
        return dict(connection.execute("SELECT oid, relpages FROM pg_class WHERE oid = ANY(%s)", [oids]).fetchall())


def native(connection: catalog.Connection, table: catalog.Table) -> tuple[str, ...] | None:
    """Return an expression for each published column whose JSON in Postgres is the stream's; None if there is none for one of them."""
    if not table.key:
        return None
    oids = [column.oid for column in table.published]
    built_in = [row[0] for row in connection.execute(_BUILT_IN, [oids])]
    found = []
    for column, known in zip(table.published, built_in, strict=True):
        cast = _cast(column) if known else None
        if cast is None or (column.name in table.key and (column.element or column.base in _NOT_CANONICAL)):
            return None
        found.append(cast)
    return tuple(found)


def _cast(column: catalog.TableColumn) -> str | None:
    if column.element:  # a vector counts as an array, and is printed as text
        return _ELEMENTS.get(column.element) if column.base.startswith("_") else None
    return _CASTS.get(column.base)


def fields(data: bytes) -> tuple[bytes, bytes]:
    """Return key and row of one message of a native COPY."""
    _, length = _FIELD(data)
    at = 6 + length
    return data[6:at], data[at + 4 :]


def _text(table: catalog.Table, rest: sql.Composed) -> sql.Composed:
    columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.published)
    return sql.SQL("COPY (SELECT {} FROM {}) TO STDOUT").format(columns, rest)


def _native(table: catalog.Table, casts: tuple[str, ...], rest: sql.Composed) -> sql.Composed:
    made = {
        column.name: sql.SQL(cast).format(sql.Identifier(column.name))
        for column, cast in zip(table.published, casts, strict=True)
    }
    row = sql.SQL(", ").join(sql.SQL("{} AS {}").format(value, sql.Identifier(name)) for name, value in made.items())
    key = sql.SQL(", ").join(sql.SQL("{}").format(sql.Identifier("r", name)) for name in table.key)
    one = sql.SQL("to_json({})") if len(table.key) == 1 else sql.SQL("(SELECT row_to_json(k.*) FROM (SELECT {}) k)")
    return sql.SQL(
        "COPY (SELECT {}::text, row_to_json(r.*)::text FROM (SELECT {} FROM {}) r) TO STDOUT (FORMAT binary)"
    ).format(one.format(key), row, rest)


_SIZES: Final = """
SELECT oid, pg_relation_size(oid) / current_setting('block_size')::int FROM unnest(%s::oid[]) o(oid)
"""

# Below all domains. An extension's type may have a cast to json, which row_to_json would use.
_BUILT_IN: Final = """
WITH RECURSIVE base(oid, below) AS (
  SELECT oid, oid FROM pg_type WHERE typtype <> 'd'
  UNION ALL SELECT t.oid, b.below FROM pg_type t JOIN base b ON t.typtype = 'd' AND t.typbasetype = b.oid
)
SELECT coalesce(t.typnamespace = 'pg_catalog'::regnamespace, false)
FROM unnest(%s::oid[]) WITH ORDINALITY u(oid, place)
LEFT JOIN base b ON b.oid = u.oid LEFT JOIN pg_type t ON t.oid = b.below ORDER BY u.place
"""
