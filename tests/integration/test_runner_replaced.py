"""Two processes for one view: one goes on, and the other says nothing over it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

import pytest

from headrace.change import Change
from headrace.effects import EffectConsumer
from headrace.settings import Settings
from headrace.waiting import reached
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.plain import Plain
from tests.fixtures.runners import Served, wait_for
from tests.fixtures.serving import said


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
    for module in ("runner.runner", "control"):
        monkeypatch.setattr(f"headrace.{module}.DEAD_SECONDS", 3.0)
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
    wait_for(lambda: (its := first.report(1)).phase == "live" and its.version == last.version)
    assert first.runner.failed() is None
