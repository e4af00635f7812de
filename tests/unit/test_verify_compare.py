"""What verify calls the same, what a snapshot sees, and how its ledger decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing

import pytest

from headrace import codec
from headrace.change import NOWHERE, Snapshot
from headrace.consumer import ViewRow
from headrace.runner.rows import _just_before
from headrace_verify.compare import differing, same
from headrace_verify.expected import Made
from headrace_verify.ledger import DIFFERENT, EXTRA, MISSING, Difference, Excused, Expected, Ledger, Member
from headrace_verify.multiset import Multiset
from headrace_verify.postgres import Moment
from headrace_verify.view import check, write


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger()
    yield ledger
    ledger.close()


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), ({"a": [1, None]}, {"a": [1.0, None]}), ("1", "1"), (None, None)])
def test_json_that_means_the_same_is_the_same(one: object, other: object) -> None:
    assert same(one, other)


@pytest.mark.parametrize(
    ("one", "other"), [(1, True), (0, False), ("1", 1), (None, False), ([1], [1, 2]), ({"a": None}, {})]
)
def test_json_that_means_something_else_is_not(one: object, other: object) -> None:
    assert not same(one, other)
    assert not same(other, one)


def test_a_column_that_a_row_was_written_without_is_null_but_a_document_lacks_a_field() -> None:
    assert differing({"id": 1, "new": None}, {"id": 1}, rows=True) == ()
    assert differing({"id": 1, "new": 5}, {"id": 1}, rows=True) == ("new",)
    assert differing({"id": 1}, {"id": 1, "dropped": 7}, rows=True) == ()
    assert differing({"id": 1, "new": None}, {"id": 1}, rows=False) == ("new",)
    assert differing({"id": 1}, {"id": 1, "more": 7}, rows=False) == ("more",)


def test_a_snapshot_sees_what_was_committed_before_it_and_nothing_else() -> None:
    now = Moment(Snapshot(xmax=110, running=frozenset({100, 105})), lsn=5000)
    assert [xid for xid in (1, 99, 100, 101, 105, 109, 110, 111) if not now.snapshot.sees(xid)] == [100, 105, 110, 111]
    assert now.snapshot.sees(0), "rows of the initial snapshot have no transaction"
    assert now.unseen(xid=99, lsn=5000), "at X or beyond: committed after the snapshot"
    assert now.unseen(xid=105, lsn=4000), "logged before X, and not visible yet (S7)"
    assert not now.unseen(xid=99, lsn=4999)


def test_transaction_ids_wrap_around() -> None:
    turn = 1 << 32
    young = Moment(Snapshot(xmax=turn + 3, running=frozenset()), lsn=1)
    assert young.snapshot.sees(turn - 5), "the one before the turn is older"
    assert young.snapshot.sees(2)
    assert not young.snapshot.sees(3)
    old = Moment(Snapshot(xmax=turn - 2, running=frozenset()), lsn=1)
    assert not old.snapshot.sees(5), "the one after the turn is newer"


def test_what_nothing_excuses_is_wrong_and_the_rest_waits(ledger: Ledger) -> None:
    rows = [Expected("t", key, ("t", key), {"id": key}) for key in "abcd"]
    ledger.add([*rows, Expected("t", "none", ("t", "none"), None)], [Member("child", "1", "t", "a")])
    assert ledger.count() == 4
    assert ledger.strike("t", "a") == {"id": "a"}
    assert ledger.strike("t", "b") == {"id": "b"}
    assert ledger.strike("t", "none") is None
    assert ledger.strike("t", "unknown") is None
    assert list(ledger.left()) == [Difference(MISSING, "t", "c"), Difference(MISSING, "t", "d")]
    for difference in [*ledger.left(), Difference(EXTRA, "t", "x"), Difference(DIFFERENT, "t", "b", ("id",))]:
        ledger.note(difference)
    for touched in ledger.holders("child", "1"):
        ledger.excuse(*touched)
    ledger.excuse("t", "c", ("t", "c"))
    ledger.excuse("t", "x", ("t", "x"))
    size = len(codec.dumps({"id": "c"}))
    assert ledger.excused() == [Excused("t", "c", ("t", "c"), size), Excused("t", "x", ("t", "x"), 0)]
    ledger.settle("t", "c", None)
    assert [(d.kind, d.key) for d in ledger.differences(excused=False)] == [(DIFFERENT, "b"), (MISSING, "d")]
    ledger.settle("t", "x", Difference(EXTRA, "t", "x"))
    assert ledger.counts() == {"missing": 1, "extra": 1, "different": 1, "undecided": 0}


def test_a_row_that_comes_twice_is_wrong_whatever_changes_it(ledger: Ledger) -> None:
    """Also one that was not expected, or differs: a scan has no key twice, so no change explains that."""
    ledger.add([Expected("t", key, ("t", key), {"id": key}) for key in "ab"], [])
    for key, value in [("a", "a"), ("b", "other"), ("new", "new")]:
        check(ViewRow("t", key, {"id": value}, NOWHERE), ledger)
    assert [d.key for d in ledger.differences()] == ["b", "new"]
    for key in ("a", "b", "new"):
        check(ViewRow("t", key, {"id": key}, NOWHERE), ledger)
        ledger.excuse("t", key, ("t", key))
    ledger.excuse_all()
    assert list(ledger.differences(excused=False)) == [Difference(EXTRA, "t", key) for key in ("a", "b", "new")]
    assert not list(ledger.left())


def test_so_is_one_of_a_table_without_a_key_also_where_the_snapshot_cannot_have_it() -> None:
    row = {"n": 1}
    with closing(Multiset()) as multiset:
        multiset.expect("t", ("n",), [row, row])
        for key in ("1", "2", "3", "3", "4"):
            multiset.hold("t", key, row)
        for key in ("3", "4", "3", "4"):
            multiset.leave_out("t", key)
        assert list(multiset.differences(["t"])) == [Difference(EXTRA, "t", "3")]


@pytest.mark.parametrize("key", ['{"id":1}', "7", "a,b", "\ue000", "\x00", "é", "\U0001f600"])
def test_just_before_a_key_comes_that_key_and_nothing_else(key: str) -> None:
    before = _just_before(key).encode()
    assert before < key.encode() or key == "\x00"
    others = [key[:-1], key + "0", key[:-1] + "!", key[:-1] + "\x7f", key[:-1] + "zz"]
    assert not any(before < other.encode() < key.encode() for other in others)


def test_documents_of_many_rows_are_written_few_at_a_time() -> None:
    """However many have these rows, no more of them are in memory at once than one has, and some."""

    class Counting(Ledger):
        """Notes how many rows are written at once."""

        def add(self, rows: Iterable[Expected], members: Iterable[Member]) -> None:
            members = list(members)
            most.append(len(members))
            super().add(rows, members)

    most: list[int] = []
    documents = [Expected("", str(n), ("t", str(n)), {"n": n}) for n in range(50)]
    with closing(Counting()) as ledger:
        write(ledger, (Made(d, tuple(Member("u", f"{d.key} {n}", "", d.key) for n in range(150))) for d in documents))
        assert (ledger.count(), len(list(ledger.members()))) == (50, 50 * 150)
        assert ledger.holders("u", "49 149") == [("", "49", ("t", "49"))]
    assert max(most) <= 300
