"""The reader of a Debezium feed (S28): the same interface as the cut-aligned reader, over topics without checkpoints.

At-least-once and in log order, nothing more. What it has read is shown as soon as it has come to where the topics ended when it was
opened; from then on every batch is. Such a state may hold half of a transaction, and no LSN says where in Postgres's history it is: so
there are no tokens, no exact cuts, and nothing for verify to compare with. The position's version is the highest one handed out, and no
complete batch comes before the end that there was at the opening: what a reader that died had shown is never taken back.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from confluent_kafka import Message

from headrace.change import DELETE, Change, Checkpoint, Position, Source, Version
from headrace.consumer import ALL, Batch
from headrace.errors import Misconfigured, Transient
from headrace.log.debezium import EPOCH, Decoder
from headrace.log.lag import Lag
from headrace.log.refusal import check_age, refused
from headrace.log.tail import BEGINNING, Tail, end_of_partition, record
from headrace.log.topics import Ends, table_of, topic_of

if TYPE_CHECKING:
    from headrace.log.log import Log

Place = tuple[str, int]
_TOPICS_SECONDS = 5.0
_ENDS_SECONDS = 1.0
_STILL_SECONDS = 60.0
"""Without changes the position is handed out once in so long: it says how long ago the view was fed (S19)."""


_NEW_FEED = "Begin a new feed: another topic.prefix, HEADRACE_SOURCE, a snapshot."


@contextmanager
def _of_the_connector() -> Iterator[None]:
    """Where a topic is gone, or what was in it, name its writer: capture, which makes it anew for other readers, does not write it."""
    try:
        yield
    except Misconfigured as error:
        if error.code not in {"topic-missing", "log-lost-records"}:
            raise
        remedy = f"The connector writes it; what was in it no start of it brings back. {_NEW_FEED}"
        raise Misconfigured(error.code, error.message, remedy) from error


class FeedReader:
    """Reads the topics of one connector for one generation."""

    @_of_the_connector()
    def __init__(self, log: Log, tables: Collection[str], position: Position | None, group: str) -> None:
        """Go on from `position`, from zero when None; `group` is the consumer group that mirrors it [I6].

        Raises:
            Refused: the position makes no sense for this feed [I12]: `position-of-another-source`, `topic-replaced`, `position-ahead`,
                `away-too-long`, `build-too-slow`.
        """
        self._log = log
        self._settings = log.settings  # and how long the topics really keep tombstones
        self._all = tuple(tables) == ALL
        self._wanted = {topic_of(log.settings.source, table) for table in tables}
        self._source = Source("debezium", 0, log.settings.source, "", "")
        self.position = position or Position(source=self._source)
        if self.position.source != self._source:
            raise refused(
                "position-of-another-source", f"The view was built from {self.position.source}, not from this feed."
            )
        self._decoder = Decoder(self.position.version.lsn)
        self._read_to: dict[Place, int] = {}
        self._goal: dict[Place, int] = {}
        self._gone: dict[Place, bytes | None] = {}
        self._ends: Ends = {}
        self._asked = self._looked = self._told = 0.0
        self._whole = not self.position.loading
        self._tail = Tail(log.settings, {}, group)
        self._add_topics()
        # What was written before this moment is read; and of a later moment, where the topics ended then.
        self._fed = self.position.appended / 1000
        self._next: tuple[float, Ends] | None = None
        self._check_position()

    @_of_the_connector()
    def poll(self, timeout: float) -> Batch | None:
        """Return the next batch, or None when there is nothing new within about `timeout` seconds.

        Raises:
            Transient: `kafka-away`, `feed-topic-missing`.
            Poison: `undecodable-record`, `debezium-placeholder`, `debezium-truncate`.
            Misconfigured: `feed-incomplete`, `partitions-changed`, `key-changed` (S9), `topic-missing`, `log-lost-records`.
            Refused: `build-too-slow`, `away-too-long` (S19), `topic-replaced`.
        """
        self._require_tables()
        if time.monotonic() - self._looked > _TOPICS_SECONDS:
            self._add_topics()
        self._ask_ends()
        changes = [
            change
            for message in self._tail.poll(timeout, self._log.settings.batch_records)
            if (change := self._take(message)) is not None
        ]
        self._check_age()
        self._note_read()
        reached = all(self._read_to[place] >= end for place, end in self._goal.items())
        due = reached and (not self._whole or time.monotonic() - self._told > _STILL_SECONDS)
        return self._batch(changes, reached=reached) if changes or due else None

    @_of_the_connector()
    def lag(self) -> Lag:
        """Return what is missing up to where the topics end; there is no WAL to count."""
        self._ask_ends()
        records = self._unread(self._ends)
        return Lag(records, 0, time.time() - self._fed if records else 0.0)

    def mirror(self) -> None:
        """Show the position as the offsets of the consumer group; nothing ever reads it back [I6]."""
        self._tail.mirror(dict(self._read_to))

    def close(self) -> None:
        """Leave."""
        self._tail.close()

    def _take(self, message: Message) -> Change | None:
        place = (message.topic() or "", message.partition() or 0)
        if end_of_partition(message):
            self._read_to[place] = max(self._read_to[place], message.offset() or 0)
            return None
        topic, partition, offset, _, key, value, _ = record(message)
        self._read_to[place] = offset + 1
        change = self._decoder.change(table_of(topic), partition, offset, key, value)
        before, self._gone[place] = self._gone.get(place), key if change.op == DELETE else None
        if (
            change.op == DELETE and key == before
        ):  # the tombstone behind the `d` record; a batch may end between the two
            self._whole = False  # the position is to be told, or the next reader would take it for a delete
            return None
        return change

    def _ask_ends(self) -> None:
        now = time.time()  # not the monotonic clock, which stands still while a machine sleeps
        if 0 <= now - self._asked < _ENDS_SECONDS:
            return
        self._ends = self._log.topics.ends({topic: len(at) for topic, at in self.position.offsets.items()})
        self._asked = now
        self._next = self._next or (now, self._ends)
        self._note_read()

    def _note_read(self) -> None:
        if self._next and not self._unread(self._next[1]):
            self._fed, self._next = self._next[0], None

    def _unread(self, ends: Ends) -> int:
        return sum(
            max(0, end - self._read_to.get((topic, partition), 0))
            for topic, at in ends.items()
            for partition, end in enumerate(at)
        )

    def _check_age(self) -> None:
        if self.position.offsets:
            check_age(self._settings, self.position, self._fed, time.time())

    def _batch(self, changes: list[Change], *, reached: bool) -> Batch:
        loading = self.position.loading
        for (topic, partition), offset in self._read_to.items():
            self.position.offsets[topic][partition] = offset
        checkpoint = self._checkpoint() if reached else None
        self._whole = reached
        if checkpoint:
            self._told = time.monotonic()
            kept = self._settings.delete_retention_ms
            self.position = replace(
                self.position, version=checkpoint.version, appended=checkpoint.appended, retention=kept
            )
        if loading:
            changes = list({(change.table, change.key): change for change in changes}.values())
        else:
            changes.sort(key=lambda change: change.version)
        return Batch(changes, self.position.copy(), checkpoint, loading, self._decoder.schemas)

    def _checkpoint(self) -> Checkpoint:
        """Return what stands for a checkpoint: everything that was read is shown."""
        decoder = self._decoder
        ends = {topic: list(offsets) for topic, offsets in self.position.offsets.items()}
        version = Version(EPOCH, decoder.highest)
        return Checkpoint(version, decoder.commit_ts, decoder.xid, ends, self._source, appended=int(self._fed * 1000))

    def _add_topics(self) -> None:
        """Read what has come, where every topic is yet what it was."""
        self._looked = time.monotonic()
        described = self._described()
        for topic, (identity, count) in described.items():
            self._check_topic(topic, identity, count)
        new = [topic for topic in sorted(described) if (topic, 0) not in self._read_to]
        if not new:
            return
        self._settings = self._log.topics.in_force(new, self._settings)
        if not self.position.offsets:
            self.position.retention = self._settings.delete_retention_ms
            self.position.appended = int(
                time.time() * 1000
            )  # a build begins: nothing that it reads was removed before now (S19)
        counts = {topic: described[topic][1] for topic in new}
        begins, ends = self._log.topics.begins(counts), self._log.topics.ends(counts)
        starts: dict[Place, int] = {}
        for topic in new:
            offsets = self.position.offsets.setdefault(topic, [0] * counts[topic])
            if any(begin > offset for begin, offset in zip(begins[topic], offsets, strict=True)):
                raise Misconfigured(
                    "feed-incomplete",
                    f"Topic {topic} begins at {begins[topic]}, the view goes on from {offsets}: records between were deleted.",
                    "Set its cleanup.policy to compact, then begin a new feed: another topic.prefix, HEADRACE_SOURCE, a snapshot.",
                )
            starts |= {(topic, partition): offset for partition, offset in enumerate(offsets)}
            self._goal |= {(topic, partition): end for partition, end in enumerate(ends[topic])}
        self._read_to |= starts
        self._tail.add({place: offset or BEGINNING for place, offset in starts.items()})

    def _described(self) -> dict[str, tuple[str, int]]:
        try:
            return self._log.topics.describe([topic for topic in self._log.topics.names() if self._reads(topic)])
        except Misconfigured as error:
            if error.code != "topic-missing":
                raise
            if not self._read_to:  # nothing is a state yet
                raise Transient(error.code, error.message, error.remedy) from error
            return {}  # one was deleted just now: the next look decides

    def _check_topic(self, topic: str, identity: str, count: int) -> None:
        if self.position.topics.setdefault(topic, identity) != identity:
            raise refused("topic-replaced", f"Topic {topic} is not the one that the view was built from.")
        known = len(self.position.offsets.get(topic, ())) or count
        if count != known:
            raise Misconfigured(
                "partitions-changed",
                f"Topic {topic} has {count} partitions, the view knows {known}: keys are in others now, and their order is gone.",
                _NEW_FEED,
            )

    def _reads(self, topic: str) -> bool:
        prefix = f"{self._log.settings.source}."
        # Debezium's own topics, as `<prefix>.transaction`, have no schema in their names.
        return topic in self._wanted or (
            self._all and topic.startswith(prefix) and topic.removeprefix(prefix).count(".") == 1
        )

    def _require_tables(self) -> None:
        missing = self._wanted - self.position.topics.keys() if not self._all else set()
        if missing:
            table = table_of(min(missing))
            raise Transient(
                "feed-topic-missing",
                f"The feed {self._log.settings.source} has no topic of {table} yet.",
                f"HEADRACE_SOURCE must be the connector's topic.prefix, and its table.include.list have {table}; it makes the "
                "topic with the first row. For an empty table make it yourself.",
            )

    def _check_position(self) -> None:
        """Refuse a position that lies beyond the feed, or so far back that tombstones before its end may be gone (S19)."""
        if gone := self.position.offsets.keys() - {topic for topic, _ in self._read_to}:
            raise Misconfigured(
                "topic-missing", f"The view was built from {', '.join(sorted(gone))}: Kafka has it no more."
            )
        for place, end in self._goal.items():
            if self._read_to[place] > end:
                raise refused(
                    "position-ahead", f"The view is at {self._read_to[place]} of {place[0]}, which ends at {end}."
                )
        self._ask_ends()
        self._check_age()
