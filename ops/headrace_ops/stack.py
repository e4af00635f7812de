"""All servers in one folder."""

from __future__ import annotations

import fcntl
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from headrace.errors import Misconfigured
from headrace_ops import artifacts, guard, java
from headrace_ops.elasticsearch import Elasticsearch
from headrace_ops.kafka import Kafka
from headrace_ops.postgres import Postgres
from headrace_ops.process_server import ProcessServer
from headrace_ops.redis import Redis
from headrace_ops.registry import Registry
from headrace_ops.server import ALL, NAMES, Report, silent

_CLASSES: Final[tuple[type[ProcessServer], ...]] = (Postgres, Kafka, Elasticsearch, Redis, Registry)
_SETTINGS: Final = {
    "postgres": "HEADRACE_DSN",
    "kafka": "HEADRACE_KAFKA",
    "elasticsearch": "HEADRACE_ELASTICSEARCH",
    "redis": "HEADRACE_REDIS",
    "registry": "HEADRACE_SCHEMA_REGISTRY",
}


class Stack:
    """The servers of one folder. Any number of processes may hold a Stack of the same folder.

    Args:
        folder: Where data, configuration, logs and state are; made by `up`.
        ports: Ports that must be used, by the server's name.
        spread: Choose random ports even where the usual ones are free.
        report: Told of downloads and starts.
    """

    def __init__(
        self, folder: Path, *, ports: Mapping[str, int] | None = None, spread: bool = False, report: Report = silent
    ) -> None:
        self.folder = folder.absolute()
        self._report = report
        self._servers = {cls.name: cls(folder, given=ports, spread=spread, report=report) for cls in _CLASSES}

    def server(self, name: str) -> ProcessServer:
        """Return one server, running or not.

        Raises:
            Misconfigured: `unknown-server`.
        """
        try:
            return self._servers[name]
        except KeyError:
            known = ", ".join(ALL)
            raise Misconfigured(
                "unknown-server", f"There is no server {name!r}.", f"The servers are {known}."
            ) from None

    def up(self, names: Sequence[str] = NAMES) -> None:
        """Start those of `names` that do not run, all at once; return when all answer.

        If one of them cannot, or we are interrupted or killed, those that were started now are taken down again.

        Raises:
            Misconfigured: `not-linux`, `server-runs`; what a server's start raises.
        """
        if platform.system() != "Linux":
            raise Misconfigured(
                "not-linux",
                f"This is {platform.system()}; the servers run as processes on Linux only.",
                "Run them as containers: set HEADRACE_STACK=docker.",
            )
        wanted = [self.server(name) for name in names]
        for server in self._servers.values():
            server.check_given()
        absent = [server for server in wanted if not server.process()]
        if not absent:
            self._start(wanted)
            return
        with self._locked(), guard.armed(self.folder, [server.name for server in absent]):
            try:
                self._fetch(absent)
                self._start(wanted)
            except BaseException:
                self._stop(absent)
                raise

    def down(self, names: Sequence[str] = ALL, *, remove: bool = False) -> list[str]:
        """Stop those of `names` that run; return them. With `remove` the data goes, and the folder unless others' files are in it.

        Raises:
            Misconfigured: `stack-folder`, and nothing is removed, if with `remove` the folder is not that of a stack.
        """
        running = [server for name in names if (server := self.server(name)).process()]
        self._stop(running)
        if remove and self.folder.exists():
            self._remove()
        return [server.name for server in running]

    def status(self) -> list[dict[str, Any]]:
        """Return the facts of every server that this folder has ever had."""
        return [_facts(server) for server in self._servers.values() if (self.folder / f"{server.name}.json").exists()]

    def environment(self) -> dict[str, str]:
        """Return the settings that lead to the servers that run."""
        return {_SETTINGS[server.name]: server.address() for server in self._servers.values() if server.process()}

    def _remove(self) -> None:
        """Remove what we have made and nothing else: `--dir` may name any folder."""
        made = [server for server in self._servers.values() if server.recorded()]
        lock = self.folder / ".lock"
        if not made and {*self.folder.iterdir()} - {lock}:
            raise Misconfigured(
                "stack-folder",
                f"{self.folder} is not the folder of a stack: there is none of its servers' files. Nothing was removed.",
                "Name the folder that headrace stack up was given, with --dir.",
            )
        try:
            for server in made:
                server.remove()
            lock.unlink(missing_ok=True)
            for place in (*(self.folder / name for name in ("data", "conf", "logs")), self.folder):
                if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
                    place.rmdir()
        except OSError as error:
            raise Misconfigured(
                "stack-folder", f"{self.folder} could not be removed: {error}.", "Mend that, then run it again."
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _fetch(self, servers: Sequence[ProcessServer]) -> None:
        """Get what is missing, one after the other: two Mavens would spoil their common repository."""
        if {server.name for server in servers} & {"kafka", "elasticsearch", "registry"}:
            java.find()
        for server in servers:
            artifact = server.artifact()
            if artifact:
                artifacts.get(artifact, self._report)

    def _start(self, servers: Sequence[ProcessServer]) -> None:
        cancelled = threading.Event()
        for server in servers:
            server.cancelled = cancelled
        with ThreadPoolExecutor(max_workers=len(servers) or 1) as pool:
            starts: list[Future[None]] = [pool.submit(server.start) for server in servers]
            try:
                done, _ = wait(starts, return_when=FIRST_EXCEPTION)
                failed = [start for start in done if start.exception()]
            except BaseException:
                cancelled.set()
                raise
            if failed:
                cancelled.set()
                failed[0].result()

    def _stop(self, servers: Sequence[ProcessServer]) -> None:
        with ThreadPoolExecutor(max_workers=len(servers) or 1) as pool:
            list(pool.map(lambda server: server.stop(), servers))


def _facts(server: ProcessServer) -> dict[str, Any]:
    process = server.process()
    return {
        "server": server.name,
        "state": "stopped" if not process else "running" if server.healthy() else "not answering",
        "address": server.address(),
        "pid": process.pid if process else None,
        "data": str(server.data),
        "log": str(server.log),
    }
