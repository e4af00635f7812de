"""The decoder of Postgres's logical replication messages: bytes in, values out, no I/O.

Strategy: `parse` looks at the first byte and hands the message to one small function for it (protocol version 1, without
streaming of open transactions). Nothing is guessed: a read beyond the end raises, and every message must end exactly at its
payload's end, so that a misread length never goes through unnoticed. Row messages, which are nearly all there is, are read by one
plain loop over the payload; everything else by a cursor. Values stay Postgres's text, as bytes; `values` makes JSON of them.

`unframe` and `status` speak the layer below: the CopyData messages of the streaming replication protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct, error
from typing import Final, NamedTuple

PROTOCOL: Final = "1"


class DecodeError(Exception):
    """The bytes are not a message of the protocol. Says which message, and where it stopped making sense."""


class Unchanged:
    """Stands in an updated row for a value kept out of line that the update left alone (TOAST)."""

    def __repr__(self) -> str:
        """Return a name for messages."""
        return "UNCHANGED"


UNCHANGED: Final = Unchanged()
Datum = bytes | None | Unchanged
"""A column's value: Postgres's text, None for NULL, UNCHANGED."""
Datums = Sequence[Datum]

MALFORMED: Final = (DecodeError, KeyError, IndexError, ValueError, error)
"""What a parser of `PARSERS` raises, and `parse` tells apart: a read beyond the end, text without its end or not UTF-8."""

DATA, HEADER = b"w"[0], 25
"""The first byte of a CopyData that carries a message, and how many come before the message."""
_NO_HEADER: Final = bytes(HEADER)

_EPOCH_US: Final = 946_684_800_000_000
"""2000-01-01 in µs since the Unix epoch: Postgres counts from there."""


class Begin(NamedTuple):
    """A transaction begins. `commit_lsn` is that of its commit record, `commit_ts` ms since the Unix epoch."""

    commit_lsn: int
    commit_ts: int
    xid: int


class Commit(NamedTuple):
    """A transaction is whole. `end_lsn` is where its commit record ends: what a checkpoint names."""

    commit_lsn: int
    end_lsn: int
    commit_ts: int


class RelationColumn(NamedTuple):
    """A column as the stream sends it. `identity`: it is part of the replica identity (all are under FULL, so this is no key: S8)."""

    identity: bool
    name: str
    type_oid: int
    modifier: int


class Relation(NamedTuple):
    """The shape of a table, sent before its first row and again after it may have changed."""

    oid: int
    schema: str
    name: str
    identity: str
    columns: tuple[RelationColumn, ...]


class Type(NamedTuple):
    """A type that is not built in, sent before a Relation that uses it."""

    oid: int
    schema: str
    name: str


class Insert(NamedTuple):
    """A new row."""

    oid: int
    new: Datums


class Update(NamedTuple):
    """A changed row. `old` is the old key, or the old row under FULL (`whole`), or None when the key did not change."""

    oid: int
    old: Datums | None
    whole: bool
    new: Datums


class Delete(NamedTuple):
    """A row that is gone: its key, or the row under FULL (`whole`)."""

    oid: int
    old: Datums
    whole: bool


class Truncate(NamedTuple):
    """Tables that are empty now."""

    oids: tuple[int, ...]


class Origin(NamedTuple):
    """The transaction was replicated from elsewhere."""

    commit_lsn: int
    name: str


class Message(NamedTuple):
    """What `pg_logical_emit_message` wrote."""

    lsn: int
    prefix: str
    content: bytes


Parsed = Begin | Commit | Relation | Type | Insert | Update | Delete | Truncate | Origin | Message


class Keepalive(NamedTuple):
    """Postgres has sent everything up to `wal_end`; `reply` asks for a status at once."""

    wal_end: int
    reply: bool


_I16, _I32, _I64 = Struct(">H"), Struct(">I"), Struct(">Q")
_read32 = _I32.unpack_from
_BEGIN, _COMMIT = Struct(f">{HEADER + 1}xQqI"), Struct(f">{HEADER + 1}xBQQq")
_KEEPALIVE = Struct(">cQqB")
_STATUS = Struct(">cQQQqB")
_NULL, _TEXT, _TOAST = b"ntu"
_NEW, _OLD = b"NO"
_made = tuple.__new__
"""Makes a named tuple of values without the call of its own constructor, which takes as long as reading two columns."""


class _Cursor:
    """Reads forward through one payload and refuses to read beyond its end."""

    __slots__ = ("_at", "_buffer")

    def __init__(self, buffer: bytes) -> None:
        self._buffer = buffer
        self._at = HEADER + 1

    def _number(self, layout: Struct) -> int:
        (number,) = layout.unpack_from(self._buffer, self._at)
        self._at += layout.size
        return int(number)

    def int8(self) -> int:
        return self.take(1)[0]

    def int16(self) -> int:
        return self._number(_I16)

    def int32(self) -> int:
        return self._number(_I32)

    def int64(self) -> int:
        return self._number(_I64)

    def text(self) -> str:
        end = self._buffer.index(b"\0", self._at)
        found = self._buffer[self._at : end]
        self._at = end + 1
        return found.decode()

    def take(self, count: int) -> bytes:
        found = self._buffer[self._at : self._at + count]
        if len(found) != count:
            raise DecodeError(f"{count} bytes wanted at {self._at - HEADER}, {len(found)} there")
        self._at += count
        return found

    def flag(self, most: int = 1) -> int:
        value = self.int8()
        if value > most:
            raise DecodeError(f"flags {value} at {self._at - 1 - HEADER}")
        return value

    def end(self) -> None:
        if self._at != len(self._buffer):
            raise DecodeError(f"{len(self._buffer) - self._at} bytes left over at {self._at - HEADER}")


def parse(payload: bytes) -> Parsed:
    """Decode one message.

    Raises:
        DecodeError: it is not exactly one message of protocol version 1.
    """
    try:
        return PARSERS[payload[0]](_NO_HEADER + payload)
    except KeyError:
        raise DecodeError(f"unknown message {payload[:1]!r}") from None
    except DecodeError as failure:
        raise DecodeError(f"message {payload[:1]!r} of {len(payload)} bytes: {failure}") from None
    except MALFORMED as failure:
        raise DecodeError(f"message {payload[:1]!r} of {len(payload)} bytes: {failure}") from failure


def unframe(data: bytes) -> bytes | Keepalive:
    """Decode what one CopyData of the replication protocol carries: a message for `parse`, or a keepalive.

    Raises:
        DecodeError: it is neither of the two messages that a server sends.
    """
    if data[:1] == b"w" and len(data) > HEADER:
        return data[HEADER:]
    if data[:1] == b"k" and len(data) == _KEEPALIVE.size:
        _, wal_end, _, reply = _KEEPALIVE.unpack(data)
        return Keepalive(wal_end, bool(reply))
    raise DecodeError(f"a CopyData {data[:1]!r} of {len(data)} bytes")


def status(lsn: int, now: float) -> bytes:
    """Return a standby status update that confirms everything below `lsn`; `now` is seconds since the Unix epoch."""
    return _STATUS.pack(b"r", lsn, lsn, lsn, int(now * 1_000_000) - _EPOCH_US, 0)


def _begin(data: bytes) -> Begin:
    commit_lsn, timestamp, xid = _BEGIN.unpack(data)
    return _made(Begin, (commit_lsn, (timestamp + _EPOCH_US) // 1000, xid))


def _commit(data: bytes) -> Commit:
    flags, commit_lsn, end_lsn, timestamp = _COMMIT.unpack(data)
    if flags:
        raise DecodeError(f"flags {flags}")
    return _made(Commit, (commit_lsn, end_lsn, (timestamp + _EPOCH_US) // 1000))


def _relation(data: bytes) -> Relation:
    at = _Cursor(data)
    oid, schema, name, identity = at.int32(), at.text(), at.text(), at.take(1).decode()
    columns = tuple(
        RelationColumn(bool(at.flag()), at.text(), at.int32(), _signed(at.int32())) for _ in range(at.int16())
    )
    at.end()
    return Relation(oid, schema or "pg_catalog", name, identity, columns)


def _signed(number: int) -> int:
    return number - (1 << 32) if number >> 31 else number


def _type(data: bytes) -> Type:
    at = _Cursor(data)
    found = Type(at.int32(), at.text(), at.text())
    at.end()
    return found


def _truncate(data: bytes) -> Truncate:
    at = _Cursor(data)
    count, _ = at.int32(), at.flag(3)
    if count * 4 > len(data):
        raise DecodeError(f"{count} tables in {len(data) - HEADER} bytes")
    found = Truncate(tuple(at.int32() for _ in range(count)))
    at.end()
    return found


def _origin(data: bytes) -> Origin:
    at = _Cursor(data)
    found = Origin(at.int64(), at.text())
    at.end()
    return found


def _message(data: bytes) -> Message:
    at = _Cursor(data)
    at.flag()
    found = Message(at.int64(), at.text(), at.take(at.int32()))
    at.end()
    return found


_OID, _KIND, _ROW = HEADER + 1, HEADER + 5, HEADER + 6
"""Where a row message has its table, what kind of row comes first, and that row."""


def _insert(data: bytes) -> Insert:
    _expect(data, _KIND, b"N")
    new, end = _row(data, _ROW)
    if end != len(data):
        raise _ends_at(end)
    return _made(Insert, (_read32(data, _OID)[0], new))


def _update(data: bytes) -> Update:
    kind, at = data[_KIND], _ROW
    old: list[Datum] | None = None
    if kind != _NEW:
        _expect(data, _KIND, b"KO")
        old, at = _row(data, _ROW)
        _expect(data, at, b"N")
        at += 1
    new, end = _row(data, at)
    if end != len(data):
        raise _ends_at(end)
    return _made(Update, (_read32(data, _OID)[0], old, kind == _OLD, new))


def _delete(data: bytes) -> Delete:
    _expect(data, _KIND, b"KO")
    old, end = _row(data, _ROW)
    if end != len(data):
        raise _ends_at(end)
    return Delete(_read32(data, _OID)[0], old, data[_KIND] == _OLD)


def _expect(data: bytes, at: int, kinds: bytes) -> None:
    if data[at] not in kinds:
        raise DecodeError(f"{data[at : at + 1]!r} at {at - HEADER} where one of {kinds!r} belongs")


def _ends_at(end: int) -> DecodeError:
    return DecodeError(f"it ends at {end - HEADER}")


def _row(data: bytes, at: int, length: Callable[..., tuple[int]] = _read32) -> tuple[list[Datum], int]:
    """Read one row; return it and where it ends. A length beyond the end makes `end` too large, which the caller refuses."""
    columns: list[Datum] = []
    add = columns.append
    count = data[at] << 8 | data[at + 1]
    at += 2
    for _ in range(count):
        kind = data[at]
        if kind == _TEXT:
            begin = at + 5
            at = begin + length(data, at + 1)[0]
            add(data[begin:at])
            continue
        at += 1
        if kind == _NULL:
            add(None)
        elif kind == _TOAST:
            add(UNCHANGED)
        else:
            raise DecodeError(f"a column of kind {kind} at {at - 1 - HEADER}")
    return columns, at


PARSERS: dict[int, Callable[[bytes], Parsed]] = {
    b"B"[0]: _begin,
    b"C"[0]: _commit,
    b"R"[0]: _relation,
    b"Y"[0]: _type,
    b"I"[0]: _insert,
    b"U"[0]: _update,
    b"D"[0]: _delete,
    b"T"[0]: _truncate,
    b"O"[0]: _origin,
    b"M"[0]: _message,
}
"""By a message's first byte: what decodes a whole CopyData that carries one. Raises what `MALFORMED` names."""
