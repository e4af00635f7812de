"""Debezium's own connector for Postgres in Kafka Connect's standalone worker, tuned for throughput or for latency.

It comes from Maven and runs on the newest Java there is, with the options that Kafka's own script gives it. Its topics are made
beforehand with the configuration of ours; its records are JSON without schemas, numbers and times as text where that is an option.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from bench import truth
from bench.program import Program
from bench.source import AWAKE
from bench.tools import Tool
from headrace.settings import Settings
from headrace_ops import artifacts, java, ports

VERSION: Final = "3.6.1.Final"
_KAFKA: Final = "4.3.1"


def _unpack(brought: Path, filled: Path) -> None:
    brought.rename(filled / "libs")


ARTIFACT: Final = artifacts.Artifact(
    f"debezium-{VERSION}",
    (
        f"io.debezium:debezium-connector-postgres:{VERSION}",
        f"org.apache.kafka:connect-runtime:{_KAFKA}",
        "org.apache.logging.log4j:log4j-slf4j-impl:2.25.2",
        "org.apache.logging.log4j:log4j-core:2.25.2",
    ),
    megabytes=42,
    unpack=_unpack,
    dependencies=True,
)
MEMORY: Final = ("-Xms256M", "-Xmx2G")
_JAVA: Final = (
    *MEMORY,
    "-server",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
    "-Djava.awt.headless=true",
)
"""What bin/connect-standalone.sh of Kafka gives."""
THROUGHPUT: Final = {
    "worker": {"producer.linger.ms": "20", "producer.batch.size": str(512 * 1024), "producer.compression.type": "lz4"},
    "connector": {"max.batch.size": "16384", "max.queue.size": "65536"},
}
LATENCY: Final = {
    "worker": {"producer.linger.ms": "0", "producer.compression.type": "lz4"},
    "connector": {"poll.interval.ms": "10"},
}
_DROP_SLOT: Final = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s"
_LOGGING: Final = """\
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d{ISO8601} %-5p %c{1}: %m%n
rootLogger.level=INFO
rootLogger.appenderRef.console.ref=console
"""


def program() -> list[str]:
    """Return the command line of the standalone worker, from its classes on: a file of its properties and one of the connector's follow."""
    return ["-cp", str(artifacts.get(ARTIFACT) / "libs/*"), "org.apache.kafka.connect.cli.ConnectStandalone"]


def worker(settings: Settings, offsets: Path) -> dict[str, str]:
    """Return the worker's options: JSON without schemas, what it has read kept in the file `offsets`."""
    json = {"": "org.apache.kafka.connect.json.JsonConverter", ".schemas.enable": "false"}
    return {
        "bootstrap.servers": settings.kafka,
        "listeners": f"http://{ports.HOST}:{ports.choose()}",
        "offset.storage.file.filename": str(offsets),
        "offset.flush.interval.ms": "1000",  # what is not noted when it is stopped is written again in the next run
        "plugin.discovery": "service_load",
        **{f"{which}.converter{option}": value for which in ("key", "value") for option, value in json.items()},
    }


def connector(settings: Settings, tables: Iterable[str]) -> dict[str, str]:
    """Return the connector's options: the names, the source and the topics of `settings`."""
    server = conninfo_to_dict(settings.dsn)
    return {
        "name": settings.source,
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "tasks.max": "1",
        "database.hostname": str(server["host"]),
        "database.port": str(server["port"]),
        "database.user": str(server["user"]),
        "database.dbname": str(server["dbname"]),
        "topic.prefix": settings.source,
        "plugin.name": "pgoutput",
        "slot.name": settings.slot,
        "publication.name": settings.publication,
        "table.include.list": ",".join(tables),
    }


def write(path: Path, options: Mapping[str, str]) -> Path:
    """Write a file of properties."""
    path.write_text("".join(f"{name}={value}\n" for name, value in options.items()))
    return path


class Debezium(Tool):
    """Kafka Connect with one connector.

    Attributes:
        tuning: `THROUGHPUT` or `LATENCY`.
    """

    kind = "Debezium"
    tuning = THROUGHPUT

    def publish(self) -> None:
        self.source.run(f"CREATE PUBLICATION {self.name} FOR TABLE {', '.join(self.source.captured)}")

    def unpublish(self) -> None:
        with psycopg.connect(self.source.dsn, autocommit=True) as connection:
            connection.execute(_DROP_SLOT, [self.settings.slot])
            connection.execute(f"DROP PUBLICATION {self.name}".encode())

    def start(self, *, snapshot: bool) -> Program:
        files = [self._write("worker", self._worker()), self._write("connector", self._connector(snapshot=snapshot))]
        logging = self.folder / f"{self.name}.log4j2.properties"
        logging.write_text(_LOGGING)
        started = [str(java.find() / "bin/java"), *_JAVA, f"-Dlog4j2.configurationFile={logging}"]
        command = [*started, *program(), *map(str, files)]
        return Program(self.name, command, self.folder, {})

    def streams(self) -> bool:
        with truth.reading(self.kafka) as consumer:
            return truth.ends(consumer, [self.log.topic_of(f"public.{AWAKE}")]) > (0,)

    def _write(self, what: str, options: dict[str, str]) -> Path:
        return write(self.folder / f"{self.name}.{what}.properties", options)

    def _worker(self) -> dict[str, str]:
        return worker(self.settings, self.folder / f"{self.name}.offsets") | self.tuning["worker"]

    def _connector(self, *, snapshot: bool) -> dict[str, str]:
        return {
            **connector(self.settings, [f"public.{name}" for name in self.source.captured]),
            "publication.autocreate.mode": "disabled",
            "snapshot.mode": "initial" if snapshot else "no_data",
            "decimal.handling.mode": "string",
            "message.prefix.exclude.list": ".*",  # our heartbeats, and what ends pg_recvlogical, would want a topic of their own
            **self.tuning["connector"],
        }


class Prompt(Debezium):
    """The same, tuned for latency."""

    tuning = LATENCY
