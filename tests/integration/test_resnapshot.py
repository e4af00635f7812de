"""Tables read again while the stream runs (I4, S7): the log ends equal to Postgres, whatever happens meanwhile."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from confluent_kafka import Message

from headrace.control import Control
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.log import Log, kafka
from headrace.log.tail import BEGINNING, Tail, check_heard, read_to_end
from headrace.settings import Settings
from headrace_capture import known, spool
from tests.fixtures.capture import (
    Running,
    capturing,
    changes,
    end,
    eventually,
    execute,
    prepare,
    refused,
    replay,
    selected,
    spawn,
)
from tests.fixtures.disk import no_room
from tests.fixtures.feed import add_partition
from tests.fixtures.meanwhile import meanwhile
from tests.fixtures.resnapshots import ITEMS, Load, T, ask, done, jobs, phases, unseen

pytestmark = pytest.mark.usefixtures("blind")


def foreign(settings: Settings) -> dict[bytes, Any]:
    """Return the table as a reader has it that knows nothing of headrace: the last value of each key, none for a tombstone."""
    log = Log(settings)
    topic = log.topic_of(T)
    places = {(topic, partition): BEGINNING for partition in range(log.partitions([topic])[topic])}
    last = {record.key: record.value for record in read_to_end(settings, places)}
    return {key: json.loads(value)["after"] for key, value in last.items() if value is not None}


def test_rows_and_deletes_that_were_never_seen_are_in_the_log_afterwards(settings: Settings) -> None:
    """In chunks of a few rows: changed rows, new rows, and tombstones for those that are gone."""
    settings = replace(settings, cut_records=7)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 60) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        unseen(settings, "DELETE FROM items WHERE id % 10 = 3", "UPDATE items SET no = -no WHERE id % 10 = 5")
        unseen(settings, "INSERT INTO items VALUES (1000, 1)")
        assert ask(settings, tables=[T]) == {"jobs": [T]}
        done(settings, capture)
    assert replay(settings, T) == selected(settings, T)
    assert {c.read for c in changes(settings, T) if c.op == "r"} == {"snapshot", "resnapshot"}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_table_of_large_rows_is_read_in_chunks_of_a_bounded_size(settings: Settings, *, chunked: bool) -> None:
    """A chunk ends with the row that reaches its most bytes: the COPY that has more rows is given up (I10)."""
    docs = "CREATE TABLE docs (id int PRIMARY KEY, big text); ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL"
    prepare(
        settings, docs, f"INSERT INTO docs SELECT i, repeat(i::text, {100_000 // 3}) FROM generate_series(100, 299) i"
    )
    with capturing(settings, chunked=chunked) as capture:
        if not chunked:
            capture.hear("streaming")
            ask(settings, tables=["public.docs"])
        capture.hear("public.docs was read again: 200 rows")
        capture.reach()
    assert replay(settings, "public.docs") == selected(settings, "docs")


def test_under_load_the_log_stays_exact(settings: Settings) -> None:
    """Three times over while rows come, change, move and go; no version ever stands for two states of the topic."""
    settings = replace(settings, cut_records=150, partitions=3)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 1000) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        with meanwhile(Load(settings, 1500)) as load:
            for _ in range(3):
                before = load.commits
                ask(settings, tables=[T])
                done(settings, capture)
                capture.eventually("rows changed meanwhile", lambda before=before: load.commits > before)
        capture.reach()
    assert replay(settings, T) == selected(settings, T)
    assert foreign(settings) == selected(settings, T)
    states = [(c.version, c.ends) for c in Log(settings).checkpoints() if c.complete]
    assert states == sorted(states, key=lambda state: state[0])
    assert all(ends == dict(states)[version] for version, ends in states)


def test_a_pass_goes_on_after_a_kill(settings: Settings) -> None:
    """SIGKILL in the middle of a pass, under load: it goes on behind what is in the log, and ends exact."""
    settings = replace(settings, cut_records=100)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 15000) i")
    with capturing(settings) as capture:
        capture.reach()
        unseen(settings, "DELETE FROM items WHERE id % 100 = 3", "UPDATE items SET no = -no WHERE id % 100 = 5")
        capture.reach()
    with meanwhile(Load(settings, 2000)):
        process = spawn(settings)
        try:
            ask(settings, tables=[T])
            eventually("it reads", lambda: jobs(settings)[T]["rows"] > 400)
        finally:
            end(process)
        read = jobs(settings)[T]
        assert read["phase"] == "reading"
        with capturing(settings) as capture:
            done(settings, capture)
    with capturing(settings) as capture:
        capture.reach()
    assert replay(settings, T) == selected(settings, T)
    assert foreign(settings) == selected(settings, T)
    whole = jobs(settings)[T]
    assert whole["first"] == read["first"]
    assert whole["rows"] > read["rows"]


def test_the_initial_snapshot_in_chunks(settings: Settings) -> None:
    """Killed under load it goes on where it was; nothing is a state before it is complete; then the log is the tables."""
    settings = replace(settings, cut_records=100)
    prepare(
        settings,
        ITEMS,
        "CREATE TABLE empty (id int PRIMARY KEY)",
        "INSERT INTO items SELECT i, i FROM generate_series(1, 12000) i",
    )
    with meanwhile(Load(settings, 12500)):
        process = spawn(settings, "--snapshot=chunked")
        try:
            eventually("it reads", lambda: jobs(settings).get(T, {}).get("rows", 0) > 500)
        finally:
            end(process)
        read = jobs(settings)[T]["rows"]
        assert read < 12000
        assert Log(settings).newest_checkpoint(complete=True) is None
        with capturing(settings) as capture:
            capture.hear("the initial snapshot is complete")
            capture.reach()
    with capturing(settings) as capture:
        assert capture.reach().inexact == ()
        assert "public.empty" in Log(settings).tables()
    assert replay(settings, T) == selected(settings, T)


def test_large_chunks_are_not_read_back_and_no_less_exact(settings: Settings) -> None:
    """What a pass has just written it does not read again; what the stream wrote meanwhile it does."""
    settings = replace(settings, cut_records=2000)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 9000) i")
    with capturing(settings, chunked=True) as capture, meanwhile(Load(settings, 10000)):
        capture.hear("the initial snapshot is complete")
        ask(settings, tables=[T])
        done(settings, capture)
    with capturing(settings) as capture:
        capture.reach()
    assert replay(settings, T) == selected(settings, T)


def test_a_row_that_cannot_be_written_stops_its_table_and_nothing_else(settings: Settings) -> None:
    """Larger than a record may be: the job says so and rests, the stream goes on; asked again under a higher limit it ends."""
    small = replace(settings, message_max_bytes=100_000)
    prepare(small, ITEMS)
    with capturing(small) as capture:
        capture.hear("streaming")
        execute(
            small,
            "CREATE TABLE large (id int PRIMARY KEY, a text)",
            "INSERT INTO large VALUES (1, 'a'), (2, repeat('x', 200000))",
            f"ALTER PUBLICATION {small.publication} ADD TABLE large",
        )
        capture.hear("public.large cannot be read again")
        execute(small, "INSERT INTO items VALUES (1, 1)")
        assert capture.reach().inexact == ("public.large",)
        assert "row-too-large" in capture.hear("cannot be read again")
        assert phases(small) == {"public.large": "failed"}
    with capturing(settings) as capture:
        ask(settings, tables=["public.large"])
        done(settings, capture, "public.large")
        assert capture.reach().inexact == ()
    assert replay(settings, T) == selected(settings, T)
    assert replay(settings, "public.large") == selected(settings, "large")


def test_no_room_for_the_keys_stops_their_table_and_nothing_else(settings: Settings) -> None:
    """With room again the pass ends; a TRUNCATE, for which the stream itself must list the keys, stops capture with the reason."""
    prepare(settings, "CREATE TABLE items (id text PRIMARY KEY)", "CREATE TABLE few (id int PRIMARY KEY)")
    # More keys than SQLite keeps in memory: what it writes of them is larger than there is room for.
    execute(settings, "INSERT INTO items SELECT lpad(i::text, 800, '0') FROM generate_series(1, 8000) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        with no_room():
            ask(settings, tables=[T])
            assert "spool-full" in capture.hear("cannot be read again")
            execute(settings, "INSERT INTO few VALUES (1)")
            capture.reach()
        ask(settings, tables=[T])
        done(settings, capture)
    execute(settings, "TRUNCATE items")
    with no_room():
        assert refused(settings).code == "spool-full"
    with capturing(settings) as capture:
        capture.reach()
    assert replay(settings, T) == {}


class Silent(Tail):
    """Hears nothing of a Kafka that is away."""

    def poll(self, timeout: float, most: int = 1) -> list[Message]:
        return []


@pytest.mark.parametrize("amid", ["catch_up", "older", "silence"])
def test_asked_to_stop_while_it_looks_what_the_log_has_it_writes_nothing_more(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, amid: str
) -> None:
    """That may take minutes, a minute also where Kafka sends nothing. The job is there for the next start."""
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 1), (2, 2)")
    monkeypatch.setattr(spool, "_STEPS", 1)
    silent, amid = amid == "silence", amid.replace("silence", "catch_up")
    look, looked, waits = getattr(known.KnownKeys, amid), [], []

    def waiting(_since: float) -> None:
        waits.append("waits")
        if len(waits) > 1:
            raise Transient("kafka-away", "It sends nothing.")

    with capturing(settings) as capture:

        def stopping(keys: known.KnownKeys, first: Any, second: Any, *more: Any) -> Any:
            if threading.current_thread().name.startswith("resnapshot"):
                return None  # all is left to the stream
            if amid == "older":
                return look(keys, first, capture._stop.set, *more)
            capture._stop.set()
            if silent:
                monkeypatch.setattr(known, "Tail", Silent)
                monkeypatch.setattr(known, "check_heard", waiting)
            looked.append(look(keys, first, second, *more))
            return None

        capture.hear("streaming from")
        capture.reach()
        monkeypatch.setattr(known.KnownKeys, amid, stopping)
        unseen(settings, "DELETE FROM items WHERE id = 1")
        with suppress(HeadraceError):  # it may end before it answers
            ask(settings, tables=[T])
        capture.join()
    assert (phases(settings)[T], looked, len(waits)) == ("waiting", [], silent)
    assert b'{"id":1}' in replay(settings, T)
    monkeypatch.setattr(known.KnownKeys, amid, look)
    monkeypatch.setattr(known, "Tail", Tail)
    monkeypatch.setattr(known, "check_heard", check_heard)
    with capturing(settings) as capture:
        done(settings, capture)
    assert replay(settings, T) == selected(settings, T)


def test_a_partition_that_was_added_is_no_fault_of_the_table_that_is_read_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer finds it when the chunk is committed: no cut may be, and capture says so (S9)."""
    settings = replace(settings, partitions=2)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 2000) i")
    often = {"topic.metadata.refresh.interval.ms": 50}  # by itself a producer looks every five minutes
    monkeypatch.setattr(kafka, "producer", partial(kafka.producer, **often))
    capture = Running(settings)

    def refused() -> bool:
        with suppress(HeadraceError):  # it may have ended
            Control(Log(settings)).ask("capture", "resnapshot", {"tables": [T]}, 5.0)
        return capture.error is not None or phases(settings).get(T) == "failed"

    try:
        capture.hear("streaming from")
        capture.reach()
        add_partition(settings, Log(settings).topic_of(T))
        eventually("it is refused", refused)
    finally:
        capture.stop()
    assert isinstance(capture.error, Misconfigured)
    assert capture.error.code == "partitions-changed"
    assert not any("cannot be read again" in line for line in capture.said)
