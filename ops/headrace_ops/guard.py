"""Take a stack down when whoever watches over it dies, however it dies.

`armed` starts a small process that holds the reading end of a pipe whose writing end only we have. When we end, even by
SIGKILL, the pipe closes; unless it was told before that all is well, it takes the servers down.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_ops.stack import Stack

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


@contextmanager
def temporary(prefix: str, names: Sequence[str]) -> Iterator[Path]:
    """Give a new folder for the servers `names` of a stack; it goes at the end, and by our death, with those that run in it."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    folder.chmod(0o755)  # the servers' user must get in
    with armed(folder, names, remove=True):
        try:
            yield folder
        finally:
            _stack(folder).down(names)
            shutil.rmtree(folder, ignore_errors=True)


def main(remove: str, folder: str, *names: str) -> None:
    """Wait for the end of standard input."""
    if sys.stdin.buffer.read() == _WELL:
        return
    _stack(Path(folder)).down(names)
    if remove == "remove":
        shutil.rmtree(folder, ignore_errors=True)


def _stack(folder: Path) -> Stack:
    from headrace_ops.stack import Stack  # noqa: PLC0415 -- stack imports us

    return Stack(folder)
