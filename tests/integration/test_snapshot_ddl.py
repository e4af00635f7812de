"""DDL of a table that the initial snapshot knows and has not read yet: the snapshot starts again by itself."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.settings import Settings
from headrace_capture import snapshot
from headrace_capture.published import row_filters
from tests.fixtures.capture import capturing, execute, prepare, replay, rows, selected


@pytest.mark.parametrize(
    ("ddl", "table"),
    [
        ("ALTER TABLE items DROP COLUMN n", "items"),
        ("ALTER TABLE items RENAME COLUMN n TO m", "items"),
        ("ALTER TABLE items ALTER COLUMN raw TYPE text USING 'x'", "items"),
        ("ALTER TABLE items RENAME TO others", "others"),
        ("ALTER TABLE items SET SCHEMA s", "s.items"),
        ("DROP TABLE items", "parts"),
        ("DROP TABLE low", "parts"),
    ],
)
def test_a_table_that_is_altered_before_it_is_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, ddl: str, table: str
) -> None:
    prepare(
        settings,
        "CREATE SCHEMA s",
        "CREATE TABLE items (id int PRIMARY KEY, n int, raw bytea); INSERT INTO items VALUES (1, 1), (2, 2)",
        "CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE low PARTITION OF parts FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE high PARTITION OF parts FOR VALUES FROM (10) TO (20)",
        "INSERT INTO parts VALUES (1), (11)",
    )
    altered: list[str] = []

    def filters(*args: Any) -> dict[int, str]:
        """Asked when the snapshot is there and nothing has been read."""
        if not altered:
            altered.append(ddl)
            execute(settings, ddl)
        return row_filters(*args)

    monkeypatch.setattr(snapshot, "row_filters", filters)
    with capturing(settings) as capture:
        said = capture.hear("[table-altered]")
        capture.hear("snapshot complete")
        capture.reach()
    assert ("public.parts" if "low" in ddl else "public.items") in said
    assert altered == [ddl]
    assert rows(settings, f"SELECT FROM {table}")
    assert replay(settings, table if "." in table else f"public.{table}") == selected(settings, table)


def test_a_table_that_is_written_anew_before_it_is_read_looks_empty_and_is_read_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error says so: to the snapshot's eyes its rows are not there yet. The catalogue tells (S12)."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n int); INSERT INTO items VALUES (1, 1), (2, 2)")
    altered: list[str] = []

    def filters(*args: Any) -> dict[int, str]:
        if not altered:
            altered.append("ALTER TABLE items ALTER COLUMN n TYPE bigint USING n * 2")
            execute(settings, *altered)
        return row_filters(*args)

    monkeypatch.setattr(snapshot, "row_filters", filters)
    with capturing(settings) as capture:
        capture.hear("snapshot of public.items: 0 rows")
        capture.hear("public.items was read again")
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
    assert replay(settings, "public.items") == selected(settings, "items")
