"""How values in the codec's form compare: as SQL compares what they stand for.

The codec writes some numbers as text, `numeric` and NaN, so only the table's schema tells "9.90" the price from "9.90"
the name. Text, and all else that is text in the log, compares by code points (``COLLATE "C"``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from headrace import codec
from headrace.change import Column, TableSchema
from headrace.shapes import UNKNOWN_TYPE, check_key, grown

_NUMBERS = frozenset({"smallint", "integer", "bigint", "real", "double precision", "numeric"})
_TIMES = frozenset({"date", "timestamp without time zone", "timestamp with time zone"})
_LIKE_TEXT = frozenset({
    "text", "character varying", "character", "bpchar", "name", "citext", "time without time zone", "uuid", "macaddr", "macaddr8", "bit",
    "bit varying", UNKNOWN_TYPE,
})  # fmt: skip
ORDERED = _NUMBERS | _TIMES | _LIKE_TEXT | {"boolean", "oid"}
"""Types, as `kind_of` names them, whose values are put in order."""

Row = Mapping[str, Any]
Comparable = tuple[int, Any, str]


def kind_of(column: Column) -> str:
    """Return the name of a column's type below all domains, without modifiers, of `citext` without its schema."""
    kind = re.sub(r"\([^)]*\)", "", column.base or column.type)
    return "citext" if kind.rpartition(".")[2] == "citext" else kind


class Shape(NamedTuple):
    """What documents need to know of a table: its key, empty when its rows have none, the columns of numbers, all columns, empty
    where they are not known, those of dates and timestamps, and of a Debezium feed the types of all that were seen."""

    key: Sequence[str] = ()
    numbers: Collection[str] = frozenset()
    columns: Sequence[str] = ()
    times: Collection[str] = frozenset()
    seen: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def of(cls, schema: TableSchema) -> Shape:
        """Return what a schema says."""
        kinds = {column.name: kind_of(column) for column in schema.columns}
        numbers, times = (frozenset(n for n, kind in kinds.items() if kind in some) for some in (_NUMBERS, _TIMES))
        return cls(schema.key, numbers, tuple(kinds), times)

    def grown(self, schema: TableSchema) -> TableSchema:
        """Return the table's shape after rows of `schema`, of which any may be an old one (S28). Raises Misconfigured: `key-changed`."""
        check_key(schema.table, self.key, schema.key)
        return grown(self.seen, schema)

    def rank(self, name: str) -> Callable[[Any], Comparable]:
        """Return what the values of a column are sorted by."""
        return partial(comparable, number=name in self.numbers, time=name in self.times)

    def whole(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row with the table's columns of now, as Postgres has it: a later one is NULL there, one that is gone is not in it."""
        if not self.columns or tuple(row) == self.columns:
            return row
        return {name: row.get(name) for name in self.columns}


def comparable(value: Any, *, number: bool, time: bool = False) -> Comparable:
    """Return what a value that is not NULL is compared by.

    Args:
        value: In the codec's form.
        number: Whether its column is one of numbers. NaN is above them all, as in Postgres.
        time: Whether it is one of dates or timestamps.
    """
    if type(value) is int:
        return (1, value, "")
    if isinstance(value, bool):
        return (0, value, "")
    if isinstance(value, float):
        return (1, Decimal(repr(value)), "")
    if isinstance(value, str):
        found = _number(value) if number else _moment(value) if time else None
        return found or (3, 0, value)
    return (4, 0, codec.dumps(value).decode())


def _number(text: str) -> Comparable | None:
    try:
        value = Decimal(text)
    except InvalidOperation:  # from before the column's type changed
        return None
    return (2, 0, "") if value.is_nan() else (1, value, "")


def _moment(text: str) -> Comparable | None:
    """Return what puts a date or timestamp in its place; None for text from before the column's type changed."""
    before_christ = text.endswith(" BC")
    if text[4:5] == "-" and not before_christ:
        return (3, 0, text.removesuffix("Z"))  # of a Debezium feed
    if text in {"infinity", "-infinity"}:
        return (3, math.inf if text == "infinity" else -math.inf, "")
    year, _, _ = text.partition("-")
    return (3, -int(year) if before_christ else int(year), text) if year.isdecimal() else None


class _Falling:
    """A value whose order is turned round."""

    __slots__ = ("_value",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Comparable) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Falling) and self._value == other._value

    def __lt__(self, other: _Falling) -> bool:
        return other._value < self._value


def sorting(order: Sequence[tuple[str, bool]], shape: Shape) -> Callable[[Row], Any]:
    """Return what rows are sorted by: some columns, NULLs last, then the key.

    Rows without a key of their own (append-only) are then sorted by all that they hold.

    Args:
        order: Columns, each with whether it descends.
        shape: Of the rows' table.
    """
    if not order and len(shape.key) == 1:  # nearly always
        (only,), rank = shape.key, shape.rank(shape.key[0])
        return lambda row: rank(row[only])
    columns = [(name, falling, shape.rank(name)) for name, falling in order]
    key = [(name, shape.rank(name)) for name in shape.key]

    def by(row: Row) -> tuple[Any, ...]:
        last = [rank(row[name]) for name, rank in key] or [_content(shape.whole(dict(row)))]
        return (*(_placed(row.get(name), falling, rank) for name, falling, rank in columns), *last)

    return by


def _placed(value: Any, falling: bool, rank: Callable[[Any], Comparable]) -> tuple[Any, ...]:
    if value is None:
        return (1,)
    found = rank(value)
    return (0, _Falling(found) if falling else found)


def _content(row: Row) -> Comparable:
    return comparable(sorted(row.items()), number=False)


def filtering(where: Mapping[str, Any], shape: Shape) -> Callable[[Row], bool]:
    """Return whether a row has one of the values that `where` lists for each of its columns; None is NULL."""
    wanted = {
        name: {None if value is None else comparable(value, number=name in shape.numbers) for value in values}
        for name, values in where.items()
    }

    def admits(row: Row) -> bool:
        return all(_among(row.get(name), values, name in shape.numbers) for name, values in wanted.items())

    return admits


def _among(value: Any, values: Collection[Comparable | None], number: bool) -> bool:
    return (None if value is None else comparable(value, number=number)) in values
