"""The servers that headrace runs against.

`Server` is the small interface (`start, stop, kill, pause, resume, address`); `processes` is the backend that runs them
as ordinary child processes; `Stack` is all of them in one folder; `headrace stack` is the command line to it.
"""

from headrace_ops.server import ALL, NAMES, Server
from headrace_ops.stack import Stack

__all__ = ["ALL", "NAMES", "Server", "Stack"]
