"""What is asked of a runner: the requests in control, as the process reads them that is asked."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from headrace import codec
from headrace.log import Log
from headrace.log.tail import BEGINNING, Tail, end_of_partition
from headrace.log.topics import CONTROL

_MOMENT_SECONDS = 2.0
_CLOCK_SECONDS = 60.0


class Request(NamedTuple):
    """What somebody asks of a runner.

    Attributes:
        at: The broker's timestamp, ms.
        timeout: How long the asker waits, seconds.
        ahead: By how many seconds the clock here is ahead of the broker's, as far as is known.
    """

    id: str
    verb: str
    args: dict[str, Any]
    at: int
    timeout: float
    ahead: float = 0.0

    @property
    def given_up(self) -> bool:
        """Whether the asker no longer waits: who was told "no answer" must not see it carried out at the next start."""
        return time.time() - self.ahead > self.at / 1000 + self.timeout


class RequestBox:
    """The requests to some names: first those that wait, then those that come."""

    def __init__(self, log: Log, names: set[str]) -> None:
        """Begin at the beginning of control: a request may have come while nobody ran."""
        self._log = log
        self._source = log.settings.source
        self._names = names
        self._tail = Tail(log.settings, {(CONTROL, 0): BEGINNING}, committed=False)
        self._open: dict[tuple[str, str], Request] = {}
        self._caught_up = False
        self._ended = 0.0
        self._late: list[tuple[float, float]] = []

    def poll(self, timeout: float) -> list[tuple[str, Request]]:
        """Return requests as (name, request); each is returned once."""
        for message in self._tail.poll(timeout):
            if end_of_partition(message):
                self._caught_up = True
                self._ended = time.monotonic()
                continue
            self._compare(message.timestamp()[1] / 1000)
            key = codec.loads(message.key() or b"{}")
            if key["source"] != self._source or key["kind"] != "request" or key["name"] not in self._names:
                continue
            value = message.value()
            self._open.pop((key["name"], key["id"]), None)
            if value is not None:
                said = codec.loads(value)
                at, timeout = message.timestamp()[1], said.get("timeout", 0.0)
                self._open[key["name"], key["id"]] = Request(key["id"], said["verb"], said["args"], at, timeout)
        if not self._caught_up:
            return []
        if self._late:
            self._log.ahead = self._late[0][1]
        ready = [(name, request._replace(ahead=self._log.ahead)) for (name, _), request in self._open.items()]
        self._open.clear()
        return ready

    def _compare(self, written: float) -> None:
        """Compare the clocks by what was written a moment ago: it came when the end had been read just before.

        What came soonest counts, of the last minute: clocks are set right. So of two the later is kept, and the earlier if it came sooner.
        """
        now = time.monotonic()
        if now - self._ended < _MOMENT_SECONDS:
            late = time.time() - written
            sooner = [(at, each) for at, each in self._late if now - at < _CLOCK_SECONDS and each < late]
            self._late = [*sooner, (now, late)]

    def close(self) -> None:
        """Leave."""
        self._tail.close()
