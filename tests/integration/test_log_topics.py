"""The topics of the log: how they are made, and that their partitions stay (S9)."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from confluent_kafka import KafkaError
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from headrace.errors import Misconfigured
from headrace.log import Log, kafka
from headrace.log.topics import ANSWERS, CONTROL, PARKED, checkpoints_topic, topic_of
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.drained import Seen, configured
from tests.fixtures.feed import ITEMS, TAGS, Feed, add_partition


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
    for name in altered:
        eventually("it is altered", lambda name=name: config_of(settings, name)["delete.retention.ms"] == "691200000")
    assert config_of(settings, topic) == made | {"delete.retention.ms": "691200000"}


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
