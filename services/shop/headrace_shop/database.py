"""The shop's database: its schema, and loading it by COPY."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import psycopg

from headrace.errors import Misconfigured, Transient
from headrace_shop import catalogue, generate
from headrace_shop.generate import Span

Connection = psycopg.Connection[tuple[Any, ...]]

KEYS = {
    "categories": ("id",),
    "products": ("id",),
    "reviews": ("id",),
    "customers": ("id",),
    "orders": ("id",),
    "order_items": ("order_id", "line"),
    "ledger": ("seq",),
}
"""The key of each table."""

TABLES = ("categories", "products", "reviews", "customers", "orders", "order_items")


@dataclass(frozen=True, slots=True)
class Amounts:
    """How many rows to add."""

    products: int
    reviews: int
    customers: int
    orders: int


def connect(dsn: str) -> Connection:
    """Connect, in autocommit, so that each transaction is one that the code names.

    Raises:
        Transient: `shop-database`, when Postgres does not answer or refuses.
    """
    try:
        return psycopg.connect(dsn, autocommit=True, connect_timeout=5, application_name="headrace-shop")
    except psycopg.OperationalError as error:
        reason = str(error).strip().splitlines()[0]
        raise Transient(
            "shop-database", f"The shop cannot reach its database: {reason}.", "Change HEADRACE_DSN or give --dsn."
        ) from error


def create(connection: Connection) -> None:
    """Make the shop's tables where they are missing."""
    schema = files("headrace_shop").joinpath("sql/schema.sql").read_text(encoding="utf-8")
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('headrace-shop'))")
        connection.execute(schema.encode())


def load(connection: Connection, amounts: Amounts, seed: int) -> dict[str, int]:
    """Add rows behind those that are there, in one transaction; return how many each table then holds.

    Raises:
        Misconfigured: `shop-empty`, when reviews or orders are asked for where there are no products or customers.
    """
    with connection.transaction():
        categories = _categories(connection)
        span = _span(connection, "products", amounts.products)
        _copy(
            connection,
            "products (id, category_id, name, description, director, year, rating, price, stock)",
            generate.products(span, categories, seed),
        )
        span = _span(connection, "customers", amounts.customers)
        _copy(connection, "customers (id, name, email)", generate.customers(span, seed))
        _load_reviews(connection, amounts.reviews, seed)
        _load_orders(connection, amounts.orders, seed)
        for table in ("products", "reviews", "customers", "orders"):
            connection.execute(
                f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), coalesce(max(id), 1)) FROM {table}".encode()
            )
    connection.execute("ANALYZE")
    return counts(connection)


def counts(connection: Connection) -> dict[str, int]:
    """Return the number of rows of each table."""
    union = " UNION ALL ".join(f"SELECT '{table}', count(*) FROM {table}" for table in TABLES)
    return dict(connection.execute(union.encode()).fetchall())


def _load_reviews(connection: Connection, count: int, seed: int) -> None:
    span = _span(connection, "reviews", count)
    products = _ids(connection, "products", needed=count)
    _copy(
        connection,
        "reviews (id, product_id, author, stars, body, created_at)",
        generate.reviews(span, products, seed),
    )


def _load_orders(connection: Connection, count: int, seed: int) -> None:
    span = _span(connection, "orders", count)
    customers = _ids(connection, "customers", needed=count)
    prices = connection.execute("SELECT id, price FROM products ORDER BY id").fetchall() if count else []
    _copy(connection, "orders (id, customer_id, placed_at, status)", generate.orders(span, customers, seed))
    _copy(
        connection,
        "order_items (order_id, line, product_id, quantity, price)",
        generate.order_items(span, prices, seed),
    )


def _categories(connection: Connection) -> dict[str, int]:
    rows = enumerate(catalogue.genres(), start=1)
    with connection.cursor() as cursor:
        cursor.executemany("INSERT INTO categories (id, name) VALUES (%s, %s) ON CONFLICT (id) DO NOTHING", list(rows))
    return {name: number for number, name in enumerate(catalogue.genres(), start=1)}


def _span(connection: Connection, table: str, count: int) -> Span:
    (last,) = connection.execute(f"SELECT coalesce(max(id), 0) FROM {table}".encode()).fetchone() or (0,)
    return Span(last, count)


def _ids(connection: Connection, table: str, *, needed: int) -> list[int]:
    ids = [number for (number,) in connection.execute(f"SELECT id FROM {table} ORDER BY id".encode())] if needed else []
    if needed and not ids:
        raise Misconfigured("shop-empty", f"The shop has no {table}.", f"Give --{table} too.")
    return ids


def _copy(connection: Connection, target: str, rows: Iterable[Sequence[Any]]) -> None:
    with connection.cursor() as cursor, cursor.copy(f"COPY {target} FROM STDIN".encode()) as copy:
        for row in rows:
            copy.write_row(row)
