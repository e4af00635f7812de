"""Whether a declaration fits the tables, as far as their schemas are known."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from headrace.change import Column, TableSchema
from headrace.documents.declaration import Folding, Level, Many, One
from headrace.documents.order import ORDERED, kind_of
from headrace.documents.windows import Root, Window
from headrace.errors import Misconfigured, Transient
from headrace.shapes import UNKNOWN_TYPE

_REMEDY = "Change the declaration of the document."
_JSON = ("json", "jsonb")
_WHOLE = frozenset({"smallint", "integer", "bigint", "oid"})
_BY_ITSELF = frozenset({
    "boolean", "real", "double precision", "date", "timestamp without time zone", "timestamp with time zone", "time without time zone",
    "time with time zone", "inet", "cidr", "macaddr", "macaddr8", "money",
})  # fmt: skip
"""Types whose values the log writes in one way, and those of other types otherwise."""
_IN_TWO_WAYS = frozenset({"citext", "interval", "json", "jsonb", "numrange", "nummultirange"})
"""Types that have equal values which the log writes otherwise."""


def check_all(
    documents: Iterable[Root], newest: Mapping[str, TableSchema], *, shown: bool, typed: bool, whole: bool
) -> None:
    """See `check`, `check_window`, and where types are known, `typed`, `check_types`.

    Once there is a view, the log may just have half of a migration: one table's new type before the other's, a column that is dropped
    before it is added again. Then it is looked at again; of a feed a column never goes, nor is its type another.

    Raises:
        Misconfigured: `document-column`, `document-key`.
        Transient: `document-column`.
    """
    try:
        for document in documents:
            if isinstance(document, Window):
                check_window(document, newest, whole=whole)
            else:
                check(document, newest, whole=whole)
                if typed:
                    check_types(document, newest)
    except Misconfigured as error:
        if not shown or not typed or error.code != "document-column":
            raise
        raise Transient(error.code, error.message, error.remedy) from error


def check(level: Level, newest: Mapping[str, TableSchema], *, whole: bool = True) -> None:
    """Hold the joins of a level, and what is joined to those, against the newest schemas.

    Args:
        level: A document, or a join.
        newest: By the table.
        whole: Whether they have all columns. Else one that they lack may just not have been seen (S28).

    Raises:
        Misconfigured: `document-column`, `document-key`.
    """
    for join in level.joins.values():
        refers, referred = (level.table, join.table) if isinstance(join, One) else (join.table, level.table)
        _check_columns(join.columns, newest.get(refers), whole)
        _check_key(join.columns, newest.get(referred))
        if not isinstance(join, One):
            _check_values(join, newest.get(join.table), whole)
        check(join, newest, whole=whole)


def check_types(level: Level, newest: Mapping[str, TableSchema]) -> None:
    """Hold the types of the columns of each join against each other: documents join by what the log writes.

    Not of a Debezium feed (S28), which knows many types by how values look, or not at all.

    Raises:
        Misconfigured: `document-column`.
    """
    for join in level.joins.values():
        refers, referred = (level.table, join.table) if isinstance(join, One) else (join.table, level.table)
        _check_types(join.columns, newest.get(refers), newest.get(referred))
        check_types(join, newest)


def check_window(window: Window, newest: Mapping[str, TableSchema], *, whole: bool = True) -> None:
    """Hold a window against the newest schema of its table, see `check`. Raises Misconfigured: `document-column`."""
    schema = newest.get(window.table)
    _check_columns((window.on,), schema, whole)
    _check_values(window, schema, whole)
    for column in schema.columns if schema else ():
        kind = column.base or column.type
        timestamp = kind in {"date", UNKNOWN_TYPE} or (kind.startswith("timestamp") and not kind.endswith("[]"))
        if column.name == window.on and not timestamp:
            said = f"{window.table}.{column.name} is {column.type}, no timestamp, and is in no window."
            raise Misconfigured("document-column", said, _REMEDY)


def _check_columns(columns: Collection[str], schema: TableSchema | None, whole: bool) -> None:
    missing = set(columns) - {column.name for column in schema.columns} if schema and whole else None
    if schema and missing:
        said = f"{schema.table} has no column {', '.join(sorted(missing))}."
        remedy = (
            "Add the column, and write a row of the table: a view that is there then goes on by itself, a build by: headrace rebuild NAME. "
            "Or change the declaration of the document."
        )
        raise Misconfigured("document-column", said, remedy)


def _check_key(columns: Collection[str], schema: TableSchema | None) -> None:
    if schema and len(schema.key) != len(columns):
        raise Misconfigured(
            "document-key",
            f"A join by {', '.join(columns)} does not fit the key of {schema.table}: {', '.join(schema.key)}.",
            _REMEDY,
        )


def _check_types(columns: Collection[str], refers: TableSchema | None, referred: TableSchema | None) -> None:
    if refers is None or referred is None:
        return
    ours, theirs = ({column.name: column for column in schema.columns} for schema in (refers, referred))
    for one, other in ((ours[a], theirs[b]) for a, b in zip(columns, referred.key, strict=True) if b in theirs):
        if not _written(one) or _written(one) != _written(other):
            raise Misconfigured(
                "document-column",
                f"{refers.table}.{one.name} is {one.type} and {referred.table}.{other.name} is {other.type}: the log may write "
                "equal values of these otherwise, as 1 and 1.0, and such rows are not joined.",
                "Give both columns one type that writes a value in one way, as bigint, numeric(20,0) or text; or leave the join out.",
            )


def _written(column: Column) -> str:
    """Return what is the same of columns whose equal values the log writes alike; empty where one column may write a value in two ways.

    The scale or length below a domain is not known: such a column is like those of the same domain.
    """
    kind = kind_of(column)
    if kind in {"numeric", "character", "bpchar"}:
        modifiers = column.type.partition("(")[2]
        digits = modifiers.rpartition(",")[2] if kind == "numeric" else modifiers
        return column.type if column.base else digits and f"{kind} {digits}"
    if kind in _IN_TWO_WAYS or kind.endswith("[]"):
        return ""
    return "integer" if kind in _WHOLE else kind if kind in _BY_ITSELF else "text"


def _check_values(join: Many | Folding, schema: TableSchema | None, whole: bool) -> None:
    if schema is None:
        return
    counted, added = (join.counted, join.added) if isinstance(join, Folding) else ((), ())
    _check_columns({*join.where, *join.ordered, *counted}, schema, whole)
    for column in schema.columns:
        kind, name = kind_of(column), column.name
        if name in join.where and (kind in _JSON or kind.endswith("[]")):
            how = "compared"
        elif name in join.ordered and kind not in ORDERED:
            how = "put in order, as the log writes them: order by another column"
        elif name in added and kind in _JSON:
            how = 'added: 12 and "12" are two values there, and one number'
        else:
            continue
        said = f"{schema.table}.{name} is {column.type}, whose values are not {how}."
        raise Misconfigured("document-column", said, _REMEDY)
