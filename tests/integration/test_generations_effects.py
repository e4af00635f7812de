"""Effects over promotions, rollbacks and a lost file: none is left out in silence, and none done by two."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from headrace import codec
from headrace.change import Change, Version
from headrace.effects import EffectConsumer
from headrace.errors import Transient
from headrace.runner import worker
from headrace.runner.worker import Worker
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.generations import await_phase, report
from tests.fixtures.serving import await_live, serving


class Calls(EffectConsumer):
    """Tells a list, while somebody listens."""

    tables = (ITEMS,)
    told: ClassVar[list[int]] = []
    away: ClassVar[threading.Event] = threading.Event()

    def effect(self, changes: Sequence[Change]) -> None:
        if self.away.is_set():
            raise Transient("calls-away", "Nobody listens.", "Wait.")
        self.told.extend(change.row["n"] for change in changes if change.row)


@pytest.mark.parametrize("paused", [False, True])
def test_no_token_is_answered_after_a_promotion_before_the_effects_up_to_it_are_done(
    feed: Feed, settings: Settings, paused: bool
) -> None:
    """S25: the live one waited for its receiver, the build has gone on. Nothing new comes that would tell it of its position."""
    Calls.told.clear()
    Calls.away.clear()
    first = feed.cut((ITEMS, 1, 1))
    with serving(settings, calls=Calls) as control:
        await_live(control, "calls")
        control.ask("calls", "rebuild")
        await_phase(control, "calls", 2, "following")
        Calls.away.set()
        last = feed.cut((ITEMS, 1, 2))
        eventually("the build goes on", lambda: report(control, "calls", 2).version == last.version)
        await_phase(control, "calls", 1, "waiting")
        if paused:
            control.ask("calls", "pause")
        assert Version(*control.ask("calls", "promote")["version"]) <= first.version
        assert report(control, "calls", 2).live
        assert report(control, "calls", 2).version <= first.version
        eventually("it is opened there", lambda: report(control, "calls", 2).version == first.version)
        Calls.away.clear()
        if paused:
            control.ask("calls", "resume")
        eventually("it is done", lambda: report(control, "calls", 2).version == last.version)
        assert Calls.told == [2]


def test_effects_whose_file_is_lost_are_not_left_out_in_silence(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process waits, and says so, until the file is there again or somebody says that what came since does not matter."""
    monkeypatch.setattr(Calls, "told", [])
    folder = settings.path(f"{settings.source}/calls-effects.sqlite").parent
    feed.cut((ITEMS, 1, 1))
    with serving(settings, calls=Calls) as control:
        await_live(control, "calls")
    feed.cut((ITEMS, 1, 2))
    kept = folder.rename(folder.with_name("kept"))
    with serving(settings, calls=Calls) as control:
        eventually("it says so", lambda: report(control, "calls", 0).code == "effects-lost")
        assert report(control, "calls", 0).phase == "waiting"
        assert "calls-effects.sqlite" in report(control, "calls", 0).remedy
        with pytest.raises(Transient, match="has no file of its position"):
            control.ask("calls", "rebuild")
        assert not (folder / "calls-effects.sqlite").exists(), "it would stand in the way of what is put back"
        for each in sorted(kept.iterdir(), reverse=True):  # what SQLite keeps beside it first
            each.rename(folder / each.name)
        eventually("it goes on", lambda: Calls.told == [2])
        await_live(control, "calls")
    shutil.rmtree(folder)
    feed.cut((ITEMS, 1, 3))
    with serving(settings, calls=Calls) as control:
        eventually("it says so", lambda: report(control, "calls", 0).code == "effects-lost")
        control.ask("calls", "drop", {"all": True})
        assert control.ask("calls", "rebuild") == {"generation": 1}
        await_live(control, "calls")
        feed.cut((ITEMS, 1, 4))
        eventually("it begins anew", lambda: Calls.told == [2, 4])


def test_effects_whose_file_is_lost_under_their_process_are_not_begun_anew(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listened just then: when it came back what had been committed meanwhile was told to nobody, and nothing said so."""
    monkeypatch.setattr(Calls, "told", [])
    monkeypatch.setattr(Calls, "away", threading.Event())
    folder = settings.path(f"{settings.source}/calls-effects.sqlite").parent
    feed.cut((ITEMS, 1, 1))
    with serving(settings, calls=Calls) as control:
        await_live(control, "calls")
        Calls.away.set()
        feed.cut((ITEMS, 1, 2))
        await_phase(control, "calls", 1, "waiting")
        kept = folder.rename(folder.with_name("kept"))
        Calls.away.clear()
        eventually("it says so", lambda: report(control, "calls", 0).code == "effects-lost")
        shutil.rmtree(folder, ignore_errors=True)
        kept.rename(folder)
        eventually("it goes on", lambda: Calls.told == [2])
        await_live(control, "calls")


class CallsAnew(Calls):
    """Other code."""


def test_effects_that_are_lost_while_they_stand_still_are_not_begun_anew(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calls, "told", [])
    feed.cut((ITEMS, 1, 1))
    with serving(settings, calls=Calls) as control:
        await_live(control, "calls")
    with serving(settings, calls=CallsAnew) as control:
        await_phase(control, "calls", 1, "stale")
        with sqlite3.connect(settings.path(f"{settings.source}/calls-effects.sqlite")) as connection:
            connection.execute("DELETE FROM generations")
        eventually("it says so", lambda: report(control, "calls", 0).code == "effects-lost")
        assert CallsAnew(settings, "calls").generations() == []


class Slow(Calls):
    """Its first generation tells when it may."""

    may: ClassVar[threading.Event] = threading.Event()
    begun: ClassVar[threading.Event] = threading.Event()

    def effect(self, changes: Sequence[Change]) -> None:
        if self._number == 1 and not self.away.is_set():
            self.begun.set()
            assert self.may.wait(60)
        super().effect(changes)


def test_effects_that_are_being_done_after_a_wait_are_not_done_by_the_new_generation_too(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until they are done its report says that it waits."""
    Calls.told.clear()
    Calls.away.clear()
    asked, hold = threading.Event(), Worker.hold

    def holds(of: Worker, *args: Any, **options: Any) -> Version:
        asked.set()
        return hold(of, *args, **options)

    monkeypatch.setattr(Worker, "hold", holds)
    monkeypatch.setattr(worker, "_POLL_SECONDS", 2.0)  # nothing else is told of it before
    feed.cut((ITEMS, 1, 1))
    with serving(settings, calls=Slow) as control, ThreadPoolExecutor(1) as pool:
        await_live(control, "calls")
        control.ask("calls", "rebuild")
        await_phase(control, "calls", 2, "following")
        Calls.away.set()
        last = feed.cut((ITEMS, 1, 2))
        eventually("the build goes on", lambda: report(control, "calls", 2).version == last.version)
        await_phase(control, "calls", 1, "waiting")
        Calls.away.clear()
        assert Slow.begun.wait(60)
        promoted = pool.submit(control.ask, "calls", "promote")
        eventually("it is promoted, or held", lambda: asked.is_set() or promoted.done())
        Slow.may.set()
        assert promoted.result()["generation"] == 2
        eventually("it is opened there", lambda: report(control, "calls", 2).version == last.version)
        assert Calls.told == [2]


class NewCalls(Calls):
    """Other code."""


def test_effects_of_a_refused_generation_go_on_when_it_is_rolled_back_to(feed: Feed, settings: Settings) -> None:
    """The newer code ran for longer than delete.retention.ms; then the older one is deployed again."""
    Calls.told.clear()
    Calls.away.clear()
    feed.cut((ITEMS, 1, 1))
    with serving(settings, calls=Calls) as control:
        await_live(control, "calls")
    with serving(settings, calls=NewCalls) as control:
        await_phase(control, "calls", 1, "stale")
        assert control.ask("calls", "rebuild") == {"generation": 2}
        await_phase(control, "calls", 2, "following")
        control.ask("calls", "promote")
        told = feed.cut((ITEMS, 1, 2))
        eventually("it is told", lambda: report(control, "calls", 2).version == told.version)
    with sqlite3.connect(settings.path(f"{settings.source}/calls-effects.sqlite")) as file:
        (kept,) = file.execute("SELECT position FROM generations WHERE number = 1").fetchone()
        long_ago = codec.encode_position(replace(codec.decode_position(kept), appended=1))
        file.execute("UPDATE generations SET position = ? WHERE number = 1", [long_ago])
    file.close()
    with serving(settings, calls=Calls) as control:
        assert await_phase(control, "calls", 1, "stopped").code == "away-too-long"
        assert control.ask("calls", "rollback", {"stale": True})["generation"] == 1
        assert await_phase(control, "calls", 1, "live").code == ""
        last = feed.cut((ITEMS, 1, 3))
        eventually("it is done", lambda: report(control, "calls", 1).version == last.version)
        assert Calls.told == [2, 3]
