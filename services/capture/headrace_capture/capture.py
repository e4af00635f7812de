"""Capture's life: one session after another, each from the newest committed checkpoint.

A session is: look at the source, wait until no other capture uses the slot, fence every predecessor in Kafka, read the newest checkpoint,
hold it against the source and the slot [I12], then the snapshot if there is none that is complete, then the stream (S3). Whatever is
transient ends the session; the next one starts from the checkpoint again, which makes every failure the same failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import NamedTuple

from psycopg import sql

from headrace.change import Checkpoint, Source, Version, format_lsn, parse_lsn
from headrace.consumer import no_progress
from headrace.control import Control
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.log import CutWriter, Log
from headrace.settings import Settings
from headrace_capture import catalog
from headrace_capture.cut import Cut
from headrace_capture.progress import Progress
from headrace_capture.relations import Relations
from headrace_capture.replication import Replication, Stopped, postgres_errors
from headrace_capture.snapshot import Snapshot
from headrace_capture.stream import Stream
from headrace_capture.toast import Filler
from headrace_capture.watch import Watch

_AGAIN = "Start again from zero: headrace teardown --topics, then setup and capture."
_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)


class Slot(NamedTuple):
    """The slot as Postgres shows it. `confirmed` is its confirmed_flush_lsn; `lost` says why it can no longer be used."""

    plugin: str
    database: str
    active_pid: int | None
    confirmed: int
    lost: str


class Capture:
    """Captures one source until it is stopped."""

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        stopped: Callable[[], bool],
        log: Log | None = None,
        show: Callable[[int, int], None] = no_progress,
    ) -> None:
        """Connect to nothing yet; `say` tells people what happens, `show` how far long work is, `stopped` is asked often."""
        self._settings = settings
        self._log = log or Log(settings)
        self._say = say
        self._stopped = stopped
        self._progress = Progress(Control(self._log), say, show)
        self._answered = False

    def run(self) -> None:
        """Capture until stopped. What is transient is tried again for ever, once all servers have answered.

        Raises:
            Transient: at the start: a server does not answer, and somebody is there to read it.
            Misconfigured: `wal-level`, `publication-missing`, `slot-missing`, `slot-lost`, `slot-beyond-checkpoint`, `other-source`, ….
            Poison: see `Stream.run`.
        """
        self._log.ensure_spine()
        self._progress.start()
        error: HeadraceError | None = None
        try:
            self._sessions()
        except HeadraceError as failure:
            error = failure
            raise
        finally:
            self._progress.stop(error)

    def _sessions(self) -> None:
        failures = 0
        while not self._stopped():
            began = time.monotonic()
            try:
                self._session()
            except Stopped:
                return
            except Transient as error:
                if not self._answered:
                    raise
                failures = failures + 1 if time.monotonic() - began < 60 else 1
                self._progress.phase("waiting", error)
                self._say(f"waiting: {error}")
                self._rest(_BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS)) - 1])

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stopped():
            time.sleep(0.1)

    def _session(self) -> None:
        with closing(catalog.connect(self._settings.dsn, name="headrace capture")) as connection:
            source, now = self._look(connection)
            slot = self._free_slot(connection)
            writer = self._log.writer()
            try:
                checkpoint = self._resume(writer, source, slot)
                if checkpoint is None or checkpoint.snapshot == "running":
                    checkpoint = self._snapshot(writer, checkpoint, source, slot, now)
                self._stream(writer, checkpoint, connection)
            finally:
                with suppress(HeadraceError):
                    writer.abort()
                writer.close()

    def _look(self, connection: catalog.Connection) -> tuple[Source, int]:
        """Return which source this is and where its WAL ends; refuse one that cannot be captured."""
        settings = self._settings
        with postgres_errors("looking at the source"):
            row = connection.execute("SHOW wal_level").fetchone()
            if row != ("logical",):
                raise Misconfigured(
                    "wal-level",
                    f"wal_level is {row and row[0]}.",
                    "ALTER SYSTEM SET wal_level = 'logical', then restart Postgres.",
                )
            catalog.published_tables(connection, settings.publication)
        with closing(Replication(settings.dsn)) as replication:
            identity = replication.identify()
        return (
            Source(identity.system_id, identity.timeline, identity.database, settings.slot, settings.publication),
            identity.lsn,
        )

    def _free_slot(self, connection: catalog.Connection) -> Slot | None:
        """Return the slot once nobody uses it, None when there is none: a killed predecessor's walsender may linger (S3)."""
        said = False
        while True:
            slot = _slot(connection, self._settings.slot)
            if slot is None or slot.active_pid is None:
                return slot
            if not said:
                self._say(
                    f"slot {self._settings.slot} is in use by process {slot.active_pid} of Postgres: waiting until it is free"
                )
                busy = Transient(
                    "slot-active", f"Another capture reads slot {self._settings.slot}.", "Stop one of the two."
                )
                self._progress.phase("waiting", busy)
                said = True
            if self._stopped():
                raise Stopped
            time.sleep(0.2)

    def _resume(self, writer: CutWriter, source: Source, slot: Slot | None) -> Checkpoint | None:
        """Fence every predecessor, then read the newest checkpoint and hold it against source, slot and log (S3, I12)."""
        writer.open()
        checkpoint = self._log.newest_checkpoint()
        check(checkpoint, source, slot)
        if checkpoint:
            self._log.check_ends(checkpoint)
            for altered in self._log.configure(checkpoint):
                self._say(f"settings have changed: topic {altered}")
        writer.resume(checkpoint)
        return checkpoint

    def _snapshot(
        self, writer: CutWriter, before: Checkpoint | None, source: Source, slot: Slot | None, now: int
    ) -> Checkpoint:
        # The intent goes into the log before the slot is made: a slot of ours without it would not be known as ours.
        version = Version(before.version.epoch, max(now, before.version.lsn)) if before else Version(1, now)
        intent = writer.seal(
            version=version, commit_ts=self._progress.now_ms(), xid=0, source=source, snapshot="running"
        )
        with closing(Replication(self._settings.dsn, "headrace snapshot")) as exporter:
            if slot:
                exporter.drop_slot(self._settings.slot, self._stopped)
            snapshot = Snapshot(self._log, writer, intent, self._progress, self._stopped)
            complete = snapshot.take(exporter)
        self._say(f"snapshot complete at {format_lsn(complete.version.lsn)}")
        return complete

    def _stream(self, writer: CutWriter, checkpoint: Checkpoint, connection: catalog.Connection) -> None:
        self._answered = True
        cut = Cut(writer, self._settings, replace(checkpoint, snapshot=None), self._progress.sealed)
        self._progress.sealed(checkpoint)
        with (
            closing(Replication(self._settings.dsn)) as replication,
            closing(Watch(self._settings, self._progress)),
            self._progress.watching(replication.cut_off),
        ):
            relations = Relations(self._log, cut, connection, self._say)
            replication.start(self._settings.slot, self._settings.publication, checkpoint.version.lsn)
            with closing(Filler(self._log, connection, self._tick(replication))) as filler:
                self._say(f"streaming from {format_lsn(checkpoint.version.lsn)}")
                self._progress.phase("streaming")
                Stream(self._log, cut, replication, relations, filler, self._progress).run(self._stopped)

    def _tick(self, replication: Replication) -> Callable[[], None]:
        def tick() -> None:
            self._progress.beat()
            replication.alive()

        return tick


def check(checkpoint: Checkpoint | None, source: Source, slot: Slot | None) -> None:
    """Refuse to go on where changes may have been lost [I12].

    Raises:
        Misconfigured: `slot-without-checkpoint`, `other-source`, `slot-missing`, `slot-lost`, `slot-beyond-checkpoint`.
    """
    if checkpoint is None:
        if slot is not None:
            raise Misconfigured(
                "slot-without-checkpoint",
                f"Slot {source.slot} exists, but this log has no checkpoint: it may be another log's.",
                "Name another one by HEADRACE_SLOT, or drop it: headrace teardown, then setup and capture.",
            )
        return
    if checkpoint.source != source:
        raise Misconfigured(
            "other-source",
            f"The log is of {_told(checkpoint.source)}; this is {_told(source)}: their positions do not compare.",
            f"Let HEADRACE_DSN, HEADRACE_SLOT and HEADRACE_PUBLICATION name the first, or set HEADRACE_SOURCE for a new log. {_AGAIN}",
        )
    if checkpoint.snapshot != "running":
        _check_slot(checkpoint, source, slot)


def _check_slot(checkpoint: Checkpoint, source: Source, slot: Slot | None) -> None:
    at = format_lsn(checkpoint.version.lsn)
    if slot is None:
        raise Misconfigured(
            "slot-missing",
            f"The log ends at {at}, but there is no slot {source.slot}: what came since is lost.",
            _AGAIN,
        )
    if slot.plugin != "pgoutput" or slot.database != source.database:
        raise Misconfigured("slot-lost", f"Slot {source.slot} is of {slot.plugin} in database {slot.database}.", _AGAIN)
    if slot.lost:
        raise Misconfigured("slot-lost", f"Slot {source.slot} can no longer be read from: {slot.lost}.", _AGAIN)
    if slot.confirmed > checkpoint.version.lsn:
        raise Misconfigured(
            "slot-beyond-checkpoint",
            f"Slot {source.slot} has passed {format_lsn(slot.confirmed)}, the log ends at {at}: the changes between are lost to the log.",
            _AGAIN,
        )


def _told(source: Source) -> str:
    return (
        f"database {source.database}, slot {source.slot}, publication {source.publication}, "
        f"system {source.system_id}, timeline {source.timeline}"
    )


def _slot(connection: catalog.Connection, name: str) -> Slot | None:
    invalidated = "invalidation_reason" if connection.info.server_version >= 170000 else "NULL"
    query = sql.SQL(_SLOT).format(sql.SQL(invalidated))
    with postgres_errors("looking at the slot"):
        row = connection.execute(query, [name]).fetchone()
    return Slot(row[0], row[1], row[2], parse_lsn(row[3]), row[4]) if row else None


_SLOT = """
SELECT plugin, database, active_pid, coalesce(confirmed_flush_lsn, '0/0')::text,
       coalesce({}, CASE WHEN wal_status = 'lost' THEN 'its WAL was removed (max_slot_wal_keep_size)' ELSE '' END)
FROM pg_replication_slots WHERE slot_name = %s AND slot_type = 'logical'
"""
