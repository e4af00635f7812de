"""The writer of cuts: one Kafka transaction a cut, sealed by its checkpoint.

Offsets are known from the delivery reports before the transaction commits (S16), so the checkpoint can name them and still be
part of it. What is unknown after a failure (did the commit land?) is never guessed: the commit is retried; after anything fatal
the caller starts again from `Log.newest_checkpoint` (S3).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from headrace import codec
from headrace.change import Checkpoint, Source, TableSchema, Version
from headrace.codec import Headers
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.log import kafka
from headrace.log.spine import Named, kept, outdated
from headrace.log.tail import Record, records_lost
from headrace.log.topics import Ends, Topics, checkpoints_topic, partitions_changed, schemas_topic, topic_replaced
from headrace.log.unmarked import Breaks
from headrace.settings import Settings

KEPT_CHECKPOINTS = 2_000
"""Checkpoints that stay in their topic; older ones are tombstoned in bunches of as many (S16)."""
_COMMIT_SECONDS = 60
_MARKERS_SECONDS = 0.003
"""A commit is answered before its markers are written. A transaction that begins meanwhile is refused, and librdkafka asks again after
20 ms: a cut that waits this long first is there sooner."""
_NONE = (0, "", b"")
_BUNCH, _BUNCH_BYTES = 256, 1024 * 1024
"""Records are handed to librdkafka in bunches of so many, or of so many bytes: the loop costs less than a call for each."""

_Record = tuple[str, bytes, bytes | None, Headers]
"""(topic, key, value, headers)."""


class CutWriter:
    """Writes cuts of one source. One at a time per source: `open` fences every predecessor.

    Attributes:
        records: Records in the cuts that were committed.
        open_records: Records in the open cut; `open_bytes` of keys and values.
        opened_at: `time.monotonic()` when the open cut began; 0.0 when none is open.
        sealed: Ends of the newest cut that was committed.
    """

    def __init__(self, settings: Settings, topics: Topics) -> None:
        """Connect to nothing yet."""
        self._settings = settings
        self._topics = topics
        self._checkpoints = checkpoints_topic(settings.source)
        self._schemas = schemas_topic(settings.source)
        self._producer: Producer | None = None
        self._ends: Ends = {}
        self._ids: dict[str, str] = {}
        self._last: dict[str, _Record | None] = {}
        self._begun: set[str] = set()
        self._waiting: list[_Record] = []
        self.sealed: Ends = {}
        self._breaks = Breaks()
        self._bunch_ends = _BUNCH_BYTES
        self._failed: HeadraceError | None = None
        self._largest = _NONE
        self._kept: deque[bytes] = deque()
        self._named = Named()
        self._committed_at = 0.0
        self.records = self.open_records = self.open_bytes = 0
        self.opened_at = 0.0

    def open(self) -> None:
        """Fence every predecessor; complete or abort the transaction that it left (S3). By then readers are shown all that was committed.

        Raises:
            Transient: `kafka-away`. Misconfigured: `transaction-timeout`.
        """
        self._failed = None
        self._producer = kafka.producer(
            self._settings,
            **{
                "transactional.id": f"headrace-{self._settings.source}",
                "transaction.timeout.ms": 60_000,
                "error_cb": self._breaks.note,
            },
        )
        with kafka.kafka_errors("opening the transactional writer"):
            self._producer.init_transactions(_COMMIT_SECONDS)

    def resume(self, checkpoint: Checkpoint | None, tick: Callable[[], None] = lambda: None) -> None:
        """Go on after `checkpoint`, the newest one in the log (None for a new log): take over its `ends`.

        All that are there are read for that: `tick` is called meanwhile, and ends it by what it raises.

        Raises:
            Misconfigured: `partitions-changed` (S9), `topic-missing`.
        """
        ends = checkpoint.ends if checkpoint else {}
        described = self._topics.await_there({self._checkpoints, self._schemas, *ends})
        self._ids = {topic: identity for topic, (identity, _) in described.items()}
        for topic, offsets in ends.items():
            if described[topic][1] != len(offsets):
                raise partitions_changed(topic, described[topic][1], len(offsets))
        self.sealed, self._ends = ends, {topic: list(offsets) for topic, offsets in ends.items()}
        self._last = {topic: None for topic, offsets in ends.items() if len(offsets) == 1}
        self._named = Named()
        self._kept = kept(self._settings, self._topics, tick)

    def add_topic(self, *topics: str) -> None:
        """Name topics in every checkpoint from now on, also before they have records: an empty table is a state too."""
        for topic, (identity, count) in self._topics.describe(set(topics) - self._ends.keys()).items():
            self._ids[topic], self._ends[topic] = identity, [0] * count
            if count == 1:
                self._last[topic] = None

    def check_topics(self) -> None:
        """Refuse topics that are no longer those that this writer began with: it would write on into others.

        Raises:
            Misconfigured: `topic-replaced`, `topic-missing`.
        """
        known = dict(self._ids)  # another thread may ask, while topics are added
        for topic, (identity, _) in self._topics.await_there(known).items():
            if identity != known[topic]:
                raise topic_replaced(topic)

    def produce(self, topic: str, key: bytes, value: bytes | None, headers: Headers) -> None:
        """Append a record to the open cut, which begins with the first one.

        Raises:
            Misconfigured: `row-too-large`, `partitions-changed`; also by `seal`, for what the broker said of an earlier record.
            Transient: the cut is lost; start again from the newest checkpoint.
        """
        if not self.opened_at:
            self._begin()
        size = len(key) + (len(value) if value else 0)
        if size > self._largest[0]:
            self._note_largest(size, topic, key)
        self.open_records += 1
        self.open_bytes += size
        self._waiting.append((topic, key, value, headers))
        if len(self._waiting) >= _BUNCH or self.open_bytes >= self._bunch_ends:
            self._hand_over()

    def _note_largest(self, size: int, topic: str, key: bytes) -> None:
        """Refuse a record beyond the limit; remember the largest of the cut, which the broker may refuse without naming it."""
        if size > self._settings.message_max_bytes:
            raise Misconfigured(
                "row-too-large",
                f"{_row(topic, key)} is {size} bytes as a record.",
                f"Raise HEADRACE_MESSAGE_MAX_BYTES (now {self._settings.message_max_bytes}) and start capture again.",
            )
        self._largest = size, topic, key

    def schema(self, schema: TableSchema) -> None:
        """Publish a schema version in the open cut (S13)."""
        if not self.opened_at:
            self._begin()
        self._send(self._schemas, codec.encode_schema_key(schema), codec.encode_schema(schema), [], 0)

    def also(self, topic: str, key: bytes, value: bytes | None) -> None:
        """Append a record of a topic with one partition to the open cut: it becomes durable with it, or not at all."""
        if not self.opened_at:
            self._begin()
        self._send(topic, key, value, [], 0)

    def seal(
        self,
        *,
        version: Version,
        commit_ts: int,
        xid: int,
        source: Source,
        partial: tuple[int, int] | None = None,
        inexact: tuple[str, ...] = (),
        snapshot: str | None = None,
        approximate: Mapping[str, int] | None = None,
    ) -> Checkpoint:
        """End the cut: everything delivered, then the checkpoint, then the commit. Without an open cut: an empty one (S4).

        Raises:
            Transient: `cut-lost`; the commit did not land or may not have: start again from the newest checkpoint.
        """
        if not self.opened_at:
            self._begin()
        self._send_last()
        self._flush()
        ends = {topic: list(offsets) for topic, offsets in self._ends.items()}
        checkpoint = Checkpoint(version, commit_ts, xid, ends, source, partial, inexact, snapshot, version.lsn)
        checkpoint = replace(checkpoint, approximate=dict(approximate or {}))
        checkpoint, named = self._named.choose(checkpoint)
        key = codec.encode_checkpoint_key(checkpoint)
        self._send(self._checkpoints, key, codec.encode_checkpoint(checkpoint, named), [], 0)
        self._trim(key)
        self._flush()  # a report that speaks against it must not come after the commit
        self._commit()
        self.records += self.open_records
        self.sealed = ends
        self._closed()
        if snapshot != "running":
            self._breaks.look(self._topics, self._schemas, ends)
        return checkpoint

    def broke(self) -> bool:
        """Whether connections broke since the newest cut was committed; librdkafka says so only when it is asked."""
        with suppress(HeadraceError):
            self._serve(lambda client: client.poll(0))
        return bool(self._breaks)

    def again(self, records: Iterable[Record], *, commit: bool) -> None:
        """Write records once more, in their partitions and without a checkpoint: its markers end what none has ended there before.

        Raises:
            Transient: as `seal`.
        """
        self._begin()
        for topic, partition, _, _, key, value, headers in records:
            self._send(topic, key, value, headers, partition)
        self._flush()
        (self._commit if commit else self.abort)()
        self._closed()

    def abort(self) -> None:
        """Throw the open cut away. The caller starts again from the newest checkpoint: `ends` are no longer known."""
        if self._producer and self.opened_at:
            with kafka.kafka_errors("aborting a cut"):
                self._producer.abort_transaction(_COMMIT_SECONDS)
            self._failed = None  # the reports of what was thrown away
        self._last = dict.fromkeys(self._last)
        self._waiting.clear()
        self._closed()

    def _closed(self) -> None:
        self.open_records = self.open_bytes = 0
        self.opened_at, self._largest, self._bunch_ends = 0.0, _NONE, _BUNCH_BYTES
        self._begun.clear()

    def close(self) -> None:
        """Forget the producer. A cut that is open stays to be aborted by the next `open` or by the broker's timeout."""
        if self._producer:
            self._producer.purge()
        self._producer = None

    def _begin(self) -> None:
        time.sleep(max(0.0, self._committed_at + _MARKERS_SECONDS - time.monotonic()))
        with kafka.kafka_errors("beginning a cut"):
            self._client.begin_transaction()
        self.opened_at = time.monotonic()

    @property
    def _client(self) -> Producer:
        if self._producer is None:
            raise Transient("writer-closed", "The writer is closed.")
        return self._producer

    def _hand_over(self) -> None:
        """Hand what waits to librdkafka, but keep a topic's last record (`_send_last`). The first has a report: any loss is of it too."""
        records, self._waiting = self._waiting, []
        self._bunch_ends = self.open_bytes + _BUNCH_BYTES
        self._hold_back(records)
        begun, single, produce, report = self._begun, self._last, self._client.produce, self._delivered
        for topic, key, value, headers in records:
            try:
                # By position, and headers as a list of pairs of str and bytes: what librdkafka's binding reads fastest.
                if topic in begun:
                    produce(topic, value, key, 0, None, None, 0, headers)  # type: ignore[arg-type]
                    continue
                produce(topic, value, key, 0 if topic in single else -1, report, None, 0, headers)  # type: ignore[arg-type]
                if topic in single:
                    begun.add(topic)
            except (BufferError, KafkaException):
                self._send(topic, key, value, headers, 0 if topic in single else -1)

    def _hold_back(self, records: list[_Record]) -> None:
        for at in sorted({record[0]: at for at, record in enumerate(records)}.values(), reverse=True):
            topic = records[at][0]
            if topic not in self._ends:
                self.add_topic(topic)
            if topic in self._last:
                before, self._last[topic] = self._last[topic], records.pop(at)
                if before:
                    self._send(*before, 0)

    def _send_last(self) -> None:
        """Hand over the last record of each topic with one partition: where it lands is where the cut ends there.

        A report for each record costs as much as the record. A partition keeps the order of its writer.
        """
        self._hand_over()
        for topic, last in self._last.items():
            if last is not None:
                self._last[topic] = None
                self._send(*last, 0)

    def _send(self, topic: str, key: bytes, value: bytes | None, headers: Headers, partition: int) -> None:
        """Hand one record to librdkafka, with a report; partition -1 leaves the choice to the partitioner."""
        while True:
            try:
                self._client.produce(topic, value, key, partition, self._delivered, None, 0, headers)  # type: ignore[arg-type]
            except BufferError:
                self._serve(lambda client: client.poll(0.1))
                self._raise_broken()
            except KafkaException as error:
                self._raise_broken()
                raise self._explain(error.args[0], f"writing to {topic}") from error
            else:
                return

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            # What is thrown away because another record was refused says nothing of why: `_raise_broken` does.
            if error.name() != "_PURGE_QUEUE":
                self._failed = self._failed or self._explain(error, "delivering the records of a cut")
            return
        if kafka.lost(message):
            said = f"Kafka takes records of a cut for {message.topic()} for ones that it has, and has not."
            self._failed = self._failed or Transient("cut-lost", said, "capture writes it again.")
            return
        topic, partition, offset = message.topic() or "", message.partition() or 0, message.offset() or 0
        ends = self._ends.get(topic)  # None: no table's
        if ends is not None and partition >= len(ends):
            self._failed = self._failed or partitions_changed(topic, partition + 1, len(ends))
        elif ends is not None:
            if offset < (end := ends[partition]):  # readers that are at the end would never read it
                self._failed = records_lost(topic, f"{topic} partition {partition} goes on at {offset}, not at {end}.")
            ends[partition] = offset + 1

    def _explain(self, error: KafkaError, doing: str) -> HeadraceError:
        if error.name() != "MSG_SIZE_TOO_LARGE":
            return kafka.translate(error, doing)
        size, topic, key = self._largest  # tried again it would be refused for ever
        return Misconfigured(
            "row-too-large",
            f"The broker refuses a record as too large. {_row(topic, key)} is the largest of its cut, {size} bytes.",
            "Raise max.message.bytes of that topic: capture sets it when it starts, by HEADRACE_MESSAGE_MAX_BYTES.",
        )

    def _raise_broken(self) -> None:
        """Raise why nothing more of this cut can be sent, if so: a record was refused, perhaps one without a report of its own."""
        error = kafka.broken(self._client)
        if error is not None:
            raise self._explain(error, "delivering the records of a cut")

    def _flush(self) -> None:
        deadline = time.monotonic() + _COMMIT_SECONDS
        while self._serve(lambda client: client.flush(1.0)):
            self._raise_broken()
            if time.monotonic() > deadline:
                raise Transient("cut-lost", "Kafka did not take the records of a cut in time.", kafka.CHECK)

    def _serve(self, call: Callable[[Producer], int]) -> int:
        """Let librdkafka deliver reports; raise what they say. The binding raises a fatal error out of a callback as SystemError."""
        try:
            left = call(self._client)
        except SystemError as error:
            raise Transient(
                "fenced", f"The writer of cuts was fenced or broke: {error.__cause__}.", "capture starts again."
            ) from error
        self._raise_failed()
        return left

    def _raise_failed(self) -> None:
        if self._failed is not None:  # until the cut is thrown away
            if self._failed.code == "log-lost-records":
                self.check_topics()  # one that was made anew is told as that
            raise self._failed

    def _trim(self, key: bytes) -> None:
        if not self._kept or self._kept[-1] != key:
            self._kept.append(key)
        for old in outdated(self._kept, KEPT_CHECKPOINTS):
            self._send(self._checkpoints, old, None, [], 0)

    def _commit(self) -> None:
        deadline = time.monotonic() + _COMMIT_SECONDS
        while True:
            try:
                self._client.commit_transaction(_COMMIT_SECONDS)
            except KafkaException as error:
                cause = error.args[0]
                # Retriable means that the outcome is unknown: asking again is the only way to learn it (S3).
                if not cause.retriable() or time.monotonic() > deadline:
                    failure = self._explain(cause, "committing a cut")  # a record that was not taken may be why
                    lost = Transient(
                        "cut-lost", f"A cut could not be committed: {cause.str()}.", "capture starts again."
                    )
                    raise (failure if isinstance(failure, Misconfigured) else lost) from error
            else:
                self._committed_at = time.monotonic()
                self._raise_failed()
                return


def _row(topic: str, key: bytes) -> str:
    return f"The row {key.decode(errors='replace')[:200]} for {topic}"
