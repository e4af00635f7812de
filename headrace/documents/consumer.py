"""A view of documents: which ones a change touches, when they are rendered, and what is durable when.

Two stores have a position each: the view (the plugin's store) and the local rows (`headrace.documents.local`). A cut
goes to the view first and is committed locally only when the view has it. So the local rows are never ahead of a
healthy view, and reading resumes from *their* position: what a crash left undone is found again by the old join values,
which the local rows still have.

| what happened                                 | local   | view   | on open                                           |
|-----------------------------------------------|---------|--------|---------------------------------------------------|
| a kill before the view had the cut            | L       | L      | resume at L: the cut comes again                  |
| a kill after documents, before the position   | L       | L      | the same; equal or newer versions overwrite       |
| a kill between the view's commit and local's  | L       | L' > L | resume at L: what was touched since is rendered   |
| a kill amid a transaction of several cuts     | L       | L      | its pieces were uncommitted: they come again      |
| a kill while loading                          | loading | none   | resume at the last committed piece; view is empty |
| a kill while every document is rendered       | loading | none   | the same; every document is rendered again        |
| the local file is lost, or of another code    | none    | L      | from zero, while readers keep the old: a *reload* |
| the view went back (restored)                 | L' > L  | L      | local, which forgot old parents, goes; reload     |
| a kill while reloading                        | loading | L      | resume; readers keep the old documents            |
| the view was wiped                            | L       | none   | both from zero [I6]                               |
| both come from another log                    | L       | L      | the reader refuses L [I12]                        |

A *reload* ends like a load: at the first complete exact state every root key that the log knows is rendered once. Keys
that it knows only by their tombstones are deleted from the view: that is right for as long as tombstones last, so a
view that was last fed longer ago than `delete.retention.ms` is refused, like one whose log was replaced.

Between complete states nothing is rendered: the changes wait in the open local transaction, which SQLite keeps on disk.
"""

from __future__ import annotations

import copy
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

from headrace import codec
from headrace.change import Position, Row, TableSchema
from headrace.consumer import Batch, Cursor, Generation, ViewRow, no_progress
from headrace.documents.checks import check
from headrace.documents.declaration import Document, Node
from headrace.documents.local import LocalRows, Touched, discard
from headrace.documents.unshown import Unshown, rows_of
from headrace.errors import HeadraceError, Misconfigured, Poison, Refused, Transient
from headrace.settings import Settings
from headrace.stores import Doc, DocumentStore

_CHUNK = 500


class DocumentConsumer:
    """A consumer that keeps one document for each row of a root table. Subclass it and write `render`.

    Class attributes:
        document, documents: What belongs together; one `Document`, or several with roots of their own.
        store: Where the documents are kept, e.g. `ElasticsearchIndex` or `RedisPages`.
        name: Names the view; by default the entry point's name.

    `render` must be a function of the row alone: no clock, no counter, no look elsewhere. Verify calls it too, and
    expects the same document.
    """

    document: ClassVar[Document]
    documents: ClassVar[Sequence[Document]] = ()
    store: DocumentStore
    name: str = ""
    tables: Collection[str] = ()
    mirrors_rows: bool = False
    leaves_parked: ClassVar[bool] = True
    progress: Callable[[int, int], None]

    def __init_subclass__(cls) -> None:
        """Derive `documents` and `tables` from the declaration."""
        super().__init_subclass__()
        if "document" in vars(cls):
            cls.documents = (cls.document,)
        cls.tables = tuple(dict.fromkeys(table for document in cls.documents for table in document.tables))

    def __init__(self, settings: Settings, name: str) -> None:
        """Connect to nothing yet. Raises Misconfigured: `document-ids`."""
        if len(self.documents) > 1 and type(self).id is DocumentConsumer.id:
            raise Misconfigured(
                "document-ids",
                f"{type(self).__name__} has several documents, whose default ids can be the same.",
                "Define id(table, key).",
            )
        self.settings = settings
        self.name = name
        self.progress = no_progress
        self.store = copy.copy(type(self).store)
        self.store.bind(settings, name)
        self._local: LocalRows | None = None
        self._view: Position | None = None
        self._checked: set[tuple[str, int]] = set()

    # What a plugin writes

    def render(self, row: Node) -> Row | None:
        """Return the document of a root row as a mapping of JSON values, None for no document."""
        raise NotImplementedError

    def id(self, table: str, key: Row) -> str:  # noqa: ARG002  a plugin with several documents needs the table
        """Return the document's id: the values of the root's key, joined by commas."""
        values = [str(value) for value in key.values()]
        return values[0] if len(values) == 1 else ",".join(_escaped(value) for value in values)

    # The contract

    def generations(self) -> list[Generation]:
        """Return the generations that the store holds."""
        return self.store.generations()

    def open(self, generation: Generation) -> Position | None:
        """Open view and local rows; return the local position. The table above says what is kept of either."""
        self._close_local()
        self._view = self.store.open(generation)
        path = self.settings.path(f"{self.name}-g{generation.number}.sqlite")
        local = LocalRows(path, self.documents, generation.fingerprint)
        if local.position is not None and not self._fits(local.position, self._view):
            local.close()
            discard(path)
            local = LocalRows(path, self.documents, generation.fingerprint)
        self._local = local
        self._checked.clear()
        return local.position

    def apply(self, batch: Batch) -> None:
        """Take the changes in; at a complete exact state render what they touched, write it, and only then commit
        locally.

        After a Poison it may be called again with the same changes: the open local transaction has them and what they touched, by the
        old values too, and takes them in once more.
        """
        local = self._opened()
        with _local_errors(local):
            self._learn_schemas(local, batch.schemas)
            for change in batch.changes:
                local.apply(change, loading=batch.loading)
            if batch.complete:
                self._publish(local, batch)
            elif batch.loading:
                local.commit(batch.position)

    def promote(self) -> None:
        """Point readers at this generation."""
        self.store.promote()

    def drop(self) -> None:
        """Remove this generation and its local rows."""
        self.store.drop()
        local = self._opened()
        self._close_local()
        discard(local.path)

    def close(self) -> None:
        """Release the store and the local rows."""
        self._close_local()
        self.store.close()

    def get(self, keys: Sequence[Cursor]) -> Sequence[ViewRow]:
        """Return some documents as readers see them."""
        return self.store.get([key for _, key in keys])

    def count(self) -> Mapping[str, int] | None:
        """Return how many documents readers see, None where the store does not count by itself."""
        count = getattr(self.store, "count", None)
        found: Mapping[str, int] | None = count() if count else None
        return found

    def scan(self, after: Cursor | None, limit: int) -> Sequence[ViewRow]:
        """Return documents as readers see them."""
        return self.store.scan(after, limit)

    # Where to go on

    def _fits(self, local: Position, view: Position | None) -> bool:
        """Whether reading may go on from the local rows: they are loading, or not ahead of the view."""
        if view is not None and not (
            local.continued_by(view.version, view.source) and local.topics.items() <= view.topics.items()
        ):
            return False
        if local.loading:
            # Tombstones that the load has not read yet may be gone (S19).
            return _now() - local.appended <= self.settings.delete_retention_ms
        return view is not None and local.version <= view.version and _behind(local, view)

    def _check_reload(self, view: Position, now: Position) -> None:
        """Refuse to go on with a view's old documents from a state that does not continue them."""
        if not view.continued_by(now.version, now.source) or not view.topics.items() <= now.topics.items():
            raise _refused(
                "position-of-another-source", f"The view was built from {view.source}, the log is of {now.source}."
            )
        if view.version > now.version:
            raise _refused("position-ahead", f"The view is at {view.version}, the log ends at {now.version}.")
        if now.appended - view.appended > self.settings.delete_retention_ms:
            raise _refused("away-too-long", "The view was last fed longer ago than delete.retention.ms.")

    # Rendering

    def _publish(self, local: LocalRows, batch: Batch) -> None:
        fresh = batch.loading and self._view is None
        if batch.loading and self._view is not None:
            self._check_reload(self._view, batch.position)
        done, total = 0, local.count_touched() if batch.loading else 0
        chunk: dict[str, tuple[Touched, Doc]] = {}
        waiting: list[Touched] = []
        unshown = Unshown(self.settings.parked_limit)
        for touched in local.touched():
            if len(chunk) == _CHUNK:
                self._write(chunk, None, unshown)
                done += _CHUNK
                self.progress(done, total)
                chunk = {}
            cursor = touched.document.table, self.id(touched.document.table, touched.key)
            if cursor in batch.parked:
                waiting.append(touched)
            elif cursor not in batch.dropped:
                doc = self._doc(touched, cursor, batch, unshown)
                if doc is not None and (doc.body is not None or not fresh):
                    chunk[doc.id] = touched, doc
        self._write(chunk, batch.position, unshown)
        unshown.check()
        local.clear_touched(waiting)
        local.commit(batch.position)
        self._view = batch.position

    def _write(self, chunk: dict[str, tuple[Touched, Doc]], position: Position | None, unshown: Unshown) -> None:
        """Write documents, and the position when the view takes every document of the batch; note those that it does not."""
        while True:
            docs = [doc for _, doc in chunk.values()]
            try:
                self.store.write(docs, None if unshown else position, bulk=position is None or bool(unshown))
            except Poison as error:
                if error.cursor is None or error.cursor[1] not in chunk:
                    raise
                touched, doc = chunk.pop(error.cursor[1])
                unshown.add(error, (touched.document.table, doc.id), doc.body)
            else:
                return

    def _doc(self, touched: Touched, cursor: Cursor, batch: Batch, unshown: Unshown) -> Doc | None:
        try:
            body = self._body(touched) if touched.node else None
        except Poison as error:
            unshown.add(error, cursor, rows_of(touched.node))
            return None
        return Doc(cursor[1], body, batch.position.version)

    def _body(self, touched: Touched) -> Row | None:
        table, key = touched.document.table, touched.key
        try:
            body = self.render(touched.node) if touched.node else None
            plain = codec.loads(codec.dumps(body))
        except HeadraceError:
            raise
        except Exception as error:
            raise Poison(
                "render-failed",
                f"{type(self).__name__}.render failed for {table} {codec.dumps(key).decode()}: {error!r}.",
                f"Mend render, then: headrace rebuild {self.name}",
            ) from error
        if plain is not None and not isinstance(plain, dict):
            raise Misconfigured(
                "render-result",
                f"{type(self).__name__}.render returned {type(body).__name__} for {table} {codec.dumps(key).decode()}.",
                "Return a mapping, or None for no document.",
            )
        return plain

    # Small questions

    def _opened(self) -> LocalRows:
        if self._local is None:
            raise Misconfigured("not-open", f"{self.name} is not open.", "Call open(generation) first.")
        return self._local

    def _close_local(self) -> None:
        if self._local is not None:
            self._local.close()
            self._local = None

    def _learn_schemas(self, local: LocalRows, schemas: Mapping[tuple[str, int], TableSchema]) -> None:
        """Hold the declaration against the newest schemas, once each, and let the local rows know them."""
        if schemas.keys() <= self._checked:
            return
        newest = {schema.table: schema for _, schema in sorted(schemas.items())}
        for document in self.documents:
            check(document, newest)
        local.learn(newest)
        self._checked |= schemas.keys()


@contextmanager
def _local_errors(local: LocalRows) -> Iterator[None]:
    """Turn an error of SQLite into Transient: the consumer is opened again, and what was not committed is read
    again."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise Transient(
            "local-state", f"{local.path}: {error}.", "Free space in the folder of HEADRACE_STATE."
        ) from error
    except sqlite3.DatabaseError as error:
        local.close()
        discard(local.path)
        raise Transient(
            "local-state", f"{local.path} is damaged ({error}); it is loaded from the log again."
        ) from error


def _behind(local: Position, view: Position) -> bool:
    """Whether `local` is at `view` or before it, partition by partition."""
    return all(
        topic in view.offsets and all(a <= b for a, b in zip(offsets, view.offsets[topic], strict=True))
        for topic, offsets in local.offsets.items()
    )


def _refused(code: str, seen: str) -> Refused:
    return Refused(
        code,
        f"{seen} Going on could miss changes or keep documents of rows that are gone.",
        "Run: headrace rebuild NAME",
    )


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(",", "\\,")


def _now() -> float:
    return time.time() * 1000
