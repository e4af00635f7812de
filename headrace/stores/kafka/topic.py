"""Documents in a compacted topic: a derived stream, for people's own consumers and for further ones of headrace's kind.

| topic                | key       | value                                                             |
|----------------------|-----------|-------------------------------------------------------------------|
| `<name>.g<N>`        | the id    | a document of generation N as JSON; a tombstone when it is gone    |
| `<name>.generations` | `g<N>`    | of generation N: consumer, fingerprint, source, topic id and ends, position; dropped |
| `<name>.generations` | `live`    | the number of the generation that readers should read, its topic  |

*Writing.* The documents of a state and the position are one Kafka transaction: they are never there without their position [I7], and a
`read_committed` reader of a partition sees whole states only, as long as it is less than HEADRACE_MIN_COMPACTION_LAG_MS behind; the commit
reaches partition by partition. A tombstone stays for HEADRACE_DELETE_RETENTION_MS, the longest that a reader may be away.
While a generation is loading it is not the live one, and pieces are committed as they come.
One process writes a generation: opening it fences the one before (S21).

*Versions.* Each record has the headers `epoch` and `lsn`, the state that the document shows. A state that is older than the position
was written whole already; it is passed over, so that the stream never goes back.

*Reading.* `live_topic` names the topic to read; after a promotion it is another one, which is read from its beginning. Verify reads a
topic as a whole, of single documents their partitions: there is no index.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any

from headrace import codec
from headrace.change import NOWHERE, Position
from headrace.codec import Headers
from headrace.consumer import Cursor, Generation, ViewRow
from headrace.errors import Misconfigured, Poison, Transient, Wiped
from headrace.log import Log
from headrace.log.kafka import partition_of
from headrace.log.tail import Record, read_to_end
from headrace.log.transaction import TransactionWriter
from headrace.log.unmarked import hidden_records
from headrace.settings import Settings
from headrace.stores import Doc, check_alone, of_another_source, source_held
from headrace.stores.kafka.known import Known, configs
from headrace.stores.kafka.rows import LIVE, Rows, generation_key, headers_of, id_of, version_of
from headrace.stores.scans import Scans

log = logging.getLogger(__name__)

_CLEARED = 1000
_CHECK_SECONDS = 1.0
_VISIBLE_SECONDS = 15.0


class KafkaTopic:
    """A document store that is a stream. Bodies are mappings of JSON values.

    Args:
        name: Begins the topics' names; the consumer's name by default.
        partitions: Of the topic of a new generation; ids are placed as every Java client places them.

    Attributes:
        shows: The position of what readers see where Kafka has lost a part of it, until something is written.
    """

    def __init__(self, name: str = "", *, partitions: int = 1) -> None:
        """Say where documents go; connects to nothing."""
        self.name = name
        self._partitions = partitions
        self._writer: TransactionWriter | None = None
        self._other = ""
        self._facts: dict[str, Any] = {}
        self._version = NOWHERE
        self._checked = 0.0
        self._count = partitions
        self._left = False
        self.shows: Position | None = None
        self._scans = Scans[Rows]()
        self._tidy = False

    def bind(self, settings: Settings, consumer: str) -> None:
        """Use the Kafka of `settings`."""
        self._settings = settings
        self._consumer = consumer
        self.name = self.name or consumer
        self._topics = Log(settings).topics
        self._scans = Scans[Rows]()
        self._known = Known(settings, self._topics, self._pointers)

    def generations(self) -> list[Generation]:
        """Return the generations that Kafka holds; the first call finishes drops that were cut short."""
        known = self._known.read()
        live = known.get(LIVE, {}).get("generation")
        ours = [facts for key, facts in known.items() if key != LIVE and facts["consumer"] == self._consumer]
        if not self._tidy:
            left = [self._topic_of(facts["generation"]) for facts in ours if facts.get("dropped")]
            with suppress(Misconfigured):  # where topics may not be deleted, who dropped it was told
                self._topics.delete(left, wait=True)
            self._tidy = True
        made = [
            Generation(facts["consumer"], facts["generation"], facts["fingerprint"], facts["generation"] == live)
            for facts in ours
            if not facts.get("dropped")
        ]
        return sorted(made, key=lambda generation: generation.number)

    def open(self, generation: Generation) -> Position | None:
        """Take the topic of `generation` if it is whole; else it begins from zero, and is emptied when something is written.

        Raises:
            Transient: `kafka-away`. Misconfigured: `view-of-another`.
        """
        self.close()
        number, topic = generation.number, self._topic_of(generation.number)
        ours = {"consumer": generation.consumer, "fingerprint": generation.fingerprint}
        self._check(ours, number)
        pointers, documents = configs(self._settings)
        self._topics.make({self._pointers: (1, pointers), topic: (self._partitions, documents)})
        self._topics.configure({self._pointers: pointers, topic: documents})
        facts = self._check(ours, number)
        self._other = self._other_of(facts)
        topic_id, self._count = self._topics.describe([topic])[topic]
        # What is written, a marker too, fills the place of what was lost: it is looked before that.
        lost = not self._other and facts.get("topic_id") == topic_id and self._has_lost(topic, facts.get("ends", {}))
        # The process of another source goes on with it: its writer is not ended.
        self._writer = TransactionWriter(self._settings, self._writer_of(number) + (self._other and "-other"))
        if lost:
            self._note(facts | {"position": None, "shown": facts["position"]})
        if not self._other:
            self._show(number)
        facts = self._check(ours, number)
        same = facts.get("topic_id", topic_id) == topic_id
        whole = not lost and same and bool(facts.get("position"))
        self._facts = ours | {
            "generation": number,
            "topic_id": topic_id,
            "ends": dict(facts.get("ends", {})) if whole else {},
            "source": self._other or self._settings.source,
        }
        position = codec.decode_position(facts["position"]) if whole else None
        self._version = position.version if position else NOWHERE
        self._left = position is None and not self._other
        self.shows = codec.decode_position(facts["shown"]) if self._left and same and facts.get("shown") else None
        if self.shows:
            log.warning("Kafka has lost documents of %s: a process that runs its code loads it again", topic)
            self._facts["shown"] = facts["shown"]
        if self._left:
            # Readers see nothing before they see a half.
            if not same and self._is_live(number):
                self._opened.write(self._pointers, LIVE, None)
            self._point(None)
        return position

    def _note(self, facts: dict[str, Any]) -> None:
        self._opened.write(self._pointers, generation_key(facts["generation"]), codec.dumps(facts))
        self._opened.commit()

    def _has_lost(self, topic: str, ends: Mapping[str, int]) -> bool:
        """Whether Kafka has lost documents of what the position covers: then the topic ends below them, or with a marker in their place."""
        for partition, there in enumerate(self._topics.ends({topic: self._count}, committed=False)[topic]):
            end, place = ends.get(str(partition), 0), (topic, partition)
            if there < end:
                return True
            # Behind a document comes its marker. Where that alone was lost the document is the newest record, which compaction leaves.
            if 0 < there == end and not [*read_to_end(self._settings, {place: end - 1}, {place: end}, committed=False)]:
                return True
        return False

    def _show(self, number: int) -> None:
        """End what an earlier writer's transaction has left without a marker as that was to end: its position is its last record."""
        known = self._known.read()
        position = known.get(generation_key(number), {}).get("position")
        version = codec.decode_position(position).version if position else NOWHERE
        ended: dict[bool, list[tuple[str, bytes, bytes | None, Headers]]] = {True: [], False: []}
        for first, last in hidden_records(self._settings, self._topics, {self._pointers, self._topic_of(number)}):
            if first.topic == self._pointers and known.get(first.key, {}).get("dropped"):  # nobody opens that any more
                self._end_dropped(known[first.key]["generation"])
            elif first.topic == self._pointers:  # a position that nobody was told of; or another generation's
                ended[False].append((self._pointers, b"", None, []))
            else:
                committed = NOWHERE < version_of(first.headers) <= version
                ended[committed].append((last.topic, last.key, last.value, last.headers))
        for committed, records in ended.items():
            for record in records:
                self._opened.write(*record)
            if records:
                (self._opened.commit if committed else self._opened.abort)()

    def _end_dropped(self, number: int) -> None:
        """End the last act of a dropped generation as it was to end: readers of all generations stand still at it."""
        with closing(TransactionWriter(self._settings, self._writer_of(number))) as writer:
            writer.write(self._pointers, generation_key(number), None)
            writer.commit()

    def _other_of(self, facts: dict[str, Any]) -> str:
        """Return the source of a generation if that is another's."""
        position = codec.decode_position(facts["position"]) if facts.get("position") else None
        source = source_held(facts.get("source"), position, self._settings.source)
        return source if source != self._settings.source else ""

    def _check(self, ours: dict[str, str], number: int) -> dict[str, Any]:
        """Return what is known of a generation; refuse one of other code, and a name of another's, before its writer is ended."""
        known = {key: each for key, each in self._known.read().items() if not each.get("dropped")}
        held = [each for key, each in known.items() if key != LIVE]
        check_alone(ours["consumer"], [(self._topic_of(each["generation"]), each["consumer"]) for each in held])
        facts = known.get(generation_key(number), {})
        if facts and facts | ours != facts:
            raise Misconfigured(
                "view-of-another",
                f"{self._topic_of(number)} is of {facts['consumer']}, not of {ours['consumer']} {ours['fingerprint']}.",
                "Give the consumer's store another name.",
            )
        return facts

    def write(self, docs: Sequence[Doc], position: Position | None, *, bulk: bool = False) -> None:  # noqa: ARG002
        """Write documents, and with the last of them the position.

        Raises:
            Transient: `kafka-away`, `transaction-too-long`; Wiped: `view-wiped`.
            Poison: `document-too-large`.
            Misconfigured: `writer-taken-over`, `view-of-another`; `document-too-large`, where the broker takes less than the settings say.
        """
        topic = self._topic_of(self._facts["generation"])
        if self._other:
            raise of_another_source(f"The topic {topic}", self._other, self._settings.source)
        bodies = [self._packed(doc) for doc in docs]
        try:
            self._put(docs, bodies)
            if position is not None and position.version >= self._version:
                self._point(position)
                self._version = position.version
            elif self._version == NOWHERE:
                self._check_kept()
                self._opened.commit()
        except Misconfigured as error:
            if error.code == "topic-missing":
                raise Wiped("view-wiped", f"The topic {topic} is gone; it is made anew.") from error
            raise

    def _put(self, docs: Sequence[Doc], bodies: Sequence[bytes | None]) -> None:
        if self._left:
            self._clear()
        topic = self._topic_of(self._facts["generation"])
        for doc, body in zip(docs, bodies, strict=True):
            if doc.version >= self._version:
                self._opened.write(topic, doc.id.encode(), body, headers_of(doc.version))

    def promote(self) -> None:
        """Move the pointer to this generation. Raises Wiped: `view-wiped`."""
        number = self._facts["generation"]
        self._checked = 0.0
        self._check_topic()
        live = {"generation": number, "topic": self._topic_of(number)}
        self._opened.write(self._pointers, LIVE, codec.dumps(live))
        self._commit()

    def drop(self) -> None:
        """Note that it is dropped, then delete the topic; readers that are pointed at it are pointed at nothing."""
        number = self._facts["generation"]
        if self._is_live(number):
            self._opened.write(self._pointers, LIVE, None)
        self._opened.write(self._pointers, generation_key(number), codec.dumps(self._facts | {"dropped": True}))
        self._commit({self._pointers: 1})
        with suppress(Transient):  # it is dropped: `generations` does the rest, in the next process
            self._topics.delete([self._topic_of(number)], wait=True)
            self._opened.write(self._pointers, generation_key(number), None)
            self._commit({self._pointers: 1})

    def close(self) -> None:
        """Leave."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._scans = Scans[Rows]()

    def get(self, ids: Sequence[str]) -> Sequence[ViewRow]:
        """Return some documents as readers see them. It reads their partitions as a whole: ask for many at once."""
        wanted = set(ids)
        found = self._documents({partition_of(id_.encode(), self._count) for id_ in wanted})
        return Rows(each for each in found if id_of(each.key) in wanted).named(ids)

    def scan(self, after: Cursor | None, limit: int) -> Sequence[ViewRow]:
        """Return documents as readers see them, by id. A scan reads the topic when it begins; a few at once go on in turns."""
        start = after[1] if after else None
        rows = self._scans.take(start)
        rows = rows or Rows(self._documents())
        found = rows.next(start, limit)
        if len(found) >= limit:  # else it is at the end
            self._scans.put(found[-1].key, rows)
        return found

    # How

    @property
    def _pointers(self) -> str:
        return f"{self.name}.generations"

    @property
    def _opened(self) -> TransactionWriter:
        if self._writer is None:
            raise Misconfigured("not-open", f"{self.name} is not open.", "Call open(generation) first.")
        return self._writer

    def _packed(self, doc: Doc) -> bytes | None:
        body = (doc.text or codec.dumps(doc.body)) if doc.body is not None else None
        if body is None or len(body) <= self._settings.message_max_bytes:
            return body
        raise Poison(
            "document-too-large",
            f"Document {doc.id!r} of {self.name} has {len(body)} bytes, more than HEADRACE_MESSAGE_MAX_BYTES.",
            f"Render less, then: headrace rebuild {self._consumer}; or raise the setting.",
            cursor=("", doc.id),
        )

    def _topic_of(self, number: int) -> str:
        return f"{self.name}.g{number}"

    def _writer_of(self, number: int) -> str:
        return f"headrace-view-{self.name}-g{number}"

    def _is_live(self, number: int) -> bool:
        return bool(self._known.read().get(LIVE, {}).get("generation") == number)

    def _clear(self) -> None:
        """Begin from zero: tombstones for what an earlier attempt, or a loss, has left. Until something is written it stays."""
        number = self._facts["generation"]
        if self._is_live(number):
            self._opened.write(self._pointers, LIVE, None)
            self._opened.commit()
        topic, kept = self._topic_of(number), Rows(self._documents()).keys()
        while keys := list(itertools.islice(kept, _CLEARED)):
            for key in keys:
                self._opened.write(topic, key, None, headers_of(NOWHERE))
            self._opened.commit()
        self._left, self.shows = False, None
        self._facts.pop("shown", None)

    def _point(self, position: Position | None) -> None:
        """Commit what was written together with the position."""
        self._check_topic()
        self._check_kept()
        for (topic, partition), end in self._opened.ends.items():
            if topic != self._pointers:
                self._facts["ends"][str(partition)] = end
        facts = self._facts | {"position": codec.encode_position(position).decode() if position else None}
        self._opened.write(self._pointers, generation_key(facts["generation"]), codec.dumps(facts))
        self._commit()

    def _check_kept(self) -> None:
        """Look whether what was written went behind all that was there: else Kafka has lost some, and readers are pointed at nothing."""
        self._opened.arrive()
        topic, ends = self._topic_of(self._facts["generation"]), self._facts["ends"]
        before = {place for place, at in self._opened.begins.items() if at < ends.get(str(place[1]), 0)}
        if not any(name == topic for name, _ in before | self._opened.fell):
            return
        if self._is_live(self._facts["generation"]):
            self._opened.write(self._pointers, LIVE, None)
        self._note(self._facts | {"position": None})
        raise Wiped("view-wiped", f"Kafka has lost documents of {topic}; it is made anew.")

    def _check_topic(self) -> None:
        """Look now and then whether the topic is still the one that was opened: who deletes it may make another."""
        if time.monotonic() - self._checked < _CHECK_SECONDS:
            return
        topic = self._topic_of(self._facts["generation"])
        try:
            there = self._topics.describe([topic])[topic][0]
        except Misconfigured as error:
            if error.code != "topic-missing":
                raise
            there = ""
        if there != self._facts["topic_id"]:
            raise Wiped("view-wiped", f"The topic {topic} is gone, or another one than was opened; it is made anew.")
        self._checked = time.monotonic()

    def _commit(self, places: dict[str, int] | None = None) -> None:
        """Commit, and wait until readers see it (S25): the broker answers before it has written the markers.

        `places` are the topics that were written, with their partitions: by default this generation's and that of the pointers.
        """
        self._opened.commit()
        counts = places or {self._pointers: 1, self._topic_of(self._facts["generation"]): self._count}
        written, deadline = self._topics.ends(counts, committed=False), time.monotonic() + _VISIBLE_SECONDS
        while any(
            seen < end
            for topic, ends in self._topics.ends(counts).items()
            for seen, end in zip(ends, written[topic], strict=True)
        ):
            if time.monotonic() > deadline:
                raise Transient(
                    "kafka-away", f"Kafka does not finish a transaction of {self.name}.", "Look at the broker."
                )

    def _documents(self, partitions: Collection[int] | None = None) -> Iterator[Record]:
        """Yield what is there of some partitions, from where they begin: somebody may have deleted records."""
        topic = self._topic_of(self._facts["generation"])
        begins = self._topics.begins({topic: self._count})[topic]
        read = range(self._count) if partitions is None else partitions
        return read_to_end(self._settings, {(topic, partition): begins[partition] for partition in read})
