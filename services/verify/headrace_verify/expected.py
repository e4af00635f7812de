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
from headrace_verify.ledger import Expected, Member, Touched
from headrace_verify.postgres import Connection, Table, stream
from headrace_verify.postgres import table as read_table

Root = tuple[str, str]


class Query(NamedTuple):
    """SQL that gives rows or documents of one kind as `width` texts; `kind` counts the tables or documents of the view."""

    kind: int
    sql: bytes
    width: int


class Found(NamedTuple):
    """What Postgres gave for one row or document: the texts, and perhaps NULLs."""

    kind: int
    texts: tuple[str | None, ...]


class Made(NamedTuple):
    """One expected row, and the joined rows in it or that it refers to."""

    row: Expected
    members: tuple[Member, ...] = ()


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

    def queries(self, connection: Connection, roots: Sequence[Root] | None) -> Iterator[Query]:
        """Yield what reads the rows or documents of these roots, of all that there are when None."""

    def made(self, found: Found) -> Made:
        """Return what the view should hold of it."""

    def without_key(self, connection: Connection, collection: str) -> tuple[tuple[str, ...], Iterator[Row]]:
        """Return the columns and all rows of one of `keyless`, as the open snapshot has them."""

    def named(self, change: Change) -> Iterator[Touched]:
        """Yield the view's rows that are of a changed row, or that hold it by what it says itself."""

    def member(self, change: Change) -> tuple[str, str]:
        """Return the changed row as documents hold it, as (table, log's key)."""


def everything(expectation: Expectation, connection: Connection) -> Iterator[Made]:
    """Yield all that a view should hold, as the open snapshot has it."""
    for query in expectation.queries(connection, None):
        for texts in stream(connection, query.sql):
            yield expectation.made(Found(query.kind, texts))


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
        self._tables = [table for table in tables if table.key]
        self._keyless = {table.name: table for table in tables if not table.key}
        self.tables = tuple(table.name for table in self._tables)
        self.keyless = frozenset(self._keyless)
        self.notes = notes

    def queries(self, connection: Connection, roots: Sequence[Root] | None) -> Iterator[Query]:
        """See `Expectation.queries`."""
        keys = _by_table(roots)
        for kind, table in enumerate(self._tables):
            if roots is None or table.name in keys:
                yield Query(kind, _plain(table, keys.get(table.name)).as_bytes(connection), 1)

    def made(self, found: Found) -> Made:
        """See `Expectation.made`."""
        table = self._tables[found.kind]
        row = table.plain(codec.loads(found.texts[0] or ""))
        key = _key(table, row)
        return Made(Expected(table.name, key, (table.name, key), row))

    def without_key(self, connection: Connection, collection: str) -> tuple[tuple[str, ...], Iterator[Row]]:
        """See `Expectation.without_key`."""
        table = self._keyless[collection]
        rows = stream(connection, _plain(table, None).as_bytes(connection))
        return tuple(column.name for column in table.columns), (table.plain(codec.loads(text)) for (text,) in rows)

    def named(self, change: Change) -> Iterator[Touched]:
        """See `Expectation.named`."""
        yield change.table, change.key.decode(), self.member(change)

    def member(self, change: Change) -> tuple[str, str]:
        """See `Expectation.member`."""
        return change.table, change.key.decode()


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

    def queries(self, connection: Connection, roots: Sequence[Root] | None) -> Iterator[Query]:
        """See `Expectation.queries`."""
        keys = _by_table(roots)
        for kind, document in enumerate(self._consumer.documents):
            if roots is None or document.table in keys:
                query = _join(document, self._tables, keys.get(document.table))
                yield Query(kind, query.as_bytes(connection), 1 + len(document.joins))

    def made(self, found: Found) -> Made:
        """See `Expectation.made`."""
        document = self._consumer.documents[found.kind]
        table = self._tables[document.table]
        row = table.plain(codec.loads(found.texts[0] or ""))
        joined, members = self._joined(document, row, found.texts[1:])
        key = {name: row[name] for name in table.key}
        made = Expected(*self._document(document, key), self._render(document, row, joined))
        return Made(made, tuple(Member(*member, made.collection, made.key) for member in members))

    def named(self, change: Change) -> Iterator[Touched]:
        """See `Expectation.named`."""
        for document in self._consumer.documents:
            if document.table == change.table:
                yield self._document(document, codec.decode_key(change.key))
            for join in document.joins.values():
                if isinstance(join, Many) and join.table == change.table and change.row is not None:
                    names = self._keys[document.table]
                    values = [change.row.get(column) for column in join.by]
                    yield self._document(document, dict(zip(names, values, strict=True)))

    def member(self, change: Change) -> tuple[str, str]:
        """See `Expectation.member`: a row without a key (S10) may be in any document that holds one of its table."""
        return change.table, change.key.decode() if self._keys[change.table] else _key(self._tables[change.table], {})

    def without_key(self, connection: Connection, collection: str) -> tuple[tuple[str, ...], Iterator[Row]]:  # noqa: ARG002  see there
        """See `Expectation.without_key`: a document has a key always."""
        raise KeyError(collection)

    def _document(self, document: Document, key: Row) -> Touched:
        root = (document.table, codec.encode_key(key).decode())
        return "", self._consumer.id(document.table, key), root

    def _joined(self, document: Document, row: Row, texts: Sequence[str | None]) -> tuple[dict[str, Any], list[Root]]:
        joined: dict[str, Any] = {}
        members: list[Root] = []
        for (name, join), text in zip(document.joins.items(), texts, strict=False):
            table = self._tables[join.table]
            many = isinstance(join, Many)
            value = codec.loads(text) if text is not None else []
            plain = [table.plain(each) for each in (value if isinstance(value, list) else [value])]
            # What a root refers to counts also when it is not there: it may come.
            keys = (
                [_key(table, each) for each in plain] if many else [_encoded(table.key, [row[c] for c in join.columns])]
            )
            members += [(table.name, key) for key in keys]
            joined[name] = plain if many else next(iter(plain), None)
        return joined, members

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


def _plain(table: Table, keys: Sequence[str] | None) -> sql.Composed:
    """Return the SQL of the rows of these keys as they are, of all rows when None."""
    return sql.SQL("SELECT {}::text FROM {} t WHERE {}").format(table.json("t"), table.identifier, _any_of(table, keys))


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
    return sql.SQL("SELECT {} FROM {} t {} WHERE {}").format(
        texts, root.identifier, sql.SQL(" ").join(joins), _any_of(root, keys)
    )


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


def _any_of(table: Table, keys: Sequence[str] | None) -> sql.Composable:
    """Return the SQL that is true of the rows of these keys, of every row when None."""
    if keys is None:
        return sql.SQL("true")
    conditions = [sql.SQL("({})").format(table.matches("t", codec.decode_key(key.encode()))) for key in keys]
    return sql.SQL(" OR ").join(conditions)


def _by_table(roots: Sequence[Root] | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for table, key in roots or ():
        found.setdefault(table, []).append(key)
    return found


def _key(table: Table, row: Row) -> str:
    return _encoded(table.key, [row[name] for name in table.key])


def _encoded(names: Sequence[str], values: Sequence[Any]) -> str:
    return codec.encode_key(dict(zip(names, values, strict=True))).decode()
