"""What a reader keeps of one poll in which records of a partition and its end come together: no server can be made to send them so."""

from __future__ import annotations

from collections import deque
from typing import Any

from confluent_kafka import KafkaError

from headrace.log.reader import Reader

PLACE = ("t", 0)


class Message:
    def __init__(self, offset: int, end: bool = False) -> None:
        self._offset, self._error = offset, KafkaError(KafkaError._PARTITION_EOF) if end else None

    def topic(self) -> str:
        return PLACE[0]

    def partition(self) -> int:
        return PLACE[1]

    def offset(self) -> int:
        return self._offset

    def error(self) -> KafkaError | None:
        return self._error

    def key(self) -> bytes:
        return b"k"

    def value(self) -> bytes:
        return b"v"

    def __len__(self) -> int:
        return len(self.value())


def test_the_end_of_a_partition_is_known_also_when_it_comes_with_its_last_records() -> None:
    """It is told once. Without it a state behind which nothing follows is never exact (S18)."""
    reader: Any = Reader.__new__(Reader)
    reader._kept, reader._read_to, reader._at_end = {PLACE: deque()}, {PLACE: 0}, set()
    reader._waiting = reader._waiting_bytes = 0
    reader._take([Message(0), Message(1), Message(3, end=True)])
    assert (reader._at_end, reader._read_to, reader._waiting) == ({PLACE}, {PLACE: 3}, 2)
    reader._take([Message(3)])
    assert (reader._at_end, reader._read_to) == (set(), {PLACE: 4})
