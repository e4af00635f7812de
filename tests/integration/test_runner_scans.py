"""A scan of a generation: every row, while the view reads on; who asked hears why it ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace import codec
from headrace.change import NOWHERE, Position
from headrace.consumer import Batch, Cursor, Generation, ViewRow
from headrace.control import PAGE_BYTES, Control
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.log import Log
from headrace.log.plain import PlainWriter
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import ANSWERS
from headrace.settings import Settings
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.plain import Plain
from tests.fixtures.runners import Picky, Served, wait_for


class Endless(Picky):
    """Has more rows for as long as only 1 is applied."""

    scanned = 0

    def scan(self, after: Cursor | None, limit: int) -> list[ViewRow]:
        type(self).scanned += 1
        if len(self.rows()) > 1 or self.scanned > 2000:
            return []
        first = int(after[1]) + 1 if after else 0
        return [ViewRow(ITEMS, f"{n:09}", {"id": n}, NOWHERE) for n in range(first, first + limit)]


def test_a_view_reads_on_while_it_is_scanned(
    feed: Feed, settings: Settings, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endless, "scanned", 0)
    feed.cut((ITEMS, 1, 10))
    serve(Endless, "endless").await_phase(1, "live")
    rows = Control(feed.log).scan("endless")
    next(rows)
    feed.cut((ITEMS, 2, 20))
    for _ in rows:
        pass
    assert Plain(settings, "endless").rows() == {'{"id":1}': 10, '{"id":2}': 20}
    assert Endless.scanned <= 2000


def test_a_scan_ends_when_who_asked_for_it_leaves(
    feed: Feed, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest would go to Kafka for nobody."""
    monkeypatch.setattr(Endless, "scanned", 0)
    feed.cut((ITEMS, 1, 10))
    serve(Endless, "endless").await_phase(1, "live")
    control = Control(feed.log)
    rows = control.scan("endless")
    next(rows)
    rows.close()  # as Ctrl-C and an error where they are read do
    control.rows("endless", 1, [])  # requests are carried out in order, and so are calls of a worker
    scanned = Endless.scanned
    control.rows("endless", 1, [])
    assert Endless.scanned == scanned


def test_a_scan_in_which_poison_strikes_ends_with_the_reason(
    feed: Feed, settings: Settings, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endless, "scanned", 0)
    feed.cut((ITEMS, 1, 10))
    serve(Endless, "endless").await_phase(1, "live")
    rows = Control(feed.log).scan("endless")
    next(rows)
    feed.cut((ITEMS, 2, 13))
    with pytest.raises(HeadraceError) as told:
        list(rows)
    assert told.value.code == "unlucky"


def test_scan_gives_every_row_of_a_generation(feed: Feed, settings: Settings, serve: Callable[..., Served]) -> None:
    view = Plain(settings, "plain")
    last = feed.cut(*((ITEMS, n, n) for n in range(1200)))
    serve().await_phase(1, "live")
    assert len(view.rows()) == 1200
    rows = list(Control(Log(settings)).scan("plain"))
    assert [row.key for row in rows] == sorted(row.key for row in rows)
    assert {row.key: row.value["n"] for row in rows} == view.rows()
    assert {row.version.lsn for row in rows} == {last.version.lsn - 10}


def test_rows_of_any_size_come_through_a_scan_and_by_their_keys(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    """More than Kafka takes as one record, and some that are more by themselves than a topic takes by default."""
    view = Plain(settings, "plain")
    sizes = {n: 10 if n % 4 else 300_000 for n in range(40)} | {7: 3_000_000}
    for number in sizes:
        feed.put(ITEMS, number, number)
    feed.seal()
    serve().await_phase(1, "live")
    view.widen(sizes)
    control = Control(Log(settings))
    rows = {codec.loads(row.key)["id"]: row.value for row in control.scan("plain")}
    assert {id_: len(row["wide"]) for id_, row in rows.items()} == sizes
    wanted = [(ITEMS, f'{{"id":{n}}}') for n in sizes]
    _, some = control.rows("plain", 1, wanted)
    assert {codec.loads(key)["id"]: row.value for (_, key), row in some.items()} == rows
    pages = [record.value or b"" for record in read_to_end(settings, {(ANSWERS, 0): BEGINNING})]
    large = [codec.loads(page)["rows"] for page in pages if len(page) > PAGE_BYTES + 100]
    assert [len(page) for page in large] == [1, 1], "the row of 3 MB, by a scan and by its key"


class Opened(Plain):
    opens = 0

    def open(self, generation: Generation) -> Position | None:
        type(self).opens += 1
        return super().open(generation)


def test_a_row_that_no_record_can_hold_is_named_and_the_view_goes_on(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 1), (ITEMS, 2, 2))
    served = serve(Opened)
    served.await_phase(1, "live")
    opens = Opened.opens
    view.widen({2: settings.message_max_bytes + 2 * 1024 * 1024})
    control = Control(Log(settings))
    for ask in (lambda: list(control.scan("plain")), lambda: control.rows("plain", 1, [(ITEMS, '{"id":2}')])):
        with pytest.raises(Misconfigured, match=r'"id":2.*public\.items|public\.items.*"id":2') as caught:
            ask()
        assert caught.value.code == "record-too-large"
        assert "HEADRACE_MESSAGE_MAX_BYTES" in caught.value.remedy
    last = feed.cut((ITEMS, 1, 3))
    wait_for(lambda: served.report(1).version == last.version)
    assert served.report(1).phase == "live"
    assert Opened.opens == opens


class Torn(Plain):
    """Its server goes away between the rows and the position of a batch, and comes back when told."""

    torn: threading.Event
    opens: threading.Event
    may: threading.Event

    def open(self, generation: Generation) -> Position | None:
        if self.torn.is_set():
            self.opens.set()
            self.may.wait(30)
        return super().open(generation)

    def apply(self, batch: Batch) -> None:
        if not batch.loading and not self.torn.is_set():
            with self._open() as connection:
                connection.execute("UPDATE rows SET value = ?", [codec.dumps(batch.changes[-1].row).decode()])
            self.torn.set()
            raise Transient("plain-away", "The plain store is away.", "Wait.")
        super().apply(batch)


def test_rows_that_may_be_newer_than_the_position_are_of_no_version(
    feed: Feed, settings: Settings, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever compares them must not take them for the state at the position."""
    for name in ("torn", "opens", "may"):
        monkeypatch.setattr(Torn, name, threading.Event(), raising=False)
    feed.cut((ITEMS, 1, 10))
    served = serve(Torn, "torn")
    served.await_phase(1, "live")
    last = feed.cut((ITEMS, 1, 11))
    assert Torn.opens.wait(30)
    control, key = Control(Log(settings)), (ITEMS, '{"id":1}')
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(control.rows, "torn", 1, [key])
        wait_for(lambda: not served.runner.generations.workers[1]._calls.empty())
        Torn.may.set()
        version, rows = asked.result()
    assert (version, rows[key].value["n"]) == (NOWHERE, 11)
    wait_for(lambda: control.rows("torn", 1, [key])[0] == last.version)


class Broken(Plain):
    """Cannot be read beyond its first rows."""

    def scan(self, after: Cursor | None, limit: int) -> list[ViewRow]:
        if after is not None:
            raise ValueError("a fault in the plugin")
        return super().scan(after, limit)


def test_a_scan_that_breaks_off_says_why_to_who_asked(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    feed.cut(*((ITEMS, n, n) for n in range(100)))
    served = serve(Broken, "broken")
    served.await_phase(1, "live")
    with pytest.raises(Misconfigured, match="a fault in the plugin"):
        list(Control(Log(settings)).scan("broken"))
    assert served.await_phase(1, "live")


def test_a_record_that_kafka_refuses_is_not_silently_lost(feed: Feed, settings: Settings) -> None:
    """The topic takes one megabyte, the client more."""
    feed.log.topics.make({f"{settings.source}.narrow": (1, {"max.message.bytes": "1000000"})})
    with pytest.raises(HeadraceError):
        PlainWriter(settings).write(f"{settings.source}.narrow", b"k", os.urandom(2_000_000), seconds=5)
