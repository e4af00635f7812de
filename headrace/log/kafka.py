"""Clients of Kafka: how they are configured and how their errors become ours.

Every reader assigns its partitions itself and joins no group: positions live in the views [I6]. It is `read_committed`, but of what has
nothing to do with the cut that somebody may have left open in the same topic.
"""

from __future__ import annotations

import os
import re
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.settings import Settings, kafka_options

TIMEOUT = 15.0
"""Seconds that one request to Kafka may take."""
LEADER_IS_LATE = frozenset(
    {
        "NOT_LEADER_FOR_PARTITION",
        "LEADER_NOT_AVAILABLE",
        "UNKNOWN_TOPIC_OR_PART",
        "OFFSET_NOT_AVAILABLE",
        "FENCED_LEADER_EPOCH",
        "UNKNOWN_LEADER_EPOCH",
    }
)
"""Errors of a topic that was just made, or whose leader was just elected; librdkafka's `retriable()` speaks of transactions only."""
CHECK = "Check HEADRACE_KAFKA, HEADRACE_KAFKA_OPTIONS (TLS, SASL) and the broker."
_REFUSAL = re.compile("SASL authentication error: |: Broker: |certificate| alert ")
"""What a broker, or its certificate, is refused with; not what a connection says that broke meanwhile."""

_M, _BITS = 0x5BD1E995, 0xFFFFFFFF

_let_in: set[tuple[str, str]] = set()
"""To which brokers by which options this process has come: where these refuse it later, what knows the logins may be away."""


def _common(settings: Settings) -> dict[str, Any]:
    return {
        "bootstrap.servers": settings.kafka,
        "log_level": 0,
        "socket.keepalive.enable": True,
        "allow.auto.create.topics": False,
    } | kafka_options(settings.kafka_options)


@contextmanager
def _configuring(settings: Settings) -> Iterator[None]:
    """Turn the refusal of a configuration into ours. Of a file that it cannot read librdkafka names the property only."""
    try:
        yield
    except KafkaException as error:
        said = error.args[0].str()
        if error.args[0].name() != "_INVALID_ARG":
            raise translate(error.args[0], "making a client") from error
        named = {name: str(value) for name, value in kafka_options(settings.kafka_options).items() if name in said}
        unread = [path for name, path in named.items() if name.endswith(".location") and not os.access(path, os.R_OK)]
        raise Misconfigured(
            "bad-setting",
            f"Kafka's client refuses HEADRACE_KAFKA_OPTIONS: {said}.",
            f"Let it name a file that is there and may be read, as {unread[0]!r} is not (in a container: is it mounted?)."
            if unread
            else "Change it: librdkafka's CONFIGURATION.md says what there is.",
        ) from error


class Admin(AdminClient):
    """A client for topics and offsets. It hears why no broker lets it in, which no request is told: that only fails in time."""

    def __init__(self, settings: Settings) -> None:
        """Connect in the background. Raises Misconfigured: `bad-setting`."""
        self._said: deque[KafkaError] = deque(maxlen=100)
        self._as = settings.kafka, settings.kafka_options
        with _configuring(settings):
            super().__init__(_common(settings) | {"error_cb": self._said.append})

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Do as `kafka_errors`.

        Raises:
            Misconfigured: `kafka-refuses-login`, when no answer came, and a broker refused us meanwhile, or we its certificate;
                not of a process that was let in before.
        """
        self.poll(0)
        self._said.clear()
        try:
            with kafka_errors(doing):
                yield
            _let_in.add(self._as)
        except Transient as error:
            self.poll(0)  # hands over what was said meanwhile
            said = [told.str().partition(" (after ")[0] for told in self._said if told.name() != "_ALL_BROKERS_DOWN"]
            refused = [why for why in said if _REFUSAL.search(why)]
            if refused and self._as not in _let_in:
                raise Misconfigured(
                    "kafka-refuses-login",
                    f"Kafka lets nobody in while {doing}: {refused[-1]}.",
                    "Change HEADRACE_KAFKA_OPTIONS, and start it again.",
                ) from error
            more = f" Last heard: {said[-1]}." if said else ""
            raise Transient(error.code, error.message + more, error.remedy) from error


def admin(settings: Settings) -> Admin:
    """Return a client for topics and offsets."""
    return Admin(settings)


def consumer(settings: Settings, group: str = "", *, wait_ms: int = 100, committed: bool = True) -> Consumer:
    """Return a reader of `committed` records, or of all, that assigns and never subscribes; `group` may mirror its position [I6].

    Where there is nothing new, the broker answers after `wait_ms`.
    """
    with _configuring(settings):
        return Consumer(
            _common(settings)
            | {
                "group.id": f"headrace.{settings.source}.{group or 'reader'}",  # librdkafka wants one always
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed" if committed else "read_uncommitted",
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": wait_ms,
                # What is fetched is held unpacked, ten times as large, with some hundred bytes for each record more. More in advance
                # makes no reader of ours faster, as long as librdkafka does not wait for a second whenever this much is there.
                "fetch.message.max.bytes": 512 * 1024,
                "queued.max.messages.kbytes": 4 * 1024,
                "queued.min.messages": 10_000,
                "fetch.queue.backoff.ms": 20,
                "check.crcs": True,  # as Java's client does: a bit that fell over on a disk would be another value in each view
                "receive.message.max.bytes": max(100_000_000, settings.message_max_bytes + 1024 * 1024),
            }
        )


def partition_of(key: bytes, partitions: int) -> int:
    """Return where `producer` places a key: by murmur2, as Java's client has it."""
    whole = len(key) & ~3
    hashed = 0x9747B28C ^ len(key)
    for (four,) in struct.iter_unpack("<I", key[:whole]):
        mixed = four * _M & _BITS
        hashed = (hashed * _M & _BITS) ^ ((mixed ^ mixed >> 24) * _M & _BITS)
    if rest := key[whole:]:
        hashed = (hashed ^ int.from_bytes(rest, "little")) * _M & _BITS
    hashed = (hashed ^ hashed >> 13) * _M & _BITS
    return ((hashed ^ hashed >> 15) & 0x7FFFFFFF) % partitions


def producer(settings: Settings, **more: Any) -> Producer:
    """Return an idempotent writer that places keys as every Java client does."""
    with _configuring(settings):
        return Producer(
            _common(settings)
            | {
                "partitioner": "murmur2_random",
                "enable.idempotence": True,
                # Of a partition that is not there yet the broker refused a first request and took the second: the first was lost (`lost`).
                "max.in.flight.requests.per.connection": 1,
                "acks": "all",
                "compression.type": "lz4",
                "linger.ms": 5,
                "batch.size": 1024 * 1024,
                # The broker counts the whole batch: leave room for key, headers and framing above the row's own limit.
                "message.max.bytes": settings.message_max_bytes + 1024 * 1024,
                "queue.buffering.max.messages": 200_000,
                # One record must fit, or `produce` says for ever that the queue is full.
                "queue.buffering.max.kbytes": max(128 * 1024, settings.message_max_bytes // 1024 + 1024),
            }
            | more
        )


def lost(message: Message) -> bool:
    """Whether a record that is reported as taken is not in its partition: librdkafka says then that it was sent twice, and not where it is.

    A broker that has nothing of a writer in a partition takes any sequence of it for the first one, and what comes before that for known.
    """
    return message.error() is None and message.offset() is None


def broken(producer: Producer) -> KafkaError | None:
    """Return why nothing more can be sent in the open transaction of `producer`, None when it is whole.

    librdkafka tells it to whoever asks for something that is never valid within a transaction: to begin one.
    """
    try:
        producer.begin_transaction()
    except KafkaException as error:
        found: KafkaError = error.args[0]
        return found if found.name() != "_STATE" else None
    return None


_TOO_LARGE = (
    "record-too-large",
    "a record that large",
    "Raise HEADRACE_MESSAGE_MAX_BYTES for everybody, or make less of it.",
)
_TOO_MUCH = {
    "MSG_SIZE_TOO_LARGE": _TOO_LARGE,
    "RECORD_LIST_TOO_LARGE": _TOO_LARGE,
    "INVALID_TRANSACTION_TIMEOUT": (
        "transaction-timeout",
        "a transaction that may last so long",
        "Set transaction.max.timeout.ms=900000 on the broker, Kafka's own default.",
    ),
}
_NEVER = dict.fromkeys(
    ("POLICY_VIOLATION", "INVALID_CONFIG", "INVALID_PARTITIONS"),
    "Change the setting that this is about (of max.message.bytes: lower HEADRACE_MESSAGE_MAX_BYTES), or let the broker take it.",
)
"""What a broker says of a topic that it will never make or alter so: its own bounds, or a policy of whoever runs it."""


def translate(error: KafkaError, doing: str) -> HeadraceError:
    """Return the error of ours for one of Kafka's."""
    name = error.name()
    if name in {"_UNKNOWN_TOPIC", "UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_PARTITION"}:
        return Misconfigured(
            "topic-missing",
            f"Kafka has no such topic while {doing}: {error.str()}.",
            "Run: headrace capture. If somebody deleted it: headrace resnapshot --recover",
        )
    if name in _TOO_MUCH:
        code, what, remedy = _TOO_MUCH[name]
        return Misconfigured(code, f"Kafka does not take {what} while {doing}.", remedy)
    if name == "TOPIC_EXCEPTION":
        return Misconfigured(
            "topic-refused",
            f"Kafka does not take the name while {doing}: {error.str()}.",
            "If it collides with another table's: ALTER PUBLICATION … DROP TABLE one of the two, or choose another HEADRACE_SOURCE.",
        )
    if name in {"_FENCED", "PRODUCER_FENCED", "INVALID_PRODUCER_EPOCH"}:
        return Transient("fenced", f"Another process took over while {doing}.", "Stop one of the two.")
    if name in _NEVER or "AUTH" in name or name == "CLUSTER_AUTHORIZATION_FAILED":
        remedy = _NEVER.get(name, "Change HEADRACE_KAFKA_OPTIONS or the broker's ACLs.")
        return Misconfigured("kafka-refuses", f"Kafka refuses {doing}: {error.str()} ({name}).", remedy)
    return Transient(
        "kafka-away",
        f"Kafka failed while {doing}: {error.str()} ({name}).",
        CHECK,
    )


@contextmanager
def kafka_errors(doing: str) -> Iterator[None]:
    """Turn Kafka's exceptions into ours; `doing` completes the sentence "Kafka failed while …"."""
    try:
        yield
    except KafkaException as error:
        raise translate(error.args[0], doing) from error
    except TimeoutError as error:  # of a future, whose own time may be over a moment before librdkafka says so
        raise Transient("kafka-away", f"Kafka gave no answer while {doing}.", CHECK) from error
