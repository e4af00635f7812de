"""Every statement that changes rows: the log holds what was committed, each transaction once and whole, and its replay is SELECT."""

from __future__ import annotations

import itertools
import random
from contextlib import ExitStack, suppress
from dataclasses import replace

import psycopg
import pytest

from headrace.log import Log
from headrace.settings import Settings
from tests.fixtures.capture import capturing, execute, loopback, prepare, replay, rows, selected
from tests.fixtures.statements import ITEMS, ROWS, TABLES, equal, numbered, play, play_while_captured
from tests.fixtures.versions import NEWEST

OTHERS = "CREATE TABLE others (id int PRIMARY KEY, item int REFERENCES items ON DELETE CASCADE ON UPDATE CASCADE)"
SCRIPTS = {
    "truncate of several": """
        a BEGIN
        a INSERT INTO items VALUES (100, 1, 'before')
        a TRUNCATE items, others
        a INSERT INTO items VALUES (5, 1, 'after')
        a COMMIT
    """,
    "truncate cascade": """
        a TRUNCATE items RESTART IDENTITY CASCADE
        a INSERT INTO items VALUES (1, 1, 'again')
        a INSERT INTO others VALUES (1, 1)
    """,
    "truncate twice and rolled back": """
        a BEGIN
        a TRUNCATE others
        a ROLLBACK
        a BEGIN
        a TRUNCATE others
        a INSERT INTO others VALUES (7, 7)
        a TRUNCATE others
        a COMMIT
    """,
    "keys that move": """
        a UPDATE items SET id = id + 1000
        a UPDATE items SET id = -id WHERE id > 1020
        a BEGIN
        a UPDATE items SET id = 0 WHERE id = 1001
        a UPDATE items SET id = 1001 WHERE id = 1002
        a UPDATE items SET id = 1002 WHERE id = 0
        a COMMIT
        a BEGIN
        a DELETE FROM items WHERE id = 1003
        a INSERT INTO items VALUES (1003, 9, 'again')
        a UPDATE items SET id = 5 WHERE id = 1003
        a COMMIT
    """,
    "cascades": """
        a DELETE FROM items WHERE id <= 10
        a UPDATE items SET id = id + 500 WHERE id <= 15
    """,
    "upserts": """
        a INSERT INTO items VALUES (1, 0, 'up'), (99, 0, 'new') ON CONFLICT (id) DO UPDATE SET name = excluded.name
        a INSERT INTO items VALUES (1, 0, 'no') ON CONFLICT DO NOTHING
        a MERGE INTO items i USING generate_series(35, 45) s ON i.id = s \
            WHEN MATCHED AND s < 38 THEN DELETE WHEN MATCHED THEN UPDATE SET n = -1 \
            WHEN NOT MATCHED THEN INSERT VALUES (s, s, 'merged')
        a WITH gone AS (DELETE FROM items WHERE id BETWEEN 20 AND 25 RETURNING *) INSERT INTO items SELECT id + 200, n, name FROM gone
        a UPDATE items SET n = n
    """,
    "thousands of subtransactions": """
        a DO $$ BEGIN FOR i IN 1..3000 LOOP BEGIN INSERT INTO items VALUES (1000 + i, i, 'sub'); IF i % 3 = 0 THEN RAISE 'no'; END IF; \
            UPDATE items SET n = n + 1 WHERE id = 999 + i; EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$
    """,
    "savepoints": """
        a BEGIN
        a INSERT INTO items VALUES (101, 1, 'kept')
        a SAVEPOINT one
        a DELETE FROM items WHERE id < 20
        a SAVEPOINT two
        a INSERT INTO items VALUES (102, 1, 'gone')
        a ROLLBACK TO two
        a INSERT INTO items VALUES (103, 1, 'gone')
        a ROLLBACK TO one
        a UPDATE items SET n = 7 WHERE id = 101
        a RELEASE one
        a COMMIT
    """,
    "rolled back": """
        a BEGIN
        a INSERT INTO items SELECT i, i, 'never' FROM generate_series(1000, 9000) i
        a DELETE FROM others
        a ROLLBACK
    """,
    "commits in another order than writes": """
        a BEGIN
        a UPDATE items SET n = 1000 WHERE id = 1
        b BEGIN
        b UPDATE items SET n = 2000 WHERE id = 2
        c INSERT INTO items VALUES (77, 0, 'c')
        a UPDATE items SET name = 'a' WHERE id = 3
        b INSERT INTO others VALUES (77, 2)
        b COMMIT
        c UPDATE items SET n = 2001 WHERE id = 2
        a INSERT INTO others VALUES (78, 1)
        a COMMIT
    """,
    "prepared transactions": """
        a BEGIN
        a UPDATE items SET n = 1 WHERE id = 1
        a INSERT INTO items VALUES (55, 5, 'prepared')
        a PREPARE TRANSACTION '{source}_one'
        a BEGIN
        a DELETE FROM items WHERE id = 30
        a PREPARE TRANSACTION '{source}_never'
        b UPDATE items SET n = 2 WHERE id = 2
        b COMMIT PREPARED '{source}_one'
        b UPDATE items SET n = 3 WHERE id = 1
        c ROLLBACK PREPARED '{source}_never'
    """,
}


@pytest.mark.parametrize(
    ("each_postgres", "codec"), [("15", "json"), (NEWEST, "json"), (NEWEST, "avro")], indirect=["each_postgres"]
)
def test_the_log_is_what_was_committed(each_version: Settings, codec: str, request: pytest.FixtureRequest) -> None:
    settings = each_version
    if codec == "avro":
        settings = replace(settings, codec=codec, schema_registry=request.getfixturevalue("registry").address())
    tables = [numbered(number, ITEMS, OTHERS, *ROWS) for number in range(len(SCRIPTS))]
    prepare(settings, *itertools.chain(*tables))
    with capturing(settings) as capture:
        capture.hear("streaming")
        for number, script in enumerate(SCRIPTS.values()):
            play(settings, *numbered(number, script))
        capture.reach()
    for number, name in enumerate(SCRIPTS):
        equal(settings, *numbered(number, *TABLES), script=name)


def test_copy(settings: Settings) -> None:
    """Rows of COPY, which Postgres writes many at a time, also where some of them are taken back."""
    prepare(settings, ITEMS)
    with capturing(settings) as capture, psycopg.connect(settings.dsn) as connection:
        capture.hear("streaming")
        for start, kept in ((0, True), (5_000, False), (10_000, True)):
            with suppress(psycopg.Rollback), connection.transaction() as part:
                with connection.cursor().copy("COPY items FROM STDIN") as copy:
                    for n in range(start, start + 2_000):
                        copy.write_row([n, n, "c\t\\ü"])
                if not kept:
                    raise psycopg.Rollback(part)
        connection.commit()
        capture.reach()
    equal(settings, "items")
    assert len(replay(settings, "public.items")) == 4_000


def test_a_transaction_prepared_before_a_restart_comes_when_it_commits(settings: Settings) -> None:
    """Capture goes on past it meanwhile, and stops and starts between PREPARE and COMMIT."""
    prepare(settings, ITEMS, OTHERS, *ROWS)
    name = f"{settings.source}_x"
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(
            settings, f"BEGIN; UPDATE items SET n = 111 WHERE id = 11; DELETE FROM others; PREPARE TRANSACTION '{name}'"
        )
        execute(settings, "UPDATE items SET n = 222 WHERE id = 22")
        capture.reach()
    assert len(replay(settings, "public.others")) == 20
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"COMMIT PREPARED '{name}'")
        capture.reach()
    equal(settings)
    assert replay(settings, "public.others") == {}


def test_any_interleaving_of_sessions(settings: Settings) -> None:
    """Four sessions write and commit, roll back and take parts back in any order; the order of the log is that of the commits."""
    prepare(settings, ITEMS, *ROWS[:1])
    chance = random.Random(11)
    with capturing(settings) as capture, ExitStack() as ending:
        capture.hear("streaming")
        sessions = [ending.enter_context(psycopg.connect(settings.dsn)) for _ in range(4)]
        for session in sessions:
            session.execute("SET lock_timeout = '1ms'")
            session.commit()
        for step in range(400):
            _step(chance.choice(sessions), chance, step)
        for session in sessions:
            session.commit()
        capture.reach()
    equal(settings, "items")


def _step(session: psycopg.Connection, chance: random.Random, step: int) -> None:
    key, other = chance.randint(1, 60), chance.randint(1, 60)
    what = [
        f"INSERT INTO items VALUES ({key}, {step}, 'i')",
        f"UPDATE items SET n = {step} WHERE id = {key}",
        f"UPDATE items SET id = {other} WHERE id = {key}",
        f"DELETE FROM items WHERE id = {key}",
    ]
    end = chance.random()
    if end < 0.2:
        session.commit()
    elif end < 0.25:
        session.rollback()
    else:
        with suppress(psycopg.errors.UniqueViolation, psycopg.errors.LockNotAvailable), session.transaction():
            session.execute(chance.choice(what).encode())


DDL = {
    "between": """
        a INSERT INTO items VALUES (50, 1, 'old')
        a ALTER TABLE items ADD COLUMN more text
        a INSERT INTO items VALUES (51, 1, 'new', 'm')
        a UPDATE items SET more = 'set' WHERE id = 1
        a ALTER TABLE items DROP COLUMN n
        a UPDATE items SET name = 'all'
        a DELETE FROM items WHERE id = 2
    """,
    "inside": """
        a BEGIN
        a INSERT INTO items VALUES (50, 1, 'old')
        a ALTER TABLE items ADD COLUMN more text
        a INSERT INTO items VALUES (51, 1, 'new', 'm')
        a ALTER TABLE items ADD COLUMN yet int
        a UPDATE items SET yet = id
        a COMMIT
    """,
    "rolled back": """
        a BEGIN
        a ALTER TABLE items ADD COLUMN more text
        a UPDATE items SET more = 'never'
        a ROLLBACK
        a UPDATE items SET n = 5
    """,
    "while another writes": """
        b BEGIN
        b INSERT INTO others VALUES (30, NULL)
        a ALTER TABLE items ADD COLUMN more text
        a UPDATE items SET more = 'x' WHERE id < 5
        b INSERT INTO others VALUES (31, NULL)
        b COMMIT
    """,
    "a column that comes and goes": """
        a BEGIN
        a ALTER TABLE items ADD COLUMN more text
        a UPDATE items SET more = 'x'
        a ALTER TABLE items DROP COLUMN more
        a UPDATE items SET n = 1
        a COMMIT
    """,
    "a wider varchar": """
        a ALTER TABLE items ADD COLUMN v varchar(3)
        a UPDATE items SET v = 'abc'
        a ALTER TABLE items ALTER v TYPE varchar(9)
        a UPDATE items SET v = 'abcdefghi' WHERE id = 3
        a ALTER TABLE items ALTER v TYPE text
        a UPDATE items SET v = repeat('v', 20) WHERE id = 4
    """,
    "a new table": """
        a BEGIN
        a CREATE TABLE fresh (id int PRIMARY KEY)
        a ALTER PUBLICATION {source} ADD TABLE fresh
        a INSERT INTO fresh VALUES (1)
        a COMMIT
        a INSERT INTO fresh VALUES (2)
    """,
}


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("codec", ["json", "avro"])
@pytest.mark.usefixtures("registry")
def test_ddl_among_the_changes(settings: Settings, late: bool, codec: str) -> None:
    """Also when capture was off, and the catalogue that it reads is newer than the rows that come."""
    settings = replace(settings, codec=codec)
    tables = [numbered(number, ITEMS, OTHERS, *ROWS) for number in range(len(DDL))]
    prepare(settings, *itertools.chain(*tables))
    scripts = itertools.chain(*[numbered(number, script) for number, script in enumerate(DDL.values())])
    play_while_captured(settings, list(scripts), late=late)
    for number, name in enumerate(DDL):
        compared(settings, numbered(number, *TABLES, "fresh"), name)


def compared(settings: Settings, tables: list[str], script: str) -> None:
    """Rows from before a nullable column was added lack it in the log: null, as Postgres shows it; of a dropped one nothing is read."""
    for table in tables:
        if rows(settings, f"SELECT to_regclass('public.{table}') IS NOT NULL") == [(True,)]:
            wanted = selected(settings, table)
            columns = next(iter(wanted.values()))
            log = replay(settings, f"public.{table}")
            assert {key: {name: row.get(name) for name in columns} for key, row in log.items()} == wanted, script


def test_unlogged_temporary_and_foreign_tables_are_ignored(settings: Settings) -> None:
    """What is written through a foreign table of the same database is there under the name of the table behind it."""
    prepare(
        settings,
        ITEMS,
        "CREATE UNLOGGED TABLE quick (id int PRIMARY KEY)",
        "CREATE VIEW seen AS SELECT * FROM items",
        *loopback(settings),
        "CREATE FOREIGN TABLE far (id int, n int, name text) SERVER here OPTIONS (schema_name 'public', table_name 'items')",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        play(
            settings,
            """
            a CREATE TEMPORARY TABLE mine (id int PRIMARY KEY)
            a INSERT INTO mine VALUES (1)
            a INSERT INTO quick VALUES (1)
            a INSERT INTO seen VALUES (1, 1, 'through the view')
            a INSERT INTO far VALUES (2, 2, 'through the foreign table')
            """,
        )
        capture.reach()
    assert Log(settings).tables() == ["public.items"]
    equal(settings, "items")
