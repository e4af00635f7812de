"""Verify where the publication sends a part only: rows by row filters, and columns by column lists. The log has no more, and so no view."""

from __future__ import annotations

from typing import ClassVar

import pytest

from headrace.change import Row
from headrace.control import Control
from headrace.documents import Aggregate, Count, Document, DocumentConsumer, Many, Node, One, Sum, Window
from headrace.documents.windows import Root
from headrace.log import Log
from headrace.settings import Settings
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace_verify.ledger import MISSING, Difference
from headrace_verify.verify import Verifier
from tests.fixtures.capture import execute, replay
from tests.fixtures.verified import SHOP, Mirror, T, found, kept, meddle
from tests.integration.test_capture_append_only import EVENTS, SOME, prepare_append_only


def published(settings: Settings, *tables: str) -> None:
    """Let the publication send so much of these tables, and nothing of others."""
    execute(settings, f"ALTER PUBLICATION {settings.publication} SET TABLE {', '.join(tables)}")


def test_what_row_filters_and_column_lists_leave_out_is_not_expected(settings: Settings) -> None:
    """Rows with a key and without, of an ordinary and of a partitioned table; they are counted so too."""
    prepare_append_only(
        settings,
        EVENTS,
        SOME,
        "CREATE TABLE items (id int, n int, other int, PRIMARY KEY (id, n))",
        "CREATE TABLE parted (id int PRIMARY KEY, n int) PARTITION BY RANGE (id)",
        "CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (100)",
        "INSERT INTO items SELECT i, i, 0 FROM generate_series(1, 30) i",
        "INSERT INTO parted SELECT i, i FROM generate_series(1, 30) i",
    )
    items, parted = "ONLY items (id, n) WHERE (n > 10 AND n % 2 = 0)", "parted WHERE (id > 20)"
    published(settings, items, parted, "ONLY events WHERE (n = 1 AND what <> '%s{}')")
    with kept(settings, Mirror):
        execute(
            settings,
            "UPDATE items SET n = 40 WHERE id IN (1, 12)",
            "UPDATE items SET n = 1 WHERE id = 14",
            "INSERT INTO items VALUES (50, 50, 0), (51, 51, 0)",
            "INSERT INTO events VALUES ('x', 1, NULL), ('x', 2, NULL)",
        )
        seen = found(settings, Mirror)
        assert (seen.wrong, seen.undecided, seen.rows) == ([], [], 11 + 10 + 11)
        log = Log(settings)
        (counted,) = Verifier(log, Control(log), lambda *_: None, 60).count({"view": Mirror})
        assert counted.differing == {}
        assert counted.expected == {T: 11, "public.parted": 10, "public.events": 11}
        meddle(settings, "DELETE FROM rows WHERE key = ?", '{"id":16,"n":16}')
        assert found(settings, Mirror).wrong == [Difference(MISSING, T, '{"id":16,"n":16}')]
    assert {"n", "id"} == {name for row in replay(settings, T).values() for name in row}


class Shown(DocumentConsumer):
    """Every kind of join, and windows."""

    documents: ClassVar[tuple[Root, ...]] = (
        Document(
            "public.products",
            category=One("public.categories", on="category_id"),
            reviews=Many("public.reviews", by="product_id"),
            best=Many("public.reviews", by="product_id", order="-stars", limit=2),
            all=Aggregate("public.reviews", by="product_id", n=Count(), stars=Sum("stars")),
        ),
        Window("public.sales", on="at", seconds=60, start="minute", n=Count(), sum=Sum("n")),
    )
    store = ElasticsearchIndex("verify-filtered", mappings={"dynamic": False})

    def id(self, table: str, key: Row) -> str:
        ((name, value),) = key.items()
        return f"{table} {name} {value}"

    def render(self, row: Node) -> Row:
        if "minute" in row:
            return dict(row)
        return {
            "category": row.category and row.category["name"],
            "reviews": sorted(review["id"] for review in row.reviews),
            "best": [review["id"] for review in row.best],
            "all": dict(row.all),
        }


@pytest.mark.usefixtures("elasticsearch")
def test_joined_rows_that_row_filters_leave_out_are_in_no_document(settings: Settings) -> None:
    prepare_append_only(
        settings,
        EVENTS,
        *SHOP,
        "CREATE TABLE sales (id int PRIMARY KEY, at timestamptz, n int)",
        "INSERT INTO categories SELECT i, 'c' || i FROM generate_series(1, 6) i",
        "INSERT INTO products SELECT i, 'p' || i, i % 7 FROM generate_series(1, 20) i",
        "INSERT INTO reviews SELECT i, i % 20, i % 5, 'x' FROM generate_series(1, 200) i",
        "INSERT INTO sales SELECT i, timestamptz '2026-01-01' + i * interval '20 s', i FROM generate_series(1, 40) i",
    )
    some = (
        "products WHERE (id > 3)",
        "categories WHERE (id > 2)",
        "reviews WHERE (id % 3 > 0)",
        "sales WHERE (id > 9)",
    )
    published(settings, *some)
    with kept(settings, Shown):
        execute(
            settings,
            "UPDATE products SET category_id = 1 WHERE id < 6",
            "INSERT INTO reviews SELECT i, 7, 9, 'new' FROM generate_series(300, 305) i",
            "DELETE FROM reviews WHERE id < 20",
        )
        seen = found(settings, Shown)
    assert (seen.wrong, seen.undecided) == ([], [])
    assert seen.rows == 17 + 11
