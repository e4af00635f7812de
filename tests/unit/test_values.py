"""Values: Postgres's text becomes natural JSON; keys are canonical; COPY's escapes are undone."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import codec
from headrace.change import Column, Snapshot, TableSchema, Version
from headrace.codec import members
from headrace.documents import Document
from headrace.documents.local import LocalRows
from headrace.errors import Poison
from headrace.settings import Settings
from headrace.stores.duckdb import DuckDBStore
from headrace_capture.pgoutput import UNCHANGED
from headrace_capture.tables import ColumnPlan, Json, Stamp, Table, copy_fields
from headrace_capture.values import converter, key_converter, template
from tests.fixtures.tables import FIRST, batch, schema

NESTED = b"[" * 2000 + b"]" * 2000


@pytest.mark.parametrize(
    ("base", "text", "expected"),
    [
        ("int4", b"-7", b"-7"),
        ("int8", b"9223372036854775807", b"9223372036854775807"),
        ("float8", b"1e-05", b"1e-05"),
        ("float8", b"NaN", b'"NaN"'),
        ("float4", b"-Infinity", b'"-Infinity"'),
        ("bool", b"t", b"true"),
        ("bool", b"f", b"false"),
        ("numeric", b"12.50", b'"12.50"'),
        ("numeric", b"NaN", b'"NaN"'),
        ("text", 'a"b\\c\nü'.encode(), '"a\\"b\\\\c\\nü"'.encode()),
        ("bpchar", b"x  ", b'"x  "'),
        ("date", b"2024-02-03", b'"2024-02-03"'),
        ("date", b"infinity", b'"infinity"'),
        ("date", b"0044-03-15 BC", b'"0044-03-15 BC"'),
        ("timestamp", b"2024-02-03 04:05:06.789", b'"2024-02-03T04:05:06.789"'),
        ("timestamp", b"-infinity", b'"-infinity"'),
        ("timestamp", b"0044-03-15 12:00:00 BC", b'"0044-03-15T12:00:00 BC"'),
        ("timestamptz", b"2024-02-03 04:05:06+00", b'"2024-02-03T04:05:06+00:00"'),
        ("timestamptz", b"0044-03-15 12:00:00+00 BC", b'"0044-03-15T12:00:00+00:00 BC"'),
        ("time", b"04:05:06", b'"04:05:06"'),
        ("bytea", b"\\x00ff10", b'"AP8Q"'),
        ("bytea", b"\\x", b'""'),
        ("interval", b"1 day 02:00:00", b'"1 day 02:00:00"'),
        ("json", b' {"a" : 123456789012345678901234567890.10}', b' {"a" : 123456789012345678901234567890.10}'),
        ("json", b'"\\ud800"', b'"\\"\\\\ud800\\""'),
        ("jsonb", b"1e400", b'"1e400"'),
        ("json", NESTED, b'"%b"' % NESTED),
        ("int2vector", b"1 2", b'"1 2"'),
        ("anything", b"(1,2)", b'"(1,2)"'),
    ],
)
def test_scalars(base: str, text: bytes, expected: bytes) -> None:
    """One of each kind, and its odd ones."""
    assert converter(base)(text) == expected
    orjson.loads(expected)


@pytest.mark.parametrize(
    ("element", "text", "expected"),
    [
        ("int4", b"{}", b"[]"),
        ("int4", b"{1,NULL,3}", b"[1,null,3]"),
        ("int4", b"{{1,2},{3,4}}", b"[[1,2],[3,4]]"),
        ("int4", b"[0:1]={3,4}", b"[3,4]"),
        ("int4", b"[1:2][-1:0]={{1,2},{3,4}}", b"[[1,2],[3,4]]"),
        (
            "text",
            b'{"a,b","c\\"d","e\\\\f",NULL,"NULL","","{x}",plain}',
            b'["a,b","c\\"d","e\\\\f",null,"NULL","","{x}","plain"]',
        ),
        ("bytea", b'{"\\\\x00ff"}', b'["AP8="]'),
        ("jsonb", b'{"{\\"a\\": [1, 2]}"}', b'[{"a": [1, 2]}]'),
        ('public."x;y":', b'{a,b:"c:d":NULL}', b'["a,b","c:d",null]'),
        ("box;", b"{(1,1),(0,0);(2,2),(1,1)}", b'["(1,1),(0,0)","(2,2),(1,1)"]'),
        ("timestamptz", b'{"2024-02-03 04:05:06+00",infinity}', b'["2024-02-03T04:05:06+00:00","infinity"]'),
    ],
)
def test_arrays(element: str, text: bytes, expected: bytes) -> None:
    """Nested, quoted, with other bounds and other delimiters."""
    assert converter(f"_{element.rstrip(';')}", element)(text) == expected


def test_an_array_that_goes_on_after_its_end_is_refused() -> None:
    """Nothing is read as half of what it is."""
    with pytest.raises(ValueError, match="ends at"):
        converter("_int4", "int4")(b"{1}2}")


@given(st.dictionaries(st.text(), st.one_of(st.integers(-(2**63), 2**63 - 1), st.text()), min_size=1, max_size=4))
def test_keys_are_the_codecs_bytes(columns: dict[str, int | str]) -> None:
    """Whoever encodes a key, its bytes are the same."""
    kinds = ["int8" if isinstance(value, int) else "text" for value in columns.values()]
    encoded = template(list(columns)) % tuple(
        key_converter(kind)(str(value).encode()) for kind, value in zip(kinds, columns.values(), strict=True)
    )
    assert encoded == codec.encode_key(columns)


def test_float_and_json_keys_are_canonical() -> None:
    """Where Postgres's text is not what a codec would write."""
    assert key_converter("float8")(b"1e+20") == codec.dumps(1e20)
    assert key_converter("jsonb")(b'{"a": 1}') == codec.dumps({"a": 1})
    assert key_converter("jsonb")(b"1.50") == key_converter("jsonb")(b"1.5") == b"1.5"


def test_json_keys_that_differ_in_a_digit_stay_two_keys() -> None:
    """Where a double would round them to one."""
    one, other = (key_converter("jsonb")(b'{"n": 18446744073709551617.%d}' % n) for n in (1, 2))
    assert one == b'"{\\"n\\": 18446744073709551617.1}"'
    assert one != other


def table(*columns: tuple[str, str]) -> Table:
    """Return a table of these columns (name, base type), the first of them its key."""
    shape = TableSchema("public.t", 3, tuple(Column(name, base) for name, base in columns), (columns[0][0],))
    plans = [ColumnPlan(Column(name, base), base, "", out_of_line=True) for name, base in columns]
    return Table(shape, "s.public.t", plans, ("s", "db"))


def test_column_names_need_not_be_plain() -> None:
    """Quotes, percent signs and all."""
    odd = table(('a"b', "int4"), ("50%", "text"), ("%b", "text"))
    assert orjson.loads(odd.row([b"1", b"x", None])) == {'a"b': 1, "50%": "x", "%b": None}
    assert odd.key([b"1", None, None]) == b'{"a\\"b":1}'


def test_what_cannot_be_converted_is_named() -> None:
    """Text that is not UTF-8, a placeholder, a row of another width."""
    for values in ([b"1", b"\xff"], [b"1", UNCHANGED], [b"1"]):
        with pytest.raises(Poison, match=r"public\.t"):
            table(("id", "int4"), ("name", "text")).row(values)


def nested(levels: int) -> bytes:
    """Return a document of so many levels, objects and arrays by turns, with brackets in a string that are none."""
    return b'{"[{":[' * (levels // 2) + b"[]" * (levels % 2) + b"]}" * (levels // 2)


@pytest.mark.parametrize("levels", [200, 201, 206, 207, 253, 260, 1000, 1022, 1023, 1024, 1025, 3000])
def test_a_document_of_any_depth_is_written_read_and_kept(tmp_path: Path, levels: int) -> None:
    """From Postgres's text to the local rows and the warehouse: as itself or as its text, and the same under a log of before."""
    text = nested(levels)
    said = orjson.loads(text) if levels <= codec.LEVELS else text.decode()
    assert converter("jsonb")(text) == (text if levels <= codec.LEVELS else orjson.dumps(said))
    kinds = table(("id", "int4"), ("doc", "jsonb"), ("plain", "jsonb"))
    stamp = Stamp(Version(1, 5), 1, (0, 0))
    plain = b'{"a": [%b]}' % b",".join([b"[]"] * 300)
    values = [b"1", text, plain]
    written, headers = stamp.record(kinds, 1, b"c", kinds.row(values))
    before, _ = stamp.record(kinds, 1, b"c", kinds.row_of_any([b"1", Json(text), plain]))
    now, then = (codec.decode_change("public.t", 0, 7, kinds.key(values), each, headers) for each in (written, before))
    assert now.row == {"id": 1, "doc": said, "plain": orjson.loads(plain)}
    assert (then.op, then.version) == ("c", Version(1, 5))
    whole = levels <= codec.COLUMN_LEVELS  # it might be an array of documents
    assert then.row == now.row | ({"doc": orjson.loads(text)} if whole else {})
    rows = LocalRows(tmp_path / "rows", [Document("public.t")], "abc")
    rows.follow([then])
    assert [touched.node and touched.node["doc"] for touched in rows.touched()] == [then.row["doc"]]
    rows.close()
    shape = schema("public.t", 3, id="integer", doc="jsonb", plain="jsonb")
    store = DuckDBStore(Settings(warehouse=str(tmp_path / "w.duckdb"), warehouse_memory="1GB"), "warehouse")
    store.open(FIRST)
    store.apply(batch(5, then, schemas=(shape,)))
    assert [row.value for row in store.scan(None, 9)] == [then.row]
    store.close()


def test_a_key_of_any_depth_is_the_codecs() -> None:
    """One that is too deep for a document is its text, as in the row."""
    assert key_converter("jsonb")(nested(200)) == nested(200)
    assert key_converter("jsonb")(nested(300)) == orjson.dumps(nested(300).decode())


def escape(value: str | None) -> bytes:
    """Write a field as COPY does."""
    if value is None:
        return b"\\N"
    for plain, escaped in (
        ("\\", "\\\\"),
        ("\t", "\\t"),
        ("\n", "\\n"),
        ("\r", "\\r"),
        ("\b", "\\b"),
        ("\f", "\\f"),
        ("\v", "\\v"),
    ):
        value = value.replace(plain, escaped)
    return value.encode()


@given(st.lists(st.one_of(st.none(), st.text(alphabet="ab\\\t\n\r\b\f\vNxü")), min_size=1, max_size=5))
def test_copy_fields_come_back(fields: list[str | None]) -> None:
    r"""Backslashes, tabs, newlines, and the two characters \N that are no null."""
    line = b"\t".join(escape(field) for field in fields)
    assert copy_fields(line) == [None if field is None else field.encode() for field in fields]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_members_of_a_record_stand_as_they_were_written(row: dict[str, object]) -> None:
    """Each value's bytes, whatever is nested in them."""
    record = b'{"before":null,"after":%b,"source":{"after":1},"op":"u"}' % orjson.dumps(row)
    assert {name: orjson.loads(value) for name, value in members(record, b"after").items()} == row


@pytest.mark.parametrize(
    ("snapshot", "xid", "seen"),
    [
        ("100:200:", 99, True),
        ("100:200:150", 150, False),
        ("100:200:150", 151, True),
        ("100:200:", 200, False),
        (f"{(1 << 32) + 5}:{(1 << 32) + 9}:", 4, True),
        (f"{(1 << 32) + 5}:{(1 << 32) + 9}:{(1 << 32) + 6}", 6, False),
        (f"{(1 << 32) + 5}:{(1 << 32) + 9}:", (1 << 32) - 1, True),
        (f"{(1 << 33) - 5}:{(1 << 33) - 1}:", 3, False),
    ],
)
def test_a_snapshot_sees_what_committed_before_it(snapshot: str, xid: int, seen: bool) -> None:
    """Transaction ids of the stream are the low 32 bits; they wrap."""
    assert Snapshot.parsed(snapshot).sees(xid) is seen


def test_a_commit_far_behind_is_seen_although_a_younger_transaction_has_its_bits() -> None:
    """Half of all ids later the nearest id with the same bits is above the snapshot's end; only by name may it still run."""
    snapshot = Snapshot.parsed("5000000000:5000000000:5000000007")
    later, running = 5_000_000_005 % (1 << 32), 5_000_000_007 % (1 << 32)
    assert not snapshot.sees(later)
    assert not snapshot.sees(later, since=1 << 33)
    assert snapshot.sees(later, since=(1 << 33) + 1)
    assert not snapshot.sees(running, since=1 << 40)
