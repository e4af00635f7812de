"""A view that a reader refuses: its position makes no sense, or tombstones may be gone (S19)."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from headrace import codec
from headrace.change import Position, Version
from headrace.errors import Misconfigured, Refused
from headrace.log import Reader
from headrace.log.topics import checkpoints_topic, table_of, topic_of
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.drained import Seen, configured, drain, rows
from tests.fixtures.feed import ITEMS, SOURCE, TAGS, Feed
from tests.fixtures.removed import delete_records


@pytest.fixture
def feed(settings: Settings) -> Feed:
    return Seen(settings)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda p: replace(p, source=replace(SOURCE, slot="other")), "position-of-another-source"),
        (lambda p: replace(p, version=Version(1, 10**9)), "position-ahead"),
        (lambda p: replace(p, appended=1), "away-too-long"),
        # The setting was raised since: tombstones that were gone by then are.
        (lambda p: replace(p, appended=p.appended - 7_200_000, retention=3_600_000), "away-too-long"),
        (lambda p: replace(p, topics=dict.fromkeys(p.topics, "other")), "topic-replaced"),
        (lambda p: replace(p, offsets=further(p.offsets)), "position-ahead"),
        (
            lambda p: replace(p, offsets=of_another(p.offsets), topics=of_another(p.topics)),
            "position-of-another-source",
        ),
    ],
)
def test_a_position_that_makes_no_sense_is_refused(feed: Feed, spoil: object, code: str) -> None:
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    position: Position = drain(reader, first.version)[-1].position
    reader.close()
    feed.cut((ITEMS, 2, 20))
    with pytest.raises(Refused) as caught:
        feed.log.reader([ITEMS], spoil(position))  # type: ignore[operator]
    assert caught.value.code == code


def test_a_log_that_lost_its_end_and_has_grown_past_the_view_is_not_the_views(feed: Feed) -> None:
    """Kafka lost the state that the view is at; what stands below the view's offsets by now it has never read."""
    feed.cut((ITEMS, 1, 10))
    second = feed.cut((ITEMS, 2, 20))
    reader = feed.log.reader([ITEMS], None)
    position = drain(reader, second.version)[-1].position
    reader.close()
    feed.cut((ITEMS, 3, 30))
    feed.cut((ITEMS, 4, 40))
    feed.log.reader([ITEMS], position).close()
    amid = {topic: [at + 1 for at in offsets] for topic, offsets in position.offsets.items()}
    amid_next = replace(position, offsets=amid, appended=position.appended - 1)  # the state was written again since
    feed.log.reader([ITEMS], amid_next).close()
    feed.log.reader([ITEMS], amid_next, until=position.version).close()
    lost = replace(position, version=position.version._replace(lsn=second.version.lsn - 1))
    with pytest.raises(Refused, match="has lost the state") as caught:
        feed.log.reader([ITEMS], lost)
    assert caught.value.code == "position-ahead"
    feed.log.reader([ITEMS], replace(position, version=Version(1, 1))).close()  # older than all that is kept


def test_a_recovery_under_a_running_view_whose_state_was_lost_is_noticed(feed: Feed) -> None:
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    drain(reader, first.version)
    lost = first.version._replace(lsn=first.version.lsn + 5)
    reader.position, reader._newest = replace(reader.position, version=lost), replace(first, version=lost)
    feed.epoch = 2
    feed.cut((ITEMS, 2, 20))
    with pytest.raises(Refused, match="has lost the state"):
        drain(reader, Version(2, feed.lsn))
    reader.close()


def further(offsets: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return offsets beyond the log's end."""
    return {topic: [at + 100 for at in each] for topic, each in offsets.items()}


def test_who_believes_that_the_topics_keep_more_than_they_do_goes_by_what_they_keep(feed: Feed) -> None:
    """Capture has another environment, or has not begun yet with the new settings."""
    first, topic = feed.cut((ITEMS, 1, 10)), feed.log.topic_of(ITEMS)
    feed.log.topics.configure({topic: {"delete.retention.ms": "3600000", "min.compaction.lag.ms": "1000"}})
    eventually("it is known", lambda: configured(feed.log, topic, "min.compaction.lag.ms") == "1000")
    reader = feed.log.reader([ITEMS, TAGS], None)
    position = drain(reader, first.version)[-1].position
    assert position.retention == 3_600_000
    reader.close()
    feed.cut((ITEMS, 1, 11))
    reader = feed.log.reader([ITEMS], position)
    assert not reader._is_exact(replace(first, appended=position.appended - 10_000))
    reader.close()
    with pytest.raises(Refused, match="2 hours ago"):
        feed.log.reader([ITEMS], replace(position, appended=position.appended - 7_200_000, retention=0))


def of_another(topics: dict[str, Any]) -> dict[str, Any]:
    """Return what a view has of the topics of a source whose name begins as ours does, and goes on."""
    return {topic_of(f"{topic.rsplit('.', 2)[0]}.b", table_of(topic)): value for topic, value in topics.items()}


def test_a_log_begun_under_another_name_of_the_source_is_not_the_views_even_while_it_is_empty(feed: Feed) -> None:
    """HEADRACE_SOURCE changed, and everything else is as it was: server, database, slot, publication, ever higher LSNs."""
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    position = drain(reader, first.version)[-1].position
    reader.close()
    other = Feed(replace(feed.log.settings, source=f"{feed.log.settings.source}.b"))
    for empty in (True, False):
        if not empty:
            other.lsn = feed.lsn
            other.cut((ITEMS, 2, 20))
        with pytest.raises(Refused) as caught:
            other.log.reader([ITEMS], position)
        assert caught.value.code == "position-of-another-source"


def test_a_view_that_was_away_for_long_and_lacks_nothing_is_not_refused(feed: Feed) -> None:
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    position = drain(reader, first.version)[-1].position
    reader.close()
    reader = feed.log.reader([ITEMS], replace(position, appended=1))
    second = feed.cut((ITEMS, 2, 20))
    assert rows(drain(reader, second.version)) == {(ITEMS, b'{"id":2}'): 20}
    reader.close()


def test_what_a_view_has_not_read_grows_too_old_also_while_it_reads(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S19: it was opened in time, and its backlog takes longer. Where only other tables were written it has missed nothing."""
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    position = codec.encode_position(drain(reader, first.version)[-1].position)
    reader.close()
    other = feed.cut((TAGS, 1, 1))
    quiet = feed.log.reader([ITEMS], replace(codec.decode_position(position), appended=1))
    drain(quiet, other.version)
    hours = feed.log.settings.delete_retention_ms // 3_600_000
    last = feed.cut((ITEMS, 1, None))
    assert rows(drain(quiet, last.version)) == {}
    quiet.close()
    in_time = int(time.time() * 1000) - (hours - 1) * 3_600_000
    reader = feed.log.reader([ITEMS], replace(codec.decode_position(position), appended=in_time))
    now = time.time
    monkeypatch.setattr("headrace.log.reader.time.time", lambda: now() + 2 * 3600)
    with pytest.raises(Refused) as caught:
        drain(reader, last.version)
    assert caught.value.code == "away-too-long"
    reader.close()


def test_a_view_that_stood_still_at_the_head_is_refused_where_tombstones_may_be_gone(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S19: its process was stopped, or cut off from Kafka. One that lacked nothing until just now goes on."""
    first = feed.cut((ITEMS, 1, 10), (TAGS, 1, 1))
    stood, polled, other = (feed.log.reader([table], None) for table in (ITEMS, ITEMS, TAGS))
    for reader in (stood, polled, other):
        drain(reader, first.version)

        def at_end(reader: Reader = reader) -> bool:
            return reader.poll(0.1) is None and reader._at_end >= reader._read_to.keys()

        eventually("it has read the marker too", at_end)
    later, now = feed.log.settings.delete_retention_ms / 1000 + 3600, time.time
    monkeypatch.setattr("headrace.log.reader.time.time", lambda: now() + later)
    assert polled.poll(0.1) is None
    last = feed.cut((ITEMS, 1, None))
    assert rows(drain(polled, last.version)) == {}
    monkeypatch.setattr(other, "_note_fed", lambda: None)  # it was stopped within a poll
    drain(other, last.version)
    with pytest.raises(Refused) as caught:
        drain(stood, last.version)
    assert caught.value.code == "away-too-long"
    for reader in (stood, polled, other):
        reader.close()


def test_what_comes_after_a_long_sleep_before_its_state_does_is_not_taken_for_all_there_was(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S19: another broker has the checkpoints, say, and is away for minutes. The delete may have been among what is gone."""
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    drain(reader, first.version)
    later, now = feed.log.settings.delete_retention_ms / 1000 + 3600, time.time
    spine = (checkpoints_topic(feed.log.settings.source), 0)
    reader._tail.pause([spine])
    topic = feed.log.topic_of(ITEMS)
    last = feed.cut((ITEMS, 1, None))
    for minutes in (0, 2):

        def clock(seconds: float = later + minutes * 60) -> float:
            return now() + seconds

        monkeypatch.setattr("headrace.log.reader.time.time", clock)
        eventually(
            "all has come", lambda: reader.poll(0.1) is None and reader._waiting == 2 and (topic, 0) in reader._at_end
        )
    reader._tail.resume([spine])
    with pytest.raises(Refused) as caught:
        drain(reader, last.version)
    assert caught.value.code == "away-too-long"
    reader.close()


def test_half_a_transaction_that_was_there_when_a_view_was_opened_may_lack_its_tombstones(feed: Feed) -> None:
    """S19: capture stopped amid it for longer than they stay. A view that read the half when it came lacks nothing."""
    first = feed.cut((ITEMS, 1, 10), (TAGS, 1, 1))
    running, tags = feed.log.reader([ITEMS], None), feed.log.reader([TAGS], None)
    position, of_tags = (drain(reader, first.version)[-1].position.copy() for reader in (running, tags))
    tags.close()
    feed.put(ITEMS, 1, None)
    feed.seal(partial=(first.version.lsn + 5, 1))
    late = feed.log.reader([ITEMS], replace(position, appended=1))
    other = feed.log.reader([TAGS], replace(of_tags, appended=1))  # the half has nothing for it
    for reader in (running, late, other):

        def at_end(reader: Reader = reader) -> bool:
            return reader.poll(0.1) is None and reader._at_end >= reader._read_to.keys()

        eventually("it has read the half", at_end)
        reader._looked = 0.0
        assert reader.poll(0.1) is None  # and may note that nothing follows
    last = feed.cut((TAGS, 1, 2))
    assert rows(drain(running, last.version)) == {}
    assert rows(drain(other, last.version)) == {(TAGS, b'{"id":1}'): 2}
    with pytest.raises(Refused) as caught:
        drain(late, last.version)
    assert caught.value.code == "away-too-long"
    for reader in (running, late, other):
        reader.close()


def test_a_view_is_held_against_the_first_state_where_there_was_none_when_it_was_opened(feed: Feed) -> None:
    """The checkpoints were lost, and `resnapshot --recover` writes the first of the new ones."""
    first = feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader([ITEMS], None)
    position = drain(reader, first.version)[-1].position
    reader.close()
    spine = checkpoints_topic(feed.log.settings.source)
    feed.log.topics.delete([spine], wait=True)
    feed.log.ensure_spine()
    another = replace(position, source=replace(SOURCE, database="other"))
    ahead = replace(position, version=Version(1, feed.lsn + 1000))
    spoiled = [replace(position, appended=1), another, ahead, replace(position, offsets=further(position.offsets))]
    in_time, *refused = [feed.log.reader([ITEMS], each.copy()) for each in (position, *spoiled)]
    last = feed.cut((ITEMS, 2, 20))
    assert rows(drain(in_time, last.version)) == {(ITEMS, b'{"id":2}'): 20}
    codes = ["away-too-long", "position-of-another-source", "position-ahead", "position-ahead"]
    for reader, code in zip(refused, codes, strict=True):
        with pytest.raises(Refused) as caught:
            drain(reader, last.version)
        assert caught.value.code == code
    for reader in (in_time, *refused):
        reader.close()


def test_a_topic_that_a_recovery_makes_anew_under_a_running_view_is_noticed(feed: Feed) -> None:
    first = feed.cut(*((ITEMS, n, n) for n in range(20)))
    reader = feed.log.reader([ITEMS], None)
    drain(reader, first.version)
    topic = feed.log.topic_of(ITEMS)
    feed.log.topics.delete([topic], wait=True)
    feed.log.ensure_table(ITEMS)
    feed.epoch, feed.writer._ends[topic] = 2, [0]
    feed.cut((ITEMS, 1, 100))
    with pytest.raises(Refused) as caught:
        drain(reader, Version(2, 0))
    assert caught.value.code == "topic-replaced"
    reader.close()


def test_a_view_whose_next_record_is_not_there_any_more_stops(feed: Feed, settings: Settings) -> None:
    """It was tried again: once the log had grown past the view's offset it would have gone on, without what it had missed."""
    first = feed.cut((ITEMS, 1, 1))
    position = drain(feed.log.reader([ITEMS], None), first.version)[-1].position  # type: ignore[arg-type]
    feed.cut((ITEMS, 2, 2))
    last = feed.cut((ITEMS, 3, 3))
    topic = feed.log.topic_of(ITEMS)
    eventually("it is seen", lambda: feed.log.ends(ITEMS) == [6])
    delete_records(settings, topic, 0, 5)
    with pytest.raises(Misconfigured, match=topic) as told:
        drain(feed.log.reader([ITEMS], position), last.version)  # type: ignore[arg-type]
    assert told.value.code == "log-lost-records"
