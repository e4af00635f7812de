"""What `<name>.generations` says of a stream's generations (see `headrace.stores.kafka.topic`)."""

from __future__ import annotations

import logging
from typing import Any

from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import Topics
from headrace.settings import Settings
from headrace.stores.kafka.rows import facts_of

log = logging.getLogger(__name__)


class Known:
    """The newest value of each key of a stream's generations; what was read once is not read again.

    A record that somebody else has put there says nothing of a generation: what was there under its key stands.
    """

    def __init__(self, settings: Settings, topics: Topics, topic: str) -> None:
        """Of `topic`; nothing is read yet."""
        self._settings, self._topics, self._topic = settings, topics, topic
        self._id = ""
        self._next = BEGINNING
        self._values: dict[bytes, dict[str, Any]] = {}

    def read(self) -> dict[bytes, dict[str, Any]]:
        """Return what is said of each generation, and of which is live, by key; nothing where the topic is not there."""
        if self._topic not in self._topics.names():
            return {}
        id_ = self._topics.describe([self._topic])[self._topic][0]
        if id_ != self._id:
            self._id, self._next, self._values = id_, BEGINNING, {}
        for record in read_to_end(self._settings, {(self._topic, 0): self._next}):
            self._next = record.offset + 1
            said = facts_of(record)
            if record.value is None:
                self._values.pop(record.key, None)
            elif said is None:
                log.warning(
                    "%s has a record at offset %d that is not headrace's: passed over", self._topic, record.offset
                )
            else:
                self._values[record.key] = said
        return dict(self._values)
