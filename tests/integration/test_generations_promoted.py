"""Views promoted at one LSN, several at once: no old generation has shown more, no new one shows less, and nothing is left held."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import orjson
import pytest

from headrace.change import NOWHERE, Change, Version
from headrace.cli import together
from headrace.consumer import Batch
from headrace.control import Control
from headrace.effects import EffectConsumer
from headrace.errors import Misconfigured, Transient
from headrace.log import Log
from headrace.runner import generations, verbs
from headrace.runner.worker import Worker
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, Feed, writing
from tests.fixtures.generations import KEY, Noted, await_phase, await_version, command, report
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving


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


class Listening(Control):
    """Keeps what was asked and answered."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self.heard: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def ask(self, name: str, verb: str, args: dict[str, Any] | None = None, timeout: float = 30.0) -> dict[str, Any]:
        answer = super().ask(name, verb, args, timeout)
        self.heard.append((verb, args or {}, answer))
        return answer


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
        hasty.setattr(verbs, "_PATIENCE_SECONDS", 10.0)
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
    monkeypatch.setattr(together, "_SECONDS", 10.0)
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
