"""Names in a warehouse: DuckDB does not tell upper from lower case, and some names are taken."""

from __future__ import annotations

import re
from collections.abc import Collection

_TAKEN = re.compile(r"g\d+|main|temp|system|headrace|information_schema|pg_catalog", re.IGNORECASE)

_AMBIGUOUS = re.compile(r"g\d+|headrace|public|information_schema|pg_catalog", re.IGNORECASE)


def quoted(name: str) -> str:
    """Return an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """Return an SQL string."""
    return "'" + value.replace("'", "''") + "'"


def unique(name: str, taken: Collection[str]) -> str:
    """Return `name`, with a number when `taken` holds it in whatever case."""
    folded = {other.casefold() for other in taken}
    found, number = name, 1
    while found.casefold() in folded:
        number += 1
        found = f"{name}_{number}"
    return found


def internal(schema: str) -> bool:
    """Return whether a schema's name is one of those that headrace or DuckDB use themselves."""
    return _TAKEN.fullmatch(schema) is not None


def reader_schema(schema: str, catalog: str) -> str:
    """Return where readers find the tables of a Postgres schema; `catalog` is DuckDB's name of the file."""
    return f"{schema}_" if internal(schema) or schema.casefold() == catalog.casefold() else schema


def ambiguous(file: str) -> bool:
    """Return whether DuckDB, which names a file's catalogue after it, would take the name of a schema in it for the file."""
    return _AMBIGUOUS.fullmatch(file.partition(".")[0]) is not None
