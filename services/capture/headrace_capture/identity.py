"""Whether this is still the server, the slot and the log that belong together [I12, S2].

A position means something only on one history of one server. Here each way in which the two can have parted is told apart, says what may
be missing, and names the one command that mends it. Nobody takes a `max()` of positions: going on silently would lose changes, or
keep rows that the server never had.

A failover is followed without any command when nothing was lost by it: the new timeline left the old one at or after the newest
checkpoint, and after the commit of a transaction of which the log has a part (S5); and the slot is there (a failover slot, on 17
and newer).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from psycopg import sql

from headrace.change import Checkpoint, Source, format_lsn, parse_lsn
from headrace.errors import Misconfigured, Transient
from headrace_capture import catalog
from headrace_capture.replication import MEND, Replication, postgres_errors

_TOLD = 3
"""So many topics are named."""
_ANOTHER = "Name another slot by HEADRACE_SLOT"


class Slot(NamedTuple):
    """The slot as Postgres shows it. `confirmed` is its confirmed_flush_lsn; `lost` says why it can no longer be used."""

    plugin: str
    database: str
    active_pid: int | None
    confirmed: int
    lost: str

    def fits(self, database: str) -> bool:
        """Whether capture of this database may have made it: Postgres lets anybody drop one of another database."""
        return (self.plugin, self.database) == ("pgoutput", database)


class Here(NamedTuple):
    """The server that answers.

    Attributes:
        source: What a checkpoint would say of it.
        lsn: Up to where its WAL is written.
        switches: (timeline, LSN) for each timeline before the present one: where it was left.
        tables: What the publication sends.
    """

    source: Source
    lsn: int
    switches: tuple[tuple[int, int], ...] = ()
    tables: tuple[str, ...] = ()


def look(connection: catalog.Connection, slot: str, publication: str, dsn: str) -> Here:
    """Return which server answers; refuse one that cannot be captured.

    Raises:
        Misconfigured: `wal-level`, `publication-missing`, `publication-incomplete`.
        Transient: `postgres-standby`: somebody may be promoting it.
    """
    with postgres_errors("looking at the source"):
        row = connection.execute("SELECT pg_is_in_recovery(), current_setting('wal_level')").fetchone()
        assert row is not None
        if row[0]:
            raise Transient("postgres-standby", "The server is a standby.", "Let HEADRACE_DSN name the primary.")
        if row[1] != "logical":
            raise Misconfigured(
                "wal-level",
                f"wal_level is {row[1]}.",
                "ALTER SYSTEM SET wal_level = 'logical', then restart Postgres.",
            )
        tables = tuple(table.full_name for table in catalog.published_tables(connection, publication))
        catalog.check_operations(connection, publication)
        flushed = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
        assert flushed is not None
        replication = Replication(dsn)
        try:
            identity = replication.identify()
            switches = replication.history(identity.timeline)
        finally:
            replication.close()
    source = Source(identity.system_id, identity.timeline, identity.database, slot, publication)
    return Here(source, max(identity.lsn, parse_lsn(flushed[0])), switches, tables)


def slot_of(connection: catalog.Connection, name: str) -> Slot | None:
    """Return the slot, None when there is none."""
    invalidated = "invalidation_reason" if connection.info.server_version >= 170000 else "NULL"
    query = sql.SQL(_SLOT).format(sql.SQL(invalidated))
    with postgres_errors("looking at the slot"):
        row = connection.execute(query, [name]).fetchone()
    return Slot(row[0], row[1], row[2], parse_lsn(row[3]), row[4]) if row else None


def check(checkpoint: Checkpoint | None, here: Here, slot: Slot | None, remains: Collection[str] = ()) -> None:
    """Refuse to go on where changes may have been lost; `remains`: topics that have records though there is no checkpoint.

    Raises:
        Misconfigured: `checkpoints-missing`, `slot-without-checkpoint`, `other-source`, `timeline-diverged`, `source-behind-log`,
            `slot-missing`, `slot-lost`, `slot-beyond-checkpoint`.
    """
    if checkpoint is None:
        if remains:
            raise _checkpoints_missing(sorted(remains))
        if slot is not None:
            drop = (
                f"; {drop_unread(here.source.slot)}, then: headrace capture" if slot.fits(here.source.database) else ""
            )
            raise Misconfigured(
                "slot-without-checkpoint",
                f"Slot {here.source.slot} exists ({slot.plugin} in database {slot.database}), but this log has no checkpoint: "
                "it may be another log's.",
                f"{_ANOTHER}{drop}.",
            )
        return
    check_source(checkpoint.source, here.source)
    if checkpoint.snapshot != "running":
        _check_history(checkpoint, here)
        _check_slot(checkpoint, here.source, slot)
    elif slot is not None and not slot.fits(here.source.database):
        raise Misconfigured("slot-lost", foreign(here.source.slot, slot), f"{_ANOTHER}; then: {MEND}")


def check_source(log: Source, here: Source) -> None:
    """Raise Misconfigured: `other-source`, unless the log is of this source, perhaps before a failover."""
    if not log.same_but_timeline(here):
        raise Misconfigured(
            "other-source",
            f"The log is of {_told(log)}; this is {_told(here)}: their positions do not compare.",
            f"Let HEADRACE_DSN, HEADRACE_SLOT and HEADRACE_PUBLICATION name the first, or set HEADRACE_SOURCE for a new log. "
            f"If this is the same database on another server: {MEND}",
        )


def check_same(source: Source, answers: catalog.Identity) -> None:
    """Raise Transient: `postgres-away`, where a connection does not lead to the server that was looked at a moment ago.

    One that was promoted between the two looks would send what comes after the log's end, whatever it lacks before that.
    """
    if (source.system_id, source.timeline) != (answers.system_id, answers.timeline):
        said = f"Another server answers by now: it is on timeline {answers.timeline}, that of a moment ago on {source.timeline}."
        raise Transient("postgres-away", said, "It is looked at and tried again.")


def foreign(name: str, slot: Slot) -> str:
    """Say whose a slot is that does not fit."""
    return f"Slot {name} is of {slot.plugin} in database {slot.database}: it is not ours to drop."


def drop_unread(name: str) -> str:
    """Say how a slot goes of which a person has to know that nobody needs it: publication and rights stay."""
    return f"if nothing else reads it: SELECT pg_drop_replication_slot('{name}')"


def check_ours(name: str, slot: Slot, database: str) -> None:
    """Raise Misconfigured: `slot-lost`, where no capture of this database made the slot."""
    if not slot.fits(database):
        remedy = "Name another one by HEADRACE_SLOT, if HEADRACE_DSN names the right database."
        raise Misconfigured("slot-lost", foreign(name, slot), remedy)


def _checkpoints_missing(remains: list[str]) -> Misconfigured:
    told = ", ".join(remains[:_TOLD]) + (f" and {len(remains) - _TOLD} more" if len(remains) > _TOLD else "")
    return Misconfigured(
        "checkpoints-missing",
        f"There are records in {told}, and the log has no checkpoint: their topic was deleted. "
        "How far the log goes is not known any more, nor which changes and deletes it lacks.",
        "Run: headrace resnapshot --recover, then capture. It takes the initial snapshot again, into the topics that are there, "
        "and deletes from them what is gone.",
    )


def _check_history(checkpoint: Checkpoint, here: Here) -> None:
    """Hold the timelines against each other: the newest checkpoint, and what the log has beyond it, must be this server's own past."""
    at, then, now = checkpoint.version.lsn, checkpoint.source.timeline, here.source.timeline
    ends = f"The log ends at {format_lsn(at)}"
    if checkpoint.partial:  # that commit begins where `partial` says, and is wholly there if anything is after it
        at = checkpoint.partial[0] + 1
        ends = f"The log ends amid the transaction committed at {format_lsn(at - 1)}"
    left = here.lsn if then == now else dict(here.switches).get(then)
    if left is None:
        raise Misconfigured(
            "timeline-diverged",
            f"The log is of timeline {then}; this server is on timeline {now}, which does not come from it.",
            f"Let HEADRACE_DSN name the right server. If this is it, its rows are other ones: {MEND}",
        )
    if left >= at:
        return
    if then == now:
        raise Misconfigured(
            "source-behind-log",
            f"{ends}, this server's WAL at {format_lsn(left)}: it was restored from older data. "
            "The log has changes that this server never had.",
            f"Let HEADRACE_DSN name the right server. If this is it: {MEND}",
        )
    raise Misconfigured(
        "timeline-diverged",
        f"{ends} on timeline {then}; this server left that timeline at {format_lsn(left)} "
        f"and is on timeline {now}: the log has changes that it never had.",
        MEND,
    )


def _check_slot(checkpoint: Checkpoint, source: Source, slot: Slot | None) -> None:
    at = format_lsn(checkpoint.version.lsn)
    if slot is None:
        why = " (a standby that was promoted has it only if it was made for failover)" if source.timeline > 1 else ""
        raise Misconfigured(
            "slot-missing",
            f"The log ends at {at}, but there is no slot {source.slot}{why}: what came since is lost to the log.",
            MEND,
        )
    if not slot.fits(source.database):
        raise Misconfigured(
            "slot-lost",
            f"Slot {source.slot} is of {slot.plugin} in database {slot.database}: what came since {at} is lost to the log.",
            f"{_ANOTHER}, or drop that one; then: {MEND}",
        )
    if slot.lost:
        raise Misconfigured(
            "slot-lost",
            f"Slot {source.slot} can no longer be read from ({slot.lost}): what came since {at} is lost to the log.",
            MEND,
        )
    if slot.confirmed > checkpoint.version.lsn:
        raise Misconfigured(
            "slot-beyond-checkpoint",
            f"Slot {source.slot} has passed {format_lsn(slot.confirmed)}, the log ends at {at}: the changes between are lost to the log.",
            MEND,
        )


def _told(source: Source) -> str:
    return (
        f"database {source.database}, slot {source.slot}, publication {source.publication}, "
        f"system {source.system_id}, timeline {source.timeline}"
    )


_SLOT = """
SELECT plugin, database, active_pid, coalesce(confirmed_flush_lsn, '0/0')::text,
       coalesce({}, CASE WHEN wal_status = 'lost' THEN 'its WAL was removed (max_slot_wal_keep_size)' ELSE '' END)
FROM pg_replication_slots WHERE slot_name = %s AND slot_type = 'logical'
"""
