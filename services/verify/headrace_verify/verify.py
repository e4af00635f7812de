"""Verify: every row of a view against Postgres, exact while both go on (S27).

1. Open a snapshot of Postgres; then take the LSN X. Write down all that each view should hold.
2. Wait until the view shows X; scan it; whatever is not as written down is a difference.
3. Read the log from before the snapshot. A difference is excused only by a change of its key (of a document: of any of its
   rows) that the snapshot does not see or that is beyond X. What nothing excuses is wrong, and is reported.
4. What is excused is compared again, a few keys at a time with a snapshot of their own, until it is decided or the time is up.
5. Tables without a key are compared as multisets, without the rows that the snapshot cannot have (`multiset`).

Step 3 reads first what was logged since the checkpoint before the snapshot. A transaction that was open at the snapshot may
have its commit before that (WAL order is not visibility order, S7), and a snapshot does not list all of these: one that is
younger than every finished transaction is only beyond its xmax. So what still nothing excuses is looked up in all of the log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import psycopg

from headrace.change import Checkpoint, Version, format_lsn
from headrace.consumer import Consumer, ViewRow
from headrace.control import Control, Report
from headrace.errors import Misconfigured, Transient
from headrace.fingerprint import fingerprint
from headrace.log import Log
from headrace_verify.compare import differing
from headrace_verify.expected import Expectation, Made, Shapes, expectation
from headrace_verify.ledger import DIFFERENT, EXTRA, Difference, Ledger
from headrace_verify.multiset import Multiset
from headrace_verify.postgres import Connection, Moment, connect, moment, published

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``; total 0 when unknown."""

_WRITE = 1000
_KEYS = 50
_POLL_SECONDS = 0.1


@dataclass(slots=True)
class Outcome:
    """What was found in one view. `close` removes the file behind it.

    Attributes:
        generation: The one that was compared.
        lsn: Every view was compared at this LSN or later.
        rows: How many rows were expected.
        notes: What a reader should know: tables that are inexact or not compared.
    """

    name: str
    generation: int
    lsn: int
    rows: int
    ledger: Ledger
    notes: list[str] = field(default_factory=list)

    def wrong(self) -> Iterator[Difference]:
        """Yield the rows that are not what Postgres has."""
        return self.ledger.differences(excused=False)

    def undecided(self) -> Iterator[Difference]:
        """Yield the rows that changed each time they were compared."""
        return self.ledger.differences(excused=True)

    def close(self) -> None:
        """Remove the file."""
        self.ledger.close()


class Verifier:
    """Compares views of one source."""

    def __init__(self, log: Log, control: Control, progress: Progress, timeout: float) -> None:
        """Use `timeout` (s) as the longest wait for a view to reach X, and for what is excused to be decided."""
        self._log = log
        self._control = control
        self._progress = progress
        self._timeout = timeout

    def verify(self, consumers: dict[str, type[Consumer]], generation: int | None = None) -> Iterator[Outcome]:
        """Yield the outcome of each view; all are compared with the same snapshot.

        Args:
            consumers: Name to class.
            generation: Which one of each; the live one when None.

        Raises:
            Misconfigured: `consumer-not-running`, `no-live-generation`, `stale-generation`, `nothing-captured`, and what
                stopped a view.
            Transient: `view-behind`, `postgres-away`.
        """
        views = {name: self._served(name, consumer, generation) for name, consumer in consumers.items()}
        with closing(connect(self._log.settings)) as connection, _postgres_errors():
            before = self._checkpoint()
            opened: list[_View] = []
            try:
                with moment(connection) as now:
                    for name, consumer in consumers.items():
                        expected = self._expectation(connection, consumer, name)
                        view = _View(name, views[name].generation, expected, Ledger(), Multiset())
                        opened.append(view)
                        self._fill(name, expected.all(connection), view.ledger)
                        self._expect(connection, view, expected.keyless)
                for view in opened:
                    self._compare(view, now, before)
                    self._decide(connection, view)
                    self._compare_without_key(connection, view, now, before)
                    rows = view.ledger.count() + view.multiset.count()
                    view.multiset.close()
                    notes = [*view.expected.notes, *_inexact(self._checkpoint(), view.expected)]
                    yield Outcome(view.name, view.generation, now.lsn, rows, view.ledger, notes)
            except BaseException:
                for view in opened:
                    view.ledger.close()
                    view.multiset.close()
                raise

    # Before

    def _served(self, name: str, consumer: type[Consumer], generation: int | None) -> Report:
        running = self._control.running(name)
        found = [report for report in running if (report.generation == generation if generation else report.live)]
        if not found:
            said = f"{name} has no generation {generation}." if generation else f"{name} has no live generation yet."
            raise Misconfigured("no-live-generation", said, "Wait for its first build: headrace status --watch")
        if found[0].fingerprint != fingerprint(consumer):
            said = f"Generation {found[0].generation} of {name} was built by other code than is installed here."
            raise Misconfigured("stale-generation", said, f"Run: headrace rebuild {name}")
        return found[0]

    def _checkpoint(self) -> Checkpoint:
        found = self._log.newest_checkpoint(complete=True)
        if found is None:
            said = f"The log of {self._log.settings.source} has no complete checkpoint."
            raise Misconfigured("nothing-captured", said, "Run: headrace capture")
        return found

    def _expectation(self, connection: Connection, consumer: type[Consumer], name: str) -> Expectation:
        settings = self._log.settings
        shapes: Shapes = {table: schema for (table, _), schema in sorted(self._log.schemas().items())}
        names = set(published(connection, settings.publication))
        return expectation(connection, consumer, name, settings, shapes, names)

    def _fill(self, name: str, made: Iterator[Made], ledger: Ledger) -> None:
        batch: list[Made] = []
        done = 0
        for each in made:
            batch.append(each)
            if len(batch) == _WRITE:
                _write(ledger, batch)
                done += len(batch)
                batch.clear()
                self._progress(f"{name}: reading Postgres", done, 0)
        _write(ledger, batch)

    def _expect(self, connection: Connection, view: _View, keyless: Collection[str]) -> None:
        for table in keyless:
            self._progress(f"{view.name}: reading {table}", 0, 0)
            view.multiset.expect(table, *view.expected.without_key(connection, table))

    # Comparing

    def _compare(self, view: _View, now: Moment, before: Checkpoint) -> None:
        self._await(view, Version(before.version.epoch, now.lsn))
        ledger = view.ledger
        total = ledger.count() + view.multiset.count()
        for done, row in enumerate(self._control.scan(view.name, view.generation, self._timeout)):
            if row.collection in view.expected.keyless:
                view.multiset.hold(row.collection, row.key, row.value)
            else:
                _check(row, ledger)
            if done % _WRITE == 0:
                self._progress(f"{view.name}: comparing", done, max(done, total))
        for difference in ledger.left():
            ledger.note(difference)
        self._excuse(view, ledger, now, before)

    def _await(self, view: _View, wanted: Version) -> None:
        """Wait until readers of the view see everything up to X."""
        deadline = time.monotonic() + self._timeout
        while True:
            found = [r for r in self._control.running(view.name) if r.generation == view.generation]
            if found and found[0].version >= wanted:
                return
            if not found or found[0].phase in {"stopped", "stale"}:
                raise _stopped(view, found)
            if time.monotonic() > deadline:
                said = f"{view.name} is at {found[0].version}, Postgres at {wanted}, after {self._timeout:.0f} s."
                raise Transient("view-behind", said, "See: headrace status")
            self._progress(f"{view.name}: waiting for {format_lsn(wanted.lsn)}", 0, 0)
            time.sleep(_POLL_SECONDS)

    def _excuse(self, view: _View, ledger: Ledger, now: Moment, before: Checkpoint) -> None:
        """Find for each difference the change that may explain it."""
        self._excuse_since(view, ledger, now, before, whole=False)
        self._excuse_since(view, ledger, now, before, whole=True)

    def _excuse_since(self, view: _View, ledger: Ledger, now: Moment, before: Checkpoint, *, whole: bool) -> None:
        if next(ledger.differences(excused=False), None) is None:
            return
        for table in view.expected.tables:
            since = None if whole else before.ends.get(self._log.topic_of(table))
            for change in self._log.scan(table, since):
                # LSNs and transactions of an earlier epoch are of another server's: they excuse nothing.
                if change.version.epoch >= before.version.epoch and now.unseen(change.xid, change.version.lsn):
                    for touched in view.expected.touched(change, ledger):
                        ledger.excuse(*touched)

    # Deciding what was excused

    def _decide(self, connection: Connection, view: _View) -> None:
        """Compare excused rows again, until each was once quiet between snapshot and look, or the time is up."""
        ledger, deadline = view.ledger, time.monotonic() + self._timeout
        pending = ledger.excused_roots()
        while pending and time.monotonic() < deadline:
            for start in range(0, len(pending), _KEYS):
                self._again(connection, view, pending[start : start + _KEYS])
                self._progress(f"{view.name}: comparing again what just changed", start, len(pending))
            pending = ledger.excused_roots()

    def _again(self, connection: Connection, view: _View, pending: Sequence[tuple[str, str, str, str]]) -> None:
        before = self._checkpoint()
        small = Ledger()
        try:
            with moment(connection) as now:
                roots = sorted({(table, root) for _, _, table, root in pending})
                self._fill(view.name, view.expected.some(connection, roots), small)
            self._look(
                view,
                small,
                [(collection, key) for collection, key, *_ in pending],
                Version(before.version.epoch, now.lsn),
            )
            self._excuse(view, small, now, before)
            found = {(d.collection, d.key): d for d in small.differences(excused=False)}
            still = {(d.collection, d.key) for d in small.differences(excused=True)}
        finally:
            small.close()
        for collection, key, *_ in pending:
            if (collection, key) not in still:
                view.ledger.settle(collection, key, found.get((collection, key)))

    def _look(self, view: _View, small: Ledger, keys: list[tuple[str, str]], wanted: Version) -> None:
        """Compare single rows as soon as the view shows X."""
        deadline = time.monotonic() + self._timeout
        version, rows = self._control.rows(view.name, view.generation, keys, self._timeout)
        while version < wanted:
            if time.monotonic() > deadline:
                raise Transient(
                    "view-behind", f"{view.name} is at {version}, Postgres at {wanted}.", "See: headrace status"
                )
            version, rows = self._control.rows(view.name, view.generation, keys, self._timeout)
        for row in rows.values():
            _check(row, small)
        for difference in small.left():
            if (difference.collection, difference.key) in set(keys):
                small.note(difference)

    # Rows without a key

    def _compare_without_key(self, connection: Connection, view: _View, now: Moment, before: Checkpoint) -> None:
        """Note what differs in the tables without a key; those in which rows went meanwhile are compared again, until time is up."""
        deadline = time.monotonic() + self._timeout
        unsure = self._note_without_key(view, view.expected.keyless, now, before)
        while unsure and time.monotonic() < deadline:
            before = self._checkpoint()
            view.multiset.clear(unsure)
            with moment(connection) as later:
                self._expect(connection, view, unsure)
            self._await(view, Version(before.version.epoch, later.lsn))
            for row in self._control.scan(view.name, view.generation, self._timeout):
                if row.collection in unsure:
                    view.multiset.hold(row.collection, row.key, row.value)
            unsure = self._note_without_key(view, unsure, later, before)
        for difference in view.multiset.differences(unsure):
            view.ledger.note(difference)
            view.ledger.excuse(*difference[1:3], difference[1:3])

    def _note_without_key(self, view: _View, tables: Collection[str], now: Moment, before: Checkpoint) -> set[str]:
        """Note what certainly differs; return the other tables that are not equal."""
        unsure = self._leave_out(view, tables, now, before)
        for difference in view.multiset.differences(set(tables) - unsure):
            view.ledger.note(difference)
        return unsure

    def _leave_out(self, view: _View, tables: Collection[str], now: Moment, before: Checkpoint) -> set[str]:
        """Leave out what the snapshot cannot have; return the tables that differ perhaps because rows went, or were written anew."""
        unsure: set[str] = set()
        for whole in (False, True):
            for table in set(tables) & view.multiset.differing() if whole else tables:
                since = None if whole else before.ends.get(self._log.topic_of(table))
                for change in self._log.scan(table, since):
                    version, anew = change.version, change.row is None or not change.xid
                    unseen = now.unseen(change.xid, version.lsn) or (anew and version > before.version)
                    if version.epoch < before.version.epoch or not unseen:
                        continue
                    if anew:
                        unsure.add(table)
                    else:
                        view.multiset.leave_out(table, change.key.decode())
        return unsure & view.multiset.differing()


@contextmanager
def _postgres_errors() -> Iterator[None]:
    """Say what Postgres says as one of our errors."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege as error:
        said = f"The role of HEADRACE_DSN may not read everything: {error.diag.message_primary}."
        raise Misconfigured("verify-not-allowed", said, "Run: headrace setup --role ROLE --apply") from error
    except psycopg.Error as error:
        said = f"Reading Postgres broke off: {' '.join(str(error).split())}."
        raise Transient("postgres-away", said, "Run verify again.") from error


@dataclass(frozen=True, slots=True)
class _View:
    name: str
    generation: int
    expected: Expectation
    ledger: Ledger
    multiset: Multiset


def _write(ledger: Ledger, batch: list[Made]) -> None:
    members = [(*member, made.row.collection, made.row.key) for made in batch for member in made.members]
    ledger.add([made.row for made in batch], members)


def _check(row: ViewRow, ledger: Ledger) -> None:
    expected = ledger.strike(row.collection, row.key)
    if expected is None:
        ledger.note(Difference(EXTRA, row.collection, row.key))
        return
    columns = differing(expected, row.value, rows=bool(row.collection))
    if columns:
        ledger.note(Difference(DIFFERENT, row.collection, row.key, columns))


def _stopped(view: _View, found: list[Report]) -> Misconfigured:
    if not found:
        said = f"Generation {view.generation} of {view.name} is gone."
        return Misconfigured("no-live-generation", said, "Run verify again.")
    report = found[0]
    said = f"{view.name} has stopped at {report.version}: {report.reason or report.phase}"
    return Misconfigured(report.code or "stale-generation", said, report.remedy or f"Run: headrace rebuild {view.name}")


def _inexact(checkpoint: Checkpoint, expected: Expectation) -> list[str]:
    inexact = sorted(set(checkpoint.inexact) & {*expected.tables, *expected.keyless})
    return [f"{table} is being read again by capture: its state in the log is not exact (S12)" for table in inexact]
