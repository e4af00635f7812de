"""The tables of the stream: how a row of each becomes a record's key and value, and which schema version it has (S13).

Strategy: a Relation message says which columns come and of which types; the catalogue, read at that moment, says which of them are
the key (never the message's flags: S8), which may be null and which may be out of line. The two make one `Table`, compiled once: from
then on a row is a few lookups and one `%`. A shape that differs from the newest version in the log becomes a new version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
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
    """A column of the stream: its place in the schema, and how its text becomes JSON; `sent`: its type's oid and modifier there."""

    __slots__ = ("column", "convert", "convert_key", "out_of_line", "sent")

    def __init__(
        self, column: Column, base: str, element: str, *, out_of_line: bool, sent: tuple[int, int] = (0, -1)
    ) -> None:
        """Choose the converters of the type (see `values.converter`)."""
        self.column = column
        self.convert = converter(base, element)
        self.convert_key = key_converter(base, element)
        self.out_of_line = out_of_line
        self.sent = sent


_Plan = tuple[tuple[tuple[int, Converter], ...], bytes]
"""How a row is made whose NULLs are known: which of the other values are converted, and the template that all of them go into."""
_MOST_PLANS = 1_000


class Table:
    """One table in one schema version: from a row's values to bytes.

    Attributes:
        name: ``schema.table``; `topic` is the table's.
        shape: The schema version that its records name.
        key_at: The positions of the key's columns in a row, in the key's order; empty if the table is append-only (S10).
        key: From a row's values to the key's canonical JSON. Raises Poison (`bad-value`) and Misconfigured
            (`append-only-changed`: the table has no key, and a row of it changed all the same; `key-not-sent`).
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
        self._calls, self._whole = self._plan()
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._row = template(names)
        self.key = _keys(self.name, shape.key, [(at, columns[at].convert_key) for at in self.key_at])
        self.version = ("schema", b"%d" % shape.version)
        schema, _, name = self.name.partition(".")
        self.origin = (
            b',"source":{"connector":"headrace",%b,"lsn":'
            % orjson.dumps({"name": about[0], "db": about[1], "schema": schema, "table": name})[1:-1]
        )

    def row(self, values: Datums) -> bytes:
        """Return the row as JSON. Raises Poison (`bad-value`)."""
        try:
            if None in values:
                calls, whole = self._without(values)
                row = [value for value in values if value is not None]
            else:
                calls, whole = self._calls, self._whole
                row = list(values)  # type: ignore[arg-type]  # UNCHANGED fails below, as it should
            for at, convert in calls:
                row[at] = convert(row[at])  # type: ignore[arg-type]  # the same
            return whole % tuple(row)
        except (ValueError, TypeError, AttributeError, IndexError):
            return self.row_of_any(values)

    def _without(self, values: Datums) -> _Plan:
        """Return how a row with these NULLs is made; few combinations occur."""
        nulls = tuple([at for at, value in enumerate(values) if value is None])
        plan = self._plans.get(nulls)
        if plan is None:
            plan = self._plan(nulls)
            if len(self._plans) < _MOST_PLANS:
                self._plans[nulls] = plan
        return plan

    def _plan(self, nulls: Sequence[int] = ()) -> _Plan:
        """Compile a row's template. What is copied as it stands needs no call: its quotes are in the template."""
        converts = [plan.convert for at, plan in enumerate(self.columns) if at not in nulls]
        places = [NULL if at in nulls else COPIED.get(plan.convert, b"%b") for at, plan in enumerate(self.columns)]
        calls = tuple((at, convert) for at, convert in enumerate(converts) if convert not in COPIED)
        return calls, template([plan.column.name for plan in self.columns], places)

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


def _keys(table: str, names: Sequence[str], plans: Sequence[tuple[int, Converter]]) -> Callable[[Datums], bytes]:
    """Return what makes a row's key of its values (see `Table`); nearly all keys are one number."""
    whole = template(names, [COPIED.get(convert, b"%b") for _, convert in plans])
    at = plans[0][0] if len(plans) == 1 and plans[0][1] in COPIED else -1

    def one(values: Datums) -> bytes:
        try:
            return whole % values[at]  # UNCHANGED and NULL fail, as they should
        except (TypeError, IndexError) as error:
            raise _bad_key(table, names, values[at : at + 1], error) from error

    every = template(names)

    def several(values: Datums) -> bytes:
        try:
            return every % tuple([convert(values[at]) for at, convert in plans])  # type: ignore[arg-type]  # as above
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise _bad_key(table, names, [values[at] for at, _ in plans if at < len(values)], error) from error

    def none(_values: Datums) -> bytes:
        raise Misconfigured(
            "append-only-changed",
            f"{table} is captured as append-only, and a row of it was updated or deleted.",
            "Give it a primary key, then start again from zero: headrace teardown --topics, then setup and capture.",
        )

    return (several if at < 0 else one) if plans else none


def _bad_key(table: str, names: Sequence[str], values: Datums, error: Exception) -> Misconfigured | Poison:
    if None in values:  # of an old row, which comes with its replica identity only
        return Misconfigured(
            "key-not-sent",
            f"A change of {table} came without the old row's key ({', '.join(names)}): the table, or a partition of it, had REPLICA "
            "IDENTITY USING INDEX of other columns then.",
            "Where one still has it: ALTER TABLE that one REPLICA IDENTITY DEFAULT, so that it stays mended. Then run: "
            "headrace resnapshot --recover, and capture. It reads all tables again beside the stream.",
        )
    return Poison("bad-value", f"A key of {table} cannot be read: {error}.", _BAD)


_BAD: Final = (
    "A database whose encoding is SQL_ASCII may hold text that is not UTF-8: mend the row. Otherwise report this."
)


class Stamp:
    """What all records of one transaction, or of one snapshot, say of where they came from."""

    __slots__ = ("_after_ordinal", "_before_ordinal", "_end", "_epoch", "_lsn", "_read", "_xid", "lsn", "xid")

    def __init__(self, version: Version, xid: int, times: tuple[int, int], *, snapshot: bool = False) -> None:
        """Prepare the constant parts; `times` are (committed, now) in ms since the Unix epoch."""
        epoch, self.lsn = version
        self.xid = xid
        self._read = SNAPSHOT if snapshot else None
        lsn, id_ = b"%d" % self.lsn, b"%d" % xid
        self._epoch, self._lsn, self._xid = _epoch(epoch), ("lsn", lsn), ("xid", id_)
        self._before_ordinal = b'%b,"txId":%b,"sequence":[%b,' % (lsn, id_, lsn)
        self._after_ordinal = (_OF_SNAPSHOT if snapshot else _OF_STREAM) % times[0]
        self._end = _end(times[1])

    def record(
        self, table: Table, ordinal: int, op: bytes, row: bytes, read: bytes | None = None
    ) -> tuple[bytes, Headers]:
        """Return a record's value, the envelope around `row` (``null`` for a delete), and its headers (see `headers`)."""
        place = _ORDINALS[ordinal] if ordinal < _MANY else _ordinal(ordinal)
        parts = HEAD, row, table.origin, self._before_ordinal, place[1], self._after_ordinal, op, self._end
        headers = [self._epoch, self._lsn, place, self._xid, table.version]
        if read := read or self._read:
            headers.append(("read", read))
        return b"".join(parts), headers

    def value(self, table: Table, ordinal: int, op: bytes, row: bytes) -> bytes:
        """Return a record's value (see `record`)."""
        return self.record(table, ordinal, op, row)[0]

    def headers(self, table: Table, ordinal: int, read: bytes | None = None) -> Headers:
        """Return a record's headers; `read` tells how its row was read if not from the stream."""
        return self.record(table, ordinal, b"", b"", read)[1]


_OF_SNAPSHOT, _OF_STREAM = (b'],"snapshot":%b,"ts_ms":%%d},"op":"' % told for told in (b"true", b"false"))


def _ordinal(ordinal: int) -> tuple[str, bytes]:
    return "ordinal", b"%d" % ordinal


_MANY: Final = 1024
_ORDINALS: Final = [*map(_ordinal, range(_MANY))]


@lru_cache(maxsize=8)
def _epoch(epoch: int) -> tuple[str, bytes]:
    return "epoch", b"%d" % epoch


@lru_cache(maxsize=8)
def _end(now: int) -> bytes:
    return b'","ts_ms":%d}' % now


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
