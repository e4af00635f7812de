"""A document's joins as SQL, and what that gives as `render` gets it.

All of a document comes in one row: the root's row as JSON, then a text for each join of the root, in whose JSON all that
is joined further down is nested. Filters, order, limits and aggregates are Postgres's; only children of which SQL cannot
say the order (rows without a key, keys of a kind that has no order of its own in text) are put in order here.

A joined row is its JSON, or where something is joined to it ``[row, join, …]``. An aggregate is ``[keys, value, …]``: the
keys of the rows it is over, since whatever happens to one of them may change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from typing import Any

from psycopg import sql

from headrace import codec
from headrace.change import Row
from headrace.documents import Aggregate, Avg, Count, Document, Many, Max, Node, One, Sum, Window
from headrace.documents.aggregates import Function, Summed
from headrace.documents.declaration import Folding, Join, Level
from headrace.documents.order import Shape
from headrace_verify.postgres import Table

Tables = Mapping[str, Table]
Members = list[tuple[str, str]]
"""Joined rows by table and log's key."""
Pair = tuple[sql.Composable, sql.Composable, sql.Composable]
"""Two values, and the operator that compares them."""


class Select:
    """What reads documents: their roots', or for a few roots, each of which is looked up."""

    def __init__(self, tables: Tables, *, few: bool) -> None:
        """Read from `tables`. All children of a table are grouped in one pass; of a few roots they are looked up."""
        self._tables = tables
        self._few = few

    def documents(self, document: Document, condition: sql.Composable) -> sql.Composed:
        """Return the SQL of the documents whose roots, called ``t``, satisfy a condition."""
        root = self._tables[document.table]
        columns, sources = self._joined(document, "t")
        texts = sql.SQL(", ").join(sql.SQL("{}::text").format(each) for each in (root.json("t"), *columns))
        return sql.SQL("SELECT {} FROM {} t {} WHERE {}").format(
            texts, root.source, sql.SQL(" ").join(sources), condition
        )

    def windows(self, window: Window, starts: Sequence[str] | None) -> sql.Composed:
        """Return the SQL of the windows of a table in which there are rows, of those that begin then, or of all when None.

        The arithmetic is Postgres's own, and so is the text of a window's start.
        """
        table, alias = self._tables[window.table], "c"
        column = table.column(window.on)
        kind = sql.SQL("timestamptz" if column.base == "timestamptz" else "timestamp")
        at = sql.SQL("CAST({} AS {})").format(sql.Identifier(alias, window.on), kind)
        # As date_bin does it; that one has no interval long enough from 1970 to the last years that Postgres has. Of whole seconds, because
        # extract rounds microseconds that far away.
        second = sql.SQL("date_trunc('second', {})").format(at)
        past = sql.SQL("mod(mod(extract(epoch FROM {0}), {1}) + {1}, {1})").format(second, sql.Literal(window.seconds))
        start = sql.SQL("{} - make_interval(secs => CAST({} AS double precision))").format(second, past)
        conditions = [sql.SQL("isfinite({})").format(at)]
        conditions += [_among(table, alias, name, values) for name, values in window.where.items()]
        if starts is not None:
            within = sql.SQL("{0} BETWEEN CAST({1} AS {2}) AND CAST({1} AS {2}) + make_interval(secs => {3})")
            last = sql.Literal(window.seconds - 0.000001)
            some = [within.format(at, sql.Literal(each), kind, last) for each in starts]
            conditions.append(sql.SQL("({})").format(sql.SQL(" OR ").join(some)))
        return sql.SQL("SELECT to_json({0})::text, {1}::text FROM {2} {3} WHERE {4} GROUP BY {0}").format(
            start,
            _aggregated(window, table, alias),
            table.source,
            sql.Identifier(alias),
            sql.SQL(" AND ").join(conditions),
        )

    def _joined(self, level: Level, alias: str) -> tuple[list[sql.Composed], list[sql.Composed]]:
        """Return what is joined to the rows of `alias`, as values and as items of FROM."""
        values: list[sql.Composed] = []
        sources: list[sql.Composed] = []
        for number, join in enumerate(level.joins.values()):
            name, other = f"{alias}_{number}", self._tables[join.table]
            if isinstance(join, One):
                row, further = self._row(join, name)
                there = sql.Identifier(name, other.key[0])
                values.append(sql.SQL("CASE WHEN {} IS NOT NULL THEN {} END").format(there, row))
                on = _equal(_pairs(other, name, other.key, self._tables[level.table], alias, join.on))
                sources.append(sql.SQL("LEFT JOIN {} {} ON {}").format(other.source, sql.Identifier(name), on))
                sources += further
            else:
                values.append(sql.SQL("{}").format(sql.Identifier(name, "found")))
                sources.append(self._referring(join, name, alias, self._tables[level.table]))
        return values, sources

    def _row(self, level: Level, alias: str) -> tuple[sql.Composed, list[sql.Composed]]:
        values, sources = self._joined(level, alias)
        row = self._tables[level.table].json(alias)
        if values:
            row = sql.SQL("json_build_array({})").format(sql.SQL(", ").join([row, *values]))
        return row, sources

    def _referring(self, join: Many | Aggregate, name: str, above: str, parent: Table) -> sql.Composed:
        """Return the item of FROM that has in ``found`` what of a table refers to the row of `above`."""
        table, child = self._tables[join.table], f"{name}c"
        pairs = _pairs(table, child, join.by, parent, above, parent.key)
        by = [one for one, *_ in pairs]
        conditions = [_among(table, child, column, values) for column, values in join.where.items()]
        conditions += [_equal(pairs)] if self._few else []
        condition: sql.Composable = sql.SQL(" AND ").join(conditions) if conditions else sql.SQL("true")
        if isinstance(join, Aggregate):
            found, sources = _aggregated(join, table, child), list[sql.Composed]()
        else:
            row, sources = self._row(join, child)
            found = sql.SQL("json_agg({})").format(row)
        source = sql.SQL("{} {} {}").format(table.source, sql.Identifier(child), sql.SQL(" ").join(sources))
        if isinstance(join, Many) and in_order(join, table):
            source = _numbered(join, table, child, by, row, source, condition)
            by = [sql.Identifier("q", f"k{number}") for number in range(len(by))]
            found = sql.SQL("json_agg(q.element ORDER BY q.n)").format()
            condition = sql.SQL("q.n <= {}").format(sql.Literal(join.limit)) if join.limit else sql.SQL("true")
        return sql.SQL("LEFT JOIN {} (SELECT {}, {} AS found FROM {} WHERE {} GROUP BY {}) {} ON {}").format(
            sql.SQL("LATERAL" if self._few else ""),
            _keys(by),
            found,
            source,
            condition,
            sql.SQL(", ").join(by),
            sql.Identifier(name),
            sql.SQL("true")
            if self._few
            else _equal([(sql.Identifier(name, f"k{n}"), other, equals) for n, (_, other, equals) in enumerate(pairs)]),
        )


def in_order(join: Many, table: Table) -> bool:
    """Whether SQL puts the rows in order, and leaves out those beyond the limit."""
    return bool(join.order or join.limit) and bool(table.key) and all(table.column(each).ordered for each in table.key)


def _numbered(
    join: Many,
    table: Table,
    child: str,
    by: Sequence[sql.Composable],
    row: sql.Composed,
    source: sql.Composed,
    condition: sql.Composable,
) -> sql.Composed:
    """Return rows as ``q.element`` with their places in the order as ``q.n``."""
    order = [
        sql.SQL("{} {} NULLS LAST").format(table.ordering(child, column), sql.SQL("DESC" if falling else "ASC"))
        for column, falling in (*join.order, *((column, False) for column in table.key))
    ]
    return sql.SQL(
        "(SELECT {}, {} AS element, row_number() OVER (PARTITION BY {} ORDER BY {}) AS n FROM {} WHERE {}) q"
    ).format(_keys(by), row, sql.SQL(", ").join(by), sql.SQL(", ").join(order), source, condition)


def _keys(by: Sequence[sql.Composable]) -> sql.Composed:
    named = [sql.SQL("{} AS {}").format(each, sql.Identifier(f"k{number}")) for number, each in enumerate(by)]
    return sql.SQL(", ").join(named)


def _pairs(
    one: Table, left: str, left_columns: Sequence[str], other: Table, right: str, right_columns: Sequence[str]
) -> list[Pair]:
    """Return what must be equal of two rows: the columns, or where Postgres does not compare those, what the log writes."""
    pairs: list[Pair] = []
    for a, b in zip(left_columns, right_columns, strict=True):
        if one.column(a).compares_with(other.column(b)):
            pairs.append((sql.Identifier(left, a), sql.Identifier(right, b), one.column(a).equals))
        else:
            pairs.append((one.written(left, a), other.written(right, b), sql.SQL("=")))
    return pairs


def _equal(pairs: Iterable[Pair]) -> sql.Composed:
    return sql.SQL(" AND ").join(sql.SQL("{} {} {}").format(one, equals, other) for one, other, equals in pairs)


def _among(table: Table, alias: str, column: str, values: Sequence[Any]) -> sql.Composed:
    """Return the SQL that is true of rows with one of these values, as JSON means them."""
    number = table.column(column).number
    listed = [_literal(value, number=number) for value in values if value is not None]
    anyone = sql.SQL("{} = ANY (ARRAY[{}]::jsonb[])").format(table.meaning(alias, column), sql.SQL(", ").join(listed))
    if None not in values:
        return anyone
    return sql.SQL("({} OR {} IS NULL)").format(anyone, sql.Identifier(alias, column))


def _literal(value: Any, *, number: bool) -> sql.Literal:
    """Return a value as JSON; a number may be written as text, as the log writes some."""
    if number and isinstance(value, str):
        with suppress(ArithmeticError):
            if Decimal(value).is_finite():
                return sql.Literal(format(Decimal(value), "f"))
    return sql.Literal(codec.dumps(value).decode())


def _aggregated(join: Folding, table: Table, alias: str) -> sql.Composed:
    keys = sql.SQL("json_agg({})").format(_keyed(table).json(alias)) if table.key else sql.SQL("NULL")
    values = [_value(function, table, alias) for function in join.values.values()]
    return sql.SQL("json_build_array({})").format(sql.SQL(", ").join([keys, *values]))


def _value(function: Function, table: Table, alias: str) -> sql.Composed:
    if function.column is None:
        return sql.SQL("count(*)").format()
    column: sql.Composable = sql.Identifier(alias, function.column)
    if table.column(function.column).base in {"json", "jsonb"}:  # whose null is written as SQL's is
        column = sql.SQL("nullif(btrim({}::text, e' \\t\\n\\r'), 'null')").format(column)
    if isinstance(function, Count):
        return sql.SQL("count({})").format(column)
    if isinstance(function, Sum | Avg):
        # The digits that are written: a cast of floating point to numeric rounds.
        return sql.SQL("json_build_array(sum({0}::text::numeric)::text, count({0}))").format(column)
    way = sql.SQL("DESC" if isinstance(function, Max) else "ASC")
    return sql.SQL("(array_agg({0} ORDER BY {1} {2}, {3} {2}) FILTER (WHERE {4} IS NOT NULL))[1]").format(
        table.coded(alias, function.column),
        table.ordering(alias, function.column),
        way,
        table.written(alias, function.column),
        column,
    )


def _keyed(table: Table) -> Table:
    return replace(table, columns=tuple(table.column(name) for name in table.key))


# What came


def node(tables: Tables, level: Level, row: Row, found: Iterable[Any], members: Members) -> Node:
    """Return a row with what is joined to it; `members` gains every row that is joined, or referred to."""
    joins = {
        name: _read(tables, join, row, value, members)
        for (name, join), value in zip(level.joins.items(), found, strict=False)
    }
    return Node(level.table, row, joins)


def _read(tables: Tables, join: Join, row: Row, value: Any, members: Members) -> Node | list[Node] | None:
    table = tables[join.table]
    if isinstance(join, Aggregate):
        return _read_aggregate(join, table, value, members)
    if isinstance(join, One):
        # What a row refers to counts also when it is not there: it may come.
        members.append((table.name, encoded(table.key, [row[column] for column in join.on])))
        if value is None:
            return None
        child, further = _parted(join, value)
        return node(tables, join, table.plain(child), further, members)
    parts = [_parted(join, each) for each in value or ()]
    members += [(table.name, key_of(table, child)) for child, _ in parts]
    children = [(table.plain(child), further) for child, further in parts]
    if not in_order(join, table):
        numbers = frozenset(column.name for column in table.columns if column.number)
        times = frozenset(column.name for column in table.columns if column.time)
        shape = Shape(table.key, numbers, times=times)
        children = join.picked(children, shape)
    return [node(tables, join, child, further, members) for child, further in children]


def _parted(join: Join, value: Any) -> tuple[Row, Sequence[Any]]:
    row, *further = value if join.joins else (value,)
    return row, further


def window(tables: Tables, declared: Window, start: str, value: Any, members: Members) -> Node:
    """Return a window as `render` gets it; `members` gains every row that is in it."""
    values = _read_aggregate(declared, tables[declared.table], value, members)
    return Node(declared.table, {declared.start: start, **values})


def _read_aggregate(join: Folding, table: Table, value: Any, members: Members) -> Node:
    keys, *values = value or ([], *(function.result(None) for function in join.values.values()))
    members += [(table.name, key_of(table, key)) for key in keys or ()]
    if not table.key:
        members.append((table.name, key_of(table, {})))
    results = {
        name: function.result(_summed(table, function.column, found)) if isinstance(function, Sum | Avg) else found
        for (name, function), found in zip(join.values.items(), values, strict=True)
    }
    return Node(join.table, results)


def _summed(table: Table, name: str, found: Any) -> Summed | None:
    if not found or not found[1]:
        return None
    column = table.column(name)
    written = column.base == "numeric" or not (column.number or column.base == "oid")
    return Summed(Decimal(found[0]), found[1], text=written)


def key_of(table: Table, row: Row) -> str:
    """Return the log's key of a row that SQL has given, before it is finished."""
    return codec.encode_key(table.keyed(row)).decode()


def encoded(names: Sequence[str], values: Sequence[Any]) -> str:
    """Return the log's key that has these values."""
    return codec.encode_key(dict(zip(names, values, strict=True))).decode()


# Which documents a change is of


def places(level: Level) -> Iterator[tuple[Level, Join]]:
    """Yield every join of a document, each with what it is joined to."""
    for join in level.joins.values():
        yield level, join
        yield from places(join)
