"""Read-only SQL for people, on the live generation.

What keeps it read-only and whole, each enough for most of it: the file is opened without external access and its
configuration is locked; exactly one statement is run, which DuckDB itself types as SELECT; it runs in a read-only
transaction, so it sees one state; the schemas that hold generations cannot be named, and of table functions only
those listed here, since others read what a SELECT should not (`query_table`), act (`force_checkpoint`) or trust a
number to be an address (`arrow_scan`). Both are looked up in the statement as DuckDB parsed it. Time, rows and bytes
are bounded.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import orjson

from headrace.change import Position, Version
from headrace.errors import HeadraceError, Transient
from headrace.stores.duckdb import catalogue
from headrace.stores.duckdb.database import Database, damage, first
from headrace.stores.duckdb.kinds import read_json
from headrace.stores.duckdb.names import internal, quoted

_FUNCTIONS = {
    *("range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree", "histogram"),
    *("duckdb_tables", "duckdb_views", "duckdb_columns", "duckdb_schemas", "duckdb_types", "duckdb_functions"),
    *("pragma_table_info", "pragma_version"),
}
_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}
_LONG = {"UBIGINT", "HUGEINT", "UHUGEINT"}
_NATIVE = _INTEGERS | {"BOOLEAN", "VARCHAR", "DOUBLE"}
_BYTES = 32 * 1024 * 1024
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Result:
    """What a query gave.

    Attributes:
        columns: Names, in order; they may repeat.
        types: DuckDB's name of each column's type.
        rows: Values: integers (to 64 bits), floats, booleans and lists as themselves, bytes in base64, all others as DuckDB's text;
            within lists and structs too, where every HUGEINT is text.
        version: Everything up to this LSN of the source is in it: it is the state there, where nothing is parked.
        inexact: Tables that are not known to equal Postgres at that state (S12).
        approximate: Tables of which values may be of a later moment than that state (S7).
        parked: Tables that lack what is parked.
        truncated: Whether there were more rows than asked for.
    """

    columns: list[str]
    types: list[str]
    rows: list[list[Any]]
    version: Version
    inexact: tuple[str, ...]
    approximate: tuple[str, ...]
    parked: tuple[str, ...]
    truncated: bool


def query(database: Database, sql: str, *, rows: int, seconds: float) -> Result:
    """Run one SELECT on the live generation.

    Raises:
        Transient: `warehouse-loading`: there is no state to be seen yet.
        Misconfigured: `warehouse-damaged`.
        HeadraceError: `sql-refused`, `sql-failed`, `sql-too-slow`, `sql-too-large`.
    """
    with database.cursor() as cursor:
        try:
            _check(cursor, sql)
            with _deadline(cursor, seconds), database.reading(cursor):
                return _run(cursor, sql, rows)
        except duckdb.InterruptException as error:
            raise HeadraceError(
                "sql-too-slow",
                f"The query took longer than {seconds:g} s.",
                "Ask for less.",
            ) from error
        except duckdb.Error as error:
            raise damage(error, database.path) or HeadraceError("sql-failed", str(error)) from error


def shown(database: Database) -> Version:
    """Return the state that readers see now.

    Raises:
        Transient: `warehouse-loading`.
    """
    with database.cursor() as cursor, database.reading(cursor):
        return _shown(cursor).reached


def _shown(cursor: duckdb.DuckDBPyConnection) -> Position:
    position = catalogue.shown(cursor)
    if position.loading:
        raise Transient(
            "warehouse-loading",
            "The warehouse is loading: it has reached no state yet.",
            "See: headrace status",
        )
    return position


def _run(cursor: duckdb.DuckDBPyConnection, sql: str, limit: int) -> Result:
    state = _shown(cursor)
    found = cursor.sql(sql)
    types = [str(kind) for kind in found.types]
    shown = ", ".join(_as_json(index, str(kind), _exact(kind)) for index, kind in enumerate(found.types, start=1))
    rows: list[list[Any]] = []
    size = 0
    for batch in found.project(shown).limit(limit + 1).to_arrow_reader(_BATCH):
        size += batch.nbytes
        if size > _BYTES:
            raise HeadraceError(
                "sql-too-large",
                f"The result is larger than {_BYTES >> 20} MB.",
                "Ask for less.",
            )
        columns = [_values(column.to_pylist(), kind) for column, kind in zip(batch.columns, types, strict=True)]
        rows += [list(row) for row in zip(*columns, strict=True)]
    said = (state.reached, state.inexact, state.approximate, state.parked)
    return Result(found.columns, types, rows[:limit], *said, truncated=len(rows) > limit)


def _as_json(index: int, kind: str, exact: str) -> str:
    if kind in _NATIVE:
        return f"#{index}"
    if kind == "FLOAT":
        return f"CAST(CAST(#{index} AS VARCHAR) AS DOUBLE)"  # 0.1, not the nearest FLOAT in sixteen digits
    if kind == "BLOB":
        return f"base64(#{index})"
    if not _nested(kind):
        return f"CAST(#{index} AS VARCHAR)"
    return f"CAST(to_json({f'#{index}' if exact == kind else f'CAST(#{index} AS {exact})'}) AS VARCHAR)"


def _exact(kind: Any) -> str:
    """Return a type of DuckDB with text for those numbers within it that readers of JSON round."""
    if kind.id in {"decimal", "hugeint", "uhugeint"}:
        return "VARCHAR"
    if kind.id not in {"list", "array", "struct", "map"}:
        return str(kind)
    (_, inner), *rest = kind.children
    if kind.id in {"list", "array"}:
        return f"{_exact(inner)}[{rest[0][1] if rest else ''}]"
    if kind.id == "map":
        return f"MAP({_exact(inner)}, {_exact(rest[0][1])})"
    return f"STRUCT({', '.join(f'{quoted(name)} {_exact(each)}' for name, each in kind.children)})"


def _values(values: list[Any], kind: str) -> list[Any]:
    if _nested(kind):
        return [value if value is None else read_json(value) for value in values]
    if kind in _LONG:
        return [value if value is None else _integer(int(value)) for value in values]
    if kind in {"FLOAT", "DOUBLE"}:
        return [value if value is None or math.isfinite(value) else str(value) for value in values]
    return values


def _integer(value: int) -> int | str:
    """Return an integer that JSON writers take: one of more than 64 bits is text."""
    return value if -(1 << 63) <= value < 1 << 64 else str(value)


def _nested(kind: str) -> bool:
    return kind == "JSON" or kind.endswith("]") or kind.startswith(("STRUCT", "MAP"))


def _check(cursor: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = cursor.extract_statements(sql)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        seen = ", ".join(statement.type.name for statement in statements) or "nothing"
        raise _refused(f"Only one SELECT is run; this is {seen}.")
    found = first(cursor, "SELECT json_serialize_sql(?::VARCHAR)", sql)
    parsed = orjson.loads(found[0]) if found else {"error": True}
    if parsed["error"]:
        raise _refused(f"Only a SELECT is run: {parsed.get('error_message', '')}")
    for node in _nodes(parsed):
        _check_node(node)


def _check_node(node: dict[str, Any]) -> None:
    if node.get("type") == "TABLE_FUNCTION":
        name = node["function"].get("function_name", "")
        if name.lower() not in _FUNCTIONS:
            raise _refused(f"The table function {name} is not one of those allowed here.")
    if node.get("type") == "BASE_TABLE":
        for name in (node.get("catalog_name", ""), node.get("schema_name", "")):
            if internal(name) and name.lower() not in {
                "main",
                "information_schema",
                "pg_catalog",
                "system",
            }:
                raise _refused(f"{name} belongs to headrace; the tables to read are in the schemas of the source.")


def _nodes(parsed: Any) -> Iterator[dict[str, Any]]:
    waiting = [parsed]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


@contextlib.contextmanager
def _deadline(cursor: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, cursor.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _refused(message: str) -> HeadraceError:
    return HeadraceError("sql-refused", message, "The warehouse is read-only: write to Postgres.")
