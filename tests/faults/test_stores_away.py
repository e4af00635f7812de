"""One server goes away while changes flow: what does not need it goes on, and what does catches up by itself."""

from __future__ import annotations

import time

import psycopg
import pytest
import redis

from headrace.change import Version
from headrace_ops.stack import Stack
from tests.fixtures.processes import SMALL, System

RATE = "40/s"
HUNG = 15.0
"""Seconds after which a fast shutdown of Postgres hangs."""
GRACE = 30.0
"""Seconds that a container engine gives a process to end."""


@pytest.fixture
def loaded(system: System) -> System:
    """The small shop, loaded."""
    system.run("shop", "load", *SMALL)
    return system


@pytest.mark.usefixtures("elasticsearch", "redis_server")
def test_elasticsearch_down_the_others_go_on_and_it_catches_up(loaded: System, stack: Stack) -> None:
    loaded.up("search", "pages", "warehouse")
    loaded.start("work", "shop", "work", "--rate", RATE)
    loaded.busy(30)
    stack.server("elasticsearch").kill()
    loaded.wait("search to say that it waits", lambda: _waits(loaded, "search", "elasticsearch-away"))
    stopped_at = _version(loaded, "search")
    loaded.busy(200)
    loaded.settle("pages", "warehouse")
    assert _version(loaded, "search") == stopped_at
    stack.server("elasticsearch").start()
    loaded.busy(30)
    loaded.stop("work")
    loaded.settle("search", "pages", "warehouse")
    loaded.verify("search", "pages", "warehouse")


@pytest.mark.usefixtures("redis_server")
def test_redis_flushed_while_running_the_pages_rebuild_themselves(loaded: System) -> None:
    loaded.up("pages")
    loaded.start("work", "shop", "work", "--rate", RATE)
    loaded.busy(30)
    with redis.Redis.from_url(loaded.settings.redis, decode_responses=True) as client:
        client.flushall()
        loaded.wait("a page to be there again", lambda: bool(client.hget("pages:1:products/1", "html")))
        loaded.wait("readers to see it", lambda: client.get("pages:live") is not None)
    loaded.busy(30)
    loaded.stop("work")
    loaded.settle("pages")
    loaded.verify("pages")


def test_kafka_away_capture_lets_postgres_go_and_comes_back(loaded: System, stack: Stack) -> None:
    """S15: a walsender whose client does not read would hold up a shutdown of Postgres."""
    loaded.up("warehouse")
    loaded.start("work", "shop", "work", "--rate", RATE)
    loaded.busy(30)
    loaded.wait("capture to stream", lambda: _connected(loaded))
    stack.server("kafka").kill()
    loaded.wait("capture to close its replication connection", lambda: not _connected(loaded), 60)
    loaded.busy(100)
    loaded.stop("work")
    began = time.monotonic()
    stack.server("postgres").stop()
    assert time.monotonic() - began < HUNG, "Postgres waits for capture's walsender"
    stack.server("postgres").start()
    began = time.monotonic()
    assert loaded.ends("warehouse") == 0
    assert time.monotonic() - began < GRACE, "a consumer waits for Kafka before it ends"
    stack.server("kafka").start()
    loaded.start("warehouse", "run", "warehouse")
    loaded.wait("capture to stream again", lambda: _connected(loaded))
    loaded.run("shop", "work", "--rate", RATE, "--seconds", "1")
    loaded.settle("warehouse")
    loaded.verify("warehouse")


def _waits(system: System, view: str, code: str) -> bool:
    report = system.report(view)
    return report is not None and report.phase == "waiting" and report.code == code


def _version(system: System, view: str) -> Version:
    return system.applied(view)


def _connected(system: System) -> bool:
    """Whether a walsender serves the slot."""
    with psycopg.connect(system.settings.dsn) as connection:
        row = connection.execute(
            "SELECT active FROM pg_replication_slots WHERE slot_name = %s", [system.settings.slot]
        ).fetchone()
    return bool(row and row[0])
