"""Resnapshot: tables, or single rows, read again while the stream runs (I4, S7, S12).

Strategy. There are jobs (`jobs`): somebody asked for them, or the catalogue or a Relation message showed that rows may have changed without
an event; a table that joins the publication and a big initial snapshot are the same thing. One chunk at a time is read beside the
stream (`chunks`); its watermarks come back in the stream. When the high one comes, the stream stands still for a moment *inside* that
little transaction, and the chunk is written, with the job's record, in the same cut (`writing`). That transaction's end is then the next
complete checkpoint. A kill anywhere loses at most the chunk at hand. An append-only table is one chunk (S10).

The loop calls `look` between transactions, and `heard` for each logical message. Nothing here waits for Postgres, except for the
answer to a watermark that the stream has shown already.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import TimeoutError as NotYet
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial

from headrace.change import TableSchema
from headrace.control import Control
from headrace.errors import HeadraceError, Misconfigured, Poison
from headrace.log import Log
from headrace_capture import catalog, fingerprints, watermarks
from headrace_capture.asked import Asked
from headrace_capture.attention import CatalogueWatch, Findings, Requests
from headrace_capture.chunks import Ask, Chunk, ChunkReader, Reading
from headrace_capture.cut import Cut
from headrace_capture.fingerprints import Fingerprint
from headrace_capture.jobs import DONE, FAILED, JOINED, LEFT, PAUSED, READING, REMOVING, WAITING, WRITING, Job, Jobs
from headrace_capture.pgoutput import Message
from headrace_capture.progress import Progress
from headrace_capture.relations import Relations
from headrace_capture.replication import postgres_errors
from headrace_capture.telling import tell
from headrace_capture.toast import Filler
from headrace_capture.writing import Writing

_AGAIN_SECONDS = 0.5


class Resnapshot:
    """Carries out the jobs of one stream."""

    def __init__(
        self,
        log: Log,
        cut: Cut,
        relations: Relations,
        connection: catalog.Connection,
        progress: Progress,
        tick: Callable[[], None],
        idle: Callable[[], None],
        filler: Filler,
        jobs: Jobs,
    ) -> None:
        """Go on with `jobs`, as the log has them; `filler` must forget values that can no longer be believed."""
        self._log = log
        self._cut = cut
        self._relations = relations
        self._connection = connection
        self._progress = progress
        self._tick = tick
        self._forget, filler.doubted = filler.memory.forget_named, self._doubted
        self._jobs = jobs
        control = Control(log)
        self._requests = Requests(control)
        self._asked = Asked(control, self._jobs, relations, cut, self._disturb)
        tell_how = partial(progress.fact, "catalogue")
        self._catalogue = CatalogueWatch(log.settings, self._leaves, cut.writer.check_topics, tell_how)
        self._reader = ChunkReader(log.settings)
        self._reading: Reading | None = None
        self._writing = Writing(log, cut, relations, self._jobs, progress, tick, idle)
        self._names: Findings | None = None
        self._printed_at: dict[str, float] = {}
        self._not_before = 0.0
        self._read_doubted()  # before a cut is sealed that would call them exact

    def close(self) -> None:
        """End everything that runs beside the stream."""
        self._requests.close()
        self._catalogue.close()
        self._reader.close()
        self._writing.forget_known()

    # Between transactions

    def look(self) -> None:
        """Take in what was asked for and what the catalogue says, and go on with the next chunk. Cheap when there is nothing."""
        self._relations.tell_parts()
        self._asked.answer()
        for request in self._requests.take():
            self._asked.take(request)
        findings = self._catalogue.take()
        if findings is not None:
            self._judge(findings)
            self._complete()
            self._names = self._names or findings  # what waits for the stream stays, or it would wait for ever
        self._rename()
        for table in list(self._cut.inexact):
            job = self._jobs.all.get(table)
            if job is None or job.phase == DONE:
                self.mark(table, "its checkpoints say so", JOINED)
        self._read_doubted()
        self._go_on()
        self.note()

    def note(self) -> None:
        """Write down what has become of the jobs: in each cut, as one that names a table as inexact must not go without its job."""
        self._relations.tell_parts()
        if self._jobs.dirty:
            self._jobs.write(self._cut.writer)
            self.tell()

    def _read_doubted(self) -> None:
        for table in list(self._jobs.doubted):
            phase = self._jobs.all[table].phase if table in self._jobs.all else DONE
            if phase not in {WRITING, REMOVING}:  # half of it is in the log: that is mended first
                self._jobs.believe(table)
                if phase != LEFT:
                    self.mark(table, "Kafka did not show its newest rows", JOINED)

    def mark(self, table: str, why: str, floor: str = "") -> None:
        """Rows of `table` may have changed, or have been there, without an event: read it again (S12)."""
        self._cut.inexact.add(table)
        self._forget(table)
        self._disturb(table)
        job = self._jobs.all.get(table)
        if job is None or job.phase == DONE:
            job = Job(table)
        job.why, job.floor = why, floor or job.floor
        job.begin_again()
        self._jobs.put(job)
        self._progress.say(f"warning: {table} is inexact: {why} (rule S12); it is read again beside the stream")

    def left_out(self, table: str, why: str) -> None:
        """A change could not be written: read its table again, which is written down and said once until something of it was read."""
        job = self._jobs.all.get(table)
        if job is None or table not in self._cut.inexact or not job.awaits(why):
            self.mark(table, why)
        else:
            self._disturb(table)

    def suspect(self, shape: TableSchema, why: str | None) -> None:
        """The stream shows a table in another shape (`why` that may have changed rows, or empty), or for the first time (None)."""
        # The catalogue is asked at each new shape: what is looked at later must not take a column that is new for one that came back.
        table = shape.table
        if why is None:
            self.mark(table, "it joined the publication", JOINED)
            return
        known = self._jobs.prints.get(table)
        if known is not None:
            with postgres_errors(f"reading the catalogue of {table}"):
                prints = fingerprints.read(self._connection, self._log.settings.publication, table=table)
                found = prints.get(table, known)
            # Whether a new one has rows is asked beside the stream: it may be locked.
            if found.kind == known.kind == "p":
                found = replace(found, leaves=known.leaves)
            if not self._compare(table, known, found) and (passed := fingerprints.taken_back(shape, found)):
                self.mark(table, passed)
            self._printed_at[table] = time.monotonic()
        elif why:
            self.mark(table, why)

    def moved(self, table: str, oids: frozenset[int], was: str) -> None:
        """The stream sends the rows of these tables under this name: what is known of them under another one is of before a rename.

        Changes have gone by the other name since. If it is there again when the catalogue is read next, it is read again (`_came`). So it
        is if it is known to be there again: rows went by it (`was`) until now, as those of the table that has taken it.
        """
        known = self._jobs.prints
        gone = {name for name in known if name != table and any(oid in oids for oid, _ in known[name].leaves)}
        if gone:
            self._left(gone)
            self._jobs.know_only(known.keys() - gone)
            self._printed_at.update(dict.fromkeys(gone, time.monotonic()))
        if was != table and was in known:
            self.mark(was, f"rows of {table} went by its name", JOINED)

    def held(self, table: str, oid: int) -> None:
        """The stream has rows of a partition, or another table, by this name (see `Jobs.hold`). By a name of its own that lacks them."""
        if self._jobs.hold(table, oid):
            self.moved(table, frozenset({oid}), "")
            self._printed_at[table] = time.monotonic()

    def _rename(self) -> None:
        """Let rows go by their table's name of now, once the stream is where it has that name, and read again what went by another."""
        found = self._names
        if found is None or self._cut.whole.lsn < found.lsn:
            return
        self._names = None
        for oid, name in found.roots.items():
            if self._relations.rename(oid, name, found.lsn):
                self.mark(name, "it was renamed", JOINED)

    def _compare(self, table: str, known: Fingerprint, found: Fingerprint) -> bool:
        """Take a newer fingerprint of a table; return whether it must be read again because of what has changed since `known`."""
        why = fingerprints.silent(known, found, self._relations.names[table])
        if why:
            self.mark(table, why, JOINED if fingerprints.outlived(known, found) else "")
        self._jobs.know(table, found)
        return bool(why)

    def _doubted(self, table: str) -> bool:
        """Whether the log may not have what Postgres has of this table."""
        return table in self._cut.inexact or any(job.table == table and job.open for job in self._jobs.all.values())

    def _disturb(self, table: str) -> None:
        """What is being read of this table is no longer wanted."""
        if self._reading and self._reading.job.table == table:
            self._reading.stale = True

    def _judge(self, findings: Findings) -> None:
        self._progress.failing(findings.failing)
        newer = {table for table, at in self._printed_at.items() if findings.asked < at}
        for table, print_ in findings.prints.items():
            if table in newer:
                continue  # more is known of it by now
            known = self._jobs.prints.get(table)
            if table not in self._relations.shapes:
                if self._writing.left_out.get(table) != print_ and table not in self._jobs.all:
                    self._jobs.put(Job(table, why="it joined the publication", floor=JOINED))
            elif known is not None:
                self._compare(table, known, print_)
            elif not self._joining(table):
                self._came(table, print_)
        there = findings.prints.keys() | newer
        self._left(self._jobs.prints.keys() - there)
        self._jobs.know_only(there)
        self._jobs.drop_resting(there | self._relations.shapes.keys())
        # Of one that was being read then the job is not LEFT: it goes on, it is paused, or it failed.
        resting = {LEFT, PAUSED, FAILED}
        whole = {job.table for job in self._jobs.all.values() if job.key is None and job.phase in resting}
        self._progress.unpublished(sorted(whole & self._relations.shapes.keys() - there))

    def _left(self, tables: set[str]) -> None:
        """Note that tables are not published any more, though the log has their rows: it goes on without them."""
        for table in tables & self._relations.shapes.keys():
            job = self._jobs.all.get(table)
            if job is not None and job.open:
                job.request = ""  # who asked for it did not know
            else:
                job = Job(table, why="it is not published any more", phase=LEFT)
            self._jobs.put(job)

    def _joining(self, table: str) -> bool:
        """Whether the next chunk takes the table for one that has just joined, and learns its fingerprint."""
        job = self._jobs.all.get(table)
        return job is not None and job.floor == JOINED

    def _came(self, table: str, print_: Fingerprint) -> None:
        """A table that the log has is published, and was not when the catalogue was read before: changes may be missing [I4]."""
        self.mark(table, "it joined the publication", JOINED)
        self._jobs.know(table, print_)

    def _leaves(self) -> frozenset[int]:
        return frozenset(oid for print_ in list(self._jobs.prints.values()) for oid, _ in print_.leaves)

    def _go_on(self) -> None:
        """Begin to read the next chunk, if none is being read."""
        reading = self._reading
        if reading is not None:
            if reading.future.done() and reading.future.exception() is not None:
                self._failed(reading)
            return
        if time.monotonic() < self._not_before:
            return
        job = self._jobs.next()
        if job is None:
            self._writing.forget_known()
            return
        mark, shape = uuid.uuid4().hex, self._relations.shapes.get(job.table)
        appended = shape is not None and not shape.key
        most = self._log.settings.cut_records
        ask = Ask(mark, job.table, job.after, job.key, most, self._leaves(), job.floor, appended, bool(job.reason))
        ends = self._cut.sealed.ends.get(self._log.topic_of(job.table), [])
        # Asked for when it is needed: what another table has on disk is not given up for one that must wait.
        future = self._reader.begin(ask, lambda check: self._writing.known_of(job.table).catch_up(ends, check, check))
        self._reading = Reading(job, mark, future, self._jobs.prints.get(job.table))

    def _failed(self, reading: Reading) -> None:
        """A chunk could not be read: try again later, or let the job rest with the reason."""
        self._reading = None
        error = reading.future.exception()
        self._not_before = time.monotonic() + _AGAIN_SECONDS
        if isinstance(error, Misconfigured):
            self._writing.forget_known()  # where its disk is full it has a half of what was read
        if isinstance(error, Misconfigured) and not reading.stale:  # it may have asked for a shape of before
            self._fail(reading.job, error)
        elif isinstance(error, HeadraceError):
            self._wait(reading.job, error.message)
        elif error is not None:
            raise error

    def _fail(self, job: Job, error: HeadraceError) -> None:
        job.phase, job.reason = FAILED, f"{error.message} {error.remedy}".strip()
        self._jobs.put(job)
        then = f"When that is mended: headrace resnapshot {job.table}"
        self._progress.say(f"warning: {job.name} cannot be read again: {error}. {then}")

    def _wait(self, job: Job, reason: str) -> None:
        self._not_before = time.monotonic() + _AGAIN_SECONDS
        self._jobs.wait(job, reason)

    # Within the stream

    def heard(self, message: Message, lsn: int, seal: Callable[[], None]) -> None:
        """A logical message has come, in the transaction committed at `lsn`; `seal` commits what came before it."""
        which, mark = watermarks.mark_of(message)
        if which == watermarks.HIGH and self._writing.mend(lsn, seal):
            self._written()
        reading = self._reading
        if reading is None or not mark or mark != reading.mark:
            return
        if which == watermarks.LOW:
            reading.low = lsn
            self._forget(reading.job.table)
        elif which == watermarks.HIGH and reading.low:
            self._take(reading, lsn, seal)

    def _take(self, reading: Reading, high: int, seal: Callable[[], None]) -> None:
        while not reading.future.done():
            self._tick()
            with suppress(NotYet, HeadraceError):
                reading.future.result(0.2)
        if reading.future.exception() is not None:
            self._failed(reading)
            return
        self._reading = None
        with closing(reading.future.result()) as chunk:
            job = reading.job
            if reading.stale or job.phase not in {WAITING, READING} or not self._usable(reading, chunk):
                return
            try:
                self._writing.write(job, chunk, (reading.low, high), seal)
            except (Poison, Misconfigured) as error:
                self._writing.forget_known()
                if job.phase in {WRITING, REMOVING} or error.code == "partitions-changed":
                    raise  # half of it is in the log: who starts capture again mends that; or the log itself is wrong
                self._fail(job, error)
        self._written()
        self._go_on()

    def _written(self) -> None:
        """Write down what has become of the jobs in the cut that has their rows."""
        self._complete()
        self._jobs.write(self._cut.writer)
        self.tell()

    def _complete(self) -> None:
        """Note that the initial snapshot is complete, once its last table was read, or is not published any more."""
        if self._cut.snapshot and not any(other.initial and other.phase != DONE for other in self._jobs.all.values()):
            self._cut.snapshot = None
            self._progress.phase("streaming")
            self._progress.say("the initial snapshot is complete")

    def _usable(self, reading: Reading, chunk: Chunk) -> bool:
        """Whether the chunk sees what it must, and is of the table that the chunks before it were of."""
        job = reading.job
        joining, job.floor = job.floor == JOINED, chunk.floor
        if job.key is None and chunk.print is not None and not self._same(reading, chunk.print, joining=joining):
            return False
        if not chunk.covered:
            if not (chunk.floor and watermarks.covers(chunk.snapshot, chunk.floor)):  # else it goes on at once
                self._wait(job, "waits for transactions that began before it")
        elif not chunk.exists and job.key is None:  # its rows go now: nothing is left of it
            self._printed_at[job.table] = time.monotonic()
            self._jobs.know_only(self._jobs.prints.keys() - {job.table})
        return chunk.covered

    def _same(self, reading: Reading, print_: Fingerprint, *, joining: bool) -> bool:
        """Take the fingerprint that came with a chunk; return whether the job can go on with it."""
        table, before = reading.job.table, reading.known
        known, names = self._jobs.prints.get(table), self._relations.names[table]
        self._printed_at[table] = time.monotonic()
        if known and not joining:  # what changed after the low watermark counts as newer than what is read
            return fingerprints.overtaken(before, print_, known, names) or not self._compare(table, known, print_)
        if not joining:
            self._came(table, print_)
        elif known and fingerprints.silent(known, print_, names):
            self._cut.inexact.add(table)
        self._jobs.know(table, print_)
        return joining

    def tell(self) -> None:
        """Report what is to be read again, and what the log lacks."""
        tell(self._jobs.all.values(), self._relations.shapes, self._progress, initial=bool(self._cut.snapshot))
