"""The initial snapshot: every captured table as it was at the slot's consistent point, by COPY.

One connection exports the snapshot by making the slot and then stays idle, for its next command would end it; another one reads all
tables in that snapshot. Values are the same text that the stream sends, so they go through the same converters. Rows are written in cuts
whose checkpoints say `snapshot: running`; nothing in the log is a state until the last one says `complete` (S6). A snapshot that starts
again cannot know what its predecessor published: afterwards every live key whose newest record is older than this snapshot gets a delete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from psycopg import sql

from headrace.change import Checkpoint, TableSchema, Version
from headrace.log import CutWriter, Log
from headrace_capture import catalog
from headrace_capture.live import LiveKeys
from headrace_capture.progress import Progress
from headrace_capture.relations import Relations, keyless
from headrace_capture.replication import Replication, Stopped, postgres_errors
from headrace_capture.stream import DELETE, NULL
from headrace_capture.tables import ColumnPlan, Stamp, Table, copy_fields, newest

READ: Final = b"r"
_LOOK_AROUND = 1_024


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

    def take(self, exporter: Replication) -> Checkpoint:
        """Make the slot, read all tables, remove what an earlier attempt left; return the complete checkpoint.

        Raises:
            Stopped: it was asked to stop.
            Transient: `postgres-away`, `kafka-away`, `cut-lost`: the whole snapshot starts again.
            Misconfigured: `postgres-rights`, `too-many-slots`, `row-too-large`, `key-changed`.
        """
        settings = self._log.settings
        self._progress.phase("snapshot")
        self._progress.say(f"making slot {settings.slot}: Postgres waits for the transactions that are running now")
        point, name = exporter.create_slot(settings.slot, self._stopped)
        version = Version(self._intent.version.epoch, point)
        stamp = Stamp(version, 0, (self._progress.now_ms(), self._progress.now_ms()), snapshot=True)
        with (
            catalog.connect(settings.dsn, name="headrace snapshot", timeout_s=0) as connection,
            postgres_errors("reading a snapshot"),
        ):
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(name)))
            tables = self._tables(connection)
            for table, query in tables:
                self._read(connection, table, query, stamp, version)
            connection.execute("COMMIT")
        self._remove_older(stamp, version, [table for table, _ in tables])
        return self._seal(version, "complete")

    def _tables(self, connection: catalog.Connection) -> list[tuple[Table, sql.Composed]]:
        """Return what to read and how, and publish the tables' shapes."""
        publication = self._log.settings.publication
        filters = {(row[0], row[1]): row[2] for row in connection.execute(_FILTERS, [publication])}
        found = []
        for published in catalog.published_tables(connection, publication):
            if not published.key:
                self._progress.say(keyless(published.full_name, published.keyless))
                continue
            table = self._table(published)
            found.append((table, _query(published, filters.get((published.schema, published.name)))))
        return found

    def _table(self, published: catalog.Table) -> Table:
        known = self._schemas.get(published.full_name)
        shape = Relations.version(known, published.shape(1))
        self._writer.add_topic(self._log.ensure_table(shape.table))
        if shape is not known:
            self._writer.schema(shape)
        columns = [
            ColumnPlan(column, read.base, read.element, out_of_line=read.out_of_line)
            for column, read in zip(shape.columns, published.published, strict=True)
        ]
        about = self._log.settings.source, self._intent.source.database
        return Table(shape, self._log.topic_of(shape.table), columns, about)

    def _read(
        self, connection: catalog.Connection, table: Table, query: sql.Composed, stamp: Stamp, version: Version
    ) -> None:
        self._progress.say(f"snapshot of {table.name}")
        headers = stamp.headers(table, 0)
        count = 0
        with connection.cursor().copy(query) as copy:
            for line in copy:
                row = copy_fields(bytes(line)[:-1])
                self._writer.produce(table.topic, table.key(row), stamp.value(table, 0, READ, table.row(row)), headers)
                count += 1
                if not count % _LOOK_AROUND:
                    self._look_around(version, count)
        self._progress.say(f"snapshot of {table.name}: {count} rows")

    def _look_around(self, version: Version, done: int) -> None:
        if self._stopped():
            raise Stopped
        self._progress.changes = self._writer.records + self._writer.open_records
        self._progress.phase("snapshot", progress=(done, 0))
        if self._writer.open_records >= self._log.settings.cut_records:
            self._seal(version, "running")

    def _remove_older(self, stamp: Stamp, version: Version, tables: Iterable[Table]) -> None:
        """Delete every key that an earlier attempt wrote and this one did not (S6), also of tables that are captured no more."""
        known = {table.name: table for table in tables}
        if self._writer.opened_at:
            self._seal(version, "running")
        for name in (self._log.table_of(topic) for topic, ends in self._intent.ends.items() if any(ends)):
            table = known.get(name) or self._gone(name)
            if table is None:
                continue
            with LiveKeys(self._log, name) as live:
                live.catch_up(self._progress.beat)
                for count, key in enumerate(live.each(below=version.lsn), start=1):
                    self._writer.produce(table.topic, key, stamp.value(table, 0, DELETE, NULL), stamp.headers(table, 0))
                    self._writer.produce(table.topic, key, None, stamp.headers(table, 0))
                    if not count % _LOOK_AROUND:
                        self._look_around(version, 0)

    def _gone(self, name: str) -> Table | None:
        """Return a table that the log has and the publication no longer."""
        shape: TableSchema | None = self._schemas.get(name)
        if shape is None:
            return None
        columns = [ColumnPlan(column, "", "", out_of_line=False) for column in shape.columns]
        return Table(
            shape, self._log.topic_of(name), columns, (self._log.settings.source, self._intent.source.database)
        )

    def _seal(self, version: Version, state: str) -> Checkpoint:
        checkpoint = self._writer.seal(
            version=version, commit_ts=self._progress.now_ms(), xid=0, source=self._intent.source, snapshot=state
        )
        self._progress.sealed(checkpoint)
        return checkpoint


def _query(table: catalog.Table, only: str | None) -> sql.Composed:
    """Return the COPY of what the stream would send: its columns, its row filter, its rows (an ordinary table's own only)."""
    columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.published)
    source = table.identifier if table.kind == "p" else sql.SQL("ONLY {}").format(table.identifier)
    where = sql.SQL(f" WHERE {only}") if only else sql.SQL("")  # Postgres's own text of the filter
    return sql.SQL("COPY (SELECT {} FROM {}{}) TO STDOUT").format(columns, source, where)


_FILTERS = "SELECT schemaname, tablename, rowfilter FROM pg_publication_tables WHERE pubname = %s"
