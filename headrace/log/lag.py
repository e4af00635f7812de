"""What a reader says is missing."""

from __future__ import annotations

from typing import NamedTuple


class Lag(NamedTuple):
    """What a generation has not applied, counted to the newest complete checkpoint that its reader has seen (S29).

    `records` counts offsets, so compacted holes count until they are passed; `wal` is bytes of WAL, `seconds` for how long the view
    has not been up to date: since the state that it shows was written, or since a newer one came that it could have shown.
    """

    records: int
    wal: int
    seconds: float
