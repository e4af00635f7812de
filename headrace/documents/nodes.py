"""From local rows to nodes: a row with all that is joined to it, as `render` gets it.

What refers to a root, `Many` and `Aggregate`, is not asked for root by root: of all the roots that are due one statement yields the rows in
the roots' order, and each root takes its own from there. It is a stream, so that nothing of it is in memory but the rows of one document.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, groupby
from operator import itemgetter

from headrace import codec
from headrace.change import Row
from headrace.documents import layout
from headrace.documents.declaration import Aggregate, Document, Folding, Join, Level, Many, Node, One
from headrace.documents.order import Shape
from headrace.documents.paths import Paths, named, text_of, value_of
from headrace.documents.when import When
from headrace.documents.windows import Root, Window

Found = Iterator[tuple[bytes, str]]
"""Rows as they are kept, each with its key."""
Under = Callable[[str], Found]
"""From a key to the rows that refer to it."""

_TOUCHED = f"doc = :doc AND {layout.WAITS} AND {layout.IS_DUE}"
_REFERRING = (
    "SELECT row, links.key FROM links JOIN rows ON tbl = ? AND rows.key = links.key WHERE link = ? AND value = ?"
)
_OF_TOUCHED = f"""
    SELECT touched.key, row, links.key FROM touched CROSS JOIN links ON link = :link AND value = touched.key
    CROSS JOIN rows ON tbl = :table AND rows.key = links.key WHERE {_TOUCHED} ORDER BY touched.key
"""
_ROOTS = f"""
    SELECT touched.key, row FROM touched LEFT JOIN rows ON tbl = :table AND rows.key = touched.key
    WHERE {_TOUCHED} ORDER BY touched.key
"""


class Nodes:
    """Puts the nodes of some documents together."""

    def __init__(self, db: sqlite3.Connection, paths: Paths, shape: Callable[[str], Shape]) -> None:
        """Read `db`; `shape` says how the values of a table compare."""
        self._db = db
        self._paths = paths
        self._shape = shape

    def touched(self, number: int, document: Root, when: When) -> Iterator[tuple[str, Node | None]]:
        """Yield the key of each touched root of the document `number` that is due, and what to render, None when there is nothing."""
        which = when._asdict() | {"doc": number, "table": document.table}
        if isinstance(document, Window):
            for (key,) in self._db.execute(f"SELECT key FROM touched WHERE {_TOUCHED} ORDER BY key", which):
                yield key, self._window(number, document, key)
            return
        joined = {
            name: _in_order(
                self._db.execute(_OF_TOUCHED, which | {"link": self._paths.link(document, join), "table": join.table})
            )
            for name, join in document.joins.items()
            if not isinstance(join, One)
        }
        for key, row in self._db.execute(_ROOTS, which):
            yield key, self._node(document, codec.loads(row), key, joined) if row is not None else None

    def referring(self, level: Level, join: Many | Aggregate, key: str) -> Iterator[tuple[Row, str]]:
        """Yield the rows that a join of the row `key` of `level` is over, each with its own key."""
        return self._wanted(join, self._under(self._paths.link(level, join), join.table, key))

    def within(self, number: int, window: Window, key: str) -> Iterator[tuple[Row, str]]:
        """Yield the rows that the document `number` of one window is over, each with its own key."""
        return self._wanted(window, self._under(self._paths.windows[number], window.table, key))

    def root(self, document: Document, key: Row) -> Node | None:
        """Return a root row with all that is joined to it, None where it is not there."""
        packed = text_of(key.values())
        row = self.row(document.table, packed)
        return self._node(document, row, packed, {}) if row is not None else None

    def row(self, table: str, key: str) -> Row | None:
        """Return a row."""
        found = self._db.execute("SELECT row FROM rows WHERE tbl = ? AND key = ?", (table, key)).fetchone()
        return codec.loads(found[0]) if found else None

    def _window(self, number: int, window: Window, key: str) -> Node | None:
        rows = (row for row, _ in self.within(number, window, key))
        first = next(rows, None)
        if first is None:
            return None
        values = window.over(chain([first], rows), self._shape(window.table))
        return Node(window.table, named((window.start,), key) | values)

    def _node(self, level: Level, row: Row, key: str, joined: Mapping[str, Under]) -> Node:
        row = self._shape(level.table).whole(row)
        if not level.joins:
            return Node(level.table, row)
        joins = {name: self._joined(level, join, row, key, joined.get(name)) for name, join in level.joins.items()}
        return Node(level.table, row, joins)

    def _joined(self, level: Level, join: Join, row: Row, key: str, under: Under | None) -> Node | list[Node] | None:
        if isinstance(join, One):
            value = value_of(row, join.on)
            found = self.row(join.table, value) if value is not None else None
            return self._node(join, found, value, {}) if found is not None and value is not None else None
        shape = self._shape(join.table)
        children = self._wanted(join, under(key)) if under else self.referring(level, join, key)
        if isinstance(join, Aggregate):
            return Node(join.table, join.over((child for child, _ in children), shape))
        return [self._node(join, child, its, {}) for child, its in join.picked(children, shape)]

    def _under(self, link: int, table: str, key: str) -> Found:
        return self._db.execute(_REFERRING, (table, link, key))

    def _wanted(self, join: Many | Folding, found: Found) -> Iterator[tuple[Row, str]]:
        """Yield the rows that a join wants, each with its own key."""
        wanted = join.filter(self._shape(join.table)) if join.where else None
        for packed, its in found:
            row = codec.loads(packed)
            if wanted is None or wanted(row):
                yield row, its


def shown(level: Level) -> Iterator[str]:
    """Yield the tables whose rows `render` gets as they are; of an aggregate it gets values."""
    if isinstance(level, Folding):
        return
    yield level.table
    for join in level.joins.values():
        yield from shown(join)


def _in_order(rows: Iterator[tuple[str, bytes, str]]) -> Under:
    """Return what gives the rows of one key; keys are asked for in the order in which `rows` has them, not all of them need be there."""
    groups = groupby(rows, itemgetter(0))
    group = next(groups, None)

    def under(key: str) -> Found:
        nonlocal group
        while group is not None and group[0] < key:
            group = next(groups, None)
        if group is None or group[0] != key:
            return
        for _, row, its in group[1]:
            yield row, its

    return under
