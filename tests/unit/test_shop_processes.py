"""The demo's programs know nothing of servers that are not the demo's own."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from headrace_shop.processes import Programs, watched


@pytest.fixture
def somebodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of a deployment, as operating.md has people export them."""
    monkeypatch.setenv("HEADRACE_STACK", "docker")
    for name in ("COMPOSE_PROJECT_NAME", "SHOP_DSN", "HEADRACE_DSN", "HEADRACE_CONFIG", "HEADRACE_SLOT"):
        monkeypatch.setenv(name, "somebodys")


@pytest.mark.usefixtures("somebodys")
def test_programs_inherit_the_kind_of_stack_and_nothing_that_leads_to_another(tmp_path: Path) -> None:
    programs = Programs(tmp_path, {"HEADRACE_DSN": "own"})
    assert "somebodys" not in programs.environment.values()
    assert programs.environment["HEADRACE_DSN"] == "own"
    assert programs.environment["HEADRACE_STACK"] == "docker"
    assert programs.environment["PATH"] == os.environ["PATH"]


@pytest.mark.usefixtures("somebodys")
def test_whoever_removes_the_stack_after_a_death_removes_no_other(tmp_path: Path) -> None:
    with watched(tmp_path):
        environ = environ_of(str(tmp_path))
    assert b"HEADRACE_STACK=docker" in environ
    assert not [line for line in environ if line.endswith(b"=somebodys")]


def environ_of(folder: str) -> list[bytes]:
    """Return the environment of the process that names the folder, which is the test's own. Just begun it shows neither for a moment."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if folder.encode() in (process / "cmdline").read_bytes() and (
                    environ := (process / "environ").read_bytes()
                ):
                    return environ.split(b"\0")
        time.sleep(0.01)
    raise AssertionError(folder)
