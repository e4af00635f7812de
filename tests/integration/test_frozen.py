"""A process that was frozen, and wakes when another one runs its view."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from headrace.control import Control
from headrace.log import Log
from headrace.requests import Request
from headrace.runner import Runner
from headrace.settings import Settings
from headrace.waiting import reached
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving

KEY = '{"id":1}'


class Frozen:
    """A process of `plain` that is driven by hand: between two calls it is frozen, as long as they say."""

    def __init__(self, settings: Settings) -> None:
        log = Log(settings)
        self.control = Control(log)
        plain: type[Any] = Plain
        self.runner = Runner(log, self.control, "plain", plain)

    def tick(self) -> dict[str, str]:
        """Look and report once; return the phases."""
        self.runner.look()
        self.runner.report()
        return self.runner.phases()

    def ask(self, verb: str, **args: Any) -> None:
        self.runner.handle(Request(verb, verb, args, int(time.time() * 1000), 30.0))

    def wake(self, seconds: float) -> None:
        """Go on after so long; control has nothing to say to it."""
        self.runner._reported -= seconds
        self.tick()


@pytest.fixture
def feed(settings: Settings) -> Feed:
    return Feed(settings)


@pytest.fixture
def frozen(feed: Feed, settings: Settings) -> Iterator[Frozen]:
    feed.cut((ITEMS, 1, 1))
    made = Frozen(settings)

    def live() -> bool:
        made.tick()
        return Plain(settings, "plain").rows() == {KEY: 1}

    eventually("it is live", live)
    made.tick()
    yield made
    made.runner.stop()


def built_beside(frozen: Frozen, control: Control) -> None:
    """Let the other process take the paused view over, and build and promote its second generation."""
    eventually("the other is there", lambda: control.reports()["plain"][0].process != frozen.runner._process)
    control.ask("plain", "resume")
    control.ask("plain", "rebuild")
    eventually("it is built", lambda: [each.phase for each in control.reports()["plain"]] == ["live", "following"])
    control.ask("plain", "promote")


def test_who_wakes_does_not_drop_again_what_another_process_has_begun_anew(
    frozen: Frozen, feed: Feed, settings: Settings
) -> None:
    """It was frozen when its view had just been dropped."""
    frozen.ask("drop", all=True)
    with serving(settings, plain=Plain) as control:
        eventually("the other is there", lambda: {"dropped"} == {each.phase for each in control.reports()["plain"]})
        control.ask("plain", "rebuild")
        await_live(control, "plain")
        frozen.tick()
        assert Plain(settings, "plain").rows() == {KEY: 1}
        failed = frozen.runner.failed()
        assert failed is not None
        assert failed.code == "view-taken-over"
        last = feed.cut((ITEMS, 1, 2))
        assert reached(control, "plain", last.version, 60).phase == "live"


def test_who_wakes_lets_a_view_that_stands_still_to_the_process_that_runs_it(
    frozen: Frozen, feed: Feed, settings: Settings
) -> None:
    """What is paused writes nothing to its store, and would not be told there that the view is another's by now."""
    frozen.ask("pause")
    with serving(settings, plain=Plain) as control:
        built_beside(frozen, control)
        frozen.wake(60)
        failed = frozen.runner.failed()
        assert failed is not None
        assert failed.code == "view-taken-over"
        last = feed.cut((ITEMS, 1, 2))
        assert reached(control, "plain", last.version, 60).phase == "live"
        assert "paused" not in {each.phase for each in control.reports()["plain"]}
    frozen.wake(60)
    left = {"plain-g1": "following", "plain-g2": "live"}
    eventually("it goes on when that has ended, as that has left it", lambda: frozen.tick() == left)


def test_who_ends_as_it_wakes_says_nothing_of_a_view_that_another_process_runs(
    frozen: Frozen, settings: Settings
) -> None:
    """It is told to end while it is frozen: what it knows as live may have been dropped since."""
    frozen.ask("pause")
    with serving(settings, plain=Plain) as control:
        built_beside(frozen, control)
        control.ask("plain", "drop")
        eventually("the old one is gone", lambda: [each.generation for each in control.reports()["plain"]] == [2])
        frozen.runner._reported -= 60
        frozen.runner.stop()
        assert [(each.generation, each.ended) for each in control.reports()["plain"]] == [(2, False)]
