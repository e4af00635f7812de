"""Debezium's records, as its connector 3.6 wrote them, decoded: versions in log order, shapes, documents, whole rows only."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from headrace.change import UNKNOWN_SCHEMA, Version
from headrace.errors import Misconfigured, Poison
from headrace.log.debezium import Decoder
from tests.fixtures.envelopes import key, value, with_schema

T = "public.items"
TEXT = "__debezium_unavailable_value"


def test_records_become_changes_of_a_version_that_grows_with_the_log() -> None:
    """A snapshot and the first transaction after a start have no commit before them; a tombstone says nothing at all."""
    decoder = Decoder(0)
    records = [
        (key(1), value("r", {"id": 1, "n": None}, [None, 100])),
        (key(1), value("u", {"id": 1, "n": 5}, [None, 90])),
        (key(1), value("u", {"id": 1, "n": 6}, [150, 120])),
        (key(1), value("d", None, [160, 170])),
        (key(1), None),
    ]
    changes = [decoder.change(T, 0, offset, *record) for offset, record in enumerate(records)]
    assert [change.version for change in changes] == [Version(1, lsn) for lsn in (100, 100, 150, 160, 160)]
    assert [change.op for change in changes] == ["r", "u", "u", "d", "d"]
    assert [change.key for change in changes] == [b'{"id":1}'] * 5
    assert [change.row for change in changes] == [
        {"id": 1, "n": None},
        {"id": 1, "n": 5},
        {"id": 1, "n": 6},
        None,
        None,
    ]
    assert [change.read for change in changes] == ["snapshot", None, None, None, None]
    assert (decoder.highest, decoder.xid) == (160, 758)


def test_what_is_sent_again_after_a_restart_stays_in_log_order() -> None:
    decoder = Decoder(500)
    change = decoder.change(T, 0, 9, key(1), value("u", {"id": 1}, [None, 90]))
    assert change.version == Version(1, 500)


def test_a_shape_is_what_the_values_look_like_and_grows_in_versions() -> None:
    decoder = Decoder(0)
    rows = [
        {"id": 1, "a": None},
        {"id": 2, "a": 1},
        {"id": 3, "a": 1.5},
        {"id": 4, "a": 2},
        {"id": 5, "a": 2, "b": [1]},
    ]
    changes = [decoder.change(T, 0, at, key(at), value("c", row, [10, 10])) for at, row in enumerate(rows)]
    shapes = [decoder.schemas[T, change.schema] for change in changes]
    assert [column.type for column in shapes[0].columns] == ["bigint", "unknown"], "a null says nothing"
    assert [column.type for column in shapes[1].columns] == ["bigint", "bigint"]
    assert [column.type for column in shapes[2].columns] == ["bigint", "double precision"]
    assert shapes[3] is shapes[2]
    assert [column.type for column in shapes[4].columns] == ["bigint", "double precision", "jsonb"]
    assert [shape.version for shape in shapes] == sorted(shape.version for shape in shapes)
    assert all(shape.key == ("id",) for shape in shapes)


def test_a_shape_only_grows_for_a_row_may_be_of_an_old_one() -> None:
    """A column goes and comes again; partitions that were written before and after a change are read in turns."""
    decoder = Decoder(0)
    narrow = [{"field": "id", "type": "int32"}, {"field": "n", "type": "int32"}]
    wide = [{"field": "n", "type": "int64"}, {"field": "note", "type": "string"}, {"field": "id", "type": "int32"}]
    rows = [({"id": 1, "n": 1}, narrow), ({"n": 1 << 40, "note": "x", "id": 2}, wide), ({"id": 3, "n": 3}, narrow)]
    said = [with_schema(value("c", row, [10, 10]), fields) for row, fields in [*rows, rows[1]]]
    versions = [decoder.change(T, at % 2, at, key(at), each).schema for at, each in enumerate(said)]
    assert versions[0] < versions[1] == versions[2] == versions[3]
    grown = [(column.name, column.type) for column in decoder.schemas[T, versions[3]].columns]
    assert grown == [("id", "integer"), ("n", "bigint"), ("note", "text")]


def test_what_is_kept_of_a_feed_does_not_grow_with_its_rows() -> None:
    """[I10]: without Connect's schema each row has nulls in other columns."""
    decoder = Decoder(0)

    def held(rows: range) -> int:
        for id_ in rows:
            row = {"id": id_, **{f"c{bit}": "x" if id_ >> bit & 1 else None for bit in range(6)}}
            decoder.change(T, 0, id_, key(id_), value("c", row, [10, 10]))
        return sum(len(each) for each in vars(decoder).values() if not isinstance(each, int))

    assert held(range(63, 64)) == held(range(63))


@pytest.mark.parametrize("said", [value("u", {"id": 1, "tenant": 5}, [20, 20]), value("d", None, [20, 20]), None])
def test_s9_a_key_of_other_columns_is_refused(said: bytes | None) -> None:
    """Rows that were written with the old key would stay for ever."""
    decoder = Decoder(0)
    decoder.change(T, 0, 0, key(1), value("c", {"id": 1, "tenant": 5}, [10, 10]))
    with pytest.raises(Misconfigured, match=r"was id, and is id, tenant") as caught:
        decoder.change(T, 0, 1, b'{"id":1,"tenant":5}', said)
    assert (caught.value.code, "new feed" in caught.value.remedy) == ("key-changed", True)


def test_a_delete_says_nothing_of_a_shape() -> None:
    """A decoder is new at each opening: what it reads first may be a delete."""
    decoder = Decoder(0)
    for offset, said in enumerate([value("d", None, [10, 10]), None]):
        assert decoder.change(T, 0, offset, key(1), said).schema == UNKNOWN_SCHEMA
    assert decoder.schemas == {}
    row = decoder.change(T, 0, 2, key(2), value("c", {"id": 2, "n": 1}, [20, 20]))
    assert [column.name for column in decoder.schemas[T, row.schema].columns] == ["id", "n"]
    assert decoder.change(T, 0, 3, key(2), None).schema == row.schema > UNKNOWN_SCHEMA


def test_connects_schema_tells_types_and_documents() -> None:
    decoder = Decoder(0)
    fields = [
        {"field": "id", "type": "int32"},
        {"field": "j", "type": "string", "name": "io.debezium.data.Json"},
        {"field": "js", "type": "array", "items": {"type": "string", "name": "io.debezium.data.Json"}},
        {"field": "f", "type": "float"},
        {"field": "t", "type": "string", "name": "io.debezium.time.ZonedTimestamp"},
    ]
    row = {"id": 1, "j": '{"a": [1]}', "js": ["1", None], "f": 1.5, "t": "2026-11-25T21:33:15.948634Z"}
    of_key = b'{"schema":{"type":"struct","fields":[{"type":"int32","field":"id"}]},"payload":{"id":1}}'
    change = decoder.change(T, 0, 0, of_key, with_schema(value("c", row, [10, 10]), fields))
    assert change.key == b'{"id":1}'
    assert change.row == row | {"j": {"a": [1]}, "js": [1, None]}
    assert [column.type for column in decoder.schemas[T, change.schema].columns] == [
        "integer",
        "jsonb",
        "jsonb[]",
        "real",
        "timestamp with time zone",
    ]


def iso(name: str) -> dict[str, Any]:
    return {"type": "string", "name": f"io.debezium.time.{name}"}


def source(type_: str, length: int, scale: int | None = None) -> dict[str, Any]:
    said = {"type": type_, "length": str(length)} | ({} if scale is None else {"scale": str(scale)})
    return {"parameters": {f"__debezium.source.column.{name}": value for name, value in said.items()}}


TYPED: list[tuple[dict[str, Any], str, Any, Any]] = [
    (iso("IsoDate"), "date", "2024-01-02Z", "2024-01-02"),
    (iso("IsoDate"), "date", "+10000-01-01Z", "10000-01-01"),
    (iso("IsoDate"), "date", "-0043-03-15Z", "0044-03-15 BC"),
    ({"type": "int32", "name": "io.debezium.time.Date"}, "integer", -735_160, -735_160),  # not isostring: as it comes
    (iso("IsoDate"), "date", "+292278994-08-16Z", "infinity"),
    (iso("IsoDate"), "date", "+292269055-12-02Z", "-infinity"),
    (iso("IsoTimestamp"), "timestamp without time zone", "2024-01-02T03:04:05.1Z", "2024-01-02T03:04:05.1"),
    (iso("IsoTimestamp"), "timestamp without time zone", "-0043-03-15T12:00:00Z", "0044-03-15T12:00:00 BC"),
    (iso("IsoTimestamp"), "timestamp without time zone", "0000-03-15T12:00:00Z", "0001-03-15T12:00:00 BC"),
    (iso("IsoTimestamp"), "timestamp without time zone", "+294247-01-10T04:00:25.2Z", "infinity"),
    (iso("IsoTimestamp"), "timestamp without time zone", "-290308-12-21T19:59:27.6Z", "-infinity"),
    (
        iso("ZonedTimestamp"),
        "timestamp with time zone",
        "-0043-03-15T12:00:00.000000Z",
        "0044-03-15T12:00:00.000000Z BC",
    ),
    (
        iso("ZonedTimestamp"),
        "timestamp with time zone",
        "+10000-01-01T00:00:00.000000Z",
        "10000-01-01T00:00:00.000000Z",
    ),
    (iso("ZonedTimestamp"), "timestamp with time zone", "-infinity", "-infinity"),
    (iso("IsoTime"), "text", "03:04:05Z", "03:04:05Z"),
    ({"type": "string"}, "text", "9.90", "9.90"),
    ({"type": "string"} | source("NUMERIC", 10, 2), "numeric(10,2)", "9.90", "9.90"),
    ({"type": "string"} | source("NUMERIC", 0), "numeric", "NAN", "NaN"),
    ({"type": "string"} | source("NUMERIC", 5, 2046), "numeric", "NEGATIVE_INFINITY", "-Infinity"),
    ({"type": "double"} | source("NUMERIC", 10, 2), "double precision", 9.9, 9.9),
    ({"type": "string"} | source("VARCHAR", 9, 0), "text", "NAN", "NAN"),
]
"""Fields as Debezium 3.6 writes them (seen, but for year 0 and negative infinity), their type in Postgres, a value before and after."""


@pytest.mark.parametrize(("field", "kind", "said", "plain"), TYPED)
def test_values_of_the_recommended_options_are_as_in_headraces_log(
    field: dict[str, Any], kind: str, said: Any, plain: Any
) -> None:
    decoder = Decoder(0)
    parameters = field.get("parameters", {})
    of_array = {name: "_" + value if name.endswith("type") else value for name, value in parameters.items()}
    items = {name: value for name, value in field.items() if name != "parameters"}
    fields = [
        {"field": "id", "type": "int32"},
        {"field": "v"} | field,
        {"field": "vs", "type": "array", "items": items} | ({"parameters": of_array} if of_array else {}),
    ]
    row = {"id": 1, "v": said, "vs": [said, None]}
    change = decoder.change(T, 0, 0, key(1), with_schema(value("c", row, [10, 10]), fields))
    assert change.row == {"id": 1, "v": plain, "vs": [plain, None]}
    assert [column.type for column in decoder.schemas[T, change.schema].columns] == ["integer", kind, f"{kind}[]"]


def test_a_key_is_in_the_form_of_its_row() -> None:
    decoder, field = Decoder(0), {"field": "day"} | iso("IsoDate")
    of_key = orjson.dumps({"schema": {"type": "struct", "fields": [field]}, "payload": {"day": "2024-01-02Z"}})
    row = with_schema(value("c", {"day": "2024-01-02Z"}, [10, 10]), [field])
    change = decoder.change(T, 0, 0, of_key, row)
    assert (change.key, change.row) == (b'{"day":"2024-01-02"}', {"day": "2024-01-02"})
    assert decoder.change(T, 0, 1, of_key, None).key == change.key


def test_documents_that_readers_refuse_are_their_text_as_captures_are() -> None:
    json = {"type": "string", "name": "io.debezium.data.Json"}
    fields = [{"field": "id", "type": "int32"}, {"field": "j"} | json, {"field": "js", "type": "array", "items": json}]
    for text in ("[" * 201 + "]" * 201, "[" * 2000 + "]" * 2000, '"\\ud800"', "1e400"):
        row = {"id": 1, "j": text, "js": [text, "[1]"]}
        change = Decoder(0).change(T, 0, 0, key(1), with_schema(value("c", row, [10, 10]), fields))
        assert change.row == row | {"js": [text, [1]]}


@pytest.mark.parametrize(
    "placeholder",
    [
        TEXT,
        "X19kZWJleml1bV91bmF2YWlsYWJsZV92YWx1ZQ==",
        [TEXT],
        ["X19kZWJleml1bV91bmF2YWlsYWJsZV92YWx1ZQ=="],
        ["b68a35a7-17ad-35b3-af2a-ae46edb4545a"],
        list(TEXT.encode()),
        {TEXT: TEXT},
    ],
)
def test_a_row_that_is_not_whole_is_refused_with_what_to_change(placeholder: Any) -> None:
    with pytest.raises(Poison) as caught:
        Decoder(0).change(T, 0, 7, key(1), value("u", {"id": 1, "big": placeholder}, [10, 10]))
    assert caught.value.code == "debezium-placeholder"
    assert "big" in caught.value.message
    assert "REPLICA IDENTITY FULL" in caught.value.remedy


def test_a_value_that_only_speaks_of_the_placeholder_is_a_value() -> None:
    row = {"id": 1, "big": f"see {TEXT}"}
    assert Decoder(0).change(T, 0, 7, key(1), value("u", row, [10, 10])).row == row


@pytest.mark.parametrize(
    ("of_key", "said", "code"),
    [
        (key(1), value("t", None, [10, 10]), "debezium-truncate"),
        (key(1), b"\0\0\0\0\x01avro", "undecodable-record"),
        (key(1), b'{"id":1}', "undecodable-record"),
        (key(1), value("u", None, [10, 10]), "undecodable-record"),
        (b"", value("c", {"id": 1}, [10, 10]), "undecodable-record"),
    ],
)
def test_what_cannot_be_read_is_poison(of_key: bytes, said: bytes, code: str) -> None:
    with pytest.raises(Poison) as caught:
        Decoder(0).change(T, 3, 42, of_key, said)
    assert caught.value.code == code
