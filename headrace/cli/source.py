"""What the source says of itself: what speaks to Postgres is never part of the library [I11], so its own service is asked."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from headrace.settings import Settings


def source_facts(settings: Settings) -> dict[str, Any]:
    """Return the facts about the slot, and as `lsn` where WAL is written now; none where no such service is installed.

    Raises:
        HeadraceError: what the service raises.
    """
    for entry in entry_points(group="headrace.sources"):
        facts: dict[str, Any] = entry.load()(settings)
        return facts
    return {}
