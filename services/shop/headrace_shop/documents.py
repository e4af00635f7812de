"""Documents as an application makes them that writes its stores itself: rows by SQL, bodies by the plugins' own
`render`.

Only the dual writer needs this: it does in the request what consumers do from the log, for what the shop's own plugins
declare: one level of `One` and `Many`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from psycopg.rows import dict_row

from headrace import codec
from headrace.change import Row, Version
from headrace.documents import Document, Many, Node
from headrace.documents.consumer import DocumentConsumer
from headrace.documents.declaration import Join
from headrace.documents.order import Shape
from headrace.stores import Doc
from headrace_shop.database import KEYS, Connection

Touched = Sequence[tuple[str, tuple[int, ...]]]
"""(table without its schema, key) of rows that a transaction changed."""

_CHUNK = 500


def render(connection: Connection, consumer: DocumentConsumer, touched: Touched, version: Version) -> list[Doc]:
    """Return the documents of `consumer` that show any of the touched rows, as Postgres has them now."""
    docs = []
    for document in _declared(consumer):
        roots = sorted(_roots(connection, document, touched))
        bodies = {node["id"]: consumer.render(node) for node in nodes(connection, document, roots)}
        docs += [Doc(consumer.id(document.table, {"id": root}), _plain(bodies.get(root)), version) for root in roots]
    return docs


def render_all(connection: Connection, consumer: DocumentConsumer, version: Version) -> Iterator[Doc]:
    """Yield every document of `consumer`, as Postgres has them now."""
    for document in _declared(consumer):
        for node in nodes(connection, document):
            body = _plain(consumer.render(node))
            if body is not None:
                yield Doc(consumer.id(document.table, {"id": node["id"]}), body, version)


def _declared(consumer: DocumentConsumer) -> list[Document]:
    return [document for document in consumer.documents if isinstance(document, Document)]


def nodes(connection: Connection, document: Document, roots: Sequence[int] | None = None) -> Iterator[Node]:
    """Yield what `render` gets for some roots, or for all of them."""
    found = rows(connection, document.table, "id", roots)
    for start in range(0, len(found), _CHUNK):
        chunk = found[start : start + _CHUNK]
        joined = {name: _join(connection, join, chunk) for name, join in document.joins.items()}
        for row in chunk:
            picked = {name: _nodes(join, joined[name].get(row[_column(join)])) for name, join in document.joins.items()}
            yield Node(document.table, row, picked)


def _nodes(join: Join, found: Any) -> Node | list[Node] | None:
    if isinstance(join, Many):
        picked = join.picked(((row, None) for row in found or ()), Shape(("id",)))
        return [Node(join.table, row) for row, _ in picked]
    return Node(join.table, found) if found is not None else None


def rows(connection: Connection, table: str, column: str = "id", values: Sequence[Any] | None = None) -> list[Row]:
    """Return rows of `table` in the codec's form, by key: those with one of `values` in `column`, or all."""
    where = f"WHERE {column} = ANY(%s)" if values is not None else ""
    order = ", ".join(KEYS[table.removeprefix("public.")])
    with connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute(
            f"SELECT * FROM {table} {where} ORDER BY {order}".encode(), (list(values),) if values is not None else ()
        )
        return [{name: natural(value) for name, value in row.items()} for row in cursor]


def natural(value: Any) -> Any:
    """Return a value of psycopg in the codec's form (docs/formats.md)."""
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, datetime):
        text = value.isoformat().removesuffix("+00:00")
        return (text.rstrip("0") if "." in text else text) + "+00:00"
    return value


def _join(connection: Connection, join: Join, chunk: Sequence[Row]) -> dict[Any, Any]:
    (column,) = join.columns
    if isinstance(join, Many):
        grouped: dict[Any, list[Row]] = {}
        for row in rows(connection, join.table, column, [root["id"] for root in chunk]):
            grouped.setdefault(row[column], []).append(row)
        return grouped
    return {row["id"]: row for row in rows(connection, join.table, "id", [root[column] for root in chunk])}


def _column(join: Join) -> str:
    return "id" if isinstance(join, Many) else join.columns[0]


def _roots(connection: Connection, document: Document, touched: Touched) -> set[int]:
    roots: set[int] = set()
    for table, (key, *_) in touched:
        if f"public.{table}" == document.table:
            roots.add(key)
        for join in document.joins.values():
            if f"public.{table}" == join.table:
                roots |= _referring(connection, document, join, key)
    return roots


def _referring(connection: Connection, document: Document, join: Join, key: int) -> set[int]:
    """Return the roots that show the row `key` of a joined table."""
    if isinstance(join, Many):
        statement = f"SELECT {join.columns[0]} FROM {join.table} WHERE id = %s"
    else:
        statement = f"SELECT id FROM {document.table} WHERE {join.columns[0]} = %s"
    return {root for (root,) in connection.execute(statement.encode(), (key,))}


def _plain(body: Row | None) -> Row | None:
    """Return the body as a consumer would hand it on: through JSON."""
    plain: Row | None = codec.loads(codec.dumps(body))
    return plain
