"""The runner: generations that are built, promoted, rolled back and dropped beside readers who see none of it."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from headrace import codec
from headrace.change import CREATE, NOWHERE, Change, Position, Version
from headrace.consumer import Batch, Cursor, Generation, ViewRow
from headrace.control import DEAD_SECONDS, PAGE_BYTES, Control, Report
from headrace.effects import EffectConsumer
from headrace.errors import HeadraceError, Misconfigured, Poison, Transient
from headrace.fingerprint import fingerprint
from headrace.log import Log
from headrace.log.plain import PlainWriter
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import ANSWERS, CONTROL
from headrace.runner import Runner
from headrace.settings import Settings
from headrace.waiting import reached
from tests.fixtures.capture import PATIENCE
from tests.fixtures.feed import ITEMS, Feed, writing
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, drive, said, serving


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until `what()` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {seconds} s")
        time.sleep(0.02)


class Served:
    """A runner in a thread of the test's process, as `headrace run` drives it."""

    def __init__(self, settings: Settings, consumer: type[Plain], name: str, **beside: type[Plain]) -> None:
        self.log = Log(settings)
        self.control = Control(self.log)
        self.runner = Runner(self.log, self.control, name, consumer)
        self.name = name
        self._stopping = threading.Event()
        runners = {each: Runner(self.log, self.control, each, made) for each, made in beside.items()}
        runners[name] = self.runner
        self._thread = threading.Thread(target=drive, args=(self.control, runners, self._stopping), daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(60)

    def report(self, generation: int) -> Report:
        found = [report for report in self.control.reports().get(self.name, []) if report.generation == generation]
        return found[0] if found else Report(self.name, generation, phase="none")

    def await_phase(self, generation: int, *phases: str) -> Report:
        deadline = time.monotonic() + PATIENCE
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

    def start(consumer: type[Plain] = Plain, name: str = "plain", **beside: type[Plain]) -> Served:
        started.append(Served(settings, consumer, name, **beside))
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
    control = Control(Log(settings))
    control.keep("plain", "shown", {"generations": [], "left": []})  # it was killed before it had kept that
    control.flush(10)
    runner = serve()
    wait_for(lambda: view.rows() == {'{"id":1}': 10, '{"id":2}': 20})
    assert runner.runner.generations.workers[1].shown
    assert view.generations() == [replace(generation, live=True)]
    assert runner.await_phase(1, "live").live


def test_a_rebuild_stands_beside_the_live_one_until_promoted(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    view = Plain(settings, "plain")
    feed.cut(*((ITEMS, n, n) for n in range(50)))
    served = serve()
    served.await_phase(1, "live")
    assert len(view.rows()) == 50
    control = Control(Log(settings))
    assert control.ask("plain", "rebuild") == {"generation": 2}
    served.await_phase(2, "following")
    assert not served.runner.generations.workers[2].shown
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

    def read() -> None:
        while not stopping.is_set():
            seen.append(view.rows()['{"id":1}'])

    reader = threading.Thread(target=read)
    reader.start()
    try:
        control = Control(Log(settings))
        with writing(feed):
            for generation in (2, 3):
                control.ask("plain", "rebuild")
                served.await_phase(generation, "following")
                control.ask("plain", "promote", {"generation": generation})
            control.ask("plain", "rollback")
    finally:
        stopping.set()
        reader.join(30)
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

    unlucky = 13

    def apply(self, batch: Batch) -> None:
        for change in batch.changes:
            if change.row and change.row["n"] == self.unlucky:
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


class Beside(Plain):
    """In a file of its own."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, name)
        self._path = settings.path("beside.sqlite")


def asked_of(control: Control) -> list[HeadraceError]:
    """Ask in every way for what a stopped view holds; return the errors."""
    errors: list[HeadraceError] = []
    asks: list[Callable[[], object]] = [
        lambda: list(control.scan("picky")),
        lambda: control.rows("picky", 1, [(ITEMS, '{"id":1}')]),
        lambda: control.ask("picky", "promote"),
    ]
    for ask in asks:
        with pytest.raises(HeadraceError) as raised:
            ask()
        errors.append(raised.value)
    return errors


def test_who_asks_a_view_that_poison_stopped_is_told_why(
    feed: Feed, settings: Settings, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its process while that has other consumers to run, and from its last report when it has ended."""
    feed.cut((ITEMS, 1, 10))
    with serving(settings, picky=Picky, beside=Beside) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        wait_for(lambda: control.reports()["picky"][0].phase == "stopped")
        scan, rows, _ = asked_of(control)
        assert [error.code for error in (scan, rows)] == ["unlucky", "unlucky"]
    served = serve(Picky, "picky")
    wait_for(lambda: not served.alive)
    for seconds in (DEAD_SECONDS, 0.0):
        monkeypatch.setattr("headrace.control.DEAD_SECONDS", seconds)
        for error in asked_of(Control(feed.log)):
            assert error.code == "unlucky"
            assert '{"id":2}' in error.message
            assert "Change the row." in error.remedy
            assert "headrace run picky" in error.remedy


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


def test_a_stopped_build_can_be_gone_on_with_and_dropped(
    feed: Feed, settings: Settings, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Picky, "unlucky", None)
    view = Plain(settings, "picky")
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 13))
    served = serve(Picky, "picky")
    served.await_phase(1, "live")
    control = Control(Log(settings))

    def build(number: int, phase: str) -> None:
        assert control.ask("picky", "rebuild") == {"generation": number}
        served.await_phase(number, phase)

    monkeypatch.setattr(Picky, "unlucky", 13)
    build(2, "stopped")
    monkeypatch.setattr(Picky, "unlucky", None)
    build(2, "following")
    assert control.ask("picky", "drop", {"generation": 2}) == {"dropped": [2]}
    monkeypatch.setattr(Picky, "unlucky", 13)
    build(2, "stopped")
    assert control.ask("picky", "drop", {"generation": 2}) == {"dropped": [2]}
    assert [generation.number for generation in view.generations()] == [1]
    assert [report.generation for report in control.reports()["picky"]] == [1]


def test_who_looks_right_after_a_build_or_a_view_goes_on_hears_no_reason_of_before(
    feed: Feed, settings: Settings, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `rebuild --wait` does, and `resume` and then `wait`."""
    monkeypatch.setattr(Picky, "unlucky", None)
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 13))
    served = serve(Picky, "picky")
    served.await_phase(1, "live")
    control = Control(Log(settings))

    def phases() -> dict[int, str]:
        return {report.generation: report.phase for report in control.running("picky")}

    monkeypatch.setattr(Picky, "unlucky", 13)
    assert control.ask("picky", "rebuild") == {"generation": 2}
    served.await_phase(2, "stopped")
    monkeypatch.setattr(Picky, "unlucky", None)
    assert control.ask("picky", "rebuild") == {"generation": 2}
    assert phases()[2] != "stopped"
    served.await_phase(2, "following")
    control.ask("picky", "pause")
    for number in (1, 2):
        served.await_phase(number, "paused")
    control.ask("picky", "resume")
    assert "paused" not in phases().values()
    served.await_phase(1, "live")


class Steady(Plain):
    """Takes its time for each batch."""

    def apply(self, batch: Batch) -> None:
        time.sleep(0.1)
        super().apply(batch)


def test_a_build_says_how_long_it_still_takes(feed: Feed, settings: Settings) -> None:
    feed.cut(*((ITEMS, n, n) for n in range(500)))
    served = Served(replace(settings, batch_records=10), Steady, "steady")
    told: list[float] = []

    def ended() -> bool:
        report = served.report(1)
        told.append(report.eta)
        return report.phase == "live"

    try:
        wait_for(ended, 60)
    finally:
        served.stop()
    estimates = [eta for eta in told if eta >= 0]
    assert len(set(estimates)) >= 3, "it is not known in the first second"
    assert estimates[0] > estimates[-1] >= 0
    assert told[-1] == -1, "nothing is left"


class Slow(Plain):
    """Waits before it is promoted by hand."""

    may: threading.Event
    waits: threading.Event

    def promote(self) -> None:
        self.waits.set()
        self.may.wait(30)
        super().promote()


def test_a_process_reports_while_a_request_waits(
    feed: Feed, settings: Settings, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slow, "may", threading.Event(), raising=False)
    monkeypatch.setattr(Slow, "waits", threading.Event(), raising=False)
    feed.cut((ITEMS, 1, 10))
    Slow.may.set()
    served = serve(Slow, "slow")
    served.await_phase(1, "live")
    control = Control(Log(settings))
    control.ask("slow", "rebuild")
    served.await_phase(2, "following")
    Slow.may.clear()
    Slow.waits.clear()
    asking = threading.Thread(target=control.ask, args=("slow", "promote"))
    asking.start()
    assert Slow.waits.wait(20)

    def reports() -> int:
        records = read_to_end(settings, {(CONTROL, 0): BEGINNING})
        return sum(b'"report"' in record.key for record in records if settings.source.encode() in record.key)

    before = reports()
    wait_for(lambda: reports() >= before + 6, 20)
    Slow.may.set()
    asking.join(30)
    assert served.await_phase(2, "live")


class Closed(Plain):
    """Its server refuses it."""

    def generations(self) -> list[Generation]:
        raise Misconfigured("plain-refused", "The plain store refuses NAME.", "Run: headrace mend NAME")


def test_a_consumer_whose_store_refuses_it_does_not_end_those_beside_it(feed: Feed, settings: Settings) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 10))
    with serving(settings, closed=Closed, plain=Plain) as control:
        wait_for(view.rows)
        wait_for(lambda: "closed" in control.reports())
        feed.cut((ITEMS, 2, 20))
        wait_for(lambda: len(view.rows()) == 2)
        (report,) = control.reports()["closed"]
    assert (report.phase, report.code, report.remedy) == ("stopped", "plain-refused", "Run: headrace mend closed")


def test_a_second_process_that_is_refused_by_the_store_leaves_no_report_beside_the_first(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    feed.cut((ITEMS, 1, 10))
    first = serve()
    first.await_phase(1, "live")
    second = serve(Closed)
    wait_for(lambda: not second.alive)
    assert [(report.generation, report.phase) for report in first.control.reports()["plain"]] == [(1, "live")]
    first.stop()
    third = serve(Closed)
    wait_for(lambda: not third.alive)
    assert third.report(0).code == "plain-refused", "with nobody else it is its last word"


def test_a_request_that_was_given_up_is_not_carried_out_by_the_next_runner(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    feed.cut((ITEMS, 1, 10))
    served = serve()
    served.await_phase(1, "live")
    served.stop()
    control = Control(feed.log)
    control._request("plain", "1", {"verb": "rebuild", "args": {}, "timeout": 0})
    served = serve()
    served.await_phase(1, "live")
    assert len(list(control.scan("plain"))) == 1  # requests are carried out in order
    assert [generation.number for generation in Plain(settings, "plain").generations()] == [1]
    box = control.requests(["plain"])
    wait_for(lambda: box.poll(0.1) or box._caught_up)
    assert not box.poll(0.1)
    box.close()


def test_a_wait_at_the_start_leaves_no_report_behind(
    feed: Feed, settings: Settings, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its store away a runner does not know its generations, and reports as generation 0."""
    feed.cut((ITEMS, 1, 10))
    served = serve()
    served.await_phase(1, "live")
    served.stop()
    monkeypatch.setattr(Plain, "away", True)
    served = serve()
    served.await_phase(0, "waiting")
    served.stop()
    monkeypatch.setattr(Plain, "away", False)
    served = serve()
    wait_for(lambda: [report.generation for report in served.control.reports()["plain"]] == [1])


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
    assert report.reason == f"stale since 0/{first.version.lsn:X}, built by other code: run headrace rebuild plain"
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


class Times(Plain):
    """Multiplies by what a file of its fingerprint says when it is made."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, name)
        self._times = int(self.file.read_text())

    file: ClassVar[Path]

    @classmethod
    def fingerprint_files(cls) -> list[Path]:
        return [cls.file]

    def apply(self, batch: Batch) -> None:
        rows = ({**change.row, "n": change.row["n"] * self._times} for change in batch.changes if change.row)
        pairs = zip(batch.changes, rows, strict=True)
        super().apply(replace(batch, changes=[change._replace(row=row) for change, row in pairs]))


@pytest.mark.parametrize("saved", ["2", "", None])
def test_a_view_that_comes_back_does_not_go_on_with_a_file_that_was_saved_meanwhile(
    feed: Feed, settings: Settings, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, saved: str | None
) -> None:
    """Also with one that is half written, or gone, which its plugin cannot read."""
    Times.file = settings.path("times")
    Times.file.write_text("1")
    view = Plain(settings, "times")
    feed.cut((ITEMS, 1, 10))
    served = serve(Times, "times")
    served.await_phase(1, "live")
    Times.file.unlink() if saved is None else Times.file.write_text(saved)
    monkeypatch.setattr(Plain, "away", True)
    feed.cut((ITEMS, 2, 20))
    served.await_phase(1, "waiting")
    monkeypatch.setattr(Plain, "away", False)
    report = served.await_phase(1, "stopped")
    assert (report.code, report.remedy) == ("other-code", "Start its process again.")
    wait_for(lambda: not served.alive)
    assert view.rows() == {'{"id":1}': 10}
    Times.file.write_text("2")
    served = serve(Times, "times")
    served.await_phase(1, "stale")
    served.control.ask("times", "rebuild")
    served.await_phase(2, "following")
    served.control.ask("times", "promote")
    assert view.rows() == {'{"id":1}': 20, '{"id":2}': 40}


def feed_position(feed: Feed) -> Position:
    reader = feed.log.reader([ITEMS], None)
    while True:
        batch = reader.poll(0.2)
        if batch is not None and batch.complete:
            reader.close()
            return batch.position


def take_for_another_log(view: Plain, index: int, feed: Feed) -> None:
    """Let one of its generations have a position of another log."""
    position = feed_position(feed)
    position.topics = dict.fromkeys(position.topics, "another")
    view.open(view.generations()[index])
    view.apply(Batch([], position, None, loading=False))


def test_a_refused_build_still_answers_when_the_next_one_is_begun(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 10))
    served = serve()
    served.await_phase(1, "live")
    control = Control(Log(settings))
    control.ask("plain", "rebuild")
    served.await_phase(2, "following")
    served.stop()
    take_for_another_log(view, 1, feed)
    served = serve()
    served.await_phase(2, "stopped")
    assert control.ask("plain", "rebuild") == {"generation": 3}
    assert [row.value["n"] for row in control.scan("plain", 2, timeout=10)] == [10]
    assert control.ask("plain", "drop", {"generation": 2}) == {"dropped": [2]}


def test_a_position_of_another_log_is_refused_and_waits_for_a_rebuild(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 10))
    served = serve()
    served.await_phase(1, "live")
    served.stop()
    take_for_another_log(view, 0, feed)
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


def test_a_build_that_stood_still_for_too_long_begins_again_from_zero(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    """S19: it had read a row that was deleted meanwhile, and the tombstone has been compacted away too."""
    feed.cut((ITEMS, 1, 10))
    half = replace(feed_position(feed), version=NOWHERE, appended=int(time.time() * 1000) - 8 * 24 * 3_600_000)
    ghost = Change(ITEMS, CREATE, b'{"id":9}', {"id": 9, "n": 90}, Version(1, 50), 0, 7, 1, 0, 0)
    view = Plain(settings, "plain")
    view.open(Generation("plain", 1, fingerprint(Plain)))
    view.apply(Batch([ghost], half, None, loading=True))
    feed.cut((ITEMS, 2, 20))
    served = serve()
    served.await_phase(1, "live")
    assert view.rows() == {'{"id":1}': 10, '{"id":2}': 20}


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
    rows = {codec.loads(row.key)["id"]: row.value for row in control.scan("plain", timeout=10)}
    assert {id_: len(row["wide"]) for id_, row in rows.items()} == sizes
    wanted = [(ITEMS, f'{{"id":{n}}}') for n in sizes]
    _, some = control.rows("plain", 1, wanted, timeout=10)
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
        list(Control(Log(settings)).scan("broken", timeout=10))
    assert served.await_phase(1, "live")


def test_a_record_that_kafka_refuses_is_not_silently_lost(feed: Feed, settings: Settings) -> None:
    """The topic takes one megabyte, the client more."""
    feed.log.topics.make({f"{settings.source}.narrow": (1, {"max.message.bytes": "1000000"})})
    with pytest.raises(HeadraceError):
        PlainWriter(settings).write(f"{settings.source}.narrow", b"k", os.urandom(2_000_000), seconds=5)


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


class Unmade(Plain):
    """Cannot be made."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, name)
        raise KeyError("MINE_TOKEN")


class Unread(Plain):
    """Names a file of its code that cannot be read."""

    @classmethod
    def fingerprint_files(cls) -> list[str]:
        raise KeyError("MINE_TOKEN")


@pytest.mark.parametrize("faulty", [Unmade, Unread])
def test_a_plugin_that_cannot_be_made_stops_alone_and_says_why(
    feed: Feed, settings: Settings, faulty: type[Plain]
) -> None:
    feed.cut((ITEMS, 1, 1))
    with serving(settings, mine=faulty, plain=Plain) as control:
        await_live(control, "plain")
        wait_for(lambda: control.reports().get("mine"))
        (report,) = control.reports()["mine"]
        assert (report.generation, report.phase, report.code) == (0, "stopped", "consumer-failed")
        assert "MINE_TOKEN" in report.reason
        assert Plain(settings, "plain").rows() == {'{"id":1}': 1}


class Told(EffectConsumer):
    """Knows when another process has taken it over, as stores with servers do."""

    tables = (ITEMS,)

    def effect(self, changes: Sequence[Change]) -> None:
        pass


def test_who_was_put_aside_says_nothing_over_who_took_the_view_over(
    feed: Feed, settings: Settings, serve: Callable[..., Served]
) -> None:
    """A rolling deployment starts the second before the first ends: whoever waits must not hear that the view has stopped."""
    feed.cut((ITEMS, 1, 10))
    first = serve(Told, "told")
    wait_for(lambda: first.report(1).live)
    second = serve(Told, "told")
    wait_for(lambda: second.runner.phases().get("told-g1") == "live")
    last = feed.cut((ITEMS, 2, 20))
    wait_for(lambda: not first.alive)
    assert "Another process" in first.runner.phases()["told-g1"]
    assert reached(second.control, "told", last.version, 20).phase == "live"
    assert not {"stopped", "off"} & set(said(settings, "told"))


class ToldAnew(Told):
    """Other code."""


@pytest.mark.parametrize("beside", [{}, {"plain": Plain}])
def test_who_was_taken_over_has_no_more_part_in_the_view(
    feed: Feed, settings: Settings, serve: Callable[..., Served], beside: dict[str, type[Plain]]
) -> None:
    """Its generation of older code writes nothing, so nothing takes that away from it; and another view keeps its process up."""
    feed.cut((ITEMS, 1, 10))
    old = serve(Told, "told")
    wait_for(lambda: old.report(1).live)
    old.stop()
    first = serve(ToldAnew, "told", **beside)
    first.await_phase(1, "stale")
    assert first.control.ask("told", "rebuild") == {"generation": 2}
    first.await_phase(2, "following")
    first.control.ask("told", "promote")
    second = serve(ToldAnew, "told")
    wait_for(lambda: second.runner.phases().get("told-g2") == "live")
    feed.cut((ITEMS, 2, 20))
    mine = first.runner.generations.workers
    wait_for(lambda: not any(worker.is_alive() for worker in mine.values()))
    assert second.control.ask("told", "rebuild") == {"generation": 3}
    second.await_phase(3, "following")
    assert second.control.ask("told", "promote")["before"] == 2
    wait_for(lambda: second.report(3).live)
    assert second.report(1).phase == "stale"
    assert sorted(mine) == [1, 2]
    if beside:
        assert first.alive
        assert "Another process" in str(first.runner.failed())
        assert second.control.ask("told", "rollback")["generation"] == 2
        second.stop()
        first.await_phase(2, "live")  # each of two may have stopped the other: who is left goes on
        assert first.runner.failed() is None
        first.await_phase(3, "following")
        assert first.report(3).facts["left"]
        assert first.control.ask("told", "rebuild") == {"generation": 4}
    else:
        wait_for(lambda: not first.alive)


def test_of_two_that_have_put_each_other_aside_one_goes_on(
    feed: Feed, settings: Settings, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has opened a generation of the other's, so neither says anything any more, and neither has said that it ends."""
    monkeypatch.setattr("headrace.runner.runner.DEAD_SECONDS", 1.0)
    monkeypatch.setattr("headrace.runner.runner._ASK_SECONDS", 0.5)
    feed.cut((ITEMS, 1, 10))
    first = serve(Told, "told", plain=Plain)
    wait_for(lambda: first.report(1).live)
    second = serve(Told, "told")
    wait_for(lambda: second.runner.phases().get("told-g1") == "live")
    with sqlite3.connect(settings.path(f"{settings.source}/told-effects.sqlite")) as connection:
        connection.execute("UPDATE generations SET owner = 'another'")
    last = feed.cut((ITEMS, 2, 20))
    wait_for(lambda: not second.alive)
    assert not second.report(1).ended
    assert reached(first.control, "told", last.version, 20).phase == "live"
    assert first.runner.failed() is None
