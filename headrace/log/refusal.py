"""What both readers refuse a position with [I12], and how old one may be (S19)."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.change import NOWHERE, Checkpoint, Position, source_of
from headrace.errors import Refused
from headrace.settings import Settings


def check_log(settings: Settings, position: Position, newest: Checkpoint | None) -> None:
    """Refuse a position of another log than the source's, which ends at `newest`, and one beyond its end."""
    others = [topic for topic in position.topics if source_of(topic) != settings.source]
    if others:  # all else may be the same: the log was begun anew under another HEADRACE_SOURCE
        raise refused("position-of-another-source", f"The view was built from {others[0]}, not from {settings.source}.")
    if newest is None:
        return
    if not position.continued_by(newest.version, newest.source):
        raise refused(
            "position-of-another-source", f"The view was built from {position.source}, the log is of {newest.source}."
        )
    if position.version > newest.version:
        raise refused("position-ahead", f"The view is at {position.version}, the log ends at {newest.version}.")


def check_state(position: Position, newest: Checkpoint, kept: Sequence[Checkpoint]) -> None:
    """Refuse a position that the log does not have: it lost its end (S3), and may have grown again since.

    What then stands below the position's offsets is not what the view has read.

    Args:
        position: The view's.
        newest: The log's newest complete checkpoint.
        kept: Complete checkpoints, see `Log.states_since`; none where the position is at the newest.
    """
    beyond = any(
        at > end
        for topic, offsets in position.offsets.items()
        for at, end in zip(offsets, newest.ends.get(topic, offsets), strict=False)
    )
    if beyond:
        raise refused("position-ahead", f"The view has read further than {newest.version}, the end of the log.")
    versions = [checkpoint.version for checkpoint in kept]
    # Of its epoch all are kept since the oldest; of an earlier one the last, though what came after it was trimmed.
    known = [version for version in versions if version.epoch == position.version.epoch] or versions
    if position.version not in (NOWHERE, *versions) and any(version < position.version for version in known):
        raise refused("position-ahead", f"The log has lost the state {position.version} that the view is at.")


def lacks(position: Position, target: Checkpoint) -> bool:
    """Whether up to `target` the view has not read all of its tables. If it has, nothing that it lacks can have been removed (S19)."""
    return bool(position.offsets) and (
        position.loading
        or any(
            at < end
            for topic, offsets in position.offsets.items()
            for at, end in zip(offsets, target.ends.get(topic, offsets), strict=False)
        )
    )


def check_age(settings: Settings, position: Position, since: float, now: float) -> None:
    """Refuse to go on where tombstones may be gone that the view has not seen.

    Args:
        settings: They say how long tombstones stay.
        position: The view's; while it is loading, its age is the build's.
        since: When the oldest of what the view has not read may have been written, in seconds.
        now: The time, in seconds.
    """
    if position.loading:
        since = position.appended / 1000
    hours = (now - since) / 3600
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
