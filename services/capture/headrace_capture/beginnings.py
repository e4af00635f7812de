"""A new slot with every table still to be read: the initial snapshot in chunks, and a log that begins a new epoch (S2).

Both are the same few steps. The slot is made, and its exported snapshot is asked for what it sees: that is the *floor* of every chunk,
because a transaction that committed before the slot's consistent point and is still invisible (its commit waits for a standby) is never in
the stream. Every table becomes a job; jobs, fingerprints, shapes and the checkpoint at the consistent point are one cut. The
stream does the rest, beside everything that is committed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from psycopg import sql

from headrace.change import Checkpoint, Source, Version
from headrace.errors import Misconfigured
from headrace.log import CutWriter, Log
from headrace_capture import append_only, catalog, fingerprints
from headrace_capture.jobs import Job, Jobs
from headrace_capture.progress import Progress
from headrace_capture.relations import Relations, keyless
from headrace_capture.replication import Replication, postgres_errors
from headrace_capture.tables import newest


def forget(log: Log, writer: CutWriter, connection: catalog.Connection) -> None:
    """Write into the open cut that nothing is to be read again, and how the tables look now: before a snapshot of all of them."""
    jobs = Jobs(log)
    jobs.clear()
    _know(jobs, connection, log.settings.publication)
    jobs.write(writer)


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
    jobs = Jobs(log)
    jobs.clear(list(jobs.prints))
    with postgres_errors("looking at the captured tables"):
        _know(jobs, connection, settings.publication)
        tables = catalog.published_tables(connection, settings.publication)
        appended = _append_only(connection, settings.publication, tables, initial=initial)
    progress.say(f"making slot {settings.slot}: Postgres waits for the transactions that are running now")
    point, name = exporter.create_slot(settings.slot, stopped)
    floor = _floor(settings.dsn, name)
    named = _publish(log, writer, tables, appended, progress)
    named |= {table for table, _ in log.schemas()} & set(log.tables())  # captured once and no longer: dead keys only
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


def _append_only(
    connection: catalog.Connection, publication: str, tables: list[catalog.Table], *, initial: bool
) -> set[str]:
    """Return the append-only tables; refuse them where they would have to be read in chunks."""
    found = append_only.named(connection, publication) & {table.full_name for table in tables if not table.key}
    if initial and found:
        raise Misconfigured(
            "append-only-again",
            f"{', '.join(sorted(found))}: an append-only table cannot be read in chunks, for it has no key (S10).",
            "Run: headrace capture --snapshot=whole",
        )
    return found


def _publish(
    log: Log, writer: CutWriter, tables: list[catalog.Table], appended: set[str], progress: Progress
) -> set[str]:
    """Make topics and shapes of the tables that have a key, and topics of those that are append-only; return the names of the former."""
    shapes = newest(log.schemas().values())
    keyed = {table.full_name: table for table in tables if table.key}
    for name in sorted(appended):
        writer.add_topic(log.ensure_table(name))
    for table in tables:
        if not table.key and table.full_name not in appended:
            progress.say(keyless(table.full_name, table.keyless))
    for name, table in keyed.items():
        known, wanted = shapes.get(name), table.shape(1)
        if known is not None and known.key != wanted.key:  # its topic has been made anew
            shape = replace(wanted, version=known.version + 1)
        else:
            shape = Relations.version(known, wanted)
        writer.add_topic(log.ensure_table(name))
        if shape is not known:
            writer.schema(shape)
    return set(keyed)


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
