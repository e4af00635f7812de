"""What the shop does: each edit is one or more numbered changes, made within somebody's Postgres transaction.

Every change takes a number, leaves it in the row and in the ledger (sql/schema.sql), and notes the rows, which
only the dual writer needs to know, so that it can find the documents: writing through the log, nobody has to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

from headrace.errors import Misconfigured
from headrace_shop.database import Connection


@dataclass(slots=True)
class Made:
    """What a transaction did so far.

    Attributes:
        numbers: The number of every change, in order.
        rows: ``(table, key)`` of every row created, updated or deleted, the key in the order of its columns; and of
            rows whose documents showed such a row before and do not any more.
        ids: The ids of the rows that it created, in order.
    """

    numbers: list[int] = field(default_factory=list)
    rows: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


class Edit(Protocol):
    """Something that a person does in the shop."""

    def make(self, connection: Connection, made: Made) -> None:
        """Make the changes in the open transaction of `connection` and note them in `made`.

        Raises:
            Misconfigured: `no-such-row`.
        """


@dataclass(frozen=True, slots=True)
class SetPrice:
    """Somebody edits a price."""

    product: int
    price: Decimal

    def make(self, connection: Connection, made: Made) -> None:
        """See `Edit`."""
        update(connection, made, "products", self.product, "price = %s", self.price)


@dataclass(frozen=True, slots=True)
class Rename:
    """A product or a category gets another name."""

    table: str
    id: int
    name: str

    def make(self, connection: Connection, made: Made) -> None:
        """See `Edit`."""
        update(connection, made, self.table, self.id, "name = %s", self.name)


@dataclass(frozen=True, slots=True)
class MoveProduct:
    """A product goes to another category."""

    product: int
    category: int

    def make(self, connection: Connection, made: Made) -> None:
        """See `Edit`."""
        _leave(connection, made, "categories", "products", "category_id", self.product)
        update(connection, made, "products", self.product, "category_id = %s", self.category)


@dataclass(frozen=True, slots=True)
class AddProduct:
    """A product appears, without stock."""

    category: int
    name: str
    description: str
    price: Decimal

    def make(self, connection: Connection, made: Made) -> None:
        """See `Edit`."""
        insert(
            connection,
            made,
            "products",
            category_id=self.category,
            name=self.name,
            description=self.description,
            price=self.price,
            stock=0,
        )


@dataclass(frozen=True, slots=True)
class DeleteProduct:
    """A product disappears with its reviews; one that was ever ordered stays."""

    product: int

    def make(self, connection: Connection, made: Made) -> None:
        """See `Edit`."""
        if connection.execute("SELECT FROM order_items WHERE product_id = %s LIMIT 1", (self.product,)).fetchone():
            raise Misconfigured("no-such-row", f"Product {self.product} was ordered and stays.")
        for (review,) in connection.execute(
            "SELECT id FROM reviews WHERE product_id = %s FOR UPDATE", (self.product,)
        ).fetchall():
            delete(connection, made, "reviews", review)
        _leave(connection, made, "categories", "products", "category_id", self.product)
        delete(connection, made, "products", self.product)


@dataclass(frozen=True, slots=True)
class AddReview:
    """A customer writes a review."""

    product: int
    author: str
    stars: int
    body: str

    def make(self, connection: Connection, made: Made) -> None:
        """See `Edit`."""
        insert(
            connection, made, "reviews", product_id=self.product, author=self.author, stars=self.stars, body=self.body
        )


@dataclass(frozen=True, slots=True)
class MoveReview:
    """A review was written for the wrong product."""

    review: int
    product: int

    def make(self, connection: Connection, made: Made) -> None:
        """See `Edit`."""
        _leave(connection, made, "products", "reviews", "product_id", self.review)
        update(connection, made, "reviews", self.review, "product_id = %s", self.product)


@dataclass(frozen=True, slots=True)
class DeleteReview:
    """A review is taken down."""

    review: int

    def make(self, connection: Connection, made: Made) -> None:
        """See `Edit`."""
        _leave(connection, made, "products", "reviews", "product_id", self.review)
        delete(connection, made, "reviews", self.review)


@dataclass(frozen=True, slots=True)
class PlaceOrder:
    """A customer orders, ``(product, quantity)`` a line, at the prices of the moment; stock never goes below zero."""

    customer: int
    lines: Sequence[tuple[int, int]]

    def make(self, connection: Connection, made: Made) -> None:
        """See `Edit`."""
        order = insert(connection, made, "orders", customer_id=self.customer, status="placed")
        for line, (product, quantity) in enumerate(sorted(self.lines), start=1):
            update(connection, made, "products", product, "stock = greatest(stock - %s, 0)", quantity)
            (price,) = connection.execute("SELECT price FROM products WHERE id = %s", (product,)).fetchone() or (None,)
            insert(
                connection,
                made,
                "order_items",
                order_id=order,
                line=line,
                product_id=product,
                quantity=quantity,
                price=price,
            )


def insert(connection: Connection, made: Made, table: str, **values: Any) -> int:
    """Insert one row; return its id, or the first column of its key. Raises psycopg's errors as they are."""
    number = _number(connection, made, "insert", table)
    key = "order_id, line" if table == "order_items" else "id"
    columns, places = ", ".join(values), ", ".join(["%s"] * len(values))
    statement = f"INSERT INTO {table} ({columns}, seq) VALUES ({places}, %s) RETURNING {key}"
    row = connection.execute(statement.encode(), (*values.values(), number)).fetchone() or ()
    made.rows.append((table, row))
    made.ids.append(row[0])
    return int(row[0])


def update(connection: Connection, made: Made, table: str, row_id: int, assignment: str, value: Any) -> None:
    """Change one column of one row. Raises Misconfigured: `no-such-row`."""
    number = _number(connection, made, "update", table)
    statement = f"UPDATE {table} SET {assignment}, seq = %s WHERE id = %s"
    _one(connection.execute(statement.encode(), (value, number, row_id)).rowcount, table, row_id)
    made.rows.append((table, (row_id,)))


def delete(connection: Connection, made: Made, table: str, row_id: int) -> None:
    """Delete one row; its number is in the ledger alone. Raises Misconfigured: `no-such-row`."""
    _number(connection, made, "delete", table)
    _one(connection.execute(f"DELETE FROM {table} WHERE id = %s".encode(), (row_id,)).rowcount, table, row_id)
    made.rows.append((table, (row_id,)))


def _leave(connection: Connection, made: Made, parents: str, table: str, column: str, row_id: int) -> None:
    """Note the row of `parents` that row `id` of `table` is about to leave."""
    row = connection.execute(f"SELECT {column} FROM {table} WHERE id = %s FOR UPDATE".encode(), (row_id,)).fetchone()
    if row:
        made.rows.append((parents, row))


def _number(connection: Connection, made: Made, action: str, table: str) -> int:
    row = connection.execute(
        "INSERT INTO ledger (seq, what) VALUES (nextval('workload_seq'), %s) RETURNING seq", (f"{action} {table}",)
    ).fetchone()
    made.numbers.append(row[0] if row else 0)
    return made.numbers[-1]


def _one(count: int, table: str, row_id: int) -> None:
    if count != 1:
        raise Misconfigured("no-such-row", f"There is no row {row_id} in {table}.", "It was deleted meanwhile.")
