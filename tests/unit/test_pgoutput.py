"""The decoder takes exactly one whole message and refuses everything else with its own error."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_capture import pgoutput as p

Y2K_MS = 946_684_800_000
SECOND = 1_000_000


def cstring(text: str) -> bytes:
    return text.encode() + b"\0"


def row(*values: bytes | p.Unchanged | None) -> bytes:
    parts = [struct.pack(">H", len(values))]
    for value in values:
        if value is None:
            parts.append(b"n")
        elif isinstance(value, bytes):
            parts.append(b"t" + struct.pack(">I", len(value)) + value)
        else:
            parts.append(b"u")
    return b"".join(parts)


COLUMNS = (
    b"\x01" + cstring("id") + struct.pack(">Ii", 23, -1) + b"\x00" + cstring("näme") + struct.pack(">Ii", 1043, 104)
)
EXAMPLES: list[tuple[bytes, p.Parsed]] = [
    (b"B" + struct.pack(">QqI", 0x17ABA90, SECOND, 771), p.Begin(0x17ABA90, Y2K_MS + 1000, 771)),
    (b"C\0" + struct.pack(">QQq", 5, 9, -SECOND), p.Commit(5, 9, Y2K_MS - 1000)),
    (
        b"R" + struct.pack(">I", 16_400) + cstring("public") + cstring("items") + b"d" + struct.pack(">H", 2) + COLUMNS,
        p.Relation(
            16_400,
            "public",
            "items",
            "d",
            (p.RelationColumn(True, "id", 23, -1), p.RelationColumn(False, "näme", 1043, 104)),
        ),
    ),
    (b"Y" + struct.pack(">I", 7) + cstring("public") + cstring("mood"), p.Type(7, "public", "mood")),
    (b"I" + struct.pack(">I", 7) + b"N" + row(b"1", None, b""), p.Insert(7, [b"1", None, b""])),
    (b"U" + struct.pack(">I", 7) + b"N" + row(b"1", p.UNCHANGED), p.Update(7, None, False, [b"1", p.UNCHANGED])),
    (
        b"U" + struct.pack(">I", 7) + b"K" + row(b"1", None) + b"N" + row(b"2", b"x"),
        p.Update(7, [b"1", None], False, [b"2", b"x"]),
    ),
    (
        b"U" + struct.pack(">I", 7) + b"O" + row(b"1", b"w") + b"N" + row(b"1", b"x"),
        p.Update(7, [b"1", b"w"], True, [b"1", b"x"]),
    ),
    (b"D" + struct.pack(">I", 7) + b"K" + row(b"1", None), p.Delete(7, [b"1", None], False)),
    (b"D" + struct.pack(">I", 7) + b"O" + row(b"1", b"x"), p.Delete(7, [b"1", b"x"], True)),
    (b"T" + struct.pack(">IBII", 2, 3, 7, 8), p.Truncate((7, 8))),
    (b"O" + struct.pack(">Q", 4) + cstring("elsewhere"), p.Origin(4, "elsewhere")),
    (
        b"M\1" + struct.pack(">Q", 4) + cstring("headrace") + struct.pack(">I", 2) + b"hi",
        p.Message(4, "headrace", b"hi"),
    ),
]
NAMES = [type(parsed).__name__ for _, parsed in EXAMPLES]


@pytest.mark.parametrize(("payload", "parsed"), EXAMPLES, ids=NAMES)
def test_a_whole_message_is_taken(payload: bytes, parsed: p.Parsed) -> None:
    """Field by field."""
    assert p.parse(payload) == parsed


@pytest.mark.parametrize("payload", [payload for payload, _ in EXAMPLES], ids=NAMES)
def test_truncated_anywhere_it_is_refused(payload: bytes) -> None:
    """At every byte, nothing but the decoder's own error comes out."""
    for end in range(len(payload)):
        with pytest.raises(p.DecodeError):
            p.parse(payload[:end])


@pytest.mark.parametrize("payload", [payload for payload, _ in EXAMPLES], ids=NAMES)
def test_with_trailing_bytes_it_is_refused(payload: bytes) -> None:
    """A message ends exactly at its payload's end."""
    for more in (b"\0", b"n", payload):
        with pytest.raises(p.DecodeError):
            p.parse(payload + more)


@given(st.binary(max_size=200))
def test_noise_is_parsed_or_refused(payload: bytes) -> None:
    """No other exception, whatever comes."""
    try:
        p.parse(payload)
    except p.DecodeError:
        return


@given(st.data())
def test_a_changed_byte_is_parsed_or_refused(data: st.DataObject) -> None:
    """Lengths and counts that lie included."""
    payload = bytearray(data.draw(st.sampled_from([payload for payload, _ in EXAMPLES])))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        p.parse(bytes(payload))
    except p.DecodeError:
        return


VALUES = st.lists(st.one_of(st.none(), st.binary(max_size=50), st.just(p.UNCHANGED)), max_size=20)


@given(VALUES)
def test_any_row_comes_back(values: list[bytes | p.Unchanged | None]) -> None:
    """Whatever the values hold."""
    parsed = p.parse(b"I" + struct.pack(">I", 1) + b"N" + row(*values))
    assert parsed == p.Insert(1, values)


def test_unknown_messages_are_refused() -> None:
    """Streaming of open transactions and two-phase commit are not asked for."""
    for kind in b"SEcAbPKrpX":
        with pytest.raises(p.DecodeError, match="unknown message"):
            p.parse(bytes([kind]) + b"\0" * 20)


def test_frames() -> None:
    """The two messages of a server; everything else, and every cut of them, is refused."""
    data = b"w" + struct.pack(">QQq", 1, 2, 3) + b"payload"
    alive = b"k" + struct.pack(">QqB", 9, 0, 1)
    assert p.unframe(data) == b"payload"
    assert p.unframe(alive) == p.Keepalive(9, True)
    for end in range(len(alive)):
        with pytest.raises(p.DecodeError):
            p.unframe(alive[:end])
    for end in range(len(data) - len(b"payload") + 1):
        with pytest.raises(p.DecodeError):
            p.unframe(data[:end])
    for noise in (b"", b"x", alive + b"\0"):
        with pytest.raises(p.DecodeError):
            p.unframe(noise)


def test_status_confirms_one_lsn_three_times() -> None:
    """Written, flushed and applied are one: what a committed checkpoint covers."""
    told = struct.unpack(">cQQQqB", p.status(77, 946_684_801.5))
    assert told == (b"r", 77, 77, 77, 1_500_000, 0)


def test_examples_cover_every_message() -> None:
    """A message that is added to the decoder is added here."""
    assert {type(parsed) for _, parsed in EXAMPLES} == set(p.Parsed.__args__)
