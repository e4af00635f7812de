"""Every consumer that comes with headrace passes the suite that is shipped for strangers', against its real server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from headrace.change import Row
from headrace.documents import Document, DocumentConsumer, Node, One
from headrace.settings import Settings
from headrace.stores.duckdb import DuckDBStore
from headrace.stores.kafka import KafkaTopic
from headrace.testing import ConsumerConformance, shape
from headrace_ops.elasticsearch import Elasticsearch
from headrace_ops.kafka import Kafka
from headrace_ops.redis import Redis
from headrace_pages import Pages
from headrace_search import ProductSearch

PRODUCTS = shape(
    "public.products",
    id="integer",
    category_id="integer",
    name="text",
    description="text",
    director="text",
    year="integer",
    rating="numeric(3,1)",
    price="numeric(10,2)",
    stock="integer",
)
CATEGORIES = shape("public.categories", id="integer", name="text")
REVIEWS = shape(
    "public.reviews",
    id="integer",
    product_id="integer",
    author="text",
    stars="integer",
    body="text",
    created_at="timestamptz",
)


def product(id_: int, name: str, category: int) -> dict[str, object]:
    return {
        "id": id_,
        "category_id": category,
        "name": name,
        "description": f"about {name}",
        "director": "D",
        "year": 1999,
        "rating": "7.5",
        "price": "9.90",
        "stock": 3,
    }


WHEN = {"created_at": "2026-01-02T03:04:05Z"}
SHOP = {
    PRODUCTS: [product(2, "kettle", 5), product(10, "cup", 5), product(2, "pot", 5)],
    CATEGORIES: [{"id": 5, "name": "kitchen"}],
    REVIEWS: [
        {"id": 7, "product_id": 2, "author": "A", "stars": 4, "body": "good", **WHEN},
        {"id": 8, "product_id": 3, "author": "B", "stars": 1, "body": "of what is not there", **WHEN},
    ],
}

STREAMED = {PRODUCTS: SHOP[PRODUCTS], CATEGORIES: SHOP[CATEGORIES]}
STRIDE = 11
"""tests/faults/test_steps.py kills these before each step of an open and an apply."""
ALL_STEPS = ("steps_of_a_promotion", "steps_of_a_drop", "promotion_that_fails", "drop_that_fails")
"""What nothing else kills, nor lets fail."""


class Pointed(ConsumerConformance):
    """Each step of a promotion and of a drop is tried, whatever the stride of the rest."""

    @pytest.fixture(autouse=True)
    def _each_step(self, request: pytest.FixtureRequest) -> None:
        if request.function.__name__.endswith(ALL_STEPS):
            self.stride = 1  # type: ignore[misc]


class TestSearch(ConsumerConformance):
    consumer = ProductSearch
    name = "search"
    history = SHOP
    lost = "stock"
    stride = STRIDE
    # test_writing_a_consumer.py has these for this store, at each step.
    test_a_promotion_keeps_the_earlier_generation = test_what_is_dropped_is_gone_and_nothing_else = None
    test_a_kill_between_every_two_steps_of_a_promotion = test_every_promotion_that_fails = None
    test_a_kill_between_every_two_steps_of_a_drop = test_every_drop_that_fails = None

    @pytest.fixture
    def settings(self, elasticsearch: Elasticsearch, tmp_path: Path) -> Settings:
        return replace(Settings(), elasticsearch=elasticsearch.address())


class TestPages(Pointed):
    consumer = Pages
    name = "pages"
    history = SHOP
    test_a_column_less = None  # the templates show every column
    stride = STRIDE

    @pytest.fixture
    def settings(self, redis_server: Redis) -> Settings:
        return replace(Settings(), redis=redis_server.address())


class TestWarehouse(Pointed):
    consumer = DuckDBStore
    name = "warehouse"
    history = SHOP
    lost = "description"
    test_every_lost_answer = None  # it is a file
    test_every_write_that_does_not_arrive = None  # DuckDB writes it, which Python does not see
    stride = STRIDE

    def test_a_kill_between_every_two_steps_of_a_promotion(self) -> None:
        self.stride = 3  # it has a hundred
        super().test_a_kill_between_every_two_steps_of_a_promotion()

    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return replace(Settings(), warehouse=str(tmp_path / "warehouse.duckdb"))


class Titles(DocumentConsumer):
    """A derived stream."""

    document = Document("public.products", category=One("public.categories", on="category_id"))
    store = KafkaTopic()

    def render(self, row: Node) -> Row:
        return {"name": row["name"], "category": row.category and row.category["name"]}


class TestStream(ConsumerConformance):
    consumer = Titles
    name = "titles"
    history = STREAMED
    lost = "description"
    test_every_lost_answer = None  # librdkafka sends in threads of its own, and asks again by itself
    test_every_write_that_does_not_arrive = None  # only those of local rows could fail, which others have
    stride = 3  # it takes long, and no step is far from one that is tried

    @pytest.fixture
    def settings(self, kafka: Kafka) -> Settings:
        return replace(Settings(), kafka=kafka.address())
