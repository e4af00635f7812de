"""What the suite works with: processes that open a generation, catch up and end; and what a fresh build of the same rows shows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest

from headrace.change import Position, Row, TableSchema
from headrace.consumer import Consumer, Cursor, Generation, ViewRow, no_progress
from headrace.settings import Settings, load
from headrace.testing.history import History
from headrace.testing.steps import Steps

Shown = list[tuple[str, str, Row]]
"""(collection, key, value) of every row that readers see."""


class Harness:
    """What `ConsumerConformance` is given and does; see there."""

    consumer: ClassVar[type[Consumer]]
    history: ClassVar[Mapping[TableSchema, Sequence[Row]]]
    name: ClassVar[str] = ""
    lost: ClassVar[str] = ""
    modules: ClassVar[tuple[str, ...]] = ("headrace.stores.duckdb", "headrace.log.transaction")
    stride: ClassVar[int] = 1
    _told: ClassVar[dict[str, Shown]]

    def __init_subclass__(cls) -> None:
        """What fresh builds show is found out once for all tests of a class."""
        super().__init_subclass__()
        cls._told = {}

    @pytest.fixture
    def settings(self) -> Settings:
        """Override it to say where the view's server is; by default the environment says."""
        return load()

    @pytest.fixture(autouse=True)
    def _store(self, settings: Settings, tmp_path: Path) -> Iterator[None]:
        """Begin with an empty store, and never touch generations that were there before."""
        self._settings, self._states = settings, tmp_path
        self._turn = 0
        assert not self._generations(), (
            f"{self._name} has generations on this server: name a server for tests in the settings"
        )
        yield
        with ThreadPoolExecutor(16) as together:  # a store may give readers a moment's grace at each
            list(together.map(self._drop, [generation.number for generation in self._generations()]))

    @property
    def _name(self) -> str:
        return self.name or getattr(self.consumer, "name", "") or self.consumer.__name__.lower()

    @property
    def _schema(self) -> TableSchema:
        return next(iter(self.history))

    @property
    def _versions(self) -> tuple[Row, Row]:
        """Two rows of one key of the first table."""
        seen: dict[tuple[Any, ...], Row] = {}
        for row in self.history[self._schema]:
            key = tuple(row[name] for name in self._schema.key)
            if key in seen:
                return dict(seen[key]), dict(row)
            seen[key] = dict(row)
        raise AssertionError(f"no key of {self._schema.table} is in the history twice")

    def _log(self, *, cut: bool = True) -> History:
        log = History(self.history)
        self._put_all(log, cut=cut)
        return log

    def _put_all(self, log: History, *, cut: bool = True) -> None:
        for schema, rows in self.history.items():
            for row in rows:
                log.put(schema.table, row)
        if cut:
            log.cut()

    def _change(self, log: History) -> None:
        """Commit another state, in turn one of two."""
        self._turn += 1
        table, (first, last) = self._schema.table, self._versions
        other = next(row for row in self.history[self._schema] if log.key(table, row) != log.key(table, last))
        if self._turn % 2:
            log.put(table, first)
            log.delete(table, other)
        else:
            log.put(table, last)
            log.put(table, other)
        log.cut()

    def _position(self) -> Position | None:
        """Return where the generation is for a process that opens it."""
        with self._opened() as (_, position):
            return position

    def _expected(self, log: History) -> Shown:
        """Return what a fresh generation shows that was given the rows at once."""
        told = repr(log.rows)
        if told not in self._told:
            fresh = log.at_once()
            self._catch_up(fresh, number=9999)
            self._told[told] = self._shown(9999)
            self._drop(9999)
        return self._told[told]

    def _made(self, host: str = "") -> Consumer:
        consumer = self.consumer(replace(self._settings, state=str(self._states / (host or "state"))), self._name)
        consumer.progress = no_progress
        return consumer

    @contextmanager
    def _opened(
        self, number: int = 1, host: str = "", fault: Steps | None = None
    ) -> Iterator[tuple[Consumer, Position | None]]:
        with closing(self._made(host)) as consumer, fault or nullcontext():
            yield consumer, consumer.open(Generation(self._name, number, "conformance"))

    def _catch_up(self, log: History, fault: Steps | None = None, *, number: int = 1, twice: bool = False) -> None:
        """Open the generation and apply all that it has not, as a process does that was started."""
        with self._opened(number, fault=fault) as (consumer, position):
            for batch in log.batches(position):
                consumer.apply(batch)
                if twice:
                    consumer.apply(batch)

    def _two(self, *, live: int) -> History:
        """Return a log at whose end the generations 1 and 2 are, one of them live."""
        log = self._log()
        for number in (1, 2):
            self._catch_up(log, number=number)
        self._promote(live)
        return log

    def _begin(self, log: History) -> None:
        """Open the generation and apply the first piece of what it has not."""
        with self._opened() as (consumer, position):
            consumer.apply(next(log.batches(position, piece=1)))

    def _check(self, log: History, said: str = "", *, number: int = 1) -> None:
        """Find the generation at the log's end, with the rows that belong there."""
        expected = self._expected(log)
        *_, last = log.batches(None)
        with self._opened(number) as (consumer, position):
            assert position is not None, "it forgot where it is"
            assert position == last.position, said
            assert shown(consumer) == expected, said

    def _shown(self, number: int = 1) -> Shown:
        with self._opened(number) as (consumer, _):
            return shown(consumer)

    def _from_opened(self, number: int) -> Iterator[int]:
        """Count the steps of what opens a generation and does something with it, from the last of its opening on."""
        opening = Steps(modules=self.modules)
        with self._opened(number, fault=opening):
            return itertools.count(max(opening.count, 1), self.stride)

    def _generations(self, fault: Steps | None = None) -> list[Generation]:
        with closing(self._made()) as consumer, fault or nullcontext():
            return consumer.generations()

    def _live(self) -> list[int]:
        return [generation.number for generation in self._generations() if generation.live]

    def _promote(self, number: int, fault: Steps | None = None) -> None:
        with self._opened(number, fault=fault) as (consumer, _):
            consumer.promote()

    def _drop(self, number: int, fault: Steps | None = None) -> None:
        with self._opened(number, fault=fault) as (consumer, _):
            consumer.drop()


def shown(consumer: Consumer, limit: int = 1000) -> Shown:
    """Return all that readers see, read in pages of `limit`."""
    return [(row.collection, row.key, row.value) for row in _scanned(consumer, limit)]


def compare_with_scan(consumer: Consumer, asked: Collection[Cursor]) -> set[Cursor]:
    """Compare the consumer's `get` and `count`, where it has them, with a scan; return the keys that there are.

    `asked` are further keys to ask for: rows that are gone are not given. A scan goes on after a key whether its row is there or not.
    """
    rows = {(row.collection, row.key): row for row in _scanned(consumer)}
    for after in {*rows, *asked, *((collection, key[:-1]) for collection, key in rows)}:
        rest = [row for key, row in rows.items() if key > after]
        assert list(consumer.scan(after, len(rows) + 1)) == rest, f"a scan after {after}"
    if get := getattr(consumer, "get", None):
        found = list(get([*{*rows, *asked}]))
        assert {(row.collection, row.key): row for row in found} == rows, "get gives other rows than a scan"
        assert len(found) == len(rows), "get gives a row twice"
    counted = count() if (count := getattr(consumer, "count", None)) else None
    if counted is not None:
        assert +Counter(counted) == Counter(collection for collection, _ in rows), "count counts other rows than a scan"
    return set(rows)


def _scanned(consumer: Consumer, limit: int = 1000) -> list[ViewRow]:
    found: list[ViewRow] = []
    after: Cursor | None = None
    while rows := consumer.scan(after, limit):
        assert len(rows) <= limit, f"a scan gives {len(rows)} rows where {limit} are asked for"
        found += rows
        keys = [*([after] if after else []), *((row.collection, row.key) for row in rows)]
        for earlier, later in pairwise(keys):
            assert earlier < later, (
                f"a scan gives {later} after {earlier}: again, or in another order than that of (collection, key)"
            )
        after = keys[-1]
    return found
