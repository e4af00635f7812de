"""Views that are dropped, also by who is busy, killed or away from its store."""

from __future__ import annotations

import orjson
import pytest

from headrace.control import Control
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.log import Log
from headrace.settings import Settings
from headrace.stores.elasticsearch import SearchReader
from headrace.stores.kafka import live_topic
from headrace.stores.redis.reader import PageReader
from headrace_ops.elasticsearch import Elasticsearch
from headrace_warehouse import Warehouse
from tests.fixtures import ticks
from tests.fixtures.capture import eventually, prepare
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.generations import KEY, await_phase, build, captured, command, headrace, report
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving


def test_a_drop_of_everything_while_the_store_is_away_does_not_happen_later(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        with monkeypatch.context() as patch:
            patch.setattr(Plain, "away", True)
            with pytest.raises(Transient) as away:
                control.ask("plain", "drop", {"all": True})
        assert away.value.code == "plain-away"
        assert control.kept("plain", "standing") == [{}]
        last = feed.cut((ITEMS, 1, 2))
        eventually("it goes on", lambda: report(control, "plain", 1).version == last.version)
        assert report(control, "plain", 1).phase == "live"


def test_a_process_that_has_not_come_to_its_store_yet_says_so_whatever_it_is_asked(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows of no generation, which does not mean that there is none."""
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        build(control, 2)
    monkeypatch.setattr(Plain, "away", True)
    second, every = {"generation": 2}, {"all": True}
    with serving(settings, plain=Plain) as control:
        await_phase(control, "plain", 0, "waiting")
        for args in ({}, second):
            for verb in ("promote", "hold", "rollback", "drop", "retry", "rebuild", "scan"):
                with pytest.raises(Transient, match="The plain store is away"):
                    control.ask("plain", verb, args)
        with pytest.raises(Transient, match="The plain store is away"):
            control.ask("plain", "drop", every)
        assert control.ask("plain", "pause")["paused"]
        assert not control.ask("plain", "resume")["paused"]
        monkeypatch.setattr(Plain, "away", False)
        await_phase(control, "plain", 2, "following")
        assert control.ask("plain", "rebuild") == {"generation": 2}
        assert [each.number for each in Plain(settings, "plain").generations()] == [1, 2]


class Clings(Plain):
    """Cannot be dropped."""

    def drop(self) -> None:
        raise Misconfigured("clings", "It cannot be dropped.", "Free it.")


def test_a_drop_of_everything_that_is_still_to_come_says_so_and_can_be_taken_back(
    feed: Feed, settings: Settings
) -> None:
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Clings) as control:
        await_live(control, "plain")
        with pytest.raises(Misconfigured, match="dropped as soon as that is possible") as stuck:
            control.ask("plain", "drop", {"all": True})
        assert (stuck.value.code, stuck.value.remedy) == (
            "clings",
            "Free it. To keep what is there: headrace rebuild plain",
        )
        eventually("it says so", lambda: "is to be dropped" in report(control, "plain", 1).reason)
        assert control.ask("plain", "rebuild") == {"generation": 2}
        assert control.kept("plain", "standing") == [{}]
        eventually("it is as before", lambda: not report(control, "plain", 1).reason)


def test_a_dropped_view_stays_so_until_it_is_rebuilt(feed: Feed, settings: Settings) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        assert "then: headrace promote plain" in command(settings, "rebuild", "plain").stdout
        await_phase(control, "plain", 2, "following")
        refused = command(settings, "drop", "plain", "1").exception
        assert isinstance(refused, HeadraceError)
        assert refused.code == "drops-the-live-one"
        assert command(settings, "drop", "plain", "1", "--all").exit_code == 2
        assert orjson.loads(command(settings, "drop", "plain", "--all", "--json").stdout) == {"dropped": [1, 2]}
        assert view.generations() == []
        await_phase(control, "plain", 0, "dropped")
        assert [each.generation for each in control.reports()["plain"]] == [0]
        with pytest.raises(Misconfigured, match="dropped"):
            control.ask("plain", "pause")
    with serving(settings, plain=Plain) as control:
        eventually("the new process has said so", lambda: not report(control, "plain", 0).ended)
        await_phase(control, "plain", 0, "dropped")
        assert "headrace rebuild plain" in command(settings, "status", "plain", "--check").stdout
        assert view.generations() == []
        assert "building generation 1 of plain; no other is live" in command(settings, "rebuild", "plain").stdout
        eventually("it is there again", lambda: view.rows() == {KEY: 1})
        assert [each.generation for each in control.reports()["plain"] if each.phase != "dropped"] == [1]


def test_a_drop_of_everything_that_was_killed_half_way_is_ended_by_the_next_process(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
    Control(Log(settings)).keep("plain", "standing", {"phase": "dropped"})
    with serving(settings, plain=Plain):
        eventually("it is gone", lambda: view.generations() == [])


@pytest.mark.parametrize("dropped", [False, True])
def test_nothing_is_said_any_more_of_a_view_whose_store_was_lost_while_nobody_ran_it(
    feed: Feed, settings: Settings, dropped: bool
) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
    view.wipe()
    if dropped:
        control.keep("plain", "standing", {"phase": "dropped"})
    number, phase = (0, "dropped") if dropped else (2, "live")
    with serving(settings, plain=Plain) as control:
        await_phase(control, "plain", number, phase)
        eventually("the lost one is gone", lambda: [r.generation for r in control.reports()["plain"]] == [number])
        checked = command(settings, "status", "plain", "--check")
        assert checked.stdout == "ok\n" if not dropped else "headrace rebuild plain" in checked.stdout


@pytest.mark.usefixtures("redis_server")
def test_a_view_is_dropped_whole_from_every_store_and_built_anew(
    settings: Settings, elasticsearch: Elasticsearch
) -> None:
    prepare(settings, *ticks.MAKE)
    views = {"found": ticks.TicksFound, "pages": ticks.TicksPages, "stream": ticks.TicksStream, "warehouse": Warehouse}
    with captured(settings, **views) as control:
        for name, consumer in views.items():
            assert command(settings, "drop", name, "--all").exit_code == 0
            assert consumer(settings, name).generations() == []
            await_phase(control, name, 0, "dropped")
        with pytest.raises(Transient, match="No generation of ticking is live"):
            PageReader(settings, "ticking").get("1")
        with pytest.raises(Transient, match="No generation of found is live"):
            SearchReader(settings, "found").search("1")
        assert live_topic(settings, "ticked") is None
        ended = headrace(settings, "rebuild", *views, "--wait", "--gate", "none", "--json")
        assert ended.returncode == 0, ended.stderr
        assert [each["generation"] for each in orjson.loads(ended.stdout)] == [1, 1, 1, 1]
        for name in views:
            rows = [row for row in control.scan(name) if row.collection in {"", "public.ticks"}]
            assert len(rows) == ticks.ROWS
