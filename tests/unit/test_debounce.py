"""Documents that are rendered at most once in a while: what waits, until when, and that nothing of it is lost."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as rules
from hypothesis import strategies as st

from headrace.change import Checkpoint, Version
from headrace.consumer import Batch
from headrace.documents import consumer, local, when
from headrace.settings import Settings
from tests.fixtures.documents import (
    CATEGORIES,
    GENERATION,
    NOW,
    PRODUCTS,
    REVIEWS,
    SOURCE,
    Killed,
    Products,
    World,
    linear,
    shop,
)

SECONDS = 10


class Clock:
    """The time, as a test says: a wait that is over, or a clock that is put back, cannot be waited for."""

    def __init__(self) -> None:
        self.now = NOW

    def tick(self, seconds: float) -> None:
        self.now += int(seconds * 1000)


class Debounced(Products):
    debounce_seconds = SECONDS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return told(monkeypatch)


def told(patch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (consumer, local, when):
        patch.setattr(module, "now", lambda: clock.now)
    return clock


@pytest.fixture
def world(tmp_path: Path, clock: Clock) -> World:
    made = World(Settings(state=str(tmp_path / "state")), Debounced)
    shop(made.log)
    made.run()
    made.check()
    return made


def stars(world: World, stars: int) -> None:
    """Change the review of product 1 in a cut of its own, and catch up."""
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 1, "stars": stars})
    world.log.cut()
    world.run()


def seen(world: World) -> Any:
    return world.store.bodies()["1"]["stars"]


def poll(world: World, *, hurry: bool = False) -> bool:
    """Do what a worker does when no change comes; return whether there was anything to do."""
    made = world.start()
    try:
        position = made.open(GENERATION)
        assert position is not None
        if not hurry and not made.due():
            return False
        checkpoint = Checkpoint(position.version, 0, 0, {}, SOURCE)
        made.apply(Batch([], position, checkpoint, loading=False, hurry=hurry))
    finally:
        made.close()
    return True


def pending(world: World) -> Version | None:
    made = world.start()
    try:
        made.open(GENERATION)
        return made.pending()
    finally:
        made.close()


def test_the_first_change_is_shown_at_once_and_the_next_when_its_time_has_come(world: World, clock: Clock) -> None:
    stars(world, 1)
    assert seen(world) == 1
    stars(world, 2)
    stars(world, 3)
    assert seen(world) == 1, "not yet"
    assert not poll(world)
    clock.tick(SECONDS)
    assert poll(world)
    world.check()
    assert [doc.id for doc in world.store.written] == ["1", "2", "1", "1"], "once, with the newest state"
    assert world.store.docs["1"].version == Version(1, 400), "of the cut at which it is rendered"


def test_a_batch_renders_what_is_due_too(world: World, clock: Clock) -> None:
    stars(world, 1)
    stars(world, 2)
    clock.tick(SECONDS)
    world.log.put(PRODUCTS, 2, {"id": 2, "category_id": 5, "name": "mug"})
    world.log.cut()
    world.run()
    world.check()


def test_what_waits_holds_tokens_back_and_its_view_stays_as_it_is(world: World) -> None:
    stars(world, 1)
    assert pending(world) is None
    stars(world, 2)
    stars(world, 3)
    assert pending(world) == Version(1, 300), "since the oldest of its changes"
    position = world.store.open(GENERATION)
    assert position is not None
    assert (position.version, position.reached) == (Version(1, 400), Version(1, 299))
    assert world.store.docs["1"].version == Version(1, 200)
    poll(world, hurry=True)
    world.check()
    position = world.store.open(GENERATION)
    assert pending(world) is None
    assert position is not None
    assert position.reached == position.version


def test_others_do_not_wait(world: World) -> None:
    stars(world, 1)
    stars(world, 2)
    world.log.put(PRODUCTS, 2, {"id": 2, "category_id": 5, "name": "mug"})
    world.log.cut()
    world.run()
    assert world.store.bodies()["2"]["name"] == "mug"
    assert seen(world) == 1


def test_a_document_that_waits_may_go(world: World) -> None:
    stars(world, 1)
    world.log.put(PRODUCTS, 1, None)
    world.log.cut()
    world.run()
    assert world.store.bodies().keys() == {"1", "2"}
    poll(world, hurry=True)
    world.check()
    assert world.store.bodies().keys() == {"2"}


def test_an_old_parent_that_waits_is_not_forgotten(world: World, clock: Clock) -> None:
    """S20, later: by when it is rendered nothing but the list knows that it was touched."""
    stars(world, 1)
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 2, "stars": 1})
    world.log.cut()
    world.run()
    clock.tick(SECONDS)
    assert poll(world)
    world.check()


@pytest.mark.parametrize("at", ["before", "middle", "after"])
def test_a_kill_while_what_was_due_is_written_leaves_it_due(world: World, clock: Clock, at: str) -> None:
    stars(world, 1)
    stars(world, 2)
    clock.tick(SECONDS)
    world.log.put(CATEGORIES, 5, {"id": 5, "name": "tea"})
    world.log.cut()
    world.run(kill=at)
    world.run()
    poll(world, hurry=True)
    world.check()


@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside one that waits on"])
def test_a_view_that_has_lost_what_was_shown_when_it_was_due_is_made_good(
    world: World, clock: Clock, others: bool
) -> None:
    """Its store came back as it was a second ago, at the same state; nobody was to touch the document again."""
    stars(world, 1)
    if others:  # since the same change, and due later
        clock.tick(1)
        world.log.put(PRODUCTS, 2, {"id": 2, "category_id": 5, "name": "mug"})
        world.log.cut()
        world.run()
        world.log.put(PRODUCTS, 2, {"id": 2, "category_id": 5, "name": "bowl"})
    stars(world, 2)
    docs, position = dict(world.store.docs), world.store.position
    clock.tick(SECONDS - 1 if others else SECONDS)
    assert poll(world)
    assert seen(world) == 2
    world.store.docs, world.store.position = docs, position
    assert world.opened_at() is None
    world.run()
    world.check()


@pytest.mark.parametrize("at", [None, "before", "after"])
def test_what_was_shown_when_it_was_due_is_no_reason_to_load_again(world: World, clock: Clock, at: str | None) -> None:
    """Killed before the view had it, or before the local rows knew that, and by a clock that was put back."""
    stars(world, 1)
    stars(world, 2)
    clock.tick(SECONDS)
    world.store.kill = at
    with suppress(Killed):
        poll(world)
    clock.tick(-2 * SECONDS)
    for _ in range(2):
        assert world.opened_at() is not None
        poll(world, hurry=True)
    world.check()


def test_files_and_views_from_before_that_was_noted_stay(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(consumer, "replace", lambda position, **_: replace(position, told=0))
        stars(world, 1)
        stars(world, 2)
    assert world.opened_at() is not None
    poll(world, hurry=True)
    assert world.opened_at() is not None
    world.check()


def test_what_was_begun_is_still_known_when_it_is_not_due_any_more(world: World, clock: Clock) -> None:
    """The row is gone by then, and compaction has taken what says in which document it was."""
    world.log.put(REVIEWS, 7, None)
    world.log.cut()
    world.run()
    clock.tick(SECONDS)
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 1, "stars": 1})
    world.log.cut()
    world.run(kill="after")
    clock.tick(-SECONDS / 2)
    world.run(kill="before")
    world.log.put(REVIEWS, 7, None)
    world.log.cut()
    world.log.compact()
    world.run(kill="before")
    assert world.store.bodies()["1"]["reviews"] == [7]  # type: ignore[index]
    world.run()
    poll(world, hurry=True)
    world.check()


def test_a_clock_that_is_put_back_keeps_nothing_waiting(world: World, clock: Clock) -> None:
    stars(world, 1)
    stars(world, 2)
    clock.tick(-100 * SECONDS)
    assert poll(world)
    world.check()


def test_a_load_shows_everything(world: World) -> None:
    stars(world, 1)
    stars(world, 2)
    world.lose_local()
    stars(world, 3)
    world.check()
    assert pending(world) is None


def test_a_change_that_waits_is_said_by_why(world: World) -> None:
    stars(world, 1)
    made = world.start()
    made.open(GENERATION)
    assert not made.why(("", "1"), 1)[0].waits
    made.close()
    stars(world, 2)
    made = world.start()
    made.open(GENERATION)
    assert made.why(("", "1"), 1)[0].waits
    made.close()


# Any history

KEYS = st.integers(1, 4)
CHANGE = st.one_of(
    st.tuples(
        st.just(PRODUCTS),
        KEYS,
        st.none() | st.fixed_dictionaries({"category_id": st.none() | KEYS, "name": st.sampled_from("ab")}),
    ),
    st.tuples(st.just(CATEGORIES), KEYS, st.none() | st.fixed_dictionaries({"name": st.sampled_from("ab")})),
    st.tuples(
        st.just(REVIEWS),
        KEYS,
        st.none() | st.fixed_dictionaries({"product_id": st.none() | KEYS, "stars": st.integers(1, 5)}),
    ),
)
STEP = st.one_of(
    *[CHANGE] * 3,
    st.tuples(
        st.just("run"), st.sampled_from([None, None, "before", "middle", "after"]), st.integers(1, 5), st.integers(1, 9)
    ),
    st.just(("run", None, 10**9, 10**9)),
    st.tuples(st.just("tick"), st.sampled_from([0.5, SECONDS / 2, SECONDS, -SECONDS / 2])),
    st.sampled_from([("poll",), ("poll",), ("hurry",), ("lose",), ("wipe",), ("compact",)]),
)


@rules(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.lists(STEP, min_size=5, max_size=60))
def test_any_history_equals_the_join_when_nothing_waits(steps: list[tuple[Any, ...]]) -> None:
    """And what does wait is as it was in some state that was complete, since no later than the oldest change that it lacks."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        clock = told(patch)
        world = World(Settings(state=f"{folder}/state"), Debounced)
        for step in steps:
            _take(world, clock, step)
        world.log.cut()
        world.run()
        poll(world, hurry=True)
        world.check()


def _take(world: World, clock: Clock, step: tuple[Any, ...]) -> None:
    what, *how = step
    if what == "run":
        _run(world, *how)
    elif what == "tick":
        clock.tick(how[0])
    elif what in {"poll", "hurry"}:
        _poll(world, hurry=what == "hurry")
    else:
        world.take(step)


def _run(world: World, kill: str | None, piece: int, stop_after: int) -> None:
    world.log.cut()
    world.run(kill, piece, stop_after)
    if kill is None and stop_after == 10**9 and pending(world) is None:
        world.check()


def _poll(world: World, *, hurry: bool) -> None:
    if _stands(world):
        poll(world, hurry=hurry)
        if pending(world) is None:
            assert world.store.bodies() == linear(_committed(world))


def _stands(world: World) -> bool:
    """Whether the local rows are at the newest complete state: a worker polls nothing in between."""
    position = world.opened_at()
    return bool(world.log.cuts) and position is not None and position.version.lsn == world.log.cuts[-1][1]


def _committed(world: World) -> dict[str, dict[int, Any]]:
    """Return the rows at the newest cut."""
    rows: dict[str, dict[int, Any]] = {table: {} for table in world.log.rows}
    for change in world.log.records[: world.log.cuts[-1][0]]:
        key = int(change.key.decode().strip('{}"id:'))
        rows[change.table].pop(key, None)
        if change.row is not None:
            rows[change.table][key] = change.row
    return rows


def test_a_position_that_holds_back_is_kept_by_its_store(world: World) -> None:
    position = world.opened_at()
    assert position is not None
    assert replace(position, held=Version(1, 7)).reached == Version(1, 7)
    assert position.reached == position.version
