"""A table's rows on disk (I10): read as a whole, because it cannot be read in chunks, and kept until the stream is where they belong.

The lines of COPY … TO STDOUT as they come: none has a newline within. The file has no name, so that nothing is left of it after a kill.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from headrace.errors import HeadraceError, Misconfigured
from headrace_capture.replication import Stopped
from headrace_capture.tables import copy_fields

_STEPS = 1_000_000
"""Steps of SQLite's machine between two signs of life."""


class Spool:
    """Rows in the order in which they were added; its length is their number."""

    def __init__(self) -> None:
        """Make it empty."""
        self._file = tempfile.TemporaryFile(prefix="headrace-spool-")  # noqa: SIM115  `close` closes it
        self._rows = 0

    def add(self, line: bytes) -> None:
        """Add the line of a row, with its newline. Raises Misconfigured: `spool-full`."""
        try:
            self._file.write(line)
        except OSError as error:
            raise _full(error) from error
        self._rows += 1

    def end(self) -> None:
        """Say that there are no more rows. Raises Misconfigured: `spool-full`."""
        try:
            self._file.flush()
        except OSError as error:
            raise _full(error) from error

    def __len__(self) -> int:
        """Return how many rows there are."""
        return self._rows

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the values of each row."""
        self._file.seek(0)
        return (copy_fields(line[:-1]) for line in self._file)

    def close(self) -> None:
        """Remove it."""
        self._file.close()


@contextmanager
def room() -> Iterator[None]:
    """Say what it means that SQLite cannot write a table's keys to its file without a name. Raises Misconfigured: `spool-full`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise Misconfigured(
            "spool-full",
            f"The folder for temporary files does not take a table's keys: {error}.",
            "Make room in TMPDIR (/var/tmp where it is not set), or set it to a folder with more and start capture again.",
        ) from error


def paged(
    db: sqlite3.Connection, query: str, bound: int, most: int, seal: Callable[[], None], tick: Callable[[], None]
) -> Iterator[Any]:
    """Yield what a query finds of keys, in their order: its values are the key that they come after, `bound`, and `most`, how many at once.

    `seal` is called before each look for some, and `tick` amid it, which may end it by Stopped: all of a table may have to be looked at.

    Raises:
        Misconfigured: `spool-full`.
    """
    after = b""
    while True:
        seal()
        rows = _found(db, query, (after, bound, most), tick)
        yield from rows
        if len(rows) < most:
            return
        after = rows[-1][0]


def _found(db: sqlite3.Connection, query: str, values: Sequence[Any], tick: Callable[[], None]) -> list[Any]:
    db.set_progress_handler(lambda: _stopped(tick), _STEPS)
    try:
        with room():
            try:
                return db.execute(query, values).fetchall()
            except sqlite3.OperationalError:
                tick()  # which raises, if that is what ended the look
                raise
    finally:
        db.set_progress_handler(None, 0)


def _stopped(tick: Callable[[], None]) -> bool:
    """Say that capture lives; whoever does not answer is asked again soon. Return whether it is asked to stop."""
    try:
        with suppress(HeadraceError):
            tick()
    except Stopped:
        return True
    return False


def _full(error: OSError) -> Misconfigured:
    return Misconfigured(
        "spool-full",
        f"{tempfile.gettempdir()} does not take a table's rows: {error.strerror}.",
        "Make room there, or set TMPDIR to a folder with more and start capture again.",
    )
