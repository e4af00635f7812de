"""Documents whose view is refused, held, dropped or cannot be rendered: readers keep what they saw, and who asks hears why."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.change import NOWHERE, Position, Version
from headrace.documents import DocumentConsumer
from headrace.errors import Misconfigured, Refused, Transient
from headrace.log import Lag
from headrace.runner.generations import Generations
from headrace.runner.worker import Worker
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.documents import GENERATION, World, shop


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(Settings(state=str(tmp_path / "state")))


@pytest.mark.parametrize("shown", ["shown", "wiped", ""])
@pytest.mark.parametrize("stop_after", [0, 2], ids=["begun", "resumed"])
def test_a_reload_that_is_refused_keeps_what_readers_have_seen_and_begins_a_build_again(
    world: World, stop_after: int, shown: str
) -> None:
    """The one is what a rollback goes to [I8]; the other, also of what was wiped, would stop for nobody's sake."""
    opened: list[Position | None] = []

    def refuse(_tables: Any, position: Position | None, *_: Any) -> None:
        opened.append(position)
        if len(opened) > 1:
            raise Misconfigured("enough", "It is opened anew.", "Look at it.")
        raise Refused("away-too-long", "Its pieces are older than tombstones stay.")

    shop(world.log)
    world.run()
    world.lose_local()
    if shown == "wiped":
        world.store.wipe()
    world.run(piece=1, stop_after=stop_after)
    log: Any = SimpleNamespace(settings=world.settings, topics=SimpleNamespace(names=set), reader=refuse)
    worker = Worker(log, world.start, GENERATION)
    worker.shown = bool(shown)
    worker.start()
    try:
        eventually("it has stopped", lambda: worker.state.phase == "stopped")
        if shown == "shown":
            asked = worker.call(lambda _consumer: worker.state.version)
            assert (asked.result(5), len(opened)) == (Version(1, 100), 1)
            world.check()
        else:
            assert (len(opened), opened[1], world.store.bodies()) == (2, None, {})
    finally:
        worker.stop()
        worker.join()


def test_a_view_that_reloads_is_held_at_what_readers_see(world: World) -> None:
    """S24: they would go back in time by a promotion of anything."""
    shop(world.log)
    world.run()
    world.lose_local()
    reader = SimpleNamespace(newest=None, position=Position(), lag=lambda: Lag(9, 9, 9.0), poll=lambda _seconds: None)
    reader.mirror = reader.close = lambda: None
    log: Any = SimpleNamespace(settings=world.settings, topics=SimpleNamespace(names=set), reader=lambda *_: reader)
    worker = Worker(log, world.start, GENERATION)
    worker.start()
    try:
        assert worker.hold(5, 5, whole=False) == Version(1, 100)
        worker.release()
        eventually("it loads", lambda: worker.state.phase == "loading")
        assert (worker.state.version, worker.seen) == (NOWHERE, Version(1, 100))
    finally:
        worker.stop()
        worker.join()


def test_who_asks_a_worker_that_ends_hears_so(world: World) -> None:
    """Else the promotion of a first build would be waited for, and never tried again."""
    log: Any = SimpleNamespace(settings=world.settings)
    worker = Worker(log, world.start, GENERATION)
    worker.stop()
    asked = worker.call(lambda _consumer: None)
    worker.start()
    worker.join()
    with pytest.raises(Transient) as told:
        asked.result(0)
    assert told.value.code == "worker-busy"


def test_a_refused_view_answers_again_whatever_its_consumer_raised(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By when it is made once more it can be read."""
    monkeypatch.setattr("headrace.runner.worker._BACKOFF_SECONDS", (0.05, 0.05))
    made: list[DocumentConsumer] = []

    def fail(*_: Any) -> None:
        raise OSError("Too many open files")

    def make() -> DocumentConsumer:
        made.append(world.start())
        if len(made) == 2:
            fail()
        if len(made) == 3:
            made[-1].open = made[-1].close = fail  # type: ignore[method-assign, assignment]
        return made[-1]

    def refuse(*_: Any) -> None:
        raise Refused("away-too-long", "Its pieces are older than tombstones stay.")

    shop(world.log)
    world.run()
    log: Any = SimpleNamespace(settings=world.settings, topics=SimpleNamespace(names=set), reader=refuse)
    worker = Worker(log, make, replace(GENERATION, live=True))
    worker.start()
    try:
        eventually("it is made once more", lambda: len(made) == 4)
        assert worker.call(lambda consumer: consumer.count()).result(10) == {"": 2}
    finally:
        worker.stop()
        worker.join()


def test_a_drop_that_is_carried_out_when_nobody_waits_for_it_ends_the_generation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be opened anew, and built again."""
    monkeypatch.setattr("headrace.runner.generations.CALL_SECONDS", 0.1)
    shop(world.log)
    world.run()
    waits, forgotten = threading.Event(), []
    reader = SimpleNamespace(newest=None, position=Position(), lag=lambda: Lag(9, 9, 9.0), poll=lambda _seconds: None)
    reader.mirror = reader.close = lambda: None
    log: Any = SimpleNamespace(settings=world.settings, topics=SimpleNamespace(names=set), reader=lambda *_: reader)
    control: Any = SimpleNamespace(forget=lambda _, number: forgotten.append(number), keep=lambda *_: None)
    generations = Generations(log, control, "products", world.cls)
    generations.make, generations._shelf = world.start, SimpleNamespace(clear=lambda *_: None)  # type: ignore[assignment]
    monkeypatch.setattr(world.store, "drop", lambda: waits.wait(30) and world.store.wipe())
    worker = generations.workers[1] = Worker(log, world.start, GENERATION)
    worker.start()
    try:
        eventually("it follows", lambda: worker.follows)
        with pytest.raises(Transient) as told:
            generations.drop(1)
        assert (told.value.code, worker.is_alive()) == ("worker-busy", True)
        waits.set()
        worker.join(30)
        assert not worker.is_alive()
        assert world.store.position is None
    finally:
        worker.stop()
        worker.join()
    generations._serve({2: replace(GENERATION, number=2, fingerprint="other", live=True)})
    generations.workers[2].stop()
    assert (forgotten, list(generations.workers)) == ([1], [2])


def test_a_first_build_is_not_promoted_when_somebody_has_promoted_another_meanwhile(world: World) -> None:
    """It was in a long apply when it was asked to go live by itself."""
    log: Any = SimpleNamespace(settings=world.settings)
    generations = Generations(log, Any, "products", world.cls)  # type: ignore[arg-type]
    for number in (1, 2):
        generations.workers[number] = Worker(log, world.start, replace(GENERATION, number=number))
        generations.workers[number].state.version = Version(1, 100)
    shown: list[int] = []
    held = {number: worker.generation for number, worker in generations.workers.items()}
    generations._serve(held)
    function, _ = generations.workers[2]._calls.get_nowait()
    function(SimpleNamespace(promote=lambda: shown.append(2)))  # type: ignore[arg-type]
    assert shown == [2], "none is live"
    generations._serve(held | {1: replace(GENERATION, live=True)})
    function(SimpleNamespace(promote=lambda: shown.append(2)))  # type: ignore[arg-type]
    assert shown == [2]


def test_a_reload_is_refused_when_tombstones_may_be_gone(world: World) -> None:
    shop(world.log)
    world.run()
    world.lose_local()
    consumer = world.start()
    consumer.open(GENERATION)
    batch = next(world.log.batches(None))
    batch.position.appended = int(time.time() * 1000) + world.settings.delete_retention_ms + 1
    with pytest.raises(Refused, match=r"delete\.retention\.ms"):
        consumer.apply(batch)
