"""Columns come and go: `render` gets every row with those that its table has now, as Postgres has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from headrace.change import Column, Row, TableSchema
from headrace.documents import Aggregate, Avg, Count, Document, DocumentConsumer, Many, Node, Sum, count, mean, total
from headrace.documents.order import Shape
from headrace.settings import Settings
from tests.fixtures.documents import GENERATION, PRODUCTS, REVIEWS, World

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
