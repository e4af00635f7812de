"""Verify's SQL against capture's converters, for every type of Postgres: no value is called wrong that the log has right.

What verify expects of a row, and its key, is what capture makes of the text of the same row; and each key, as the log has it,
finds its row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress

import psycopg
from psycopg import sql

from headrace import codec
from headrace.change import Row
from headrace.settings import Settings
from headrace_capture import catalog
from headrace_capture.relations import plans_of
from headrace_verify import postgres
from headrace_verify.compare import differing
from headrace_verify.expected import _plain
from headrace_verify.joins import key_of
from headrace_verify.multiset import Multiset
from tests.fixtures.kinds import Kind, every_kind
from tests.integration.test_capture_types import MADE, made_kinds

Log = dict[str, Row]


def captured(connection: catalog.Connection, table: catalog.Table) -> Log:
    """Return the rows of a table by their keys as capture makes them."""
    plans = plans_of(table.shape(1), table)
    names = sql.SQL(", ").join(sql.Identifier(plan.column.name) for plan in plans)
    with connection.cursor() as cursor:
        cursor.execute(sql.SQL("SELECT {} FROM {}").format(names, table.identifier))
        result = cursor.pgresult
        assert result is not None
        made: Log = {}
        for number in range(result.ntuples):
            texts = [result.get_value(number, at) for at in range(len(plans))]
            parts = [
                plan.convert(text) if text is not None else b"null" for plan, text in zip(plans, texts, strict=True)
            ]
            row = b"{%b}" % b",".join(
                b'"%b":%b' % (plan.column.name.encode(), each) for plan, each in zip(plans, parts, strict=True)
            )
            at = {plan.column.name: index for index, plan in enumerate(plans)}
            keys = [(name, plans[at[name]].convert_key(texts[at[name]] or b"")) for name in table.key]
            key = b"{%b}" % b",".join(b'"%b":%b' % (name.encode(), each) for name, each in keys)
            assert codec.dumps(codec.loads(key)) == key, "canonical"
            made[key.decode() if table.key else str(number)] = codec.loads(row)
    return made


def expected(
    connection: postgres.Connection, table: postgres.Table, keys: list[str] | None = None
) -> list[tuple[str, Row]]:
    with connection.cursor() as cursor:
        cursor.execute(_plain(table, keys))
        rows = [codec.loads(text) for (text,) in cursor.fetchall()]
    return [(key_of(table, row), table.plain(row)) for row in rows]


def make(connection: psycopg.Connection, number: int, kind: Kind) -> None:
    """Make a table that has a kind in its key if it may, and one that has no key."""
    with suppress(psycopg.errors.UndefinedObject, psycopg.errors.InvalidObjectDefinition):  # no order, no key
        connection.execute(f"CREATE TABLE k{number} (n int, id {kind.sql}, v {kind.sql}, PRIMARY KEY (id, n))".encode())
    connection.execute(f"CREATE TABLE f{number} (n int PRIMARY KEY, v {kind.sql})".encode())
    for at in range(len(kind.values) + 8):
        value = kind.literal(at)
        for table, statement in (
            ("k", "INSERT INTO k{} SELECT $1, $2::{}, $2::{} WHERE $2 IS NOT NULL"),
            ("f", "INSERT INTO f{} VALUES ($1, $2::{})"),
        ):
            if table == "f" or connection.execute("SELECT to_regclass($1)", [f"k{number}"]).fetchone() != (None,):
                with suppress(psycopg.errors.ProgramLimitExceeded, psycopg.errors.UndefinedFunction):
                    connection.execute(statement.format(number, kind.sql, kind.sql).encode(), [at, value])


def wrong(
    log: catalog.Connection, verify: postgres.Connection, table: catalog.Table, kind: Kind
) -> tuple[int, list[str]]:
    """Return how many rows a table has, and in what verify and capture do not agree."""
    rows = captured(log, table)
    read = postgres.table(verify, table.shape(1), None)
    assert read is not None
    found = expected(verify, read)
    by_key = dict(found)
    said = [f"key {key}" for key in rows.keys() ^ by_key.keys()]
    for key in rows.keys() & by_key.keys():
        if names := differing(by_key[key], rows[key], rows=True):
            said.append(f"{names}: {by_key[key]} in Postgres, {rows[key]} in the log")
        try:
            again = expected(verify, read, [key])
        except psycopg.Error as error:
            verify.rollback()
            said.append(f"{key}: {error}")
        else:
            said += (
                [f"{key} finds {again}"]
                if (key, by_key[key]) not in again or (len(again) > 1 and "[]" not in kind.sql)
                else []
            )
    with closing(Multiset()) as multiset:
        multiset.expect(table.name, tuple(column.name for column in read.columns), (row for _, row in found))
        for key, row in rows.items():
            multiset.hold(table.name, key, row)
        said += [str(each) for each in multiset.differences({table.name})]
    return len(rows), said


def test_every_kind_is_expected_as_capture_writes_it(fresh_database: Callable[[], str]) -> None:
    settings = Settings(dsn=fresh_database())
    with psycopg.connect(settings.dsn, autocommit=True, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute(MADE.encode())
        kinds = [*every_kind(connection), *made_kinds()]
        for number, kind in enumerate(kinds):
            make(connection, number, kind)
    compared, found = 0, list[str]()
    with closing(catalog.connect(settings.dsn)) as log, closing(postgres.connect(settings)) as verify:
        for table in catalog.all_tables(log):
            count, said = wrong(log, verify, table, kinds[int(table.name[1:])])
            compared += count
            found += [f"{table.name} {kinds[int(table.name[1:])].sql} {each}" for each in said]
    assert compared > 2000, compared
    assert not found, "\n".join(each[:400] for each in found)
