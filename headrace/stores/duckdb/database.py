"""One DuckDB file, shared by everything in the process that uses it.

DuckDB admits one process to a file, and one configuration within it. Every thread works with its own cursor; writers
take turns, as two transactions that change the catalogue would fail each other.

When the disk is full a commit fails, and nothing of it is there. But one that is durable may find no room to move the write-ahead log
into the file, and then DuckDB gives up whatever is open: all of it is closed and the file opened anew, in the same process.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb

from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.stores.duckdb.names import ambiguous

log = logging.getLogger(__name__)

_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,  # no statement reads or writes a file or the network
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,  # no statement sees a variable of this program
    "checkpoint_threshold": "64MB",  # of write-ahead log: by default after 16, a load compresses its last rows four times as often
}
_NO_ROOM = ("Could not write file", "No space left on device")
"""Also within what DuckDB says when it gives up."""
_DAMAGE = (
    "Corrupt database",
    "Corrupt WAL",
    "Could not read enough bytes",
    "not a valid DuckDB database",
    "WAL does not match",
    "checkpoint iteration does not match",
    "data may be corrupt",
)
_open: dict[Path, Database] = {}
_opening = threading.Lock()


class Database:
    """An open file; `opened` gives the process's one object for it, `release` gives it back."""

    def __init__(self, path: Path, memory: str) -> None:
        """Open or make the file; callers use `opened`."""
        self.path = path
        self.users = 0
        self._memory = memory
        self._turn = threading.RLock()
        self._lent: list[duckdb.DuckDBPyConnection] = []
        self._gave_up = False
        self._root = _connect(path, memory)

    @staticmethod
    def file(path: str) -> Path:
        """Return the file that the setting names."""
        return Path(path).expanduser().resolve()

    @classmethod
    def opened(cls, path: str, memory: str) -> Database:
        """Return the object for the file at `path`, opened if nobody in the process has.

        Args:
            path: The file; its folder is made.
            memory: The most that DuckDB may use, as ``2GB``.

        Raises:
            Misconfigured: `warehouse-locked` (another process has it), `warehouse-file`, `warehouse-version`,
            `warehouse-memory`. Transient: `warehouse-io`.
        """
        file = cls.file(path)
        if ambiguous(file.name):
            raise Misconfigured(
                "warehouse-file",
                f"{file}: a schema within it has this name, and DuckDB would take it for the file's.",
                "Name the file otherwise in HEADRACE_WAREHOUSE; one that is there can be renamed.",
            )
        with _opening:
            database = _open.get(file) or cls(file, memory)
            _open[file] = database
            database.renew()
            database.users += 1
            return database

    def release(self) -> None:
        """Give one use back; the last one closes the file."""
        with _opening:
            self.users -= 1
            if self.users == 0:
                del _open[self.path]
                self._root.close()

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """Return a connection for one thread, which closes it soon. Raises Transient: `warehouse-io`, while the file is opened anew."""
        with self.translated():
            return self._root.cursor()

    def lend(self) -> duckdb.DuckDBPyConnection:
        """Return a connection that is kept, and used within `writing` and `looking` only: when DuckDB has given up it is closed for whom
        has it. Give it back by `take_back`."""
        cursor = self.cursor()
        self._lent.append(cursor)
        return cursor

    def take_back(self, cursor: duckdb.DuckDBPyConnection) -> None:
        """Close a connection that was lent."""
        self._lent.remove(cursor)
        cursor.close()

    def renew(self) -> None:
        """Open the file anew if DuckDB gave up. Raises Transient: `warehouse-io`, also while a query still runs: it holds what was open."""
        if not self._gave_up:
            return
        with self._turn, self.translated():
            for cursor in [*self._lent, self._root]:
                cursor.close()
            self._root = _configured(self.path, self._memory)
            self._gave_up = False

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Raise errors of DuckDB as ours; remember what they say of the file."""
        try:
            yield
        except duckdb.Error as error:
            self._gave_up = self._gave_up or isinstance(error, duckdb.FatalException)
            raise _ours(error, self.path) from error

    @contextlib.contextmanager
    def reading(self, cursor: duckdb.DuckDBPyConnection) -> Iterator[None]:
        """Let a block see one state, and change nothing. Raises what DuckDB raises."""
        cursor.execute("BEGIN TRANSACTION READ ONLY")
        try:
            yield
        finally:
            with contextlib.suppress(duckdb.Error):
                cursor.rollback()

    @contextlib.contextmanager
    def looking(self, cursor: duckdb.DuckDBPyConnection) -> Iterator[None]:
        """As `reading`, on a cursor that was lent. Raises HeadraceError: what DuckDB raised, translated."""
        with self.translated(), self.reading(cursor):
            yield

    @contextlib.contextmanager
    def writing(self, cursor: duckdb.DuckDBPyConnection) -> Iterator[None]:
        """Run a block as one durable transaction on `cursor`, alone.

        Raises:
            HeadraceError: what DuckDB raised, translated. Nothing of the block is durable then.
        """
        with self._turn, self.translated():
            cursor.begin()
            try:
                yield
                cursor.commit()
            except BaseException:
                with contextlib.suppress(duckdb.Error):
                    cursor.rollback()
                raise


def first(cursor: duckdb.DuckDBPyConnection, sql: str, *values: object) -> tuple[Any, ...] | None:
    """Return the first row, and leave no result open: that would keep the connection from other work."""
    found = cursor.execute(sql, list(values)).fetchall()
    return found[0] if found else None


def _ours(error: duckdb.Error, path: Path) -> HeadraceError:
    text = str(error).splitlines()[0]
    if _is_no_room(error):
        return _no_room(error)
    if _is_damage(error, text):
        _mark(path).touch()
        return Misconfigured(
            "warehouse-damaged",
            f"{path} is damaged: {text}",
            f"Run this process again: it sets the file aside as {path.name}.broken and loads a new one from zero. If you restore a copy"
            f" first, remove {_mark(path).name} and {path.name}.wal too.",
        )
    if isinstance(error, (duckdb.FatalException, duckdb.InternalException)):
        again = f"Run this process again: nothing durable is lost. If it stops so again, {_anew(path)}"
        return Misconfigured("warehouse-failed", f"DuckDB gave up: {text}", again)
    if isinstance(error, duckdb.OutOfMemoryException):
        return Transient("warehouse-memory", f"DuckDB needs more memory: {text}", "Raise HEADRACE_WAREHOUSE_MEMORY.")
    if isinstance(error, (duckdb.OperationalError, duckdb.TransactionException)):
        return Transient("warehouse-io", f"DuckDB cannot write or read: {text}", "See the message.")
    said = f"DuckDB refused a statement of headrace: {text}"
    return Misconfigured(
        "warehouse-failed", said, f"Report this, and run this process again. If it stops so again, {_anew(path)}"
    )


def _anew(path: Path) -> str:
    mark = shlex.quote(str(_mark(path)))
    return f"run: touch {mark}. Then it sets the file aside as {path.name}.broken, and loads a new one from zero."


def damage(error: duckdb.Error, path: Path) -> Misconfigured | None:
    """Return what it means for who only reads where he came upon damage; None for another error."""
    text = str(error).splitlines()[0]
    if not _tells_damage(error, text):
        return None
    remedy = f"Before the process of the warehouse is started again, {_anew(path)}"
    return Misconfigured("warehouse-damaged", f"{path} is damaged: {text}", remedy)


def _is_damage(error: duckdb.Error, text: str) -> bool:
    """Whether DuckDB says that the file is damaged; in other errors the same words may be a row's."""
    if isinstance(error, duckdb.TransactionException):  # also of a write-ahead log over a damaged block
        return any(f"Failed to commit: {sign}" in text for sign in _DAMAGE)
    return _tells_damage(error, text) or isinstance(error, duckdb.SerializationException)


def _tells_damage(error: duckdb.Error, text: str) -> bool:
    return type(error) in {duckdb.Error, duckdb.IOException} and any(sign in text for sign in _DAMAGE)


def _is_no_room(error: duckdb.Error) -> bool:
    """Whether the disk is full, or a cursor was closed because it was."""
    return any(sign in str(error) for sign in _NO_ROOM) or isinstance(error, duckdb.ConnectionException)


def _no_room(error: duckdb.Error) -> Transient:
    text = str(error).splitlines()[0]
    return Transient("warehouse-io", f"DuckDB cannot write: {text}", "Free the disk of HEADRACE_WAREHOUSE.")


def _connect(path: Path, memory: str) -> duckdb.DuckDBPyConnection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _mark(path).exists():
            return _configured(path, memory)
    except OSError as error:
        raise _file(path, str(error)) from error
    except duckdb.Error as error:
        refusal = _refusal(path, error)
        if refusal.code != "warehouse-damaged":
            raise refusal from error
        log.warning("%s is damaged: %s", path, error)
    _set_aside(path)
    return _configured(path, memory)


def _set_aside(path: Path) -> None:
    """Rename the file and its write-ahead log; what was set aside before stays."""
    files = [path, path.with_name(f"{path.name}.wal")]
    names = (f"broken{number or ''}" for number in itertools.chain([0], itertools.count(2)))
    name = next(name for name in names if not any(Path(f"{file}.{name}").exists() for file in files))
    log.warning("%s is set aside as %s.%s; a new one is loaded from zero", path, path.name, name)
    for file in files:
        if file.exists():
            file.replace(f"{file}.{name}")
    _mark(path).unlink(missing_ok=True)


def _configured(path: Path, memory: str) -> duckdb.DuckDBPyConnection:
    made = not path.exists()
    try:
        connection = duckdb.connect(path, config=_CONFIG)
        try:
            _settle(connection, memory)
        except duckdb.Error:
            connection.close()
            raise
    except duckdb.Error as error:
        if not _is_no_room(error):
            raise
        if made:
            path.unlink(missing_ok=True)  # half a file would be taken for damaged
        raise _no_room(error) from error
    return connection


def _settle(connection: duckdb.DuckDBPyConnection, memory: str) -> None:
    try:
        connection.execute(f"SET GLOBAL memory_limit = '{memory.replace(chr(39), '')}'")
    except (duckdb.ParserException, duckdb.InvalidInputException) as error:
        connection.close()
        raise Misconfigured(
            "warehouse-memory",
            f"HEADRACE_WAREHOUSE_MEMORY={memory!r} is no size.",
            "Write it as 2GB.",
        ) from error
    connection.execute("SET GLOBAL TimeZone = 'UTC'")
    connection.execute("SET lock_configuration = true")


def _refusal(path: Path, error: duckdb.Error) -> HeadraceError:
    """Return why a file cannot be opened: damaged only if DuckDB says so, as whatever passes leaves it whole."""
    text = str(error).splitlines()[0]
    if "Could not set lock" in text:
        return Misconfigured(
            "warehouse-locked",
            f"Another process has {path}: {text}",
            "Ask it (headrace sql, headrace status), stop it, or name another file by HEADRACE_WAREHOUSE.",
        )
    if "version number" in text:
        return Misconfigured(
            "warehouse-version",
            f"{path} is of another version of DuckDB: {text}",
            "Use that version, or remove the file: it is loaded again from zero.",
        )
    if not path.is_file() or not os.access(path, os.R_OK | os.W_OK):
        return _file(path, text)
    return _ours(error, path)


def _file(path: Path, text: str) -> Misconfigured:
    return Misconfigured(
        "warehouse-file",
        f"{path} cannot be opened: {text}",
        "Change HEADRACE_WAREHOUSE or the file's rights.",
    )


def _mark(path: Path) -> Path:
    """Return the file whose presence says that the next process sets the warehouse aside."""
    return path.with_name(f"{path.name}.damaged")
