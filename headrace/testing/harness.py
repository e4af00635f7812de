"""What the suite works with: processes that open a generation, catch up and end; and what a fresh build of the same rows shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from headrace.change import Position, Row, TableSchema
from headrace.consumer import Batch, Consumer, Cursor, Generation, no_progress
from headrace.settings import Settings, load
from headrace.testing.history import History
from headrace.testing.steps import FailAfterWrite

Shown = list[tuple[str, str, Row]]
"""(collection, key, value) of every row that readers see."""


class Harness:
    """What `ConsumerConformance` is given and does; see there."""

    consumer: ClassVar[type[Consumer]]
    history: ClassVar[Mapping[TableSchema, Sequence[Row]]]
    name: ClassVar[str] = ""
    lost: ClassVar[str] = ""
    modules: ClassVar[tuple[str, ...]] = ()
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

    def _change(self, log: History) -> Position | None:
        """Commit another state, in turn one of two; return the position before it."""
        with self._opened() as (_, position):
            before = position
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
        return before

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
    def _opened(self, number: int = 1, host: str = "") -> Iterator[tuple[Consumer, Position | None]]:
        with closing(self._made(host)) as consumer:
            yield consumer, consumer.open(Generation(self._name, number, "conformance"))

    def _catch_up(
        self, log: History, fault: FailAfterWrite | None = None, *, number: int = 1, twice: bool = False
    ) -> None:
        """Open the generation and apply all that it has not, as a process does that was started."""
        with self._opened(number) as (consumer, position):
            for batch in log.batches(position):
                _apply(consumer, batch, fault)
                if twice:
                    consumer.apply(batch)

    def _shown(self, number: int = 1) -> Shown:
        with self._opened(number) as (consumer, _):
            return shown(consumer)

    def _generations(self) -> list[Generation]:
        with closing(self._made()) as consumer:
            return consumer.generations()

    def _drop(self, number: int) -> None:
        with self._opened(number) as (consumer, _):
            consumer.drop()


def _apply(consumer: Consumer, batch: Batch, fault: FailAfterWrite | None) -> None:
    if fault is None:
        consumer.apply(batch)
    else:
        with fault:
            consumer.apply(batch)


def shown(consumer: Consumer, limit: int = 1000) -> Shown:
    """Return all that readers see, read in pages of `limit`."""
    found: Shown = []
    after: Cursor | None = None
    seen: set[Cursor] = set()
    while rows := consumer.scan(after, limit):
        found += [(row.collection, row.key, row.value) for row in rows]
        keys = {(row.collection, row.key) for row in rows}
        assert not keys & seen, f"a scan gives {sorted(keys & seen)} again"
        seen |= keys
        after = rows[-1].collection, rows[-1].key
    return found
