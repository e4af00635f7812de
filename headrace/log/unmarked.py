"""Transactions that lack their marker in a partition: what KAFKA-20734 leaves where a single node was killed.

Nobody is shown such a partition any further. The next transaction of the same writer that touches it ends both, as it ends itself: a commit
shows what was hidden, an abort takes it away (docs/decisions/a-killed-kafka.md). So a writer that has just fenced its predecessors, and
has nothing open itself, writes the newest record of what is hidden once more, and commits that or aborts it, as the transaction did that
it is of.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from confluent_kafka import KafkaError

from headrace.errors import Transient
from headrace.log.tail import Record, read_to_end
from headrace.log.topics import Ends, Topics
from headrace.settings import Settings

_AGAIN_SECONDS = 60.0


class Hidden(NamedTuple):
    """What a partition does not show: its first record, and the newest."""

    first: Record
    newest: Record


def hidden_records(
    settings: Settings, topics: Topics, names: Collection[str], idle: Callable[[], None] = lambda: None
) -> Iterator[Hidden]:
    """Yield what each partition of `names` has and does not show for some seconds."""
    counts = {name: count for name, (_, count) in topics.describe(topics.names() & set(names)).items()}
    ends = topics.ends(counts, committed=False)
    for place, start in topics.unshown(ends, idle).items():
        until = {place: ends[place[0]][place[1]]}
        first = newest = None
        for record in read_to_end(settings, {place: start}, until, committed=False, idle=idle):
            first, newest = first or record, record
        if first and newest:
            yield Hidden(first, newest)


def check_shown(topics: Topics, of_one: str, ends: Ends) -> None:
    """Refuse partitions that do not show what they have: up to `ends`, and all of the topic `of_one`.

    Raises:
        Transient: `marker-missing`; `kafka-away`.
    """
    hidden = topics.unshown(ends | topics.ends({of_one: 1}, committed=False))
    if hidden:
        named = ", ".join(f"{topic} partition {partition}" for topic, partition in sorted(hidden))
        raise Transient(
            "marker-missing",
            f"A transaction has no marker in {named}: its readers stand still there.",
            "capture writes there again, which ends it; see docs/decisions/a-killed-kafka.md.",
        )


class Breaks:
    """Whether connections of a writer broke since it was looked last: a Kafka that was killed may have left a commit without a marker."""

    def __init__(self) -> None:
        """None broke."""
        self._said: deque[KafkaError] = deque(maxlen=1)
        self._next = 0.0
        self.note: Callable[[KafkaError], None] = self._said.append

    def __bool__(self) -> bool:
        """Whether one did."""
        return bool(self._said)

    def look(self, topics: Topics, of_one: str, ends: Ends) -> None:
        """Do as `check_shown`, if there is reason to. What was committed is not given up where Kafka does not answer: it is asked later.

        Raises:
            Transient: `marker-missing`.
        """
        if not self._said or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _AGAIN_SECONDS
        try:
            check_shown(topics, of_one, ends)
        except Transient as error:
            if error.code == "marker-missing":
                raise
            self._next += 10 * _AGAIN_SECONDS  # a partition without a leader takes half a minute to say so
        else:
            self._said.clear()
