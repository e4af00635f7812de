"""Topics: their names, their configuration, and where they end.

Partition count, key columns and key format of a table's topic never change under it (S9).
"""

from __future__ import annotations

import re
import string
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

from confluent_kafka import IsolationLevel, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from headrace.errors import Misconfigured
from headrace.log.kafka import LEADER_IS_LATE, TIMEOUT, Admin
from headrace.settings import Settings

CONTROL = "headrace.control"
ANSWERS = "headrace.answers"
PARKED = "headrace.parked"

_BUNCH = 500
"""Partitions that are made by one request: a broker makes none of 10,000, and is to answer in time."""
_MARKER_SECONDS = 5.0
_PLAIN = frozenset(string.ascii_letters + string.digits + "-_")
_ESCAPE = re.compile(r"_u([0-9A-F]{4,6})_")
_LIKE_ONE = re.compile(r"_(?=u[0-9A-F]{4,6}([^0-9A-F]))")
Ends = dict[str, list[int]]


def topic_of(source: str, table: str) -> str:
    """Return the topic of a table: ``topic_of("shop", "public.products")`` is ``shop.public.products``."""
    schema, _, name = table.partition(".")
    return f"{source}.{escape(schema)}.{escape(name)}"


def table_of(topic: str) -> str:
    """Undo `topic_of`."""
    _, schema, name = topic.rsplit(".", 2)
    return f"{_unescape(schema)}.{_unescape(name)}"


def checkpoints_topic(source: str) -> str:
    """Return the topic of a source's checkpoints."""
    return f"{source}.checkpoints"


def schemas_topic(source: str) -> str:
    """Return the topic of a source's schema versions."""
    return f"{source}.schemas"


def escape(name: str, plain: frozenset[str] = _PLAIN) -> str:
    """Return `name` with every character that is not in `plain` as its code point; no two names become one."""
    # What looks escaped already, or would when the next character is, has its underscore escaped: two names never share a topic.
    looks = {match.start() for match in _LIKE_ONE.finditer(name) if match[1] == "_" or match[1] not in plain}
    return "".join(c if c in plain and at not in looks else f"_u{ord(c):04X}_" for at, c in enumerate(name))


def _unescape(name: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), name)


def partitions_changed(topic: str, has: int, known: int) -> Misconfigured:
    """Return the refusal of a topic whose partition count is not the newest checkpoint's (S9)."""
    return Misconfigured(
        "partitions-changed",
        f"Topic {topic} has {has} partitions, the newest checkpoint knows {known}.",
        "Run: headrace resnapshot --recover. It makes the topic anew; then rebuild the views that read it.",
    )


def topic_replaced(topic: str) -> Misconfigured:
    """Return the refusal of a topic that is not the one that capture began to write."""
    return Misconfigured(
        "topic-replaced",
        f"Topic {topic} was deleted and made anew while capture ran: what it held is gone.",
        "Run: headrace resnapshot --recover, then capture. It reads all tables again; then rebuild the views that read them.",
    )


def table_config(settings: Settings) -> dict[str, str]:
    """Return the configuration of a table's topic."""
    return {
        "cleanup.policy": "compact",
        "min.compaction.lag.ms": str(settings.min_compaction_lag_ms),
        "delete.retention.ms": str(settings.delete_retention_ms),
        "message.timestamp.type": "LogAppendTime",
        "max.message.bytes": _largest(settings),
    }


def _largest(settings: Settings) -> str:
    # The broker counts the whole batch: key, headers and framing above the row's own limit.
    return str(settings.message_max_bytes + 1024 * 1024)


def spine_config(settings: Settings) -> dict[str, dict[str, str]]:
    """Return name and configuration of the topics that every source has."""
    kept = {"cleanup.policy": "compact", "message.timestamp.type": "LogAppendTime"}
    # Small segments: these are read from their beginning, and an open segment is never compacted.
    often = {"segment.ms": "600000", "segment.bytes": str(16 * 1024 * 1024), "min.cleanable.dirty.ratio": "0.1"}
    return {
        schemas_topic(settings.source): kept,
        # A cut leaves a tombstone and a marker, which nobody needs: capture reads all of them when it starts.
        checkpoints_topic(settings.source): kept | often | {"delete.retention.ms": "60000"},
        CONTROL: kept | often | {"max.message.bytes": _largest(settings)},  # an answer may name very many keys
        PARKED: kept | often | {"max.message.bytes": _largest(settings)},  # a body may be as large as a row of a table
        ANSWERS: {
            "cleanup.policy": "delete",
            "message.timestamp.type": "LogAppendTime",  # else pages of a process whose clock is wrong are refused, or expire at once
            "retention.ms": "3600000",
            "retention.bytes": str(32 * 1024**3),
            "segment.ms": "600000",
            "max.message.bytes": _largest(settings),  # one row of a view may be as large as a row of a table
        },
    }


def _differs(name: str, key: str, wanted: str, is_now: str) -> bool:
    if name in {CONTROL, PARKED, ANSWERS} and key == "max.message.bytes":
        return int(wanted) > int(is_now)  # another source's rows may be larger
    return wanted != is_now


def _altered(name: str, config: Mapping[str, str]) -> ConfigResource:
    entries = [ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET) for key, value in config.items()]
    return ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)


def _less(settings: Settings, has: Mapping[str, str | None]) -> Settings:
    """Return settings with what a topic has, where that is less; one that is not compacted takes nothing."""
    if "compact" not in (has.get("cleanup.policy") or ""):
        return settings
    stays, lags = has.get("delete.retention.ms"), has.get("min.compaction.lag.ms")
    return replace(
        settings,
        delete_retention_ms=min(settings.delete_retention_ms, int(stays or settings.delete_retention_ms)),
        min_compaction_lag_ms=min(settings.min_compaction_lag_ms, int(lags or settings.min_compaction_lag_ms)),
    )


def _each(client: Admin, futures: Mapping[ConfigResource, Future[Any]], doing: str) -> dict[str, Any]:
    """Wait for what was asked of each topic; return the answers by name."""
    answers = {}
    for resource, future in futures.items():
        with client.errors(f"{doing} {resource.name}"):
            answers[resource.name] = future.result(TIMEOUT)
    return answers


class Topics:
    """Makes and describes topics."""

    def __init__(self, settings: Settings, client: Admin) -> None:
        """Use `client` for every request."""
        self._settings = settings
        self._client = client

    def names(self) -> set[str]:
        """Return the names of all topics."""
        with self._client.errors("listing topics"):
            return set(self._client.list_topics(timeout=TIMEOUT).topics)

    def make(self, wanted: Mapping[str, tuple[int, dict[str, str]]]) -> None:
        """Make those of `wanted` (name to partitions and configuration) that are missing."""
        there = self.names() if wanted else ()
        missing = {name: how for name, how in wanted.items() if name not in there}
        if not missing:
            return
        copies = self._settings.replication or -1  # the broker's default.replication.factor
        new = [
            NewTopic(name, num_partitions=partitions, replication_factor=copies, config=config)
            for name, (partitions, config) in missing.items()
        ]
        bunch = max(1, _BUNCH // max(topic.num_partitions for topic in new))
        for at in range(0, len(new), bunch):
            self._make(new[at : at + bunch])
        self.await_there(missing)

    def _make(self, new: list[NewTopic]) -> None:
        for name, future in self._client.create_topics(new, operation_timeout=TIMEOUT).items():
            with self._client.errors(f"making topic {name}"):
                try:
                    future.result(TIMEOUT)
                except KafkaException as error:  # another process may have made it, which this broker need not know yet
                    if error.args[0].name() != "TOPIC_ALREADY_EXISTS":
                        raise

    def await_there(self, names: Collection[str]) -> dict[str, tuple[str, int]]:
        """Return what `describe` does, once a broker that was just told of topics knows them too."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                return self.describe(names)
            except Misconfigured:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def configure(self, wanted: Mapping[str, dict[str, str]]) -> list[str]:
        """Give topics that are there the configuration that is wanted (by name) where theirs differs; say what was altered.

        Raises:
            Misconfigured: `topic-missing`, `kafka-refuses`.
        """
        if not wanted:
            return []
        asked = [ConfigResource(ResourceType.TOPIC, name) for name in wanted]
        found = _each(
            self._client,
            self._client.describe_configs(asked, request_timeout=TIMEOUT),
            "reading the configuration of topic",
        )
        news = {
            name: {key: value for key, value in config.items() if _differs(name, key, value, found[name][key].value)}
            for name, config in wanted.items()
        }
        altered = [_altered(name, config) for name, config in news.items() if config]
        if altered:
            _each(
                self._client,
                self._client.incremental_alter_configs(altered, request_timeout=TIMEOUT),
                "altering the configuration of topic",
            )
        return [f"{name}: {key} is now {value}" for name, config in news.items() for key, value in config.items()]

    def in_force(self, names: Iterable[str], settings: Settings) -> Settings:
        """Return settings with how long these topics keep what compaction takes, where that is less; of one that is gone, or may not be
        asked, they are believed."""
        asked = [ConfigResource(ResourceType.TOPIC, name) for name in names]
        for start in range(0, len(asked), _BUNCH):  # what is said of one topic is large
            futures = self._client.describe_configs(asked[start : start + _BUNCH], request_timeout=TIMEOUT)
            for resource, future in futures.items():
                with (
                    suppress(Misconfigured),
                    self._client.errors(f"reading the configuration of topic {resource.name}"),
                ):
                    settings = _less(settings, {name: has.value for name, has in future.result(TIMEOUT).items()})
        return settings

    def delete(self, names: Collection[str], *, wait: bool = False) -> None:
        """Delete topics; those that are gone already are no error. `wait` until brokers know, so that they can be made again."""
        there = self.names() if names else ()
        gone = [name for name in names if name in there]
        if gone:
            for name, future in self._client.delete_topics(gone, operation_timeout=TIMEOUT).items():
                with self._client.errors(f"deleting topic {name}"):
                    future.result(TIMEOUT)
        deadline = time.monotonic() + TIMEOUT
        while wait and gone and self.names() & set(gone) and time.monotonic() < deadline:
            time.sleep(0.05)

    def describe(self, names: Collection[str]) -> dict[str, tuple[str, int]]:
        """Return topic id and partition count of each topic. Raises Misconfigured (`topic-missing`)."""
        described: dict[str, tuple[str, int]] = {}
        if not names:
            return described
        for name, future in self._client.describe_topics(
            TopicCollection(sorted(names)), request_timeout=TIMEOUT
        ).items():
            with self._client.errors(f"describing topic {name}"):
                topic = future.result(TIMEOUT)
            described[name] = (str(topic.topic_id), len(topic.partitions))
        return described

    def ends(self, counts: Mapping[str, int], *, committed: bool = True) -> Ends:
        """Return where each partition of each topic (name to partition count) ends.

        Args:
            counts: Partitions of each topic.
            committed: Up to the last stable offset, else up to the high watermark.
        """
        level = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
        return self._offsets(counts, OffsetSpec.latest(), level)  # type: ignore[no-untyped-call]

    def unshown(self, ends: Ends, idle: Callable[[], None] = lambda: None) -> dict[tuple[str, int], int]:
        """Return the partitions that have records up to `ends` and do not show them for some seconds, and where they are shown to.

        Markers come a moment after a commit is answered: one that does not come by then is lost (docs/decisions/a-killed-kafka.md), or
        somebody's transaction is open. What is not there any more is left out. `idle` is called meanwhile.
        """
        deadline = time.monotonic() + _MARKER_SECONDS
        counts = {topic: len(of) for topic, of in ends.items()}
        while True:
            found = {
                (topic, partition): at
                for topic, ats in self.ends(counts).items()
                for partition, at in enumerate(ats)
                if at < ends[topic][partition]
            }
            if found:
                has = self.ends(counts, committed=False)
                found = {(t, p): at for (t, p), at in found.items() if ends[t][p] <= has[t][p]}
            if not found or time.monotonic() > deadline:
                return found
            idle()
            time.sleep(0.05)

    def begins(self, counts: Mapping[str, int]) -> Ends:
        """Return the first offset of each partition: above 0 where records were deleted, which compaction never does."""
        return self._offsets(counts, OffsetSpec.earliest(), IsolationLevel.READ_COMMITTED)  # type: ignore[no-untyped-call]

    def _offsets(self, counts: Mapping[str, int], which: OffsetSpec, level: IsolationLevel) -> Ends:
        wanted = {
            TopicPartition(name, partition): which for name, count in counts.items() for partition in range(count)
        }
        found: Ends = {name: [0] * count for name, count in counts.items()}
        if wanted:
            with self._client.errors("asking where topics end"):
                for place, offset in self._ask_offsets(wanted, level):
                    found[place.topic][place.partition] = offset
        return found

    def _ask_offsets(
        self, wanted: dict[TopicPartition, OffsetSpec], level: IsolationLevel
    ) -> list[tuple[TopicPartition, int]]:
        deadline = time.monotonic() + TIMEOUT
        while True:
            futures = self._client.list_offsets(wanted, isolation_level=level, request_timeout=TIMEOUT)
            try:
                return [(place, future.result(TIMEOUT).offset) for place, future in futures.items()]
            except KafkaException as error:
                # A new topic's leader may be a moment late; librdkafka's retriable() speaks of transactions only.
                if error.args[0].name() not in LEADER_IS_LATE or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
