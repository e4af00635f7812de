"""Verify: every row of a view against Postgres, exact while both go on (S27).

1. Open a snapshot of Postgres; then take the LSN X. Write down all that each view should hold.
2. Wait until the view shows X; scan it; whatever is not as written down is a difference.
3. Read the log from before the snapshot. A difference is excused only by a change of its key (of a document: of any of its
   rows) that the snapshot does not see or that is beyond X. What nothing excuses is wrong, and is reported.
4. What is excused is compared again, some keys at a time, until it is decided (`deciding`).
5. Tables without a key are compared as multisets, without the rows that the snapshot cannot have (`multiset`).

Step 3 reads first what was logged since the checkpoint before the snapshot. A transaction that was open at the snapshot may
have its commit before that (WAL order is not visibility order, S7), and a snapshot does not list all of these: one that is
younger than every finished transaction is only beyond its xmax. So what still nothing excuses is looked up in all of the log.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import psycopg
from psycopg import errors as pg

from headrace.change import NOWHERE, Checkpoint, Version, format_lsn
from headrace.consumer import ALL, Consumer
from headrace.control import Control, Report
from headrace.errors import Misconfigured, Transient
from headrace.fingerprint import fingerprint
from headrace.log import Log
from headrace.waiting import check_code, check_whole, reached
from headrace_verify.counts import Counted, drift
from headrace_verify.deciding import Deciding, Progress
from headrace_verify.excuses import Take, excuse
from headrace_verify.expected import Expectation, Shapes, count, everything, expectation
from headrace_verify.ledger import Difference, Ledger
from headrace_verify.multiset import Multiset
from headrace_verify.postgres import Connection, Moment, check_source, connect, moment, published
from headrace_verify.view import View, check, write

_RIGHTS = (
    "Run: headrace setup --role ROLE --table TABLE --apply. ROLE is that of HEADRACE_DSN, TABLE any captured one (with no --table setup "
    "captures every table with a key)."
)
_WRITE = 1000
_PAUSE_SECONDS = 0.1


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
        """Yield the rows of which a change was in the view or in the snapshot only, each time they were compared."""
        return self.ledger.differences(excused=True)

    def close(self) -> None:
        """Remove the file."""
        self.ledger.close()


class Verifier:
    """Compares views of one source."""

    def __init__(self, log: Log, control: Control, progress: Progress, timeout: float) -> None:
        """Use `timeout` (s) as the longest wait for a view to reach X, and for the next excused row to be decided."""
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
            Misconfigured: `consumer-not-running`, `no-live-generation`, `stale-generation`, `other-code`, `nothing-captured`,
                `records-parked`, `view-paused`, `token-void` (the log was recovered meanwhile), `other-source`, `postgres-standby`,
                and what stopped a view.
            Transient: `view-behind`, `postgres-away`, `table-altered`.
        """
        views = {name: self._served(name, consumer, generation) for name, consumer in consumers.items()}
        with closing(connect(self._log.settings)) as connection, _postgres_errors():
            before, known = self._checkpoint(), self._shapes()
            check_source(connection, before.source)
            opened: list[View] = []
            try:
                with moment(connection) as now:
                    for name, consumer in consumers.items():
                        expected = self._expectation(connection, consumer, name)
                        view = View(name, views[name].generation, expected, Ledger(), Multiset())
                        opened.append(view)
                        self._fill(connection, view)
                for view in opened:
                    outcome = self._outcome(connection, view, now, before)
                    if any(outcome.ledger.counts().values()):
                        self._check_unaltered(view.name, consumers[view.name], known)
                    yield outcome
            except BaseException:
                for view in opened:
                    view.close()
                raise

    def count(self, consumers: dict[str, type[Consumer]], generation: int | None = None) -> Iterator[Counted]:
        """Yield how many rows each view has, and should have by the same snapshot. Arguments and errors are those of `verify`."""
        views = {name: self._served(name, consumer, generation) for name, consumer in consumers.items()}
        with closing(connect(self._log.settings)) as connection, _postgres_errors():
            before, known = self._checkpoint(), self._shapes()
            check_source(connection, before.source)
            with moment(connection) as now:
                made = {name: self._expectation(connection, consumer, name) for name, consumer in consumers.items()}
                counts = {name: count(expected, connection) for name, expected in made.items()}
            for name, expected in made.items():
                counted = self._counted(views[name], expected, counts[name], now, before)
                counted = counted or self._counted_again(connection, views[name], expected)
                if counted.differing:
                    self._check_unaltered(name, consumers[name], known)
                yield counted

    def _counted_again(self, connection: Connection, view: Report, expected: Expectation) -> Counted:
        """Count a view by snapshots of its own until none of its tables was read again meanwhile."""
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            before = self._checkpoint()
            with moment(connection) as now:
                rows = count(expected, connection)
            if counted := self._counted(view, expected, rows, now, before):
                return counted
        said = f"For {self._timeout:.0f} s tables of {view.name} were read again whenever its rows were counted."
        raise Transient("view-behind", said, "See: headrace resnapshot --status")

    def _counted(
        self, view: Report, expected: Expectation, rows: dict[str, int], now: Moment, before: Checkpoint
    ) -> Counted | None:
        """Count a view; what was logged since the snapshot is looked at first, and all that was logged only if that is not enough (S7).

        None where it must be counted by another snapshot (see `drift`).
        """
        self._await(view.name, view.generation, Version(before.version.epoch, now.lsn))
        version, found = self._at_a_state(view)
        notes = _left(expected, found)
        found = {collection: count for collection, count in found.items() if collection not in expected.left}
        tables = {collection: [table.name for table in of] for collection, of in expected.counted().items()}
        for since in (before.ends, {}):
            drifted = drift(self._log, tables, now, since, version)
            if drifted is None:
                return None
            wanted = {collection: count + drifted.more[collection] for collection, count in rows.items()}
            counted = Counted(view.name, view.generation, version, wanted, found, (*expected.notes, *notes))
            if not counted.differing:
                break
            if not drifted.read.isdisjoint(counted.differing):
                return None
        return counted

    def _at_a_state(self, view: Report) -> tuple[Version, dict[str, int]]:
        """Return how many rows a view has, and at which state, once that is certain."""
        deadline = time.monotonic() + self._timeout
        while True:
            version, found = self._control.counts(view.name, view.generation)
            if version != NOWHERE:
                return version, found
            if time.monotonic() > deadline:
                said = f"For {self._timeout:.0f} s {view.name} was between two states whenever its rows were counted."
                raise Transient("view-behind", said, "See: headrace status")
            time.sleep(_PAUSE_SECONDS)

    def _outcome(self, connection: Connection, view: View, now: Moment, before: Checkpoint) -> Outcome:
        left = self._compare(view, now, before)
        deciding = Deciding(self._log, self._control, connection, view, self._progress, self._timeout)
        said = deciding.decide(self._checkpoint)
        self._compare_without_key(connection, view, now, before)
        rows = view.ledger.count() + view.multiset.count()
        view.multiset.close()
        notes = [*view.expected.notes, *_left(view.expected, left), *_inexact(self._checkpoint(), view.expected), *said]
        return Outcome(view.name, view.generation, now.lsn, rows, view.ledger, notes)

    # Before

    def _served(self, name: str, consumer: type[Consumer], generation: int | None) -> Report:
        running = self._control.running(name)
        found = [each for each in running if (each.live if generation is None else each.generation == generation)]
        if not found:
            which = "live generation yet" if generation is None else f"generation {generation}"
            said = f"{name} has no {which}."
            raise Misconfigured("no-live-generation", said, "Wait for its first build: headrace status --watch")
        check_whole(found[0])
        check_code(name, found[0].fingerprint, fingerprint(consumer))  # one of other code than its process has is stale
        return found[0]

    def _checkpoint(self) -> Checkpoint:
        found = self._log.newest_checkpoint(complete=True)
        if found is None:
            said = f"The log of {self._log.settings.source} has no complete checkpoint."
            raise Misconfigured("nothing-captured", said, "Run: headrace capture")
        return found

    def _shapes(self) -> Shapes:
        return {table: schema for (table, _), schema in sorted(self._log.schemas().items())}

    def _check_unaltered(self, name: str, consumer: type[Consumer], known: Shapes) -> None:
        """Refuse to call a view wrong by tables and columns from before it was scanned: it may know others since.

        Raises:
            Transient: `table-altered`.
        """
        every = tuple(consumer.tables) == ALL
        altered = [
            table
            for table, shape in self._shapes().items()
            if shape != known.get(table) and (every or table in consumer.tables)
        ]
        if altered:
            said = f"{', '.join(altered)} came or was altered while {name} was compared: it may differ by that alone."
            raise Transient("table-altered", said, "Run it again.")

    def _expectation(self, connection: Connection, consumer: type[Consumer], name: str) -> Expectation:
        settings = self._log.settings
        sent = published(connection, settings.publication)
        return expectation(connection, consumer, name, settings, self._shapes(), sent)

    def _fill(self, connection: Connection, view: View) -> None:
        said = f"{view.name}: reading Postgres"
        write(view.ledger, everything(view.expected, connection), lambda done: self._progress(said, done, 0))
        self._expect(connection, view, view.expected.keyless)

    def _expect(self, connection: Connection, view: View, keyless: Collection[str]) -> None:
        for table in keyless:
            self._progress(f"{view.name}: reading {table}", 0, 0)
            view.multiset.expect(table, *view.expected.without_key(connection, table))

    # Comparing

    def _compare(self, view: View, now: Moment, before: Checkpoint) -> Counter[str]:
        """Note what differs; return how many rows are of tables that are captured no more."""
        left: Counter[str] = Counter()
        self._await(view.name, view.generation, Version(before.version.epoch, now.lsn))
        ledger = view.ledger
        total = ledger.count() + view.multiset.count()
        for done, row in enumerate(self._control.scan(view.name, view.generation, self._timeout)):
            if row.collection in view.expected.left:
                left[row.collection] += 1
            elif row.collection in view.expected.keyless:
                view.multiset.hold(row.collection, row.key, row.value)
            else:
                check(row, ledger)
            if done % _WRITE == 0:
                self._progress(f"{view.name}: comparing", done, max(done, total))
        for difference in ledger.left():
            ledger.note(difference)
        excuse(self._log, view.expected, [Take(now, ledger)], before)
        return left

    def _await(self, name: str, generation: int, wanted: Version) -> None:
        """Wait until readers of the view see everything up to X."""
        said = f"{name}: waiting for {format_lsn(wanted.lsn)}"
        reached(self._control, name, wanted, self._timeout, generation, lambda _: self._progress(said, 0, 0))

    # Rows without a key

    def _compare_without_key(self, connection: Connection, view: View, now: Moment, before: Checkpoint) -> None:
        """Note what differs in the tables without a key; those in which rows went meanwhile are compared again, until time is up."""
        deadline = time.monotonic() + self._timeout
        unsure = self._note_without_key(view, view.expected.keyless, now, before)
        while unsure and time.monotonic() < deadline:
            before = self._checkpoint()
            view.multiset.clear(unsure)
            with moment(connection) as later:
                self._expect(connection, view, unsure)
            self._await(view.name, view.generation, Version(before.version.epoch, later.lsn))
            for row in self._control.scan(view.name, view.generation, self._timeout):
                if row.collection in unsure:
                    view.multiset.hold(row.collection, row.key, row.value)
            unsure = self._note_without_key(view, unsure, later, before)
        for difference in view.multiset.differences(unsure):
            view.ledger.note(difference)
            view.ledger.excuse(*difference[1:3], difference[1:3])

    def _note_without_key(self, view: View, tables: Collection[str], now: Moment, before: Checkpoint) -> set[str]:
        """Note what certainly differs; return the other tables that are not equal."""
        unsure = self._leave_out(view, tables, now, before)
        for difference in view.multiset.differences(set(tables) - unsure):
            view.ledger.note(difference)
        return unsure

    def _leave_out(self, view: View, tables: Collection[str], now: Moment, before: Checkpoint) -> set[str]:
        """Leave out what the snapshot cannot have; return the tables that differ perhaps because rows went, or were written anew."""
        unsure: set[str] = set()
        for whole in (False, True):
            for table in set(tables) & view.multiset.differing() if whole else tables:
                for change in self._log.scan(table, since={} if whole else before.ends):
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
    except pg.InsufficientPrivilege as error:
        said = f"The role of HEADRACE_DSN may not read everything: {error.diag.message_primary}."
        raise Misconfigured("verify-not-allowed", said, _RIGHTS) from error
    except psycopg.ProgrammingError as error:
        said = f"Postgres does not answer what the view should hold: {' '.join(str(error).split())}."
        raise Misconfigured("verify-no-expectation", said, "If a table was altered meanwhile, run it again.") from error
    except (psycopg.DataError, pg.ProgramLimitExceeded, pg.TooManyArguments, pg.TooManyColumns) as error:
        said = f"Postgres cannot compute what the view should hold: {' '.join(str(error).split())}."
        raise Misconfigured("verify-no-expectation", said, "Change the declaration, or what it is over.") from error
    except psycopg.Error as error:
        said = f"Reading Postgres broke off: {' '.join(str(error).split())}."
        raise Transient("postgres-away", said, "Run verify again.") from error


def _left(expected: Expectation, rows: Mapping[str, int]) -> list[str]:
    left = sorted(expected.left & rows.keys())
    return [f"{table} is not captured any more: its {rows[table]} rows are not compared" for table in left]


def _inexact(checkpoint: Checkpoint, expected: Expectation) -> list[str]:
    inexact = sorted(set(checkpoint.inexact) & {*expected.tables, *expected.keyless})
    return [
        f"{table} is inexact: its state in the log may not be what Postgres has (S12); see headrace status capture"
        for table in inexact
    ]
