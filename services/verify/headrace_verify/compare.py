"""Two rows, column by column, as JSON means them."""

from __future__ import annotations

from typing import Any

from headrace.change import Row


def differing(expected: Row, actual: Row, *, rows: bool) -> tuple[str, ...]:
    """Return the names of the columns whose values differ.

    Args:
        expected: From Postgres.
        actual: From the view.
        rows: Whether these are rows of a table: a column that only one side has is then the same as NULL in Postgres, since
            a row that was written before its column existed has none; a column that Postgres no longer has is not compared.
    """
    names = expected.keys() if rows else expected.keys() | actual.keys()
    if rows:
        return tuple(sorted(name for name in names if not same(expected[name], actual.get(name))))
    return tuple(sorted(n for n in names if n not in expected or n not in actual or not same(expected[n], actual[n])))


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values mean the same: 1 is 1.0, but true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)
