"""A new slot with every table still to be read: the initial snapshot in chunks, and a log that begins a new epoch (S2).

Both are the same few steps. The slot is made, and its exported snapshot is asked for what it sees: that is the *floor* of every chunk,
because a transaction that committed before the slot's consistent point and is still invisible (its commit waits for a standby) is never in
the stream. Every table becomes a job; jobs, fingerprints, shapes and the checkpoint at the consistent point are one cut. The
stream does the rest, beside everything that is committed meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from psycopg import sql

from headrace.change import Checkpoint, Source, Version
from headrace.control import Control
from headrace.errors import Transient
from headrace.log import CutWriter, Log
from headrace_capture import append_only, catalog, fingerprints
from headrace_capture.jobs import Job, Jobs
from headrace_capture.progress import Progress
from headrace_capture.relations import Relations, keyless
from headrace_capture.replication import Replication, check, postgres_errors
from headrace_capture.tables import newest

_PATIENCE_SECONDS = 3.0
"""So long a slot may take before it is told that Postgres waits: transactions that run now mostly end soon."""


def forget(
    log: Log,
    writer: CutWriter,
    connection: catalog.Connection,
    tick: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Write into the open cut that nothing is to be read again, and how the tables look now: before a snapshot of all of them."""
    jobs = Jobs(log, tick, say)
    jobs.clear()
    _know(jobs, connection, log.settings.publication)
    jobs.write(writer)


def new_epoch(log: Log, known: int) -> int:
    """Return the epoch of a log that begins anew: above `known`, and above all that capture or a view of its source has reported.

    So what is built from it can take the place of a view of the log before.
    """
    reports = Control(log).reports().values()
    return 1 + max([known, *(report.version.epoch for of_one in reports for report in of_one)])


def make_slot(exporter: Replication, slot: str, progress: Progress, stopped: Callable[[], bool]) -> tuple[int, str]:
    """Make the slot; return what `Replication.create_slot` does. What Postgres waits for is told, for it may last for ever."""
    running = "the transactions that are running now"
    progress.say(f"making slot {slot}: Postgres waits for {running}")
    remedy = "If that lasts, end what is left open: see pg_prepared_xacts, and pg_stat_activity by xact_start."
    said = f"The initial snapshot has not begun: to make slot {slot}, Postgres waits for {running}, of any database."
    since = time.monotonic()

    def waits() -> bool:
        if time.monotonic() - since > _PATIENCE_SECONDS:
            progress.phase("snapshot", Transient("snapshot-waits", said, remedy))
        return stopped()

    progress.phase("snapshot")
    made = exporter.create_slot(slot, waits)
    progress.phase("snapshot")
    return made


def known_tables(log: Log) -> set[str]:
    """Return the tables of which the log has a topic and a shape."""
    return {table for table, _ in log.schemas()} & set(log.tables())


def begin(
    log: Log,
    writer: CutWriter,
    connection: catalog.Connection,
    exporter: Replication,
    where: tuple[Source, int],
    progress: Progress,
    stopped: Callable[[], bool],
    *,
    initial: bool,
) -> Checkpoint:
    """Make the slot and hand every table over to be read; return the checkpoint from which to stream.

    Args:
        log: The log.
        writer: Open; its `ends` are those of the log.
        connection: For the catalogue.
        exporter: A replication connection that makes the slot.
        where: The source and the epoch that begins or goes on.
        progress: Is told.
        stopped: Ends the waiting.
        initial: Whether nothing in the log is a state before all tables are read; else they are *inexact* until then.
    """
    settings = log.settings
    source, epoch = where
    jobs = Jobs(log, partial(check, stopped), progress.say)
    jobs.clear(list(jobs.prints))
    with postgres_errors("looking at the captured tables"):
        _know(jobs, connection, settings.publication)
        tables = catalog.published_tables(connection, settings.publication)
        appended = append_only.named(connection, settings.publication)
    point, name = make_slot(exporter, settings.slot, progress, stopped)
    floor = _floor(settings.dsn, name)
    once = known_tables(log)  # of what is captured no longer: dead keys only
    named = once | _publish(log, writer, tables, appended, progress)
    for table in sorted(named):
        why = "initial snapshot" if initial else "a new epoch"
        jobs.put(Job(table, why=why, floor=floor, initial=initial))
    jobs.write(writer)
    return writer.seal(
        version=Version(epoch, point),
        commit_ts=progress.now_ms(),
        xid=0,
        source=source,
        inexact=() if initial else tuple(sorted(named)),
        snapshot="chunked" if initial and named else None,
    )


def _publish(
    log: Log, writer: CutWriter, tables: list[catalog.Table], appended: set[str], progress: Progress
) -> set[str]:
    """Make topics and shapes of the tables that have a key or are `appended`; return their names.

    Raises:
        Misconfigured: `append-only-full`, `append-only-key`.
    """
    shapes = newest(log.schemas().values())
    named = {table.full_name: table for table in tables if table.key or table.full_name in appended}
    for table in tables:
        if table.full_name not in named:
            progress.say(keyless(table.full_name, table))
        elif not table.key:
            append_only.check(table)
    writer.add_topic(*log.ensure_tables(named))  # before the first shape opens a cut, which may not last long (S5)
    for name, table in named.items():
        known, wanted = shapes.get(name), table.shape(1)
        if known is not None and known.key != wanted.key:  # its topic has been made anew
            shape = replace(wanted, version=known.version + 1)
        else:
            shape = Relations.version(known, wanted)
        if shape is not known:
            writer.schema(shape)
    return set(named)


def _know(jobs: Jobs, connection: catalog.Connection, publication: str) -> None:
    for table, print_ in fingerprints.read(connection, publication).items():
        jobs.know(table, print_)


def _floor(dsn: str, snapshot: str) -> str:
    """Return what an exported snapshot sees."""
    with (
        catalog.connect(dsn, name="headrace resnapshot") as connection,
        postgres_errors("reading an exported snapshot"),
    ):
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
        row = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
        connection.execute("COMMIT")
    assert row is not None
    return str(row[0])
