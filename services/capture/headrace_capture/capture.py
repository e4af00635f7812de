"""Capture's life: one session after another, each from the newest committed checkpoint.

A session is: look at the source, refuse the log of another one, wait until no other capture uses the slot, fence every predecessor in
Kafka, read the newest checkpoint, hold it against the source and the slot [I12], then the snapshot if there is none that is complete, then
the stream (S3). Whatever is transient ends the session; the next one starts from the checkpoint again, which makes every failure the same
failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace

from headrace.change import Checkpoint, Version, format_lsn
from headrace.consumer import no_progress
from headrace.control import Control
from headrace.errors import HeadraceError, Transient
from headrace.log import CutWriter, Log
from headrace.settings import Settings
from headrace_capture import beginnings, catalog, identity, unmarked
from headrace_capture.connection import silent_joins
from headrace_capture.cut import Cut
from headrace_capture.identity import Here, Slot, slot_of
from headrace_capture.jobs import Jobs
from headrace_capture.progress import Progress
from headrace_capture.relations import Relations
from headrace_capture.replication import Replication, Stopped, check, postgres_errors
from headrace_capture.resnapshot import Resnapshot
from headrace_capture.snapshot import Snapshot
from headrace_capture.stream import Stream
from headrace_capture.toast import Filler
from headrace_capture.watch import Watch

_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
_LOCK_SECONDS = 0.2
"""The stream reads no table of the application but for a value that it lacks, and waits for no longer lock than this (see `toast`)."""


class Capture:
    """Captures one source until it is stopped."""

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        stopped: Callable[[], bool],
        log: Log | None = None,
        show: Callable[[int, int], None] = no_progress,
        *,
        chunked: bool = False,
    ) -> None:
        """Connect to nothing yet; `say` tells people what happens, `show` how far long work is, `stopped` is asked often.

        `chunked`: read the initial snapshot in chunks beside the stream, and go on with it after a kill.
        """
        self._settings = settings
        self._log = log or Log(settings)
        self._say = say
        self._stopped = stopped
        self._chunked = chunked
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
        # Views are judged by it (S17), and the more so while nothing beats: before the report of now takes the place of the last one.
        self._progress.fact("heartbeat_ms", self._settings.heartbeat_ms)
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
        with closing(catalog.connect(self._settings.dsn, name="headrace capture", lock_s=_LOCK_SECONDS)) as connection:
            here = self._look(connection)
            self._check_source(here)
            slot = self._free_slot(connection, here.source.database)
            writer = self._log.writer()
            try:
                before, _ = unmarked.newest_committed(self._log, slot.confirmed if slot else 0)
                unmarked.note_tables(self._log, before.ends if before else {}, self._say, self._check_stopped)
                writer.open()  # fences every predecessor: only now is the newest checkpoint the newest (S3)
                here, slot = self._look(connection), slot_of(connection, self._settings.slot)
                if not self._answered and (warning := silent_joins(connection.info.server_version)):
                    self._say(f"warning: {warning}")
                self._answered = True
                unmarked.show_spine(self._log, writer, before, slot.confirmed if slot else 0, self._check_stopped)
                checkpoint = self._resume(writer, here, slot)
                if checkpoint is None or checkpoint.snapshot == "running":
                    self._snapshot(writer, checkpoint, here, slot, connection)
                    # A commit is answered before its markers are written. `open` is answered when readers see it all: begin anew.
                    return
                self._stream(writer, checkpoint, connection)
            finally:
                self._give_up(writer)

    def _give_up(self, writer: CutWriter) -> None:
        """Throw away what is open. What that may take away is noted before, here or by the next session, which looks before it fences."""
        with suppress(HeadraceError):
            if writer.opened_at and writer.broke():
                unmarked.note_tables(self._log, writer.sealed, self._say, lambda: None)
            writer.abort()
        writer.close()

    def _check_source(self, here: Here) -> None:
        """Refuse the log of another source before its own capture is fenced: that would lose its cut each time this one starts."""
        newest = self._log.newest_checkpoint()  # an old one too, for `recover` alone puts another source in its place
        if newest is not None:
            identity.check_source(newest.source, here.source)

    def _look(self, connection: catalog.Connection) -> Here:
        settings = self._settings
        return identity.look(connection, settings.slot, settings.publication, settings.dsn)

    def _free_slot(self, connection: catalog.Connection, database: str) -> Slot | None:
        """Return the slot once nobody uses it, None when there is none: a killed predecessor's walsender may linger (S3).

        One that is not ours is not waited for. Raises Misconfigured: `slot-lost`.
        """
        said = False
        while True:
            slot = slot_of(connection, self._settings.slot)
            if slot is None or slot.active_pid is None:
                if said:
                    self._progress.phase("starting")
                return slot
            identity.check_ours(self._settings.slot, slot, database)
            if not said:
                self._say(
                    f"slot {self._settings.slot} is in use by process {slot.active_pid} of Postgres: waiting until it is free"
                )
                busy = Transient(
                    "slot-active", f"Another capture reads slot {self._settings.slot}.", "Stop one of the two."
                )
                self._progress.phase("waiting", busy)
                said = True
            self._check_stopped()
            time.sleep(0.2)

    def _check_stopped(self) -> None:
        check(self._stopped)

    def _resume(self, writer: CutWriter, here: Here, slot: Slot | None) -> Checkpoint | None:
        """Read the newest checkpoint and hold it against source, slot and log (S3, I12)."""
        checkpoint = self._log.newest_checkpoint()
        remains = {} if checkpoint else self._log.remains(here.tables)
        self._log.check_written_by_us(remains)
        identity.check(checkpoint, here, slot, remains)
        if checkpoint is not None:
            self._log.check_ends(checkpoint)
        for altered in self._log.configure(checkpoint):
            self._say(f"settings have changed: topic {altered}")
        if checkpoint is None:
            writer.resume(None, self._check_stopped)
            return None
        writer.resume(checkpoint, self._check_stopped)
        unmarked.show_tables(self._log, writer, checkpoint, self._say, self._check_stopped)
        if checkpoint.snapshot == "running":
            return checkpoint  # names the server on which that snapshot began
        if checkpoint.source != here.source:
            self._say(
                f"timeline {here.source.timeline} goes on from timeline {checkpoint.source.timeline}: nothing was lost"
            )
        return replace(checkpoint, source=here.source)

    def _snapshot(
        self,
        writer: CutWriter,
        before: Checkpoint | None,
        here: Here,
        slot: Slot | None,
        connection: catalog.Connection,
    ) -> Checkpoint:
        self._progress.unpublished([])  # of a log before this one, perhaps
        # The intent goes into the log before the slot is made: a slot of ours without it would not be known as ours.
        source = here.source
        known = before.version.epoch if before else 0
        # What a snapshot has published that began on a server ahead of this one must be below all that comes (S2).
        new = before is None or source != before.source or here.lsn < before.version.lsn
        version = Version(beginnings.new_epoch(self._log, known) if new else known, here.lsn)
        if before and new:
            self._say(f"epoch {version.epoch} begins: the initial snapshot began on another server, or on newer data")
        with postgres_errors("looking at the captured tables"):
            beginnings.forget(self._log, writer, connection, self._check_stopped, self._say)
        intent = writer.seal(
            version=version, commit_ts=self._progress.now_ms(), xid=0, source=source, snapshot="running"
        )
        with closing(Replication(self._settings.dsn, "headrace snapshot")) as exporter:
            if slot:
                exporter.drop_slot(self._settings.slot, self._stopped)
            if self._chunked:
                begun = source, version.epoch
                return beginnings.begin(
                    self._log, writer, connection, exporter, begun, self._progress, self._stopped, initial=True
                )
            snapshot = Snapshot(self._log, writer, intent, self._progress, self._stopped)
            complete = snapshot.take(exporter)
        self._say(f"snapshot complete at {format_lsn(complete.version.lsn)}")
        return complete

    def _stream(self, writer: CutWriter, checkpoint: Checkpoint, connection: catalog.Connection) -> None:
        loading = "chunked" if checkpoint.snapshot == "chunked" else None
        cut = Cut(writer, self._settings, replace(checkpoint, snapshot=loading), self._progress.sealed)
        self._progress.sealed(checkpoint)
        jobs = Jobs(self._log, self._check_stopped, self._say)  # may take a minute, in which nobody reads a stream
        with (
            closing(Replication(self._settings.dsn)) as replication,
            closing(Watch(self._settings, self._progress)),
            self._progress.watching(replication.cut_off),
        ):
            relations = Relations(self._log, cut, connection, self._say)
            identity.check_same(checkpoint.source, replication.identify())
            replication.start(self._settings.slot, self._settings.publication, checkpoint.version.lsn)
            tick, idle = self._tick(replication), self._check_stopped
            with (
                closing(Filler(self._log, connection, relations.versions, cut.approximate, tick, idle)) as filler,
                closing(
                    Resnapshot(self._log, cut, relations, connection, self._progress, tick, idle, filler, jobs)
                ) as beside,
            ):
                relations.suspected, relations.moved, relations.held = beside.suspect, beside.moved, beside.held
                self._say(f"streaming from {format_lsn(checkpoint.version.lsn)}")
                self._progress.phase("streaming")
                beside.tell()
                Stream(self._log, cut, replication, relations, filler, beside, self._progress).run(self._stopped)

    def _tick(self, replication: Replication) -> Callable[[], None]:
        def tick() -> None:
            self._check_stopped()
            self._progress.beat()
            replication.alive()

        return tick
