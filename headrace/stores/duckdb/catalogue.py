"""What a warehouse knows of itself: the schema `headrace` in its file.

`generations` holds each build with its position and a `turn`, the number that compare-and-set compares: opening a
generation takes the next turn, so that an older instance can no longer move the position (S21). `live` has at most
one row, `consumer` has the name of whose file it is. `tables` maps a generation's tables to their names here, `schemas`
keeps the table schemas that staged rows name.
"""

from __future__ import annotations

from typing import Any

import duckdb
import orjson

from headrace import codec
from headrace.change import Position, TableSchema, Version
from headrace.errors import Misconfigured, Wiped
from headrace.stores.duckdb.database import first
from headrace.stores.duckdb.tables import Mapped, Table

FORMAT = 1

_MAKE = f"""
CREATE SCHEMA headrace;
CREATE TABLE headrace.format (version INTEGER);
INSERT INTO headrace.format VALUES ({FORMAT});
CREATE TABLE headrace.live (number INTEGER);
CREATE TABLE headrace.generations (number INTEGER PRIMARY KEY, fingerprint VARCHAR, turn BIGINT, position VARCHAR);
CREATE TABLE headrace.tables (
    generation INTEGER, source VARCHAR, version INTEGER, name VARCHAR, reader_schema VARCHAR, reader_name VARCHAR, columns VARCHAR,
    PRIMARY KEY (generation, source));
CREATE TABLE headrace.schemas (generation INTEGER, body VARCHAR)
"""


def ready(cursor: duckdb.DuckDBPyConnection) -> bool:
    """Return whether the file has been prepared by headrace.

    Raises:
        Misconfigured: `warehouse-foreign` (the file holds somebody else's tables), `warehouse-version`.
    """
    if not _one(
        cursor,
        "SELECT count(*) FROM duckdb_schemas() WHERE schema_name = 'headrace' AND NOT internal",
    )[0]:
        if _one(cursor, "SELECT count(*) FROM duckdb_tables()")[0]:
            raise Misconfigured(
                "warehouse-foreign",
                "The file of the warehouse holds tables that headrace did not make.",
                "Name another file by HEADRACE_WAREHOUSE.",
            )
        return False
    found = _one(cursor, "SELECT version FROM headrace.format")[0]
    if found != FORMAT:
        raise Misconfigured(
            "warehouse-version",
            f"The warehouse is of format {found}, this headrace reads {FORMAT}.",
            "Use the headrace that made it, or remove the file: it is loaded again from zero.",
        )
    return True


def prepare(cursor: duckdb.DuckDBPyConnection) -> None:
    """Make the schema `headrace` in a new file."""
    cursor.execute(_MAKE)


def owned(cursor: duckdb.DuckDBPyConnection, name: str) -> bool:
    """Return whether the file says that it is this consumer's; one that an older headrace made does not say.

    Raises:
        Misconfigured: `view-of-another`.
    """
    said = "SELECT count(*) FROM duckdb_tables() WHERE schema_name = 'headrace' AND table_name = 'consumer'"
    if not _one(cursor, said)[0]:
        return False
    kept = _one(cursor, "SELECT name FROM headrace.consumer")[0]
    if kept != name:
        raise Misconfigured(
            "view-of-another",
            f"The file of the warehouse is of {kept}, not of {name}.",
            "Name another file by HEADRACE_WAREHOUSE: each consumer needs its own, and a process of its own.",
        )
    return True


def own(cursor: duckdb.DuckDBPyConnection, name: str) -> None:
    """Keep whose file it is. Raises Misconfigured: `view-of-another`."""
    if not owned(cursor, name):
        cursor.execute("CREATE TABLE headrace.consumer (name VARCHAR)")
        cursor.execute("INSERT INTO headrace.consumer VALUES (?)", [name])


def held(cursor: duckdb.DuckDBPyConnection) -> list[tuple[int, str]]:
    """Return number and fingerprint of every generation."""
    return cursor.execute("SELECT number, fingerprint FROM headrace.generations ORDER BY number").fetchall()


def live(cursor: duckdb.DuckDBPyConnection) -> int | None:
    """Return the number of the live generation."""
    found = first(cursor, "SELECT number FROM headrace.live")
    return found[0] if found else None


def point(cursor: duckdb.DuckDBPyConnection, number: int | None) -> None:
    """Move the pointer to the live generation."""
    cursor.execute("DELETE FROM headrace.live")
    if number is not None:
        cursor.execute("INSERT INTO headrace.live VALUES (?)", [number])


def version_of(cursor: duckdb.DuckDBPyConnection, number: int) -> Version:
    """Return the state that a generation shows, NOWHERE while it is loading or gone."""
    return position_of(cursor, number).version


def position_of(cursor: duckdb.DuckDBPyConnection, number: int) -> Position:
    """Return where a generation stands, at NOWHERE when it is gone."""
    found = first(cursor, "SELECT position FROM headrace.generations WHERE number = ?", number)
    return codec.decode_position(found[0]) if found and found[0] else Position()


def shown(cursor: duckdb.DuckDBPyConnection) -> Position:
    """Return where the generation stands that readers see, at NOWHERE when there is none. Of a file that is not headrace's it raises as
    `ready`; who opened one of another format has been told."""
    try:
        found = first(cursor, "SELECT position FROM headrace.live JOIN headrace.generations USING (number)")
    except duckdb.CatalogException:
        if ready(cursor):
            raise
        found = None
    return codec.decode_position(found[0]) if found and found[0] else Position()


def take(cursor: duckdb.DuckDBPyConnection, number: int) -> tuple[int, Position | None] | None:
    """Take the next turn of a generation; return it with the durable position, None when there is no such generation."""
    found = first(
        cursor, "UPDATE headrace.generations SET turn = turn + 1 WHERE number = ? RETURNING turn, position", number
    )
    if found is None:
        return None
    return found[0], codec.decode_position(found[1]) if found[1] else None


def make(cursor: duckdb.DuckDBPyConnection, number: int, fingerprint: str) -> None:
    """Make an empty generation at turn 0."""
    cursor.execute("INSERT INTO headrace.generations VALUES (?, ?, 0, NULL)", [number, fingerprint])
    cursor.execute(f"CREATE SCHEMA g{number:d}")


def move(cursor: duckdb.DuckDBPyConnection, number: int, turn: int, position: Position) -> None:
    """Move a position, by compare-and-set on the turn.

    Raises:
        Wiped: `position-moved`: the generation is gone, or another instance has opened it since.
    """
    moved = first(
        cursor,
        "UPDATE headrace.generations SET position = ? WHERE number = ? AND turn = ? RETURNING number",
        codec.encode_position(position).decode(),
        number,
        turn,
    )
    if moved is None:
        raise Wiped(
            "position-moved",
            f"Generation {number} was dropped or opened by somebody else.",
            "It is opened again by itself.",
        )


def remove(cursor: duckdb.DuckDBPyConnection, number: int) -> None:
    """Remove a generation with everything in it."""
    cursor.execute(f"DROP SCHEMA IF EXISTS g{number:d} CASCADE")
    cursor.execute("DELETE FROM headrace.generations WHERE number = ?", [number])
    for table in ("tables", "schemas"):
        cursor.execute(f"DELETE FROM headrace.{table} WHERE generation = ?", [number])


def tables(cursor: duckdb.DuckDBPyConnection, number: int) -> dict[str, Table]:
    """Return the tables of a generation by their name in the source."""
    found = cursor.execute(
        "SELECT source, version, name, reader_schema, reader_name, columns FROM headrace.tables WHERE generation = ?",
        [number],
    ).fetchall()
    return {
        source: Table(
            source,
            version,
            f"g{number}",
            name,
            (schema, view),
            tuple(Mapped(*c) for c in orjson.loads(columns)),
        )
        for source, version, name, schema, view, columns in found
    }


def remember(cursor: duckdb.DuckDBPyConnection, number: int, table: Table) -> None:
    """Keep how a table is mapped."""
    cursor.execute(
        "INSERT OR REPLACE INTO headrace.tables VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            number,
            table.source,
            table.version,
            table.name,
            *table.reader,
            orjson.dumps([list(column) for column in table.columns]).decode(),
        ],
    )


def schemas(cursor: duckdb.DuckDBPyConnection, number: int) -> dict[tuple[str, int], TableSchema]:
    """Return the kept table schemas of a generation."""
    found = cursor.execute("SELECT body FROM headrace.schemas WHERE generation = ?", [number]).fetchall()
    read = [codec.decode_schema(body) for (body,) in found]
    return {(schema.table, schema.version): schema for schema in read}


def keep_schemas(cursor: duckdb.DuckDBPyConnection, number: int, new: list[TableSchema]) -> None:
    """Keep table schemas; they are immutable (S13)."""
    for schema in new:
        cursor.execute(
            "INSERT INTO headrace.schemas VALUES (?, ?)",
            [number, codec.encode_schema(schema).decode()],
        )


def _one(cursor: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    return first(cursor, sql) or (0,)
