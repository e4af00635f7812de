"""Redis, kept in an append-only file so that positions survive, and never evicting."""

from __future__ import annotations

import shutil
import socket
from typing import ClassVar

from headrace_ops import artifacts, ports
from headrace_ops.process_server import ProcessServer


class Redis(ProcessServer):
    """The page store: the system's own `redis-server` if there is one."""

    name = "redis"
    usual_ports: ClassVar = {"redis": 6379}

    def artifact(self) -> artifacts.Artifact | None:
        """See `ProcessServer.artifact`."""
        return None if shutil.which("redis-server") else artifacts.REDIS

    def address(self) -> str:
        """Return the URL of database 0."""
        return f"redis://{ports.HOST}:{self.port}/0"

    def prepare(self) -> None:
        """Nothing: everything is on the command line."""

    def command(self) -> list[str]:
        """See `ProcessServer.command`."""
        program = shutil.which("redis-server") or str(artifacts.get(artifacts.REDIS) / "redis-server")
        options = {
            "port": str(self.port),
            "bind": ports.HOST,
            "dir": str(self.data),
            "databases": "1024",
            "appendonly": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        return [program, *(word for name, value in options.items() for word in (f"--{name}", value))]

    def probe(self) -> None:
        """See `ProcessServer.probe`."""
        with socket.create_connection((ports.HOST, self.port), timeout=2) as connection:
            connection.sendall(b"PING\r\n")
            if not connection.recv(16).startswith(b"+PONG"):
                raise EOFError
