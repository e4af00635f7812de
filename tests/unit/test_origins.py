"""What a document was made from: the rows that render gets, and the change that brought each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headrace.change import Row, Version
from headrace.consumer import Origin
from headrace.documents import Aggregate, Count, Document, DocumentConsumer, Many, Node
from headrace.settings import Settings
from tests.fixtures.documents import CATEGORIES, GENERATION, PRODUCTS, REVIEWS, Products, World, shop
from tests.fixtures.documents_deep import DEEP_SCHEMAS


class Some(Products):
    """A category has its products, the newest two of each have their reviews; one is hidden."""

    document = Document(
        CATEGORIES,
        products=Many(PRODUCTS, by="category_id", order="-name", limit=2, reviews=Many(REVIEWS, by="product_id")),
        talk=Aggregate(REVIEWS, by="product_id", where={"hidden": False}, n=Count()),
    )

    def render(self, row: Node) -> Row | None:
        return {"name": row["name"]} if row["name"] != "hidden" else None


class Named(Products):
    """Ids that tell nothing of the key."""

    def id(self, table: str, key: Row) -> str:
        return f"{table}/{key['id'] * 7}"


@contextmanager
def opened(world: World) -> Iterator[DocumentConsumer]:
    consumer = world.start()
    consumer.open(GENERATION)
    try:
        yield consumer
    finally:
        consumer.close()


def why(world: World, id_: str, limit: int = 10) -> list[Origin]:
    with opened(world) as consumer:
        return list(consumer.why(("", id_), limit))


def offsets(found: list[Origin]) -> list[tuple[str, object]]:
    """Return each origin's place, and the offset of a row or the number of rows of a join."""
    return [(".".join(each.place), f"@{each.change.offset}" if each.change else each.rows) for each in found]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(Settings(state=str(tmp_path / "state")))


def test_each_row_of_a_document_names_the_change_that_brought_it(world: World) -> None:
    shop(world.log)
    world.run()
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 1, "stars": 5})
    world.log.cut()
    world.run()
    found = why(world, "1")
    assert offsets(found) == [("", "@1"), ("category", 1), ("category", "@3"), ("reviews", 1), ("reviews", "@4")]
    (last,) = [change for change in world.log.records if change.offset == 4]
    assert found[-1].change == last, "the row, its version, transaction, ordinal, schema and place in the log"
    assert found[-1].applied > 1_700_000_000_000


def test_how_a_row_was_read_and_a_second_epoch_are_kept(world: World) -> None:
    shop(world.log)
    read = world.log.records[1]._replace(op="r", read="snapshot", version=Version(3, 100), xid=2**32 - 1, ordinal=-7)
    world.log.records[1] = read
    world.run()
    assert why(world, "1")[0].change == read


def test_a_change_that_readers_do_not_see_yet_is_said(world: World) -> None:
    shop(world.log)
    world.run()
    world.log.put(CATEGORIES, 5, {"id": 5, "name": "tea"})
    world.log.put(CATEGORIES, 6, {"id": 6, "name": "tea"})
    world.log.cut()
    with opened(world) as consumer:
        assert not consumer.why(("", "1"), 10)[0].waits
        consumer.apply(next(world.log.batches(consumer._opened().position, piece=1)))
        assert consumer.why(("", "1"), 10)[0].waits
        assert not consumer.why(("", "2"), 10)[0].waits


def test_a_row_that_is_gone_or_never_was_is_told_apart(world: World) -> None:
    shop(world.log)
    world.run()
    assert why(world, "3") == []
    world.log.put(PRODUCTS, 1, None)
    world.log.put(PRODUCTS, 9, {"id": 9, "category_id": 5, "name": "x"})
    world.log.cut()
    with opened(world) as consumer:
        consumer.apply(next(world.log.batches(consumer._opened().position, piece=1)))
        assert consumer.why(("", "1"), 10) == [Origin((), PRODUCTS, rows=0, waits=True)]
    world.run()
    assert why(world, "1") == []


def test_a_document_is_found_by_an_id_of_the_plugins_own(tmp_path: Path) -> None:
    world = World(Settings(state=str(tmp_path / "state")), Named)
    shop(world.log)
    world.run()
    assert offsets(why(world, f"{PRODUCTS}/14")) == [("", "@2"), ("category", 0), ("reviews", 0)]
    assert why(world, "2") == []


def test_of_many_rows_the_first_are_told_and_how_many_there_are(tmp_path: Path) -> None:
    world = World(Settings(state=str(tmp_path / "state")), Some, schemas=DEEP_SCHEMAS)
    world.log.put(CATEGORIES, 1, {"id": 1, "parent_id": None, "name": "hidden"})
    for key, name in (1, "a"), (2, "c"), (3, "b"):
        world.log.put(PRODUCTS, key, {"id": key, "category_id": 1, "name": name})
    for key in range(10):
        hidden = key > 4
        world.log.put(REVIEWS, key, {"id": key, "product_id": key % 2 + 1, "stars": 1, "hidden": hidden, "paid": None})
    world.log.cut()
    world.run()
    assert world.store.bodies() == {}
    found = why(world, "1", 2)
    assert offsets(found) == [
        ("", "@0"),
        ("products", 2),
        ("products", "@2"),
        ("products.reviews", 5),
        ("products.reviews", "@5"),
        ("products.reviews", "@7"),
        ("products", "@3"),
        ("products.reviews", 0),
        ("talk", 3),
        ("talk", "@4"),
        ("talk", "@6"),
    ]
    assert found[8].values == {"n": 3}, "also what is not shown counts"
