"""The reader of the log: aligned to cuts, bounded in memory, and exact only when it knows so."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from headrace import codec
from headrace.change import Column, TableSchema, Version
from headrace.consumer import ALL
from headrace.errors import Misconfigured, Refused, Transient
from headrace.log import Log, Reader, kafka, tail
from headrace.log.topics import table_of
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.drained import Seen, drain, rows
from tests.fixtures.feed import ITEMS, TAGS, Feed


@pytest.fixture
def feed(settings: Settings) -> Feed:
    return Seen(settings)


def test_a_reader_from_zero_loads_and_then_follows_cut_by_cut(feed: Feed) -> None:
    first = feed.cut((ITEMS, 1, 10), (TAGS, 1, 1), (ITEMS, 1, 11))
    reader = feed.log.reader([ITEMS, TAGS], None)
    loaded = drain(reader, first.version)
    assert all(batch.loading for batch in loaded)
    assert rows(loaded) == {(ITEMS, b'{"id":1}'): 11, (TAGS, b'{"id":1}'): 1}
    second = feed.cut((ITEMS, 1, None), (ITEMS, 2, 20))
    followed = drain(reader, second.version)
    assert [change.op for batch in followed for change in batch.changes] == ["d", "c"]  # the tombstone says nothing new
    assert not any(batch.loading for batch in followed)
    assert reader.lag() == (0, 0, 0.0)
    reader.close()


def test_s29_what_is_open_or_aborted_is_no_lag(feed: Feed) -> None:
    """The high watermark counts it, and so do clients that know of nothing else."""
    reader = feed.log.reader([ITEMS], None)
    drain(reader, feed.cut((ITEMS, 1, 10)).version)
    for id_ in range(3):
        feed.put(ITEMS, id_, 20)
    feed.writer._hand_over()
    feed.writer._flush()
    topic = feed.log.topic_of(ITEMS)
    ends = kafka.consumer(feed.log.settings, committed=False)
    eventually("they are in the partition", lambda: ends.get_watermark_offsets(TopicPartition(topic, 0))[1] > 3)
    ends.close()
    assert reader.poll(0.5) is None
    assert reader.lag() == (0, 0, 0.0)
    feed.writer.abort()
    assert reader.poll(0.5) is None
    assert reader.lag() == (0, 0, 0.0)
    drain(reader, feed.cut((ITEMS, 1, 30)).version)
    assert reader.lag() == (0, 0, 0.0)
    reader.close()


def test_a_reader_goes_on_from_its_position_and_neither_repeats_nor_skips(feed: Feed) -> None:
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    position = codec.decode_position(codec.encode_position(drain(reader, first.version)[-1].position))
    reader.close()
    second = feed.cut((ITEMS, 2, 20))
    reader = feed.log.reader([ITEMS], position)
    assert rows(drain(reader, second.version)) == {(ITEMS, b'{"id":2}'): 20}
    reader.close()


class Told:
    """A client of Kafka that keeps what it is told to commit."""

    def __init__(self, client: Consumer) -> None:
        self._client = client
        self.told: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def commit(self, *, offsets: list[TopicPartition], **_: bool) -> None:
        self.told.append(" ".join(table_of(place.topic) for place in offsets))
        self._client.commit(offsets=offsets, asynchronous=False)


def test_the_group_shows_the_position_and_is_told_only_what_moves(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few places at a time, since the broker takes no large commit; and all of it now and then."""
    first = feed.cut((ITEMS, 1, 10), (TAGS, 1, 1))
    reader = feed.log.reader([ITEMS, TAGS], None, "view.g1")
    assert isinstance(reader, Reader)
    client = Told(reader._tail._consumer)
    monkeypatch.setattr(reader._tail, "_consumer", client)
    monkeypatch.setattr(tail, "_MIRRORED", 1)
    drain(reader, first.version)
    reader.mirror()
    assert sorted(client.told) == [ITEMS, TAGS]
    drain(reader, feed.cut((ITEMS, 2, 20)).version)
    for _ in range(2):
        reader.mirror()
    assert client.told[2:] == [ITEMS]
    shown = client.committed([TopicPartition(topic, 0) for topic in reader.position.offsets], 10)
    assert {place.topic: [place.offset] for place in shown} == reader.position.offsets
    monkeypatch.setattr(tail, "_MIRROR_SECONDS", -1.0)
    reader.mirror()
    assert sorted(client.told[3:]) == [ITEMS, TAGS]
    reader.close()


def test_a_transaction_that_spans_cuts_appears_whole(feed: Feed) -> None:
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    drain(reader, first.version)
    feed.put(ITEMS, 1, 11)
    feed.seal(partial=(200, 1))
    quiet = time.monotonic() + 1.0
    while time.monotonic() < quiet:
        assert reader.poll(0.1) is None
    feed.put(ITEMS, 2, 20, 2)
    whole = feed.seal()
    assert rows(drain(reader, whole.version)) == {(ITEMS, b'{"id":1}'): 11, (ITEMS, b'{"id":2}'): 20}
    reader.close()


def test_nothing_beyond_a_checkpoint_is_handed_out_and_an_aborted_cut_never(feed: Feed) -> None:
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    drain(reader, first.version)
    feed.put(ITEMS, 1, 99)
    feed.writer.abort()
    feed.open()
    second = feed.cut((ITEMS, 3, 30))
    assert rows(drain(reader, second.version)) == {(ITEMS, b'{"id":3}'): 30}
    reader.close()


def test_a_backlog_comes_in_pieces_of_bounded_size(feed: Feed, settings: Settings) -> None:
    for number in range(50):
        feed.put(ITEMS, number, number)
    whole = feed.seal()
    log = Log(replace(settings, batch_records=10))
    reader = log.reader([ITEMS], None)
    batches = drain(reader, whole.version)
    assert len(rows(batches)) == 50
    assert [batch.checkpoint is None for batch in batches][-1] is False
    reader.close()


def test_a_delete_is_told_once_wherever_a_piece_ends(feed: Feed, settings: Settings) -> None:
    """Its two records come in two pieces here, of the one key or of the other: the change between is one record."""
    first = feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    reader = feed.log.reader([ITEMS], None)
    position = drain(reader, first.version)[-1].position
    reader.close()
    last = feed.cut((ITEMS, 1, None), (ITEMS, 3, 30), (ITEMS, 2, None))
    reader = Log(replace(settings, batch_records=1)).reader([ITEMS], position)
    told = [change.key for batch in drain(reader, last.version) for change in batch.changes]
    assert told == [codec.encode_key({"id": id_}) for id_ in (1, 3, 2)]
    reader.close()


@pytest.mark.parametrize("bound", ["records", "bytes"])
def test_a_transaction_however_big_never_waits_whole_in_a_readers_memory(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """I10: 40 cuts of 20 records, none of which ends at a state; the reader has been following."""
    batch_records = 20 if bound == "records" else 100
    if bound == "bytes":
        monkeypatch.setattr(
            "headrace.log.reader.BATCH_BYTES", 20 * len(b'{"id":100}{"op":"c","after":{"id":100,"n":100}}')
        )
    before = feed.cut((ITEMS, 1, 0), (TAGS, 1, 0))
    reader = Log(replace(settings, batch_records=batch_records)).reader([ITEMS, TAGS], None)
    drain(reader, before.version)
    most = 0
    for cut in range(40):
        for number in range(20):
            feed.put(ITEMS if cut % 2 else TAGS, 100 + 20 * cut + number, 1)
        feed.seal(partial=(feed.lsn + 10, cut))
        assert reader.poll(0.1) is None, "no state, no piece"
        most = max(most, reader._waiting)
    assert 20 <= most <= 150
    whole = feed.cut((ITEMS, 1, None))
    batches = drain(reader, whole.version)
    assert len(rows(batches)) == 800
    assert max(len(batch.changes) for batch in batches) <= 150
    reader.close()


def test_a_reader_that_was_away_says_for_how_long_it_has_not_been_up_to_date(feed: Feed) -> None:
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    position = drain(reader, first.version)[-1].position
    reader.close()
    feed.cut((ITEMS, 2, 20))
    reader = feed.log.reader([ITEMS], replace(position, appended=position.appended - 3_600_000))
    assert 3600 <= reader.lag().seconds < 3660
    reader.close()


def test_all_reads_tables_that_appear_later(feed: Feed) -> None:
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader(ALL, None)
    drain(reader, first.version)
    feed.add_table("public.new")
    second = feed.cut(("public.new", 1, 1))
    assert rows(drain(reader, second.version)) == {("public.new", b'{"id":1}'): 1}
    reader.close()


def test_a_state_older_than_the_compaction_lag_is_not_exact_while_more_follows(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    impatient = Log(replace(settings, min_compaction_lag_ms=0))
    reader = impatient.reader([ITEMS], None)
    feed.put(ITEMS, 1, 11)
    feed.put(ITEMS, 2, 12)
    second = feed.seal()
    # At the very end of the log nothing can have been compacted away, however old the checkpoint is.
    batches = drain(reader, second.version)
    assert [batch.position.version for batch in batches if batch.complete] == [second.version]
    assert rows(batches) == {(ITEMS, b'{"id":1}'): 11, (ITEMS, b'{"id":2}'): 12}
    reader.close()


def test_a_state_that_is_read_to_its_end_is_not_exact_before_it_is_known_that_nothing_follows(
    feed: Feed, settings: Settings
) -> None:
    """What follows may be there, and not here yet. This reader takes one record at a time."""
    first = feed.cut((ITEMS, 1, 10))
    feed.cut((ITEMS, 2, 20))
    impatient = Log(replace(settings, min_compaction_lag_ms=0, batch_records=0))
    with closing(impatient.reader([ITEMS], None, until=first.version)) as reader:
        batch = eventually("the record", lambda: reader.poll(0.2))
        assert (len(batch.changes), batch.complete) == (1, False)
        assert reader.poll(0.2) is None


def test_a_state_is_no_younger_because_the_clock_here_is_behind_the_brokers(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that was paused may go on with its old time. A view that was away for long is not fed either."""
    feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    position = drain(reader, Version(1, feed.lsn))[-1].position
    reader.close()
    feed.cut((ITEMS, 1, 11))
    newest = feed.log.newest_checkpoint()
    assert newest is not None
    now = time.time
    monkeypatch.setattr("headrace.log.reader.time.time", lambda: now() - 3 * 3_600)
    reader = Log(replace(settings, min_compaction_lag_ms=60_000)).reader([ITEMS], position)
    assert reader._is_exact(newest)
    assert not reader._is_exact(replace(newest, appended=newest.appended - 2 * 3_600_000))
    reader.close()
    away = replace(position, appended=newest.appended - settings.delete_retention_ms - 3_600_000)
    with pytest.raises(Refused, match="169 hours ago"):
        feed.log.reader([ITEMS], away)
    monkeypatch.setattr("headrace.log.reader.time.time", lambda: now() + 3 * 3_600)
    reader = feed.log.reader([ITEMS], position)
    assert not reader._is_exact(newest)
    build = feed.log.reader([ITEMS], None)
    feed.log.ahead = 3 * 3_600.0  # a runner compares the clocks
    assert reader._is_exact(newest)
    reader.close()
    drain(build, newest.version)
    assert build._fed < now() + 60, "as noted before that, it would be refused three hours late"
    build.close()


def test_a_few_records_that_are_old_are_a_state_though_nothing_follows(settings: Settings) -> None:
    """Capture is off, and its last cuts are older than what a compaction leaves alone."""
    feed = Seen(replace(settings, min_compaction_lag_ms=0))
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS, TAGS], None)
    position = drain(reader, first.version)[-1].position
    reader.close()
    feed.cut((ITEMS, 1, 11), (TAGS, 1, 1))
    last = feed.cut((ITEMS, 2, 20))
    reader = feed.log.reader([ITEMS, TAGS], position)
    expected = {(ITEMS, b'{"id":1}'): 11, (ITEMS, b'{"id":2}'): 20, (TAGS, b'{"id":1}'): 1}
    assert rows(drain(reader, last.version)) == expected
    reader.close()


def test_a_table_nobody_captures_is_named(feed: Feed) -> None:
    feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader(["public.nothing"], None)
    with pytest.raises(Misconfigured, match=r"public\.nothing"):
        reader.poll(0.1)
    reader.close()


# S13: there is no order between topics


def published_late(feed: Feed, monkeypatch: pytest.MonkeyPatch, late: Callable[[], None]) -> None:
    """Call `late` when a reader has looked for a schema in vain, twice."""
    schemas_from, looks = Log.schemas_from, itertools.count(1)

    def look(log: Log, start: int) -> Any:
        found = schemas_from(log, start)
        if next(looks) == 2:
            late()
        return found

    monkeypatch.setattr(Log, "schemas_from", look)


def test_s13_a_record_that_comes_before_its_schema_waits_for_it(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never an error, never the newest that there is. The topic is read on from where it was read to: it grows for ever."""
    read: list[bytes] = []
    decode = codec.decode_schema
    monkeypatch.setattr(codec, "decode_schema", lambda value: read.append(value) or decode(value))
    feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    feed.version = 2
    sealed = feed.cut((ITEMS, 2, 20))
    wider = TableSchema(ITEMS, 2, (Column("id", "integer"), Column("n", "bigint")), ("id",))

    def publish() -> None:
        feed.writer.schema(wider)
        feed.seal()

    published_late(feed, monkeypatch, publish)
    batches = drain(reader, sealed.version)
    reader.close()
    assert [change.schema for batch in batches for change in batch.changes] == [1, 2]
    assert batches[-1].schemas[ITEMS, 2] == wider
    assert len(read) == len(set(read)) == 3  # TAGS too


def test_s13_a_schema_that_never_comes_is_waited_for_and_then_said(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where reading what is there takes longer than that."""
    monkeypatch.setattr("headrace.log.values._SCHEMA_SECONDS", 0.0)
    sealed = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    drain(reader, sealed.version)
    feed.version = 2
    feed.cut((ITEMS, 2, 20))
    with pytest.raises(Transient) as caught:
        drain(reader, Version(1, feed.lsn))
    reader.close()
    assert caught.value.code == "schema-not-there"
    assert f"Version 2 of {ITEMS}" in caught.value.message
