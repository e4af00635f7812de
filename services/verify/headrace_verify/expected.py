"""What a view should hold, from SQL alone: the rows themselves, or a document's joins and then the plugin's own `render`.

Nothing of `headrace.documents` but the declaration is used, so that a mistake in keeping documents in step is seen (S27);
how it is SQL is said in `joins`. (In which window a changed row is, is asked of the declaration: that decides only what is compared
again.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from psycopg import sql

from headrace import codec
from headrace.change import Change, Row, TableSchema
from headrace.consumer import ALL, Consumer
from headrace.documents import Document, DocumentConsumer, Many, Node, One, Window
from headrace.documents.checks import check, check_types, check_window
from headrace.documents.declaration import Level
from headrace.documents.windows import Root
from headrace.errors import HeadraceError, Misconfigured, Poison
from headrace.settings import Settings
from headrace_verify.joins import Members, Select, key_of, node, places, window
from headrace_verify.ledger import Expected, Member, Touched
from headrace_verify.postgres import Connection, Published, Table, stream, without_key
from headrace_verify.postgres import table as read_table

RootKey = tuple[str, str]


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
        left: Collections whose tables the log has and captures no more: their rows stay as they were (docs/formats.md).
        adrift: Tables of rows that come into a document without a change of their own and without being named by what
            changed: with the joined row that they refer to, or because a limit left them out before.
    """

    tables: tuple[str, ...]
    notes: tuple[str, ...]
    keyless: frozenset[str]
    left: frozenset[str]
    adrift: frozenset[str]

    def queries(self, connection: Connection, roots: Sequence[RootKey] | None) -> Iterator[Query]:
        """Yield what reads the rows or documents of these roots, of all that there are when None."""

    def made(self, found: Found) -> Made:
        """Return what the view should hold of it."""

    def counted(self) -> dict[str, list[Table]]:
        """Return the tables of which the view has a row or document for each row, by collection."""

    def without_key(self, connection: Connection, collection: str) -> tuple[tuple[str, ...], Iterator[Row]]:
        """Return the columns and all rows of one of `keyless`, as the open snapshot has them."""

    def named(self, change: Change) -> Iterator[Touched]:
        """Yield the view's rows that are of a changed row, or that hold it by what it says itself."""

    def member(self, change: Change) -> tuple[str, str]:
        """Return the changed row as documents hold it, as (table, log's key)."""

    def above(self, change: Change) -> Iterator[tuple[str, str]]:
        """Yield the joined rows to which the changed row is joined by what it says itself, as (table, log's key)."""


def count(expectation: Expectation, connection: Connection) -> dict[str, int]:
    """Return how many rows or documents a view should hold, by collection, as the open snapshot has it."""
    found: dict[str, int] = {}
    for collection, tables in expectation.counted().items():
        for table in tables:
            query = sql.SQL("SELECT count(*) FROM {} t").format(table.source)
            row = connection.execute(query).fetchone()
            found[collection] = found.get(collection, 0) + (row[0] if row else 0)
    return found


def everything(expectation: Expectation, connection: Connection) -> Iterator[Made]:
    """Yield all that a view should hold, as the open snapshot has it."""
    for query in expectation.queries(connection, None):
        for texts in stream(connection, query.sql):
            yield expectation.made(Found(query.kind, texts))


Shapes = dict[str, TableSchema]
"""The newest schema of each table in the log."""


def expectation(
    connection: Connection,
    consumer: type[Consumer],
    name: str,
    settings: Settings,
    shapes: Shapes,
    published: Published,
) -> Expectation:
    """Return what a view should hold.

    Raises:
        Misconfigured: `verify-no-expectation`, `table-not-captured`, `document-column`.
    """
    if consumer.mirrors_rows:
        wanted = set(published) if tuple(consumer.tables) == ALL else set(consumer.tables)
        left_out = without_key(connection, settings.publication, wanted & published.keys() - shapes.keys())
        tables, notes = _tables(connection, sorted(wanted - left_out), shapes, published)
        notes += tuple(f"{table} is published and left out (no usable key): not compared" for table in sorted(left_out))
        return Rows(tables, notes, frozenset(shapes.keys() - published.keys()))
    if issubclass(consumer, DocumentConsumer):
        tables, notes = _tables(connection, list(consumer.tables), shapes, published)
        lacking = sorted(set(consumer.tables) - {table.name for table in tables})
        if lacking:
            said = f"{name} needs {', '.join(lacking)}, not captured."
            flags = " ".join(f"--table {table}" for table in lacking)
            remedy = f"Run: headrace setup {flags} --apply. Of one that was renamed or is gone: change the declaration, and rebuild."
            raise Misconfigured("table-not-captured", said, remedy)
        if said := append_only_root(consumer, name, shapes):
            raise Misconfigured("verify-no-expectation", said, "Give the table a primary key and capture it by that.")
        _check_columns(consumer, {table.name: table for table in tables}, shapes)
        notes += _dropped(tables, shapes)
        return Documents(consumer(settings, name), {table.name: table for table in tables}, notes)
    raise Misconfigured(
        "verify-no-expectation",
        f"Verify does not know what {name} should hold: it neither mirrors rows nor renders documents.",
        "Set mirrors_rows, or subclass DocumentConsumer.",
    )


def append_only_root(consumer: type[Consumer], name: str, shapes: Shapes) -> str:
    """Return why no document of a view can be found in Postgres, where its root has no key; "" else."""
    for document in consumer.documents if issubclass(consumer, DocumentConsumer) else ():
        if isinstance(document, Document) and document.table in shapes and not shapes[document.table].key:
            return f"{name} has a document for each row of {document.table}, which is append-only: {_KEYLESS}."
    return ""


def _check_columns(consumer: type[DocumentConsumer], tables: dict[str, Table], shapes: Shapes) -> None:
    """Hold the declaration against the columns that Postgres has: the log says that one is gone only with the next row."""
    there = {name: {column.name for column in table.columns} for name, table in tables.items()}
    newest = {
        name: replace(shapes[name], columns=tuple(each for each in shapes[name].columns if each.name in names))
        for name, names in there.items()
    }
    for document in consumer.documents:
        if isinstance(document, Window):
            check_window(document, newest)
        else:
            check(document, newest)
            check_types(document, newest)


_KEYLESS = "in Postgres its rows have no key by which to find them (S10)"


def _tables(
    connection: Connection, wanted: list[str], shapes: Shapes, published: Published
) -> tuple[list[Table], tuple[str, ...]]:
    """Return how to read the wanted tables; one that Postgres has and the log does not is an error."""
    gone = sorted(set(wanted) - published.keys())
    if unknown := sorted((set(wanted) & published.keys()) - shapes.keys()):
        said = f"The log does not know {', '.join(unknown)} yet."
        raise Misconfigured("table-not-captured", said, "Let `headrace capture` run until its snapshot is complete.")
    found = [read_table(connection, shapes[name], published[name]) for name in wanted if name in published]
    there = [table for table in found if table]
    notes = [f"{name} is not captured and not compared" for name in gone]
    notes += [
        f"{table.name} is approximate: a large value that an update left alone may be of a later moment (S7)"
        for table in there
        if table.approximate
    ]
    return there, tuple(notes)


def _dropped(tables: list[Table], shapes: Shapes) -> tuple[str, ...]:
    """Return notes on columns that documents show until the log, with the next row of the table, says that they are gone."""
    notes: list[str] = []
    for table in tables:
        there = {column.name for column in table.columns}
        gone = [column.name for column in shapes[table.name].columns if column.name not in there]
        if gone:
            said = "documents that show whole rows differ until a row of it is written: update one, as it is"
            notes.append(
                f"{table.name} has no column {', '.join(gone)} any more, which the log does not know yet: {said}"
            )
    return tuple(notes)


class Rows:
    """The rows of tables as they are: the collection is the table, the key the log's."""

    def __init__(self, tables: list[Table], notes: tuple[str, ...], left: frozenset[str]) -> None:
        """Expect the rows of `tables`, and of those that `left` any."""
        self._tables = [table for table in tables if table.key]
        self._keyless = {table.name: table for table in tables if not table.key}
        self.tables = tuple(table.name for table in self._tables)
        self.keyless = frozenset(self._keyless)
        self.adrift = frozenset[str]()
        self.left = left
        self.notes = notes

    def queries(self, connection: Connection, roots: Sequence[RootKey] | None) -> Iterator[Query]:
        """See `Expectation.queries`."""
        keys = _by_table(roots)
        for kind, table in enumerate(self._tables):
            if roots is None or table.name in keys:
                yield Query(kind, _plain(table, keys.get(table.name)).as_bytes(connection), 1)

    def made(self, found: Found) -> Made:
        """See `Expectation.made`."""
        table = self._tables[found.kind]
        row = codec.loads(found.texts[0] or "")
        key = key_of(table, row)
        return Made(Expected(table.name, key, (table.name, key), table.plain(row)))

    def counted(self) -> dict[str, list[Table]]:
        """See `Expectation.counted`."""
        return {table.name: [table] for table in (*self._tables, *self._keyless.values())}

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

    def above(self, change: Change) -> Iterator[tuple[str, str]]:  # noqa: ARG002 -- see there
        """See `Expectation.above`: a row is in no other."""
        return iter(())


class Documents:
    """Documents by their declarations; ids are unique in a consumer, and the collection is empty."""

    def __init__(self, consumer: DocumentConsumer, tables: dict[str, Table], notes: tuple[str, ...]) -> None:
        """Expect what `consumer` renders of the rows in Postgres."""
        self._consumer = consumer
        self._tables = tables
        self._keys = {name: table.key for name, table in tables.items()}
        self.tables = tuple(tables)
        self.notes = notes
        self.keyless = self.left = frozenset[str]()
        roots = [document for document in consumer.documents if isinstance(document, Document)]
        self._places = [(document, *place) for document in roots for place in places(document)]
        self.adrift = frozenset(
            join.table
            for document, level, join in self._places
            if (isinstance(join, Many) and join.limit) or (level is not document and not isinstance(join, One))
        )

    def queries(self, connection: Connection, roots: Sequence[RootKey] | None) -> Iterator[Query]:
        """See `Expectation.queries`."""
        keys = _by_table(roots)
        for kind, document in enumerate(self._consumer.documents):
            some = keys.get(self._root(document))
            if roots is not None and some is None:
                continue
            select = Select(self._tables, few=some is not None)
            if isinstance(document, Window):
                starts = [codec.decode_key(key.encode())[document.start] for key in some] if some is not None else None
                yield Query(kind, select.windows(document, starts).as_bytes(connection), 2)
            else:
                query = select.documents(document, _any_of(self._tables[document.table], some))
                yield Query(kind, query.as_bytes(connection), 1 + len(document.joins))

    def made(self, found: Found) -> Made:
        """See `Expectation.made`."""
        document = self._consumer.documents[found.kind]
        row, *joined = (codec.loads(text or "null") for text in found.texts)
        members: Members = []
        if isinstance(document, Window):
            key, root = {document.start: row}, window(self._tables, document, row, joined[0], members)
        else:
            table = self._tables[document.table]
            key = table.keyed(row)
            root = node(self._tables, document, table.plain(row), joined, members)
        made = Expected(*self._document(document, key), self._render(root))
        return Made(made, tuple(Member(*member, made.collection, made.key) for member in members))

    def named(self, change: Change) -> Iterator[Touched]:
        """See `Expectation.named`."""
        for document in self._consumer.documents:
            if document.table != change.table:
                continue
            if isinstance(document, Document):
                yield self._document(document, codec.decode_key(change.key))
            elif change.row is not None and (start := document.start_of(change.row)) is not None:
                yield self._document(document, {document.start: start})
        for document, level, key in self._referred(change):
            if level is document:
                yield self._document(document, key)

    def member(self, change: Change) -> tuple[str, str]:
        """See `Expectation.member`: a row without a key (S10) may be in any document that holds one of its table."""
        return change.table, change.key.decode() if self._keys[change.table] else key_of(self._tables[change.table], {})

    def above(self, change: Change) -> Iterator[tuple[str, str]]:
        """See `Expectation.above`."""
        for document, level, key in self._referred(change):
            if level is not document:
                yield level.table, codec.encode_key(key).decode()

    def _referred(self, change: Change) -> Iterator[tuple[Document, Level, Row]]:
        """Yield what the changed row refers to, to be among what is joined there: the place and the key."""
        for document, level, join in self._places:
            if not isinstance(join, One) and join.table == change.table and change.row is not None:
                values = [change.row.get(column) for column in join.by]
                if None not in values:
                    yield document, level, dict(zip(self._keys[level.table], values, strict=True))

    def counted(self) -> dict[str, list[Table]]:
        """See `Expectation.counted`: a root row for which `render` returns no document is not known here.

        Raises:
            Misconfigured: `verify-no-expectation`, for windows: how many there are is not how many rows.
        """
        if any(isinstance(document, Window) for document in self._consumer.documents):
            said = f"{self._consumer.name} has a document for each window of time, and these are not counted by rows."
            raise Misconfigured(
                "verify-no-expectation", said, "Compare every row: leave out --counts, use --gate verify."
            )
        return {"": [self._tables[document.table] for document in self._consumer.documents]}

    def without_key(self, connection: Connection, collection: str) -> tuple[tuple[str, ...], Iterator[Row]]:  # noqa: ARG002  see there
        """See `Expectation.without_key`: a document has a key always."""
        raise KeyError(collection)

    def _document(self, document: Root, key: Row) -> Touched:
        root = (self._root(document), codec.encode_key(key).decode())
        return "", self._consumer.id(document.table, key), root

    def _root(self, document: Root) -> str:
        """Return what roots of a document are told apart by: several documents of one table may have windows."""
        if isinstance(document, Document):
            return document.table
        return f"{document.table} {self._consumer.documents.index(document)}"

    def _render(self, root: Node) -> Row | None:
        try:
            body = self._consumer.render(root)
            plain: Row | None = codec.loads(codec.dumps(body))
        except HeadraceError:
            raise
        except Exception as error:
            said = f"{type(self._consumer).__name__}.render failed for a row of {root.table}: {error!r}."
            raise Poison("render-failed", said, "Mend render.") from error
        return plain


def _plain(table: Table, keys: Sequence[str] | None) -> sql.Composed:
    """Return the SQL of the rows of these keys as they are, of all rows when None."""
    return sql.SQL("SELECT {}::text FROM {} t WHERE {}").format(table.json("t"), table.source, _any_of(table, keys))


def _any_of(table: Table, keys: Sequence[str] | None) -> sql.Composable:
    """Return the SQL that is true of the rows of these keys, of every row when None."""
    if keys is None:
        return sql.SQL("true")
    conditions = [sql.SQL("({})").format(table.matches("t", codec.decode_key(key.encode()))) for key in keys]
    return sql.SQL(" OR ").join(conditions)


def _by_table(roots: Sequence[RootKey] | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for table, key in roots or ():
        found.setdefault(table, []).append(key)
    return found
