"""Which documents of several levels a change excuses (S27)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from headrace import codec
from headrace.change import Change, Row, Snapshot, Version
from headrace.settings import Settings
from headrace.stores.redis import RedisPages
from headrace_verify.excuses import Take
from headrace_verify.expected import Documents
from headrace_verify.ledger import DIFFERENT, Difference, Expected, Ledger, Member
from headrace_verify.postgres import Moment, Table
from tests.fixtures.documents import CATEGORIES, PRODUCTS, REVIEWS
from tests.fixtures.documents_deep import COLUMNS, COMMENTS, TAGGED, Deep

TABLES = {name: Table(name, ("id",), (), only=True, approximate=False) for name in COLUMNS}
SEEN, UNSEEN = 5, 50
"""Ids of transactions that the snapshot sees, and does not."""


class Kept(Deep):
    store = RedisPages()


@pytest.fixture
def expected() -> Documents:
    return Documents(Kept(Settings(), "kept"), TABLES, ())


@pytest.fixture
def take() -> Iterator[Take]:
    """Two products that differ: the first holds category 1, review 1 and comment 1."""
    with closing(Ledger()) as ledger:
        roots = [Expected("", f"products-{key}", (PRODUCTS, f'{{"id":{key}}}'), {"id": key}) for key in (1, 2)]
        members = [(CATEGORIES, 1), (REVIEWS, 1), (COMMENTS, 1)]
        ledger.add(roots, [Member(table, f'{{"id":{key}}}', "", "products-1") for table, key in members])
        for root in roots:
            ledger.note(Difference(DIFFERENT, "", root.key, ("name",)))
        yield Take(Moment(Snapshot(xmax=10, running=frozenset()), 200), ledger)


def change(table: str, key: int, row: Row | None, xid: int = UNSEEN, lsn: int = 150) -> Change:
    row = row and {"id": key, **row}
    return Change(table, "u", codec.encode_key({"id": key}), row, Version(1, lsn), 1, xid, 1, 0, 0)


def excused(take: Take) -> list[str]:
    return [difference.key for difference in take.ledger.differences(excused=True)]


def test_a_row_that_refers_to_nothing_names_no_document(expected: Documents) -> None:
    ids: list[str] = []
    expected._consumer.id = lambda table, key: ids.append(f"{table} {key}") or "x"  # type: ignore[method-assign,func-returns-value]
    nothing = {"product_id": None, "stars": 1, "hidden": False, "paid": None}
    assert list(expected.named(change(REVIEWS, 9, nothing))) == []
    assert list(expected.above(change(COMMENTS, 9, {"review_id": None, "said": "a"}))) == []
    assert ids == []


@pytest.mark.parametrize(
    ("what", "documents"),
    [
        (change(CATEGORIES, 1, None), ["products-1"]),
        (change(COMMENTS, 1, None), ["products-1"]),
        (change(COMMENTS, 9, {"review_id": 1}), ["products-1"]),
        (change(COMMENTS, 9, {"review_id": 9}), []),
        (change(REVIEWS, 9, {"product_id": 2}), ["products-2"]),
        (change(TAGGED, 9, {"product_id": 2, "tag_id": 1}), ["products-2"]),
        (change(COMMENTS, 9, None), []),
        (change(COMMENTS, 1, None, SEEN), []),
    ],
)
def test_a_change_excuses_what_holds_its_row_or_the_row_it_is_joined_to(
    expected: Documents, take: Take, what: Change, documents: list[str]
) -> None:
    take.hear(what, expected, None)
    assert excused(take) == documents


def test_what_came_below_a_row_before_the_views_state_is_known_when_it_has_left_after_it(
    expected: Documents, take: Take
) -> None:
    shown = Version(1, 120)
    take.hear(change(TAGGED, 9, {"product_id": 2, "tag_id": 1}, SEEN, lsn=110), expected, shown)
    assert not excused(take), "the snapshot sees it and the view shows it"
    take.hear(change(TAGGED, 9, None, SEEN, lsn=150), expected, shown)
    assert excused(take) == ["products-2"]


def test_where_a_row_was_that_came_with_others_nobody_knows_so_it_may_have_been_anywhere(
    expected: Documents, take: Take
) -> None:
    """Its review moved here and the comment left it, with the view's state in between."""
    shown = Version(1, 120)
    assert {COMMENTS, REVIEWS, PRODUCTS} == expected.adrift, "below another row, or beyond a limit"
    take.hear(change(COMMENTS, 9, None, SEEN, lsn=110), expected, shown)
    take.hear(change(TAGGED, 9, None, SEEN, lsn=150), expected, shown)
    assert not excused(take)
    take.hear(change(COMMENTS, 9, None, SEEN, lsn=150), expected, shown)
    assert excused(take) == ["products-1", "products-2"]
