"""Effects: each change is told once or more, by one process and one generation, and none is left out by a promotion."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from headrace import codec
from headrace.change import Change, Position, Version
from headrace.consumer import ALL, Batch, Generation
from headrace.effects import EffectConsumer, idempotency_key
from headrace.errors import Misconfigured, Transient, Wiped
from headrace.settings import Settings
from headrace.testing import History, shape
from tests.fixtures.tables import SOURCE

ORDERS = shape("public.orders", id="integer", status="text")
MANY = 600
CUSTOMERS = shape("public.customers", id="integer", status="text")


class Told(EffectConsumer):
    """Tells a list."""

    tables = ("public.orders",)
    told: list[tuple[int, str | None]]
    away = False

    def effect(self, changes: Sequence[Change]) -> None:
        if self.away:
            raise Transient("away", "Nobody listens.")
        self.told += [(change.version.lsn, change.row and change.row["status"]) for change in changes]


class World:
    def __init__(self, path: Path) -> None:
        self.settings = replace(Settings(), state=str(path))
        self.log = History([ORDERS])
        self.told: list[tuple[int, str | None]] = []

    def commit(self, *statuses: str) -> None:
        for status in statuses:
            self.log.put("public.orders", {"id": 1, "status": status})
            self.log.cut()

    def open(self, number: int = 1) -> tuple[Told, Position | None]:
        consumer = Told(self.settings, "told")
        consumer.told = self.told
        return consumer, consumer.open(Generation("told", number, "abc"))

    def catch_up(self, number: int = 1) -> None:
        consumer, position = self.open(number)
        for batch in self.log.batches(position):
            consumer.apply(batch)
        consumer.close()

    def promote(self, number: int) -> None:
        consumer, _ = self.open(number)
        consumer.promote()
        consumer.close()

    def statuses(self) -> list[str | None]:
        return [status for _, status in self.told]


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


def test_each_source_has_a_file_and_the_one_of_before_is_whose_generation_is_live(world: World) -> None:
    """An upgrade leaves nothing out and tells nothing twice."""
    world.settings = replace(world.settings, source="conformance")
    world.commit("old")
    world.catch_up()
    world.promote(1)
    world.commit("a")
    world.catch_up()
    consumer, at = world.open()
    consumer.close()
    old = world.settings.path("told-effects.sqlite")
    world.settings.path("conformance/told-effects.sqlite").rename(old)
    assert Told(replace(world.settings, source="crm"), "told").generations() == []
    assert old.exists()
    with closing(sqlite3.connect(old)) as running:
        running.execute("SELECT * FROM generations").fetchall()
        assert Told(replace(world.settings, source="crm"), "told").generations() == []
        with pytest.raises(Transient, match="is locked"):
            world.open()
    assert Told(world.settings, "told").generations() == [Generation("told", 1, "abc", live=True)]
    assert world.open()[1] == at
    world.commit("b")
    world.catch_up()
    assert world.statuses() == ["a", "b"]


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


def spoil(world: World, number: int, **fields: object) -> None:
    """Let the position of a generation be another one."""
    consumer, position = world.open(number)
    assert position is not None
    with consumer._file() as db:
        spoilt = codec.encode_position(replace(position, **fields))  # type: ignore[arg-type]
        db.execute("UPDATE generations SET position = ? WHERE number = ?", (spoilt, number))
    consumer.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"appended": 1},
        {"topics": {"conformance.public.orders": "made anew"}},
        {"source": replace(SOURCE, database="b")},
    ],
    ids=["away too long", "topic replaced", "another source"],
)
def test_a_generation_does_not_go_on_where_one_has_stopped_whose_position_would_be_refused(
    world: World, fields: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """It would be refused there too, for ever; nor is what is parked there waited for: nobody can retry it."""
    world.commit("old")
    world.catch_up()
    world.promote(1)
    spoil(world, 1, held=Version(1, 50), parked=("public.orders",), **fields)
    world.commit("a")
    world.catch_up(2)
    own = world.open(2)[1]
    world.promote(2)
    assert world.open(2)[1] == own
    assert "is left out" in caplog.text
    world.commit("b")
    world.catch_up(2)
    assert world.statuses() == ["b"], "what came before it was built is left out"


def forget_customers(world: World, number: int) -> None:
    """Let a generation be of code that does not read them."""
    position = world.open(number)[1]
    assert position is not None
    offsets, topics = (
        {t: x for t, x in each.items() if "customers" not in t} for each in (position.offsets, position.topics)
    )
    spoil(world, number, offsets=offsets, topics=topics)


def test_a_generation_that_reads_a_table_less_leaves_nothing_out(world: World) -> None:
    world.log = History([ORDERS, CUSTOMERS])
    world.commit("old")
    world.catch_up()
    world.promote(1)
    world.commit("a")
    world.catch_up(2)
    forget_customers(world, 2)
    world.promote(2)
    world.commit("b")
    world.catch_up(2)
    assert world.statuses() == ["a", "b"]


def test_a_generation_that_reads_a_table_more_tells_nobody_of_what_was_in_it_before(world: World) -> None:
    world.log = History([ORDERS, CUSTOMERS])
    world.log.put("public.customers", {"id": 1, "status": "a customer of before"})
    world.commit("old")
    world.catch_up()
    world.promote(1)
    forget_customers(world, 1)
    world.commit("a")
    world.catch_up(2)
    world.promote(2)
    world.log.put("public.customers", {"id": 2, "status": "a customer"})
    world.commit("b")
    world.catch_up(2)
    assert sorted(map(str, world.statuses())) == ["a", "a customer", "b"]


def test_of_a_table_that_came_after_the_one_before_had_stopped_everything_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both read all tables: the one before would have told it."""
    monkeypatch.setattr(Told, "tables", ALL)
    world.log = History([ORDERS, CUSTOMERS])
    world.commit("old")
    world.catch_up()
    world.promote(1)
    forget_customers(world, 1)
    world.log.put("public.customers", {"id": 1, "status": "a customer"})
    world.commit("a")
    world.catch_up(2)
    world.promote(2)
    world.commit("b")
    world.catch_up(2)
    assert sorted(map(str, world.statuses())) == ["a", "a customer", "b"]


def test_a_rollback_goes_on_where_the_newer_one_has_stopped_though_its_topic_is_another(world: World) -> None:
    world.commit("old")
    world.catch_up()
    world.promote(1)
    spoil(world, 1, topics={"conformance.public.orders": "deleted"}, appended=1)
    world.catch_up(2)
    world.promote(2)
    world.commit("a")
    world.catch_up(2)
    world.promote(1)
    world.commit("b")
    world.catch_up(1)
    assert world.statuses() == ["a", "b"]


def test_what_is_parked_of_the_generation_before_is_not_left_out(world: World) -> None:
    world.commit("old")
    world.catch_up()
    world.promote(1)
    spoil(world, 1, held=Version(1, 50), parked=("public.orders",))
    world.catch_up(2)
    with pytest.raises(Misconfigured, match="parked retry"):
        world.promote(2)


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
