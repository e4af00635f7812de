"""The seam through which every write of the shop goes, and its first implementation: write once.

The other implementation, which writes to every store itself, is in `headrace_shop.dual`. Nothing else of the shop knows
which of the two it uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from psycopg_pool import ConnectionPool

from headrace.change import parse_lsn
from headrace_shop.database import Connection
from headrace_shop.edits import Edit, Made


@dataclass(frozen=True, slots=True)
class Written:
    """What a committed transaction was. `lsn` is at or after its commit: a view that reached it shows it (S25).

    It is 0 when every view was written already: there is nothing to wait for.
    """

    made: Made
    lsn: int


class Writes(Protocol):
    """How the shop writes."""

    def write(self, *edits: Edit) -> Written:
        """Make all of `edits` or none, in one Postgres transaction, and return when it is committed."""

    def close(self) -> None:
        """Release connections."""


class LogWrites:
    """One Postgres transaction and nothing else: the views follow by the log."""

    def __init__(self, dsn: str, connections: int = 4) -> None:
        """Connect to the database `dsn`, with up to `connections` transactions at once."""
        self._pool = pool(dsn, connections)

    def write(self, *edits: Edit) -> Written:
        """See `Writes`."""
        with self._pool.connection() as connection:
            return commit(connection, edits)

    def close(self) -> None:
        """See `Writes`."""
        self._pool.close()


def pool(dsn: str, connections: int) -> ConnectionPool[Connection]:
    """Return an open pool of connections in autocommit; a dead one is replaced when it is asked for."""
    kwargs = {"autocommit": True, "connect_timeout": 5, "application_name": "headrace-shop"}
    return ConnectionPool(
        dsn,
        min_size=1,
        max_size=connections,
        kwargs=kwargs,
        check=ConnectionPool.check_connection,
        timeout=10,
        open=True,
    )


def commit(connection: Connection, edits: tuple[Edit, ...]) -> Written:
    """Make `edits` in one transaction. The token is read after COMMIT: inside the transaction it is too low (S25)."""
    made = Made()
    with connection.transaction():
        for edit in edits:
            edit.make(connection, made)
    (lsn,) = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone() or ("0/0",)
    return Written(made, parse_lsn(lsn))
