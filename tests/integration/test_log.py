"""What writes the log, against a real broker: cuts, their checkpoints, and what of them stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import ANY

import pytest

from headrace import codec, parked
from headrace.change import Version
from headrace.errors import HeadraceError, Misconfigured
from headrace.log import tail
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import checkpoints_topic
from headrace.settings import Settings
from tests.fixtures.drained import Seen, drain
from tests.fixtures.feed import ITEMS, SOURCE, TAGS, Feed


@pytest.fixture
def feed(settings: Settings) -> Feed:
    return Seen(settings)


def test_a_checkpoint_names_the_ends_of_its_cut(feed: Feed) -> None:
    sealed = feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20), (TAGS, 1, 1))
    assert sealed.ends == {feed.log.topic_of(ITEMS): [2], feed.log.topic_of(TAGS): [1]}
    again = feed.cut((ITEMS, 1, 11))
    # The commit marker of the first cut takes an offset of its own.
    assert again.ends[feed.log.topic_of(ITEMS)] == [4]
    newest = feed.log.newest_checkpoint()
    assert newest is not None
    assert (newest.version, newest.ends, newest.source) == (again.version, again.ends, SOURCE)
    feed.log.check_ends(newest)


def test_of_what_is_parked_only_the_bodies_of_the_wanted_generation_are_read(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, read = parked.Shelf(feed.log), list[int]()
    for generation in (1, 2):
        shelf.put(parked.Entry("items", generation, ITEMS, '{"id":1}', body={"n": 1}))
    decode = parked._read
    monkeypatch.setattr(parked, "_read", lambda key, value: read.append(key["generation"]) or decode(key, value))
    assert [entry.body for entry in shelf.entries("items", 2, bodies=False)] == [None]
    assert [entry.body for entry in shelf.entries("items", 2)] == [{"n": 1}]
    assert read == [2, 2]


def test_a_predecessor_is_fenced(feed: Feed) -> None:
    feed.cut((ITEMS, 1, 10))
    successor = feed.log.writer()
    successor.open()
    with pytest.raises(HeadraceError) as caught:
        feed.cut((ITEMS, 1, 66))
    assert caught.value.code in {"fenced", "cut-lost"}
    assert [change.row for change in feed.log.scan(ITEMS)] == [{"id": 1, "n": 10}]


def test_old_checkpoints_are_tombstoned_and_never_the_newest(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.log.writer.KEPT_CHECKPOINTS", 3)
    sealed = [feed.cut((ITEMS, 1, n)) for n in range(7)]
    seen = {}
    for record in read_to_end(feed.log.settings, {(checkpoints_topic(feed.log.settings.source), 0): BEGINNING}):
        seen[record.key] = record.value
    live = [key for key, value in seen.items() if value is not None]
    assert codec.encode_checkpoint_key(sealed[-1]) in live
    assert len(live) == 4


def test_half_a_transaction_never_takes_the_place_of_the_state_before_it(feed: Feed) -> None:
    """S16: they have one LSN; under one key compaction would leave a reader without any state until the transaction ends."""
    whole = feed.cut((ITEMS, 1, 10))
    feed.put(ITEMS, 2, 20)
    half = feed.seal(partial=(whole.version.lsn + 5, 1))
    assert codec.encode_checkpoint_key(half) != codec.encode_checkpoint_key(whole)
    assert feed.log.newest_checkpoint() == replace(half, offset=ANY, appended=ANY)
    assert feed.log.newest_checkpoint(complete=True) == replace(whole, offset=ANY, appended=ANY)


def test_with_many_partitions_a_checkpoint_names_what_was_touched_and_readers_know_the_rest(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S16: the hundredth names every topic; here the fourth."""
    monkeypatch.setattr("headrace.log.spine.WHOLE_PARTITIONS", 1)
    monkeypatch.setattr("headrace.log.spine.WHOLE_EVERY", 4)
    reader = feed.log.reader([ITEMS, TAGS], None)
    sealed = []
    for n in range(10):
        sealed.append(feed.cut((ITEMS if n % 3 else TAGS, n, n)))
        if n == 5:
            feed.put(ITEMS, 99, n)
            feed.seal(partial=(feed.lsn + 5, 1))
        if n == 6:
            feed.open()
    records = list(read_to_end(feed.log.settings, {(checkpoints_topic(feed.log.settings.source), 0): BEGINNING}))
    named = [
        codec.loads(record.value)["ends"].keys()
        for record in records
        if record.value and b"partial" not in record.value
    ]
    assert [len(ends) for ends in named] == [2, 1, 1, 2, 2, 1, 2, 2, 1, 2]
    whole = [checkpoint for checkpoint in feed.log.checkpoints() if checkpoint.complete]
    assert [checkpoint.ends for checkpoint in whole] == [checkpoint.ends for checkpoint in sealed]
    assert drain(reader, sealed[-1].version)[-1].position.offsets == sealed[-1].ends
    reader.close()


def test_the_newest_checkpoint_is_not_half_a_transaction_of_long_ago_because_its_base_lies_further_back(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3, S16: halves name every topic, so they are found where the states after them are not."""
    monkeypatch.setattr("headrace.log.spine.WHOLE_PARTITIONS", 1)
    for n in range(61):
        feed.cut((TAGS, n, n))
    for ordinal in range(10):
        feed.put(TAGS, 99, ordinal)
        feed.seal(partial=(feed.lsn + 5, ordinal + 1))
    last = [feed.cut((TAGS, n, n)) for n in range(30)][-1]
    newest = feed.log.newest_checkpoint()
    assert newest is not None
    assert (newest.version, newest.ends, newest.partial) == (last.version, last.ends, None)
    before = feed.log.newest_checkpoint(until=Version(1, last.version.lsn - 5))
    assert before is not None
    assert (before.version, before.partial) == (Version(1, last.version.lsn - 10), None)


def test_with_many_partitions_a_cut_that_moves_no_lsn_names_what_its_predecessor_at_the_same_one_did(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S16: such a cut replaces the base of those that follow: a resnapshot writes rows while Postgres stands still."""
    monkeypatch.setattr("headrace.log.spine.WHOLE_PARTITIONS", 1)
    base = feed.cut((ITEMS, 1, 1), (TAGS, 1, 1))
    feed.put(ITEMS, 2, 2)
    feed.lsn -= 10
    again = feed.seal()
    assert again.version == base.version
    newest = feed.log.newest_checkpoint()
    assert newest is not None
    assert newest.ends == again.ends
    last = feed.cut((TAGS, 2, 2))
    newest = feed.log.newest_checkpoint()
    assert newest is not None
    assert (newest.version, newest.ends) == (last.version, last.ends)


def test_a_log_that_goes_on_below_its_end_is_not_written(feed: Feed) -> None:
    """Kafka lost the end: readers that are there already would never read what is written now."""
    sealed = feed.cut((ITEMS, 1, 1))
    feed.writer.resume(replace(sealed, ends={topic: [end + 10 for end in ends] for topic, ends in sealed.ends.items()}))
    feed.put(ITEMS, 2, 2)
    with pytest.raises(Misconfigured, match="goes on at 2, not at 11") as told:
        feed.seal()
    assert told.value.code == "log-lost-records"


def test_an_end_of_a_partition_that_comes_too_early_is_not_believed(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a leader shows it that was just elected and does not know yet how far its predecessor was."""
    feed.cut((ITEMS, 1, 1))
    early = tail.end_of_partition
    told: list[int] = []

    def too_early(message: Any, *more: Any) -> bool:
        if not told and (message.topic(), message.offset()) == (place[0], 0):
            told.append(message.offset())
            return True
        return early(message, *more)  # type: ignore[no-any-return]

    place = feed.log.topic_of(ITEMS), 0
    monkeypatch.setattr(tail, "end_of_partition", too_early)
    feed.put(ITEMS, 2, 2)
    feed.put(ITEMS, 3, 3)
    feed.seal()
    found = [record.offset for record in read_to_end(settings, {place: BEGINNING})]
    assert told == [0]
    assert found == [2, 3]
