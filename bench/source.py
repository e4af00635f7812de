"""The rows, and the changes that make the backlogs. Whatever is measured reads the very same write-ahead log.

No column is so wide that Postgres could keep it out of line, so that `headrace setup` leaves the replica identity as it is,
and both tools get the same, smaller stream.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from headrace.errors import Misconfigured
from headrace_ops.postgres import Postgres

_QUIET = """
ALTER SYSTEM SET autovacuum = off;
ALTER SYSTEM SET checkpoint_timeout = '1h';
ALTER SYSTEM SET max_wal_size = '16GB';
"""
_ORDERS = """
CREATE TABLE orders (
    id bigint PRIMARY KEY, customer_id int NOT NULL, quantity int NOT NULL, status varchar(12) NOT NULL,
    amount numeric(12, 2) NOT NULL, placed timestamptz NOT NULL, title varchar(80) NOT NULL, note varchar(240) NOT NULL
);
{insert};
CREATE PROCEDURE change(begin_with int, changes int, per_transaction int, number_of_rows int)
LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1..changes LOOP
        UPDATE orders SET quantity = begin_with + i WHERE id = 1 + (i::bigint * 7919) % number_of_rows;
        IF i % per_transaction = 0 THEN COMMIT; END IF;
    END LOOP;
END $$;
"""
_INSERT = """
INSERT INTO orders
SELECT i, i % 9973, 0, (ARRAY['new', 'paid', 'packed', 'shipped'])[1 + i % 4], (i % 1000000) / 100.0,
       timestamptz '2026-01-01 UTC' + i * interval '1 second', 'Größe "L", Artikel ' || md5(i::text),
       repeat(md5((i + 1)::text) || ' ', 5) || 'not before noon, the bell is broken' || chr(10) || 'please ask at no. ' || (i % 100)::text
FROM generate_series({first}, {last}) i
"""
MAKE_AWAKE = """
CREATE TABLE awake (id int PRIMARY KEY, times int NOT NULL);
INSERT INTO awake VALUES (1, 0);
"""
_NARROW = """
CREATE TABLE narrow (id bigint PRIMARY KEY, n int NOT NULL);
INSERT INTO narrow SELECT i, i % 1000 FROM generate_series(1, {rows}) i;
"""
_NOTES = """
CREATE TABLE notes (id bigint PRIMARY KEY, n int NOT NULL, body text NOT NULL);
ALTER TABLE notes ALTER body SET STORAGE EXTERNAL;
INSERT INTO notes SELECT i, 0, repeat(md5(i::text), 100) FROM generate_series(1, {rows}) i;
"""
_PRODUCTS = """
CREATE TABLE products (id bigint PRIMARY KEY, name varchar(80) NOT NULL, description varchar(240) NOT NULL, price numeric(10, 2) NOT NULL);
CREATE TABLE reviews (
    id bigint PRIMARY KEY, product_id bigint NOT NULL REFERENCES products, stars int NOT NULL, body varchar(240) NOT NULL
);
CREATE INDEX ON reviews (product_id);
INSERT INTO products
SELECT i, 'Lampe ' || md5(i::text), repeat(md5((i + 1)::text) || ' ', 3), (i % 100000) / 100.0 FROM generate_series(1, {products}) i;
INSERT INTO reviews
SELECT i, 1 + (i::bigint * 7919) % {products}, 1 + i % 5, 'good light, ' || repeat(md5(i::text) || ' ', 2)
FROM generate_series(1, {reviews}) i;
"""
_CHANGE_ALL = """
DO $$ BEGIN
    FOR i IN 1..{loops} LOOP
        UPDATE orders SET quantity = i WHERE id = 1 + (i::bigint * 7919) % {orders};
        IF i % 2 = 0 THEN UPDATE narrow SET n = i WHERE id = 1 + (i::bigint * 7919) % {narrow}; END IF;
        IF i % 10 = 0 THEN UPDATE notes SET n = i WHERE id = 1 + (i::bigint * 7919) % {notes}; END IF;
    END LOOP;
END $$
"""
_BANK = """
ALTER TABLE pgbench_history ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY;
"""
_CLIENTS = 4


@dataclass(frozen=True, slots=True)
class Table:
    """A table that is captured: its key, and the columns that both tools write alike (as plain integers and text)."""

    name: str
    key: str
    columns: tuple[str, ...]


ORDERS = Table("orders", "id", ("customer_id", "quantity", "status", "title", "note"))
NARROW = Table("narrow", "id", ("n",))
NOTES = Table("notes", "id", ("n", "body"))
"""Its bodies are out of line: updates leave them alone, and Postgres does not send them but in old rows."""
PRODUCTS = Table("products", "id", ("name", "description"))
REVIEWS = Table("reviews", "id", ("product_id", "stars", "body"))
AWAKE = "awake"
BANK = (
    Table("pgbench_accounts", "aid", ("bid", "abalance")),
    Table("pgbench_tellers", "tid", ("bid", "tbalance")),
    Table("pgbench_branches", "bid", ("bbalance",)),
    Table("pgbench_history", "id", ("tid", "bid", "aid", "delta")),
)


@dataclass(frozen=True, slots=True)
class Source:
    """One database of the stack's Postgres. Beside what is counted it has a small table by which a tool shows that it is awake."""

    dsn: str
    tables: tuple[Table, ...]

    @property
    def captured(self) -> list[str]:
        """Return the names of all tables to capture."""
        return [*(table.name for table in self.tables), AWAKE]

    def touch(self) -> None:
        """Change a row that is captured and not counted."""
        self.run(f"UPDATE {AWAKE} SET times = times + 1")

    def run(self, *statements: str, quick: bool = False) -> None:
        """Run statements, each by itself; `quick` does not wait for the disk at each commit."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            if quick:
                connection.execute("SET synchronous_commit = off")
            for statement in statements:
                connection.execute(statement.encode())

    def value(self, query: str) -> Any:
        """Return the one value that a query gives."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]

    def settle(self) -> None:
        """Leave nothing to do that would fall to whoever reads first."""
        self.run("VACUUM (FREEZE, ANALYZE)", "CHECKPOINT")

    def lsn(self) -> str:
        """Return where the write-ahead log ends now."""
        return str(self.value("SELECT pg_current_wal_insert_lsn()"))


def calm(postgres: Postgres) -> None:
    """Keep Postgres's own housekeeping out of the measurement."""
    with psycopg.connect(postgres.address(), autocommit=True) as connection:
        for statement in _QUIET.strip().splitlines():
            connection.execute(statement.encode())
        connection.execute("SELECT pg_reload_conf()")


def version(postgres: Postgres) -> str:
    """Return the server's version."""
    return str(Source(postgres.address(), ()).value("SHOW server_version"))


def orders(postgres: Postgres, database: str, rows: int) -> Source:
    """Make a database with `rows` orders."""
    source = Source(new_database(postgres, database), (ORDERS,))
    source.run(MAKE_AWAKE, _ORDERS.format(insert=insertion(1, rows)))
    source.settle()
    return source


def narrow(postgres: Postgres, database: str, rows: int) -> Source:
    """Make a database with one narrow table."""
    source = Source(new_database(postgres, database), (NARROW,))
    source.run(MAKE_AWAKE, _NARROW.format(rows=rows))
    source.settle()
    return source


def mixed(postgres: Postgres, database: str, rows: dict[str, int]) -> Source:
    """Make a database with so many orders, narrow rows and notes."""
    source = Source(new_database(postgres, database), (ORDERS, NARROW, NOTES))
    made = [_NARROW.format(rows=rows["narrow"]), _NOTES.format(rows=rows["notes"])]
    source.run(MAKE_AWAKE, _ORDERS.format(insert=insertion(1, rows["orders"])), *made)
    source.settle()
    return source


def products(postgres: Postgres, database: str, products: int, reviews: int) -> Source:
    """Make a database with products and their reviews."""
    source = Source(new_database(postgres, database), (PRODUCTS, REVIEWS))
    source.run(MAKE_AWAKE, _PRODUCTS.format(products=products, reviews=reviews))
    source.settle()
    return source


def change_all(changes: int, rows: dict[str, int]) -> tuple[str, dict[str, int]]:
    """Return the statement that makes so many updates in turn in all three tables, and how many of them in each."""
    loops = changes * 10 // 16
    each = {"orders": loops, "narrow": loops // 2, "notes": loops // 10}
    return _CHANGE_ALL.format(loops=loops, **rows), each


def insertion(first: int, last: int) -> str:
    """Return the statement that makes the orders from `first` to `last`."""
    return _INSERT.format(first=first, last=last)


def bank(postgres: Postgres, database: str, scale: int) -> Source:
    """Make a database with pgbench's tables; its history is given a key, without which neither tool could capture it."""
    source = Source(new_database(postgres, database), BANK)
    _pgbench(source, "--initialize", "--quiet", f"--scale={scale}")
    source.run(MAKE_AWAKE, _BANK)
    source.settle()
    return source


def change(source: Source, rows: int, per_transaction: int) -> Callable[[int], dict[str, int]]:
    """Return what makes a backlog of updates: given how many, it makes them and returns the records expected of each table."""
    begin = 0

    def make(changes: int) -> dict[str, int]:
        nonlocal begin
        source.run(f"CALL change({begin}, {changes}, {per_transaction}, {rows})", quick=True)
        begin += changes
        return {ORDERS.name: changes}

    return make


def transfer(source: Source) -> Callable[[int], dict[str, int]]:
    """Return what makes a backlog of pgbench's TPC-B: four changes in each transaction."""

    def make(changes: int) -> dict[str, int]:
        each = -(-changes // (4 * _CLIENTS))
        _pgbench(source, "--no-vacuum", f"--client={_CLIENTS}", "--jobs=2", f"--transactions={each}")
        return {table.name: each * _CLIENTS for table in BANK}

    return make


def new_database(postgres: Postgres, name: str) -> str:
    """Make a database; return its DSN."""
    with psycopg.connect(postgres.address(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return postgres.dsn(name)


def _pgbench(source: Source, *options: str) -> None:
    subprocess.run(
        [client("pgbench"), *options, source.dsn],
        env={**os.environ, "PGOPTIONS": "-c synchronous_commit=off"},
        capture_output=True,
        check=True,
    )


def client(name: str) -> str:
    """Return the path of one of Postgres's own clients. Raises Misconfigured `no-postgres-clients`."""
    found = shutil.which(name)
    if found is None:
        raise Misconfigured(
            "no-postgres-clients",
            f"There is no `{name}` on the PATH.",
            "Install Postgres's clients (Debian: apt-get install postgresql-client postgresql-contrib).",
        )
    return found
