"""Reading raw records: a topic to its end, or on and on.

The end is the last stable offset: librdkafka reports the end of a partition there, past markers and compacted holes (S29).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from headrace.errors import Misconfigured, Transient
from headrace.log import kafka
from headrace.settings import Settings

BEGINNING = 0
"""The first offset. Compaction never moves it; where somebody deleted records, reading from zero is rightly an error. (Asking
librdkafka for "the beginning" costs a look-up of half a second.)"""
_BUNCH = 2_000
"""Messages that are taken at once: beside what it holds, each is a kilobyte or more here."""
_SHORT_MS = 5
_MIRRORED = 1_000
_MIRROR_SECONDS = 600.0
"""How often offsets that stand still are committed too: one commit may have failed, and Kafka forgets what is not for a week."""
_NONE: Mapping[tuple[str, int], int] = {}


class Record(NamedTuple):
    """One committed record. `timestamp` is the broker's, in ms since the Unix epoch."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes
    value: bytes | None
    headers: list[tuple[str, bytes]]


def record(message: Message) -> Record:
    """Copy a message into a `Record`."""
    return Record(
        message.topic() or "",
        message.partition() or 0,
        message.offset() or 0,
        message.timestamp()[1],
        message.key() or b"",
        message.value(),
        message.headers() or [],  # type: ignore[arg-type]
    )


class Head(NamedTuple):
    """A record without its value: what is asked of very many. `live`: it is no tombstone (no value of ours is empty)."""

    partition: int
    offset: int
    key: bytes
    headers: dict[str, bytes]
    live: bool


def head(message: Message) -> Head:
    """Return a message's head."""
    headers: dict[str, bytes] = dict(message.headers() or [])  # type: ignore[arg-type]
    return Head(message.partition() or 0, message.offset() or 0, message.key() or b"", headers, len(message) > 0)


def end_of_partition(message: Message, still_those: Callable[[list[str]], None] | None = None) -> bool:
    """Whether `message` says that its partition has no more; raise for every other error.

    Where a record that is not there is nothing to be tried again, `still_those` refuses topics that are others by now. The first one
    is there in every topic, also in one that was made anew, but where somebody removed it.
    """
    error = message.error()
    if error is None:
        return False
    if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  the binding's public name of the code
        return True
    topic = message.topic() or ""
    if error.code() == KafkaError._AUTO_OFFSET_RESET and (still_those or message.offset() == BEGINNING):  # noqa: SLF001
        if still_those:
            still_those([topic])
        seen = f"{topic} partition {message.partition()} has no record {message.offset()}: {error.str()}."
        raise records_lost(topic, seen)
    raise kafka.translate(error, f"reading {topic}")


def records_lost(topic: str, seen: str) -> Misconfigured:
    """Return the refusal of a topic that is not as it was."""
    remedy = "Run: headrace resnapshot --recover. It makes the topic anew; then rebuild the views that read it."
    others = topic.count(".") < 2 and not topic.endswith(".checkpoints")
    if others or topic.endswith(".schemas"):  # no table's; the name of a source may have dots
        remedy = "Delete the topic, and start again: it is made anew. What goes with it says the runbook, at log-lost-records."
    return Misconfigured("log-lost-records", f"{seen} Kafka lost records, or somebody removed some.", remedy)


class Tail:
    """Follows the partitions of topics from given offsets."""

    def __init__(
        self,
        settings: Settings,
        starts: dict[tuple[str, int], int],
        group: str = "",
        *,
        wait_ms: int = 100,
        committed: bool = True,
    ) -> None:
        """Begin at `starts`: (topic, partition) to offset, BEGINNING for the first one there is. For the rest see `kafka.consumer`."""
        self._consumer: Consumer = kafka.consumer(settings, group, wait_ms=wait_ms, committed=committed)
        with kafka.kafka_errors("assigning partitions"):
            self._consumer.assign([TopicPartition(topic, partition, at) for (topic, partition), at in starts.items()])
        self._starts = starts
        self._mirrored: dict[tuple[str, int], int] = {}
        self._mirrored_all = 0.0

    def add(self, starts: dict[tuple[str, int], int]) -> None:
        """Follow further partitions."""
        with kafka.kafka_errors("assigning partitions"):
            self._consumer.incremental_assign(
                [TopicPartition(topic, partition, at) for (topic, partition), at in starts.items()]
            )

    def seek(self, starts: dict[tuple[str, int], int]) -> None:
        """Go on from these offsets."""
        with kafka.kafka_errors("seeking"):
            for (topic, partition), at in starts.items():
                self._consumer.seek(TopicPartition(topic, partition, at))

    def pause(self, places: Collection[tuple[str, int]]) -> None:
        """Fetch nothing more of these for now."""
        with kafka.kafka_errors("pausing partitions"):
            self._consumer.pause([TopicPartition(topic, partition) for topic, partition in places])

    def resume(self, places: Collection[tuple[str, int]]) -> None:
        """Fetch these again."""
        with kafka.kafka_errors("resuming partitions"):
            self._consumer.resume([TopicPartition(topic, partition) for topic, partition in places])

    def poll(self, timeout: float, most: int = _BUNCH) -> list[Message]:
        """Return what is there within `timeout` seconds, markers of a partition's end among it.

        `poll` waits for the first message and `consume` takes what has come with it: `consume` alone would wait for `most`.
        """
        with kafka.kafka_errors("reading"):
            first = self._consumer.poll(timeout)
            return [first, *self._consumer.consume(most, 0)] if first is not None else []

    def to_end(
        self,
        timeout: float = 60.0,
        ends: Mapping[tuple[str, int], int] = _NONE,
        idle: Callable[[], None] = lambda: None,
    ) -> Iterator[Record]:
        """Yield records until every partition has been read to the end that it has now, and none beyond it, whatever comes meanwhile.

        An end is the end of a transaction: more could be half of the next one. At least to `ends`: a commit is answered before its
        marker is written, and until then the broker names an older end. `idle` is called while nothing comes.

        Raises:
            Transient: `kafka-away`, when nothing comes for `timeout` seconds.
        """
        known = {place: max(self._end(place), ends.get(place, 0)) for place in self._starts}
        missing = {place: end for place, end in known.items() if end > self._starts[place]}
        heard = time.monotonic()
        while missing:
            messages = self.poll(0.5)
            if messages:
                heard = time.monotonic()
            else:
                check_heard(heard, timeout)
                idle()
            for message in messages:
                place = (message.topic() or "", message.partition() or 0)
                # The end may be a marker or a hole, which no message shows: then the partition's end is told instead.
                at_end = end_of_partition(message)
                there = message.offset() or 0
                if (there if at_end else there + 1) >= known[place]:
                    missing.pop(place, None)
                if not at_end and there < known[place]:
                    yield record(message)

    def _end(self, place: tuple[str, int]) -> int:
        deadline = time.monotonic() + kafka.TIMEOUT
        while True:
            try:
                marks = self._consumer.get_watermark_offsets(
                    TopicPartition(*place), timeout=kafka.TIMEOUT, cached=False
                )
            except KafkaException as error:
                if error.args[0].name() not in kafka.LEADER_IS_LATE or time.monotonic() > deadline:
                    raise kafka.translate(error.args[0], f"asking where {place[0]} ends") from error
                time.sleep(0.1)
            else:
                return marks[1] if marks else 0

    def mirror(self, offsets: dict[tuple[str, int], int]) -> None:
        """Commit what has moved to the group, without waiting for it and without caring whether it worked."""
        if time.monotonic() - self._mirrored_all > _MIRROR_SECONDS:
            self._mirrored, self._mirrored_all = {}, time.monotonic()
        moved = [TopicPartition(*place, at) for place, at in offsets.items() if self._mirrored.get(place) != at]
        # The broker keeps a commit as one batch of records, of a megabyte at most.
        for start in range(0, len(moved), _MIRRORED):
            with suppress(KafkaException):
                self._consumer.commit(offsets=moved[start : start + _MIRRORED], asynchronous=True)
        self._mirrored = offsets

    def close(self) -> None:
        """Leave."""
        self._consumer.close()


def check_heard(at: float, timeout: float = 60.0) -> None:
    """Raise Transient (`kafka-away`) when nothing has come for `timeout` seconds, since `at` (`time.monotonic`)."""
    if time.monotonic() - at > timeout:
        said = f"Kafka sent nothing for {timeout:.0f} s."
        raise Transient("kafka-away", said, kafka.CHECK)


def read_to_end(
    settings: Settings,
    starts: dict[tuple[str, int], int],
    ends: Mapping[tuple[str, int], int] = _NONE,
    *,
    committed: bool = True,
    timeout: float = 60.0,
    idle: Callable[[], None] = lambda: None,
) -> Iterator[Record]:
    """Yield every `committed` record from `starts` to the end that each partition has now, at least to `ends` (see `Tail.to_end`)."""
    if not starts:
        return
    # After the last record comes a marker, which no message shows: the end is known only when the broker has nothing more to give.
    tail = Tail(settings, starts, wait_ms=_SHORT_MS, committed=committed)
    try:
        yield from tail.to_end(timeout, ends, idle)
    finally:
        tail.close()
