"""Values of every kind, with Postgres itself as the oracle: snapshot and stream say the same, and what its own JSON says.

`to_jsonb` is the oracle where it has natural JSON of its own; where docs/formats.md says otherwise (numeric, bytea, times in UTC)
the expectation is an SQL expression beside the literal.
"""

from __future__ import annotations

import json
from typing import Any

from headrace import codec
from headrace.log import Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.settings import Settings
from tests.fixtures.capture import capturing, execute, prepare, replay, rows

T = "public.kinds"
SAME = "to_jsonb(v)"
TEXT = "to_jsonb(v::text)"
KINDS: dict[str, tuple[str, list[str]]] = {
    "smallint": (SAME, ["-32768", "32767"]),
    "integer": (SAME, ["-2147483648", "0"]),
    "bigint": (SAME, ["-9223372036854775808", "9223372036854775807"]),
    "real": (SAME, ["1.5", "1e-10", "3.4028235e38"]),
    "double precision": (SAME, ["0.1::float8 + 0.2", "1e300", "-0.0"]),
    "boolean": (SAME, ["true", "false"]),
    "numeric(30,10)": (TEXT, ["12345678901234567890.0123456789", "'NaN'"]),
    "numeric": (TEXT, ["1e-20", "1e50", "'Infinity'"]),
    "text": (SAME, ["''", "E'tab\\t nl\\n q\" b\\\\ ctl\\x01'", "'ü€😀'", "repeat('z', 20000)"]),
    "varchar(10)": (SAME, ["'x'"]),
    "char(5)": (SAME, ["'x'"]),
    '"char"': (SAME, ["'x'"]),
    "name": (SAME, ["'x'"]),
    "uuid": (SAME, ["gen_random_uuid()"]),
    "date": (SAME, ["'2024-02-29'", "'infinity'", "'0001-01-01'"]),
    "time": (SAME, ["'23:59:59.999999'"]),
    "timetz": (SAME, ["'23:59:59+05'"]),
    "timestamp": (SAME, ["'2024-02-29 12:00:00.000001'", "'-infinity'", "'2024-02-29 00:00:00'"]),
    "timestamptz": (SAME, ["'2024-02-29 12:00:00+05'", "'0044-03-15 12:00:00+05 BC'", "'infinity'"]),
    "interval": (TEXT, ["'1 year -2 days 03:04:05.6'"]),
    "bytea": (
        "to_jsonb(translate(encode(v, 'base64'), E'\\n', ''))",
        ["'\\x'", "'\\x00ff'", "decode(repeat('ab', 500), 'hex')"],
    ),
    "json": (SAME, ['\'{"a": [1, null, "x"], "b": {}}\'', "'[]'", "'null'"]),
    "jsonb": (SAME, ["'{\"a\": 1.50}'", "'\"text\"'"]),
    "integer[]": (SAME, ["'{}'", "'{1,NULL,3}'", "'{{1,2},{3,4}}'"]),
    "text[]": (SAME, ["array['a,b', 'c\"d', E'e\\\\f', NULL, 'NULL', '', '{x}', ' y ']"]),
    "boolean[]": (SAME, ["'{t,f,NULL}'"]),
    "jsonb[]": (SAME, ["array['{\"a\": [1, 2]}'::jsonb]"]),
    "numeric[]": ("(SELECT jsonb_agg(x::text) FROM unnest(v) x)", ["'{1.10,2}'"]),
    "inet": (TEXT, ["'10.0.0.1/8'"]),
    "int4range": (TEXT, ["'[1,5)'"]),
    "point": (TEXT, ["'(1,2)'"]),
    "money": (TEXT, ["'12.34'"]),
    "bit(3)": (TEXT, ["'101'"]),
    "xml": (TEXT, ["'<a/>'"]),
    "tsvector": (TEXT, ["'a:1 b:2'"]),
    "mood": (TEXT, ["'so so'"]),
    "pair": (TEXT, ["ROW(1, 'x,\"y')"]),
    "positive": (SAME, ["7"]),
    "amounts": ("(SELECT jsonb_agg(x::text) FROM unnest(v::numeric[]) x)", ["'{1.5}'"]),
}
TYPES = (
    "CREATE TYPE mood AS ENUM ('sad', 'so so'); CREATE TYPE pair AS (a int, b text);"
    "CREATE DOMAIN positive AS int CHECK (VALUE > 0); CREATE DOMAIN amounts AS numeric[]"
)


def test_every_kind_is_what_postgres_says(settings: Settings) -> None:
    columns = [f"c{n}" for n in range(len(KINDS))]
    defined = ", ".join(f"{column} {kind}" for column, kind in zip(columns, KINDS, strict=True))
    inserts = [
        f"INSERT INTO kinds (id, c{n}) VALUES ({{offset}} + {100 * n + m}, {literal})"
        for n, (_, literals) in enumerate(KINDS.values())
        for m, literal in enumerate(literals)
    ]
    prepare(settings, TYPES, f"CREATE TABLE kinds (id int PRIMARY KEY, {defined})")
    execute(settings, *[insert.replace("{offset}", "0") for insert in inserts])
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "SET TimeZone = 'Asia/Tokyo'", *[insert.replace("{offset}", "10000") for insert in inserts])
        capture.reach()
    log = replay(settings, T)
    wanted = expected(settings, columns)
    assert len(log) == len(wanted) == 2 * len(inserts)
    assert {key: row for key, row in log.items() if wanted[key] != row} == {}


def expected(settings: Settings, columns: list[str]) -> dict[bytes, Any]:
    """Return each row as its expressions make it of Postgres's values, in a session with settings of its own."""
    oracles = ", ".join(
        f"'{column}', CASE WHEN {column} IS NULL THEN NULL ELSE {oracle.replace('(v', f'({column}')} END"
        for column, (oracle, _) in zip(columns, KINDS.values(), strict=True)
    )
    found = rows(settings, f"SELECT id, jsonb_build_object('id', id, {oracles})::text FROM kinds")
    return {b'{"id":%d}' % id_: json.loads(text, parse_int=_number) for id_, text in found}


def _number(text: str) -> float:
    """jsonb writes a float's exponent out."""
    return int(text) if len(text) < 20 else float(text)


def test_numbers_in_json_keep_their_digits(settings: Settings) -> None:
    """The bytes of the document are Postgres's, in snapshot and stream."""
    digits = "123456789012345678901234567890.12345678901234567890"
    prepare(
        settings,
        "CREATE TABLE kinds (id int PRIMARY KEY, a json, b jsonb)",
        f"INSERT INTO kinds VALUES (1, '{digits}', '{digits}')",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"INSERT INTO kinds VALUES (2, '{digits}', '{digits}')")
        capture.reach()
    values = [record.value for record in read_to_end(settings, {(Log(settings).topic_of(T), 0): BEGINNING})]
    assert [codec.members(value, b"after")["a"] for value in values if value] == [digits.encode()] * 2
    assert [codec.members(value, b"after")["b"] for value in values if value] == [digits.encode()] * 2


def test_generated_columns_as_the_publication_says(settings: Settings) -> None:
    """Stored ones are in snapshot and stream alike, virtual ones in neither."""
    prepare(
        settings,
        "CREATE TABLE kinds (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED, thrice int GENERATED ALWAYS AS (id * 3))",
        "INSERT INTO kinds VALUES (1)",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "INSERT INTO kinds VALUES (2)")
        capture.reach()
    assert list(replay(settings, T).values()) == [{"id": 1, "twice": 2}, {"id": 2, "twice": 4}]


def test_partitions_are_one_table(settings: Settings) -> None:
    """Rows come under the root's name, in snapshot and stream; a row that moves between partitions stays one row."""
    prepare(
        settings,
        "CREATE TABLE kinds (id int, region text, n int, PRIMARY KEY (id, region)) PARTITION BY LIST (region)",
        "CREATE TABLE kinds_a PARTITION OF kinds FOR VALUES IN ('a')",
        "CREATE TABLE kinds_b PARTITION OF kinds FOR VALUES IN ('b')",
        "INSERT INTO kinds VALUES (1, 'a', 1), (2, 'b', 2)",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(
            settings,
            "INSERT INTO kinds VALUES (3, 'a', 3)",
            "UPDATE kinds SET region = 'b' WHERE id = 1",
            "UPDATE kinds SET n = 9",
        )
        capture.reach()
    assert replay(settings, T) == {
        b'{"id":%d,"region":"%b"}' % (id_, region): {"id": id_, "region": region.decode(), "n": 9}
        for id_, region in ((1, b"b"), (2, b"b"), (3, b"a"))
    }
    assert Log(settings).tables() == [T]
