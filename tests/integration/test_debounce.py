"""Debounced documents on real servers: what waits is told, survives a kill, and is shown before anybody is pointed there or compares."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headrace.change import Version
from headrace.cli import app
from headrace.control import Control
from headrace.log import Log
from headrace.settings import Settings, environment
from headrace.stores.redis.reader import PageReader
from tests.fixtures import debounced
from tests.fixtures.capture import capturing, eventually, execute, now, prepare, rows
from tests.fixtures.debounced import Carts
from tests.fixtures.serving import await_live, serving
from tests.fixtures.verified import found, loaded

pytestmark = pytest.mark.usefixtures("redis_server")

HOT = "UPDATE items SET pieces = pieces + 1 WHERE id = 1"
"""In cart 2."""


@pytest.fixture
def carts(settings: Settings) -> Settings:
    prepare(settings, *debounced.MAKE)
    return settings


def selected(settings: Settings) -> dict[str, str]:
    return dict(rows(settings, debounced.EXPECTED))


class Pages:
    """What readers see, and up to where they are told that it is everything."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def all(self) -> dict[str, str]:
        with closing(PageReader(self._settings, "carts")) as reader:
            found = {str(id_): reader.get(str(id_)) for id_ in range(1, 6)}
        return {id_: page.html for id_, page in found.items() if page}

    def applied(self) -> Version:
        with closing(PageReader(self._settings, "carts")) as reader:
            return reader.applied()

    def show(self, settings: Settings) -> bool:
        return self.all() == selected(settings)


def made_wait(settings: Settings, pages: Pages) -> int:
    """Change a document until one of its changes waits; return an LSN after that change."""
    execute(settings, HOT)
    first = now(settings)
    eventually("the first change is shown", lambda: pages.show(settings))
    reports = Control(Log(settings)).reports
    eventually("by all", lambda: all(report.version.lsn >= first for report in reports()["carts"]))
    execute(settings, HOT)
    waits = now(settings)
    execute(settings, "UPDATE carts SET name = 'cold' WHERE id = 5")
    eventually("a later change of another document is shown", lambda: pages.all()["5"].startswith("cold"))
    assert pages.all()["2"] != selected(settings)["2"], "it waits"
    assert pages.applied().lsn < waits, "and who asks for it is not told that it is there"
    return waits


@contextmanager
def process(settings: Settings, folder: Path, seconds: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "headrace", "run", "--consumer", f"{debounced.FILE}:Carts"]
    env = os.environ | environment(settings) | {debounced.SECONDS: seconds}
    started = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.terminate()
        started.communicate(timeout=60)


def test_what_waits_is_shown_after_a_kill(carts: Settings, tmp_path: Path) -> None:
    pages = Pages(carts)
    with capturing(carts) as capture:
        capture.reach()
        with process(carts, tmp_path, debounced.FOR_EVER) as killed:
            await_live(Control(Log(carts)), "carts")
            waits = made_wait(carts, pages)
            (report,) = Control(Log(carts)).reports()["carts"]
            assert report.version.lsn < waits
            killed.send_signal(signal.SIGKILL)
            killed.wait(30)
    # Capture is off: no change comes that it could be rendered with.
    with process(carts, tmp_path, "0.2"):
        eventually("what waited is shown", lambda: pages.show(carts))
        eventually("and it is told", lambda: pages.applied().lsn >= waits)


def test_readers_of_a_promoted_generation_see_what_waited_in_either(carts: Settings) -> None:
    pages = Pages(carts)
    with capturing(carts) as capture, serving(carts, carts=Carts) as control:
        capture.reach()
        await_live(control, "carts")
        control.ask("carts", "rebuild")
        eventually("it follows", lambda: phases(control).get(2) == "following")
        waits = made_wait(carts, pages)
        eventually("it waits there too", lambda: behind(control, 2, waits) and behind(control, 1, waits))
        answer = control.ask("carts", "promote", timeout=120)
        assert answer["version"][1] >= waits
        assert pages.show(carts), "at once"
        assert pages.applied().lsn >= waits


def test_a_held_view_shows_everything(carts: Settings) -> None:
    pages = Pages(carts)
    with capturing(carts) as capture, serving(carts, carts=Carts) as control:
        capture.reach()
        await_live(control, "carts")
        waits = made_wait(carts, pages)
        assert control.ask("carts", "hold", {"compare": True})["version"][1] >= waits
        assert pages.show(carts)
        control.ask("carts", "release")


def test_a_paused_view_shows_everything_also_after_a_restart(carts: Settings) -> None:
    pages = Pages(carts)
    with capturing(carts) as capture:
        with serving(carts, carts=Carts) as control:
            capture.reach()
            await_live(control, "carts")
            waits = made_wait(carts, pages)
            control.ask("carts", "pause")
            assert pages.show(carts)
            assert pages.applied().lsn >= waits
            eventually("it is told", lambda: phases(control)[1] == "paused")
        with serving(carts, carts=Carts) as control:
            execute(carts, "UPDATE carts SET name = 'new' WHERE id = 4")
            capture.reach()
            eventually("it is paused", lambda: phases(control)[1] == "paused")
            assert not pages.show(carts), "it stands"
            control.ask("carts", "resume")
            eventually("it goes on", lambda: pages.show(carts))


def test_single_rows_and_counts_are_of_one_state(carts: Settings) -> None:
    """Verify's second look: nothing waits in what it is given."""
    with capturing(carts) as capture, serving(carts, carts=Carts) as control:
        capture.reach()
        await_live(control, "carts")
        waits = made_wait(carts, Pages(carts))
        version, one = control.rows("carts", 1, [("", "2")])
        assert version.lsn >= waits
        assert one["", "2"].value["html"] == selected(carts)["2"]


def test_a_replay_compares_what_waits_in_either(carts: Settings) -> None:
    """Both are debounced for ever, and are at one state when they are compared."""
    with capturing(carts) as capture, serving(carts, carts=Carts) as control:
        capture.reach()
        await_live(control, "carts")
        with loaded(carts, lambda _: HOT, lambda _: "SELECT pg_sleep(0.02)"):
            words = ("replay", "carts", "--consumer", f"{debounced.FILE}:Carts", "--diff")
            ended = CliRunner().invoke(app, words, env=environment(carts) | {"COLUMNS": "200"})
        assert ended.exit_code == 0, ended.output
        assert "5 same" in ended.output


class Hurried(Carts):
    """Waits for no longer than a test does."""

    debounce_seconds = 0.5


def test_verify_ends_and_is_clean_while_documents_wait_all_the_time(carts: Settings) -> None:
    def hot(chance: Any) -> str:
        return (
            f"UPDATE items SET pieces = pieces + 1, cart_id = {chance.randint(1, 5)} WHERE id = {chance.randint(1, 20)}"
        )

    with capturing(carts) as capture, serving(carts, view=Hurried) as control:
        capture.reach()
        await_live(control, "view")
        with loaded(carts, hot, lambda _: "SELECT pg_sleep(0.01)"):
            for _ in range(3):
                assert found(carts, Hurried, timeout=120).clean
        eventually("the last change is shown with none after it", lambda: Pages(carts).show(carts))
        assert found(carts, Hurried).clean


def phases(control: Control) -> dict[int, str]:
    return {report.generation: report.phase for report in control.reports()["carts"]}


def behind(control: Control, generation: int, lsn: int) -> bool:
    """Whether a generation says that it does not show everything up to an LSN, and has come to it."""
    (report,) = [each for each in control.reports()["carts"] if each.generation == generation]
    return report.version.lsn < lsn and report.lag[0] == 0 and report.phase in {"live", "following"}
