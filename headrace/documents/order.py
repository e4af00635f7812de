"""How values in the codec's form compare: as SQL compares what they stand for.

The codec writes some numbers as text, `numeric` and NaN, so only the table's schema tells "9.90" the price from "9.90"
the name. Text, and all else that is text in the log, compares by code points (``COLLATE "C"``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from headrace import codec
from headrace.change import TableSchema

_NUMBERS = frozenset({"smallint", "integer", "bigint", "real", "double precision", "numeric"})

Row = Mapping[str, Any]
Comparable = tuple[int, Any, str]


class Shape(NamedTuple):
    """What documents need to know of a table: its key, empty when its rows have none, the columns of numbers, and all columns, empty
    where they are not known."""

    key: Sequence[str] = ()
    numbers: Collection[str] = frozenset()
    columns: Sequence[str] = ()

    @classmethod
    def of(cls, schema: TableSchema) -> Shape:
        """Return what a schema says."""
        kinds = {column.name: (column.base or column.type).partition("(")[0] for column in schema.columns}
        numbers = frozenset(name for name, kind in kinds.items() if kind in _NUMBERS)
        return cls(schema.key, numbers, tuple(kinds))

    def whole(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row with the table's columns of now, as Postgres has it: a later one is NULL there, one that is gone is not in it."""
        if not self.columns or tuple(row) == self.columns:
            return row
        return {name: row.get(name) for name in self.columns}


def comparable(value: Any, *, number: bool) -> Comparable:
    """Return what a value that is not NULL is compared by.

    Args:
        value: In the codec's form.
        number: Whether its column is one of numbers. NaN is above them all, as in Postgres.
    """
    if type(value) is int:
        return (1, value, "")
    if isinstance(value, bool):
        return (0, value, "")
    if isinstance(value, float):
        return (1, Decimal(repr(value)), "")
    if isinstance(value, str):
        return (_number(value) if number else None) or (3, 0, value)
    return (4, 0, codec.dumps(value).decode())


def _number(text: str) -> Comparable | None:
    try:
        value = Decimal(text)
    except InvalidOperation:  # from before the column's type changed
        return None
    return (2, 0, "") if value.is_nan() else (1, value, "")


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
        (only,), number = shape.key, shape.key[0] in shape.numbers
        return lambda row: comparable(row[only], number=number)
    columns = [(name, falling, name in shape.numbers) for name, falling in order]
    key = [(name, name in shape.numbers) for name in shape.key]

    def by(row: Row) -> tuple[Any, ...]:
        last = [comparable(row[name], number=number) for name, number in key] or [_content(row)]
        return (*(_placed(row.get(name), falling, number) for name, falling, number in columns), *last)

    return by


def _placed(value: Any, falling: bool, number: bool) -> tuple[Any, ...]:
    if value is None:
        return (1,)
    found = comparable(value, number=number)
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
