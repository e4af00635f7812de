"""A log that Kafka has compacted: holes where records were, and the newest of each key in the end (S18, S29)."""

from __future__ import annotations

import copy
from contextlib import closing
from dataclasses import replace

from headrace.change import Position
from headrace.consumer import Batch
from headrace.log import Lag, Log
from headrace.log.feed import FeedReader
from headrace.log.reader import Reader
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import checkpoints_topic, schemas_topic
from headrace.settings import Settings
from tests.fixtures.capture import capturing, eventually, execute, prepare, replay, selected
from tests.fixtures.ticks import repeating

T = "public.items"
SOON = {"segment.ms": "100", "min.cleanable.dirty.ratio": "0.0", "min.compaction.lag.ms": "0"}
EQUAL, STILL = 20, 2_000
"""Rows that each transaction changes alike, and rows that lie before all of that in the log: more than a client fetches in advance."""


def followed(settings: Settings, position: Position | None, rows: dict[bytes, int], *, ended: bool = False) -> Position:
    """Apply to `rows` all that comes after `position`; return where it ends: nothing is behind it, no checkpoint if capture has `ended`."""
    log = Log(settings)
    newest = log.newest_checkpoint(complete=True)
    assert newest is not None
    with closing(log.reader([T], copy.deepcopy(position), "compacted")) as reader:

        def whole() -> Batch | None:
            batch = reader.poll(0.2)
            for change in batch.changes if batch else ():
                rows.pop(change.key, None)
                if change.row is not None:
                    rows[change.key] = change.row["n"]
            return batch if batch and batch.complete and batch.position.version >= newest.version else None

        last = eventually("the state", whole)
        assert reader.lag() == Lag(0, 0, 0.0) if ended else reader.lag().records == 0
    return copy.deepcopy(last.position)


def test_whoever_reads_a_compacted_log_ends_where_postgres_is(settings: Settings) -> None:
    """From zero, from a position whose record is gone, and capture itself, which looks for keys in it."""
    prepare(
        settings,
        "CREATE TABLE items (id int PRIMARY KEY, n int)",
        "INSERT INTO items SELECT i, 0 FROM generate_series(1, 20) i",
    )
    log = Log(settings)
    topic = log.topic_of(T)
    held: dict[bytes, int] = {}
    with capturing(settings) as capture:
        capture.reach()
        position = followed(settings, None, held)
        for n in range(1, 40):
            execute(
                settings, f"UPDATE items SET n = {n} WHERE id % 3 = {n % 3}", f"DELETE FROM items WHERE id = {n // 2}"
            )
            if n == 20:
                capture.reach()
                position = followed(settings, position, held)
        execute(settings, "INSERT INTO items VALUES (3, 33)")
        capture.reach()
        written = sum(log.ends(T))
        log.topics.configure(
            dict.fromkeys((topic, checkpoints_topic(settings.source), schemas_topic(settings.source)), SOON)
        )

        def left() -> list[int]:
            return [record.offset for record in read_to_end(settings, {(topic, 0): BEGINNING})]

        def compacted() -> bool:
            execute(settings, "UPDATE items SET n = n + 1 WHERE id = 20")  # an open segment is never compacted
            capture.reach()
            return len(left()) < written / 4

        eventually("it is compacted", compacted)
    with capturing(settings) as capture:
        execute(
            settings,
            "UPDATE items SET n = 7 WHERE id = 19",
            "TRUNCATE items",
            "INSERT INTO items VALUES (1, 1), (40, 4)",
        )
        capture.reach()
    wanted = {key: row["n"] for key, row in selected(settings, T).items()}
    assert len(wanted) == 2
    assert {key: row["n"] for key, row in replay(settings, T).items()} == wanted
    assert position.offsets[topic][0] not in left(), "that record is gone"
    followed(settings, position, held, ended=True)
    fresh: dict[bytes, int] = {}
    followed(settings, None, fresh, ended=True)
    assert held == fresh == wanted


def states(reader: Reader | FeedReader, count: int) -> None:
    """Read from zero until `count` batches were complete: each ends at a state that Postgres had."""
    rows: dict[bytes, int | None] = {}
    seen: list[int] = []

    def enough() -> bool:
        batch = reader.poll(0.2)
        rows.update((change.key, change.row["n"]) for change in (batch.changes if batch else ()) if change.row)
        if batch and batch.complete:
            ticked = [n for n in rows.values() if n is not None]
            assert (len(ticked), len(rows)) == (EQUAL, EQUAL + STILL), "a row is missing"
            assert len(set(ticked)) == 1, f"half of a transaction: {sorted(set(ticked))}"
            seen.append(ticked[0])
        return len(seen) >= count

    with closing(reader):
        eventually(f"{count} states", enough)
    assert seen == sorted(seen)


def test_whoever_reads_from_zero_while_the_broker_compacts_sees_only_states_that_postgres_had(
    settings: Settings,
) -> None:
    """Under a writer that does not stop: at once, and so slowly that what made the first state aimed at is gone."""
    settings = replace(settings, min_compaction_lag_ms=500)
    prepare(
        settings,
        "CREATE TABLE items (id int PRIMARY KEY, n int, wide text)",
        f"INSERT INTO items SELECT i, 0 FROM generate_series(1, {EQUAL}) i",
        f"INSERT INTO items SELECT {EQUAL} + i, NULL, (SELECT string_agg(md5(i * j || ''), '') FROM generate_series(1, 128) j)"
        f" FROM generate_series(1, {STILL}) i",
    )
    log = Log(settings)
    topic = log.topic_of(T)
    with capturing(settings) as capture, repeating(settings, f"UPDATE items SET n = n + 1 WHERE id <= {EQUAL}"):
        capture.reach()
        log.topics.configure({topic: {"segment.ms": "100", "min.cleanable.dirty.ratio": "0.0"}})
        slow = log.reader([T], None, "slow")
        assert slow.newest is not None
        aimed = slow.newest.end(topic, 0)

        def compacted() -> bool:
            states(log.reader([T], None, "prompt"), 3)
            left = read_to_end(settings, {(topic, 0): BEGINNING})
            return min(record.offset for record in left if record.key == b'{"id":1}') >= aimed

        capture.eventually("it is compacted", compacted)
        states(slow, 3)
        states(log.reader([T], None, "prompt"), 3)
