"""The file of the local row store: its tables, and the statements that more than one of its methods need."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from headrace import codec
from headrace.change import Change, source_of
from headrace.documents.paths import TOUCHED
from headrace.errors import Misconfigured, Transient, described
from headrace.settings import Settings

LAYOUT: Final = 7
"""Of the tables below, and of what is in them: a file of another layout is thrown away."""
SCHEMA = """
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB);
    CREATE TABLE IF NOT EXISTS rows (tbl TEXT, key TEXT, row BLOB, version INT, ordinal INT, xid INT, schema INT,
                                     part INT, at INT, came TEXT, applied INT, PRIMARY KEY (tbl, key)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS links (link INT, value TEXT, key TEXT, PRIMARY KEY (link, value, key)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS back (link INT, key TEXT, value TEXT, PRIMARY KEY (link, key)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS touched (doc INT, key TEXT, since INT, due INT, PRIMARY KEY (doc, key)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS shown (id TEXT PRIMARY KEY) WITHOUT ROWID;
"""
CACHE_KB: Final = 64 * 1024
PAGE_BYTES: Final = 8192
"""Rows are in the tree of their keys, of which a page holds a quarter at most: larger ones go on elsewhere."""
WAITS = "since IS NOT NULL"
IS_DUE = "(due <= :now OR due > :now + :interval)"
"""A time further away than the interval is of a clock that has been put back."""
TOUCH = f"INSERT INTO touched VALUES (?, ?, ?, 0) {TOUCHED}"
TOUCH_ALL = f"INSERT INTO touched SELECT ?, key, coalesce(?, version), 0 FROM rows WHERE tbl = ? {TOUCHED}"
LINK = "INSERT OR IGNORE INTO links VALUES (?, ?, ?)"
LINK_BACK = "INSERT OR REPLACE INTO back VALUES (?, ?, ?)"
INSERT = "INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
DELETE = "DELETE FROM rows WHERE tbl = ? AND key = ?"
STORE = """
    INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET row = excluded.row,
    version = excluded.version, ordinal = excluded.ordinal, xid = excluded.xid, schema = excluded.schema,
    part = excluded.part, at = excluded.at, came = excluded.came, applied = excluded.applied
"""
_AT_ONCE: Final = 50
BEGUN: Final = ("-begun", "-begun-new")
"""Of what `headrace.documents.begun` keeps beside the file."""


def insert(db: sqlite3.Connection, statement: str, rows: Iterable[tuple[Any, ...]]) -> int:
    """Run an INSERT that ends with its VALUES for each of some rows, fifty at once, which takes a quarter less; return how many are new."""
    head, _, values = statement.partition(" VALUES ")
    many, new = f"{head} VALUES {', '.join([values] * _AT_ONCE)}", 0
    rows = iter(rows)
    while len(piece := list(islice(rows, _AT_ONCE))) == _AT_ONCE:
        new += db.execute(many, list(chain.from_iterable(piece))).rowcount
    return new + (db.executemany(statement, piece).rowcount if piece else 0)


def stored(change: Change, key: str, version: int, at: int) -> tuple[Any, ...]:
    """Return the values of INSERT and STORE: a row with where it came from, and when (ms since the Unix epoch)."""
    table, op, _, row, _, ordinal, xid, schema, partition, offset, read = change
    came = op + read if read else op
    return (table, key, codec.dumps(row), version, ordinal, xid, schema, partition, offset, came, at)


@contextmanager
def errors(path: Path, close: Callable[[], None]) -> Iterator[None]:
    """Turn an error of SQLite into Transient: the consumer is opened again, and what was not committed is read again. What is damaged is
    closed and thrown away."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise Transient(
            "local-state", f"{path}: {error}.", "Free space in the folder of HEADRACE_STATE, or mend its rights."
        ) from error
    except sqlite3.DatabaseError as error:
        close()
        discard(path)
        raise Transient("local-state", f"{path} is of no use ({error}); it is loaded from the log again.") from error


@contextmanager
def of_the_store() -> Iterator[None]:
    """Turn an error of SQLite that the plugin's store raises into one of its own: it says nothing of the local rows."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise Transient(
            "local-state", f"The store raised {described(error)}.", "Free space, or mend rights."
        ) from error
    except sqlite3.Error as error:
        said = f"The store raised {described(error)}."
        raise Misconfigured("consumer-failed", said, "Mend it, and start it again.") from error


def place(settings: Settings, name: str) -> Path:
    """Return where a file of this source is: in its own folder. One that an earlier version kept beside those of others is moved there.

    Raises Transient: `local-state`, while a process of that version has it open.
    """
    path, old = settings.path(f"{settings.source}/{name}"), settings.path(name)
    if old.exists() and not path.exists():
        with suppress(OSError, sqlite3.Error):  # then it is loaded anew
            _move(old, path, settings.source)
    return path


def _move(old: Path, path: Path, source: str) -> None:
    with closing(sqlite3.connect(old)) as db:
        found = db.execute("SELECT value FROM meta WHERE name = 'position'").fetchone()
    if not found or set(map(source_of, codec.decode_position(found[0]).topics)) != {source}:
        return
    with errors(old, lambda: None), closing(sqlite3.connect(old)) as db:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("BEGIN IMMEDIATE")  # the last to close it takes in what SQLite keeps beside it
        db.rollback()
    for suffix in (*BEGUN, ""):
        if (at := old.with_name(old.name + suffix)).exists():
            at.replace(path.with_name(path.name + suffix))


def discard(path: Path) -> None:
    """Remove a local store with what SQLite keeps beside it. Raises Transient: `local-state`."""
    try:
        for suffix in ("", "-wal", "-shm", *BEGUN):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    except OSError as error:
        raise Transient(
            "local-state", f"{path}: {error}.", "Mend the rights of the folder of HEADRACE_STATE."
        ) from error
