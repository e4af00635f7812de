"""The commands of this service: `headrace setup`, `headrace capture`, `headrace resnapshot`, `headrace teardown`."""

from __future__ import annotations

import enum
import signal
import sys
import threading
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from headrace.memory import use_few_arenas
from headrace.settings import load
from headrace_capture.capture import Capture
from headrace_capture.resnapshot_cli import resnapshot
from headrace_capture.setup_cli import setup, teardown

__all__ = ["capture", "resnapshot", "setup", "teardown"]


class How(enum.StrEnum):
    """How the initial snapshot is read: in one transaction, or in chunks beside the stream."""

    WHOLE = "whole"
    CHUNKED = "chunked"


Snapshot = Annotated[
    How, typer.Option("--snapshot", help="For a big database, chunked: it goes on where it was after a kill.")
]


def capture(snapshot: Snapshot = How.WHOLE) -> None:
    """Read Postgres's write-ahead log into Kafka: the initial snapshot first, then every commit, until stopped.

    Start it as often as you like: it goes on where the log ends, and only one of them writes. SIGTERM and Ctrl-C stop it cleanly.

    Exit codes: 0 it was asked to stop; 3 something must be changed first; 4 a change cannot be captured; 5 a server did not answer
    at the start.

    Examples:

        headrace capture

        headrace capture --snapshot=chunked

        HEADRACE_DSN=postgresql://headrace@db/shop HEADRACE_SOURCE=shop headrace capture
    """
    stop = threading.Event()

    def asked(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():  # asked twice: do not wait for Kafka; the cut is aborted by the next start
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, asked)
    use_few_arenas()
    with Bar(*_COLUMNS, console=_console, transient=True, disable=not _console.is_terminal) as bar:
        task = bar.add_task("snapshot", total=None, visible=False)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=total > 0)

        Capture(load(), say, stop.is_set, show=show, chunked=snapshot == How.CHUNKED).run()
    say("stopped")


def say(line: str) -> None:
    """Print a line for people, at once."""
    colour = "yellow" if line.startswith(("warning", "waiting", "Kafka")) else "default"
    _console.print(f"[dim]capture[/dim] [{colour}]{escape(line)}[/{colour}]")
    sys.stdout.flush()


_COLUMNS = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
_console = Console(highlight=False, soft_wrap=True)
