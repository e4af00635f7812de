"""Reports and requests whose sender has another clock, waits no longer, or was killed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from headrace.control import Control, Report, record_key
from headrace.errors import Transient
from headrace.log import Log
from headrace.log.topics import CONTROL
from headrace.requests import Request
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving
from tests.fixtures.statuses import say, status


class Clock:
    """A clock that is ahead, or behind, until it is set right; `passed` seconds have passed then."""

    def __init__(self, ahead: float) -> None:
        self.ahead = ahead
        self.passed = 0.0

    def time(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


@pytest.mark.parametrize("ahead", [15.0, -15.0])
def test_who_asks_by_another_clock_knows_who_runs_and_who_does_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    Feed(settings).cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        monkeypatch.setattr("headrace.control.time", Clock(ahead))
        other = Control(Log(settings))
        assert [report.live for report in other.running("plain")] == [True]
        assert status(settings, "--check", "plain").stdout == "ok\n"
        assert other.ask("plain", "release") == {}
    say(control, Report("dead", 1, live=True, phase="live"))
    monkeypatch.setattr("headrace.control.DEAD_SECONDS", 3.0)
    monkeypatch.setattr("headrace.control._CLOCK_SECONDS", 0.0)
    eventually("it is dead", lambda: control.reports()["dead"][0].dead)
    assert control.reports()["dead"][0].age < 15  # not by the wrong clock
    assert re.search(rf"1[0-9]\.\d s {'ahead of' if ahead > 0 else 'behind'} the broker's", status(settings).stdout)


def test_a_request_is_carried_out_by_a_process_whose_clock_is_ahead(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Feed(settings).cut((ITEMS, 1, 1))
    monkeypatch.setattr("headrace.requests.time", Clock(60.0))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        assert control.ask("plain", "release", timeout=30.0) == {}


@pytest.mark.parametrize("ahead", [-60.0, 60.0])
def test_a_clock_that_was_set_right_is_believed_a_minute_later(
    settings: Settings, control: Control, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    clock = Clock(ahead)
    monkeypatch.setattr("headrace.requests.time", clock)
    box = control.requests(["plain"])

    def heard() -> list[Request]:
        control._request("plain", "1", {"verb": "any", "args": {}, "timeout": 30.0})
        return [request for _ in range(5) for _, request in box.poll(0.2)]  # its end is heard when nothing more comes

    try:
        eventually("it is known", lambda: any(abs(request.ahead - ahead) < 10 for request in heard()), 20)
        assert abs(control._log.ahead - ahead) < 10
        clock.ahead, clock.passed = 0.0, 61.0
        eventually("it is believed", lambda: any(abs(request.ahead) < 10 for request in heard()), 20)
        assert not any(request.given_up for request in eventually("it is heard", heard))
    finally:
        box.close()


def test_a_cut_that_a_killed_capture_has_left_open_hides_nothing_that_others_say(
    settings: Settings, control: Control
) -> None:
    """Until Kafka ended it, a minute later and more, every view of every source was called dead, and nobody was heard."""
    feed = Feed(settings)
    feed.cut((ITEMS, 1, 1))
    feed.writer.also(CONTROL, record_key(settings.source, "capture", "resnapshot", ITEMS), b"{}")
    feed.writer._flush()
    try:
        with serving(settings, plain=Plain):
            await_live(control, "plain")
            assert control.ask("plain", "release") == {}
        assert control.kept("capture", "resnapshot") == [{}], "what is in it is not there"
    finally:
        feed.writer.abort()


def interrupted(*_: object) -> Iterator[dict[str, object]]:
    raise KeyboardInterrupt


@pytest.mark.parametrize("by", [KeyboardInterrupt, Transient])
def test_what_was_asked_is_taken_back_by_who_no_longer_waits(
    settings: Settings, control: Control, monkeypatch: pytest.MonkeyPatch, by: type[BaseException]
) -> None:
    """Else it would be carried out when the process comes to it, up to two minutes later."""
    say(control, Report("busy", 1, live=True, phase="live"))
    if by is KeyboardInterrupt:
        monkeypatch.setattr("headrace.control._values", interrupted)
    with pytest.raises(by):
        control.ask("busy", "drop", {"all": True}, timeout=0.5)
    box = control.requests(["busy"])
    try:
        read: list[tuple[str, str]] = []

        def look() -> bool:
            read.extend((name, request.verb) for name, request in box.poll(0.1))
            return box._caught_up

        eventually("control is read", look)
        read += [(name, request.verb) for _ in range(20) for name, request in box.poll(0.1)]
    finally:
        box.close()
    assert not read
