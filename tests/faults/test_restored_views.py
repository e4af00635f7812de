"""A store that is as it was some time ago, or empty: its view finds out, and ends equal to Postgres, row by row (I6)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from elasticsearch import Elasticsearch as Client

from headrace import codec
from headrace.change import Row
from headrace.documents import DocumentConsumer, Node
from headrace.errors import HeadraceError
from headrace.log import Log
from headrace.settings import Settings
from headrace.stores.duckdb import DuckDBStore
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace.stores.kafka import KafkaTopic
from headrace.stores.redis import RedisPages
from tests.fixtures.capture import capturing, eventually, execute, prepare
from tests.fixtures.debounced import MAKE, Carts
from tests.fixtures.serving import await_live, serving
from tests.fixtures.verified import SHOP, Found, Products, found
from tests.integration.test_debounce import Pages, made_wait

pytestmark = pytest.mark.usefixtures("elasticsearch", "redis_server")

ROWS = (
    "INSERT INTO categories SELECT i, 'c' || i FROM generate_series(1, 3) i",
    "INSERT INTO products SELECT i, 'p' || i, i % 4 FROM generate_series(1, 20) i",
    "INSERT INTO reviews SELECT i, i % 25, i % 5, 'b' FROM generate_series(1, 60) i",
)
MEANWHILE = (
    "DELETE FROM products WHERE id = 1",
    "DELETE FROM reviews WHERE id = 2",
    "UPDATE reviews SET product_id = 4 WHERE id = 3",
    "UPDATE categories SET name = 'meanwhile' WHERE id = 2",
    "INSERT INTO products VALUES (21, 'meanwhile', 1)",
)
AFTERWARDS = (
    "DELETE FROM products WHERE id IN (5, 21)",
    "DELETE FROM reviews WHERE id = 3",
    "UPDATE products SET name = 'afterwards' WHERE id = 4",
    "INSERT INTO products VALUES (1, 'again', 2)",
)


class Searched(Products):
    store = ElasticsearchIndex("restored", mappings={"dynamic": False})


class Streamed(Products):
    store = KafkaTopic("restored")


class Paged(DocumentConsumer):
    document = Products.document
    store = RedisPages("restored")

    def render(self, row: Node) -> Row:
        return {"html": codec.dumps([row, row.category, row.reviews]).decode(), "etag": ""}


@pytest.fixture
def shop(settings: Settings) -> Settings:
    prepare(settings, *SHOP, *ROWS)
    return settings


def copy_index(settings: Settings) -> Callable[[], None]:
    """As a snapshot that is restored: another index of this name, with the position and the readers' alias."""
    with closing(Client(settings.elasticsearch)) as client:
        client.indices.put_settings(index="restored-g1", settings={"index.blocks.write": True})
        client.indices.clone(index="restored-g1", target="older")
        client.indices.put_settings(index="restored-g1", settings={"index.blocks.write": None})

    def put_back() -> None:
        with closing(Client(settings.elasticsearch)) as client:
            client.indices.delete(index="restored-g1")
            of = {"aliases": {"restored": {}}, "settings": {"index.blocks.write": None}}
            client.indices.clone(index="older", target="restored-g1", **of)

    return put_back


def no_index(settings: Settings) -> Callable[[], None]:
    def delete() -> None:
        with closing(Client(settings.elasticsearch)) as client:
            client.indices.delete(index="restored-g1")

    return delete


def copy_keys(settings: Settings) -> Callable[[], None]:
    with redis.Redis.from_url(settings.redis) as client:
        kept = {key: client.dump(key) for key in client.scan_iter()}

    def put_back() -> None:
        with redis.Redis.from_url(settings.redis) as client:
            client.flushdb()
            for key, value in kept.items():
                client.restore(key, 0, value)

    return put_back


def copy_file(settings: Settings) -> Callable[[], None]:
    file = Path(settings.warehouse)
    kept = shutil.copy(file, file.with_suffix(".older"))
    return lambda: shutil.copy(kept, file)


def no_topic(settings: Settings) -> Callable[[], None]:
    return lambda: Log(settings).topics.delete(["restored.g1"], wait=True)


def no_file(settings: Settings) -> Callable[[], None]:
    return Path(settings.warehouse).unlink


def compared(settings: Settings, view: type[Any]) -> Found | None:
    """Compare the view; what was live when its store was gone is not for a while."""
    try:
        return found(settings, view)
    except HeadraceError as error:
        if error.code != "no-live-generation":
            raise
        return None


def shows(settings: Settings, view: type[Any]) -> None:
    """Run the view until it shows what is committed."""
    with serving(settings, view=view) as control:
        await_live(control, "view")
        seen = eventually("it is compared", lambda: compared(settings, view))
    assert seen.clean, (seen.wrong, seen.undecided)
    assert seen.rows


@pytest.mark.parametrize(
    ("view", "copied"),
    [
        (Searched, copy_index),
        (Paged, copy_keys),
        (DuckDBStore, copy_file),
        (DuckDBStore, no_file),
        (Streamed, no_topic),
    ],
    ids=["Elasticsearch", "Redis", "DuckDB", "no file", "no topic"],
)
def test_a_store_that_is_as_it_was_before_the_view_was_stopped(
    shop: Settings, view: type[Any], copied: Callable[[Settings], Callable[[], None]]
) -> None:
    with capturing(shop):
        shows(shop, view)
        put_back = copied(shop)
        execute(shop, *MEANWHILE)
        shows(shop, view)
        put_back()
        execute(shop, *AFTERWARDS)
        shows(shop, view)


@pytest.mark.parametrize("copied", [copy_index, no_index], ids=["older", "deleted"])
def test_an_index_that_is_another_while_its_view_runs(
    shop: Settings, copied: Callable[[Settings], Callable[[], None]]
) -> None:
    with capturing(shop):
        shows(shop, Searched)
        put_back = copied(shop)
        with serving(shop, view=Searched) as control:
            await_live(control, "view")
            execute(shop, *MEANWHILE)
            assert found(shop, Searched).clean
            put_back()
            execute(shop, *AFTERWARDS)

            def equal() -> bool:
                with suppress(HeadraceError):  # there is no live generation for a while
                    return found(shop, Searched).clean
                return False

            eventually("it shows what is committed", equal)


def test_pages_without_what_was_shown_last_at_the_same_state(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had waited was shown when it was due, and the store lost that: nothing else says so."""
    prepare(settings, *MAKE)
    log, pages = Log(settings), Pages(settings)
    with serving(settings, carts=Carts) as control:
        with capturing(settings) as capture:
            capture.reach()
            await_live(control, "carts")
            made_wait(settings, pages)
        end = lambda: log.newest_checkpoint(complete=True)  # noqa: E731  the last may not be shown yet
        with redis.Redis.from_url(settings.redis) as client:
            at = lambda: codec.decode_position(client.hget("carts:g1", "position"))  # noqa: E731
            eventually("it has read all", lambda: at().version == getattr(end(), "version", None))
    put_back = copy_keys(settings)
    monkeypatch.setattr(Carts, "debounce_seconds", 0.1)
    with serving(settings, carts=Carts):
        eventually("what waited is shown", lambda: pages.show(settings))
    put_back()
    assert not pages.show(settings)
    with serving(settings, carts=Carts):
        eventually("and again", lambda: pages.show(settings))
