"""What is parked of one generation, and how a batch is applied around it [I9].

A record that cannot be done is written to `headrace.parked` before `apply` is called again without it, and so before the position
passes it; whatever changes it later waits behind it. A kill at any moment leaves an entry too many at most: the same batch comes again,
and what it has of a parked key is known by its place. Of rows each change is an entry. Of documents there is one: the consumer keeps in
its local rows that the document is touched, and shows its newest state when it is no longer named.

| a kill between                           | on open                                                                    |
|------------------------------------------|----------------------------------------------------------------------------|
| the entry and `apply`                    | the batch comes again, around the entry                                    |
| `apply` and the next entry               | the same: what was applied is before the position                          |
| the `apply` of a retry and its tombstone | the position does not name it: it is done, and is taken away               |
| the `apply` of a drop and its tombstone  | of rows: the same, it is given up                                          |
| the tombstone of a drop and its `apply`  | of documents: it is tried again, and parked again                          |

A process that was replaced may write an entry late, of what its successor has done since: the position does not name that either. Tried
again, an older row would come back. Only beside an older entry of its table it is taken for one that the view lacks.

So a position of rows that says that something is parked is never without its entries: where they are missing, they are lost, and so is
what the view lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from headrace import codec
from headrace.change import Change, Checkpoint, Position, Source, TableSchema, Version
from headrace.consumer import Batch, Consumer, Cursor, Generation
from headrace.effects import EffectConsumer
from headrace.errors import HeadraceError, Misconfigured, Poison, Refused
from headrace.log import Log
from headrace.log.topics import PARKED
from headrace.parked import Entry, Shelf
from headrace.runner.poison import among, placed, places
from headrace.shapes import grown, types_of

Schemas = dict[tuple[str, int], TableSchema]
_UNKNOWN = Source("", 0, "", "", "")
_BEHIND = "It waits behind an earlier change of its key, which is parked."


class Lacking(Refused):
    """A generation lacks for ever what was parked of it: none such goes live."""


@dataclass(frozen=True, slots=True)
class Retried:
    """What became of a retry: what is done, and what still cannot be."""

    done: list[Cursor]
    left: list[Entry]


class Parking:
    """Serves one generation, in its worker's thread.

    Attributes:
        count: How many records are parked.
        held: The version up to which everything is shown, None when nothing is parked (S25).
    """

    def __init__(self, log: Log, generation: Generation) -> None:
        """Read nothing yet."""
        self._log = log
        self._shelf = Shelf(log)
        self._name, self._number = generation.consumer, generation.number
        self._limit = log.settings.parked_limit
        self._held: dict[Cursor, dict[str, Version]] = {}
        self._lost: list[str] = []
        self._done: list[Entry] = []
        self._lost_held: Version | None = None
        self._version = Position().version
        self._schemas: Schemas = {}

    @property
    def count(self) -> int:
        """See the class."""
        return sum(len(entries) for entries in self._held.values())

    @property
    def held(self) -> Version | None:
        """See the class."""
        return self._lost_held if self._lost else _oldest(self._held)

    def open(self, consumer: Consumer, position: Position | None) -> None:
        """Read what is parked; of a view that begins from zero nothing is."""
        entries = self._shelf.entries(self._name, self._number, bodies=False)
        if position is None:
            self._shelf.remove(entries)
            entries = []
        self._version = (position or Position()).version
        self._held = {}
        # A promotion moves the position of effects, whatever they lack.
        moves = isinstance(consumer, EffectConsumer)
        self._done = []
        for entry in entries:
            if not moves and self._is_done(entry, position):
                self._done.append(entry)
            else:
                self._note(entry)
        there = _collections(self._held)
        self._lost = [collection for collection in (position or Position()).parked if collection not in there]
        self._lost_held = position.held if position else None

    def _is_done(self, entry: Entry, position: Position | None) -> bool:
        """Whether the view has passed an entry and does not lack it, as its position says."""
        if position is None:
            return False
        older = position.held is not None and entry.held < position.held  # than all that the view lacks
        if entry.collection in position.parked and not older:
            return False
        if not entry.at:
            return entry.version <= position.version
        partition, offset = map(int, entry.at.split(":"))
        passed = position.offsets.get(self._log.topic_of(entry.collection), [])
        return partition < len(passed) and offset < passed[partition]

    def check(self, consumer: Consumer) -> None:
        """Take away what is done. Refuse to go on without what is parked, as the position says, and is not there; of a document nothing is
        lost: it is tried again.

        Raises:
            Lacking: `parked-lost`.
        """
        if self._lost and not _leaves(consumer):
            raise Lacking(
                "parked-lost",
                f"Records of {', '.join(self._lost)} are parked in generation {self._number} of {self._name}, and {PARKED} has none of "
                "them: the view would lack them for ever.",
                "Run: headrace drop NAME --all, then headrace rebuild NAME"  # no build would tell of them, nor be promoted
                if isinstance(consumer, EffectConsumer)
                else "Run: headrace rebuild NAME",
            )
        self._shelf.remove(self._done)
        self._done = []

    def apply(self, consumer: Consumer, batch: Batch) -> None:
        """Apply a batch. What cannot be done is parked, and the batch applied again without it.

        Raises:
            Poison: what does not say of which record it is; `too-many-parked`.
        """
        self._schemas = batch.schemas
        while True:
            rest = self._around(consumer, batch)
            try:
                consumer.apply(rest)
            except Poison as error:
                self._park(consumer, error, rest)
            else:
                self._version = batch.position.version
                self._lost = []
                return

    # Parking

    def _around(self, consumer: Consumer, batch: Batch) -> Batch:
        """Return the batch without what is parked; its changes wait from now on."""
        if self._held and not _leaves(consumer):
            behind = [change for change in batch.changes if _cursor(change) in self._held]
            self._put([self._waiting(change) for change in behind if _at(change) not in self._held[_cursor(change)]])
            batch = replace(batch, changes=[change for change in batch.changes if _cursor(change) not in self._held])
        batch.position.held, batch.position.parked = self.held, _collections(self._held)
        return replace(batch, parked=frozenset(self._held)) if self._held else batch

    def _park(self, consumer: Consumer, error: Poison, batch: Batch) -> None:
        """Write entries for what a consumer cannot do; raise the error where it cannot be set aside."""
        entries: list[Entry] = []
        for each in (error, *error.others):
            if not self._limit or not self._known(consumer, each.cursor, batch):
                raise placed(each, batch) from error
            entries += self._made(consumer, each, batch)
        self._put(entries, error)

    def _known(self, consumer: Consumer, cursor: Cursor | None, batch: Batch) -> bool:
        """Whether a cursor is one of this batch: else it would come again for ever."""
        if cursor is None or cursor in self._held:
            return False
        return _leaves(consumer) or any(_cursor(change) == cursor for change in batch.changes)

    def _made(self, consumer: Consumer, error: Poison, batch: Batch) -> Iterator[Entry]:
        """Yield the entries of one error: of a row each of its changes, of which the first tells the error."""
        assert error.cursor is not None
        if _leaves(consumer):
            held = min(self._version, delayed(consumer) or self._version)
            entry = self._entry(error.cursor, "", held, batch.position.version)
            where = among(error, batch, self._log.topic_of)
            yield replace(_because(entry, error), body=error.body, where=where)
            return
        first, *later = [change for change in batch.changes if _cursor(change) == error.cursor]
        yield _because(self._waiting(first), error)
        yield from map(self._waiting, later)

    def _waiting(self, change: Change) -> Entry:
        version = change.version
        entry = self._entry(_cursor(change), _at(change), version.before(), version)
        body = change._asdict() | {"key": change.key.decode(), "version": list(version)}
        shape = self._schemas.get((change.table, change.schema)) if self._log.fed_by_debezium else None
        if shape is not None:  # the next reader will give it another version
            body["shape"] = codec.loads(codec.encode_schema(shape))
        return replace(entry, reason=_BEHIND, body=body, where=places([change], self._log.topic_of))

    def _entry(self, cursor: Cursor, at: str, held: Version, version: Version) -> Entry:
        made = Entry(self._name, self._number, *cursor, at, held=held, version=version)
        return replace(made, when=time.time_ns() // 1_000_000)

    def _put(self, entries: Sequence[Entry], error: Poison | None = None) -> None:
        """Write entries; refuse them all when that would be too many."""
        if entries and self.count + len(entries) > self._limit:
            last = error.message if error else f"{entries[0].collection} {entries[0].key}: {_BEHIND}"
            again = f"headrace parked retry {self._name} --all --generation {self._number}"
            raise Poison(
                "too-many-parked",
                f"{self.count} records of {self._name} are parked, and {len(entries)} more would be: "
                f"HEADRACE_PARKED_LIMIT={self._limit} is the most. The first of these is: {last}",
                f"Mend the consumer, and run it again; then: headrace rebuild {self._name}. Where the rows are at fault (headrace parked "
                f"list {self._name}), mend them, raise HEADRACE_PARKED_LIMIT, run it again; then: {again}",
            ) from error
        for entry in entries:
            self._shelf.put(entry)
            self._note(entry)

    def _note(self, entry: Entry) -> None:
        self._held.setdefault(entry.cursor, {})[entry.at] = entry.held

    # What is asked for: see `headrace.runner.unparking`

    def retry(self, consumer: Consumer, chosen: Callable[[Cursor], bool], position: Position) -> Retried:
        """Try again what is chosen, at the complete state at which the view stands; later changes come after it.

        Raises:
            Misconfigured: `not-parked`, `parked-body-cut`. Poison: one that does not say of which record it is.
        """
        entries, cut = self._whole(consumer, self._chosen(chosen))
        failed: dict[Cursor, Poison] = {}
        wanted = {entry.cursor for entry in entries}
        changes = [] if _leaves(consumer) else sorted((entry.change() for entry in entries), key=_in_order)
        for shape in filter(None, [entry.shape() for entry in entries if changes]):
            # Two readers may have given one version to two shapes.
            known = self._schemas.get((shape.table, shape.version))
            now = grown(types_of(known), shape) if known else shape
            self._schemas = self._schemas | {(shape.table, shape.version): now}
        while True:
            left = {cursor: held for cursor, held in self._held.items() if cursor not in wanted or cursor in failed}
            some = [change for change in changes if _cursor(change) not in failed]
            try:
                consumer.apply(self._standing(position, left, some))
                break
            except Poison as error:
                for each in (error, *error.others):
                    if each.cursor is None or each.cursor in failed or each.cursor not in wanted:
                        raise
                    failed[each.cursor] = each
        done = [entry for entry in entries if entry.cursor not in failed]
        self._forget(done)
        still = [self._told(entry, failed[entry.cursor]) for entry in entries if entry.cursor in failed and entry.code]
        still += [_because(entry, entry.body_cut()) for entry in cut]
        return Retried(list(dict.fromkeys(entry.cursor for entry in done)), still)

    def _whole(self, consumer: Consumer, entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
        """Return what can be tried again, and an entry of each key that cannot: a change of it is not there as a whole.

        Raises:
            Misconfigured: `parked-body-cut`, when that is all of them.
        """
        cut = {} if _leaves(consumer) else {entry.cursor: entry for entry in entries if entry.cut}
        whole = [entry for entry in entries if entry.cursor not in cut]
        if not whole:
            raise next(iter(cut.values())).body_cut()
        return whole, list(cut.values())

    def drop(self, consumer: Consumer, chosen: Callable[[Cursor], bool], position: Position) -> list[Entry]:
        """Give up what is chosen; return it. Raises Misconfigured: `not-parked`."""
        entries = self._chosen(chosen)
        dropped = frozenset(entry.cursor for entry in entries)
        left = {cursor: held for cursor, held in self._held.items() if cursor not in dropped}
        batch = replace(self._standing(position, left, []), dropped=dropped)
        if _leaves(consumer):  # killed between the two, it is tried again and not taken for done
            self._forget(entries)
            consumer.apply(batch)
        else:
            consumer.apply(batch)
            self._forget(entries)
        return entries

    def _chosen(self, chosen: Callable[[Cursor], bool]) -> list[Entry]:
        there = self._shelf.entries(self._name, self._number)
        found = [entry for entry in there if entry.cursor in self._held and chosen(entry.cursor)]
        if not found:
            said = f"Generation {self._number} of {self._name} has nothing parked by that key."
            raise Misconfigured("not-parked", said, f"See: headrace parked list {self._name}")
        return found

    def _standing(self, position: Position, held: dict[Cursor, dict[str, Version]], changes: list[Change]) -> Batch:
        """Return a batch that changes nothing but what is parked: it ends where the view stands."""
        now = replace(position, held=_oldest(held), parked=_collections(held))
        of_log = self._log.schemas() if changes and not self._log.fed_by_debezium else {}
        schemas = self._schemas | of_log if changes else {}
        return replace(standing(now, hurry=True), changes=changes, schemas=schemas, parked=frozenset(held))

    def _told(self, entry: Entry, error: Poison) -> Entry:
        """Keep why an entry failed again."""
        body = entry.body if entry.at or error.body is None else error.body
        told = replace(_because(entry, error), body=body)
        self._shelf.put(told)
        return told

    def _forget(self, entries: Sequence[Entry]) -> None:
        self._shelf.remove(entries)
        for entry in entries:
            self._held.pop(entry.cursor, None)


def _because(entry: Entry, error: HeadraceError) -> Entry:
    return replace(entry, code=error.code, reason=error.message, remedy=error.remedy)


def standing(position: Position, *, hurry: bool = False) -> Batch:
    """Return a batch without changes that ends where the view stands, at a complete state."""
    source = position.source or _UNKNOWN
    checkpoint = Checkpoint(position.version, 0, 0, position.offsets, source, appended=position.appended)
    return Batch([], position, checkpoint, loading=False, hurry=hurry)


def is_due(consumer: Consumer) -> bool:
    """Whether something that the consumer delays is to be shown now."""
    due = getattr(consumer, "due", None)
    return bool(due and due())


def delayed(consumer: Consumer) -> Version | None:
    """Return the version up to which a view shows everything that it delays, None when it delays nothing."""
    delays: Callable[[], Version | None] | None = getattr(consumer, "pending", None)
    pending = delays() if delays else None
    return pending.before() if pending else None


def _leaves(consumer: Consumer) -> bool:
    return bool(getattr(consumer, "leaves_parked", False))


def _cursor(change: Change) -> Cursor:
    return change.table, change.key.decode()


def _at(change: Change) -> str:
    return f"{change.partition}:{change.offset}"


def _in_order(change: Change) -> tuple[Version, int]:
    return change.version, change.ordinal


def _oldest(held: dict[Cursor, dict[str, Version]]) -> Version | None:
    return min((version for entries in held.values() for version in entries.values()), default=None)


def _collections(held: dict[Cursor, dict[str, Version]]) -> tuple[str, ...]:
    return tuple(sorted({collection for collection, _ in held}))
