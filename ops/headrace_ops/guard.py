"""Take a stack down when whoever watches over it dies, however it dies.

`armed` starts a small process that holds the reading end of a pipe whose writing end only we have. When we end, even by
SIGKILL, the pipe closes; unless it was told before that all is well, it takes the servers down.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_WELL = b"well"
_PROGRAM = "import sys; from headrace_ops.guard import main; main(*sys.argv[1:])"


@contextmanager
def armed(folder: Path, names: Sequence[str], *, remove: bool = False) -> Iterator[None]:
    """Within it, our death takes down the servers `names` of the stack in `folder`; with `remove` the folder goes too.

    Leaving it by an exception is not a death: the caller cleans up.
    """
    command = [sys.executable, "-c", _PROGRAM, "remove" if remove else "keep", str(folder), *names]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.communicate(_WELL)


def main(remove: str, folder: str, *names: str) -> None:
    """Wait for the end of standard input."""
    from headrace_ops.stack import Stack  # noqa: PLC0415 -- stack imports us

    if sys.stdin.buffer.read() == _WELL:
        return
    Stack(Path(folder)).down(names)
    if remove == "remove":
        shutil.rmtree(folder, ignore_errors=True)
