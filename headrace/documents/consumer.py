"""A view of documents: which ones a change touches, when they are rendered, and what is durable when.

Two stores have a position each: the view (the plugin's store) and the local rows (`headrace.documents.local`). A cut
goes to the view first and is committed locally only when the view has it. So the local rows are never ahead of a
healthy view, and reading resumes from *their* position: what a crash left undone is found again by the old join values,
which the local rows still have, and by what was begun (`headrace.documents.begun`), where the log has lost a row since.

| what happened                                 | local   | view   | on open                                           |
|-----------------------------------------------|---------|--------|---------------------------------------------------|
| a kill before the view had the cut            | L       | L      | resume at L: the cut comes again                  |
| a kill after documents, before the position   | L       | L      | the same; what was begun is rendered again        |
| a kill between the view's commit and local's  | L       | L' > L | the same                                          |
| the view lost what was last written, by which  | L       | L      | local, which waits for nothing, goes; reload      |
| a document was shown that had waited          |         |        |                                                   |
| the view was fed from elsewhere meanwhile, or | L       | L' > L | the same; where compaction may have begun since L |
| a power failure took local commits back       |         |        | (half of its lag ago), local goes; reload         |
| a kill amid a transaction of several cuts     | L       | L      | its pieces were uncommitted: they come again      |
| a kill while loading                          | loading | none   | resume at the last committed piece; view is empty |
| a kill while every document is rendered       | loading | none   | the same; every document is rendered again        |
| the local file is lost, or of another code    | none    | L      | from zero, while readers keep the old: a *reload* |
| the view went back (restored)                 | L' > L  | L      | local, which forgot old parents, goes; reload     |
| a kill while reloading                        | loading | L      | resume; readers keep the old documents            |
| the view was wiped                            | L       | none   | both from zero [I6]                               |
| it came back (restored) while that loads      | loading | L      | local, which kept nothing of what goes; reload    |
| both come from another log                    | L       | L      | the reader refuses L [I12]                        |

A *reload* ends like a load: at the first complete exact state each root key of the log is rendered once. What is known by its tombstone
alone is deleted from the view: a view last fed longer ago than tombstones stay, `delete.retention.ms`, is refused, like one of another log.
In which window its row was a tombstone does not say: of windows all goes that only the view has.

Between complete states nothing is rendered: the changes wait in the open local transaction, which SQLite keeps on disk. Only in
a load from zero documents of one row each are written as rows come; where it is resumed, all are rendered at its end.

A document that is debounced stays in the list of those that are touched, which is committed with the position: so it is
rendered after a kill too, at the next complete state or, when no change comes, at the one where the view stands.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import ClassVar

from headrace import codec
from headrace.change import Change, Position, Row, Version
from headrace.consumer import Batch, Cursor, Generation, Origin, ViewRow, no_progress
from headrace.documents.checks import check_all
from headrace.documents.declaration import Node
from headrace.documents.layout import discard, errors, of_the_store, place
from headrace.documents.local import LocalRows, Touched
from headrace.documents.origins import find, origins
from headrace.documents.rendering import meant, rendered
from headrace.documents.unshown import CHUNK, Sent, Showing, Unshown, chunk_of, rows_of
from headrace.documents.when import EVER, Left, When, held_back, now
from headrace.documents.windows import Root, Window, is_joined
from headrace.errors import Misconfigured, Poison, Refused
from headrace.settings import Settings
from headrace.stores import Doc, DocumentStore

_ESCAPES = str.maketrans({"\\": "\\\\", ",": "\\,"})


class DocumentConsumer:
    """A consumer that keeps one document for each row of a root table. Subclass it and write `render`.

    Class attributes:
        document, documents: What belongs together; one `Document` or `Window`, or several with roots of their own.
        store: Where the documents are kept, e.g. `ElasticsearchIndex` or `RedisPages`.
        debounce_seconds: A document that changes all the time is rendered once in so many seconds at most, and waits in between as it is.
        name: Names the view; by default the entry point's name.

    `render` must be a function of the row alone: no clock, no counter, no look elsewhere. Verify calls it too, and expects the same.
    """

    document: ClassVar[Root]
    documents: ClassVar[Sequence[Root]] = ()
    store: DocumentStore
    debounce_seconds: ClassVar[float] = 0
    name: str = ""
    tables: Collection[str] = ()
    mirrors_rows: bool = False
    leaves_parked: ClassVar[bool] = True
    progress: Callable[[int, int], None]
    shows = property(lambda self: self._view or getattr(self.store, "shows", None))

    def __init_subclass__(cls) -> None:
        """Derive `documents` and `tables` from the declaration."""
        super().__init_subclass__()
        if "document" in vars(cls):
            cls.documents = (cls.document,)
        cls.tables = tuple(dict.fromkeys(table for document in cls.documents for table in document.tables))

    def __init__(self, settings: Settings, name: str) -> None:
        """Connect to nothing yet. Raises Misconfigured: `document-ids`."""
        kinds = [(document.table, getattr(document, "start", None)) for document in self.documents]
        if twice := next((table for table, start in kinds if kinds.count((table, start)) > 1), None):
            raise Misconfigured(
                "document-ids",
                f"{type(self).__name__} has two documents of {twice} that id(table, key) cannot tell apart.",
                "Make one Document of them; give each Window a start of its own name.",
            )
        if len(self.documents) > 1 and type(self).id is DocumentConsumer.id:
            raise Misconfigured(
                "document-ids",
                f"{type(self).__name__} has several documents, whose default ids can be the same.",
                "Define id(table, key).",
            )
        self.settings, self.name = settings, name
        self.progress = no_progress
        self.store = copy.copy(type(self).store)
        self.store.bind(settings, name)
        self._local: LocalRows | None = None
        self._view: Position | None = None
        self._told = 0
        self._left: Left | None = None
        self._early = False
        self._checked: set[tuple[str, int]] = set()

    # What a plugin writes

    def render(self, row: Node) -> Row | None:
        """Return the document of a root row as a mapping of JSON values, None for no document."""
        raise NotImplementedError

    def id(self, table: str, key: Row) -> str:  # noqa: ARG002  a plugin with several documents needs the table
        """Return the document's id, which no other root may have: the values of the root's key, joined by commas."""
        if len(key) == 1:
            return str(*key.values())
        return ",".join(str(value).translate(_ESCAPES) for value in key.values())

    # The contract

    def generations(self) -> list[Generation]:
        """Return the generations that the store holds."""
        return self.store.generations()

    def open(self, generation: Generation) -> Position | None:
        """Open view and local rows; return the local position. The table above says what is kept of either."""
        self._close_local()
        self._view = self.store.open(generation)
        self._told = self._view.told if self._view else now()
        path = place(self.settings, f"{self.name}-g{generation.number}.sqlite")
        local = LocalRows(path, self.documents, generation.fingerprint)
        if local.position is not None and not self._fits(local.position, self._view):
            local.close()
            discard(path)
            local = LocalRows(path, self.documents, generation.fingerprint)
        self._local = local
        self._showing = Showing(self.store)
        alone = self._view is None and not any(map(is_joined, self.documents))
        self._early = alone and local.position is None
        with errors(local.path, local.close):
            if alone and local.position is not None:
                local.touch_all()
            self._left = local.left() if local.position is not None and not local.position.loading else None
        self._checked.clear()
        return local.position

    def apply(self, batch: Batch) -> None:
        """Take the changes in; at a complete exact state render what they touched, write it, and only then commit locally.

        After a Poison it may be called again with the same changes: the open local transaction has them and what they touched, by the
        old values too, and takes them in once more.
        """
        local = self._opened()
        with errors(local.path, local.close):
            local.check()
            self._learn_schemas(local, batch)
            self._take(local, batch)
            if batch.complete:
                self._publish(local, batch, self._when(batch))
            elif batch.loading:
                local.commit(replace(batch.position, told=self._told), rarely=True)

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
        """Return some documents as readers see them: none before the first state, of which a load may have written a part."""
        return self.store.get([key for _, key in keys]) if self._view is not None else ()

    def count(self) -> Mapping[str, int] | None:
        """Return how many documents readers see, None where the store does not count by itself."""
        count = getattr(self.store, "count", None) if self._view is not None else None
        found: Mapping[str, int] | None = count() if count else None
        return found

    def scan(self, after: Cursor | None, limit: int) -> Sequence[ViewRow]:
        """Return documents as readers see them (see `get`)."""
        return self.store.scan(after, limit) if self._view is not None else ()

    def why(self, key: Cursor, limit: int) -> Sequence[Origin]:
        """Return what a document is made from, as the local rows are now."""
        local = self._opened()
        for number, document in enumerate(self.documents):
            root = find(local, number, key[1], partial(self.id, document.table))
            if root is not None:
                return list(origins(local, number, document, root, limit))
        return []

    def pending(self) -> Version | None:
        """Return the version of the oldest change that a document waits to show, None when none waits; a reload does not know it."""
        local = self._local.position if self._local else None
        if self._view is not None and (local is None or local.loading):
            return self._view.held
        return self._left.since if self._left else None

    def due(self) -> bool:
        """Whether the wait of a document is over."""
        return self._left is not None and self._left.is_due(self._interval)

    # Where to go on

    def _take(self, local: LocalRows, batch: Batch) -> None:
        """Take the changes of a batch in. From zero, documents of one row each are written as rows come: the store works as we read."""
        if not batch.loading:
            local.follow(batch.changes)
            return
        early = self._early and not batch.complete
        new = local.load(batch.changes, touch=not early, unknown=self._view is not None)
        if early:
            self._showing.early(local, self._of_one_row(local, new))

    def _fits(self, local: Position, view: Position | None) -> bool:
        """Whether reading may go on from the local rows: they are loading, or not ahead of the view nor long behind it."""
        if view is not None and not (
            local.continued_by(view.version, view.source) and local.topics.items() <= view.topics.items()
        ):
            return False
        if view is not None and local.loading and local.told > view.told:
            return False  # it began while there was no view: of what is gone, and of what was written early, nothing was kept
        if local.loading:  # tombstones that it has not read yet may be gone (S19)
            return now() - local.appended <= local.tombstones_stay(self.settings.delete_retention_ms)
        if view is None or local.version > view.version or not _behind(local, view):
            return False
        # The view may show rows that the local rows never had; of those that are gone by now the log says so only for a while.
        since = max(now(), view.appended) - local.appended  # the clock here may be behind the broker's
        if local.version != view.version:
            return since <= self.settings.min_compaction_lag_ms / 2
        # Else it has lost what was shown later of this state, for which nothing waits here any more.
        return not view.told or local.told <= view.told

    def _check_reload(self, view: Position, state: Position) -> None:
        """Refuse to go on with a view's old documents from a state that does not continue them."""
        if not view.continued_by(state.version, state.source) or not view.topics.items() <= state.topics.items():
            raise _refused(
                "position-of-another-source", f"The view was built from {view.source}, the log is of {state.source}."
            )
        if view.version > state.version:
            raise _refused("position-ahead", f"The view is at {view.version}, the log ends at {state.version}.")
        if state.appended - view.appended > view.tombstones_stay(self.settings.delete_retention_ms):
            raise _refused("away-too-long", "The view was last fed longer ago than delete.retention.ms.")

    # Rendering

    def _when(self, batch: Batch) -> When:
        """Return which documents are shown now: all of a load, which is then as if none was shown before."""
        if batch.loading or not self.debounce_seconds:
            return When(EVER, 0)
        return When(EVER if batch.hurry else now(), self._interval)

    @property
    def _interval(self) -> int:
        return int(1000 * self.debounce_seconds)

    def _publish(self, local: LocalRows, batch: Batch, when: When) -> None:
        if batch.loading and self._view is not None:
            self._check_reload(self._view, batch.position)
        position = replace(batch.position, told=max(now(), self._told + 1))
        self._showing.settle(local)
        at = local.position
        further = at is None or (at.version, at.offsets) != (position.version, position.offsets)
        if further and not batch.loading:
            local.begun.begin(when, batch.position.version)
        done, total = 0, local.count_touched() if batch.loading else 0
        unshown = Unshown(self.settings.parked_limit)
        with closing(self._docs(local, batch, when, unshown)) as docs:
            while (chunk := chunk_of(docs)).more:
                self._showing.write(chunk.docs, None, unshown)
                done += len(chunk.docs)
                self.progress(done, total)
        left = local.left(when) if when.interval else None
        self._showing.write(chunk.docs, held_back(position, left), unshown)
        unshown.check()
        local.clear_touched(when, unshown.waiting)
        local.commit(position)
        if further:
            local.begun.forget()
        self._view, self._told, self._left, self._early = position, position.told, left, False

    def _docs(self, local: LocalRows, batch: Batch, when: When, unshown: Unshown) -> Generator[Sent]:
        """Yield what to write. After a reload a window that lost its rows meanwhile is known by nothing but its document."""
        version = batch.position.version
        fresh = batch.loading and self._view is None and not self._early
        by_view = batch.loading and self._view is not None and any(isinstance(each, Window) for each in self.documents)
        if by_view:
            local.remember_shown(self._ids())
        for touched in local.touched(when):
            cursor = touched.document.table, self.id(touched.document.table, touched.key)
            if by_view:
                local.is_rendered(cursor[1])
            if cursor in batch.parked:
                unshown.waiting.append(touched)
            elif cursor not in batch.dropped:
                doc = self._doc(touched, cursor, version, unshown)
                if doc is not None and (doc.body is not None or not fresh):
                    yield Sent(Touched(touched.document, touched.key, None), doc)
        for id_ in local.not_rendered() if by_view else ():
            yield Sent(None, Doc(id_, None, version))

    def _ids(self) -> Iterator[str]:
        scan = of_the_store()(self.store.scan)
        rows = scan(None, CHUNK)
        while rows:
            yield from (row.key for row in rows)
            rows = scan((rows[-1].collection, rows[-1].key), CHUNK)

    def _doc(self, touched: Touched, cursor: Cursor, version: Version, unshown: Unshown) -> Doc | None:
        touched = meant(self._opened(), self.id, touched, cursor[1])
        try:
            return rendered(self, touched, touched.node, cursor[1], version)
        except Poison as error:
            unshown.add(error, cursor, rows_of(touched.node))
            return None

    def _of_one_row(self, local: LocalRows, changes: Sequence[Change]) -> Iterator[Sent]:
        for document in self.documents:
            shape = local.shape(document.table)
            for change in changes:
                if change.table == document.table:
                    touched = Touched(document, codec.decode_key(change.key), None)
                    node = Node(change.table, shape.whole(change.row or {}))
                    try:
                        doc = rendered(self, touched, node, self.id(change.table, touched.key), change.version)
                    except Poison:
                        local.touch(touched, change.version)
                    else:
                        if doc.body is not None:
                            yield Sent(touched, doc)

    # Small questions

    def _opened(self) -> LocalRows:
        if self._local is None:
            raise Misconfigured("not-open", f"{self.name} is not open.", "Call open(generation) first.")
        return self._local

    def _close_local(self) -> None:
        if self._local is not None:
            self._local.close()
            self._local = None

    def _learn_schemas(self, local: LocalRows, batch: Batch) -> None:
        """Hold the declaration against the newest schemas, once each, and let the local rows know them.

        Of a Debezium feed (S28) any row may be an old one: it has not all columns until all that there is was read.
        """
        typed = self.settings.feed == "headrace"
        loaded = batch.loading and batch.complete
        if batch.schemas.keys() <= self._checked and (typed or not loaded):
            return
        newest = {schema.table: schema for _, schema in sorted(batch.schemas.items())}
        if not typed:
            newest = {table: local.shape(table).grown(schema) for table, schema in newest.items()}
        check_all(self.documents, newest, shown=self._view is not None, typed=typed, whole=typed or loaded)
        since = batch.changes[0].version if batch.changes else batch.position.version
        local.learn(newest, since, whole=typed)
        self._checked |= batch.schemas.keys()


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
