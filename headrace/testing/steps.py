"""Steps: the calls by which a process changes something outside of itself, and what can go wrong between two of them.

Nothing is known of a store or of its client. Whatever the client is, what it does to a server or to a file ends in a call of a C
function with one of a few names (`STEPS`), and Python tells a profiler of each: before it, and after. So a process can be ended between
any two of them, any one can fail before it has begun, and the answer to any one can be lost after the server has what was sent.
"""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Collection
from datetime import date, time
from io import BytesIO, IOBase, StringIO
from types import CoroutineType, FrameType, GeneratorType
from typing import Any, Final, Self

SENT: Final = frozenset({"send", "sendall", "sendmsg"})
"""To a server by a socket: Elasticsearch, Redis, HTTP."""
STEPS: Final = SENT | frozenset(
    {
        *("execute", "executemany", "executescript", "begin", "commit"),  # SQLite, DuckDB
        *("write", "fsync", "rename", "replace", "unlink", "truncate"),  # files
        *("commit_transaction", "flush"),  # Kafka
        *("exec_params", "exec_", "send_query", "send_query_params"),  # Postgres
    }
)
_IN_MEMORY = (str, bytes, bytearray, date, time, StringIO, BytesIO, GeneratorType, CoroutineType)
"""Who has methods of these names that change nothing outside of the process: `replace`, `write`, `send`."""
_DIED, _UNSEEN = 77, 78
_SECONDS = 120


class Steps:
    """Counts the steps of this thread while it is entered; `between` is called before each.

    Attributes:
        count: How many times it was called.
        local: How many of these were for the local rows of documents, whatever their store is.
    """

    def __init__(
        self,
        between: Callable[[int], None] = lambda _count: None,
        names: Collection[str] = STEPS,
        modules: tuple[str, ...] = (),
    ) -> None:
        """Call `between(count)`, count from 1, before every C function of one of these names.

        Args:
            between: What happens there.
            names: Of C functions.
            modules: Those whose Python functions are steps too. Python does not see the C functions of some clients, as DuckDB's.
        """
        self.count = self.local = 0
        self._between = between
        self._names = names
        self._modules = modules

    def __enter__(self) -> Self:
        """Begin to count."""
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_error: object) -> None:
        """End it."""
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call":
            counts = self._is_step(function)
        else:
            counts = event == "call" and frame.f_globals.get("__name__", "").startswith(self._modules or ("-",))
        if counts:
            self._add(frame)
            self._between(self.count)

    def _add(self, frame: FrameType) -> None:
        self.count += 1
        asks: FrameType | None = frame
        while asks is not None and asks.f_globals.get("__name__", "") == "pathlib":
            asks = asks.f_back
        self.local += asks is not None and asks.f_globals.get("__name__", "").startswith("headrace.documents.")

    def _is_step(self, function: Any) -> bool:
        return function.__name__ in self._names and not isinstance(getattr(function, "__self__", None), _IN_MEMORY)


class Fails(Steps):
    """Fails once, at the n-th step.

    Attributes:
        failed: Whether there were so many.
    """

    def __init__(self, number: int, names: Collection[str]) -> None:
        """Fail at the `number`-th, counted from 1."""
        super().__init__(names=names)
        self._number = number
        self.failed = False

    def _fail(self, frame: FrameType, error: Exception) -> None:
        self._add(frame)
        if self.count == self._number:
            self.failed = True
            raise error


class FailAfterWrite(Fails):
    """Loses the answer to the n-th thing that is sent: the server has it, and whoever sent it sees a broken connection.

        with FailAfterWrite(3):
            consumer.apply(batch)

    Attributes:
        failed: Whether so many were sent.
    """

    def __init__(self, number: int, names: Collection[str] = SENT) -> None:
        """Fail once, after the `number`-th is sent, counted from 1."""
        super().__init__(number, names)

    def _profile(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_return" and self._is_step(function):
            self._fail(frame, ConnectionResetError("what was sent is lost with its answer"))


class FailBeforeWrite(Fails):
    """Lets the n-th step fail before it has begun, as its client would say it: a connection that is broken, a disk that is full.

        with FailBeforeWrite(3):
            consumer.apply(batch)

    Only steps count of which it is known what their client raises: sockets, files, and clients that name their errors as PEP 249 does.

    Attributes:
        failed: Whether there were so many.
    """

    def __init__(self, number: int, names: Collection[str] = STEPS) -> None:
        """Fail once, before the `number`-th step, counted from 1."""
        super().__init__(number, names)

    def _profile(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and self._is_step(function) and (error := _refusal(function)):
            self._fail(frame, error)


def _refusal(function: Any) -> Exception | None:
    """Return what a step raises that could not be done; None where that is not known."""
    if function.__name__ in SENT:
        return ConnectionResetError("the connection was broken before this was sent")
    owner = function.__self__
    if isinstance(owner, IOBase) or owner is sys.modules[os.name]:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for cls in type(owner).__mro__:
        client = sys.modules.get(cls.__module__.partition(".")[0])
        if error := getattr(client, "OperationalError", None):
            failed: Exception = error("the disk is full")
            return failed
    return None


def dies_before(step: int, work: Callable[[], None], modules: tuple[str, ...] = ()) -> bool:
    """Do `work` in a process of its own that dies, without a word to anybody, before its `step`-th step; tell whether it died.

    `modules`: see `Steps`.

    Raises:
        AssertionError: it ended in another way, or no step is known but those for the local rows of documents.
    """

    def between(count: int) -> None:
        if count == step:
            os._exit(_DIED)

    def mortal() -> None:
        gc.freeze()  # what others left is theirs: a client whose threads stayed behind cannot be ended here (librdkafka crashes)
        with Steps(between, modules=modules) as steps:
            work()
        if step and steps.count == steps.local:
            os._exit(_UNSEEN)

    # A fork: the work is whatever the caller has at hand, and it opens its connections itself.
    process = multiprocessing.get_context("fork").Process(target=mortal)
    process.start()
    process.join(_SECONDS)
    if process.is_alive():
        process.kill()
    assert process.exitcode != _UNSEEN, "it has no step that is known: set `modules`"
    assert process.exitcode in {0, _DIED}, f"it ended with {process.exitcode} before step {step}"
    return process.exitcode == _DIED
