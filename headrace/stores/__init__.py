"""How views are kept: one module a server, each the only one that imports the client of it.

`DocumentStore` is what `headrace.documents` needs of a store that keeps documents by key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from headrace.change import Position, Row, Version, source_of
from headrace.consumer import SCRATCH, Cursor, Generation, ViewRow
from headrace.errors import Misconfigured
from headrace.settings import Settings

__all__ = ["Doc", "DocumentStore"]


class Doc(NamedTuple):
    """One document to be written: its id, its body (None: delete it), the version of the cut that it shows (S1), and its body as JSON
    where that is known already."""

    id: str
    body: Row | None
    version: Version
    text: bytes | None = None


class DocumentStore(Protocol):
    """Documents by id, with a version check: an older version never replaces a newer one, also not after a delete
    (S21). Optional: ``count() -> Mapping[str, int]``, how many documents readers see of the collection ``""``; ``shows``, the position of
    what they see where `open` has returned none, for a part of it was lost."""

    def bind(self, settings: Settings, consumer: str) -> None:
        """Say which servers to use and for which consumer; called once before anything else. Connects to nothing.

        Who is called is a shallow copy of what the consumer's class names: begin here what is one process's own, as a list or a cache.
        """

    def generations(self) -> list[Generation]:
        """Return the generations that the server holds."""

    def open(self, generation: Generation) -> Position | None:
        """Make or open this generation's store; return its durable position, None when there is none.

        One of another `settings.source` is opened to be read; `write` refuses it.
        """

    def write(self, docs: Sequence[Doc], position: Position | None, *, bulk: bool = False) -> None:
        """Write documents durably, then (in the same atomic step where the server can) the position.

        Args:
            docs: At most one document for each id.
            position: None for all but the last call of a batch.
            bulk: More follows: showing it to readers may wait until a call without, and so may the proof that it is durable, and a Poison.
                Where it does, the store has a method ``arrive()`` that waits for what is on its way and raises what that has raised.

        Raises:
            Transient: try again later. Wiped: open it anew. Misconfigured: stop.
            Poison: a document cannot be kept. Its `cursor` is ``("", id)``: that one is parked, and the others are written again.
        """

    def promote(self) -> None:
        """Point readers at this generation, atomically."""

    def drop(self) -> None:
        """Remove this generation."""

    def close(self) -> None:
        """Release connections."""

    def get(self, ids: Sequence[str]) -> Sequence[ViewRow]:
        """Return the documents of these ids that readers see, in any order."""

    def scan(self, after: Cursor | None, limit: int) -> Sequence[ViewRow]:
        """Return documents as readers see them, by id; `ViewRow.collection` is the empty text."""


def source_held(noted: str | None, position: Position | None, own: str) -> str:
    """Return the source that a generation is of: the one that is noted, or, of before it was, with which its topics begin."""
    return noted or next(map(source_of, position.topics if position else ()), own)


def of_another_source(where: str, held: str, own: str) -> Misconfigured:
    """Return the refusal to write a generation of another HEADRACE_SOURCE: it may be read, and its process goes on with it."""
    return Misconfigured(
        "view-of-another",
        f"{where} is of source {held}, not of {own}.",
        f"Give the consumer's store another name; or, where nothing runs {held} any more: headrace drop NAME --all, then rebuild.",
    )


def check_alone(consumer: str, held: Iterable[tuple[str, str]]) -> None:
    """Refuse a name in a store under which another consumer keeps generations: both would move the one pointer of readers.

    One that `headrace replay` makes for a comparison is in nobody's way: it never moves it.

    Args:
        consumer: Who wants to open one.
        held: Of each generation that is there, what it is called and whose it is.

    Raises:
        Misconfigured: `view-of-another`.
    """
    for where, owner in held:
        if owner != consumer and not owner.endswith(SCRATCH) and not consumer.endswith(SCRATCH):
            raise Misconfigured(
                "view-of-another",
                f"{where} is of {owner}, not of {consumer}.",
                "Give the consumer's store another name, or remove the other.",
            )
