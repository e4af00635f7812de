"""What a consumer may meet (docs/formats.md, *What may change*): the three of the shop, and one of its own, with each kind of change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

import headrace_shop
from headrace.change import Row
from headrace.control import Control, Report
from headrace.documents import Document, DocumentConsumer, Many, Node, One, count
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.parked import Shelf
from headrace.settings import Settings
from headrace.stores.elasticsearch import ElasticsearchIndex, SearchReader
from headrace.stores.kafka import KafkaTopic
from headrace.stores.redis import PageReader
from headrace_capture import catalog, setup
from headrace_ops.elasticsearch import Elasticsearch
from headrace_ops.redis import Redis
from headrace_pages import Pages
from headrace_search import ProductSearch
from headrace_verify.expected import expectation
from headrace_verify.postgres import connect
from headrace_verify.verify import Verifier
from headrace_warehouse import Warehouse
from tests.fixtures.capture import Running, capturing, eventually, execute, now, prepare, rows
from tests.fixtures.resnapshots import ask, done
from tests.fixtures.serving import serving

SCHEMA = (Path(headrace_shop.__file__).parent / "sql/schema.sql").read_text()
ROWS = [
    "INSERT INTO categories (id, name) SELECT i, 'category ' || i FROM generate_series(1, 3) i",
    "INSERT INTO products SELECT i, 1 + i % 3, 'product ' || i, 'said of ' || i, '', 1990, 7.5, i + 0.5, i FROM generate_series(1, 12) i",
    "INSERT INTO reviews (id, product_id, author, stars, body) SELECT i, 1 + i % 12, 'a', 1 + i % 5, 'b' FROM generate_series(1, 30) i",
    "INSERT INTO customers (id, name, email) SELECT i, 'n', 'e' FROM generate_series(11, 13) i",
    "INSERT INTO orders (id, customer_id, status) SELECT i, 11, 'paid' FROM generate_series(1, 5) i",
    "INSERT INTO order_items SELECT i, 1, i, 1, 9.5 FROM generate_series(1, 5) i",
]


class Copies(DocumentConsumer):
    """Products with all that is joined to them, whatever columns these have: as `headrace new` writes it."""

    document = Document(
        "public.products",
        category=One("public.categories", on="category_id"),
        reviews=Many("public.reviews", by="product_id"),
    )
    store = KafkaTopic("copies")

    def render(self, row: Node) -> Row:
        return {**row, "category": row.category and dict(row.category), "reviews": list(map(dict, row.reviews))}


class Customers(DocumentConsumer):
    """Customers alone: written as rows come."""

    document = Document("public.customers")
    store = KafkaTopic("customers")

    def render(self, row: Node) -> Row:
        return dict(row)


VIEWS: dict[str, type[Any]] = {
    "search": ProductSearch,
    "pages": Pages,
    "warehouse": Warehouse,
    "copies": Copies,
    "customers": Customers,
}


class Shop:
    """The shop's source, captured, with its three views."""

    def __init__(self, settings: Settings, control: Control, capture: Running) -> None:
        self.settings, self.control, self.capture = settings, control, capture

    def report(self, view: str) -> Report | None:
        return next((report for report in self.control.reports().get(view, []) if report.live), None)

    def settle(self, *views: str) -> None:
        """Wait until the views show what is committed now."""
        self.capture.reach()
        lsn = now(self.settings)
        for view in views or VIEWS:
            eventually(f"{view} is there", lambda view=view: (found := self.report(view)) and found.version.lsn >= lsn)

    def differences(self, *views: str) -> tuple[list[Any], list[str]]:
        """Compare views with Postgres row by row; return what differs, and what verify notes."""
        log = Log(self.settings)
        wrong, notes = [], []
        for outcome in Verifier(log, Control(log), lambda *_: None, 60).verify({view: VIEWS[view] for view in views}):
            with closing(outcome):
                assert outcome.rows
                wrong += [(outcome.name, *outcome.wrong(), *outcome.undecided())]
                notes += outcome.notes
        return [found for found in wrong if len(found) > 1], notes

    def rows(self, view: str, collection: str = "") -> dict[str, Row]:
        """Return what readers see."""
        return {row.key: row.value for row in self.control.scan(view) if row.collection == collection}


@pytest.fixture
def shop(
    settings: Settings, elasticsearch: Elasticsearch, redis_server: Redis, request: pytest.FixtureRequest
) -> Iterator[Shop]:
    if getattr(request, "param", "json") == "avro":
        request.getfixturevalue("registry")
        settings = replace(settings, codec="avro")
    prepare(settings, SCHEMA, *ROWS)
    with capturing(settings) as capture, serving(settings, **VIEWS) as control:
        made = Shop(settings, control, capture)
        made.settle()
        yield made


def shown(settings: Settings) -> tuple[list[Row], dict[str, str]]:
    """Return what readers of the two stores see."""
    found = SearchReader(settings, "search", ["name"])
    pages = PageReader(settings, "pages")
    with closing(found), closing(pages):
        read = [pages.get(f"products/{n}") for n in range(1, 13)]
        assert all(read)
        return sorted(found.search("product"), key=orjson.dumps), {page.etag: page.html for page in read if page}


HARMLESS = {
    "a new column": [
        "ALTER TABLE products ADD COLUMN more text",
        "UPDATE products SET more = 'm', price = 99 WHERE id = 1",
        "ALTER TABLE customers ADD COLUMN more text",
        "UPDATE customers SET more = 'm' WHERE id = 11",
    ],
    "a column that no view reads goes": [
        "ALTER TABLE products DROP COLUMN seq",
        "UPDATE products SET stock = 0 WHERE id = 2",
    ],
    "a new column of what is joined": [
        "ALTER TABLE reviews ADD COLUMN note text",
        "UPDATE reviews SET note = 'n' WHERE id = 1",
    ],
    "it goes again": [
        "ALTER TABLE reviews DROP COLUMN note",
        "UPDATE reviews SET stars = 2 WHERE id = 2",
    ],
    "a type that gets wider": [
        "ALTER TABLE customers ALTER name TYPE varchar(90)",
        "INSERT INTO customers (id, name, email) VALUES (1, 'n', 'e')",
    ],
    "a number that becomes a float": [
        "ALTER TABLE products ALTER rating TYPE float8",
        "UPDATE products SET rating = 8.25 WHERE id = 3",
    ],
    "a new table": [
        "CREATE TABLE extras (id int PRIMARY KEY, t text)",
        "ALTER PUBLICATION {} ADD TABLE extras",
        "INSERT INTO extras VALUES (1, 'x')",
    ],
    "a table that is captured no more": [
        "ALTER PUBLICATION {} DROP TABLE order_items",
        "UPDATE products SET stock = 5 WHERE id = 4",
    ],
}


@pytest.mark.parametrize("shop", ["json", "avro"], indirect=True)
def test_what_changes_without_harm_leaves_every_view_equal(shop: Shop) -> None:
    """One after the other, so that each is met by views that have met the others."""
    for name, statements in HARMLESS.items():
        execute(shop.settings, *[statement.format(shop.settings.publication) for statement in statements])
        shop.settle()
        assert shop.differences(*VIEWS)[0] == [], name
    left = "public.order_items is not captured any more: its 5 rows are not compared"
    assert left in shop.differences("warehouse")[1]
    (counted,) = Verifier(Log(shop.settings), shop.control, lambda *_: None, 60).count({"warehouse": Warehouse})
    assert (counted.differing, left in counted.notes) == ({}, True)
    products = shop.rows("warehouse", "public.products")
    assert (products['{"id":1}']["more"], products['{"id":2}'].get("more")) == ("m", None)
    assert "seq" not in products['{"id":1}']
    assert (products['{"id":3}']["rating"], products['{"id":4}']["rating"]) == (8.25, 7.5)
    assert shop.rows("warehouse", "public.extras") == {'{"id":1}': {"id": 1, "t": "x"}}


@pytest.mark.parametrize("ddl", ["RENAME COLUMN description TO about", "DROP COLUMN description"])
def test_a_column_that_a_view_reads_and_that_is_gone_is_told_by_its_name(shop: Shop, ddl: str) -> None:
    """Documents are parked, a template stops its view; readers keep what they had, what does not need the column goes on."""
    before = shown(shop.settings)
    execute(shop.settings, f"ALTER TABLE products {ddl}", "UPDATE products SET stock = 77 WHERE id = 1")
    shop.settle("warehouse")
    stopped = eventually("pages stops", lambda: (now := shop.report("pages")) and now.phase == "stopped" and now)
    eventually("search parks", lambda: (now := shop.report("search")) and now.facts.get("parked"))
    parked = Shelf(Log(shop.settings)).entries("search")
    assert "1" in {entry.key for entry in parked}
    for view, code, told in (("search", "render-failed", parked[0]), ("pages", "template-error", stopped)):
        assert told.code == code
        assert "description" in told.reason
        assert f"headrace rebuild {view}" in told.remedy
    assert shown(shop.settings) == before
    product = shop.rows("warehouse", "public.products")['{"id":1}']
    assert product["stock"] == 77
    assert product.get("about") == ("said of 1" if "RENAME" in ddl else None)
    assert "description" not in product


class About(ProductSearch):
    """As its author writes it then."""

    def render(self, row: Node) -> Row:
        names = ("name", "director", "year", "price")
        joined = {"category": row.category and row.category["name"], "reviews": count(row.reviews)}
        return {name: row[name] for name in names} | joined | {"description": row["about"], "stars": None}


def test_what_was_told_of_a_column_that_is_gone_mends_it(settings: Settings, elasticsearch: Elasticsearch) -> None:
    """New code, a rebuild: nothing is parked, the view is equal."""
    prepare(settings, SCHEMA, *ROWS)
    with capturing(settings) as capture:
        with serving(settings, search=ProductSearch) as control:
            shop = Shop(settings, control, capture)
            shop.settle("search")
            execute(
                settings,
                "ALTER TABLE products RENAME COLUMN description TO about",
                "UPDATE products SET stock = 77 WHERE id = 1",
            )
            eventually("search parks", lambda: (now := shop.report("search")) and now.facts.get("parked"))
        with serving(settings, search=About) as control:
            shop = Shop(settings, control, capture)
            eventually("it is there", lambda: (now := shop.report("search")) and now.phase == "stale")
            control.ask("search", "rebuild")
            eventually("it is built", lambda: any(each.phase == "following" for each in control.reports()["search"]))
            control.ask("search", "promote", timeout=120)
            shop.settle("search")
            (outcome,) = Verifier(Log(settings), control, lambda *_: None, 60).verify({"search": About})
            with closing(outcome):
                assert (outcome.rows, [*outcome.wrong(), *outcome.undecided()]) == (12, [])
            control.ask("search", "drop", {"generation": 1}, timeout=60)
            assert Shelf(Log(settings)).entries("search") == []


def test_a_view_waits_for_a_declared_column_that_is_dropped_before_it_is_added_again(settings: Settings) -> None:
    """With a row between, of which the log knows the column no more; nobody starts it again."""
    prepare(settings, SCHEMA, *ROWS)
    with capturing(settings) as capture, serving(settings, copies=Copies) as control:
        shop = Shop(settings, control, capture)
        shop.settle("copies")
        execute(settings, "ALTER TABLE reviews DROP COLUMN product_id", "UPDATE reviews SET stars = 1 WHERE id = 1")
        waits = eventually("it waits", lambda: (now := shop.report("copies")) and now.code and now)
        assert (waits.phase, waits.code) == ("waiting", "document-column")
        assert "public.reviews has no column product_id" in waits.reason
        execute(
            settings, "ALTER TABLE reviews ADD COLUMN product_id int", "UPDATE reviews SET product_id = 5 WHERE id < 9"
        )
        shop.settle("copies")
        assert shop.differences("copies")[0] == []
        assert [len(row["reviews"]) for row in shop.rows("copies").values()].count(8) == 1


# Append-only tables (S10)


class Clicked(DocumentConsumer):
    """Products with their clicks, which have no key."""

    document = Document("public.products", clicks=Many("public.clicks", by="product_id"))
    store = ElasticsearchIndex(
        "clicked", mappings={"properties": {"clicks": {"type": "integer"}, "by": {"type": "keyword"}}}
    )

    def render(self, row: Node) -> Row:
        return {"clicks": count(row.clicks), "by": [click["by"] for click in row.clicks]}


CLICKS = [
    "CREATE TABLE products (id int PRIMARY KEY)",
    "CREATE TABLE clicks (product_id int, by text)",
    "INSERT INTO products SELECT generate_series(1, 5)",
    "INSERT INTO clicks SELECT 1 + i % 5, 'user ' || i % 4 FROM generate_series(1, 40) i",
]


@contextmanager
def clicked(settings: Settings) -> Iterator[Shop]:
    with capturing(settings) as capture, serving(settings, clicked=Clicked, warehouse=Warehouse) as control:
        made = Shop(settings, control, capture)
        made.settle("clicked", "warehouse")
        yield made


def as_selected(shop: Shop) -> None:
    """The warehouse holds each row as often as Postgres; the documents are its join."""
    held = Counter(orjson.dumps(row) for row in shop.rows("warehouse", "public.clicks").values())
    assert held == Counter(orjson.dumps(row) for (row,) in rows(shop.settings, "SELECT row_to_json(c) FROM clicks c"))
    joined = (
        "SELECT id::text, (SELECT json_agg(by ORDER BY by) FROM clicks c WHERE c.product_id = p.id) FROM products p"
    )
    documents = {key: document["by"] for key, document in shop.rows("clicked").items()}
    assert documents == {key: by or [] for key, by in rows(shop.settings, joined)}


def test_every_view_holds_an_append_only_table(
    settings: Settings, elasticsearch: Elasticsearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a restart of all of them, a TRUNCATE, and the table being written anew; verify compares the documents and the rows."""
    monkeypatch.setitem(VIEWS, "clicked", Clicked)
    execute(settings, *CLICKS)
    with closing(catalog.connect(settings.dsn)) as connection:
        setup.apply(connection, setup.plan(connection, settings, [], "", ["clicks"]))
    with clicked(settings) as shop:
        execute(settings, "INSERT INTO clicks VALUES (1, 'a'), (1, 'a'), (NULL, NULL), (9, 'of no product')")
        shop.settle("clicked", "warehouse")
        as_selected(shop)
    execute(
        settings,
        "INSERT INTO clicks SELECT 2, 'while off' FROM generate_series(1, 3)",
        "INSERT INTO products VALUES (9)",
    )
    with clicked(settings) as shop:
        as_selected(shop)
        assert shop.differences("clicked", "warehouse") == ([], [])
        keys = set(shop.rows("warehouse", "public.clicks"))
        ask(settings, tables=["public.clicks"])
        done(settings, shop.capture, "public.clicks")
        shop.settle("clicked", "warehouse")
        as_selected(shop)
        assert not keys & set(shop.rows("warehouse", "public.clicks"))
        assert shop.differences("clicked", "warehouse") == ([], [])
        execute(settings, "TRUNCATE clicks", "INSERT INTO clicks VALUES (3, 'after')")
        shop.settle("clicked", "warehouse")
        as_selected(shop)
        shapes = {schema.table: schema for schema in Log(settings).schemas().values()}
        with connect(settings) as postgres, pytest.raises(Misconfigured, match="append-only"):
            expectation(postgres, OfClicks, "clicks", settings, shapes, dict.fromkeys(shapes))


class OfClicks(DocumentConsumer):
    """A document for each row that has no key: it can be kept, but not verified."""

    document = Document("public.clicks", product=One("public.products", on="product_id"))
    store = ElasticsearchIndex("of-clicks", mappings={})
