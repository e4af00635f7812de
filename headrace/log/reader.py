"""The cut-aligned reader: from the topics to batches that end where Postgres once was (S18).

One librdkafka consumer reads the checkpoints and the tables' partitions together. The newest complete checkpoint is the *target*;
records below its `ends` are handed out, in pieces of bounded size, and the piece that reaches all of its `ends` completes it. Commit
markers arrive partition by partition, so some partitions run ahead of the target; and while half of a big transaction is in the log
there is no target. What comes then is kept, and such partitions are paused while it is much, in records or in bytes; the checkpoints
never are. A target is exact when it was still younger than `min.compaction.lag.ms` when reached: before that age no record below
its `ends` can have been removed for a later one beyond them. So it is when nothing at all follows it (capture has been off). Otherwise
the next checkpoint is the target. Of what followed only tombstones can be gone again, which the checkpoints tell.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING

from confluent_kafka import Message

from headrace import codec
from headrace.change import DELETE, NOWHERE, Change, Checkpoint, Position, TableSchema, Version
from headrace.consumer import ALL, Batch
from headrace.errors import HeadraceError, Misconfigured
from headrace.log.lag import Lag
from headrace.log.refusal import check_age, check_log, check_state, lacks, refused
from headrace.log.spine import Spine
from headrace.log.tail import BEGINNING, Tail, end_of_partition
from headrace.log.topics import checkpoints_topic, partitions_changed, table_of, topic_of
from headrace.log.values import learn

if TYPE_CHECKING:
    from headrace.log.log import Log

Place = tuple[str, int]
BATCH_BYTES = 32 * 1024 * 1024
"""Most bytes of values in a piece, about: where rows are large, fewer than `batch_records` are handed out at once."""
_STILL_SECONDS = 60.0
"""How often a view that stands at the newest checkpoint looks whether it lacks nothing, where no other comes."""
_ORDER = attrgetter("version", "ordinal")


class Reader:
    """Reads the log of one source for one generation."""

    def __init__(
        self, log: Log, tables: Collection[str], position: Position | None, group: str, until: Version | None = None
    ) -> None:
        """Go on from `position`, from zero when None; `group` is the consumer group that mirrors it [I6].

        No checkpoint after `until` is a target: there it stops, at the state that another view shows.

        Raises:
            Refused: the position makes no sense for this log [I12]: `position-of-another-source`, `topic-replaced`,
                `position-ahead`, `away-too-long`, `build-too-slow`.
        """
        self._log = log
        self._all = tuple(tables) == ALL
        self._wanted = {topic_of(log.settings.source, table) for table in tables}
        self._until = until
        self._newest = log.newest_checkpoint(complete=True, until=until)
        known = self._newest.ends if position and self._newest else ()
        self._settings = log.topics.in_force(filter(self._reads, known), log.settings)
        self._spine = Spine(self._newest)
        self._target: Checkpoint | None = None
        self._behind_since: float | None = None
        self._fed = self._looked = self._came = self._now()  # what was written before the first is read (S19)
        self._resumed = self._fed if position and not position.loading else 0.0
        self._old_half = -1
        self._later = False  # whether a checkpoint came after the newest complete one that may be a target
        self._schemas: dict[tuple[str, int], TableSchema] = {}
        self._schemas_end = BEGINNING
        self._kept: dict[Place, deque[Message]] = {}
        self._read_to: dict[Place, int] = {}
        self._paused: set[Place] = set()
        self._at_end: set[Place] = set()
        self._gone: dict[Place, Change | None] = {}
        self._waiting = self._waiting_bytes = 0
        self.position = position or Position(source=self._newest.source if self._newest else None)
        self._check_position(self._newest)
        after = self._newest.offset + 1 if self._newest else BEGINNING
        self._tail = Tail(log.settings, {(checkpoints_topic(log.settings.source), 0): after}, group)
        if self._newest:
            try:
                self._add_topics(self._newest)
                self._check_state(self._newest)
            except HeadraceError:  # whoever keeps it keeps this reader, which fetches already
                self.close()
                raise
            if self._newest.version != self.position.version:
                self._behind_since = self._fed

    @property
    def newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint seen."""
        return self._newest

    def poll(self, timeout: float) -> Batch | None:
        """Return the next batch, or None when none is complete within about `timeout` seconds.

        Raises:
            Transient: `kafka-away`, `schema-not-there`, `registry-away`. Poison: `undecodable-record`.
            Misconfigured: `table-not-captured`, `partitions-changed` (S9), `schema-unknown`, `registry-refuses`.
            Refused: `build-too-slow`, `away-too-long` (S19), `topic-replaced`.
        """
        batch = self._next(idle=False)
        if batch is None:
            self._note_fed()
            if self._take(self._tail.poll(timeout, self._log.settings.batch_records)):
                self._came = self._now()
            self._steer()
            batch = self._next(idle=True)
        return batch

    def lag(self) -> Lag:
        """Return what is missing up to the newest checkpoint."""
        newest = self._newest
        if newest is None or newest.version == self.position.version:
            return Lag(0, 0, 0.0)
        records = sum(
            max(0, end - self._offset(topic, partition))
            for topic, ends in newest.ends.items()
            if self._reads(topic)
            for partition, end in enumerate(ends)
        )
        since = time.time() - self._behind_since if self._behind_since else 0.0
        return Lag(records, max(0, newest.version.lsn - self.position.version.lsn), since)

    def mirror(self) -> None:
        """Show the position as the offsets of the consumer group, for the usual tools; nothing ever reads it back [I6]."""
        self._tail.mirror({place: self._offset(*place) for place in self._read_to})

    def close(self) -> None:
        """Leave."""
        self._tail.close()

    # What comes in

    def _take(self, messages: Sequence[Message]) -> bool:
        """Keep what came of the tables; say if anything did. For millions; and nobody keeps the list: a late end costs a tenth more."""
        queues, read_to = self._kept, self._read_to
        came: set[Place] = set()
        for message in messages:
            place = (message.topic() or "", message.partition() or 0)
            queue = queues.get(place)
            if queue is None or message.error() is not None:
                self._at_end -= came
                came.clear()
                self._take_other(message, place)
                continue
            read_to[place] = (message.offset() or 0) + 1
            came.add(place)
            queue.append(message)
            self._waiting += 1
            self._waiting_bytes += len(message)  # of its value
        self._at_end -= came
        return bool(messages)

    def _take_other(self, message: Message, place: Place) -> None:
        if not end_of_partition(message, self._check_topics if place in self._read_to else None):
            self._at_end.discard(place)
            self._take_checkpoint(message)
            return
        self._at_end.add(place)
        if place in self._read_to:
            self._read_to[place] = max(self._read_to[place], message.offset() or 0)

    def _take_checkpoint(self, message: Message) -> None:
        checkpoint = self._spine.take(message.value(), message.offset() or 0, message.timestamp()[1])
        self._later = self._later or checkpoint is not None
        if checkpoint is None or (self._until and not (self._until.epoch, 0) <= checkpoint.version <= self._until):
            return
        if not checkpoint.complete:
            self._note_half(checkpoint)
            return
        before, self._newest, self._later = self._newest, checkpoint, False
        if checkpoint.version != self.position.version:  # capture writes of its jobs where the view stands, too
            self._behind_since = self._behind_since or time.time()
        if before is None or before.version.epoch != checkpoint.version.epoch:
            check_log(self._log.settings, self.position, checkpoint)
            self._check_topics(list(checkpoint.ends))
            self._check_state(checkpoint)
        self._add_topics(checkpoint)

    def _check_topics(self, topics: list[str]) -> None:
        """Refuse to go on in topics that a recovery has made anew meanwhile (S2): what was read of them says nothing of what they have."""
        for topic, (identity, _) in self._log.topics.describe(self.position.topics.keys() & topics).items():
            self._check_topic(topic, identity)

    def _check_topic(self, topic: str, identity: str) -> None:
        if self.position.topics.setdefault(topic, identity) != identity:
            raise refused("topic-replaced", f"Topic {topic} is not the one that the view was built from.")

    def _add_topics(self, checkpoint: Checkpoint) -> None:
        new = [topic for topic in checkpoint.ends if self._reads(topic) and (topic, 0) not in self._read_to]
        if not new:
            return
        if not self.position.offsets:
            # A build begins: nothing that it reads was removed before now (S19).
            self._settings = self._log.topics.in_force(new, self._log.settings)
            self.position.appended = int(self._now() * 1000)
            self.position.retention = self._settings.delete_retention_ms
        described = self._log.topics.describe(new)
        starts: dict[Place, int] = {}
        for topic in new:
            identity, count = described[topic]
            if count != len(checkpoint.ends[topic]):
                raise partitions_changed(topic, count, len(checkpoint.ends[topic]))
            self._check_topic(topic, identity)
            offsets = self.position.offsets.setdefault(topic, [0] * count)
            starts |= {(topic, partition): offset for partition, offset in enumerate(offsets)}
        self._read_to |= starts
        self._kept |= {place: deque() for place in starts}
        self._tail.add({place: offset or BEGINNING for place, offset in starts.items()})

    def _steer(self) -> None:
        """While much waits, fetch nothing of the partitions that the target does not need, of none when there is no target."""
        if not self._paused and not self._much(2):
            return
        target = self._target
        ahead = {place for place in self._read_to if target is None or self._passed(place, target)}
        again = self._paused - ahead if self._much() else self._paused
        if again:
            self._tail.resume(again)
            self._paused = self._paused - again
        if self._much(2) and ahead > self._paused:
            self._tail.pause(ahead - self._paused)
            self._paused = ahead

    def _much(self, times: int = 1) -> bool:
        """Whether so many pieces wait to be handed out, or to be aimed at."""
        return self._waiting >= times * self._log.settings.batch_records or self._waiting_bytes >= times * BATCH_BYTES

    # What goes out

    def _next(self, *, idle: bool) -> Batch | None:
        target = self._target = self._target or self._pick()
        if target is None:
            return None
        if all(self._passed(place, target) for place in self._read_to):
            if self._is_exact(target):
                return self._complete(target)
            self._target = self._newest
        if self._much() or (idle and self._waiting and self.position.loading):
            return self._piece(target)
        return None

    def _pick(self) -> Checkpoint | None:
        newest = self._newest
        if newest is None or newest.version == self.position.version:
            return None
        for table in () if self._all else sorted(self._wanted):
            if table not in newest.ends:
                raise Misconfigured(
                    "table-not-captured",
                    f"The log of source {self._log.settings.source} has no table {table_of(table)}.",
                    f"Run: headrace setup --table {table_of(table)} --apply, and capture. If both are done, see: headrace status",
                )
        return newest

    def _complete(self, target: Checkpoint) -> Batch:
        self._check_age(target)
        changes = self._hand_out(target)
        loading = self.position.loading
        for topic, ends in target.ends.items():
            if self._reads(topic):
                self._move(topic, ends)
        self.position = replace(
            self.position,
            retention=self._settings.delete_retention_ms,
            version=target.version,
            source=target.source,
            appended=target.appended,
            inexact=self._read_of(target.inexact),
            approximate=self._read_of(target.approximate),
        )
        newest, self._fed = self._newest, max(self._fed, target.appended / 1000)
        self._behind_since = target.appended / 1000 if newest and newest.version != target.version else None
        self._target = None
        return self._batch(changes, target, loading=loading)

    def _piece(self, target: Checkpoint) -> Batch | None:
        self._check_age(target)
        changes = self._hand_out(target)
        return self._batch(changes, None, loading=self.position.loading) if changes else None

    def _batch(self, changes: list[Change], checkpoint: Checkpoint | None, *, loading: bool) -> Batch:
        if loading:
            changes = list({(change.table, change.key): change for change in changes}.values())
        else:
            changes.sort(key=_ORDER)
        return Batch(changes, self.position.copy(), checkpoint, loading, self._schemas)

    def _hand_out(self, target: Checkpoint) -> list[Change]:
        """Decode what is kept below the target's ends, and move the position past it."""
        changes: list[Change] = []
        envelope_of = self._log.values.envelope
        for place, kept in self._kept.items():
            topic, partition = place
            end, table = target.end(topic, partition), table_of(topic)
            before = gone = self._gone.get(place)  # a piece may end between the two records of a delete
            while kept and (offset := kept[0].offset() or 0) < end:
                message = kept.popleft()
                self._waiting -= 1
                self._waiting_bytes -= len(message)
                key, value, headers = message.key() or b"", message.value(), message.headers() or ()
                change = codec.decode_change(table, partition, offset, key, value, headers, envelope_of)  # type: ignore[arg-type]
                if not change.repeats(before):
                    changes.append(change)
                before = change
            if before is not None and before is not gone:
                self.position.offsets[topic][partition] = before.offset + 1
                self._gone[place] = before if before.op == DELETE else None
        self._learn_schemas({(change.table, change.schema) for change in changes})
        return changes

    def _learn_schemas(self, wanted: set[tuple[str, int]]) -> None:
        learn(self._schemas, wanted, self._new_schemas)

    def _new_schemas(self) -> dict[tuple[str, int], TableSchema]:
        found, self._schemas_end = self._log.schemas_from(self._schemas_end)
        return found

    # Small questions

    def _reads(self, topic: str) -> bool:
        return self._all or topic in self._wanted

    def _read_of(self, tables: Iterable[str]) -> tuple[str, ...]:
        return tuple(table for table in tables if self._reads(self._log.topic_of(table)))

    def _passed(self, place: Place, target: Checkpoint) -> bool:
        return self._read_to[place] >= target.end(*place)

    def _offset(self, topic: str, partition: int) -> int:
        offsets = self.position.offsets.get(topic)
        return offsets[partition] if offsets else 0

    def _move(self, topic: str, ends: list[int]) -> None:
        offsets = self.position.offsets[topic]
        self.position.offsets[topic] = [max(now, end) for now, end in zip(offsets, ends, strict=True)]

    def _is_exact(self, target: Checkpoint) -> bool:
        if self._now() * 1000 - target.appended < self._settings.min_compaction_lag_ms:
            return True
        # Nothing follows the target anywhere, so nothing below its ends can have given way to something beyond them.
        return self._is_last(target) and not any(
            kept and (kept[-1].offset() or 0) >= target.end(*place) for place, kept in self._kept.items()
        )

    def _is_last(self, target: Checkpoint) -> bool:
        """Whether all is read. Of what follows only tombstones may be gone, and then a checkpoint says that something did."""
        if not self._at_end > self._read_to.keys():  # the checkpoints too
            return False
        may_be_gone = self._now() * 1000 - target.appended > self._settings.delete_retention_ms
        return not may_be_gone or (target is self._newest and not self._later)

    def _now(self) -> float:
        """Return the broker's time, seconds, as far as is known: no earlier than its word, for the clock here may be hours behind."""
        return max(time.time() - self._log.ahead, self._newest.appended / 1000 if self._newest else 0.0)

    def _check_position(self, newest: Checkpoint | None) -> None:
        check_log(self._log.settings, self.position, newest)
        if newest is None:  # what is there already no state says: the first that comes may be of old records
            self._fed = self.position.appended / 1000
        elif newest.version != self.position.version and lacks(self.position, newest):
            self._fed = self.position.appended / 1000
            self._check_age(newest)

    def _check_state(self, newest: Checkpoint) -> None:
        at, same = self.position.version, newest.version
        if at != same or self._until is None:  # else it may be amid what came after the state that another shows
            check_state(self.position, newest, () if at in (NOWHERE, same) else self._log.states_since(at))

    def _note_half(self, half: Checkpoint) -> None:
        """Note half a transaction that was there when the view was opened: by then tombstones in it may have been gone (S19)."""
        if half.appended / 1000 < self._resumed and lacks(self.position, half):
            self._fed, self._old_half = min(self._fed, self.position.appended / 1000), half.offset

    def _note_fed(self) -> None:
        """Note that a view at the newest checkpoint lacks nothing: no other may. What came after a long sleep may lack tombstones."""
        now = self._now()  # not the monotonic clock, which stands still while a machine sleeps
        newest = self._newest if self._newest and self._newest.version == self.position.version else None
        if newest is None or newest.offset < self._old_half or 0 <= now - max(self._fed, self._looked) < _STILL_SECONDS:
            return
        self._looked = now
        slept = self._came - self._fed > self.position.tombstones_stay(self._settings.delete_retention_ms) / 1000
        with suppress(Misconfigured):  # a topic that is gone: what becomes of it is said where it is read
            ends = self._log.topics.ends(Counter(topic for topic, _ in self._read_to))
            if not slept and all(at >= ends[topic][partition] for (topic, partition), at in self._read_to.items()):
                self._fed = now

    def _check_age(self, target: Checkpoint) -> None:
        if lacks(self.position, target):
            now = self._now()  # what was noted before the two clocks were compared may be later
            self._fed, self.position.appended = min(self._fed, now), min(self.position.appended, int(now * 1000))
            check_age(self._settings, self.position, self._fed, now)
