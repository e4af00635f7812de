"""The schema registry: Apicurio, whose API is also Confluent's; its schemas in a file, written at each commit, so that ids outlive it."""

from __future__ import annotations

import urllib.request
from typing import ClassVar

from headrace_ops import artifacts, java, ports
from headrace_ops.process_server import ProcessServer


class Registry(ProcessServer):
    """The registry of schemas for values in Avro. Optional: it runs where it is named."""

    name = "registry"
    usual_ports: ClassVar = {"registry": 8081, "registry-management": None}
    usual_seconds = 8

    def artifact(self) -> artifacts.Artifact:
        """See `ProcessServer.artifact`."""
        return artifacts.REGISTRY

    def address(self) -> str:
        """Return the URL of Confluent's API."""
        return f"http://{ports.HOST}:{self.port}/apis/ccompat/v7"

    def prepare(self) -> None:
        """Nothing: everything is on the command line."""

    def command(self) -> list[str]:
        """See `ProcessServer.command`."""
        said = {
            "quarkus.http.host": ports.HOST,
            "quarkus.http.port": str(self.port),
            "quarkus.management.host": ports.HOST,
            "quarkus.management.port": str(self.ports["registry-management"]),
            "apicurio.storage.kind": "sql",
            "apicurio.storage.sql.kind": "h2",
            "apicurio.datasource.url": f"jdbc:h2:file:{self.data}/registry;WRITE_DELAY=0",
        }
        small = ["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        options = [f"-D{name}={value}" for name, value in said.items()]
        jar = artifacts.get(artifacts.REGISTRY) / "quarkus-run.jar"
        return [str(java.find() / "bin/java"), *small, *options, "-jar", str(jar)]

    def probe(self) -> None:
        """Ask for the subjects that there are."""
        with urllib.request.urlopen(f"{self.address()}/subjects", timeout=2) as answer:  # noqa: S310 -- http, ours
            answer.read()
