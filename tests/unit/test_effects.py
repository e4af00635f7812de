"""Effects: each change is told once or more, by one process and one generation, and none is left out by a promotion."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from headrace.change import Change, Position, Version
from headrace.consumer import Batch, Generation
from headrace.effects import idempotency_key
from headrace.errors import Misconfigured, Transient, Wiped
from tests.fixtures.telling import Told, World

MANY = 600


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_what_was_there_before_is_not_told_and_what_comes_is_before_anybody_promotes(world: World) -> None:
    world.commit("old", "older")
    world.catch_up()
    assert world.statuses() == []
    world.commit("new")
    world.catch_up()
    world.promote(1)
    world.commit("paid")
    world.catch_up()
    assert world.statuses() == ["new", "paid"]


def test_nothing_is_left_out_and_nothing_told_twice_by_a_promotion_or_a_rollback(world: World) -> None:
    world.commit("old")
    world.catch_up()
    world.promote(1)
    world.commit("a")
    world.catch_up()
    world.commit("b", "c")
    world.catch_up(2)
    world.commit("d")
    world.catch_up(2)  # the first stands still, as one of other code does
    assert world.statuses() == ["a"]
    world.promote(2)
    world.catch_up(2)
    assert world.statuses() == ["a", "b", "c", "d"]
    world.commit("e")
    world.catch_up(1)
    world.catch_up(2)
    world.promote(1)
    world.commit("f")
    world.catch_up(1)
    assert world.statuses() == ["a", "b", "c", "d", "e", "f"]


def test_a_generation_that_is_promoted_while_it_runs_is_opened_anew(world: World) -> None:
    world.commit("old")
    world.catch_up()
    world.promote(1)
    consumer, position = world.open(2)
    for batch in world.log.batches(position):
        consumer.apply(batch)
    consumer.promote()
    world.commit("a")
    (batch,) = world.log.batches(world.open(3)[1])
    with pytest.raises(Wiped):
        consumer.apply(batch)
    world.catch_up(2)
    assert world.statuses() == ["a"]


def test_what_fails_comes_again(world: World) -> None:
    world.commit("old")
    world.catch_up()
    world.commit("a")
    consumer, position = world.open()
    consumer.away = True
    (batch,) = world.log.batches(position)
    with pytest.raises(Transient):
        consumer.apply(batch)
    consumer.close()
    world.catch_up()
    assert world.statuses() == ["a"]


@pytest.fixture
def busy(world: World) -> tuple[World, list[int]]:
    """A cut of so many changes that they are done in several chunks, and their numbers; generation 1 is live."""
    world.commit("old")
    world.catch_up()
    world.promote(1)
    for number in range(MANY):
        world.log.put("public.orders", {"id": number, "status": str(number)})
    world.log.cut()
    return world, list(range(MANY))


class Limited(Told):
    """Takes so many at a time, and then none for a while."""

    most = 20
    tries = 0

    def effect(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self.tries += 1
            if self.tries % self.most == 0:
                raise Transient("busy", "Come again later.")
            super().effect([change])


def test_a_receiver_that_takes_few_at_a_time_is_told_everything_in_the_end(busy: tuple[World, list[int]]) -> None:
    """By a consumer that is made anew after each error, as the worker does it."""
    world, numbers = busy
    tried, done = 0, False
    while not done and tried < MANY:
        consumer = Limited(world.settings, "told")
        consumer.told = world.told
        (batch,) = world.log.batches(consumer.open(Generation("told", 1, "abc")))
        tried += 1
        with closing(consumer), suppress(Transient):
            consumer.apply(batch)
            done = True
    assert done
    assert tried > 5
    told = [int(status or "") for status in world.statuses()]
    assert sorted(set(told)) == numbers
    assert [n for at, n in enumerate(told) if n not in told[:at]] == numbers
    assert len(told) < 3 * len(numbers)
    assert noted(world) == 0
    world.told.clear()
    world.commit("after")
    world.catch_up()
    assert world.statuses() == ["after"]


def noted(world: World) -> int:
    """Return how many changes are known to be done beyond the positions."""
    with closing(sqlite3.connect(world.settings.path(f"{world.settings.source}/told-effects.sqlite"))) as db:
        return int(db.execute("SELECT count(*) FROM done").fetchone()[0])


def failed(world: World) -> tuple[Limited, Batch, Position]:
    """Let a consumer fail before the last change of a batch; return it with the batch, and where it stood."""
    consumer = Limited(world.settings, "told")
    consumer.most, consumer.told = MANY - 1, world.told
    position = consumer.open(Generation("told", 1, "abc"))
    assert position is not None
    (batch,) = world.log.batches(position)
    with pytest.raises(Transient):
        consumer.apply(batch)
    return consumer, batch, position


def test_what_is_parked_is_tried_again_amid_a_batch_without_forgetting_what_is_done(
    busy: tuple[World, list[int]],
) -> None:
    """It comes with the position that is there."""
    world, _ = busy
    consumer, batch, position = failed(world)
    before = noted(world)
    assert before > 0
    consumer.apply(replace(batch, changes=batch.changes[-1:], position=position))
    assert noted(world) >= before


@pytest.mark.parametrize("promoted", [False, True])
def test_what_was_done_of_a_batch_is_not_done_again_by_who_goes_on(
    busy: tuple[World, list[int]], *, promoted: bool
) -> None:
    """A process that starts again, or a generation that is promoted meanwhile: only of one chunk it is not known."""
    world, numbers = busy
    world.catch_up(2)
    consumer, _, _ = failed(world)
    consumer.close()
    assert len(world.told) == MANY - 2
    assert noted(world) > 256
    if promoted:
        world.promote(2)
    world.catch_up(2 if promoted else 1)
    told = [int(status or "") for status in world.statuses()]
    assert sorted(set(told)) == numbers
    assert len(told) < MANY + 256


def test_what_was_done_of_a_batch_that_is_cut_otherwise_when_it_comes_again_is_not_done_again(
    busy: tuple[World, list[int]],
) -> None:
    """More waits by then, and the first piece has less of a partition than the batch that failed."""
    world, numbers = busy
    consumer, batch, position = failed(world)
    consumer.close()
    assert noted(world) > 256
    piece = replace(position, offsets={topic: [at + 1 for at in ats] for topic, ats in position.offsets.items()})
    consumer, _ = world.open()
    consumer.apply(replace(batch, changes=batch.changes[100:], position=piece, checkpoint=None))
    assert noted(world) == 100
    consumer.apply(replace(batch, changes=batch.changes[:90]))  # compaction has taken ten meanwhile
    consumer.close()
    told = [int(status or "") for status in world.statuses()]
    assert sorted(set(told)) == numbers
    assert sorted(told[:100]) == numbers[:100]
    assert not {*told[100:]} & {*numbers[:100]}
    assert noted(world) == 0, "nobody would ever forget what comes no more"


def test_who_is_replaced_amid_a_batch_ends(busy: tuple[World, list[int]]) -> None:
    world, _ = busy
    consumer, position = world.open()
    (batch,) = world.log.batches(position)

    class Replaced(list[tuple[int, str | None]]):
        def __iadd__(self, told: Iterable[tuple[int, str | None]]) -> Self:
            self.extend(told)
            if len(self) < 300:
                world.open()[0].close()
            return self

    consumer.told = Replaced()
    with pytest.raises(Misconfigured, match="Another process"):
        consumer.apply(batch)
    assert len(consumer.told) < 300


def test_a_process_that_was_replaced_tells_nobody(world: World) -> None:
    world.commit("old")
    world.catch_up()
    before, position = world.open()
    world.commit("a")
    world.catch_up()
    (batch,) = world.log.batches(position)
    with pytest.raises(Misconfigured, match="Another process"):
        before.apply(batch)
    assert world.statuses() == ["a"]


def test_a_dropped_generation_tells_nobody(world: World) -> None:
    world.commit("old")
    consumer, position = world.open()
    for batch in world.log.batches(position):
        consumer.apply(batch)
        at = batch.position
    world.commit("a")
    (batch,) = world.log.batches(at)
    world.open()[0].drop()
    with pytest.raises(Wiped):
        consumer.apply(batch)
    assert world.statuses() == []


@pytest.mark.parametrize("file", ["told-effects.sqlite", "main/told-effects.sqlite"])
def test_a_damaged_file_is_told_by_its_name(world: World, file: str) -> None:
    world.settings.path(file).write_bytes(b"no database" * 100)
    with pytest.raises(Transient, match=r"told-effects\.sqlite"):
        world.open()


def test_each_change_has_a_key_of_its_own() -> None:
    """A changed key is a delete and a create of one ordinal, a TRUNCATE has one for all of its rows."""
    one = Change("public.orders", "d", b'{"id":1}', None, Version(1, 5), 3, 1, 1, 0, 0)
    others = [one._replace(key=b'{"id":9}'), one._replace(table="public.заказы"), one._replace(ordinal=4)]
    keys = {idempotency_key(change) for change in [one, *others]}
    assert len(keys) == 4
    assert all(key.isascii() for key in keys)


def test_a_cut_without_changes_is_no_effect(world: World) -> None:
    """Heartbeats, and what is parked when it is tried again or dropped, are cuts as well."""
    world.commit("old")
    world.catch_up()
    world.log.cut()
    consumer, position = world.open()
    consumer.away = True
    (batch,) = world.log.batches(position)
    consumer.apply(batch)
    assert consumer.open(Generation("told", 1, "abc")) == batch.position
    consumer.close()
