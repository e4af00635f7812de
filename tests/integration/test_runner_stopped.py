"""A consumer that stops, waits or never began: the others go on, and who asks it hears why."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from headrace.change import NOWHERE
from headrace.consumer import Generation
from headrace.control import DEAD_SECONDS, Control
from headrace.errors import HeadraceError, Misconfigured, Poison
from headrace.log import Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import CONTROL
from headrace.settings import Settings
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.plain import Plain
from tests.fixtures.runners import Picky, Served, wait_for
from tests.fixtures.serving import await_live, serving


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
    wait_for(lambda: [(each.generation, each.phase) for each in first.control.reports()["plain"]] == [(1, "live")])
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
