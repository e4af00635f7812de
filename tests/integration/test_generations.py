"""Several views promoted at one L; views that stand still, or are gone; gates; new code held against what runs."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import orjson
import pytest
from typer.testing import CliRunner, Result

from headrace import codec, plugins
from headrace.change import NOWHERE, Change, Position, Version
from headrace.cli import app, together
from headrace.consumer import Batch, Consumer, Generation
from headrace.control import Control, Report
from headrace.effects import EffectConsumer
from headrace.errors import HeadraceError, Misconfigured, Refused, Transient, Wiped
from headrace.log import Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import CONTROL
from headrace.runner import generations, verbs, worker
from headrace.runner.scratch import NUMBER, Scratch
from headrace.runner.worker import Worker
from headrace.settings import Settings, environment
from headrace.stores.elasticsearch import SearchReader
from headrace.stores.kafka import live_topic
from headrace.stores.redis.reader import PageReader
from headrace_ops.elasticsearch import Elasticsearch
from headrace_warehouse import Warehouse
from tests.fixtures import ticks
from tests.fixtures.capture import capturing, eventually, prepare
from tests.fixtures.feed import ITEMS, Feed, writing
from tests.fixtures.plain import Doubled, Loses, Plain
from tests.fixtures.serving import await_live, serving

KEY = '{"id":1}'
PLAIN = Path(__file__).parents[1] / "fixtures" / "plain.py"


class Switch(NamedTuple):
    """A promotion: what readers had seen of the view at most, and what they see at least afterwards."""

    name: str
    before: Version
    after: Version


class Noted(Plain):
    """A view in a file of its own, that notes its promotions.

    `refuses` are the views whose pointer does not move, `fails` says that the first generation cannot keep its position. A new
    generation applies nothing while `may` is not set; that of `one` sets `waits`.
    """

    switches: ClassVar[list[Switch]] = []
    refuses: ClassVar[set[str]] = set()
    may: ClassVar[threading.Event] = threading.Event()
    waits: ClassVar[threading.Event] = threading.Event()
    fails: ClassVar[threading.Event] = threading.Event()

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, name)
        self._path = settings.path(f"{name}.sqlite")

    def apply(self, batch: Batch) -> None:
        if self._number > 1 and not self.may.is_set():
            if self.name == "one":
                self.waits.set()
            self.may.wait(60)
        if self._number == 1 and self.fails.is_set():
            with self._open() as connection:
                query = "UPDATE rows SET value = ? WHERE number = 1 AND key = ?"
                connection.executemany(query, [(codec.dumps(each.row), each.key.decode()) for each in batch.changes])
            raise Transient("noted-away", "Its store is away.", "Wait.")
        super().apply(batch)

    def promote(self) -> None:
        if self._number > 1:
            if self.name in self.refuses:
                raise Misconfigured("stuck", "The pointer is stuck.", "Free it.")
            live = next(generation.number for generation in self.generations() if generation.live)
            self.switches.append(Switch(self.name, self.version(live), self.version(self._number)))
        super().promote()


class NotedAnew(Noted):
    """Other code."""


@pytest.fixture
def feed(settings: Settings) -> Feed:
    return Feed(settings)


@pytest.fixture
def two(feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    """Two views, each in a process of its own, with a second generation each that follows."""
    monkeypatch.setattr(Noted, "switches", [])
    monkeypatch.setattr(Noted, "refuses", set())
    Noted.may.set()
    Noted.waits.clear()
    Noted.fails.clear()
    feed.cut((ITEMS, 1, 0))
    with ExitStack() as processes:
        controls = [processes.enter_context(serving(settings, **{name: Noted})) for name in ("one", "other")]
        await_live(controls[0], "one", "other")
        for name in ("one", "other"):
            assert controls[0].ask(name, "rebuild") == {"generation": 2}
            await_phase(controls[0], name, 2, "following")
        yield controls[0]


def report(control: Control, name: str, number: int) -> Report:
    found = [report for report in control.reports().get(name, []) if report.generation == number]
    return found[0] if found else Report(name, number, phase="none")


def await_phase(control: Control, name: str, number: int, phase: str) -> Report:
    eventually(f"{name} g{number} is {phase}", lambda: report(control, name, number).phase == phase)
    return report(control, name, number)


def await_version(control: Control, name: str, version: Version) -> None:
    """Wait until both generations of a view have gone on to a state."""
    eventually(f"{name} goes on", lambda: all(report(control, name, number).version == version for number in (1, 2)))


class Listening(Control):
    """Keeps what was asked and answered."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self.heard: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def ask(self, name: str, verb: str, args: dict[str, Any] | None = None, timeout: float = 30.0) -> dict[str, Any]:
        answer = super().ask(name, verb, args, timeout)
        self.heard.append((verb, args or {}, answer))
        return answer


def command(settings: Settings, *words: str) -> Result:
    return CliRunner().invoke(app, words, env=environment(settings) | {"COLUMNS": "200"})


def test_two_views_are_promoted_at_one_lsn(two: Control, feed: Feed, settings: Settings) -> None:
    """There is an L beyond which no old generation was shown, and before which no new one is."""
    with writing(feed):
        eventually(
            "both have moved", lambda: all(report(two, name, 1).version > Version(1, 200) for name in ("one", "other"))
        )
        control = Listening(feed.log)
        done = together.promote(control, {"one": None, "other": None})
    assert [(each["name"], each["generation"]) for each in done] == [("one", 2), ("other", 2)]
    stood = [answer["version"] for verb, _, answer in control.heard if verb == "hold"]
    assert [args["at"] for verb, args, _ in control.heard if verb == "promote"] == [max(stood), max(stood)]
    assert [switch.name for switch in Noted.switches] == ["one", "other"]
    assert max(switch.before for switch in Noted.switches) <= min(switch.after for switch in Noted.switches)
    last = feed.cut((ITEMS, 1, -1))
    for name in ("one", "other"):
        await_version(two, name, last.version)


def test_a_pointer_moves_only_when_the_new_generation_has_reached_the_old_one(two: Control, feed: Feed) -> None:
    Noted.may.clear()
    feed.cut((ITEMS, 1, 1))
    assert Noted.waits.wait(30)
    last = feed.cut((ITEMS, 1, 2))
    eventually("readers see it", lambda: report(two, "one", 1).version == last.version)
    with ThreadPoolExecutor(1) as pool:
        promoted = pool.submit(two.ask, "one", "promote")
        newer = feed.cut((ITEMS, 1, 3))  # readers may see this before they are held, or never from the old one
        Noted.may.set()
        promoted.result()
    (switch,) = Noted.switches
    assert last.version <= switch.before <= switch.after <= newer.version


def test_a_new_generation_that_does_not_come_to_the_common_lsn_is_not_promoted(
    two: Control, feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = Version(1, feed.lsn + 10)
    with monkeypatch.context() as hasty:
        hasty.setattr(verbs, "_PATIENCE_SECONDS", 3.0)
        with pytest.raises(Misconfigured) as behind:
            two.ask("one", "promote", {"at": list(ahead)})
    assert behind.value.code == "generation-behind"
    assert feed.cut((ITEMS, 1, 1)).version == ahead
    eventually("the old one goes on", lambda: report(two, "one", 1).version == ahead)
    assert Version(*two.ask("one", "promote", {"at": list(ahead)})["version"]) == ahead


def test_several_are_promoted_by_the_command(two: Control, settings: Settings) -> None:
    said = orjson.loads(command(settings, "promote", "one", "other", "--json").stdout)
    assert [(each["name"], each["generation"]) for each in said] == [("one", 2), ("other", 2)]
    for name in ("one", "other"):
        assert [generation.live for generation in Noted(settings, name).generations()] == [False, True]
    assert command(settings, "promote", "one", "other", "--generation", "2").exit_code == 2


def test_a_failure_half_way_says_where_each_view_stands_and_leaves_nothing_held(
    two: Control, feed: Feed, settings: Settings
) -> None:
    Noted.refuses.add("other")
    with pytest.raises(Misconfigured, match="one: generation 2 is live") as failed:
        together.promote(two, {"one": None, "other": None})
    assert failed.value.message.endswith("other: not promoted.")
    assert (failed.value.code, failed.value.remedy) == ("stuck", "Free it. Then: headrace promote other")
    Noted.refuses.clear()
    last = feed.cut((ITEMS, 1, 7))
    for name in ("one", "other"):
        await_version(two, name, last.version)
    assert [generation.live for generation in Noted(settings, "one").generations()] == [False, True]
    assert [generation.live for generation in Noted(settings, "other").generations()] == [True, False]
    assert command(settings, "promote", "other").exit_code == 0


def test_one_that_cannot_be_promoted_is_found_before_any_pointer_moves(two: Control, feed: Feed) -> None:
    two.ask("other", "drop", {"generation": 2})
    with pytest.raises(Misconfigured, match="one: not promoted") as failed:
        together.promote(two, {"one": None, "other": None})
    assert failed.value.code == "nothing-to-promote"
    assert Noted.switches == []
    last = feed.cut((ITEMS, 1, 7))
    await_version(two, "one", last.version)


def test_there_is_no_generation_0(two: Control, settings: Settings) -> None:
    """It is not the newest one, nor the live one."""
    for verb in ("promote", "verify"):
        assert command(settings, verb, "one", "--generation", "0").exit_code == 2
    with pytest.raises(Misconfigured) as refused:
        two.ask("one", "promote", {"generation": 0})
    assert refused.value.code == "no-such-generation"
    two.ask("one", "drop", {"generation": 2})
    with pytest.raises(Misconfigured) as refused:
        two.ask("one", "promote", {"generation": 0})
    assert refused.value.code == "no-such-generation"
    assert report(two, "one", 1).live


def test_no_view_is_rebuilt_where_nobody_runs_one_of_them(two: Control, settings: Settings) -> None:
    two.ask("one", "drop", {"generation": 2})
    refused = command(settings, "rebuild", "one", "nobody").exception
    assert isinstance(refused, Misconfigured)
    assert (refused.code, [each.generation for each in two.running("one")]) == ("consumer-not-running", [1])
    two.ask("other", "pause")
    refused = command(settings, "rebuild", "one", "other").exception
    assert isinstance(refused, Misconfigured)
    assert refused.code == "view-paused"
    assert refused.message.endswith("Generation 2 of one is being built.")
    await_phase(two, "one", 2, "following")


class Frees(Control):
    """Lets new generations go on before it releases anything."""

    def ask(self, name: str, verb: str, args: dict[str, Any] | None = None, timeout: float = 30.0) -> dict[str, Any]:
        if verb == "release":
            Noted.may.set()
        return super().ask(name, verb, args, timeout)


def test_who_does_not_answer_when_it_is_to_be_held_is_the_one_to_look_at(
    two: Control, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = threading.Event()

    reaches = verbs._reach

    def reach(*asked: Any) -> bool:
        busy.set()
        return reaches(*asked)

    monkeypatch.setattr(verbs, "_reach", reach)
    monkeypatch.setattr(together, "_SECONDS", 6.0)
    Noted.may.clear()
    feed.cut((ITEMS, 1, 7))
    eventually("the old one goes on", lambda: Noted(feed.log.settings, "other").rows() == {KEY: 7})
    with ThreadPoolExecutor() as threads:
        promoted = threads.submit(two.ask, "other", "promote")
        assert busy.wait(30)
        with pytest.raises(Transient) as silent:
            together.promote(Frees(feed.log), {"one": None, "other": None})
        assert promoted.result()["generation"] == 2
    assert silent.value.code == "no-answer"
    assert silent.value.message.endswith("one: not promoted. other: see headrace status other.")


def test_who_dies_between_hold_and_promote_leaves_nothing_held(
    two: Control, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "HOLD_SECONDS", 1.0)
    stood = Version(*two.ask("one", "hold")["version"])
    last = feed.cut((ITEMS, 1, 7))
    eventually("the new generation goes on", lambda: report(two, "one", 2).version == last.version)
    assert stood < last.version
    eventually("the old one too, by itself", lambda: report(two, "one", 1).version == last.version)
    with pytest.raises(Transient) as late:
        two.ask("one", "promote", {"at": list(stood)})
    assert late.value.code == "hold-ended"
    assert two.ask("one", "promote")["generation"] == 2


def test_a_held_view_shows_nothing_newer_until_it_is_released(two: Control, feed: Feed, settings: Settings) -> None:
    stood = two.ask("one", "hold")["version"]
    last = feed.cut((ITEMS, 1, 7))
    eventually("the new generation goes on", lambda: report(two, "one", 2).version == last.version)
    assert Noted(settings, "one").rows() == {KEY: 0}
    assert two.ask("one", "hold")["version"] == stood
    two.ask("one", "release")
    eventually("it goes on", lambda: Noted(settings, "one").rows() == {KEY: 7})


def test_a_view_that_waits_amid_a_state_is_held_as_if_readers_had_seen_it_all_also_when_it_comes_back(
    two: Control, feed: Feed, settings: Settings
) -> None:
    """S24: its rows are there, its position is not. It shows nothing newer, and no other view anything older."""
    Noted.fails.set()
    first = feed.cut((ITEMS, 1, 7))
    await_phase(two, "one", 1, "waiting")
    assert Noted(settings, "one").rows() == {KEY: 7}
    assert Noted(settings, "one").version(1) < first.version
    assert two.ask("one", "hold", {"compare": True})["version"] == list(NOWHERE), "its rows are of no state"
    assert two.ask("one", "hold")["version"] == list(first.version)
    (live, _) = Noted(settings, "one").generations()
    opened = Worker(Log(settings), lambda: Noted(settings, "one"), live)  # after a kill there
    opened.stand(60)
    opened.start()
    assert opened.hold(60, 30, whole=False) == first.version
    opened.stop()
    feed.cut((ITEMS, 1, 8))
    Noted.fails.clear()
    eventually("it has come back", lambda: report(two, "one", 1).phase in {"live", "catching up"})
    assert two.ask("one", "hold")["version"] == list(first.version)
    assert Noted(settings, "one").rows() == {KEY: 7}
    assert two.ask("one", "promote", {"at": list(first.version)})["generation"] == 2


class Piecemeal(Plain):
    """Its first generation, once it is live, applies a piece when it may, and comes to no state before that."""

    may: ClassVar[threading.Semaphore] = threading.Semaphore(0)
    begun: ClassVar[threading.Event] = threading.Event()

    def apply(self, batch: Batch) -> None:
        if self._number == 1 and not batch.loading:
            self.begun.set()
            assert self.may.acquire(timeout=60)
        super().apply(batch)


class Telling(EffectConsumer):
    """Tells of a piece when it may."""

    tables = (ITEMS,)
    may: ClassVar[threading.Semaphore] = threading.Semaphore(0)
    begun: ClassVar[threading.Event] = threading.Event()

    def effect(self, changes: Sequence[Change]) -> None:
        self.begun.set()
        assert self.may.acquire(timeout=60)


def test_a_live_view_is_held_amid_its_backlog_for_a_promotion_and_not_to_be_compared(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody needs it to catch up first, which may take hours: readers see nothing of its pieces. Of effects they do."""
    for each in (Piecemeal, Telling):
        monkeypatch.setattr(each, "may", threading.Semaphore(0))
        monkeypatch.setattr(each, "begun", threading.Event())
    asked, stand = threading.Event(), Worker.stand

    def stands(worker: Worker, *args: Any, **options: Any) -> None:
        stand(worker, *args, **options)
        asked.set()

    monkeypatch.setattr(Worker, "stand", stands)
    first = feed.cut((ITEMS, 1, 0))
    views: dict[str, type[Any]] = {"plain": Piecemeal, "calls": Telling}
    with serving(replace(settings, batch_records=2), **views) as control, ThreadPoolExecutor(1) as pool:
        await_live(control, *views)
        for name in views:
            assert control.ask(name, "rebuild") == {"generation": 2}
            await_phase(control, name, 2, "following")
        last = feed.cut(*((ITEMS, n, n) for n in range(40)))
        for name, view in views.items():
            eventually("the new one has caught up", lambda name=name: report(control, name, 2).version == last.version)
            assert view.begun.wait(30)
        try:
            with monkeypatch.context() as patched:
                patched.setattr(verbs, "_PATIENCE_SECONDS", 1.0)
                compared = pool.submit(control.ask, "plain", "hold", {"compare": True})
                assert asked.wait(30)
                Piecemeal.may.release(2)
                with pytest.raises(Transient) as refused:
                    compared.result()
            assert refused.value.code == "does-not-hold"
            asked.clear()
            held = pool.submit(control.ask, "calls", "hold")
            assert asked.wait(30)
            Telling.may.release(1000)
            assert held.result() == {"generation": 2, "version": list(last.version)}, "what its pieces did is done"
            asked.clear()
            promoted = pool.submit(control.ask, "plain", "promote")
            assert asked.wait(30)
            Piecemeal.may.release()
            assert promoted.result() == {"generation": 2, "version": list(last.version), "before": 1}
            assert Piecemeal(settings, "plain").version(1) == first.version, "it is still amid its backlog"
        finally:
            Piecemeal.may.release(1000)
            Telling.may.release(1000)
        eventually("the old one goes on", lambda: report(control, "plain", 1).version == last.version)


def test_a_promotion_that_is_answered_as_busy_does_not_happen_later(
    two: Control, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    stood = two.ask("one", "hold")["version"]
    Noted.may.clear()
    last = feed.cut((ITEMS, 1, 7))
    assert Noted.waits.wait(30)
    monkeypatch.setattr(generations, "CALL_SECONDS", 1.0)
    with pytest.raises(Transient) as busy:
        two.ask("one", "promote", {"at": stood})
    assert busy.value.code == "worker-busy"
    Noted.may.set()
    await_version(two, "one", last.version)
    assert Noted.switches == []
    assert report(two, "one", 1).live


def test_a_drop_of_everything_that_is_answered_as_busy_does_not_happen_later(
    two: Control, feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Noted.may.clear()
    feed.cut((ITEMS, 1, 7))
    assert Noted.waits.wait(30)
    monkeypatch.setattr(generations, "CALL_SECONDS", 1.0)
    with pytest.raises(Transient) as busy:
        two.ask("one", "drop", {"all": True})
    assert busy.value.code == "worker-busy"
    assert two.kept("one", "standing") == [{}]
    Noted.may.set()
    last = feed.cut((ITEMS, 1, 8))
    await_version(two, "one", last.version)
    assert [generation.live for generation in Noted(settings, "one").generations()] == [True, False]


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


# Standing still, and gone


def test_a_paused_view_is_readable_and_still_also_after_a_restart(feed: Feed, settings: Settings) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        assert command(settings, "pause", "plain").exit_code == 0
        feed.cut((ITEMS, 1, 2))
        await_phase(control, "plain", 1, "paused")
        assert [row.value["n"] for row in control.scan("plain")] == [1]
        assert "headrace resume plain" in command(settings, "rebuild", "plain").exception.remedy
    with serving(settings, plain=Plain) as control:
        await_phase(control, "plain", 1, "paused")
        checked = command(settings, "status", "plain", "--check")
        assert checked.exit_code == 1
        assert "paused for 168 hours" in checked.stdout
        assert view.rows() == {KEY: 1}
        assert command(settings, "resume", "plain").exit_code == 0
        eventually("it goes on", lambda: view.rows() == {KEY: 2})
        await_phase(control, "plain", 1, "live")
    with serving(settings, plain=Plain) as control:
        feed.cut((ITEMS, 1, 3))
        eventually("it still goes on", lambda: view.rows() == {KEY: 3})


class Stuck(Plain):
    """Its first generation applies nothing while `may` is not set, and says by `waits` that something has come. `late`: it waits first."""

    may: ClassVar[threading.Event] = threading.Event()
    waits: ClassVar[threading.Event] = threading.Event()
    late: ClassVar[threading.Event] = threading.Event()

    def apply(self, batch: Batch) -> None:
        if self._number == 1 and self.late.is_set() and batch.changes:
            self.late.clear()
            raise Transient("plain-away", "Its store is away.", "Wait.")
        if self._number == 1 and not self.may.is_set():
            self.waits.set()
            self.may.wait(60)
        super().apply(batch)


@pytest.mark.parametrize("waited", [False, True])
def test_all_generations_of_a_view_stand_when_one_was_too_busy_to_be_paused_at_once(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch, waited: bool
) -> None:
    """Also one that has waited until just now, and says so yet."""
    Stuck.may.set()
    Stuck.waits.clear()
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Stuck) as control:
        await_live(control, "plain")
        build(control, 2)
        Stuck.may.clear()
        if waited:
            Stuck.late.set()
        feed.cut((ITEMS, 1, 2))
        assert Stuck.waits.wait(30)
        monkeypatch.setattr(generations, "CALL_SECONDS", 1.0)
        monkeypatch.setattr(generations, "_STATE_SECONDS", 1.0)
        with pytest.raises(Transient, match="plain is recorded as paused, and stands as soon as that is over") as busy:
            control.ask("plain", "pause")
        assert busy.value.code == "worker-busy"
        await_phase(control, "plain", 2, "paused")
        Stuck.may.set()
        await_phase(control, "plain", 1, "paused")
        control.ask("plain", "resume")
        last = feed.cut((ITEMS, 1, 3))
        await_version(control, "plain", last.version)


def test_a_view_that_was_paused_for_longer_than_tombstones_stay_is_refused(feed: Feed, settings: Settings) -> None:
    """S19."""
    settings = replace(settings, delete_retention_ms=2000)
    cut = feed.cut((ITEMS, 1, 1))
    began = time.time()
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        control.ask("plain", "pause")
        feed.cut((ITEMS, 1, None))
        eventually("its last state is that old", lambda: time.time() > began + 2.5)
        control.ask("plain", "resume")
        assert await_phase(control, "plain", 1, "stopped").code == "away-too-long"
        assert report(control, "plain", 1).version == cut.version
        assert control.ask("plain", "rebuild") == {"generation": 2}


def test_a_dropped_view_stays_so_until_it_is_rebuilt(feed: Feed, settings: Settings) -> None:
    view = Plain(settings, "plain")
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        control.ask("plain", "rebuild")
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
        assert control.ask("plain", "rebuild") == {"generation": 1}
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


class Newer(Plain):
    """Other code, for all that a fingerprint knows."""


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
        assert await_phase(control, "plain", 2, "live").version == last.version
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


KEPT = {"": {"generations": [1, 2], "left": [], "refused": []}}


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
    monkeypatch.setattr(verbs, "_PATIENCE_SECONDS", 5.0)
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Fails) as control:
        await_live(control, "plain")
        build_and_promote(control, 2)
        last = feed.cut((ITEMS, 1, 13))
        await_phase(control, "plain", 1, "stopped")
        eventually("the live one has it", lambda: report(control, "plain", 2).version == last.version)
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


def live_of(settings: Settings) -> list[int]:
    return [generation.number for generation in Plain(settings, "plain").generations() if generation.live]


def lose_pointer(settings: Settings, *gone: int) -> None:
    """Let the store forget which generation is live, and some generations."""
    with closing(sqlite3.connect(settings.path("plain.sqlite"))) as db, db:
        db.execute("UPDATE generations SET live = 0")
        db.executemany("DELETE FROM generations WHERE number = ?", [(number,) for number in gone])


def build(control: Control, number: int) -> None:
    """Build a generation, of this number, beside the live one."""
    assert control.ask("plain", "rebuild") == {"generation": number}
    await_phase(control, "plain", number, "following")


def build_and_promote(control: Control, *numbers: int) -> None:
    for number in numbers:
        build(control, number)
        control.ask("plain", "promote")


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


# Gates


@contextmanager
def captured(settings: Settings, **views: type[Any]) -> Iterator[Control]:
    with capturing(settings) as capture, serving(settings, **views) as control:
        capture.reach()
        await_live(control, *views)
        yield control


@pytest.mark.parametrize("gate", ["verify", "counts"])
def test_a_build_that_differs_is_refused_and_stays_beside_the_live_one(settings: Settings, gate: str) -> None:
    prepare(
        settings, "CREATE TABLE items (id int PRIMARY KEY, n int)", "INSERT INTO items VALUES (1, 1), (2, 2), (3, 3)"
    )
    view = Plain(settings, "plain")
    with captured(settings, plain=Loses) as control:
        spec = ("--consumer", f"{PLAIN}:Loses")
        ended = headrace(settings, "rebuild", "plain", "--wait", "--gate", gate, *spec)
        assert ended.returncode == 1, ended.stdout + ended.stderr
        assert "generation 2 of plain differs from Postgres" in ended.stderr
        assert "headrace drop plain 2, then: headrace rebuild plain" in ended.stderr
        assert [generation.live for generation in view.generations()] == [True, False]
        lose_pointer(settings)
        eventually("readers have theirs again", lambda: live_of(settings) == [1])
        ended = headrace(settings, "rebuild", "plain", "--wait", "--gate", "none", "--json")
        assert ended.returncode == 0, ended.stderr
        eventually("it is live", lambda: control.running("plain")[-1].live)


def test_nothing_is_built_where_the_gate_could_not_ask_the_code_that_runs(
    feed: Feed, settings: Settings, tmp_path: Path
) -> None:
    """It would be found out after the build, which may take hours."""
    feed.cut((ITEMS, 1, 1))
    newer = tmp_path / "newer.py"
    newer.write_text(PLAIN.read_text() + "# other code\n")
    specs = {"other-code": (f"{newer}:Plain",), "unknown-consumer": (f"{newer.parent}/none.py:Plain",)}
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        for code, spec in (*specs.items(), ("unknown-consumer", ())):
            options = [word for each in spec for word in ("--consumer", each)]
            refused = command(settings, "rebuild", "plain", "--wait", *options).exception
            assert isinstance(refused, Misconfigured)
            assert refused.code == code
            if code == "other-code":
                assert "start that process again, then: headrace rebuild plain --wait" in refused.remedy
        assert [generation.number for generation in Plain(settings, "plain").generations()] == [1]


def test_nothing_is_built_by_code_that_was_changed_since(feed: Feed, settings: Settings, tmp_path: Path) -> None:
    """It would be what runs, again and again; started anew the process has the new one."""
    feed.cut((ITEMS, 1, 1))
    file = tmp_path / "view.py"
    file.write_text(PLAIN.read_text())
    view = Plain(settings, "plain")
    with serving(settings, plain=plugins.load_file(f"{file}:Plain")[1]) as control:
        await_live(control, "plain")
        for saved in ("# other code\n", "half a line("):
            file.write_text(PLAIN.read_text() + saved)
            with pytest.raises(Misconfigured, match="changed after its process had been started") as refused:
                control.ask("plain", "rebuild")
            assert refused.value.code == "other-code"
            assert "Start that again, then: headrace rebuild plain" in refused.value.remedy
        assert [generation.number for generation in view.generations()] == [1]
    file.write_text(PLAIN.read_text() + "# other code\n")
    with serving(settings, plain=plugins.load_file(f"{file}:Plain")[1]) as control:
        await_phase(control, "plain", 1, "stale")
        assert command(settings, "rebuild", "plain", "--wait", "--gate", "none").exit_code == 0
        assert live_of(settings) == [2]


def test_neither_what_a_gate_refused_nor_what_was_rolled_back_from_goes_live_by_itself(
    feed: Feed, settings: Settings
) -> None:
    """Also after a restart, when nothing else is left; a person may still want it."""
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        build_and_promote(control, 2)
        control.ask("plain", "rollback")
        lose_pointer(settings)
        build(control, 3)
        control.ask("plain", "refuse", {"generation": 3})
    lose_pointer(settings, 1)
    with serving(settings, plain=Plain) as control:
        for number in (2, 3):
            await_phase(control, "plain", number, "following")
        eventually("that is said", lambda: report(control, "plain", 3).code == "not-by-itself")
        assert live_of(settings) == []
        control.ask("plain", "promote", {"generation": 3})
        assert live_of(settings) == [3]
        eventually("it is live, and well", lambda: report(control, "plain", 3).code == "")
    lose_pointer(settings)
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
    assert live_of(settings) == [3]


def test_a_first_build_that_differs_is_said_to_be_live_already(settings: Settings, tmp_path: Path) -> None:
    """Where nothing is live the first state goes live by itself: there is nothing that readers could keep instead.

    So it is said of one that could not be compared, because verify was killed.
    """
    dies = tmp_path / "dies.py"
    killed = "import os, sys\nif 'verify' in sys.argv and os.path.exists(__file__ + '.dies'): os.kill(os.getpid(), 9)\n"
    dies.write_text(f"{PLAIN.read_text()}\n{killed}")
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n int)", "INSERT INTO items VALUES (1, 1), (2, 2)")
    view = Plain(settings, "plain")
    with captured(settings, plain=plugins.load_file(f"{dies}:Lacks")[1]) as control:
        control.ask("plain", "drop", {"all": True})
        ended = headrace(settings, "rebuild", "plain", "--wait", "--consumer", f"{dies}:Lacks")
        assert ended.returncode == 1, ended.stdout + ended.stderr
        assert "generation 1 of plain differs from Postgres; it is live already, for no other was" in ended.stderr
        assert "nothing was promoted" not in ended.stderr
        assert [generation.live for generation in view.generations()] == [True]
        dies.with_suffix(".py.dies").touch()
        ended = headrace(settings, "rebuild", "plain", "--wait", "--consumer", f"{dies}:Lacks")
        assert (ended.returncode, "killed by signal 9. Nothing was promoted" in ended.stderr) == (5, True), ended.stderr
        assert [generation.live for generation in view.generations()] == [True, False]


def test_counts_are_exact_while_rows_come_and_go(settings: Settings) -> None:
    prepare(
        settings,
        "CREATE TABLE items (id int PRIMARY KEY, n int)",
        "INSERT INTO items SELECT i FROM generate_series(1, 50) i",
    )
    with captured(settings, plain=Plain), ticks.repeating(settings, *COMING_AND_GOING, every=0.01):
        counts: list[int] = []
        for _ in range(3):
            counted = headrace(settings, "verify", "--consumer", f"{PLAIN}:Plain", "--counts", "--json")
            assert counted.returncode == 0, counted.stdout + counted.stderr
            (fact,) = orjson.loads(counted.stdout)
            counts.append(fact["rows"])
        assert counts == sorted(set(counts)), "there were more each time"


COMING_AND_GOING = (
    "INSERT INTO items SELECT top + i FROM (SELECT max(id) AS top FROM items) t, generate_series(1, 3) i",
    "UPDATE items SET id = -id WHERE id = (SELECT max(id) FROM items)",
    "DELETE FROM items WHERE id = (SELECT min(id) FROM items)",
)


def headrace(settings: Settings, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "headrace", *words],
        env=os.environ | environment(settings) | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# New code against what runs


def test_a_replay_shows_what_new_code_would_add_remove_and_change(feed: Feed, settings: Settings) -> None:
    last = feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20), (ITEMS, 3, 30))
    spec = f"{PLAIN}:Doubled"
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        ended = command(settings, "replay", "doubled", "--consumer", spec, "--against", "plain", "--diff", "--json")
        assert ended.exit_code == 1, ended.output
        said = orjson.loads(ended.stdout)
        assert (said["against"], said["generation"], said["lsn"]) == ("plain", 1, f"0/{last.version.lsn:X}")
        assert {kind: said[kind] for kind in ("added", "removed", "changed", "same")} == {
            "added": 1,
            "removed": 1,
            "changed": 1,
            "same": 1,
        }
        assert [(each["kind"], each["key"]) for each in said["documents"]] == [
            ("changed", KEY),
            ("removed", '{"id":2}'),
            ("added", '{"id":9}'),
        ]
        assert (said["documents"][0]["before"], said["documents"][0]["after"]) == ({"n": 10}, {"n": 100})
        shown = command(
            settings, "replay", "doubled", "--consumer", spec, "--against", "plain", "--diff", "--limit", "1"
        )
        assert "n: 10 → 100" in shown.stdout
        assert "1 added, 1 removed, 1 changed, 1 same" in shown.stdout
        assert "~" not in command(settings, "replay", "doubled", "--consumer", spec, "--against", "plain").stdout
        last = feed.cut((ITEMS, 3, 31))
        eventually("the live one goes on", lambda: report(control, "plain", 1).version == last.version)
    assert [generation.number for generation in Plain(settings, "plain").generations()] == [1]
    assert sorted(control.reports()) == ["plain"], "nobody heard of the scratch generation"


@pytest.mark.usefixtures("redis_server")
def test_the_same_code_changes_nothing_in_any_store_while_all_rows_change(
    settings: Settings, elasticsearch: Elasticsearch
) -> None:
    """Both sides are compared at one LSN; the alias and the prefix of the live views are fixed in their classes."""
    prepare(settings, *ticks.MAKE)
    views = {
        "found": ticks.TicksFound,
        "pages": ticks.TicksPages,
        "stream": ticks.TicksStream,
        "warehouse": Warehouse,
    }
    with captured(settings, **views) as control, ticks.repeating(settings, ticks.TICK):
        for name, code in views.items():
            spec = ("--consumer", f"{ticks.FILE}:{code.__name__}") if code is not Warehouse else ()
            ended = headrace(settings, "replay", name, *spec, "--diff", "--json")
            assert ended.returncode == 0, ended.stdout + ended.stderr
            assert orjson.loads(ended.stdout)["same"] == ticks.ROWS
        spec = ("--consumer", f"{ticks.FILE}:NewFound")
        ended = headrace(settings, "replay", "found", *spec, "--diff", "--json")
        said = orjson.loads(ended.stdout)
        assert {kind: said[kind] for kind in ("added", "removed", "changed")} == {
            "added": 0,
            "removed": 1,
            "changed": 1,
        }
        assert said["documents"][-1]["after"] == {"word": "two"}
        for name, consumer in views.items():
            assert [generation.number for generation in consumer(settings, name).generations()] == [1]
            assert leftovers(settings, name, consumer) == []
        assert {each.generation for name in views for each in control.reports()[name]} == {1}


@pytest.mark.usefixtures("redis_server")
def test_what_a_killed_replay_leaves_behind_the_next_one_drops(settings: Settings, tmp_path: Path) -> None:
    """And its folder goes at once."""
    prepare(settings, *ticks.MAKE)
    words = ("replay", "pages", "--consumer", f"{ticks.FILE}:TicksPages")
    env = os.environ | environment(settings) | {"TMPDIR": str(tmp_path)}
    with captured(settings, pages=ticks.TicksPages) as control:
        process = subprocess.Popen([sys.executable, "-m", "headrace", *words], env=env)
        kept = lambda: list(tmp_path.glob("headrace-replay-*/**/*.sqlite"))  # noqa: E731  made once the store is open
        eventually("it has begun to build", lambda: leftovers(settings, "pages", ticks.TicksPages) and kept())
        process.kill()
        process.wait()
        eventually("its folder is gone", lambda: not list(tmp_path.glob("headrace-replay-*")))
        assert leftovers(settings, "pages", ticks.TicksPages), "killed before its end"
        control.ask("pages", "release")
        assert headrace(settings, *words).returncode == 0
        assert leftovers(settings, "pages", ticks.TicksPages) == []
        assert [generation.live for generation in ticks.TicksPages(settings, "pages").generations()] == [True]


@pytest.mark.usefixtures("redis_server")
def test_a_view_is_dropped_whole_from_every_store_and_built_anew(
    settings: Settings, elasticsearch: Elasticsearch
) -> None:
    prepare(settings, *ticks.MAKE)
    views = {
        "found": ticks.TicksFound,
        "pages": ticks.TicksPages,
        "stream": ticks.TicksStream,
        "warehouse": Warehouse,
    }
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


def leftovers(settings: Settings, name: str, consumer: type[Any]) -> list[Generation]:
    scratch = consumer(settings, name if consumer is Warehouse else f"{name}--replay")  # a file is one consumer's
    return [generation for generation in scratch.generations() if generation.number == NUMBER]


def test_what_has_effects_is_not_replayed(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "purge.py"
    file.write_text(
        "from headrace.effects import EffectConsumer\n\nclass Purge(EffectConsumer):\n    tables = ['public.items']\n"
    )
    refused = command(settings, "replay", "--consumer", f"{file}:Purge").exception
    assert isinstance(refused, Misconfigured)
    assert refused.code == "replay-no-view"


def test_a_replay_against_a_view_that_stands_still_builds_nothing(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Scratch] = []
    monkeypatch.setattr(Scratch, "build", lambda scratch, *_: built.append(scratch))
    feed.cut((ITEMS, 1, 1))
    words = ("replay", "doubled", "--consumer", f"{PLAIN}:Doubled", "--against", "plain")
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        control.ask("plain", "pause")
        eventually("it is paused", lambda: report(control, "plain", 1).phase == "paused")
        paused = command(settings, *words)
        control.ask("plain", "resume")
    with serving(settings, plain=Doubled) as control:
        eventually("it is stale", lambda: report(control, "plain", 1).phase == "stale")
        stale = command(settings, *words)
    for ended, code in ((paused, "view-paused"), (stale, "stale-generation")):
        assert isinstance(ended.exception, Misconfigured), ended.output
        assert ended.exception.code == code
    assert not built


def test_a_replay_against_a_view_that_nobody_runs_says_so(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 1))
    ended = command(settings, "replay", "doubled", "--consumer", f"{PLAIN}:Doubled", "--against", "plain").exception
    assert isinstance(ended, Misconfigured)
    assert ended.code == "consumer-not-running"


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
        assert Slow.begun.wait(30)
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
