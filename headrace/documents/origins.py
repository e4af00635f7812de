"""What a document was made from: its local rows, level by level, and the change that brought each: `headrace why`.

The rows are those that `render` gets, in its order, but of a join only the first: a root may have very many. How many there
are is said before them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

from headrace import codec
from headrace.change import Row
from headrace.consumer import Origin
from headrace.documents.declaration import Aggregate, Level, Many, One
from headrace.documents.local import LocalRows
from headrace.documents.order import sorting
from headrace.documents.paths import text_of, value_of
from headrace.documents.windows import Root, Window

Place = tuple[str, ...]


def find(local: LocalRows, number: int, id_: str, id_of: Callable[[Row], str]) -> str | None:
    """Return the root's key of the document `number` whose id is `id_`: an `id` of the plugin's own is looked for among all."""
    return local.find(number, lambda key: id_of(key) == id_, _guesses(id_))


def origins(local: LocalRows, number: int, document: Root, key: str, limit: int) -> Iterator[Origin]:
    """Yield what the document `number` of the root `key` is made from: the root, then each join and the first rows of it.

    A window has no row of its own: it is a join of those that are in it.
    """
    waits = local.waits(number, key)
    if isinstance(document, Window):
        rows, shape = partial(local.nodes.within, number, document, key), local.shape(document.table)
        keys, count = _first(rows(), sorting((), shape), limit)
        yield Origin(
            (), document.table, rows=count, values=document.over((row for row, _ in rows()), shape), waits=waits
        )
        yield from filter(None, (_row(local, document, each, ()) for each in keys))
        return
    root = _row(local, document, key, ())
    if root is None:
        yield Origin((), document.table, rows=0, waits=waits)
        return
    yield root._replace(waits=waits)
    yield from _joined(local, document, root, key, limit)


def _joined(local: LocalRows, level: Level, origin: Origin, key: str, limit: int) -> Iterator[Origin]:
    """Yield what is joined to one row."""
    row = (origin.change and origin.change.row) or {}
    for name, join in level.joins.items():
        place = (*origin.place, name)
        values = None
        if isinstance(join, One):
            value = value_of(row, join.on)
            keys = [value] if value is not None and local.came(join.table, value) else []
            count = len(keys)
        else:
            keys, count = _picked(local, level, join, key, limit)
            if isinstance(join, Aggregate):
                values = join.over(
                    (each for each, _ in local.nodes.referring(level, join, key)), local.shape(join.table)
                )
        yield Origin(place, join.table, rows=count, values=values)
        for each in keys:
            child = _row(local, join, each, place)
            if child is not None:
                yield child
                yield from _joined(local, join, child, each, limit)


def _row(local: LocalRows, level: Level, key: str, place: Place) -> Origin | None:
    found = local.came(level.table, key)
    return found and Origin(place, level.table, *found)


def _picked(local: LocalRows, level: Level, join: Many | Aggregate, key: str, limit: int) -> tuple[list[str], int]:
    """Return the keys of the first rows of a join, and how many are in the document."""
    order, most = (join.order, join.limit) if isinstance(join, Many) else ((), None)
    by = sorting(order, local.shape(join.table))
    keys, count = _first(local.nodes.referring(level, join, key), by, min(limit, most or limit))
    return keys, min(count, most or count)


def _first(rows: Iterator[tuple[Row, str]], by: Callable[[Row], Any], limit: int) -> tuple[list[str], int]:
    """Return the keys of the first rows, and how many there are; in memory are no more than `limit`."""
    counted = _Counted(rows)
    first = heapq.nsmallest(limit, counted, key=lambda each: by(each[0]))
    return [its for _, its in first], counted.count


class _Counted:
    """Counts what is taken from it."""

    def __init__(self, rows: Iterable[tuple[Row, str]]) -> None:
        self._rows = rows
        self.count = 0

    def __iter__(self) -> Iterator[tuple[Row, str]]:
        for row in self._rows:
            self.count += 1
            yield row


def _guesses(id_: str) -> Iterator[str]:
    """Yield the keys whose document has this id by default: a value may be text or a number."""
    for parts in {(id_,), tuple(id_.split(","))}:
        if len(parts) <= _GUESSED:
            yield from map(text_of, product(*map(_meanings, parts)))


_GUESSED = 4
"""Most columns of a key that are guessed."""


def _meanings(part: str) -> list[object]:
    try:
        meant = codec.loads(part)
    except ValueError:
        return [part]
    return [meant, part] if isinstance(meant, int | float) else [part]
