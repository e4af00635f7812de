"""Generations of other code, of another source or of a log begun anew, and those whose store was lost."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import ClassVar

import orjson
import pytest

from headrace.change import NOWHERE, Position, Version
from headrace.cli import together
from headrace.consumer import Batch, Consumer, Generation
from headrace.control import Report
from headrace.errors import HeadraceError, Misconfigured, Refused, Transient, Wiped
from headrace.log import Log
from headrace.runner.worker import Worker
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.generations import (
    KEPT,
    KEY,
    Newer,
    Noted,
    await_phase,
    build,
    build_and_promote,
    command,
    headrace,
    report,
)
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving


class NotedAnew(Noted):
    """Other code."""


class Forgets(Noted):
    """Loses everything once, and takes its time to begin anew."""

    wiped: ClassVar[threading.Event] = threading.Event()
    again: ClassVar[threading.Event] = threading.Event()

    def open(self, generation: Generation) -> Position | None:
        if self.wiped.is_set():
            self.again.wait(60)
        return super().open(generation)

    def apply(self, batch: Batch) -> None:
        if batch.position.version.lsn > 110 and not self.wiped.is_set():
            self.drop()
            self.wiped.set()
            raise Wiped("noted-wiped", "It is gone.")
        super().apply(batch)


def test_a_view_that_was_wiped_is_at_nothing_until_it_is_loaded_again(feed: Feed, settings: Settings) -> None:
    Forgets.wiped.clear()
    Forgets.again.clear()
    Noted.fails.clear()
    feed.cut((ITEMS, 1, 1))
    with serving(settings, wiped=Forgets) as control:
        await_live(control, "wiped")
        last = feed.cut((ITEMS, 1, 2))
        eventually("it is at nothing", lambda: report(control, "wiped", 1).version == NOWHERE)
        Forgets.again.set()
        eventually("it is live again", lambda: report(control, "wiped", 1).version == last.version)
        eventually("readers see it", lambda: report(control, "wiped", 1).live)


def test_each_code_goes_on_with_its_own_generation_and_leaves_the_other_as_it_is(
    feed: Feed, settings: Settings
) -> None:
    view = Plain(settings, "plain")
    first = feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
    with serving(settings, plain=Newer) as control:
        assert "headrace rebuild plain" in await_phase(control, "plain", 1, "stale").reason
        second = feed.cut((ITEMS, 1, 2))
        control.report(Report("capture", live=True, phase="streaming", version=second.version))
        control.flush()
        stale = orjson.loads(command(settings, "status", "plain", "--json").stdout)["consumers"]["plain"][0]
        assert stale["lag"]["wal_bytes"] == second.version.lsn - first.version.lsn
        assert headrace(settings, "rebuild", "plain", "--wait", "--gate", "none").returncode == 0
        assert view.rows() == {KEY: 2}
        assert report(control, "plain", 1).version == first.version, "its LSN is shown"
        refused = command(settings, "rollback", "plain").exception
        assert isinstance(refused, HeadraceError)
        assert refused.code == "generation-behind"
        assert "put that back, start its process again" in refused.remedy
        assert command(settings, "rollback", "plain", "--stale").exit_code == 0
        assert view.rows() == {KEY: 1}
        assert command(settings, "promote", "plain").exit_code == 0
    third = feed.cut((ITEMS, 1, 3))
    with serving(settings, plain=Plain) as control:
        await_phase(control, "plain", 2, "stale")
        eventually("its own goes on", lambda: report(control, "plain", 1).version == third.version)
        assert view.rows() == {KEY: 2}
        assert report(control, "plain", 2).version == second.version
        assert command(settings, "rollback", "plain").exit_code == 0, "it is ahead: at once"
        assert view.rows() == {KEY: 3}


class Refuses(Newer):
    """It applies no row whose n is 2."""

    def apply(self, batch: Batch) -> None:
        if any(change.row and change.row["n"] == 2 for change in batch.changes):
            raise Refused("position-too-old", "It is refused.", "Build it anew.")
        super().apply(batch)


@pytest.mark.parametrize(("after", "phase"), [(Newer, "stale"), (Refuses, "stopped")])
def test_a_view_that_applies_nothing_and_whose_store_was_lost_begins_anew(
    feed: Feed, settings: Settings, after: type[Plain], phase: str
) -> None:
    """No write of its own tells it of the loss, so the runner does [I6]; nothing stays live beside what readers see."""
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 1))
    if phase == "stale":
        with serving(settings, plain=Plain) as control:
            await_live(control, "plain")
    with serving(settings, plain=after) as control:
        eventually("readers see it", lambda: view.rows() == {KEY: 1})
        feed.cut((ITEMS, 1, 2))
        await_phase(control, "plain", 1, phase)
        last = feed.cut((ITEMS, 1, 3))
        view.wipe()
        eventually("it is live with all", lambda: await_phase(control, "plain", 2, "live").version == last.version)
        eventually("the lost one is gone", lambda: [each.generation for each in control.reports()["plain"]] == [2])
        with pytest.raises(Misconfigured) as refused:
            control.ask("plain", "drop", {"generation": 2})
        assert refused.value.code == "drops-the-live-one"
        assert view.rows() == {KEY: 3}


def test_a_generation_that_applies_nothing_is_not_made_again_empty(feed: Feed, settings: Settings) -> None:
    """It would then be one that the store has, and nobody would begin anew."""
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
    still = Worker(Log(settings), lambda: Newer(settings, "plain"), view.generations()[0], still=True)
    still.start()
    eventually("it stands", lambda: still.state.phase == "stale")
    view.wipe()
    still.call(_is_away)
    eventually("it has tried again", lambda: _code(still) == "view-wiped" or view.generations())
    assert view.generations() == []
    still.stop()
    still.join(20)


def _code(served: Worker) -> str:
    return served.state.error.code if served.state.error else ""


def _is_away(_consumer: Consumer) -> None:
    raise Transient("plain-away", "The plain store is away.", "Wait.")


def test_the_number_of_a_lost_generation_is_as_new(feed: Feed, settings: Settings) -> None:
    """The next rebuild has it again, and nobody has seen that."""
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        build(control, 2)
        control.ask("plain", "promote")
    with serving(settings, plain=Newer) as control:
        await_phase(control, "plain", 2, "stale")
        assert control.kept("plain", "shown") == [KEPT]
        lost = Plain(settings, "plain")
        lost.open(view.generations()[1])
        lost.drop()
        eventually("it is let go", lambda: [each.generation for each in control.reports()["plain"]] == [1])
        assert control.kept("plain", "shown") == [{"": KEPT[""] | {"generations": [1]}}]


def test_nobody_is_told_to_wait_for_a_build_that_does_not_go_on(feed: Feed, settings: Settings) -> None:
    """It has come to no state and is of other code than its process; nor is a rebuild told that a pause refuses."""
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
    Plain(settings, "plain").open(Generation("plain", 2, "other code"))
    with serving(settings, plain=Plain) as control:
        await_phase(control, "plain", 2, "stale")
        with pytest.raises(Misconfigured) as refused:
            control.ask("plain", "promote")
        assert (refused.value.code, refused.value.remedy) == ("stale-generation", "Run: headrace rebuild plain")
        control.ask("plain", "pause")
        assert (
            "run headrace resume plain, then headrace rebuild plain" in await_phase(control, "plain", 2, "stale").reason
        )
        control.ask("plain", "resume")
        build_and_promote(control, 3)


@pytest.mark.parametrize(("code", "phase"), [(Plain, "stopped"), (Newer, "stale")])
def test_a_build_of_a_log_that_was_begun_anew_is_promoted_though_its_versions_are_lower(
    feed: Feed, settings: Settings, code: type[Plain], phase: str
) -> None:
    """Kafka's volume was lost, or the database came to a server with lower LSNs: what readers have seen is no state of this log.

    Perhaps new code comes with it, which opens no reader for the old view.
    """
    feed.epoch, feed.lsn = 2, 10_000
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
    log = Log(settings)
    own = log.own_topics()
    log.delete_topics(own)
    eventually("they are gone", lambda: not log.topics.names() & set(own))
    anew = Feed(settings)
    anew.cut((ITEMS, 1, 2))
    with serving(settings, plain=code) as control:
        assert await_phase(control, "plain", 1, phase).code == ("position-ahead" if code is Plain else "")
        build(control, 2)
        (promoted,) = together.promote(control, {"plain": None})
        assert (promoted["generation"], Version(*promoted["version"]).epoch) == (2, 1)


def test_a_build_of_another_source_is_promoted_over_a_view_of_older_code(feed: Feed, settings: Settings) -> None:
    """The database came under another HEADRACE_SOURCE, to a server with lower LSNs, with new code; two views are promoted together."""
    Noted.may.set()
    Noted.fails.clear()
    Noted.refuses.clear()
    feed.lsn = 10_000
    feed.cut((ITEMS, 1, 1))
    with serving(settings, one=Noted, other=Noted) as control:
        await_live(control, "one", "other")
    settings = replace(settings, source=f"{settings.source}_b")
    Feed(settings).cut((ITEMS, 1, 2))
    with serving(settings, one=NotedAnew, other=NotedAnew) as control:
        for name in ("one", "other"):
            await_phase(control, name, 1, "stale")
            assert control.ask(name, "rebuild") == {"generation": 2}
            await_phase(control, name, 2, "following")
        done = together.promote(control, {"one": None, "other": None})
        assert [each["generation"] for each in done] == [2, 2]
    assert Noted(settings, "other").rows() == {KEY: 2}


class Unended(Plain):
    """Its second generation loads pieces and comes to no state."""

    def apply(self, batch: Batch) -> None:
        if self._number > 1 and batch.complete:
            raise Transient("plain-away", "Its store is away.", "Wait.")
        super().apply(batch)


def test_a_build_of_another_source_is_left_alone(feed: Feed, settings: Settings) -> None:
    """Its process may be building it: one of the own source, which nobody sees, would be removed and begun again."""
    settings = replace(settings, batch_records=1)
    feed.cut((ITEMS, 1, 1), (ITEMS, 2, 1), (ITEMS, 3, 1))
    with serving(settings, plain=Unended) as before:
        await_live(before, "plain")
        assert before.ask("plain", "rebuild") == {"generation": 2}
        assert await_phase(before, "plain", 2, "waiting").code == "plain-away"
    settings = replace(settings, source=f"{settings.source}_b")
    Feed(settings).cut((ITEMS, 1, 2))
    with serving(settings, plain=Unended) as control:
        assert await_phase(control, "plain", 2, "stopped").code == "position-of-another-source"
        before.report(Report("plain", 1, live=True, phase="live"))
        before.flush()
        with pytest.raises(Misconfigured) as refused:
            control.ask("plain", "rebuild")
        assert (refused.value.code, "whose process runs" in refused.value.message) == ("view-of-another", True)
        before.report(Report("plain", 1, live=True, phase="off", ended=True))
        before.flush()
        assert control.ask("plain", "rebuild") == {"generation": 3}
