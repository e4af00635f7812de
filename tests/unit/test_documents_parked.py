"""Documents that cannot be shown are left alone by name, and shown as they are by then; all others are the join, whatever happens."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.change import Checkpoint, Position, Row
from headrace.consumer import Batch, Cursor
from headrace.documents import Node
from headrace.errors import Poison
from headrace.settings import Settings
from tests.fixtures.documents import GENERATION, PRODUCTS, REVIEWS, SOURCE, Killed, Products, World, linear, shop
from tests.unit.test_documents import CATEGORY, PRODUCT, REVIEW


class Moody(Products):
    """Does not render some products; which, is not in its code."""

    moods: ClassVar[set[int]] = set()

    def render(self, row: Node) -> Row:
        if row["id"] in self.moods:
            raise ValueError("not in the mood")
        return super().render(row)


class Runner(World):
    """A world whose documents are parked, as the runner parks them. What is parked is durable."""

    def __init__(self, folder: str) -> None:
        super().__init__(Settings(state=folder), Moody)
        self.cls = type("Moody", (Moody,), {"store": self.store, "moods": set()})
        self.parked: set[Cursor] = set()

    @property
    def moods(self) -> set[int]:
        found: set[int] = self.cls.moods
        return found

    def run(self, kill: str | None = None, piece: int = 10**9, stop_after: int = 10**9) -> None:
        consumer = self.start()
        self.store.kill = kill
        try:
            position = consumer.open(GENERATION)
            if position is None:
                self.parked.clear()
            for batch in itertools.islice(self.log.batches(position, piece), stop_after):
                self.apply(batch)
        except Killed:
            pass
        finally:
            self.store.kill = None
            consumer.close()

    def apply(self, batch: Batch) -> None:
        """Apply a batch around what is parked; what is found is parked too."""
        assert self.consumer is not None
        while True:
            try:
                self.consumer.apply(replace(batch, parked=frozenset(self.parked)))
            except Poison as error:
                found = {each.cursor for each in (error, *error.others) if each.cursor}
                assert found
                assert not found & self.parked
                self.parked |= found
            else:
                return

    def retry(self, dropped: frozenset[Cursor] = frozenset()) -> None:
        """Try everything again where the view stands, but what is given up."""
        consumer = self.start()
        try:
            position = consumer.open(GENERATION)
            if position is not None and not position.loading:
                self.parked.clear()
                self.apply(replace(standing(position), dropped=dropped))
        finally:
            consumer.close()

    def check(self) -> None:
        assert self.parked == set()
        super().check()

    def check_others(self) -> None:
        """What is not parked is the join."""
        ids = {id_ for _, id_ in self.parked}
        found, wanted = self.store.bodies(), linear(self.log.rows)
        assert {id_: body for id_, body in found.items() if id_ not in ids} == {
            id_: body for id_, body in wanted.items() if id_ not in ids
        }


def standing(position: Position) -> Batch:
    checkpoint = Checkpoint(position.version, 0, 0, position.offsets, SOURCE)
    return Batch([], position, checkpoint, loading=False)


@pytest.fixture
def world(tmp_path: Path) -> Runner:
    made = Runner(str(tmp_path / "state"))
    shop(made.log)
    made.run()
    made.check()
    return made


def move(world: Runner, product: int) -> None:
    """Give review 7 to another product, in two changes of one batch."""
    world.log.put(REVIEWS, 7, None)
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": product, "stars": 4})
    world.log.cut()


def test_the_same_batch_twice_in_the_open_transaction_still_knows_the_old_parent(world: Runner) -> None:
    """The first attempt has moved the review in the local rows before it failed."""
    world.moods.add(2)
    move(world, 2)
    world.run()
    assert world.parked == {(PRODUCTS, "2")}
    assert world.store.bodies()["1"] == linear(world.log.rows)["1"]
    assert world.store.bodies()["2"]["reviews"] == [], "as it was"  # type: ignore[index]
    world.moods.clear()
    world.retry()
    world.check()


def test_what_changes_while_it_is_parked_is_shown_by_the_retry(world: Runner) -> None:
    world.moods.add(1)
    move(world, 2)
    world.run()
    assert world.parked == {(PRODUCTS, "1")}
    world.log.put(PRODUCTS, 1, {"id": 1, "category_id": None, "name": "pot"})
    world.log.cut()
    world.run()
    move(world, 1)
    world.run(kill="after")
    world.run()
    assert world.store.bodies()["1"]["name"] == "kettle"  # type: ignore[index]
    world.moods.clear()
    world.retry()
    world.check()


def test_what_is_given_up_stays_until_it_changes(world: Runner) -> None:
    world.moods.add(1)
    move(world, 2)
    world.run()
    before = world.store.bodies()["1"]
    world.moods.clear()
    world.retry(dropped=frozenset({(PRODUCTS, "1")}))
    assert (world.parked, world.store.bodies()["1"]) == (set(), before)
    move(world, 1)
    world.run()
    world.check()


def test_all_that_a_batch_cannot_show_is_told_at_once_up_to_the_limit(tmp_path: Path) -> None:
    world = Runner(str(tmp_path / "state"))
    world.settings = replace(world.settings, parked_limit=3)
    for number in range(1, 11):
        world.log.put(PRODUCTS, number, {"id": number, "category_id": None, "name": "p"})
    world.log.cut()
    world.moods.update(range(2, 10))
    consumer = world.start()
    position = consumer.open(GENERATION)
    (batch,) = world.log.batches(position)
    with pytest.raises(Poison) as error:
        consumer.apply(batch)
    assert [each.cursor for each in (error.value, *error.value.others)] == [
        (PRODUCTS, str(number)) for number in range(2, 6)
    ]
    consumer.close()


STEP = st.one_of(
    PRODUCT,
    CATEGORY,
    REVIEW,
    st.tuples(st.just("mood"), st.frozensets(st.integers(1, 4))),
    st.just(("retry",)),
    st.tuples(
        st.just("run"), st.sampled_from([None, None, "before", "middle", "after"]), st.integers(1, 5), st.integers(1, 9)
    ),
    st.sampled_from([("lose",), ("wipe",), ("compact",), ("run", None, 10**9, 10**9)]),
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, max_size=40))
def test_any_history_with_poison_kills_and_retries_equals_the_join(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = Runner(f"{folder}/state")
        for step in steps:
            _take(world, step)
        world.moods.clear()
        world.log.cut()
        world.run()
        world.check_others()
        world.retry()
        world.check()


def _take(world: Runner, step: tuple[Any, ...]) -> None:
    if step[0] == "mood":
        world.moods.clear()
        world.moods.update(step[1])
    elif step[0] == "retry":
        world.retry()
    else:
        world.take(step)
    if step == ("run", None, 10**9, 10**9):
        world.check_others()
