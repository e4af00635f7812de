"""A table that is renamed, changed, and renamed back between two looks at the catalogue: what changed went to a topic of another name."""

from __future__ import annotations

import threading

import pytest

from headrace.settings import Settings
from headrace_capture import attention, resnapshot
from tests.fixtures.capture import capturing, changes, eventually, execute, prepare, replay, selected
from tests.fixtures.resnapshots import jobs
from tests.fixtures.silent import HIGH, ITEMS, LOW, PARTS, ROWS, fingerprint

pytestmark = pytest.mark.usefixtures("often")


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one transaction"])
@pytest.mark.parametrize("table", ["items", "parts"])
@pytest.mark.parametrize("seen", [False, True], ids=["idle before", "changed before"])
def test_what_changed_under_another_name_is_not_lost(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, table: str, *, together: bool, seen: bool
) -> None:
    discovered = threading.Event()
    take = attention.CatalogueWatch.take
    monkeypatch.setattr(attention.CatalogueWatch, "take", lambda self: take(self) if discovered.is_set() else None)
    prepare(settings, PARTS, LOW, HIGH, ROWS, ITEMS, "INSERT INTO items VALUES (1, 1), (2, 2), (3, 3)")
    statements = [
        f"ALTER TABLE {table} RENAME TO other",
        "UPDATE other SET n = -1 WHERE id = 1; DELETE FROM other WHERE id = 2; INSERT INTO other VALUES (-5, 0) ON CONFLICT DO NOTHING"
        if table == "items"
        else "UPDATE other SET n = -1 WHERE id = 1; DELETE FROM other WHERE id = 2",
        f"ALTER TABLE other RENAME TO {table}",
        f"UPDATE {table} SET n = 7 WHERE id = 3",
    ]
    with capturing(settings) as capture:
        capture.hear("streaming")
        if seen:
            execute(settings, f"UPDATE {table} SET n = 5 WHERE id = 1")
        capture.reach()
        execute(settings, *(["; ".join(statements)] if together else statements))
        capture.reach()
        discovered.set()
        if (table, seen) != (
            "parts",
            True,
        ):  # of a partitioned table that it knows, the stream has sent rows under its first name
            capture.hear(f"public.{table} was read again")
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
    assert replay(settings, f"public.{table}") == selected(settings, table)
    if table == "items":
        assert replay(settings, "public.other") == {}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What capture has learnt of the catalogue, look by look."""
    found: list[object] = []
    judge = resnapshot.Resnapshot._judge
    monkeypatch.setattr(resnapshot.Resnapshot, "_judge", lambda self, each: (found.append(each), judge(self, each))[1])
    return found


def looked_twice(looks: list[object]) -> None:
    """Wait for a look that was begun by now, and for one after it."""
    before = len(looks)
    eventually("it was looked twice", lambda: len(looks) > before + 2)


@pytest.mark.parametrize("back", [False, True], ids=["for good", "and back"])
@pytest.mark.parametrize("seen", [False, True], ids=["idle before", "changed before"])
def test_rows_of_a_partitioned_table_go_by_its_name_of_now(
    settings: Settings, looks: list[object], *, back: bool, seen: bool
) -> None:
    """Postgres does not tell the new name of a root whose partition it has told."""
    prepare(settings, PARTS, LOW, HIGH, ROWS)
    name = "parts" if back else "other"
    with capturing(settings) as capture:
        capture.hear("streaming")
        if seen:
            execute(settings, "UPDATE parts SET n = 5 WHERE id = 1")
        capture.reach()
        execute(settings, "ALTER TABLE parts RENAME TO other", "UPDATE other SET n = -1 WHERE id = 1")
        if back:
            execute(settings, "ALTER TABLE other RENAME TO parts")
            looked_twice(looks)  # one may have seen the other name
        if seen != back:  # else the stream has the right name
            capture.hear(f"warning: public.{name} is inexact: it was renamed")
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
        for id_ in range(5):
            execute(settings, f"UPDATE {name} SET n = 9 WHERE id = {id_}")
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
    assert replay(settings, f"public.{name}") == selected(settings, name)


def test_rows_that_went_by_a_name_which_another_table_has_taken_do_not_stay_there(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that took it was read again before the stream was where the old root has its new name: as amid a big transaction."""
    monkeypatch.setattr(attention, "LOOK_SECONDS", 0.2)
    there = threading.Event()
    rename = resnapshot.Resnapshot._rename
    monkeypatch.setattr(resnapshot.Resnapshot, "_rename", lambda self: rename(self) if there.is_set() else None)
    prepare(settings, PARTS, LOW, HIGH, ROWS)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "UPDATE parts SET n = 5 WHERE id = 1", "DELETE FROM parts WHERE id = 2")
        capture.reach()
        execute(
            settings,
            f"ALTER TABLE parts RENAME TO other; {PARTS}; CREATE TABLE every PARTITION OF parts DEFAULT; "
            f"INSERT INTO parts VALUES (1, 100); ALTER PUBLICATION {settings.publication} ADD TABLE parts",
        )
        capture.hear("public.parts was read again")
        execute(settings, "INSERT INTO other VALUES (2, -2)")
        capture.reach()
        assert replay(settings, "public.parts") != selected(settings, "parts"), "it went by the old name"
        there.set()
        capture.hear("public.other is inexact: it was renamed")
        capture.eventually("they are exact", lambda: capture.reach().inexact == ())
    for table in ("parts", "other"):
        assert replay(settings, f"public.{table}") == selected(settings, table)


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one transaction"])
@pytest.mark.parametrize("what", ["TABLE parts", "ALL TABLES"])
def test_a_partition_that_was_detached_changed_and_attached_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, what: str, *, together: bool
) -> None:
    """Between two looks: the stream tells nothing of it, or tells it of a table of its own."""
    prepare(settings, PARTS, LOW, HIGH, ROWS)
    execute(
        settings,
        f"DROP PUBLICATION {settings.publication}",
        f"CREATE PUBLICATION {settings.publication} FOR {what} WITH (publish_via_partition_root)",
    )
    statements = [
        "ALTER TABLE parts DETACH PARTITION low",
        "UPDATE low SET n = -1 WHERE id = 1; DELETE FROM low WHERE id = 2",
        "ALTER TABLE parts ATTACH PARTITION low FOR VALUES FROM (0) TO (10)",
    ]
    with capturing(settings) as capture:
        capture.reach()
        eventually("it was looked at", lambda: fingerprint(settings, "public.parts") != "null")
        execute(settings, "UPDATE parts SET n = 5 WHERE id = 3")
        capture.reach()
        with monkeypatch.context() as patch:
            patch.setattr(attention.CatalogueWatch, "take", lambda _: None)
            execute(settings, *(["; ".join(statements)] if together else statements))
            capture.reach()
        capture.hear("public.parts was read again")
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
    assert replay(settings, "public.parts") == selected(settings, "parts")


def test_partitions_that_change_let_nothing_be_read_again(settings: Settings, looks: list[object]) -> None:
    """Postgres tells of each by its own name too, at its first change since a start, and after ANALYZE."""
    prepare(settings, PARTS, LOW, HIGH, ROWS)
    changes = (
        "UPDATE parts SET n = n + 1 WHERE id = 1",
        "UPDATE parts SET n = n + 1 WHERE id = 12",
        "ANALYZE low; ANALYZE parts",
    )
    for _ in range(2):
        with capturing(settings) as capture:
            capture.hear("streaming")
            for statement in (*changes, *changes):
                execute(settings, statement)
                capture.reach()
                looked_twice(looks)
            assert capture.reach().inexact == ()
        assert not [said for said in capture.said if "left out" in said or "inexact" in said]
    assert jobs(settings) == {}


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one transaction"])
@pytest.mark.parametrize("other", ["there before", "made and dropped"])
def test_rows_of_another_table_that_had_its_name_for_a_while_do_not_stay(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, other: str, *, together: bool
) -> None:
    """Between two looks; of the table itself nothing changed."""
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 1)", ITEMS.replace("items", "other"))
    everything = f"CREATE PUBLICATION {settings.publication} FOR ALL TABLES"
    execute(settings, f"DROP PUBLICATION {settings.publication}", everything)
    made, gone = ITEMS, "DROP TABLE items"
    if other == "there before":
        made, gone = "ALTER TABLE other RENAME TO items", "ALTER TABLE items RENAME TO other"
    rename, back = "ALTER TABLE items RENAME TO away", "ALTER TABLE away RENAME TO items"
    statements = [rename, made, "INSERT INTO items VALUES (77, 77), (1, -1)", gone, back]
    with capturing(settings) as capture:
        capture.reach()
        eventually("it was looked at", lambda: fingerprint(settings, "public.other") != "null")
        with monkeypatch.context() as patch:
            patch.setattr(attention.CatalogueWatch, "take", lambda _: None)
            execute(settings, *(["; ".join(statements)] if together else statements))
            capture.reach()
            assert b'{"id":77}' in {change.key for change in changes(settings, "public.items")}, "it went by the name"
        capture.hear("public.items was read again")
        capture.eventually("all is exact", lambda: capture.reach().inexact == ())
    for table in ("items", "other"):
        assert replay(settings, f"public.{table}") == selected(settings, table)
