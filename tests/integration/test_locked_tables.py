"""A transaction of the application holds a table ACCESS EXCLUSIVE for as long as it likes: nothing but that table waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from headrace.control import Control
from headrace.errors import HeadraceError
from headrace.log import Log
from headrace.settings import Settings
from headrace_capture import catalog, copies, fingerprints, snapshot, toast
from headrace_capture.chunks import ChunkReader
from headrace_capture.named import named_tables
from headrace_capture.progress import Progress
from headrace_capture.published import row_filters
from tests.fixtures.capture import Running, capturing, eventually, execute, prepare, replay, rows, selected
from tests.fixtures.mortal import Died, DyingOfCuts, Life
from tests.fixtures.resnapshots import ask, jobs


@pytest.fixture
def everything_published(each_source: Settings) -> Settings:
    """Publications of every kind over tables of every kind."""
    execute(
        each_source,
        "CREATE SCHEMA s",
        "CREATE TABLE a (id int PRIMARY KEY, n int, gone int, g int GENERATED ALWAYS AS (n * 2) STORED)",
        "ALTER TABLE a DROP COLUMN gone",
        "CREATE TABLE nothing ()",
        "CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY)",
        "CREATE TABLE parent (id int PRIMARY KEY)",
        "CREATE TABLE child () INHERITS (parent)",
        "CREATE TABLE parts (id int PRIMARY KEY, n int) PARTITION BY RANGE (id)",
        "CREATE TABLE low PARTITION OF parts FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (id)",
        "CREATE TABLE s.lowest PARTITION OF low FOR VALUES FROM (0) TO (5)",
        "CREATE TABLE s.high PARTITION OF parts FOR VALUES FROM (10) TO (20)",
        "CREATE TABLE s.t (id int PRIMARY KEY)",
        "CREATE TABLE s.hollow (id int PRIMARY KEY) PARTITION BY RANGE (id)",
    )
    tables = (
        "TABLE a (id, n) WHERE (n > 1), nothing, parent",
        "TABLE ONLY parent, parts",
        "TABLE parts (id) WHERE (id < 4)",
        "TABLE low, parts, s.lowest (id)",
        "TABLE s.high",
        "TABLES IN SCHEMA s",
        "TABLES IN SCHEMA s, TABLE a",
        "TABLES IN SCHEMA public, TABLE s.t WHERE (id > 1)",
        "TABLES IN SCHEMA s, TABLE s.t WHERE (id > 1)",
        "ALL TABLES",
    )
    options = ["publish_via_partition_root = true", "publish_via_partition_root = false"]
    if rows(each_source, "SELECT 1 WHERE current_setting('server_version_num')::int >= 180000"):
        options += [f"{option}, publish_generated_columns = stored" for option in options]
    for number, (table, option) in enumerate((table, option) for table in tables for option in options):
        with suppress(
            psycopg.errors.InvalidParameterValue
        ):  # lists and filters of a partitioned table only at its root
            execute(each_source, f"CREATE PUBLICATION p{number} FOR {table} WITH ({option})")
    return each_source


def test_what_the_catalogue_says_of_publications_is_what_postgres_says(everything_published: Settings) -> None:
    with closing(catalog.connect(everything_published.dsn)) as connection:
        publications = [name for (name,) in connection.execute("SELECT pubname FROM pg_publication")]
        assert len(publications) > 15
        for publication in publications:
            ours = catalog.published_tables(connection, publication)
            filters = row_filters(connection, publication)
            told = {t.full_name: (sorted(c.name for c in t.published), filters.get(t.oid)) for t in ours}
            assert told == _as_the_view_says(connection, publication), publication
            assert fingerprints.read(connection, publication).keys() == told.keys()
            oids = connection.execute("SELECT oid FROM pg_class WHERE relkind IN ('r', 'p')").fetchall()
            for oid in {t.oid for t in ours} | {oid for (oid,) in oids if oid >= 16384}:
                found = catalog.published_tables(connection, publication, holding=oid)
                above = {root for (root,) in connection.execute("SELECT pg_partition_ancestors(%s)::oid", [oid])}
                assert found == [t for t in ours if t.oid in {oid, *above}]
            assert catalog.published_tables(connection, publication, holding=7) == []


def _as_the_view_says(connection: catalog.Connection, publication: str) -> dict[str, tuple[list[str], str | None]]:
    """Before 18 it lists generated columns, which are not sent."""
    generated = {"g"} if connection.info.server_version < catalog.GENERATED else set()
    query = "SELECT schemaname || '.' || tablename, attnames, rowfilter FROM pg_publication_tables WHERE pubname = %s"
    found = connection.execute(query, [publication]).fetchall()
    return {table: (sorted(set(columns or []) - generated), only) for table, columns, only in found}


def test_the_tables_that_hold_a_tables_rows_are_those_that_postgres_names(everything_published: Settings) -> None:
    query = "SELECT relid::regclass::text FROM pg_partition_tree('parts') WHERE isleaf ORDER BY 1"
    leaves = [name for (name,) in rows(everything_published, query)]
    with closing(catalog.connect(everything_published.dsn)) as connection:
        ((table,), _) = named_tables(connection, ["parts"])
    assert sorted(f"{leaf.schema}.{leaf.name}" for leaf in table.leaves) == leaves


@contextmanager
def locked(settings: Settings, *tables: str) -> Iterator[Callable[[], None]]:
    """Hold tables as DDL does, in a transaction that stays open until what is yielded is called."""
    with psycopg.connect(settings.dsn) as application:
        application.execute(f"LOCK TABLE {', '.join(tables)} IN ACCESS EXCLUSIVE MODE".encode())
        yield application.commit


@contextmanager
def locked_late(settings: Settings, table: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Hold a table from when the initial snapshot is there and nothing has been read, until what is yielded is called."""
    monkeypatch.setattr(snapshot, "_LOCK_SECONDS", 0.2)
    with ExitStack() as application:
        released: list[Callable[[], None]] = []

        def filters(*args: Any) -> dict[int, str]:
            if not released:
                released.append(application.enter_context(locked(settings, table)))
            return row_filters(*args)

        monkeypatch.setattr(snapshot, "row_filters", filters)

        def release() -> None:
            released[0]()

        yield release


def read_again(capture: Running) -> list[str]:
    """Return what capture said each time that `free` was read again."""
    return [line for line in capture.said if "public.free was read again" in line]


@pytest.mark.usefixtures("often")
def test_a_locked_table_holds_up_neither_the_stream_nor_what_is_read_beside_it(each_version: Settings) -> None:
    """Tables and partitions, captured and new; meanwhile capture starts, learns shapes, finds silent DDL and reads a table again."""
    settings = each_version
    tables = ("held", "free", "joined", "parts")
    prepare(
        settings,
        "CREATE TABLE held (id int PRIMARY KEY, n int)",
        "CREATE TABLE free (id int PRIMARY KEY, n int)",
        "CREATE TABLE parts (id int PRIMARY KEY, n int) PARTITION BY RANGE (id)",
        "CREATE TABLE low PARTITION OF parts FOR VALUES FROM (0) TO (10)",
        "INSERT INTO held VALUES (1, 1); INSERT INTO parts VALUES (1, 1)",
        "ALTER TABLE parts ADD COLUMN filled int DEFAULT 1",
    )
    with capturing(settings) as capture:
        capture.reach()
    execute(
        settings,
        "CREATE TABLE joined (id int PRIMARY KEY, n int)",
        "INSERT INTO joined VALUES (1, 1)",
        f"ALTER PUBLICATION {settings.publication} ADD TABLE joined WHERE (n > 0)",
        "CREATE TABLE high (id int PRIMARY KEY, n int, filled int)",
        "INSERT INTO high VALUES (11, 1)",
        "ALTER TABLE parts ATTACH PARTITION high FOR VALUES FROM (10) TO (20)",
        "ALTER TABLE held ADD COLUMN more int DEFAULT 5",
        *(f"INSERT INTO {table} VALUES (2, 2)" for table in tables),
    )
    with locked(settings, "held", "joined", "low", "high") as release, capturing(settings) as capture:
        assert {"public.held", "public.joined"} <= set(capture.reach().inexact)
        execute(settings, "ALTER TABLE free ALTER COLUMN n TYPE int USING n * 2")  # only the catalogue tells
        capture.hear("public.free was read again")
        execute(settings, "ALTER TABLE free ADD COLUMN more int DEFAULT 5", "INSERT INTO free VALUES (3, 3, 3)")
        capture.eventually("the stream tells too", lambda: capture.reach() and len(read_again(capture)) == 2)
        eventually("what waits says for what", lambda: "lock" in jobs(settings)["public.held"]["reason"])
        execute(settings, "INSERT INTO free VALUES (4, 4, 4)")
        inexact = capture.reach().inexact
        assert replay(settings, "public.free") == selected(settings, "free")
        assert "public.free" not in inexact
        assert {"public.held", "public.joined"} <= set(inexact)
        release()
        for table in ("held", "joined", "parts"):
            capture.hear(f"public.{table} was read again")
        capture.eventually("all is exact", lambda: capture.reach().inexact == ())
    for table in tables:
        assert replay(settings, f"public.{table}") == selected(settings, table)


def test_of_tables_that_were_locked_the_one_that_is_free_first_is_read_first(settings: Settings) -> None:
    prepare(settings, "CREATE TABLE held (id int PRIMARY KEY)", "CREATE TABLE soon (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.hear("streaming")
        with locked(settings, "held") as release, locked(settings, "soon") as release_soon:
            ask(settings, tables=["public.held", "public.soon"])
            eventually("both wait", lambda: all("lock" in said["reason"] for said in jobs(settings).values()))
            release_soon()
            capture.hear("public.soon was read again")
            assert jobs(settings)["public.held"]["phase"] == "waiting"
            release()
        capture.hear("public.held was read again")


@pytest.mark.usefixtures("often")
def test_a_large_value_of_a_locked_table_is_taken_from_the_log(settings: Settings) -> None:
    """It was left alone by an update and is not remembered; of a table that is to be read again the update is left out until then."""
    docs = "(id int PRIMARY KEY, n int, big text); ALTER TABLE {0} ALTER COLUMN big SET STORAGE EXTERNAL; "
    prepare(
        settings,
        *(
            f"CREATE TABLE {table} {docs.format(table)} INSERT INTO {table} VALUES (1, 1, '{'W' * 5000}')"
            for table in ("held", "doubted")
        ),
    )
    execute(settings, *(f"ALTER TABLE {table} REPLICA IDENTITY DEFAULT" for table in ("held", "doubted")))
    with capturing(settings) as capture:
        capture.reach()
    execute(
        settings,
        "UPDATE held SET n = 2",
        "ALTER TABLE doubted ALTER COLUMN n TYPE bigint USING n + 1",
        "UPDATE doubted SET n = n + 1",
    )
    with locked(settings, "held", "doubted") as release, capturing(settings) as capture:
        assert capture.reach().inexact == ("public.doubted",)
        assert replay(settings, "public.held") == {b'{"id":1}': {"id": 1, "n": 2, "big": "W" * 5000}}
        assert replay(settings, "public.doubted") == {b'{"id":1}': {"id": 1, "n": 1, "big": "W" * 5000}}
        release()
        capture.hear("public.doubted was read again")
        capture.eventually("all is exact", lambda: capture.reach().inexact == ())
    for table in ("held", "doubted"):
        assert replay(settings, f"public.{table}") == selected(settings, table)


def test_what_was_left_out_before_a_kill_is_read_though_the_pass_was_beyond_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cut amid the transaction names the table as inexact: it says, too, that the pass begins again."""
    settings, begin, chunks = replace(settings, cut_records=10), ChunkReader.begin, iter(range(10))
    prepare(
        settings,
        "CREATE TABLE docs (id int PRIMARY KEY, n int, big text); ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL",
        "INSERT INTO docs SELECT i, i, repeat('W', 5000) FROM generate_series(1, 15) i",
        "CREATE TABLE others (id int PRIMARY KEY)",
    )
    execute(settings, "ALTER TABLE docs REPLICA IDENTITY DEFAULT")
    monkeypatch.setattr(toast, "_REREAD_SECONDS", 0.2)
    with monkeypatch.context() as patch, capturing(settings) as capture:
        patch.setattr(ChunkReader, "begin", lambda *args: Future() if next(chunks) else begin(*args))
        capture.hear("streaming")
        ask(settings, tables=["public.docs"])
        eventually("it has read some", lambda: jobs(settings)["public.docs"]["phase"] == "reading")
    change = "UPDATE docs SET n = -1 WHERE id < 5; INSERT INTO others SELECT generate_series(1, 30)"
    execute(settings, f"BEGIN; {change}; COMMIT")
    with locked(settings, "docs"):
        dying = Running(settings, DyingOfCuts(settings, Life(), 1, after=True))
        dying.join()
    assert isinstance(dying.error, Died)
    assert sum("inexact" in line for line in dying.said) == 1, dying.said
    half = Log(settings).newest_checkpoint()
    assert half
    assert half.partial
    assert half.inexact == ("public.docs",)
    with capturing(settings) as capture:
        capture.eventually("all is exact", lambda: capture.reach().inexact == ())
    assert replay(settings, "public.docs") == selected(settings, "docs")


def test_a_lock_that_waits_for_the_snapshot_does_not_stop_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application asks for it when one connection has begun to read the table, and the other has not: that one queues behind it."""
    monkeypatch.setattr(copies, "PAGES", 4)
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n int)", "CREATE TABLE zeros (id int PRIMARY KEY)")
    execute(settings, "INSERT INTO items SELECT i, i FROM generate_series(1, 9000) i", "INSERT INTO zeros VALUES (0)")
    lock = "BEGIN; LOCK TABLE items IN ACCESS EXCLUSIVE MODE; INSERT INTO zeros VALUES (1); COMMIT"
    application = threading.Thread(target=execute, args=(settings, lock))
    begun: list[str] = []

    class Copy(copies.Copy):
        def __init__(self, connection: catalog.Connection, piece: copies.Piece) -> None:
            begun.append(piece.table.name)
            if len(begun) == 2:
                asked = "SELECT 1 FROM pg_locks WHERE relation = 'items'::regclass AND"
                eventually("the first connection reads", lambda: rows(settings, f"{asked} granted"))
                application.start()
                eventually("the application waits", lambda: rows(settings, f"{asked} NOT granted"))
            super().__init__(connection, piece)

    monkeypatch.setattr(snapshot, "Copy", Copy)
    with capturing(settings) as capture:
        capture.hear("snapshot complete")
        application.join()
        capture.reach()
    assert begun[:2] == ["items", "items"]
    for table in ("items", "zeros"):
        assert replay(settings, f"public.{table}") == selected(settings, table)


def reported(settings: Settings) -> str:
    """Return what capture says of itself that it waits for."""
    return Control(Log(settings)).reports()["capture"][0].reason


@pytest.mark.parametrize("stopped", [False, True], ids=["released", "stopped"])
def test_a_table_that_is_locked_when_the_snapshot_comes_to_it_is_read_last(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, *, stopped: bool
) -> None:
    """The others are read meanwhile, and capture can be stopped. What it waits for is reported until it has it."""
    codes: list[str] = []
    phase = Progress.phase

    def seen(of: Progress, name: str, error: HeadraceError | None = None, **more: Any) -> None:
        codes.extend([error.code if error else ""] * (name == "snapshot"))
        phase(of, name, error, **more)

    monkeypatch.setattr(Progress, "phase", seen)
    prepare(
        settings,
        "CREATE TABLE held (id int PRIMARY KEY, n int); INSERT INTO held VALUES (1, 1)",
        "CREATE TABLE items (id int PRIMARY KEY, n int); INSERT INTO items SELECT i, i FROM generate_series(1, 9000) i",
    )
    with locked_late(settings, "held", monkeypatch) as release:
        running = Running(settings)
        try:
            running.hear("snapshot of public.items: 9000 rows")
            running.hear("snapshot of public.held waits")
            running.eventually("it is reported", lambda: "waits for public.held: " in reported(settings))
            if not stopped:
                release()
                running.reach()
        finally:
            running.stop()
    assert running.error is None
    if not stopped:
        assert codes[-1] == ""
        for table in ("held", "items"):
            assert replay(settings, f"public.{table}") == selected(settings, table)


def test_a_filtered_table_that_is_locked_when_the_snapshot_begins_is_waited_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its filter says is asked of Postgres under its lock; no slot can be made while a transaction has one already."""
    prepare(settings, "CREATE TABLE held (id int PRIMARY KEY, n int); INSERT INTO held VALUES (1, 1), (2, 2)")
    execute(settings, f"ALTER PUBLICATION {settings.publication} SET TABLE held WHERE (id > 1)")
    with locked_late(settings, "held", monkeypatch) as release, capturing(settings) as capture:
        capture.hear("[table-locked]")
        release()
        capture.reach()
    assert replay(settings, "public.held") == {b'{"id":2}': {"id": 2, "n": 2}}
