"""DDL that is taken back before capture looks at the catalogue (S12): what was written meanwhile is not left as it was written.

The catalogue then says what it said before, and only the rows of between, or nothing at all, tell that it was another for a while.
"""

from __future__ import annotations

import pytest

from headrace.settings import Settings
from headrace_capture import attention, resnapshot
from headrace_capture.recovery import recover
from tests.fixtures.capture import Running, capturing, execute, prepare, refused, replay, selected
from tests.fixtures.slots import await_free

pytestmark = pytest.mark.usefixtures("often")

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, a text, b text, at timestamp, n mood, p pair)"
PAIR = "CREATE TABLE {} (id int PRIMARY KEY, a text)"
WRITE = "UPDATE items SET {} WHERE id = 2"


def swap(one: str, other: str, what: str = "TABLE items RENAME") -> list[str]:
    return [f"ALTER {what} {was} TO {now}" for was, now in ((one, "between"), (other, one), ("between", other))]


TAKEN_BACK = {
    "a column's name": [
        "ALTER TABLE items RENAME a TO x",
        WRITE.format("x = 'new'"),
        "ALTER TABLE items RENAME x TO a",
    ],
    "two names": [*swap("a", "b"), WRITE.format("a = 'new'"), *swap("a", "b")],
    "a type that is not written anew": [
        "ALTER TABLE items ALTER at TYPE timestamptz",
        WRITE.format("at = '2024-02-29 12:00'"),
        "ALTER TABLE items ALTER at TYPE timestamp",
    ],
    "a label": [
        "ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'",
        WRITE.format("n = 'blue'"),
        "ALTER TYPE mood RENAME VALUE 'blue' TO 'sad'",
    ],
    "an attribute": [
        "ALTER TYPE pair ADD ATTRIBUTE c int",
        WRITE.format("p = (3, 4, 5)"),
        "ALTER TYPE pair DROP ATTRIBUTE c",
    ],
}


Looks = list[attention.Findings]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """What capture has learnt of the catalogue, look by look."""
    found: Looks = []
    judge = resnapshot.Resnapshot._judge
    monkeypatch.setattr(resnapshot.Resnapshot, "_judge", lambda self, each: (judge(self, each), found.append(each)))
    return found


def equal(settings: Settings, capture: Running, looks: Looks, **tables: str) -> None:
    """Wait until capture has seen everything, and what it has to read again is read; compare tables with what they are in SQL."""
    capture.reach()
    seen = len(looks)
    capture.eventually("it has looked", lambda: len(looks) > seen + 1)
    capture.eventually("it is exact", lambda: capture.reach().inexact == ())
    assert [replay(settings, f"public.{name}") for name in tables] == [
        selected(settings, tables[name]) for name in tables
    ]


@pytest.mark.parametrize("how", ["by and by", "at once"])
@pytest.mark.parametrize("ddl", list(TAKEN_BACK.values()), ids=list(TAKEN_BACK))
def test_what_was_written_before_it_was_taken_back(settings: Settings, looks: Looks, ddl: list[str], how: str) -> None:
    rows = "INSERT INTO items SELECT i, 'a', 'b', '2024-01-01', 'glad', (1, 2)::pair FROM generate_series(1, 3) i"
    prepare(settings, "CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE TYPE pair AS (a int, b int)", ITEMS, rows)
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, "SET timezone = 'UTC'", *(ddl if how == "by and by" else ["; ".join(ddl)]))
    with capturing(settings) as capture:
        equal(settings, capture, looks, items="(SELECT id, a, b, at, n, p::text FROM items)")


def test_two_tables_that_had_each_others_names(settings: Settings, looks: Looks) -> None:
    """They look the same: not even the shape of what comes under a name tells that it is of the other one."""
    prepare(settings, PAIR.format("items"), PAIR.format("others"), "INSERT INTO items VALUES (1, 'mine')")
    exchange = [f"ALTER TABLE {a} RENAME TO {b}" for a, b in (("items", "tmp"), ("others", "items"), ("tmp", "others"))]
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, *exchange, "INSERT INTO items VALUES (1, 'theirs')", *exchange)
    with capturing(settings) as capture:
        equal(settings, capture, looks, items="items", others="others")


def test_a_column_that_is_generated_no_more(each_version: Settings, looks: Looks) -> None:
    """Before 18 Postgres sends it from then on, and old rows have values of it as well."""
    settings = each_version
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, a int, twice int GENERATED ALWAYS AS (a * 2) STORED)")
    execute(settings, "INSERT INTO items SELECT i, i FROM generate_series(1, 3) i")
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, "ALTER TABLE items ALTER twice DROP EXPRESSION", "UPDATE items SET a = 0 WHERE id = 1")
        equal(settings, capture, looks, items="items")


def test_old_rows_that_were_named_by_another_index_for_a_while(settings: Settings, looks: Looks) -> None:
    """Which row was deleted is not known: refused, and what is said mends it."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, a int NOT NULL UNIQUE)")
    execute(settings, "INSERT INTO items SELECT i, i FROM generate_series(1, 3) i")
    with capturing(settings) as capture:
        capture.reach()
    identity = "ALTER TABLE items REPLICA IDENTITY"
    execute(settings, f"{identity} USING INDEX items_a_key", "DELETE FROM items WHERE id = 2", f"{identity} DEFAULT")
    error = refused(settings)
    assert (error.code, "the table, or a partition of it" in error.message) == ("key-not-sent", True)
    assert "headrace resnapshot --recover" in error.remedy
    await_free(settings)
    recover(settings, print)
    with capturing(settings) as capture:
        equal(settings, capture, looks, items="items")
