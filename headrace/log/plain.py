"""A plain idempotent writer, for control and answers: no transaction, no order with anything else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from confluent_kafka import KafkaError, Message, Producer

from headrace.errors import Misconfigured, Transient
from headrace.log import kafka
from headrace.settings import Settings

_POLL_SECONDS = 0.05


class PlainWriter:
    """Writes single records, from any thread."""

    def __init__(self, settings: Settings) -> None:
        """Connect at the first record."""
        self._settings = settings
        self._producer: Producer | None = None

    def send(self, topic: str, key: bytes, value: bytes | None) -> None:
        """Hand a record over and forget it: nobody is told when Kafka does not take it.

        Raises:
            Transient: `kafka-away`: too many wait already.
        """
        self._hand_over(topic, key, value, None)

    def write(self, topic: str, key: bytes, value: bytes | None, seconds: float = 15.0) -> int:
        """Write a record and wait up to `seconds` until Kafka has it; return the record's timestamp, ms.

        Raises:
            Transient: `kafka-away`; and what Kafka refuses the record with.
        """
        said: list[tuple[KafkaError | None, int]] = []
        producer = self._hand_over(topic, key, value, lambda error, made: said.append((error, made.timestamp()[1])))
        deadline = time.monotonic() + seconds
        while not said:
            if time.monotonic() > deadline:
                raise _away()
            producer.poll(_POLL_SECONDS)  # whichever thread polls, the report ends in `said`
        error, written = said[0]
        if error is not None:
            with shared():
                raise kafka.translate(error, f"writing to {topic}")
        return written

    def flush(self, seconds: float) -> None:
        """Wait up to `seconds` until nothing is on its way.

        Raises:
            Transient: `kafka-away`.
        """
        if self._producer is not None and self._producer.flush(seconds):
            raise _away()

    def _hand_over(
        self,
        topic: str,
        key: bytes,
        value: bytes | None,
        delivered: Callable[[KafkaError | None, Message], None] | None,
    ) -> Producer:
        producer = self._producer = self._producer or kafka.producer(self._settings, **{"linger.ms": 0})
        with shared(), kafka.kafka_errors(f"writing to {topic}"):
            try:
                producer.produce(topic, value, key, on_delivery=delivered)
            except BufferError as error:
                raise _away() from error
        producer.poll(0)
        return producer


@contextmanager
def shared() -> Iterator[None]:
    """Where a topic that all share is missing, say what makes it: to read tables again, as for one of theirs, would be in vain."""
    try:
        yield
    except Misconfigured as error:
        if error.code != "topic-missing":
            raise
        remedy = "Start any process of headrace again, headrace run NAME or headrace capture: it makes it."
        raise Misconfigured(error.code, error.message, remedy) from error


def _away() -> Transient:
    return Transient("kafka-away", "Kafka takes no records.", kafka.CHECK)
