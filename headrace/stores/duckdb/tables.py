"""Tables of a generation: made, changed with their schema, written set by set, read back in the log's form.

A set of changes is written by deleting its keys and inserting its rows. There is no index: DuckDB's must fit into memory,
makes the file two to three times as large and big sets slower [I10]. What finds the rows instead is a scan of the column
of keys, about 20 ms for a million rows, the same for one change as for ten thousand. Few keys that have a whole number are found by
it, in a third of the time: the text of the key is then read only of rows that have one of the numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import duckdb
import orjson
import pyarrow as pa

from headrace import codec
from headrace.change import Column, Row, TableSchema, Version
from headrace.consumer import ViewRow
from headrace.stores.duckdb.kinds import WHOLE, Kind, kind_of
from headrace.stores.duckdb.names import quoted, reader_schema, text, unique

KEY, VERSION, EXACT = "_headrace_key", "_headrace_version", "_headrace_exact"
_ANEW = "_headrace_anew"
"""No table of a generation has this name: theirs have a dot."""
_RAW = "headrace_raw"
_FEW = 100
"""Rows up to which they are parameters: DuckDB takes longer to learn of an Arrow table than to insert a few."""
_HANDFUL = 10
"""Keys up to which each row's is held against them one by one: planning a join takes longer."""
_LISTS = {**WHOLE, pa.float64(): "DOUBLE", pa.bool_(): "BOOLEAN", pa.string(): "VARCHAR"}


class Record(NamedTuple):
    """The last change of a key: its packed version, the version of the table's schema, the row or None for a delete."""

    key: str
    version: int
    schema: int
    row: Row | None


class Mapped(NamedTuple):
    """A column: its name in the source, its name here, its type in Postgres below all domains, its type here."""

    column: str
    name: str
    postgres: str
    duck: str

    @property
    def kind(self) -> Kind:
        """How its values are kept."""
        return kind_of(self.postgres)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of one generation.

    Attributes:
        source: ``schema.name`` in Postgres.
        version: The newest version of its schema that a record had.
        schema: The generation's schema.
        name: The table's name in it.
        reader: Schema and name of the view that readers use.
        columns: Its columns in the order of its schema.
    """

    source: str
    version: int
    schema: str
    name: str
    reader: tuple[str, str]
    columns: tuple[Mapped, ...]

    @property
    def path(self) -> str:
        """The table in SQL."""
        return f"{self.schema}.{quoted(self.name)}"


def create(
    cursor: duckdb.DuckDBPyConnection,
    schema: str,
    made: TableSchema,
    others: Sequence[Table],
) -> Table:
    """Make the table of `made` in `schema`; `others` are the tables that are there."""
    columns: list[Mapped] = []
    for column in made.columns:
        columns.append(_mapped(column, columns))
    source_schema, _, source_name = made.table.partition(".")
    catalog: str = cursor.execute("SELECT current_database()").fetchall()[0][0]
    where = reader_schema(source_schema, catalog)
    beside = [other.reader[1] for other in others if other.reader[0].casefold() == where.casefold()]
    name = unique(made.table, [other.name for other in others])
    table = Table(
        made.table,
        made.version,
        schema,
        name,
        (where, unique(source_name, beside)),
        tuple(columns),
    )
    typed = "".join(f", {quoted(column.name)} {column.duck}" for column in columns)
    cursor.execute(f"CREATE TABLE {table.path} ({KEY} VARCHAR, {VERSION} BIGINT, {EXACT} VARCHAR{typed})")
    return table


def evolve(cursor: duckdb.DuckDBPyConnection, table: Table, schema: TableSchema) -> Table:
    """Change a table to a newer version of its schema; return how it is then."""
    wanted = {column.name: column for column in schema.columns}
    there = {mapped.column: mapped for mapped in table.columns}
    for mapped in table.columns:
        if mapped.column not in wanted:
            _forget_exact(cursor, table, mapped)
            cursor.execute(f"ALTER TABLE {table.path} DROP COLUMN {quoted(mapped.name)}")
            del there[mapped.column]
    for column in schema.columns:
        if column.name not in there:
            there[column.name] = added = _mapped(column, list(there.values()))
            cursor.execute(f"ALTER TABLE {table.path} ADD COLUMN {quoted(added.name)} {added.duck}")
        elif there[column.name].postgres not in {_below(column), column.type}:  # a domain's own name: `is_old`
            there[column.name] = _retype(cursor, table, there[column.name], column)
    columns = tuple(there[column.name] for column in schema.columns)
    return replace(table, version=schema.version, columns=columns)


def show(cursor: duckdb.DuckDBPyConnection, table: Table) -> list[tuple[str, str]]:
    """Make the views by which readers see a table; return their schemas and names."""
    schema, name = table.reader
    listed = ", ".join(quoted(column.name) for column in table.columns)
    views = [(schema, name), ("main", name)] if schema.casefold() == "public" else [(schema, name)]
    for where, view in views:
        cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(where)}")
        cursor.execute(f"CREATE OR REPLACE VIEW {quoted(where)}.{quoted(view)} AS SELECT {listed} FROM {table.path}")
    return views


def hide(cursor: duckdb.DuckDBPyConnection, view: tuple[str, str]) -> None:
    """Drop a view of readers."""
    cursor.execute(f"DROP VIEW {quoted(view[0])}.{quoted(view[1])}")


def write(cursor: duckdb.DuckDBPyConnection, table: Table, of_key: Sequence[str], records: Sequence[Record]) -> None:
    """Apply the last changes of some keys, one for each key; `of_key` are the columns that a key has, if that is known."""
    which, keys = _having(table, of_key, [record.key for record in records])
    cursor.execute(f"DELETE FROM {table.path} WHERE {which}", keys)
    kept = [(record, record.row) for record in records if record.row is not None]
    if not kept:
        return
    rows = [row for _, row in kept]
    arrays: dict[str, pa.Array] = {
        "k": pa.array([record.key for record, _ in kept], pa.string()),
        "v": pa.array([record.version for record, _ in kept], pa.int64()),
    }
    untyped = set()
    for index, mapped in enumerate(table.columns):
        values = [row.get(mapped.column) for row in rows]
        typed = _typed(values, mapped.kind)
        if typed is None:
            untyped.add(index)
        arrays[f"r{index}"] = fragments(values) if typed is None else typed
    if len(kept) <= _FEW:
        lists = ", ".join(f"unnest(?::{_LISTS[array.type]}[]) AS {name}" for name, array in arrays.items())
        columns = [array.to_pylist() for array in arrays.values()]
        cursor.execute(_insertion(table, f"(SELECT {lists})", untyped), columns)
        return
    with registered(cursor, pa.table(arrays)) as raw:
        cursor.execute(_insertion(table, raw, untyped))


def _having(table: Table, of_key: Sequence[str], keys: list[str]) -> tuple[str, list[Any]]:
    """Return the condition that finds the rows of some keys, and its parameters.

    A row has the number that its key has, or NULL where it was written before such a column was added.
    """
    which = _among(KEY, "VARCHAR", len(keys))
    whole = [each for each in table.columns if each.column in of_key and each.duck in WHOLE.values()]
    if whole and len(keys) <= _FEW:
        numbers = [codec.decode_key(key.encode()).get(whole[0].column) for key in keys]
        if all(type(number) is int and abs(number) < 1 << 63 for number in numbers):
            name = quoted(whole[0].name)
            return f"({name} IS NULL OR {_among(name, 'BIGINT', len(keys))}) AND {which}", [numbers, keys]
    return which, [keys]


def _among(column: str, duck: str, count: int) -> str:
    listed = f"?::{duck}[]"
    return f"list_contains({listed}, {column})" if count <= _HANDFUL else f"{column} IN (SELECT unnest({listed}))"


def merge(cursor: duckdb.DuckDBPyConnection, table: Table, staging: str) -> None:
    """Apply what `staging` holds of a table, the last change of each key, as two statements whatever the size.

    The bodies are taken apart in DuckDB: Arrow tables that were registered stay in memory until a transaction ends [I10].
    """
    mine = f"FROM {staging} WHERE source = {text(table.source)}"
    cursor.execute(f"DELETE FROM {table.path} WHERE {KEY} IN (SELECT key {mine})")
    paths = ", ".join(text(_pointer(mapped.column)) for mapped in table.columns)
    # Of JSON's null the text is null, of the string null it is "null".
    listed = "".join(f", nullif(CAST(j[{n + 1}] AS VARCHAR), 'null') AS r{n}" for n in range(len(table.columns)))
    last = f"n IN (SELECT max(n) {mine} GROUP BY key) AND body IS NOT NULL"
    raw = f"(SELECT k, v{listed} FROM (SELECT key AS k, version AS v, json_extract(body, [{paths}]) AS j {mine} AND {last}))"
    cursor.execute(_insertion(table, raw, set(range(len(table.columns)))))


def read(cursor: duckdb.DuckDBPyConnection, table: Table, after: str | None, limit: int) -> list[ViewRow]:
    """Return up to `limit` rows after the key `after`, by key, in the log's form.

    And one more that has the last one's key: no index forbids that somebody doubles a row, and the next page begins after it. What
    somebody wrote without a key comes first, with the key "".
    """
    which, values = ("true", [limit + 1]) if after is None else (f"{KEY} > $2", [limit + 1, after])
    found = _select(cursor, table, f"WHERE {which} ORDER BY {KEY} NULLS FIRST LIMIT $1", values)
    return found if len({row.key for row in found[limit - 1 :]}) == 1 else found[:limit]


def count(cursor: duckdb.DuckDBPyConnection, table: Table) -> int:
    """Return how many rows it has."""
    found = cursor.execute(f"SELECT count(*) FROM {table.path}").fetchall()
    return int(found[0][0])


def key_columns(cursor: duckdb.DuckDBPyConnection, table: Table) -> tuple[str, ...]:
    """Return the columns of the key of a row that is there, nothing where none is."""
    found = cursor.execute(f"SELECT {KEY} FROM {table.path} WHERE {KEY} > '' LIMIT 1").fetchall()
    return tuple(codec.decode_key(found[0][0].encode())) if found else ()


def pick(cursor: duckdb.DuckDBPyConnection, table: Table, keys: Sequence[str]) -> list[ViewRow]:
    """Return those of the rows `keys` that there are, by key, in the log's form."""
    return _select(cursor, table, f"WHERE {KEY} IN (SELECT unnest($1::VARCHAR[]))", [list(keys)])


def _select(cursor: duckdb.DuckDBPyConnection, table: Table, which: str, values: list[Any]) -> list[ViewRow]:
    raws = [mapped.kind.raw.format(quoted(mapped.name)) for mapped in table.columns]
    printed = ", ".join(f"CAST({raw} AS VARCHAR)" for raw in raws)
    found = cursor.execute(
        f"SELECT coalesce({KEY}, ''), coalesce({VERSION}, 0), {EXACT}, "
        f"CASE WHEN {EXACT} IS NOT NULL THEN [{printed}] END, {', '.join(raws)} "
        f"FROM (SELECT * FROM {table.path} {which}) ORDER BY {KEY} NULLS FIRST",
        values,
    ).fetchall()
    return [_row(table, found_row[:4], found_row[4:]) for found_row in found]


def _row(table: Table, kept: Sequence[Any], raws: Sequence[Any]) -> ViewRow:
    key, version, exact, printed = kept
    row = {mapped.column: mapped.kind.value(raw) for mapped, raw in zip(table.columns, raws, strict=True)}
    if exact is not None:
        beside = orjson.loads(exact)
        for mapped, now in zip(table.columns, printed, strict=True):
            pair = beside.get(mapped.name)
            if pair and pair[1] == now:
                row[mapped.column] = pair[0]
    return ViewRow(table.source, key, row, Version.unpacked(version))


def _mapped(column: Column, others: Sequence[Mapped]) -> Mapped:
    name = unique(column.name, [KEY, VERSION, EXACT, *(other.name for other in others)])
    return Mapped(column.name, name, _below(column), kind_of(_below(column)).duck)


def _below(column: Column) -> str:
    return column.base or column.type


def is_old(table: Table, schema: TableSchema) -> bool:
    """Return whether columns of domains are text here, as an older headrace made them: they stay so until a rebuild, since text
    alone does not say exactly what it was."""
    domains = {column.name: column for column in schema.columns if column.base}
    return any(
        mapped.postgres == domains[mapped.column].type and mapped.duck != kind_of(domains[mapped.column].base).duck
        for mapped in table.columns
        if mapped.column in domains
    )


def _retype(cursor: duckdb.DuckDBPyConnection, table: Table, mapped: Mapped, column: Column) -> Mapped:
    """Give a column another type, by way of text, which every type has.

    By writing the table anew, which needs little memory, as an UPDATE would not. Not by ALTER … USING: who opens the file after a kill
    evaluates that again, before DuckDB knows functions of JSON, and cannot open it.
    """
    changed = mapped._replace(postgres=_below(column), duck=kind_of(_below(column)).duck)
    if changed.duck != mapped.duck:
        name, at = quoted(mapped.name), text(_pointer(mapped.name))
        old = mapped.kind.raw.format(name)
        exact = f"json_extract_string({EXACT}, {text(_pointer(mapped.name) + '/0')})"
        new = changed.kind.parse.format(f"coalesce({exact}, CAST({old} AS VARCHAR))")
        anew = replace(table, name=_ANEW)
        retyped = f"CAST({new} AS {changed.duck}) AS {name}"
        cursor.execute(f"CREATE TABLE {anew.path} AS SELECT * REPLACE ({retyped}) FROM {table.path}")
        cursor.execute(f"DROP TABLE {table.path}")
        cursor.execute(f"ALTER TABLE {anew.path} RENAME TO {quoted(table.name)}")
        # What the new type has as it was need not be kept beside it any more; what it has not, such as NaN, stays.
        again = f"CAST({changed.kind.raw.format(name)} AS VARCHAR)"
        value = f"json_extract({EXACT}, {text(_pointer(mapped.name) + '/0')})"
        pair = f"CASE WHEN {exact} IS DISTINCT FROM {again} THEN json_array({value}, {again}) END"
        cursor.execute(
            f"UPDATE {table.path} SET {EXACT} = json_merge_patch({EXACT}, json_object({text(mapped.name)}, {pair})) "
            f"WHERE json_extract({EXACT}, {at}) IS NOT NULL"
        )
    return changed


def _forget_exact(cursor: duckdb.DuckDBPyConnection, table: Table, mapped: Mapped) -> None:
    """Forget what was kept beside a column that goes or changes."""
    patch = orjson.dumps({mapped.name: None}).decode()
    cursor.execute(
        f"UPDATE {table.path} SET {EXACT} = json_merge_patch({EXACT}, ?::JSON) WHERE {EXACT} IS NOT NULL",
        [patch],
    )


def _pointer(name: str) -> str:
    """Return the JSON pointer to a member."""
    return "/" + name.replace("~", "~0").replace("/", "~1")


def _typed(values: list[Any], kind: Kind) -> pa.Array | None:
    """Return a raw column, None when the kind has none or the values are others: of an older schema, or such as NaN in a float."""
    if kind.arrow is None:
        return None
    try:
        return pa.array(values, kind.arrow)
    except (pa.ArrowException, OverflowError):
        return None


def _insertion(table: Table, source: str, untyped: set[int]) -> str:
    parsed, exact = [], []
    for index, mapped in enumerate(table.columns):
        parse, kept = _parsing(index, mapped.kind, fragment=index in untyped)
        parsed.append(f"{parse} AS p{index}")
        if kept:
            exact.append((mapped.name, f"x{index}", kept))
    named = ", ".join(quoted(mapped.name) for mapped in table.columns)
    values = ", ".join(f"p{index}" for index in range(len(table.columns)))
    any_kept = " OR ".join(f"{alias} IS NOT NULL" for _, alias, _ in exact) or "false"
    pairs = ", ".join(f"{text(name)}, {alias}" for name, alias, _ in exact)
    compared = "".join(f", {sql} AS {alias}" for _, alias, sql in exact)
    return (
        f"INSERT INTO {table.path} ({KEY}, {VERSION}, {EXACT}, {named}) "
        f"SELECT k, v, CASE WHEN {any_kept} THEN CAST(json_merge_patch('{{}}', json_object({pairs})) AS VARCHAR) END, {values} "
        f"FROM (SELECT *{compared} FROM (SELECT *, {', '.join(parsed)} FROM {source}))"
    )


def _parsing(index: int, kind: Kind, *, fragment: bool) -> tuple[str, str]:
    """Return SQL for the typed value of `r<index>`, and for what is kept beside it: NULL where nothing is."""
    raw, again = f"r{index}", kind.raw.format(f"p{index}")
    value = f"CAST({raw} AS JSON)"
    if kind.arrow is None:
        parse, same = kind.parse.format(raw), again
    elif fragment:
        parse, same = (
            kind.parse.format(f"json_extract_string({raw}, '$')"),
            f"CAST(to_json({again}) AS VARCHAR)",
        )
    elif kind.plain:
        return kind.parse.format(raw), ""
    else:
        parse, same, value = kind.parse.format(raw), again, f"to_json({raw})"
    return (
        parse,
        f"CASE WHEN {raw} IS DISTINCT FROM {same} THEN json_array({value}, CAST({again} AS VARCHAR)) END",
    )


def fragments(values: Sequence[Any]) -> pa.Array:
    """Return each value as JSON text."""
    return pa.array(
        [None if value is None else orjson.dumps(value) for value in values],
        pa.binary(),
    ).cast(pa.string())


@contextlib.contextmanager
def registered(cursor: duckdb.DuckDBPyConnection, raw: pa.Table) -> Iterator[str]:
    """Let SQL on `cursor` see an Arrow table, by the name that this gives."""
    cursor.register(_RAW, raw)
    try:
        yield f"temp.{_RAW}"
    finally:
        cursor.unregister(_RAW)
