"""A scratch generation: a view built with the code at hand, to be looked at and dropped. `headrace replay` compares it with a live one.

It is a view of its own, `NAME--replay`, which this process alone serves [I13]: no runner knows of it, no pointer ever leads to it, and what
it keeps in files is in a folder of its own. On a server it is generation NUMBER, so far from the live view's that one whose store and
prefix are fixed in its class is not touched either. What a killed replay left behind is dropped by the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from headrace.change import Version
from headrace.consumer import SCRATCH, Consumer, Cursor, Generation, ViewRow
from headrace.errors import Misconfigured, Transient
from headrace.log import Log
from headrace.runner.code import Code
from headrace.runner.worker import State, Worker

NUMBER = 1_000_000
_PAGE = 500
_LOOK_SECONDS = 0.2
_PATIENCE_SECONDS = 60.0
_CALL_SECONDS = 120.0


class Scratch:
    """Builds a consumer's view for once."""

    def __init__(self, log: Log, name: str, consumer: type[Consumer], folder: Path) -> None:
        """Keep files in `folder`; build nothing yet."""
        self.name = f"{name}{SCRATCH}"
        settings = replace(
            log.settings,
            state=str(folder),
            warehouse=str(folder / "warehouse.duckdb"),
            warehouse_listen="127.0.0.1:0",
            parked_limit=0,  # what the new code cannot do is the answer
        )
        self._log = Log(settings)
        self._code = Code(consumer, settings, self.name)
        self._generation = Generation(self.name, NUMBER, self._code.fingerprint)
        self._worker: Worker | None = None

    def build(self, told: Callable[[State], None]) -> Version:
        """Build it from zero until it has caught up, then stop; return where. `told` hears how it stands, now and then.

        Raises:
            HeadraceError: what stops it; Transient, when it has waited for a server for a minute.
        """
        self.drop()
        worker = self._begin(None)
        answered = time.monotonic()
        while worker.state.phase != "following":
            _check(worker)
            told(worker.state)
            if worker.state.phase != "waiting":
                answered = time.monotonic()
            elif worker.state.error and time.monotonic() - answered > _PATIENCE_SECONDS:
                raise worker.state.error
            time.sleep(_LOOK_SECONDS)
        self._end()
        return worker.state.version

    def reach(self, version: Version) -> None:
        """Go on to the state at `version` exactly, and stay there. Raises Transient: `view-behind`."""
        worker = self._begin(version)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while worker.state.reached != version:
            _check(worker)
            if worker.state.version == version:
                worker.call(worker.hurry)
            if time.monotonic() > deadline:
                said = f"{self.name} is at {worker.state.version}, not at {version}, after {_PATIENCE_SECONDS:.0f} s."
                raise Transient("view-behind", said, "Run it again.")
            time.sleep(_LOOK_SECONDS)

    def rows(self) -> Iterator[ViewRow]:
        """Yield its rows in (collection, key) order."""
        after: Cursor | None = None
        while True:
            rows = self._page(after)
            yield from rows
            if len(rows) < _PAGE:
                return
            after = (rows[-1].collection, rows[-1].key)

    def drop(self) -> None:
        """Remove it, and what an earlier one of its name left behind."""
        self._end()
        consumer = self._code.make()
        try:
            for generation in consumer.generations():
                if generation.number == NUMBER:
                    consumer.open(generation)
                    consumer.drop()
        finally:
            consumer.close()

    def _page(self, after: Cursor | None) -> list[ViewRow]:
        assert self._worker is not None
        return list(self._worker.call(lambda consumer: consumer.scan(after, _PAGE)).result(_CALL_SECONDS))

    def _begin(self, until: Version | None) -> Worker:
        self._worker = Worker(self._log, self._code.make_same, self._generation, until=until)
        self._worker.start()
        return self._worker

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker.join(_CALL_SECONDS)
            self._worker = None


def _check(worker: Worker) -> None:
    """Raise what stopped it."""
    if worker.state.phase == "stopped":
        raise worker.state.error or Misconfigured("consumer-failed", f"{worker.name} has stopped.")
