"""Every type of Postgres, with Postgres itself as the oracle: a value written, read from the log and cast back is the same value.

One table has a column of every built-in type that pg_type knows, of the array of each, and of made ones: enums, composites,
domains, ranges, and extensions' types. Its rows come by the snapshot, by the stream, and by an update that leaves all of it alone.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from headrace.codec import members
from headrace.control import Control
from headrace.log import Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.settings import Settings
from headrace_capture import catalog, chunks, copies
from headrace_capture.chunks import Ask
from headrace_capture.named import named_tables
from tests.fixtures.capture import capturing, changes, execute, prepare, replay, rows
from tests.fixtures.kinds import TEXT, Kind, both, drawn, every_kind

ROWS = 32
LATER = 1_000_000
T = "public.kinds"
MADE = """
CREATE EXTENSION hstore; CREATE EXTENSION citext; CREATE EXTENSION ltree; CREATE EXTENSION cube; CREATE EXTENSION isn;
CREATE TYPE mood AS ENUM ('sad', 'so so', 'a"b,c\\');
CREATE TYPE pair AS (a int, b text, c mood[]); CREATE TYPE nest AS (p pair, l pair[], n numeric);
CREATE DOMAIN positive AS int CHECK (VALUE > 0); CREATE DOMAIN more AS positive CHECK (VALUE > 1);
CREATE DOMAIN amounts AS numeric[]; CREATE DOMAIN document AS json; CREATE DOMAIN two AS pair; CREATE DOMAIN moody AS mood;
CREATE TYPE texts AS RANGE (SUBTYPE = text, MULTIRANGE_TYPE_NAME = manytexts);
CREATE TYPE moods AS RANGE (SUBTYPE = mood); CREATE TYPE deep AS (m moods, p pair);
CREATE SCHEMA other; CREATE TYPE other.date AS ENUM ('a "date"', 'b'); CREATE TYPE other.bool AS ENUM ('t', 'maybe');
CREATE TYPE colons; CREATE FUNCTION colons_in(cstring) RETURNS colons IMMUTABLE STRICT LANGUAGE internal AS 'textin';
CREATE FUNCTION colons_out(colons) RETURNS cstring IMMUTABLE STRICT LANGUAGE internal AS 'textout';
CREATE TYPE colons (INPUT = colons_in, OUTPUT = colons_out, LIKE = text, DELIMITER = ':');
"""
ODD = ["", "NULL", '"', "\\", "a,b:c;d", "{x}", "(y)", " z ", "ü€😀", "\t\n"]


def made_kinds() -> list[Kind]:
    """Return the types of MADE, each with its array."""
    pairs = ["(,,)", "(1,,{})", '(-1,"x,""y\\\\","{sad,""so so""}")', '(2,"","{NULL}")']
    kinds: dict[str, list[str]] = {
        "public.hstore": ["", '"a"=>"1"', '"a b"=>NULL, "c\\"d"=>"e\\\\f"'],
        "public.citext": ["Abc", *ODD],
        "public.ltree": ["", "Top.Science.Astronomy"],
        "public.cube": ["(1,2,3)", "(0),(1.5)"],
        "public.isbn": ["978-0-393-04002-9"],
        "mood": ["sad", "so so", 'a"b,c\\'],
        "pair": pairs,
        "nest": ["(,,)", '("(1,x,{sad})","{""(2,,)"",NULL}",1.50)'],
        "positive": ["1", "2147483647"],
        "more": ["2"],
        "amounts": ["{}", "{1.50,NULL,NaN}", "{{1},{2.00}}"],
        "document": ['{"n": 123456789012345678901234567890.10}', '"x"'],
        "two": pairs,
        "moody": ["sad", "so so"],
        "texts": ["empty", "[a,b)", '["a,\\"","b)"]', "(,)"],
        "moods": ["empty", '["so so",)', '[sad,"a\\"b,c\\\\"]'],
        "deep": ["(,)", '("[sad,""so so"")","(1,,{sad})")'],
        "manytexts": ["{}", "{[a,b),[c,)}"],
        "other.date": ['a "date"', "b"],
        "other.bool": ["t", "maybe"],
    }
    found = [kind for name, values in kinds.items() for kind in both(name, values)]
    return [*found, *both("colons", [*ODD, *drawn(TEXT)], ":")]


def all_kinds(settings: Settings) -> list[Kind]:
    """Return the kinds of every column, and make the made ones."""
    execute(settings, *[f"{statement}" for statement in MADE.split(";\n") if statement.strip()])
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        return [*every_kind(connection), *made_kinds()]


def insert(settings: Settings, table: str, columns: list[tuple[str, str, list[str | None]]]) -> None:
    """Insert rows, given column by column as (name, type, literals)."""
    named = ", ".join(name for name, _, _ in columns)
    cast = ", ".join(f"%s::{kind}" for _, kind, _ in columns)
    statement = f"INSERT INTO {table} (id, {named}) VALUES (%s, {cast}) ON CONFLICT DO NOTHING".encode()
    with psycopg.connect(settings.dsn, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
        connection.execute("SET search_path = public")
        for number in range(ROWS):
            connection.execute(statement, [number, *(literals[number] for _, _, literals in columns)])


def natively(settings: Settings, kinds: list[Kind]) -> list[Kind]:
    """Return the kinds of which Postgres itself makes the snapshot's JSON."""
    columns = ", ".join(f"c{n} {kind.sql}" for n, kind in enumerate(kinds))
    execute(settings, f"CREATE TABLE every_kind (id int PRIMARY KEY, {columns})")
    with closing(catalog.connect(settings.dsn)) as connection:
        ((table,), _) = named_tables(connection, ["every_kind"])
        key, *others = table.columns
        found = [
            kind
            for kind, column in zip(kinds, others, strict=True)
            if copies.native(connection, replace(table, columns=(key, column))) is not None
        ]
    execute(settings, "DROP TABLE every_kind")
    return found


@pytest.fixture(params=["any", "native"])
def kinds(each_version: Settings, request: pytest.FixtureRequest) -> list[Kind]:
    """The columns c0, c1, … of the table `kinds`, which has ROWS rows: of every kind, or of those that Postgres makes JSON of."""
    settings = each_version
    found = all_kinds(settings)
    if request.param == "native":
        found = natively(settings, found)
        assert found
    defined = ", ".join(f"c{n} {kind.sql}" for n, kind in enumerate(found))
    execute(settings, f"CREATE TABLE kinds (id int PRIMARY KEY, touched int, {defined})")
    columns = [(f"c{n}", kind.sql, [kind.literal(row) for row in range(ROWS)]) for n, kind in enumerate(found)]
    insert(settings, "kinds", columns)
    return found


def test_every_value_comes_back_and_has_the_same_bytes_whichever_way_it_came(
    each_version: Settings, kinds: list[Kind]
) -> None:
    settings = each_version
    prepare(settings)
    names = ", ".join(f"c{n}" for n in range(len(kinds)))
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"INSERT INTO kinds (id, {names}) SELECT id + {LATER}, {names} FROM kinds")
        execute(settings, f"UPDATE kinds SET touched = 1 WHERE id >= {LATER}")
        capture.reach()
    snapshot, stream, updated = written(settings)
    assert len(snapshot) == len(stream) == len(updated) == ROWS
    assert differing(kinds, snapshot, stream) == []
    assert differing(kinds, snapshot, updated) == []
    assert cast_back(settings, kinds, snapshot) == []


Rows = dict[int, dict[str, bytes]]


def written(settings: Settings) -> tuple[Rows, Rows, Rows]:
    """Return the rows as they stand in the log: of the snapshot, of the inserts, of the updates; each value's own bytes."""
    found: dict[bytes, Rows] = {b"r": {}, b"c": {}, b"u": {}}
    for record in read_to_end(settings, {(Log(settings).topic_of(T), 0): BEGINNING}):
        assert record.value is not None
        json.loads(record.value)
        row = members(record.value, b"after")
        found[record.value.rpartition(b'"op":"')[2][:1]][int(row.pop("id")) % LATER] = row
    return found[b"r"], found[b"c"], found[b"u"]


def differing(kinds: list[Kind], one: Rows, other: Rows) -> list[Any]:
    """Return what is not the same bytes in both."""
    return [
        (kind.name, one[row][f"c{n}"], other[row][f"c{n}"])
        for row in one
        for n, kind in enumerate(kinds)
        if one[row][f"c{n}"] != other[row][f"c{n}"]
    ]


def cast_back(settings: Settings, kinds: list[Kind], log: Rows) -> list[Any]:
    """Let Postgres make rows of the JSON; return the values that are others than those in the table, by text and by image."""
    execute(settings, "CREATE TABLE back (LIKE kinds)")
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        for row, values in log.items():
            text = b'{"id":%d,%b}' % (row, b",".join(_member(kinds, name, value) for name, value in values.items()))
            statement = "INSERT INTO back SELECT * FROM json_populate_record(NULL::kinds, %s::json)"
            connection.execute(statement, [text.decode()])
    named = ", ".join(f"({n}, k.c{n}::text, b.c{n}::text)" for n in range(len(kinds)))
    both_rows = "FROM kinds k JOIN back b USING (id)"
    query = f"SELECT n, was, is_ {both_rows}, LATERAL (VALUES {named}) v(n, was, is_) WHERE was IS DISTINCT FROM is_"
    found: list[Any] = [(kinds[n].name, was, now) for n, was, now in rows(settings, query)]
    return found or rows(settings, f"SELECT id {both_rows} WHERE NOT k *= b")


def _member(kinds: list[Kind], name: str, value: bytes) -> bytes:
    if name.startswith("c") and kinds[int(name[1:])].type == "bytea":
        value = json.dumps(_hex(json.loads(value))).encode()
    return b'"%b":%b' % (name.encode(), value)


def _hex(value: Any) -> Any:
    if isinstance(value, list):
        return [_hex(item) for item in value]
    return value if value is None else "\\x" + b64decode(value).hex()


def test_a_key_has_the_same_bytes_in_snapshot_and_stream(settings: Settings) -> None:
    """Of every type that a primary key may hold: what the snapshot wrote, the stream's deletes find."""
    keyed = [kind for kind in all_kinds(settings) if kind.keyed]
    native = [kind for kind in natively(settings, keyed) if not kind.array]
    tables = [[kind] for kind in native] + [[kind for kind in native if not kind.name.startswith("float")]]
    tables += [keyed[start : start + 24] for start in range(0, len(keyed), 24)]
    for number, columns in enumerate(tables):
        names = [f"k{n}" for n in range(len(columns))]
        defined = ", ".join(f"{name} {kind.sql}" for name, kind in zip(names, columns, strict=True))
        key = ", ".join(names if len(names) == 1 else [*names, "id"])
        execute(settings, f"CREATE TABLE keys{number} (id int, {defined}, PRIMARY KEY ({key}))")
        literals = [[filled(kind, row) for row in range(ROWS)] for kind in columns]
        kinds = [kind.sql for kind in columns]
        insert(settings, f"keys{number}", list(zip(names, kinds, literals, strict=True)))
    prepare(settings)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, *[f"DELETE FROM keys{number}" for number in range(len(tables))])
        capture.reach()
    for number in range(len(tables)):
        logged = changes(settings, f"public.keys{number}")
        ops = [change.op for change in logged]
        assert ops.count("d") == 2 * ops.count("r") > 0, (capture.said, logged)
        assert replay(settings, f"public.keys{number}") == {}


def filled(kind: Kind, row: int) -> str:
    """Return a value that is never null and fits into an index."""
    values = [value for value in kind.values if len(value) < 300]
    return "{}" if kind.array else values[row % len(values)]


COLLATED = """
CREATE COLLATION blind (PROVIDER = icu, LOCALE = 'und-u-ks-level2', DETERMINISTIC = false);
CREATE DOMAIN spoken AS text COLLATE "und-x-icu"; CREATE DOMAIN fixed AS char(5); CREATE DOMAIN named AS text[] COLLATE "und-x-icu"
"""
WORDS = ["", "a", "B", "c", "Ä", "\\", "it's", "z\t", "ß", "10", "9"]
FEW = 9
"""Rows of a table that is read in chunks."""


def test_a_key_of_any_type_is_where_the_next_chunk_begins(settings: Settings) -> None:
    """One that does not come back would let rows fall between two chunks, and be taken for dead; here each row is a chunk."""
    execute(settings, *COLLATED.split(";"))
    with psycopg.connect(settings.dsn, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
        tables = keyed_by(connection, [*all_kinds(settings), *collated_kinds()])
    assert len(tables) > 100
    prepare(settings)
    with closing(catalog.connect(settings.dsn)) as connection:
        published = catalog.published_tables(connection, settings.publication)
        found = {
            tables[table.full_name].sql: [in_chunks(connection, settings, table, most) for most in (100, 1)]
            for table in published
        }
    wrong = {kind: (read, again) for kind, (read, again) in found.items() if read != again or not read}
    assert wrong == {}


PAGED = {"float8", "numeric", "bytea", "timestamp", "inet", "integer[]", "pair", "public.hstore", "texts", "char(5)"}
PAGED |= {"text COLLATE blind", 'spoken COLLATE "C"'}


def test_no_row_is_lost_between_chunks_whatever_the_key_is(settings: Settings) -> None:
    """By a snapshot in chunks and by a pass after it every row is written once, and none is deleted."""
    settings = replace(settings, cut_records=4)
    execute(settings, *COLLATED.split(";"))
    kinds = [kind for kind in [*all_kinds(settings), *collated_kinds()] if {kind.name, kind.sql} & PAGED]
    with psycopg.connect(settings.dsn, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
        tables = keyed_by(connection, kinds)
    assert len(tables) == len(PAGED)
    prepare(settings)
    with capturing(settings, chunked=True) as capture:
        capture.hear("the initial snapshot is complete")
        capture.reach()
        Control(Log(settings)).ask("capture", "resnapshot", {"tables": list(tables)})
        capture.eventually(
            "all are read again", lambda: sum("was read again" in line for line in capture.said) == 2 * len(tables)
        )
        capture.reach()
    for table, kind in tables.items():
        written = Counter((change.op, change.key) for change in changes(settings, table))
        ((count,),) = rows(settings, f"SELECT count(*) FROM {table}")
        assert (len(written), set(written.values()), {op for op, _ in written}) == (count, {2}, {"r"}), (
            kind.sql,
            written,
        )


def collated_kinds() -> list[Kind]:
    """Return types that are more than their name, as keys may have them."""
    texts = [
        'text COLLATE "de-x-icu"',
        "text COLLATE blind",
        'spoken COLLATE "C"',
        "spoken",
        "fixed",
        "char(5)",
        "varchar(4)",
    ]
    found = [Kind(spelled, tuple(WORDS)) for spelled in texts]
    found.append(Kind('named COLLATE "C"', tuple("{" + word + "}" for word in "aBcÄ")))
    found.append(Kind("numeric(6,2)", ("NaN", "1", "1.10", "-0.5", "9999.99")))
    return [*found, Kind("timestamp(0)", ("infinity", "0044-03-15 00:00:00.7 BC", "2024-02-29"))]


def keyed_by(connection: psycopg.Connection[Any], kinds: list[Kind]) -> dict[str, Kind]:
    """Make a table with a few rows for each kind that a primary key may hold; return the kinds by table."""
    tables = {}
    for number, kind in enumerate(kinds):
        name, values = f"public.paged{number}", [value for value in kind.values if len(value) < 300]
        literals = [kind.literal(row) for row in range(FEW)] if kind.array else values[:FEW]
        with suppress(psycopg.errors.UndefinedObject, psycopg.errors.UndefinedFunction), connection.transaction():
            connection.execute(f"CREATE TABLE {name} (k {kind.sql} PRIMARY KEY)".encode())
            rows = ", ".join([f"(%s::{kind.sql})"] * len(literals))
            query = f"INSERT INTO {name} SELECT * FROM (VALUES {rows}) v(k) WHERE k IS NOT NULL ON CONFLICT DO NOTHING"
            connection.execute(query.encode(), literals)
            tables[name] = kind
    return tables


def in_chunks(connection: catalog.Connection, settings: Settings, table: catalog.Table, most: int) -> list[str]:
    """Return the keys of a table, read in chunks of so many rows; or what Postgres says to that."""
    keys: list[str] = []
    while len(keys) <= FEW:
        ask = Ask("", table.full_name, keys[-1:], None, most, frozenset(), "", appended=False, again=False)
        try:
            rows, last = chunks._rows(connection, chunks._query(connection, settings.publication, table, ask), most)
        except psycopg.Error as error:
            return [*keys, str(error)]
        keys += [key.decode() for (key,) in rows]
        if last:
            break
    return keys


IDENTIFIERS = [
    'Camel "Case"',
    "sp ace",
    "ünïcode 表 😀",
    "a.b",
    "50%",
    "select",
    "it's",
    "back\\slash",
    "_u0020_",
    "tab\tbed",
]


def test_identifiers_of_any_kind(settings: Settings) -> None:
    """Schemas, tables, key columns and columns named with spaces, quotes, capitals, dots, Unicode and keywords."""
    made = []
    for number, name in enumerate(IDENTIFIERS):
        table, column = quote(name), quote(IDENTIFIERS[number - 1])
        schema = quote(IDENTIFIERS[number - 3].replace(".", "-"))
        made += [f"CREATE SCHEMA {schema}", f"CREATE TABLE {schema}.{table} ({column} int PRIMARY KEY, {table} text)"]
        made.append(f"INSERT INTO {schema}.{table} VALUES (1, 'snapshot')")
    prepare(settings, *made)
    with capturing(settings) as capture:
        capture.hear("streaming")
        for number, name in enumerate(IDENTIFIERS):
            table, schema = quote(name), quote(IDENTIFIERS[number - 3].replace(".", "-"))
            execute(
                settings,
                f"INSERT INTO {schema}.{table} VALUES (2, 'stream')",
                f"UPDATE {schema}.{table} SET {table} = 'x'",
            )
        capture.reach()
    for number, name in enumerate(IDENTIFIERS):
        column, schema = IDENTIFIERS[number - 1], IDENTIFIERS[number - 3].replace(".", "-")
        log = replay(settings, f"{schema}.{name}")
        assert list(log.values()) == [{column: 1, name: "x"}, {column: 2, name: "x"}]
        assert list(log) == [
            json.dumps({column: n}, ensure_ascii=False, separators=(",", ":")).encode() for n in (1, 2)
        ]


def quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
