"""SQL over the warehouse while generations come and go: one exact state, and never an older one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from headrace.change import Version
from headrace.errors import Transient
from headrace.settings import Settings
from headrace_warehouse import Warehouse, endpoint
from headrace_warehouse.cli import ask
from tests.fixtures.capture import eventually
from tests.fixtures.endpoints import ITEMS, address, fill
from tests.fixtures.tables import SECOND, batch, put
from tests.integration.test_warehouse_sql import settings, store

__all__ = ["settings", "store"]


class Poller(threading.Thread):
    """A reader that never stops asking."""

    def __init__(self, at: str, query: str) -> None:
        super().__init__(daemon=True)
        self.at, self.query = at, query
        self.seen: list[tuple[Version, Any]] = []
        self.failed: Exception | None = None
        self.enough = threading.Event()

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                answer = ask(self.at, self.query)
                epoch, _, lsn = answer["version"].partition("@0/")
                self.seen.append((Version(int(epoch), int(lsn, 16)), answer["rows"]))
        except Exception as error:  # noqa: BLE001  shown by the test
            self.failed = error


@contextmanager
def polling(query: str) -> Iterator[Poller]:
    with ExitStack() as last:
        poller = Poller(address(), query)
        poller.start()
        last.callback(poller.join, 30)
        last.callback(poller.enough.set)
        while not poller.seen and poller.failed is None:
            time.sleep(0.001)
        yield poller
    assert poller.failed is None


def test_a_polling_reader_sees_whole_states_only_and_never_goes_back(store: Warehouse, settings: Settings) -> None:
    fill(store)
    store.promote()
    second = Warehouse(settings, "warehouse")
    second.open(SECOND)
    with polling("SELECT count(*), min(n), max(n) FROM items") as poller:
        for lsn in range(11, 40):
            fill(store, n=lsn, lsn=lsn)
            half = [put(ITEMS, lsn, id=number, n=-lsn) for number in range(25)]
            store.apply(batch(lsn, *half, schemas=(ITEMS,), shown=lsn))
            second.apply(batch(lsn, *half, schemas=(ITEMS,), shown=0))
            if lsn % 2:  # and now and then nobody waits for the reader
                eventually("it is seen", lambda lsn=lsn: poller.failed or poller.seen[-1][0] >= Version(1, lsn))
        fill(second, n=40, lsn=40)
        second.promote()
        fill(second, n=41, lsn=41)
        until = time.monotonic() + 60
        while poller.seen[-1][0] < Version(1, 41) and time.monotonic() < until and poller.failed is None:
            time.sleep(0.001)
    second.close()
    versions = [version for version, _ in poller.seen]
    assert versions == sorted(versions)
    assert versions[-1] == Version(1, 41)
    for version, rows in poller.seen:
        n = 0 if version.lsn == 10 else version.lsn
        assert rows == [[50, n, n]], version
    assert len(set(versions)) > 10


def test_the_live_one_goes_on_while_another_loads(store: Warehouse, settings: Settings) -> None:
    fill(store)
    store.promote()
    second = Warehouse(settings, "warehouse")
    second.open(SECOND)
    loading = threading.Event()

    def load() -> None:
        for lsn in range(1, 16):
            rows = [put(ITEMS, lsn, id=lsn * 10_000 + number, n=number, price="1.00") for number in range(10_000)]
            second.apply(batch(lsn, *rows, schemas=(ITEMS,), shown=0))
        loading.set()

    loader = threading.Thread(target=load)
    start = time.monotonic()
    loader.start()
    lsn, longest = 10, 0.0
    while not loading.is_set():
        lsn, began = lsn + 1, time.monotonic()
        fill(store, n=lsn, lsn=lsn)
        assert ask(address(), "SELECT max(n), count(*) FROM items")["rows"] == [[lsn, 50]]
        longest = max(longest, time.monotonic() - began)
    loader.join()
    took = time.monotonic() - start
    second.apply(batch(1000, schemas=(ITEMS,)))
    second.promote()
    assert ask(address(), "SELECT count(*) FROM items")["rows"] == [[150_000]]
    second.close()
    assert lsn > 15
    assert longest < max(20.0, took / 2)


def test_the_endpoint_outlives_the_generations_and_stops_with_the_process(store: Warehouse) -> None:
    fill(store)
    store.promote()
    store.close()
    assert ask(address(), "SELECT count(*) FROM items")["rows"] == [[50]]
    at = address()
    endpoint.stop()
    with pytest.raises(Transient) as raised:
        ask(at, "SELECT 1")
    assert "headrace run warehouse" in raised.value.remedy
