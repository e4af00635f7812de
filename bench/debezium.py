"""Debezium's own connector for Postgres in Kafka Connect's standalone worker, tuned for throughput or for latency.

It comes from Maven and runs on the newest Java there is, with the options that Kafka's own script gives it. Its topics are made
beforehand with the configuration of ours; its records are JSON without schemas, numbers and times as text where that is an option.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from bench import truth
from bench.program import Program
from bench.source import AWAKE
from bench.tools import Tool
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
        classes = artifacts.get(ARTIFACT) / "libs/*"
        command = [str(java.find() / "bin/java"), *_JAVA, f"-Dlog4j2.configurationFile={logging}", "-cp", str(classes)]
        command += ["org.apache.kafka.connect.cli.ConnectStandalone", *map(str, files)]
        return Program(self.name, command, self.folder, {})

    def streams(self) -> bool:
        with truth.reading(self.kafka) as consumer:
            return truth.ends(consumer, [self.log.topic_of(f"public.{AWAKE}")]) > (0,)

    def _write(self, what: str, options: dict[str, str]) -> Path:
        path = self.folder / f"{self.name}.{what}.properties"
        path.write_text("".join(f"{name}={value}\n" for name, value in options.items()))
        return path

    def _worker(self) -> dict[str, str]:
        return {
            "bootstrap.servers": self.kafka.address(),
            "listeners": f"http://{ports.HOST}:{ports.choose()}",
            "offset.storage.file.filename": str(self.folder / f"{self.name}.offsets"),
            "offset.flush.interval.ms": "1000",  # what is not noted when it is stopped is written again in the next run
            "plugin.discovery": "service_load",
            "key.converter": "org.apache.kafka.connect.json.JsonConverter",
            "key.converter.schemas.enable": "false",
            "value.converter": "org.apache.kafka.connect.json.JsonConverter",
            "value.converter.schemas.enable": "false",
            **self.tuning["worker"],
        }

    def _connector(self, *, snapshot: bool) -> dict[str, str]:
        server = conninfo_to_dict(self.source.dsn)
        return {
            "name": self.name,
            "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
            "tasks.max": "1",
            "database.hostname": str(server["host"]),
            "database.port": str(server["port"]),
            "database.user": str(server["user"]),
            "database.dbname": str(server["dbname"]),
            "topic.prefix": self.settings.source,
            "plugin.name": "pgoutput",
            "slot.name": self.settings.slot,
            "publication.name": self.settings.publication,
            "publication.autocreate.mode": "disabled",
            "table.include.list": ",".join(f"public.{name}" for name in self.source.captured),
            "snapshot.mode": "initial" if snapshot else "no_data",
            "decimal.handling.mode": "string",
            "message.prefix.exclude.list": "headrace",  # our heartbeats would want a topic of their own
            **self.tuning["connector"],
        }


class Prompt(Debezium):
    """The same, tuned for latency."""

    tuning = LATENCY
