"""Watermarks: logical messages around each read outside of the stream; they tell where in the stream it belongs (S7).

WAL order is not visibility order, so two watermarks alone prove nothing: what a snapshot sees is asked of the snapshot. Three questions
are asked about what `pg_current_snapshot()` prints: does it see a transaction (`Snapshot.sees`), does it see all that another one sees
(`covers`), and from which snapshot on everything that runs now is over (`settled`).

The messages are transactional, so each has a commit LSN, which is the version of what is read between them; they never wait for a
standby, because nobody reads them but us.
"""

from __future__ import annotations

from typing import Final

from headrace.change import Snapshot
from headrace_capture.catalog import Connection
from headrace_capture.pgoutput import Message

LOW: Final = "low"
HIGH: Final = "high"
_PREFIX: Final = "headrace.watermark"


def emit(connection: Connection, which: str, mark: str) -> None:
    """Write a watermark into the stream. The connection must have `synchronous_commit` at ``local``."""
    connection.execute("SELECT pg_logical_emit_message(true, %s, %s)", [_PREFIX, f"{which} {mark}"])


def mark_of(message: Message) -> tuple[str, str]:
    """Return which watermark a message is, and its mark; empty texts for a message of somebody else."""
    if message.prefix != _PREFIX:
        return "", ""
    which, _, mark = message.content.decode(errors="replace").partition(" ")
    return which, mark


def covers(snapshot: str, floor: str) -> bool:
    """Whether `snapshot` sees every transaction that `floor` sees."""
    now, before = Snapshot.parsed(snapshot), Snapshot.parsed(floor)
    unseen = [xid for xid in now.running if xid < before.xmax]
    return all(xid in before.running for ids in (unseen, range(now.xmax, before.xmax)) for xid in ids)


def settled(snapshot: str) -> str:
    """Return a floor that only snapshots cover in which everything that runs in `snapshot` is over."""
    end = Snapshot.parsed(snapshot).xmax
    return f"{end}:{end}:"
