"""Four consumers of strangers', as packages outside of the tree: from a commit in Postgres to what they do."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import replace

import pytest

from headrace.change import Version
from headrace.control import Control
from headrace.effects import EffectConsumer
from headrace.errors import HeadraceError, Misconfigured, Poison, Transient
from headrace.log.tail import BEGINNING, read_to_end
from headrace.settings import Settings
from headrace.stores.kafka import live_topic
from headrace.stores.redis import PageReader
from headrace.testing import History, shape
from headrace_ops.redis import Redis
from tests.fixtures.capture import capturing, eventually, execute, prepare, rows
from tests.fixtures.heard import FOLDER, Heard, plugin
from tests.fixtures.serving import await_live, serving

SHOP = (
    "CREATE TABLE categories (id int PRIMARY KEY, name text)",
    "CREATE TABLE products (id int PRIMARY KEY, category_id int, name text)",
    "CREATE TABLE customers (id int PRIMARY KEY, name text)",
    "CREATE TABLE orders (id int PRIMARY KEY, customer_id int, status text)",
    "CREATE TABLE order_items (order_id int, line int, product_id int, PRIMARY KEY (order_id, line))",
    "INSERT INTO categories VALUES (1, 'kitchen'), (2, 'empty')",
    "INSERT INTO products VALUES (1, 1, 'kettle'), (2, 1, 'cup')",
    "INSERT INTO customers VALUES (1, 'Ada')",
    "INSERT INTO orders VALUES (1, 1, 'new')",
    "INSERT INTO order_items VALUES (1, 1, 1), (1, 2, 2)",
)


def test_each_is_a_package_of_less_than_forty_lines() -> None:
    found = sorted(FOLDER.glob("headrace-*/headrace_*/__init__.py"))
    assert len(found) == 4
    assert all(len(path.read_text().splitlines()) < 40 for path in found)


def effect(name: str, table: str) -> None:
    """Let a consumer do its effect for one change."""
    log = History([shape(table, id="integer")])
    log.put(table, {"id": 1})
    log.cut()
    (batch,) = log.batches(None)
    made = plugin(name)(Settings(), name)
    assert isinstance(made, EffectConsumer)
    made.effect(batch.changes)


@pytest.mark.parametrize(
    ("answer", "error"),
    [(301, Misconfigured), (400, Poison), (422, Poison), (429, Transient), (408, Transient), (503, Transient)],
)
def test_a_webhook_that_will_not_take_a_change_is_not_asked_for_ever(
    answer: int, error: type[HeadraceError], heard: Heard, answers: dict[str, int]
) -> None:
    """A redirected POST would be a GET without a body, and taken for told."""
    answers["/orders"] = answer
    with pytest.raises(error) as raised:
        effect("webhook", "public.orders")
    assert getattr(raised.value, "cursor", None) == (("public.orders", '{"id":1}') if error is Poison else None)
    assert [request[:2] for request in heard] == [("POST", "/orders")]


@pytest.mark.parametrize("name", ["webhook", "purge"])
def test_an_answer_that_is_no_http_is_tried_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a proxy that restarts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for setting in ("WEBHOOK", "CACHE"):
            monkeypatch.setenv(setting, f"http://127.0.0.1:{server.getsockname()[1]}")

        def answer() -> None:
            with server.accept()[0] as asked:
                asked.recv(65536)
                asked.sendall(b"nonsense\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(Transient):
            effect(name, "public.orders" if name == "webhook" else "public.products")


def test_a_page_that_the_cache_does_not_have_is_purged(heard: Heard, answers: dict[str, int]) -> None:
    answers["/products/1"] = 404
    effect("purge", "public.products")
    assert [request[:2] for request in heard] == [("PURGE", "/products/1")]


def test_effects_follow_what_is_committed_from_now_on(settings: Settings, heard: Heard) -> None:
    prepare(settings, *SHOP)
    with capturing(settings) as capture:
        capture.reach()
        consumers = {"webhook": plugin("webhook"), "purge": plugin("purge")}
        with serving(settings, **consumers) as control:
            await_live(control, "webhook", "purge")
            assert heard == [], "nobody is told of what was there before"
            execute(settings, "UPDATE products SET name = 'pot' WHERE id = 1", "UPDATE orders SET status = 'paid'")
            eventually("both were called", lambda: len(heard) >= 2)
        execute(settings, "INSERT INTO orders VALUES (2, 1, 'new')", "DELETE FROM orders WHERE id = 1")
        with serving(settings, **consumers):
            eventually("what was missed is told", lambda: any(b'{"id":1},"row":null' in body for *_, body in heard))
    purged = [path for method, path, _, _ in heard if method == "PURGE"]
    assert set(purged) == {"/products/1"}
    told = {key: json.loads(body) for method, _, key, body in heard if method == "POST"}
    assert [(fact["key"]["id"], fact["row"] and fact["row"]["status"]) for fact in told.values()] == [
        (1, "paid"),
        (2, "new"),
        (1, None),
    ]


def test_a_sitemap_and_a_joined_stream_equal_what_postgres_has(
    settings: Settings, redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, redis=f"{redis_server.address().rpartition('/')[0]}/9")
    prepare(settings, *SHOP)
    consumers = {"sitemap": plugin("sitemap"), "order_details": plugin("order_details")}
    with capturing(settings) as capture, serving(settings, **consumers) as control:
        await_live(control, *consumers)
        execute(
            settings,
            "INSERT INTO products VALUES (3, 2, 'nothing')",
            "UPDATE customers SET name = 'Grace'",
            "DELETE FROM order_items WHERE line = 1",
        )
        at = capture.reach().version
        eventually("both are there", lambda: all(reached(control, name, at) for name in consumers))
        topic = live_topic(settings, "order_details")
        assert topic
        newest = {r.key: r.value for r in read_to_end(settings, {(topic, 0): BEGINNING})}
        found = {int(key): json.loads(value) for key, value in newest.items() if value}
        lines = "(SELECT json_agg(i ORDER BY line) FROM order_items i WHERE order_id = o.id)"
        query = f"SELECT o.id, status, c.name, {lines} FROM orders o JOIN customers c ON c.id = customer_id"
        assert found == {
            id_: {"status": status, "customer": name, "lines": items}
            for id_, status, name, items in rows(settings, query)
        }
        pages = PageReader(settings, "sitemap")
        for id_, products in rows(settings, "SELECT category_id, array_agg(id ORDER BY id) FROM products GROUP BY 1"):
            page = pages.get(str(id_))
            assert page
            assert [f"/products/{product}</loc>" in page.html for product in products] == [True] * len(products)
            assert page.html.count("<url>") == len(products)


def reached(control: Control, name: str, version: Version) -> bool:
    return any(report.live and report.version >= version for report in control.reports().get(name, []))
