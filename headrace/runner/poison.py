"""Where a record that cannot be applied stands: a consumer knows its key, the batch that it came in knows the offsets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headrace.change import Change
from headrace.consumer import Batch
from headrace.errors import Poison
from headrace.parked import Place

_TABLES = 5


def placed(error: Poison, batch: Batch) -> Poison:
    """Return the error with the offsets among which its record is: of the key that it names, else of the whole batch."""
    named = _named(error, batch)
    spans = [
        f"{table} partition {partition} offset {first}" + (f" to {last}" if last > first else "")
        for table, partition, first, last in places(named or batch.changes)
    ]
    if not spans:
        return error
    where = "; ".join(spans[:_TABLES]) + ("; …" if len(spans) > _TABLES else "")
    before = ", or before" if batch.loading and not named else ""
    return Poison(error.code, f"{error.message} See {where}{before}.", error.remedy)


def among(error: Poison, batch: Batch, topic_of: Callable[[str], str]) -> list[Place]:
    """Return the records among which that of an error is."""
    return places(_named(error, batch) or batch.changes, topic_of)[:_TABLES]


def places(changes: Sequence[Change], topic_of: Callable[[str], str] = str) -> list[Place]:
    """Return where changes stand: the first and the last of each partition."""
    found: dict[tuple[str, int], list[int]] = {}
    for change in changes:
        found.setdefault((change.table, change.partition), []).append(change.offset)
    return [Place(topic_of(table), partition, min(at), max(at)) for (table, partition), at in found.items()]


def _named(error: Poison, batch: Batch) -> list[Change]:
    return [change for change in batch.changes if change.key.decode(errors="replace") in error.message]
