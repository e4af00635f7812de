"""DDL that changes rows without an event (S12): the table ends exact by itself, whether capture ran or not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg import sql
from typer.testing import CliRunner

from headrace.cli import app
from headrace.control import Control
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.settings import Settings, environment
from headrace_capture import attention, catalog, fingerprints, identities, resnapshot
from headrace_capture.fingerprints import ColumnPrint, Fingerprint, silent
from headrace_capture.recovery import recover
from tests.fixtures.capture import Running, capturing, changes, eventually, execute, prepare, replay, selected
from tests.integration.test_resnapshot import ask, done, jobs

pytestmark = pytest.mark.usefixtures("often")

T = "public.items"
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, n int)"
PARTS = "CREATE TABLE parts (id int PRIMARY KEY, n int) PARTITION BY RANGE (id)"
LOW = "CREATE TABLE low PARTITION OF parts FOR VALUES FROM (0) TO (10)"
HIGH = "CREATE TABLE high PARTITION OF parts FOR VALUES FROM (10) TO (20)"
ATTACH = (
    "CREATE TABLE more (id int PRIMARY KEY, n int); INSERT INTO more VALUES (25, 1), (26, 1), (27, 1); "
    "ALTER TABLE parts ATTACH PARTITION more FOR VALUES FROM (20) TO (30)"
)
ROWS = "INSERT INTO parts SELECT i, i FROM generate_series(0, 19) i"


def exact(settings: Settings, running: Running, table: str) -> None:
    """Wait until it was read again by itself, and is equal."""
    running.hear(f"{table} was read again")
    eventually("it is exact", lambda: running.reach().inexact == ())
    name = table.partition(".")[2]
    assert replay(settings, table) == selected(settings, name)
    assert any(c.inexact == (table,) for c in Log(settings).checkpoints())


@contextmanager
def off(settings: Settings) -> Iterator[None]:
    """What is done meanwhile, capture finds when it is started again."""
    with capturing(settings) as capture:
        capture.reach()
    yield


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
LOGGED = "ALTER TABLE public.more SET LOGGED"


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


def fingerprint(settings: Settings, table: str) -> str:
    """Return what the log has as the table's fingerprint, as JSON."""
    (found,) = Control(Log(settings)).kept("capture", "catalogue")
    return json.dumps(found.get(table))


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


@pytest.mark.parametrize("shown", [False, True], ids=["by the catalogue", "by the stream"])
def test_a_text_that_became_an_array_while_capture_runs(settings: Settings, *, shown: bool) -> None:
    """Their lengths do not compare."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n varchar(5))", "INSERT INTO items VALUES (1, 'a')")
    with capturing(settings) as capture:
        capture.reach()
        eventually("it was looked at", lambda: "varying" in fingerprint(settings, T))
        execute(settings, "ALTER TABLE items ALTER COLUMN n TYPE varchar(5)[] USING ARRAY[n]")
        if shown:
            execute(settings, "INSERT INTO items VALUES (2, ARRAY['b'])")
        exact(settings, capture, T)


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
    execute(settings, *(f"INSERT INTO {name} SELECT generate_series(1, 3000)" for name in names))

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


MOOD = "CREATE TYPE mood AS ENUM ('a', 'b'); CREATE DOMAIN temper AS mood"


@pytest.mark.parametrize("capture_was_off", [False, True])
@pytest.mark.parametrize(
    ("key", "type_"),
    [("int", "mood"), ("int", "mood[]"), ("int", "temper[]"), ("mood", "mood"), ("temper", "mood")],
)
def test_a_value_of_an_enum_that_was_renamed(
    settings: Settings, key: str, type_: str, *, capture_was_off: bool
) -> None:
    """Every row's text changes, its key's too; rows that are written before anybody knows have the new one."""
    first, second = ("1", "2") if key == "int" else ("'a'", "'b'")
    old, new = ("'{a}'", "'{z}'") if type_.endswith("[]") else ("'a'", "'z'")
    table = f"CREATE TABLE items (id {key} PRIMARY KEY, n {type_})"
    prepare(settings, *MOOD.split("; "), table, f"INSERT INTO items VALUES ({first}, {old})")
    ddl = "ALTER TYPE mood RENAME VALUE 'a' TO 'z'", f"INSERT INTO items VALUES ({second}, {new})"
    if capture_was_off:
        with off(settings):
            execute(settings, *ddl)
    with capturing(settings) as capture:
        if not capture_was_off:
            capture.reach()
            eventually("it was looked at", lambda: fingerprint(settings, T) != "null")
            execute(settings, *ddl)
        exact(settings, capture, T)


def test_an_enum_within_other_types_and_the_attributes_of_these(settings: Settings) -> None:
    """A composite that gains one is not written anew: all rows show it at once."""
    prepare(
        settings,
        *MOOD.split("; "),
        "CREATE TYPE moods AS RANGE (SUBTYPE = mood, MULTIRANGE_TYPE_NAME = many)",
        "CREATE TYPE pair AS (a int, m many)",
        "CREATE DOMAIN two AS pair",
        "CREATE TABLE items (id int PRIMARY KEY, n two[])",
        "INSERT INTO items VALUES (1, ARRAY[ROW(1, '{[a,b)}')::two])",
        "CREATE TABLE whole (id pair PRIMARY KEY)",
        "INSERT INTO whole VALUES (ROW(1, '{}'))",
    )
    with capturing(settings) as capture:
        capture.reach()
        eventually("they were looked at", lambda: fingerprint(settings, "public.whole") != "null")
        execute(settings, "ALTER TYPE mood RENAME VALUE 'a' TO 'z'")
        eventually("both are read again", lambda: jobs(settings).keys() == {T, "public.whole"})
        done(settings, capture, T, "public.whole")
        assert [row["n"] for row in replay(settings, T).values()] == [['(1,"{[z,b)}")']]
        execute(settings, "ALTER TYPE pair ADD ATTRIBUTE more text")
        eventually("keys are", lambda: set(replay(settings, "public.whole")) == {b'{"id":"(1,{},)"}'})
        done(settings, capture, T, "public.whole")
    assert [row["n"] for row in replay(settings, T).values()] == [['(1,"{[z,b)}",)']]


def test_a_value_that_an_enum_gained_changes_no_row(settings: Settings) -> None:
    prepare(
        settings,
        *MOOD.split("; "),
        "CREATE TABLE items (id int PRIMARY KEY, n mood)",
        "INSERT INTO items VALUES (1, 'a')",
    )
    with capturing(settings) as capture:
        capture.reach()
        eventually("it was looked at", lambda: fingerprint(settings, T) != "null")
        execute(settings, "ALTER TYPE mood ADD VALUE 'new' BEFORE 'b'", "INSERT INTO items VALUES (2, 'new')")
        eventually("it was looked at", lambda: "new" in fingerprint(settings, T))
        assert capture.reach().inexact == ()
    assert jobs(settings) == {}
    assert replay(settings, T) == selected(settings, "items")


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
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 10000) i")
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


def print_of(*columns: ColumnPrint, kind: str = "r", leaves: tuple[tuple[int, int], ...] = ((1, 1),)) -> Fingerprint:
    return Fingerprint(kind, columns, leaves)


def test_a_print_of_before_that_does_not_say_all_is_not_suspected() -> None:
    plain = print_of(ColumnPrint(1, "id", "integer", filled=False, touched="7")).plain()
    known = {"sent": "16400 16401", "altered": "812", "width": 1, "key": "16405"}
    now = Fingerprint.of(plain | known)
    for lacking in known:
        assert not silent(
            Fingerprint.of({name: said for name, said in (plain | known).items() if name != lacking}), now
        )
    assert "options changed" in silent(Fingerprint.of(plain | known | {"altered": "811"}), now)
    assert "unlogged" in silent(now, Fingerprint.of(plain | known | {"unlogged": [LOGGED]})), (
        "it was not looked for before"
    )


@pytest.mark.parametrize(
    ("old", "new", "harmless"),
    [
        ("integer", "integer", True),
        ("character varying(5)", "character varying(9)", True),
        ("character varying(5)", "character varying", True),
        ("character varying", "text", True),
        ("character varying(9)", "character varying(5)", False),
        ("text", "character varying", False),
        ("integer", "bigint", False),
        ("character varying(5)", "character varying(5)[]", False),
        ("character varying(5)[]", "character varying(9)", False),
        ("character varying(5)[]", "character varying(9)[]", False),
        ("character varying[]", "character varying(9)[]", False),
        ("character varying", "character varying[]", False),
        ("character varying[]", "text", False),
        ("character varying[]", "text[]", False),
    ],
)
def test_types_that_say_the_same(old: str, new: str, *, harmless: bool) -> None:
    column = ColumnPrint(1, "a", old, filled=False, touched="7")
    before, after = print_of(column), print_of(column._replace(type=new, touched="9"))
    assert (silent(before, after) == "") is harmless


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
