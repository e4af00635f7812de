"""The JSON codec: how keys, values, headers, checkpoints, schemas and positions are bytes.

The formats are written down in docs/formats.md. Values are Debezium's envelope, so that people's tools read the topics.
The key's bytes are a format of their own, the same under every codec for values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from typing import Any, Final

import orjson

from headrace.change import Change, Checkpoint, Column, Position, Row, Source, TableSchema, Version
from headrace.errors import Poison

__all__ = ["decode_key", "decode_position", "dumps", "encode_key", "encode_position", "loads"]

Headers = list[tuple[str, bytes]]

dumps = orjson.dumps
loads = orjson.loads
SORTED: Final = orjson.OPT_SORT_KEYS
LEVELS: Final = 200
"""How deep the document of a `json` column is in the log; a deeper one is its text: around a document are rows, other documents and
envelopes, and all of it must be written again."""
COLUMN_LEVELS: Final = LEVELS + 6
"""Levels of a column, which may be an array of documents, of up to six dimensions."""
_READ, _WRITTEN = 1024, 254
"""Levels that orjson reads and writes."""


def fields_of(kind: type[Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a dataclass has of a record; what a newer version has added is passed over."""
    return {field.name: said[field.name] for field in fields(kind) if field.name in said}


def parse(text: bytes, levels: int = LEVELS) -> Any:
    """Return the value of JSON. Raises JSONDecodeError: readers refuse it, or it has more levels than that."""
    if not _has_levels(text, levels):
        return orjson.loads(text)
    around = _READ - levels
    value = orjson.loads(b"[" * around + text + b"]" * around)
    for _ in range(around):
        value = value[0]
    return value


def document(text: bytes, levels: int = LEVELS) -> Any:
    """Return a document of a `json` column as the log has it: itself, or its text where `parse` refuses it."""
    try:
        return parse(text, levels)
    except orjson.JSONDecodeError:
        return text.decode()


def envelope(value: bytes) -> Row:
    """Return the envelope of a record in JSON. Columns too deep for a document, which capture once wrote, are their text as they are now.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    if len(value) < _SHALLOW:
        return orjson.loads(value)  # type: ignore[no-any-return]
    try:
        told: Row = orjson.loads(value)
    except orjson.JSONDecodeError:
        if not _has_levels(value, COLUMN_LEVELS):
            raise
        return _as_texts(value)
    row = told["after"]
    # Of nearly all rows the first question is the last: it is asked of millions.
    if _NESTED.isdisjoint(map(type, row.values() if type(row) is dict else ())) or not _has_levels(
        value, COLUMN_LEVELS
    ):
        return told
    return told if _is_written(row) else _as_texts(value)


_SHALLOW: Final = 600
"""Bytes of a record below which nothing in it is too deep: a third of them is the envelope."""
_NESTED: Final = frozenset({dict, list})
_AFTER: Final = b'"after":'


def _has_levels(text: bytes, levels: int) -> bool:
    """Whether JSON has brackets for more levels."""
    return len(text) > 2 * levels and text.count(b"[") + text.count(b"{") > levels


def _is_written(row: Row) -> bool:
    """Whether the columns of a row are no deeper than they may be: orjson writes them within as many levels as are left."""
    around: Any = row
    for _ in range(_WRITTEN - 1 - COLUMN_LEVELS):
        around = [around]
    try:
        orjson.dumps(around)
    except TypeError:
        return False
    return True


def _as_texts(value: bytes) -> Row:
    row = {name: document(text, COLUMN_LEVELS) for name, text in members(value, b"after").items()}
    around = value[: value.index(_AFTER) + len(_AFTER)], value[value.rindex(b',"source":') :]
    return orjson.loads(b"null".join(around)) | {"after": row}  # type: ignore[no-any-return]


def encode_key(columns: Mapping[str, Any]) -> bytes:
    """Return the key's bytes: compact JSON of the key's columns, in the key's order, e.g. ``{"id":1}``."""
    return orjson.dumps(columns)


def decode_key(key: bytes) -> Row:
    """Undo `encode_key`."""
    row: Row = orjson.loads(key)
    return row


def decode_change(
    table: str,
    partition: int,
    offset: int,
    key: bytes,
    value: bytes | None,
    headers: Iterable[tuple[str, bytes]],
    envelope_of: Callable[[bytes, str, int], Row] | None = None,
) -> Change:
    """Decode one record of a table's topic. A tombstone is a delete.

    `envelope_of` decodes a value of that table and schema version, by default of JSON; `headrace.log.Values.envelope` reads every codec.

    Raises:
        Poison: `undecodable-record`, when key, value or headers are not of the format.
    """
    try:
        named = dict(headers)
        read = named.get("read")
        version = _version(named["epoch"], named["lsn"])
        numbers = int(named["ordinal"]), int(named["xid"]), int(named["schema"])
        told: Row = {"op": "d", "after": None}
        if value is not None:
            told = envelope(value) if envelope_of is None else envelope_of(value, table, numbers[2])
        how = read.decode() if read else None
        # Of millions of records: `_make` is one call in C, the constructor one in Python.
        return Change._make((table, told["op"], key, told["after"], version, *numbers, partition, offset, how))
    except (KeyError, TypeError, ValueError) as error:
        raise Poison(
            "undecodable-record",
            f"The record of {table} at partition {partition}, offset {offset}, key {key!r} is not in headrace's format: {error!r}.",
            "See who else writes to this topic.",
        ) from error


@lru_cache
def _version(epoch: bytes, lsn: bytes) -> Version:
    """Return the version that is in headers: all changes of a transaction, and all rows of a snapshot, have the same."""
    return Version(int(epoch), int(lsn))


def members(text: bytes, name: bytes) -> dict[str, bytes]:
    """Return the members of the object ``name`` in a record's value, each as the JSON that stands there: nothing is rounded."""
    start = text.index(b'"%b":' % name) + len(name) + 3
    found: dict[str, bytes] = {}
    depth, begin, last, member = 0, 0, b"", b""
    for token in _TOKEN.finditer(text, start):
        what = token[0]
        depth += (what in _OPENING) - (what in _CLOSING)
        if what == b":" and depth == 1:
            member, begin = last, token.end()
        elif member and (depth == 0 or (what == b"," and depth == 1)):
            found[orjson.loads(member)] = text[begin : token.start()]
            member = b""
        if depth == 0:
            break
        last = what
    return found


_OPENING, _CLOSING = frozenset({b"{", b"["}), frozenset({b"}", b"]"})
# Possessive: a choice for each character of a text would be remembered, 120 bytes of memory for one of text.
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\],:]')


def encode_checkpoint_key(checkpoint: Checkpoint) -> bytes:
    """Return the key of a checkpoint: its version; for half a transaction also which one, so that it never replaces a state."""
    key = {"epoch": checkpoint.version.epoch, "lsn": checkpoint.version.lsn}
    return orjson.dumps(key | {"partial": checkpoint.partial[0]} if checkpoint.partial else key)


def encode_checkpoint(checkpoint: Checkpoint, topics: Collection[str] | None = None) -> bytes:
    """Return the value of a checkpoint; absent and false fields are left out.

    Args:
        checkpoint: With `ends` of every topic.
        topics: Name only the ends of these, the ones touched since the checkpoint at `base`; all when None.
    """
    record: dict[str, Any] = {
        "epoch": checkpoint.version.epoch,
        "lsn": checkpoint.version.lsn,
        "commit_ts": checkpoint.commit_ts,
        "xid": checkpoint.xid,
        "ends": checkpoint.ends if topics is None else {topic: checkpoint.ends[topic] for topic in sorted(topics)},
        "source": asdict(checkpoint.source),
    }
    if topics is not None:
        record["base"] = checkpoint.base
    if checkpoint.partial:
        record["partial"] = {"commit_lsn": checkpoint.partial[0], "ordinal": checkpoint.partial[1]}
    if checkpoint.inexact:
        record["inexact"] = list(checkpoint.inexact)
    if checkpoint.approximate:
        record["approximate"] = checkpoint.approximate
    if checkpoint.snapshot:
        record["snapshot"] = checkpoint.snapshot
    return orjson.dumps(record)


def decode_checkpoint(value: bytes, offset: int = -1, appended: int = 0) -> Checkpoint:
    """Undo `encode_checkpoint`; `offset` and `appended` (broker's ms) are the record's own. Raises KeyError, ValueError.

    The `ends` of one with another `base` are only what was touched since: see `headrace.log.spine`.
    """
    record = orjson.loads(value)
    partial = record.get("partial")
    return Checkpoint(
        version=Version(record["epoch"], record["lsn"]),
        commit_ts=record["commit_ts"],
        xid=record["xid"],
        ends=record["ends"],
        source=Source(**record["source"]),
        partial=(partial["commit_lsn"], partial["ordinal"]) if partial else None,
        inexact=tuple(record.get("inexact", ())),
        snapshot=record.get("snapshot"),
        base=record.get("base", record["lsn"]),
        offset=offset,
        appended=appended,
        approximate=record.get("approximate", {}),
    )


def encode_schema_key(schema: TableSchema) -> bytes:
    """Return the key of a schema record: table and version."""
    return orjson.dumps({"table": schema.table, "version": schema.version})


def encode_schema(schema: TableSchema) -> bytes:
    """Return the value of a schema record; a column's empty `base` is left out."""
    record = asdict(schema)
    record["columns"] = [{name: said for name, said in column.items() if said != ""} for column in record["columns"]]
    return orjson.dumps(record)


def decode_schema(value: bytes) -> TableSchema:
    """Undo `encode_schema`. Raises KeyError, TypeError, ValueError."""
    record = orjson.loads(value)
    columns = tuple(Column(**column) for column in record["columns"])
    return TableSchema(record["table"], record["version"], columns, tuple(record["key"]))


def encode_position(position: Position) -> bytes:
    """Return a position as JSON: what a store keeps; what holds it back is left out when nothing does."""
    record = asdict(position) | {"version": list(position.version)}
    del record["held"], record["parked"]
    if position.held is not None:
        record |= {"held": list(position.held), "parked": list(position.parked)}
    return orjson.dumps(record)


def decode_position(value: bytes | str) -> Position:
    """Undo `encode_position`. Raises KeyError, TypeError, ValueError."""
    record = orjson.loads(value)
    source = record["source"]
    return Position(
        offsets=record["offsets"],
        topics=record["topics"],
        version=Version(*record["version"]),
        source=Source(**source) if source else None,
        appended=record["appended"],
        inexact=tuple(record.get("inexact", ())),
        approximate=tuple(record.get("approximate", ())),
        held=Version(*record["held"]) if "held" in record else None,
        parked=tuple(record.get("parked", ())),
        retention=record.get("retention", 0),
        told=record.get("told", 0),
    )
