"""DDL that changes rows without an event (S12): the table ends exact by itself, whether capture ran or not."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from headrace.log import Log
from headrace.settings import Settings
from headrace_capture import attention, fingerprints, resnapshot
from headrace_capture.fingerprints import Fingerprint
from tests.fixtures.capture import capturing, eventually, execute, prepare, replay, selected
from tests.fixtures.resnapshots import ask, done, jobs
from tests.fixtures.silent import ATTACH, HIGH, ITEMS, LOW, PARTS, ROWS, T, exact, fingerprint, off

pytestmark = pytest.mark.usefixtures("often")


@pytest.mark.parametrize(
    "ddl",
    [
        "ALTER TABLE items ADD COLUMN more int DEFAULT 5",
        "ALTER TABLE items RENAME COLUMN n TO m",
        "ALTER TABLE items ALTER COLUMN n TYPE text USING 'no ' || n",
        "ALTER TABLE items ALTER COLUMN n TYPE int USING n * 2",
        "ALTER TABLE items ADD COLUMN more int GENERATED ALWAYS AS IDENTITY",
    ],
    ids=["default", "rename", "retype", "same type", "identity"],
)
def test_columns_though_no_row_changes_afterwards_and_capture_was_off(settings: Settings, ddl: str) -> None:
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 20) i")
    with off(settings):
        execute(settings, ddl)
    with capturing(settings) as capture:
        exact(settings, capture, T)


def test_what_changes_no_row_lets_nothing_be_read_again(settings: Settings) -> None:
    """Written anew as it is, a nullable column, a default for later rows, a dropped column, an empty partition, TRUNCATE."""
    whole = "CREATE TABLE whole (id int PRIMARY KEY, n int)"
    prepare(
        settings,
        ITEMS,
        PARTS,
        LOW,
        HIGH,
        ROWS,
        whole,
        "INSERT INTO whole VALUES (1, 1)",
        "INSERT INTO items VALUES (1, 1)",
    )
    with off(settings):
        execute(
            settings,
            "VACUUM FULL whole",
            "ALTER TABLE items ADD COLUMN more text",
            "ALTER TABLE items ALTER COLUMN more SET DEFAULT 'x'",
            "CREATE TABLE more PARTITION OF parts FOR VALUES FROM (20) TO (30)",
        )
    with capturing(settings) as capture:
        eventually("it was looked at", lambda: "more" in fingerprint(settings, T))
        file = fingerprint(settings, "public.whole")
        execute(settings, "ALTER TABLE items DROP COLUMN n", "TRUNCATE whole")
        execute(settings, "INSERT INTO parts VALUES (25, 25)", "INSERT INTO items VALUES (3, 'y')")
        eventually("it was looked at", lambda: '"n"' not in fingerprint(settings, T))
        eventually("the other was, too", lambda: fingerprint(settings, "public.whole") != file)
        capture.reach()
        execute(settings, "ALTER TABLE whole ADD COLUMN last text")
        eventually("it was looked at again", lambda: "last" in fingerprint(settings, "public.whole"))
        assert capture.reach().inexact == ()
    assert jobs(settings) == {}
    for table in ("items", "parts", "whole"):
        rows = selected(settings, table)
        assert {
            key: {name: row.get(name) for name in rows[key]} for key, row in replay(settings, f"public.{table}").items()
        } == rows


@pytest.mark.parametrize("what", ["ALL TABLES", "TABLES IN SCHEMA public"])
def test_a_table_that_was_unlogged_for_a_while(settings: Settings, what: str) -> None:
    """Postgres forbids it only where the publication names the table. The stream is silent, and nothing but the file is another."""
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 5) i")
    execute(
        settings, f"DROP PUBLICATION {settings.publication}", f"CREATE PUBLICATION {settings.publication} FOR {what}"
    )
    changes = "UPDATE items SET n = -1 WHERE id = 1; DELETE FROM items WHERE id = 2"
    with off(settings):
        execute(settings, "ALTER TABLE items SET UNLOGGED", changes, "ALTER TABLE items SET LOGGED")
    with capturing(settings) as capture:
        exact(settings, capture, T)
        execute(settings, "VACUUM FULL items")
        capture.eventually("so it is after that", lambda: sum("was read again" in said for said in capture.said) == 2)
        execute(settings, "ALTER TABLE items ADD COLUMN more text")
        eventually("it was looked at once more", lambda: "more" in fingerprint(settings, T))
        assert capture.reach().inexact == ()
        assert sum("was read again" in said for said in capture.said) == 2


def test_a_table_that_was_in_another_schema_for_a_while(settings: Settings) -> None:
    """Where the publication names only its schema; within one transaction. All that was sent of it is as it was before."""
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 5) i", "CREATE SCHEMA old")
    named = f"CREATE PUBLICATION {settings.publication} FOR TABLES IN SCHEMA public"
    execute(settings, f"DROP PUBLICATION {settings.publication}", named)
    changes = "UPDATE old.items SET n = -1 WHERE id = 1; DELETE FROM old.items WHERE id = 2"
    with off(settings):
        execute(settings, f"ALTER TABLE items SET SCHEMA old; {changes}; ALTER TABLE old.items SET SCHEMA public")
    with capturing(settings) as capture:
        exact(settings, capture, T)
        execute(settings, "VACUUM FULL pg_depend", "ALTER TABLE items ADD COLUMN more text")
        eventually("it was looked at once more", lambda: "more" in fingerprint(settings, T))
        assert capture.reach().inexact == ()
        assert sum("was read again" in said for said in capture.said) == 1


TWICE = "ALTER TABLE items ALTER COLUMN n TYPE int USING n * 2"
DETACH = "ALTER TABLE parts DETACH PARTITION low"
UPPER = "ALTER TABLE docs ALTER COLUMN big TYPE text USING upper(big)"


@pytest.mark.parametrize("together", [False, True], ids=["after it", "with it"])
@pytest.mark.parametrize(
    ("table", "ddl", "changes"),
    [
        ("items", TWICE, "UPDATE items SET n = n + 1 WHERE id = 1; UPDATE items SET id = 30 WHERE id = 2"),
        ("items", TWICE, "DELETE FROM items WHERE id = 1; INSERT INTO items VALUES (1, 1)"),
        (
            "parts",
            DETACH,
            "UPDATE low SET n = -1; DELETE FROM parts WHERE id = 15; INSERT INTO parts VALUES (16, 0) ON CONFLICT DO NOTHING",
        ),
        ("parts", DETACH, "TRUNCATE parts; INSERT INTO parts VALUES (15, 15)"),
        (
            "parts",
            ATTACH,
            "UPDATE parts SET n = n + 1 WHERE id >= 19; DELETE FROM parts WHERE id IN (3, 27); UPDATE parts SET id = 3 WHERE id = 26",
        ),
        ("parts", "TRUNCATE low", "INSERT INTO parts VALUES (1, 1); DELETE FROM parts WHERE id = 11"),
        ("docs", UPPER, "UPDATE docs SET n = n + 1; UPDATE docs SET id = 30 WHERE id = 2"),
    ],
    ids=["retype, update", "retype, delete", "detach", "detach, truncate", "attach", "truncate", "large value"],
)
def test_rows_that_change_before_the_ddl_is_discovered(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, table: str, ddl: str, changes: str, together: bool
) -> None:
    """The catalogue is read now and then: the stream brings what comes after the DDL, or with it, before anybody knows of it."""
    discovered = threading.Event()
    take = attention.CatalogueWatch.take
    monkeypatch.setattr(attention.CatalogueWatch, "take", lambda self: take(self) if discovered.is_set() else None)
    docs = "CREATE TABLE docs (id int PRIMARY KEY, n int, big text); ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL"
    rows = "INSERT INTO items VALUES (1, 1), (2, 2), (3, 3); INSERT INTO docs SELECT i, i, repeat('w', 5000) FROM generate_series(1, 3) i"
    prepare(settings, ITEMS, PARTS, LOW, HIGH, ROWS, docs, rows)
    execute(settings, "ALTER TABLE docs REPLICA IDENTITY DEFAULT")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "UPDATE docs SET big = repeat('v', 5000) WHERE id = 1")  # remembered, as it is before the DDL
        execute(settings, f"{ddl}; {changes}" if together else ddl, *([] if together else changes.split("; ")))
        assert capture.reach().inexact == (), "nobody knows yet"
        discovered.set()
        exact(settings, capture, f"public.{table}")


def test_a_change_in_the_middle_of_a_pass_begins_it_again(settings: Settings) -> None:
    """Rows that were passed already changed without an event: the pass does not end before it has read them anew."""
    settings = replace(settings, cut_records=50)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 20000) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "ALTER TABLE items ADD COLUMN a int DEFAULT 5", "INSERT INTO items VALUES (0)")
        eventually("it reads", lambda: jobs(settings).get(T, {}).get("rows", 0) > 100)
        before = eventually("that is seen", lambda: '"a"' in (said := fingerprint(settings, T)) and said)
        execute(settings, "ALTER TABLE items ALTER COLUMN n TYPE int USING n + 1")
        eventually("it is seen", lambda: fingerprint(settings, T) != before)
        assert not [line for line in capture.said if f"{T} was read again" in line], "in the middle"
        exact(settings, capture, T)


def test_a_table_that_is_read_all_the_time_hides_no_other(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the catalogue takes longer than its next chunk: what the look says of the others counts."""
    settings = replace(settings, cut_records=5)
    prepare(settings, ITEMS, PARTS, "INSERT INTO items SELECT i, i FROM generate_series(1, 12000) i")
    read, chunks = fingerprints.read, []

    def reading() -> bool:
        return jobs(settings).get(T, {}).get("phase") == "reading"

    def slow(*args: Any, **named: Any) -> dict[str, Fingerprint]:
        found = read(*args, **named)
        if named:
            return found
        if args[3:]:
            chunks.append(args)
        elif reading():
            before = len(chunks)
            eventually("chunks are read meanwhile", lambda: len(chunks) > before + 2 or not reading())
        return found

    monkeypatch.setattr(fingerprints, "read", slow)
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        ask(settings, tables=[T])
        eventually("it reads", lambda: jobs(settings)[T]["rows"])
        execute(settings, "ALTER TABLE parts ALTER COLUMN n TYPE bigint USING n + 1")
        capture.hear("public.parts is inexact")
        assert not [line for line in capture.said if f"{T} was read again" in line], "in the middle"
        ask(settings, "cancel", tables=[T])


def test_a_change_that_the_first_chunk_shows_is_told_by_the_checkpoints(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody asked for the table just then, so that nothing has begun its job by itself."""
    monkeypatch.setattr(resnapshot.Resnapshot, "_judge", lambda *_: None)
    settings = replace(settings, cut_records=50)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 10000) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        ask(settings, tables=[T])
        capture.hear(f"{T} was read again")
        assert capture.reach().inexact == ()
        execute(settings, "ALTER TABLE items ALTER COLUMN n TYPE int USING n + 1")
        ask(settings, tables=[T])
        done(settings, capture)
        assert capture.reach().inexact == ()
    assert replay(settings, T) == selected(settings, "items")
    assert any(checkpoint.inexact == (T,) for checkpoint in Log(settings).checkpoints())
