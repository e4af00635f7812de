"""Capture dies between any two steps of a cut: each change is in the log exactly once all the same.

The writer of cuts and the replication connection are wrapped: before its k-th step the "process" is dead: the wrapper raises and lets
nothing through any more, not even an abort. What was handed to Kafka by then is there for the next capture to fence, as after a
SIGKILL; what was not yet confirmed to Postgres, though committed in Kafka, comes again and must be skipped (S4).
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from headrace.log import Log
from headrace.settings import Settings
from headrace_capture import replication, stream
from headrace_capture.replication import Replication
from tests.fixtures.capture import Running, capturing, changes, eventually, execute, now, prepare, replay, selected
from tests.fixtures.mortal import WRITER, Died, DyingOfCuts, Life, MortalLog

T = "public.items"
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, no int)"
REPLICATION = ("create_slot", "drop_slot", "start", "confirm")


def die_at(settings: Settings, steps_left: int, patch: pytest.MonkeyPatch) -> str | None:
    """Run capture until it dies or has caught up; return the step after which it died."""
    life = Life(steps_left)
    with patch.context() as patched:
        for name in REPLICATION:
            patched.setattr(Replication, name, life.step(name, getattr(Replication, name)))
        log = MortalLog(settings, life)
        running = Running(settings, log)
        lsn = now(settings)

        def over() -> bool:
            newest = log.newest_checkpoint()
            return running.error is not None or bool(newest and newest.complete and newest.version.lsn >= lsn)

        eventually("capture dies or catches up", over)
        running.stop()
    assert running.error is None or isinstance(running.error, Died), running.error
    return life.steps[-1] if running.error else None


@pytest.mark.timeout(600)
def test_killed_between_any_two_steps_of_a_cut(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream: a transaction in one cut, and one that spans two of them. Between Kafka's commit and the confirmation too (S4)."""
    settings = replace(settings, cut_records=2)
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        capture.reach()
    numbers = itertools.count(1)
    died = set()
    for steps_left in itertools.count(1):
        one, *many = [next(numbers) for _ in range(3)]
        execute(settings, f"INSERT INTO items VALUES ({one}, {one})")
        values = ", ".join(f"({no}, {no})" for no in many)
        execute(settings, f"BEGIN; INSERT INTO items VALUES {values}; DELETE FROM items WHERE id = {one}; COMMIT")
        where = die_at(settings, steps_left, monkeypatch)
        if where is None:
            break
        died.add(where)
    assert died == {*WRITER, "start", "confirm"}
    seen = Counter(c.row["no"] for c in changes(settings, T) if c.row)
    assert seen == Counter(range(1, next(numbers)))
    assert replay(settings, T) == selected(settings, T)
    dead = Counter(c.key for c in changes(settings, T) if c.row is None)
    assert set(dead.values()) == {2}


def test_killed_amid_a_transaction_and_amid_what_is_skipped_of_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape that is new by now opens a cut while the transaction is skipped; what ends it when it is old names no earlier place."""
    monkeypatch.setattr(stream, "LONGEST_SECONDS", 1e-9)
    monkeypatch.setattr(replication, "_BUNCH", 3)
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, "INSERT INTO items SELECT i, i FROM generate_series(1, 30) i")
    for cuts in (5, 1):
        running = Running(settings, DyingOfCuts(settings, Life(), cuts, after=True))
        running.join()
        assert isinstance(running.error, Died)
        execute(settings, "ALTER TABLE items ALTER COLUMN no SET NOT NULL")
    with capturing(settings) as capture:
        capture.reach()
    partial = [c.partial for c in Log(settings).checkpoints() if c.partial]
    assert partial == sorted(partial)
    assert sorted(c.row["no"] for c in changes(settings, T) if c.row) == list(range(1, 31))


@pytest.mark.timeout(600)
def test_killed_between_any_two_steps_of_the_snapshot(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that one attempt published and that are gone before the next one leave no ghosts (S6)."""
    settings = replace(settings, cut_records=2)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 4) i")
    for steps_left in itertools.count(1):
        if die_at(settings, steps_left, monkeypatch) is None:
            break
        gone = min(steps_left, 4)  # more ghosts at each attempt would need more steps at each attempt
        execute(
            settings,
            f"DELETE FROM items WHERE id = {gone}",
            f"INSERT INTO items VALUES ({gone + 4}, 0) ON CONFLICT DO NOTHING",
        )
    assert steps_left > 10
    with capturing(settings) as capture:
        execute(settings, "INSERT INTO items VALUES (0, 0)")
        capture.reach()
    assert replay(settings, T) == selected(settings, T)
    assert Log(settings).newest_checkpoint(complete=True)
