"""Append-only tables read again (S10): everything the log has of the table gives way to what was read, at one checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import psycopg
import pytest

from headrace.control import Control
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.settings import Settings
from headrace_capture import catalog, chunks, setup, watermarks
from headrace_capture.recovery import recover
from headrace_capture.resnapshot_cli import _key
from tests.fixtures.capture import (
    Running,
    capturing,
    changes,
    eventually,
    execute,
    prepare,
    refused,
    replay,
    rows,
    selected,
)
from tests.fixtures.disk import no_room
from tests.fixtures.meanwhile import meanwhile
from tests.fixtures.mortal import DyingOfCuts, Life
from tests.fixtures.resnapshots import ask, done, jobs, phases, reporting, unnoticed
from tests.fixtures.slots import drop_slot
from tests.integration.test_capture_append_only import EVENTS, SOME, T, equal, prepare_append_only
from tests.integration.test_resnapshot_order import waiting

MANY = "INSERT INTO events SELECT 'many', i, NULL FROM generate_series(1, 3000) i"

pytestmark = pytest.mark.usefixtures("blind", "often")


def states(settings: Settings) -> Iterator[list[int]]:
    """Yield the numbers `n` that the log's live rows have at each complete checkpoint, in order."""
    log, live = Log(settings), dict[bytes, int]()
    topic, left = log.topic_of(T), changes(settings, T)
    for checkpoint in log.checkpoints():
        if not checkpoint.complete or topic not in checkpoint.ends:
            continue
        ends = checkpoint.ends[topic]
        for change in left:
            if change.offset < ends[change.partition]:
                live.pop(change.key, None)
                if change.row is not None:
                    live[change.key] = change.row["n"]
        left = [change for change in left if change.offset >= ends[change.partition]]
        yield sorted(live.values())


class Numbers:
    """Inserts rows with the numbers from `first` on, in transactions of one or many, until told to stop."""

    def __init__(self, settings: Settings, first: int) -> None:
        self.last = first - 1
        self._settings = settings

    def __call__(self, stop: threading.Event) -> None:
        with psycopg.connect(self._settings.dsn, autocommit=True) as connection:
            while not stop.wait(0.01):
                count = (1, 1, 2, 40)[self.last % 4]
                connection.execute(
                    "INSERT INTO events SELECT 'more', i, NULL FROM generate_series(%s::int, %s::int) i",
                    [self.last + 1, self.last + count],
                )
                self.last += count


def test_under_load_each_checkpoint_has_each_row_once(settings: Settings) -> None:
    """Three times over, in several partitions and tiny cuts, while rows come: never is one missing or double."""
    settings = replace(settings, cut_records=150, partitions=3)
    prepare_append_only(settings, EVENTS, MANY)
    with capturing(settings) as capture, meanwhile(Numbers(settings, 3001)) as load:
        capture.hear("streaming")
        for _ in range(3):
            before = load.last
            ask(settings, tables=[T])
            done(settings, capture, T)
            eventually("rows come meanwhile", lambda before=before: load.last > before)
    with capturing(settings) as capture:
        capture.reach()
    equal(settings)
    seen = list(states(settings))
    assert all(state == list(range(1, len(state) + 1)) for state in seen)
    assert len({len(state) for state in seen}) > 3
    assert any(checkpoint.partial for checkpoint in Log(settings).checkpoints())


def test_what_the_stream_never_had_is_right_afterwards(settings: Settings) -> None:
    """Rows that came, and a TRUNCATE, which the stream does not mention; rows that are equal are several; their keys are new."""
    prepare_append_only(settings, EVENTS, SOME)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, SOME)
        capture.reach()
        with unnoticed(settings, publish=""):
            execute(settings, "TRUNCATE events", SOME, "INSERT INTO events VALUES ('new\n\\', NULL, repeat('x', 5000))")
        execute(settings, SOME)
        capture.reach()
        old = set(replay(settings, T))
        ask(settings, tables=[T])
        done(settings, capture, T)
        assert (jobs(settings)[T]["rows"], jobs(settings)[T]["removed"]) == (61, 90)
    equal(settings)
    assert not old & set(replay(settings, T))
    written = [change for change in changes(settings, T) if change.read == "resnapshot"]
    assert {change.version.lsn for change in written} == {jobs(settings)[T]["first"]}


@pytest.mark.parametrize(
    "ddl",
    ["ALTER TABLE events ADD COLUMN more int DEFAULT 5", "DROP TABLE old", "ALTER TABLE events RENAME what TO why"],
)
def test_silent_changes_mend_by_themselves(settings: Settings, ddl: str) -> None:
    """DDL that changes rows without an event (S12), of a partitioned table."""
    prepare_append_only(
        settings,
        "CREATE TABLE events (what text, n int) PARTITION BY RANGE (n)",
        "CREATE TABLE old PARTITION OF events FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE young PARTITION OF events FOR VALUES FROM (10) TO (20)",
        "INSERT INTO events SELECT 'x', i % 20 FROM generate_series(1, 60) i",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        execute(settings, ddl, "INSERT INTO events SELECT 'y', 15 FROM generate_series(1, 3)")
        capture.hear(f"{T} was read again")
        eventually("it is exact", lambda: capture.reach().inexact == ())
    equal(settings)


def test_a_table_that_joins_and_one_that_goes(settings: Settings) -> None:
    """Named while capture runs it is read with the rows that it had; dropped and asked for, all of its rows are deleted."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.reach()
        prepare_append_only(settings, EVENTS, SOME)
        execute(settings, SOME)
        capture.hear(f"{T} was read again")
        eventually("it is exact", lambda: capture.reach().inexact == ())
        equal(settings)
        execute(settings, SOME)
        capture.reach()
        equal(settings)
        execute(settings, "DROP TABLE events")
        ask(settings, tables=[T])
        done(settings, capture, T)
    assert replay(settings, T) == {}


def test_the_initial_snapshot_in_chunks_and_a_new_epoch(settings: Settings) -> None:
    """Beside a table with a key; nothing is a state before both are read. Then the slot is lost, and rows with it."""
    prepare_append_only(
        settings, EVENTS, MANY, "CREATE TABLE items (id int PRIMARY KEY)", "INSERT INTO items VALUES (1)"
    )
    with capturing(settings, chunked=True) as capture:
        execute(settings, SOME)
        capture.hear("the initial snapshot is complete")
        capture.reach()
    equal(settings)
    drop_slot(settings)
    execute(settings, "TRUNCATE events", SOME)
    assert recover(settings, lambda _: None).inexact == (T, "public.items")
    with capturing(settings) as capture:
        execute(settings, SOME)
        eventually("all is exact", lambda: capture.reach().inexact == ())
    equal(settings)
    live = replay(settings, T)
    assert {change.version.epoch for change in changes(settings, T) if change.key in live} == {2}
    assert replay(settings, "public.items") == selected(settings, "items")


def test_what_is_not_append_only_is_not_read_in_chunks_either(settings: Settings) -> None:
    prepare_append_only(settings, EVENTS)
    execute(settings, "ALTER TABLE events REPLICA IDENTITY FULL")
    assert refused(settings, chunked=True).code == "append-only-full"


# A kill


@pytest.mark.parametrize("after", [False, True], ids=["before its commit", "after it"])
def test_killed_anywhere_it_ends_exact_and_never_shows_a_half(settings: Settings, after: bool) -> None:
    """Each process dies one cut later than the last, which had written some rows, or removed some; rows come between the lives."""
    settings = replace(settings, cut_records=1000)
    prepare_append_only(settings, EVENTS, MANY)
    with capturing(settings) as capture:
        capture.reach()
    half: set[str] = set()
    numbers = 3000
    for cuts in range(1, 12):
        running = Running(settings, DyingOfCuts(settings, Life(), cuts, after=after))
        numbers += 2
        execute(settings, f"INSERT INTO events VALUES ('between', {numbers - 1}, NULL)")
        if cuts == 1:
            reporting(settings)
            said = {"verb": "resnapshot", "args": {"tables": [T]}, "timeout": 30.0}
            Control(Log(settings))._request("capture", "1", said)  # it may die before it answers
        eventually("it dies or is done", lambda: running.error or phases(settings).get(T) == "done")  # noqa: B023
        if running.error is None:
            running.stop()
            break
        running.join()
        half.add(phases(settings).get(T, ""))
        execute(settings, f"INSERT INTO events VALUES ('off', {numbers}, NULL)")
    with capturing(settings) as capture:
        done(settings, capture, T)
    equal(settings)
    assert half >= {"writing", "removing"}
    assert all(state == list(range(1, len(state) + 1)) for state in states(settings))


def test_asked_to_stop_while_it_is_written_anew_it_stops_there(settings: Settings) -> None:
    """It does not go on to the end of the table; started again it ends exact."""
    settings = replace(settings, cut_records=1000)
    prepare_append_only(settings, EVENTS, MANY)
    with capturing(settings) as capture:
        capture.reach()
    log = DyingOfCuts(settings, Life(), 2, after=True)
    running = Running(settings, log)
    log._end = running._stop.set
    reporting(settings)
    Control(Log(settings))._request("capture", "1", {"verb": "resnapshot", "args": {"tables": [T]}, "timeout": 30.0})
    running.join()
    assert (running.error, phases(settings)[T]) == (None, "writing")
    with capturing(settings) as capture:
        done(settings, capture, T)
    equal(settings)


# What happens between the read and the watermark


def test_a_commit_that_is_not_visible_yet_is_kept_once(settings: Settings) -> None:
    """In the stream before the low watermark, not in the rows that were read (S7)."""
    prepare_append_only(settings, EVENTS, SOME)
    with capturing(settings) as capture:
        capture.hear("streaming")
        with waiting(settings, "INSERT INTO events VALUES ('unseen', 1, NULL), ('unseen', 1, NULL)"):
            eventually("the stream has it", lambda: len(replay(settings, T)) == 32)
            ask(settings, tables=[T])
            eventually("it was read", lambda: jobs(settings)[T]["phase"] == "done")
            assert rows(settings, "SELECT count(*) FROM events") == [(30,)]
        capture.reach()
        equal(settings)
        ask(settings, tables=[T])
        done(settings, capture, T)
    equal(settings)


@contextmanager
def before_the_high_watermark(settings: Settings, statement: str) -> Iterator[Callable[[], bool]]:
    """Run a statement once the rows were read and before the high watermark is written; whether it had to wait for that."""
    waits: list[bool] = []
    emit = watermarks.emit
    thread = threading.Thread(target=execute, args=(settings, statement))
    locked = f"SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query = '{statement}'"

    def emitting(connection: catalog.Connection, which: str, mark: str) -> None:
        if which == watermarks.HIGH and not waits:
            thread.start()
            eventually("it ends or waits", lambda: not thread.is_alive() or rows(settings, locked))
            waits.append(thread.is_alive())
        emit(connection, which, mark)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watermarks, "emit", emitting)
        yield lambda: waits == [True]
        thread.join()


def test_truncated_before_the_high_watermark(settings: Settings) -> None:
    """The reading transaction holds its lock up to the watermark: the TRUNCATE is behind it, and deletes what was written."""
    prepare_append_only(settings, EVENTS, SOME)
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        with before_the_high_watermark(settings, "TRUNCATE events") as waited:
            ask(settings, tables=[T])
            done(settings, capture, T)
        execute(settings, "INSERT INTO events VALUES ('after', 1, NULL)")
        capture.reach()
        assert waited()
    equal(settings)


def test_truncated_before_the_high_watermark_with_a_key(settings: Settings) -> None:
    """A row that the log never had would get no delete by a TRUNCATE before the watermark, and be written after it."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, no int)", "INSERT INTO items VALUES (1, 1)")
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        with unnoticed(settings):
            execute(settings, "INSERT INTO items VALUES (2, 2)")
        with before_the_high_watermark(settings, "TRUNCATE items") as waited:
            ask(settings, tables=["public.items"])
            done(settings, capture, "public.items")
        capture.reach()
        assert waited()
    assert replay(settings, "public.items") == selected(settings, "items") == {}


# What cannot be written


def test_a_row_that_cannot_be_written_leaves_the_table_as_it_was(settings: Settings) -> None:
    """Rows before it were committed in cuts of their own: they are taken back. The stream goes on; mended, it ends exact."""
    small = replace(settings, cut_records=1000, message_max_bytes=100_000)
    prepare_append_only(small, EVENTS, MANY)
    with capturing(small) as capture:
        capture.hear("streaming")
        capture.reach()
        with unnoticed(small):
            execute(small, "INSERT INTO events VALUES ('large', 3001, repeat('x', 200000))")
        ask(small, tables=[T])
        assert "row-too-large" in capture.hear("cannot be read again")
        execute(small, "INSERT INTO events VALUES ('goes on', 3001, NULL)")
        capture.reach()
        assert jobs(small)[T]["phase"] == "failed"
        assert len(replay(small, T)) == 3001
        assert any(change.read == "resnapshot" for change in changes(small, T))
    assert all(state == list(range(1, len(state) + 1)) for state in states(small))
    with capturing(settings) as capture:
        ask(settings, tables=[T])
        done(settings, capture, T)
    equal(settings)


def test_no_room_for_the_rows_is_told_and_the_stream_goes_on(settings: Settings) -> None:
    prepare_append_only(
        settings, EVENTS, "INSERT INTO events SELECT 'x', i, repeat('x', 100000) FROM generate_series(1, 20) i"
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        with no_room():
            ask(settings, tables=[T])
            assert "spool-full" in capture.hear("cannot be read again")
            execute(settings, "INSERT INTO events VALUES ('goes on', 21, NULL)")
            capture.reach()
        equal(settings)
        ask(settings, tables=[T])
        done(settings, capture, T)
    equal(settings)


def test_there_is_no_single_row_to_read(settings: Settings) -> None:
    prepare_append_only(settings, EVENTS)
    with capturing(settings) as capture:
        capture.reach()
        with pytest.raises(Misconfigured, match="append-only"):
            _key(Log(settings), [T], "5")
        ask(settings, tables=[T], key={})
        capture.hear("its rows have no key")


def test_a_pause_while_it_is_read(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read is thrown away; resumed it is read once more, and cancelled it leaves the log as it is."""
    prepare_append_only(settings, EVENTS, SOME)
    go, emit = threading.Event(), watermarks.emit

    def held(connection: catalog.Connection, which: str, mark: str) -> None:
        if which == watermarks.HIGH:
            go.wait(60)
        emit(connection, which, mark)

    monkeypatch.setattr(chunks.watermarks, "emit", held)
    with capturing(settings) as capture:
        capture.reach()
        ask(settings, tables=[T])
        assert ask(settings, "pause") == {"jobs": [T]}
        go.set()
        execute(settings, SOME)
        capture.reach()
        assert (jobs(settings)[T]["phase"], jobs(settings)[T]["rows"]) == ("paused", 0)
        assert ask(settings, "resume") == {"jobs": [T]}
        done(settings, capture, T)
    equal(settings)


def test_setup_of_a_table_that_is_read_again_needs_nothing_more(settings: Settings) -> None:
    """Two tables at once, one of them with a row filter: what the stream leaves out, the read leaves out."""
    execute(settings, EVENTS, "CREATE TABLE others (n int)", "INSERT INTO others SELECT generate_series(1, 20)")
    with closing(catalog.connect(settings.dsn)) as connection:
        setup.apply(connection, setup.plan(connection, settings, [], "", ["events", "others"]))
    execute(settings, f"ALTER PUBLICATION {settings.publication} SET TABLE events, others WHERE (n > 10)")
    with capturing(settings) as capture:
        capture.reach()
        ask(settings, tables=[T, "public.others"])
        done(settings, capture, T, "public.others")
        execute(settings, SOME, "INSERT INTO others VALUES (5), (50)")
        capture.reach()
    equal(settings)
    assert sorted(row["n"] for row in replay(settings, "public.others").values()) == [*range(11, 21), 50]
