"""The records of a Debezium connector for Postgres, decoded: JSON, with or without Connect's schemas (S28). No I/O.

Debezium's envelope is the one that capture writes, but for what it lacks: headers. So:

- the version is the end of the last transaction before the record's (the first of `source.sequence`), which grows with commit
  order as a commit LSN does; where there is none (a snapshot, the first transaction after a start) it is the record's own LSN. Neither may
  fall below what came before in the partition: a feed is in log order, whatever its LSNs say;
- the shape of a table is what Connect's schema says, or else what the values look like, of all the rows so far (`headrace.shapes`), and a
  new version when it grows. Versions are the seconds at which they were first seen, so that those of one reader are above those of the
  readers before it, but where a clock was set back. A delete says nothing of a shape: before the first row it names `UNKNOWN_SCHEMA`;
- values are as the connector writes them; where the schema tells what they are, documents are themselves, and dates, timestamps and
  numbers that are text (isostring, string) have the form of capture's log, in the key too: SQL's order and windows go by it.

A row with Debezium's placeholder for a value that an update left alone is no whole row, and is refused [I3].
"""

from __future__ import annotations

import re
import time
from base64 import b64encode
from collections.abc import Callable
from hashlib import md5
from typing import Any, Final
from uuid import UUID

import orjson

from headrace import codec
from headrace.change import DELETE, READ, UNKNOWN_SCHEMA, Change, Column, Row, TableSchema, Version
from headrace.errors import Poison
from headrace.shapes import UNKNOWN_TYPE, check_key, joined

EPOCH: Final = 1
_TEXT: Final = "__debezium_unavailable_value"
_BASE64: Final = b64encode(_TEXT.encode()).decode()
_UUID: Final = str(UUID(bytes=md5(_TEXT.encode(), usedforsecurity=False).digest(), version=3))
_PLACEHOLDERS: Final = (_TEXT, _BASE64, [_TEXT], [_BASE64], [_UUID], list(_TEXT.encode()), {_TEXT: _TEXT})
"""What Debezium 3.6 writes by the column's type: text, bytes, arrays of these, of uuids, of integers, hstore (all seen)."""
_SIGNS: Final = (_TEXT.encode(), _BASE64.encode(), _UUID.encode(), orjson.dumps(list(_TEXT.encode()))[:-1])
_CONNECT: Final = {
    "boolean": "boolean",
    "int8": "smallint",
    "int16": "smallint",
    "int32": "integer",
    "int64": "bigint",
    "float": "real",
    "double": "double precision",
    "bytes": "bytea",
}
_NAMED: Final = {
    "io.debezium.data.Json": "jsonb",
    "io.debezium.data.Uuid": "uuid",
    "io.debezium.time.ZonedTimestamp": "timestamp with time zone",
    "io.debezium.time.IsoTimestamp": "timestamp without time zone",
    "io.debezium.time.IsoDate": "date",
}
_SOURCE: Final = "__debezium.source.column."
"""What `column.propagate.source.type` tells: the type in Postgres, ``NUMERIC`` or ``_NUMERIC``, its length and its scale."""
_MOST_DIGITS: Final = 1000
_INFINITE: Final = {
    "+292278994-08-16Z": "infinity",
    "+292269055-12-02Z": "-infinity",
    "+294247-01-10T04:00:25.2Z": "infinity",
    "-290308-12-21T19:59:27.6Z": "-infinity",
}
"""What Debezium 3.6 makes of infinite dates and timestamps (seen)."""
_YEAR: Final = re.compile(r"([+-]?)(\d{4,})(-.*)")
_NUMERIC: Final = frozenset({"NUMERIC", "_NUMERIC"})
_NUMBERS: Final = {"NAN": "NaN", "POSITIVE_INFINITY": "Infinity", "NEGATIVE_INFINITY": "-Infinity"}
_LOOKS: Final = {bool: "boolean", int: "bigint", float: "double precision", str: "text", list: "jsonb", dict: "jsonb"}
Types = dict[str, str]


class Decoder:
    """Decodes the records of one source's feed, each partition's in their order.

    Attributes:
        schemas: The shapes seen, by (table, version).
        highest: The highest version of a record so far: its LSN.
        commit_ts: When the newest record's transaction committed, ms since the Unix epoch.
        xid: Its id.
    """

    def __init__(self, highest: int) -> None:
        """Go on after `highest`, 0 from zero."""
        self.schemas: dict[tuple[str, int], TableSchema] = {}
        self.highest = self._begin = highest
        self.commit_ts = self.xid = 0
        self._passed: dict[tuple[str, int], int] = {}
        self._newest: dict[str, TableSchema] = {}
        self._types: dict[str, Types] = {}

    def change(self, table: str, partition: int, offset: int, key: bytes, value: bytes | None) -> Change:
        """Decode one record. A tombstone is a delete.

        Raises:
            Poison: `undecodable-record`, `debezium-placeholder`, `debezium-truncate`.
            Misconfigured: `key-changed` (S9).
        """
        try:
            return self._change(table, partition, offset, key, value)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise Poison(
                "undecodable-record",
                f"The record of {table} at partition {partition}, offset {offset}, key {key!r} is not what a Debezium connector "
                f"for Postgres writes in JSON: {error!r}.",
                "Let the connector use org.apache.kafka.connect.json.JsonConverter for keys and values, and no transforms.",
            ) from error

    def _change(self, table: str, partition: int, offset: int, key: bytes, value: bytes | None) -> Change:
        of_key, of_schema = _payload(key)
        of_key = _plain(of_key, of_schema)
        canonical = codec.encode_key(of_key)
        if table in self._newest:
            check_key(table, self._newest[table].key, tuple(of_key))
        row, op, read, lsn = None, DELETE, None, 0
        if value is not None:
            envelope, structs = _payload(value)
            fields = next((each["fields"] for each in structs or () if each["field"] == "after"), None)
            op, row = envelope["op"], envelope["after"]
            lsn = self._see(envelope["source"])
            _check(table, canonical, op, row, value)
            read = "snapshot" if op == READ else None
            if row is not None:
                row = _plain(row, fields)
                self._learn(table, of_key, row, fields)
        version = Version(EPOCH, self._version(table, partition, lsn))
        schema = self._newest[table].version if table in self._newest else UNKNOWN_SCHEMA
        return Change(table, op, canonical, row, version, offset, self.xid, schema, partition, offset, read)

    def _see(self, source: Row) -> int:
        """Note the transaction that a record is of; return the LSN that it orders by."""
        before, own = orjson.loads(source.get("sequence") or "[null,null]")
        self.commit_ts, self.xid = int(source["ts_ms"]), int(source.get("txId") or 0)
        return int(before or own or source["lsn"])

    def _version(self, table: str, partition: int, lsn: int) -> int:
        lsn = max(lsn, self._passed.get((table, partition), self._begin))
        self._passed[table, partition] = lsn
        self.highest = max(self.highest, lsn)
        return lsn

    def _learn(self, table: str, key: Row, row: Row, fields: list[Row] | None) -> None:
        """Make a new version of a table's shape if this row has more than it: one that has less may be an old one."""
        known = self._types.get(table, {})
        seen = (
            _declared(fields)
            if fields
            else {name: _LOOKS.get(type(value), UNKNOWN_TYPE) for name, value in row.items()}
        )
        types = known if seen.items() <= known.items() else joined(known, seen)
        if types != known:
            before = self._newest.get(table)
            version = max(int(time.time()), before.version + 1 if before else 0)
            columns = tuple(Column(name, kind, nullable=name not in key) for name, kind in types.items())
            self._types[table] = types
            self._newest[table] = self.schemas[table, version] = TableSchema(table, version, columns, tuple(key))


def _payload(text: bytes) -> tuple[Row, list[Row] | None]:
    """Return a key or an envelope, and its fields where Connect's schema comes with it."""
    said: Row = orjson.loads(text)
    if said.keys() != {"schema", "payload"}:
        return said, None
    return said["payload"], said["schema"]["fields"]


def _declared(fields: list[Row]) -> Types:
    """Return the columns' types as Postgres names them, of the fields of a schema of Connect's."""
    return {field["field"]: _type(field) for field in fields}


def _type(field: Row) -> str:
    if field["type"] == "array":
        return f"{_type(field['items'] | {'parameters': field.get('parameters')})}[]"
    if field["type"] == "string" and (told := field.get("parameters")) and told.get(f"{_SOURCE}type") in _NUMERIC:
        digits, scale = (int(told.get(f"{_SOURCE}{name}", 0)) for name in ("length", "scale"))
        return f"numeric({digits},{scale})" if 0 < digits <= _MOST_DIGITS >= scale else "numeric"
    return _NAMED.get(field.get("name", ""), _CONNECT.get(field["type"], "text"))


def _plain(row: Row, fields: list[Row] | None) -> Row:
    """Give the values of a row, or of a key, whose types are known the form of capture's log."""
    for field in fields or ():
        name, kind = field["field"], _type(field)
        turn, value = _TURNS.get(kind.removesuffix("[]").partition("(")[0]), row[field["field"]]
        if turn is not None and value is not None:
            row[name] = [each if each is None else turn(each) for each in value] if kind.endswith("[]") else turn(value)
    return row


def _local(text: str) -> str:
    return _INFINITE.get(text) or _zoned(text.removesuffix("Z"))


def _zoned(text: str) -> str:
    """Return a date or timestamp whose year ISO 8601 writes with a sign, or as the year 0, as Postgres prints it."""
    found = _YEAR.fullmatch(text)
    if found is None:
        return text
    sign, year, rest = found.groups()
    before = sign == "-" or not int(year)
    return f"{int(year) + 1:04d}{rest} BC" if before else f"{year}{rest}"


_TURNS: Final[dict[str, Callable[[str], Any]]] = {
    "jsonb": lambda text: codec.document(text.encode()),
    "date": _local,
    "timestamp without time zone": _local,
    "timestamp with time zone": _zoned,
    "numeric": lambda text: _NUMBERS.get(text, text),
}


def _check(table: str, key: bytes, op: str, row: Row | None, value: bytes) -> None:
    if op == "t":
        raise Poison(
            "debezium-truncate",
            f"{table} was truncated, and a Debezium feed does not say which rows went.",
            "Let the connector leave truncates out (skipped.operations=t, its default), and delete the rows instead.",
        )
    if (row is None) != (op == DELETE):
        raise ValueError(f"op {op!r} with after {row!r}")
    if row is None or not any(sign in value for sign in _SIGNS):
        return
    left_out = [name for name, column in row.items() if column in _PLACEHOLDERS]
    if left_out:
        raise Poison(
            "debezium-placeholder",
            f"The row {key.decode()} of {table} is not whole: Debezium did not know {', '.join(left_out)}, which an update left alone.",
            f"ALTER TABLE {table} REPLICA IDENTITY FULL, then begin a new feed: another topic.prefix, HEADRACE_SOURCE, a snapshot.",
        )
