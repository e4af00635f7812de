"""What capture does in the source besides reading: the heartbeat (S17), how much WAL the slot holds back, and who waits for whom.

All on a connection of their own, with timeouts, in a thread: a commit may hang for as long as a synchronous standby is away, and the
stream must not wait for it. A heartbeat is a transactional message that nobody reads; what matters is that its commit moves the WAL,
so that an idle source still tells every view that it is alive.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from headrace.change import parse_lsn
from headrace.settings import Settings
from headrace_capture import catalog, standby
from headrace_capture.attention import LOOK_SECONDS, Asking
from headrace_capture.progress import Progress

_TIMEOUT_SECONDS = 5.0
LOCKED_SECONDS = 5.0
"""A shorter wait is nothing: whoever writes may wait so."""


class Watch(Asking):
    """Runs from when it is made until it is closed. Its failures are reported, never raised: the stream tells what matters."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        """Begin."""
        super().__init__("watch")
        self._settings = settings
        self._progress = progress
        self.start()

    def _ask(self) -> None:
        with catalog.connect(self._settings.dsn, name="headrace heartbeat", timeout_s=_TIMEOUT_SECONDS) as connection:
            self._watch(connection)

    def _failed(self, error: Exception) -> None:
        self._progress.fact("heartbeat", f"failed: {' '.join(str(error).split())}")

    def _watch(self, connection: catalog.Connection) -> None:
        every = self._settings.heartbeat_ms / 1000
        beaten, stood, application = 0.0, 0.0, standby.NAME
        while not self._ended.is_set():
            row = connection.execute(_HELD, [self._settings.slot]).fetchone()
            if row:
                self._progress.wal(int(row[0] or 0), parse_lsn(row[1]))
                application = row[3] or application  # while the stream is cut off, commits wait the more
                self._progress.warn("standby", standby.told(row[2], application))
                stood = (stood or time.monotonic()) if row[4] else 0.0
                waits = row[4] and time.monotonic() - stood >= LOCKED_SECONDS
                self._progress.warn("blocked", _blocked(row[4]) if waits else "")
            if every and time.monotonic() - beaten >= every:
                since = datetime.now(UTC).isoformat(timespec="seconds")
                self._progress.fact("heartbeat", f"waits since {since} for its commit")
                connection.execute("SELECT pg_logical_emit_message(true, 'headrace', '')")
                beaten = time.monotonic()
            self._progress.fact("heartbeat", "ok" if every else "off")
            self._ended.wait(min(LOOK_SECONDS, every or LOOK_SECONDS))


def _blocked(pids: list[int]) -> str:
    """Return what it means that Postgres' decoder waits for locks of these processes; 0 stands for a prepared transaction."""
    listed = ", ".join(map(str, sorted({*pids} - {0})))
    looks = [f"SELECT pid, state, xact_start, query FROM pg_stat_activity WHERE pid IN ({listed})"] if listed else []
    looks += ["SELECT * FROM pg_prepared_xacts"] if 0 in pids else []
    return (
        "the stream stands, with all views: in Postgres its decoder waits for a lock of a transaction that is open, which may have altered "
        f"a type of a captured column. It goes on when that ends; to see which one it is, run: {'; '.join(looks)}"
    )


_HELD = """
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), pg_current_wal_lsn()::text,
       current_setting('synchronous_standby_names'), a.application_name,
       CASE WHEN a.wait_event_type = 'Lock' THEN pg_blocking_pids(a.pid) END
FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid WHERE slot_name = %s
"""
