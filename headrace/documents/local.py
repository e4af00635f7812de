"""The local row store: what documents are put together from [I11].

One SQLite file a generation. It holds the declared tables' rows as the codec's JSON by key, an index from each join's
columns to the rows that have them (`headrace.documents.paths`), the list of documents that changes have touched, and the
position it stands at. Everything, the touched list too, is on disk, so that memory does not grow with a table or a
backlog [I10]; nor does it with the rows of an aggregate or of a `Many` with a limit, which are streamed.

One transaction is open at all times; `commit` ends it together with a position. What is not committed is read again
from the log after a crash, so the file needs no durability of its own, only that it never holds half a transaction
(WAL, synchronous NORMAL).

A key is the JSON list of its values, ``[1]``, which is what the columns of a join hold on the other side.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from headrace import codec
from headrace.change import Change, Position, Row, TableSchema
from headrace.documents.declaration import Aggregate, Document, Join, Level, Many, Node, One
from headrace.documents.order import Shape
from headrace.documents.paths import Paths
from headrace.errors import Transient

_LAYOUT: Final = 2
"""Of the tables below, and of what is in them: a file of another layout is thrown away."""
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB);
    CREATE TABLE IF NOT EXISTS rows (tbl TEXT, key TEXT, row BLOB, PRIMARY KEY (tbl, key));
    CREATE TABLE IF NOT EXISTS links (link INT, value TEXT, key TEXT, PRIMARY KEY (link, value, key)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS back (link INT, key TEXT, value TEXT, PRIMARY KEY (link, key)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS touched (doc INT, key TEXT, PRIMARY KEY (doc, key)) WITHOUT ROWID;
"""


class Touched(NamedTuple):
    """A document that a change has touched: its declaration and the root's key."""

    document: Document
    key: Row
    node: Node | None
    """What to render; None when the root row is gone."""


class LocalRows:
    """The rows of some documents' tables at one position.

    Attributes:
        position: Where the committed rows stand; None for an empty store.
    """

    def __init__(self, path: Path, documents: Sequence[Document], fingerprint: str) -> None:
        """Open the file; one of another fingerprint or layout, or one that is damaged, is thrown away.

        Raises:
            Transient: `local-state`.
        """
        self.path = path
        self._documents = documents
        self._paths = Paths(documents)
        built_by = f"{_LAYOUT} {fingerprint}".encode()
        try:
            self._open(built_by)
        except sqlite3.OperationalError as error:
            raise Transient("local-state", f"{path}: {error}.", "See the folder of HEADRACE_STATE.") from error
        except sqlite3.DatabaseError:
            discard(path)
            self._open(built_by)

    def _open(self, built_by: bytes) -> None:
        self._db = sqlite3.connect(self.path, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)
            kept = self._meta("fingerprint")
            if kept not in (None, built_by):
                raise sqlite3.DatabaseError  # noqa: TRY301  thrown away like one that is damaged
            self._db.execute("BEGIN")
            self._put("fingerprint", built_by)
            position = self._meta("position")
            self.position = codec.decode_position(position) if position else None
            self._keys: dict[str, list[str]] = codec.loads(self._meta("keys") or b"{}")
            shapes = codec.loads(self._meta("shapes") or b"{}")
            self._shapes = {table: Shape(tuple(key), frozenset(numbers)) for table, (key, numbers) in shapes.items()}
        except sqlite3.DatabaseError:
            self._db.close()
            raise

    def learn(self, schemas: Mapping[str, TableSchema]) -> None:
        """Take in the newest schemas of tables: how their values compare."""
        self._shapes |= {table: Shape.of(schema) for table, schema in schemas.items() if table in self._paths.roots}
        shapes = {table: (list(shape.key), sorted(shape.numbers)) for table, shape in self._shapes.items()}
        self._put("shapes", codec.dumps(shapes))

    def apply(self, change: Change, *, loading: bool) -> None:
        """Take a change in and note the documents that it touches, by the old values of its joins and by the new ones.

        Args:
            change: A change of one of the declared tables.
            loading: Every document will be rendered anyway, so only roots are noted, those that are deleted too.
        """
        if change.table not in self._keys:
            self._learn_key(change)
        key = _text(codec.decode_key(change.key).values())
        old = self._row(change.table, key)
        self._store(change.table, key, change.row)
        self._relink(change.table, key, old, change.row)
        for number in self._paths.roots[change.table]:
            self._db.execute("INSERT OR IGNORE INTO touched VALUES (?, ?)", (number, key))
        if not loading:
            self._touch_joined(change.table, key, old, change.row)

    def touched(self) -> Iterator[Touched]:
        """Yield each touched document once, with what to render."""
        for number, key in self._db.execute("SELECT doc, key FROM touched ORDER BY doc, key"):
            document = self._documents[number]
            names = self._keys[document.table]
            row = self._row(document.table, key)
            node = self._node(document, row, key) if row is not None else None
            yield Touched(document, dict(zip(names, codec.loads(key), strict=True)), node)

    def count_touched(self) -> int:
        """Return how many documents are touched."""
        count: int = self._db.execute("SELECT count(*) FROM touched").fetchone()[0]
        return count

    def clear_touched(self, waiting: Sequence[Touched] = ()) -> None:
        """Forget the touched documents: they are in the view, but for those that wait until they can be shown."""
        self._db.execute("DELETE FROM touched")
        kept = [(self._documents.index(each.document), _text(each.key.values())) for each in waiting]
        self._db.executemany("INSERT INTO touched VALUES (?, ?)", kept)

    def commit(self, position: Position) -> None:
        """Make what was applied durable, as the state at `position`."""
        self._put("position", codec.encode_position(position))
        self._db.execute("COMMIT")
        self.position = position
        self._db.execute("BEGIN")

    def close(self) -> None:
        """Leave; what is not committed is gone."""
        self._db.close()

    # Rows and links

    def _row(self, table: str, key: str) -> Row | None:
        found = self._db.execute("SELECT row FROM rows WHERE tbl = ? AND key = ?", (table, key)).fetchone()
        return codec.loads(found[0]) if found else None

    def _store(self, table: str, key: str, row: Row | None) -> None:
        if row is None:
            self._db.execute("DELETE FROM rows WHERE tbl = ? AND key = ?", (table, key))
        else:
            values = (table, key, codec.dumps(row))
            self._db.execute("INSERT INTO rows VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET row = excluded.row", values)

    def _relink(self, table: str, key: str, old: Row | None, new: Row | None) -> None:
        for number, columns, back in self._paths.links[table]:
            before, after = _value(old, columns), _value(new, columns)
            if before == after:
                continue
            if before is not None:
                self._db.execute("DELETE FROM links WHERE (link, value, key) = (?, ?, ?)", (number, before, key))
            if after is not None:
                self._db.execute("INSERT OR IGNORE INTO links VALUES (?, ?, ?)", (number, after, key))
            if back:
                self._relink_back(number, key, after)

    def _relink_back(self, link: int, key: str, value: str | None) -> None:
        if value is None:
            self._db.execute("DELETE FROM back WHERE link = ? AND key = ?", (link, key))
        else:
            self._db.execute("INSERT OR REPLACE INTO back VALUES (?, ?, ?)", (link, key, value))

    def _touch_joined(self, table: str, key: str, old: Row | None, new: Row | None) -> None:
        for root, by, sql in self._paths.climbs[table]:
            if root in self._keys:  # else there is no root yet
                for value in (key,) if by is None else {_value(old, by), _value(new, by)} - {None}:
                    self._db.execute(sql, (value,))

    # Documents

    def _node(self, level: Level, row: Row, key: str) -> Node:
        if not level.joins:
            return Node(level.table, row)
        joins = {name: self._joined(level, join, row, key) for name, join in level.joins.items()}
        return Node(level.table, row, joins)

    def _joined(self, level: Level, join: Join, row: Row, key: str) -> Node | list[Node] | None:
        if isinstance(join, One):
            value = _value(row, join.on)
            found = self._row(join.table, value) if value is not None else None
            return self._node(join, found, value) if found is not None and value is not None else None
        shape = self._shapes.get(join.table, Shape())
        children = self._referring(self._paths.link(level, join), join, key, shape)
        if isinstance(join, Aggregate):
            return Node(join.table, join.over((child for child, _ in children), shape))
        return [self._node(join, child, its) for child, its in join.picked(children, shape)]

    def _referring(self, link: int, join: Many | Aggregate, key: str, shape: Shape) -> Iterator[tuple[Row, str]]:
        """Yield the rows that refer to `key` and that the join wants, each with its own key."""
        wanted = join.filter(shape) if join.where else None
        found = self._db.execute(
            "SELECT row, links.key FROM links JOIN rows ON tbl = ? AND rows.key = links.key WHERE link = ? AND value = ?",
            (join.table, link, key),
        )
        for packed, its in found:
            row = codec.loads(packed)
            if wanted is None or wanted(row):
                yield row, its

    # Small facts

    def _learn_key(self, change: Change) -> None:
        self._keys[change.table] = list(codec.decode_key(change.key))
        self._put("keys", codec.dumps(self._keys))

    def _meta(self, name: str) -> bytes | None:
        found = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return found[0] if found else None

    def _put(self, name: str, value: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))


def discard(path: Path) -> None:
    """Remove a local store with what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _text(values: Iterable[Any]) -> str:
    return codec.dumps(list(values)).decode()


def _value(row: Row | None, columns: tuple[str, ...]) -> str | None:
    """Return what a row's `columns` refer to, None when one of them is NULL (or not there yet: an older schema's
    row)."""
    if row is None:
        return None
    values = [row.get(column) for column in columns]
    return None if None in values else _text(values)
