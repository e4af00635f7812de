"""TCP ports on the loopback interface."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

HOST = "127.0.0.1"
_LOWEST = 15_000
_share = (0, 1)


def free(port: int) -> bool:
    """Whether a server could listen on `port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def share(part: int, of: int) -> None:
    """Let this process choose from one of `of` equal parts of the range: who starts servers beside it never chooses the same."""
    global _share  # noqa: PLW0603 -- of the process
    _share = part, of


def choose(usual: int | None = None) -> int:
    """Return `usual` if it is free, else a random free port.

    Below the range of outgoing connections: a client that retries while its server is down could otherwise be given
    the server's own port as its end of the connection, and talk to itself.
    """
    if usual is not None and free(usual):
        return usual
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    highest = max(first_outgoing, _LOWEST + 1000)
    part, of = _share
    many = (highest - _LOWEST) // of
    while not free(port := _LOWEST + part * many + random.randrange(many)):  # noqa: S311 -- not a secret
        pass
    return port
