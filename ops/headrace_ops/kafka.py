"""Kafka: one KRaft node that is broker and controller, in a small Java process.

A node that was killed is still registered as the leader of everything. Started as it is, it would first believe that,
take up the transactions that were being committed, then be fenced because its old session ends, and find its
partitions without a leader; Kafka 4 takes such partitions for deleted and never writes their commit markers
(KAFKA-20734): readers of committed records would be stuck for ever. So after a kill its controller runs alone first, for
as long as it needs to end the old session. For the same reason a session is long: no pause may end it.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from typing import ClassVar, Final

from headrace.errors import Transient
from headrace_ops import artifacts, java, ports, processes
from headrace_ops.process_server import ProcessServer

_CLUSTER: Final = "aGVhZHJhY2Utc3RhY2stMQ"
_CONF: Final = """\
process.roles=broker,controller
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller}
advertised.listeners=PLAINTEXT://{host}:{port}
inter.broker.listener.name=PLAINTEXT
broker.session.timeout.ms=600000
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
"""
_CONTROLLER: Final = """\
process.roles=controller
listeners=CONTROLLER://{host}:{controller}
broker.session.timeout.ms=100
"""
_NODE: Final = """\
node.id=1
controller.quorum.voters=1@{host}:{controller}
controller.listener.names=CONTROLLER
log.dirs={data}/log
"""
_LOGGING: Final = """\
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d{ISO8601} %-5p %c{1}: %m%n
rootLogger.level=INFO
rootLogger.appenderRef.console.ref=console
"""
_TALKING: Final = """\
logger.controller.name=org.apache.kafka.controller
logger.controller.level=DEBUG
"""
"""Added for the controller alone: it tells what it has looked at, and what is committed."""
_FENCING: Final = b"Fencing broker 1 "
_FENCED: Final = re.compile(rb"Read-write operation (maybeFenceStaleBroker\(\d+\)) .*Processed \1 in ", re.DOTALL)
_NONE_TO_FENCE: Final = b"maybeFenceStaleBroker generated 0 records"
_LOOKS: Final = 40
"""It looks every eighth of its session: after so many looks without a broker to fence, there is none."""
_METADATA, _METADATA_VERSION = 3, 1
_SESSION_SECONDS = 60.0
_STUCK: Final = "kafka was killed, and its controller did not end the old session in time: started so, readers would be stuck for ever."
_HEADER: Final = struct.Struct(">iii")
"""Of the answer: its size, the number of the request, the number of live brokers."""


class Kafka(ProcessServer):
    """The log."""

    name = "kafka"
    usual_ports: ClassVar = {"kafka": 9092, "kafka-controller": None}
    usual_seconds = 6

    def artifact(self) -> artifacts.Artifact:
        """See `ProcessServer.artifact`."""
        return artifacts.KAFKA

    def address(self) -> str:
        """Return the bootstrap server."""
        return f"{ports.HOST}:{self.port}"

    def prepare(self) -> None:
        """Write the properties; format the data once; after a kill, end the old session."""
        controller = self.ports["kafka-controller"]
        for name, text in (("server", _CONF), ("controller", _CONTROLLER)):
            conf = (text + _NODE).format(host=ports.HOST, port=self.port, controller=controller, data=self.data)
            (self.conf / f"{name}.properties").write_text(conf)
        (self.conf / "log4j2.properties").write_text(_LOGGING)
        (self.conf / "talking.properties").write_text(_LOGGING + _TALKING)
        if not (self.data / "log/meta.properties").exists():
            self._format()
        elif not (self.data / "log/.kafka_cleanshutdown").exists():
            self._end_old_session()

    def _format(self) -> None:
        tool = ["kafka.tools.StorageTool", "format", "-t", _CLUSTER, "-c", str(self.conf / "server.properties")]
        processes.run([*self.java(), *tool], folder=self.data, environ=self.environ())

    def _end_old_session(self) -> None:
        """Run the controller alone until it has fenced the broker, or has looked so often that there was none to fence.

        It says what it does before that is in its log: ended then, it leaves the old session, and the broker may not register.
        """
        begin = self.log.stat().st_size if self.log.exists() else 0
        talking = self.java("talking.properties")
        controller = self.spawn([*talking, "kafka.Kafka", str(self.conf / "controller.properties")])
        deadline = time.monotonic() + _SESSION_SECONDS
        ended = False
        while (
            not ended and processes.alive(controller) and time.monotonic() < deadline and not self.cancelled.wait(0.05)
        ):
            said = self.log.read_bytes()[begin:]
            none = _FENCING not in said and said.count(_NONE_TO_FENCE) >= _LOOKS
            ended = none or _FENCED.search(said) is not None
        died = not processes.alive(controller)
        self.stop()
        if not ended:
            raise (
                self._died()
                if died
                else Transient("server-slow", _STUCK, f"Look at {self.log}, then run headrace stack up again.")
            )

    def java(self, told: str = "log4j2.properties") -> list[str]:
        """Return the start of a command line that runs a class of Kafka's: the broker or one of its tools; `told` is how it logs."""
        classes = artifacts.get(artifacts.KAFKA) / "libs/*"
        small = ["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        logging = f"-Dlog4j2.configurationFile={self.conf}/{told}"
        return [str(java.find() / "bin/java"), *small, logging, "-cp", str(classes)]

    def command(self) -> list[str]:
        """See `ProcessServer.command`."""
        return [*self.java(), "kafka.Kafka", str(self.conf / "server.properties")]

    def probe(self) -> None:
        """Ask for the cluster's live brokers: a broker is in the answer once it may lead partitions."""
        with socket.create_connection((ports.HOST, self.port), timeout=2) as connection:
            request = struct.pack(">hhihi", _METADATA, _METADATA_VERSION, 1, -1, 0)
            connection.sendall(struct.pack(">i", len(request)) + request)
            header = connection.recv(_HEADER.size, socket.MSG_WAITALL)
            if len(header) < _HEADER.size or _HEADER.unpack(header)[2] < 1:
                raise EOFError
