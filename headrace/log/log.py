"""The log of one source: its topics, its newest checkpoint, its schemas, and plain scans of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property

from headrace import codec
from headrace.change import Change, Checkpoint, Position, TableSchema, Version
from headrace.errors import Misconfigured
from headrace.log import kafka
from headrace.log.feed import FeedReader
from headrace.log.reader import Reader
from headrace.log.spine import Spine
from headrace.log.tail import BEGINNING, Record, read_to_end, records_lost
from headrace.log.topics import (
    ANSWERS,
    CONTROL,
    PARKED,
    Ends,
    Topics,
    checkpoints_topic,
    schemas_topic,
    spine_config,
    table_config,
    table_of,
    topic_of,
)
from headrace.log.values import Values, writer
from headrace.log.writer import CutWriter
from headrace.settings import Settings

Schemas = dict[tuple[str, int], TableSchema]


class Log:
    """The topics of `settings.source`. Cheap to make: it connects when first asked.

    Attributes:
        ahead: By how many seconds the clock here is ahead of the broker's, as far as is known: a runner compares them all the time.
    """

    def __init__(self, settings: Settings) -> None:
        """Use the source and the servers that `settings` name."""
        self.settings = settings
        self.ahead = 0.0

    @cached_property
    def topics(self) -> Topics:
        """Return what makes and describes topics."""
        return Topics(self.settings, kafka.admin(self.settings))

    @cached_property
    def values(self) -> Values:
        """Return what reads the values of records, in either codec."""
        return Values(self.settings, self.schemas)

    @property
    def fed_by_debezium(self) -> bool:
        """Whether a Debezium connector writes the tables' topics, so that there are no checkpoints (S28).

        Raises:
            Misconfigured: `bad-setting`.
        """
        feed = self.settings.feed
        if feed not in {"headrace", "debezium"}:
            raise Misconfigured(
                "bad-setting", f"HEADRACE_FEED={feed!r} is not headrace or debezium.", "Change HEADRACE_FEED."
            )
        return feed == "debezium"

    def require_checkpoints(self) -> None:
        """Refuse what cannot be done with a Debezium feed (S28). Raises Misconfigured: `no-checkpoints`."""
        if self.fed_by_debezium:
            raise Misconfigured(
                "no-checkpoints",
                f"{self.settings.source} is fed by Debezium and has no checkpoints: no LSN says which state of Postgres a view shows.",
                "Leave HEADRACE_FEED out where headrace captures the source; a Debezium feed cannot be verified or waited for.",
            )

    def topic_of(self, table: str) -> str:
        """Return the topic of ``schema.table``."""
        return topic_of(self.settings.source, table)

    def table_of(self, topic: str) -> str:
        """Return the table of a topic."""
        return table_of(topic)

    def ensure_spine(self) -> None:
        """Make the topics that every source has: schemas, checkpoints, control, answers, parked."""
        wanted = spine_config(self.settings)
        if self.fed_by_debezium:
            wanted = {name: wanted[name] for name in (CONTROL, ANSWERS, PARKED)}
        self.topics.make({name: (1, config) for name, config in wanted.items()})

    def ensure_table(self, table: str) -> str:
        """Make a table's topic if it is missing; return its name."""
        return self.ensure_tables([table])[0]

    def ensure_tables(self, tables: Iterable[str]) -> list[str]:
        """Make the topics of tables where they are missing, in few requests; return their names.

        One that a broker made for somebody who asked for it is configured.
        """
        topics, config, there = [*map(self.topic_of, tables)], table_config(self.settings), self.topics.names()
        self.topics.configure({topic: config for topic in topics if topic in there})
        self.topics.make({topic: (self.settings.partitions, config) for topic in topics if topic not in there})
        return topics

    def configure(self, checkpoint: Checkpoint | None) -> list[str]:
        """Let the topics that `checkpoint` names, and the spine, follow settings that changed since they were made; say what was altered.

        Raises:
            Misconfigured: `kafka-refuses`, when the broker's rights forbid it.
        """
        return self.topics.configure(
            spine_config(self.settings)
            | dict.fromkeys(checkpoint.ends if checkpoint else (), table_config(self.settings))
        )

    def own_topics(self) -> list[str]:
        """Return the topics that were made for this source alone, the spine last. Another's name may begin as ours do."""
        spine = [checkpoints_topic(self.settings.source), schemas_topic(self.settings.source)]
        return [*map(self.topic_of, self.tables()), *sorted(self.topics.names() & set(spine))]

    def delete_topics(self, names: Collection[str]) -> None:
        """Delete topics of `own_topics`. Those of the spine, which name the others, go when the others are gone."""
        spine = {checkpoints_topic(self.settings.source), schemas_topic(self.settings.source)}
        self.topics.delete(set(names) - spine)
        self.topics.delete(spine & set(names))

    def tables(self) -> list[str]:
        """Return the tables that have a topic: a schema version or the newest checkpoint names them."""
        newest, there = self.newest_checkpoint(), self.topics.names()
        known = {table for table, _ in self.schemas()} | set(map(table_of, newest.ends if newest else ()))
        return sorted(table for table in known if self.topic_of(table) in there)

    def writer(self) -> CutWriter:
        """Return the writer of cuts in the codec of the settings, closed. Raises Misconfigured: `bad-setting`."""
        return writer(self.settings, self.topics, self.values, self.schemas)

    def partitions(self, topics: Collection[str]) -> dict[str, int]:
        """Return how many partitions each topic has."""
        return {name: count for name, (_, count) in self.topics.describe(topics).items()}

    def checkpoints(self) -> Iterator[Checkpoint]:
        """Yield the committed checkpoints that are in their topic now, oldest first."""
        self.require_checkpoints()
        return self._checkpoints(Spine(), BEGINNING)

    def _checkpoints(self, spine: Spine, start: int) -> Iterator[Checkpoint]:
        for record in read_to_end(self.settings, {(checkpoints_topic(self.settings.source), 0): start}):
            checkpoint = spine.take(record.value, record.offset, record.timestamp)
            if checkpoint is not None:
                yield checkpoint

    def newest_checkpoint(self, *, complete: bool = False, until: Version | None = None) -> Checkpoint | None:
        """Return the newest committed checkpoint, or the newest complete one, up to `until`; None when there is none.

        None of an earlier epoch than that of `until`: of these but the last is kept, whatever is trimmed after it.
        """
        self.require_checkpoints()
        topic = checkpoints_topic(self.settings.source)
        if topic not in self.topics.names():
            return None
        end, begin = self._span(topic)
        for start in _back_from(end, begin):
            spine = Spine()
            read = self._checkpoints(spine, start)
            within = (c for c in read if until is None or (until.epoch, 0) <= c.version <= until)
            found = [c for c in within if c.complete or not complete]
            # Half a transaction needs no base: it is found, though newer states are passed over, whose base lies before `start`.
            if found and (found[-1].offset > spine.passed_over or start == begin):
                return found[-1]
        return None

    def states_since(self, version: Version) -> list[Checkpoint]:
        """Return the complete checkpoints that are kept, in their order, from one before `version` on if there is one.

        With many partitions one has only the ends that its record names.
        """
        topic = checkpoints_topic(self.settings.source)
        found: list[Checkpoint] = []
        for start in _back_from(*self._span(topic)):
            records = (each for each in read_to_end(self.settings, {(topic, 0): start}) if each.value is not None)
            read = (codec.decode_checkpoint(each.value, each.offset, each.timestamp) for each in records)  # type: ignore[arg-type]
            found = [checkpoint for checkpoint in read if checkpoint.complete]
            if found and found[0].version < version:
                break
        return found

    def _span(self, topic: str) -> tuple[int, int]:
        """Return where a topic of one partition ends, and where it begins."""
        return self.topics.ends({topic: 1})[topic][0], self.topics.begins({topic: 1})[topic][0]

    def remains(self, tables: Collection[str]) -> Ends:
        """Return the ends of topics that have records, of `tables` and of all that the schemas name: what a log without checkpoints has."""
        known = {table for table, _ in self.schemas()} | set(tables)
        ends = self.topics.ends(self.partitions(self.topics.names() & set(map(self.topic_of, known))))
        return {topic: offsets for topic, offsets in ends.items() if any(offsets)}

    def newest_epoch(self, ends: Ends) -> int:
        """Return the highest epoch of the records below `ends`, 0 when there are none; it never falls along a partition.

        Raises:
            Poison: `undecodable-record`.
        """
        newest = 0
        for topic, partition, offset, _, key, _, headers in self._newest_records(ends):
            # Without its value, which may be of a shape that is lost.
            change = codec.decode_change(table_of(topic), partition, offset, key, None, headers)
            newest = max(newest, change.version.epoch)
        return newest

    def check_written_by_us(self, ends: Ends) -> None:
        """Refuse topics of a log without checkpoints whose newest records headrace did not write: a connector's, most likely.

        Raises:
            Misconfigured: `topic-of-another-writer`.
        """
        others = sorted({record.topic for record in self._newest_records(ends) if "epoch" not in dict(record.headers)})
        if others:
            raise Misconfigured(
                "topic-of-another-writer",
                f"{', '.join(others)} has records that headrace did not write: is it a Debezium connector's?",
                "Set another HEADRACE_SOURCE for what headrace captures; or end that writer and delete its topics.",
            )

    def _newest_records(self, ends: Ends) -> Iterator[Record]:
        """Yield the newest record of each partition below `ends` that has any."""
        begins = self.topics.begins({topic: len(of) for topic, of in ends.items()})
        for (topic, partition), end in {(t, p): end for t, of in ends.items() for p, end in enumerate(of)}.items():
            for start in _back_from(end, begins[topic][partition]):
                last = deque(read_to_end(self.settings, {(topic, partition): start}), maxlen=1)
                if last:
                    yield last[0]
                    break

    def check_ends(self, checkpoint: Checkpoint) -> None:
        """Refuse a log that ends below its newest checkpoint: Kafka lost acknowledged records (S3); or that nobody can read from zero [I4].

        Raises:
            Misconfigured: `log-lost-records`, `topic-missing`, `schemas-missing`.
        """
        missing = sorted(checkpoint.ends.keys() - self.topics.names())
        if missing:
            raise Misconfigured(
                "topic-missing",
                f"The newest checkpoint names {', '.join(missing)}: Kafka has no such topic any more.",
                "Run: headrace resnapshot --recover. It makes the topic anew; then rebuild the views that read it.",
            )
        counts = {topic: len(ends) for topic, ends in checkpoint.ends.items()}
        begins, actual = self.topics.begins(counts), self.topics.ends(counts, committed=False)
        for topic, ends in checkpoint.ends.items():
            for partition, (end, is_now) in enumerate(zip(ends, actual[topic], strict=True)):
                said = f"{topic} partition {partition}"
                if is_now < end:
                    raise records_lost(topic, f"{said} ends at {is_now}; the newest checkpoint says {end}.")
                if begin := begins[topic][partition]:
                    raise records_lost(topic, f"{said} has no records before {begin} any more.")
        shaped = {self.topic_of(table) for table, _ in self.schemas()}
        unread = sorted(topic for topic, ends in checkpoint.ends.items() if any(ends) and topic not in shaped)
        if unread:
            raise Misconfigured(
                "schemas-missing",
                f"Records in {', '.join(unread)} name shapes that are not in {schemas_topic(self.settings.source)}: it was deleted.",
                "Run: headrace resnapshot --recover. It makes those topics anew; then rebuild the views that read them.",
            )

    def schemas(self) -> Schemas:
        """Return every schema version that is in the log now."""
        return self.schemas_from(BEGINNING)[0]

    def schemas_from(self, start: int) -> tuple[Schemas, int]:
        """Return the schema versions that are in the log now from offset `start` on, and from where to go on."""
        topic = schemas_topic(self.settings.source)
        found: Schemas = {}
        if topic not in self.topics.names():
            return found, start
        for record in read_to_end(self.settings, {(topic, 0): start}):
            start = record.offset + 1
            if record.value is not None:
                schema = codec.decode_schema(record.value)
                found[schema.table, schema.version] = schema
        return found, start

    def scan(self, *tables: str, since: Ends | None = None) -> Iterator[Change]:
        """Yield every committed change of some tables to the end, each partition's in order.

        From `since`, offsets by topic; a topic that is not in it comes from zero. Both records of a delete come: the `d` and the tombstone.
        """
        topics = [self.topic_of(table) for table in tables]
        starts = {topic: (since or {}).get(topic) or [BEGINNING] * n for topic, n in self.partitions(topics).items()}
        places = {(topic, partition): at for topic, ats in starts.items() for partition, at in enumerate(ats)}
        for topic, partition, offset, _, key, value, headers in read_to_end(self.settings, places):
            yield codec.decode_change(table_of(topic), partition, offset, key, value, headers, self.values.envelope)

    def ends(self, table: str) -> list[int]:
        """Return where the committed part of a table's topic ends, partition by partition."""
        topic = self.topic_of(table)
        ends: Ends = self.topics.ends(self.partitions([topic]))
        return ends[topic]

    def reader(
        self, tables: Collection[str], position: Position | None, group: str = "", until: Version | None = None
    ) -> Reader | FeedReader:
        """Return a reader that goes on from `position`, from zero when None; `group` mirrors it.

        It is cut-aligned, but for a Debezium feed, and stops at the checkpoint at `until`.
        """
        if self.fed_by_debezium:
            return FeedReader(self, tables, position, group)
        return Reader(self, tables, position, group, until)


def _back_from(end: int, begin: int) -> Iterator[int]:
    """Yield offsets to read from, ever further back: 200 before `end`, then ten times as many, at last the first, `begin`."""
    start = end
    while start > begin:
        start = max(begin, start - 10 * max(20, end - start))
        yield start
