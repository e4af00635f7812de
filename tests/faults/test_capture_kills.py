"""SIGKILL of capture under load: a reader of committed records, Kafka's own too, sees each committed number exactly once and no other."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from dataclasses import replace
from functools import partial

import psycopg
import pytest

from headrace.log import Log
from headrace.settings import Settings
from headrace_ops.kafka import Kafka
from tests.fixtures.capture import (
    capturing,
    changes,
    end,
    eventually,
    execute,
    now,
    prepare,
    reached,
    replay,
    selected,
    spawn,
)
from tests.fixtures.meanwhile import meanwhile
from tests.fixtures.processes import console
from tests.fixtures.ticks import repeating

T = "public.items"
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, no int)"
KEYS = 50


class Load:
    """Writes until told to stop: inserts, updates, deletes, changed keys; every row it writes has a number of its own."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.committed: list[int] = []
        self._settings = settings
        self._random = random.Random(seed)
        self._number = 0

    def __call__(self, stop: threading.Event) -> None:
        with psycopg.connect(self._settings.dsn) as connection:
            while not stop.is_set():
                written = [no for _ in range(self._random.choice([1, 1, 2, 40])) for no in self._change(connection)]
                if self._random.random() < 0.1:
                    connection.rollback()
                else:
                    connection.commit()
                    self.committed += written

    def _change(self, connection: psycopg.Connection[tuple[int]]) -> list[int]:
        key, other = self._random.randrange(KEYS), self._random.randrange(KEYS)
        what = self._random.random()
        self._number += 1
        if what < 0.15:
            connection.execute("DELETE FROM items WHERE id = %s", [key])
            return []
        if what < 0.25:
            moved = "UPDATE items SET id = %s, no = %s WHERE id = %s AND NOT EXISTS (SELECT FROM items WHERE id = %s)"
            return [self._number] if connection.execute(moved, [other, self._number, key, other]).rowcount else []
        written = "INSERT INTO items VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET no = excluded.no"
        connection.execute(written, [key, self._number])
        return [self._number]


@pytest.mark.parametrize("seed", [1])
def test_six_kills_under_load(settings: Settings, kafka: Kafka, seed: int) -> None:
    """Each at another moment of the stream; after the last one the log equals the table."""
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        capture.reach()  # a snapshot shows no numbers that were written over before it
    moments = random.Random(seed)
    with meanwhile(Load(settings, seed)) as load:
        for kill in range(6):
            for _ in range(20):  # one that came when nothing was on its way is made again
                more = moments.randrange(10_000, 300_000)
                late = killed(settings, load, more)
                if late > 0:
                    break
            assert late > 0
            sys.stdout.write(
                f"seed {seed} kill {kill}: after {more} bytes of WAL, {late} committed changes not in the log\n"
            )
    with capturing(settings) as capture:
        capture.reach()
    exactly(settings, load)
    seen_by_kafkas_own_consumer(settings, kafka, load)


def killed(settings: Settings, load: Load, more: int) -> int:
    """Kill capture when there are so many bytes of WAL more than it has reached; return how many committed changes the log lacked then."""
    process = spawn(settings)
    try:
        lsn = now(settings)
        reached(settings, lsn)
        eventually("there is work", lambda: now(settings) > lsn + more)
        committed = len(load.committed)
    finally:
        end(process)
    return committed - sum(change.row is not None for change in changes(settings, T))


def seen_by_kafkas_own_consumer(settings: Settings, kafka: Kafka, load: Load) -> None:
    """The same for who knows nothing of headrace, and each delete with the one tombstone behind it."""
    records = sorted(console(kafka, settings.source + "." + T), key=lambda record: record["place"])
    assert [record["after"]["no"] for record in records if record.get("after")] == load.committed
    deletes = [at for at, record in enumerate(records) if record["op"] == "d"]
    tombstones = [at for at, record in enumerate(records) if record["op"] is None]
    assert [at + 1 for at in deletes] == tombstones != []
    assert all(records[at]["key"] == records[at + 1]["key"] for at in deletes)
    last = {record["key"].encode(): record for record in records}
    assert {key: record["after"] for key, record in last.items() if record["op"]} == selected(settings, T)


def exactly(settings: Settings, load: Load) -> None:
    """Each committed number is in the log once and no other is, in their order; and the log is the table."""
    log = [change.row["no"] for change in changes(settings, T) if change.row]
    assert Counter(log) == Counter(load.committed)
    assert log == load.committed
    assert replay(settings, T) == selected(settings, T)


def test_killed_snapshots_leave_no_ghosts(settings: Settings) -> None:
    """Killed twice while rows of several tables are published, rows deleted between, others written all the time; then the log equals
    the tables (S6)."""
    settings = replace(settings, snapshot_connections=3)
    tables = ("items", "more", "yet")
    made = [f"CREATE TABLE {name} (id int PRIMARY KEY, no int)" for name in tables]
    prepare(settings, *made, *[f"INSERT INTO {name} SELECT i, i FROM generate_series(1, 30000) i" for name in tables])
    before = 0

    def published() -> int:
        newest = Log(settings).newest_checkpoint()
        return sum(map(sum, newest.ends.values())) if newest and newest.snapshot == "running" else 0

    any_row = "WHERE id = (SELECT (random() * 30000)::int)"
    load = [
        statement
        for name in tables
        for statement in (
            f"UPDATE {name} SET id = -id {any_row}",
            f"INSERT INTO {name} SELECT max(id) + 1, 0 FROM {name}",
            f"DELETE FROM {name} {any_row}",
        )
    ]
    writing = partial(repeating, settings, *load, every=0.01)
    with writing():
        for kill in range(2):
            process = spawn(replace(settings, cut_records=100))  # it takes its time, so that it is caught
            try:
                eventually("rows of the snapshot are published", lambda: published() > before + 10_000)  # noqa: B023
            finally:
                end(process)
            before = published()
            assert before, "caught"
            execute(settings, *[f"DELETE FROM {name} WHERE id % 1000 = {kill}" for name in tables])
    with capturing(settings) as capture:
        with writing():
            capture.hear("snapshot complete")
        capture.reach()
    for name in tables:
        assert replay(settings, f"public.{name}") == selected(settings, name)
