"""Where a record that cannot be applied stands: a consumer knows its key, the batch that it came in knows the offsets."""

from __future__ import annotations

from headrace.change import Change
from headrace.consumer import Batch
from headrace.errors import Poison

_TABLES = 5


def placed(error: Poison, batch: Batch) -> Poison:
    """Return the error with the offsets among which its record is: of the key that it names, else of the whole batch."""
    named = [change for change in batch.changes if change.key.decode(errors="replace") in error.message]
    spans = _spans(named or batch.changes)
    if not spans:
        return error
    where = "; ".join(spans[:_TABLES]) + ("; …" if len(spans) > _TABLES else "")
    before = ", or before" if batch.loading and not named else ""
    return Poison(error.code, f"{error.message} See {where}{before}.", error.remedy)


def _spans(changes: list[Change]) -> list[str]:
    found: dict[tuple[str, int], list[int]] = {}
    for change in changes:
        found.setdefault((change.table, change.partition), []).append(change.offset)
    return [
        f"{table} partition {partition} offset {min(at)}" + (f" to {max(at)}" if len(at) > 1 else "")
        for (table, partition), at in found.items()
    ]
