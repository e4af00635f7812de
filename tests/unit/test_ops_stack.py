"""A stack's folder: what is removed with it, where it stays, and what is refused before anything is touched."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import ClassVar

import pytest

from headrace.errors import HeadraceError, Misconfigured
from headrace_ops import Stack, artifacts, docker_stack, processes
from headrace_ops.kafka import Kafka


def made(folder: Path, *, port: int = 5432, running: bool = False) -> Path:
    """Make the files of a Postgres that was started in `folder`; `running` by us."""
    for place in ("data/postgres", "conf/postgres", "logs"):
        (folder / place).mkdir(parents=True)
    (folder / "logs/postgres.log").write_text("x")
    (folder / "logs/postgres.log.1").write_text("x")
    (folder / ".lock").touch()
    state: dict[str, object] = {"ports": {"postgres": port}}
    if running:
        process = processes.identify(os.getpid())
        assert process is not None
        state |= {"pid": process.pid, "started": process.started, "boot": processes.boot_id()}
    (folder / "postgres.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ought to be refused starts no server where it is not."""
    monkeypatch.setattr(Stack, "_fetch", lambda _self, _servers: None)
    monkeypatch.setattr(Stack, "_start", lambda _self, _servers: None)


def test_a_removed_stack_leaves_no_folder(tmp_path: Path) -> None:
    Stack(made(tmp_path / "s")).down(remove=True)
    assert not (tmp_path / "s").exists()
    assert Stack(tmp_path / "s").down(remove=True) == []


def test_what_was_only_locked_is_removed_too(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/.lock").touch()
    Stack(tmp_path / "s").down(remove=True)
    assert not (tmp_path / "s").exists()


def test_with_a_stack_nothing_of_somebody_else_is_removed(tmp_path: Path) -> None:
    made(tmp_path)
    others = [tmp_path / name for name in ("package.json", "data/mine", "data/redis", "logs/mine.log")]
    for file in others:
        file.touch()
    Stack(tmp_path).down(remove=True)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)


def test_a_folder_in_which_no_stack_was_is_refused_and_stays(tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("Makefile", ".lock", "data/postgres/mine")]
    for file in others:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with pytest.raises(Misconfigured, match="not the folder of a stack") as caught:
        Stack(tmp_path).down(remove=True)
    assert caught.value.code == "stack-folder"
    assert all(file.exists() for file in others)


def test_what_cannot_be_removed_is_said(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "logs/postgres.log").unlink()
    (tmp_path / "logs/postgres.log").mkdir()
    with pytest.raises(Misconfigured, match=r"could not be removed.*postgres\.log"):
        Stack(tmp_path).down(remove=True)


class Stuck(Kafka):
    """Its controller ends no session: it says nothing, or dies."""

    seconds = "30"

    def java(self, told: str = "") -> list[str]:
        return ["/bin/sh", "-c", f"exec sleep {self.seconds}"]


@pytest.mark.parametrize(("seconds", "code"), [("30", "server-slow"), ("0", "server-died")])
def test_a_killed_broker_is_not_started_while_its_old_session_has_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: str, code: str
) -> None:
    monkeypatch.setattr("headrace_ops.kafka._SESSION_SECONDS", 1.0)
    monkeypatch.setattr(Stuck, "seconds", seconds)
    monkeypatch.setattr(processes, "server_user", lambda: None)  # who cannot reach a test's folder
    broker = Stuck(tmp_path, spread=True)
    (broker.data / "log").mkdir(parents=True)
    (broker.data / "log/meta.properties").touch()
    with pytest.raises(HeadraceError) as caught:
        broker.start()
    assert caught.value.code == code
    assert broker.process() is None


class Contained:
    """What is told of a container, without an engine."""

    name = "elasticsearch"
    attrs: ClassVar = {"State": {"Pid": 1}}

    def container(self) -> Contained:
        return self

    def running(self) -> bool:
        return False

    def address(self) -> str:
        return "http://elastic:secret@127.0.0.1:9200"


def test_what_is_told_of_containers_has_no_password() -> None:
    address = docker_stack._facts(Contained())["address"]  # type: ignore[arg-type]
    assert ("secret" in address, address.endswith("***@127.0.0.1:9200")) == (False, True)


@pytest.mark.usefixtures("starts_nothing")
def test_a_port_given_to_a_server_that_runs_is_refused_and_not_recorded(tmp_path: Path) -> None:
    made(tmp_path, running=True)
    stack = Stack(tmp_path, ports={"postgres": 5433})
    with pytest.raises(Misconfigured, match=r"runs at \S+:5432/") as caught:
        stack.up(["redis"])
    assert caught.value.code == "server-runs"
    assert stack.server("postgres").port == 5432
    assert json.loads((tmp_path / "postgres.json").read_text())["ports"] == {"postgres": 5432}
    Stack(tmp_path, ports={"postgres": 5432}).server("postgres").check_given()


def test_containers_keep_the_ports_that_they_were_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_stack, "engine", lambda: None)
    (tmp_path / ".env").write_text("POSTGRES_PORT=5432\n")
    with pytest.raises(Misconfigured, match="postgres is not at 5433") as caught:
        docker_stack.DockerStack(tmp_path, ports={"postgres": 5433}).up()
    assert caught.value.code == "server-runs"


@pytest.mark.usefixtures("starts_nothing")
def test_elsewhere_than_on_linux_containers_are_named_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(Misconfigured, match="Darwin") as caught:
        Stack(tmp_path / "s").up()
    assert "HEADRACE_STACK=docker" in caught.value.remedy
    assert not (tmp_path / "s").exists()


def test_a_disk_that_somebody_found_full_is_named_without_a_made_up_need(tmp_path: Path) -> None:
    error = artifacts.disk_full(tmp_path)
    assert str(tmp_path) in error.message
    assert "MB" not in error.message


def test_elasticsearch_keeps_its_temporary_files_with_its_data(tmp_path: Path) -> None:
    server = Stack(tmp_path).server("elasticsearch")
    assert Path(server.environ()["ES_TMPDIR"]).is_relative_to(server.data)
