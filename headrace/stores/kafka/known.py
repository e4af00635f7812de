"""What `<name>.generations` says of a stream's generations (see `headrace.stores.kafka.topic`)."""

from __future__ import annotations

import logging
from typing import Any

from headrace.log import Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import Topics
from headrace.settings import Settings
from headrace.stores.kafka.rows import LIVE, facts_of

log = logging.getLogger(__name__)


def configs(settings: Settings) -> tuple[dict[str, str], dict[str, str]]:
    """Return how the topic of generations is kept, and one of documents."""
    kept = {"cleanup.policy": "compact", "message.timestamp.type": "LogAppendTime"}
    kept["max.message.bytes"] = str(settings.message_max_bytes + 1024 * 1024)
    often = {"segment.ms": "600000", "segment.bytes": str(16 * 1024 * 1024), "min.cleanable.dirty.ratio": "0.1"}
    # As of a table's topic: so long may who reads the stream be away, and be behind and yet see whole states.
    lasting = {"delete.retention.ms": str(settings.delete_retention_ms)}
    lasting["min.compaction.lag.ms"] = str(settings.min_compaction_lag_ms)
    return kept | often, kept | lasting


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
        # It may be another topic by now, or have lost its end.
        if id_ != self._id or self._topics.ends({self._topic: 1}, committed=False)[self._topic][0] < self._next:
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


def live_topic(settings: Settings, name: str) -> str | None:
    """Return the topic of the live generation of a stream, None when there is none."""
    known = Known(settings, Log(settings).topics, f"{name}.generations").read()
    topic: str | None = known.get(LIVE, {}).get("topic")
    return topic
