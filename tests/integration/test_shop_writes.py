"""The shop on a real Postgres: loading, edits, the numbers of changes, the steady load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import repeat
from pathlib import Path

import pytest

from headrace.change import parse_lsn
from headrace.errors import Misconfigured, Transient
from headrace_shop import database, edits, work
from headrace_shop.database import Amounts, Connection
from headrace_shop.writes import LogWrites

NUMBERED = [*database.TABLES]
SMALL = Amounts(products=60, reviews=120, customers=10, orders=20)


@pytest.fixture
def dsn(fresh_database: Callable[[], str]) -> str:
    return fresh_database()


@pytest.fixture
def shop(dsn: str) -> Iterator[Connection]:
    with database.connect(dsn) as connection:
        database.create(connection)
        database.load(connection, SMALL, seed=1)
        yield connection


@pytest.fixture
def writes(dsn: str) -> Iterator[LogWrites]:
    writes = LogWrites(dsn)
    yield writes
    writes.close()


def ledger(shop: Connection) -> list[int]:
    return [seq for (seq,) in shop.execute("SELECT seq FROM ledger ORDER BY seq")]


def numbers(shop: Connection) -> list[int]:
    union = " UNION ALL ".join(f"SELECT seq FROM {table} WHERE seq IS NOT NULL" for table in NUMBERED)
    return sorted(seq for (seq,) in shop.execute(union.encode()))


def test_loading_adds_rows_behind_those_that_are_there(shop: Connection) -> None:
    before = database.counts(shop)
    after = database.load(shop, Amounts(products=5, reviews=7, customers=1, orders=2), seed=2)
    assert (before["products"], before["reviews"]) == (60, 120)
    assert (after["products"], after["reviews"], after["customers"], after["orders"]) == (65, 127, 11, 22)
    assert edits.insert(shop, edits.Made(), "customers", name="A", email="a@example.org") == 12


def test_reviews_for_an_empty_shop_are_refused(dsn: str) -> None:
    with database.connect(dsn) as connection:
        database.create(connection)
        with pytest.raises(Misconfigured) as error:
            database.load(connection, Amounts(products=0, reviews=1, customers=0, orders=0), seed=1)
    assert error.value.code == "shop-empty"
    assert "--products" in error.value.remedy


def test_an_edit_is_one_transaction_and_its_token_is_not_before_its_commit(shop: Connection, writes: LogWrites) -> None:
    written = writes.write(edits.SetPrice(1, Decimal("9.90")), edits.AddReview(1, "Ada", 5, "<b>Good</b>"))
    (flushed,) = shop.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone() or ("",)
    assert shop.execute("SELECT price, seq FROM products WHERE id = 1").fetchone() == (
        Decimal("9.90"),
        written.made.numbers[0],
    )
    assert 0 < written.lsn <= parse_lsn(flushed)
    assert ledger(shop) == written.made.numbers
    assert numbers(shop) == written.made.numbers


def test_an_order_takes_prices_and_stock_of_the_moment(shop: Connection, writes: LogWrites) -> None:
    writes.write(edits.SetPrice(3, Decimal("5.00")))
    (stock,) = shop.execute("SELECT stock FROM products WHERE id = 3").fetchone() or (0,)
    order = writes.write(edits.PlaceOrder(1, [(3, 2)])).made.ids[0]
    assert shop.execute(
        "SELECT product_id, quantity, price FROM order_items WHERE order_id = %s", (order,)
    ).fetchall() == [(3, 2, Decimal("5.00"))]
    assert shop.execute("SELECT stock FROM products WHERE id = 3").fetchone() == (stock - 2,)


def test_an_edit_of_a_row_that_is_gone_changes_nothing(shop: Connection, writes: LogWrites) -> None:
    with pytest.raises(Misconfigured) as error:
        writes.write(edits.SetPrice(1, Decimal(1)), edits.SetPrice(999, Decimal(1)))
    assert error.value.code == "no-such-row"
    assert ledger(shop) == []


def test_the_ledger_holds_exactly_the_numbers_that_were_committed(
    shop: Connection, writes: LogWrites, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    done = work.work(work.Load(shop, seed=3), writes, iter(repeat(None, 400)), journal)
    said = sorted(int(number) for number in journal.read_text().split())
    assert done.committed + done.rolled_back + done.refused == 400
    assert done.committed > 300
    assert done.rolled_back > 5
    assert said == ledger(shop)
    assert (len(said), said[-1]) == (done.changes, done.highest)
    assert set(numbers(shop)) <= set(said)
    done_to = {what for (what,) in shop.execute("SELECT DISTINCT what FROM ledger")}
    assert {
        "update products",
        "insert reviews",
        "delete reviews",
        "insert orders",
        "delete products",
        "insert products",
    } <= done_to


def test_the_same_seed_gives_the_same_load(fresh_database: Callable[[], str]) -> None:
    states = []
    for _ in range(2):
        writes = LogWrites(dsn := fresh_database())
        with database.connect(dsn) as connection:
            database.create(connection)
            database.load(connection, SMALL, seed=1)
            work.work(work.Load(connection, seed=5), writes, iter(repeat(None, 100)))
            states.append(connection.execute("SELECT id, name, price, stock, seq FROM products ORDER BY id").fetchall())
        writes.close()
    assert states[0] == states[1]


def test_a_load_that_is_killed_leaves_nothing_half_written(shop: Connection, dsn: str) -> None:
    command = [sys.executable, "-m", "headrace", "shop", "work", "--rate", "1000", "--dsn", dsn]
    process = subprocess.Popen(command, env={**os.environ, "HEADRACE_DSN": dsn})
    while len(ledger(shop)) < 50:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    while shop.execute(
        "SELECT FROM pg_stat_activity WHERE application_name = 'headrace-shop' AND pid <> pg_backend_pid()"
    ).fetchone():
        time.sleep(0.01)
    assert set(numbers(shop)) <= set(ledger(shop))


def test_a_database_that_does_not_answer_is_named_with_its_setting() -> None:
    with pytest.raises(Transient) as error:
        database.connect("postgresql://nobody@127.0.0.1:1/none")
    assert "HEADRACE_DSN" in error.value.remedy
