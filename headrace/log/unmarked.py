"""Committed transactions that lack their marker in a partition: what KAFKA-20734 leaves where a single node was killed.

Nobody is shown such a partition any further. The next transaction of the same writer that touches it ends both: by its commit readers are
shown what was hidden; by its abort what was acknowledged is gone (docs/decisions/a-killed-kafka.md). So a writer that has just fenced its
predecessors, and has nothing open itself, commits the newest record of what is hidden once more: the topic holds it of its key anyhow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator

from headrace.log.tail import Record, read_to_end
from headrace.log.topics import Topics
from headrace.settings import Settings


def newest_hidden(
    settings: Settings, topics: Topics, names: Collection[str], idle: Callable[[], None] = lambda: None
) -> Iterator[Record]:
    """Yield the newest record of each partition of `names` that does not show all that it has for some seconds."""
    ends = topics.ends({name: count for name, (_, count) in topics.describe(names).items()}, committed=False)
    for place, start in topics.unshown(ends, idle).items():
        until = {place: ends[place[0]][place[1]]}
        yield from deque(read_to_end(settings, {place: start}, until, committed=False, idle=idle), maxlen=1)
