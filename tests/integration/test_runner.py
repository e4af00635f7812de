"""The runner: generations that are built, promoted, rolled back and dropped beside readers who see none of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from headrace.change import CREATE, NOWHERE, Change, Position, Version
from headrace.consumer import Batch, Generation
from headrace.control import Control
from headrace.errors import Misconfigured
from headrace.fingerprint import fingerprint
from headrace.log import Log
from headrace.settings import Settings
from tests.fixtures.feed import ITEMS, Feed, writing
from tests.fixtures.meanwhile import over_and_over
from tests.fixtures.plain import Plain
from tests.fixtures.runners import Picky, Served, wait_for


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
    served.await_phase(1, "off")
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
    control = Control(Log(settings))
    with over_and_over(lambda: seen.append(view.rows()['{"id":1}'])), writing(feed):
        for generation in (2, 3):
            control.ask("plain", "rebuild")
            served.await_phase(generation, "following")
            control.ask("plain", "promote", {"generation": generation})
        control.ask("plain", "rollback")
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
    assert [row.value["n"] for row in control.scan("plain", 2)] == [10]
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
