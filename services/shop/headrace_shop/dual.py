"""The other implementation of the seam: every store written from the request, as good engineers do it.

Postgres first, in one transaction; then, by importance, what people search, what they see, what is counted. The
documents are read right after COMMIT and rendered by the consumers' own code; each store is tried several times under a
deadline, and one that stays away is reported and left, because the order *is* placed. It has stores of its own: the
consumers' names with the prefix `dual-` and another DuckDB file, so that nothing but the way of writing differs.

It diverges all the same, and no more care would mend it: between two writes the process can die, and two requests can
reach two stores in different orders. `steps` is the write cut where that happens, so that a replay can show it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

from headrace import plugins
from headrace.change import CREATE, DELETE, Change, Checkpoint, Column, Position, Row, Source, TableSchema, Version
from headrace.codec import encode_key
from headrace.consumer import Batch, Consumer, Generation, ViewRow
from headrace.documents.consumer import DocumentConsumer
from headrace.errors import Transient
from headrace.fingerprint import fingerprint
from headrace.settings import Settings
from headrace.stores import Doc, DocumentStore
from headrace_shop import documents
from headrace_shop.database import KEYS, TABLES, Connection
from headrace_shop.documents import Touched
from headrace_shop.edits import Edit
from headrace_shop.writes import Written, commit, pool

PREFIX = "dual-"
_DOCUMENT_VIEWS = ("search", "pages")
_TRIES = 3
_PAUSE = 0.1
_DEADLINE = 5.0
"""No store is tried again later than this, seconds: the request waits."""
_UNVERSIONED = Version(1, 1)
"""A request knows no version of what it writes: the last one to arrive wins."""
_SOURCE = Source("dual", 1, "dual", "dual", "dual")
_CHUNK = 1000
_log = logging.getLogger(__name__)


def own_settings(settings: Settings) -> Settings:
    """Return the settings of the dual writer's own stores: another DuckDB file, another port."""
    host, _, port = settings.warehouse_listen.rpartition(":")
    return replace(
        settings,
        state=f"{settings.state}/dual",
        warehouse=f"{settings.state}/dual/warehouse.duckdb",
        warehouse_listen=f"{host}:{int(port) + 1}",
    )


@dataclass(slots=True)
class Request:
    """One write on its way: what it committed, and what it has yet to bring to the stores."""

    written: Written
    docs: dict[str, list[Doc]]
    changes: list[Change] = field(default_factory=list)


class DualWrites:
    """Postgres, Elasticsearch, Redis and DuckDB, written one after the other."""

    def __init__(self, settings: Settings, dsn: str) -> None:
        """Open the stores, making them when they are missing. Raises what the stores raise."""
        own = own_settings(settings)
        self._pool = pool(dsn, 4)
        self._views = {name: _opened(name, own) for name in _DOCUMENT_VIEWS}
        self._warehouse = _opened("warehouse", own)
        self._schemas: dict[tuple[str, int], TableSchema] = {}
        self._turns = {name: threading.Lock() for name in (*_DOCUMENT_VIEWS, "warehouse")}

    def write(self, *edits: Edit) -> Written:
        """Write everywhere; a store that stays away is left behind with a line in the log."""
        steps = self.steps(*edits)
        request = next(steps)
        for _ in steps:
            pass
        return replace(request.written, lsn=0)

    def steps(self, *edits: Edit) -> Iterator[Request]:
        """Write one store a step: Postgres, Elasticsearch, Redis, DuckDB; yield after each what is under way."""
        with self._pool.connection() as connection:
            written = commit(connection, edits)
            request = Request(written, self._render(connection, written), self._changes(connection, written.made.rows))
        yield request
        for name, consumer in self._views.items():
            with self._turns[name]:
                _firmly(name, partial(_documents(consumer).store.write, request.docs[name], _position()))
            yield request
        with self._turns["warehouse"]:
            _firmly("warehouse", partial(self._warehouse.apply, self._batch(request.changes)))
        yield request

    def fill(self) -> None:
        """Bring everything that Postgres has to the stores, once, while nobody writes; then let readers see them."""
        with self._pool.connection() as connection:
            for consumer in self._views.values():
                docs = list(documents.render_all(connection, _documents(consumer), _UNVERSIONED))
                for start in range(0, len(docs), _CHUNK):
                    _documents(consumer).store.write(docs[start : start + _CHUNK], None, bulk=True)
                _documents(consumer).store.write([], _position())
                consumer.promote()
            for table in TABLES:
                rows = documents.rows(connection, table)
                self._warehouse.apply(
                    self._batch([self._change(connection, table, _key(table, row), row) for row in rows])
                )
            self._warehouse.promote()

    def close(self) -> None:
        """Release the stores."""
        for consumer in (*self._views.values(), self._warehouse):
            consumer.close()
        self._pool.close()

    def compare(self) -> dict[str, tuple[int, int]]:
        """Return for each view how many rows it has and how many are missing, extra or other than Postgres has them."""
        with self._pool.connection() as connection:
            expected: dict[str, dict[tuple[str, str], Row]] = {
                name: {
                    ("", doc.id): cast("Row", doc.body)
                    for doc in documents.render_all(connection, _documents(consumer), _UNVERSIONED)
                }
                for name, consumer in self._views.items()
            }
            expected["warehouse"] = {
                (f"public.{table}", encode_key(_key(table, row)).decode()): row
                for table in TABLES
                for row in documents.rows(connection, table)
            }
        consumers = self._views | {"warehouse": self._warehouse}
        return {name: _compare(expected[name], consumer) for name, consumer in consumers.items()}

    def _render(self, connection: Connection, written: Written) -> dict[str, list[Doc]]:
        touched = written.made.rows
        return {
            name: documents.render(connection, _documents(view), touched, _UNVERSIONED)
            for name, view in self._views.items()
        }

    def _changes(self, connection: Connection, touched: Touched) -> list[Change]:
        """Return the rows that a transaction touched, as they are now, each once."""
        changes = []
        for table, key in dict.fromkeys(touched):
            names = KEYS[table]
            found = [row for row in documents.rows(connection, table, names[0], [key[0]]) if _values(table, row) == key]
            changes.append(
                self._change(connection, table, dict(zip(names, key, strict=True)), found[0] if found else None)
            )
        return changes

    def _change(self, connection: Connection, table: str, key: Row, row: Row | None) -> Change:
        name = f"public.{table}"
        if (name, 1) not in self._schemas:
            self._schemas[name, 1] = _schema(connection, table)
        op = CREATE if row is not None else DELETE
        return Change(name, op, encode_key(key), row, _UNVERSIONED, 0, 0, 1, 0, 0)

    def _batch(self, changes: list[Change]) -> Batch:
        checkpoint = Checkpoint(_UNVERSIONED, 0, 0, {}, _SOURCE)
        return Batch(changes, _position(), checkpoint, loading=False, schemas=dict(self._schemas))


def _opened(name: str, settings: Settings) -> Consumer:
    """Return the consumer `name` with a store of its own name, open, and nothing else of it running."""
    cls = plugins.load(name)
    consumer = cls(settings, PREFIX + name)
    store = consumer.store if isinstance(consumer, DocumentConsumer) else consumer
    store.open(Generation(PREFIX + name, 1, fingerprint(cls)))
    return consumer


def _documents(consumer: Consumer) -> DocumentConsumer:
    return cast("DocumentConsumer", consumer)


def _position() -> Position:
    return Position(version=_UNVERSIONED, source=_SOURCE)


def _key(table: str, row: Row) -> Row:
    return {name: row[name] for name in KEYS[table]}


def _values(table: str, row: Row) -> tuple[int, ...]:
    return tuple(row[name] for name in KEYS[table])


def _schema(connection: Connection, table: str) -> TableSchema:
    columns = connection.execute(
        """SELECT attname, format_type(atttypid, atttypmod), NOT attnotnull FROM pg_attribute
           WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum""",
        (table,),
    ).fetchall()
    return TableSchema(f"public.{table}", 1, tuple(Column(*column) for column in columns), KEYS[table])


def _firmly(name: str, write: Callable[[], None]) -> None:
    """Try a store several times, under a deadline; the order stands whether it answers or not."""
    deadline = time.monotonic() + _DEADLINE
    for attempt in range(1, _TRIES + 1):
        try:
            return write()
        except Transient as error:
            _log.warning("%s did not take a write (try %d of %d): %s", name, attempt, _TRIES, error)
            if time.monotonic() > deadline:
                break
            time.sleep(_PAUSE * attempt)
    return None


def _compare(expected: dict[tuple[str, str], Row], consumer: Consumer) -> tuple[int, int]:
    kept = (
        consumer.store if isinstance(consumer, DocumentConsumer) else consumer
    )  # a consumer that was not opened shows nothing
    found = {(row.collection, row.key): row.value for row in _scan(kept)}
    differing = sum(1 for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    return len(found), differing


def _scan(kept: Consumer | DocumentStore) -> Iterator[ViewRow]:
    after = None
    while rows := kept.scan(after, _CHUNK):
        yield from rows
        after = (rows[-1].collection, rows[-1].key)
