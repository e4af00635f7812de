"""Effects that are parked: done by one generation, and not missed when they are gone from the shelf."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from headrace.change import Change
from headrace.effects import EffectConsumer
from headrace.errors import Misconfigured, Poison
from headrace.parked import Shelf
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.parked import Picky, forbid
from tests.fixtures.serving import await_live, serving
from tests.fixtures.shelf import TWO, await_parked, command, parked, report


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Of three partitions a table the rows 1 and 3 are in the first, 2 is in the second."""
    return replace(settings, partitions=3)


class Called(EffectConsumer):
    """A webhook whose receiver refuses some rows."""

    name = "called"
    tables = (ITEMS,)

    def effect(self, changes: Any) -> None:
        for change in changes:
            self._call(change)

    def _call(self, change: Change) -> None:
        path = self.settings.path("forbidden")
        if change.row and path.exists() and str(change.row["n"]) in orjson.loads(path.read_bytes()):
            raise Poison("refused", "The receiver says 400.", cursor=(change.table, change.key.decode()))
        with self.settings.path("called").open("a") as calls:
            calls.write(f"{change.row and change.row['n']}\n")


def test_an_effect_that_is_refused_is_parked_and_goes_to_no_other_generation(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)

    def calls() -> list[str]:
        path = settings.path("called")
        return path.read_text().splitlines() if path.exists() else []

    with serving(settings, called=Called) as control:
        await_live(control, "called")
        feed.cut((ITEMS, 2, 13), (ITEMS, 1, 11))
        await_parked(control, "called", 1)
        feed.cut((ITEMS, 2, 14))
        await_parked(control, "called", 2)
        assert set(calls()) == {"11"}
        control.ask("called", "rebuild")
        eventually("it is built", lambda: report(control, "called", 2).phase == "following")
        with pytest.raises(Misconfigured) as refused:
            control.ask("called", "promote")
        assert refused.value.code == "records-parked"
        forbid(settings)
        assert control.ask("called", "retry")["done"] == [[ITEMS, TWO]]
        assert calls()[-2:] == ["13", "14"]
        feed.cut((ITEMS, 3, 30))  # the position says that nothing is parked any more
        eventually("it goes on", lambda: "30" in calls())
        control.ask("called", "promote")
        assert parked(settings, "called") == []


def test_effects_that_are_not_on_the_shelf_any_more_are_begun_anew(feed: Feed, settings: Settings) -> None:
    """No build would tell of them, nor be promoted."""
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(settings, called=Called) as control:
        await_live(control, "called")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "called", 1)
    Shelf(feed.log).clear("called", lambda _number: True)
    with serving(settings, called=Called) as control:
        eventually("it stops", lambda: report(control, "called").code == "parked-lost")
        assert report(control, "called").remedy == "Run: headrace drop called --all, then headrace rebuild called"
        assert command(settings, "drop", "called", "--all").exit_code == 0
        assert command(settings, "rebuild", "called").exit_code == 0
        await_live(control, "called")
        last = feed.cut((ITEMS, 1, 11))
        eventually("it goes on", lambda: report(control, "called").version == last.version)
        assert settings.path("called").read_text() == "11\n"


@pytest.mark.parametrize("verb", ["retry", "drop-parked"])
@pytest.mark.parametrize("view", [Picky, Called])
def test_what_was_tried_again_or_given_up_is_not_missed_after_a_restart(
    feed: Feed, settings: Settings, view: type[Any], verb: str
) -> None:
    """The position is written with it, also when nothing comes afterwards."""
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(settings, view=view) as control:
        await_live(control, "view")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "view", 1)
        forbid(settings)
        control.ask("view", verb)
        assert parked(settings, "view") == []
    last = feed.cut((ITEMS, 1, 11))
    with serving(settings, view=view) as control:
        eventually("it goes on", lambda: (said := report(control, "view")).live and said.version == last.version)
