"""Errors by how one recovers from them.

Consumers and services raise; only a runner (or the loop of capture) decides what follows. The kind is the class:

| class         | recovery                        | the runner                               | exit code |
|---------------|---------------------------------|------------------------------------------|-----------|
| Transient     | try again later                 | backs off, says so in status, tries on   | 5         |
| Misconfigured | somebody must change something  | stops, says what to change               | 3         |
| Poison        | this one record cannot be done  | parks it and goes on; stops where it     | 4         |
|               |                                 | is not named, or too many are parked     |           |

Two of them have a name of their own because the runner does something more: `Wiped` is Transient and opens the view anew,
`Refused` is Misconfigured and waits for a rebuild.

Every error carries a *code*, a short name such as ``slot-missing`` under which `ops/runbook.md` says more,
a message that names what was seen, and a *remedy*: the setting to change or the command to run next.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["HeadraceError", "Misconfigured", "Poison", "Refused", "Transient", "Wiped"]

OK = 0
CHECK_FAILED = 1
USAGE = 2
DEFECT = 70
"""What nobody foresaw: not Python's 1, which says that something was checked. It is `EX_SOFTWARE` of sysexits.h."""
INTERRUPTED = 130

_HEAD, _TAIL = 12_000, 3_000
"""Characters of a message that are kept: it goes into reports and into what is parked, and may quote a row or what a server says of it."""


_NOT_THEIRS = (f"{Path(__file__).parent}/", "<")
"""How the files of frames begin that are the library's, or the import system's."""


class HeadraceError(Exception):
    """The base of every error that headrace raises on purpose.

    Args:
        code: The entry in `ops/runbook.md`, in words joined by hyphens.
        message: What was seen, with names and values; of a very long one the beginning and the end are kept.
        remedy: What to change or to run next; empty when the message says it.
    """

    exit_code = CHECK_FAILED

    def __init__(self, code: str, message: str, remedy: str = "") -> None:
        self.message = message if len(message) <= _HEAD + _TAIL else f"{message[:_HEAD]} … {message[-_TAIL:]}"
        super().__init__(self.message)
        self.code = code
        self.remedy = remedy

    def __str__(self) -> str:
        """Return one line for logs: the message, the remedy and the code."""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{self.message}{remedy} [{self.code}]"


def described(error: BaseException) -> str:
    """Return what an error of a plugin's code is, and the ``file:line`` where it came about: the last one outside the library."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{frame.filename}:{frame.lineno}" for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
    if isinstance(error, SyntaxError):
        lines.append(f"{error.filename}:{error.lineno}")
    return f"{error!r} at {lines[-1]}" if lines else repr(error)


class Transient(HeadraceError):
    """A server is away, busy or full: the same call may succeed later. Nothing is lost by waiting."""

    exit_code = 5


class Misconfigured(HeadraceError):
    """A setting, a server or a piece of state must be changed by somebody before going on."""

    exit_code = 3


class Poison(HeadraceError):
    """One record cannot be applied, now or later; the message names its key, partition and offset.

    Args:
        code, message, remedy: See `HeadraceError`.
        cursor: (collection, key as text) of what cannot be done, so that the runner can set it aside: of rows the table and the log's
            key, of documents the root's table and the id. Without it the consumer stops.
        body: What could not be done, as JSON values, for who looks at it.
        others: Further ones of the same batch: one attempt may find many.
    """

    exit_code = 4

    def __init__(
        self,
        code: str,
        message: str,
        remedy: str = "",
        *,
        cursor: tuple[str, str] | None = None,
        body: Any = None,
        others: Sequence[Poison] = (),
    ) -> None:
        super().__init__(code, message, remedy)
        self.cursor = cursor
        self.body = body
        self.others = others


class Refused(Misconfigured):
    """A position that no longer makes sense for the log [I12]: the view must be rebuilt.

    The runner leaves the view readable and still, and stays up to be asked for the rebuild.
    """


class Wiped(Transient):
    """A view lost its position, or itself, while it was served [I6]: open it again, which makes it anew."""


def as_ours(error: BaseException, consumer: str) -> HeadraceError:
    """Return an error as one of ours, its NAME being `consumer`: what else a plugin may raise is a fault in its code."""
    if not isinstance(error, HeadraceError):
        said = f"The consumer {consumer} raised {described(error)}."
        return Misconfigured("consumer-failed", said, "Mend it, and start it again.")
    error.remedy = re.sub(r"\bNAME\b", consumer, error.remedy)
    return error
