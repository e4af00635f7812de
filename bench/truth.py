"""The truth, in the topics: where they end for a `read_committed` reader, and what is in them.

Nothing is believed that a tool says of itself. While one runs only the ends are asked for, which costs it next to nothing; what lies
below them is read and counted afterwards, by a plain consumer that knows neither tool: each record, the broker's time of the first
and of the last, and the newest row of every key, which must be the row that Postgres has.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import psycopg
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from headrace.errors import Poison
from headrace_ops.kafka import Kafka

_SECONDS = 30.0


@dataclass(slots=True)
class Found:
    """What is in one topic, from an offset on.

    Attributes:
        offsets: Of every record, in order; markers and holes have none.
        first_ms: The broker's time of the first record, `last_ms` of the last.
        rows: The newest row of each key: the hash of the columns that are compared.
    """

    offsets: array[int] = field(default_factory=lambda: array("q"))
    first_ms: int = 0
    last_ms: int = 0
    rows: dict[bytes, int] = field(default_factory=dict)

    def below(self, end: int) -> int:
        """Return how many records lie below the offset `end`."""
        return bisect_left(self.offsets, end)


@contextmanager
def reading(kafka: Kafka) -> Iterator[Consumer]:
    """Give a reader of committed records that belongs to nobody."""
    options = {
        "bootstrap.servers": kafka.address(),
        "group.id": "bench",
        "isolation.level": "read_committed",
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "fetch.wait.max.ms": 100,
        "fetch.queue.backoff.ms": 20,  # else it waits for a second whenever much is there
    }
    with closing(Consumer(options)) as consumer:
        yield consumer


def ends(consumer: Consumer, topics: Iterable[str]) -> tuple[int, ...]:
    """Return the last stable offset of each topic: what a reader of committed records may see."""
    found = []
    for topic in topics:
        marks = consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=_SECONDS, cached=False)
        assert marks is not None, f"Kafka does not say where {topic} ends"
        found.append(marks[1])
    return tuple(found)


def read(kafka: Kafka, topic: str, start: int, columns: Sequence[str]) -> Found:
    """Read a topic from `start` to its end."""
    found = Found()
    with reading(kafka) as consumer:
        consumer.assign([TopicPartition(topic, 0, start)])
        for message in _to_end(consumer):
            _add(found, message, columns)
    return found


def compare(dsn: str, table: str, key: str, columns: Sequence[str], found: Found) -> None:
    """Raise Poison `bench-wrong-row` unless the newest row of each key is the one that Postgres has."""
    names = ", ".join([key, *columns])
    rows: dict[bytes, int] = {}
    with psycopg.connect(dsn) as connection, connection.cursor(name="truth") as cursor:
        for row in cursor.execute(f"SELECT {names} FROM {table}".encode()):
            rows[orjson.dumps({key: row[0]})] = hash(row[1:])
    wrong = next((key for key, row in found.rows.items() if rows.get(key) != row), None)
    if wrong is not None:
        raise Poison("bench-wrong-row", f"The topic of {table} has another row {wrong.decode()} than Postgres.")


@dataclass(slots=True)
class Rows:
    """A table with a key `id`, as a plain reader of its topic has it, or Postgres: few bytes for each of very many rows.

    Attributes:
        hashes: By id, of the columns that are compared; 0 where there is no row.
        ops: How many records of each kind there were; tombstones under an empty name.
    """

    hashes: array[int]
    ops: Counter[str] = field(default_factory=Counter)

    @classmethod
    def none(cls, most: int) -> Rows:
        """Return no rows yet, with ids up to `most`."""
        return cls(array("q", bytes(8 * (most + 1))))


def replay(kafka: Kafka, topic: str, columns: Sequence[str], most: int) -> Rows:
    """Read a topic from its beginning, as a plain reader does: a row is put, a tombstone takes it away."""
    found = Rows.none(most)
    with reading(kafka) as consumer:
        consumer.assign([TopicPartition(topic, 0, 0)])
        for message in _to_end(consumer):
            id_ = orjson.loads(message.key() or b"")["id"]
            value = message.value()
            change: dict[str, Any] = orjson.loads(value) if value else {"op": "", "after": None}
            found.ops[change["op"]] += 1
            row = change["after"]
            if row is not None:
                found.hashes[id_] = hash(tuple(row[column] for column in columns))
            elif not value:
                found.hashes[id_] = 0
    return found


def select(dsn: str, table: str, columns: Sequence[str], most: int) -> Rows:
    """Return the same of Postgres."""
    found = Rows.none(most)
    with psycopg.connect(dsn) as connection, connection.cursor(name="truth") as cursor:
        cursor.itersize = 10_000
        for row in cursor.execute(f"SELECT id, {', '.join(columns)} FROM {table}".encode()):
            found.hashes[row[0]] = hash(row[1:])
    return found


def _to_end(consumer: Consumer) -> Iterator[Message]:
    while True:
        first = consumer.poll(_SECONDS)
        if first is None:
            raise Poison("bench-no-end", f"Kafka sent nothing for {_SECONDS:.0f} s, not even the end of a topic.")
        # `consume` with a time would wait for so many messages.
        for message in (first, *consumer.consume(10_000, 0)):
            error = message.error()
            if error is None:
                yield message
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 -- the binding's public name of the code
                return
            else:
                raise KafkaException(error)


def _add(found: Found, message: Message, columns: Sequence[str]) -> None:
    at = message.timestamp()[1]
    found.offsets.append(message.offset() or 0)
    found.first_ms = found.first_ms or at
    found.last_ms = at
    row = after(message)
    if row is not None:
        found.rows[message.key() or b""] = hash(tuple(row[column] for column in columns))


def after(message: Message) -> dict[str, Any] | None:
    """Return the row in a change of either tool; None of a delete."""
    value = message.value()
    row: dict[str, Any] | None = orjson.loads(value)["after"] if value else None
    return row
