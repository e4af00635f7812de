"""How many rows a view has, against how many it should: the cheapest comparison that is exact while both go on.

Postgres counts in one snapshot, the view at a state that holds all which that snapshot sees. Between the two lie changes that the
snapshot does not see and the view does: the log has them, and each row that they make or delete is added or taken away. What a table
that is read again loses meanwhile may have been in the snapshot or gone long before, and what it gains nobody tells from what it had:
then it is counted again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from headrace.change import CREATE, DELETE, READ, Change, Version
from headrace.log import Log
from headrace.log.topics import Ends
from headrace_verify.postgres import Moment


@dataclass(frozen=True, slots=True)
class Counted:
    """How many rows of each collection one view should have at a state, and has."""

    name: str
    generation: int
    version: Version
    expected: dict[str, int]
    found: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def differing(self) -> dict[str, tuple[int, int]]:
        """Return what was expected and found where it is not the same."""
        both = {name: (self.expected.get(name, 0), self.found.get(name, 0)) for name in {**self.expected, **self.found}}
        return {name: pair for name, pair in sorted(both.items()) if pair[0] != pair[1]}


class Drift(NamedTuple):
    """How many rows more than a snapshot a state has, by collection, and the collections that were read again meanwhile."""

    more: Counter[str]
    read: set[str]


def drift(log: Log, collections: dict[str, list[str]], now: Moment, since: Ends, shown: Version) -> Drift | None:
    """Return what the state at `shown` has that the snapshot has not, from what was logged `since`.

    None when that is not known: a table was read again meanwhile, and lost rows by it. It may also have gained some, of which nobody
    logged that they came (a partition was attached): a row that was read does not say whether it is one.
    """
    found = Drift(Counter(), set())
    for collection, tables in collections.items():
        last: dict[tuple[str, int], Change] = {}
        for change in log.scan(*tables, since=since) if tables else ():
            place = change.table, change.partition
            before, last[place] = last.get(place), change
            later = change.version > shown or change.version.epoch < shown.epoch
            if not (later or change.repeats(before)) and now.unseen(change.xid, change.version.lsn):
                if change.op == DELETE and not change.xid:
                    return None
                if change.op == READ:
                    found.read.add(collection)
                found.more[collection] += {CREATE: 1, DELETE: -1}.get(change.op, 0)
    return found
