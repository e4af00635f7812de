"""The local row store: what documents are put together from [I11].

One SQLite file a generation. It holds the declared tables' rows as the codec's JSON by key, each with where in the log
it came from (`headrace.documents.origins` tells it), an index from each join's columns to the rows that have them
(`headrace.documents.paths`), the list of documents that changes have touched, and the position it stands at.
Everything, the touched list too, is on disk, so that memory does not grow with a table or a backlog [I10]; nor does it
with the rows of an aggregate or of a `Many` with a limit, which are streamed.

One transaction is open at all times; `commit` ends it together with a position. What is not committed is read again
from the log after a crash, so the file needs no durability of its own, only that it never holds half a transaction
(WAL, synchronous NORMAL).

A key is the JSON list of its values, ``[1]``, which is what the columns of a join hold on the other side.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from headrace import codec
from headrace.change import Change, Position, Row, TableSchema, Version
from headrace.documents import layout
from headrace.documents.declaration import Aggregate, Folding, Join, Level, Many, Node, One
from headrace.documents.order import Shape
from headrace.documents.paths import Link, Paths, text_of, value_of
from headrace.documents.when import ALL, Left, When, now
from headrace.documents.windows import Root, Window


class Touched(NamedTuple):
    """A document that a change has touched: its declaration and the root's key."""

    document: Root
    key: Row
    node: Node | None
    """What to render; None when the root row is gone, or no row is in the window."""


class LocalRows:
    """The rows of some documents' tables at one position.

    Attributes:
        position: Where the committed rows stand; None for an empty store.
    """

    def __init__(self, path: Path, documents: Sequence[Root], fingerprint: str) -> None:
        """Open the file; one of another fingerprint or layout, or one that is damaged, is thrown away.

        Raises:
            Transient: `local-state`.
        """
        self.path = path
        self._documents = documents
        self._paths = Paths(documents)
        built_by = f"{layout.LAYOUT} {fingerprint}".encode()
        with layout.errors(path, lambda: None):
            try:
                self._open(built_by)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                layout.discard(path)
                self._open(built_by)

    def _open(self, built_by: bytes) -> None:
        self._db = sqlite3.connect(self.path, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute(f"PRAGMA cache_size = -{layout.CACHE_KB}")
            self._db.executescript(layout.SCHEMA)
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
        key = self._key_of(change)
        old = self._row(change.table, key)
        since = change.version.packed()
        self._store(change, key, since)
        self._relink(change.table, key, old, change.row, since)
        for number in self._paths.roots[change.table]:
            self._touch(number, key, since)
        if not loading:
            self._touch_joined(change.table, key, old, change.row, since)

    def load(self, changes: Sequence[Change], *, touch: bool, unknown: bool) -> list[Change]:
        """Take changes in while nothing is shown, at most one of each key; return those of rows that were not there yet.

        These go in by the thousand.

        Args:
            changes: Of the declared tables.
            touch: Note these too; else who loads shows them by himself.
            unknown: Note deletes of rows that never were here: readers see documents that were made before.
        """
        new: list[tuple[str, Change]] = []
        for table in dict.fromkeys(change.table for change in changes):
            keyed = {self._key_of(change): change for change in changes if change.table == table}
            there = "SELECT key FROM rows WHERE tbl = ? AND key IN (SELECT value FROM json_each(?))"
            known = {key for (key,) in self._db.execute(there, (table, codec.dumps(list(keyed)).decode()))}
            for key, change in keyed.items():
                if change.row is not None and key not in known:
                    new.append((key, change))
                elif unknown or key in known:
                    self.apply(change, loading=True)
        self._insert(new, touch=touch)
        return [change for _, change in new]

    def touched(self, when: When = ALL) -> Iterator[Touched]:
        """Yield each touched document that is due once, with what to render."""
        query = (
            "SELECT touched.key, row FROM touched LEFT JOIN rows ON tbl = :table AND rows.key = touched.key "
            f"WHERE doc = :doc AND {layout.WAITS} AND {layout.IS_DUE} ORDER BY touched.key"
        )
        for number, document in enumerate(self._documents):
            which = {"doc": number, "table": document.table}
            for key, row in self._db.execute(query, when._asdict() | which):
                yield Touched(document, self._key(document, key), self._root(number, document, key, row))

    def count_touched(self) -> int:
        """Return how many documents are touched."""
        count: int = self._db.execute(f"SELECT count(*) FROM touched WHERE {layout.WAITS}").fetchone()[0]
        return count

    def left(self, when: When | None = None) -> Left | None:
        """Return what is touched and not due, of all that is touched when None; None when there is nothing."""
        which = f"{layout.WAITS} AND NOT {layout.IS_DUE}" if when else layout.WAITS
        query = f"SELECT min(since), min(due), max(due) FROM touched WHERE {which}"
        since, *dues = self._db.execute(query, when._asdict() if when else {}).fetchone()
        return Left(Version.unpacked(since), *dues) if since is not None else None

    def clear_touched(self, when: When = ALL, waiting: Sequence[Touched] = ()) -> None:
        """Forget the touched documents that were due: they are in the view, but for those `waiting`. When they may be shown again is kept
        until then."""
        places = [(self._documents.index(each.document), text_of(each.key.values())) for each in waiting]
        kept = [
            self._db.execute("SELECT * FROM touched WHERE (doc, key) = (?, ?)", place).fetchone() for place in places
        ]
        self._clear(when)
        self._db.executemany("INSERT OR REPLACE INTO touched VALUES (?, ?, ?, ?)", kept)

    def touch(self, touched: Touched, version: Version) -> None:
        """Note a document as touched since `version`, if it is not."""
        self._touch(self._documents.index(touched.document), text_of(touched.key.values()), version.packed())

    def touch_all(self) -> None:
        """Note all documents of one row each: who showed them as they came is gone."""
        for table, numbers in self._paths.roots.items():
            for number in numbers:
                self._db.execute(layout.TOUCH_ALL, (number, table))

    def _clear(self, when: When) -> None:
        if not when.interval:
            self._db.execute("DELETE FROM touched")
            return
        over, again = when._replace(now=now()), {"again": now() + when.interval}
        self._db.execute(f"DELETE FROM touched WHERE NOT {layout.WAITS} AND {layout.IS_DUE}", over._asdict())
        update = f"UPDATE touched SET since = NULL, due = :again WHERE {layout.WAITS} AND {layout.IS_DUE}"
        self._db.execute(update, when._asdict() | again)

    def remember_shown(self, ids: Iterable[str]) -> None:
        """Remember which documents readers see before all are rendered anew."""
        self._db.execute("DELETE FROM shown")
        self._db.executemany("INSERT OR IGNORE INTO shown VALUES (?)", ((id_,) for id_ in ids))

    def is_rendered(self, id_: str) -> None:
        """Say that one of them was rendered."""
        self._db.execute("DELETE FROM shown WHERE id = ?", (id_,))

    def not_rendered(self) -> Iterator[str]:
        """Yield those of them that were not."""
        for (id_,) in self._db.execute("SELECT id FROM shown"):
            yield id_

    def commit(self, position: Position) -> None:
        """Make what was applied durable, as the state at `position`."""
        self._put("position", codec.encode_position(position))
        self._db.execute("COMMIT")
        self.position = position
        self._db.execute("BEGIN")

    def close(self) -> None:
        """Leave; what is not committed is gone, also where somebody still holds a cursor, by which the connection would live on."""
        with suppress(sqlite3.Error):
            self._db.execute("ROLLBACK")
        self._db.close()

    # What rows are and where they came from

    def find(self, number: int, wanted: Callable[[Row], bool], guesses: Iterable[str]) -> str | None:
        """Return the key of the first of a document's roots whose columns are `wanted`; `guesses` are looked at before the others."""
        document = self._documents[number]
        known, of = "SELECT key FROM rows WHERE tbl = ?", document.table
        if isinstance(document, Window):
            known, of = "SELECT DISTINCT value AS key FROM links WHERE link = ?", str(self._paths.windows[number])
        known = (
            f"SELECT key FROM ({known}) {{0}} UNION ALL SELECT key FROM touched WHERE {layout.WAITS} AND doc = ? {{1}}"
        )
        for guess in guesses:
            found = self._db.execute(known.format("WHERE key = ?", "AND key = ?"), (of, guess, number, guess))
            if found.fetchone() and wanted(self._key(document, guess)):
                return guess
        every = self._db.execute(known.format("", ""), (of, number))
        return next((key for (key,) in every if wanted(self._key(document, key))), None)

    def came(self, table: str, key: str) -> tuple[Change, int] | None:
        """Return the change that brought a row, and when it was applied here (ms since the Unix epoch)."""
        found = self._db.execute("SELECT * FROM rows WHERE tbl = ? AND key = ?", (table, key)).fetchone()
        if found is None:
            return None
        _, _, row, version, ordinal, xid, schema, partition, offset, came, applied = found
        of_log = codec.encode_key(_named(self._keys[table], key))
        place = (Version.unpacked(version), ordinal, xid, schema, partition, offset)
        return Change(table, came[0], of_log, codec.loads(row), *place, came[1:] or None), applied

    def waits(self, number: int, key: str) -> bool:
        """Whether a document is touched and not shown yet."""
        query = f"SELECT 1 FROM touched WHERE {layout.WAITS} AND doc = ? AND key = ?"
        return self._db.execute(query, (number, key)).fetchone() is not None

    def shape(self, table: str) -> Shape:
        """Return how the values of a table compare."""
        return self._shapes.get(table, Shape())

    def referring(self, level: Level, join: Many | Aggregate, key: str) -> Iterator[tuple[Row, str]]:
        """Yield the rows that a join of the row `key` of `level` is over, each with its own key."""
        return self._referring(self._paths.link(level, join), join, key)

    def within(self, number: int, window: Window, key: str) -> Iterator[tuple[Row, str]]:
        """Yield the rows that the document `number` of one window is over, each with its own key."""
        return self._referring(self._paths.windows[number], window, key)

    # Rows and links

    def _row(self, table: str, key: str) -> Row | None:
        found = self._db.execute("SELECT row FROM rows WHERE tbl = ? AND key = ?", (table, key)).fetchone()
        return codec.loads(found[0]) if found else None

    def _store(self, change: Change, key: str, since: int) -> None:
        if change.row is None:
            self._db.execute("DELETE FROM rows WHERE tbl = ? AND key = ?", (change.table, key))
            return
        self._db.execute(layout.STORE, _stored(change, key, since, now()))

    def _insert(self, new: Sequence[tuple[str, Change]], *, touch: bool) -> None:
        """Put rows in that are not there, with their links."""
        stored, links, back, touched = [], [], [], []
        at = now()
        for key, change in new:
            since = change.version.packed()
            stored.append(_stored(change, key, since, at))
            if touch:
                touched += [(number, key, since) for number in self._paths.roots[change.table]]
            for link in self._paths.links[change.table]:
                value = link.value(change.row or {})
                if value is None:
                    continue
                links.append((link.number, value, key))
                touched += [(number, value, since) for number in link.windows]
                if link.back:
                    back.append((link.number, key, value))
        self._db.executemany(layout.STORE, stored)
        self._db.executemany(layout.LINK, links)
        self._db.executemany(layout.LINK_BACK, back)
        self._db.executemany(layout.TOUCH, touched)

    def _relink(self, table: str, key: str, old: Row | None, new: Row | None, since: int) -> None:
        for link in self._paths.links[table]:
            before = link.value(old) if old is not None else None
            after = link.value(new) if new is not None else None
            for value in {before, after} - {None} if link.windows else ():
                for number in link.windows:
                    self._touch(number, value, since)
            if before != after:
                self._move(link, key, before, after)

    def _move(self, link: Link, key: str, before: str | None, after: str | None) -> None:
        if before is not None:
            self._db.execute("DELETE FROM links WHERE (link, value, key) = (?, ?, ?)", (link.number, before, key))
        if after is not None:
            self._db.execute(layout.LINK, (link.number, after, key))
        if link.back:
            self._relink_back(link.number, key, after)

    def _relink_back(self, link: int, key: str, value: str | None) -> None:
        if value is None:
            self._db.execute("DELETE FROM back WHERE link = ? AND key = ?", (link, key))
        else:
            self._db.execute(layout.LINK_BACK, (link, key, value))

    def _touch(self, number: int, key: str | None, since: int) -> None:
        self._db.execute(layout.TOUCH, (number, key, since))

    def _touch_joined(self, table: str, key: str, old: Row | None, new: Row | None, since: int) -> None:
        for root, by, sql in self._paths.climbs[table]:
            if root in self._keys:  # else there is no root yet
                named = {value_of(row, by) for row in (old, new) if row is not None} if by else {key}
                for value in named - {None}:
                    self._db.execute(sql, (value, since))

    # Documents

    def _key(self, document: Root, key: str) -> Row:
        names = (document.start,) if isinstance(document, Window) else self._keys[document.table]
        return _named(names, key)

    def _root(self, number: int, document: Root, key: str, row: bytes | None) -> Node | None:
        """Return what is rendered, None for no document; `row` is the one of that key."""
        if isinstance(document, Window):
            rows = (row for row, _ in self.within(number, document, key))
            first = next(rows, None)
            if first is None:
                return None
            values = document.over(chain([first], rows), self.shape(document.table))
            return Node(document.table, self._key(document, key) | values)
        return self._node(document, codec.loads(row), key) if row is not None else None

    def _node(self, level: Level, row: Row, key: str) -> Node:
        if not level.joins:
            return Node(level.table, row)
        joins = {name: self._joined(level, join, row, key) for name, join in level.joins.items()}
        return Node(level.table, row, joins)

    def _joined(self, level: Level, join: Join, row: Row, key: str) -> Node | list[Node] | None:
        if isinstance(join, One):
            value = value_of(row, join.on)
            found = self._row(join.table, value) if value is not None else None
            return self._node(join, found, value) if found is not None and value is not None else None
        shape = self.shape(join.table)
        children = self.referring(level, join, key)
        if isinstance(join, Aggregate):
            return Node(join.table, join.over((child for child, _ in children), shape))
        return [self._node(join, child, its) for child, its in join.picked(children, shape)]

    def _referring(self, link: int, join: Many | Folding, key: str) -> Iterator[tuple[Row, str]]:
        """Yield the rows that an index has under `key` and that the join wants, each with its own key."""
        wanted = join.filter(self.shape(join.table)) if join.where else None
        found = self._db.execute(
            "SELECT row, links.key FROM links JOIN rows ON tbl = ? AND rows.key = links.key WHERE link = ? AND value = ?",
            (join.table, link, key),
        )
        for packed, its in found:
            row = codec.loads(packed)
            if wanted is None or wanted(row):
                yield row, its

    # Small facts

    def _key_of(self, change: Change) -> str:
        key = codec.decode_key(change.key)
        if change.table not in self._keys:
            self._keys[change.table] = list(key)
            self._put("keys", codec.dumps(self._keys))
        return text_of(key.values())

    def _meta(self, name: str) -> bytes | None:
        found = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return found[0] if found else None

    def _put(self, name: str, value: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))


def _stored(change: Change, key: str, version: int, at: int) -> tuple[Any, ...]:
    table, op, _, row, _, ordinal, xid, schema, partition, offset, read = change
    came = op + read if read else op
    return (table, key, codec.dumps(row), version, ordinal, xid, schema, partition, offset, came, at)


def _named(names: Sequence[str], key: str) -> Row:
    return dict(zip(names, codec.loads(key), strict=True))
