"""`headrace resnapshot --recover`: a new slot, a new epoch, and every table to be read again.

For when log and source have parted (`identity`). Run while capture is stopped: it makes what capture needs, and ends. What the log has
stays, so that views go on from where they are: the epoch that begins has higher versions than all before (S2), every table is *inexact*
until it was read again beside the stream, and what vanished meanwhile gets its tombstone [I4]. Only where a topic is gone, is short of
records, has records whose shapes are gone, or has another key or partition count, it is made anew, and the views that read it must be
rebuilt: they see its new id.

Where the checkpoints are gone nothing in the log is known to be a state (S6): the new epoch begins with an initial snapshot, which
capture takes, into the topics that are there. The slot is capture's matter then.

Killed at any moment it leaves a log that is refused as before, or one whose new epoch has begun and says that every table is inexact;
then it is run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace

from headrace.change import Checkpoint, Source, Version, format_lsn
from headrace.control import Control
from headrace.errors import HeadraceError, Misconfigured
from headrace.log import CutWriter, Log
from headrace.settings import Settings
from headrace_capture import append_only, beginnings, catalog, identity, unmarked
from headrace_capture.identity import Here, Slot
from headrace_capture.progress import Progress
from headrace_capture.replication import Replication
from headrace_capture.tables import newest
from headrace_capture.teardown import check_unused


def recover(settings: Settings, say: Callable[[str], None]) -> Checkpoint:
    """Begin the new epoch; return the checkpoint from which capture will stream, or, where it says `running`, take its snapshot.

    Raises:
        Misconfigured: `slot-active`: capture is running; `nothing-captured`; `wal-level`, `publication-missing`, ….
        Transient: `postgres-away`, `kafka-away`, `cut-lost`: run it again.
    """
    log = Log(settings)
    log.ensure_spine()
    check_unused(log)  # by another DSN or slot nothing of it shows in Postgres, and it would be fenced
    with closing(catalog.connect(settings.dsn, name="headrace resnapshot", timeout_s=0)) as connection:
        here = identity.look(connection, settings.slot, settings.publication, settings.dsn)
        slot = identity.slot_of(connection, settings.slot)
        _check_free(slot, here.source)
        writer = log.writer()
        try:
            confirmed = slot.confirmed if slot else 0
            known, _ = unmarked.newest_committed(log, confirmed)
            writer.open()
            unmarked.show_spine(log, writer, known, confirmed, lambda: None)
            before = log.newest_checkpoint()
            if before is None:
                begun = _begin_with_snapshot(log, writer, connection, here, say)
            else:
                writer.resume(_mend_topics(log, before, connection, say))
                begun = _begin(log, writer, connection, before, here, slot, say)
            _await_shown(log, begun)
            return begun
        finally:
            with suppress(HeadraceError):
                writer.abort()
            writer.close()


def _await_shown(log: Log, begun: Checkpoint) -> None:
    """Wait until readers see it, which is later than its commit is answered: capture asks for the source of the newest before it fences."""
    while (newest := log.newest_checkpoint()) is None or newest.version < begun.version:
        time.sleep(0.05)


def _check_free(slot: Slot | None, source: Source) -> None:
    if slot is not None:
        identity.check_ours(source.slot, slot, source.database)
    if slot is not None and slot.active_pid is not None:
        raise Misconfigured(
            "slot-active", f"Process {slot.active_pid} of Postgres reads slot {source.slot}.", "Stop headrace capture."
        )


def _begin(
    log: Log,
    writer: CutWriter,
    connection: catalog.Connection,
    before: Checkpoint,
    here: Here,
    slot: Slot | None,
    say: Callable[[str], None],
) -> Checkpoint:
    # A log that never was a state begins its initial snapshot again, in chunks.
    initial = log.newest_checkpoint(complete=True) is None
    source, epoch = here.source, before.version.epoch + 1
    if (
        here.lsn < before.version.lsn
    ):  # a slot that is made here looks right to the old epoch once the WAL has come so far again
        inexact = () if initial else tuple(sorted(beginnings.known_tables(log)))
        at, snapshot = Version(epoch, here.lsn), "running" if initial else None
        writer.seal(version=at, commit_ts=_now_ms(), xid=0, source=source, inexact=inexact, snapshot=snapshot)
    progress = Progress(Control(log), say)
    with closing(Replication(log.settings.dsn, "headrace resnapshot")) as exporter:
        if slot:
            exporter.drop_slot(log.settings.slot, _never)
        where = source, epoch
        begun = beginnings.begin(log, writer, connection, exporter, where, progress, _never, initial=initial)
    say(f"epoch {begun.version.epoch} begins at {format_lsn(begun.version.lsn)}; every table will be read again")
    old = before.source.slot
    left = identity.slot_of(connection, old) if old != source.slot else None
    if left is not None and left.fits(source.database):
        say(f"slot {old} stays and keeps WAL; {identity.drop_unread(old)}")
    return begun


def _begin_with_snapshot(
    log: Log, writer: CutWriter, connection: catalog.Connection, here: Here, say: Callable[[str], None]
) -> Checkpoint:
    """Write the intent of an initial snapshot, above every version that the log and the views have."""
    ends = log.remains(here.tables)
    if not ends:
        raise Misconfigured(
            "nothing-captured",
            f"The log of {log.settings.source} has neither checkpoints nor records: there is nothing to go on from.",
            f"Run: headrace capture. If it refuses slot {here.source.slot}, {identity.drop_unread(here.source.slot)}, then run it again.",
        )
    log.check_written_by_us(ends)
    version = Version(beginnings.new_epoch(log, log.newest_epoch(ends)), here.lsn)
    writer.resume(_mend_topics(log, Checkpoint(version, 0, 0, ends, here.source), connection, say))
    begun = writer.seal(version=version, commit_ts=_now_ms(), xid=0, source=here.source, snapshot="running")
    say(f"epoch {version.epoch} begins with the initial snapshot")
    return begun


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _never() -> bool:
    return False


def _mend_topics(
    log: Log, before: Checkpoint, connection: catalog.Connection, say: Callable[[str], None]
) -> Checkpoint:
    """Delete the topics that can no longer be believed; return the checkpoint without them and without those that are gone."""
    there = [topic for topic in before.ends if topic in log.topics.names()]
    counts = log.partitions(there)
    begins, actual = log.topics.begins(counts), log.topics.ends(counts, committed=False)
    publication = log.settings.publication
    tables, appended = catalog.published_tables(connection, publication), append_only.named(connection, publication)
    keys = {table.full_name: table.key for table in tables if table.key or table.full_name in appended}
    shapes = newest(log.schemas().values())
    kept = {}
    for topic in there:
        table, shape = log.table_of(topic), shapes.get(log.table_of(topic))
        whole = counts[topic] == len(before.ends[topic]) and not any(begins[topic])
        whole = whole and all(is_now >= end for is_now, end in zip(actual[topic], before.ends[topic], strict=True))
        readable = shape.key == keys.get(table, shape.key) if shape else not any(before.ends[topic])
        if whole and readable:
            kept[topic] = before.ends[topic]
    for topic in sorted(before.ends.keys() - kept.keys()):
        say(f"topic {topic} is made anew: views that read it must be rebuilt")
    _delete(log, [topic for topic in there if topic not in kept])
    return replace(before, ends=kept)


def _delete(log: Log, topics: list[str]) -> None:
    log.topics.delete(topics)
    while any(topic in log.topics.names() for topic in topics):
        time.sleep(0.1)
