"""What is missing is named, with how to get it; processes and ports are never confused with others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from headrace.errors import Misconfigured, Transient
from headrace_ops import Stack, artifacts, java, ports, processes
from headrace_ops.artifacts import Artifact
from headrace_ops.redis import Redis


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only Java there is: a program whose answer the test writes."""
    program = tmp_path / "jdk/bin/java"
    program.parent.mkdir(parents=True)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(java, "_FOLDERS", ())
    java.find.cache_clear()
    yield program
    java.find.cache_clear()


def says(program: Path, *lines: str) -> None:
    program.write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in lines))
    program.chmod(0o755)


def test_no_java_says_that_there_is_none(fake_java: Path) -> None:
    fake_java.parent.rmdir()
    with pytest.raises(Misconfigured, match="Java 21 or newer") as caught:
        java.find()
    assert caught.value.code == "no-java"
    assert "openjdk-21" in caught.value.remedy


def test_an_old_java_is_named_with_its_version(fake_java: Path) -> None:
    says(fake_java, "java.base@17.0.15", "jdk.incubator.vector@17.0.15")
    with pytest.raises(Misconfigured, match=r"jdk \(Java 17\)"):
        java.find()


def test_a_java_without_the_vector_module_is_named_with_what_it_lacks(fake_java: Path) -> None:
    says(fake_java, "java.base@25.0.1")
    with pytest.raises(Misconfigured, match=r"Java 25 without jdk\.incubator\.vector"):
        java.find()


def test_a_new_java_is_found(fake_java: Path) -> None:
    says(fake_java, "java.base@21", "jdk.incubator.vector@21")
    assert java.find() == fake_java.parents[1]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(artifacts, "cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def wanted(unpack: object = None) -> Artifact:
    return Artifact("thing-1", ("g:thing:1",), 1, unpack)  # type: ignore[arg-type]


def test_no_maven_says_what_was_to_be_downloaded(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Misconfigured, match=r"thing-1 has to be downloaded.*mvn") as caught:
        artifacts.get(wanted())
    assert "apt-get install maven" in caught.value.remedy
    assert [path.name for path in empty_cache.iterdir()] == [".lock"]


def test_a_download_that_fails_leaves_nothing_and_says_why(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    maven = tmp_path / "bin/mvn"
    maven.parent.mkdir()
    maven.write_text("#!/bin/sh\necho '[ERROR] no route to the repository'\nexit 1\n")
    maven.chmod(0o755)
    monkeypatch.setenv("PATH", f"{maven.parent}:{os.environ['PATH']}")
    with pytest.raises(Transient, match="could not get thing-1: no route to the repository"):
        artifacts.get(wanted())
    assert [path.name for path in empty_cache.iterdir()] == [".lock"]


def test_what_a_dead_process_left_half_unpacked_is_removed(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_cache / ".part-dead").mkdir(parents=True)

    def download(_artifact: Artifact, folder: Path, _report: object) -> None:
        (folder / "file").write_text("x")

    monkeypatch.setattr(artifacts, "_download", download)
    place = artifacts.get(wanted(lambda brought, filled: (brought / "file").rename(filled / "file")))
    assert (place / "file").read_text() == "x"
    assert sorted(path.name for path in empty_cache.iterdir()) == [".lock", "thing-1"]


def test_two_who_want_the_same_thing_at_once_fetch_it_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []

    def download(_artifact: Artifact, folder: Path, _report: object) -> None:
        fetched.append(folder)
        (folder / "file").write_text("x")

    monkeypatch.setattr(artifacts, "_download", download)
    thing = wanted(lambda brought, filled: (brought / "file").rename(filled / "file"))
    with ThreadPoolExecutor(8) as pool:
        places = set(pool.map(lambda _: artifacts.get(thing), range(8)))
    assert places == {empty_cache / "thing-1"}
    assert len(fetched) == 1


def test_a_full_disk_is_named_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=rf"{tmp_path} has \d+ MB left; \d+ MB are needed") as caught:
        artifacts.check_space(tmp_path, 1 << 60)
    assert caught.value.code == "disk-full"


def test_no_redis_on_the_path_means_the_one_from_maven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert Redis(tmp_path).artifact() is artifacts.REDIS


def test_an_unknown_server_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="no server 'mysql'") as caught:
        Stack(tmp_path).server("mysql")
    assert "postgres, kafka, elasticsearch, redis" in caught.value.remedy


def test_a_port_in_use_is_not_chosen() -> None:
    with socket.socket() as taken:
        taken.bind((ports.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not ports.free(port)
        assert ports.choose(port) != port


def test_processes_that_share_the_range_never_choose_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for part in range(3):
        monkeypatch.setattr(ports, "_share", (part, 3))
        chosen.append({ports.choose() for _ in range(50)})
    assert max(chosen[0]) < min(chosen[1])
    assert max(chosen[1]) < min(chosen[2])


def test_a_process_is_known_by_its_start_time_too() -> None:
    child = subprocess.Popen(["/bin/sleep", "60"])
    try:
        process = processes.identify(child.pid)
        assert process is not None
        assert processes.alive(process)
        earlier = process._replace(started=process.started - 1)
        assert not processes.alive(earlier)
        processes.send(earlier, signal.SIGKILL)
        assert processes.family(earlier) == []
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_a_family_is_the_process_first_then_children_and_grandchildren() -> None:
    child = subprocess.Popen(
        ["/bin/sh", "-c", "(sleep 60; true) & sleep 60; true"], start_new_session=True, stdout=subprocess.DEVNULL
    )
    root = processes.identify(child.pid)
    assert root is not None
    deadline = time.monotonic() + 10
    while len(members := processes.family(root)) < 4:
        assert time.monotonic() < deadline
    assert members[0] == root
    for process in members:
        processes.send(process, signal.SIGKILL)
    child.wait()
    assert processes.wait_gone(members, 10) == []
