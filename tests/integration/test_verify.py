"""Verify against real servers: it is not blind, it is exact under load, and it knows each value as the log has it."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
import redis
from elasticsearch import Elasticsearch as Client

from headrace import codec, plugins
from headrace.change import NOWHERE, Row, Version
from headrace.consumer import ALL, Consumer, Cursor, ViewRow
from headrace.control import Control
from headrace.documents import Document, DocumentConsumer, Many, Node, One, count, mean
from headrace.errors import HeadraceError, Misconfigured, Poison, Transient
from headrace.log import Log
from headrace.log.kafka import producer
from headrace.settings import Settings, environment
from headrace.stores.duckdb import Database, DuckDBStore
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace.stores.kafka import KafkaTopic
from headrace.stores.redis import RedisPages
from headrace_verify.expected import everything, expectation
from headrace_verify.film import Film
from headrace_verify.ledger import DIFFERENT, EXTRA, MISSING, Difference
from headrace_verify.postgres import connect, moment
from headrace_verify.verify import Verifier, _postgres_errors
from tests.fixtures.capture import capturing, eventually, execute, prepare, replay, rows
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving
from tests.integration.test_capture_append_only import prepare_append_only

ITEMS = "CREATE TABLE public.items (id int PRIMARY KEY, n int, name text)"
T = "public.items"
SHOP = (
    "CREATE TABLE public.categories (id int PRIMARY KEY, name text)",
    "CREATE TABLE public.products (id int PRIMARY KEY, name text, category_id int)",
    "CREATE TABLE public.reviews (id int PRIMARY KEY, product_id int, stars int, body text)",
)


class Mirror(Plain):
    """Every captured table."""

    tables = ALL


BROKEN = """
from headrace.errors import Misconfigured
from tests.fixtures.plain import Plain

class Broken(Plain):
    name = "broken"

    def __init__(self, settings, name):
        super().__init__(settings, name)
        self._path = settings.path("broken.sqlite")

    def scan(self, after, limit):
        raise Misconfigured("unlucky", "It cannot be read.")
"""


class Products(DocumentConsumer):
    """The design's own example."""

    document = Document(
        "public.products",
        category=One("public.categories", on="category_id"),
        reviews=Many("public.reviews", by="product_id"),
    )
    store = ElasticsearchIndex(
        "verify-products",
        mappings={"properties": {"name": {"type": "keyword"}, "reviews": {"type": "integer"}}},
    )

    def render(self, row: Node) -> Row | None:
        if row["name"] == "hidden":
            return None
        category = row.category
        return {
            "name": row["name"],
            "category": category and category["name"],
            "reviews": count(row.reviews),
            "stars": mean(row.reviews, "stars"),
        }


class Found:
    """What verify found in one view."""

    def __init__(self, verifier: Verifier, name: str, consumer: type[Consumer]) -> None:
        (outcome,) = list(verifier.verify({name: consumer}))
        self.rows = outcome.rows
        self.notes = outcome.notes
        self.wrong = list(outcome.wrong())
        self.undecided = list(outcome.undecided())
        outcome.close()

    @property
    def clean(self) -> bool:
        return not self.wrong and not self.undecided


def found(settings: Settings, consumer: type[Any], name: str = "view", timeout: float = 60) -> Found:
    """Verify one view."""
    log = Log(settings)
    return Found(Verifier(log, Control(log), lambda *_: None, timeout), name, consumer)


@contextmanager
def kept(settings: Settings, consumer: type[Any]) -> Iterator[Control]:
    """Run capture and one consumer; go on when it is live."""
    with capturing(settings) as capture, serving(settings, view=consumer) as control:
        capture.reach()
        await_live(control, "view")
        yield control


@contextmanager
def loaded(settings: Settings, *statements: Callable[[random.Random], str]) -> Iterator[None]:
    """Run random statements one after the other, each its own transaction, until the end."""
    stop = threading.Event()
    chance = random.Random(7)

    def load() -> None:
        with psycopg.connect(settings.dsn, autocommit=True) as connection:
            while not stop.is_set():
                connection.execute(chance.choice(statements)(chance).encode())

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


@contextmanager
def churned(settings: Settings, statement: str) -> Iterator[None]:
    """Run a statement in Postgres again and again until the end, a transaction each: as fast as commits are durable."""
    loop = f"DO $$ BEGIN LOOP {statement}; COMMIT; END LOOP; END $$"

    def churn(connection: psycopg.Connection[Any]) -> None:
        with suppress(psycopg.errors.QueryCanceled):
            connection.execute(loop.encode())

    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        thread = threading.Thread(target=churn, args=(connection,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            connection.cancel()
            thread.join(30)


def meddle(settings: Settings, statement: str, *values: Any) -> None:
    """Change the plain view behind headrace's back."""
    with sqlite3.connect(settings.path("plain.sqlite"), timeout=10) as view:
        view.execute(statement, values)


def test_one_row_changed_one_removed_and_one_added_are_found_by_name(settings: Settings) -> None:
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 1200) i")
    with kept(settings, Mirror):
        assert found(settings, Mirror).clean
        meddle(settings, "UPDATE rows SET value = ? WHERE key = ?", '{"id":7,"n":8,"name":"x"}', '{"id":7}')
        meddle(settings, "DELETE FROM rows WHERE key = ?", '{"id":600}')
        meddle(settings, "INSERT INTO rows VALUES (1, ?, ?, ?, 1, 1)", T, '{"id":9999}', '{"id":9999}')
        seen = found(settings, Mirror)
    assert seen.rows == 1200
    assert not seen.undecided
    assert seen.wrong == [
        Difference(MISSING, T, '{"id":600}'),
        Difference(DIFFERENT, T, '{"id":7}', ("n",)),
        Difference(EXTRA, T, '{"id":9999}'),
    ]


def test_it_is_exact_while_everything_changes(settings: Settings) -> None:
    """Nothing that merely moves is reported, and what is wrong is, whatever moves around it."""
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 3000) i")
    with (
        kept(settings, Mirror),
        loaded(
            settings,
            lambda chance: f"UPDATE {T} SET n = n + 1 WHERE id = {chance.randint(100, 2999)}",
            lambda chance: f"DELETE FROM {T} WHERE id = {chance.randint(100, 2999)}",
            lambda chance: f"INSERT INTO {T} VALUES ({chance.randint(100, 2999)}, 0, 'new') ON CONFLICT DO NOTHING",
        ),
    ):
        for _ in range(3):
            assert found(settings, Mirror).clean
        meddle(settings, "DELETE FROM rows WHERE key = ?", '{"id":50}')
        seen = found(settings, Mirror)
    assert [(d.kind, d.key) for d in seen.wrong] == [(MISSING, '{"id":50}')]
    assert not seen.undecided


HOTTEST = f"UPDATE {T} SET n = n + 1 WHERE id = 1"


@contextmanager
def hot(settings: Settings) -> Iterator[None]:
    """Change one row all the time, and some hundreds often."""
    others = f"UPDATE {T} SET n = n + 1 WHERE id = 2 + floor(random() * 300)"
    with churned(settings, HOTTEST), churned(settings, others):
        yield


def test_rows_that_change_all_the_time_are_decided(settings: Settings) -> None:
    """Such a row is never quiet for as long as a change needs to the view: it is compared with the state that the view shows."""
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 400) i")
    with kept(settings, Mirror), hot(settings):
        for _ in range(3):
            assert found(settings, Mirror).clean


def test_so_are_rows_whose_keys_have_a_length(settings: Settings) -> None:
    coins = "CREATE TABLE coins (id char(3) PRIMARY KEY, n int)"
    flags = "CREATE TABLE flags (id bit(4) PRIMARY KEY, n int)"
    prepare(settings, coins, flags, "INSERT INTO coins VALUES ('USD', 1)", "INSERT INTO flags VALUES (B'1010', 1)")
    with kept(settings, Mirror), churned(settings, "UPDATE coins SET n = n + 1; UPDATE flags SET n = n + 1"):
        seen = found(settings, Mirror)
    assert seen.clean, seen.wrong


class Undecided(Control):
    """Asks a view that is always between two states."""

    def counts(self, name: str, generation: int, timeout: float = 150.0) -> tuple[Version, dict[str, int]]:
        return NOWHERE, super().counts(name, generation, timeout)[1]


def test_a_count_that_is_of_no_certain_state_ends_in_time(settings: Settings) -> None:
    prepare(settings, ITEMS)
    with kept(settings, Mirror):
        log = Log(settings)
        with pytest.raises(Transient, match="between two states") as ended:
            list(Verifier(log, Undecided(log), lambda *_: None, 1).count({"view": Mirror}))
    assert ended.value.code == "view-behind"


def test_a_row_that_changes_all_the_time_and_is_wrong_is_found(settings: Settings) -> None:
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'right' FROM generate_series(1, 400) i")

    class Wrong(Mirror):
        """Spoils a column of one row whenever it is applied."""

        def apply(self, batch: Any) -> None:
            spoilt = [c._replace(row={**c.row, "name": "wrong"}) if c.key == b'{"id":1}' else c for c in batch.changes]
            super().apply(replace(batch, changes=spoilt))

    with kept(settings, Wrong), hot(settings):
        seen = found(settings, Wrong)
    assert seen.wrong == [Difference(DIFFERENT, T, '{"id":1}', ("name",))]
    assert not seen.undecided


def test_a_rebuild_is_verified_and_promoted_while_rows_change_all_the_time(settings: Settings) -> None:
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 400) i")
    code = Path(__file__).parents[1] / "fixtures" / "plain.py"
    command = [sys.executable, "-m", "headrace", "rebuild", "plain", "--wait", "--consumer", f"{code}:Plain"]
    with capturing(settings) as capture, serving(settings, plain=Plain) as control:
        capture.reach()
        await_live(control, "plain")
        with hot(settings):
            environ = environment(settings) | {"PATH": "/usr/bin:/bin"}
            built = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert [(g.number, g.live) for g in Plain(settings, "plain").generations()] == [(1, False), (2, True)]


def test_what_changes_while_the_view_stands_still_is_undecided_and_that_is_said(settings: Settings) -> None:
    prepare(settings, ITEMS, f"INSERT INTO {T} VALUES (1, 0, 'x')")
    with capturing(settings) as capture, serving(settings, view=Mirror) as control:
        capture.reach()
        await_live(control, "view")

        class Standing(Verifier):
            """Capture ends when the view has been compared."""

            def _compare(self, *args: Any) -> Any:
                execute(settings, HOTTEST)
                capture.reach()
                left = super()._compare(*args)
                capture.stop()
                execute(settings, HOTTEST)
                return left

        log = Log(settings)
        (outcome,) = Standing(log, Control(log), lambda *_: None, 15).verify({"view": Mirror})
        assert [d.key for d in outcome.undecided()] == ['{"id":1}']
        assert not list(outcome.wrong())
        assert any("showed nothing newer" in note for note in outcome.notes)
        outcome.close()


def test_a_commit_that_the_snapshot_does_not_see_excuses_although_it_is_logged_before(settings: Settings) -> None:
    """A commit that waits for a synchronous standby is in the log and in the view, and no snapshot sees it (S7)."""
    settings = replace(settings, heartbeat_ms=0)  # which has a transaction of its own, after that
    prepare(settings, ITEMS, f"INSERT INTO {T} VALUES (1, 0, 'old')")
    with kept(settings, Mirror) as control:
        with psycopg.connect(settings.dsn, autocommit=True) as waiting, closing_sync(settings):
            waiting.execute("SET synchronous_commit = on")
            thread = threading.Thread(target=_ignore_cancel, args=(waiting, f"UPDATE {T} SET name = 'new'"))
            thread.start()
            eventually("the view has it", lambda: _named(settings) == "new")
            with connect(settings) as connection, moment(connection) as now:
                assert connection.execute(f"SELECT name FROM {T}").fetchone() == ("old",)
            assert not now.snapshot.running, "its transaction is not even listed: it is beyond xmax"
            seen = found(settings, Mirror, timeout=15)
            waiting.cancel()
            thread.join(30)
        assert not seen.wrong
        assert [d.key for d in seen.undecided] == ['{"id":1}'], (
            "not decided while the commit waits, and not called clean"
        )
        assert found(settings, Mirror).clean
        assert control.running("view")


@contextmanager
def closing_sync(settings: Settings) -> Iterator[None]:
    """Make commits that ask for it wait for a standby that there is not; other connections do not ask."""
    name = settings.dsn.rpartition("/")[2]
    execute(settings, f"ALTER DATABASE {name} SET synchronous_commit = local")
    execute(settings, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
    eventually("it is set", lambda: rows(settings, "SHOW synchronous_standby_names") == [("nobody",)])
    try:
        yield
    finally:
        with psycopg.connect(settings.dsn, autocommit=True) as connection:
            connection.execute("SET synchronous_commit = local")
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")


def _ignore_cancel(connection: psycopg.Connection[Any], statement: str) -> None:
    connection.execute(statement.encode())


def _named(settings: Settings) -> str | None:
    with sqlite3.connect(settings.path("plain.sqlite"), timeout=10) as view:
        row = view.execute("SELECT value FROM rows WHERE key = ?", ['{"id":1}']).fetchone()
    return str(orjson.loads(row[0])["name"]) if row else None


VALUES = {
    "bool": "true",
    "int8": "9007199254740993",
    "float8": "'NaN'",
    "float4": "0.1",
    "numeric(30,10)": "12345678901234567890.1234567890",
    "numeric": "'NaN'",
    "char(5)": "'ab'",
    "varchar(9)": "E'q\"\\\\ü\\n'",
    "date": "'infinity'",
    "time(3)": "'12:34:56.789'",
    "timetz": "'12:34:56+02'",
    "timestamp": "'2024-02-29 12:34:56.789'",
    "timestamptz": "'2024-02-29 12:34:56+03'",
    "timestamptz[]": "ARRAY['2024-02-29 12:34:56+03'::timestamptz, 'infinity', NULL]",
    "interval": "'1 year 2 days 03:04:05.6'",
    "bytea": "'\\x00ff10'",
    "bytea[]": "ARRAY['\\x00ff'::bytea]",
    "json": "'{\"a\": [1, 2.50, null]}'",
    "jsonb": '\'{"a": {"b": "\\u00fc"}}\'',
    "jsonb[]": "ARRAY['{\"a\": 1}'::jsonb, NULL]",
    "uuid": "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",
    "inet": "'10.0.0.1'",
    "inet[]": "ARRAY['10.0.0.1'::inet, '10.0.0.0/8']",
    "cidr": "'10.0.0.0/8'",
    "money": "1234.56",
    "int4range": "'[1,5)'",
    "int4[]": "'{{1,2},{3,NULL}}'",
    "text[]": "ARRAY['a,b', 'c\"d', NULL, '']",
    "numeric[]": "ARRAY[1.10, NULL]",
    "char(3)[]": "ARRAY['a'::char(3)]",
    "bool[]": "ARRAY[true, NULL]",
    "float8[]": "ARRAY[1.5, 'Infinity']",
    "date[]": "ARRAY['2024-01-01'::date]",
    "oid": "4294967295",
    "bit(4)": "'1010'",
    "point": "'(1,2.5)'",
    "box[]": "ARRAY['(1,1),(0,0)'::box, '(2,2),(0,0)'::box]",
    "xml": "'<a>b</a>'",
    "public.mood": "'fine'",
    "public.mood[]": "ARRAY['fine'::public.mood]",
    "public.positive": "7",
    "public.pair": "ROW(1, NULL)",
    "public.pair[]": "ARRAY[ROW(1, 'x y')::public.pair]",
}
TYPES = (
    "CREATE TYPE public.mood AS ENUM ('fine', 'bad')",
    "CREATE DOMAIN public.positive AS int CHECK (VALUE > 0)",
    "CREATE TYPE public.pair AS (a int, b text)",
)


def test_columns_may_be_called_as_our_queries_call_their_rows(settings: Settings) -> None:
    """In the snapshot's queries and in ours: an alias must not be taken for the column."""
    prepare(
        settings,
        "CREATE TABLE items (r int, k int, t int, c int, PRIMARY KEY (k, r))",
        "CREATE TABLE others (r int PRIMARY KEY, k text)",
        "INSERT INTO items VALUES (1, 2, 3, 4)",
        "INSERT INTO others VALUES (1, 'k')",
    )
    with kept(settings, Mirror):
        execute(settings, "INSERT INTO items VALUES (5, 6, 7, 8)", "UPDATE others SET k = 'more'")
        assert found(settings, Mirror).clean
        keys = {change.key for table in (T, "public.others") for change in Log(settings).scan(table)}
    assert keys == {b'{"k":2,"r":1}', b'{"k":6,"r":5}', b'{"r":1}'}


def test_every_type_is_read_as_the_log_has_it(settings: Settings) -> None:
    """Snapshot and stream against SQL; the same value, all NULL, and an old row from before a column was added."""
    columns = {f"c{number}": type_ for number, type_ in enumerate(VALUES)}
    typed = ", ".join(f"{name} {type_}" for name, type_ in columns.items())
    values = ", ".join(f"{value}::{type_}" for type_, value in VALUES.items())
    table = f"CREATE TABLE public.every (id numeric(5,2), code text, PRIMARY KEY (code, id), {typed})"
    prepare(settings, *TYPES, table, f"INSERT INTO public.every VALUES (1.5, 'k', {values})")
    execute(settings, "INSERT INTO public.every VALUES (2, 'nulls')")
    with kept(settings, Mirror):
        execute(settings, f"INSERT INTO public.every VALUES (1.5, 'streamed \" ü', {values})")
        assert [(d.kind, d.key, d.columns) for d in found(settings, Mirror).wrong] == []
        execute(
            settings,
            "ALTER TABLE public.every ADD COLUMN later int",
            "INSERT INTO public.every (id, code, later) VALUES (3, 'l', 1)",
        )
        execute(settings, "UPDATE public.every SET c1 = 1 WHERE code = 'nulls'")
        seen = found(settings, Mirror)
        assert [(d.kind, d.key, d.columns) for d in seen.wrong] == []
        meddle(settings, "UPDATE rows SET value = replace(value, '\"1.50\"', '\"1.5\"') WHERE key LIKE '%\"k\"%'")
        again = found(settings, Mirror)
    assert seen.rows == 4
    assert [(d.key, d.columns) for d in again.wrong] == [('{"code":"k","id":"1.50"}', ("id",))]


@pytest.mark.usefixtures("redis_server")
def test_documents_as_deep_as_postgres_takes_them_are_in_every_view(settings: Settings) -> None:
    """Snapshot and stream; rows, a warehouse and documents, which then go on with what comes after."""

    class Deep(DocumentConsumer):
        """Rows as they are."""

        document = Document(T)
        store = RedisPages("verify-deep")

        def render(self, row: Node) -> Row | None:
            return {"html": codec.dumps([row["a"], row["b"], row["c"]]).decode()}

    insert = (
        f"INSERT INTO {T} SELECT {{}} + n, d, d::jsonb, ARRAY[d::jsonb, '[1]'] "
        "FROM unnest(ARRAY[2, 199, 200, 201, 253, 260, 1022, 1023, 1024, 3000]) n, LATERAL (SELECT (repeat('[{{\"[\":', n / 2) || "
        "CASE WHEN n % 2 = 1 THEN '[ ]' ELSE 'null' END || repeat('}} ]', n / 2))::json) made (d)"
    )
    prepare(settings, f"CREATE TABLE {T} (id int PRIMARY KEY, a json, b jsonb, c jsonb[])", insert.format(0))
    views: dict[str, type[Any]] = {"view": Mirror, "deep": Deep, "warehouse": Warehouse}
    with capturing(settings) as capture, serving(settings, **views) as control:
        capture.reach()
        await_live(control, *views)
        execute(settings, insert.format(10000), f"INSERT INTO {T} VALUES (99, '1', '2', NULL)")
        seen = {name: found(settings, consumer, name) for name, consumer in views.items()}
    assert {name: ([(d.kind, d.key, d.columns) for d in of.wrong], of.rows) for name, of in seen.items()} == {
        name: ([], 21) for name in views
    }
    log = replay(settings, T)
    for n in (200, 1024):
        assert log[b'{"id":%d}' % (10000 + n)]["a"] == log[b'{"id":%d}' % n]["a"]
    assert [type(log[b'{"id":%d}' % n]["b"]) for n in (200, 201)] == [list, str]


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


class Warehouse(DuckDBStore):
    """The built-in one without its endpoint."""


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


def test_a_row_that_is_there_twice_is_found(settings: Settings) -> None:
    """No index of the warehouse forbids it; also where a page ends between the two, as the first does after ten rows."""
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 30) i")
    with kept(settings, Warehouse):
        database = Database.opened(settings.warehouse, settings.warehouse_memory)
        try:
            with database.cursor() as cursor:
                items = f'g1."{T}"'
                cursor.execute(f"CREATE TEMP TABLE more AS FROM {items} WHERE id = 30")
                cursor.execute(f"INSERT INTO more (FROM {items} ORDER BY _headrace_key LIMIT 1 OFFSET 9)")
                cursor.execute(f"INSERT INTO {items} FROM more")
                keys = sorted(key for (key,) in cursor.execute("SELECT _headrace_key FROM more").fetchall())
        finally:
            database.release()
        seen = found(settings, Warehouse)
    assert seen.wrong == [Difference(EXTRA, T, key) for key in keys]
    assert (len(keys), seen.undecided) == (2, [])


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


def test_the_command_names_keys_and_exits_1(settings: Settings, tmp_path: Path) -> None:
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 30) i")
    code = Path(__file__).parents[1] / "fixtures" / "plain.py"
    command = [sys.executable, "-m", "headrace", "verify", "--consumer", f"{code}:Plain"]
    environ = environment(settings) | {"PATH": "/usr/bin:/bin"}
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN)
    files = ["--consumer", f"{broken}:Broken"]

    def verify(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=environ, capture_output=True, text=True, timeout=60, check=False)

    with capturing(settings) as capture:
        capture.reach()
        off = verify()
        assert off.returncode == 3
        assert "headrace run plain" in off.stderr
        with serving(settings, plain=Plain, **plugins.load_files(files[1:])) as control:
            await_live(control, "plain", "broken")
            right = verify()
            assert right.returncode == 0, right.stderr
            meddle(settings, "DELETE FROM rows WHERE key = ?", '{"id":3}')
            wrong = verify()
            said = orjson.loads(verify("--json").stdout)
            some = verify("--json", *files)
    assert (some.returncode, "It cannot be read." in some.stderr) == (3, True), some.stderr
    assert orjson.loads(some.stdout)[0] | {"lsn": ""} == said[0] | {"lsn": ""}, "what was compared before is known"
    assert wrong.returncode == 1
    assert f'missing plain {T} {{"id":3}}' in wrong.stdout
    assert (said[0]["missing"], said[0]["rows"], said[0]["ok"]) == (1, 30, False)
    assert said[0]["differences"][0]["key"] == '{"id":3}'


def test_what_is_not_exact_is_said(settings: Settings) -> None:
    """FULL is impossible beside a virtual column, so a TOAST value may have to be read again (S7, S8)."""
    prepare(
        settings, "CREATE TABLE public.v (id int PRIMARY KEY, n int, big text, twice int GENERATED ALWAYS AS (n * 2))"
    )
    execute(settings, "INSERT INTO public.v VALUES (1, 1, 'x')")
    with kept(settings, Mirror):
        seen = found(settings, Mirror)
    assert seen.clean
    assert seen.rows == 1
    assert [note for note in seen.notes if "public.v is approximate" in note]


def test_a_view_that_has_stopped_is_not_compared_and_that_is_said_at_once(settings: Settings) -> None:
    """When it stops while it is scanned; and then before anything is read. Its process goes on for the consumer beside it."""
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 2000) i")
    nowhere = replace(settings, dsn="postgresql://postgres@127.0.0.1:1/x")

    class Poisoned(Mirror):
        """Cannot apply a row that is written when it is scanned; the scan has no end."""

        def apply(self, batch: Any) -> None:
            if any(change.row and change.row["name"] == "poison" for change in batch.changes):
                raise Poison("unlucky", "One row is poison.", "Mend it, then: headrace rebuild NAME")
            super().apply(batch)

        def scan(self, after: Cursor | None, limit: int) -> list[ViewRow]:
            if after is None:
                execute(settings, f"UPDATE {T} SET name = 'poison' WHERE id = 1")
            return super().scan(None, limit) if after else super().scan(after, limit)

    with capturing(settings) as capture, serving(settings, view=Poisoned, beside=Warehouse) as control:
        capture.reach()
        await_live(control, "view")
        for asked in (settings, nowhere):
            with pytest.raises(HeadraceError) as stopped:
                found(asked, Poisoned)
            assert stopped.value.code == "unlucky"
            assert "headrace rebuild view" in stopped.value.remedy
            eventually("that is reported", lambda: control.reports()["view"][0].phase == "stopped")


def test_without_a_view_or_postgres_it_says_what_to_do(settings: Settings, fresh_database: Callable[[], str]) -> None:
    prepare(settings, ITEMS)

    class Other(Mirror):
        """Neither mirrors rows nor renders."""

        mirrors_rows = False

    with kept(settings, Other):
        with pytest.raises(Misconfigured, match="neither mirrors"):
            found(settings, Other)
        with pytest.raises(Misconfigured, match="runs other code") as here:
            found(settings, Mirror)
        assert here.value.code == "other-code"
        with pytest.raises(Transient) as away:
            found(replace(settings, dsn="postgresql://postgres@127.0.0.1:1/x"), Other)
        assert away.value.code == "postgres-away"
        with pytest.raises(Misconfigured) as elsewhere:
            found(replace(settings, dsn=fresh_database()), Other)
        assert elsewhere.value.code == "other-source"
        with (
            connect(settings) as postgres,
            pytest.raises(Misconfigured, match="text = uuid") as refused,
            _postgres_errors(),
        ):
            postgres.execute("SELECT 'a'::text = gen_random_uuid()")
        assert refused.value.code == "verify-no-expectation", "it is there, and answers"
    with pytest.raises(Misconfigured, match="No process runs"):
        found(settings, Other)


def test_what_cannot_be_compared_keeps_nobody_else_from_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "calls-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: calls\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[headrace.consumers]\nplain = tests.fixtures.plain:Plain\ncalls = calls:Calls\ntrail = calls:Trail\n"
    )
    (tmp_path / "calls.py").write_text(
        "from headrace.documents import Document, DocumentConsumer\nfrom headrace.effects import EffectConsumer\n"
        "from headrace.stores.kafka import KafkaTopic\n\nclass Calls(EffectConsumer):\n"
        f"    tables = ('{T}',)\n\n    def effect(self, changes):\n        pass\n\n\nclass Trail(DocumentConsumer):\n"
        "    document = Document('public.events')\n    store = KafkaTopic('trail')\n\n"
        "    def render(self, row):\n        return dict(row)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = ("INSERT INTO items VALUES (1, 1, 'one')", "CREATE TABLE events (n int)", "INSERT INTO events VALUES (1)")
    prepare_append_only(settings, ITEMS, *made)
    consumers = {name: plugins.load(name) for name in ("plain", "calls", "trail")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environ = os.environ | environment(settings) | {"COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "headrace", *words], env=environ, capture_output=True, text=True, check=False
        )

    with capturing(settings) as capture, serving(settings, **consumers) as control:
        capture.reach()
        await_live(control, "plain", "calls", "trail")
        ended = run("verify", "--json")
        assert ended.returncode == 0, ended.stderr
        assert [fact["consumer"] for fact in orjson.loads(ended.stdout)] == ["plain"]
        assert "not compared calls" in ended.stderr
        assert "not compared trail has a document for each row of public.events" in ended.stderr
        ended = run("verify", "plain", "trail")
        assert (ended.returncode, "verify-no-expectation" in ended.stderr) == (3, True), "it was asked for by name"
        ended = run("rebuild", "calls", "--wait")
        assert ended.returncode == 0, ended.stderr
        assert [report.live for report in control.reports()["calls"]] == [False, True]
