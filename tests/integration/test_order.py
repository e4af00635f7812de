"""The order of a document's rows, and the least and greatest of its values, are Postgres's own, or the declaration is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import sql

from headrace import codec
from headrace.change import Column, Row, TableSchema
from headrace.documents import Aggregate, Document, Many, Max, Min
from headrace.documents.checks import check
from headrace.documents.order import Shape
from headrace.errors import Misconfigured
from headrace.settings import Settings
from headrace_verify.joins import Select, node
from headrace_verify.postgres import Connection, Table, connect, stream
from headrace_verify.postgres import table as read_table
from tests.fixtures.capture import execute
from tests.fixtures.kinds import TEXT, Kind, both, drawn, every_kind
from tests.integration.test_capture_types import ROWS, insert

MAKERS, THINGS = "public.makers", "public.things"
TEXTS = {"text", "varchar", "bpchar", "character(4)", "name", "public.citext"}
"""What documents sort by code points, whatever the column's collation."""
NUMBERS = {"int2", "int4", "int8", "oid", "float4", "float8", "numeric", "numeric(10,2)"}
TIMES = {"date", "timestamp", "timestamptz", "timestamp(3) with time zone", "time"}
ADMITTED = TEXTS | NUMBERS | TIMES | {"bool", "uuid", "macaddr", "macaddr8", "varbit", "bit(3)"}


@dataclass
class Things:
    """A table with a column of every kind, as verify reads it."""

    connection: Connection
    kinds: list[Kind]
    schema: TableSchema
    tables: dict[str, Table]
    rows: list[Row]

    def natural(self, kind: Kind, column: str) -> list[Any]:
        """Return the keys in the order of a column."""
        by = "format('%s', {c}) COLLATE \"C\"" if kind.name in TEXTS else "{c}"
        query = f"SELECT id FROM {THINGS} ORDER BY {column} IS NULL, {by.format(c=column)}, id".encode()
        return [key for (key,) in self.connection.execute(query)]

    def expected(self, document: Document) -> Any:
        """Return what verify expects of a document's one join."""
        query = Select(self.tables, few=False).documents(document, sql.SQL("true"))
        ((row, *found),) = stream(self.connection, query.as_bytes(self.connection))
        return node(self.tables, document, codec.loads(row), [codec.loads(text) for text in found], []).of


@pytest.fixture
def things(settings: Settings) -> Any:
    execute(settings, "CREATE EXTENSION citext", "CREATE TYPE mood AS ENUM ('sad', 'so so', 'good')")
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        kinds = every_kind(connection)
    kinds += both("public.mood", ["so so", "good", "sad"])
    kinds += both("public.citext", ["b", "B", "a", *drawn(TEXT)])
    kinds += both("bit(3)", ["101", "011", "111"])
    kinds += both("character(4)", ["b", "ab", "abc"])
    kinds += both("numeric(10,2)", ["9.9", "10", "-1"])
    kinds += both("timestamp(3) with time zone", ["10000-01-01 00:00+02", "2024-01-01 00:00", "0044-03-15 00:00 BC"])
    columns = ", ".join(f"c{n} {kind.sql}" for n, kind in enumerate(kinds))
    execute(
        settings,
        f"CREATE TABLE things (id int PRIMARY KEY, maker int DEFAULT 1, {columns})",
        "CREATE TABLE makers (id int PRIMARY KEY)",
        "INSERT INTO makers VALUES (1)",
    )
    literals = [(f"c{n}", kind.sql, [kind.literal(row) for row in range(ROWS)]) for n, kind in enumerate(kinds)]
    insert(settings, "things", literals)
    with connect(settings) as connection:
        query = "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
        shapes = [
            TableSchema(table, 1, tuple(Column(*row) for row in connection.execute(query, [table])), ("id",))
            for table in (MAKERS, THINGS)
        ]
        tables = {shape.table: read for shape in shapes if (read := read_table(connection, shape, None))}
        query_rows = sql.SQL("SELECT {}::text FROM public.things t").format(tables[THINGS].json("t"))
        rows = [tables[THINGS].plain(codec.loads(text)) for (text,) in connection.execute(query_rows)]
        yield Things(connection, kinds, shapes[1], tables, rows)


def test_values_of_every_type_are_in_the_order_of_postgres_or_refused(things: Things) -> None:
    admitted, shape = set(), Shape.of(things.schema)
    for number, kind in enumerate(things.kinds):
        name = f"c{number}"
        many = Many(THINGS, by="maker", order=name)
        values = Aggregate(THINGS, by="maker", low=Min(name), high=Max(name))
        try:
            for join in (many, values):
                check(Document(MAKERS, of=join), {THINGS: things.schema})
        except Misconfigured:
            continue
        admitted.add(kind.name)
        natural = things.natural(kind, name)
        assert [row["id"] for row, _ in many.picked(((row, None) for row in things.rows), shape)] == natural, kind.name
        assert [row["id"] for row in things.expected(Document(MAKERS, of=many))] == natural, kind.name
        assert things.expected(Document(MAKERS, of=values)) == values.over(things.rows, shape), kind.name
    assert admitted == ADMITTED
