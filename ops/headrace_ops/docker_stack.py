"""All servers as containers: the four of docker-compose.yml, in a compose project of the stack's folder.

Each folder is a project of its own, with its own volumes, ports and passwords (`<folder>/.env`), so that a demo never
touches a deployment; where COMPOSE_PROJECT_NAME is set, it is that project. Compose makes the containers, once; from
then on they are driven through the engine.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from headrace.errors import Misconfigured
from headrace.settings import masked
from headrace_ops import ports
from headrace_ops.docker_server import PROJECT, DockerServer, engine
from headrace_ops.server import ALL, NAMES, Report, silent

COMPOSE_FILE: Final = Path(__file__).parents[2] / "docker-compose.yml"
_PASSWORDS = ("POSTGRES_PASSWORD", "CAPTURE_PASSWORD", "ELASTIC_PASSWORD", "REDIS_PASSWORD")
_PORTS: Final = {
    "postgres": ("POSTGRES_PORT", 5432),
    "kafka": ("KAFKA_PORT", 9092),
    "elasticsearch": ("ELASTICSEARCH_PORT", 9200),
    "redis": ("REDIS_PORT", 6379),
    "registry": ("REGISTRY_PORT", 8081),
}
_OTHERWISE: Final = {"postgres": "DSN", "registry": "SCHEMA_REGISTRY"}
_SETTINGS: Final = {name: f"HEADRACE_{_OTHERWISE.get(name, name.upper())}" for name in ALL}


class DockerStack:
    """The servers of one compose project. Any number of processes may hold one of the same folder.

    Args:
        folder: Its `.env` is made by `up`.
        ports: Ports that must be used, by the server's name.
        spread: Choose random ports even where the usual ones are free.
        report: Told of starts.
    """

    def __init__(
        self, folder: Path, *, ports: Mapping[str, int] | None = None, spread: bool = False, report: Report = silent
    ) -> None:
        self.folder = folder.absolute()
        digest = hashlib.sha256(str(self.folder).encode()).hexdigest()[:10]
        self.project = os.environ.get("COMPOSE_PROJECT_NAME") or f"headrace-{digest}"
        self._ports, self._spread = ports or {}, spread
        self._client = engine()
        self._servers = {name: DockerServer(self._client, self.project, name, report) for name in ALL}

    def server(self, name: str) -> DockerServer:
        """Return one server, running or not. Raises Misconfigured: `unknown-server`."""
        if name not in self._servers:
            known = ", ".join(ALL)
            raise Misconfigured("unknown-server", f"There is no server {name!r}.", f"The servers are {known}.")
        return self._servers[name]

    def up(self, names: Sequence[str] = NAMES) -> None:
        """Start those of `names` that do not run, all at once; return when all are healthy.

        If one of them cannot, those that were started now are taken down again.

        Raises:
            Misconfigured: `server-runs`, if the project was made with other ports than those given.
        """
        self._check_given()
        wanted = [self.server(name) for name in names]
        stopped = [server.name for server in wanted if not server.running()]
        absent = [server.name for server in wanted if server.found() is None]
        if absent:
            self._create(absent)
        try:
            with ThreadPoolExecutor(max_workers=len(wanted)) as pool:
                list(pool.map(DockerServer.start, wanted))
        except BaseException:
            self.down(stopped)
            raise

    def down(self, names: Sequence[str] = ALL, *, remove: bool = False) -> list[str]:
        """Stop those of `names` that run; return them. With `remove` the project goes with its data."""
        running = [server for name in names if (server := self.server(name)).running()]
        with ThreadPoolExecutor(max_workers=len(ALL)) as pool:
            list(pool.map(DockerServer.stop, running))
        if remove:
            self._remove()
        return [server.name for server in running]

    def status(self) -> list[dict[str, Any]]:
        """Return the facts of every server that has a container."""
        return [_facts(server) for server in self._servers.values() if server.found()]

    def environment(self) -> dict[str, str]:
        """Return the settings that lead to the servers that run."""
        return {_SETTINGS[name]: server.address() for name, server in self._servers.items() if server.running()}

    def _check_given(self) -> None:
        """Ports are those of the first `up`, as passwords are."""
        path = self.folder / ".env"
        made = set(path.read_text().splitlines()) if path.exists() else None
        for name, port in self._ports.items():
            if made is not None and f"{_PORTS[name][0]}={port}" not in made:
                raise Misconfigured(
                    "server-runs",
                    f"The ports of {self.project} are those in {path}; {name} is not at {port}.",
                    "Leave --port out; or remove the project with its data: headrace stack down --remove, then up --port again.",
                )

    def _create(self, names: Sequence[str]) -> None:
        program = shutil.which("docker")
        if program is None or not COMPOSE_FILE.exists():
            raise Misconfigured(
                "no-compose",
                f"The containers of {self.project} are not there, and `docker compose` or {COMPOSE_FILE} is missing.",
                "Run docker compose up where they are, and set COMPOSE_PROJECT_NAME to its project.",
            )
        files = ["--file", str(COMPOSE_FILE), "--env-file", str(self._env_file())]
        command = [program, "compose", "--project-name", self.project, *files, "create", "--no-build", *names]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip()[-1000:]
            raise Misconfigured("no-compose", f"`docker compose create` failed: {said}", "Mend what it says.")

    def _env_file(self) -> Path:
        """Return the project's `.env`, made at the first time."""
        path = self.folder / ".env"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = [f"{name}={secrets.token_hex(16)}" for name in _PASSWORDS]
            lines += [f"{variable}={self._port(name, usual)}" for name, (variable, usual) in _PORTS.items()]
            path.touch(mode=0o600)
            path.write_text("\n".join(lines) + "\n")
        return path

    def _port(self, name: str, usual: int) -> int:
        return self._ports.get(name) or ports.choose(None if self._spread else usual)

    def _remove(self) -> None:
        mine = {"label": f"{PROJECT}={self.project}"}
        for container in self._client.containers.list(all=True, filters=mine):
            container.remove(v=True, force=True)
        for thing in (*self._client.networks.list(filters=mine), *self._client.volumes.list(filters=mine)):
            thing.remove()
        (self.folder / ".env").unlink(missing_ok=True)


def _facts(server: DockerServer) -> dict[str, Any]:
    container = server.container()
    running = server.running()
    return {
        "server": server.name,
        "state": "stopped" if not running else "running" if server.healthy() else "not answering",
        "address": masked(server.address()),  # it has the password; `stack env` gives it
        "pid": container.attrs["State"]["Pid"] or None,
        "data": "volume",
        "log": f"docker logs {container.name}",
    }
