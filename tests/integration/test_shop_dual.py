"""Dual writes on real servers: right while nothing happens, wrong for ever after a race or a death."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from itertools import repeat

import pytest

from headrace.errors import Misconfigured, Transient
from headrace.settings import Settings, environment
from headrace_shop import database, dual, edits, replay, work
from headrace_shop.database import Amounts
from headrace_shop.dual import DualWrites
from headrace_shop.edits import SetPrice
from headrace_shop.writes import LogWrites
from headrace_warehouse import endpoint

NOTHING = {"search": 0, "pages": 0, "warehouse": 0}


@pytest.fixture
def shop(
    settings: Settings,
    elasticsearch: object,
    redis_server: object,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Settings]:
    for name, value in environment(settings).items():
        monkeypatch.setitem(os.environ, name, value)
    with database.connect(settings.dsn) as connection:
        database.create(connection)
        database.load(connection, Amounts(products=80, reviews=150, customers=10, orders=20), seed=1)
    yield settings
    endpoint.stop()  # the dual writer's warehouse answers until its process ends, and this one goes on


def differing(writes: DualWrites) -> dict[str, int]:
    return {view: wrong for view, (_, wrong) in writes.compare().items()}


def test_undisturbed_dual_writes_equal_postgres(shop: Settings) -> None:
    with closing(DualWrites(shop, shop.dsn)) as writes, database.connect(shop.dsn) as connection:
        writes.fill()
        assert {view: rows for view, (rows, _) in writes.compare().items()}["search"] == 80
        assert differing(writes) == NOTHING
        done = work.work(work.Load(connection, seed=2), writes, iter(repeat(None, 60)))
        assert done.committed > 40
        assert differing(writes) == NOTHING


def test_a_store_that_stays_away_is_not_tried_again_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def away() -> None:
        tried.append(1)
        raise Transient("away", "It does not answer.")

    dual._firmly("search", away)
    assert len(tried) == 3
    monkeypatch.setattr(dual, "_DEADLINE", 0.0)
    dual._firmly("search", away)
    assert len(tried) == 4


def test_two_editors_of_one_price_leave_the_stores_apart(shop: Settings) -> None:
    with closing(DualWrites(shop, shop.dsn)) as writes:
        writes.fill()
        said: list[str] = []
        first, second = SetPrice(1, Decimal("50.50")), SetPrice(1, Decimal("60.50"))
        replay.race(writes.steps(first), writes.steps(second), said.append)
        assert said[0] == "editor A commits in Postgres"
        assert differing(writes) == {"search": 1, "pages": 2, "warehouse": 1}


def test_the_replay_diverges_dually_and_not_through_the_log(shop: Settings) -> None:
    said: list[str] = []
    with database.connect(shop.dsn) as connection:
        chosen = replay.plan(connection, seed=1)
        assert replay.replay(shop, shop.dsn, "log", seed=1, say=said.append) == {}
        assert "SIGKILL" in said[-1]
        prices = {key: price for key, price in connection.execute("SELECT id, price FROM products")}  # noqa: C416
        (categories,) = connection.execute(
            "SELECT count(DISTINCT category_id) FROM products WHERE id IN (%s, %s)", (chosen.raced, chosen.orphaned)
        ).fetchone() or (0,)
    assert prices[chosen.raced] == chosen.price_b
    assert prices[chosen.orphaned] == chosen.price_c
    compared = replay.replay(shop, shop.dsn, "dual", seed=1, say=said.append)
    assert {view: wrong for view, (_, wrong) in compared.items()} == {
        "search": 2,
        "pages": 2 + categories,
        "warehouse": 2,
    }


def test_both_ways_of_writing_leave_the_same_in_postgres(shop: Settings) -> None:
    edit = edits.PlaceOrder(1, [(2, 1), (3, 2)])
    with closing(LogWrites(shop.dsn)) as log, closing(DualWrites(shop, shop.dsn)) as dual:
        numbers = [writes.write(edit).made.numbers for writes in (log, dual)]
    assert len(numbers[0]) == len(numbers[1]) == 5


def test_a_replay_that_fails_tells_no_password(settings: Settings) -> None:
    dsn = "postgresql://shop:secret@127.0.0.1:1/shop"
    with pytest.raises(Misconfigured) as refused:
        replay.replay(settings, dsn, "log", seed=1, say=print)
    assert refused.value.code == "replay-failed"
    assert "secret" not in str(refused.value)
