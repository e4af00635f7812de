"""Elasticsearch: one node without security, in a small Java process."""

from __future__ import annotations

import shutil
import urllib.request
from pathlib import Path
from typing import ClassVar, Final

from headrace_ops import artifacts, java, ports, processes
from headrace_ops.process_server import ProcessServer

# The breaker that looks at the real use of the heap is made for G1: with the serial collector it counts garbage, and refuses bulks (429).
_CONF: Final = """\
cluster.name: headrace
node.name: headrace
discovery.type: single-node
network.host: {host}
http.port: {port}
transport.port: {transport}
path.data: {data}/data
path.logs: {data}/logs
xpack.security.enabled: false
cluster.routing.allocation.disk.threshold_enabled: false
action.destructive_requires_name: false
indices.breaker.total.use_real_memory: false
"""
_LOGGING: Final = """\
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d{ISO8601}][%-5p][%-25c{1.}] %marker %m%consoleException%n
rootLogger.level = info
rootLogger.appenderRef.console.ref = console
"""
_JVM: Final = """\
-Xms512m
-Xmx512m
-XX:+UseSerialGC
-XX:TieredStopAtLevel=1
-XX:+ExitOnOutOfMemoryError
-Djava.io.tmpdir=${ES_TMPDIR}
--add-modules=jdk.incubator.vector
-XX:CompileCommand=dontinline,java/lang/invoke/MethodHandle.setAsTypeCache
-XX:CompileCommand=dontinline,java/lang/invoke/MethodHandle.asTypeUncached
"""


class Elasticsearch(ProcessServer):
    """The search store."""

    name = "elasticsearch"
    usual_ports: ClassVar = {"elasticsearch": 9200, "elasticsearch-transport": None}
    usual_seconds = 14

    @property
    def _temporary(self) -> Path:
        """Its temporary files: it makes another folder in /tmp at each start, and leaves it, where it is not told of one."""
        return self.data / "tmp"

    def artifact(self) -> artifacts.Artifact:
        """See `ProcessServer.artifact`."""
        return artifacts.ELASTICSEARCH

    def address(self) -> str:
        """Return the URL."""
        return f"http://{ports.HOST}:{self.port}"

    def prepare(self) -> None:
        """Write the configuration beside what the distribution brings; empty its folder of temporary files."""
        shutil.rmtree(self._temporary, ignore_errors=True)
        processes.own(self._temporary)
        transport = self.ports["elasticsearch-transport"]
        shutil.copytree(artifacts.get(artifacts.ELASTICSEARCH) / "config", self.conf, dirs_exist_ok=True)
        conf = _CONF.format(host=ports.HOST, port=self.port, transport=transport, data=self.data)
        (self.conf / "elasticsearch.yml").write_text(conf)
        (self.conf / "log4j2.properties").write_text(_LOGGING)
        (self.conf / "jvm.options").write_text(_JVM)

    def command(self) -> list[str]:
        """See `ProcessServer.command`."""
        return [str(artifacts.get(artifacts.ELASTICSEARCH) / "bin/elasticsearch")]

    def environ(self) -> dict[str, str]:
        """See `ProcessServer.environ`."""
        own = {"ES_PATH_CONF": str(self.conf), "ES_TMPDIR": str(self._temporary)}
        return super().environ() | own | {"ES_JAVA_HOME": str(java.find())}

    def probe(self) -> None:
        """Wait for every index to have its primary shards."""
        with urllib.request.urlopen(f"{self.address()}/_cluster/health", timeout=2) as answer:  # noqa: S310 -- http, ours
            if b'"status":"red"' in answer.read():
                raise EOFError
