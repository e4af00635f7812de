"""SQL over the warehouse: by HTTP, read-only, one exact state of the live generation, bounded."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.settings import Settings
from headrace.stores.duckdb import DuckDBStore
from headrace_warehouse import Warehouse, endpoint
from headrace_warehouse.cli import ask
from headrace_warehouse.endpoint import Endpoint
from tests.fixtures.endpoints import address, fill
from tests.fixtures.tables import FIRST, batch


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(warehouse=str(tmp_path / "w.duckdb"), warehouse_memory="512MB", warehouse_listen="127.0.0.1:0")


@pytest.fixture
def store(settings: Settings) -> Iterator[Warehouse]:
    made = Warehouse(settings, "warehouse")
    made.open(FIRST)
    yield made
    made.close()
    endpoint.stop()


class Served(NamedTuple):
    """A warehouse that tests share which change nothing in it."""

    store: DuckDBStore
    folder: Path
    at: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    settings = Settings(warehouse=str(folder / "w.duckdb"), warehouse_memory="512MB", warehouse_listen="127.0.0.1:0")
    store = DuckDBStore(settings, "warehouse")
    store.open(FIRST)
    fill(store)
    store.promote()
    server = Endpoint(settings)
    yield Served(store, folder, f"127.0.0.1:{server.port}")
    server.stop()
    store.close()


def raw(method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(f"http://{address()}{path}", body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text.decode()


def test_it_is_loading_until_there_is_a_state(store: Warehouse) -> None:
    assert raw("GET", "/health")[0] == 503
    with pytest.raises(Transient, match="loading"):
        ask(address(), "SELECT 1")
    fill(store)
    store.promote()
    assert raw("GET", "/health") == (200, {"status": "live", "version": "1@0/A", "lsn": "0/A"})


def test_an_answer_has_columns_types_rows_and_the_state_it_shows(store: Warehouse) -> None:
    fill(store)
    store.promote()
    answer = ask(
        address(), "SELECT count(*) c, sum(price) AS s, [1] l, max(id) FROM public.items JOIN sales.orders USING (id)"
    )
    assert answer == {
        "columns": ["c", "s", "l", "max(id)"],
        "types": ["BIGINT", "DECIMAL(38,2)", "INTEGER[]", "INTEGER"],
        "rows": [[1, "1.50", [1], 1]],
        "version": "1@0/A",
        "lsn": "0/A",
        "inexact": [],
        "approximate": [],
        "parked": [],
        "truncated": False,
    }


def test_an_answer_names_the_tables_that_are_inexact_or_approximate_at_its_state(store: Warehouse) -> None:
    fill(store)
    store.promote()
    later = batch(20, schemas=())
    later.position = replace(later.position, inexact=("public.items",), approximate=("public.items",))
    store.apply(later)
    answer = ask(address(), "SELECT 1")
    assert (answer["lsn"], answer["inexact"], answer["approximate"]) == ("0/14", ["public.items"], ["public.items"])


GOOD = {
    "FROM items": 50,
    "SELECT 1 a, 2 a -- comment": 1,
    "VALUES (1), (2);": 2,
    "DESCRIBE items": 3,
    "SHOW TABLES": 1,
    "SUMMARIZE items": 3,
    "SELECT * FROM range(3)": 3,
    "WITH RECURSIVE r AS (SELECT 1 a UNION ALL SELECT a + 1 FROM r WHERE a < 5) FROM r": 5,
    "SELECT table_name FROM information_schema.tables WHERE table_schema = 'sales'": 1,
    "SELECT now(), 'infinity'::DATE, 'NaN'::DOUBLE, 1::HUGEINT, uuid(), '\\xFF'::BLOB, NULL, INTERVAL 1 DAY, {'a': 1}": 1,
    "SELECT setseed(0.5)": 1,
}


@pytest.mark.parametrize("query", GOOD)
def test_a_select_in_any_form_is_answered(served: Served, query: str) -> None:
    assert len(ask(served.at, query)["rows"]) == GOOD[query]


REFUSED = [
    "INSERT INTO items VALUES (1)",
    'DELETE FROM g1."public.items"',
    'WITH x AS (DELETE FROM g1."public.items" RETURNING 1) SELECT * FROM x',
    "WITH x AS (INSERT INTO headrace.live VALUES (7) RETURNING number) SELECT * FROM x",
    "UPDATE headrace.live SET number = 2",
    "DROP SCHEMA g1 CASCADE",
    "CREATE TABLE x AS SELECT 1",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE MACRO f() AS 1",
    "BEGIN",
    "COMMIT",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW items",
    "",
    "  -- nothing",
    "SELEC 1",
    "SET memory_limit = '1MB'",
    "SET VARIABLE x = 1",
    "RESET lock_configuration",
    "PRAGMA threads = 1",
    "CALL force_checkpoint()",
    "CHECKPOINT",
    "ATTACH 'other.duckdb'",
    "DETACH w",
    "USE g1",
    "COPY items TO 'out.csv'",
    "COPY (SELECT 1) TO 'out.csv'",
    "EXPORT DATABASE 'out'",
    "IMPORT DATABASE 'out'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "EXPLAIN ANALYZE INSERT INTO items VALUES (1)",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/passwd')",
    "SELECT * FROM read_json('/etc/passwd')",
    "SELECT * FROM read_parquet('http://127.0.0.1:1/x')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM 'x.csv'",
    "SELECT * FROM '/etc/x.parquet'",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM parquet_metadata('/etc/passwd')",
    "SELECT * FROM query('SELECT * FROM g1.\"public.items\"')",
    "SELECT * FROM query_table('items')",
    "FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM python_arrow_scan(1)",
    "SELECT * FROM seq_scan()",
    "SELECT * FROM force_checkpoint()",
    "SELECT * FROM checkpoint()",
    "SELECT * FROM enable_logging()",
    "SELECT * FROM truncate_duckdb_logs()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_settings()",
    "SELECT getenv('HOME')",
    'SELECT * FROM g1."public.items"',
    'SELECT * FROM w.g1."public.items"',
    'SELECT (SELECT count(*) FROM G1."public.items")',
    "SELECT * FROM headrace.generations",
    "DESCRIBE headrace.generations",
    "SELECT * FROM settings",
    "SELECT nextval('x')",
]


@pytest.mark.parametrize("query", REFUSED)
def test_everything_else_is_refused_and_leaves_no_trace(served: Served, query: str) -> None:
    before = sorted(path.name for path in served.folder.iterdir())
    with pytest.raises(HeadraceError) as raised:
        ask(served.at, query)
    assert raised.value.code in {"sql-refused", "sql-failed"}
    assert sorted(path.name for path in served.folder.iterdir()) == before
    assert ask(served.at, "SELECT count(*) FROM items")["rows"] == [[50]]
    fill(served.store)


def test_a_query_that_runs_too_long_is_stopped(settings: Settings, store: Warehouse) -> None:
    fill(store)
    store.promote()
    quick = Endpoint(settings, seconds=0.3)
    try:
        for slow in (
            "SELECT sum(a.range * b.range) FROM range(10000000) a, range(1000000) b",
            "SELECT sleep_ms(20000)",
        ):
            began = time.monotonic()
            with pytest.raises(HeadraceError, match=r"longer than 0\.3 s"):
                ask(f"127.0.0.1:{quick.port}", slow)
            assert time.monotonic() - began < 15
        quick._seconds = 30.0
        assert ask(f"127.0.0.1:{quick.port}", "SELECT 1")["rows"] == [[1]]
        quick._seconds = 0.3
        for _ in range(endpoint._QUERIES):
            quick._queries.acquire()
        with pytest.raises(Transient, match="other queries"):
            ask(f"127.0.0.1:{quick.port}", "SELECT 1")
    finally:
        quick.stop()


def test_rows_and_bytes_of_an_answer_are_bounded(settings: Settings, store: Warehouse) -> None:
    fill(store)
    store.promote()
    few = Endpoint(settings, rows=10)
    try:
        answer = ask(f"127.0.0.1:{few.port}", "SELECT id FROM items ORDER BY id DESC")
        assert (answer["rows"], answer["truncated"]) == ([[n] for n in range(49, 39, -1)], True)
        assert ask(f"127.0.0.1:{few.port}", "SELECT id FROM items LIMIT 10")["truncated"] is False
    finally:
        few.stop()
    with pytest.raises(HeadraceError, match="larger than 32 MB"):
        ask(address(), "SELECT repeat('x', 10000) FROM range(10000)")
    assert ask(address(), "SELECT * FROM range(100000000)")["truncated"] is True


def test_a_hungry_query_fails_alone(store: Warehouse) -> None:
    fill(store)
    store.promote()
    with pytest.raises(HeadraceError):
        ask(
            address(),
            "SELECT length(list(x)::VARCHAR) FROM (SELECT repeat('y', 1000) || range AS x FROM range(20000000))",
        )
    fill(store, n=1, lsn=20)
    assert ask(address(), "SELECT sum(n) FROM items")["rows"] == [[50]]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"sql":"SELECT 1"}', {"Content-Type": "text/plain"}, 415),
        (b'{"sql":"SELECT 1"}', {"Content-Type": "application/json", "Host": "evil.example"}, 400),
        (b"SELECT 1", {"Content-Type": "application/json"}, 400),
        (b"[1]", {"Content-Type": "application/json"}, 400),
        (b'{"sql": 1}', {"Content-Type": "application/json"}, 400),
        (b'{"sql":"%s"}' % (b"x" * 2_000_000), {"Content-Type": "application/json"}, 413),
    ],
)
def test_requests_that_are_none_are_refused(
    store: Warehouse, body: bytes, headers: dict[str, str], status: int
) -> None:
    fill(store)
    store.promote()
    assert raw("POST", "/sql", body, **headers)[0] == status


def test_a_taken_port_names_the_setting(settings: Settings, store: Warehouse) -> None:
    with pytest.raises(Misconfigured, match="cannot listen") as raised:
        Endpoint(replace(settings, warehouse_listen=address()))
    assert "HEADRACE_WAREHOUSE_LISTEN" in raised.value.remedy
    for listen in ("nowhere", "[::1:0", "::1]:0"):
        with pytest.raises(Misconfigured, match="cannot listen"):
            Endpoint(replace(settings, warehouse_listen=listen))
    store.scan(None, 1)


def test_an_answer_does_not_wait_until_its_headers_are_acknowledged(settings: Settings) -> None:
    server = Endpoint(replace(settings, warehouse_listen="127.0.0.1:0"))
    try:
        assert server._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    finally:
        server.stop()


def test_a_loopback_address_of_version_6_is_answered_too(settings: Settings, store: Warehouse) -> None:
    fill(store)
    store.promote()
    server = Endpoint(replace(settings, warehouse_listen="::1:0"))
    try:
        for host in ("[::1]", "::1"):
            assert ask(f"{host}:{server.port}", "SELECT 1").get("rows") == [[1]]
    finally:
        server.stop()


def test_health_is_answered_while_more_ask_than_can_be_answered(store: Warehouse) -> None:
    fill(store)
    store.promote()
    (only,) = endpoint._serving.values()
    with ExitStack() as busy:
        for _ in range(endpoint._QUERIES):
            only._queries.acquire()
            busy.callback(only._queries.release)
        askers = [threading.Thread(target=ask, args=(address(), "SELECT 1")) for _ in range(45)]
        for asker in askers:
            asker.start()
        for _ in range(300):
            if sum(thread.name.startswith("AnyIO worker") for thread in threading.enumerate()) >= 40:
                break
            time.sleep(0.1)
        with urllib.request.urlopen(f"http://{address()}/health", timeout=5) as answer:
            assert answer.status == 200
    for asker in askers:
        asker.join()
