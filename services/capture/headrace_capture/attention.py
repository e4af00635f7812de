"""What capture pays attention to besides the stream: requests in control, the catalogue (S12, S30), and that its topics are still those.

Both are asked by threads of their own, so that the stream waits for neither; the loop takes what they found between two cuts. A server
that is away is asked again later: the stream tells what matters.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from typing import NamedTuple

import psycopg

from headrace.control import Control
from headrace.errors import HeadraceError, Misconfigured
from headrace.requests import Request
from headrace.settings import Settings
from headrace_capture import catalog, fingerprints, identities
from headrace_capture.fingerprints import Fingerprint
from headrace_capture.progress import NAME

LOOK_SECONDS = 2.0
"""How often the catalogue is read; less often where that takes long."""
PACE = 20
"""The catalogue is left alone for so many times as long as it took to read it."""
_LOCK_SECONDS = 0.2
"""Only new partitions are opened, to see whether they have rows; one that is locked is looked at the next time."""


class Findings(NamedTuple):
    """What the catalogue said.

    `prints`: the fingerprint of every published table; `asked`: when that was (`time.monotonic`); `failing`: see `identities.failing`;
    `roots`: the name of every partitioned one, by its oid, and `lsn`: how far the WAL was then.
    """

    prints: dict[str, Fingerprint]
    asked: float
    failing: list[str]
    roots: dict[int, str]
    lsn: int


class Asking(threading.Thread):
    """A thread that asks until it is closed, and after an error a little later again."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                self._ask()
            except (psycopg.Error, HeadraceError) as error:
                self._failed(error)
                self._ended.wait(LOOK_SECONDS)

    def close(self) -> None:
        """End; does not wait for what hangs."""
        self._ended.set()
        self.join(1.0)

    def _ask(self) -> None:
        raise NotImplementedError

    def _failed(self, error: Exception) -> None:
        """Asking has failed with `error`."""


class Requests(Asking):
    """What is asked of capture. `take` returns each request once."""

    def __init__(self, control: Control) -> None:
        """Begin to listen."""
        super().__init__("requests")
        self._control = control
        self._queue: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._seen: set[str] = set()
        self.start()

    def take(self) -> Iterator[Request]:
        """Return the requests that have come since."""
        while not self._queue.empty():
            yield self._queue.get()

    def _ask(self) -> None:
        with closing(self._control.requests([NAME])) as box:
            while not self._ended.is_set():
                for _, request in box.poll(0.1):
                    if request.id not in self._seen:
                        self._seen.add(request.id)
                        self._queue.put(request)


class CatalogueWatch(Asking):
    """The newest fingerprints. `known` says which leaves need not be asked whether they are empty; `tell` is told how asking goes.

    `check_topics` refuses those that somebody deleted, and a broker or a person made anew: they would be written on into.
    """

    def __init__(
        self,
        settings: Settings,
        known: Callable[[], Collection[int]],
        check_topics: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        """Begin to look."""
        super().__init__("catalogue")
        self._settings = settings
        self._known = known
        self._check_topics = check_topics
        self._tell = tell
        self._newest: Findings | Misconfigured | None = None
        self.start()

    def take(self) -> Findings | None:
        """Return what was found last, once.

        Raises:
            Misconfigured: `publication-missing`: Postgres 18 says nothing of it in the stream, and sends no more changes;
                `publication-incomplete`: it sends some; `topic-missing`, `topic-replaced`.
        """
        found, self._newest = self._newest, None
        if isinstance(found, Misconfigured):
            raise found
        return found

    def _ask(self) -> None:
        with catalog.connect(self._settings.dsn, name="headrace catalogue", lock_s=_LOCK_SECONDS) as connection:
            while not self._ended.is_set():
                asked = time.monotonic()
                try:
                    prints = fingerprints.read(connection, self._settings.publication, self._known())
                    failing = identities.failing(connection, self._settings.publication)
                    catalog.check_operations(connection, self._settings.publication)
                    roots = catalog.partitioned(connection, self._settings.publication)
                    self._newest = Findings(prints, asked, failing, *roots)
                    self._check_topics()
                    self._tell("ok")
                except Misconfigured as error:
                    self._newest = error
                self._ended.wait(max(LOOK_SECONDS, PACE * (time.monotonic() - asked)))

    def _failed(self, error: Exception) -> None:
        self._tell(f"failed: {' '.join(str(error).split())}")
