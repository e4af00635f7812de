"""Capture dies between any two steps of a cut: each change is in the log exactly once all the same.

The writer is wrapped: before its k-th step the "process" is dead: the wrapper raises and lets nothing through any more, not even an
abort. What was handed to Kafka by then is there for the next capture to fence, as after a SIGKILL.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from headrace.log import CutWriter, Log
from headrace.settings import Settings
from tests.fixtures.capture import Running, capturing, changes, eventually, execute, prepare, replay, rows, selected

T = "public.items"
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, no int)"


class Died(BaseException):
    """The process is gone."""


class Mortal:
    """A writer of cuts that lives for a number of steps."""

    def __init__(self, writer: CutWriter, steps_left: int) -> None:
        self._writer = writer
        self._left = steps_left
        self.steps: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._writer, name)
        return self._mortal(name, found) if callable(found) else found

    def _mortal(self, name: str, call: Any) -> Any:
        def step(*args: Any, **named: Any) -> Any:
            if self._left <= 0:
                raise Died(name)
            self._left -= 1
            self.steps.append(name)
            return call(*args, **named)

        return step


class MortalLog(Log):
    """A log whose writer lives for a number of steps."""

    def __init__(self, settings: Settings, steps_left: int) -> None:
        super().__init__(settings)
        self.made: list[Mortal] = []
        self._steps_left = steps_left

    def writer(self) -> Any:
        self.made.append(Mortal(super().writer(), self._steps_left))
        return self.made[-1]


def die_at(settings: Settings, steps_left: int) -> str | None:
    """Run capture until it dies or has caught up; return the step after which it died."""
    log = MortalLog(settings, steps_left)
    running = Running(settings, log)
    lsn = int(rows(settings, "SELECT pg_current_wal_insert_lsn() - '0/0'")[0][0])

    def over() -> bool:
        newest = log.newest_checkpoint()
        return running.error is not None or bool(newest and newest.complete and newest.version.lsn >= lsn)

    eventually("capture dies or catches up", over)
    running.stop()
    assert running.error is None or isinstance(running.error, Died), running.error
    return log.made[-1].steps[-1] if running.error else None


@pytest.mark.timeout(600)
def test_killed_between_any_two_steps_of_a_cut(settings: Settings) -> None:
    """The stream: a transaction in one cut, and one that spans two of them."""
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
        where = die_at(settings, steps_left)
        if where is None:
            break
        died.add(where)
    assert {"open", "resume", "produce", "seal"} <= died
    seen = Counter(c.row["no"] for c in changes(settings, T) if c.row)
    assert seen == Counter(range(1, next(numbers)))
    assert replay(settings, T) == selected(settings, T)
    dead = Counter(c.key for c in changes(settings, T) if c.row is None)
    assert set(dead.values()) == {2}


@pytest.mark.timeout(600)
def test_killed_between_any_two_steps_of_the_snapshot(settings: Settings) -> None:
    """Rows that one attempt published and that are gone before the next one leave no ghosts (S6)."""
    settings = replace(settings, cut_records=2)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 4) i")
    for steps_left in itertools.count(1):
        if die_at(settings, steps_left) is None:
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
