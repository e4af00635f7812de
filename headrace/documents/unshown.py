"""Documents go to their store; those that cannot be shown are found in one pass, so that the runner parks all of them at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from headrace.change import Position
from headrace.consumer import Cursor
from headrace.documents.declaration import Node
from headrace.documents.layout import of_the_store
from headrace.documents.local import LocalRows, Touched
from headrace.errors import Poison
from headrace.stores import Doc, DocumentStore
from headrace.stores.sending import MOST

CHUNK: Final = 1_000
CHUNK_BYTES: Final = 4 << 20
"""Of the documents of a chunk, which is ended by the one that reaches it: a few chunks are in memory at once [I10]."""
_RECENT: Final = MOST + 1
"""Chunks that a store may still have on their way, and the one that is given to it."""
_ROWS: Final = 20
"""Of a join with more rows these many are shown to who looks at what is parked."""


class Sent(NamedTuple):
    """A document that is given to the store, and what it is of, without its rows; None of one that is only known to be gone."""

    touched: Touched | None
    doc: Doc


class Chunk(NamedTuple):
    """What a store is given at once; `more` may follow."""

    docs: list[Sent]
    more: bool


def chunk_of(docs: Iterator[Sent]) -> Chunk:
    """Return the next documents, bounded in number and in bytes."""
    chunk: list[Sent] = []
    size = 0
    for sent in docs:
        chunk.append(sent)
        size += len(sent.doc.text or b"")
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            return Chunk(chunk, more=True)
    return Chunk(chunk, more=False)


class Unshown:
    """Collects poison, each with the document that it is of, up to what the runner would park.

    Attributes:
        waiting: What is parked already, and touched.
    """

    def __init__(self, limit: int) -> None:
        """Collect one more than `limit`, by which the runner sees that it is too many."""
        self._limit = limit
        self._found: list[Poison] = []
        self.waiting: list[Touched] = []

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._found)

    def add(self, error: Poison, cursor: Cursor, body: Any) -> None:
        """Note a document; raise all when they are too many. Of the error's trace nothing is kept: it holds what was written with it."""
        error.__traceback__ = error.__cause__ = error.__context__ = None
        error.cursor, error.body = cursor, error.body if error.body is not None else body
        self._found.append(error)
        if len(self._found) > self._limit:
            self.check()

    def check(self) -> None:
        """Raise what was found."""
        if self._found:
            first, *others = self._found
            first.others = others
            raise first


class Showing:
    """Gives documents to a store, and finds out which it does not take: of bulks that go out while more is rendered it says so later."""

    def __init__(self, store: DocumentStore) -> None:
        """Give nothing yet."""
        self._write = of_the_store()(store.write)
        self._arrive: Callable[[], None] = of_the_store()(getattr(store, "arrive", lambda: None))
        self._recent: deque[dict[str, Sent]] = deque(maxlen=_RECENT)

    def write(self, chunk: Sequence[Sent], position: Position | None, unshown: Unshown) -> None:
        """Write documents, and the position when the view takes every document of the batch; note those that it does not.

        After a refusal all that may be on their way are written again, so that the next one is found. Then nothing is on its way any more,
        nor after the last chunk, which has the position: a refusal belongs to this attempt and to no later one.
        """
        self._recent.append({sent.doc.id: sent for sent in chunk})
        docs: Sequence[Doc] = [sent.doc for sent in chunk]
        last = position is not None
        while True:
            try:
                self._write(docs, None if unshown else position, bulk=position is None or bool(unshown))
                if unshown and last:
                    self._arrive()
                    self.forget()
            except Poison as error:
                refused = self._refused(error)
                if refused is None or refused.touched is None:
                    raise
                unshown.add(error, (refused.touched.document.table, refused.doc.id), refused.doc.body)
                docs, last = [sent.doc for sents in self._recent for sent in sents.values()], True
            else:
                return

    def early(self, local: LocalRows, docs: Iterator[Sent]) -> None:
        """Write documents of a load that goes on. Where one is refused, all that may be meant are noted as touched: the end of the load
        tries them again, and says which."""
        while chunk := chunk_of(docs).docs:
            self._recent.append({sent.doc.id: sent for sent in chunk})
            with self._noting(local):
                self._write([sent.doc for sent in chunk], None, bulk=True)

    def settle(self, local: LocalRows) -> None:
        """Wait for what was written early: what is refused of it by now may be another document at the end."""
        with self._noting(local):
            self._arrive()
        self.forget()

    def forget(self) -> None:
        """Say that all have arrived."""
        self._recent.clear()

    @contextmanager
    def _noting(self, local: LocalRows) -> Iterator[None]:
        try:
            yield
        except Poison:
            for sents in self._recent:
                for sent in sents.values():
                    if sent.touched is not None:
                        local.touch(sent.touched, sent.doc.version)
            self.forget()

    def _refused(self, error: Poison) -> Sent | None:
        """Return which of the last documents is refused; it is not written again."""
        if error.cursor is None:
            return None
        found = [sents.pop(error.cursor[1], None) for sents in self._recent]
        return next(filter(None, reversed(found)), None)


def rows_of(node: Node | None) -> Any:
    """Return the rows that a document is made of, as JSON values; of many that are joined the first."""
    if node is None:
        return None
    joined = {name: _joined(value) for name, value in node._joins.items()}  # noqa: SLF001  a row's columns and its joins are of one name space
    return dict(node) | ({"joined": joined} if joined else {})


def _joined(value: Node | list[Node] | None) -> Any:
    if not isinstance(value, list):
        return rows_of(value)
    more = [f"and {len(value) - _ROWS} more"] if len(value) > _ROWS else []
    return [*map(rows_of, value[:_ROWS]), *more]
