"""Values and names of every kind in Avro, with a real schema registry: the same rows as in JSON."""

from __future__ import annotations

from dataclasses import replace

import orjson
import psycopg
import pytest

from headrace.change import Change
from headrace.settings import Settings
from headrace_ops.registry import Registry
from tests.fixtures.capture import capturing, changes, execute, prepare, replay
from tests.fixtures.kinds import Kind
from tests.integration.test_avro import T, values
from tests.integration.test_capture_types import IDENTIFIERS, all_kinds, quote

ROWS = 32
KINDS = {
    "int": ["-2147483648"],
    "bigint": ["9223372036854775807"],
    "oid": ["4294967295"],
    "real": ["1.5", "1e6", "999999", "3.4028235e38", "'NaN'", "'-0'"],
    "double precision": ["0.1::float8 + 0.2", "1e15", "1e14", "1e300", "'-Infinity'"],
    "boolean": ["true"],
    "numeric": [
        "12345678901234567890.0123456789",
        "'NaN'",
        "repeat('9', 1000)::numeric",
        "('-0.' || repeat('7', 1000))::numeric",
    ],
    "numeric(5,-2)": ["123456"],
    "numeric(4,1)[]": ["'{{1.5,NULL},{NULL,NaN}}'"],
    "text": ["E'tab\\t nl\\n q\" b\\\\ ü€😀'"],
    '"char"': ["'x'"],
    "uuid": ["gen_random_uuid()"],
    "timestamptz": ["'2024-02-29 12:00:00+05'", "'infinity'"],
    "interval": ["'1 year -2 days 03:04:05.6'"],
    "interval second(3)": ["'5.6789'"],
    "time(2) with time zone[]": ["'{12:00:00.123+05}'"],
    "date[]": ["'{0044-03-15 BC,NULL,infinity}'"],
    "bit(3)[]": ["'{101,NULL}'"],
    "bytea": ["'\\x'", "'\\x00ff'"],
    "json": ["'{\"a\": [1, 1.50, null]}'", "'null'", "'12345678901234567890.10'", "'\"\\ud800\"'"],
    "jsonb": ["'\"text\"'"],
    "int[]": ["'{1,NULL,3}'", "'{{1,2},{3,4}}'", "'{}'", "'[0:1]={3,4}'", "'{{1,NULL},{NULL,NULL}}'"],
    "real[]": ["'{1,1.5,NaN}'"],
    "text[]": ["array['a,b', NULL, 'NULL', '']"],
    "bytea[]": ["array['\\x00ff'::bytea]"],
    "jsonb[]": ["array['{\"a\": [1, 2.50]}'::jsonb]", "array[array['{}'::jsonb], array[NULL::jsonb]]", "'{}'"],
    "timestamp(3)[]": ["array['2024-02-29 12:00:00'::timestamp]"],
    "int2vector": ["'1 2'"],
    "point": ["'(1,2)'"],
    "mood": ["'so so'"],
    "mood[]": ["array['sad', NULL]::mood[]"],
    "positive": ["7"],
    "positive[]": ["array[7]::positive[]"],
    "amounts": ["'{1.5}'"],
    "weight": ["0.5"],
    "weight[]": ["'{1,NaN,NULL,1e9}'", "'{{1e9}}'"],
    "raw[]": ["array['\\x00ff', NULL]::raw[]"],
    "document[]": ["array['{\"a\": 1.50}', NULL]::document[]", "array[array['{}'::json]]"],
    "documents": ["'{}'", "array['{\"a\": 1.50}'::json]"],
    "documents[]": ["'{\"{}\",NULL}'", '\'{"{1}","{NULL}"}\''],
    "amounts[]": ['\'{"{}","{1.50,NULL}"}\''],
    "other.json": ["'{}'"],
    "other.json[]": ["'{\"{}\"}'"],
    'other."integer"': ["'7'"],
    'other."e(1)[]"': ["'x'"],
    'other."e(1)[]"[]': ["'{x,NULL}'"],
}
TYPES = (
    "CREATE DOMAIN light AS real",
    "CREATE DOMAIN weight AS light",
    "CREATE DOMAIN raw AS bytea",
    "CREATE DOMAIN documents AS json[]",
    "CREATE TYPE other.json AS ENUM ('{}')",
    "CREATE TYPE other.\"integer\" AS ENUM ('7')",
    "CREATE TYPE other.\"e(1)[]\" AS ENUM ('x')",
)
"""Beside those of `all_kinds`."""
NAMES = [
    "_u0031é",
    "1u00E9_",
    "_u0031_u0031_",
    "1",
    "case",
    "Case",
    "a b",
    "a_b",
    "a-b",
    "a_u0020_b",
    "after",
    "null",
]
"""Names of tables and columns of which some are one where what is no letter of Avro's is left out, or written as its number."""
LONG = "é" * 31


@pytest.fixture
def avro(settings: Settings, registry: Registry) -> Settings:
    return replace(settings, codec="avro")


def test_every_kind_is_the_same_row_under_both_codecs(avro: Settings) -> None:
    """Every built-in type, made ones and the arrays of all, in snapshot and stream; two logs of one source, one in each codec."""
    json = replace(avro, codec="json", **dict.fromkeys(("source", "slot", "publication"), f"{avro.source}_j"))
    kinds = all_kinds(avro)
    execute(avro, *TYPES)
    odd = '"1 Ödd, c""ol"'
    made = [f"m{n} {kind}" for n, kind in enumerate(KINDS)]
    found = [f"b{n} {kind.sql}" for n, kind in enumerate(kinds)]
    prepare(avro, f"CREATE TABLE items (id int PRIMARY KEY, {odd} text, {', '.join(made + found)})")
    prepare(json)
    insert(avro, odd, kinds)
    with capturing(avro) as one, capturing(json) as other:
        one.hear("streaming")
        other.hear("streaming")
        names = ", ".join(column.split()[0] for column in made + found)
        execute(avro, f"INSERT INTO items (id, {odd}, {names}) SELECT id + 100000, {odd}, {names} FROM items")
        one.reach()
        other.reach()
    assert all(value[0] == 0 for value in values(avro))
    assert not any(value[0] == 0 for value in values(json))
    read, wanted = replay(avro, T), replay(json, T)
    assert read.keys() == wanted.keys() != set()
    assert {
        (key, name, orjson.dumps(value))
        for key, row in read.items()
        for name, value in row.items()
        if orjson.dumps(value) != orjson.dumps(wanted[key][name])
    } == set()
    assert [codec_free(c) for c in changes(avro, T)] == [codec_free(c) for c in changes(json, T)]


def insert(settings: Settings, odd: str, kinds: list[Kind]) -> None:
    execute(
        settings,
        *[
            f"INSERT INTO items (id, {odd}, m{n}) VALUES ({1000 + 10 * n + m}, 'x', {literal})"
            for n, literals in enumerate(KINDS.values())
            for m, literal in enumerate(literals)
        ],
    )
    names = ", ".join(f"b{n}" for n in range(len(kinds)))
    cast = ", ".join(f"%s::{kind.sql}" for kind in kinds)
    with psycopg.connect(settings.dsn, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
        statement = f"INSERT INTO items (id, {names}) VALUES (%s, {cast})".encode()
        for row in range(ROWS):
            connection.execute(statement, [row, *(kind.literal(row) for kind in kinds)])


def codec_free(change: Change) -> tuple[object, ...]:
    return change.key, change.op, change.xid, change.schema, change.read


def test_names_that_avro_does_not_have_are_told_apart(avro: Settings) -> None:
    """Of schemas, tables, and columns, key and others; a name that looks escaped already is one of them."""
    names = [*NAMES, *IDENTIFIERS]
    columns = [*names, LONG]
    defined = ", ".join(f"{quote(name)} text DEFAULT '{number}'" for number, name in enumerate(columns))
    tables = {f"{name.replace('.', '')}.{name}": name for name in names}
    for name in tables.values():
        schema = quote(name.replace(".", ""))
        execute(
            avro,
            f"CREATE SCHEMA {schema}",
            f"CREATE TABLE {schema}.{quote(name)} ({defined}, PRIMARY KEY ({quote(name)}))",
        )
        execute(avro, f"INSERT INTO {schema}.{quote(name)} DEFAULT VALUES")
    prepare(avro)
    with capturing(avro) as capture:
        capture.hear("streaming")
        for name in tables.values():
            execute(avro, f"INSERT INTO {quote(name.replace('.', ''))}.{quote(name)} ({quote(name)}) VALUES ('stream')")
        capture.reach()
    row = {name: str(number) for number, name in enumerate(columns)}
    for table, name in tables.items():
        assert list(replay(avro, table).values()) == [row, row | {name: "stream"}]
        assert all(value[0] == 0 for value in values(avro, table))
