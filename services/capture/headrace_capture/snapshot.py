"""The initial snapshot: every captured table as it was at the slot's consistent point, by COPY.

One connection exports the snapshot by making the slot and then stays idle, for its next command would end it; others read all tables
in that snapshot, a piece each at a time. A row is the same bytes as if the stream had sent it (see `copies`). Rows are written in cuts
whose checkpoints say `snapshot: running`; nothing in the log is a state until the last one says `complete` (S6). A snapshot that starts
again cannot know what its predecessor published: afterwards every live key whose newest record is older than this snapshot gets a delete.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from psycopg import errors, sql

from headrace.change import Checkpoint, TableSchema, Version
from headrace.errors import Transient
from headrace.log import CutWriter, Log
from headrace_capture import append_only, beginnings, catalog, copies
from headrace_capture.copies import Copy, Piece
from headrace_capture.cut import FULL_BYTES, LONGEST_SECONDS
from headrace_capture.live import LiveKeys
from headrace_capture.progress import Progress
from headrace_capture.published import row_filters
from headrace_capture.relations import Relations, keyless, plans_of
from headrace_capture.replication import Replication, check, postgres_errors
from headrace_capture.stream import DELETE, NULL, READ
from headrace_capture.tables import HEAD, Stamp, Table, copy_fields, newest
from headrace_capture.values import template

_BUNCH = 512
"""Rows of one connection before the others get their turn."""
_LARGE_PAGES = 12_800
"""From a hundred megabytes on people are told what a stop costs."""
_ALTERED = (errors.UndefinedColumn, errors.UndefinedTable, errors.InvalidSchemaName, errors.UndefinedFunction)
"""A name of the table's, or what its old type is read by, is gone since the snapshot was taken."""
_LOCK_SECONDS = 5.0
"""So long a connection waits for a table that is locked, while the others read on; then it reads something else first."""


class Rows:
    """How the rows of one table become records.

    Attributes:
        table: The table.
        count: Rows that were written.
        waited: Whether the table was found locked; it is told once.
    """

    def __init__(self, table: Table, writer: CutWriter, stamp: Stamp) -> None:
        """Prepare what is the same for each row."""
        self.table = table
        self.count = 0
        self.waited = False
        self._writer = writer
        self._stamp = stamp
        self._headers = stamp.headers(table, 0)
        self._key = template(table.shape.key) if len(table.key_at) == 1 else b"%b"
        self._end = stamp.value(table, 0, READ, b"").removeprefix(HEAD)

    def write(self, rows: list[bytes], *, native: bool) -> int:
        """Write what a connection gave; return how many rows that were."""
        self.count += len(rows)
        if not native:
            self._write_text(rows)
            return len(rows)
        produce, topic, headers, key, end = self._writer.produce, self.table.topic, self._headers, self._key, self._end
        for data in rows:
            made, row = copies.fields(data)
            produce(topic, key % made, b"".join((HEAD, row, end)), headers)
        return len(rows)

    def _write_text(self, rows: list[bytes]) -> None:
        table = self.table
        for number, line in enumerate(rows, start=self.count - len(rows)):
            row = copy_fields(line[:-1])
            value = self._stamp.value(table, 0, READ, table.row(row))
            key = table.key(row) if table.key_at else append_only.position_key(self._stamp.lsn, -1 - number)
            self._writer.produce(table.topic, key, value, self._headers)


class Snapshot:
    """One attempt at the initial snapshot."""

    def __init__(
        self, log: Log, writer: CutWriter, intent: Checkpoint, progress: Progress, stopped: Callable[[], bool]
    ) -> None:
        """Go on from `intent`: the checkpoint that said that a snapshot begins."""
        self._log = log
        self._writer = writer
        self._intent = intent
        self._progress = progress
        self._stopped = stopped
        self._schemas = newest(log.schemas().values())
        self._looked = 0.0
        self._inexact: list[str] = []
        self._locked: set[str] = set()

    def take(self, exporter: Replication) -> Checkpoint:
        """Make the slot, read all tables, remove what an earlier attempt left; return the complete checkpoint.

        Raises:
            Stopped: it was asked to stop.
            Transient: `postgres-away`, `kafka-away`, `cut-lost`, `table-altered`: the whole snapshot starts again.
            Misconfigured: `postgres-rights`, `too-many-slots`, `row-too-large`, `key-changed`, `topic-replaced`, `topic-missing`.
        """
        settings = self._log.settings
        point, name = beginnings.make_slot(exporter, settings.slot, self._progress, self._stopped)
        version = Version(self._intent.version.epoch, point)
        stamp = Stamp(version, 0, (self._progress.now_ms(), self._progress.now_ms()), snapshot=True)
        with self._connections(name) as connections, postgres_errors("reading a snapshot"):
            tables = self._tables(connections[0], stamp)
            self._read(connections, tables, version)
        self._remove_older(stamp, version, [rows.table for rows, _ in tables])
        self._seal(version, "running")
        self._writer.check_topics()  # the cut that says `complete` has no rows: none can go into a topic of the same name after this
        return self._seal(version, "complete")

    @contextmanager
    def _connections(self, snapshot: str) -> Iterator[list[catalog.Connection]]:
        """Connect several times and take the exported snapshot; each asserts that it sees what the first one sees."""
        settings = self._log.settings
        with ExitStack() as stack:
            connections = [
                stack.enter_context(
                    catalog.connect(settings.dsn, name="headrace snapshot", timeout_s=0, lock_s=_LOCK_SECONDS)
                )
                for _ in range(max(1, settings.snapshot_connections))
            ]
            for connection in connections:
                connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
            seen = {connection.execute("SELECT pg_current_snapshot()::text").fetchone() for connection in connections}
            if len(seen) > 1:
                raise Transient("snapshot-differs", f"Connections of one snapshot see {seen}.", "capture starts again.")
            yield connections

    def _tables(self, connection: catalog.Connection, stamp: Stamp) -> list[tuple[Rows, list[Piece]]]:
        """Return what to read of each table, and publish the tables' shapes: only now a cut opens, which may not last long (S5)."""
        publication = self._log.settings.publication
        filters = row_filters(connection, publication)
        found = []
        named = append_only.named(connection, publication)
        for published in catalog.published_tables(connection, publication):
            if published.full_name in named:
                append_only.check(published)
            elif not published.key:
                self._progress.say(keyless(published.full_name, published))
                continue
            if any(leaf.unlogged for leaf in published.leaves):
                self._inexact.append(published.full_name)  # who streams says why
            rows = Rows(self._table(published), self._writer, stamp)
            found.append((rows, list(copies.pieces(connection, published, filters.get(published.oid)))))
        shapes = [rows.table.shape for rows, _ in found]
        self._writer.add_topic(*self._log.ensure_tables(shape.table for shape in shapes))
        for shape in shapes:
            if shape is not self._schemas.get(shape.table):
                self._writer.schema(shape)
        return found

    def _table(self, published: catalog.Table) -> Table:
        known = self._schemas.get(published.full_name)
        return self._made(Relations.version(known, published.shape(1)), published)

    def _read(
        self, connections: list[catalog.Connection], tables: list[tuple[Rows, list[Piece]]], version: Version
    ) -> None:
        """Read every piece, on whichever connection is free, from whichever socket has rows."""
        waiting = deque((rows, piece) for rows, pieces in tables for piece in pieces)
        pages, done = sum(piece.pages for _, piece in waiting), 0
        if pages >= _LARGE_PAGES:
            self._progress.say(
                "if capture is stopped amid this snapshot it begins anew: headrace capture --snapshot=chunked keeps what it has read"
            )
        under_way: dict[catalog.Connection, tuple[Rows, Copy]] = {}
        while waiting or under_way:
            for connection in connections:
                if waiting and connection not in under_way:
                    rows, piece = waiting.popleft()
                    under_way[connection] = rows, Copy(connection, piece)
            got = sum(_take(rows, copy) for rows, copy in under_way.values())
            for connection in [connection for connection, (_, copy) in under_way.items() if copy.done]:
                rows, copy = under_way.pop(connection)
                if copy.locked:
                    self._told_locked(rows)
                    waiting.append((rows, copy.piece))
                    connections.append(connections.pop(connections.index(connection)))  # another one may hold the lock
                    continue
                self._locked.clear()
                done += copy.piece.pages
                self._told(rows, waiting, under_way)
            self._look_around(version, (done, pages))
            if not got and under_way:
                _wait(copy.socket for _, copy in under_way.values())

    def _told_locked(self, rows: Rows) -> None:
        """Say so, once, when a table cannot be read now, and report it until that or another can."""
        self._locked.add(rows.table.name)
        if not rows.waited:
            rows.waited = True
            self._progress.say(f"snapshot of {rows.table.name} waits: another transaction holds or wants its lock")

    def _told(
        self, rows: Rows, waiting: Iterable[tuple[Rows, Piece]], under_way: Mapping[Any, tuple[Rows, Copy]]
    ) -> None:
        """Say so when a table has been read."""
        if not any(other is rows for other, _ in (*waiting, *under_way.values())):
            self._progress.say(f"snapshot of {rows.table.name}: {rows.count} rows")

    def _look_around(self, version: Version, progress: tuple[int, int]) -> None:
        self._beat()
        writer = self._writer
        self._progress.changes = writer.records + writer.open_records
        self._progress.phase("snapshot", self._waits(), progress=progress)
        old = writer.opened_at and time.monotonic() - writer.opened_at > LONGEST_SECONDS
        if old or writer.open_records >= self._log.settings.cut_records or writer.open_bytes >= FULL_BYTES:
            self._seal(version, "running")
            if time.monotonic() > self._looked + LONGEST_SECONDS:
                with suppress(Transient):  # once more before it is complete
                    self._writer.check_topics()
                self._looked = time.monotonic()

    def _waits(self) -> Transient | None:
        if not self._locked:
            return None
        said = f"The initial snapshot waits for {', '.join(sorted(self._locked))}: another transaction holds or wants a lock."
        return Transient(
            "table-locked", said, "Others are read meanwhile; pg_blocking_pids() and pg_locks tell who holds it."
        )

    def _beat(self) -> None:
        check(self._stopped)
        self._progress.beat()

    def _remove_older(self, stamp: Stamp, version: Version, tables: Iterable[Table]) -> None:
        """Delete every key that an earlier attempt wrote and this one did not (S6), also of tables that are captured no more."""
        known = {table.name: table for table in tables}

        def seal() -> None:
            if self._writer.opened_at:
                self._seal(version, "running")

        for name in (self._log.table_of(topic) for topic, ends in self._intent.ends.items() if any(ends)):
            table = known.get(name) or self._gone(name)
            if table is None:
                continue
            ends = self._seal(version, "running").ends
            with LiveKeys(self._log, name) as live:
                live.catch_up(ends.get(table.topic, []), self._beat, self._beat)
                for count, key in enumerate(live.each(self._beat, version, seal), start=1):
                    self._writer.produce(table.topic, key, stamp.value(table, 0, DELETE, NULL), stamp.headers(table, 0))
                    self._writer.produce(table.topic, key, None, stamp.headers(table, 0))
                    if not count % _BUNCH:
                        self._look_around(version, (0, 0))

    def _gone(self, name: str) -> Table | None:
        """Return a table that the log has and the publication no longer."""
        shape: TableSchema | None = self._schemas.get(name)
        if shape is None:
            return None
        return self._made(shape, None)

    def _made(self, shape: TableSchema, published: catalog.Table | None) -> Table:
        about = self._log.settings.source, self._intent.source.database
        return Table(shape, self._log.topic_of(shape.table), plans_of(shape, published), about)

    def _seal(self, version: Version, state: str) -> Checkpoint:
        checkpoint = self._writer.seal(
            version=version,
            commit_ts=self._progress.now_ms(),
            xid=0,
            source=self._intent.source,
            inexact=tuple(self._inexact),
            snapshot=state,
        )
        self._progress.sealed(checkpoint)
        return checkpoint


def _take(rows: Rows, copy: Copy) -> int:
    """Write what a connection has by now; return how many rows that were. What is read is named as the snapshot knows it."""
    try:
        return rows.write(copy.take(_BUNCH), native=copy.piece.native)
    except _ALTERED as error:
        name, said = rows.table.name, str(error).partition("\n")[0]
        remedy = "It starts again by itself; let DDL wait for it, or start with --snapshot=chunked."
        raise Transient(
            "table-altered", f"{name} was altered before the snapshot had read it: {said}.", remedy
        ) from error


def _wait(sockets: Iterable[int]) -> None:
    waiting = select.poll()
    for socket in sockets:
        waiting.register(socket, select.POLLIN)
    waiting.poll(100)
