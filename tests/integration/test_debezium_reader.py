"""How a Debezium feed is read: batches, topics that go, partitions that are added, and views that were away."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import closing
from dataclasses import replace

import pytest

from headrace.consumer import ALL, Batch
from headrace.errors import Misconfigured, Refused, Transient
from headrace.log import FeedReader, Log, Reader
from headrace.log.tail import Tail
from headrace.log.topics import Topics
from headrace.settings import Settings
from headrace_capture.recovery import recover
from tests.fixtures.capture import eventually, prepare, refused
from tests.fixtures.fed import ITEMS, writing
from tests.fixtures.feed import add_partition


def read(reader: FeedReader | Reader, records: int) -> list[Batch]:
    """Poll until so many records are read, all of them shown."""
    batches: list[Batch] = []
    (topic,) = reader.position.offsets

    def is_there() -> bool:
        batches.extend(filter(None, [reader.poll(0.2)]))
        return bool(batches) and batches[-1].complete and sum(batches[-1].position.offsets[topic]) == records

    eventually(f"{records} records are read", is_there)
    return batches


@pytest.fixture
def items(fed: Settings) -> Settings:
    """A feed of items whose readers take one record or two at once."""
    Log(fed).ensure_table("public.items")
    writing(fed)("public.items", 1, {"id": 1}, 10)
    return replace(fed, batch_records=1)


def test_a_delete_is_told_once_wherever_a_batch_ends(items: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record comes by itself here, the tombstone too: a position behind it is handed out at once."""
    alone = lambda tail, wait, _most: [found] if (found := tail._consumer.poll(wait)) is not None else []  # noqa: E731
    monkeypatch.setattr(Tail, "poll", alone)
    monkeypatch.setattr("headrace.log.feed._STILL_SECONDS", 3600.0)
    with closing(Log(items).reader(["public.items"], None)) as reader:
        read(reader, 1)
        for id_, row in ((1, None), (3, {"id": 3}), (2, None)):
            writing(items)("public.items", id_, row, 20)
        told = [change.key for batch in read(reader, 6) for change in batch.changes]
    assert told == [b'{"id":1}', b'{"id":3}', b'{"id":2}']


def test_a_topic_that_goes_while_it_is_looked_at_ends_no_load(items: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its name and its facts: what has read nothing yet has no state, what reads goes on."""
    describe, gone = Topics.describe, iter([True, False, True])

    def going(topics: Topics, names: Collection[str]) -> dict[str, tuple[str, int]]:
        if next(gone, False):
            raise Misconfigured("topic-missing", "It is gone.", "")
        return describe(topics, names)

    monkeypatch.setattr(Topics, "describe", going)
    with pytest.raises(Transient, match="gone"):
        Log(items).reader(ALL, None)
    monkeypatch.setattr("headrace.log.feed._TOPICS_SECONDS", 0.0)
    with closing(Log(items).reader(ALL, None)) as reader:
        assert [change.row for batch in read(reader, 1) for change in batch.changes] == [{"id": 1}]
    assert next(gone, None) is None


def test_a_topic_that_is_gone_is_the_connectors(items: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither capture nor `resnapshot --recover` makes it."""
    monkeypatch.setattr("headrace.log.feed._ENDS_SECONDS", 0.0)
    with closing(Log(items).reader(["public.items"], None)) as reader:
        position = read(reader, 1)[-1].position
        Log(items).topics.delete([Log(items).topic_of("public.items")], wait=True)
        for again in (lambda: reader.poll(0.1), reader.lag, lambda: Log(items).reader(["public.items"], position)):
            with pytest.raises(Misconfigured) as caught:
                again()
            assert caught.value.code == "topic-missing"
            assert "another topic.prefix" in caught.value.remedy
            assert "--recover" not in caught.value.remedy


def test_capture_does_not_take_the_topics_of_a_feed_over(items: Settings) -> None:
    """Neither does recovery, which cannot tell what their records are: nothing is written, and it is said whose they may be."""
    writing(items)("public.items", 1, None, 20)
    ends = Log(items).ends("public.items")
    own = replace(items, feed="headrace")
    prepare(own, ITEMS)
    error = refused(own)
    assert (error.code, "HEADRACE_SOURCE" in error.remedy) == ("topic-of-another-writer", True)
    with pytest.raises(Misconfigured, match=Log(own).topic_of("public.items")) as caught:
        recover(own, lambda _: None)
    assert caught.value.code == error.code
    assert Log(items).ends("public.items") == ends


def test_s9_a_partition_that_is_added_is_refused(items: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it is newer than what the others have of the same keys."""
    monkeypatch.setattr("headrace.log.feed._TOPICS_SECONDS", 0.0)
    topics, topic = Log(items).topics, Log(items).topic_of("public.items")
    topics.configure({topic: {"delete.retention.ms": "3600000"}})
    eventually("it is known", lambda: topics.in_force([topic], items).delete_retention_ms == 3_600_000)
    with closing(Log(items).reader(["public.items"], None)) as reader:
        position = read(reader, 1)[-1].position
        assert position.retention == 3_600_000, "as it is told of the topic"
        add_partition(items, topic)
        with pytest.raises(Misconfigured, match="has 2 partitions") as error:
            reader.poll(0.1)
    assert error.value.code == "partitions-changed"
    with pytest.raises(Misconfigured, match="has 2 partitions"):
        Log(items).reader(["public.items"], position)


def test_s19_what_a_view_has_not_read_grows_too_old_also_while_it_reads(
    items: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long nothing came, it has missed nothing."""
    now, long, passed = time.time, items.delete_retention_ms / 1000 + 3600, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + sum(passed))
    with closing(Log(items).reader(["public.items"], None)) as reader:
        read(reader, 1)
        passed.append(long)
        assert reader.poll(0.1) is None
        for id_ in range(2, 8):
            writing(items)("public.items", id_, {"id": id_}, 20)
        eventually("it reads on", lambda: reader.poll(0.2))
        passed.append(long)
        assert reader.lag().seconds > long
        with pytest.raises(Refused) as error:
            reader.poll(0.1)
    assert error.value.code == "away-too-long"
