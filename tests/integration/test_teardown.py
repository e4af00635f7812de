"""`headrace teardown --topics`: what it says it would do is what it does, and nothing of anybody else goes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import orjson
import psycopg
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from headrace.errors import Misconfigured
from headrace.log import CutWriter, Log
from headrace.settings import Settings
from headrace_capture import catalog, setup, teardown
from headrace_capture.slot import slot_facts
from tests.fixtures.capture import capturing, eventually, execute, prepare, rows
from tests.fixtures.processes import System
from tests.fixtures.slots import drop_slot


def test_it_names_its_topics_and_deletes_those_and_no_others(system: System) -> None:
    settings = system.settings
    execute(settings, "CREATE TABLE items (id int PRIMARY KEY, big text)", "INSERT INTO items VALUES (1, 'x')")
    system.run("setup", "--apply")
    system.start("capture", "capture")
    eventually("the snapshot is in the log", lambda: system.log.newest_checkpoint(complete=True))
    admin = AdminClient({"bootstrap.servers": settings.kafka})
    foreign = [f"{settings.source}.billing.invoices", f"{settings.source}.public", f"{settings.source}.a.b.c"]
    for made in admin.create_topics([NewTopic(name, 1, 1) for name in foreign]).values():
        made.result(30)
    ours = [f"{settings.source}.{name}" for name in ("public.items", "checkpoints", "schemas")]

    assert "Stop `headrace capture`" in system.ask("teardown", "--topics", "--yes").err
    assert system.ends("capture") == 0
    asked = system.ask("teardown", "--topics")
    assert asked.code == 2, "nobody is there to agree"
    told = system.ask("teardown", "--topics", "--json")
    assert told.code == 2, "nor does --json agree"
    would = orjson.loads(told.out)
    assert (would["slot"], would["topics"], would["applied"]) == (True, ours, False)
    assert any(statement.startswith("DROP PUBLICATION") for statement in would["statements"])
    assert all(f"delete the topic {topic}\n" in asked.out for topic in ours)
    assert not any(f"{topic}\n" in asked.out for topic in foreign)
    assert set(ours) <= Log(settings).topics.names(), "only said so far"
    assert slot_facts(settings)["exists"]

    assert "is gone" in system.run("teardown", "--topics", "--yes")
    eventually("our topics are gone", lambda: not set(ours) & Log(settings).topics.names())
    assert set(foreign) <= Log(settings).topics.names()
    assert not slot_facts(settings)["exists"]
    assert rows(settings, "SELECT pubname FROM pg_publication") == []
    assert "nothing of headrace is left" in system.run("teardown", "--topics", "--yes")


def test_it_takes_no_log_from_a_capture_that_runs_nor_one_of_another_source(
    system: System, fresh_database: Callable[[], str]
) -> None:
    """HEADRACE_SLOT or HEADRACE_DSN is not what capture has, or the snapshot runs: nobody is seen at the slot."""
    settings = system.settings
    another = ({"HEADRACE_SLOT": "another"}, {"HEADRACE_DSN": fresh_database()})
    log = Log(settings)

    def refuses(code: str, *environs: dict[str, str]) -> None:
        for environ in environs:
            ended = system.ask("teardown", "--topics", "--yes", environ=environ)
            assert (ended.code, f"code {code}:" in ended.err) == (3, True), ended
            assert log.topics.names() >= set(log.own_topics()) > set()
            assert rows(settings, "SELECT pubname FROM pg_publication") == [(settings.publication,)]

    execute(settings, "CREATE TABLE items (id int PRIMARY KEY)", "CREATE TABLE held (id int PRIMARY KEY)")
    system.run("setup", "--apply")
    with psycopg.connect(settings.dsn) as application:
        application.execute("LOCK TABLE held IN ACCESS EXCLUSIVE MODE")
        system.start("capture", "capture")
        eventually("the snapshot has its slot", lambda: slot_facts(settings)["exists"])
        refuses("slot-active", {}, *another)
    eventually("the snapshot is in the log", lambda: log.newest_checkpoint(complete=True))
    refuses("slot-active", {}, *another)
    assert "slot-active" in system.ask("teardown", "--yes", environ=another[0]).err
    assert system.ends("capture") == 0
    refuses("other-source", *another)
    nowhere = system.ask("teardown", "--yes", environ={"HEADRACE_KAFKA": "127.0.0.1:1"})
    assert (nowhere.code, "Whether capture runs was not looked at" in nowhere.err) == (0, True), nowhere
    assert "is gone" in system.run("teardown", "--topics", "--yes")


class Asked(Log):
    """A log that asks, when a session opens its writer, whether a capture is seen to run."""

    said = ""

    def writer(self) -> CutWriter:
        with pytest.raises(Misconfigured) as error:
            teardown.check_unused(self)
        self.said = self.said or error.value.code
        return super().writer()


def test_a_capture_is_seen_to_run_before_it_does_anything(settings: Settings) -> None:
    """Its next report is a second later: by then it may have made its slot and its first snapshot."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    log = Asked(settings)
    with capturing(settings, log) as capture:
        capture.reach()
    assert log.said == "slot-active"


@pytest.fixture
def role(fresh_database: Callable[[], str]) -> Iterator[tuple[Settings, str]]:
    """Settings of an empty database, and a role that may log in and no more."""
    dsn = fresh_database()
    name = dsn.rpartition("/")[2]
    settings = replace(Settings(), source=name, dsn=dsn, slot=name, publication=name)
    execute(settings, f"CREATE ROLE r_{name} LOGIN PASSWORD 'pw'")
    yield settings, f"r_{name}"
    execute(settings, f"DROP OWNED BY r_{name}", f"DROP ROLE r_{name}")


def set_up(settings: Settings, role: str, *tables: str) -> None:
    """Run setup for `role`, and make the slot, as capture would."""
    with closing(catalog.connect(settings.dsn)) as db:
        setup.apply(db, setup.plan(db, settings, list(tables), role))
        db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [settings.slot])


def torn_down(settings: Settings) -> list[str]:
    """Run teardown; return what it says that it keeps."""
    with closing(catalog.connect(settings.dsn)) as db:
        removal = teardown.plan(db, settings)
        teardown.run(db, settings, removal)
        return list(removal.kept)


def test_a_role_that_a_slot_of_another_database_may_need_keeps_its_attributes(
    role: tuple[Settings, str], fresh_database: Callable[[], str]
) -> None:
    """Attributes are the whole server's: without them the other source's capture is refused, and its slot keeps WAL."""
    shop, name = role
    dsn = fresh_database()
    other = dsn.rpartition("/")[2]
    billing = replace(shop, source=other, dsn=dsn, slot=other, publication=other)
    for settings in (shop, billing):
        execute(settings, "CREATE TABLE t (id int PRIMARY KEY)", "ALTER TABLE t ENABLE ROW LEVEL SECURITY")
        set_up(settings, name)
    try:
        kept = torn_down(shop)
        assert [line.rpartition(": ")[2] for line in kept] == [
            f'ALTER ROLE "{name}" {attribute}' for attribute in ("NOREPLICATION", "NOBYPASSRLS")
        ]
        assert all(f"slot {billing.slot}" in line for line in kept)
        theirs = psycopg.conninfo.make_conninfo(billing.dsn, user=name, password="pw")
        catalog.connect_replication(theirs).close()
        with catalog.connect(theirs) as reading:
            reading.execute("SELECT FROM public.t")
        assert torn_down(billing) == []
    finally:
        execute(billing, f"DROP OWNED BY {name}")


def test_a_slot_of_another_database_or_plugin_stays(
    role: tuple[Settings, str], fresh_database: Callable[[], str]
) -> None:
    """Two databases of a server may both have the default name; Postgres would drop the other's from here."""
    settings, name = role
    other = replace(settings, dsn=fresh_database())
    at = other.dsn.rpartition("/")[2]
    execute(settings, "CREATE TABLE t (id int PRIMARY KEY)")
    for theirs, plugin, where in ((other, "pgoutput", at), (settings, "test_decoding", settings.slot)):
        with closing(catalog.connect(settings.dsn)) as db:
            setup.apply(db, setup.plan(db, settings, [], name))
        execute(theirs, f"SELECT pg_create_logical_replication_slot('{settings.slot}', '{plugin}')")
        kept = torn_down(settings)
        assert f"The slot {settings.slot} stays: it is of {plugin} in database {where}." in kept
        assert any(f"slot {settings.slot} of database {where} may need it" in line for line in kept), "the role's"
        assert slot_facts(settings)["exists"]
        drop_slot(theirs)
        execute(settings, f"ALTER ROLE {name} NOREPLICATION")


def test_what_another_source_of_the_same_database_relies_on_stays(role: tuple[Settings, str]) -> None:
    shop, name = role
    second = replace(shop, source="second", slot=f"{shop.slot}_2", publication=f"{shop.publication}_2")
    execute(shop, "CREATE SCHEMA s", "CREATE TABLE s.both (id int PRIMARY KEY, big text)")
    execute(shop, "CREATE TABLE s.parts (id int PRIMARY KEY, big text) PARTITION BY RANGE (id)")
    execute(shop, "CREATE TABLE s.part PARTITION OF s.parts FOR VALUES FROM (0) TO (10)")
    execute(shop, "CREATE SCHEMA alone", "CREATE TABLE alone.one (id int PRIMARY KEY, big text)")
    set_up(shop, name)
    set_up(second, name, "s.both", "s.parts")
    kept = torn_down(shop)
    assert all(second.publication in line for line in kept)
    full = "SELECT relname FROM pg_class WHERE relreplident = 'f' ORDER BY 1"
    assert rows(shop, full) == [("both",), ("part",)]
    may = f"SELECT has_table_privilege('{name}', o, 'SELECT') FROM unnest('{{s.both,s.parts,alone.one}}'::regclass[]) o"
    assert rows(shop, may) == [(True,), (True,), (False,)]
    uses = f"SELECT has_schema_privilege('{name}', s, 'USAGE') FROM unnest('{{s,alone}}'::regnamespace[]) s"
    assert rows(shop, uses) == [(True,), (False,)]
    assert rows(shop, f"SELECT rolreplication FROM pg_roles WHERE rolname = '{name}'") == [(True,)]
    assert torn_down(second) == []
    with closing(catalog.connect(shop.dsn)) as db:
        for line in kept:
            db.execute(line.rpartition(": ")[2].encode())
    assert rows(shop, full) == []
    assert rows(shop, f"SELECT rolreplication FROM pg_roles WHERE rolname = '{name}'") == [(False,)]


def test_no_identity_comes_back_that_a_column_list_of_others_stands_against(role: tuple[Settings, str]) -> None:
    """Setup has taken it away for that: with it the application's UPDATE and DELETE would fail (S8)."""
    shop, name = role
    for table in ("docs", "free"):
        execute(shop, f"CREATE TABLE {table} (id int PRIMARY KEY, n int)", f"ALTER TABLE {table} REPLICA IDENTITY FULL")
    other = f"{shop.publication}_other"
    execute(shop, f"CREATE PUBLICATION {other} FOR TABLE docs (id)", "INSERT INTO docs VALUES (1, 1)")
    set_up(shop, name)
    (kept,) = torn_down(shop)
    assert "column list" in kept
    assert other in kept
    assert '"docs" REPLICA IDENTITY FULL' in kept
    execute(shop, "UPDATE docs SET n = 2", "DELETE FROM docs")
    identities = "SELECT relname, relreplident::text FROM pg_class WHERE relname IN ('docs', 'free') ORDER BY 1"
    assert rows(shop, identities) == [("docs", "d"), ("free", "f")]
