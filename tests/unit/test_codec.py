"""The codec: what is written is read back, and what is not of the format is refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from headrace import codec
from headrace.change import (
    NOWHERE,
    Checkpoint,
    Column,
    Position,
    Source,
    TableSchema,
    Version,
    format_lsn,
    parse_lsn,
)
from headrace.errors import Misconfigured, Poison
from headrace.log.topics import table_of, topic_of
from tests.fixtures.feed import encode_headers

SOURCE = Source("7", 1, "shop", "slot", "publication")


def test_a_change_carries_its_version_in_its_headers() -> None:
    headers = encode_headers(Version(2, 771), 3, 99, 4, "reread")
    change = codec.decode_change("public.t", 1, 42, b'{"id":1}', b'{"op":"u","after":{"id":1,"n":null}}', headers)
    assert (change.version, change.ordinal, change.xid, change.schema, change.read) == (
        Version(2, 771),
        3,
        99,
        4,
        "reread",
    )
    assert (change.op, change.row, change.partition, change.offset) == ("u", {"id": 1, "n": None}, 1, 42)


def test_a_tombstone_is_a_delete() -> None:
    change = codec.decode_change("public.t", 0, 1, b'{"id":1}', None, encode_headers(Version(1, 5), 0, 1, 1))
    assert (change.op, change.row) == ("d", None)


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        (b"not json", encode_headers(Version(1, 5), 0, 1, 1)),
        (b"{}", encode_headers(Version(1, 5), 0, 1, 1)),
        (b'{"op":"c","after":{}}', []),
        (
            b'{"op":"c","after":{}}',
            [("epoch", b"x"), ("lsn", b"1"), ("ordinal", b"1"), ("xid", b"1"), ("schema", b"1")],
        ),
        (b"3", encode_headers(Version(1, 5), 0, 1, 1)),
    ],
)
def test_a_record_of_another_format_is_poison_with_its_place(value: bytes, headers: codec.Headers) -> None:
    with pytest.raises(Poison) as caught:
        codec.decode_change("public.t", 3, 42, b'{"id":1}', value, headers)
    assert caught.value.code == "undecodable-record"
    assert "partition 3, offset 42" in caught.value.message


@pytest.mark.parametrize(
    "more",
    [{}, {"partial": (7, 3)}, {"inexact": ("public.t",)}, {"snapshot": "running"}, {"approximate": {"public.t": 12}}],
)
def test_a_checkpoint_comes_back(more: dict[str, object]) -> None:
    checkpoint = Checkpoint(Version(1, 9), 5, 6, {"s.public.t": [1, 2]}, SOURCE, base=9, **more)  # type: ignore[arg-type]
    assert codec.decode_checkpoint(codec.encode_checkpoint(checkpoint)) == checkpoint
    assert checkpoint.complete == (more.keys() <= {"inexact", "approximate"})


def test_a_schema_and_a_position_come_back() -> None:
    schema = TableSchema("public.t", 3, (Column("id", "bigint", nullable=False), Column("n", "numeric(10,2)")), ("id",))
    assert codec.decode_schema(codec.encode_schema(schema)) == schema
    position = Position({"s.public.t": [1, 2]}, {"s.public.t": "uuid"}, Version(1, 9), SOURCE, 12, retention=7, told=8)
    again = codec.decode_position(codec.encode_position(position))
    assert (again, again.told) == (position, 8)
    assert codec.decode_position(codec.encode_position(Position())).version == NOWHERE


def test_a_version_packs_into_63_bits_in_its_order() -> None:
    versions = [Version(1, 0), Version(1, 2**48 - 1), Version(2, 0), Version(2**15 - 1, 2**48 - 1)]
    packed = [version.packed() for version in versions]
    assert packed == sorted(packed)
    assert packed[-1] < 2**63
    assert [Version.unpacked(number) for number in packed] == versions
    with pytest.raises(Misconfigured):
        Version(1, 2**48).packed()


def test_lsns_are_as_postgres_prints_them() -> None:
    assert format_lsn(parse_lsn("16/B374D848")) == "16/B374D848"
    assert format_lsn(0x17ABA90) == "0/17ABA90"


@pytest.mark.parametrize(
    "table",
    [
        "public.products",
        "public.Übung",
        "public.a b",
        "public._u0041_",
        "public._u0041é",
        "public._u0041_u0041_",
        "public._u0041_uDEF",
        "s.with.dot",
        'q."x"',
    ],
)
def test_a_topic_names_one_table(table: str) -> None:
    topic = topic_of("shop", table)
    assert table_of(topic) == table
    assert set(topic) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_names_that_look_escaped_do_not_share_a_topic() -> None:
    assert topic_of("s", "public._u0041_") != topic_of("s", "public.A")


def test_a_large_text_is_looked_through_in_little_memory() -> None:
    """Rows of many megabytes come when nobody expects them (I10)."""
    code = """if True:
        from pathlib import Path
        from headrace import codec
        def most():  # that of a resource usage begins at the parent's
            return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
        text = b'{"after":{"a":"' + b'x\\\\"' * 2_000_000 + b'","b":1}}'
        before = most()
        assert sorted(codec.members(text, b"after")) == ["a", "b"]
        print((most() - before) // 1024)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64
