"""The decoder against messages that Postgres really sent, and against all that may have happened to them on their way.

Recorded from each version of the server; mutated by hypothesis: bytes changed, cut out, doubled, spliced with another message, lengths
and counts that lie. Whatever comes in, a message comes out or `DecodeError`; and of what was decoded, a row or `Poison`.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

import psycopg
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headrace.change import Column, TableSchema
from headrace.errors import Poison
from headrace.settings import Settings
from headrace_capture import pgoutput
from headrace_capture.tables import ColumnPlan, Table

BIG = "repeat(md5('x'), 300)"
HISTORY = [
    "CREATE TYPE mood AS ENUM ('sad', 'ok')",
    "CREATE TABLE items (id int PRIMARY KEY, name text, n numeric, m mood, a int[], big text, at timestamptz, raw bytea)",
    "ALTER TABLE items ALTER COLUMN big SET STORAGE EXTERNAL",
    "CREATE TABLE wide (a text, b text, PRIMARY KEY (b, a)); ALTER TABLE wide REPLICA IDENTITY FULL",
]
RECORDED = [
    f"INSERT INTO items VALUES (1, 'ü \" \\', 1.50, 'ok', '{{1,NULL,3}}', {BIG}, now(), '\\x00ff')",
    "INSERT INTO items VALUES (2, NULL, 'NaN', NULL, '{}', '', NULL, '')",
    "UPDATE items SET n = 2",
    "UPDATE items SET id = id + 10",
    "DELETE FROM items WHERE id = 11",
    "INSERT INTO wide VALUES ('a', 'b'); UPDATE wide SET a = 'c'; DELETE FROM wide",
    "TRUNCATE items, wide RESTART IDENTITY CASCADE",
    "SELECT pg_logical_emit_message(true, 'headrace', 'hello'), pg_logical_emit_message(false, 'headrace', '')",
]
CHANGES = (
    "SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, "
    "'proto_version', '1', 'publication_names', %s, 'messages', 'true')"
)


def record(source: Settings) -> list[bytes]:
    """Return the messages of a history that has every kind of them."""
    name = source.source
    with psycopg.connect(source.dsn, autocommit=True) as connection:
        for statement in [*HISTORY, f"CREATE PUBLICATION {name} FOR TABLE items, wide"]:
            connection.execute(statement.encode())
        connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])
        connection.execute(f"SELECT pg_replication_origin_create('{name}')".encode())
        for statement in RECORDED:
            connection.execute(statement.encode())
        connection.execute("SELECT pg_replication_origin_session_setup(%s)", [name])
        connection.execute("INSERT INTO items (id) VALUES (99)")
        connection.execute("SELECT pg_replication_origin_session_reset(), pg_replication_origin_drop(%s)", [name])
        return [data for (data,) in connection.execute(CHANGES, [name, name])]


@st.composite
def mutated(draw: st.DrawFn, messages: list[bytes]) -> bytes:
    """Return a message to which something has happened, up to four times."""
    message = bytearray(draw(st.sampled_from(messages)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(message)))
        how = draw(st.sampled_from(["byte", "cut", "double", "splice", "lie16", "lie32", "end"]))
        if how == "byte":
            message[at : at + 1] = draw(st.binary(min_size=1, max_size=2))
        elif how in {"cut", "double"}:
            piece = message[at : at + draw(st.integers(1, 16))]
            message[at : at + len(piece)] = piece * (2 if how == "double" else 0)
        elif how == "splice":
            other = draw(st.sampled_from(messages))
            message[at:] = other[draw(st.integers(0, len(other))) :]
        elif how == "lie16":
            message[at : at + 2] = struct.pack(">H", draw(st.sampled_from([0, 1, 0x7FFF, 0xFFFF])))
        elif how == "lie32":
            message[at : at + 4] = struct.pack(">I", draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 31])))
        else:
            del message[at:]
    return bytes(message)


def test_whatever_happens_to_a_message_it_is_decoded_or_refused(each_source: Settings) -> None:
    messages = record(each_source)
    kinds = {type(pgoutput.parse(message)) for message in messages}
    assert kinds == set(pgoutput.Parsed.__args__)
    decoded = 0

    @hypothesis_settings(max_examples=2_000, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mutated(messages))
    def fuzz(payload: bytes) -> None:
        nonlocal decoded
        with suppress(pgoutput.DecodeError):
            parsed = pgoutput.parse(payload)
            decoded += 1
            bounded(parsed, payload)
        with suppress(*pgoutput.MALFORMED):  # as the stream calls it, a few calls shorter
            pgoutput.PARSERS[payload[0]](payload)

    fuzz()
    assert decoded  # some mutations leave a message


def bounded(parsed: Any, payload: bytes) -> None:
    """What comes out is never larger than what went in: a count that lies makes nothing."""
    rows = [row for row in (getattr(parsed, "old", None), getattr(parsed, "new", None)) if row is not None]
    assert sum(len(value) for row in rows for value in row if isinstance(value, bytes)) <= len(payload)
    assert sum(map(len, rows)) <= len(payload)


@hypothesis_settings(max_examples=1_000, database=None, derandomize=True)
@given(st.binary(max_size=300), st.sampled_from(sorted(b"BCRYIUDTOM")), st.sampled_from(b"wk"))
def test_noise_behind_a_true_beginning_is_decoded_or_refused(noise: bytes, kind: int, frame: int) -> None:
    with suppress(pgoutput.DecodeError):
        pgoutput.parse(bytes([kind]) + noise)
    with suppress(pgoutput.DecodeError):
        pgoutput.unframe(bytes([frame]) + noise)


TYPES = ["bool", "int4", "float8", "numeric", "text", "timestamptz", "bytea", "json", "uuid", "nothing"]
COLUMNS = [(base, element) for each in TYPES for base, element in ((each, ""), (f"_{each}", each))]


@hypothesis_settings(max_examples=1_000, database=None, derandomize=True)
@given(st.sampled_from(COLUMNS), st.one_of(st.binary(max_size=40), st.text('{}",\\[]=:;NUL 1+-.e', max_size=20)))
def test_values_that_no_server_sends_are_encoded_or_poison(column: tuple[str, str], value: bytes | str) -> None:
    plan = ColumnPlan(Column("v", column[0]), *column, out_of_line=False)
    table = Table(TableSchema("public.t", 1, (plan.column,), ("v",)), "t", [plan], ("s", "d"))
    raw = value.encode() if isinstance(value, str) else value
    for encode in (table.row, table.key):
        with suppress(Poison):
            encode([raw])
