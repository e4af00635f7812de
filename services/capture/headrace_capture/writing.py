"""What happens at a high watermark: a chunk is written into the log, and its job goes on (S7, S10).

The stream stands still inside the watermark's little transaction. What the log has up to here is committed, read back (`known`) and held
against the chunk (`rewriting`); the job's record is in the same cuts.

An append-only table is written anew: first all of its rows under new keys (phase `WRITING`), then the deletes of all that gives way to
them (`REMOVING`). The cuts of that are parts of the watermark's transaction, so their checkpoints are `partial` (S5), and the next complete
one shows what was there before or all of the new, never both. After a kill between, Postgres sends the watermark again, for the log has
half of its transaction, and the job's record says what to do. If rows are missing, those that are there are taken back (the copy of the
table is gone with the process) and the table is read once more; if all are there the deletes go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headrace.change import TableSchema, Version
from headrace.errors import Misconfigured, Poison
from headrace.log import Log
from headrace_capture.chunks import Chunk
from headrace_capture.cut import LONGEST_SECONDS, Cut
from headrace_capture.fingerprints import Fingerprint
from headrace_capture.jobs import DONE, FAILED, LEFT, READING, REMOVING, WRITING, Job, Jobs
from headrace_capture.known import KnownKeys
from headrace_capture.progress import Progress
from headrace_capture.relations import Relations, plans_of
from headrace_capture.rewriting import Rewriting
from headrace_capture.tables import Table

_WORTH_PASSING = 1_000
"""So many rows written are worth a commit of their own, for they need not be read back then."""


class Writing:
    """Writes chunks into the cuts of one stream.

    Attributes:
        left_out: Tables that were found to be without a usable key, or not published, with how they looked then.
    """

    def __init__(
        self,
        log: Log,
        cut: Cut,
        relations: Relations,
        jobs: Jobs,
        progress: Progress,
        tick: Callable[[], None],
        idle: Callable[[], None],
    ) -> None:
        """Write into `cut`, and the jobs with it."""
        self._log = log
        self._cut = cut
        self._relations = relations
        self._jobs = jobs
        self._progress = progress
        self._tick, self._idle = tick, idle
        self._known: tuple[str, KnownKeys] | None = None
        self.left_out: dict[str, Fingerprint | None] = {}

    def known_of(self, table: str) -> KnownKeys:
        """Return the newest records of a table, as far as they have been read."""
        if self._known is None or self._known[0] != table:
            self.forget_known()
            self._known = (table, KnownKeys(self._log, table))
        return self._known[1]

    def forget_known(self) -> None:
        """Remove the file behind `known_of`."""
        if self._known is not None:
            self._known[1].close()
            self._known = None

    def write(self, job: Job, chunk: Chunk, marks: tuple[int, int], seal: Callable[[], None]) -> None:
        """Write a chunk and note how far its job is.

        Args:
            job: The job.
            chunk: What was read.
            marks: Commit LSNs of the low and the high watermark.
            seal: Commits what came before the high watermark.

        Raises:
            Misconfigured: `key-changed`, `key-missing`, `row-too-large`, `bad-key`, `spool-full`; Poison: `bad-value`. The table is as
                it was, or as far as it was.
        """
        table = self._table(job, chunk)
        if table is None:
            return
        low, high = marks
        if table.key_at:
            # Of a table that is gone, every key is, whenever its record came.
            self._write_rows(job, chunk, self._rewriting(table, low if chunk.table else high, seal), seal)
        else:
            self._write_anew(job, chunk, table, high, seal)

    def mend(self, high: int, seal: Callable[[], None]) -> bool:
        """Finish what a kill left half done at the high watermark committed at `high`; return whether there was anything."""
        begun = [job for job in self._jobs.all.values() if job.phase in {WRITING, REMOVING} and job.first == high]
        for job in begun:
            rewriting = self._rewriting(self._made(self._relations.shapes[job.table], None), high, seal)
            if job.phase == REMOVING:
                job.removed = rewriting.vanished(high, job.seen)
                self._finish(job)
            else:
                rewriting.undo()
                job.begin_again()
                self._jobs.put(job)
        return bool(begun)

    def _write_rows(self, job: Job, chunk: Chunk, rewriting: Rewriting, seal: Callable[[], None]) -> None:
        if not job.first:
            job.first, job.seen = rewriting.version.lsn, chunk.snapshot
        written = rewriting.rows(chunk)
        job.rows += len(chunk.rows)
        job.phase, job.reason = READING, ""
        self._advance(job, chunk, rewriting)
        self._jobs.put(job)
        if chunk.last or job.key is not None:
            self._finish(job)
        elif written >= _WORTH_PASSING:
            self._jobs.write(self._cut.writer)
            seal()
            rewriting.known.pass_over(self._cut.sealed.ends[rewriting.table.topic])

    @staticmethod
    def _advance(job: Job, chunk: Chunk, rewriting: Rewriting) -> None:
        """Note how far the job is; at its end write the deletes of what is gone."""
        table = rewriting.table
        if job.key is not None:
            job.removed = 0 if chunk.rows else rewriting.absent(_key(table, chunk), chunk)
        elif chunk.last:
            gone = chunk.table is None  # rows of which the first chunk knew nothing are dead then too
            first, seen = (rewriting.version.lsn, chunk.snapshot) if gone else (job.first, job.seen)
            job.removed = rewriting.vanished(first, seen)
        else:
            job.after = [chunk.rows[-1][at].decode() for at in table.key_at]

    def _write_anew(self, job: Job, chunk: Chunk, table: Table, high: int, seal: Callable[[], None]) -> None:
        """Write an append-only table anew; one that is gone has no rows."""
        rows = chunk.spool or ()
        job.first, job.seen, job.rows, job.reason = high, chunk.snapshot, len(rows), ""
        rewriting = self._rewriting(table, high, seal)
        self._enter(job, WRITING)
        try:
            rewriting.anew(rows)
        except (Poison, Misconfigured):
            self._rewriting(table, high, seal).undo()
            job.begin_again()
            raise
        self._enter(job, REMOVING)
        job.removed = rewriting.vanished(high, job.seen)
        self._finish(job)

    def _enter(self, job: Job, phase: str) -> None:
        """Write down a phase in the cut whose rows it speaks of."""
        job.phase = phase
        self._jobs.put(job)
        self._jobs.write(self._cut.writer)

    def _rewriting(self, table: Table, lsn: int, seal: Callable[[], None]) -> Rewriting:
        """Commit what came before, learn what the log has by then, and return what writes with the commit LSN `lsn`."""

        def breathe() -> None:
            self._tick()
            if self._cut.full or self._cut.age >= LONGEST_SECONDS:
                seal()

        seal()
        known = self.known_of(table.name)
        known.catch_up(self._cut.sealed.ends.get(table.topic, []), self._tick, self._idle)
        version = Version(self._cut.epoch, lsn)
        return Rewriting(self._cut.writer, known, table, version, self._progress.now_ms(), breathe, seal, self._tick)

    def _table(self, job: Job, chunk: Chunk) -> Table | None:
        """Return the table in the shape of the chunk, published if it is a new one; None when there is nothing to do."""
        if chunk.table is not None:
            if job.table not in self._relations.shapes:
                self._cut.inexact.add(job.table)
            return self._made(self._relations.settle(chunk.table.shape(1)), chunk)
        shape_then: TableSchema | None = self._relations.shapes.get(job.table)
        if shape_then is not None and shape_then.key and chunk.print is not None:
            self._cut.inexact.add(job.table)
            job.initial = False  # the others' snapshot is complete without it
            job.floor = ""  # what is there was read before
            raise _key_missing(job.table, shape_then, chunk.hidden)
        if shape_then is None or chunk.exists:
            self.left_out[job.table] = chunk.print
            why = chunk.hidden[0] if chunk.hidden else "it is not published, or has no usable key"
            self._progress.say(f"warning: {job.table} is left out: {why}")
            self._cut.inexact.discard(job.table)
            if shape_then is None or job.request or job.key is not None or job.table in self._jobs.prints:
                self._jobs.drop(job.name)
            else:  # it has left, and nobody has asked for it since
                self._jobs.put(Job(job.table, why=job.why, phase=LEFT))
            return None
        if job.key is not None:
            said = f"{job.table} is gone: no row of it can be read."
            raise Misconfigured("bad-key", said, f"All of its keys are removed by: headrace resnapshot {job.table}")
        return self._made(shape_then, None)

    def _made(self, shape: TableSchema, chunk: Chunk | None) -> Table:
        about = (self._log.settings.source, self._cut.source.database)
        plans = plans_of(shape, chunk.table if chunk else None)
        return Table(shape, self._log.topic_of(shape.table), plans, about)

    def _finish(self, job: Job) -> None:
        self.forget_known()
        self._progress.say(f"{job.name} was read again: {job.rows} rows, {job.removed} keys removed")
        known = self._jobs.prints.get(job.table)
        if job.key is not None:
            self._finish_key(job)
        elif known is not None and known.unlogged:
            self._stay_inexact(job, known.unlogged)
        else:
            job.phase = DONE
            self._cut.inexact.discard(job.table)
            self._jobs.put(job)

    def _finish_key(self, job: Job) -> None:
        self._jobs.drop(job.name)
        if not (job.rows or job.removed):
            job.phase, job.reason = DONE, _nowhere(job.table)
            self._jobs.put(job)  # it is the newest now
            self._jobs.forget_keys()
            self._progress.say(f"note: {job.name}: {job.reason}")

    def _stay_inexact(self, job: Job, mends: Sequence[str]) -> None:
        """Let a table rest whose partitions' changes are not all in the WAL; when these statements were run, its fingerprint is another."""
        job.phase, job.initial = FAILED, False  # the others' snapshot is complete without it
        job.reason = f"Changes of an unlogged or foreign partition are not in the WAL. It is read again by itself after: {'; '.join(mends)}"
        self._cut.inexact.add(job.table)
        self._jobs.put(job)
        self._progress.say(f"warning: {job.table} stays inexact (rule S12). {job.reason}")


def _key_missing(table: str, shape: TableSchema, hidden: tuple[str, str] | None) -> Misconfigured:
    if hidden:
        why, mend = hidden
        return Misconfigured("key-missing", f"{table} comes without its key: {why}. Its changes are passed over.", mend)
    said = f"{table} has no primary key any more, or a deferrable one, which is none (rule S9): its changes are passed over."
    mend = f"Give it the primary key ({', '.join(shape.key)}) again, in place of a deferrable one: all of it is read again by itself then."
    return Misconfigured("key-missing", said, mend)


def _nowhere(table: str) -> str:
    said = "Postgres has no row of this key, and the log none that is alive, written so, and older than that look: nothing was removed."
    return f"{said} One written otherwise (1.0, not 1.00) is removed by: headrace resnapshot {table}"


def _key(table: Table, chunk: Chunk) -> bytes:
    """Return the key that was looked for, as the log writes it."""
    row: list[Any] = [None] * len(table.columns)
    for at, value in zip(table.key_at, chunk.wanted or [], strict=True):
        row[at] = value
    return table.key(row)
