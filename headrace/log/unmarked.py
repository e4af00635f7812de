"""Committed transactions that lack their marker in a partition: what KAFKA-20734 leaves where a single node was killed.

Nobody is shown such a partition any further. The next transaction of the same writer that touches it ends both: by its commit readers are
shown what was hidden; by its abort what was acknowledged is gone (docs/decisions/a-killed-kafka.md). So a writer that has just fenced its
predecessors, and has nothing open itself, commits the newest record of what is hidden once more: the topic holds it of its key anyhow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from headrace.errors import Transient
from headrace.log.tail import Record, read_to_end
from headrace.log.topics import Ends, Topics
from headrace.settings import Settings


def check_shown(topics: Topics, of_one: str, ends: Ends) -> None:
    """Raise Transient (`marker-missing`) where a partition does not show what it has: up to `ends`, and all of the topic `of_one`.

    It is asked of what was committed, which is not given up where Kafka has no answer.
    """
    try:
        hidden = topics.unshown(ends | topics.ends({of_one: 1}, committed=False))
    except Transient:
        return
    if hidden:
        named = ", ".join(f"{topic} partition {partition}" for topic, partition in sorted(hidden))
        raise Transient(
            "marker-missing",
            f"A committed transaction has no marker in {named}: its readers stand still there.",
            "capture writes there again, which ends it; see docs/decisions/a-killed-kafka.md.",
        )


def newest_hidden(
    settings: Settings, topics: Topics, names: Collection[str], idle: Callable[[], None] = lambda: None
) -> Iterator[Record]:
    """Yield the newest record of each partition of `names` that does not show all that it has for some seconds; no tombstone, if it can."""
    counts = {name: count for name, (_, count) in topics.describe(topics.names() & set(names)).items()}
    ends = topics.ends(counts, committed=False)
    for place, start in topics.unshown(ends, idle).items():
        newest: dict[bool, Record] = {}
        until = {place: ends[place[0]][place[1]]}
        for record in read_to_end(settings, {place: start}, until, committed=False, idle=idle):
            newest[record.value is not None] = record
        yield newest.get(True) or newest[False]
