"""Records that cannot be done are parked by key: all others go on, later changes wait, and a retry ends in view == SELECT [I9]."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from headrace.change import Version
from headrace.control import Control
from headrace.errors import Misconfigured
from headrace.parked import Shelf
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.parked import Picky, applied, forbid
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving
from tests.fixtures.shelf import ONE, THREE, TWO, await_parked, command, parked, report, told


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Of three partitions a table the rows 1 and 3 are in the first, 2 is in the second."""
    return replace(settings, partitions=3)


def test_later_changes_of_the_key_wait_and_all_others_go_on(feed: Feed, settings: Settings, picky: Control) -> None:
    view = Plain(settings, "picky")
    assert view.rows() == {ONE: 11, TWO: 20, THREE: 30}
    first, second = Shelf(feed.log).entries("picky")
    assert (first.code, first.reason, first.remedy) == ("unlucky", f"{TWO} has 13.", "Change the row.")
    assert (second.code, "waits behind" in second.reason) == ("", True)
    assert [entry.change().row for entry in (first, second)] == [{"id": 2, "n": 13}, {"id": 2, "n": 14}]
    scanned = {change.offset: change for change in feed.log.scan(ITEMS)}
    for entry in (first, second):
        (place,) = entry.where
        assert entry.change() == scanned[place.first]
        assert place.topic == feed.log.topic_of(ITEMS)
    said = report(picky, "picky")
    assert (said.phase, said.facts["parked"]) == ("live", 2)
    assert said.version == first.held == Version(1, first.version.lsn - 1), "no token is answered beyond (S25)"
    forbid(settings)
    assert picky.ask("picky", "retry") == {"generation": 1, "done": [[ITEMS, TWO]], "left": []}
    assert view.rows() == {ONE: 11, TWO: 14, THREE: 30}
    assert applied(settings, TWO) == ["20", "13", "14"], "in their order, each once"
    assert parked(settings, "picky") == []
    last = feed.cut((ITEMS, 2, 15))
    eventually("later changes are applied again", lambda: view.rows()[TWO] == 15)
    eventually("tokens are answered again", lambda: report(picky, "picky").version == last.version)


def test_a_retry_that_fails_leaves_it_parked_with_the_newer_reason(
    feed: Feed, settings: Settings, picky: Control
) -> None:
    forbid(settings, 14)
    answer = picky.ask("picky", "retry", {"key": TWO})
    assert (answer["done"], answer["left"][0]["reason"]) == ([], f"{TWO} has 14.")
    assert Shelf(feed.log).entries("picky")[0].reason == f"{TWO} has 14."
    assert Plain(settings, "picky").rows()[TWO] == 20
    assert len(parked(settings, "picky")) == 2


def test_one_key_is_retried_the_other_stays(feed: Feed, settings: Settings, picky: Control) -> None:
    forbid(settings, 13, 33)
    feed.cut((ITEMS, 3, 33))
    await_parked(picky, "picky", 3)
    forbid(settings, 13)
    answer = picky.ask("picky", "retry")
    assert (answer["done"], [each["key"] for each in answer["left"]]) == ([[ITEMS, THREE]], [TWO])
    assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 20, THREE: 33}
    assert set(parked(settings, "picky")) == {TWO}


def test_a_restart_keeps_what_is_parked(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    forbid(settings, 13)
    with serving(settings, picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "picky", 1)
    with serving(settings, picky=Picky) as control:
        feed.cut((ITEMS, 2, 14), (ITEMS, 1, 11))
        held = await_parked(control, "picky", 2).version
        assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 20}
    with serving(settings, picky=Picky) as control:
        assert await_parked(control, "picky", 2).version == held
        forbid(settings)
        eventually("it stands at a state", lambda: control.ask("picky", "retry")["done"])
        assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 14}


def test_what_a_process_that_was_replaced_parks_late_is_not_tried_again(feed: Feed, settings: Settings) -> None:
    """The older row would come back, and stay."""
    feed.cut((ITEMS, 2, 20))
    forbid(settings, 13)
    with serving(settings, picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "picky", 1)
        (late,) = Shelf(feed.log).entries("picky")
        forbid(settings)
        assert control.ask("picky", "retry")["done"]
        feed.cut((ITEMS, 2, 14))
        eventually("it goes on", lambda: Plain(settings, "picky").rows() == {TWO: 14})
    Shelf(feed.log).put(late)
    with serving(settings, picky=Picky) as control:
        eventually("it is taken away", lambda: parked(settings, "picky") == [])
        await_live(control, "picky")
        with pytest.raises(Misconfigured) as refused:
            control.ask("picky", "retry")
        assert refused.value.code == "not-parked"
        feed.cut((ITEMS, 2, 15))
        eventually("it goes on", lambda: Plain(settings, "picky").rows() == {TWO: 15})


def parked_by_a_process_that_ended(feed: Feed, settings: Settings) -> Version:
    """Let a live view of two rows park the second one's change, and end; return what tokens are held back to."""
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    forbid(settings, 13)
    with serving(settings, picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        return await_parked(control, "picky", 1).version


def test_a_start_with_another_store_leaves_what_is_parked_where_it_is(feed: Feed, settings: Settings) -> None:
    """From another folder there is nothing of the view: it is built there from zero."""
    held = parked_by_a_process_that_ended(feed, settings)
    elsewhere = replace(settings, state=f"{settings.state}/elsewhere")
    with serving(elsewhere, picky=Picky) as control:
        eventually("it is built there", lambda: Plain(elsewhere, "picky").rows() == {ONE: 10, TWO: 13})
    with serving(settings, picky=Picky) as control:
        feed.cut((ITEMS, 1, 11))
        eventually("it goes on", lambda: Plain(settings, "picky").rows() == {ONE: 11, TWO: 20})
        assert await_parked(control, "picky", 1).version == held
        forbid(settings)
        assert control.ask("picky", "retry")["done"] == [[ITEMS, TWO]]
        assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 13}


def test_a_view_that_lacks_what_is_not_on_the_shelf_any_more_goes_no_further(feed: Feed, settings: Settings) -> None:
    held = parked_by_a_process_that_ended(feed, settings)
    Shelf(feed.log).clear("picky", lambda _number: True)
    feed.cut((ITEMS, 1, 11))
    with serving(settings, picky=Picky) as control:
        eventually("it stops", lambda: report(control, "picky").phase == "stopped")
        said = report(control, "picky")
        assert (said.code, said.version) == ("parked-lost", held), "no token is answered beyond (S25)"
        assert "headrace rebuild picky" in said.remedy
        assert [row.value["n"] for row in control.scan("picky")] == [10, 20], "it can still be read"
        forbid(settings)
        assert control.ask("picky", "rebuild") == {"generation": 2}
        eventually("it is built", lambda: report(control, "picky", 2).phase == "following")
        control.ask("picky", "promote")
        assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 13}


def test_a_generation_that_lacks_what_is_lost_is_not_promoted(feed: Feed, settings: Settings) -> None:
    """Neither over a live one nor by itself where there is none any more."""
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    with serving(settings, picky=Picky) as control:
        await_live(control, "picky")
        assert control.ask("picky", "rebuild") == {"generation": 2}
        eventually("it is built", lambda: report(control, "picky", 2).phase == "following")
        forbid(settings, 13)
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "picky", 1)
        await_parked(control, "picky", 1, generation=2)
    Shelf(feed.log).clear("picky", lambda number: number == 2)
    with serving(settings, picky=Picky) as control:
        await_parked(control, "picky", 1)
        eventually("it stops", lambda: report(control, "picky", 2).code == "parked-lost")
        for verb in ("promote", "hold"):
            with pytest.raises(Misconfigured) as refused:
                control.ask("picky", verb)
            assert refused.value.code == "parked-lost"
            assert "headrace rebuild picky" in refused.value.remedy
    with closing(sqlite3.connect(settings.path("plain.sqlite"))) as file, file:
        file.execute("DELETE FROM generations WHERE number = 1")
    with serving(settings, picky=Picky) as control:
        eventually("it stops", lambda: report(control, "picky", 2).code == "parked-lost")
        assert control.ask("picky", "rebuild") == {"generation": 3}
        eventually("what is whole goes live", lambda: await_parked(control, "picky", 1, generation=3).live)
        assert not report(control, "picky", 2).live


def test_what_is_dropped_is_lost_and_later_changes_are_applied(feed: Feed, settings: Settings, picky: Control) -> None:
    answer = picky.ask("picky", "drop-parked", {"key": TWO})
    assert (answer["dropped"], answer["records"]) == ([[ITEMS, TWO]], 2)
    view = Plain(settings, "picky")
    assert view.rows()[TWO] == 20
    feed.cut((ITEMS, 2, 15))
    eventually("the next change is applied", lambda: view.rows()[TWO] == 15)
    assert await_parked(picky, "picky", 0).phase == "live"


def test_a_wiped_view_and_a_dropped_generation_have_nothing_parked(
    feed: Feed, settings: Settings, picky: Control
) -> None:
    view = Plain(settings, "picky")
    forbid(settings)
    view.wipe()
    last = feed.cut((ITEMS, 1, 12))
    eventually("it is built anew", lambda: view.rows() == {ONE: 12, TWO: 14, THREE: 30})
    assert parked(settings, "picky") == []
    eventually("that is told", lambda: (said := report(picky, "picky")).live and said.version == last.version)
    forbid(settings, 14)
    assert picky.ask("picky", "rebuild") == {"generation": 2}
    await_parked(picky, "picky", 1, generation=2)
    picky.ask("picky", "drop", {"generation": 2})
    assert parked(settings, "picky") == []


def test_a_build_that_lacks_something_is_not_promoted_over_a_live_view(
    feed: Feed, settings: Settings, picky: Control
) -> None:
    forbid(settings, 14)
    picky.ask("picky", "rebuild")
    eventually("it is built", lambda: report(picky, "picky", 2).phase == "following")
    await_parked(picky, "picky", 1, generation=2)
    for verb in ("promote", "hold"):
        with pytest.raises(Misconfigured) as refused:
            picky.ask("picky", verb)
        assert refused.value.code == "records-parked"
        assert "headrace parked retry picky --all --generation 2" in refused.value.remedy
    assert "all when left out" in command(settings, "parked", "show", "--help").stdout
    for which, generations in (((), [1, 1, 2]), (("--generation", "2"), [2])):
        shown = told(settings, "parked", "show", "picky", TWO, *which)
        assert [each["generation"] for each in shown] == generations
    forbid(settings)
    picky.ask("picky", "retry", {"generation": 2})
    picky.ask("picky", "promote")
    assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 14, THREE: 30}
    assert parked(settings, "picky", 1) == [TWO, TWO], "the one before keeps its own"
    with pytest.raises(Misconfigured) as refused:
        picky.ask("picky", "retry")
    assert (refused.value.code, refused.value.remedy) == ("not-parked", "Say which: --generation 1")
