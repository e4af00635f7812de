"""S28: a real Debezium connector feeds our consumers; its feed has no checkpoints, and whoever needs one says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from decimal import Decimal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import orjson
import pytest

from headrace.control import Report
from headrace.documents import Document, DocumentConsumer, Many, Max, Min, Node, Window
from headrace.errors import HeadraceError, Misconfigured, Refused, Transient
from headrace.log import Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import CONTROL, checkpoints_topic
from headrace.settings import Settings, environment
from headrace.stores.duckdb import DuckDBStore
from headrace.stores.redis import PageReader, RedisPages
from tests.fixtures import plain
from tests.fixtures.capture import eventually, execute, now, refused, rows, selected
from tests.fixtures.debezium import connecting
from tests.fixtures.fed import ITEMS, writing
from tests.fixtures.plain import Plain
from tests.fixtures.processes import System
from tests.fixtures.serving import await_live, serving
from tests.fixtures.ticks import repeating


class Tables(DuckDBStore):
    """Every table, typed, in DuckDB."""


def shown(settings: Settings) -> dict[bytes, Any]:
    """What readers of the plain view see."""
    view = Plain(settings, "plain")
    live = [generation.number for generation in view.generations() if generation.live]
    if not live:
        return {}
    view._number = live[0]
    return {row.key.encode(): row.value for row in view.scan(None, 10_000)}


def report(control: Any, name: str = "plain") -> Report | None:
    return next(iter(control.reports().get(name, [])), None)


def equal(settings: Settings) -> None:
    eventually("view == SELECT", lambda: shown(settings) == selected(settings, "items") != {})


def headrace(settings: Settings, *words: str) -> subprocess.CompletedProcess[str]:
    program = [str(Path(sys.executable).with_name("headrace")), *words]
    environ = os.environ | environment(settings)
    return subprocess.run(program, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_a_real_connector_feeds_a_view_over_every_change(fed: Settings, tmp_path: Path) -> None:
    """Snapshot, inserts, updates, deletes, a changed key; the view is stopped, and goes on where it was; it is rebuilt."""
    execute(fed, ITEMS, "INSERT INTO items SELECT i, 'n' || i, i FROM generate_series(1, 50) i")
    with connecting(fed, tmp_path, "public.items"):
        with serving(fed, plain=Plain) as control:
            equal(fed)
            execute(
                fed,
                "INSERT INTO items VALUES (100, 'new \" \\ ü', NULL)",
                "UPDATE items SET n = n + 1 WHERE id < 20",
                "DELETE FROM items WHERE id BETWEEN 30 AND 35",
                "BEGIN; UPDATE items SET id = 200 WHERE id = 7; UPDATE items SET n = 0 WHERE id = 200; COMMIT",
            )
            equal(fed)
            eventually("it is live", lambda: (found := report(control)) and found.phase == "live")
            _says_no_checkpoints(fed)
        execute(fed, "UPDATE items SET n = 78 WHERE id = 1", "DELETE FROM items WHERE id = 2")
        with serving(fed, plain=Plain) as control:
            equal(fed)
            eventually("it is live", lambda: _phase(control, 1) == "live")
            assert control.ask("plain", "rebuild") == {"generation": 2}
            execute(fed, "UPDATE items SET n = 79 WHERE id = 1", "INSERT INTO items VALUES (2, 'again', 2)")
            eventually("it follows", lambda: _phase(control, 2) == "following")
            eventually("it is promoted", lambda: _promoted(control))
            equal(fed)
    assert checkpoints_topic(fed.source) not in Log(fed).topics.names()
    assert CONTROL in Log(fed).topics.names()


@pytest.mark.timeout(300)
def test_what_a_killed_connector_sends_again_is_taken_by_a_view_that_is_killed_too(
    fed: Settings, tmp_path: Path
) -> None:
    """Updates go on all the time; the second connector notes nothing, so that the third sends again all that it has sent."""
    execute(fed, ITEMS, "INSERT INTO items SELECT i, 'n' || i, 0 FROM generate_series(1, 3) i")
    view, run = System(fed, tmp_path), ("run", "--consumer", f"{plain.__file__}:Plain")
    connector = partial(connecting, fed, tmp_path, "public.items")
    updates = [f"UPDATE items SET n = n + 1 WHERE id = {id_}" for id_ in (1, 2, 3)]

    def killed(what: str, condition: Callable[[], Any]) -> None:
        eventually(what, condition)
        view.kill("plain")
        view.start("plain", *run)

    with ExitStack() as last:
        last.callback(view.stop_all)
        view.start("plain", *run)
        with connector():
            equal(fed)
            lsn = now(fed)
            execute(fed, *updates)
            eventually("it has noted an update", lambda: noted(tmp_path / "offsets") >= lsn)
        with repeating(fed, *updates, every=0.02):
            with connector(noting_ms=3_600_000):
                killed("the view follows", lambda: shown(fed)[b'{"id":3}']["n"] > 10)
            last.enter_context(connector())
            killed("it is sent again", lambda: any(map(goes_back, sent(fed).values())))
        equal(fed)


def sent(settings: Settings) -> dict[bytes, list[int]]:
    """Return of each key of items the LSNs that were sent, in their order."""
    found = defaultdict[bytes, list[int]](list)
    for record in read_to_end(settings, {(Log(settings).topic_of("public.items"), 0): BEGINNING}):
        if record.value is not None:
            found[record.key].append(orjson.loads(record.value)["source"]["lsn"])
    return found


def goes_back(lsns: list[int]) -> bool:
    """Whether one stands there again after a later one."""
    return any(lsn < before and lsn in lsns[:at] for at, (before, lsn) in enumerate(pairwise(lsns)))


def noted(offsets: Path) -> int:
    """Return the highest LSN in the connector's file of what it has read."""
    said = offsets.read_bytes() if offsets.exists() else b""
    return max(map(int, re.findall(rb'"lsn":(\d+)', said)), default=0)


def _says_no_checkpoints(settings: Settings) -> None:
    status = headrace(settings, "status")
    assert "fed by Debezium, no checkpoints" in status.stdout, status
    assert status.stdout.count("no checkpoints") == 2, "the source's line, and the view's"
    said = orjson.loads(headrace(settings, "status", "--json").stdout)
    assert said["source"]["feed"] == "debezium"
    assert said["consumers"]["plain"][0]["checkpoints"] == "none"
    for words in (("verify",), ("wait", "plain"), ("wait", "plain", "--lsn", "0/1"), ("rebuild", "plain", "--wait")):
        asked = headrace(settings, *words)
        assert asked.returncode == Misconfigured.exit_code, asked
        assert "no-checkpoints" in asked.stderr + asked.stdout


def _phase(control: Any, generation: int) -> str:
    return next((found.phase for found in control.reports()["plain"] if found.generation == generation), "")


def _promoted(control: Any) -> bool:
    try:
        control.ask("plain", "promote", {"generation": 2}, timeout=60)
    except HeadraceError:
        return False
    return True


class Orders(DocumentConsumer):
    """A page for each customer with their orders."""

    document = Document("public.customers", orders=Many("public.orders", by="customer_id"))
    store = RedisPages()

    def render(self, row: Node) -> dict[str, Any]:
        return {"html": ",".join(sorted(order["what"] for order in row.orders))}


class Days(DocumentConsumer):
    """A page for each day in which customers were seen."""

    document = Window("public.customers", on="seen", seconds=86400, most=Max("price"), first=Min("born"))
    store = RedisPages()

    def render(self, row: Node) -> dict[str, Any]:
        return {"html": f"{row['most']}"}


def test_with_schemas_tables_are_typed_and_documents_are_themselves(
    fed: Settings, tmp_path: Path, redis_server: object
) -> None:
    """The warehouse, joined documents and windows, from one feed."""
    execute(
        fed,
        "CREATE TABLE customers (id int PRIMARY KEY, note jsonb, born timestamptz, price numeric(10,2), score real, tags text[], "
        "seen timestamp, day date, days date[])",
        "CREATE TABLE orders (id int PRIMARY KEY, customer_id int, what text)",
        """INSERT INTO customers VALUES (1, '{"a": [1, 2.5]}', '2024-02-29 12:00:00+05', 1.50, 0.5, '{a,NULL}', '2024-02-29 12:00:00.5',
           '2024-02-29', '{2024-02-29}')""",
        "INSERT INTO customers (id) VALUES (2)",
        "INSERT INTO customers (id, price, seen) VALUES (3, 9.90, '2024-03-01 12:00'), (4, 10.00, '2024-03-01 23:59:59')",
        "INSERT INTO orders VALUES (1, 1, 'tea'), (2, 2, 'milk')",
    )
    with connecting(fed, tmp_path, "public.customers", "public.orders", schemas_enable="true"):
        with serving(fed, tables=Tables, orders=Orders, days=Days) as control:
            eventually("tables are live", lambda: (found := report(control, "tables")) and found.live)
            execute(
                fed,
                "UPDATE orders SET customer_id = 1 WHERE id = 2",
                "ALTER TABLE customers ADD COLUMN vip boolean",
                "UPDATE customers SET vip = true, score = 1 WHERE id = 1",
                "DELETE FROM customers WHERE id = 2",
            )
            eventually("pages follow", lambda: _pages(fed) == {"1": "milk,tea"})
            await_live(control, "days")
            days = {"2024-02-29T00:00:00": "1.50", "2024-03-01T00:00:00": "10.00"}
            eventually("windows follow", lambda: _pages(fed, "days", *days) == days)
            moved = {("public.orders", 1, 1), ("public.orders", 2, 1)}
            moved |= {("public.customers", 1, True), ("public.customers", 3, None), ("public.customers", 4, None)}
            eventually("the warehouse follows", lambda: _scanned(control) == moved)
        with duckdb.connect(fed.warehouse, read_only=True) as database:
            typed = (
                "id, note->'a'->1, born = '2024-02-29 07:00:00+00', price, score, tags, vip, typeof(id), typeof(vip), "
                "CAST(seen AS VARCHAR), typeof(seen), typeof(day), typeof(days), typeof(price)"
            )
            dated = ("2024-02-29 12:00:00.5", "TIMESTAMP", "DATE", "DATE[]", "DECIMAL(10,2)")
            assert database.sql(f"SELECT {typed} FROM customers WHERE id = 1").fetchall() == [
                (1, "2.5", True, Decimal("1.50"), 1.0, ["a", None], True, "INTEGER", "BOOLEAN", *dated)
            ]
            assert database.sql("SELECT max(price) FROM customers").fetchall() == [(Decimal("10.00"),)]
            assert sorted(database.sql("SELECT id, customer_id, what FROM orders").fetchall()) == rows(
                fed, "SELECT id, customer_id, what FROM orders ORDER BY id"
            )


def test_a_delete_that_is_read_first_takes_no_column_away(fed: Settings, redis_server: object) -> None:
    """A reader knows no shapes when it is opened, at each start and after each error: records as the connector writes them."""
    write = writing(fed)
    for table in ("public.customers", "public.orders", "public.gone"):
        Log(fed).ensure_table(table)
    write("public.gone", 1, None, 5)
    for id_ in (1, 2):
        write("public.customers", id_, {"id": id_, "name": "n"}, 10)
        write("public.orders", id_, {"id": id_, "customer_id": 1, "what": f"w{id_}"}, 10)
    with serving(fed, tables=Tables, orders=Orders) as control:
        await_live(control, "tables", "orders")
    write("public.orders", 1, None, 20)
    with serving(fed, tables=Tables, orders=Orders) as control:
        eventually("the page follows", lambda: _pages(fed) == {"1": "w2", "2": ""})
        eventually("the warehouse follows", lambda: _at_end(control))
    with duckdb.connect(fed.warehouse, read_only=True) as database:
        assert database.sql("SELECT * FROM orders").fetchall() == [(2, 1, "w2")]
        assert sorted(database.sql("SELECT * FROM customers").fetchall()) == [(1, "n"), (2, "n")]


def test_what_is_no_whole_row_or_no_feed_is_refused(fed: Settings, tmp_path: Path) -> None:
    """Under REPLICA IDENTITY FULL rows are whole, else the placeholder stops the consumer; capture leaves a feed alone."""
    execute(
        fed,
        "CREATE TABLE items (id int PRIMARY KEY, n int, big text, many float8[])",
        "ALTER TABLE items ALTER COLUMN big SET STORAGE EXTERNAL, ALTER COLUMN many SET STORAGE EXTERNAL",
        "ALTER TABLE items REPLICA IDENTITY FULL",
        "INSERT INTO items SELECT 1, 1, repeat('W', 5000), array_agg(i) FROM generate_series(1, 1000) i",
    )
    with connecting(fed, tmp_path, "public.items"), serving(fed, plain=Plain) as control:
        equal(fed)
        execute(fed, "UPDATE items SET n = 2")
        equal(fed)
        before = shown(fed)
        execute(fed, "ALTER TABLE items REPLICA IDENTITY DEFAULT", "UPDATE items SET n = 3")
        stopped = eventually("it stops", lambda: (found := report(control)) and found.phase == "stopped" and found)
        assert stopped.code == "debezium-placeholder"
        assert "REPLICA IDENTITY FULL" in stopped.remedy
        assert shown(fed) == before
    view = Plain(fed, "plain")
    position = view.open(view.generations()[0])
    assert position is not None
    with pytest.raises(Refused, match="not from this feed"):
        Log(fed).reader(["public.items"], replace(position, source=None))
    with pytest.raises(Refused, match="longer than delete"):
        Log(fed).reader(["public.items"], replace(position, appended=1))
    execute(fed, "CREATE PUBLICATION other FOR TABLE items")
    assert refused(replace(fed, publication="other")).code == "no-checkpoints"
    with pytest.raises(Transient, match=r"no topic of public\.nothing"):
        Log(fed).reader(["public.nothing"], None).poll(0.1)


def _pages(settings: Settings, view: str = "orders", *ids: str) -> dict[str, str | None]:
    with closing(PageReader(settings, view)) as reader:
        return {id_: page.html for id_ in ids or ("1", "2") if (page := reader.get(id_))}


def _scanned(control: Any) -> set[tuple[str, int, Any]]:
    """Return which rows the warehouse has, each with what was changed of it; what it says of its lag may be a second old."""
    rows = [(row.collection, row.value) for row in control.scan("tables")]
    return {
        (table, row["id"], row.get("vip") if table == "public.customers" else row["customer_id"]) for table, row in rows
    }


def _at_end(control: Any) -> bool:
    found = report(control, "tables")
    return bool(found and found.phase == "live" and found.lag == (0, 0, 0.0))
