"""What the shop reads of its views: pages from Redis, search from Elasticsearch, sales from the warehouse.

The same code reads the views that consumers keep and those that the dual writer keeps: only names and addresses differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from headrace.change import NOWHERE, Row, Version, format_lsn, parse_lsn
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.settings import Settings
from headrace.stores.elasticsearch import SearchReader
from headrace.stores.redis import Page, PageReader

Sql = Callable[[str], list[Row]]
"""Runs one SELECT on a warehouse and returns its rows."""

WAIT = 2.0
"""How long a page waits for the view to show what its reader has just written, seconds."""

_TOTALS = """
    SELECT (SELECT count(*) FROM orders) AS orders, coalesce(sum(quantity), 0)::BIGINT AS sold,
           coalesce(sum(quantity * price), 0)::VARCHAR AS revenue FROM order_items"""
_GENRES = """
    SELECT c.name, sum(i.quantity)::BIGINT AS sold, sum(i.quantity * i.price)::VARCHAR AS revenue
    FROM order_items i JOIN products p ON p.id = i.product_id JOIN categories c ON c.id = p.category_id
    GROUP BY c.name ORDER BY sum(i.quantity * i.price) DESC, c.name LIMIT 20"""
_FILMS = """
    SELECT p.id, p.name, sum(i.quantity)::BIGINT AS sold FROM order_items i JOIN products p ON p.id = i.product_id
    GROUP BY p.id, p.name ORDER BY sold DESC, p.id LIMIT 15"""


@dataclass(frozen=True, slots=True)
class Sales:
    """The sales page: totals {orders, sold, revenue}, genres [{name, sold, revenue}], films [{id, name, sold}]."""

    totals: Row
    genres: list[Row]
    films: list[Row]


class Views:
    """Reads three views."""

    def __init__(self, pages: PageReader, search: SearchReader, sql: Sql) -> None:
        """Read by these readers; the caller closes them."""
        self._pages, self._search, self._sql = pages, search, sql

    def page(self, page_id: str, after: Version = NOWHERE) -> Page | None:
        """Return a page as the consumer rendered it, or None. One round trip, or some more for up to `WAIT` seconds
        until the view has reached the token `after`.

        Raises:
            Misconfigured: `token-void`, when the token is of an earlier epoch than the view (S2).
        """
        deadline = time.monotonic() + WAIT
        while after > NOWHERE and not self._reached(after) and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._pages.get(page_id)  # only now: one that was read before could be older than what is reached

    def token(self, lsn: int) -> str:
        """Return the token of a commit that ended before `lsn`, as it stands in an address: ``1:0/17ABA90`` (S25).

        An application hears of epochs from the views alone: the token is of the epoch that the pages show now. It is empty
        when they do not answer: what was written is written, and nobody can wait for it.
        """
        with suppress(HeadraceError):
            applied = self._pages.applied()
            return f"{applied.epoch}:{format_lsn(lsn)}" if applied > NOWHERE else ""
        return ""

    def _reached(self, after: Version) -> bool:
        applied = self._pages.applied()
        if after.epoch < applied.epoch:
            raise Misconfigured(
                "token-void",
                f"{after} is of an epoch before {applied}: what was written then may be lost.",
                "Look at the page again, without `after`.",
            )
        return applied >= after

    def search(self, text: str) -> list[Row]:
        """Return up to 30 products for `text`, the best first."""
        return self._search.search(text)

    def sales(self) -> Sales:
        """Return the sales."""
        return Sales(self._sql(_TOTALS)[0], self._sql(_GENRES), self._sql(_FILMS))


def warehouse_sql(settings: Settings) -> Sql:
    """Return what asks the process that runs the warehouse.

    Raises when called:
        Transient: `warehouse-away`, when it does not answer.
        Misconfigured: `warehouse-refused`, when it refuses the query.
    """
    client = httpx.Client(base_url=f"http://{settings.warehouse_listen}", timeout=10)

    def run(statement: str) -> list[Row]:
        try:
            answer = client.post("/sql", json={"sql": statement})
        except httpx.HTTPError as error:
            raise Transient(
                "warehouse-away", f"The warehouse does not answer: {error}.", "Run: headrace run warehouse"
            ) from error
        if answer.status_code != httpx.codes.OK:
            raise Misconfigured("warehouse-refused", f"The warehouse refused a query: {answer.text}.")
        found: dict[str, Any] = answer.json()
        return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]

    return run


def parse_token(text: str) -> Version:
    """Undo `Views.token`; NOWHERE, which is always reached, for what is none."""
    epoch, _, lsn = text.partition(":")
    try:
        return Version(int(epoch), parse_lsn(lsn))
    except ValueError:
        return NOWHERE
