"""Which generation tells, and from where on: nothing is left out between one and the next."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from headrace import codec
from headrace.change import Version
from headrace.consumer import ALL, Generation
from headrace.errors import Misconfigured, Transient
from headrace.testing import History, shape
from tests.fixtures.tables import SOURCE
from tests.fixtures.telling import ORDERS, Told, World

CUSTOMERS = shape("public.customers", id="integer", status="text")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


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
