"""Capture by a role of its own, which may read what setup let it read and nothing else: partitions have rights of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import psycopg
import pytest

from headrace.control import Control
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.settings import Settings
from headrace_capture import catalog, setup, watch
from headrace_ops.postgres import Postgres
from tests.fixtures.capture import capturing, changes, eventually, execute, replay, rows, selected
from tests.fixtures.resnapshots import ask
from tests.fixtures.shelf import command
from tests.fixtures.silent import exact

pytestmark = pytest.mark.usefixtures("often")

PARTS = (
    "CREATE SCHEMA s",
    "CREATE TABLE parts (id int PRIMARY KEY, n int) PARTITION BY RANGE (id)",
    "CREATE TABLE s.low PARTITION OF parts FOR VALUES FROM (0) TO (10)",
    "CREATE TABLE high PARTITION OF parts FOR VALUES FROM (10) TO (20)",
    "INSERT INTO parts SELECT i, i FROM generate_series(0, 19) i",
    "CREATE TABLE items (id int PRIMARY KEY, n int)",
    "INSERT INTO items VALUES (1, 1), (2, 2)",
)
NEXT = "CREATE TABLE next PARTITION OF parts FOR VALUES FROM (20) TO (30)"
ATTACH = (
    "CREATE TABLE more (id int PRIMARY KEY, n int)",
    "INSERT INTO more VALUES (35, 1)",
    "ALTER TABLE parts ATTACH PARTITION more FOR VALUES FROM (30) TO (40)",
)
TWICE = "ALTER TABLE items ALTER COLUMN n TYPE int USING n * 2"


@pytest.fixture
def theirs(settings: Settings) -> Iterator[Settings]:
    """Settings of a role that nobody has given anything."""
    role = f"{settings.source}_role"
    execute(settings, f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    yield replace(settings, dsn=psycopg.conninfo.make_conninfo(settings.dsn, user=role, password="x"))
    execute(settings, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def prepare(settings: Settings, *statements: str) -> None:
    """Run statements, then what `headrace setup --role --apply` does; a second time there is nothing left to do."""
    execute(settings, *statements)
    role = f"{settings.source}_role"
    with closing(catalog.connect(settings.dsn)) as connection:
        setup.apply(connection, setup.plan(connection, settings, [], role))
        assert setup.plan(connection, settings, [], role).statements == []


@pytest.fixture
def admit(postgres: Postgres, settings: Settings) -> Iterator[Callable[..., None]]:
    """Write lines before all others of pg_hba.conf: call it with them; none are left afterwards."""
    file = postgres.data / "pg_hba.conf"
    before = file.read_text()

    def write(*lines: str) -> None:
        file.write_text("\n".join([*lines, before]))
        execute(settings, "SELECT pg_reload_conf()")
        wanted = "SELECT count(*) FROM pg_hba_file_rules WHERE error IS NULL"
        assert rows(settings, wanted)[0][0] == 2 + len(lines)

    yield write
    write()


def test_the_line_of_the_database_admits_capture_and_one_of_replication_is_not_needed(
    settings: Settings, theirs: Settings, admit: Callable[..., None]
) -> None:
    """Whoever had that could copy the whole server."""
    prepare(settings, *PARTS)
    role = f"{settings.source}_role"
    nothing = f"host all,replication {role} 127.0.0.1/32 reject"
    admit(nothing)
    error = eventually("pg_hba.conf is read again", lambda: refusal(theirs))
    assert (error.code, "line too" in error.remedy) == ("postgres-refused", True)
    admit(f"host {settings.source} {role} 127.0.0.1/32 scram-sha-256", nothing)
    eventually("pg_hba.conf is read again", lambda: refusal(theirs) is None)
    with capturing(theirs) as capture:
        capture.reach()
    assert replay(settings, "public.items") == selected(settings, "items")
    with pytest.raises(psycopg.OperationalError, match="rejects replication connection"):
        psycopg.connect(theirs.dsn, replication="true")


def refusal(settings: Settings) -> Misconfigured | None:
    """Return why Postgres lets nobody in, if it does not."""
    try:
        catalog.connect(settings.dsn).close()
    except Misconfigured as error:
        return error
    return None


NAMES = {
    "*": True,
    '"headrace", capture': False,
    "ANY 1 (*)": True,
    'FIRST 1 ("head""race capture", "any")': False,
    '2 (other, "Headrace CAPTURE")': True,
    "1 (_, captures)": False,
    '"first", x1, "*"': True,
}
"""Whether it counts capture among the standbys."""


def test_capture_that_is_a_synchronous_standby_is_told(settings: Settings, theirs: Settings) -> None:
    """Each commit waits for Kafka then (I1). Its own role sees it, as Postgres decides it, and so does setup."""
    prepare(settings, *PARTS)
    query = (
        "SELECT current_setting('synchronous_standby_names'), sync_priority > 0 FROM pg_stat_replication "
        "WHERE application_name = 'headrace capture'"
    )

    def warned() -> bool:
        with closing(catalog.connect(settings.dsn)) as connection:
            return any("counts capture" in warning for warning in setup.plan(connection, settings, []).warnings)

    with (
        psycopg.connect(settings.dsn, autocommit=True) as local,
        capturing(replace(theirs, heartbeat_ms=100)) as capture,
    ):
        local.execute("SET synchronous_commit = local")
        try:
            capture.reach()
            for names, counts in NAMES.items():
                local.execute(psycopg.sql.SQL("ALTER SYSTEM SET synchronous_standby_names = {}").format(names))
                local.execute("SELECT pg_reload_conf()")
                decided = [(names, counts)]
                capture.eventually(f"Postgres knows {names}", lambda decided=decided: rows(settings, query) == decided)
                assert warned() is counts, names
                if names == "*":
                    assert "(*) counts capture" in capture.hear("warning: synchronous_standby_names")
                    capture.eventually("status tells it", lambda: "counts capture" in status(settings))
        finally:
            local.execute("ALTER SYSTEM RESET synchronous_standby_names")
            local.execute("SELECT pg_reload_conf()")
        capture.eventually("status is content", lambda: status(settings) == "ok\n")


@pytest.mark.parametrize("prepared", [False, True], ids=["open", "prepared"])
def test_a_stream_that_stands_for_a_lock_in_postgres_is_told(
    settings: Settings, theirs: Settings, monkeypatch: pytest.MonkeyPatch, prepared: bool
) -> None:
    """Its decoder looks at the type of a row, which a transaction that is not over has altered."""
    monkeypatch.setattr(watch, "LOCKED_SECONDS", 0.0)
    prepare(settings, "CREATE TYPE pair AS (a int)", "CREATE TABLE items (id int PRIMARY KEY, p pair)")
    with capturing(theirs) as capture:
        capture.reach()
    execute(settings, "INSERT INTO items VALUES (1, '(1)')")
    with psycopg.connect(settings.dsn, autocommit=True) as altering:
        pid, name = altering.info.backend_pid, settings.source
        altering.execute("BEGIN; ALTER TYPE pair ADD ATTRIBUTE b int")
        if prepared:
            altering.execute(psycopg.sql.SQL("PREPARE TRANSACTION {}").format(name))
        with capturing(replace(theirs, heartbeat_ms=100)) as capture:
            said = capture.hear("warning: the stream stands")
            assert ("pg_prepared_xacts" if prepared else f"pid IN ({pid})") in said
            capture.eventually("status tells it", lambda: "the stream stands" in status(settings))
            altering.execute(psycopg.sql.SQL("ROLLBACK PREPARED {}" if prepared else "ROLLBACK").format(name))
            capture.eventually("status is content", lambda: status(settings) == "ok\n")
            capture.reach()
    assert [row["p"] for row in replay(settings, "public.items").values()] == ["(1)"]


def status(settings: Settings) -> str:
    return command(settings, "status", "--check", "capture").output


@pytest.mark.parametrize("secure", ["", "ALTER TABLE high ENABLE ROW LEVEL SECURITY"], ids=["rights", "row security"])
def test_the_partitions_can_be_read_by_the_role_that_setup_names(
    settings: Settings, theirs: Settings, secure: str
) -> None:
    """The initial snapshot reads each partition by its own name, and Postgres asks for a right to that."""
    prepare(settings, *PARTS, *filter(None, [secure]))
    with capturing(theirs) as capture:
        capture.reach()
    assert replay(settings, "public.parts") == selected(settings, "parts")


def test_a_new_partition_that_may_not_be_read_does_not_hide_what_the_catalogue_says_of_others(
    settings: Settings, theirs: Settings
) -> None:
    """S12: whoever makes partitions grants the role of capture nothing, and rows are read through the root."""
    prepare(settings, *PARTS)
    with capturing(theirs) as capture:
        capture.reach()
        execute(settings, NEXT, TWICE)
        exact(settings, capture, "public.items")
        assert not any("public.parts" in line for line in capture.said if "inexact" in line), "it is empty"
        execute(settings, *ATTACH, "INSERT INTO parts VALUES (20, 1)")
        exact(settings, capture, "public.parts")


def test_a_table_that_joined_and_could_not_be_read_is_read_when_it_is_asked_for_again(
    settings: Settings, theirs: Settings
) -> None:
    """It has no shape yet, and capture itself named the command."""
    prepare(settings, *PARTS)
    with capturing(theirs) as capture:
        capture.reach()
        execute(settings, "CREATE TABLE lands (id int PRIMARY KEY, n int)", "INSERT INTO lands VALUES (1, 1)")
        execute(settings, f"ALTER PUBLICATION {settings.publication} ADD TABLE lands")
        assert "headrace resnapshot public.lands" in capture.hear("public.lands cannot be read again")
        execute(settings, f"GRANT SELECT ON lands TO {settings.source}_role")
        assert ask(settings, tables=["public.lands"]) == {"jobs": ["public.lands"]}
        capture.hear("public.lands was read again")
        capture.reach()
    assert replay(settings, "public.lands") == selected(settings, "lands")


def test_a_catalogue_that_cannot_be_read_is_told_in_the_status(settings: Settings, theirs: Settings) -> None:
    prepare(settings, *PARTS)
    role = f"{settings.source}_role"

    def told() -> str:
        found = Control(Log(settings)).reports().get("capture", [])
        return str(found[-1].facts.get("catalogue", "")) if found else ""

    with capturing(theirs) as capture:
        capture.reach()
        eventually("it is well", lambda: told() == "ok")
        execute(
            settings,
            f"ALTER ROLE {role} CONNECTION LIMIT 0",
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}' AND application_name = 'headrace catalogue'",
        )
        # First it says that its connection was ended, which names no role.
        eventually("it is told, by its name", lambda: (said := told()).startswith("failed") and role in said)
        execute(settings, f"ALTER ROLE {role} CONNECTION LIMIT -1")
        eventually("it is well again", lambda: told() == "ok")


def test_a_row_is_read_again_by_a_key_whose_type_is_in_a_schema_that_the_role_may_not_look_into(
    settings: Settings, theirs: Settings
) -> None:
    """Somebody took away what setup gave; the operators of an enum are built in."""
    execute(settings, "CREATE SCHEMA kinds; CREATE TYPE kinds.mood AS ENUM ('sad', 'glad')")
    prepare(
        settings,
        "CREATE TABLE docs (id kinds.mood PRIMARY KEY, n int, big text); ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL",
        "INSERT INTO docs VALUES ('glad', 0, repeat('x', 5000))",
    )
    execute(
        settings, "ALTER TABLE docs REPLICA IDENTITY DEFAULT", f"REVOKE ALL ON SCHEMA kinds FROM {settings.source}_role"
    )
    with capturing(theirs) as capture:
        capture.hear("streaming")
        execute(settings, "UPDATE docs SET n = 1")
        capture.reach()
    assert [(c.row, c.read) for c in changes(settings, "public.docs")][-1] == (
        {"id": "glad", "n": 1, "big": "x" * 5000},
        "reread",
    )


def test_rows_are_read_again_by_keys_whose_types_are_in_schemas_of_their_own(
    settings: Settings, theirs: Settings
) -> None:
    """A value of a type is named with its schema, and below a domain the operators are in another one."""
    execute(settings, "CREATE SCHEMA kinds; CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext")
    prepare(
        settings,
        "CREATE DOMAIN kinds.name AS ext.citext",
        "CREATE TABLE people (name kinds.name PRIMARY KEY, n int)",
        "INSERT INTO people SELECT i, i FROM generate_series(1, 30) i",
    )
    with capturing(replace(theirs, cut_records=10)) as capture:
        capture.hear("streaming")
        ask(settings, tables=["public.people"])
        capture.hear("people was read again: 30 rows")
        ask(settings, tables=["public.people"], key={"name": "7"})
        capture.hear('{"name":"7"} was read again: 1 rows')
