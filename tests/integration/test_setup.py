"""Setup and teardown of a source: what is captured, what never breaks the application (S8-S10), and that nothing stays."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import orjson
import psycopg
import pytest
import typer
from psycopg import errors as pg
from typer.testing import CliRunner

from headrace.errors import Misconfigured, Transient
from headrace.settings import Settings
from headrace_capture import catalog, identities, setup, teardown
from headrace_capture import connection as connecting
from headrace_capture.cli import setup as setup_command
from headrace_capture.slot import slot_facts
from headrace_ops.postgres import Postgres
from headrace_verify import postgres as postgres_of_verify
from tests.fixtures.capture import capturing, eventually, prepare
from tests.fixtures.versions import NEWEST

Connection = psycopg.Connection[tuple[Any, ...]]
PARTITION = "CREATE TABLE public.{} PARTITION OF public.parts FOR VALUES FROM ({}) TO ({})"
LONG = "repeat(md5('x'), 400)"


@pytest.fixture
def source(fresh_database: Callable[[], str]) -> Settings:
    """Settings of an empty database."""
    dsn = fresh_database()
    name = dsn.rpartition("/")[2]
    return replace(Settings(), source=name, dsn=dsn, slot=name, publication=name)


@pytest.fixture
def db(source: Settings) -> Iterator[Connection]:
    """A connection with headrace's session settings."""
    with catalog.connect(source.dsn) as connection:
        yield connection


def prepared(db: Connection, source: Settings, *names: str) -> setup.Plan:
    """Run setup; return its plan."""
    made = setup.plan(db, source, list(names))
    setup.apply(db, made)
    return made


def identity(db: Connection, table: str) -> str:
    """Return a table's replica identity."""
    row = db.execute("SELECT relreplident::text FROM pg_class WHERE oid = %s::regclass", [table]).fetchone()
    assert row
    return str(row[0])


def published(db: Connection, source: Settings) -> dict[str, list[str]]:
    """Return the published columns by table."""
    return {t.full_name: [c.name for c in t.published] for t in catalog.published_tables(db, source.publication)}


@contextmanager
def streaming(source: Settings) -> Iterator[None]:
    """Make the slot, and read it as capture does."""
    with catalog.connect(source.dsn) as db:
        db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [source.slot])
    with closing(catalog.connect_replication(source.dsn)) as reading:
        reading.pgconn.exec_(
            f"START_REPLICATION SLOT {source.slot} LOGICAL 0/0 (proto_version '1', publication_names '{source.publication}')".encode()
        )
        yield


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


def test_only_tables_with_out_of_line_columns_get_full(db: Connection, source: Settings) -> None:
    db.execute(
        "CREATE TABLE public.wide (id int PRIMARY KEY, big text); CREATE TABLE public.slim (id int PRIMARY KEY, s varchar(9))"
    )
    prepared(db, source)
    assert (identity(db, "public.wide"), identity(db, "public.slim")) == ("f", "d")


@pytest.mark.parametrize(("kind", "given", "wanted"), [
    ("STORED", "DEFAULT", "f"),   # 18 can publish stored ones, and then FULL is harmless
    ("VIRTUAL", "DEFAULT", "d"),  # never published: FULL would make UPDATE and DELETE fail
    ("VIRTUAL", "FULL", "d"),     # was harmless unpublished, and would fail once published
    ("STORED", "NOTHING", "f"),   # would fail once published
])  # fmt: skip
def test_s8_no_statement_of_the_application_fails_with_generated_columns(
    db: Connection, source: Settings, kind: str, given: str, wanted: str
) -> None:
    db.execute(
        f"CREATE TABLE public.g (id int PRIMARY KEY, n int, big text, twice int GENERATED ALWAYS AS (n * 2) {kind})"
    )
    db.execute(f"ALTER TABLE public.g REPLICA IDENTITY {given}; INSERT INTO public.g VALUES (1, 1, {LONG})")
    made = prepared(db, source)
    assert identity(db, "public.g") == wanted
    assert bool(made.warnings) == (wanted == "d")
    db.execute("UPDATE public.g SET n = 2; DELETE FROM public.g")
    assert ("twice" in published(db, source)["public.g"]) == (kind == "STORED")


@pytest.mark.parametrize(("kind", "option"), [("VIRTUAL", "none"), ("VIRTUAL", "stored"), ("STORED", "none")])
def test_s8_seen_full_with_an_unpublished_generated_column_makes_update_and_delete_fail(
    db: Connection, kind: str, option: str
) -> None:
    """What setup must avoid; if Postgres mends this, setup may become simpler."""
    db.execute(f"CREATE TABLE public.g (id int PRIMARY KEY, n int, twice int GENERATED ALWAYS AS (n * 2) {kind})")
    db.execute("ALTER TABLE public.g REPLICA IDENTITY FULL; INSERT INTO public.g VALUES (1, 1)")
    db.execute(f"CREATE PUBLICATION p FOR TABLE public.g WITH (publish_generated_columns = {option})")
    for statement in ("UPDATE public.g SET n = 2", "DELETE FROM public.g"):
        with pytest.raises(pg.InvalidColumnReference, match="unpublished generated columns"):
            db.execute(statement.encode())


@pytest.mark.parametrize("other", ["TABLE public.t (id, n)", "ALL TABLES"])
def test_s8_another_publication_that_leaves_columns_out_keeps_full_away(
    db: Connection, source: Settings, other: str
) -> None:
    generated = ", g int GENERATED ALWAYS AS (n * 2) STORED" if other == "ALL TABLES" else ""
    db.execute(
        f"CREATE TABLE public.t (id int PRIMARY KEY, n int, big text{generated}); CREATE PUBLICATION other FOR {other}"
    )
    db.execute("INSERT INTO public.t VALUES (1, 1, 'x')")
    assert prepared(db, source).warnings
    assert identity(db, "public.t") == "d"
    db.execute("UPDATE public.t SET n = 2; DELETE FROM public.t")


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


def test_s8_what_people_narrow_in_our_publication_is_told_and_mended(each_source: Settings) -> None:
    """Postgres takes no column list beside FULL, and no row filter beyond the replica identity: UPDATE and DELETE fail."""
    tables = ["listed", "filtered", "mixed", "keyless", "theirs", "parts"]
    with catalog.connect(each_source.dsn) as db:
        for table in tables:
            big = "" if table in {"filtered", "keyless"} else ", big text"
            parted = "PARTITION BY LIST (id)" * (table == "parts")
            db.execute(f"CREATE TABLE public.{table} (id int PRIMARY KEY, n int{big}) {parted}".encode())
        db.execute("CREATE TABLE public.part PARTITION OF public.parts DEFAULT")
        prepared(db, each_source)
        ours = psycopg.sql.Identifier(each_source.publication).as_string()
        narrow = "listed (id, n, big), filtered WHERE (n > 0), mixed (id, n) WHERE (n > 0), keyless (n), theirs, parts (id, n)"
        db.execute(f"SET search_path = public; ALTER PUBLICATION {ours} SET TABLE {narrow}".encode())
        db.execute("CREATE PUBLICATION other FOR TABLE theirs (id)")
        assert broken(db, tables) == tables
        to = 'ALTER TABLE "public"."{}" REPLICA IDENTITY {}'.format
        alters = [
            to("filtered", "FULL"),
            *(to(t, "DEFAULT") for t in ("listed", "mixed", "part", "theirs")),
        ]
        drops = [f'ALTER PUBLICATION {ours} DROP TABLE ONLY "public"."{table}"' for table in ("keyless", "mixed")]
        mends = identities.failing(db, each_source.publication)
        assert sorted(mend.partition(" /*")[0] for mend in mends) == sorted(alters + drops)
        made = prepared(db, each_source)
        assert [each for each in made.statements if each.startswith("ALTER TABLE")] == alters
        assert [
            w.partition(" /*")[0].partition("run: ")[2] for w in made.warnings if "as it is published" in w
        ] == drops
        assert broken(db, tables) == ["mixed", "keyless"], "no identity mends them"
        left = identities.failing(db, each_source.publication)
        for mend in left:
            db.execute(mend.encode())
        assert (broken(db, tables), identities.failing(db, each_source.publication)) == ([], [])
        assert setup.plan(db, each_source, []).statements == []


def broken(db: Connection, tables: list[str]) -> list[str]:
    """Return those of which the application can neither update nor delete a row."""
    found = set()
    for table in tables:
        for statement in ("UPDATE public.{} SET n = 1", "DELETE FROM public.{}"):
            try:
                db.execute(statement.format(table).encode())
            except pg.InvalidColumnReference:
                found.add(table)
    return [table for table in tables if table in found]


def test_a_partitioned_table_is_captured_under_its_root_and_its_partitions_get_full(
    db: Connection, source: Settings
) -> None:
    db.execute("CREATE TABLE public.p (id int, big text, PRIMARY KEY (id)) PARTITION BY RANGE (id)")
    db.execute("CREATE TABLE public.p1 PARTITION OF public.p FOR VALUES FROM (0) TO (10)")
    prepared(db, source)
    assert sorted(published(db, source)) == ["public.p"]
    assert identity(db, "public.p1") == "f"
    with pytest.raises(Misconfigured, match=r"partition of public\.p"):
        setup.plan(db, source, ["public.p1"])


def test_partitions_that_are_sent_under_their_own_names_go_by_the_root_s_again(
    db: Connection, source: Settings
) -> None:
    db.execute("CREATE TABLE public.p (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    db.execute(PARTITION.replace("parts", "p").format("low", 0, 10).encode())
    prepared(db, source)
    ours = psycopg.sql.Identifier(source.publication).as_string()
    db.execute(f"ALTER PUBLICATION {ours} SET (publish_via_partition_root = false)".encode())
    told = [each for each in prepared(db, source).statements if each.startswith("ALTER PUBLICATION")]
    assert [each.partition(" (")[0] for each in told] == [f"ALTER PUBLICATION {ours} SET"]
    assert sorted(published(db, source)) == ["public.p"]


def test_an_index_that_tells_more_apart_than_its_column_is_no_key(db: Connection, source: Settings) -> None:
    """A chunk goes on behind a value of the column: a row that the column takes for the same would be passed over, and deleted."""
    blind = "CREATE COLLATION public.blind (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
    db.execute(blind.encode())
    for table, other in (("apart", ' COLLATE "C"'), ("same", "")):
        db.execute(f"CREATE TABLE public.{table} (name text COLLATE public.blind NOT NULL)".encode())
        db.execute(f"CREATE UNIQUE INDEX {table}_i ON public.{table} (name{other})".encode())
        db.execute(f"ALTER TABLE public.{table} REPLICA IDENTITY USING INDEX {table}_i".encode())
    made = setup.plan(db, source, [])
    assert ([table.full_name for table in made.tables], [left.table for left in made.left_out]) == (
        ["public.same"],
        ["public.apart"],
    )


def test_an_unlogged_partition_is_told_with_what_mends_it(db: Connection, source: Settings) -> None:
    db.execute("CREATE TABLE public.parts (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    db.execute(PARTITION.format("low", 0, 10).encode())
    db.execute(PARTITION.replace("TABLE", "UNLOGGED TABLE", 1).format('"High"', 10, 20).encode())
    (warning,) = prepared(db, source).warnings
    mend = 'ALTER TABLE public."High" SET LOGGED'
    assert warning.startswith("Changes of public.High are not in the WAL: public.parts")
    assert warning.endswith(mend)
    db.execute(mend.encode())
    assert setup.plan(db, source, []).warnings == []


def test_a_table_without_a_key_is_left_out_with_what_to_do_and_refused_when_named(
    db: Connection, source: Settings
) -> None:
    db.execute("CREATE TABLE public.a (id int PRIMARY KEY); CREATE TABLE public.k (x int NOT NULL)")
    db.execute("CREATE UNIQUE INDEX k_x ON public.k (x); CREATE TABLE public.none (x int)")
    made = prepared(db, source)
    assert [t.full_name for t in made.tables] == ["public.a"]
    remedies = {left.table: left.remedy for left in made.left_out}
    assert "ADD PRIMARY KEY" in remedies["public.none"]
    db.execute(remedies["public.k"].removeprefix("Run: ").encode())
    assert [t.full_name for t in prepared(db, source, "public.k").tables] == ["public.a", "public.k"]
    with pytest.raises(Misconfigured, match="S10") as refused:
        setup.plan(db, source, ["none"])
    assert refused.value.code == "no-usable-key"


def test_s9_a_deferrable_key_is_not_a_key(db: Connection, source: Settings) -> None:
    db.execute("CREATE TABLE public.d (id int PRIMARY KEY DEFERRABLE); CREATE TABLE public.a (id int PRIMARY KEY)")
    assert [left.table for left in setup.plan(db, source, []).left_out] == ["public.d"]
    with pytest.raises(Misconfigured, match="S9"):
        setup.plan(db, source, ["public.d"])


def test_where_an_index_is_the_replica_identity_it_is_the_key(db: Connection, source: Settings) -> None:
    """The stream names old rows by it alone, so the primary key of a deleted row is not known."""
    db.execute(
        "CREATE TABLE public.t (id int PRIMARY KEY, code text NOT NULL, big text); CREATE UNIQUE INDEX by_code ON public.t (code)"
    )
    db.execute("ALTER TABLE public.t REPLICA IDENTITY USING INDEX by_code")
    made = prepared(db, source)
    assert made.tables[0].key == ("code",)
    assert identity(db, "public.t") == "i"


def test_teardown_puts_everything_back(db: Connection, source: Settings) -> None:
    db.execute(
        "CREATE TABLE public.wide (id int PRIMARY KEY, big text); CREATE TABLE public.quiet (id int PRIMARY KEY, big text)"
    )
    db.execute("CREATE TABLE public.gone (id int PRIMARY KEY)")
    db.execute(
        "CREATE TABLE public.mine (id int PRIMARY KEY, big text); ALTER TABLE public.quiet REPLICA IDENTITY NOTHING"
    )
    db.execute("CREATE TABLE public.parts (id int PRIMARY KEY, big text) PARTITION BY RANGE (id)")
    prepared(db, source)
    db.execute(f"DROP TABLE public.gone; {PARTITION.format('gone', 0, 9)}; {PARTITION.format('part', 9, 99)}")
    prepared(db, source)
    assert setup.plan(db, source, []).statements == []
    db.execute("ALTER TABLE public.part RENAME TO older")
    db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [source.slot])
    db.execute("ALTER TABLE public.mine REPLICA IDENTITY NOTHING")  # changed by its owner since: not ours any more
    db.execute(
        "ALTER TABLE public.wide RENAME TO wider; CREATE TABLE public.wide (id int); ALTER TABLE public.wide REPLICA IDENTITY FULL"
    )
    teardown.run(db, source, teardown.plan(db, source))
    assert [identity(db, f"public.{t}") for t in ("wider", "wide", "quiet", "mine")] == ["d", "f", "n", "n"]
    assert [identity(db, f"public.{t}") for t in ("gone", "older")] == ["d", "d"], "partitions"
    assert db.execute("SELECT FROM pg_publication").fetchall() == []
    assert slot_facts(source)["exists"] is False
    assert teardown.plan(db, source) == teardown.Removal(slot=False, statements=(), kept=())


def test_a_publication_of_somebody_else_is_neither_used_nor_dropped(db: Connection, source: Settings) -> None:
    db.execute(
        f"CREATE TABLE public.a (id int PRIMARY KEY); CREATE PUBLICATION {source.publication} FOR TABLE public.a"
    )
    with pytest.raises(Misconfigured, match="did not make"):
        setup.plan(db, source, [])
    removal = teardown.plan(db, source)
    assert not removal.statements
    assert removal.kept


def test_teardown_refuses_while_capture_runs(db: Connection, source: Settings) -> None:
    db.execute(f"CREATE PUBLICATION {source.publication}")
    with streaming(source):
        assert slot_facts(source)["active"] is True
        with pytest.raises(Misconfigured) as refused:
            teardown.plan(db, source)
    assert refused.value.code == "slot-active"


@pytest.mark.parametrize(
    "gone",
    [
        "SELECT pg_drop_replication_slot('{0}')",
        "DROP TABLE public.a",
        "DROP SCHEMA s CASCADE",
        "DROP OWNED BY {0}_role; DROP ROLE {0}_role",
    ],
)
def test_what_is_gone_between_teardowns_look_and_its_deed_is_told(db: Connection, source: Settings, gone: str) -> None:
    """It asks a person in between. A second run takes the rest away, though the publication was dropped after its look."""
    with torn(db, source) as removal:
        db.execute(gone.format(source.source).encode())
        with pytest.raises(Transient) as refused:
            teardown.run(db, source, removal)
        assert refused.value.code == "teardown-outrun"
        rest = teardown.plan(db, source)
        db.execute(f"DROP PUBLICATION {source.publication}".encode())
        teardown.run(db, source, rest)
        assert slot_facts(source)["exists"] is False
        assert db.execute("SELECT FROM pg_class WHERE relreplident = 'f'").fetchall() == []


@contextmanager
def torn(db: Connection, source: Settings) -> Iterator[teardown.Removal]:
    """Run setup for a role of its own, make the slot, and look at what teardown would do."""
    role = f"{source.source}_role"
    db.execute(f"CREATE SCHEMA s; CREATE ROLE {role}".encode())
    for table in ("s.a", "public.a"):
        db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, x text)".encode())
    try:
        setup.apply(db, setup.plan(db, source, [], role))
        db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [source.slot])
        yield teardown.plan(db, source)
    finally:
        db.execute(f"DROP ROLE IF EXISTS {role}".encode())  # it has no right any more


def test_a_server_that_goes_away_is_told_by_setup_and_teardown(db: Connection, source: Settings) -> None:
    db.execute("CREATE TABLE public.a (id int PRIMARY KEY)")
    prepared(db, source)
    removal = teardown.plan(db, source)
    deeds: list[Callable[[Connection], object]] = [
        lambda lost: setup.plan(lost, source, []),
        lambda lost: teardown.plan(lost, source),
        lambda lost: teardown.run(lost, source, removal),
    ]
    for deed in deeds:
        with catalog.connect(source.dsn) as lost:
            db.execute("SELECT pg_terminate_backend(%s, 30000)", [lost.info.backend_pid])
            with pytest.raises(Transient) as away:
                deed(lost)
        assert away.value.code == "postgres-away"


def test_a_plain_role_gets_what_it_lacks_and_loses_it_again(db: Connection, source: Settings) -> None:
    role = f"{source.source}_role"
    db.execute(f"CREATE SCHEMA s; CREATE TABLE s.a (id int PRIMARY KEY); CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    db.execute("ALTER TABLE s.a ENABLE ROW LEVEL SECURITY; INSERT INTO s.a VALUES (1)")
    try:
        setup.apply(db, setup.plan(db, source, [], role))
        assert setup.plan(db, source, [], role).statements == []
        theirs = psycopg.conninfo.make_conninfo(source.dsn, user=role, password="pw")
        with catalog.connect(theirs) as plain, catalog.connect_replication(theirs) as walsender:
            assert plain.execute("SELECT * FROM s.a").fetchall() == [(1,)]
            facts = catalog.server(plain)
            assert (facts.system_id, facts.timeline) == catalog.identify(walsender)[:2]
        db.execute("ALTER TABLE s.a RENAME TO b")
        teardown.run(db, source, teardown.plan(db, source))
        with catalog.connect(theirs) as plain, pytest.raises(pg.InsufficientPrivilege):
            plain.execute("SELECT * FROM s.b")
        assert db.execute(f"SELECT has_table_privilege('{role}', 's.b', 'SELECT')").fetchall() == [(False,)]
        with pytest.raises(Misconfigured, match="REPLICATION"):
            catalog.connect_replication(theirs)
    finally:
        db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_without_a_role_rights_go_to_whom_setup_gave_them_last(db: Connection, source: Settings) -> None:
    """A remedy names a table and no role: the owner who runs it must not get the rights, and capture's role lack them.

    It is enough to name one captured table for the rights to all of them.
    """
    owner, role = (f"{source.source}_{name}" for name in ("owner", "role"))
    db.execute(f"CREATE ROLE {owner} LOGIN PASSWORD 'pw'; CREATE ROLE {role} REPLICATION".encode())
    db.execute(f"GRANT ALL ON SCHEMA public TO {owner}; GRANT ALL ON DATABASE {source.source} TO {owner}".encode())
    try:
        with catalog.connect(psycopg.conninfo.make_conninfo(source.dsn, user=owner, password="pw")) as theirs:
            for table in ("a", "b", "c"):
                theirs.execute(f"CREATE TABLE public.{table} (id int PRIMARY KEY)".encode())
            setup.apply(theirs, setup.plan(theirs, source, ["a"], role))
            setup.apply(theirs, setup.plan(theirs, source, ["b"]))
            assert readable(db, role) == ["public.a", "public.b"] == sorted(published(db, source))
            theirs.execute(f"REVOKE ALL ON public.a, public.b FROM {role}".encode())
            setup.apply(theirs, setup.plan(theirs, source, ["b"], role))
            assert readable(db, role) == ["public.a", "public.b"] == sorted(published(db, source))
            db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())
            assert setup.plan(db, source, ["b"]).statements == [], "of those that setup gave rights nobody is left"
    finally:
        db.execute(f"DROP OWNED BY {owner}; DROP ROLE {owner}; DROP ROLE IF EXISTS {role}".encode())


def readable(db: Connection, role: str) -> list[str]:
    """Return the tables that a role may read."""
    query = "SELECT format('%%s.%%s', schemaname, relname) FROM pg_stat_user_tables WHERE has_table_privilege(%s, relid, 'SELECT')"
    return sorted(name for (name,) in db.execute(query, [role]))


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


def test_bad_connections_name_the_setting(postgres: Postgres) -> None:
    wrong = {
        "postgres-away": "postgresql://postgres@127.0.0.1:1/postgres",
        "postgres-refused": postgres.dsn("no_such_database"),
        "postgres-dsn": "not a dsn",
    }
    for code, dsn in wrong.items():
        with pytest.raises((Misconfigured, Transient)) as refused:
            catalog.connect(dsn)
        assert refused.value.code == code
        assert "HEADRACE_DSN" in str(refused.value)


def test_a_connection_that_is_silent_for_long_is_kept_alive_as_the_dsn_says_or_we_do(source: Settings) -> None:
    """What stands between forgets a silent connection after some minutes; the kernel's own probes begin after two hours."""
    own = psycopg.conninfo.make_conninfo(source.dsn, keepalives_idle=7, tcp_user_timeout=9000)
    for settings, idle, given_up in ((source, 30, 30000), (replace(source, dsn=own), 7, 9000)):
        for connection in (catalog.connect(settings.dsn), postgres_of_verify.connect(settings)):
            with closing(connection), closing(socket.socket(fileno=os.dup(connection.pgconn.socket))) as kept:
                assert kept.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle
                assert kept.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 10
                assert kept.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == given_up


def test_a_wrong_password_is_told_and_not_shown(db: Connection, source: Settings) -> None:
    role = f"{source.source}_role"
    db.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'right'")
    dsn = psycopg.conninfo.make_conninfo(source.dsn, user=role, password="secret-wrong")
    try:
        with pytest.raises(Misconfigured, match="password") as refused:
            catalog.connect(dsn)
        assert "secret-wrong" not in str(refused.value)
    finally:
        db.execute(f"DROP ROLE {role}")


def test_wal_level_replica_is_refused_with_the_remedy(postgres: Postgres, source: Settings) -> None:
    with catalog.connect(source.dsn) as db:
        db.execute("CREATE TABLE public.a (id int PRIMARY KEY); ")
        db.execute("ALTER SYSTEM SET wal_level = replica")
    try:
        restart(postgres)
        with catalog.connect(source.dsn) as db, pytest.raises(Misconfigured, match="wal_level=replica") as refused:
            setup.plan(db, source, [])
        assert "ALTER SYSTEM" in refused.value.remedy
    finally:
        with catalog.connect(source.dsn) as db:
            db.execute("ALTER SYSTEM RESET wal_level")
        restart(postgres)


def restart(postgres: Postgres) -> None:
    """Stop and start it."""
    postgres.stop()
    postgres.start()


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
