"""What the source says of itself and of its slot: `headrace status` asks here."""

from __future__ import annotations

from typing import Any

from headrace.settings import Settings
from headrace_capture.catalog import connect, server
from headrace_capture.replication import postgres_errors


def slot_facts(settings: Settings) -> dict[str, Any]:
    """Return the facts about the source's slot; LSNs as Postgres prints them.

    `system_id` and `database` of the server; `slot`, `exists`, `active`, `lsn` (where WAL is written now); and when it exists
    `confirmed_flush_lsn` (confirmed by capture), `restart_lsn`, `wal_held_bytes` (WAL that the slot keeps on disk; None when it was lost),
    `wal_status` (``reserved``, ``extended``, ``unreserved``, ``lost``).

    Raises:
        Transient: `postgres-away`.
        Misconfigured: `postgres-refused`, `postgres-dsn`, `postgres-standby`, `postgres-too-old`.
    """
    with (
        connect(settings.dsn, name="headrace status", timeout_s=5) as connection,
        postgres_errors("looking at the slot"),
    ):
        here = server(connection)
        row = connection.execute(_SLOT, [settings.slot]).fetchone()
    assert row is not None
    lsn, exists, *rest = row
    of = {"system_id": here.system_id, "database": here.database}
    facts = of | {"slot": settings.slot, "exists": exists, "active": False, "lsn": lsn}
    named = ("active", "confirmed_flush_lsn", "restart_lsn", "wal_held_bytes", "wal_status")
    return facts | dict(zip(named, rest, strict=True)) if exists else facts


_SLOT = """
SELECT now::text, s.slot_name IS NOT NULL, s.active, s.confirmed_flush_lsn::text, s.restart_lsn::text,
       (now - s.restart_lsn)::bigint, s.wal_status
FROM pg_current_wal_insert_lsn() now LEFT JOIN pg_replication_slots s ON s.slot_name = %s
"""
