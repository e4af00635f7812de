"""The tables of the stream: how a row of each becomes a record's key and value, and which schema version it has (S13).

Strategy: a Relation message says which columns come and of which types; the catalogue, read at that moment, says which of them are
the key (never the message's flags: S8), which may be null and which may be out of line. The two make one `Table`, compiled once: from
then on a row is a few lookups and one `%`. A shape that differs from the newest version in the log becomes a new version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import orjson

from headrace.change import Column, TableSchema, Version
from headrace.codec import Headers
from headrace.errors import Misconfigured, Poison
from headrace_capture.pgoutput import Datum, Datums
from headrace_capture.values import COPIED, NULL, Converter, converter, key_converter, template

SNAPSHOT: Final = b"snapshot"
REREAD: Final = b"reread"
HEAD: Final = b'{"before":null,"after":'
"""What every record's value begins with; the row follows."""


class Json(bytes):
    """A value that is JSON already: taken from the log, not from Postgres."""

    __slots__ = ()


class ColumnPlan:
    """A column of the stream: its place in the schema, and how its text becomes JSON."""

    __slots__ = ("column", "convert", "convert_key", "out_of_line")

    def __init__(self, column: Column, base: str, element: str, *, out_of_line: bool) -> None:
        """Choose the converters of the type (see `values.converter`)."""
        self.column = column
        self.convert = converter(base, element)
        self.convert_key = key_converter(base, element)
        self.out_of_line = out_of_line


class Table:
    """One table in one schema version: from a row's values to bytes.

    Attributes:
        name: ``schema.table``; `topic` is the table's.
        shape: The schema version that its records name.
        key_at: The positions of the key's columns in a row, in the key's order; empty if the table is append-only (S10).
        wide: The positions of columns that may be out of line; none if the table is append-only: nothing updates it.
    """

    def __init__(self, shape: TableSchema, topic: str, columns: Sequence[ColumnPlan], about: tuple[str, str]) -> None:
        """Compile the table; `about` is (source, database), named in every record."""
        self.shape = shape
        self.name = shape.table
        self.topic = topic
        names = [plan.column.name for plan in columns]
        self.columns = columns
        self.key_at = tuple(names.index(name) for name in shape.key)
        self.wide = tuple(at for at, plan in enumerate(columns) if plan.out_of_line and shape.key)
        self._converters: tuple[Converter, ...] = tuple(plan.convert for plan in columns)
        # Of a row without NULLs: what is copied as it stands needs no call, with its quotes in the template.
        self._called = tuple((at, plan.convert) for at, plan in enumerate(columns) if plan.convert not in COPIED)
        self._full = template(names, [COPIED.get(plan.convert, b"%b") for plan in columns])
        self._row = template(names)
        self._key_of = _keys(shape.key, [(at, columns[at].convert_key) for at in self.key_at])
        self.version = ("schema", b"%d" % shape.version)
        schema, _, name = self.name.partition(".")
        self.origin = (
            b',"source":{"connector":"headrace",%b,"lsn":'
            % orjson.dumps({"name": about[0], "db": about[1], "schema": schema, "table": name})[1:-1]
        )

    def row(self, values: Datums) -> bytes:
        """Return the row as JSON. Raises Poison (`bad-value`)."""
        try:
            if None not in values:
                row = list(values)
                for at, convert in self._called:
                    row[at] = convert(row[at])  # type: ignore[arg-type]  # UNCHANGED fails, as it should
                return self._full % tuple(row)
            return self._row % tuple(
                [
                    NULL if value is None else convert(value)  # type: ignore[arg-type]  # the same
                    for convert, value in zip(self._converters, values, strict=True)
                ]
            )
        except (ValueError, TypeError, AttributeError, IndexError):
            return self.row_of_any(values)

    def key(self, values: Datums) -> bytes:
        """Return the key's canonical JSON.

        Raises:
            Poison: `bad-value`.
            Misconfigured: `append-only-changed`: the table has no key, and a row of it changed all the same.
        """
        if not self.key_at:
            raise Misconfigured(
                "append-only-changed",
                f"{self.name} is captured as append-only, and a row of it was updated or deleted.",
                "Give it a primary key, then start again from zero: headrace teardown --topics, then setup and capture.",
            )
        try:
            return self._key_of(values)
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise Poison("bad-value", f"A key of {self.name} cannot be read: {error}.", _BAD) from error

    def same_key(self, old: Datums, new: Datums) -> bool:
        """Whether two states of a row have one key, as far as their texts tell."""
        for at in self.key_at:  # noqa: SIM110  a generator costs more than all the rest
            if old[at] != new[at]:
                return False
        return True

    def row_of_any(self, values: Datums) -> bytes:
        """Return the row, some of whose values may be JSON already, and name the column that cannot be converted."""
        if len(values) != len(self.columns):
            raise Poison("bad-value", f"A row of {self.name} has {len(values)} columns, not {len(self.columns)}.", _BAD)
        return self._row % tuple(self._any(plan, value) for plan, value in zip(self.columns, values, strict=True))

    def _any(self, plan: ColumnPlan, value: Datum) -> bytes:
        if value is None or isinstance(value, Json):
            return NULL if value is None else bytes(value)
        try:
            return plan.convert(value)  # type: ignore[arg-type]
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise Poison(
                "bad-value", f"Column {plan.column.name} of {self.name} cannot be read: {error}.", _BAD
            ) from error


def _keys(names: Sequence[str], plans: Sequence[tuple[int, Converter]]) -> Callable[[Datums], bytes]:
    """Return what makes a row's key; nearly all keys are one number."""
    whole = template(names, [COPIED.get(convert, b"%b") for _, convert in plans])
    if len(plans) == 1 and plans[0][1] in COPIED:
        at = plans[0][0]
        return lambda values: whole % values[at]  # UNCHANGED and NULL fail, as they should
    every = template(names)
    return lambda values: every % tuple([convert(values[at]) for at, convert in plans])  # type: ignore[arg-type]


_BAD: Final = (
    "A database whose encoding is SQL_ASCII may hold text that is not UTF-8: mend the row. Otherwise report this."
)


class Stamp:
    """What all records of one transaction, or of one snapshot, say of where they came from."""

    __slots__ = ("_after_ordinal", "_before_ordinal", "_end", "_headers", "_read", "lsn", "xid")

    def __init__(self, version: Version, xid: int, times: tuple[int, int], *, snapshot: bool = False) -> None:
        """Prepare the constant parts; `times` are (committed, now) in ms since the Unix epoch."""
        self.lsn = version.lsn
        self.xid = xid
        self._read = SNAPSHOT if snapshot else None
        lsn, id_ = b"%d" % version.lsn, b"%d" % xid
        self._headers = ("epoch", b"%d" % version.epoch), ("lsn", lsn), ("xid", id_)
        self._before_ordinal = b'%b,"txId":%b,"sequence":[%b,' % (lsn, id_, lsn)
        told = b"true" if snapshot else b"false"
        self._after_ordinal = b'],"snapshot":%b,"ts_ms":%d},"op":"' % (told, times[0])
        self._end = b'","ts_ms":%d}' % times[1]

    def value(self, table: Table, ordinal: int, op: bytes, row: bytes) -> bytes:
        """Return a record's value: the envelope around `row` (``null`` for a delete)."""
        return b"%b%b%b%b%d%b%b%b" % (
            HEAD,
            row,
            table.origin,
            self._before_ordinal,
            ordinal,
            self._after_ordinal,
            op,
            self._end,
        )

    def headers(self, table: Table, ordinal: int, read: bytes | None = None) -> Headers:
        """Return a record's headers; `read` tells how its row was read if not from the stream."""
        epoch, lsn, xid = self._headers
        headers = [epoch, lsn, ("ordinal", b"%d" % ordinal), xid, table.version]
        read = read or self._read
        return [*headers, ("read", read)] if read else headers


def newest(schemas: Iterable[TableSchema]) -> dict[str, TableSchema]:
    """Return the newest version of each table."""
    found: dict[str, TableSchema] = {}
    for schema in schemas:
        if schema.table not in found or found[schema.table].version < schema.version:
            found[schema.table] = schema
    return found


def copy_fields(line: bytes) -> list[Any]:
    """Return the values of one line of COPY … TO STDOUT (text format), without its newline."""
    if b"\\" not in line:
        return line.split(b"\t")
    return [None if field == b"\\N" else _unescape(field) for field in line.split(b"\t")]


_ESCAPES: Final = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


def _unescape(field: bytes) -> bytes:
    if b"\\" not in field:
        return field
    first, *rest = field.split(b"\\")
    parts = [first]
    pieces = iter(rest)
    for piece in pieces:
        if piece:
            parts.append(_ESCAPES.get(piece[:1], piece[:1]) + piece[1:])
        else:  # an escaped backslash: what follows the next one is plain
            parts.append(b"\\" + next(pieces, b""))
    return b"".join(parts)
