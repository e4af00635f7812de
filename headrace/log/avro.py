"""Avro: a table's shape as a schema, and a value's way between natural JSON and Avro's types. No I/O.

Strategy: what natural JSON says of a value and Avro cannot (that a string is a document, that bytes are shown as base64, which floats are
written as integers) hangs on the type, so the schema carries it: the property ``postgres`` of each type is Postgres's name of it. One
table, `_FORMS`, says for each name which Avro type it is and how a value goes there and back; whatever is not in it is its text. A
row that has gone through is exactly the row that the JSON codec gives. Foreign readers skip properties that they do not know.

Every column may be null and is so by default, whatever Postgres says: columns come and go, and old and new readers read on.
"""

from __future__ import annotations

import string
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from functools import partial
from math import isfinite
from typing import Any, Final, NamedTuple

import orjson

from headrace import codec
from headrace.change import Column, Row, TableSchema
from headrace.log.topics import escape

Avro = Any
"""A schema as JSON: the name of a primitive type, an object, or a list of branches."""
Turn = Callable[[Any], Any]

_LETTERS: Final = frozenset(string.ascii_letters + string.digits + "_")


class Form(NamedTuple):
    """How values of a type are kept: as which Avro type, and the way there and back. None: as they are."""

    avro: str
    pack: Turn | None = None
    unpack: Turn | None = None


def _float(first_with_exponent: float, value: float) -> float | int | str:
    """Return the natural JSON of a float as Postgres writes it: up to where it uses an exponent, whole ones without a point."""
    if not isfinite(value):
        return _NOT_NUMBERS[str(value)]
    return int(value) if value.is_integer() and abs(value) < first_with_exponent else value


_NOT_NUMBERS: Final = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _base64(value: bytes) -> str:
    return b64encode(value).decode()


def _document(value: Any) -> str:
    return orjson.dumps(value).decode()


_TEXT: Final = Form("string")
_DOCUMENT: Final = Form("string", None, lambda text: codec.document(text.encode(), codec.COLUMN_LEVELS))
_FORMS: Final = {
    "boolean": Form("boolean"),
    "smallint": Form("int"),
    "integer": Form("int"),
    "bigint": Form("long"),
    "oid": Form("long"),
    "real": Form("double", float, partial(_float, 1e6)),  # Avro's float would come back with digits that nobody wrote
    "double precision": Form("double", float, partial(_float, 1e15)),
    "bytea": Form("bytes", b64decode, _base64),
    "json": _DOCUMENT,
    "jsonb": _DOCUMENT,
    "json[]": _DOCUMENT,  # digits count in documents: the whole array is one
    "jsonb[]": _DOCUMENT,
}


def schema_of(source: str, shape: TableSchema) -> Avro:
    """Return the schema of the values of a table: Debezium's envelope around a record of its columns."""
    row = {"type": "record", "name": "Value", "fields": [_field(column) for column in shape.columns]}
    said = {"connector": "string", "name": "string", "db": "string", "schema": "string", "table": "string"}
    place = {"lsn": "long", "txId": "long", "sequence": _array("long"), "snapshot": "boolean", "ts_ms": "long"}
    origin = [{"name": name, "type": avro} for name, avro in (said | place).items()]
    schema, _, table = shape.table.partition(".")
    return {
        "type": "record",
        "name": "Envelope",
        "namespace": ".".join(_name(part) for part in (source, schema, table)),
        "fields": [
            {"name": "before", "type": ["null", row], "default": None},
            {"name": "after", "type": ["null", "Value"], "default": None},
            {"name": "source", "type": {"type": "record", "name": "Source", "fields": origin}},
            {"name": "op", "type": "string"},
            {"name": "ts_ms", "type": "long"},
        ],
    }


def schema_id(value: bytes) -> int:
    """Return the id of the schema that a value was written with."""
    return int.from_bytes(value[1:5], "big")


class Packer:
    """From a record's value in JSON to what an Avro writer takes, for one shape."""

    def __init__(self, shape: TableSchema) -> None:
        """Choose each column's way."""
        forms = [(column.name, _name(column.name), _base(column)) for column in shape.columns]
        self._documents = [(name, to) for name, to, base in forms if _FORMS.get(base) is _DOCUMENT]
        self._turns = [(name, to, _pack(base)) for name, to, base in forms if _FORMS.get(base) is not _DOCUMENT]

    def envelope(self, value: bytes) -> Row:
        """Return the envelope. Raises KeyError, TypeError, ValueError."""
        envelope: Row = orjson.loads(value)
        row = envelope["after"]
        if row is not None:
            envelope["after"] = self._row(row)
            if self._documents:
                as_written = codec.members(value, b"after")
                envelope["after"] |= {
                    to: None if row[name] is None else as_written[name].decode() for name, to in self._documents
                }
        return envelope

    def _row(self, row: Row) -> Row:
        return {
            to: value if (value := row[name]) is None or turn is None else turn(value) for name, to, turn in self._turns
        }


class Unpacker:
    """From what an Avro reader gives back to the row, by the schema that the record was written with."""

    def __init__(self, schema: Avro) -> None:
        """Choose each field's way. Raises KeyError, TypeError, ValueError: the schema is no envelope of ours."""
        before = next(field for field in schema["fields"] if field["name"] == "before")
        fields = _record(before["type"])["fields"]
        self._fields = [(field["name"], field.get("column", field["name"]), *_back(field["type"])) for field in fields]
        self.shape = schema["namespace"], [(field["name"], _record(field["type"])["postgres"]) for field in fields]
        """Which table's it is, and its columns with Postgres's names of their types."""

    def envelope(self, read: Row) -> Row:
        """Return the envelope with the row in natural JSON."""
        row = read["after"]
        if row is not None:
            read["after"] = {
                column: value if (value := row[name]) is None or turn is None else turn(value)
                for name, column, turn, _ in self._fields
            }
        return read

    def members(self, read: Row) -> dict[str, bytes]:
        """Return the columns of `after`, each as its JSON; documents as they were written."""
        row = read["after"]
        return {
            column: row[name].encode() if document and row[name] is not None else orjson.dumps(_turned(turn, row[name]))
            for name, column, turn, document in self._fields
        }


def _field(column: Column) -> Avro:
    base = _base(column)
    form = _FORMS.get(base)
    avro: Avro = {"type": (form or _TEXT).avro, "postgres": base}
    branches = ["null", avro]
    if form is None and base.endswith("[]"):
        element = _element(base[:-2])
        # An array of arrays has another type than the schema can name for it: it is its JSON.
        branches = [
            "null",
            _array(["null", {"type": element.avro, "postgres": base[:-2]}]) | {"postgres": base},
            "string",
        ]
    name = _name(column.name)
    told = {} if name == column.name else {"column": column.name}
    return {"name": name, "type": branches, "default": None, **told}


def _array(items: Avro) -> dict[str, Avro]:
    return {"type": "array", "items": items}


def _base(column: Column) -> str:
    """Return the name of the type without modifiers: what `postgres` says."""
    said = column.base or column.type
    begin = said.find("(")
    return said if begin < 0 or '"' in said else said[:begin] + said[said.rindex(")") + 1 :]


def _name(name: str) -> str:
    """Return a name of Avro's: letters, digits and underscores, no digit at its beginning."""
    safe = escape(name, _LETTERS)
    return f"_u{ord(safe[0]):04X}_{safe[1:]}" if safe[:1].isdigit() else safe


def _pack(base: str) -> Turn | None:
    form = _FORMS.get(base)
    if form is not None or not base.endswith("[]"):
        return form.pack if form else None
    element = _element(base[:-2]).pack
    return lambda value: (
        _document(value)
        if any(isinstance(each, list) for each in value)
        else [_turned(element, each) for each in value]
    )


def _back(branches: list[Avro]) -> tuple[Turn | None, bool]:
    """Return how a field's values become natural JSON, and whether they are documents."""
    told = next(branch for branch in branches if isinstance(branch, Mapping))
    if told["type"] == "array":
        (element,) = (branch for branch in told["items"] if branch != "null")
        turn = _element(element["postgres"]).unpack
        return partial(_array_back, turn), False
    form = _FORMS.get(told["postgres"], _TEXT)
    return form.unpack, form is _DOCUMENT


def _element(name: str) -> Form:
    """Return the form of an array's elements. A domain over an array may be one: it is its text, also where that reads as a document."""
    return _TEXT if name.endswith("[]") else _FORMS.get(name, _TEXT)


def _array_back(turn: Turn | None, value: list[Any] | str) -> Any:
    return orjson.loads(value) if isinstance(value, str) else [_turned(turn, each) for each in value]


def _turned(turn: Turn | None, value: Any) -> Any:
    return value if value is None or turn is None else turn(value)


def _record(branches: list[Avro]) -> Avro:
    return next(branch for branch in branches if isinstance(branch, Mapping))
