"""The log against a real broker: cuts, checkpoints, and the reader that aligns to them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import ANY

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from headrace import codec, parked
from headrace.change import Checkpoint, Column, Position, TableSchema, Version
from headrace.consumer import ALL, Batch
from headrace.errors import HeadraceError, Misconfigured, Refused, Transient
from headrace.log import Log, Reader, kafka, tail
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import ANSWERS, CONTROL, PARKED, checkpoints_topic, table_of, topic_of
from headrace.settings import Settings
from tests.fixtures.capture import PATIENCE, eventually
from tests.fixtures.feed import ITEMS, SOURCE, TAGS, Feed, add_partition
from tests.fixtures.removed import delete_records


def drain(reader: Reader, until: Version, seconds: float = PATIENCE) -> list[Batch]:
    """Poll until a batch completes `until` exactly."""
    batches: list[Batch] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        batch = reader.poll(0.2)
        if batch is not None:
            batches.append(batch)
            if batch.complete and batch.position.version == until:
                return batches
    raise AssertionError(f"not at {until} in {seconds} s; the last of {len(batches)} batches: {batches[-1:]}")


def rows(batches: list[Batch]) -> dict[tuple[str, bytes], int]:
    """Replay batches linearly: (table, key) to n."""
    state: dict[tuple[str, bytes], int] = {}
    for batch in batches:
        for change in batch.changes:
            state.pop((change.table, change.key), None)
            if change.row is not None:
                state[change.table, change.key] = change.row["n"]
    return state


class Seen(Feed):
    """What it has sealed can be read: Kafka says that it will commit, and then does."""

    def seal(self, *, partial: tuple[int, int] | None = None, inexact: tuple[str, ...] = ()) -> Checkpoint:
        sealed = super().seal(partial=partial, inexact=inexact)
        said = (sealed.version, sealed.partial)
        eventually("it is seen", lambda: (c := self.log.newest_checkpoint()) and (c.version, c.partial) == said)
        return sealed


@pytest.fixture
def feed(settings: Settings) -> Feed:
    return Seen(settings)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"min_compaction_lag_ms": 2**63}, "min.compaction.lag.ms.*INVALID_CONFIG"),
        ({"partitions": 10_001}, "POLICY_VIOLATION"),
    ],
)
def test_a_topic_that_the_broker_will_never_make_so_is_not_asked_for_for_ever(
    settings: Settings, how: dict[str, Any], said: str
) -> None:
    """As a managed one refuses what is larger than it allows, in its own words."""
    with pytest.raises(Misconfigured, match=said) as caught:
        Log(replace(settings, **how)).ensure_table(ITEMS)
    assert caught.value.code == "kafka-refuses"
    assert "lower HEADRACE_MESSAGE_MAX_BYTES" in caught.value.remedy
    assert Log(settings).topics.names() & {topic_of(settings.source, ITEMS)} == set()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KafkaError.POLICY_VIOLATION, "kafka-refuses"),
        (KafkaError.INVALID_CONFIG, "kafka-refuses"),
        (KafkaError.INVALID_PARTITIONS, "kafka-refuses"),
        (KafkaError.INVALID_REPLICATION_FACTOR, "kafka-away"),  # brokers may yet come
        (KafkaError.THROTTLING_QUOTA_EXCEEDED, "kafka-away"),
    ],
)
def test_what_may_pass_is_tried_again_and_what_never_will_is_not(error: int, code: str) -> None:
    told = kafka.translate(KafkaError(error), "making a topic")
    assert (told.code, isinstance(told, Misconfigured)) == (code, code == "kafka-refuses")


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


def test_topics_are_made_as_the_settings_say_and_follow_them(feed: Feed, settings: Settings) -> None:
    """Read back from the broker: compacted, tombstones kept for seven days, the broker's own timestamps."""
    sealed, topic = feed.cut((ITEMS, 1, 10)), feed.log.topic_of(ITEMS)
    made = config_of(settings, topic)
    assert (made["cleanup.policy"], made["message.timestamp.type"]) == ("compact", "LogAppendTime")
    assert int(made["delete.retention.ms"]) == settings.delete_retention_ms == 7 * 86_400_000
    assert int(made["min.compaction.lag.ms"]) == settings.min_compaction_lag_ms
    assert int(made["max.message.bytes"]) > settings.message_max_bytes
    assert feed.log.partitions([topic]) == {topic: settings.partitions}
    spine = config_of(settings, checkpoints_topic(settings.source))
    assert (spine["cleanup.policy"], spine["message.timestamp.type"]) == ("compact", "LogAppendTime")
    assert config_of(settings, ANSWERS)["message.timestamp.type"] == "LogAppendTime"
    assert spine["delete.retention.ms"] == "60000"  # each cut leaves a tombstone, and capture reads them when it starts
    small = [
        config_of(settings, name)["segment.bytes"] for name in (checkpoints_topic(settings.source), CONTROL, PARKED)
    ]
    assert small == [str(16 * 1024 * 1024)] * 3  # read from their beginning
    assert feed.log.configure(sealed) == []
    longer = Log(replace(settings, delete_retention_ms=8 * 86_400_000))
    altered = [topic, feed.log.topic_of(TAGS)]
    assert sorted(longer.configure(sealed)) == sorted(
        f"{name}: delete.retention.ms is now 691200000" for name in altered
    )
    assert [config_of(settings, name)["delete.retention.ms"] for name in altered] == ["691200000"] * 2
    assert config_of(settings, topic) == made | {"delete.retention.ms": "691200000"}


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


def config_of(settings: Settings, topic: str) -> dict[str, str]:
    """Return a topic's configuration as the broker has it."""
    asked = ConfigResource(ResourceType.TOPIC, topic)
    admin = AdminClient({"bootstrap.servers": settings.kafka})
    found = admin.describe_configs([asked])[asked].result(30)
    return {name: entry.value for name, entry in found.items()}


@pytest.mark.parametrize(("said", "asked"), [(0, -1), (1, 1)])  # -1 is Kafka's word for the broker's own
def test_the_broker_says_how_many_copies_a_topic_has_unless_the_settings_do(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, said: int, asked: int
) -> None:
    assert Settings().replication == 0
    made: list[NewTopic] = []
    create = AdminClient.create_topics

    def noted(client: AdminClient, new: list[NewTopic], **how: Any) -> Any:
        made.extend(new)
        return create(client, new, **how)

    monkeypatch.setattr(AdminClient, "create_topics", noted)
    log = Log(replace(settings, replication=said))
    log.ensure_spine()
    assert {topic.replication_factor for topic in made} == {asked}
    assert checkpoints_topic(settings.source) in log.topics.names()


def configured(log: Log, topic: str, key: str) -> Any:
    client = kafka.admin(log.settings)
    (future,) = client.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
    return future.result()[key].value


def test_a_topic_that_was_there_before_is_compacted_from_the_beginning(settings: Settings) -> None:
    """A broker makes the topics that somebody asks for, and lets their records go after a week."""
    log = Log(settings)
    topic = topic_of(settings.source, "public.items")
    for name in (topic, checkpoints_topic(settings.source)):
        log.topics.make({name: (1, {"cleanup.policy": "delete"})})
    log.ensure_spine()
    log.configure(None)
    log.ensure_table("public.items")
    for name in (
        topic,
        checkpoints_topic(settings.source),
    ):  # a broker learns of it from its controller, a moment later
        eventually("it is compacted", lambda name=name: configured(log, name, "cleanup.policy") == "compact")


def test_the_limits_of_the_shared_topics_are_those_of_the_source_with_the_largest_rows(settings: Settings) -> None:
    for megabytes, least in ((30, 30), (40, 40), (30, 40)):
        log = Log(replace(settings, message_max_bytes=megabytes * 1024 * 1024))
        log.ensure_spine()
        log.configure(None)

        def limit(log: Log = log) -> int:
            return int(configured(log, "headrace.parked", "max.message.bytes"))

        eventually("it is raised", lambda least=least: limit() >= least * 1024 * 1024)
    assert limit() >= 40 * 1024 * 1024


def test_a_record_of_any_size_that_the_settings_allow_can_be_sent(settings: Settings) -> None:
    """Else `produce` says that the queue is full for ever."""
    producer = kafka.producer(replace(settings, message_max_bytes=200_000_000))
    producer.produce("t", b"x" * 140_000_000)
    producer.purge()


def test_several_may_make_the_topics_at_once(settings: Settings) -> None:
    """Capture and consumers start together: whoever is told that a topic exists may not see it yet."""
    logs = [Log(settings) for _ in range(8)]
    with ThreadPoolExecutor(len(logs)) as threads:
        assert list(threads.map(lambda log: log.ensure_spine(), logs)) == [None] * len(logs)
    assert checkpoints_topic(settings.source) in logs[0].topics.names()


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


def test_a_table_nobody_captures_is_named(feed: Feed) -> None:
    feed.cut((ITEMS, 1, 10))
    reader = feed.log.reader(["public.nothing"], None)
    with pytest.raises(Misconfigured, match=r"public\.nothing"):
        reader.poll(0.1)
    reader.close()


# S9: the partition count never changes


def test_s9_more_partitions_than_the_checkpoint_knows_are_refused_by_who_writes_and_who_reads(
    feed: Feed, settings: Settings
) -> None:
    feed.cut((ITEMS, 1, 10))
    add_partition(settings, feed.log.topic_of(ITEMS))
    with pytest.raises(Misconfigured) as caught:
        feed.open()
    assert caught.value.code == "partitions-changed"
    with pytest.raises(Misconfigured) as caught:
        feed.log.reader([ITEMS], None)
    assert caught.value.code == "partitions-changed"


def test_s9_a_partition_that_is_added_while_a_cut_is_written_is_refused_and_nothing_is_committed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a topic with several: one that had a single partition is written to that one until the next start."""
    feed = Seen(replace(settings, partitions=2))
    feed.cut((ITEMS, 1, 10))
    often = {"topic.metadata.refresh.interval.ms": 50}  # by itself a producer looks every five minutes
    monkeypatch.setattr(kafka, "producer", partial(kafka.producer, **often))
    feed.open()
    sealed = [feed.cut((ITEMS, 1, 10))]
    add_partition(settings, feed.log.topic_of(ITEMS))

    def write() -> None:
        for cut in itertools.count(1):
            sealed[0] = feed.cut(*((ITEMS, 10 * cut + n, n) for n in range(10)))

    with pytest.raises(Misconfigured) as caught:
        write()
    assert caught.value.code == "partitions-changed"
    with pytest.raises(Misconfigured):  # whoever goes on commits nothing either
        feed.seal()
    newest = feed.log.newest_checkpoint()
    assert newest
    assert newest.version == sealed[0].version


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
