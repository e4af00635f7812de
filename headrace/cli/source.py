"""What the source says of itself: what speaks to Postgres is never part of the library [I11], so its own service is asked."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from headrace.change import Checkpoint
from headrace.settings import Settings
from headrace.waiting import check_server


def source_facts(settings: Settings, newest: Checkpoint | None = None) -> dict[str, Any]:
    """Return the facts about the slot, as `lsn` where WAL is written now, and the server's `system_id` and `database`; none where no
    such service is installed.

    Raises:
        HeadraceError: what the service raises; Misconfigured: `other-source`, where `newest`, the log's, is of another server.
    """
    for entry in entry_points(group="headrace.sources"):
        facts: dict[str, Any] = entry.load()(settings)
        if newest is not None:
            check_server(newest.source, facts["system_id"], facts["database"])
        return facts
    return {}
