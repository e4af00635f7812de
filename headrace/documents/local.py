"""The local row store: what documents are put together from [I11].

One SQLite file a generation. It holds the declared tables' rows as the codec's JSON by key, an index from each join's
columns to the rows that have them, the list of documents that changes have touched, and the position it stands at.
Everything, the touched list too, is on disk, so that memory does not grow with a table or a backlog [I10].

One transaction is open at all times; `commit` ends it together with a position. What is not committed is read again
from the log after a crash, so the file needs no durability of its own, only that it never holds half a transaction
(WAL, synchronous NORMAL).

A key is the JSON list of its values, ``[1]``, which is what the columns of a join hold on the other side.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headrace import codec
from headrace.change import Change, Position, Row
from headrace.documents.declaration import Document, Many, Node
from headrace.errors import Transient

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB);
    CREATE TABLE IF NOT EXISTS rows (tbl TEXT, key TEXT, row BLOB, PRIMARY KEY (tbl, key));
    CREATE TABLE IF NOT EXISTS links (link INT, value TEXT, key TEXT, PRIMARY KEY (link, value, key)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS touched (doc INT, key TEXT, PRIMARY KEY (doc, key)) WITHOUT ROWID;
"""


class _Link(NamedTuple):
    """A join as an index: the rows of `table` by the values of their `columns`.

    For a `Many` the rows are the joined ones and the values a root's key; for a `One` the rows are roots and the values
    the joined row's key.
    """

    number: int
    document: int
    table: str
    columns: tuple[str, ...]
    many: bool
    other: str


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
        """Open the file; one of another fingerprint, or one that is damaged, is thrown away.

        Raises:
            Transient: `local-state`.
        """
        self.path = path
        self._documents = documents
        self._links = _links(documents)
        self._by_table = {
            table: [link for link in self._links.values() if link.table == table]
            for document in documents
            for table in document.tables
        }
        try:
            self._open(fingerprint)
        except sqlite3.OperationalError as error:
            raise Transient("local-state", f"{path}: {error}.", "See the folder of HEADRACE_STATE.") from error
        except sqlite3.DatabaseError:
            discard(path)
            self._open(fingerprint)

    def _open(self, fingerprint: str) -> None:
        self._db = sqlite3.connect(self.path, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)
            kept = self._meta("fingerprint")
            if kept not in (None, fingerprint.encode()):
                raise sqlite3.DatabaseError  # noqa: TRY301  thrown away like one that is damaged
            self._db.execute("BEGIN")
            self._put("fingerprint", fingerprint.encode())
            position = self._meta("position")
            self.position = codec.decode_position(position) if position else None
            self._keys: dict[str, list[str]] = codec.loads(self._meta("keys") or b"{}")
        except sqlite3.DatabaseError:
            self._db.close()
            raise

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
        for number, document in enumerate(self._documents):
            if document.table == change.table:
                self._touch(number, key)
        if not loading:
            self._touch_joined(change.table, key, old, change.row)

    def touched(self) -> Iterator[Touched]:
        """Yield each touched document once, with what to render."""
        for number, key in self._db.execute("SELECT doc, key FROM touched ORDER BY doc, key"):
            document = self._documents[number]
            names = self._keys[document.table]
            yield Touched(document, dict(zip(names, codec.loads(key), strict=True)), self._node(number, document, key))

    def count_touched(self) -> int:
        """Return how many documents are touched."""
        count: int = self._db.execute("SELECT count(*) FROM touched").fetchone()[0]
        return count

    def clear_touched(self) -> None:
        """Forget the touched documents: they are in the view."""
        self._db.execute("DELETE FROM touched")

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
        for link in self._by_table[table]:
            before, after = _value(old, link.columns), _value(new, link.columns)
            if before == after:
                continue
            if before is not None:
                self._db.execute("DELETE FROM links WHERE (link, value, key) = (?, ?, ?)", (link.number, before, key))
            if after is not None:
                self._db.execute("INSERT OR IGNORE INTO links VALUES (?, ?, ?)", (link.number, after, key))

    def _touch_joined(self, table: str, key: str, old: Row | None, new: Row | None) -> None:
        for link in self._links.values():
            if link.many and link.table == table and link.other in self._keys:  # else there is no root yet
                for parent in {_value(old, link.columns), _value(new, link.columns)} - {None}:
                    self._touch(link.document, str(parent))
            elif not link.many and link.other == table:
                self._db.execute(
                    "INSERT OR IGNORE INTO touched SELECT ?, key FROM links WHERE link = ? AND value = ?",
                    (link.document, link.number, key),
                )

    def _touch(self, document: int, key: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO touched VALUES (?, ?)", (document, key))

    def _node(self, number: int, document: Document, key: str) -> Node | None:
        row = self._row(document.table, key)
        if row is None:
            return None
        joined: dict[str, Any] = {}
        for name, join in document.joins.items():
            if isinstance(join, Many):
                joined[name] = self._children(self._links[number, name], key)
            else:
                value = _value(row, join.on)
                joined[name] = self._row(join.table, value) if value is not None else None
        return document.node(row, joined, self._keys)

    def _children(self, link: _Link, key: str) -> list[Row]:
        found = self._db.execute(
            "SELECT row FROM links JOIN rows ON tbl = ? AND rows.key = links.key WHERE link = ? AND value = ?",
            (link.table, link.number, key),
        )
        return [codec.loads(row) for (row,) in found]

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


def _links(documents: Sequence[Document]) -> dict[tuple[int, str], _Link]:
    links: dict[tuple[int, str], _Link] = {}
    for number, document in enumerate(documents):
        for name, join in document.joins.items():
            many = isinstance(join, Many)
            table, other = (join.table, document.table) if many else (document.table, join.table)
            links[number, name] = _Link(len(links), number, table, join.columns, many, other)
    return links


def _text(values: Iterable[Any]) -> str:
    return codec.dumps(list(values)).decode()


def _value(row: Row | None, columns: tuple[str, ...]) -> str | None:
    """Return what a row's `columns` refer to, None when one of them is NULL (or not there yet: an older schema's
    row)."""
    if row is None:
        return None
    values = [row.get(column) for column in columns]
    return None if None in values else _text(values)
