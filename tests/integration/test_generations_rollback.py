"""Rollbacks and promotions: where they go, and that none happens twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import pytest

from headrace import codec
from headrace.consumer import Batch
from headrace.control import Control
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import CONTROL
from headrace.runner import verbs
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.generations import KEPT, KEY, Newer, await_phase, build, build_and_promote, command, live_of, report
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving


class Newest(Plain):
    """Other code once more."""


def test_a_rollback_goes_to_what_readers_saw_and_not_to_a_build_that_they_never_saw(
    feed: Feed, settings: Settings
) -> None:
    """Its gate may have refused it. Each code is deployed by a process of its own."""
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
    with serving(settings, plain=Newer) as control:
        await_phase(control, "plain", 1, "stale")
        build(control, 2)
    last = feed.cut((ITEMS, 1, 2))
    with serving(settings, plain=Newest) as control:
        await_phase(control, "plain", 2, "stale")
        build(control, 3)
        control.ask("plain", "promote")
        assert view.rows() == {KEY: 2}
        refused = command(settings, "rollback", "plain").exception
        assert isinstance(refused, HeadraceError)
        assert "plain-g1 is at" in refused.message, "not the second: it is not what was there before"
        assert "headrace rollback plain --stale" in refused.remedy
        refused = command(settings, "promote", "plain", "--generation", "2").exception
        assert isinstance(refused, HeadraceError)
        assert (refused.code, refused.remedy) == ("generation-behind", "Run: headrace rebuild plain"), (
            "not to the first"
        )
    with serving(settings, plain=Plain) as control:
        eventually("its own goes on", lambda: report(control, "plain", 1).version == last.version)
        assert orjson.loads(command(settings, "rollback", "plain", "--json").stdout)["generation"] == 1
        none = command(settings, "rollback", "plain").exception
        assert isinstance(none, HeadraceError)
        assert none.code == "nothing-to-roll-back-to"


def test_after_an_upgrade_a_rollback_goes_to_what_is_older(feed: Feed, settings: Settings) -> None:
    """An older headrace kept no record of what readers have seen."""
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        build(control, 2)
        control.ask("plain", "promote")
        build(control, 3)
    control.keep("plain", "shown", None)
    with serving(settings, plain=Plain) as control:
        await_phase(control, "plain", 2, "live")
        eventually("that is kept", lambda: control.kept("plain", "shown") == [KEPT])
        assert control.ask("plain", "rollback")["generation"] == 1
        with pytest.raises(Misconfigured) as refused:
            control.ask("plain", "rollback")
        assert refused.value.code == "nothing-to-roll-back-to"


def test_rollbacks_go_back_the_way_that_readers_were_led(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        for number in (2, 3, 4):
            build(control, number)
            control.ask("plain", "promote")
        control.ask("plain", "drop", {"generation": 3})
        assert control.ask("plain", "rollback")["generation"] == 2, "the third is gone"
        assert control.ask("plain", "rollback")["generation"] == 1
        control.ask("plain", "promote", {"generation": 4})
    with serving(settings, plain=Plain) as control:
        await_phase(control, "plain", 4, "live")
        assert control.ask("plain", "rollback")["generation"] == 1, "it was left for this one, not the second"
    assert [generation.live for generation in Plain(settings, "plain").generations()] == [True, False, False]


class Fails(Plain):
    """Its first generation stops at 13."""

    def apply(self, batch: Batch) -> None:
        if self._number == 1 and any(change.row and change.row["n"] == 13 for change in batch.changes):
            raise Misconfigured("fails-at-13", "It has met 13.", "Change it.")
        super().apply(batch)


def test_stale_is_not_offered_for_a_generation_that_has_stopped(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers nothing: a rollback that accepts what it lacks would fail as well."""
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Fails) as control:
        await_live(control, "plain")
        build_and_promote(control, 2)
        last = feed.cut((ITEMS, 1, 13))
        await_phase(control, "plain", 1, "stopped")
        eventually("the live one has it", lambda: report(control, "plain", 2).version == last.version)
        monkeypatch.setattr(verbs, "_PATIENCE_SECONDS", 5.0)
        with pytest.raises(Misconfigured) as refused:
            control.ask("plain", "rollback")
        assert (refused.value.code, refused.value.remedy) == ("generation-behind", "Run: headrace rebuild plain")
        assert "It has stopped: It has met 13." in refused.value.message


def test_a_promotion_says_what_stays_of_what_was_there_before(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 1))

    def promoted(*options: str) -> str:
        return command(settings, "promote", "plain", *options).stdout.strip()

    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        assert promoted("--generation", "1") == "generation 1 of plain is live"
        build(control, 2)
        assert promoted() == "generation 2 of plain is live; the one before stays until: headrace drop plain"
        assert promoted("--generation", "1") == (
            "generation 1 of plain is live; the one before stays until: headrace drop plain 2"
        )


def test_a_rollback_that_is_asked_twice_goes_back_once(feed: Feed, settings: Settings) -> None:
    """Who heard no answer asks again while the first is carried out; both have seen the third generation live."""
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        build_and_promote(control, 2, 3)
        for _ in range(2):
            assert control.ask("plain", "rollback", {"from": 3})["generation"] == 2
        assert live_of(settings) == [2]
        assert command(settings, "rollback", "plain").exit_code == 0, "the next one is from what is live"
        assert live_of(settings) == [1]
        with pytest.raises(Misconfigured, match="Generation 1 of plain is live") as refused:
            control.ask("plain", "rollback", {"from": 3})
        assert refused.value.code == "rolled-back-already"
        control.ask("plain", "promote", {"generation": 3})
        assert control.ask("plain", "rollback", {"from": 3})["generation"] == 1
    records = [record for record in read_to_end(settings, {(CONTROL, 0): BEGINNING}) if record.value]
    mine = [codec.loads(record.value or b"") for record in records if settings.source.encode() in record.key]
    assert {"stale": False, "from": 2} in [said["args"] for said in mine if said.get("verb") == "rollback"]


@contextmanager
def killed_before_it_takes_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A process carries requests out, and is killed before it takes the first away: then the event is set."""
    died = threading.Event()

    def take_away(*_: object) -> None:
        died.set()
        raise Transient("kafka-away", "It is killed here.")

    with monkeypatch.context() as patch:
        patch.setattr(Control, "take_away", take_away)
        yield died


def test_a_rollback_whose_process_died_before_it_was_taken_away_goes_back_once(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        build_and_promote(control, 2, 3)
        with killed_before_it_takes_away(monkeypatch) as died:
            control._request("plain", "1", {"verb": "rollback", "args": {"from": 3}, "timeout": 300})
            assert died.wait(30)
            assert live_of(settings) == [2]
    with serving(settings, plain=Plain) as control:
        await_phase(control, "plain", 2, "live")
        assert len(list(control.scan("plain"))) == 1, "requests are carried out in order"
        assert live_of(settings) == [2]


def test_a_promotion_whose_process_died_before_it_was_taken_away_is_answered_as_it_was(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        build(control, 2)
        with killed_before_it_takes_away(monkeypatch) as died:
            asked = {"verb": "promote", "args": {"generation": None, "from": 1}, "timeout": 300}
            control._request("plain", "1", asked)
            assert died.wait(30)
            assert live_of(settings) == [2]
    with serving(settings, plain=Plain) as control:
        await_phase(control, "plain", 2, "live")
        assert control.ask("plain", "rebuild") == {"generation": 3}, "requests are carried out in order"
        await_phase(control, "plain", 3, "following")
        assert command(settings, "promote", "plain").exit_code == 0
    records = [record for record in read_to_end(settings, {(CONTROL, 0): BEGINNING}) if record.value]
    mine = [record for record in records if codec.loads(record.key)["source"] == settings.source]
    said = [codec.loads(record.value or b"") for record in mine]
    assert [(each["generation"], each["before"]) for each in said if "before" in each] == [(2, 1), (2, 1), (3, 2)]
    assert [each["args"] for each in said if each.get("verb") == "promote"][-1] == {"generation": None, "from": 2}


@pytest.mark.parametrize("restarted", [False, True])
def test_a_rebuild_after_a_rollback_does_not_go_on_with_what_was_left(
    feed: Feed, settings: Settings, restarted: bool
) -> None:
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        build_and_promote(control, 2)
        control.ask("plain", "rollback")
        if not restarted:
            assert control.ask("plain", "rebuild") == {"generation": 3}
    with serving(settings, plain=Plain) as control:
        await_phase(control, "plain", 1, "live")
        assert control.ask("plain", "rebuild") == {"generation": 3}, "with this one it goes on"
    assert live_of(settings) == [1]
