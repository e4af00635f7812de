"""Who sets a source up: roles and their rights, connections, passwords, and the server's settings."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from dataclasses import replace

import psycopg
import pytest
from psycopg import errors as pg

from headrace.errors import Misconfigured, Transient
from headrace.settings import Settings
from headrace_capture import catalog, setup, teardown
from headrace_ops.postgres import Postgres
from headrace_verify import postgres as postgres_of_verify
from tests.fixtures.sources import Connection, published


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
