"""The backend of `Server` that drives the containers of docker-compose.yml, found by compose's own labels.

A container holds everything that must be known of its server: the address is read from its published port and the
passwords in its environment, so that whoever started it may be long gone.
"""

from __future__ import annotations

import contextlib
import time
from threading import Event
from typing import Any, Final

import docker
from docker.errors import APIError, DockerException, NotFound
from docker.models.containers import Container

from headrace.errors import Misconfigured, Transient
from headrace_ops.server import Report, silent

PROJECT, SERVICE = "com.docker.compose.project", "com.docker.compose.service"
_DEADLINE = 240.0
_STOP_SECONDS = 60
_ADDRESSES: Final = {
    "postgres": "postgresql://{POSTGRES_USER}:{POSTGRES_PASSWORD}@{host}:{port}/{POSTGRES_DB}",
    "kafka": "{host}:{port}",
    "elasticsearch": "http://elastic:{ELASTIC_PASSWORD}@{host}:{port}",
    "redis": "redis://:{REDISCLI_AUTH}@{host}:{port}/0",
    "registry": "http://{host}:{port}/apis/ccompat/v7",
}


def engine() -> docker.DockerClient:
    """Return a client of the container engine. Raises Misconfigured: `no-engine`."""
    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        raise Misconfigured(
            "no-engine",
            f"No container engine answers: {error}.",
            "Start Docker, set DOCKER_HOST, or run without HEADRACE_STACK=docker.",
        ) from error
    return client


class DockerServer:
    """One server as a container of a compose project.

    Args:
        client: The engine.
        project: The compose project.
        name: The service.
        report: Told how long the server has been starting.
    """

    def __init__(self, client: docker.DockerClient, project: str, name: str, report: Report = silent) -> None:
        self.name = name
        self._client = client
        self._project = project
        self._report = report

    def found(self) -> Container | None:
        """Return its container, running or not."""
        labels = [f"{PROJECT}={self._project}", f"{SERVICE}={self.name}", "com.docker.compose.oneoff=False"]
        containers = self._client.containers.list(all=True, filters={"label": labels})
        return containers[0] if containers else None

    def container(self) -> Container:
        """Return its container. Raises Misconfigured: `no-container`."""
        container = self.found()
        if container is None:
            raise Misconfigured(
                "no-container",
                f"The compose project {self._project} has no container of {self.name}.",
                "Run: HEADRACE_STACK=docker headrace stack up, or set COMPOSE_PROJECT_NAME to the project that runs.",
            )
        return container

    def start(self) -> None:
        """See `Server.start`."""
        self.resume()
        try:
            self.container().start()
        except APIError as error:
            raise Misconfigured(
                "container-start",
                f"The engine cannot start {self.name}: {error.explanation}.",
                "Free what it names (a port: headrace stack down --remove, then up --port), and run it again.",
            ) from error
        began = time.monotonic()
        while not self.healthy():
            waited = time.monotonic() - began
            self._report(self.name, min(waited, 19.0), 20.0)
            self._check(waited)
            Event().wait(0.2)
        self._report(self.name, 20.0, 20.0)

    def stop(self) -> None:
        """See `Server.stop`."""
        self.resume()
        self.container().stop(timeout=_STOP_SECONDS)

    def kill(self) -> None:
        """See `Server.kill`."""
        self.resume()
        container = self.container()
        with contextlib.suppress(NotFound):
            if container.status in {"running", "restarting"}:
                with contextlib.suppress(APIError):  # it has just ended by itself
                    container.kill()
                container.wait()

    def pause(self) -> None:
        """See `Server.pause`."""
        container = self.container()
        if container.status == "running":
            container.pause()

    def resume(self) -> None:
        """See `Server.resume`."""
        container = self.container()
        if container.status == "paused":
            container.unpause()

    def address(self) -> str:
        """See `Server.address`."""
        attributes: dict[str, Any] = self.container().attrs
        environ = dict(line.partition("=")[::2] for line in attributes["Config"]["Env"])
        bound = next(binding for bindings in attributes["HostConfig"]["PortBindings"].values() for binding in bindings)
        return _ADDRESSES[self.name].format(host=bound["HostIp"], port=bound["HostPort"], **environ)

    def running(self) -> bool:
        """Whether its container runs, or is frozen."""
        container = self.found()
        return container is not None and container.status in {"running", "paused"}

    def healthy(self) -> bool:
        """Whether its health check passes."""
        container = self.container()
        health: str = container.attrs["State"].get("Health", {}).get("Status", "healthy")
        return container.status == "running" and health == "healthy"

    def said(self, lines: int) -> str:
        """Return the end of its output."""
        return str(self.container().logs(tail=lines).decode(errors="replace"))

    def _check(self, waited: float) -> None:
        """Raise when waiting for its health is of no use."""
        if self.container().status in {"exited", "dead"}:
            last = "\n  ".join(self.said(5).splitlines())
            raise Misconfigured(
                "server-died",
                f"{self.name} ended while starting; its last words:\n  {last}",
                f"See: headrace stack logs {self.name}",
            )
        if waited > _DEADLINE:
            raise Transient(
                "server-slow",
                f"{self.name} is not healthy after {waited:.0f} s.",
                f"See: headrace stack logs {self.name}",
            )
