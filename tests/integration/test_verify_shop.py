"""Documents compared with Postgres, in every store: exact under load, and what somebody meddled with is found."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from elasticsearch import Elasticsearch as Client

from headrace import codec
from headrace.change import Row
from headrace.documents import DocumentConsumer, Node, count
from headrace.log import Log
from headrace.log.kafka import producer
from headrace.settings import Settings
from headrace.stores.duckdb import Database
from headrace.stores.kafka import KafkaTopic
from headrace.stores.redis import RedisPages
from headrace_verify.expected import everything, expectation
from headrace_verify.film import Film
from headrace_verify.ledger import DIFFERENT, EXTRA, MISSING, Difference
from headrace_verify.postgres import connect, moment
from tests.fixtures.capture import capturing, execute, prepare, rows
from tests.fixtures.serving import await_live, serving
from tests.fixtures.verified import SHOP, Products, Warehouse, found, kept, loaded


@pytest.fixture
def shop(settings: Settings) -> Settings:
    """A small shop, set up."""
    prepare(
        settings,
        *SHOP,
        "INSERT INTO public.categories SELECT i, 'c' || i FROM generate_series(1, 5) i",
        "INSERT INTO public.products SELECT i, 'p' || i, nullif(i % 6, 0) FROM generate_series(1, 300) i",
        "INSERT INTO public.reviews SELECT i, i % 250, i % 5, repeat('x', 3000) FROM generate_series(1, 1000) i",
        "UPDATE public.products SET name = 'hidden' WHERE id = 33",
    )
    return settings


def test_the_expectation_of_documents_is_what_hand_written_sql_says(shop: Settings) -> None:
    by_hand = rows(
        shop,
        """
        SELECT p.id::text, p.name, c.name, count(r.id), avg(r.stars)::float8
        FROM products p LEFT JOIN categories c ON c.id = p.category_id LEFT JOIN reviews r ON r.product_id = p.id
        WHERE p.name <> 'hidden' GROUP BY p.id, p.name, c.name
        """,
    )
    with capturing(shop) as capture:
        capture.reach()
    shapes = {table: schema for (table, _), schema in sorted(Log(shop).schemas().items())}
    with connect(shop) as connection:
        with moment(connection):
            expected = expectation(connection, Products, "view", shop, shapes, dict.fromkeys(shapes))
            made = {each.row.key: each.row.value for each in everything(expected, connection)}
        some = [("public.products", codec.encode_key({"id": key}).decode()) for key in (1, 33, 9999)]
        film = Film(connection, list(expected.queries(connection, some)), 0.0, 1)
        film.shoot()
    (frame,) = film.around(1 << 63, 1 << 63)
    few = {each.row.key: each.row.value for each in map(expected.made, frame.found)}
    assert made.pop("33") is None
    assert few == {"1": made["1"], "33": None}
    assert made == {
        key: {"name": name, "category": category, "reviews": reviews, "stars": pytest.approx(stars)}
        for key, name, category, reviews, stars in by_hand
    }


@pytest.mark.usefixtures("elasticsearch")
def test_documents_are_compared_exactly_under_load_and_meddling_is_found(shop: Settings) -> None:
    with kept(shop, Products):
        client = Client(shop.elasticsearch)
        with loaded(
            shop,
            lambda chance: (
                f"UPDATE public.reviews SET product_id = {chance.randint(20, 299)} WHERE id = {chance.randint(1, 1000)}"
            ),
            lambda chance: (
                f"UPDATE public.products SET name = 'n{chance.random()}' WHERE id = {chance.randint(20, 299)}"
            ),
            lambda chance: f"UPDATE public.categories SET name = 'n{chance.random()}' WHERE id = 5",
            lambda chance: f"DELETE FROM public.products WHERE id = {chance.randint(100, 299)}",
        ):
            assert found(shop, Products).clean
        assert found(shop, Products).clean
        (index,) = client.indices.get_alias(name="verify-products")
        client.update(index=index, id="1", doc={"reviews": 77}, refresh=True)
        client.delete(index=index, id="2", refresh=True)
        source = client.get(index=index, id="3")["_source"]
        seen = found(shop, Products)
        client.index(index=index, id="9999", document=source, refresh=True)
        more = found(shop, Products)
        client.close()
    assert seen.wrong == [Difference(DIFFERENT, "", "1", ("reviews",)), Difference(MISSING, "", "2")]
    assert [d.kind for d in more.wrong].count(EXTRA) == 1


@pytest.mark.usefixtures("elasticsearch")
def test_a_document_that_changes_all_the_time_and_is_wrong_is_found(shop: Settings) -> None:
    """Somebody put a version on it that no write of ours is above: Elasticsearch refuses them all."""
    with kept(shop, Products):
        client = Client(shop.elasticsearch)
        (index,) = client.indices.get_alias(name="verify-products")
        for id_, name in ("7", "meddled"), ("8", "meddled too"):
            body = client.get(index=index, id=id_)["_source"] | {"name": name}
            client.index(index=index, id=id_, document=body, version=1 << 62, version_type="external", refresh=True)
        client.close()
        with loaded(shop, lambda chance: f"UPDATE public.products SET name = 'n{chance.random()}' WHERE id IN (7, 9)"):
            seen = found(shop, Products)
    assert seen.wrong == [Difference(DIFFERENT, "", "7", ("name",)), Difference(DIFFERENT, "", "8", ("name",))]
    assert not seen.undecided


@pytest.mark.usefixtures("elasticsearch")
def test_a_row_that_documents_refer_to_comes_and_goes(shop: Settings) -> None:
    """There is no foreign key: while the row is not there, no document holds it."""
    execute(shop, "UPDATE public.products SET category_id = 99 WHERE id <= 40")
    with (
        kept(shop, Products),
        loaded(
            shop,
            lambda _: "INSERT INTO public.categories VALUES (99, 'late') ON CONFLICT DO NOTHING",
            lambda _: "DELETE FROM public.categories WHERE id = 99",
        ),
    ):
        for _ in range(3):
            assert found(shop, Products).clean


class Pages(DocumentConsumer):
    """A page a product."""

    document = Products.document
    store = RedisPages("verify-pages")

    def render(self, row: Node) -> Row | None:
        return {"html": f"<h1>{row['name']}</h1>{count(row.reviews)}"}


class Streamed(Products):
    """A record a product."""

    store = KafkaTopic("verify-stream", partitions=2)


@pytest.mark.usefixtures("elasticsearch", "redis_server")
def test_one_row_changed_removed_and_added_in_each_of_four_stores_are_twelve_keys(shop: Settings) -> None:
    views: dict[str, type[Any]] = {
        "products": Products,
        "pages": Pages,
        "stream": Streamed,
        "warehouse": Warehouse,
    }
    with capturing(shop) as capture, serving(shop, **views) as control:
        capture.reach()
        await_live(control, *views)
        assert all(found(shop, consumer, name).clean for name, consumer in views.items())
        _meddle_everywhere(shop)
        seen = {name: found(shop, consumer, name) for name, consumer in views.items()}
    docs = {(DIFFERENT, "", "1"), (MISSING, "", "2"), (EXTRA, "", "9999")}
    table = "public.reviews"
    rows_ = {(DIFFERENT, table, '{"id":1}'), (MISSING, table, '{"id":2}'), (EXTRA, table, '{"id":9999}')}
    assert {name: {(d.kind, d.collection, d.key) for d in of.wrong} for name, of in seen.items()} == {
        "products": docs,
        "pages": docs,
        "stream": docs,
        "warehouse": rows_,
    }
    assert not any(of.undecided for of in seen.values())


def _meddle_everywhere(settings: Settings) -> None:
    client = Client(settings.elasticsearch)
    (index,) = client.indices.get_alias(name="verify-products")
    client.index(index=index, id="9999", document=client.get(index=index, id="3")["_source"])
    client.update(index=index, id="1", doc={"reviews": 77})
    client.delete(index=index, id="2", refresh=True)
    client.close()
    with redis.Redis.from_url(settings.redis) as pages:
        pages.hset("verify-pages:1:1", "html", "<h1>other</h1>")
        pages.delete("verify-pages:1:2")
        pages.hset("verify-pages:1:9999", "html", "<h1>new</h1>")
    _produce(settings, "verify-stream.g1", {b"1": b"no JSON", b"2": None, b"9999": b"{}"})
    reviews = 'g1."public.reviews"'
    database = Database.opened(settings.warehouse, settings.warehouse_memory)
    try:
        with database.cursor() as cursor:
            cursor.execute(f"UPDATE {reviews} SET body = 'y' WHERE id = 1")
            cursor.execute(f"DELETE FROM {reviews} WHERE id = 2")
            cursor.execute(f"CREATE TEMP TABLE added AS FROM {reviews} WHERE id = 3")
            cursor.execute("UPDATE added SET id = 9999, _headrace_key = $1", ['{"id":9999}'])
            cursor.execute(f"INSERT INTO {reviews} FROM added")
    finally:
        database.release()


def _produce(settings: Settings, topic: str, records: dict[bytes, bytes | None]) -> None:
    """Write to a topic as a stranger does: without headers of ours."""
    stranger = producer(settings)
    for key, value in records.items():
        stranger.produce(topic, key=key, value=value)
    assert stranger.flush(30) == 0
