"""The reader of a Debezium feed (S28): the same interface as the cut-aligned reader, over topics without checkpoints.

At-least-once and in log order, nothing more. What it has read is shown as soon as it has come to where the topics ended when it was
opened; from then on every batch is. Such a state may hold half of a transaction, and no LSN says where in Postgres's history it is: so
there are no tokens, no exact cuts, and nothing for verify to compare with. The position's version is the highest one handed out, and no
complete batch comes before the end that there was at the opening: what a reader that died had shown is never taken back.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from confluent_kafka import Message

from headrace.change import DELETE, Change, Checkpoint, Position, Source, Version
from headrace.consumer import ALL, Batch
from headrace.errors import Misconfigured, Transient
from headrace.log.debezium import EPOCH, Decoder
from headrace.log.reader import Lag
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


class FeedReader:
    """Reads the topics of one connector for one generation."""

    def __init__(self, log: Log, tables: Collection[str], position: Position | None, group: str) -> None:
        """Go on from `position`, from zero when None; `group` is the consumer group that mirrors it [I6].

        Raises:
            Refused: the position makes no sense for this feed [I12]: `position-of-another-source`, `topic-replaced`, `position-ahead`,
                `away-too-long`, `build-too-slow`.
        """
        self._log = log
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
        self._ends: Ends = {}
        self._asked = self._looked = self._told = 0.0
        self._whole = not self.position.loading
        self._unread = False
        self._behind_since: float | None = None
        self._tail = Tail(log.settings, {}, group)
        self._add_topics()
        self._check_position()

    def poll(self, timeout: float) -> Batch | None:
        """Return the next batch, or None when there is nothing new within about `timeout` seconds.

        Raises:
            Transient: `kafka-away`, `feed-topic-missing`.
            Poison: `undecodable-record`, `debezium-placeholder`, `debezium-truncate`.
            Misconfigured: `feed-incomplete`; Refused: `build-too-slow`, `away-too-long` (S19).
        """
        self._require_tables()
        if time.monotonic() - self._looked > _TOPICS_SECONDS:
            self._add_topics()
        changes = [
            change
            for message in self._tail.poll(timeout, self._log.settings.batch_records)
            if (change := self._take(message)) is not None
        ]
        reached = all(self._read_to[place] >= end for place, end in self._goal.items())
        due = reached and (not self._whole or time.monotonic() - self._told > _STILL_SECONDS)
        return self._batch(changes, reached=reached) if changes or due else None

    def lag(self) -> Lag:
        """Return what is missing up to where the topics end; there is no WAL to count."""
        if time.monotonic() - self._asked > _ENDS_SECONDS:
            self._ends = self._log.topics.ends({topic: len(at) for topic, at in self.position.offsets.items()})
            self._asked = time.monotonic()
        records = sum(
            max(0, end - self._read_to.get((topic, partition), 0))
            for topic, ends in self._ends.items()
            for partition, end in enumerate(ends)
        )
        self._behind_since = (self._behind_since or time.time()) if records else None
        return Lag(records, 0, time.time() - self._behind_since if self._behind_since else 0.0)

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
        return self._decoder.change(table_of(topic), partition, offset, key, value)

    def _batch(self, changes: list[Change], *, reached: bool) -> Batch:
        loading = self.position.loading
        if self._unread and self.position.offsets:  # what there was at the opening, which may be as old as the position
            check_age(self._log.settings, self.position)
        for (topic, partition), offset in self._read_to.items():
            self.position.offsets[topic][partition] = offset
        checkpoint = self._checkpoint() if reached else None
        self._whole = reached
        if checkpoint:
            self._told, self._unread = time.monotonic(), False
            self.position = replace(self.position, version=checkpoint.version, appended=checkpoint.appended)
        if loading:
            changes = list({(change.table, change.key): change for change in changes}.values())
        else:
            changes = [now for before, now in zip([None, *changes], changes, strict=False) if not _said(before, now)]
            changes.sort(key=lambda change: change.version)
        offsets = {topic: list(offsets) for topic, offsets in self.position.offsets.items()}
        position = replace(self.position, offsets=offsets, topics=dict(self.position.topics))
        return Batch(changes, position, checkpoint, loading, self._decoder.schemas)

    def _checkpoint(self) -> Checkpoint:
        """Return what stands for a checkpoint: everything that was read is shown."""
        decoder, now = self._decoder, int(time.time() * 1000)
        ends = {topic: list(offsets) for topic, offsets in self.position.offsets.items()}
        version = Version(EPOCH, decoder.highest)
        return Checkpoint(version, decoder.commit_ts, decoder.xid, ends, self._source, appended=now)

    def _add_topics(self) -> None:
        self._looked = time.monotonic()
        new = [
            topic
            for topic in sorted(self._log.topics.names())
            if self._reads(topic) and (topic, 0) not in self._read_to
        ]
        if not new:
            return
        if not self.position.offsets:
            self.position.appended = int(
                time.time() * 1000
            )  # a build begins: nothing that it reads was removed before now (S19)
        described = self._log.topics.describe(new)
        counts = {topic: described[topic][1] for topic in new}
        begins, ends = self._log.topics.begins(counts), self._log.topics.ends(counts)
        starts: dict[Place, int] = {}
        for topic in new:
            identity, count = described[topic]
            if self.position.topics.setdefault(topic, identity) != identity:
                raise refused("topic-replaced", f"Topic {topic} is not the one that the view was built from.")
            offsets = self.position.offsets.setdefault(topic, [0] * count)
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
        behind = self.position.loading
        for place, end in self._goal.items():
            if self._read_to[place] > end:
                raise refused(
                    "position-ahead", f"The view is at {self._read_to[place]} of {place[0]}, which ends at {end}."
                )
            behind = behind or self._read_to[place] < end
        self._unread = behind
        if behind and self.position.offsets:
            check_age(self._log.settings, self.position)


def _said(before: Change | None, now: Change) -> bool:
    """Whether `now` is the tombstone of the `d` record just before it."""
    return before is not None and now.op == DELETE and before[:3] == now[:3]
