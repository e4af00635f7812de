"""Postgres 15, 17 and 18: the initial snapshot in chunks, a silent change, a lost slot; each ends with the log equal to the tables."""

from __future__ import annotations

from functools import partial

from headrace.settings import Settings
from headrace_capture.recovery import recover
from tests.fixtures.capture import Running, capturing, eventually, execute, replay, selected
from tests.fixtures.slots import drop_slot
from tests.integration.test_capture_append_only import equal as equal_without_key
from tests.integration.test_capture_append_only import prepare_append_only

TABLES = (
    "CREATE TABLE items (id int PRIMARY KEY, n int)",
    "CREATE TABLE parts (id int PRIMARY KEY, n int) PARTITION BY RANGE (id)",
    "CREATE TABLE low PARTITION OF parts FOR VALUES FROM (0) TO (10)",
    "CREATE TABLE high PARTITION OF parts FOR VALUES FROM (10) TO (20)",
    "INSERT INTO items SELECT i, i FROM generate_series(1, 50) i",
    "INSERT INTO parts SELECT i, i FROM generate_series(0, 19) i",
    "CREATE TABLE events (n int)",
    "INSERT INTO events SELECT i % 10 FROM generate_series(1, 50) i",
)


def equal(settings: Settings) -> None:
    """The log is the tables."""
    for table in ("items", "parts"):
        assert replay(settings, f"public.{table}") == selected(settings, table)
    equal_without_key(settings)


def twice(running: Running, words: str) -> bool:
    """Whether capture has said so at least two times: the initial snapshot is one."""
    return sum(words in line for line in running.said) > 1


def test_read_in_chunks_and_again(each_version: Settings) -> None:
    settings = each_version
    prepare_append_only(settings, *TABLES)
    with capturing(settings, chunked=True) as capture:
        capture.hear("the initial snapshot is complete")
        capture.reach()
        equal(settings)
        more = "ADD COLUMN more int DEFAULT 5"
        execute(settings, "DROP TABLE low", f"ALTER TABLE items {more}", f"ALTER TABLE events {more}")
        for table in ("items", "parts", "events"):
            again = f"public.{table} was read again"
            eventually(again, partial(twice, capture, again))
        eventually("all is exact", lambda: capture.reach().inexact == ())
        equal(settings)
    drop_slot(settings)
    execute(settings, "DELETE FROM items WHERE id < 9", "TRUNCATE events")
    recover(settings, lambda _: None)
    with capturing(settings) as capture:
        eventually("all is exact", lambda: capture.reach().inexact == ())
    equal(settings)
