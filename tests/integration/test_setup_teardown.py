"""Teardown of a source: everything is as before setup, and nothing of anybody else goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from headrace.errors import Misconfigured, Transient
from headrace.settings import Settings
from headrace_capture import catalog, setup, teardown
from headrace_capture.slot import slot_facts
from tests.fixtures.sources import PARTITION, Connection, identity, prepared, streaming


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
