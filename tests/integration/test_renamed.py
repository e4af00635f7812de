"""A table that is renamed, changed, and renamed back between two looks at the catalogue: what changed went to a topic of another name."""

from __future__ import annotations

import threading

import pytest

from headrace.settings import Settings
from headrace_capture import attention
from tests.fixtures.capture import capturing, execute, prepare, replay, selected
from tests.integration.test_silent_changes import HIGH, ITEMS, LOW, PARTS, ROWS


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one transaction"])
@pytest.mark.parametrize("table", ["items", "parts"])
@pytest.mark.parametrize("seen", [False, True], ids=["idle before", "changed before"])
def test_what_changed_under_another_name_is_not_lost(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, table: str, *, together: bool, seen: bool
) -> None:
    monkeypatch.setattr(attention, "LOOK_SECONDS", 0.2)
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
        capture.hear(f"public.{table} was read again")
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
    assert replay(settings, f"public.{table}") == selected(settings, table)
    if (
        table == "items"
    ):  # of a partitioned table that the stream knows, it goes on to send rows under the name that it told first
        assert replay(settings, "public.other") == {}
