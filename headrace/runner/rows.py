"""Rows of a view for who asks: a scan page by page, or single rows; the worker reads on between them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from headrace.change import NOWHERE, Version
from headrace.consumer import Consumer, Cursor, Origin, ViewRow
from headrace.control import PAGE_BYTES, Control
from headrace.errors import HeadraceError, as_ours
from headrace.requests import Request
from headrace.runner.generations import Generations
from headrace.runner.worker import Worker

_FIRST_ROWS, _MOST_ROWS = 10, 500
_COUNTED_ROWS = 5000

T = TypeVar("T")


class Rows:
    """Answers `scan`, `rows`, `count` and `why` for one consumer."""

    def __init__(self, generations: Generations, control: Control) -> None:
        """Send rows of these generations."""
        self._generations = generations
        self._control = control
        self._scans: set[str] = set()

    def scan(self, request: Request) -> dict[str, Any]:
        """Begin to send every row of a generation."""
        worker = self._generations.worker(request.args.get("generation"))
        self._scans.add(request.id)
        self._send_page(worker, request, None, _FIRST_ROWS)
        return {"rows": request.id, "generation": worker.generation.number}

    def leave(self, request: Request) -> None:
        """End a scan whose rows nobody reads any more."""
        self._scans.discard(request.args["rows"])

    def some(self, request: Request) -> dict[str, Any]:
        """Send single rows by their keys, and answer the version of the state that they are, NOWHERE when that is not certain."""
        worker = self._generations.worker(request.args.get("generation"))
        keys = request.args["keys"]
        rows, version = self._at_a_state(worker, lambda consumer: _named(consumer, keys))
        self._control.send_rows(request, rows, last=True)
        return {"rows": request.id, "version": list(version)}

    def count(self, request: Request) -> dict[str, Any]:
        """Answer how many rows each collection has, and the version of the state that was counted, as `some` does."""
        worker = self._generations.worker(request.args.get("generation"))
        counts, version = self._at_a_state(worker, _counted)
        return {"counts": counts, "version": list(version)}

    def _at_a_state(self, worker: Worker, look: Callable[[Consumer], T]) -> tuple[T, Version]:
        """Return what is seen when nothing is delayed, and the version of that state, NOWHERE when it is not certain."""

        def looked(consumer: Consumer) -> tuple[T, Version]:
            worker.hurry(consumer)
            return look(consumer), worker.state.shown

        found: tuple[T, Version] = self._generations.wait_for(worker, looked)
        return found

    def why(self, request: Request) -> dict[str, Any]:
        """Send a row, if readers see it, and then what it was made from, as far as the consumer tells; answer how the view stands.

        Of a generation of other code only the row is sent. Of a view of tables these are answered, too: its rows are named by them.
        """
        worker = self._generations.worker(request.args.get("generation"))
        key, limit = request.args["key"], request.args["limit"]

        def look(consumer: Consumer) -> tuple[list[ViewRow], list[Origin], Version, list[str]]:
            # A declaration of other code reads the kept rows wrongly: it numbers their joins otherwise.
            why = getattr(consumer, "why", None) if not worker.still else None
            origins = list(why(tuple(key), limit)) if why else []
            tables = list(consumer.tables) if getattr(consumer, "mirrors_rows", False) else []
            return _named(consumer, [key]), origins, worker.state.version, tables

        found, origins, version, tables = self._generations.wait_for(worker, look)
        self._control.send_rows(request, [*found, *map(_sent, origins)], last=True)
        number = worker.generation.number
        stands = {"generation": number, "version": list(version), "stale": worker.still}
        return {"rows": request.id, "found": len(found), "tables": tables, **stands}

    def _send_page(self, worker: Worker, request: Request, after: Cursor | None, limit: int) -> None:
        """Queue the next rows of a scan; whatever becomes of them is told to who reads them."""
        sent = worker.call(lambda consumer: self._page(worker, consumer, request, after, limit))
        sent.add_done_callback(lambda done: self._tell_failure(request, done))

    def _page(self, worker: Worker, consumer: Consumer, request: Request, after: Cursor | None, limit: int) -> None:
        """Send some rows and queue the next, so that the worker reads on between them: fewer at once where rows are large.

        What hinders the sending is no fault of the view: it is told to who reads the rows, and not to the worker.
        """
        if request.id not in self._scans:
            return
        rows = consumer.scan(after, limit)
        try:
            size = self._control.send_rows(request, rows, last=len(rows) < limit)
        except HeadraceError as error:
            with suppress(HeadraceError):
                self._break_off(request, error)
            return
        if len(rows) < limit:
            self._scans.discard(request.id)
        else:
            fit = PAGE_BYTES * limit // max(size, 1)
            last = (rows[-1].collection, rows[-1].key)
            self._send_page(worker, request, last, min(max(fit, 1), _MOST_ROWS))

    def _tell_failure(self, request: Request, done: Future[None]) -> None:
        error = done.exception()
        if error is not None:
            self._break_off(request, error)

    def _break_off(self, request: Request, error: BaseException) -> None:
        self._scans.discard(request.id)
        self._control.break_off(request, as_ours(error, self._generations.name))


def _sent(origin: Origin) -> ViewRow:
    """Return an origin as it is sent to who asked."""
    facts = origin._asdict()
    change = origin.change
    if change is not None:
        facts["change"] = change._asdict() | {"key": change.key.decode(), "version": list(change.version)}
    return ViewRow("", "", facts, NOWHERE)


def _named(consumer: Consumer, keys: list[tuple[str, str]]) -> list[ViewRow]:
    """Return the rows of some keys: by the consumer's own `get`, else by a scan from just before each."""
    if get := getattr(consumer, "get", None):
        return list(get(keys))
    found = [row for collection, key in keys for row in consumer.scan((collection, _just_before(key)), 1)]
    wanted = {(collection, key) for collection, key in keys}
    return [row for row in found if (row.collection, row.key) in wanted]


def _counted(consumer: Consumer) -> dict[str, int]:
    """Return how many rows each collection has: by the consumer's own `count`, else by a scan."""
    count = getattr(consumer, "count", None)
    by_itself = count() if count else None
    if by_itself is not None:
        return dict(by_itself)
    counts: dict[str, int] = {}
    rows = consumer.scan(None, _COUNTED_ROWS)
    while rows:
        for row in rows:
            counts[row.collection] = counts.get(row.collection, 0) + 1
        rows = consumer.scan((rows[-1].collection, rows[-1].key), _COUNTED_ROWS)
    return counts


def _just_before(key: str) -> str:
    """Return a text that sorts before `key`, and after every key that does."""
    last = max(ord(key[-1:] or "\0") - 1, 0)
    last = _LAST_BEFORE_SURROGATES if _LAST_BEFORE_SURROGATES < last < _FIRST_AFTER_SURROGATES else last
    return f"{key[:-1]}{chr(last)}\U0010ffff" if key else key


_LAST_BEFORE_SURROGATES, _FIRST_AFTER_SURROGATES = 0xD7FF, 0xE000
