"""The writer of cuts against a real broker: a commit whose outcome is unknown, and where keys are placed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import pytest
from confluent_kafka import KafkaException, Message

from headrace.errors import Misconfigured, Transient
from headrace.log import Log, kafka
from headrace.log.kafka import partition_of
from headrace.log.tail import BEGINNING, Tail, read_to_end
from headrace.log.transaction import TransactionWriter
from headrace.settings import Settings
from headrace_ops.kafka import Kafka
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, Feed


class Interrupted:
    """A real producer; the first commits are not answered in time, though the broker gets to them at last."""

    def __init__(self, feed: Feed, kafka: Kafka, times: int) -> None:
        self.raised: list[KafkaException] = []
        self.asked = 0
        self._producer: Any = feed.writer._producer
        self._feed = feed
        self._kafka = kafka
        self._times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def commit_transaction(self, timeout: float) -> None:
        self.asked += 1
        if self.asked > self._times:
            self._producer.commit_transaction(timeout)
            return
        self._producer.flush()  # of the checkpoint, too: nothing but the commit itself is not answered
        self._kafka.pause()
        eventually("it stands still", lambda: not self._kafka.healthy())
        try:
            self._producer.commit_transaction(1.0)
        except KafkaException as error:
            self.raised.append(error)
            raise
        finally:
            if self.asked == self._times:
                self._kafka.resume()
                eventually(
                    "it lands", lambda: [change for change in self._feed.log.scan(ITEMS) if change.row == NEW], 30
                )

    def abort_transaction(self, _timeout: float) -> NoReturn:
        raise AssertionError("a cut that may be in the log is aborted")


NEW = {"id": 1, "n": 11}


@pytest.mark.parametrize("times", [1, 2])
def test_s3_a_commit_of_unknown_outcome_is_asked_for_again_and_never_aborted(
    settings: Settings, kafka: Kafka, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """The broker stands still, once or twice, for longer than is waited; it has committed before it is asked again."""
    feed = Feed(settings)
    first = feed.cut((ITEMS, 1, 10))
    interrupted = Interrupted(feed, kafka, times)
    monkeypatch.setattr(feed.writer, "_producer", interrupted)
    second = feed.cut((ITEMS, 1, 11))
    third = feed.cut((ITEMS, 1, 12))
    assert [error.args[0].retriable() for error in interrupted.raised] == [True] * times
    assert interrupted.asked == times + 2
    eventually("the last is seen", lambda: (n := feed.log.newest_checkpoint()) and n.version == third.version)
    assert [change.row for change in feed.log.scan(ITEMS)] == [{"id": 1, "n": n} for n in (10, 11, 12)]
    sealed = {checkpoint.version: checkpoint.ends for checkpoint in feed.log.checkpoints()}
    assert sealed == {checkpoint.version: checkpoint.ends for checkpoint in (first, second, third)}
    feed.log.check_ends(third)


def test_a_broker_that_allows_no_transaction_so_long_says_what_to_set(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of capture's writer and of a derived stream's."""
    make = kafka.producer
    longer = {"transaction.timeout.ms": 1_000_000}  # than this broker allows
    monkeypatch.setattr(kafka, "producer", lambda settings, **more: make(settings, **more | longer))
    for opening in (Log(settings).writer().open, partial(TransactionWriter, settings, settings.source)):
        with pytest.raises(Misconfigured, match=r"timeout\.ms=900000") as refused:
            opening()
        assert refused.value.code == "transaction-timeout"


class Taken:
    """What librdkafka says of a record that it sent twice: no error, and no offset."""

    @staticmethod
    def error() -> None:
        return None

    @staticmethod
    def offset() -> None:
        return None


def first_is_lost(message: Message) -> bool:
    """Whether it is the first record of a partition: a broker loses that one at least (seen: new topics, two requests on their way)."""
    return lost(message) or message.offset() == 0  # type: ignore[no-any-return]


lost = kafka.lost


@pytest.mark.parametrize("partitions", [1, 3])
def test_a_cut_of_which_a_record_is_lost_is_not_committed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, partitions: int
) -> None:
    """Of a topic with one partition only the first record and the last have a report."""
    assert lost(Taken())
    feed = Feed(replace(settings, partitions=partitions))
    feed.seal()
    with monkeypatch.context() as patched:
        patched.setattr(kafka, "lost", first_is_lost)
        for number in range(600):  # more than one bunch
            feed.put(ITEMS, number, number)
        with pytest.raises(Transient, match=feed.log.topic_of(ITEMS)) as told:
            feed.seal()
    assert told.value.code == "cut-lost"
    feed.writer.abort()
    feed.open()
    feed.cut((ITEMS, 1, 10))
    feed.open()  # it is answered when all of it is seen
    assert [change.row for change in feed.log.scan(ITEMS)] == [{"id": 1, "n": 10}]


def test_a_transaction_of_which_a_record_is_lost_is_not_committed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = Feed(settings).log.topic_of(ITEMS)
    writer = TransactionWriter(settings, settings.source)
    with monkeypatch.context() as patched:
        patched.setattr(kafka, "lost", first_is_lost)
        writer.write(topic, b"1", b"lost")
        writer.write(topic, b"2", b"there")
        with pytest.raises(Transient, match=topic) as told:
            writer.commit()
    assert told.value.code == "records-lost"
    writer = TransactionWriter(settings, settings.source)
    writer.write(topic, b"1", b"there")
    writer.commit()
    place = topic, 0
    records = list(
        read_to_end(settings, {place: BEGINNING}, {place: 4})
    )  # behind two records that do not count and their marker
    assert [(record.key, record.value) for record in records] == [(b"1", b"there")]


def test_no_record_of_a_new_topic_is_lost(settings: Settings) -> None:
    """*(seen)* With several requests on their way to a broker about one in some thousand topics lacked its first rows."""
    feed = Feed(settings)
    tables = [f"public.t{number}" for number in range(100)]
    feed.writer.add_topic(*feed.log.ensure_tables(tables))
    for number in range(3):
        for table in tables:
            feed.put(table, number, number)
    ends = feed.seal().ends
    assert {table: ends[feed.log.topic_of(table)] for table in tables} == {table: [3] for table in tables}


MURMUR2 = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}
"""What Kafka's own test of `Utils.murmur2` says."""


def test_a_key_is_in_the_partition_where_every_java_client_looks_for_it(settings: Settings) -> None:
    partitions = 7
    feed = Feed(replace(settings, partitions=partitions))
    topic = feed.log.topic_of(ITEMS)
    keys = (*MURMUR2, b"", b"\xff" * 6)
    for key in keys:
        feed.writer.produce(topic, key, b"{}", [])
    feed.seal()
    starts = {(topic, partition): BEGINNING for partition in range(partitions)}
    placed = {record.key: record.partition for record in read_to_end(settings, starts)}
    assert placed == {key: partition_of(key, partitions) for key in keys}
    assert placed.items() >= {(key, (hashed & 0x7FFFFFFF) % partitions) for key, hashed in MURMUR2.items()}


def test_what_was_committed_is_read_to_its_end_though_its_marker_comes_late(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit is answered before; until then the partition ends earlier: a TRUNCATE would leave rows (S11), a snapshot delete some."""
    feed = Feed(settings)
    place = feed.log.topic_of(ITEMS), 0
    for number in range(3):
        feed.put(ITEMS, number, number)
    poll = Tail.poll

    def late(tail: Tail, *how: Any) -> list[Message]:
        found = poll(tail, *how)
        if feed.writer.opened_at and any(message.error() for message in found):
            feed.seal()
        return found

    monkeypatch.setattr(Tail, "poll", late)
    assert len(list(read_to_end(settings, {place: BEGINNING}, {place: 3}))) == 3


def test_nothing_is_read_beyond_the_end_that_there_was(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be half of a transaction: what comes meanwhile is read with what came before, and bunches are cut anywhere."""
    feed = Feed(settings)
    place = feed.log.topic_of(ITEMS), 0
    feed.put(ITEMS, 1, 1)
    feed.seal()
    eventually("it is seen", lambda: feed.log.ends(ITEMS) == [2])
    end = Tail._end

    def then_more(tail: Tail, where: tuple[str, int]) -> int:
        was = end(tail, where)
        for number in range(2, 4):
            feed.put(ITEMS, number, number)
        feed.seal()
        return was

    monkeypatch.setattr(Tail, "_end", then_more)
    assert len(list(read_to_end(settings, {place: BEGINNING}))) == 1
