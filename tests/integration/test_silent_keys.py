"""Tables without their key for a while (S12), or with a replica identity that no longer does."""

from __future__ import annotations

from dataclasses import replace

import psycopg
import pytest
from typer.testing import CliRunner

from headrace.cli import app
from headrace.errors import Misconfigured
from headrace.settings import Settings, environment
from headrace_capture import catalog, identities
from headrace_capture.recovery import recover
from tests.fixtures.capture import Running, capturing, eventually, execute, prepare, replay, selected
from tests.fixtures.resnapshots import ask, jobs
from tests.fixtures.silent import ITEMS, T, exact, fingerprint, off

pytestmark = pytest.mark.usefixtures("often")
DROPPED, ADDED = "ALTER TABLE items DROP CONSTRAINT items_pkey", "ALTER TABLE items ADD PRIMARY KEY (id)"


@pytest.mark.parametrize("when", ["capture ran", "capture was off", "capture began between"])
@pytest.mark.parametrize(
    ("identity", "changes"),
    [
        ("DEFAULT", ["INSERT INTO items VALUES (21, 21)"]),
        (
            "FULL",
            [
                "INSERT INTO items VALUES (1, 99)",
                "DELETE FROM items WHERE n IN (1, 3)",
                "UPDATE items SET id = 30 WHERE n = 2",
            ],
        ),
    ],
)
def test_a_table_without_its_key_for_a_while(settings: Settings, identity: str, changes: list[str], when: str) -> None:
    """Changes that name no key are passed over, and it says so; of two rows with one key the stream may take the wrong one away."""
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 20) i")
    execute(settings, f"ALTER TABLE items REPLICA IDENTITY {identity}")
    if when == "capture was off":
        with off(settings):
            execute(settings, DROPPED, *changes, ADDED)
    with capturing(settings) as capture:
        if when != "capture was off":
            capture.reach()
            execute(settings, DROPPED, *changes)
            capture.hear("public.items cannot be read again")
            eventually("it is inexact", lambda: capture.reach().inexact == (T,))
            assert "no primary key" in jobs(settings)[T]["reason"]
        if when == "capture ran":
            execute(settings, ADDED, "INSERT INTO items VALUES (40, 40)")
        if when != "capture began between":
            exact(settings, capture, T)
            return
    execute(settings, "INSERT INTO items VALUES (22, 22)", ADDED)
    with capturing(settings) as capture:
        exact(settings, capture, T)


def test_a_table_without_its_key_stays_inexact_though_nothing_of_it_changes(settings: Settings) -> None:
    """Also when it is asked for again: there is nothing that a row of it could be named by."""
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 1)")
    with capturing(settings) as capture:
        capture.reach()
        eventually("it was looked at", lambda: fingerprint(settings, T) != "null")
        execute(settings, DROPPED, "ALTER TABLE items ADD PRIMARY KEY (id) DEFERRABLE")
        capture.hear("public.items cannot be read again")
        ask(settings, tables=[T])
        eventually(
            "it has failed again", lambda: jobs(settings)[T]["phase"] == "failed" and jobs(settings)[T]["request"]
        )
        assert "deferrable" in jobs(settings)[T]["reason"]
        assert capture.reach().inexact == (T,)
        execute(settings, DROPPED, ADDED)
        exact(settings, capture, T)


def test_a_table_that_lost_its_key_keeps_no_initial_snapshot_waiting(settings: Settings) -> None:
    """It is the one that is not begun yet when the other is being read: which that is, nobody says."""
    settings = replace(settings, cut_records=10)
    names = {"public.big", T}
    prepare(settings, *(f"CREATE TABLE {name} (id int PRIMARY KEY)" for name in names))
    execute(settings, *(f"INSERT INTO {name} SELECT generate_series(1, 2000)" for name in names))

    def begun() -> set[str]:
        return {name for name, job in jobs(settings).items() if job["rows"] > 10}

    with capturing(settings, chunked=True) as capture:
        (first,) = capture.eventually("it reads the first", begun)
        (other,) = names - {first}
        key = f"{other.partition('.')[2]}_pkey"
        execute(settings, f"ALTER TABLE {other} DROP CONSTRAINT {key}")
        capture.hear("the initial snapshot is complete")
        assert capture.reach().inexact == (other,)
        assert replay(settings, first) == selected(settings, first.partition(".")[2])
        execute(settings, f"ALTER TABLE {other} ADD PRIMARY KEY (id)")
        exact(settings, capture, other)


def test_a_table_that_was_altered_so_that_its_updates_fail_is_told_with_what_mends_it(settings: Settings) -> None:
    """S8 after setup: a virtual column makes every UPDATE and DELETE fail under REPLICA IDENTITY FULL [I1]."""
    prepare(settings, "CREATE TABLE docs (id int PRIMARY KEY, body text)", "INSERT INTO docs VALUES (1, 'a')")
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, "ALTER TABLE docs ADD COLUMN size int GENERATED ALWAYS AS (length(body)) VIRTUAL")
        with pytest.raises(psycopg.errors.InvalidColumnReference):
            execute(settings, "UPDATE docs SET body = 'b'")
        said = capture.hear("UPDATE and DELETE of a captured table fail")
        mends = said.partition("run: ")[2]
        eventually("status --check names it", lambda: _check(settings) == (1, mends))
        execute(settings, mends)
        execute(settings, "UPDATE docs SET body = 'b'")
        eventually("status --check is content", lambda: _check(settings)[0] == 0)
        capture.reach()
    assert replay(settings, "public.docs") == {b'{"id":1}': {"id": 1, "body": "b"}}


def test_a_partition_that_names_its_old_rows_by_another_index_is_told_and_a_delete_without_its_key_stops_capture(
    settings: Settings,
) -> None:
    prepare(
        settings,
        "CREATE TABLE parts (part bool, id int, code int NOT NULL, PRIMARY KEY (part, id)) PARTITION BY LIST (part)",
        "CREATE TABLE low PARTITION OF parts FOR VALUES IN (true)",
        "CREATE UNIQUE INDEX by_code ON low (code); INSERT INTO parts SELECT true, i, i FROM generate_series(1, 3) i",
    )
    running = Running(settings)
    try:
        running.reach()
        execute(settings, "ALTER TABLE low REPLICA IDENTITY USING INDEX low_pkey")
        with catalog.connect(settings.dsn, name="test") as connection:
            assert identities.failing(connection, settings.publication) == [], "the root's key comes with its changes"
        execute(settings, "ALTER TABLE low REPLICA IDENTITY USING INDEX by_code")
        mends = running.hear("come without its key").partition("run: ")[2]
        assert mends == 'ALTER TABLE "public"."low" REPLICA IDENTITY DEFAULT'
        execute(settings, "DELETE FROM parts WHERE id = 2")
        eventually("it stops", lambda: running.error)
    finally:
        running.stop()
    error = running.error
    assert isinstance(error, Misconfigured)
    assert error.code == "key-not-sent"
    assert "public.parts" in error.message
    assert "headrace resnapshot --recover" in error.remedy
    execute(settings, mends, "DELETE FROM parts WHERE id = 3")
    recover(settings, running.said.append)
    with capturing(settings) as again:
        again.hear("public.parts was read again")
        execute(settings, "UPDATE parts SET code = 7")
        again.reach()
    assert list(replay(settings, "public.parts").values()) == [{"part": True, "id": 1, "code": 7}]


def _check(settings: Settings) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["status", "--check", "capture"], env=environment(settings))
    return done.exit_code, done.output.strip().partition("run: ")[2]
