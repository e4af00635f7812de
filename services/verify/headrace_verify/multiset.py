"""Tables without a key (S10): a view's rows against Postgres's as multisets, for no row of the one is a certain row of the other.

A row of such a table is written once and never changes, so the log decides what a snapshot has of it: a key whose row came by a transaction
that the snapshot does not see, or beyond X, is left out, and all others must be there, each value as often. That is exact however many
rows come meanwhile. Only a TRUNCATE, or the table being written anew by capture, takes and gives rows that the log cannot count: then the
table is compared again with a new snapshot (`Verifier`).

One temporary SQLite file a view, as `Ledger` [I10].
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator
from hashlib import blake2b
from typing import Any

import orjson

from headrace.change import Row
from headrace_verify.ledger import EXTRA, MISSING, Difference

_SHOWN = 200
_LEAST, _BEYOND = -float(1 << 63), float(1 << 64)
"""Whole floats between are written as integers, as far as there are any: to JSON 1 is 1.0."""


class Multiset:
    """What Postgres has of the tables without a key, and what the view has."""

    def __init__(self) -> None:
        """Make a file without a name: nothing is left of it after a kill."""
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(_SCHEMA)
        self._db.execute("BEGIN")
        self._columns: dict[str, tuple[str, ...]] = {}

    def close(self) -> None:
        """Remove it."""
        self._db.close()

    def clear(self, tables: Iterable[str]) -> None:
        """Forget the rows of `tables`."""
        for table in tables:
            self._db.execute("DELETE FROM expected WHERE tbl = ?", (table,))
            self._db.execute("DELETE FROM held WHERE tbl = ?", (table,))

    def expect(self, table: str, columns: tuple[str, ...], rows: Iterable[Row]) -> None:
        """Take rows of Postgres; only `columns` are compared."""
        self._columns[table] = columns
        self._db.executemany(
            "INSERT INTO expected VALUES (?, ?, 1, ?) ON CONFLICT DO UPDATE SET times = times + 1",
            ((table, *self._told(table, row)) for row in rows),
        )

    def hold(self, table: str, key: str, row: Row) -> None:
        """Take a row of the view: one whose key came before is one more."""
        if table in self._columns:
            digest, _ = self._told(table, row)
            query = "INSERT INTO held VALUES (?, ?, ?, 1, 0) ON CONFLICT DO UPDATE SET times = times + 1"
            self._db.execute(query, (table, key, digest))

    def leave_out(self, table: str, key: str) -> None:
        """Do not count a row of the view, once: the snapshot cannot have it."""
        self._db.execute("UPDATE held SET unseen = 1 WHERE tbl = ? AND key = ?", (table, key))

    def count(self) -> int:
        """Return how many rows are expected."""
        return int(self._db.execute("SELECT coalesce(sum(times), 0) FROM expected").fetchone()[0])

    def differing(self) -> set[str]:
        """Return the tables that are not equal."""
        return {table for table, *_ in self._db.execute(_DIFFERING)}

    def differences(self, tables: Collection[str]) -> Iterator[Difference]:
        """Yield a missing row of `tables` by what it holds, and an extra one by its key, each as often as it is."""
        number = 0
        for table, digest, text, more in self._db.execute(_DIFFERING):
            if table not in tables:
                continue
            for _ in range(more):
                number += 1
                yield Difference(MISSING, table, f"{text} (row {number})")
            if more < 0:
                query = (
                    "SELECT key FROM held WHERE tbl = ? AND digest = ? AND times > unseen "
                    "ORDER BY times DESC, key DESC LIMIT ?"
                )
                for (key,) in self._db.execute(query, (table, digest, -more)):
                    yield Difference(EXTRA, table, key)

    def _told(self, table: str, row: Row) -> tuple[bytes, str]:
        """Return what stands for a row's values, and how it is shown."""
        plain = {name: _plain(row.get(name)) for name in self._columns[table]}
        text = orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)
        shown = text.decode()
        return blake2b(text, digest_size=16).digest(), shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _plain(value: Any) -> Any:
    """Return a value so that those which mean the same have the same JSON (see `compare.same`)."""
    if isinstance(value, float) and value.is_integer() and _LEAST <= value < _BEYOND:
        return int(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, dict) else value


_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE expected (tbl TEXT, digest BLOB, times INT, shown TEXT, PRIMARY KEY (tbl, digest)) WITHOUT ROWID;
CREATE TABLE held (tbl TEXT, key TEXT, digest BLOB, times INT, unseen INT, PRIMARY KEY (tbl, key)) WITHOUT ROWID;
"""
_DIFFERING = """
SELECT tbl, digest, max(shown), sum(times) FROM (
  SELECT tbl, digest, shown, times FROM expected
  UNION ALL SELECT tbl, digest, '', -sum(times - unseen) FROM held GROUP BY tbl, digest
) GROUP BY tbl, digest HAVING sum(times) <> 0 ORDER BY tbl, digest
"""
