"""`headrace status`: what people read, and what a health check decides by."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import orjson
import psycopg
import pytest
from rich.text import Text

from headrace.change import Version
from headrace.cli.status import _source_line
from headrace.control import Control, Report
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.settings import Settings, environment
from headrace_ops import Stack
from headrace_ops.postgres import Postgres
from tests.fixtures.capture import capturing, eventually, execute, prepare, refused, replay, rows
from tests.fixtures.feed import ITEMS
from tests.fixtures.slots import await_free, lose_slot
from tests.fixtures.statuses import say, status
from tests.integration.test_resnapshot_order import waiting


def test_who_asks_what_does_not_run_is_told_how_to_run_it(control: Control) -> None:
    for name, code, remedy in (
        ("capture", "capture-not-running", "Run: headrace capture"),
        ("pages", "consumer-not-running", "Run: headrace run pages"),
    ):
        with pytest.raises(Misconfigured) as error:
            control.ask(name, "anything")
        assert (error.value.code, error.value.remedy) == (code, remedy)


def test_what_a_newer_version_adds_to_its_report_is_passed_over(settings: Settings, control: Control) -> None:
    """Nobody could ask anything while one process of another version had reported."""
    told = asdict(Report("plain", 1, live=True, phase="live")) | {"version": [1, 5], "newer": 1}
    control.keep("plain", "report", {name: value for name, value in told.items() if name not in {"age", "at"}}, "1")
    assert control.reports()["plain"][0].version == Version(1, 5)
    assert status(settings, "--check").stdout == "ok\n"


def test_check_fails_when_nobody_has_ever_reported(settings: Settings, control: Control) -> None:
    ended = status(settings, "--check")
    assert ended.exit_code == 1
    assert ended.stdout == "capture: nobody has ever reported; run: headrace capture\n"


def test_a_view_that_was_given_up_is_wrong_only_for_who_asks_for_it(settings: Settings, control: Control) -> None:
    running, given_up = (
        Report("plain", 1, live=True, phase="live", version=Version(1, 5)),
        Report("pages", phase="dropped"),
    )
    say(control, running, given_up)
    assert status(settings, "--check").exit_code == 1, "its process is there, and has nothing to do"
    say(control, running, replace(given_up, ended=True))
    assert status(settings, "--check").stdout == "ok\n"
    assert status(settings, "--check", "pages").exit_code == 1


def test_check_sees_a_build_that_has_stopped_beside_the_live_one(settings: Settings, control: Control) -> None:
    """Not what was live before: that is kept, and nobody waits for it."""
    live = Report("plain", 2, live=True, phase="live", version=Version(1, 5))
    say(control, Report("plain", 1, phase="stopped", reason="It was away.", remedy="Wait."), live)
    assert status(settings, "--check", "plain").stdout == "ok\n"
    say(control, Report("plain", 3, phase="stopped", reason="It has met 13.", remedy="Change it."))
    for options in (["--check"], ["--check", "plain"]):
        ended = status(settings, *options)
        assert (ended.exit_code, ended.stdout) == (1, "plain g3: stopped: It has met 13. Change it.\n")


def test_check_sees_a_view_that_loads_a_log_which_nobody_writes(settings: Settings, control: Control) -> None:
    """Its source is not what capture's is, or capture was never started or has stopped: nothing else of that ever shows in the view."""
    said = f"plain: loading, and no capture of source {settings.source} runs; run: headrace capture\n"
    loads = Report("plain", 1, phase="loading")
    say(control, loads)
    assert status(settings, "--check", "plain").stdout == said
    assert " ".join(status(settings).stdout.split()).count(said.strip()) == 1  # where it is wrapped is the terminal's
    for phase, told in (("stopped", said), ("off", said), ("snapshot", "ok\n")):
        say(control, Report("capture", phase=phase), loads)
        assert status(settings, "--check", "plain").stdout == told, phase
    say(control, Report("capture", phase="off"), replace(loads, facts={"checkpoints": "none"}))
    assert status(settings, "--check", "plain").stdout == "ok\n", "it is fed by Debezium"


@pytest.mark.parametrize("name", ["plain", "capture"])
def test_check_fails_beyond_the_lag_that_is_allowed(settings: Settings, control: Control, name: str) -> None:
    say(control, Report(name, 1, live=True, phase="live", version=Version(1, 5), lag=(7, 4096, 61.0), eta=300.0))
    assert re.search(rf"^ *{name} .* 5 min *$", status(settings).stdout, re.MULTILINE)
    assert status(settings, "--check", "--max-lag", "2m").stdout == "ok\n"
    for options in (["--check"], ["--check", name, "--max-lag", "60s"]):
        ended = status(settings, *options)
        assert ended.exit_code == 1
        assert ended.stdout.count("\n") == 1
        assert ended.stdout.startswith(f"{name}: 1 min behind")


def test_a_capture_that_has_caught_up_is_not_behind_whatever_its_neighbours_write(settings: Settings) -> None:
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n int)", "CREATE TABLE other (id int)")
    control = Control(Log(settings))

    def lag() -> tuple[int, int, float] | None:
        (report,) = control.reports().get("capture", [None])
        return report.lag if report and report.phase == "streaming" and "wal_held" in report.facts else None

    with capturing(settings) as capture:
        capture.eventually("it has caught up", lambda: lag() == (0, 0, 0.0))
        execute(settings, "INSERT INTO other SELECT generate_series(1, 10000)", "INSERT INTO items VALUES (1, 1)")
        reached = capture.reach().version
        capture.eventually("it says so", lambda: control.reports()["capture"][0].version >= reached)
        capture.eventually("it has caught up again", lambda: lag() == (0, 0, 0.0))
        ended = status(settings, "--check", "capture", "--max-lag", "10s")
    assert ended.stdout == "ok\n"


def test_a_heartbeat_that_fails_is_told_while_the_stream_goes_on(settings: Settings, postgres: Postgres) -> None:
    """It gets no connection any more (S17): until it does, an idle source and a dead one look the same."""
    settings = replace(settings, heartbeat_ms=100)
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    with (
        psycopg.connect(postgres.address(), autocommit=True) as other,
        psycopg.connect(settings.dsn, autocommit=True) as connection,
        capturing(settings) as capture,
    ):
        capture.hear("streaming from")  # it connects anew after the snapshot
        capture.reach()
        beats = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'headrace heartbeat'"
        eventually("its heart beats", lambda: rows(settings, beats))
        capture.eventually("all is well", lambda: status(settings, "--check", "capture").stdout == "ok\n")
        other.execute(f"ALTER DATABASE {settings.source} ALLOW_CONNECTIONS false".encode())
        try:
            end_it = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND application_name = %s"
            )
            other.execute(end_it, [settings.source, "headrace heartbeat"])
            capture.eventually("it fails", lambda: status(settings, "--check", "capture").exit_code == 1)
            told = status(settings, "--check", "capture").stdout
            assert told.startswith("capture: the heartbeat failed: ")
            assert told.count("\n") == 1
            assert "capture: the heartbeat failed: " in status(settings).stdout
            connection.execute("INSERT INTO items VALUES (1)")
            capture.eventually("the stream goes on", lambda: replay(settings, "public.items"))
        finally:
            other.execute(f"ALTER DATABASE {settings.source} ALLOW_CONNECTIONS true".encode())
        capture.eventually("all is well again", lambda: status(settings, "--check", "capture").stdout == "ok\n")


def test_check_says_in_one_line_that_kafka_is_away(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.log.topics.TIMEOUT", 1.0)
    ended = status(replace(settings, kafka="127.0.0.1:1"), "--check")
    assert ended.exit_code == 1
    assert ended.stdout.count("\n") == 1
    assert "HEADRACE_KAFKA" in ended.stdout


def test_a_check_is_one_line_and_no_json(settings: Settings, control: Control) -> None:
    say(control, Report("plain", 1, live=True, phase="stopped", reason="It broke:\n  here", remedy="Mend it."))
    assert status(settings, "--check", "plain").stdout == "plain: stopped: It broke: here Mend it.\n"
    assert status(settings, "--check", "--json", "plain").exit_code == 2


def test_what_a_source_says_is_shown_as_it_is(settings: Settings) -> None:
    facts = {"source": {"name": "main", "error": "no [/] and no [red]", "remedy": "[bold]"}}
    assert Text.from_markup(_source_line(facts)).plain == "source main: no [/] and no [red] [bold]"


def test_a_slot_that_is_lost_or_about_to_be_is_called_so(settings: Settings) -> None:
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.reach()
    await_free(settings)
    assert re.search(r"slot not active, at \S+, [\d.]+ k?B of WAL held back", status(settings).stdout)
    lose_slot(settings)
    shown = " ".join(status(settings).stdout.split())  # the terminal's width breaks lines
    assert re.search(r"slot not active, lost: it can no longer be read from, at \S+ name", shown)
    slot = orjson.loads(status(settings, "--json").stdout)["source"]
    said = _source_line({"source": slot | {"wal_status": "unreserved", "wal_held_bytes": 1}})
    assert ", [red]unreserved: Postgres is about to remove its WAL[/red], at" in said


def test_what_a_view_shows_no_more_is_told_also_when_capture_is_started_again_and_refused(
    settings: Settings, control: Control
) -> None:
    running = Report("plain", 1, live=True, phase="live", version=Version(1, 5), facts={"reads": [ITEMS]})
    say(control, Report("capture", phase="streaming", facts={"unpublished": [ITEMS]}), running)
    for _ in range(2):  # as compose does it
        assert refused(settings).code == "publication-missing"
    say(control, running)
    assert status(settings, "--check", "plain").stdout.startswith(f"plain: shows {ITEMS} as of before")


def test_a_standby_is_called_one(settings: Settings, control: Control, postgres: Postgres) -> None:
    postgres.stop()
    (postgres.data / "standby.signal").touch()
    try:
        postgres.start()
        ended = status(settings)
    finally:
        postgres.stop()
        (postgres.data / "standby.signal").unlink()
    assert ended.exit_code == 0
    assert "Let HEADRACE_DSN name the primary." in ended.stdout


def test_watch_shows_what_is_new_until_ctrl_c_also_after_kafka_was_away(
    settings: Settings, control: Control, stack: Stack, tmp_path: Path
) -> None:
    say(control, Report("plain", 1, live=True, phase="loading"))
    ours, its = pty.openpty()
    environ = os.environ | environment(settings) | {"COLUMNS": "120", "TERM": "xterm"}
    quick = "from headrace import cli, control; from headrace.log import topics"
    quick += "; topics.TIMEOUT = 3; control.DEAD_SECONDS = 60; cli.main()"
    command = [sys.executable, "-c", quick, "status", "--watch"]
    process = subprocess.Popen(command, env=environ, cwd=tmp_path, stdout=its, stderr=its)
    os.close(its)

    def seen(word: str) -> str:
        text = ""
        while word not in text:
            text += os.read(ours, 4096).decode(errors="replace")  # ends with the process, in an error
        return text

    try:
        assert "plain g1" in seen("loading")
        say(control, Report("plain", 1, live=True, phase="catching up"))
        seen("catching up")
        stack.server("kafka").pause()  # while it sleeps: it has just shown something
        try:
            assert "catching up" in seen("kafka-away"), "what was known stays"
        finally:
            stack.server("kafka").resume()
        say(control, Report("plain", 1, live=True, phase="following"))
        seen("following")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_heartbeat_that_waits_for_a_standby_is_told_with_since_when(settings: Settings) -> None:
    """Its commit hangs for as long as the standby is away, however short its timeout (S17)."""
    settings = replace(settings, heartbeat_ms=100)
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.reach()
        capture.eventually("all is well", lambda: status(settings, "--check", "capture").stdout == "ok\n")
        with waiting(settings, "INSERT INTO items VALUES (1)"):
            capture.eventually("it waits", lambda: status(settings, "--check", "capture").exit_code == 1)
            told = status(settings, "--check", "capture", "--max-lag", "1h").stdout
            assert re.match(
                r"capture: the heartbeat waits since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 for its commit", told
            )
            assert "the heartbeat waits since " in status(settings).stdout
        capture.eventually("all is well again", lambda: status(settings, "--check", "capture").stdout == "ok\n")
