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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from headrace import codec
from headrace.change import NOWHERE, Change, Position, Row, TableSchema, Version
from headrace.documents import layout
from headrace.documents.begun import Begun
from headrace.documents.declaration import Node
from headrace.documents.nodes import Nodes, shown
from headrace.documents.order import Shape
from headrace.documents.paths import Link, Paths, named, text_of, value_of
from headrace.documents.when import ALL, Left, When, now
from headrace.documents.windows import Root, Window
from headrace.shapes import types_of

LOCKED_SECONDS = 5.0
"""So long another process may hold the file."""
RARELY_SECONDS = 3.0


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
        nodes: The rows, put together.
        begun: The documents that were to be shown.
    """

    def __init__(self, path: Path, documents: Sequence[Root], fingerprint: str) -> None:
        """Open the file; one of another fingerprint or layout, or one that is damaged, is thrown away.

        Raises:
            Transient: `local-state`.
        """
        self.path = path
        self._documents = documents
        self._paths = Paths(documents)
        self._committed = 0.0
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
        self._db = sqlite3.connect(self.path, LOCKED_SECONDS, isolation_level=None)
        try:
            self._db.execute(f"PRAGMA page_size = {layout.PAGE_BYTES}")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute(f"PRAGMA cache_size = -{layout.CACHE_KB}")
            self._db.executescript(layout.SCHEMA)
            kept = self._meta("fingerprint")
            if kept not in (None, built_by):
                raise sqlite3.DatabaseError  # noqa: TRY301  thrown away like one that is damaged
            self._db.execute("BEGIN")
            self._put("fingerprint", built_by)
            self._meaning = self._meta("meaning") or self._paths.meaning
            self._put("meaning", self._meaning)
            position = self._meta("position")
            self.position = codec.decode_position(position) if position else None
            self._keys: dict[str, list[str]] = codec.loads(self._meta("keys") or b"{}")
            shapes = codec.loads(self._meta("shapes") or b"{}")
            self.nodes = Nodes(self._db, self._paths, self.shape)
            self.begun = Begun(self._db, self.path)
            self._shapes = {
                table: Shape(tuple(key), frozenset(numbers), tuple(columns), frozenset(times), seen)
                for table, (key, numbers, columns, times, seen) in shapes.items()
            }
        except sqlite3.DatabaseError:
            self._db.close()
            raise

    def check(self) -> None:
        """Raise an error of SQLite, as of what is damaged, where rows are indexed for another declaration: they may only be looked at."""
        if self._meaning != self._paths.meaning:
            raise sqlite3.DatabaseError("it is of another declaration")

    def learn(self, schemas: Mapping[str, TableSchema], since: Version = NOWHERE, *, whole: bool = True) -> None:
        """Take in the newest schemas of tables: how their values compare, and which columns `render` gets.

        Where the columns of a table are others now, all documents that show rows of it are touched.

        Args:
            schemas: By the table.
            since: The version of the change that came with them.
            whole: Whether a schema has the columns of its table and no others. Of a Debezium feed (S28) it has all that were seen.
        """
        learned = {table: Shape.of(schema) for table, schema in schemas.items() if table in self._paths.roots}
        if not whole:
            learned = {
                table: shape._replace(columns=(), seen=types_of(schemas[table])) for table, shape in learned.items()
            }
        others = {
            table
            for table, shape in learned.items()
            if table in self._shapes and set(shape.columns) != set(self._shapes[table].columns)
        }
        for number, document in enumerate(self._documents):
            if not others.isdisjoint(shown(document)):
                self._db.execute(layout.TOUCH_ALL, (number, since.packed(), document.table))
        self._shapes |= learned
        shapes = {
            table: (key, sorted(numbers), names, sorted(times), dict(seen))
            for table, (key, numbers, names, times, seen) in self._shapes.items()
        }
        self._put("shapes", codec.dumps(shapes))

    def apply(self, change: Change, *, loading: bool) -> None:
        """Take a change in and note the documents that it touches, by the old values of its joins and by the new ones.

        Args:
            change: A change of one of the declared tables.
            loading: Every document will be rendered anyway, so only roots are noted, those that are deleted too.
        """
        key = self._key_of(change)
        old = self.nodes.row(change.table, key)
        since = change.version.packed()
        self._store(change, key, since)
        self._relink(change.table, key, old, change.row, since)
        for number in self._paths.roots[change.table]:
            self._touch(number, key, since)
        if not loading:
            self._touch_joined(change.table, key, old, change.row, since)

    def follow(self, changes: Sequence[Change]) -> None:
        """Take changes in, in their order. Rows that neither have a join nor are in one go in together: their old values touch nothing."""
        alone: dict[str, list[tuple[str, Change]]] = {}
        for change in changes:
            if self._paths.links[change.table] or self._paths.climbs[change.table]:
                self.apply(change, loading=False)
            else:
                alone.setdefault(change.table, []).append((self._key_of(change), change))
        for table, keyed in alone.items():
            since = [(key, change.version.packed()) for key, change in keyed]
            for number in self._paths.roots[table]:
                self._db.executemany(layout.TOUCH, ((number, *each) for each in since))
            last, at = dict(keyed), now()
            self._db.executemany(layout.DELETE, ((table, key) for key, change in last.items() if change.row is None))
            kept = ((key, change) for key, change in last.items() if change.row is not None)
            self._db.executemany(
                layout.STORE, (layout.stored(change, key, change.version.packed(), at) for key, change in kept)
            )

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
            rows = [(key, change) for key, change in keyed.items() if change.row is not None]
            known = self._known(table, keyed) if self._insert(rows) < len(keyed) else ()
            new += [(key, change) for key, change in rows if key not in known]
            for key, change in keyed.items() if known or unknown else ():
                if key in known or (unknown and change.row is None):
                    self.apply(change, loading=True)
        self._link(new, touch=touch)
        return [change for _, change in new]

    def touched(self, when: When = ALL) -> Iterator[Touched]:
        """Yield each touched document that is due once, with what to render."""
        for number, document in enumerate(self._documents):
            for key, node in self.nodes.touched(number, document, when):
                yield Touched(document, self._key(document, key), node)

    def count_touched(self) -> int:
        """Return how many documents are touched."""
        return int(self._db.execute(f"SELECT count(*) FROM touched WHERE {layout.WAITS}").fetchone()[0])

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
                self._db.execute(layout.TOUCH_ALL, (number, None, table))

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

    def commit(self, position: Position, *, rarely: bool = False) -> None:
        """Make what was applied durable, as the state at `position`; `rarely` only every few seconds: a commit writes most pages again."""
        if rarely and time.monotonic() - self._committed < RARELY_SECONDS:
            return
        self._committed = time.monotonic()
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
        waiting = f"SELECT key FROM touched WHERE {layout.WAITS} AND doc = ?"
        known = f"SELECT key FROM ({known}) {{0}} UNION ALL {waiting} {{1}}"
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
        of_log = codec.encode_key(named(self._keys[table], key))
        place = (Version.unpacked(version), ordinal, xid, schema, partition, offset)
        return Change(table, came[0], of_log, codec.loads(row), *place, came[1:] or None), applied

    def waits(self, number: int, key: str) -> bool:
        """Whether a document is touched and not shown yet."""
        found = self._db.execute(f"SELECT 1 FROM touched WHERE {layout.WAITS} AND doc = ? AND key = ?", (number, key))
        return found.fetchone() is not None

    def shape(self, table: str) -> Shape:
        """Return how the values of a table compare."""
        return self._shapes.get(table, Shape())

    # Rows and links

    def _store(self, change: Change, key: str, since: int) -> None:
        if change.row is None:
            self._db.execute(layout.DELETE, (change.table, key))
            return
        self._db.execute(layout.STORE, layout.stored(change, key, since, now()))

    def _insert(self, rows: Sequence[tuple[str, Change]]) -> int:
        """Put those rows in that are not there; return how many."""
        at = now()
        stored = (layout.stored(change, key, change.version.packed(), at) for key, change in rows)
        return layout.insert(self._db, layout.INSERT, stored)

    def _known(self, table: str, keyed: Mapping[str, Change]) -> set[str]:
        """Return the keys of rows that are there and did not come just now, by their places in the log."""
        there = "SELECT key, part, at FROM rows WHERE tbl = ? AND key IN (SELECT value FROM json_each(?))"
        found = self._db.execute(there, (table, codec.dumps(list(keyed)).decode()))
        return {key for key, *place in found if place != [keyed[key].partition, keyed[key].offset]}

    def _link(self, new: Sequence[tuple[str, Change]], *, touch: bool) -> None:
        """Index rows that were not there."""
        links, back, touched = [], [], []
        for key, change in new:
            since = change.version.packed()
            if touch:
                touched += [(number, key, since) for number in self._paths.roots[change.table]]
            for link in self._paths.links[change.table]:
                if (value := link.value(change.row or {})) is None:
                    continue
                links.append((link.number, value, key))
                touched += [(number, value, since) for number in link.windows]
                if link.back:
                    back.append((link.number, key, value))
        layout.insert(self._db, layout.LINK, links)
        layout.insert(self._db, layout.LINK_BACK, back)
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
        if link.back and after is not None:
            self._db.execute(layout.LINK_BACK, (link.number, key, after))
        elif link.back:
            self._db.execute("DELETE FROM back WHERE link = ? AND key = ?", (link.number, key))

    def _touch(self, number: int, key: str | None, since: int) -> None:
        self._db.execute(layout.TOUCH, (number, key, since))

    def _touch_joined(self, table: str, key: str, old: Row | None, new: Row | None, since: int) -> None:
        for root, by, sql in self._paths.climbs[table]:
            if root in self._keys:  # else there is no root yet
                values = {value_of(row, by) for row in (old, new) if row is not None} if by else {key}
                for value in values - {None}:
                    self._db.execute(sql, (value, since, root))

    def _key(self, document: Root, key: str) -> Row:
        names = (document.start,) if isinstance(document, Window) else self._keys[document.table]
        return named(names, key)

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
