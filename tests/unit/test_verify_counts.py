"""What a view has more than a snapshot, by what was logged since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from headrace.change import Change, Snapshot, Version
from headrace.log.topics import Ends
from headrace_verify.counts import drift
from headrace_verify.postgres import Moment

NOW = Moment(Snapshot(xmax=10, running=frozenset()), 200)


class Records:
    """A log's records, as a scan of several partitions gives them."""

    def __init__(self, *records: Change) -> None:
        self._records = records

    def scan(self, *tables: str, since: Ends) -> Iterator[Change]:
        yield from (record for record in self._records if record.table in tables)


def deleted(table: str, key: int, partition: int, offset: int, xid: int = 50) -> Change:
    return Change(table, "d", b'{"id":%d}' % key, None, Version(1, 300), key, xid, 1, partition, offset)


def of(log: Any, collections: dict[str, list[str]] | None = None, now: Moment = NOW, shown: int = 400) -> Counter[str]:
    found = drift(log, collections or {"t": ["t"]}, now, {}, Version(1, shown))
    assert found is not None
    return found.more


def test_a_delete_and_its_tombstone_count_once_also_where_others_are_between() -> None:
    one, other, third = (deleted("t", 1, 0, 0), deleted("t", 2, 1, 0), deleted("u", 3, 0, 0))
    log: Any = Records(one, other, third, *(each._replace(offset=1) for each in (one, other, third)))
    assert of(log, {"t": ["t"], "both": ["t", "u"]}) == {"t": -2, "both": -3}


def test_a_key_that_was_gone_when_its_table_was_read_again_makes_the_count_unknown() -> None:
    """It may have been gone before the snapshot too, without an event: a ghost, of which nobody knows when it died."""
    log: Any = Records(deleted("t", 1, 0, 0), deleted("t", 2, 0, 1, xid=0))
    assert drift(log, {"t": ["t"]}, NOW, {}, Version(1, 400)) is None
    assert of(log, shown=299) == {}, "the view does not show it yet"
    assert of(log, now=NOW._replace(lsn=301)) == {"t": -1}, "it is in neither"


def test_a_table_that_was_read_again_may_have_rows_of_which_nobody_knows_that_they_came() -> None:
    record = deleted("t", 1, 0, 0, xid=0)._replace(op="r", row={"id": 1}, read="resnapshot")
    log: Any = Records(record, deleted("u", 2, 0, 0))
    found = drift(log, {"t": ["t"], "u": ["u"]}, NOW, {}, Version(1, 400))
    assert found == ({"t": 0, "u": -1}, {"t"})
    assert drift(log, {"t": ["t"]}, NOW, {}, Version(1, 299)) == ({}, set()), "the view does not show it yet"
    assert drift(log, {"t": ["t"]}, NOW._replace(lsn=301), {}, Version(1, 400)) == ({}, set()), "it is in both"
