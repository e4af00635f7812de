"""One view that is being compared: what it should hold, and how its rows are held against that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from headrace.consumer import ViewRow
from headrace_verify.compare import differing
from headrace_verify.expected import Expectation, Made
from headrace_verify.ledger import DIFFERENT, EXTRA, Difference, Expected, Ledger, Member
from headrace_verify.multiset import Multiset

_BATCH = 200


@dataclass(frozen=True, slots=True)
class View:
    """A generation of a consumer, with what it should hold on disk."""

    name: str
    generation: int
    expected: Expectation
    ledger: Ledger
    multiset: Multiset

    def close(self) -> None:
        """Remove the files."""
        self.ledger.close()
        self.multiset.close()


def write(ledger: Ledger, made: Iterator[Made], told: Callable[[int], None] = lambda _done: None) -> None:
    """Expect what was made, about so many rows at once, with those that are joined; `told` hears how much, now and then."""
    done = 0
    rows: list[Expected] = []
    members: list[Member] = []
    for each in made:
        rows.append(each.row)
        members += each.members
        if len(rows) + len(members) >= _BATCH:
            ledger.add(rows, members)
            done += len(rows)
            told(done)
            rows, members = [], []
    ledger.add(rows, members)


def check(row: ViewRow, ledger: Ledger) -> None:
    """Strike a view's row off, and note what differs."""
    expected = ledger.strike(row.collection, row.key)
    if expected is None:
        ledger.note(Difference(EXTRA, row.collection, row.key), sure=ledger.again(row.collection, row.key))
        return
    columns = differing(expected, row.value, rows=bool(row.collection))
    if columns:
        ledger.note(Difference(DIFFERENT, row.collection, row.key, columns))
