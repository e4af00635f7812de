"""Postgres with logical decoding.

`postgres` is a superuser whom everybody on the loopback interface may be; every other role needs its password.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, ClassVar, Final

import psycopg

from headrace_ops import artifacts, ports, processes
from headrace_ops.process_server import ProcessServer

_CONF: Final = f"""
# headrace
listen_addresses = '{ports.HOST}'
unix_socket_directories = ''
wal_level = logical
max_replication_slots = 100
max_wal_senders = 100
max_prepared_transactions = 20
max_connections = 200
timezone = 'UTC'
log_timezone = 'UTC'
log_line_prefix = '%m [%p] %d '
"""
_ACCESS: Final = """
host all,replication postgres 127.0.0.1/32 trust
host all,replication all      127.0.0.1/32 scram-sha-256
"""


_BUILTIN_LOCALES: Final = 17
"""The first version whose own C.UTF-8 knows letters beyond ASCII."""


class Postgres(ProcessServer):
    """The source.

    Args:
        folder: See `ProcessServer`, which takes the other arguments too.
        artifact: Which version to run.
    """

    name = "postgres"
    usual_ports: ClassVar = {"postgres": 5432}
    stop_signal = signal.SIGINT  # without waiting for clients
    stop_seconds = 15
    usual_seconds = 3

    def __init__(self, folder: Path, *, artifact: artifacts.Artifact = artifacts.POSTGRES, **how: Any) -> None:
        super().__init__(folder, **how)
        self._artifact = artifact

    def artifact(self) -> artifacts.Artifact:
        """See `ProcessServer.artifact`."""
        return self._artifact

    def address(self) -> str:
        """Return the DSN of its superuser in the database `postgres`."""
        return self.dsn("postgres")

    def dsn(self, database: str, user: str = "postgres") -> str:
        """Return the DSN of any database and user."""
        return f"postgresql://{user}@{ports.HOST}:{self.port}/{database}"

    def prepare(self) -> None:
        """Make the cluster; a half made one is made again, since `pg_hba.conf` is written last."""
        access = self.data / "pg_hba.conf"
        if access.exists() and access.read_text() == _ACCESS:
            return
        processes.run(["find", str(self.data), "-mindepth", "1", "-delete"], folder=self.conf, environ=self.environ())
        initdb = [
            self._program("initdb"),
            "-D",
            str(self.data),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]
        major = int(self._artifact.name.partition("-")[2].partition(".")[0])
        builtin = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if major >= _BUILTIN_LOCALES else []
        processes.run([*initdb, *builtin, "--locale=C"], folder=self.data, environ=self.environ())
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.write(_CONF)
        access.write_text(_ACCESS)

    def command(self) -> list[str]:
        """See `ProcessServer.command`."""
        return [self._program("postgres"), "-D", str(self.data), "-p", str(self.port)]

    def probe(self) -> None:
        """See `ProcessServer.probe`."""
        try:
            psycopg.connect(self.address(), connect_timeout=2).close()
        except psycopg.OperationalError as error:
            raise OSError(str(error)) from error

    def _program(self, name: str) -> str:
        return str(artifacts.get(self._artifact) / "bin" / name)
