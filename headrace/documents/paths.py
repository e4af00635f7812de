"""From a row to the documents it is in: the joins between, walked up to the root in one statement of SQL.

The local rows have two indexes of every join: `links`, from what a row's columns refer to (a key) to the row, and where a
way up leads through a `Many`, `back`, from the row to what it refers to. Of the row that changed its old and its new
values are known; of the rows above it the indexes know. So whichever of them changed when, each document that held the
row, or holds it, is found: had a row above changed as well, that change found what *it* left.

SQLite walks, level by level and each row of a level once; nothing of it is in our memory, however many documents share
the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice, product
from typing import Any, NamedTuple

from headrace import codec
from headrace.change import Row
from headrace.documents.declaration import Document, Join, Level, One
from headrace.documents.windows import Root, Window

_Up = Callable[[str], str]
"""From SQL that gives keys of one level's rows to SQL that gives the root's."""

_Reference = tuple[str, tuple[str, ...]]


class Link(NamedTuple):
    """An index of a table's rows by what some columns hold, or by the windows they are in; all that are by the same share it.

    Attributes:
        value: What a row is found by.
        back: Whether it is known of a row without asking it.
        windows: The numbers of the documents of these windows.
    """

    number: int
    value: Callable[[Row], str | None]
    back: bool = False
    windows: tuple[int, ...] = ()


class Climb(NamedTuple):
    """The way from a changed row to documents.

    Attributes:
        root: The documents' table.
        by: Columns of the row that name what it is joined to; None: the row's key is what the rows above it name.
        sql: Touches the documents above a key, by a change of a version, whose roots are there in a table: a root that is not has
            no document, and its id may be another's.
    """

    root: str
    by: tuple[str, ...] | None
    sql: str


class Paths:
    """The indexes and ways of some documents.

    Attributes:
        roots: The numbers of the documents that each row of a table has.
        links: The indexes of each table.
        windows: The number of the index by windows that each document of a window is made by.
        climbs: The ways up from each table, for each place that it has in a document; the same way once.
        meaning: What the numbers are of, as bytes: what was indexed by other ones cannot be read by these.
    """

    def __init__(self, documents: Sequence[Root]) -> None:
        """Find all places of all tables."""
        tables = [table for document in documents for table in document.tables]
        self._numbers: dict[_Reference, int] = {}
        self._back: set[int] = set()
        self.roots: dict[str, list[int]] = {table: [] for table in tables}
        self.climbs: dict[str, list[Climb]] = {table: [] for table in tables}
        for number, document in enumerate(documents):
            if isinstance(document, Document):
                self.roots[document.table].append(number)
                self._descend(document, document, _touching(number))
        self.links: dict[str, list[Link]] = {table: [] for table in tables}
        for (table, columns), link in self._numbers.items():
            self.links[table].append(Link(link, partial(value_of, columns=columns), link in self._back))
        windows = {n: each for n, each in enumerate(documents) if isinstance(each, Window)}
        self.windows = self._index(windows)
        each_has = [each.tables for each in documents], [(n, *_by(window)) for n, window in windows.items()]
        self.meaning = codec.dumps((*each_has, list(self._numbers.items()), sorted(self._back)))

    def link(self, level: Level, join: Join) -> int:
        """Return the number of a join's index."""
        reference = (level.table if isinstance(join, One) else join.table, join.columns)
        return self._numbers.setdefault(reference, len(self._numbers))

    def _index(self, windows: Mapping[int, Window]) -> dict[int, int]:
        """Add the indexes by windows, and return their numbers."""
        found: dict[int, int] = {}
        for number, window in windows.items():
            same = [n for n, other in windows.items() if _by(other) == _by(window)]
            found[number] = len(self._numbers) + same[0]
            if number == same[0]:
                link = Link(found[number], partial(_start, window), windows=tuple(same))
                self.links[window.table].append(link)
        return found

    def _descend(self, document: Document, level: Level, up: _Up) -> None:
        for join in level.joins.values():
            link = self.link(level, join)
            if isinstance(join, One):
                climb = Climb(document.table, None, up(f"SELECT key FROM links WHERE link = {link} AND value = ?1"))
                further = _then(up, f"SELECT key FROM links WHERE link = {link} AND value IN ({{}})")
            else:
                climb = Climb(document.table, join.by, up("VALUES (?1)"))
                further = _then(up, f"SELECT value FROM back WHERE link = {link} AND key IN ({{}})")
                if join.joins:
                    self._back.add(link)
            if climb not in self.climbs[join.table]:
                self.climbs[join.table].append(climb)
            self._descend(document, join, further)


TOUCHED = """ON CONFLICT DO UPDATE SET since = min(coalesce(since, excluded.since), excluded.since)
    WHERE since IS NULL OR since > excluded.since"""
"""A document that is touched already waits since its oldest change."""


def _touching(number: int) -> _Up:
    there = "CROSS JOIN rows ON tbl = ?3 AND rows.key = up.key"
    return f"WITH up(key) AS ({{}}) INSERT INTO touched SELECT {number}, up.key, ?2, 0 FROM up {there} WHERE true {TOUCHED}".format


def _then(up: _Up, step: str) -> _Up:
    return lambda keys: up(step.format(keys))


def _by(window: Window) -> tuple[str, str, int]:
    return window.table, window.on, window.seconds


def _start(window: Window, row: Row) -> str | None:
    start = window.start_of(row)
    return text_of([start]) if start is not None else None


def text_of(values: Iterable[Any]) -> str:
    """Return a key that has these values."""
    return codec.dumps(list(values)).decode()


def named(names: Iterable[str], key: str) -> Row:
    """Return the columns of a key."""
    return dict(zip(names, codec.loads(key), strict=True))


def value_of(row: Row, columns: Sequence[str]) -> str | None:
    """Return what a row's `columns` refer to, None when one of them is NULL (or not there yet: an older schema's row)."""
    values = [row.get(column) for column in columns]
    return None if None in values else text_of(values)


def written_otherwise(key: Row) -> Iterator[Row]:
    """Yield the keys that are like this one but for a number that is text there, or text that is a number: once a column has another type
    the log writes its values so."""
    for values in islice(product(*map(_forms, key.values())), 1, 1 << _REWRITTEN):
        yield dict(zip(key, values, strict=True))


_REWRITTEN = 4
"""Most columns of a key of which all forms are looked at."""


def _forms(value: Any) -> list[Any]:
    if isinstance(value, str):
        with suppress(ValueError):
            number = codec.loads(value)
            return [value, number] if type(number) in {int, float} and str(number) == value else [value]
    return [value, str(value)] if type(value) in {int, float} else [value]
