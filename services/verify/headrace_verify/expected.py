"""What a view should hold, from SQL alone: the rows themselves, or a document's joins and then the plugin's own `render`.

Nothing of `headrace.documents` but the declaration is used, so that a mistake in keeping documents in step is seen (S27).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from psycopg import sql

from headrace import codec
from headrace.change import Change, Row, TableSchema
from headrace.consumer import ALL, Consumer
from headrace.documents import Document, DocumentConsumer, Many
from headrace.errors import HeadraceError, Misconfigured, Poison
from headrace.settings import Settings
from headrace_verify.ledger import Expected, Ledger
from headrace_verify.postgres import Connection, Table, stream
from headrace_verify.postgres import table as read_table

Root = tuple[str, str]
Touched = tuple[str, str, Root]
"""(collection, key, root) of a view's row."""


class Made(NamedTuple):
    """One expected row, and the joined rows in it as (table, log's key)."""

    row: Expected
    members: tuple[Root, ...] = ()


class Expectation(Protocol):
    """What one view should hold.

    Attributes:
        tables: Those whose changes can excuse a difference.
        notes: What a reader should know.
        keyless: Collections whose rows have no key: see `multiset`.
    """

    tables: tuple[str, ...]
    notes: tuple[str, ...]
    keyless: frozenset[str]

    def all(self, connection: Connection) -> Iterator[Made]:
        """Yield every row, as the open snapshot has it."""

    def some(self, connection: Connection, roots: Sequence[Root]) -> Iterator[Made]:
        """Yield what these roots' rows or documents should be; nothing for a root that is not there."""

    def without_key(self, connection: Connection, collection: str) -> tuple[tuple[str, ...], Iterator[Row]]:
        """Return the columns and all rows of one of `keyless`, as the open snapshot has them."""

    def touched(self, change: Change, ledger: Ledger) -> Iterator[Touched]:
        """Yield the view's rows that a change may alter, from their state in the ledger or any later one."""


Shapes = dict[str, TableSchema]
"""The newest schema of each table in the log."""


def expectation(
    connection: Connection, consumer: type[Consumer], name: str, settings: Settings, shapes: Shapes, published: set[str]
) -> Expectation:
    """Return what a view should hold.

    Raises:
        Misconfigured: `verify-no-expectation`, `table-not-captured`.
    """
    if consumer.mirrors_rows:
        wanted = published if tuple(consumer.tables) == ALL else set(consumer.tables)
        tables, notes = _tables(connection, sorted(wanted), shapes, published)
        return Rows(tables, notes)
    if issubclass(consumer, DocumentConsumer):
        tables, notes = _tables(connection, list(consumer.tables), shapes, published)
        lacking = sorted(set(consumer.tables) - {table.name for table in tables})
        if lacking:
            said = f"{name} needs {', '.join(lacking)}, not captured."
            raise Misconfigured("table-not-captured", said, "Run: headrace setup --table TABLE --apply")
        _check_roots(consumer, name, {table.name: table for table in tables})
        return Documents(consumer(settings, name), {table.name: table for table in tables}, notes)
    raise Misconfigured(
        "verify-no-expectation",
        f"Verify does not know what {name} should hold: it neither mirrors rows nor renders documents.",
        "Set mirrors_rows, or subclass DocumentConsumer.",
    )


def _check_roots(consumer: type[DocumentConsumer], name: str, tables: dict[str, Table]) -> None:
    for document in consumer.documents:
        if not tables[document.table].key:
            said = f"{name} has a document for each row of {document.table}, which is append-only: {_KEYLESS}."
            raise Misconfigured("verify-no-expectation", said, "Give the table a primary key and capture it by that.")


_KEYLESS = "in Postgres its rows have no key by which to find them (S10)"


def _tables(
    connection: Connection, wanted: list[str], shapes: Shapes, published: set[str]
) -> tuple[list[Table], tuple[str, ...]]:
    """Return how to read the wanted tables; one that Postgres has and the log does not is an error."""
    gone = sorted(set(wanted) - published)
    unknown = sorted((set(wanted) & published) - shapes.keys())
    if unknown:
        said = f"The log does not know {', '.join(unknown)} yet."
        raise Misconfigured("table-not-captured", said, "Let `headrace capture` run until its snapshot is complete.")
    found = [read_table(connection, shapes[name]) for name in wanted if name in published]
    there = [table for table in found if table]
    notes = [f"{name} is not captured and not compared" for name in gone]
    notes += [
        f"{table.name} is approximate: a large value that an update left alone may be of a later moment (S7)"
        for table in there
        if table.approximate
    ]
    return there, tuple(notes)


class Rows:
    """The rows of tables as they are: the collection is the table, the key the log's."""

    def __init__(self, tables: list[Table], notes: tuple[str, ...]) -> None:
        """Expect the rows of `tables`."""
        self._tables = {table.name: table for table in tables if table.key}
        self._keyless = {table.name: table for table in tables if not table.key}
        self.tables = tuple(self._tables)
        self.keyless = frozenset(self._keyless)
        self.notes = notes

    def all(self, connection: Connection) -> Iterator[Made]:
        """See `Expectation.all`."""
        for table in self._tables.values():
            yield from self._read(connection, table, sql.SQL("true"))

    def some(self, connection: Connection, roots: Sequence[Root]) -> Iterator[Made]:
        """See `Expectation.some`."""
        for name, keys in _by_table(roots).items():
            table = self._tables[name]
            yield from self._read(connection, table, _any_of(table, keys))

    def without_key(self, connection: Connection, collection: str) -> tuple[tuple[str, ...], Iterator[Row]]:
        """See `Expectation.without_key`."""
        table = self._keyless[collection]
        return tuple(column.name for column in table.columns), self._rows(connection, table, sql.SQL("true"))

    def touched(self, change: Change, ledger: Ledger) -> Iterator[Touched]:  # noqa: ARG002  a row is touched by itself alone
        """See `Expectation.touched`."""
        key = change.key.decode()
        yield change.table, key, (change.table, key)

    def _read(self, connection: Connection, table: Table, where: sql.Composable) -> Iterator[Made]:
        for row in self._rows(connection, table, where):
            key = _key(table, row)
            yield Made(Expected(table.name, key, (table.name, key), row))

    @staticmethod
    def _rows(connection: Connection, table: Table, where: sql.Composable) -> Iterator[Row]:
        query = sql.SQL("SELECT {}::text FROM {} t WHERE {}").format(table.json("t"), table.identifier, where)
        return (table.plain(codec.loads(text)) for (text,) in stream(connection, query))


class Documents:
    """Documents by their declarations; ids are unique in a consumer, and the collection is empty."""

    def __init__(self, consumer: DocumentConsumer, tables: dict[str, Table], notes: tuple[str, ...]) -> None:
        """Expect what `consumer` renders of the rows in Postgres."""
        self._consumer = consumer
        self._tables = tables
        self._keys = {name: table.key for name, table in tables.items()}
        self.tables = tuple(tables)
        self.notes = notes
        self.keyless = frozenset[str]()

    def all(self, connection: Connection) -> Iterator[Made]:
        """See `Expectation.all`."""
        for document in self._consumer.documents:
            yield from self._read(connection, document, None)

    def some(self, connection: Connection, roots: Sequence[Root]) -> Iterator[Made]:
        """See `Expectation.some`."""
        for name, keys in _by_table(roots).items():
            for document in self._consumer.documents:
                if document.table == name:
                    yield from self._read(connection, document, keys)

    def touched(self, change: Change, ledger: Ledger) -> Iterator[Touched]:
        """See `Expectation.touched`: the documents that held the row at the snapshot, and the one it names now.

        A row without a key (S10) may have been in any document that holds one of its table.
        """
        key = change.key.decode() if self._keys[change.table] else _key(self._tables[change.table], {})
        yield from ledger.members(change.table, key)
        for document in self._consumer.documents:
            if document.table == change.table:
                yield self._document(document, codec.decode_key(change.key))
            for join in document.joins.values():
                if isinstance(join, Many) and join.table == change.table and change.row is not None:
                    names = self._keys[document.table]
                    values = [change.row.get(column) for column in join.by]
                    yield self._document(document, dict(zip(names, values, strict=True)))

    def without_key(self, connection: Connection, collection: str) -> tuple[tuple[str, ...], Iterator[Row]]:  # noqa: ARG002  see there
        """See `Expectation.without_key`: a document has a key always."""
        raise KeyError(collection)

    def _document(self, document: Document, key: Row) -> Touched:
        root = (document.table, codec.encode_key(key).decode())
        return "", self._consumer.id(document.table, key), root

    def _read(self, connection: Connection, document: Document, keys: list[str] | None) -> Iterator[Made]:
        table = self._tables[document.table]
        for found in stream(connection, _join(document, self._tables, keys)):
            row = table.plain(codec.loads(found[0]))
            joined, members = self._joined(document, found[1:])
            key = {name: row[name] for name in table.key}
            body = self._render(document, row, joined)
            yield Made(Expected(*self._document(document, key), body), members)

    def _joined(self, document: Document, found: Sequence[str | None]) -> tuple[dict[str, Any], tuple[Root, ...]]:
        joined: dict[str, Any] = {}
        members: list[Root] = []
        for (name, join), text in zip(document.joins.items(), found, strict=True):
            table = self._tables[join.table]
            many = isinstance(join, Many)
            value = codec.loads(text) if text is not None else []
            plain = [table.plain(row) for row in (value if isinstance(value, list) else [value])]
            members += [(table.name, _key(table, row)) for row in plain]
            joined[name] = plain if many else next(iter(plain), None)
        return joined, tuple(members)

    def _render(self, document: Document, row: Row, joined: dict[str, Any]) -> Row | None:
        try:
            body = self._consumer.render(document.node(row, joined, self._keys))
            plain: Row | None = codec.loads(codec.dumps(body))
        except HeadraceError:
            raise
        except Exception as error:
            said = f"{type(self._consumer).__name__}.render failed for a row of {document.table}: {error!r}."
            raise Poison("render-failed", said, "Mend render.") from error
        return plain


def _join(document: Document, tables: dict[str, Table], keys: list[str] | None) -> sql.Composed:
    """Return the SQL of whole documents: the root row, then each join in its order.

    All children are grouped in one pass; for a few roots they are looked up one by one.
    """
    root = tables[document.table]
    columns, joins = [root.json("t")], []
    for number, join in enumerate(document.joins.values()):
        other, alias = tables[join.table], f"j{number}"
        if isinstance(join, Many):
            columns.append(sql.SQL("{}").format(sql.Identifier(alias, "rows")))
            joins.append((_looked_up if keys is not None else _grouped)(other, join.by, root.key, alias))
        else:
            columns.append(
                sql.SQL("CASE WHEN {} IS NOT NULL THEN {} END").format(
                    sql.Identifier(alias, other.key[0]), other.json(alias)
                )
            )
            on = _on(alias, other.key, "t", join.on)
            joins.append(sql.SQL("LEFT JOIN {} {} ON {}").format(other.identifier, sql.Identifier(alias), on))
    texts = sql.SQL(", ").join(sql.SQL("{}::text").format(column) for column in columns)
    where = _any_of(root, keys) if keys is not None else sql.SQL("true")
    return sql.SQL("SELECT {} FROM {} t {} WHERE {}").format(texts, root.identifier, sql.SQL(" ").join(joins), where)


def _grouped(other: Table, by: Sequence[str], key: Sequence[str], alias: str) -> sql.Composed:
    groups = sql.SQL(", ").join(sql.Identifier("c", column) for column in by)
    return sql.SQL("LEFT JOIN (SELECT {}, json_agg({}) AS rows FROM {} c GROUP BY {}) {} ON {}").format(
        groups, other.json("c"), other.identifier, groups, sql.Identifier(alias), _on(alias, by, "t", key)
    )


def _looked_up(other: Table, by: Sequence[str], key: Sequence[str], alias: str) -> sql.Composed:
    return sql.SQL("LEFT JOIN LATERAL (SELECT json_agg({}) AS rows FROM {} c WHERE {}) {} ON true").format(
        other.json("c"), other.identifier, _on("c", by, "t", key), sql.Identifier(alias)
    )


def _on(left: str, left_columns: Sequence[str], right: str, right_columns: Sequence[str]) -> sql.Composed:
    pairs = zip(left_columns, right_columns, strict=True)
    equal = [sql.SQL("{} = {}").format(sql.Identifier(left, a), sql.Identifier(right, b)) for a, b in pairs]
    return sql.SQL(" AND ").join(equal)


def _any_of(table: Table, keys: Sequence[str]) -> sql.Composable:
    """Return the SQL that is true of the rows of these keys."""
    conditions = [sql.SQL("({})").format(table.matches("t", codec.decode_key(key.encode()))) for key in keys]
    return sql.SQL(" OR ").join(conditions)


def _by_table(roots: Sequence[Root]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for table, key in roots:
        found.setdefault(table, []).append(key)
    return found


def _key(table: Table, row: Row) -> str:
    return codec.encode_key({name: row[name] for name in table.key}).decode()
