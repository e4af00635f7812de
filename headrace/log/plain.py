"""A plain idempotent writer, for control and answers: no transaction, no order with anything else."""

from __future__ import annotations

from confluent_kafka import Producer

from headrace.errors import Transient
from headrace.log import kafka
from headrace.settings import Settings


class PlainWriter:
    """Writes single records."""

    def __init__(self, settings: Settings) -> None:
        """Connect at the first record."""
        self._settings = settings
        self._producer: Producer | None = None

    def send(self, topic: str, key: bytes, value: bytes | None) -> None:
        """Hand a record over; it is on its way when this returns."""
        if self._producer is None:
            self._producer = kafka.producer(self._settings, **{"linger.ms": 0})
        with kafka.kafka_errors(f"writing to {topic}"):
            try:
                self._producer.produce(topic, value, key)
            except BufferError as error:
                raise Transient(
                    "kafka-away", "Kafka takes no records.", "Check HEADRACE_KAFKA and the broker."
                ) from error
        self._producer.poll(0)

    def flush(self, seconds: float = 15.0) -> None:
        """Wait up to `seconds` until everything sent is in Kafka.

        Raises:
            Transient: `kafka-away`.
        """
        if self._producer is not None and self._producer.flush(seconds):
            raise Transient("kafka-away", "Kafka takes no records.", "Check HEADRACE_KAFKA and the broker.")
