"""A table that is a partition for a while, between two looks at the catalogue: what changed of it meanwhile came by its root's name."""

from __future__ import annotations

import pytest

from headrace.settings import Settings
from headrace_capture import attention
from tests.fixtures.capture import capturing, eventually, execute, prepare, replay, selected
from tests.fixtures.resnapshots import jobs
from tests.fixtures.silent import HIGH, ITEMS, LOW, PARTS, ROWS, fingerprint

pytestmark = pytest.mark.usefixtures("often")

MORE = "CREATE TABLE more (id int PRIMARY KEY, n int)", "INSERT INTO more VALUES (25, 1), (26, 1), (27, 1)"
CHANGED = "UPDATE parts SET n = -1 WHERE id = 25; DELETE FROM parts WHERE id = 26; INSERT INTO parts VALUES (28, 28)"
ATTACHED = [
    "ALTER TABLE parts ATTACH PARTITION more FOR VALUES FROM (20) TO (30)",
    CHANGED,
    "ALTER TABLE parts DETACH PARTITION more",
]
MADE = [
    "CREATE TABLE passing PARTITION OF parts FOR VALUES FROM (20) TO (30)",
    "INSERT INTO parts VALUES (28, 28)",
    "DROP TABLE passing",
]


@pytest.mark.parametrize("when", ["one by one", "in one transaction", "while capture is off"])
@pytest.mark.parametrize("what", ["its own", "unpublished", "made and dropped"])
def test_nothing_stays_under_the_roots_name(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, what: str, when: str
) -> None:
    statements = MADE if what == "made and dropped" else ATTACHED
    tables = ["parts", "more"] if what == "its own" else ["parts"]
    prepare(settings, PARTS, LOW, HIGH, ROWS, *(MORE if what == "its own" else ()))
    execute(settings, *(MORE if what == "unpublished" else ()))
    with capturing(settings) as capture:
        capture.reach()
        eventually("they were looked at", lambda: all(fingerprint(settings, f"public.{t}") != "null" for t in tables))
        if when != "while capture is off":
            with monkeypatch.context() as patch:
                patch.setattr(attention.CatalogueWatch, "take", lambda _: None)
                execute(settings, *(["; ".join(statements)] if when == "in one transaction" else statements))
                capture.reach()
                capture.stop()  # before it may look again
    if when == "while capture is off":
        execute(settings, *statements)
    with capturing(settings) as capture:
        capture.hear("public.parts was read again")
        capture.eventually("all is exact", lambda: capture.reach().inexact == ())
    for table in tables:
        assert replay(settings, f"public.{table}") == selected(settings, table)


def test_a_table_that_is_told_after_a_root_that_was_truncated_is_not_taken_for_its_partition(
    settings: Settings,
) -> None:
    prepare(settings, PARTS, LOW, HIGH, ROWS, ITEMS)
    with capturing(settings) as capture:
        capture.reach()
        eventually("it was looked at", lambda: fingerprint(settings, "public.items") != "null")
        execute(settings, "TRUNCATE parts", "INSERT INTO items VALUES (1, 1)", "INSERT INTO parts VALUES (1, 1)")
        capture.hear("public.parts was read again")
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
    assert list(jobs(settings)) == ["public.parts"]


@pytest.mark.parametrize("truncate", ["TRUNCATE parts, items, others", "TRUNCATE parts CASCADE"])
def test_a_table_that_is_truncated_with_a_root_is_not_taken_for_its_partition(
    settings: Settings, truncate: str
) -> None:
    """Their shapes come before the TRUNCATE, as that of a partition does after its root's."""
    others = "CREATE TABLE others (id int PRIMARY KEY, n int REFERENCES parts)"
    prepare(settings, PARTS, LOW, HIGH, ROWS, ITEMS, others, "INSERT INTO items VALUES (1, 1)")
    for _ in range(2):  # each start learns the shapes anew
        with capturing(settings) as capture:
            capture.hear("streaming")
            eventually("it was looked at", lambda: fingerprint(settings, "public.others") != "null")
            execute(settings, truncate, "INSERT INTO items VALUES (2, 2) ON CONFLICT DO NOTHING", ROWS)
            capture.reach()
            capture.eventually("it is exact", lambda: capture.reach().inexact == ())
        assert not [line for line in capture.said if "joined the publication" in line or "not published" in line]
        for table in ("parts", "items", "others"):
            assert replay(settings, f"public.{table}") == selected(settings, table)
    assert jobs(settings).keys() <= {"public.parts"}
