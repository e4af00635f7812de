"""Writes that go out while more is rendered: of a rebuild, where nobody sees a half."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Final

MOST: Final = 6
"""Writes on their way at once, of a store that works on more than one: so it is busy too while the next ten thousand rows are read."""


class Sending:
    """What is on its way to a store: so many writes at once at most, and no id in two of them.

    Each has a thread of its own, which nobody waits for when the process ends.
    """

    def __init__(self, name: str, most: int) -> None:
        """Send nothing yet."""
        self._name = name
        self._most = most
        self._writes: deque[tuple[Future[None], set[str]]] = deque()

    def __bool__(self) -> bool:
        """Whether something is on its way, or has arrived and nobody has asked."""
        return bool(self._writes)

    def send(self, ids: set[str], write: Callable[[], None]) -> None:
        """Call `write`, of these ids, in a thread, when there is room for it. Raises what an earlier one has raised."""
        busy = any(not ids.isdisjoint(others) for _, others in self._writes)
        self.arrive(0 if busy else self._most - 1)
        future: Future[None] = Future()
        threading.Thread(target=_work, args=(future, write), name=self._name, daemon=True).start()
        self._writes.append((future, ids))

    def arrive(self, most: int = 0) -> None:
        """Wait until at most so many are on their way; until none is where one of them failed, and raise that."""
        while len(self._writes) > most:
            future, _ = self._writes.popleft()
            error = future.exception()
            if error is not None:
                futures.wait([other for other, _ in self._writes])
                self._writes.clear()
                try:
                    raise error
                finally:
                    del error, future  # else the error's trace would hold this frame, and this frame the error


def _work(future: Future[None], write: Callable[[], None]) -> None:
    try:
        write()
        future.set_result(None)
    except Exception as error:  # noqa: BLE001  it belongs to who waits for it
        future.set_exception(error)
    finally:
        del (
            future,
            write,
        )  # else the error's trace would hold this frame, and this frame the error, and all that was written
