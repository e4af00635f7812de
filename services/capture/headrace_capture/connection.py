"""Connections to the source, with the session settings of S14, and what a refused one means.

Capture, setup and status all come through here, so a value has one text everywhere, and every refusal names the setting.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import conninfo

from headrace.errors import HeadraceError, Misconfigured, Transient

Connection = psycopg.Connection[tuple[Any, ...]]

SESSION = {
    "search_path": "",
    "client_encoding": "UTF8",
    "row_security": "off",
    "DateStyle": "ISO,MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
}
"""What makes a value's text the same in every session (S14), and what keeps the server from ending a quiet one."""
_KEPT = {
    "connect_timeout": "10",
    "tcp_user_timeout": "30000",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
}
"""Unless the DSN says otherwise: what stands between forgets a silent connection after minutes, the kernel asks after two hours."""
_TRANSACTION_TIMEOUT = 170000
"""The version from which the server may end a long transaction: an older one would refuse a connection with that option."""


def connect(
    dsn: str, *, name: str = "headrace", timeout_s: float = 30, lock_s: float = 0, setting: str = "HEADRACE_DSN"
) -> Connection:
    """Connect, with autocommit and the session settings of S14.

    Args:
        dsn: A connection string of libpq; its own options are kept.
        name: What pg_stat_activity shows.
        timeout_s: The longest a statement may take; 0 for no limit.
        lock_s: The longest it may wait for a lock, which the application may hold for hours; 0 for no limit but that.
        setting: Where the dsn came from, for the error.

    Raises:
        Transient: `postgres-away`.
        Misconfigured: `postgres-refused`, `postgres-dsn`.
    """
    return _connect(dsn, _options(dsn, timeout_s, lock_s), {"fallback_application_name": name}, setting)


def connect_replication(dsn: str, *, name: str = "headrace") -> Connection:
    """Connect as a walsender of the database; the same settings and errors as `connect`, no statement timeout."""
    return _connect(dsn, _options(dsn, 0, 0), {"fallback_application_name": name, "replication": "database"})


def _options(dsn: str, timeout_s: float, lock_s: float) -> str:
    timeouts = {"statement_timeout": timeout_s, "lock_timeout": lock_s}
    settings = SESSION | {name: str(int(seconds * 1000)) for name, seconds in timeouts.items()}
    ours = " ".join(f"-c {name}={value}" for name, value in settings.items())
    return f"{_parsed(dsn).get('options') or ''} {ours}".strip()


def _parsed(dsn: str, setting: str = "HEADRACE_DSN") -> dict[str, Any]:
    try:
        return dict(conninfo.conninfo_to_dict(dsn))
    except psycopg.ProgrammingError:  # its text may hold the password
        raise Misconfigured("postgres-dsn", f"{setting} is not a connection string.", _DSN_EXAMPLE) from None


def _connect(dsn: str, options: str, extra: dict[str, Any], setting: str = "HEADRACE_DSN") -> Connection:
    given = _parsed(dsn, setting)
    kept: dict[str, Any] = {name: given.get(name) or ours for name, ours in _KEPT.items()}
    try:
        connection = psycopg.connect(dsn, autocommit=True, prepare_threshold=None, options=options, **kept, **extra)
        if connection.info.server_version >= _TRANSACTION_TIMEOUT:
            connection.execute("SET transaction_timeout = 0")
    except psycopg.OperationalError as error:
        raise _explain(error, given, setting) from error
    return connection


def _explain(error: psycopg.OperationalError, given: dict[str, Any], setting: str) -> HeadraceError:
    """Turn a refused connection into what to change. libpq gives no SQLSTATE here, only text."""
    text = " ".join(str(error).split())
    where = f"{given.get('host') or 'the local socket'}:{given.get('port') or 5432}/{given.get('dbname') or ''}"
    for part, code, remedy in _REFUSALS:
        if part in text:
            return Misconfigured(
                code, f"Postgres at {where} refuses {given.get('user') or 'the user'}: {text}.", remedy.format(setting)
            )
    return Transient(
        "postgres-away", f"Postgres at {where} does not answer: {text}.", f"Start it, or change {setting}."
    )


def silent_joins(version: int) -> str:
    """Return the warning for a server that may keep a table's changes from the stream (mended in the minors of `_MENDED`), or ""."""
    major, minor = divmod(version, 10_000)
    if minor >= _MENDED.get(major, 0):
        return ""
    return (
        f"Postgres {major}.{minor} may send nothing more of a table that joins the publication while a transaction that has written it "
        f"is open, for an unknown time, and nobody sees what is missing: use 15.14, 16.10, 17.6 or newer"
    )


_MENDED = {15: 13, 16: 9, 17: 5}  # the next minor of each mends a failure to decode that came with it
SETUP = (
    "Run `headrace setup … --apply` as an administrator, with the same --table, --append-only, --role and --dsn as before: what setup "
    "remembered went with the publication, and with no --table it captures every table with a key."
)
RIGHTS = (
    "Run `headrace setup --role ROLE --table TABLE --apply` as an administrator: ROLE is the one that connects, TABLE any that is "
    "captured (with no --table setup captures every table with a key)."
)
_REFUSALS = (
    ("password authentication failed", "postgres-refused", "Change user or password in {}."),
    ("no password supplied", "postgres-refused", "Add the password to {}."),
    (
        "pg_hba.conf",  # has no entry, or rejects
        "postgres-refused",
        "Let pg_hba.conf admit the role to the database (capture's replication goes by that line too), or change {}.",
    ),
    ("authentication failed", "postgres-refused", "Change user or password in {}."),
    (
        "permission denied",
        "postgres-refused",
        f"{RIGHTS} Or change {{}}.",
    ),
    ("does not exist", "postgres-refused", "Create it, or change {}."),
    ("is not permitted to log in", "postgres-refused", "ALTER ROLE … LOGIN, or change {}."),
)
_DSN_EXAMPLE = "Write it as postgresql://user:password@host:5432/database."
