"""What the demo, the tests and the command line know of a server, whichever backend runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

NAMES: Final = ("postgres", "kafka", "elasticsearch", "redis")
OPTIONAL: Final = ("registry",)
"""Servers that run only where they are named."""
ALL: Final = (*NAMES, *OPTIONAL)

Report = Callable[[str, float, float], None]
"""``report(task, done, total)``: called again and again while something long is done. Any unit; done at `total`."""


def silent(_task: str, _done: float, _total: float) -> None:
    """Report to nobody."""


class Server(Protocol):
    """One server with its data.

    The data and the address stay the same through stop, kill and start. No method does harm when repeated.
    """

    name: str

    def start(self) -> None:
        """Start the server unless it runs, go on if it was paused, and return once it answers.

        Raises:
            Misconfigured: what is missing or in the way, and how to get it.
        """

    def stop(self) -> None:
        """End it in an orderly way; by force if it takes too long."""

    def kill(self) -> None:
        """End it and all of its children with SIGKILL. It is gone on return."""

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""

    def resume(self) -> None:
        """Undo `pause`."""

    def address(self) -> str:
        """Return where it listens, in the form of its setting: a DSN, host:port, a URL. Known before the first start."""
