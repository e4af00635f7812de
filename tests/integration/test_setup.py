"""Setup of a source: which tables are captured, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import orjson
import psycopg
import pytest
import typer
from typer.testing import CliRunner

from headrace.errors import Misconfigured, Transient
from headrace.settings import Settings
from headrace_capture import catalog, identities, setup
from headrace_capture import connection as connecting
from headrace_capture.cli import setup as setup_command
from headrace_ops.postgres import Postgres
from tests.fixtures.capture import capturing, eventually, prepare
from tests.fixtures.sources import Connection, broken, identity, prepared, published, streaming
from tests.fixtures.versions import NEWEST


def test_every_table_with_a_key_is_published_and_a_second_run_has_nothing_to_do(
    db: Connection, source: Settings
) -> None:
    db.execute(
        "CREATE SCHEMA s; CREATE TABLE s.a (id int PRIMARY KEY, n int); CREATE TABLE public.b (x text, y int, PRIMARY KEY (y, x))"
    )
    made = prepared(db, source)
    assert {table.full_name: table.key for table in made.tables} == {"s.a": ("id",), "public.b": ("y", "x")}
    assert published(db, source) == {"s.a": ["id", "n"], "public.b": ["x", "y"]}
    assert setup.plan(db, source, []).statements == []


def test_a_new_table_is_added_by_the_next_run(db: Connection, source: Settings) -> None:
    db.execute("CREATE TABLE public.a (id int PRIMARY KEY)")
    prepared(db, source)
    db.execute("CREATE TABLE public.b (id int PRIMARY KEY)")
    assert len(prepared(db, source).statements) == 2, "it is added and remembered"
    assert sorted(published(db, source)) == ["public.a", "public.b"]


def test_what_somebody_took_out_stays_out_until_it_is_named(db: Connection, source: Settings) -> None:
    """`docker compose up` runs setup each time: it would publish, and read, the whole table again."""
    db.execute("CREATE TABLE public.a (id int PRIMARY KEY); CREATE TABLE public.b (id int PRIMARY KEY)")
    prepared(db, source)
    db.execute(f"ALTER PUBLICATION {source.publication} DROP TABLE public.b".encode())
    made = prepared(db, source)
    assert ([left.table for left in made.left_out], made.statements) == (["public.b"], [])
    assert "headrace setup --table public.b" in made.left_out[0].remedy
    db.execute("ALTER TABLE public.b RENAME TO c; CREATE TABLE public.b (id int PRIMARY KEY)")
    prepared(db, source)
    assert sorted(published(db, source)) == ["public.a", "public.b"], "another table"
    prepared(db, source, "public.c")
    assert sorted(published(db, source)) == ["public.a", "public.b", "public.c"]
    assert (prepared(db, source).left_out, setup.plan(db, source, []).statements) == ([], [])


def test_a_captured_table_that_is_gone_or_has_lost_its_key_keeps_no_other_from_being_named(
    db: Connection, source: Settings
) -> None:
    """`docker compose up` names all each time, and capture starts only after setup: the slot would hold WAL for all tables."""
    names = ["a", "b", "public.c", "d"]
    for name in names:
        db.execute(f"CREATE TABLE {'public.' * ('.' not in name)}{name} (id int PRIMARY KEY)".encode())
    prepared(db, source, *names)
    db.execute("DROP TABLE public.b; ALTER TABLE public.c DROP CONSTRAINT c_pkey")
    db.execute("CREATE TABLE public.p (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    db.execute("ALTER TABLE public.p ATTACH PARTITION public.d FOR VALUES FROM (0) TO (10)")
    for _ in range(2):
        made = prepared(db, source, *names)
        reasons = {left.table: left.reason for left in made.left_out}
        assert (made.statements, list(reasons)) == ([], ["public.b", "public.c"])
        assert ("nothing has that name" in reasons["public.b"], "S10" in reasons["public.c"]) == (True, True)
    prepared(db, source, *names, "p")
    (_, gone, _) = setup.plan(db, source, names).left_out
    assert "partition of public.p" in gone.reason
    db.execute(f"ALTER PUBLICATION {source.publication} DROP TABLE public.c; CREATE TABLE public.b (id int)".encode())
    made = prepared(db, source, *names)
    assert [(left.table, "S10" in left.reason) for left in made.left_out[1:]] == [
        ("public.b", True),
        ("public.c", True),
    ]
    db.execute("ALTER TABLE public.a RENAME TO e")
    prepared(db, source, "e")
    db.execute("DROP TABLE public.e")
    assert [left.table for left in setup.plan(db, source, ["a", "e"]).left_out] == ["public.a", "public.e"]
    with pytest.raises(Misconfigured, match=r"no permanent table public\.never"):
        setup.plan(db, source, [*names, "never"])


def test_the_only_captured_table_may_be_taken_out_or_gone(db: Connection, source: Settings) -> None:
    db.execute("CREATE TABLE public.a (id int PRIMARY KEY); CREATE TABLE public.k (x int)")
    prepared(db, source)
    db.execute(f"ALTER PUBLICATION {source.publication} DROP TABLE public.a".encode())
    made = prepared(db, source)
    assert ([left.table for left in made.left_out], made.statements) == (["public.a", "public.k"], [])
    db.execute("DROP TABLE public.a")
    made = prepared(db, source, "a")
    assert ([left.table for left in made.left_out], made.statements) == (["public.a"], [])
    db.execute(f"DROP PUBLICATION {source.publication}".encode())
    with pytest.raises(Misconfigured, match=r"public\.k: it has no usable key \(S10\)") as refused:
        setup.plan(db, source, [])
    assert "ADD PRIMARY KEY" in refused.value.remedy


def test_in_a_database_made_from_a_dump_what_was_taken_out_is_known_by_its_name(
    db: Connection, source: Settings, fresh_database: Callable[[], str]
) -> None:
    """The oids that are remembered mean other tables there."""
    for table in ("a", "old", "late"):
        db.execute(f"CREATE TABLE public.{table} (id int PRIMARY KEY)".encode())
    prepared(db, source)
    db.execute("ALTER TABLE public.old RENAME TO b")
    prepared(db, source)
    db.execute(f"ALTER PUBLICATION {source.publication} DROP TABLE public.b, public.late".encode())
    ((b, said),) = db.execute(
        "SELECT 'public.b'::regclass::oid::int8, obj_description(oid, 'pg_publication') FROM pg_publication"
    ).fetchall()
    with catalog.connect(fresh_database()) as restored:
        for table in ("b", "a", "c"):
            restored.execute(f"CREATE TABLE public.{table} (id int PRIMARY KEY)".encode())
        ((c,),) = restored.execute("SELECT 'public.c'::regclass::oid::int8").fetchall()
        remembered = psycopg.sql.Literal(said.replace(str(b), str(c))).as_string()
        restored.execute(f"CREATE PUBLICATION {source.publication} FOR TABLE public.a".encode())
        restored.execute(f"COMMENT ON PUBLICATION {source.publication} IS {remembered}".encode())
        for _ in range(2):
            assert [left.table for left in prepared(restored, source).left_out] == ["public.b"]
            assert sorted(published(restored, source)) == ["public.a", "public.c"]
            assert [left.table for left in setup.plan(restored, source, ["old"]).left_out] == ["public.old"]
        assert setup.plan(restored, source, []).statements == []
        restored.execute("CREATE TABLE public.late (id int PRIMARY KEY)")
        assert [left.table for left in prepared(restored, source).left_out] == ["public.b", "public.late"]
        assert sorted(published(restored, source)) == ["public.a", "public.c"]


def test_without_apply_nothing_changes(db: Connection, source: Settings) -> None:
    db.execute("CREATE TABLE public.a (id int PRIMARY KEY, big text)")
    assert setup.plan(db, source, []).statements
    assert db.execute("SELECT FROM pg_publication").fetchall() == []
    assert identity(db, "public.a") == "d"


def test_s8_a_generated_key_that_our_publication_sends_no_more_is_told_and_mended(each_source: Settings) -> None:
    """Of 18 on: before it sends none, and nothing fails."""
    with catalog.connect(each_source.dsn) as db:
        key = "low int GENERATED ALWAYS AS (n + 1) STORED PRIMARY KEY"
        db.execute(f"CREATE TABLE public.mails (n int, {key}); CREATE TABLE public.t (id int PRIMARY KEY)".encode())
        prepared(db, each_source)
        assert identities.failing(db, each_source.publication) == []
        if db.info.server_version < catalog.GENERATED:
            return
        ours = psycopg.sql.Identifier(each_source.publication).as_string()
        db.execute(f"ALTER PUBLICATION {ours} SET (publish_generated_columns = none)".encode())
        assert broken(db, ["mails"]) == ["mails"]
        (mend,) = identities.failing(db, each_source.publication)
        db.execute(mend.encode())
        assert broken(db, ["mails"]) == []
        assert identities.failing(db, each_source.publication) == []


def test_a_locked_table_stops_setup_soon_and_whole(db: Connection, source: Settings) -> None:
    db.execute("CREATE TABLE public.a (id int PRIMARY KEY, big text)")
    made = setup.plan(db, source, [])
    with psycopg.connect(source.dsn) as other:
        other.execute("LOCK TABLE public.a IN ACCESS SHARE MODE")
        with pytest.raises(Transient) as refused:
            setup.apply(db, made)
    assert refused.value.code == "table-locked"
    assert db.execute("SELECT FROM pg_publication").fetchall() == []


def test_nothing_is_told_to_be_applied_before_it_is(db: Connection, source: Settings) -> None:
    db.execute("CREATE TABLE public.a (id int PRIMARY KEY, big text)")
    app = typer.Typer()
    app.command()(setup_command)
    with psycopg.connect(source.dsn) as other:
        other.execute("LOCK TABLE public.a IN ACCESS SHARE MODE")
        ended = CliRunner().invoke(app, ["--dsn", source.dsn, "--json", "--apply"])
    assert isinstance(ended.exception, Transient)
    assert (ended.exception.code, ended.stdout) == ("table-locked", "")


def test_the_command_prints_every_statement_and_json(
    source: Settings, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.execute('CREATE TABLE public."Odd.Name" (id int PRIMARY KEY, big text)')
    for name in ("source", "slot", "publication"):
        monkeypatch.setenv(f"HEADRACE_{name.upper()}", source.source)
    app = typer.Typer()
    app.command()(setup_command)
    run = CliRunner()
    text = run.invoke(app, ["--dsn", source.dsn]).output
    said = orjson.loads(run.invoke(app, ["--dsn", source.dsn, "--json", "--apply"]).output)
    assert said["applied"]
    assert 'ALTER TABLE "public"."Odd.Name" REPLICA IDENTITY FULL' in said["statements"]
    assert all(f"{statement};" in text for statement in said["statements"])
    assert "Nothing to do" in run.invoke(app, ["--dsn", source.dsn, "--apply"]).output
    db.execute("CREATE TABLE public.a (id int PRIMARY KEY); CREATE TABLE public.b (id int PRIMARY KEY)")
    for given, wanted in {"a, public.b": ["a", "b"], "a": ["a"], "*": ["a", "b"]}.items():
        said = orjson.loads(run.invoke(app, ["--dsn", source.dsn, "--json", "--table", given]).output)
        assert [each["table"] for each in said["tables"]] == ["public.Odd.Name", *(f"public.{name}" for name in wanted)]
    assert isinstance(run.invoke(app, ["--dsn", source.dsn, "--table", ""]).exception, Misconfigured)
    db.execute('CREATE TABLE public."a,b" (id int PRIMARY KEY)')
    for given, wanted in {"a,b": ["a,b"], "b,a": ["a", "b"], "public.a,b": ["a,b"]}.items():
        said = orjson.loads(run.invoke(app, ["--dsn", source.dsn, "--json", "--table", given]).output)
        assert [each["table"] for each in said["tables"]] == ["public.Odd.Name", *(f"public.{name}" for name in wanted)]
    with streaming(source):
        assert "Done. Capture runs" in run.invoke(app, ["--dsn", source.dsn, "--apply"]).output
        assert "is ready. Capture runs" in run.invoke(app, ["--dsn", source.dsn, "--apply"]).output


def test_tables_that_inherit_are_not_published_with_their_parent(db: Connection, source: Settings) -> None:
    """They have no key of its, and their UPDATE and DELETE would fail (I1)."""
    db.execute(
        "CREATE TABLE public.parent (id int PRIMARY KEY, n int); CREATE TABLE public.child () INHERITS (public.parent)"
    )
    db.execute("INSERT INTO public.child VALUES (1, 1)")
    assert [left.table for left in prepared(db, source).left_out] == ["public.child"]
    assert sorted(published(db, source)) == ["public.parent"]
    db.execute("UPDATE public.parent SET n = 2; DELETE FROM public.child")


def test_a_schema_with_a_dot_in_its_name_is_left_out(db: Connection, source: Settings) -> None:
    """Its tables could not be told from another schema's."""
    db.execute(
        'CREATE SCHEMA "a.b"; CREATE TABLE "a.b".c (id int PRIMARY KEY); CREATE TABLE public."b.c" (id int PRIMARY KEY)'
    )
    made = prepared(db, source)
    assert [left.table for left in made.left_out] == ["a.b.c"]
    assert [table.full_name for table in made.tables] == ["public.b.c"]


def test_a_table_whose_topic_kafka_would_not_take_is_left_out(db: Connection, source: Settings) -> None:
    """Each of its characters is escaped; with one less than fits it is captured."""
    fits = (setup.LONGEST_TOPIC - len(source.source) - len(".public.")) // len("_u8868_")
    db.execute(f"CREATE SCHEMA {'表' * 20}; CREATE TABLE {'表' * 20}.{'表' * 20} (id int PRIMARY KEY)".encode())
    db.execute(f"CREATE TABLE public.{'表' * min(fits, 21)} (id int PRIMARY KEY)".encode())
    made = prepared(db, source)
    (left,) = made.left_out
    assert "too long for Kafka" in left.reason
    assert len(made.tables) == 1


def test_of_two_tables_whose_topics_kafka_takes_for_one_the_second_is_left_out(
    db: Connection, source: Settings
) -> None:
    """Kafka writes "." as "_" where it counts topics: what is published keeps its topic, whichever comes first by name."""
    db.execute(
        "CREATE SCHEMA app_user; CREATE TABLE app_user.log (id int PRIMARY KEY); CREATE TABLE app_user.x (n int)"
    )
    prepared(db, source)
    db.execute("CREATE SCHEMA app; CREATE TABLE app.user_log (id int PRIMARY KEY); CREATE TABLE app.user_x (n int)")
    made = prepared(db, source)
    assert [table.full_name for table in made.tables] == ["app_user.log"]
    assert {left.table: left.reason for left in made.left_out}["app.user_log"].endswith("app_user.log")
    with pytest.raises(Misconfigured, match=r"app_user\.log"):
        setup.plan(db, source, ["app.user_log"])
    with pytest.raises(Misconfigured, match=r"app_user\.x"):
        setup.plan(db, source, [], appended=["app_user.x", "app.user_x"])


def test_setup_says_when_a_failover_could_lose_what_was_published(
    each_postgres: Postgres, each_source: Settings
) -> None:
    """A standby that promotion could choose may lack what is in the log, unless Postgres waits for it (S2)."""

    def warnings() -> list[str]:
        with closing(catalog.connect(each_source.dsn)) as connection:
            return setup.plan(connection, each_source, []).warnings

    with psycopg.connect(each_postgres.address(), autocommit=True) as server:
        with psycopg.connect(each_source.dsn) as application:
            application.execute("CREATE TABLE t (id int PRIMARY KEY)")
        assert warnings() == []
        server.execute("SELECT pg_create_physical_replication_slot('standby')")
        try:
            (warning,) = warnings()
            if server.info.server_version < 170000:
                assert "use 17 or newer" in warning
                return
            assert "synchronized_standby_slots is empty" in warning
            server.execute("ALTER SYSTEM SET synchronized_standby_slots = 'standby'")
            server.execute("SELECT pg_reload_conf()")
            eventually("it is set", lambda: warnings() == [])
        finally:
            if server.info.server_version >= 170000:
                server.execute("ALTER SYSTEM RESET synchronized_standby_slots")
                server.execute("SELECT pg_reload_conf()")
            server.execute("SELECT pg_drop_replication_slot('standby')")


def test_of_a_server_that_may_keep_changes_of_a_new_table_back_setup_and_capture_warn(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its minor version: nothing in the stream tells."""
    last = (150012, 150013), (160008, 160009), (170004, 170005)
    assert all(connecting.silent_joins(bad) and not connecting.silent_joins(good) for bad, good in last)
    prepare(settings, "CREATE TABLE t (id int PRIMARY KEY)")
    monkeypatch.setattr(connecting, "_MENDED", {int(NEWEST): 99})
    with closing(catalog.connect(settings.dsn)) as db:
        (warning,) = setup.plan(db, settings, []).warnings
    assert f"Postgres {NEWEST}." in warning
    with capturing(settings) as capture:
        capture.hear(f"warning: {warning}")
