"""Postgres 15, 17 and 18: the initial snapshot in chunks, a silent change, a lost slot; each ends with the log equal to the tables."""

from __future__ import annotations

from functools import partial

from headrace.settings import Settings
from headrace_capture.recovery import recover
from tests.fixtures.capture import Running, capturing, eventually, execute, prepare, replay, rows, selected

TABLES = (
    "CREATE TABLE items (id int PRIMARY KEY, n int)",
    "CREATE TABLE parts (id int PRIMARY KEY, n int) PARTITION BY RANGE (id)",
    "CREATE TABLE low PARTITION OF parts FOR VALUES FROM (0) TO (10)",
    "CREATE TABLE high PARTITION OF parts FOR VALUES FROM (10) TO (20)",
    "INSERT INTO items SELECT i, i FROM generate_series(1, 50) i",
    "INSERT INTO parts SELECT i, i FROM generate_series(0, 19) i",
)


def equal(settings: Settings) -> None:
    """The log is the tables."""
    for table in ("items", "parts"):
        assert replay(settings, f"public.{table}") == selected(settings, table)


def twice(running: Running, words: str) -> bool:
    """Whether capture has said so at least two times: the initial snapshot is one."""
    return sum(words in line for line in running.said) > 1


def test_read_in_chunks_and_again(each_version: Settings) -> None:
    settings = each_version
    prepare(settings, *TABLES)
    with capturing(settings, chunked=True) as capture:
        capture.hear("the initial snapshot is complete")
        capture.reach()
        equal(settings)
        execute(settings, "DROP TABLE low", "ALTER TABLE items ADD COLUMN more int DEFAULT 5")
        for table in ("items", "parts"):
            again = f"public.{table} was read again"
            eventually(again, partial(twice, capture, again))
        eventually("all is exact", lambda: capture.reach().inexact == ())
        equal(settings)
    free = f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{settings.slot}' AND NOT active"
    eventually("the slot is free", lambda: rows(settings, free))
    execute(settings, f"SELECT pg_drop_replication_slot('{settings.slot}')", "DELETE FROM items WHERE id < 9")
    recover(settings, lambda _: None)
    with capturing(settings) as capture:
        eventually("all is exact", lambda: capture.reach().inexact == ())
    equal(settings)
