"""Kafka away: after ten seconds capture lets Postgres go, says so, and goes on when Kafka answers (S15)."""

from __future__ import annotations

import itertools
import re
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import HeadraceError
from headrace.log import Log, tail
from headrace.settings import Settings
from headrace_capture import known
from headrace_capture.live import LiveKeys
from headrace_ops import Stack
from tests.fixtures.capture import capturing, changes, eventually, execute, now, prepare, replay, selected
from tests.fixtures.processes import System
from tests.fixtures.resnapshots import ask, done
from tests.fixtures.slots import await_free, is_read

T = "public.items"


@pytest.mark.timeout(400)
def test_a_kafka_that_is_paused_does_not_hold_postgres(settings: Settings, stack: Stack) -> None:
    """The replication connection is closed, the slot keeps the WAL, and each change is in the log once afterwards."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.hear("streaming from")  # the snapshot's checkpoint comes before
        stack.server("kafka").pause()
        try:
            execute(settings, "INSERT INTO items VALUES (1)")
            capture.hear("the replication connection is closed")
            await_free(settings)
            execute(settings, "INSERT INTO items VALUES (2)")
        finally:
            stack.server("kafka").resume()
        capture.eventually("it streams again", lambda: is_read(settings), 180)
        execute(settings, "INSERT INTO items VALUES (3)")
        capture.reach()
    assert [c.row["id"] for c in changes(settings, T) if c.row] == [1, 2, 3]


def test_a_kafka_that_is_slow_is_waited_for_in_little_memory(system: System, stack: Stack) -> None:
    """It takes a tenth of what Postgres sends, and answers all the time: nothing is given up, nothing is heaped up (I10)."""
    settings, kafka = system.settings, stack.server("kafka")
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, words text)")
    pid = system.start("capture", "capture")
    eventually("it streams", lambda: Log(settings).newest_checkpoint(complete=True))
    execute(settings, "INSERT INTO items SELECT i, repeat('x', 300) FROM generate_series(1, 200000) i")
    target = now(settings)
    pauses = itertools.count(1)

    def there() -> int:
        kafka.pause()
        time.sleep(0.25)
        kafka.resume()
        time.sleep(0.03)
        paused = next(pauses)
        return Log(settings).newest_checkpoint(complete=True).version.lsn >= target and paused

    assert eventually("all of it is in the log", there, 300) > 5, "Kafka was slow"
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) // 1024
    assert peak < 150, f"{peak} MB"
    assert "the replication connection is closed" not in system.output("capture").read_text()
    assert replay(settings, T) == selected(settings, "items")


@pytest.mark.timeout(400)
def test_a_kafka_that_is_paused_while_live_keys_are_read_back_does_not_hold_postgres(
    settings: Settings, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream stands still at a TRUNCATE then, and nothing comes of what the log has of the table."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)", "INSERT INTO items VALUES (1), (2)")
    catch_up, end, paused = LiveKeys.catch_up, tail.Tail._end, threading.Event()

    def pausing(keys: LiveKeys, *args: Any) -> None:
        if not paused.is_set():
            stack.server("kafka").pause()
            paused.set()
        catch_up(keys, *args)

    def ends(of: tail.Tail, place: tuple[str, int]) -> int:
        return 0 if paused.is_set() else end(of, place)  # what the checkpoint names is read to all the same

    monkeypatch.setattr(LiveKeys, "catch_up", pausing)
    with capturing(settings) as capture:
        capture.reach()
        monkeypatch.setattr(tail.Tail, "_end", ends)
        try:
            execute(settings, "TRUNCATE items")
            assert paused.wait(60)
            capture.hear("the replication connection is closed")
            await_free(settings)
        finally:
            stack.server("kafka").resume()
            monkeypatch.setattr(tail.Tail, "_end", end)
        capture.eventually("it streams again", lambda: is_read(settings), 180)
        capture.reach()
    assert replay(settings, T) == {}


@pytest.mark.timeout(400)
def test_a_kafka_that_is_paused_while_keys_are_read_back_does_not_hold_postgres(
    settings: Settings, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream stands still at a high watermark then, and reads what the log has of the table."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)", "INSERT INTO items VALUES (1), (2)")
    catch_up, paused = known.KnownKeys.catch_up, threading.Event()

    def pausing(keys: known.KnownKeys, *args: Any) -> None:
        if threading.current_thread().name.startswith("resnapshot"):
            return  # all is left to the stream
        if not paused.is_set():
            stack.server("kafka").pause()
            paused.set()
        catch_up(keys, *args)

    def asking() -> None:
        with suppress(HeadraceError):  # it is carried out, and Kafka paused, perhaps before the answer is heard
            ask(settings, tables=[T])

    monkeypatch.setattr(known.KnownKeys, "catch_up", pausing)
    # Longer than STALLED_SECONDS: the connection is closed before it is given up.
    monkeypatch.setattr(known, "check_heard", partial(known.check_heard, timeout=30.0))
    with capturing(settings) as capture:
        capture.hear("streaming from")
        asker = threading.Thread(target=asking)
        asker.start()
        try:
            assert paused.wait(60)
            capture.hear("the replication connection is closed")
            await_free(settings)
            capture.eventually("it says why", lambda: capture._heard("kafka-away"), 120)
        finally:
            stack.server("kafka").resume()
            asker.join()
        capture.eventually("it streams again", lambda: is_read(settings), 180)
        done(settings, capture, T)
    assert replay(settings, T) == selected(settings, "items")
