"""Where capture ends a cut: by its size, by the clock, and after what is not captured."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from itertools import groupby, pairwise

import pytest

from headrace.change import Checkpoint, parse_lsn
from headrace.log import Log
from headrace.settings import Settings
from headrace_capture import stream
from tests.fixtures.capture import capturing, eventually, execute, prepare, replay, rows

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text, n int)"
T = "public.items"


def test_a_checkpoint_ends_every_cut_and_names_the_ends(settings: Settings) -> None:
    """`ends` is where the topic ends, versions never fall, and Postgres is told no more than a checkpoint covers (S4)."""
    prepare(settings, ITEMS)
    log = Log(settings)
    ends: list[list[int]] = []
    with capturing(settings) as capture:
        capture.reach()
        for n in range(5):
            execute(settings, f"INSERT INTO items VALUES ({n}, 'x', {n})")
            ends.append(capture.reach().ends[log.topic_of(T)])
            eventually("Kafka says so", lambda: log.ends(T) == [end + 1 for end in ends[-1]])  # the commit's marker
    checkpoints = list(log.checkpoints())
    assert [c.version for c in checkpoints] == sorted(c.version for c in checkpoints)
    told = [c.ends.get(log.topic_of(T), [0]) for c in checkpoints]
    assert [end for end, _ in groupby(told) if any(end)] == ends, "one for each commit"
    newest = checkpoints[-1]
    (confirmed,) = rows(
        settings, f"SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{settings.slot}'"
    )[0]
    assert parse_lsn(confirmed) <= newest.version.lsn


def test_an_empty_cut_follows_what_is_not_captured(settings: Settings) -> None:
    """An idle source's WAL is confirmed, and the token of a transaction without captured tables is reached (S4)."""
    settings = replace(settings, heartbeat_ms=0)  # a heartbeat is a transaction that is in the stream
    prepare(settings, ITEMS)
    execute(settings, "CREATE TABLE other (id int)")
    with capturing(settings) as capture:
        capture.reach()
        for n in range(3):
            execute(settings, f"INSERT INTO other VALUES ({n})")
            checkpoint = capture.reach()
            assert checkpoint.xid == 0
        slot = f"SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{settings.slot}'"
        eventually("Postgres is told", lambda: parse_lsn(rows(settings, slot)[0][0]) >= checkpoint.version.lsn)


def test_empty_cuts_come_at_most_every_100_ms(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred commits of uncaptured tables in a row do not make two hundred checkpoints."""
    monkeypatch.setattr(stream, "_IDLE_SECONDS", 1.0)  # as capture has it
    prepare(settings, ITEMS)
    execute(settings, "CREATE TABLE other (id int)")
    with capturing(settings) as capture:
        capture.reach()

        def empties() -> list[Checkpoint]:
            execute(settings, *["INSERT INTO other VALUES (1)"] * 20)
            return [c for c in Log(settings).checkpoints() if c.xid == 0 and c.snapshot is None]

        for _ in range(10):
            empties()
        eventually("some come", lambda: len(empties()) > 3)
        capture.reach()
    empty = empties()
    assert all(later.appended - earlier.appended >= 90 for earlier, later in pairwise(empty))


def partials(settings: Settings) -> list[tuple[int, int]]:
    """Return for each cut that ended inside a transaction the ordinal where, and when its checkpoint came, ms."""
    return [(c.partial[1], c.appended) for c in Log(settings).checkpoints() if c.partial]


def test_a_transaction_that_takes_long_is_cut_by_the_clock(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows there are by then: who reads its partitions would wait for all of it (S5)."""
    monkeypatch.setattr(stream, "LONGEST_SECONDS", 0.1)
    settings = replace(settings, cut_records=10**9)
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, "INSERT INTO items SELECT i, 'x', i FROM generate_series(1, 100000) i")
        capture.reach()
    found = partials(settings)
    assert len(found) > 1, "it took a second or so"
    assert all(later[1] - earlier[1] >= 90 for earlier, later in pairwise(found))
    assert len(replay(settings, T)) == 100_000


def test_a_transaction_of_which_no_more_comes_for_a_while_is_cut_by_the_clock(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres sends a part of it, and then nothing: what has come does not wait for the rest (S5)."""
    monkeypatch.setattr(stream, "LONGEST_SECONDS", 3.0)
    prepare(settings, ITEMS)
    sender = f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{settings.slot}'"
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        ((pid,),) = rows(settings, sender)
        execute(settings, "INSERT INTO items SELECT i, 'x', i FROM generate_series(1, 600000) i")
        capture.eventually("it has begun", lambda: partials(settings))
        os.kill(pid, signal.SIGSTOP)
        try:
            full = settings.cut_records
            capture.eventually("that is cut", lambda: any(ordinal % full for ordinal, _ in partials(settings)))
        finally:
            os.kill(pid, signal.SIGCONT)
        capture.reach()
    assert len(replay(settings, T)) == 600_000


def test_a_transaction_larger_than_a_cut_spans_several(settings_of_small_cuts: Settings) -> None:
    """Their checkpoints say partial and keep the LSN; the last one does not (S5)."""
    settings = settings_of_small_cuts
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, "INSERT INTO items SELECT i, 'x', i FROM generate_series(1, 95) i")
        capture.reach()
    partial = [c for c in Log(settings).checkpoints() if c.partial]
    assert [c.partial[1] for c in partial if c.partial] == list(range(10, 91, 10))
    assert len({c.version for c in partial}) == 1
    assert len(replay(settings, T)) == 95


@pytest.fixture
def settings_of_small_cuts(settings: Settings) -> Settings:
    """Settings with cuts of ten records."""
    return replace(settings, cut_records=10)
