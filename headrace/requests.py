"""What is asked of a runner: the requests in control, as the process reads them that is asked."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from headrace import codec
from headrace.log import Log
from headrace.log.tail import BEGINNING, Tail, end_of_partition
from headrace.log.topics import CONTROL


class Request(NamedTuple):
    """What somebody asks of a runner. `at` is the broker's timestamp, ms; `timeout` how long the asker waits, seconds."""

    id: str
    verb: str
    args: dict[str, Any]
    at: int
    timeout: float

    @property
    def given_up(self) -> bool:
        """Whether the asker no longer waits: who was told "no answer" must not see it carried out at the next start."""
        return time.time() > self.at / 1000 + self.timeout


class RequestBox:
    """The requests to some names: first those that wait, then those that come."""

    def __init__(self, log: Log, names: set[str]) -> None:
        """Begin at the beginning of control: a request may have come while nobody ran."""
        self._source = log.settings.source
        self._names = names
        self._tail = Tail(log.settings, {(CONTROL, 0): BEGINNING})
        self._open: dict[tuple[str, str], Request] = {}
        self._caught_up = False

    def poll(self, timeout: float) -> list[tuple[str, Request]]:
        """Return requests as (name, request); each is returned once."""
        for message in self._tail.poll(timeout):
            if end_of_partition(message):
                self._caught_up = True
                continue
            key = codec.loads(message.key() or b"{}")
            if key["source"] != self._source or key["kind"] != "request" or key["name"] not in self._names:
                continue
            value = message.value()
            self._open.pop((key["name"], key["id"]), None)
            if value is not None:
                said = codec.loads(value)
                self._open[key["name"], key["id"]] = Request(
                    key["id"], said["verb"], said["args"], message.timestamp()[1], said.get("timeout", 0.0)
                )
        if not self._caught_up:
            return []
        ready = [(name, request) for (name, _), request in self._open.items()]
        self._open.clear()
        return ready

    def close(self) -> None:
        """Leave."""
        self._tail.close()
