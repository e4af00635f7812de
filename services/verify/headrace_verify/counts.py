"""How many rows a view has, against how many it should: the cheapest comparison that is exact while both go on.

Postgres counts in one snapshot, the view at a state that holds all which that snapshot sees. Between the two lie changes that the
snapshot does not see and the view does: the log has them, and each row that they make or delete is added or taken away. What a table
that is read again loses meanwhile may have been in the snapshot or gone long before: then it is counted again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from headrace.change import CREATE, DELETE, Change, Version
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


def drift(log: Log, collections: dict[str, list[str]], now: Moment, since: Ends, shown: Version) -> Counter[str] | None:
    """Return how many rows more than the snapshot the state at `shown` has, by collection, from what was logged `since`.

    None when that is not known: a table was read again meanwhile, and lost rows by it.
    """
    more: Counter[str] = Counter()
    for collection, tables in collections.items():
        last: dict[tuple[str, int], Change] = {}
        for change in log.scan(*tables, since=since) if tables else ():
            place = change.table, change.partition
            before, last[place] = last.get(place), change
            later = change.version > shown or change.version.epoch < shown.epoch
            if not (later or change.repeats(before)) and now.unseen(change.xid, change.version.lsn):
                if change.op == DELETE and not change.xid:
                    return None
                more[collection] += {CREATE: 1, DELETE: -1}.get(change.op, 0)
    return more
