"""Keys and replica identities that setup chooses or asks for: no statement of the application fails (S8, S9)."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors as pg

from headrace.errors import Misconfigured
from headrace.settings import Settings
from headrace_capture import catalog, identities, setup
from tests.fixtures.sources import PARTITION, Connection, broken, identity, prepared, published

LONG = "repeat(md5('x'), 400)"


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
