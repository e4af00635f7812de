"""A writer of transactions for derived streams: records of several topics that become readable together, or not at all.

Its name fences: whoever opens a writer of the same name ends every earlier one, and what that had not committed is gone.
"""

from __future__ import annotations

import time
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from headrace.codec import Headers
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.log import kafka
from headrace.settings import Settings

_COMMIT_SECONDS = 60.0
_LONGEST_SECONDS = 900
"""The most that a broker allows by default: one large state is written in one transaction. Of one name it ends but one in that time."""

_ended: dict[tuple[str, str], float] = {}
"""When a writer was last found to be ended, by the brokers and its name."""


class TransactionWriter:
    """Writes one transaction after another, from one thread. After any error it is of no use: open another.

    Attributes:
        ends: Behind the last record, that is known to have arrived, of each partition that it wrote to.
        begins: The first record of the open transaction in each.
        fell: Where a record went before an earlier one: Kafka has lost that.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        """End every earlier writer of this name, with what it had not committed.

        Raises:
            Transient: `kafka-away`. Misconfigured: `transaction-timeout`.
        """
        self._name, self._key = name, (settings.kafka, name)
        self._began = 0.0
        self._lost: set[str] = set()
        self.ends: dict[tuple[str, int], int] = {}
        self.begins: dict[tuple[str, int], int] = {}
        self.fell: set[tuple[str, int]] = set()
        # Not a method: of records that nobody asks for any more librdkafka's binding would hold the writer, and that holds them.
        self._report = partial(_note, self._lost, self.fell, self.begins, self.ends)
        options = {"transactional.id": name, "transaction.timeout.ms": 1000 * _LONGEST_SECONDS}
        self._producer: Producer = kafka.producer(settings, **options)
        try:
            self._producer.init_transactions(_COMMIT_SECONDS)
        except KafkaException as error:
            raise self._explained(error.args[0], f"opening the writer {name}") from error

    def write(self, topic: str, key: bytes, value: bytes | None, headers: Headers | None = None) -> None:
        """Add a record to the transaction, which begins with the first one.

        Raises:
            Transient: `kafka-away`, `transaction-too-long`, `fenced`.
            Misconfigured: `writer-taken-over`, `topic-missing`, `document-too-large`.
        """
        try:
            if not self._began:
                self._producer.begin_transaction()
                self._began = time.time()
            while True:
                try:
                    self._producer.produce(topic, value, key, on_delivery=self._report, headers=list(headers or []))
                except BufferError:
                    self._producer.poll(0.1)
                else:
                    self._producer.poll(0)
                    return
        except (KafkaException, SystemError) as error:
            raise self._explained(_cause(error), f"writing {key.decode(errors='replace')[:200]} to {topic}") from error

    def arrive(self) -> None:
        """Wait until all that was written is in its partition. Raises as `commit`."""
        try:
            if self._producer.flush(_COMMIT_SECONDS):
                raise Transient("kafka-away", f"Kafka does not take the records of {self._name}.", kafka.CHECK)
        except (KafkaException, SystemError) as error:
            raise self._explained(_cause(error), "writing") from error
        if self._lost:
            said = f"Kafka takes records for {', '.join(self._lost)} for ones that it has, and has not."
            raise Transient("records-lost", said, "They are written again.")

    def commit(self) -> None:
        """End the transaction, if one is open. Readers see it a moment after this returns, when its markers are written.

        Raises:
            Transient: it is not known whether it was committed. Misconfigured: as `write`.
        """
        if not self._began:
            return
        self.arrive()
        try:
            self._producer.commit_transaction(_COMMIT_SECONDS)
        except (KafkaException, SystemError) as error:
            raise self._explained(_cause(error), "committing") from error
        self._end()

    def abort(self) -> None:
        """Throw the transaction away, once all its records are in their partitions. Raises Transient."""
        try:
            self._producer.flush(_COMMIT_SECONDS)
            self._producer.abort_transaction(_COMMIT_SECONDS)
        except (KafkaException, SystemError) as error:
            raise self._explained(_cause(error), "aborting") from error
        self._end()

    def _end(self) -> None:
        self._began = 0.0
        self.begins.clear()

    def close(self) -> None:
        """Leave; a transaction that is open is ended by the next writer of this name."""
        self._producer.purge()

    def _explained(self, said: KafkaError | None, doing: str) -> HeadraceError:
        why = kafka.broken(self._producer) if self._began and not (said and said.fatal()) else None
        error = why or said
        if error is None:
            return Transient("kafka-away", f"Kafka failed while {doing}.", kafka.CHECK)
        if error.name() == "MSG_SIZE_TOO_LARGE":
            return Misconfigured(
                "document-too-large",
                f"Kafka does not take a record that large while {doing}.",
                "Render less, or raise HEADRACE_MESSAGE_MAX_BYTES and the topic's max.message.bytes.",
            )
        found = kafka.translate(error, doing)
        if found.code == "fenced" and self._began and time.time() - self._began > _LONGEST_SECONDS:
            return Transient(
                "transaction-too-long",
                f"A state was not written within {_LONGEST_SECONDS} s, and Kafka has ended its transaction.",
                "It is tried again. If it is too large for that: headrace rebuild NAME, which writes in pieces.",
            )
        if found.code != "fenced" or not self._has_rival():
            return found
        return Misconfigured(
            "writer-taken-over", f"Another process has opened {self._name} since.", "Stop one of the two."
        )

    def _has_rival(self) -> bool:
        """Note that the writer was ended; return whether another process has done it: then that has happened just before, too.

        Once may be the broker's doing: a machine that was paused for longer than a transaction may last need not know that it was.
        """
        last, _ended[self._key] = _ended.get(self._key), time.monotonic()
        return last is not None and time.monotonic() - last < _LONGEST_SECONDS


def _note(
    topics: set[str],
    fell: set[tuple[str, int]],
    begins: dict[tuple[str, int], int],
    ends: dict[tuple[str, int], int],
    error: KafkaError | None,
    message: Message,
) -> None:
    topic, partition, offset = message.topic() or "", message.partition() or 0, message.offset()
    if kafka.lost(message):
        topics.add(topic)
    elif error is None and offset is not None:
        place = topic, partition
        if offset < ends.get(place, 0):
            fell.add(place)
        begins.setdefault(place, offset)
        ends[place] = offset + 1


def _cause(error: Exception) -> KafkaError | None:
    """Return what Kafka said; a fatal error comes out of a callback of the binding as a SystemError."""
    said = error if isinstance(error, KafkaException) else error.__cause__
    return said.args[0] if isinstance(said, KafkaException) else None
