"""Kafka: one KRaft node that is broker and controller, in a small Java process."""

from __future__ import annotations

import socket
import struct
import subprocess
from typing import Final

from headrace.errors import Misconfigured
from headrace_ops import artifacts, java, ports, processes
from headrace_ops.process_server import ProcessServer

_CLUSTER: Final = "aGVhZHJhY2Utc3RhY2stMQ"
_CONF: Final = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller}
advertised.listeners=PLAINTEXT://{host}:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}/log
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
message.max.bytes=20971520
replica.fetch.max.bytes=20971520
log.cleaner.backoff.ms=1000
# a broker that was killed may register again this long after its last heartbeat
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
"""
_LOGGING: Final = """\
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d{ISO8601} %-5p %c{1}: %m%n
rootLogger.level=INFO
rootLogger.appenderRef.console.ref=console
"""
_METADATA, _METADATA_VERSION = 3, 1


class Kafka(ProcessServer):
    """The log."""

    name = "kafka"
    usual_ports = {"kafka": 9092, "kafka-controller": None}
    usual_seconds = 6

    def artifact(self) -> artifacts.Artifact:
        """See `ProcessServer.artifact`."""
        return artifacts.KAFKA

    def address(self) -> str:
        """Return the bootstrap server."""
        return f"{ports.HOST}:{self.port}"

    def prepare(self) -> None:
        """Write the properties; format the data once."""
        conf = _CONF.format(host=ports.HOST, port=self.port, controller=self.ports["kafka-controller"], data=self.data)
        (self.conf / "server.properties").write_text(conf)
        (self.conf / "log4j2.properties").write_text(_LOGGING)
        if (self.data / "log/meta.properties").exists():
            return
        done = subprocess.run(  # type: ignore[call-overload]
            [*self.java(), "kafka.tools.StorageTool", "format", "-t", _CLUSTER, "-c", str(self.conf / "server.properties")],
            cwd=self.data, env=self.environ(), capture_output=True, text=True, check=False, **processes.drop_privileges(),
        )  # fmt: skip
        if done.returncode:
            raise Misconfigured("server-died", f"Kafka's storage cannot be formatted: {done.stdout}{done.stderr}"[-800:])

    def java(self) -> list[str]:
        """Return the start of a command line that runs a class of Kafka's: the broker or one of its tools."""
        classes = artifacts.get(artifacts.KAFKA) / "libs/*"
        logging = f"-Dlog4j2.configurationFile={self.conf}/log4j2.properties"
        return [str(java.find() / "bin/java"), "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", logging, "-cp", str(classes)]

    def command(self) -> list[str]:
        """See `ProcessServer.command`."""
        return [*self.java(), "kafka.Kafka", str(self.conf / "server.properties")]

    def probe(self) -> None:
        """Ask for the cluster's live brokers: a broker is in the answer once it may lead partitions."""
        with socket.create_connection((ports.HOST, self.port), timeout=2) as connection:
            request = struct.pack(">hhihi", _METADATA, _METADATA_VERSION, 1, -1, 0)
            connection.sendall(struct.pack(">i", len(request)) + request)
            header = connection.recv(12, socket.MSG_WAITALL)
            if len(header) < 12 or struct.unpack(">iii", header)[2] < 1:
                raise EOFError
