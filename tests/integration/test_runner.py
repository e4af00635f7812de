"""The runner: generations that are built, promoted, rolled back and dropped beside readers who see none of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from headrace.change import NOWHERE, Position
from headrace.consumer import Batch, Generation
from headrace.control import Control, Report
from headrace.errors import Misconfigured, Poison
from headrace.log import Log
from headrace.runner import Runner
from headrace.settings import Settings
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.plain import Plain


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until `what()` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {seconds} s")
        time.sleep(0.02)


class Served:
    """A runner in a thread of the test's process, as `headrace run` drives it."""

    def __init__(self, settings: Settings, consumer: type[Plain] = Plain, name: str = "plain") -> None:
        self.log = Log(settings)
        self.control = Control(self.log)
        self.runner = Runner(self.log, self.control, name, consumer)
        self.name = name
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        box = self.control.requests([self.name])
        ticked = 0.0
        while not self._stopping.is_set():
            if time.monotonic() - ticked > 0.3:
                ticked = time.monotonic()
                self.runner.tick()
            for _, request in box.poll(0.1):
                self.runner.handle(request)
        box.close()
        self.runner.stop()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(60)

    def report(self, generation: int) -> Report:
        found = [report for report in self.control.reports().get(self.name, []) if report.generation == generation]
        return found[0] if found else Report(self.name, generation, phase="none")

    def await_phase(self, generation: int, *phases: str) -> Report:
        deadline = time.monotonic() + 20
        while (report := self.report(generation)).phase not in phases:
            assert time.monotonic() < deadline, f"{report} is not {phases}"
            time.sleep(0.05)
        return report


@pytest.fixture
def feed(settings: Settings) -> Feed:
    return Feed(settings)


@pytest.fixture
def serve(settings: Settings) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(consumer: type[Plain] = Plain, name: str = "plain") -> Served:
        started.append(Served(settings, consumer, name))
        return started[-1]

    yield start
    for served in started:
        served.stop()


def test_the_first_build_promotes_itself_and_follows(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    served = serve()
    wait_for(lambda: view.rows() == {'{"id":1}': 10, '{"id":2}': 20})
    last = feed.cut((ITEMS, 1, None), (ITEMS, 3, 30))
    wait_for(lambda: view.rows() == {'{"id":2}': 20, '{"id":3}': 30})
    report = served.await_phase(1, "live")
    wait_for(lambda: served.report(1).version == last.version)
    assert report.live
    assert served.report(1).lag == (0, 0, 0.0)


def test_a_restarted_runner_goes_on_where_the_store_says(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 10))
    served = serve()
    wait_for(lambda: view.rows() == {'{"id":1}': 10})
    served.stop()
    assert served.report(1).phase == "off"
    feed.cut((ITEMS, 2, 20))
    generation = view.generations()[0]
    runner = serve()
    wait_for(lambda: view.rows() == {'{"id":1}': 10, '{"id":2}': 20})
    assert view.generations() == [replace(generation, live=True)]
    assert runner.await_phase(1, "live").live


def test_a_rebuild_stands_beside_the_live_one_until_promoted(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    view = Plain(settings, "plain")
    feed.cut(*((ITEMS, n, n) for n in range(50)))
    served = serve()
    served.await_phase(1, "live")
    control = Control(Log(settings))
    assert control.ask("plain", "rebuild") == {"generation": 2}
    served.await_phase(2, "following")
    assert control.ask("plain", "rebuild") == {"generation": 2}, "a build that is going on is gone on with"
    assert [g.live for g in view.generations()] == [True, False]
    control.ask("plain", "promote", {"generation": 2})
    assert [g.live for g in view.generations()] == [False, True]
    feed.cut((ITEMS, 7, None))
    wait_for(lambda: len(view.rows()) == 49)
    # The one before goes on following, so a rollback takes nobody back in time.
    control.ask("plain", "rollback")
    assert [g.live for g in view.generations()] == [True, False]
    assert len(view.rows()) == 49
    with pytest.raises(Misconfigured, match="live"):
        control.ask("plain", "drop", {"generation": 1})
    assert control.ask("plain", "drop", {"generation": 2}) == {"dropped": [2]}
    assert [g.number for g in view.generations()] == [1]
    assert "2" not in [str(report.generation) for report in control.reports()["plain"]]


def test_readers_never_go_back_in_time_over_promotions(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 0))
    served = serve()
    served.await_phase(1, "live")  # rows are there before the first report is
    seen: list[int] = []
    stopping = threading.Event()

    def write() -> None:
        number = 0
        while not stopping.is_set():
            number += 1
            feed.cut((ITEMS, 1, number))

    def read() -> None:
        while not stopping.is_set():
            seen.append(view.rows()['{"id":1}'])

    threads = [threading.Thread(target=write), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    try:
        control = Control(Log(settings))
        for generation in (2, 3):
            control.ask("plain", "rebuild")
            served.await_phase(generation, "following")
            control.ask("plain", "promote", {"generation": generation})
        control.ask("plain", "rollback")
    finally:
        stopping.set()
        for thread in threads:
            thread.join(30)
    assert seen == sorted(seen)
    assert seen[-1] > 0


def test_a_view_that_was_wiped_rebuilds_itself(feed: Feed, settings: Settings, serve: Callable[..., Served]) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 10))
    serve()
    wait_for(lambda: view.rows() == {'{"id":1}': 10})
    view.wipe()
    feed.cut((ITEMS, 2, 20))
    wait_for(lambda: view.rows() == {'{"id":1}': 10, '{"id":2}': 20})


def test_a_store_that_is_away_is_waited_for(
    feed: Feed, settings: Settings, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 10))
    served = serve()
    served.await_phase(1, "live")
    monkeypatch.setattr(Plain, "away", True)
    feed.cut((ITEMS, 2, 20))
    report = served.await_phase(1, "waiting")
    assert (report.code, report.remedy) == ("plain-away", "Wait.")
    monkeypatch.setattr(Plain, "away", False)
    wait_for(lambda: len(view.rows()) == 2)


class Picky(Plain):
    """Cannot apply n = 13."""

    def apply(self, batch: Batch) -> None:
        for change in batch.changes:
            if change.row and change.row["n"] == 13:
                raise Poison("unlucky", f"{change.key.decode()} at offset {change.offset} has 13.", "Change the row.")
        super().apply(batch)


def test_poison_stops_the_consumer_and_loses_nothing(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    view = Plain(settings, "picky")
    feed.cut((ITEMS, 1, 10))
    served = serve(Picky, "picky")
    served.await_phase(1, "live")
    feed.cut((ITEMS, 2, 13), (ITEMS, 3, 30))
    report = served.await_phase(1, "stopped")
    assert report.code == "unlucky"
    assert '{"id":2}' in report.reason
    assert f"See {ITEMS} partition 0 offset" in report.reason
    assert view.rows() == {'{"id":1}': 10}, "nothing of the batch was applied"
    assert isinstance(served.runner.failed(), Poison)


def test_new_code_leaves_the_live_view_readable_and_still(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    view = Plain(settings, "plain")
    first = feed.cut((ITEMS, 1, 10))
    view.open(Generation("plain", 1, "older code"))
    view.apply(Batch([], feed_position(feed), None, loading=False))
    view.promote()
    served = serve()
    feed.cut((ITEMS, 1, 11))
    report = served.await_phase(1, "stale")
    assert "rebuild plain" in report.reason
    assert view.version(1) == first.version
    control = Control(Log(settings))
    assert control.ask("plain", "rebuild") == {"generation": 2}
    served.await_phase(2, "following")
    assert view.rows() == {}, "the stale one is still what readers see"
    control.ask("plain", "promote")
    assert view.rows() == {'{"id":1}': 11}
    with pytest.raises(Misconfigured, match="back in time"):
        control.ask("plain", "rollback")
    control.ask("plain", "rollback", {"stale": True})
    assert [g.live for g in view.generations()] == [True, False]


def feed_position(feed: Feed) -> Position:
    reader = feed.log.reader([ITEMS], None)
    while True:
        batch = reader.poll(0.2)
        if batch is not None and batch.complete:
            reader.close()
            return batch.position


def test_a_position_of_another_log_is_refused_and_waits_for_a_rebuild(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 10))
    served = serve()
    served.await_phase(1, "live")
    served.stop()
    position = feed_position(feed)
    position.topics = dict.fromkeys(position.topics, "another")
    view.open(view.generations()[0])
    view.apply(Batch([], position, None, loading=False))
    served = serve()
    report = served.await_phase(1, "stopped")
    assert report.code == "topic-replaced"
    assert report.remedy == "Run: headrace rebuild plain"
    assert served.runner.failed() is None, "it stays up to be asked"
    control = Control(Log(settings))
    control.ask("plain", "rebuild")
    served.await_phase(2, "following")
    control.ask("plain", "promote")
    assert view.rows() == {'{"id":1}': 10}


def test_scan_gives_every_row_of_a_generation(feed: Feed, settings: Settings, serve: Callable[..., Served]) -> None:
    view = Plain(settings, "plain")
    last = feed.cut(*((ITEMS, n, n) for n in range(1200)))
    serve().await_phase(1, "live")
    rows = list(Control(Log(settings)).scan("plain"))
    assert [row.key for row in rows] == sorted(row.key for row in rows)
    assert {row.key: row.value["n"] for row in rows} == view.rows()
    assert {row.version.lsn for row in rows} == {last.version.lsn - 10}


def test_nobody_running_is_said_with_the_command(feed: Feed, settings: Settings) -> None:
    with pytest.raises(Misconfigured) as caught:
        Control(feed.log).ask("plain", "rebuild")
    assert caught.value.code == "consumer-not-running"
    assert caught.value.remedy == "Run: headrace run plain"


def test_an_unknown_request_is_refused(feed: Feed, settings: Settings, serve: Callable[..., Served]) -> None:
    feed.cut((ITEMS, 1, 10))
    served = serve()
    served.await_phase(1, "live")
    with pytest.raises(Misconfigured, match="does not know"):
        Control(feed.log).ask("plain", "dance")
    assert served.report(1).version != NOWHERE
