"""`headrace status`: what people read, and what a health check decides by."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import orjson
import psycopg
import pytest
from rich.text import Text
from typer.testing import CliRunner, Result

from headrace.change import Position, Version
from headrace.cli import app
from headrace.cli.status import _source_line
from headrace.consumer import Batch, Generation
from headrace.control import Control, Report, record_key
from headrace.errors import Misconfigured, Transient
from headrace.log import Log
from headrace.log.topics import CONTROL
from headrace.requests import Request
from headrace.settings import Settings, environment
from headrace_ops import Stack
from headrace_ops.postgres import Postgres
from tests.fixtures.capture import Running, capturing, eventually, execute, prepare, refused, replay, rows
from tests.fixtures.feed import ITEMS, TAGS, Feed
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving
from tests.fixtures.slots import drop_slot, lose_slot
from tests.integration.test_resnapshot_order import waiting


@pytest.fixture
def control(settings: Settings) -> Control:
    log = Log(settings)
    log.ensure_spine()
    return Control(log)


def say(control: Control, *reports: Report) -> None:
    for report in reports:
        control.report(report)
    control.flush()


def status(settings: Settings, *options: str) -> Result:
    return CliRunner().invoke(app, ["status", *options], env=environment(settings) | {"COLUMNS": "160"})


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


@pytest.mark.usefixtures("often")
def test_a_table_that_is_captured_no_more_is_told_until_somebody_decides(settings: Settings) -> None:
    """For capture and for the views that read it; it is captured again, or asked for: gone, its rows go, and if it is there they stay."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n int)", "INSERT INTO items VALUES (1, 1)")

    def checks(code: int) -> bool:
        return all(status(settings, "--check", name).exit_code == code for name in ("capture", "plain"))

    with serving(settings, plain=Plain) as control, capturing(settings) as capture:
        capture.hear("streaming")
        await_live(control, "plain")
        capture.eventually("all is well", lambda: checks(0))
        execute(settings, "ALTER TABLE items RENAME TO things")
        capture.eventually("it is told", lambda: checks(1))
        assert capture.hear("items is captured no more")
        for name, said in (
            ("plain", "plain: shows public.items as of before"),
            ("capture", "capture: the log has public.items"),
        ):
            assert status(settings, "--check", name).stdout.startswith(said)
            assert said in " ".join(status(settings).stdout.split())
        ended = CliRunner().invoke(app, ["wait", "plain"], env=environment(settings))
        assert (ended.exit_code, "note: plain shows public.items" in ended.stderr) == (0, True)
        capture.hear("public.things was read again")
        execute(settings, "ALTER TABLE things RENAME TO items")
        capture.eventually("it is captured again", lambda: status(settings, "--check", "plain").exit_code == 0)
        capture.eventually("so is the other name not", lambda: "public.things" in status(settings, "--check").stdout)
        control.ask("capture", "resnapshot", {"tables": ["public.things"]})
        capture.eventually("nothing is left of that", lambda: checks(0))
        assert capture.hear("public.things was read again: 0 rows, 1 keys removed")
        execute(settings, f"ALTER PUBLICATION {settings.publication} DROP TABLE items")
        capture.eventually("it is told again", lambda: checks(1))
        control.ask("capture", "resnapshot", {"tables": ["public.items"]})
        capture.eventually("that is meant so", lambda: checks(0))
        assert Plain(settings, "plain").rows()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_first_snapshot_that_waits_says_for_what(settings: Settings, *, chunked: bool) -> None:
    """A transaction that was left open, or prepared and forgotten, keeps it waiting for ever."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)")
    with psycopg.connect(settings.dsn) as application:
        application.execute("SELECT pg_current_xact_id()")
        with capturing(settings, chunked=chunked) as capture:
            said = f"The initial snapshot has not begun: to make slot {settings.slot}, Postgres waits"
            line = f"capture: snapshot: {said}"
            capture.eventually("it waits", lambda: status(settings, "--check").stdout.startswith(line))
            assert f"capture: {said}" in " ".join(status(settings).stdout.split())
            application.commit()
            capture.eventually("it goes on", lambda: status(settings, "--check").stdout == "ok\n")


@pytest.mark.usefixtures("often")
def test_a_table_that_was_never_read_is_told_until_it_was(settings: Settings) -> None:
    """It keeps the initial snapshot from its end, or the log has nothing of it; nothing else shows either, for it is not inexact."""
    small = replace(settings, message_max_bytes=100_000)
    prepare(
        small, "CREATE TABLE items (id int PRIMARY KEY, a text)", "INSERT INTO items VALUES (1, repeat('x', 200000))"
    )

    def told(capture: Running, line: str, why: str) -> None:
        capture.eventually(
            "it is told", lambda: status(settings, "--check").stdout.startswith(f"capture: {line}: {why}")
        )
        shown = " ".join(status(settings).stdout.split())
        assert (shown.count(line), shown.count(why)) == (1, 1)

    def mended(capture: Running, table: str) -> None:
        Control(Log(settings)).ask("capture", "resnapshot", {"tables": [table]})
        capture.eventually("all is well", lambda: status(settings, "--check").stdout == "ok\n")

    for chunked in (True, False):  # who starts again knows it too
        with capturing(small, chunked=chunked) as capture:
            said = "public.items could not be read, and the initial snapshot is not complete without it"
            told(capture, said, "The row")
    with capturing(settings) as capture:
        mended(capture, "public.items")
        assert capture.hear("the initial snapshot is complete")
        publish = f"ALTER PUBLICATION {settings.publication} SET TABLE items, odd"
        odd = "CREATE TABLE odd (id int PRIMARY KEY)", "INSERT INTO odd VALUES (0)"
        execute(settings, *odd, f"{publish} WHERE (1 / id > 0)")
        told(capture, "public.odd could not be read, and the log does not have all of it", "Postgres failed")
        execute(settings, publish)
        mended(capture, "public.odd")
        assert capture.hear("public.odd was read again")
    assert replay(settings, "public.odd")


def test_a_table_that_is_inexact_is_named_for_capture_and_for_the_views_that_read_it(settings: Settings) -> None:
    feed = Feed(settings)
    feed.put(ITEMS, 1, 10)
    feed.seal(inexact=(ITEMS, TAGS))
    view = Plain(settings, "plain")
    with serving(settings, plain=Plain) as control:
        deadline = time.monotonic() + 20
        while not view.rows() or not any(r.facts.get("inexact") for r in control.reports().get("plain", [])):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert status(settings, "--check", "plain").stdout == f"ok, but inexact (S12): {ITEMS}\n"
        say(control, Report("capture", live=True, phase="streaming", facts={"inexact": [ITEMS, TAGS]}))
        assert status(settings, "--check").stdout == f"ok, but inexact (S12): {ITEMS}, {TAGS}\n"
        shown = status(settings).stdout
        assert f"plain g1: {ITEMS} may differ from Postgres" in shown, "perhaps an old one only"
        assert f"capture: {ITEMS}, {TAGS} may differ from Postgres" in shown


@pytest.mark.parametrize(
    ("phase", "behind", "missing"),
    [
        *((phase, 0.0, 400) for phase in ("stale", "stopped", "waiting", "paused")),
        ("live", 60.0, 400),
        ("live", 0.1, 7),
    ],
)
def test_what_is_missing_is_counted_to_what_is_captured_now(
    settings: Settings, control: Control, phase: str, behind: float, missing: int
) -> None:
    """A view that stands still or hangs reads nothing, so that it cannot know; one that reads may be held back by what it delays."""
    say(
        control,
        Report("capture", live=True, phase="streaming", version=Version(1, 500)),
        Report("plain", 1, live=True, phase=phase, version=Version(1, 100), lag=(1, 7, behind)),
    )
    (said,) = orjson.loads(status(settings, "--json", "plain").stdout)["consumers"]["plain"]
    assert said["lag"]["wal_bytes"] == missing
    say(control, Report("capture", live=True, phase="streaming", version=Version(2, 500)))
    assert re.search(r"^ *plain .* 1 epoch, 1 records?", status(settings, "plain").stdout, re.MULTILINE), "not in bytes"


class Clock:
    """A clock that is ahead, or behind, until it is set right; `passed` seconds have passed then."""

    def __init__(self, ahead: float) -> None:
        self.ahead = ahead
        self.passed = 0.0

    def time(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


@pytest.mark.parametrize("ahead", [15.0, -15.0])
def test_who_asks_by_another_clock_knows_who_runs_and_who_does_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    Feed(settings).cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        monkeypatch.setattr("headrace.control.time", Clock(ahead))
        other = Control(Log(settings))
        assert [report.live for report in other.running("plain")] == [True]
        assert status(settings, "--check", "plain").stdout == "ok\n"
        assert other.ask("plain", "release") == {}
    say(control, Report("dead", 1, live=True, phase="live"))
    monkeypatch.setattr("headrace.control.DEAD_SECONDS", 3.0)
    monkeypatch.setattr("headrace.control._CLOCK_SECONDS", 0.0)
    eventually("it is dead", lambda: control.reports()["dead"][0].dead, 15)
    assert control.reports()["dead"][0].age < 10
    assert re.search(rf"1[0-9]\.\d s {'ahead of' if ahead > 0 else 'behind'} the broker's", status(settings).stdout)


def test_a_request_is_carried_out_by_a_process_whose_clock_is_ahead(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Feed(settings).cut((ITEMS, 1, 1))
    monkeypatch.setattr("headrace.requests.time", Clock(60.0))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        assert control.ask("plain", "release", timeout=10.0) == {}


@pytest.mark.parametrize("ahead", [-60.0, 60.0])
def test_a_clock_that_was_set_right_is_believed_a_minute_later(
    settings: Settings, control: Control, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    clock = Clock(ahead)
    monkeypatch.setattr("headrace.requests.time", clock)
    box = control.requests(["plain"])

    def heard() -> list[Request]:
        control._request("plain", "1", {"verb": "any", "args": {}, "timeout": 30.0})
        return [request for _ in range(5) for _, request in box.poll(0.2)]  # its end is heard when nothing more comes

    try:
        eventually("it is known", lambda: any(abs(request.ahead - ahead) < 10 for request in heard()), 20)
        assert abs(control._log.ahead - ahead) < 10
        clock.ahead, clock.passed = 0.0, 61.0
        eventually("it is believed", lambda: any(abs(request.ahead) < 10 for request in heard()), 20)
        assert not any(request.given_up for request in eventually("it is heard", heard))
    finally:
        box.close()


def test_a_cut_that_a_killed_capture_has_left_open_hides_nothing_that_others_say(
    settings: Settings, control: Control
) -> None:
    """Until Kafka ended it, a minute later and more, every view of every source was called dead, and nobody was heard."""
    feed = Feed(settings)
    feed.cut((ITEMS, 1, 1))
    feed.writer.also(CONTROL, record_key(settings.source, "capture", "resnapshot", ITEMS), b"{}")
    feed.writer._flush()
    try:
        with serving(settings, plain=Plain):
            await_live(control, "plain")
            assert control.ask("plain", "release") == {}
        assert control.kept("capture", "resnapshot") == [{}], "what is in it is not there"
    finally:
        feed.writer.abort()


def interrupted(*_: object) -> Iterator[dict[str, object]]:
    raise KeyboardInterrupt


@pytest.mark.parametrize("by", [KeyboardInterrupt, Transient])
def test_what_was_asked_is_taken_back_by_who_no_longer_waits(
    settings: Settings, control: Control, monkeypatch: pytest.MonkeyPatch, by: type[BaseException]
) -> None:
    """Else it would be carried out when the process comes to it, up to two minutes later."""
    say(control, Report("busy", 1, live=True, phase="live"))
    if by is KeyboardInterrupt:
        monkeypatch.setattr("headrace.control._values", interrupted)
    with pytest.raises(by):
        control.ask("busy", "drop", {"all": True}, timeout=0.5)
    box = control.requests(["busy"])
    try:
        read = [(name, request.verb) for _ in range(20) for name, request in box.poll(0.1)]
        assert box._caught_up
    finally:
        box.close()
    assert not read


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
    assert re.search(r"slot not active, at \S+, [\d.]+ k?B of WAL held back", status(settings).stdout)
    lose_slot(settings)
    shown = " ".join(status(settings).stdout.split())  # the terminal's width breaks lines
    assert re.search(r"slot not active, lost: it can no longer be read from, at \S+ name", shown)
    slot = orjson.loads(status(settings, "--json").stdout)["source"]
    said = _source_line({"source": slot | {"wal_status": "unreserved", "wal_held_bytes": 1}})
    assert ", [red]unreserved: Postgres is about to remove its WAL[/red], at" in said


class Hangs(Plain):
    """Applies nothing beyond its first state while it may not."""

    may: ClassVar[threading.Event] = threading.Event()

    def apply(self, batch: Batch) -> None:
        if not batch.loading:
            self.may.wait(60)
        super().apply(batch)


def test_a_view_whose_apply_hangs_is_behind_and_more_so_each_second(settings: Settings) -> None:
    Hangs.may.clear()
    feed = Feed(settings)
    feed.cut((ITEMS, 1, 1))
    asked = ("--check", "plain", "--max-lag", "1s")
    with serving(settings, plain=Hangs) as control:
        await_live(control, "plain")
        assert status(settings, *asked).stdout == "ok\n"
        feed.cut((ITEMS, 1, 2))
        try:
            eventually("it is behind", lambda: status(settings, *asked).exit_code == 1, 15)
            assert status(settings, *asked).stdout.startswith("plain: ")
            assert " behind (" in status(settings, *asked).stdout
        finally:
            Hangs.may.set()
        eventually("it is up to date again", lambda: status(settings, *asked).stdout == "ok\n")


class Opens(Plain):
    """Is not opened while it may not."""

    may: ClassVar[threading.Event] = threading.Event()

    def open(self, generation: Generation) -> Position | None:
        self.may.wait(60)
        return super().open(generation)


def test_a_view_whose_store_hangs_when_it_is_opened_is_behind(settings: Settings) -> None:
    """Its process reports, and has not read yet how far it is."""
    Opens.may.set()
    Feed(settings).cut((ITEMS, 1, 1))
    with serving(settings, plain=Opens) as control:
        await_live(control, "plain")
    Opens.may.clear()
    asked = ("--check", "plain", "--max-lag", "1s")
    with serving(settings, plain=Opens):
        try:
            eventually(
                "it is behind", lambda: " behind (" in (told := status(settings, *asked)).stdout and told.exit_code, 15
            )
        finally:
            Opens.may.set()
        eventually("it is up to date", lambda: status(settings, *asked).stdout == "ok\n")


class Unpromoted(Plain):
    """Its pointer cannot be moved while `taken` is set."""

    taken = True

    def promote(self) -> None:
        if self.taken:
            raise Misconfigured("name-taken", "There is an index of that name.", "Remove it.")
        super().promote()


def test_a_first_build_that_cannot_be_promoted_says_why_and_fails_the_check(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Feed(settings).cut((ITEMS, 1, 1))
    with serving(settings, plain=Unpromoted) as control:
        eventually("it says why", lambda: any(each.code for each in control.reports().get("plain", [])))
        (said,) = control.reports()["plain"]
        assert (said.phase, said.live, said.code) == ("following", False, "name-taken")
        assert (said.reason, said.remedy) == ("There is an index of that name.", "Remove it.")
        ended = status(settings, "--check", "plain")
        assert ended.exit_code == 1
        assert ended.stdout == "plain: following: There is an index of that name. Remove it.\n"
        monkeypatch.setattr(Unpromoted, "taken", False)
        eventually("it is live", lambda: control.reports()["plain"][0].phase == "live")
        assert control.reports()["plain"][0].code == ""
        assert status(settings, "--check", "plain").stdout == "ok\n"


class Anew(Unpromoted):
    """It applies while it may."""

    may: ClassVar[threading.Event] = threading.Event()

    def apply(self, batch: Batch) -> None:
        self.may.wait(60)
        super().apply(batch)


def test_why_a_build_could_not_be_promoted_is_not_said_of_the_next_one_of_its_number(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Anew.may.set()
    Feed(settings).cut((ITEMS, 1, 1))
    with serving(settings, plain=Anew) as control:
        eventually("it says why", lambda: any(each.code for each in control.reports().get("plain", [])))
        Anew.may.clear()
        try:
            assert control.ask("plain", "drop", {"generation": 1}) == {"dropped": [1]}
            begun = {"starting", "loading"}
            (said,) = eventually(
                "it is begun anew",
                lambda: [said for said in control.reports().get("plain", []) if said.phase in begun],
            )
            assert (said.generation, said.code, said.reason) == (1, "", "")
            monkeypatch.setattr(Unpromoted, "taken", False)
        finally:
            Anew.may.set()
        eventually("it is live", lambda: [said.phase for said in control.reports()["plain"]] == ["live"])


def test_a_view_that_no_heartbeat_reaches_is_wrong_by_its_own_check(settings: Settings) -> None:
    """S17: what is shown may be the newest that the log has, and an hour old."""
    settings = replace(settings, heartbeat_ms=100)
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n int)")
    asked = ("--check", "plain", "--max-lag", "2s")
    with serving(settings, plain=Plain) as control:
        with capturing(settings) as capture:
            capture.reach()
            await_live(control, "plain")
            capture.eventually(
                "it says how often it beats", lambda: control.reports()["capture"][0].facts.get("heartbeat_ms")
            )
            capture.eventually("all is well", lambda: status(settings, *asked).stdout == "ok\n")
        eventually("no heartbeat comes", lambda: status(settings, *asked).exit_code == 1, 15)
        assert status(settings, *asked).stdout.startswith("plain: ")
        assert "see: headrace status" in status(settings, *asked).stdout
        assert re.search(r"plain: shows a state .* old, no heartbeat", status(settings, "--max-lag", "2s").stdout)
        assert "no heartbeat" not in status(settings, "--max-lag", "1h").stdout
        (said,) = orjson.loads(status(settings, "--json").stdout)["consumers"]["plain"]
        assert said["shows_seconds"] > 2
        drop_slot(settings)
        assert refused(settings).code == "slot-missing"
        assert "no heartbeat" in status(settings, *asked).stdout, (
            "who was started again and refused has not beaten either"
        )


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
