"""The contract of a consumer: what a plugin's author implements and what the runner promises.

A *consumer* is a class; the runner makes one instance for each *generation* of its view that it serves and calls each
instance from one thread only. Most plugins do not implement this protocol but subclass
`headrace.documents.DocumentConsumer` and write `render`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from headrace.change import Change, Checkpoint, Position, Row, TableSchema, Version
from headrace.settings import Settings

__all__ = ["ALL", "SCRATCH", "Batch", "Consumer", "Cursor", "Generation", "Origin", "ViewRow", "no_progress"]

ALL: Final = ("*",)
"""Read every captured table, also those that appear later."""


SCRATCH = "--replay"
"""Ends the name of a scratch view, which may lie beside the one whose name it begins with."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One build of a view. `fingerprint` names the code that built it; `live` is the store's own pointer [I13]."""

    consumer: str
    number: int
    fingerprint: str
    live: bool = False


@dataclass(slots=True)
class Batch:
    """What a reader hands to `apply`: a cut-aligned piece of the log.

    Attributes:
        changes: The changes of each key in their order. While `loading`, at most the last change of each key.
        position: Where the view stands once the batch is applied; `apply` makes it durable with or after the changes.
            Its `version` moves only with a batch that completes an exact checkpoint.
        checkpoint: The complete, exact checkpoint that the batch ends at: a state that Postgres had (S18). None for a piece
            between two of them: half of a transaction too big for one cut, or a part of a backlog. A store must not show
            readers a state that ends so.
        loading: Whether the generation has not yet reached its first exact checkpoint: it shows readers nothing.
        schemas: The schema version of every (table, version) that occurs in `changes`, and the newest one of each table
            that the reader knows; none for `UNKNOWN_SCHEMA`.
        parked: What was set aside because it could not be done: (collection, key). Nothing of it is to be shown. Of rows the runner has
            taken the changes out already; of documents see `Consumer.leaves_parked`.
        dropped: What was set aside and is given up: it stays as it is until it changes again.
        hurry: Show also what is delayed (see `Consumer.pending`): readers are about to be pointed here, or the view is compared.
    """

    changes: list[Change]
    position: Position
    checkpoint: Checkpoint | None
    loading: bool
    schemas: dict[tuple[str, int], TableSchema] = field(default_factory=dict)
    parked: frozenset[Cursor] = frozenset()
    dropped: frozenset[Cursor] = frozenset()
    hurry: bool = False

    @property
    def complete(self) -> bool:
        """Whether readers may see the state after this batch."""
        return self.checkpoint is not None


class ViewRow(NamedTuple):
    """One row as readers of a view see it: what `scan` gives to verify.

    `collection` is the table, or the name of the kind of document; `key` the store's key of the row as text (for a table
    the log's key); `value` the row in the codec's form or the document as `render` returned it.
    """

    collection: str
    key: str
    value: Row
    version: Version


Cursor = tuple[str, str]
"""(collection, key) of the last row that a scan returned."""


class Origin(NamedTuple):
    """What a row of a view was made from: a row that the consumer has read, or, with a number of `rows`, a join of them.

    Attributes:
        place: The names of the joins that lead to it; none for what the view's row is itself.
        table: Whose rows these are.
        change: The change that brought the row, as the consumer keeps it.
        applied: When it was applied here, ms since the Unix epoch.
        rows: How many a join has; of these only the first follow.
        values: What the rows of an aggregate come to.
        waits: Whether the view's row does not show it all yet.
    """

    place: tuple[str, ...]
    table: str
    change: Change | None = None
    applied: int = 0
    rows: int | None = None
    values: Row | None = None
    waits: bool = False


class Consumer(Protocol):
    """A view and how it is kept.

    Repeats: after a crash the runner hands out again everything after the durable position, in other batches than before.
    `apply` must leave the same view then [I7].

    Class attributes:
        name: Names the view in commands, in control and in the store; set by the runner from the entry point.
        tables: ``schema.table`` of each table that it reads, or ALL.
        mirrors_rows: True when the view holds each table's rows as they are; verify then expects `SELECT * FROM table`.
        get: Optional: ``get(keys: Sequence[Cursor]) -> Sequence[ViewRow]``, the rows of some keys as readers see them. Without it
            verify's second look at a row is a scan from just before its key.
        count: Optional: ``count() -> Mapping[str, int]``, how many rows readers see of each collection. Without it, or where it
            returns None, counting is a scan.
        why: Optional: ``why(key: Cursor, limit: int) -> Sequence[Origin]``, what one row was made from, of each join the first `limit`
            rows, for `headrace why`. A row comes before what is joined to it. Nothing for a key that is not known.
        leaves_parked: Optional: True when `apply` itself leaves alone what `Batch.parked` names, and shows it as it is by then once it is
            no longer named. Without it the runner takes the changes of what is parked out of the batch, and hands them out later.
        pending: Optional: ``pending() -> Version | None``, the version of the oldest change that was taken in and is not shown yet; None
            when nothing waits. Tokens are not answered beyond it (S25). What waits must be durable with the position.
        due: Optional, with `pending`: ``due() -> bool``, whether some of that may be shown now. Then, while no changes come, `apply` is
            called with a batch without changes that ends where the view stands.
        shows: Optional: the position of what readers see, where `open` returns that of something else. It counts of one that stands still.
        moved: Optional: True after a `promote` that has moved the position of its generation, which is opened anew then; False before. A
            class that has it is held for a promotion where a state ends, not amid a backlog, unless it waits there.
        progress: Set by the runner; call ``progress(done, total)`` in long work so that status can show it.
    """

    name: str
    tables: Collection[str]
    mirrors_rows: bool = False
    progress: Callable[[int, int], None]

    def __init__(self, settings: Settings, name: str) -> None:
        """Connect to nothing yet."""

    def generations(self) -> list[Generation]:
        """Return the generations of this consumer's name that the store holds. May be called before `open`.

        Empty for a view that was wiped [I6].
        """

    def open(self, generation: Generation) -> Position | None:
        """Make or open the store of `generation`; return its durable position, None for from zero.

        A store that lost part of itself (another UUID, a missing position) makes it anew and returns None.
        """

    def apply(self, batch: Batch) -> None:
        """Apply `batch`, idempotently. Durable on return, and then `batch.position` [I7].

        Raises:
            Transient: try the same batch again later.
            Misconfigured: stop the consumer and say what to change.
            Poison: one record cannot be applied; nothing of the batch's position is durable. When it names the record by its `cursor` the
                runner parks that, durably, and calls `apply` again with the same batch without it: what was begun must not be in
                the way. Otherwise the consumer stops.
        """

    def promote(self) -> None:
        """Make this generation the one that readers see: one atomic move of the store's pointer [I8]."""

    def drop(self) -> None:
        """Remove this generation's store and local state. Never called on the live one, but to drop the whole view."""

    def close(self) -> None:
        """Release connections. What is durable stays."""

    def scan(self, after: Cursor | None, limit: int) -> Sequence[ViewRow]:
        """Return up to `limit` rows of this generation as readers see them, in (collection, key) order, after `after`."""


def no_progress(_done: int, _total: int) -> None:
    """Report progress to nobody: the default of `Consumer.progress`."""
