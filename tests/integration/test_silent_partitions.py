"""Partitions that bring or take rows without an event (S12), unlogged ones too: the table ends exact by itself."""

from __future__ import annotations

import json

import pytest
from psycopg import sql
from typer.testing import CliRunner

from headrace.cli import app
from headrace.log import Log
from headrace.settings import Settings, environment
from headrace_capture import attention, catalog, fingerprints
from tests.fixtures.capture import Running, capturing, changes, eventually, execute, prepare, replay, rows, selected
from tests.fixtures.resnapshots import ask, jobs
from tests.fixtures.silent import ATTACH, HIGH, ITEMS, LOGGED, LOW, PARTS, ROWS, exact, fingerprint, off

pytestmark = pytest.mark.usefixtures("often")


@pytest.mark.parametrize(
    "ddl",
    [
        "ALTER TABLE parts DETACH PARTITION low",
        "DROP TABLE low",
        "TRUNCATE low",
        ATTACH,
    ],
    ids=["detach", "drop", "truncate", "attach"],
)
def test_partitions(settings: Settings, ddl: str) -> None:
    """No message tells of them; the catalogue does."""
    prepare(settings, PARTS, LOW, HIGH, ROWS)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "INSERT INTO parts VALUES (10, 1) ON CONFLICT (id) DO UPDATE SET n = 0")
        capture.reach()
        eventually("it knows the partitions", lambda: "leaves" in fingerprint(settings, "public.parts"))
        execute(settings, *ddl.split("; "))
        exact(settings, capture, "public.parts")


UNLOGGED = "CREATE UNLOGGED TABLE more PARTITION OF parts FOR VALUES FROM (20) TO (30)"


def stays_inexact(settings: Settings, capture: Running) -> None:
    """Wait until it has said so of the table, and what mends it, and lets it rest."""
    assert capture.hear("public.parts stays inexact").endswith(f"after: {LOGGED}")
    eventually("it rests", lambda: jobs(settings)["public.parts"]["phase"] == "failed")
    assert capture.reach().inexact == ("public.parts",)


def logged(settings: Settings, capture: Running) -> None:
    """Mend it, and wait until the table was read again and is equal."""
    execute(settings, LOGGED)
    eventually("it is exact", lambda: capture.reach().inexact == ())
    execute(settings, "UPDATE parts SET n = n + 1")
    capture.reach()
    assert replay(settings, "public.parts") == selected(settings, "parts")


def _status(settings: Settings, *options: str) -> str:
    return " ".join(CliRunner().invoke(app, ["status", *options], env=environment(settings)).output.split())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_snapshot_with_an_unlogged_partition_is_not_exact_until_it_is_logged(
    settings: Settings, *, chunked: bool
) -> None:
    """The snapshot reads its rows, but no change of them is in the WAL."""
    prepare(settings, PARTS, LOW, HIGH, UNLOGGED, ROWS, "INSERT INTO parts VALUES (25, 25)")
    with capturing(settings, chunked=chunked) as capture:
        stays_inexact(settings, capture)
        assert replay(settings, "public.parts") == selected(settings, "parts"), "all the same it is as it was then"
        execute(
            settings, "UPDATE parts SET n = 0", "DELETE FROM parts WHERE id = 25", "INSERT INTO parts VALUES (26, 26)"
        )
        capture.reach()
        assert replay(settings, "public.parts") != selected(settings, "parts")
        logged(settings, capture)
    complete = [c for c in Log(settings).checkpoints() if c.snapshot == "complete"]
    assert [c.inexact for c in complete] == ([] if chunked else [("public.parts",)])


def test_a_partition_that_becomes_unlogged_leaves_its_table_inexact_until_it_is_logged(settings: Settings) -> None:
    """Also one that is empty: what it gets is not in the WAL. Neither a restart nor a person who asks for the table changes that."""
    prepare(settings, PARTS, LOW, HIGH, ROWS)
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, UNLOGGED, "INSERT INTO parts VALUES (25, 25)")
        stays_inexact(settings, capture)
        eventually("status names it", lambda: "inexact (S12): public.parts" in _status(settings, "--check"))
        eventually("with what mends it", lambda: LOGGED in _status(settings))
    with capturing(settings) as capture:
        ask(settings, tables=["public.parts"])
        stays_inexact(settings, capture)
        execute(settings, "DELETE FROM parts WHERE id = 25", "INSERT INTO parts VALUES (26, 26)")
        logged(settings, capture)
        capture.said.clear()
        execute(settings, "ALTER TABLE more SET UNLOGGED", "INSERT INTO parts VALUES (27, 27)")
        stays_inexact(settings, capture)
        logged(settings, capture)


def test_a_partition_that_cannot_be_asked_in_time_whether_it_is_empty_counts_as_not_empty(settings: Settings) -> None:
    """A scan of dead rows that takes too long: here a view, in place of a partition, that takes for ever."""
    execute(settings, ITEMS, "CREATE VIEW slow AS SELECT FROM generate_series(1, 9) i WHERE pg_sleep(60 * i) IS NULL")
    with catalog.connect(settings.dsn, name="test") as connection:
        connection.execute("SET statement_timeout = 50")
        assert fingerprints._is_empty(connection, 0, sql.Identifier("public", "slow")) is False
        connection.execute("SET statement_timeout = 0")
        assert fingerprints._is_empty(connection, 0, sql.Identifier("public", "items")) is True, (
            "the connection goes on"
        )


def test_asked_to_stop_while_it_asks_whether_partitions_are_empty_it_ends_each_question(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may take minutes, and the process would wait for the second one."""
    slow = "CREATE VIEW slow AS SELECT FROM generate_series(1, 9) i WHERE pg_sleep(60 * i) IS NULL"
    prepare(settings, PARTS, LOW, HIGH, ROWS)
    execute(settings, slow)
    asked, is_empty = sql.Identifier("public", "slow"), fingerprints._is_empty
    asks = (
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'headrace resnapshot'"
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        eventually("it knows the partitions", lambda: "leaves" in fingerprint(settings, "public.parts"))
        monkeypatch.setattr(attention.CatalogueWatch, "take", lambda _: None)
        monkeypatch.setattr(fingerprints, "_is_empty", lambda connection, *_: is_empty(connection, 0, asked))
        for number in (2, 3):
            bounds = f"FROM ({number}0) TO ({number + 1}0)"
            execute(settings, f"CREATE TABLE more{number} PARTITION OF parts FOR VALUES {bounds}")
        ask(settings, tables=["public.parts"])
        eventually("it asks", lambda: rows(settings, f"{asks} AND query LIKE '%slow%'"))
    eventually("nobody asks", lambda: not rows(settings, asks))


def test_truncate_of_a_partitioned_table_is_a_delete_for_each_live_key(settings: Settings) -> None:
    """The stream names the root; that its partitions have other files lets it be read again, which finds nothing to mend."""
    prepare(settings, PARTS, LOW, HIGH, ROWS)
    with capturing(settings) as capture:
        capture.reach()
        execute(
            settings, "DELETE FROM parts WHERE id = 3", "BEGIN; TRUNCATE parts; INSERT INTO parts VALUES (5, 0); COMMIT"
        )
        capture.hear("public.parts was read again")
        eventually("it is exact", lambda: capture.reach().inexact == ())
    assert replay(settings, "public.parts") == selected(settings, "parts") == {b'{"id":5}': {"id": 5, "n": 0}}
    log = changes(settings, "public.parts")
    (born,) = [change.version for change in log if change.op == "c"]
    dead = [json.loads(change.key)["id"] for change in log if change.row is None and change.version == born]
    assert sorted(dead) == sorted(2 * [id_ for id_ in range(20) if id_ != 3]), "each with its tombstone"


@pytest.mark.parametrize("capture_was_off", [False, True])
def test_a_default_for_the_rows_of_partitions(settings: Settings, capture_was_off: bool) -> None:
    """Only the partitions' own entries in the catalogue tell that old rows show it."""
    prepare(settings, PARTS, LOW, HIGH, ROWS)
    added = "ALTER TABLE parts ADD COLUMN more int DEFAULT 5"
    if capture_was_off:
        with off(settings):
            execute(settings, added)
    with capturing(settings) as capture:
        if not capture_was_off:
            capture.reach()
            execute(settings, added, "UPDATE parts SET n = 0 WHERE id = 3")
        exact(settings, capture, "public.parts")
