"""Columns come and go: `render` gets every row with those that its table has now, as Postgres has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from headrace import codec
from headrace.change import Column, Row, TableSchema
from headrace.documents import (
    Aggregate,
    Avg,
    Count,
    Document,
    DocumentConsumer,
    Many,
    Node,
    One,
    Sum,
    count,
    mean,
    total,
)
from headrace.documents.order import Shape
from headrace.errors import Misconfigured
from headrace.settings import Settings
from tests.fixtures.documents import CATEGORIES, GENERATION, PRODUCTS, REVIEWS, World

OLD = {PRODUCTS: ("id", "name", "seq"), REVIEWS: ("id", "product_id")}


class Whole(DocumentConsumer):
    """A row with its reviews, whatever columns they have."""

    document = Document(PRODUCTS, reviews=Many(REVIEWS, by="product_id"))

    def render(self, row: Node) -> Row:
        return {**row, "reviews": list(map(dict, row.reviews))}


class Alone(DocumentConsumer):
    """A row, written as it comes."""

    document = Document(PRODUCTS)

    def render(self, row: Node) -> Row:
        return dict(row)


class Counted(DocumentConsumer):
    """What is counted in Python, and by an aggregate."""

    document = Document(
        PRODUCTS,
        reviews=Many(REVIEWS, by="product_id"),
        rating=Aggregate(REVIEWS, by="product_id", n=Count("stars"), all=Sum("stars"), mean=Avg("stars")),
    )

    def render(self, row: Node) -> Row:
        of = row.reviews
        return {"here": [count(of, "stars"), total(of, "stars"), mean(of, "stars")], "there": [*row.rating.values()]}


class Rated(DocumentConsumer):
    """Only values of the reviews."""

    document = Document(PRODUCTS, rating=Aggregate(REVIEWS, by="product_id", n=Count()))

    def render(self, row: Node) -> Row:
        return {"n": row.rating["n"]}


def world(tmp_path: Path, cls: type[DocumentConsumer], **settings: str) -> World:
    made = World(Settings(state=str(tmp_path / "state"), **settings), cls, schemas={})
    made.log.rows = {table: {} for table in cls.tables}
    for table in cls.tables:
        shaped(made, table, 1, *OLD[table])
    made.log.put(PRODUCTS, 1, {"id": 1, "name": "kettle", "seq": 1})
    made.log.put(PRODUCTS, 2, {"id": 2, "name": "cup", "seq": 2})
    if REVIEWS in cls.tables:
        made.log.put(REVIEWS, 7, {"id": 7, "product_id": 1})
        made.log.put(REVIEWS, 8, {"id": 8, "product_id": 1})
    made.log.cut()
    return made


def shaped(made: World, table: str, version: int, *columns: str) -> None:
    shape = TableSchema(table, version, tuple(Column(name, "integer") for name in columns), ("id",))
    made.log.schemas = {**made.log.schemas, (table, version): shape}


def altered(made: World) -> None:
    """One column comes, another goes; a row of each table is written since."""
    shaped(made, PRODUCTS, 2, "id", "name", "note")
    made.log.put(PRODUCTS, 2, {"id": 2, "name": "cup", "note": "n"})
    if REVIEWS in made.cls.tables:
        shaped(made, REVIEWS, 2, "id", "product_id", "stars")
        made.log.put(REVIEWS, 8, {"id": 8, "product_id": 1, "stars": 4})
    made.log.cut()


@pytest.mark.parametrize("live", [True, False])
def test_every_document_has_the_columns_that_the_tables_have_now(tmp_path: Path, live: bool) -> None:
    made = world(tmp_path, Whole)
    if live:
        made.run()
    altered(made)
    made.run()
    reviews = [{"id": 7, "product_id": 1, "stars": None}, {"id": 8, "product_id": 1, "stars": 4}]
    assert made.store.bodies() == {
        "1": {"id": 1, "name": "kettle", "note": None, "reviews": reviews},
        "2": {"id": 2, "name": "cup", "note": "n", "reviews": []},
    }


@pytest.mark.parametrize("learned", ["live", "while loading", "before"])
def test_so_has_what_is_written_as_rows_come(tmp_path: Path, learned: str) -> None:
    made = world(tmp_path, Alone)
    if learned == "live":
        made.run()
    old = made.log.schemas
    altered(made)
    if learned == "while loading":
        consumer, new = made.start(), made.log.schemas
        consumer.open(GENERATION)
        for number, batch in enumerate(made.log.batches(None, piece=2)):
            consumer.apply(replace(batch, schemas=new if number else old))
        consumer.close()
    else:
        made.run(piece=2)
    assert made.store.bodies() == {
        "1": {"id": 1, "name": "kettle", "note": None},
        "2": {"id": 2, "name": "cup", "note": "n"},
    }


def test_a_row_from_before_its_column_is_counted_as_null(tmp_path: Path) -> None:
    made = world(tmp_path, Counted)
    altered(made)
    made.run()
    assert made.store.bodies()["1"] == {"here": [1, 4, 4.0], "there": [1, 4, 4.0]}


def test_documents_that_show_no_row_of_a_table_are_not_written_for_its_columns(tmp_path: Path) -> None:
    made = world(tmp_path, Rated)
    made.run()
    shaped(made, REVIEWS, 2, "id", "product_id", "stars")
    made.log.put(REVIEWS, 8, {"id": 8, "product_id": 1, "stars": 4})
    made.log.cut()
    made.store.written.clear()
    made.run()
    assert [doc.id for doc in made.store.written] == ["1"]


def test_a_feed_has_shapes_of_single_rows_and_no_column_goes_by_them(tmp_path: Path) -> None:
    """S28: a row that was written before a column existed may be read after one that has it."""
    made = world(tmp_path, Alone, feed="debezium")
    made.run()
    shaped(made, PRODUCTS, 2, "id", "name")
    made.log.put(PRODUCTS, 2, {"id": 2, "name": "cup"})
    made.log.cut()
    made.run()
    assert made.store.bodies() == {"1": {"id": 1, "name": "kettle", "seq": 1}, "2": {"id": 2, "name": "cup"}}


class Sorted(DocumentConsumer):
    """What a feed shows of a table late: the column of a join, of a filter, of an order."""

    document = Document(
        PRODUCTS,
        category=One(CATEGORIES, on="category_id"),
        reviews=Many(REVIEWS, by="product_id", where={"kind": "a"}, order=["price"]),
    )

    def render(self, row: Node) -> Row:
        return {"category": row.category and row.category["name"], "reviews": [of["price"] for of in row.reviews]}


NEW = {
    PRODUCTS: ("id", "name", "category_id"),
    REVIEWS: ("id", "product_id", "kind", "price"),
    CATEGORIES: ("id", "name"),
}


class Fed(World):
    """A feed whose readers know nothing when they are opened: `shown` are the shapes of the rows that each piece of one record has."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(Settings(state=str(tmp_path / "state"), feed="debezium"), Sorted, schemas={})
        self.log.rows = {table: {} for table in NEW}
        self.log.put(CATEGORIES, 5, {"id": 5, "name": "kitchen"})
        self.log.put(PRODUCTS, 1, {"id": 1, "name": "kettle", "category_id": 5})
        for id_, price in ((1, "10.00"), (2, "9.90")):
            self.log.put(REVIEWS, id_, {"id": id_, "product_id": 1, "kind": "a", "price": price})
        self.log.put(PRODUCTS, 2, {"id": 2, "name": "cup"})
        self.log.put(REVIEWS, 3, {"id": 3, "product_id": 2})
        self.log.cut()

    def read(self, *shown: dict[str, tuple[str, ...]]) -> None:
        """Open it and read on, a record at a time."""
        consumer = self.start()
        try:
            for batch, columns in zip(self.log.batches(consumer.open(GENERATION), 1), shown, strict=False):
                kinds = {"price": "numeric"}
                shapes = {
                    (table, 1): TableSchema(table, 1, tuple(Column(n, kinds.get(n, "integer")) for n in names), ("id",))
                    for table, names in columns.items()
                }
                consumer.apply(replace(batch, schemas=shapes))
        finally:
            consumer.close()


BODIES = {"1": {"category": "kitchen", "reviews": ["9.90", "10.00"]}, "2": {"category": None, "reviews": []}}


def test_a_column_that_a_feed_shows_late_is_no_error_before_all_is_read(tmp_path: Path) -> None:
    """S28: its newest shape is that of the rows so far, and the first ones may be old. A live view may be opened again at an old row."""
    made = Fed(tmp_path)
    made.read(OLD, OLD, NEW, OLD)
    made.read(OLD, OLD)
    assert made.store.bodies() == BODIES, "all was seen, by the one reader or by the other"
    made.log.put(PRODUCTS, 2, {"id": 2, "name": "cup"})
    made.log.put(REVIEWS, 3, {"id": 3, "product_id": 1, "kind": "a", "price": "9.95"})
    made.log.cut()
    made.read(OLD, OLD)
    assert made.store.bodies()["1"] == {"category": "kitchen", "reviews": ["9.90", "9.95", "10.00"]}


def test_a_column_that_no_row_of_a_feed_has_is_said_when_all_is_read(tmp_path: Path) -> None:
    made = Fed(tmp_path)
    made.read(OLD, OLD, OLD)
    for _ in range(2):  # it is opened again
        with pytest.raises(Misconfigured, match=r"public\.products has no column category_id") as caught:
            made.read(*[OLD | {REVIEWS: NEW[REVIEWS]}] * 3)
        assert caught.value.code == "document-column"
    assert made.store.bodies() == {}


def test_s9_a_key_of_other_columns_is_refused_of_a_feed(tmp_path: Path) -> None:
    """Whoever reads on knows only the new one: what has the old one would stay."""
    made = world(tmp_path, Alone, feed="debezium")
    made.run()
    shape = made.log.schemas[PRODUCTS, 1]
    made.log.schemas = {(PRODUCTS, 2): replace(shape, version=2, key=("id", "seq"))}
    made.log.put(PRODUCTS, 2, {"id": 2, "name": "cup", "seq": 2})
    made.log.cut()
    with pytest.raises(Misconfigured, match="was id, and is id, seq"):
        made.run()


@pytest.mark.parametrize("limit", [None, 1])
def test_rows_without_a_key_are_in_order_by_what_they_hold_also_from_before_a_column(limit: int | None) -> None:
    """One that came is NULL, one that went is not compared: as Postgres has the rows."""
    many, shape = Many("public.lines", by="maker", limit=limit), Shape(columns=("maker", "said", "note"))
    rows: list[Row] = [
        {"maker": 1, "said": "b", "note": None},
        {"maker": 1, "said": "a"},
        {"maker": 1, "said": "c", "gone": "x"},
    ]
    found = [row["said"] for row, _ in many.picked([(row, None) for row in rows], shape)]
    assert found == ["a", "b", "c"][:limit]


def test_a_key_of_another_type_takes_no_document_away(tmp_path: Path) -> None:
    """1 is "1" now: all rows come by their new keys, the old ones go, and a document of either has the same id."""
    world = World(Settings(state=str(tmp_path / "state")), Whole)
    numbers, texts = [9, 10], ["9", "10"]

    def product(each: int | str) -> Row:
        return {"id": each, "category_id": None, "name": f"p{each}"}

    def review(each: int | str) -> Row:
        return {"id": each, "product_id": each, "stars": 5}

    def keyed(ids: list[int] | list[str]) -> None:
        for each in ids:
            world.log.put(PRODUCTS, each, product(each))  # type: ignore[arg-type]
            world.log.put(REVIEWS, each, review(each))  # type: ignore[arg-type]

    def gone(ids: list[int] | list[str]) -> None:
        for each in ids:
            world.log.put(REVIEWS, each, None)  # type: ignore[arg-type]
            world.log.put(PRODUCTS, each, None)  # type: ignore[arg-type]

    def shown(ids: list[int] | list[str]) -> None:
        world.log.cut()
        world.run()
        assert world.store.bodies() == {str(each): product(each) | {"reviews": [review(each)]} for each in ids}

    keyed(numbers)
    shown(numbers)
    keyed(texts)
    gone(numbers)
    shown(texts)
    world.lose_local()
    world.log.put(PRODUCTS, "9", product("9"))  # type: ignore[arg-type]
    shown(texts)
    keyed(numbers)
    world.log.cut()
    world.run()
    gone(texts)
    shown(numbers)
    gone(numbers)
    shown([])


def test_of_a_row_that_is_gone_no_other_is_shown(tmp_path: Path) -> None:
    """Where the plugin's ids tell 1 and "1" apart, they are two documents."""

    class Apart(Whole):
        def id(self, table: str, key: Row) -> str:
            return f"{table} {codec.dumps(key).decode()}"

    world = World(Settings(state=str(tmp_path / "state")), Apart)
    for each in (1, "1"):
        world.log.put(PRODUCTS, each, {"id": each, "name": "p"})  # type: ignore[arg-type]
    world.log.cut()
    world.run()
    world.log.put(PRODUCTS, 1, None)
    world.log.cut()
    world.run()
    assert list(world.store.bodies()) == [f'{PRODUCTS} {{"id":"1"}}']
