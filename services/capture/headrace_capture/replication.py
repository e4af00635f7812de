"""The replication connection: slots, and the stream as a socket that is read without waiting.

It knows how to speak and when to wait, and nothing of what the bytes mean (that is `pgoutput`). psycopg's own connection does the
rest: after START_REPLICATION the server sends CopyData messages, and we answer with status updates.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import pq, sql

from headrace.change import format_lsn, parse_lsn
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace_capture import catalog, standby
from headrace_capture.connection import RIGHTS, SETUP
from headrace_capture.pgoutput import PROTOCOL, status

_STATUS_SECONDS = 1.0
_STREAM = "reading the stream"
_BUNCH, _BUNCH_BYTES = 256, 1024 * 1024
"""Messages, and bytes of them, that are read before anything else is looked at."""


class Stopped(Exception):
    """Somebody asked capture to stop while it waited."""


def check(stopped: Callable[[], bool]) -> None:
    """Raise Stopped when asked to stop."""
    if stopped():
        raise Stopped


@contextmanager
def postgres_errors(doing: str) -> Iterator[None]:
    """Turn psycopg's exceptions into ours; `doing` completes the sentence "Postgres failed while …".

    What psycopg itself refuses to send would be refused again: that is not for waiting.
    """
    try:
        yield
    except psycopg.Error as error:
        if isinstance(error, psycopg.ProgrammingError | psycopg.DataError) and error.sqlstate is None:
            said = f"A statement could not be sent while {doing}: {error}."
            raise Misconfigured("postgres-error", said, "Report this as a defect.") from error
        raise explain(error.sqlstate, str(error), doing) from error


def explain(sqlstate: str | None, said: str, doing: str) -> HeadraceError:
    """Return the error of ours for one of Postgres's; without an SQLSTATE the connection was lost."""
    text = " ".join(said.split()).removeprefix("ERROR: ").strip()
    message = f"Postgres failed while {doing}: {text}."
    if sqlstate in _BUSY:
        return Transient("slot-active", message, "Wait for the other capture to end, or stop it.")
    if sqlstate == _LOCKED:
        said = f"A lock that another transaction holds is in the way of {doing}."
        return Transient("table-locked", said, "It is tried again; pg_blocking_pids() and pg_locks tell who holds it.")
    known = _CODES.get(sqlstate or "")
    if known:
        return Misconfigured(known[0], message, known[1])
    if sqlstate is None or sqlstate[:2] in _PASSING:
        return Transient("postgres-away", message, "Check the server that HEADRACE_DSN names.")
    return Misconfigured("postgres-error", message, "See the server's log.")


_BUSY = frozenset({"55006"})  # object_in_use
_LOCKED = "55P03"  # lock_not_available
_PASSING = frozenset({"08", "53", "57", "40", "58", "25"})
MEND = "Run: headrace resnapshot --recover, then capture. It makes a new slot and reads all tables again beside the stream."
"""What to do when log and source have parted (see `recovery`)."""
_CODES = {
    "42501": ("postgres-rights", RIGHTS),
    "42704": (
        "publication-missing",
        f"{SETUP} Where changes came while it was gone the slot cannot be read past them; then: {MEND}",
    ),
    "55000": ("slot-lost", MEND),  # object_not_in_prerequisite_state: the slot can no longer be read from
    "53400": ("too-many-slots", "Raise max_replication_slots and max_wal_senders, or drop a slot that is not needed."),
}


class Replication:
    """One walsender connection, in one of two uses: commands (a snapshot's exporter), or the stream after `start`.

    Attributes:
        drained: Whether the last `read` took all that had arrived.
    """

    def __init__(self, dsn: str, name: str = standby.NAME) -> None:
        """Connect. Raises what `catalog.connect_replication` raises, and Transient: `postgres-standby`.

        The DSN may lead to several servers, and each connection to another one: a standby would say that the slot is lost.
        """
        self._connection = catalog.connect_replication(dsn, name=name)
        self._pg = self._connection.pgconn
        if self._pg.parameter_status(b"in_hot_standby") == b"on":
            self._connection.close()
            remedy = "Let HEADRACE_DSN name the primary; of several hosts by target_session_attrs=read-write."
            raise Transient("postgres-standby", "The server that answered is a standby.", remedy)
        self.drained = False
        self._doing = "asking"
        self._lsn = 0
        self._sent_at = 0.0

    def identify(self) -> catalog.Identity:
        """Return which server this is."""
        with postgres_errors("identifying the server"):
            return catalog.identify(self._connection)

    def history(self, timeline: int) -> tuple[tuple[int, int], ...]:
        """Return (timeline, LSN) for each timeline that led to this one: where it was left."""
        if timeline == 1:
            return ()
        with postgres_errors("reading the history of the timeline"):
            row = self._connection.execute(sql.SQL("TIMELINE_HISTORY {}").format(sql.Literal(timeline))).fetchone()
        assert row is not None
        text = row[1].decode() if isinstance(row[1], bytes) else str(row[1])
        lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        return tuple((int(line[0]), parse_lsn(line[1])) for line in lines)

    def create_slot(self, slot: str, stopped: Callable[[], bool]) -> tuple[int, str]:
        """Make the slot; return its consistent point and the name of the snapshot that shows exactly that state.

        Postgres waits here for every transaction that is running. The snapshot lives until this connection's next command (S6).
        """
        self._doing = f"making the replication slot {slot}"
        failover = ", FAILOVER" if self._connection.info.server_version >= 170000 else ""
        command = sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput (SNAPSHOT 'export'{})")
        row = self._run(command.format(sql.Identifier(slot), sql.SQL(failover)), stopped)
        return parse_lsn(row[1].decode()), row[2].decode()

    def drop_slot(self, slot: str, stopped: Callable[[], bool]) -> None:
        """Drop the slot, waiting until nobody uses it."""
        self._doing = f"dropping the replication slot {slot}"
        self._run(sql.SQL("DROP_REPLICATION_SLOT {} WAIT").format(sql.Identifier(slot)), stopped)

    def start(self, slot: str, publication: str, lsn: int) -> None:
        """Begin the stream with the transactions that end after `lsn`."""
        self._doing = f"starting the stream of the replication slot {slot}"
        self._lsn = lsn
        command = sql.SQL(
            "START_REPLICATION SLOT {} LOGICAL {} (proto_version {}, publication_names {}, messages 'true')"
        ).format(
            sql.Identifier(slot), sql.SQL(format_lsn(lsn)), sql.Literal(PROTOCOL), sql.Literal(_quote(publication))
        )
        result = self._pg.exec_(command.as_bytes(self._connection))
        if result.status != pq.ExecStatus.COPY_BOTH:
            raise self._failure(result)
        self._doing = _STREAM

    def read(self) -> list[bytes]:
        """Return the next CopyDatas, up to a bunch; see `drained`."""
        bunch: list[bytes] = []
        get, left = self._pg.get_copy_data, _BUNCH_BYTES
        self.drained = False
        while len(bunch) < _BUNCH and left > 0:
            size, data = get(1)
            if size == 0:
                with postgres_errors(self._doing):
                    self._pg.consume_input()
                size, data = get(1)
                if size == 0:
                    self.drained = True
                    break
            if size < 0:
                raise self._failure(self._pg.get_result())
            bunch.append(bytes(data))
            left -= size
        return bunch

    def wait(self, seconds: float) -> None:
        """Wait until there is something to read, at most `seconds`."""
        waiting = select.poll()  # select() knows no descriptor above 1023
        waiting.register(self._pg.socket, select.POLLIN)
        waiting.poll(seconds * 1000)

    def confirm(self, lsn: int) -> None:
        """Tell Postgres that everything below `lsn` is covered by a committed checkpoint: it may forget it (S4)."""
        self._lsn = lsn
        self.tell()

    def tell(self, *, at_least_every: float = 0.0) -> None:
        """Say again what is confirmed, unless that was said less than `at_least_every` seconds ago."""
        now = time.monotonic()
        if now - self._sent_at < at_least_every:
            return
        self._sent_at = now
        with postgres_errors("confirming"):
            self._pg.put_copy_data(status(self._lsn, time.time()))
            self._pg.flush()

    def alive(self) -> None:
        """Say that we live, in work that takes long; cheap to call often."""
        self.tell(at_least_every=_STATUS_SECONDS)

    def cut_off(self) -> None:
        """Shut the socket down, from any thread: the server is free at once, the next read fails (S15)."""
        try:
            with socket.socket(fileno=os.dup(self._pg.socket)) as held:
                held.shutdown(socket.SHUT_RDWR)
        except (OSError, psycopg.Error):
            return  # it is closed already

    def close(self) -> None:
        """Leave. The slot keeps what was not confirmed."""
        self._connection.close()

    def _run(self, command: sql.Composed, stopped: Callable[[], bool]) -> list[bytes]:
        """Run a command that may wait for others, and stop waiting when asked to; return its one row."""
        with postgres_errors(self._doing):
            self._pg.send_query(command.as_bytes(self._connection))
            self._pg.flush()
            while True:
                self._pg.consume_input()
                if not self._pg.is_busy():
                    break
                check(stopped)
                self.wait(0.1)
            result = self._pg.get_result()
            while self._pg.get_result():
                pass
        if result is None or result.status not in {pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK}:
            raise self._failure(result)
        return [result.get_value(0, column) or b"" for column in range(result.nfields)] if result.ntuples else []

    def _failure(self, result: Any) -> HeadraceError:
        state = result.error_field(pq.DiagnosticField.SQLSTATE) if result is not None else None
        said = result.error_message if result is not None else b""
        text = (said or self._pg.error_message or b"the server closed the connection").decode(errors="replace")
        failure = explain(state.decode() if state else None, text, self._doing)
        if failure.code == "publication-missing" and self._doing != _STREAM:  # commands name a slot only
            return Misconfigured("slot-missing", failure.message, MEND)
        return failure


def _quote(name: str) -> str:
    """Quote a name in a list of names, as pgoutput parses it."""
    return '"' + name.replace('"', '""') + '"'
