"""The shape of a table as the rows of a Debezium feed tell it, one after the other (S28).

Any row may be of an older shape than those before it: one partition is read before another, a connector sends again what it has sent,
and whoever begins to read knows nothing. So a shape only grows, whoever keeps it: no column goes, and a type gives way only to one that
keeps the values of both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from headrace.change import Column, TableSchema
from headrace.errors import Misconfigured

UNKNOWN_TYPE: Final = "unknown"
"""Postgres's own name for the type of a column of which nothing but nulls was seen."""
_WHOLE: Final = {"smallint": 5, "integer": 10, "bigint": 19}
_FLOATS: Final = {"real", "double precision"}
_NUMERIC: Final = re.compile(r"numeric\((\d+),(-?\d+)\)")
Types = Mapping[str, str]


def joined(known: Types, seen: Types) -> dict[str, str]:
    """Return the types of the columns of both, by their names: those that are known come first."""
    return {**known, **{name: wider(known.get(name, UNKNOWN_TYPE), kind) for name, kind in seen.items()}}


def grown(known: Types, schema: TableSchema) -> TableSchema:
    """Return the shape of a table with the columns `known` after a row of the shape `schema`, which may be an old one."""
    types = joined(known, types_of(schema))
    return replace(schema, columns=tuple(Column(name, kind, name not in schema.key) for name, kind in types.items()))


def types_of(schema: TableSchema) -> dict[str, str]:
    """Return the types of a shape's columns."""
    return {column.name: column.type for column in schema.columns}


def wider(one: str, other: str) -> str:
    """Return the narrowest type that keeps the values of both; text where they have nothing in common, or are arrays."""
    if other in {one, UNKNOWN_TYPE}:
        return one
    if one == UNKNOWN_TYPE:
        return other
    if one in _WHOLE and other in _WHOLE:
        return max(one, other, key=_WHOLE.__getitem__)
    if {one, other} <= {*_WHOLE, *_FLOATS}:
        return "double precision"
    of_numbers = {one.partition("(")[0], other.partition("(")[0]} <= {*_WHOLE, *_FLOATS, "numeric"}
    return _numeric(one, other) if of_numbers and "[]" not in one + other else "text"


def _numeric(*kinds: str) -> str:
    sizes = [size for kind in kinds if (size := _size(kind))]
    if len(sizes) < len(kinds):  # one without a size holds them all
        return "numeric"
    scale = max(behind for _, behind in sizes)
    return f"numeric({max(before for before, _ in sizes) + scale},{scale})"


def _size(kind: str) -> tuple[int, int] | None:
    """Return the digits before the point, and those behind it."""
    if kind in _WHOLE:
        return _WHOLE[kind], 0
    found = _NUMERIC.fullmatch(kind)
    return (int(found[1]) - int(found[2]), int(found[2])) if found else None


def check_key(table: str, before: Sequence[str], now: Sequence[str]) -> None:
    """Refuse a key of other columns: what has the old one stays for ever (S9). `before` is empty where it is not known.

    Raises:
        Misconfigured: `key-changed`.
    """
    if before and tuple(before) != tuple(now):
        raise Misconfigured(
            "key-changed",
            f"The key of {table} was {', '.join(before)}, and is {', '.join(now)}: rows that have the old one would stay in the view.",
            "Begin a new feed: another topic.prefix, HEADRACE_SOURCE, a snapshot.",
        )
