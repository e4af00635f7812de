"""The stack: real servers that survive what is done to them, and leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import psycopg
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from headrace.errors import Misconfigured
from headrace.settings import Settings
from headrace_ops import ALL, NAMES, Stack, artifacts, ports, processes
from headrace_ops.elasticsearch import Elasticsearch
from headrace_ops.kafka import Kafka
from headrace_ops.redis import Redis
from headrace_ops.registry import Registry

HEADRACE = str(Path(sys.executable).with_name("headrace"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the servers' user may enter; whatever runs in it is taken down."""
    with tempfile.TemporaryDirectory(prefix="headrace-stack-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
        Stack(Path(name)).down()


def headrace(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HEADRACE, *words], capture_output=True, text=True, check=False, timeout=180, env=os.environ | environ
    )


def anywhere(*names: str) -> list[str]:
    """Options for ports that nobody else is about to take: the usual ones are free for others' tests too."""
    return [word for name in names for word in ("--port", f"{name}={ports.choose()}")]


def redis_call(server: Redis, *words: str) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall((" ".join(words) + "\r\n").encode())
        return connection.recv(4000)


def test_postgres_decodes_logically_in_a_database_of_the_test(settings: Settings) -> None:
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        slot = connection.execute(
            "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [settings.slot]
        ).fetchone()
        database = connection.execute("SELECT current_database()").fetchone()
    assert slot is not None
    assert database == (settings.source,)


def test_only_the_superuser_needs_no_password(settings: Settings) -> None:
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        connection.execute("CREATE ROLE guest LOGIN PASSWORD 'right'")
        try:
            at = settings.dsn.replace("postgres@", "guest:{}@")
            psycopg.connect(at.format("right")).close()
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(at.format("wrong"))
        finally:
            connection.execute("DROP ROLE guest")


def test_postgres_killed_keeps_what_was_committed(settings: Settings, stack: Stack) -> None:
    server = stack.server("postgres")
    with psycopg.connect(settings.dsn) as connection:
        connection.execute("CREATE TABLE t AS SELECT 7 AS n")
    server.kill()
    assert server.process() is None
    server.start()
    with psycopg.connect(settings.dsn) as connection:
        assert connection.execute("SELECT n FROM t").fetchone() == (7,)


def test_kafka_killed_keeps_what_was_acknowledged_and_its_port(kafka: Kafka) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.address()})
    admin.create_topics([NewTopic("t", 1, 1)])["t"].result(30)
    producer = Producer({"bootstrap.servers": kafka.address(), "transactional.id": "x"})
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce("t", b"kept")
    producer.commit_transaction(30)
    kafka.kill()
    assert kafka.process() is None
    kafka.start()
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.address(),
            "group.id": "g",
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
        }
    )
    consumer.subscribe(["t"])
    message = consumer.poll(30)
    consumer.close()
    assert message is not None
    assert message.value() == b"kept"


def test_kafka_killed_comes_back_however_soon_its_controller_is_ended(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended before what it said was in its log, it left the old session: the broker could not register, and ended itself."""
    admin = AdminClient({"bootstrap.servers": kafka.address()})
    admin.create_topics([NewTopic("t", 500, 1)])["t"].result(30)
    kafka.kill()
    with monkeypatch.context() as patched:
        patched.setattr(kafka.cancelled, "wait", lambda _seconds: time.sleep(0.001))  # looks as often as it can
        kafka.start()
    wait_for(kafka.healthy, seconds=60)


def test_kafka_makes_no_topic_by_itself(kafka: Kafka) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.address()})
    admin.list_topics("absent", timeout=30)
    assert "absent" not in admin.list_topics(timeout=30).topics


def test_elasticsearch_killed_keeps_what_was_acknowledged(elasticsearch: Elasticsearch) -> None:
    at = f"{elasticsearch.address()}/t/_doc/1"
    request = urllib.request.Request(at, b'{"n":7}', {"Content-Type": "application/json"}, method="PUT")
    urllib.request.urlopen(request, timeout=30).close()
    elasticsearch.kill()
    assert elasticsearch.process() is None
    elasticsearch.start()
    with urllib.request.urlopen(at, timeout=30) as answer:
        assert json.load(answer)["_source"] == {"n": 7}


def test_redis_killed_keeps_what_was_acknowledged(redis_server: Redis) -> None:
    assert redis_call(redis_server, "SET", "k", "7") == b"+OK\r\n"
    redis_server.kill()
    redis_server.start()
    assert redis_call(redis_server, "GET", "k") == b"$1\r\n7\r\n"


def test_the_registry_killed_keeps_its_schemas_and_their_ids(registry: Registry) -> None:
    body = json.dumps({"schema": json.dumps({"type": "record", "name": "kept", "fields": []})}).encode()
    of_json = {"Content-Type": "application/vnd.schemaregistry.v1+json"}
    request = urllib.request.Request(f"{registry.address()}/subjects/kept-value/versions", body, of_json)
    with urllib.request.urlopen(request, timeout=30) as answer:
        number = json.load(answer)["id"]
    registry.kill()
    assert registry.process() is None
    registry.start()
    with urllib.request.urlopen(f"{registry.address()}/schemas/ids/{number}", timeout=30) as answer:
        assert "kept" in json.load(answer)["schema"]


def test_an_optional_server_runs_only_where_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(folder, spread=True)
    started: list[str] = []
    monkeypatch.setattr(stack, "_fetch", lambda servers: None)
    monkeypatch.setattr(stack, "_start", lambda servers: started.extend(server.name for server in servers))
    stack.up()
    assert started == list(NAMES)
    stack.up(["registry"])
    assert started == list(ALL)


def test_without_a_redis_of_the_system_the_one_from_maven_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "redis-server" else which(name))
    stack = Stack(folder, spread=True)
    stack.up(["redis"])
    server = stack.server("redis")
    assert isinstance(server, Redis)
    assert b"redis_version:6.2" in redis_call(server, "INFO", "server")


class Two(Redis):
    """A Redis with a port that nobody is told of."""

    usual_ports: ClassVar = {"redis": 6379, "redis-other": None}


def test_a_port_that_was_taken_before_the_start_is_refused_or_chosen_anew_where_nobody_knows_it(folder: Path) -> None:
    server = Two(folder, spread=True)
    for name in ("redis-other", "redis"):
        with socket.socket() as taken:
            taken.bind((ports.HOST, port := server.ports[name]))
            taken.listen()
            if name == "redis":
                with pytest.raises(Misconfigured, match=f"Port {port}, wanted for redis, is in use"):
                    server.start()
                return
            server.start()
            assert port not in server.ports.values()
            assert Two(folder).ports == server.ports
            server.stop()


def test_a_paused_server_does_not_answer_until_it_is_resumed(redis_server: Redis) -> None:
    redis_server.pause()
    assert not redis_server.healthy()
    redis_server.resume()
    wait_for(redis_server.healthy, seconds=60)


def test_up_twice_reports_the_same_processes_and_down_ends_them(folder: Path) -> None:
    at = anywhere("postgres", "redis")
    first = headrace("stack", "up", "--dir", str(folder), "--only", "postgres,redis", *at, "--json")
    assert first.returncode == 0, first.stderr
    second = headrace("stack", "up", "--dir", str(folder), "--only", "postgres,redis", "--json")
    assert json.loads(first.stdout) == json.loads(second.stdout)
    env = headrace("stack", "env", "--dir", str(folder), "--json")
    assert set(json.loads(env.stdout)) == {"HEADRACE_DSN", "HEADRACE_REDIS"}
    families = [process for fact in json.loads(first.stdout) for process in family(fact["pid"])]
    assert len(families) > 2
    wait_for(lambda: headrace("stack", "status", "--dir", str(folder)).returncode == 0, seconds=60)
    assert headrace("stack", "down", "--dir", str(folder)).stdout == "stopped postgres, redis\n"
    assert not any(processes.alive(process) for process in families)
    assert headrace("stack", "status", "--dir", str(folder)).returncode == 1
    assert "is running" in headrace("stack", "env", "--dir", str(folder)).stderr


def test_a_plain_user_has_the_same_stack(folder: Path) -> None:
    """The servers are his own processes; the rest of these tests are root's where they are run by root."""
    uid, plain = os.geteuid(), []
    if uid == 0:  # somebody who may read what root has installed, and nothing else
        uid = 65534
        os.chown(folder, uid, uid)
        plain = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        plain += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    caches = {"XDG_CACHE_HOME": str(artifacts.cache().parent), "HOME": str(folder)}

    def headrace(*words: str) -> str:
        command = [*plain, HEADRACE, "stack", *words, "--dir", str(folder / "plain")]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=180, env=os.environ | caches
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    facts = json.loads(
        headrace("up", "--only", "postgres,kafka,redis", *anywhere("postgres", "kafka", "redis"), "--json")
    )
    families = [process for fact in facts for process in family(fact["pid"])]
    assert {Path(f"/proc/{process.pid}").stat().st_uid for process in families} == {uid}
    assert "not answering" not in headrace("status")
    headrace("down", "--remove")
    assert not any(processes.alive(process) for process in families)


def family(pid: int) -> list[processes.Process]:
    root = processes.identify(pid)
    return processes.family(root) if root else []


def test_when_one_server_cannot_start_the_others_do_not_stay(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind((ports.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        at = [*anywhere("postgres"), "--port", f"redis={port}"]
        failed = headrace("stack", "up", "--dir", str(folder), "--only", "postgres,redis", *at)
    assert failed.returncode == 3
    assert f"Port {port}, wanted for redis, is in use" in failed.stderr
    assert "--port redis=PORT" in failed.stderr
    assert not Stack(folder).environment()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_up_that_is_ended_half_way_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    up = subprocess.Popen(
        [HEADRACE, "stack", "up", "--dir", str(folder), "--only", "kafka", *anywhere("kafka")],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    broker = wait_for(lambda: Stack(folder).server("kafka").process(), seconds=60)
    up.send_signal(number)
    up.wait(60)
    assert processes.wait_gone([broker], 60) == []
    wait_for(lambda: not named_in_a_command_line(folder), seconds=60)


def test_a_session_that_is_killed_takes_its_servers_along(folder: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from headrace_ops import Stack, guard\n"
        "folder = Path(sys.argv[1])\n"
        "with guard.armed(folder, ['redis'], remove=True):\n"
        "    Stack(folder, spread=True).up(['redis']); print('up', flush=True); time.sleep(600)"
    )
    inner = folder / "inner"
    session = subprocess.Popen([sys.executable, "-c", program, str(inner)], stdout=subprocess.PIPE)
    assert session.stdout is not None
    assert session.stdout.readline() == b"up\n"
    server = Stack(inner).server("redis").process()
    assert server is not None
    session.kill()
    session.communicate()
    assert processes.wait_gone([server], 30) == []
    wait_for(lambda: not inner.exists(), seconds=30)


def test_a_stranger_with_a_recorded_id_is_never_signalled(folder: Path) -> None:
    stranger = subprocess.Popen(["/bin/sleep", "600"])
    try:
        state = {"pid": stranger.pid, "started": 1, "boot": processes.boot_id(), "ports": {"redis": ports.choose()}}
        (folder / "redis.json").write_text(json.dumps(state))
        assert Stack(folder).down() == []
        Stack(folder).server("redis").kill()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def wait_for(seen, *, seconds: float):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201 -- whatever `seen` returns
    deadline = time.monotonic() + seconds
    while not (value := seen()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return value


def named_in_a_command_line(folder: Path) -> list[str]:
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                lines.append((entry / "cmdline").read_text())
            except (FileNotFoundError, ProcessLookupError):
                continue
    return [line for line in lines if str(folder) in line]
