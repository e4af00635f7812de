"""A steady load of edits, the same for the same seed and the same shop.

Which numbers were committed stands in the ledger, in Postgres; a worker that is killed leaves nothing open there. The
journal file is for people and for tests that want to follow: one line a committed transaction, written after COMMIT.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TextIO

import psycopg

from headrace.errors import Misconfigured
from headrace_shop import edits, generate
from headrace_shop.database import Connection
from headrace_shop.edits import Edit
from headrace_shop.writes import Writes

_EDITION = re.compile(r" \([^()]*\)$")
_MORE = " & more"
_SEVERAL = 1 / 8
_REGRETTED = 1 / 20
_NEVER_ORDERED = """
    SELECT id FROM products p WHERE NOT EXISTS (SELECT FROM order_items WHERE product_id = p.id)
    ORDER BY id DESC LIMIT 1"""


class RolledBackError(Exception):
    """Raised by `Regret` inside a transaction to end it."""


@dataclass(slots=True)
class Done:
    """What a load did: transactions committed, rolled back on purpose, refused; changes and their highest number."""

    committed: int = 0
    rolled_back: int = 0
    refused: int = 0
    changes: int = 0
    highest: int = 0


@dataclass(frozen=True, slots=True)
class Regret:
    """Ends the transaction that it stands in: the edits before it never happened."""

    def make(self, _connection: Connection, _made: edits.Made) -> None:
        """Raise RolledBackError."""
        raise RolledBackError


class Load:
    """Draws edits of what is in the shop now."""

    def __init__(self, connection: Connection, seed: int) -> None:
        """Read through `connection` which rows there are."""
        self._connection = connection
        self._random = Random(f"work {seed}")
        self._kinds: list[tuple[Callable[[], Edit], int]] = [
            (self._price, 400),
            (self._review, 200),
            (self._order, 160),
            (self._move_review, 40),
            (self._delete_review, 60),
            (self._move_product, 40),
            (self._rename_product, 40),
            (self._rename_category, 2),  # seldom: hundreds of documents show it
            (self._add_product, 30),
            (self._delete_product, 20),
        ]

    def transaction(self) -> list[Edit]:
        """Return the edits of the next transaction: mostly one, one in eight times several, one in twenty regretted."""
        kinds, weights = zip(*self._kinds, strict=True)
        several = self._random.randint(2, 5) if self._random.random() < _SEVERAL else 1
        chosen: list[Edit] = [kind() for kind in self._random.choices(kinds, weights=weights, k=several)]
        return [*chosen, Regret()] if self._random.random() < _REGRETTED else chosen

    def _row(self, table: str, columns: str = "id") -> tuple[Any, ...]:
        """Return some columns of a row near a random one."""
        statement = f"""
            SELECT {columns} FROM {table}
            WHERE id >= (SELECT min(id) + floor(%s * (max(id) - min(id) + 1))::bigint FROM {table})
            ORDER BY id LIMIT 1"""
        row = self._connection.execute(statement.encode(), (self._random.random(),)).fetchone()
        if row is None:
            raise Misconfigured("shop-empty", f"The shop has no {table}.", "Run `headrace shop load`.")
        return row

    def _pick(self, table: str) -> int:
        return int(self._row(table)[0])

    def _product(self) -> int:
        return self._pick("products")

    def _price(self) -> Edit:
        return edits.SetPrice(self._product(), generate.price(self._random))

    def _review(self) -> Edit:
        return edits.AddReview(self._product(), generate.person(self._random), *generate.opinion(self._random))

    def _order(self) -> Edit:
        lines = {self._product(): self._random.randint(1, 3) for _ in range(self._random.randint(1, 3))}
        return edits.PlaceOrder(self._pick("customers"), list(lines.items()))

    def _move_review(self) -> Edit:
        return edits.MoveReview(self._pick("reviews"), self._product())

    def _delete_review(self) -> Edit:
        return edits.DeleteReview(self._pick("reviews"))

    def _move_product(self) -> Edit:
        return edits.MoveProduct(self._product(), self._pick("categories"))

    def _rename_product(self) -> Edit:
        product, name = self._row("products", "id, name")
        edition = self._random.choice(generate.EDITIONS)
        return edits.Rename("products", product, f"{_EDITION.sub('', name)} ({edition})")

    def _rename_category(self) -> Edit:
        category, name = self._row("categories", "id, name")
        return edits.Rename("categories", category, name.removesuffix(_MORE) if name.endswith(_MORE) else name + _MORE)

    def _add_product(self) -> Edit:
        name = f"A film by {generate.person(self._random)}"
        return edits.AddProduct(self._pick("categories"), name, "Just in.", generate.price(self._random))

    def _delete_product(self) -> Edit:
        row = self._connection.execute(_NEVER_ORDERED.encode()).fetchone()
        return edits.DeleteProduct(row[0]) if row else self._price()


def work(load: Load, writes: Writes, ticks: Iterator[None], journal: Path | None = None) -> Done:
    """Write one transaction of `load` a tick; return what was done. Ends early, but cleanly, at KeyboardInterrupt."""
    done = Done()
    opened = journal.open("a", encoding="utf-8", buffering=1) if journal else nullcontext()
    with opened as lines, suppress(KeyboardInterrupt):
        for _ in ticks:
            _step(load.transaction(), writes, done, lines)
    return done


def paced(rate: float, seconds: float | None) -> Iterator[None]:
    """Yield `rate` times a second, for `seconds` or for ever; behind schedule, without a pause."""
    start = time.monotonic()
    count = 0
    while seconds is None or count < rate * seconds:
        time.sleep(max(0.0, start + count / rate - time.monotonic()))
        count += 1
        yield


def _step(transaction: list[Edit], writes: Writes, done: Done, journal: TextIO | None) -> None:
    try:
        made = writes.write(*transaction).made
    except RolledBackError:
        done.rolled_back += 1
    except (Misconfigured, psycopg.errors.IntegrityError, psycopg.errors.DeadlockDetected):
        done.refused += 1  # somebody else was faster: the row is gone
    else:
        done.committed += 1
        done.changes += len(made.numbers)
        done.highest = max(done.highest, *made.numbers)
        if journal:
            journal.write(" ".join(map(str, made.numbers)) + "\n")
