"""Servers that want TLS and a login: a broker with a SASL_SSL listener, Elasticsearch behind a certificate of its own."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import ssl
import subprocess
import tempfile
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from confluent_kafka.admin import ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from elasticsearch import Elasticsearch as Client

from headrace.consumer import Generation
from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.log import Log, kafka, topics
from headrace.log.plain import PlainWriter
from headrace.log.registry import Registry
from headrace.settings import Settings, environment
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace.stores.elasticsearch.client import client, errors
from headrace_ops import ports
from headrace_ops.elasticsearch import Elasticsearch
from headrace_ops.kafka import Kafka
from headrace_ops.registry import Registry as Server
from tests.fixtures.feed import ITEMS, Feed
from tests.integration.test_store_elasticsearch import at

RUNBOOK = Path(__file__).parents[2] / "ops/runbook.md"
_PASSWORD = "a, b=c"
_LOGIN = """
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller},LOGIN://{host}:{login}
advertised.listeners=PLAINTEXT://{host}:{port},LOGIN://{host}:{login}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,LOGIN:SASL_SSL
listener.name.login.ssl.keystore.type=PEM
listener.name.login.ssl.keystore.location={conf}/server.pem
listener.name.login.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512
listener.name.login.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.login.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_us="{password}";
"""


class Guarded(Kafka):
    """Has a listener with TLS and a login; what is written last in its properties counts."""

    usual_ports: ClassVar = Kafka.usual_ports | {"kafka-login": None}

    def prepare(self) -> None:
        super().prepare()
        certify(self.conf / "server.pem")
        properties = self.conf / "server.properties"
        more = {"controller": self.ports["kafka-controller"], "login": self.ports["kafka-login"], "conf": self.conf}
        login = _LOGIN.format(host=ports.HOST, port=self.port, password=_PASSWORD, **more)
        properties.write_text(properties.read_text() + login)


def certify(file: Path) -> Path:
    """Write a key with a certificate for this machine that nobody vouches for."""
    made = file.with_suffix(".crt")
    made_of = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(file), "-out", str(made)]
    named = ["-subj", "/CN=us", "-addext", f"subjectAltName=IP:{ports.HOST}"]
    subprocess.run([*made_of, *named], check=True, capture_output=True)
    file.write_text(file.read_text() + made.read_text())
    file.chmod(0o644)  # the servers' user reads it
    return file


@pytest.fixture(scope="module")
def guarded() -> Iterator[Settings]:
    """Settings for a broker that lets in who knows the password."""
    with tempfile.TemporaryDirectory(prefix="headrace-guarded-") as name:
        Path(name).chmod(0o755)
        server = Guarded(Path(name), spread=True)
        server.start()
        yield replace(
            Settings(),
            source="guarded",
            kafka=f"{ports.HOST}:{server.ports['kafka-login']}",
            kafka_options=json.dumps(
                {
                    "security.protocol": "SASL_SSL",
                    "ssl.ca.location": str(server.conf / "server.crt"),
                    "sasl.mechanism": "PLAIN",
                    "sasl.username": "us",
                    "sasl.password": _PASSWORD,
                }
            ),
        )
        server.kill()


def test_a_log_is_written_and_read_through_tls_and_a_login(guarded: Settings) -> None:
    """By the producer, the reader and the client for topics, all three."""
    feed = Feed(guarded)
    sealed = feed.cut((ITEMS, 1, 10))
    feed.writer.close()
    log = Log(guarded)
    assert [(change.key, change.row) for change in log.scan(ITEMS)] == [(b'{"id":1}', {"id": 1, "n": 10})]
    newest = log.newest_checkpoint()
    assert newest is not None
    assert newest.version == sealed.version
    options = json.loads(guarded.kafka_options)
    scram = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)  # type: ignore[no-untyped-call]
    wanted = UserScramCredentialUpsertion("us", scram, _PASSWORD.encode())  # type: ignore[no-untyped-call]
    admin = kafka.admin(guarded)
    admin.alter_user_scram_credentials([wanted])["us"].result(30)  # type: ignore[no-untyped-call]
    options["sasl.mechanism"] = "SCRAM-SHA-512"
    assert log.topic_of(ITEMS) in Log(replace(guarded, kafka_options=json.dumps(options))).topics.names()


@pytest.mark.parametrize(
    ("other", "code", "said"),
    [
        ({"sasl.password": "wrong"}, "kafka-refuses-login", "Invalid username or password"),
        ({"ssl.ca.location": ""}, "kafka-refuses-login", "certificate verify failed"),
        ({"security.protocol": "PLAINTEXT"}, "kafka-away", "HEADRACE_KAFKA_OPTIONS"),
    ],
)
def test_why_a_broker_lets_nobody_in_is_told(
    guarded: Settings, monkeypatch: pytest.MonkeyPatch, other: dict[str, str], code: str, said: str
) -> None:
    monkeypatch.setattr(topics, "TIMEOUT", 5 if code == "kafka-away" else 15)
    options = json.dumps(json.loads(guarded.kafka_options) | other)
    with pytest.raises(HeadraceError, match=said) as caught:
        Log(replace(guarded, kafka_options=options)).partitions(["any"])
    assert caught.value.code == code
    assert isinstance(caught.value, Misconfigured) == (code == "kafka-refuses-login")
    assert "HEADRACE_KAFKA_OPTIONS" in caught.value.remedy
    with pytest.raises(Transient) as caught:
        PlainWriter(replace(guarded, kafka_options=options)).write("any", b"{}", None, 0.1)
    assert "HEADRACE_KAFKA_OPTIONS" in caught.value.remedy


@contextmanager
def behind_tls(port: int, folder: Path) -> Iterator[tuple[str, Path, list[bytes]]]:
    """The host and port that a server is reached at by https, who vouches for it, and what it was asked."""
    file, asked = certify(folder / "server.pem"), list[bytes]()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    with closing(socket.create_server((ports.HOST, 0))) as listening:
        threading.Thread(target=_serve, args=(listening, context, port, asked), daemon=True).start()
        yield f"{ports.HOST}:{listening.getsockname()[1]}", file.with_suffix(".crt"), asked


def _serve(listening: socket.socket, context: ssl.SSLContext, port: int, asked: list[bytes]) -> None:
    """Hand over what comes on one connection after the other, without TLS; end with the socket."""
    while True:
        try:
            plain, _ = listening.accept()
        except OSError:
            return
        with (
            suppress(OSError),  # it does not trust us
            context.wrap_socket(plain, server_side=True) as near,
            socket.create_connection((ports.HOST, port)) as far,
        ):
            _hand_over(near, far, asked)


def _hand_over(near: ssl.SSLSocket, far: socket.socket, asked: list[bytes]) -> None:
    while True:
        for ready in select.select([near, far], [], [])[0]:
            data = ready.recv(65536)  # more than a record of TLS: nothing is left where select does not see it
            if not data:
                return
            if ready is near:
                asked.append(data)
            (far if ready is near else near).sendall(data)


def test_elasticsearch_is_reached_by_a_ca_of_its_own_and_an_api_key(
    elasticsearch: Elasticsearch, tmp_path: Path
) -> None:
    with behind_tls(elasticsearch.port, tmp_path) as (host, authority, asked):
        strange = replace(Settings(), elasticsearch=f"https://{host}")
        with pytest.raises(Transient) as caught, errors(strange):
            client(strange).cluster.health()
        assert caught.value.code == "elasticsearch-untrusted"
        assert "HEADRACE_ELASTICSEARCH_CA" in caught.value.remedy
        with closing(client(replace(strange, elasticsearch_ca=str(authority), elasticsearch_api_key="a2V5"))) as known:
            known.index(index="titles", id="1", document={"title": "Alien"})
            assert known.get(index="titles", id="1")["_source"] == {"title": "Alien"}
    assert b"\r\nauthorization: apikey a2v5\r\n" in b"".join(asked).lower()


def test_the_command_that_mends_an_index_has_the_authority_and_the_login(
    elasticsearch: Elasticsearch, tmp_path: Path
) -> None:
    """By an API key, and by a password, which is not in it: it is run as it was told."""
    with behind_tls(elasticsearch.port, tmp_path) as (host, authority, asked), Client(elasticsearch.address()) as plain:
        named = replace(Settings(), elasticsearch=f"https://us:a%40b@{host}", elasticsearch_ca=str(authority))
        keyed = replace(named, elasticsearch=f"https://{host}", elasticsearch_api_key="a2V5")
        opened(keyed)
        plain.indices.put_settings(index="titles-g1", settings={"index.translog.durability": "async"})
        with pytest.raises(Misconfigured, match="index-not-durable") as lax:
            opened(keyed)
        asked.clear()
        assert "a2V5" not in run_as_told(lax.value.remedy, keyed)
        assert b"\r\nauthorization: apikey a2v5\r\n" in b"".join(asked).lower()
        plain.indices.add_block(index="titles-g1", block="write")
        with pytest.raises(Transient, match="elasticsearch-blocked") as blocked:
            opened(named)
        asked.clear()
        assert "a%40b" not in run_as_told(blocked.value.remedy, named)
        assert b"Basic " + b64encode(b"us:a@b") in b"".join(asked)
        opened(named)
        plain.indices.add_block(index="titles-g1", block="write")
        run_in_compose(elasticsearch.address(), "titles-g1", blocked.value.remedy)
        opened(named)


def opened(settings: Settings) -> None:
    """Open an index, with a position, and close it."""
    store = ElasticsearchIndex("titles", mappings={})
    store.bind(settings, "titles")
    with closing(store):
        store.open(Generation("titles", 1, "abc"))
        store.write([], at(1))


def run_in_compose(address: str, index: str, remedy: str) -> None:
    """Run what the runbook has of it for compose, beside the server as that does."""
    (told,) = re.findall(r"docker compose exec elasticsearch (sh -c .*)", RUNBOOK.read_text())
    change = re.findall("-d '([^']*)'", remedy)[0]
    for name, value in (("http://127.0.0.1:9200", address), ("INDEX", index), ("{CHANGE}", change)):
        told = told.replace(name, value)
    done = subprocess.run(["/bin/sh", "-c", told], capture_output=True, text=True, check=True)
    assert '"acknowledged":true' in done.stdout


def run_as_told(remedy: str, settings: Settings) -> str:
    """Run the command of a remedy in a shell that has the settings; return it."""
    told = re.search("curl .* -d '[^']*'", remedy)
    assert told, remedy
    environ = environment(settings) | {"PATH": os.environ["PATH"]}
    done = subprocess.run(["/bin/sh", "-c", told[0]], env=environ, capture_output=True, text=True, check=False)
    assert '"acknowledged":true' in done.stdout, (told[0], done.stdout, done.stderr)
    return told[0]


def test_a_registry_is_reached_by_a_ca_of_its_own_and_a_password(registry: Server, tmp_path: Path) -> None:
    with behind_tls(registry.port, tmp_path) as (host, authority, asked):
        strange = replace(Settings(), schema_registry=f"https://us:a%40%2Fb@{host}/apis/ccompat/v7")
        with pytest.raises(Transient, match=r"\*\*\*@") as caught:
            Registry(strange).schema(1)
        assert "a%40" not in str(caught.value)
        assert "HEADRACE_SCHEMA_REGISTRY_CA" in caught.value.remedy
        known = Registry(replace(strange, schema_registry_ca=str(authority)))
        fields = [{"name": "title", "type": "string"}]
        write = known.writer("secured", {"type": "record", "name": "Title", "fields": fields})
        assert known.read(write({"title": "Alien"})) == {"title": "Alien"}
    assert b"Basic " + b64encode(b"us:a@/b") in b"".join(asked)
