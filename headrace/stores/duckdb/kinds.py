"""From Postgres's types to DuckDB's and back to the log's form, in SQL, a column at a time.

A batch brings each column *raw*: as the Arrow type that its values have in the log, or, where they have none or a
batch has other values than expected, each value as JSON text (a *fragment*). `parse` makes the typed value of it,
`raw` undoes that. A value is kept exactly where both together do not give back what came in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson
import pyarrow as pa

_INTEGERS = {
    "smallint": ("SMALLINT", pa.int16()),
    "integer": ("INTEGER", pa.int32()),
    "bigint": ("BIGINT", pa.int64()),
    "oid": ("BIGINT", pa.int64()),
}
WHOLE = {arrow: duck for duck, arrow in _INTEGERS.values()}
_FLOATS = {"real": "FLOAT", "double precision": "DOUBLE"}
_NUMERIC = re.compile(r"numeric\((\d+),(-?\d+)\)")
_MODIFIER = re.compile(r"\([^)]*\)")
_DIGITS = 38
"""A DECIMAL of DuckDB has at most so many."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How the values of one Postgres type are kept.

    Attributes:
        duck: The DuckDB type.
        arrow: The Arrow type of a raw column; None for kinds that always come as fragments.
        parse: SQL from the raw value `{}` to the typed one; NULL where the type has no such value.
        raw: SQL from the typed value `{}` back to the raw one.
        form: How a raw value, fetched, becomes a value of the log: `as-is`, `json`, or the digits from which Postgres
            writes a float with an exponent.
    """

    duck: str
    arrow: pa.DataType | None
    parse: str
    raw: str
    form: str | float = "as-is"

    @property
    def plain(self) -> bool:
        """Whether a raw column is kept as it is: nothing to compare."""
        return self.raw == "{}"

    def value(self, raw: Any) -> Any:
        """Return the log's form of a fetched raw value."""
        if raw is None or self.form == "as-is":
            return raw
        return read_json(raw) if self.form == "json" else _number(raw, float(self.form))


TEXT = Kind("VARCHAR", pa.string(), "{}", "{}")
_BOOLEAN = Kind("BOOLEAN", pa.bool_(), "TRY_CAST({} AS BOOLEAN)", "{}")
_DOCUMENT = Kind("JSON", None, "TRY_CAST({} AS JSON)", "CAST({} AS VARCHAR)", "json")
_SCALARS = {
    "boolean": _BOOLEAN,
    "json": _DOCUMENT,
    "jsonb": _DOCUMENT,
    "bytea": Kind("BLOB", pa.string(), "TRY(from_base64({}))", "base64({})"),
    "uuid": Kind("UUID", pa.string(), "TRY_CAST({} AS UUID)", "CAST({} AS VARCHAR)"),
    "date": Kind("DATE", pa.string(), "TRY_CAST({} AS DATE)", "CAST({} AS VARCHAR)"),
    # DuckDB reads a year before Christ as the same year after.
    "timestamp without time zone": Kind(
        "TIMESTAMP",
        pa.string(),
        "CASE WHEN {0} NOT LIKE '%BC' THEN TRY_CAST({0} AS TIMESTAMP) END",
        "replace(CAST({} AS VARCHAR), ' ', 'T')",
    ),
    "timestamp with time zone": Kind(
        "TIMESTAMP WITH TIME ZONE",
        pa.string(),
        "CASE WHEN {0} NOT LIKE '%BC' THEN TRY_CAST({0} AS TIMESTAMP WITH TIME ZONE) END",
        "replace(CAST(({0} AT TIME ZONE 'UTC') AS VARCHAR), ' ', 'T') || CASE WHEN isfinite({0}) THEN '+00:00' ELSE '' END",
    ),
}
_LISTED = {"date", "uuid", "boolean", "json", "jsonb", *_INTEGERS}
"""Scalars whose lists have their own type; lists of others hold text."""


@lru_cache(maxsize=4096)
def kind_of(postgres: str) -> Kind:
    """Return the kind of a Postgres type, named as `format_type` does."""
    if postgres.endswith("[]"):
        return _list(postgres[:-2])
    if postgres in _INTEGERS:
        duck, arrow = _INTEGERS[postgres]
        return Kind(duck, arrow, f"TRY_CAST({{}} AS {duck})", "{}")
    if postgres in _FLOATS:
        return _float(_FLOATS[postgres])
    if postgres.startswith("numeric"):
        return _numeric(postgres)
    return _SCALARS.get(_MODIFIER.sub("", postgres), TEXT)


def _float(duck: str) -> Kind:
    # By its text, as 0.1 of a FLOAT is not 0.1 of a DOUBLE.
    raw = "{}" if duck == "DOUBLE" else "CAST(CAST({} AS VARCHAR) AS DOUBLE)"
    return Kind(
        duck,
        pa.float64(),
        f"TRY_CAST({{}} AS {duck})",
        raw,
        1e15 if duck == "DOUBLE" else 1e6,
    )


def _numeric(postgres: str) -> Kind:
    found = _NUMERIC.fullmatch(postgres)
    if found is None:
        return TEXT
    digits, scale = int(found[1]), int(found[2])
    digits += digits == scale  # DuckDB prints .05 for a DECIMAL without a digit before the point
    if digits > _DIGITS or not 0 <= scale <= digits:
        return TEXT
    return Kind(
        f"DECIMAL({digits},{scale})",
        pa.string(),
        f"TRY_CAST({{}} AS DECIMAL({digits},{scale}))",
        "CAST({} AS VARCHAR)",
    )


def _list(postgres: str) -> Kind:
    """Return the kind of a list, always a fragment: Arrow has no type for arrays of any depth."""
    element = kind_of(postgres)
    if postgres in _FLOATS:
        element = kind_of("double precision")
    elif postgres not in _LISTED and not postgres.startswith("numeric"):
        element = TEXT
    written = "{}" if element.arrow in (None, *WHOLE, pa.float64(), pa.bool_()) else "CAST({} AS VARCHAR[])"
    return Kind(
        f"{element.duck}[]",
        None,
        f"TRY_CAST(TRY_CAST({{}} AS JSON) AS {element.duck}[])",
        f"CAST(to_json({written}) AS VARCHAR)",
        "json",
    )


def read_json(raw: str) -> Any:
    """Return a document that DuckDB wrote; its text when it is none, as a list with NaN."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw


def _number(value: float, exponent_from: float) -> float | int | str:
    """Return a float as reading Postgres's text gives it: ``1``, not ``1.0``; NaN and infinities as text."""
    if value != value:  # noqa: PLR0124  only NaN is not itself
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "Infinity" if value > 0 else "-Infinity"
    return int(value) if value.is_integer() and abs(value) < exponent_from else value
