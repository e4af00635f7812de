"""The command line as scripts and people use it: facts as JSON, exit codes, one-line checks, builds that are waited for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from headrace.change import NOWHERE, Version
from headrace.control import Control
from headrace.log import Log
from headrace.settings import Settings, environment
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.plain import Plain
from tests.fixtures.serving import serving

MANY = 12_000
"""Rows that come in several batches."""
Run = Callable[..., subprocess.CompletedProcess[str]]
PLAIN = f"{Path(__file__).parents[1] / 'fixtures' / 'plain.py'}:Plain"
HALTING = PLAIN.replace(":Plain", ":Halting")


@pytest.fixture
def headrace(settings: Settings, tmp_path: Path) -> Run:
    """Run one command to its end."""

    def run(*args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "headrace", *args]
        env = os.environ | environment(settings) | {"COLUMNS": "160"}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def runner(settings: Settings, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `headrace run` for the plain consumer, or another of its file."""
    started: list[subprocess.Popen[str]] = []

    def start(consumer: str = PLAIN, **more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "headrace", "run", "--consumer", consumer]
        env = os.environ | environment(settings) | more
        started.append(subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def await_rows(view: Plain, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(view.rows()) != count:
        assert time.monotonic() < deadline, f"{len(view.rows())} rows, not {count}"
        time.sleep(0.1)


def test_a_view_runs_is_killed_catches_up_and_is_rebuilt(
    settings: Settings, headrace: Run, runner: Callable[[], subprocess.Popen[str]]
) -> None:
    feed, view = Feed(settings), Plain(settings, "plain")
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    assert "headrace run plain" in headrace("status", "plain", "--check", code=1).stdout

    process = runner()
    await_rows(view, 2)
    await_live(settings, "plain")
    assert headrace("status", "plain", "--check").stdout == "ok\n"
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    last = feed.cut((ITEMS, 1, None), (ITEMS, 3, 30), (ITEMS, 4, 40))
    process = runner()
    await_rows(view, 3)
    await_live(settings, "plain", last.version)

    facts = json.loads(headrace("status", "--json").stdout)
    (report,) = facts["consumers"]["plain"]
    assert (report["generation"], report["live"], report["lag"]["records"]) == (1, True, 0)

    built = json.loads(headrace("rebuild", "plain", "--wait", "--gate", "none", "--json").stdout)
    assert built["generation"] == 2
    assert [generation.live for generation in view.generations()] == [False, True]
    assert "live again" in headrace("rollback", "plain").stdout
    assert json.loads(headrace("drop", "plain", "2", "--json").stdout) == {"dropped": [2]}

    process.terminate()
    assert process.wait(60) == 0
    assert "headrace run plain" in headrace("status", "plain", "--check", code=1).stdout
    refused = headrace("rebuild", "plain", code=3)
    assert "headrace run plain" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_rebuild_that_is_killed_half_way_goes_on_where_it_was(
    settings: Settings, headrace: Run, runner: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    small = {"HEADRACE_BATCH_RECORDS": "50"}
    feed, view = Feed(settings), Plain(settings, "plain")
    for number in range(MANY):
        feed.put(ITEMS, number, number)
    feed.seal()
    process = runner(HALTING, **small)
    await_live(settings, "halting")
    halt = settings.path("halt")
    halt.touch()
    assert json.loads(headrace("rebuild", "halting", "--json").stdout) == {"name": "halting", "generation": 2}
    half = offsets_of_second(settings)
    reports = Control(Log(settings)).reports
    killed = reports()["halting"][0].process
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    halt.unlink()
    runner(HALTING, **small)
    eventually("it has reported", lambda: reports()["halting"][0].process != killed)
    assert json.loads(headrace("rebuild", "halting", "--wait", "--gate", "none", "--json").stdout)["generation"] == 2
    whole = offsets_of_second(settings)
    assert 0 < len(half) < MANY
    assert whole == sorted(set(whole)), "nothing was read twice"
    assert len(whole) == MANY
    assert [generation.live for generation in view.generations()] == [False, True]
    assert len(view.rows()) == MANY


class Newer(Plain):
    """Other code, for all that a fingerprint knows."""


@pytest.fixture
def half_built(
    settings: Settings, runner: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """The process of a view whose second generation stands half way, and a `rebuild --wait` that waits for that."""
    feed = Feed(settings)
    for number in range(500):
        feed.put(ITEMS, number, number)
    feed.seal()
    process = runner(HALTING, HEADRACE_BATCH_RECORDS="50")
    await_live(settings, "halting")
    settings.path("halt").touch()
    command = [sys.executable, "-m", "headrace", "rebuild", "halting", "--wait", "--gate", "none"]
    environ = os.environ | environment(settings) | {"COLUMNS": "160"}
    out = subprocess.PIPE
    with subprocess.Popen(
        command, env=environ, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT, text=True
    ) as waiter:
        try:
            offsets_of_second(settings)
            reports = Control(Log(settings)).reports
            eventually("it is told", lambda: any(each.generation == 2 for each in reports()["halting"]))
            yield process, waiter
        finally:
            waiter.kill()
            settings.path("halt").unlink(missing_ok=True)


def test_who_waits_for_a_build_is_told_when_other_code_is_deployed(
    settings: Settings, half_built: tuple[subprocess.Popen[str], subprocess.Popen[str]]
) -> None:
    process, waiter = half_built
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    with serving(settings, halting=Newer):
        said = waiter.communicate(timeout=60)[0]
    assert (waiter.returncode, "stale-generation" in said) == (3, True), said
    assert "Run: headrace rebuild halting" in said


def test_who_waits_for_a_build_is_told_when_it_is_dropped(
    settings: Settings, headrace: Run, half_built: tuple[subprocess.Popen[str], subprocess.Popen[str]]
) -> None:
    kept = Control(Log(settings)).kept
    told = half_built[1].stdout
    assert told is not None
    assert re.fullmatch(r"halting g2: [a-z ]+, \d+%, \d+ records.*\n", line := told.readline()), line
    with ThreadPoolExecutor(1) as pool:
        dropped = pool.submit(headrace, "drop", "halting", "2", "--json")
        eventually("it is asked for", lambda: kept("halting", "request") != [{}])
        settings.path("halt").unlink()
        assert json.loads(dropped.result().stdout) == {"dropped": [2]}
    said = half_built[1].communicate(timeout=60)[0]
    assert (half_built[1].returncode, "no-such-generation" in said) == (3, True), said
    assert "Run: headrace rebuild halting" in said


def await_live(settings: Settings, name: str, version: Version = NOWHERE) -> None:
    """Wait until a consumer's process says that it is live, at `version` or beyond."""
    control, deadline = Control(Log(settings)), time.monotonic() + 60
    while not any(r.phase == "live" and r.version >= version for r in control.reports().get(name, [])):
        assert time.monotonic() < deadline, control.reports()
        time.sleep(0.1)


def offsets_of_second(settings: Settings) -> list[int]:
    """Return the offsets that the second generation has applied, once there are some."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        notes = [line.split() for line in settings.path("offsets").read_text().splitlines()]
        found = [int(offset) for number, offset in notes if number == "2"]
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("the second generation applied nothing")


def test_sigterm_ends_a_command_as_ctrl_c_does() -> None:
    """What it has asked for is taken back: a scan, say, would go on for nobody."""
    nap = (
        "import time\nfrom headrace.cli import app, main\n\n@app.command('nap')\ndef nap() -> None:\n    try:\n"
        "        print('begun', flush=True)\n        time.sleep(60)\n    finally:\n        print('taken back')\n\nmain()\n"
    )
    with subprocess.Popen([sys.executable, "-c", nap, "nap"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.communicate(timeout=30)[0] == "taken back\n"
    assert process.returncode == 130


def test_what_is_installed_and_what_is_set_can_be_listed(headrace: Run, settings: Settings) -> None:
    names = [row["name"] for row in json.loads(headrace("plugins", "--json").stdout)]
    assert {"search", "pages", "warehouse"} <= set(names)
    listed = {row["setting"]: row["value"] for row in json.loads(headrace("settings", "--json").stdout)}
    assert listed["HEADRACE_SOURCE"] == settings.source
