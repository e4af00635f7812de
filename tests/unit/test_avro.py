"""Avro holds what natural JSON holds: whatever goes through it comes back as the JSON codec gives it."""

from __future__ import annotations

import io
from typing import Any

import fastavro
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace import codec
from headrace.change import Column, TableSchema
from headrace.log.avro import Packer, Unpacker, schema_of
from headrace_capture.values import converter

KINDS: dict[str, tuple[str, str, list[str]]] = {
    "smallint": ("int2", "", ["-32768", "7"]),
    "integer": ("int4", "", ["-2147483648"]),
    "bigint": ("int8", "", ["9223372036854775807"]),
    "oid": ("oid", "", ["4294967295"]),
    "real": ("float4", "", ["1.5", "3.4028235e+38", "1e+06", "100000", "1.1", "NaN", "-Infinity", "-0"]),
    "double precision": ("float8", "", ["0.30000000000000004", "1e+300", "1e+15", "100000000000000", "Infinity", "-0"]),
    "boolean": ("bool", "", ["t", "f"]),
    "numeric(10,2)": ("numeric", "", ["1.50", "NaN"]),
    "timestamp(3) without time zone": ("timestamp", "", ["2024-02-29 12:00:00"]),
    "text": ("text", "", ["", "a\tb ü€😀"]),
    "public.mood": ("mood", "", ["so so"]),
    "bytea": ("bytea", "", ["\\x", "\\x00ff"]),
    "json": ("json", "", [' {"a" : [1, null]}', "null", "12345678901234567890.10", '"\\ud800"']),
    "jsonb": ("jsonb", "", ['"text"', "[]"]),
    "jsonb[]": ("_jsonb", "jsonb", ['{"{\\"a\\": 1.50}",NULL}']),
    "integer[]": ("_int4", "int4", ["{}", "{1,NULL,3}", "{{1,2},{3,NULL}}", "[0:1]={3,4}"]),
    "real[]": ("_float4", "float4", ["{1,1.5,NaN,NULL}", "{{1,1e+06}}"]),
    "bytea[]": ("_bytea", "bytea", ['{"\\\\x00ff",NULL}', '{{"\\\\x01"}}']),
    "character varying(10)[]": ("_varchar", "varchar", ['{"a,b",NULL,"NULL",""}']),
    "numeric[]": ("_numeric", "numeric", ["{1.10,NaN}"]),
    "int2vector": ("int2vector", "int2", ["1 2"]),
}


def value(columns: dict[str, bytes]) -> bytes:
    """A record's value with this row, each column as its JSON."""
    row = b",".join(orjson.dumps(name) + b":" + text for name, text in columns.items())
    source = b'{"connector":"headrace","name":"s","db":"d","schema":"public","table":"t","lsn":1,"txId":2,'
    end = b'"sequence":[1,3],"snapshot":false,"ts_ms":4},"op":"u","ts_ms":5}'
    return b'{"before":null,"after":{' + row + b'},"source":' + source + end


def through(shape: TableSchema, json: bytes) -> tuple[Unpacker, Any]:
    """Write as capture does, read as a reader does."""
    schema = orjson.loads(orjson.dumps(schema_of("shop", shape)))
    parsed = fastavro.parse_schema(schema_of("shop", shape))
    written = io.BytesIO()
    fastavro.schemaless_writer(written, parsed, Packer(shape).envelope(json))
    written.seek(0)
    return Unpacker(schema), fastavro.schemaless_reader(written, parsed, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_under_both_codecs(kind: str) -> None:
    base, element, texts = KINDS[kind]
    convert = converter(base, element)
    columns = {f"c{at}": convert(text.encode()) for at, text in enumerate(texts)} | {"none": b"null"}
    shape = TableSchema("public.t", 1, tuple(Column(name, kind) for name in columns), ("c0",))
    unpacker, read = through(shape, value(columns))
    members = unpacker.members(read)
    envelope = unpacker.envelope(read)
    assert orjson.dumps(envelope) == orjson.dumps(orjson.loads(value(columns)))
    assert orjson.dumps({name: orjson.loads(text) for name, text in members.items()}) == orjson.dumps(envelope["after"])
    if kind.startswith("json"):
        assert {name: text.strip() for name, text in members.items()} == {
            n: text.strip() for n, text in columns.items()
        }


def test_a_document_deeper_than_capture_writes_now_is_its_text_under_both_codecs() -> None:
    """Logs of before have such."""
    deep = b"[" * 260 + b"]" * 260
    shape = TableSchema(
        "public.t", 1, (Column("id", "integer"), Column("j", "jsonb"), Column("js", "jsonb[]")), ("id",)
    )
    json = value({"id": b"1", "j": deep, "js": b"[%b]" % deep})
    unpacker, read = through(shape, json)
    assert unpacker.envelope(read) == codec.envelope(json)
    assert codec.envelope(json)["after"] == {"id": 1, "j": deep.decode(), "js": f"[{deep.decode()}]"}


def test_a_domain_is_kept_as_the_type_below_it() -> None:
    columns = (Column("a", "public.positive", base="integer"), Column("b", "public.amounts", base="numeric[]"))
    shape = TableSchema("public.t", 1, columns, ("a",))
    fields = schema_of("shop", shape)["fields"][0]["type"][1]["fields"]
    assert fields[0]["type"][1]["type"] == "int"
    assert fields[1]["type"][1]["type"] == "array"
    unpacker, read = through(shape, value({"a": b"7", "b": b'["1.5"]'}))
    assert unpacker.envelope(read)["after"] == {"a": 7, "b": ["1.5"]}


NAMES = st.text(min_size=1, max_size=8) | st.lists(
    st.sampled_from(["_u0031", "u00E9_", "_", "é", "1", "a", "-"]), min_size=1, max_size=5
).map("".join)


@given(st.lists(NAMES, min_size=1, max_size=8, unique=True))
@example(["_u0031é", "1u00E9_"])
def test_every_name_of_a_column_has_its_own_field(names: list[str]) -> None:
    shape = TableSchema("1 odd.näme", 1, tuple(Column(name, "text") for name in names), (names[0],))
    json = value({name: orjson.dumps(name) for name in names})
    unpacker, read = through(shape, json)
    assert unpacker.envelope(read)["after"] == {name: name for name in names}


def test_a_delete_has_no_row() -> None:
    shape = TableSchema("public.t", 1, (Column("id", "integer"),), ("id",))
    json = value({}).replace(b"{}", b"null", 1).replace(b'"op":"u"', b'"op":"d"')
    unpacker, read = through(shape, json)
    assert unpacker.envelope(read) == codec.loads(json)


def test_columns_come_and_go_and_old_and_new_readers_read_on() -> None:
    old = TableSchema("public.t", 1, (Column("id", "integer", nullable=False), Column("gone", "text")), ("id",))
    new = TableSchema("public.t", 2, (Column("id", "integer", nullable=False), Column("more", "real[]")), ("id",))
    for writer, reader in ((old, new), (new, old)):
        written = io.BytesIO()
        columns = {column.name: b"1" if column.name == "id" else b"null" for column in writer.columns}
        packed = Packer(writer).envelope(value(columns))
        fastavro.schemaless_writer(written, fastavro.parse_schema(schema_of("s", writer)), packed)
        written.seek(0)
        schemas = (fastavro.parse_schema(schema_of("s", shape)) for shape in (writer, reader))
        read: Any = fastavro.schemaless_reader(written, *schemas)
        assert read["after"] == {column.name: 1 if column.name == "id" else None for column in reader.columns}


def document(leaf: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    names = st.sampled_from(['"a"', '"after"', '"k\\""', '""'])
    return st.lists(leaf, max_size=3).map(lambda of: "[" + " , ".join(of) + "]") | st.dictionaries(
        names, leaf, max_size=3
    ).map(lambda of: "{" + ", ".join(f"{name}: {each}" for name, each in of.items()) + "}")


NUMBERS = ["1", "1.50", "-0", "1e400", "1E-7", "12345678901234567890123.4500"]
LEAF = st.sampled_from([*NUMBERS, "null", '"\\ud800"', '"x,}]\\"{["', '"é😀"'])
TEXTS: dict[str, st.SearchStrategy[str]] = {
    kind: document(st.recursive(LEAF, document, max_leaves=8)) if kind.startswith("json") else st.sampled_from(texts)
    for kind, (_, element, texts) in KINDS.items()
    if not element
}
"""Of each type that is no array: values as Postgres prints them."""


def literal(of: st.SearchStrategy[str], depth: int) -> st.SearchStrategy[str]:
    """An array as Postgres prints it, each of its lists as long as the others of its level."""
    quoted = of.map(lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')
    found = st.just("NULL") | quoted
    for size in range(1, depth + 1):
        found = st.lists(found, min_size=size, max_size=size).map(lambda each: "{" + ",".join(each) + "}")
    return found


@st.composite
def rows(draw: st.DrawFn) -> tuple[TableSchema, dict[str, bytes]]:
    columns, shape = dict[str, bytes](), list[Column]()
    for name in draw(
        st.lists(st.sampled_from(["c", "after", "source", "1x", "é", "_u0031_", 'q"', "a\\b"]), min_size=1, unique=True)
    ):
        kind, depth = draw(st.sampled_from(list(TEXTS))), draw(st.sampled_from([0, 0, 1, 2, 3]))
        base = KINDS[kind][0]
        text = draw(literal(TEXTS[kind], depth) if depth else TEXTS[kind])
        convert = converter(f"_{base}", base) if depth else converter(base, "")
        columns[name] = convert(text.encode())
        shape.append(Column(name, kind + "[]" if depth else kind))
    return TableSchema("public.t", 1, tuple(shape), (shape[0].name,)), columns


@given(rows())
def test_any_row_is_the_same_under_both_codecs(made: tuple[TableSchema, dict[str, bytes]]) -> None:
    """Arrays of any depth, documents to the last digit, columns of any name."""
    shape, columns = made
    json = value(columns)
    unpacker, read = through(shape, json)
    members = unpacker.members(read)
    assert orjson.dumps(unpacker.envelope(read)) == orjson.dumps(codec.envelope(json))
    assert codec.members(json, b"after") == columns
    for column in shape.columns:
        mine, theirs = members[column.name], columns[column.name]
        assert mine == theirs if column.type.startswith("json") else orjson.loads(mine) == orjson.loads(theirs)
