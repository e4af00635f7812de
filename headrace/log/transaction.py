"""A writer of transactions for derived streams: records of several topics that become readable together, or not at all.

Its name fences: whoever opens a writer of the same name ends every earlier one, and what that had not committed is gone.
"""

from __future__ import annotations

from confluent_kafka import KafkaException, Producer

from headrace.codec import Headers
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.log import kafka
from headrace.settings import Settings

_COMMIT_SECONDS = 60.0
_LONGEST_MS = 900_000
"""The most that a broker allows by default: one large state is written in one transaction."""


class TransactionWriter:
    """Writes one transaction after another, from one thread."""

    def __init__(self, settings: Settings, name: str) -> None:
        """End every earlier writer of this name, with what it had not committed.

        Raises:
            Transient: `kafka-away`.
        """
        self._name = name
        self._open = False
        options = {"transactional.id": name, "transaction.timeout.ms": _LONGEST_MS}
        self._producer: Producer = kafka.producer(settings, **options)
        with kafka.kafka_errors(f"opening the writer {name}"):
            self._producer.init_transactions(_COMMIT_SECONDS)

    def write(self, topic: str, key: bytes, value: bytes | None, headers: Headers | None = None) -> None:
        """Add a record to the transaction, which begins with the first one.

        Raises:
            Transient: `kafka-away`. Misconfigured: `writer-taken-over`, `topic-missing`.
        """
        try:
            if not self._open:
                self._producer.begin_transaction()
                self._open = True
            while True:
                try:
                    self._producer.produce(topic, value, key, headers=list(headers or []))
                except BufferError:
                    self._producer.poll(0.1)
                else:
                    return
        except KafkaException as error:
            raise self._explained(error, f"writing to {topic}") from error

    def commit(self) -> None:
        """End the transaction; what it holds can be read when this returns.

        Raises:
            Transient: it is not known whether it was committed. Misconfigured: `writer-taken-over`, `topic-missing`.
        """
        if not self._open:
            return
        try:
            self._producer.commit_transaction(_COMMIT_SECONDS)
        except KafkaException as error:
            raise self._explained(error, "committing") from error
        self._open = False

    def close(self) -> None:
        """Leave; a transaction that is open is ended by the next writer of this name."""
        self._producer.purge()

    def _explained(self, error: KafkaException, doing: str) -> HeadraceError:
        found = kafka.translate(error.args[0], doing)
        if isinstance(found, Transient) and found.code == "fenced":
            return Misconfigured(
                "writer-taken-over", f"Another process has opened {self._name} since.", "Stop one of the two."
            )
        return found
