"""Kafka away: after ten seconds capture lets Postgres go, says so, and goes on when Kafka answers (S15)."""

from __future__ import annotations

import pytest

from headrace.settings import Settings
from headrace_ops import Stack
from tests.fixtures.capture import capturing, changes, eventually, execute, prepare, rows

T = "public.items"


@pytest.mark.timeout(400)
def test_a_kafka_that_is_paused_does_not_hold_postgres(settings: Settings, stack: Stack) -> None:
    """The replication connection is closed, the slot keeps the WAL, and each change is in the log once afterwards."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    walsender = f"SELECT active FROM pg_replication_slots WHERE slot_name = '{settings.slot}'"
    with capturing(settings) as capture:
        capture.hear("streaming from")  # the snapshot's checkpoint comes before
        stack.server("kafka").pause()
        try:
            execute(settings, "INSERT INTO items VALUES (1)")
            capture.hear("the replication connection is closed")
            eventually("the slot is free", lambda: rows(settings, walsender) == [(False,)])
            execute(settings, "INSERT INTO items VALUES (2)")
        finally:
            stack.server("kafka").resume()
        capture.eventually("it streams again", lambda: rows(settings, walsender) == [(True,)], 180)
        execute(settings, "INSERT INTO items VALUES (3)")
        capture.reach()
    assert [c.row["id"] for c in changes(settings, T) if c.row] == [1, 2, 3]
