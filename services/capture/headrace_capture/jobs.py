"""What is to be read again, and how far that is: one record for each table or key, in the log.

The records stand in `headrace.control` (kind ``resnapshot``) and are written inside the cut whose rows they speak of, so that they are
exactly as durable as those: whoever takes over after a kill goes on where the log ends. Beside them are the fingerprints of the tables
(kind ``catalogue``), by which DDL is noticed that happened while nobody ran, and the tables of which Kafka may have lost rows
(``doubted``). All name the log they belong to, by the id of its checkpoints topic: control is shared, and may remember a log that was
deleted.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from headrace import codec
from headrace.control import Control, record_key
from headrace.errors import Transient
from headrace.log import CutWriter, Log
from headrace.log.topics import CONTROL, checkpoints_topic
from headrace_capture.fingerprints import UNSEEN, Fingerprint
from headrace_capture.progress import NAME

JOB, CATALOGUE, DOUBTED = "resnapshot", "catalogue", "doubted"
WAITING, READING, PAUSED, FAILED, CANCELLED, DONE = "waiting", "reading", "paused", "failed", "cancelled", "done"
WRITING, REMOVING = "writing", "removing"
"""An append-only table, half of which is in the log: only within a high watermark's transaction (see `writing`)."""
LEFT = "left"
"""It was published and is not any more; its rows are still there. Whoever asks for it ends that."""
JOINED = "joined"
"""A floor still to be taken: everything that runs when the table is first read must be over by then."""
_TELL_SECONDS = 5.0

_MOST_DONE = 100
"""So many keys that were found nowhere are remembered."""


@dataclass(slots=True)
class Job:
    """One table, or one key of it, to be read again.

    Attributes:
        table: ``schema.table``.
        key: Texts of the key's columns, by name; None for the whole table.
        why: For people: who asked, or what happened.
        request: The id of the request that asked for it.
        floor: A snapshot; what is read must see all that it sees (`JOINED`, empty for no such need).
        initial: Whether it is a part of the initial snapshot.
        phase: WAITING, READING, PAUSED, FAILED, CANCELLED, DONE or LEFT; for a moment WRITING or REMOVING.
        reason: Why it failed, or what it waits for; of a key that is done, that it was found nowhere.
        first: Commit LSN of the first low watermark of this pass, 0 before; of an append-only table, of the high one.
        seen: The snapshot of the first chunk of this pass.
        after: The key up to which it has been read, as texts.
        rows, removed: Rows written, and keys tombstoned, in this pass.
    """

    table: str
    key: dict[str, str] | None = None
    why: str = "asked for"
    request: str = ""
    floor: str = ""
    initial: bool = False
    phase: str = WAITING
    reason: str = ""
    first: int = 0
    seen: str = ""
    after: list[str] = field(default_factory=list)
    rows: int = 0
    removed: int = 0

    @property
    def name(self) -> str:
        """Return what names it among all."""
        return self.table if self.key is None else f"{self.table} {codec.dumps(self.key).decode()}"

    @property
    def open(self) -> bool:
        """Whether there is something to do, now or after a resume."""
        return self.phase in {WAITING, READING, PAUSED, WRITING, REMOVING}

    def begin_again(self) -> None:
        """Forget how far it is."""
        self.phase = PAUSED if self.phase == PAUSED else WAITING
        self.first, self.seen, self.after, self.rows, self.removed, self.reason = 0, "", [], 0, 0, ""

    def awaits(self, why: str) -> bool:
        """Whether nothing was read yet of what is to be read again for this reason."""
        return self.phase in {WAITING, PAUSED} and not self.first and self.why == why

    def told(self) -> str:
        """Return one line for people."""
        told = {"phase": self.phase, "rows": f"{self.rows} rows read", "why": self.why, "reason": self.reason}
        removed = [f"{self.removed} removed"] if self.removed else []
        return ", ".join([told["phase"], told["rows"], *removed, *filter(None, [told["why"], told["reason"]])])

    def missed(self) -> str:
        """Return what people are told where it could not be read for the first time."""
        lacks = "the initial snapshot is not complete without it" if self.initial else "the log does not have all of it"
        mend = f"When that is mended: headrace resnapshot {shlex.quote(self.table)}"
        return f"{self.table} could not be read, and {lacks}: {self.reason} {mend}"


def doubt(log: Log, table: str) -> None:
    """Note, at once and in no cut, that rows of a table may be gone from the log: capture reads it again when it goes on."""
    Control(log).keep(NAME, DOUBTED, {"log": _log_id(log)}, table)


def _telling(wait: Callable[[], None], say: Callable[[str], None]) -> Callable[[], None]:
    """Return `wait`, which says once for what, when that takes long."""
    until = time.monotonic() + _TELL_SECONDS

    def waiting() -> None:
        nonlocal until
        if time.monotonic() > until:
            until = float("inf")
            say(f"waiting for {CONTROL}: it shows nothing behind a cut that is open, which Kafka ends after a minute")
        wait()

    return waiting


def _log_id(log: Log) -> str:
    spine = checkpoints_topic(log.settings.source)
    return log.topics.describe([spine])[spine][0]


class Jobs:
    """The jobs and fingerprints of a log: read once, then written with the cuts."""

    def __init__(
        self, log: Log, wait: Callable[[], None] | None = None, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """Read what the log has; capture, with every predecessor fenced by now, waits until all of it is shown (see `Control.kept`).

        Raises:
            Transient: `marker-missing`, where that does not come; `kafka-away`.
        """
        self._source = log.settings.source
        self._log_id = _log_id(log)
        waiting = _telling(wait, say) if wait else None
        try:
            kept = Control(log).kept(NAME, JOB, CATALOGUE, DOUBTED, wait=waiting)
        except Transient as error:
            if wait is None or not log.topics.unshown(log.topics.ends({CONTROL: 1}, committed=False)):
                raise
            raise Transient(
                "marker-missing",
                f"{CONTROL} does not show what it has: a transaction of another source's capture is open there, and nobody ends it.",
                "Start that capture, whose next cut ends it; where it runs no more, see marker-missing in the runbook.",
            ) from error
        jobs, prints, doubted = map(self._ours, kept)
        found = (Job(**codec.fields_of(Job, said)) for said in jobs.values())
        self.all: dict[str, Job] = {job.name: job for job in found}
        self.prints: dict[str, Fingerprint] = {table: Fingerprint.of(said) for table, said in prints.items()}
        self.doubted = set(doubted)
        self._dirty: set[str] = set()
        self._believed: set[str] = set()
        self._dirty_prints: set[str] = set()

    def _ours(self, kept: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            id_: {name: value for name, value in said.items() if name != "log"}
            for id_, said in kept.items()
            if said["log"] == self._log_id
        }

    @property
    def dirty(self) -> bool:
        """Whether anything is to be written."""
        return bool(self._dirty or self._dirty_prints or self._believed)

    def next(self) -> Job | None:
        """Return the job to go on with: what is being read before what waits, and last what could not go on just now, in turn."""
        ready = [job for job in self.all.values() if job.phase in {READING, WAITING}]
        return min(ready, key=lambda job: (bool(job.reason), not job.reason and job.phase != READING), default=None)

    def put(self, job: Job) -> None:
        """Add or change a job."""
        self.all[job.name] = job
        self._dirty.add(job.name)

    def wait(self, job: Job, reason: str) -> None:
        """Let a job wait, behind all others; one that is no longer wanted is let alone."""
        if self.all.get(job.name) is not job:
            return
        self.all[job.name] = self.all.pop(job.name)
        if job.reason != reason:
            job.reason = reason
            self.put(job)

    def drop(self, name: str) -> None:
        """Forget a job."""
        if self.all.pop(name, None):
            self._dirty.add(name)

    def drop_resting(self, known: Container[str]) -> None:
        """Forget what failed, or is paused, of tables that nobody wants any more: not published, nothing of them in the log."""
        for job in list(self.all.values()):
            if job.phase in {FAILED, PAUSED} and not job.initial and job.table not in known:
                self.drop(job.name)

    def forget_keys(self) -> None:
        """Forget keys that were found nowhere, but for the last ones: whoever asked for them is told."""
        done = [job.name for job in self.all.values() if job.key is not None and job.phase == DONE]
        for name in done[:-_MOST_DONE]:
            self.drop(name)

    def believe(self, table: str) -> None:
        """Forget that a table was doubted (`doubt`)."""
        self.doubted.discard(table)
        self._believed.add(table)

    def know(self, table: str, print_: Fingerprint) -> None:
        """Take a table's fingerprint for what it should be from now on."""
        if self.prints.get(table) != print_:
            self.prints[table] = print_
            self._dirty_prints.add(table)

    def hold(self, table: str, oid: int) -> bool:
        """Take note of what holds rows that come by this name; return whether it was not among what is known.

        A partition may be gone when the catalogue is read next, or a table that had the name, and was not there before: nothing else tells.
        """
        known = self.prints.get(table)
        if known is None or oid in dict(known.leaves):
            return False
        self.know(table, replace(known, leaves=(*known.leaves, (oid, UNSEEN))))
        return True

    def know_only(self, tables: Container[str]) -> None:
        """Forget the fingerprints of all other tables."""
        for table in [table for table in self.prints if table not in tables]:
            del self.prints[table]
            self._dirty_prints.add(table)

    def clear(self, tables: Iterable[str] = ()) -> None:
        """Forget all jobs, and the fingerprints of `tables`."""
        for name in list(self.all):
            self.drop(name)
        for table in list(self.doubted):
            self.believe(table)
        for table in tables:
            if self.prints.pop(table, None):
                self._dirty_prints.add(table)

    def write(self, writer: CutWriter) -> None:
        """Append what has changed to the open cut."""
        for name in self._dirty:
            job = self.all.get(name)
            self._write(writer, JOB, name, asdict(job) if job else None)
        for table in self._dirty_prints:
            print_ = self.prints.get(table)
            self._write(writer, CATALOGUE, table, print_.plain() if print_ else None)
        for table in self._believed:
            self._write(writer, DOUBTED, table, None)
        self._dirty.clear()
        self._dirty_prints.clear()
        self._believed.clear()

    def _write(self, writer: CutWriter, kind: str, id_: str, said: dict[str, Any] | None) -> None:
        value = codec.dumps(said | {"log": self._log_id}) if said is not None else None
        writer.also(CONTROL, record_key(self._source, NAME, kind, id_), value)
