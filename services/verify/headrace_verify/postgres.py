"""The other side of the comparison: one moment of Postgres, and its rows in the codec's form.

Values are turned into the codec's form by SQL, not by capture's converters: so a mistake there is seen here. Where SQL cannot
(json that readers refuse, arrays of types whose JSON differs from their text) the last step is Python's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import orjson
import psycopg
from psycopg import conninfo, sql

from headrace.change import Row, Snapshot, Source, TableSchema, parse_lsn
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.settings import Settings
from headrace.waiting import check_server
from headrace_verify.finishing import Finish, finish_of, finished, finished_key

Connection = psycopg.Connection[tuple[Any, ...]]
_SESSION = (
    "-c search_path= -c client_encoding=UTF8 -c row_security=off -c DateStyle=ISO,MDY -c IntervalStyle=postgres -c TimeZone=UTC "
    "-c extra_float_digits=1 -c bytea_output=hex -c lc_monetary=C -c statement_timeout=0 -c idle_in_transaction_session_timeout=0 "
    "-c idle_session_timeout=0"
)
"""The settings of S14: values read here and by capture have one text; and the server ends no session for taking long."""
_KEPT = {
    "connect_timeout": "10",
    "tcp_user_timeout": "30000",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
}
"""Unless the DSN says otherwise: the connection is silent while a view is scanned, and what stands between forgets it after minutes."""
_TRANSACTION_TIMEOUT = 170000
"""The version from which the server may end a long transaction: an older one would refuse a connection with that option."""

_FETCH, _BYTES = 200, 4 * 1024 * 1024
"""Rows that are asked for at once, as far as they are not larger together than that by the size of those before."""


class Moment(NamedTuple):
    """One snapshot of Postgres, and an LSN by which all that it sees was written."""

    snapshot: Snapshot
    lsn: int

    @classmethod
    def parsed(cls, snapshot: str, lsn: str) -> Moment:
        """Return the moment that Postgres names so."""
        return cls(Snapshot.parsed(snapshot), parse_lsn(lsn))

    def unseen(self, xid: int, lsn: int) -> bool:
        """Whether a change by `xid`, committed at `lsn`, may be in a view and not in this snapshot (S27)."""
        return lsn >= self.lsn or not self.snapshot.sees(xid, self.lsn - lsn)


@dataclass(frozen=True)
class Table:
    """A table as it is read: its columns that the log has too, and its key.

    It is approximate when a large value that an update left alone may have been read again, later than the update (S7); an append-only
    table has no updates. The filter is the publication's, as SQL.
    """

    name: str
    key: tuple[str, ...]
    columns: tuple[_Column, ...]
    only: bool
    approximate: bool
    filter: str | None = None

    @property
    def source(self) -> sql.Composed:
        """Return the item of FROM that has the rows which are captured: it wants an alias.

        Rows of tables that inherit from it are their own tables' rows. What the publication's row filter leaves out is not in the log.
        """
        source = sql.SQL("ONLY {}" if self.only else "{}").format(sql.Identifier(*self.name.split(".", 1)))
        if self.filter is None:
            return source
        columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in self.columns)
        return sql.SQL("(SELECT {} FROM {} WHERE {})").format(columns, source, sql.SQL(self.filter))

    def json(self, alias: str) -> sql.Composed:
        """Return the SQL of a whole row of `alias` as JSON."""
        values = [
            sql.SQL("{} AS {}").format(_expression(column, alias), sql.Identifier(column.name))
            for column in self.columns
        ]
        return sql.SQL("(SELECT row_to_json(r.*) FROM (SELECT {}) r)").format(sql.SQL(", ").join(values))

    def matches(self, alias: str, key: Row) -> sql.Composed:
        """Return the SQL that is true of the row of this key, and perhaps of others (see `_equals`)."""
        by_name = {column.name: column for column in self.columns}
        return sql.SQL(" AND ").join(_equals(by_name[name], alias, key[name]) for name in self.key)

    def column(self, name: str) -> _Column:
        """Return a column by its name."""
        return next(column for column in self.columns if column.name == name)

    def coded(self, alias: str, name: str) -> sql.Composed:
        """Return the SQL of a column's value as JSON, in the codec's form."""
        return sql.SQL("to_json({})").format(_expression(self.column(name), alias))

    def written(self, alias: str, name: str) -> sql.Composed:
        """Return the SQL of that as text, compared by code points."""
        return sql.SQL("({} #>> '{{}}') COLLATE \"C\"").format(self.coded(alias, name))

    def meaning(self, alias: str, name: str) -> sql.Composed:
        """Return the SQL of a column's value as JSON whose equality is the value's: a number however it is written."""
        column = self.column(name)
        value = sql.Identifier(alias, name) if column.number else _expression(column, alias)
        return sql.SQL("to_jsonb({})").format(value)

    def ordering(self, alias: str, name: str) -> sql.Composed:
        """Return the SQL of what rows are sorted by, as `headrace.documents.order` does it."""
        column = self.column(name)
        if column.number or column.time or column.base in {"bool", "oid"}:
            return sql.SQL("{}").format(sql.Identifier(alias, name))
        return self.written(alias, name)

    def keyed(self, row: Row) -> Row:
        """Return the key, as the log has it, of a row that SQL has given, before `plain`."""
        key = {name: row[name] for name in self.key}
        return key | {name: finished_key(finish, key[name]) for name, finish in self._finishes.items() if name in key}

    def plain(self, row: Row) -> Row:
        """Finish a row that SQL has given."""
        for name, finish in self._finishes.items():
            row[name] = finished(finish, row[name])
        return row

    @cached_property
    def _finishes(self) -> dict[str, Finish]:
        return {column.name: finish for column in self.columns if (finish := column.finish)}


class _Column(NamedTuple):
    name: str
    type: str
    base: str
    element: str
    collation: int = 0
    equality: str = ""
    """The schema of its operator, of a type that is not built in."""

    @property
    def number(self) -> bool:
        """Whether its values are numbers, as text or not."""
        return self.base in {"int2", "int4", "int8", "float4", "float8", "numeric"}

    @property
    def time(self) -> bool:
        """Whether its values are dates or timestamps."""
        return self.base in {"date", "timestamp", "timestamptz"}

    @property
    def finish(self) -> Finish | None:
        """Return what finishes what SQL has given."""
        return finish_of(self.base, self.element)

    @property
    def equals(self) -> sql.Composable:
        """Return the operator of its equality: the session's search_path has none of a type that is not built in."""
        return sql.SQL("OPERATOR({}.=)").format(sql.Identifier(self.equality or "pg_catalog"))

    def compares_with(self, other: _Column) -> bool:
        """Whether Postgres itself compares the two: it has no ``text = uuid``, and does not choose between two collations."""
        if all(each.number or each.base == "oid" for each in (self, other)):
            return True
        one, another = ("text" if each.base in _STRINGS else each.base for each in (self, other))
        return one == another and (self.collation == other.collation or 0 in {self.collation, other.collation})

    @property
    def ordered(self) -> bool:
        """Whether SQL can put its values in the order that they have in the log."""
        return not self.element and self.base not in {"json", "jsonb"}


def connect(settings: Settings) -> Connection:
    """Connect to the source.

    Raises:
        Transient: `postgres-away`.
        Misconfigured: `postgres-refused`.
    """
    try:
        given = conninfo.conninfo_to_dict(settings.dsn)
        kept: dict[str, Any] = {name: given.get(name) or ours for name, ours in _KEPT.items()}
        connection = psycopg.connect(settings.dsn, options=_SESSION, application_name="headrace verify", **kept)
        if connection.info.server_version >= _TRANSACTION_TIMEOUT:
            connection.execute("SET transaction_timeout = 0")
            connection.commit()
    except psycopg.ProgrammingError:  # its text may hold the password
        raise Misconfigured("postgres-dsn", "HEADRACE_DSN is not a connection string.", "Change it.") from None
    except psycopg.OperationalError as error:
        raise _explained(" ".join(str(error).split())) from error
    return connection


def check_source(connection: Connection, log: Source) -> None:
    """Refuse another server or database than the log's, and a standby, which has no LSN to compare at.

    Raises:
        Misconfigured: `other-source`, `postgres-standby`.
    """
    row = connection.execute(_SERVER).fetchone()
    connection.commit()
    assert row is not None
    check_server(log, row[0], row[1])
    if row[2]:
        raise Misconfigured("postgres-standby", "The server is a standby.", "Let HEADRACE_DSN name the primary.")


_SERVER = "SELECT system_identifier::text, current_database(), pg_is_in_recovery() FROM pg_control_system()"


def _explained(text: str) -> HeadraceError:
    refused = ("authentication failed", "does not exist", "pg_hba.conf", "no password", "permission denied")
    if any(part in text for part in refused):
        return Misconfigured("postgres-refused", f"Postgres refuses: {text}.", "Change HEADRACE_DSN.")
    return Transient("postgres-away", f"Postgres does not answer: {text}.", "Start it, or change HEADRACE_DSN.")


@contextmanager
def moment(connection: Connection) -> Iterator[Moment]:
    """Open a snapshot; everything that is read inside is of that moment. Then comes the LSN (S27): a statement begins by its snapshot."""
    with _reading(connection, psycopg.IsolationLevel.REPEATABLE_READ):
        row = connection.execute("SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text").fetchone()
        assert row
        yield Moment.parsed(*row)


def moments(connection: Connection) -> AbstractContextManager[None]:
    """Let every statement inside have a snapshot of its own."""
    return _reading(connection, psycopg.IsolationLevel.READ_COMMITTED)


@contextmanager
def _reading(connection: Connection, isolation: psycopg.IsolationLevel) -> Iterator[None]:
    connection.isolation_level = isolation
    connection.read_only = True
    try:
        yield
    finally:
        connection.rollback()


Published = Mapping[str, str | None]
"""The tables that are captured now, by ``schema.table``, each with its row filter, or None. (Their columns are those that the log has.)"""


def published(connection: Connection, publication: str) -> Published:
    """Return what a publication sends, as Postgres says it, but for schemas with a dot: their tables have no name here."""
    query = (
        "SELECT schemaname || '.' || tablename, rowfilter FROM pg_publication_tables "
        "WHERE pubname = %s AND strpos(schemaname, '.') = 0"
    )
    return dict(connection.execute(query, [publication]).fetchall())


def without_key(connection: Connection, publication: str, names: Collection[str]) -> set[str]:
    """Return those of some tables that capture leaves out of the log: without a key that it can use (S9), and not named as append-only."""
    return {name for (name,) in connection.execute(_KEYLESS, {"names": list(names), "publication": publication})}


def table(connection: Connection, schema: TableSchema, row_filter: str | None) -> Table | None:
    """Return how to read a table in the shape that the log has; None when Postgres has no such table."""
    rows = connection.execute(_COLUMNS, schema.table.split(".", 1)).fetchall()
    if not rows:
        return None
    kind, approximate = rows[0][:2]
    there = {row[2]: _Column(*row[2:]) for row in rows}
    columns = tuple(there[column.name] for column in schema.columns if column.name in there)
    return Table(schema.table, schema.key, columns, kind == "r", approximate and bool(schema.key), row_filter)


def stream(connection: Connection, query: bytes) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a query, which are texts, a few at a time: one may have the key of every row of a table."""
    with connection.cursor("headrace_verify") as cursor:
        cursor.execute(query)
        most = 1
        while rows := cursor.fetchmany(most):
            yield from rows
            size = sum(len(text) for row in rows for text in row if text is not None) // len(rows)
            most = max(1, min(2 * most, _FETCH, _BYTES // max(1, size)))


_NATURAL = frozenset({"bool", "int2", "int4", "int8", "float4", "float8", "timestamp", "timestamptz"})
_STRINGS = frozenset({"text", "varchar", "name"})
_TEXT = _STRINGS | {"bpchar", "inet"}
"""Types whose cast to text is not their output, or needs none: inside an array `to_json` gives the output."""


def _expression(column: _Column, alias: str) -> sql.Composed:
    value = sql.Identifier(alias, column.name)
    if column.element and column.base not in {"int2vector", "oidvector"}:
        form = _ARRAYS.get(
            column.element, "to_json({v})" if column.element in _NATURAL | _TEXT else "to_json({v}::text[])"
        )
    else:
        form = _SCALARS.get(column.base, "{v}" if column.base in _NATURAL else _OUTPUT)
    return sql.SQL(form).format(v=value)


_OUTPUT = "CASE WHEN {v} IS DISTINCT FROM NULL THEN format('%s', {v}) END"
"""The type's own output; a cast to text differs for char(n), inet, and others."""
_SCALARS = {
    "oid": "{v}::int8",
    "numeric": "{v}::text",
    "bytea": "translate(encode({v}, 'base64'), chr(10), '')",
    "json": "{v}::text",
    "jsonb": "{v}::text",
}
_ARRAYS = {"oid": "to_json({v}::int8[])"}


def _equals(column: _Column, alias: str, value: Any) -> sql.Composable:
    """Compare a key's column with a value in the codec's form, by the type's own equality so that an index serves.

    Arrays of what Python finishes are not compared: others may have that key then, which who asks passes over.
    """
    name = sql.Identifier(alias, column.name)
    if column.element:
        if column.finish:
            return sql.SQL("true")
        said = sql.SQL("to_json({})::jsonb").format(_expression(column, alias))
        return sql.SQL("{} = {}::jsonb").format(said, sql.Literal(orjson.dumps(value).decode()))
    text = sql.Literal(value if isinstance(value, str) else orjson.dumps(value).decode())
    if column.base == "jsonb" and isinstance(
        value, str
    ):  # a document that is a text, or the text of one that readers round
        return sql.SQL("({0} = to_jsonb({1}::text) OR {0}::text = {1})").format(name, text)
    if column.base == "bytea":
        return sql.SQL("{} = decode({}, 'base64')").format(name, text)
    if not column.equality:
        return sql.SQL("{} = CAST({} AS {})").format(name, text, sql.SQL(column.type))
    type_ = sql.SQL(column.base)  # below domains, for which it may not be found
    return sql.SQL("CAST({} AS {}) {} CAST({} AS {})").format(name, type_, column.equals, text, type_)


# What is append-only is in the publication's comment, by which setup remembers what it was told.
_KEYLESS = """
SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname || '.' || c.relname = ANY(%(names)s)
  AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
    AND CASE WHEN c.relkind = 'r' AND c.relreplident = 'i' THEN i.indisreplident ELSE i.indisprimary END)
  AND NOT EXISTS (SELECT FROM pg_publication p, obj_description(p.oid, 'pg_publication') said WHERE p.pubname = %(publication)s
    AND CASE WHEN said LIKE '{"by":"headrace setup",%%' THEN said::jsonb -> 'append_only' ? (n.nspname || '.' || c.relname) END)
"""
_COLUMNS = """
WITH RECURSIVE base(oid, below) AS (
  SELECT oid, oid FROM pg_type WHERE typtype <> 'd'
  UNION ALL SELECT t.oid, b.below FROM pg_type t JOIN base b ON t.typtype = 'd' AND t.typbasetype = b.oid
)
SELECT c.relkind::text, EXISTS (SELECT FROM pg_class l WHERE l.reltoastrelid <> 0 AND l.relreplident <> 'f'
         AND (l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid)))),
       a.attname, format_type(a.atttypid, a.atttypmod),
       CASE WHEN t.typnamespace = 'pg_catalog'::regnamespace THEN t.typname ELSE format_type(t.oid, NULL) END,
       coalesce(CASE WHEN et.typnamespace = 'pg_catalog'::regnamespace THEN et.typname ELSE format_type(et.oid, NULL) END, ''),
       CASE WHEN a.attcollation <> 'pg_catalog."default"'::regcollation THEN a.attcollation ELSE 0 END,
       CASE WHEN t.typnamespace = 'pg_catalog'::regnamespace THEN '' WHEN t.typtype <> 'b' THEN 'pg_catalog'
         ELSE (SELECT nspname FROM pg_namespace WHERE oid = t.typnamespace) END
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN base b ON b.oid = a.atttypid JOIN pg_type t ON t.oid = b.below
LEFT JOIN base e ON e.oid = t.typelem AND t.typcategory = 'A' LEFT JOIN pg_type et ON et.oid = e.below
WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
