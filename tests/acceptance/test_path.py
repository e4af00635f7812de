"""The whole path by its command line: shop, setup, capture, three views, verify; and verify is not blind."""

from __future__ import annotations

from typing import Any

import duckdb
import elasticsearch
import orjson
import redis

from headrace.settings import Settings
from tests.fixtures.processes import SMALL, System, console

VIEWS = ("search", "pages", "warehouse")


def test_every_view_follows_and_verify_names_exactly_what_was_changed_behind_headraces_back(
    system: System, elasticsearch: object, redis_server: object, kafka: Any
) -> None:
    del elasticsearch, redis_server
    system.run("shop", "load", *SMALL)
    system.up(*VIEWS)
    system.run("shop", "work", "--rate", "100/s", "--seconds", "3")
    system.settle(*VIEWS)
    facts = system.verify(*VIEWS)
    assert facts["warehouse"]["rows"] > 60

    _seen_by_kafkas_own_consumer(system, kafka)

    search = _meddle_with_search(system.settings)
    pages = _meddle_with_pages(system.settings)
    warehouse = _meddle_with_warehouse(system)
    found = system.verified(*VIEWS)
    assert _named(found["search"]) == search
    assert _named(found["pages"]) == pages
    assert _named(found["warehouse"]) == warehouse


def _seen_by_kafkas_own_consumer(system: System, kafka: Any) -> None:
    read = [record["after"]["seq"] for record in console(kafka, f"{system.settings.source}.public.ledger")]
    assert read == [number for number, _ in system.numbers()]


def _named(fact: dict[str, Any]) -> set[tuple[str, str, str]]:
    assert not fact["ok"]
    assert not fact["undecided_rows"]
    return {(each["kind"], each["collection"], each["key"]) for each in fact["differences"]}


def _meddle_with_search(settings: Settings) -> set[tuple[str, str, str]]:
    client = elasticsearch.Elasticsearch(settings.elasticsearch)
    ids = [hit["_id"] for hit in client.search(index="search", size=3, sort="price")["hits"]["hits"]]
    index = next(iter(client.indices.get_alias(name="search")))
    client.update(index=index, id=ids[0], doc={"name": "not its name"})
    client.delete(index=index, id=ids[1])
    client.index(index=index, id="90001", document={"name": "a stranger"})
    client.indices.refresh(index=index)
    client.close()
    return {("different", "", ids[0]), ("missing", "", ids[1]), ("extra", "", "90001")}


def _meddle_with_pages(settings: Settings) -> set[tuple[str, str, str]]:
    with redis.Redis.from_url(settings.redis, decode_responses=True) as client:
        prefix = f"pages:{client.get('pages:live')}:"
        different, missing = f"{prefix}products/1", f"{prefix}products/2"
        client.hset(different, "html", "<p>not its page</p>")
        assert client.delete(missing) == 1
        client.hset(f"{prefix}products/90001", mapping={"html": "<p>a stranger</p>", "etag": '"x"'})
    return {("different", "", "products/1"), ("missing", "", "products/2"), ("extra", "", "products/90001")}


def _meddle_with_warehouse(system: System) -> set[tuple[str, str, str]]:
    """DuckDB admits one process to a file: the warehouse's own is stopped meanwhile."""
    system.stop("warehouse")
    with duckdb.connect(system.settings.warehouse) as database:
        table = _table_behind(database, "customers")
        database.execute(f"UPDATE {table} SET name = 'not their name' WHERE id = 1")
        database.execute(f"DELETE FROM {table} WHERE id = 2")
        copied = """SELECT * REPLACE (90001 AS id, '{"id":90001}' AS _headrace_key)"""
        database.execute(f"CREATE TEMP TABLE stranger AS {copied} FROM {table} WHERE id = 3")
        database.execute(f"INSERT INTO {table} FROM stranger")
    system.start("warehouse", "run", "warehouse")
    system.wait("the warehouse to be live again", lambda: system.is_live("warehouse"))
    return {(kind, "public.customers", orjson.dumps({"id": key}).decode()) for kind, key in _KEYS}


_KEYS = (("different", 1), ("missing", 2), ("extra", 90001))


def _table_behind(database: duckdb.DuckDBPyConnection, name: str) -> str:
    """Return the table of the live generation: readers use views of them."""
    found = database.execute(
        "SELECT schema_name, table_name FROM duckdb_tables() WHERE table_name = ? OR table_name LIKE ?",
        [name, f"%{name}"],
    ).fetchall()
    assert len(found) == 1, found
    return ".".join(f'"{part}"' for part in found[0])
