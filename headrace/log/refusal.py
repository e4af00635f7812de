"""What both readers refuse a position with [I12], and how old one may be (S19)."""

from __future__ import annotations

import time

from headrace.change import Position
from headrace.errors import Refused
from headrace.settings import Settings


def check_age(settings: Settings, position: Position, since: float | None = None) -> None:
    """Refuse to go on where tombstones may be gone that the view has not seen.

    Args:
        settings: They say how long tombstones stay.
        position: The view's; while it is loading, its age is the build's.
        since: When the oldest of what the view has not read may have been written, in seconds; by default the position's age.
    """
    if since is None or position.loading:
        since = position.appended / 1000
    hours = (time.time() - since) / 3600
    if hours <= position.tombstones_stay(settings.delete_retention_ms) / 3_600_000:
        return
    if position.loading:
        raise refused(
            "build-too-slow",
            f"The build began {hours:.0f} hours ago, longer than delete.retention.ms, and is at no state yet.",
        )
    raise refused("away-too-long", f"The view was last fed {hours:.0f} hours ago, longer than delete.retention.ms.")


def refused(code: str, seen: str) -> Refused:
    """Return the refusal of a position, which only a rebuild ends."""
    remedy = "Run: headrace rebuild NAME"
    if code == "position-of-another-source":  # else readers of that one would see this one's rows
        remedy = f"Where that source still runs, give the store of one of the two another name. Else: {remedy[5:]}"
    return Refused(code, f"{seen} Going on could miss changes or keep rows that are gone.", remedy)
