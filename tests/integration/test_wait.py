"""`headrace wait`: who waits for his write sees it, and who would wait in vain is told at once (S25)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import orjson
import psycopg
import pytest
from typer.testing import CliRunner, Result

from headrace.change import Version, format_lsn, parse_lsn
from headrace.cli import app, show
from headrace.cli import wait as waits
from headrace.control import Control, Report
from headrace.errors import HeadraceError, Misconfigured
from headrace.log import Log
from headrace.settings import Settings, environment
from headrace.waiting import reached
from tests.fixtures.capture import Running, capturing, eventually, execute, now, prepare, rows
from tests.fixtures.feed import SOURCE, Feed
from tests.fixtures.parked import Picky, forbid
from tests.fixtures.plain import Plain
from tests.fixtures.processes import System
from tests.fixtures.serving import await_live, serving

VIEW = "plain"


def command(settings: Settings, *words: str) -> Result:
    return CliRunner().invoke(app, words, env=environment(settings) | {"COLUMNS": "200"})


def refused(settings: Settings, *words: str) -> HeadraceError:
    error = command(settings, "wait", *words).exception
    assert isinstance(error, HeadraceError), error
    return error


def selected(settings: Settings) -> dict[str, int]:
    return dict(rows(settings, """SELECT format('{"id":%s}', id), n FROM items"""))


@pytest.fixture
def capture(settings: Settings) -> Iterator[Running]:
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n int)", "INSERT INTO items VALUES (1, 1)")
    with capturing(settings) as running:
        running.reach()
        yield running


def test_what_is_committed_is_seen_when_the_wait_is_over(settings: Settings, capture: Running) -> None:
    with serving(settings, plain=Plain) as control:
        await_live(control, VIEW)
        for number in range(2, 7):
            execute(settings, f"INSERT INTO items VALUES ({number}, {number})", f"UPDATE items SET n = n + {number}")
            ended = command(settings, "wait", VIEW, "--json")
            assert Plain(settings, VIEW).rows() == selected(settings)
            (told,) = orjson.loads(ended.stdout)
            assert (ended.exit_code, told["consumer"], told["generation"], told["epoch"]) == (0, VIEW, 1, 1)
        execute(settings, "DELETE FROM items WHERE id = 3")
        token = f"1@{format_lsn(now(settings))}"
        said = command(settings, "wait", VIEW, "--lsn", token)
        assert Plain(settings, VIEW).rows() == selected(settings)
        assert (said.exit_code, token in said.stdout) == (0, True)
        execute(settings, "CREATE TABLE unrelated AS SELECT 1 AS n")
        assert command(settings, "wait", VIEW).exit_code == 0, "also for what touched no captured table"


def test_a_process_that_was_started_just_now_is_waited_for(
    settings: Settings, capture: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a view that is known here: another name may be a typing error."""
    with serving(settings, plain=Plain) as control:
        await_live(control, VIEW)
    assert refused(settings, VIEW, "--timeout", "0").code == "consumer-not-running"
    running = Control.running
    with ExitStack() as later:

        def starts(control: Control, name: str) -> list[Report]:
            try:
                return running(control, name)
            except Misconfigured:
                monkeypatch.undo()
                later.enter_context(serving(settings, plain=Plain))
                raise

        monkeypatch.setattr(Control, "running", starts)
        assert command(settings, "wait", VIEW).exit_code == 0
    error = refused(settings, VIEW, "typed")
    assert error.message == "No process runs the consumer typed.", "and at once"


def test_what_does_not_come_in_time_is_told_with_where_the_view_is(
    settings: Settings, capture: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "_MOMENT_SECONDS", 0.0)
    with serving(settings, plain=Plain) as control:
        await_live(control, VIEW)
        assert command(settings, "wait", VIEW).exit_code == 0
        capture.stop()
        execute(settings, "INSERT INTO items VALUES (2, 2)")
        before = now(settings)
        ended = command(settings, "wait", VIEW, "--timeout", "5", "--json")
        error = ended.exception
        assert isinstance(error, HeadraceError)
        assert (error.code, error.exit_code, ended.stdout) == ("view-behind", 5, "")
        assert re.fullmatch(r"plain: live, at 1@\S+, not at 1@\S+\n", ended.stderr), "and once, meanwhile"
        (wanted,) = re.findall(r"not at \d+@([0-9A-F]+/[0-9A-F]+), after", error.message)
        assert before <= parse_lsn(wanted) <= now(settings), "Postgres writes by itself, too"


def test_who_would_wait_in_vain_is_told_at_once(
    settings: Settings, capture: Running, fresh_database: Callable[[], str]
) -> None:
    assert refused(settings, VIEW).code == "consumer-not-running"
    with serving(settings, plain=Picky) as control:
        await_live(control, VIEW)
        assert command(settings, "wait", VIEW, "--lsn", "soon").exit_code == 2
        assert refused(settings, VIEW, "--lsn", "0@0/1").code == "token-void"
        elsewhere = replace(settings, dsn=fresh_database())
        assert refused(elsewhere, VIEW).code == "other-source", "its LSN says nothing of the log"
        assert "HEADRACE_DSN leads to" in orjson.loads(command(elsewhere, "status", "--json").stdout)["source"]["error"]
        forbid(settings, 13)
        execute(settings, "INSERT INTO items VALUES (2, 13)")
        eventually("it is parked", lambda: facts(control).get("parked"))
        assert refused(settings, VIEW).code == "records-parked"
        forbid(settings)
        control.ask(VIEW, "retry")
        control.ask(VIEW, "pause")
        execute(settings, "INSERT INTO items VALUES (3, 3)")
        eventually("it says so", lambda: control.running(VIEW)[0].phase == "paused")
        assert refused(settings, VIEW).code == "view-paused"
        control.ask(VIEW, "resume")
        eventually("it goes on", lambda: control.running(VIEW)[0].phase == "live")
        assert command(settings, "wait", VIEW).exit_code == 0
        assert Plain(settings, VIEW).rows() == selected(settings)


def test_the_first_snapshot_is_waited_for_while_a_capture_takes_it(system: System) -> None:
    """As the README has it: capture and the view are started just before, in the background."""
    settings = system.settings
    execute(settings, "CREATE TABLE items (id int PRIMARY KEY, n int)", "INSERT INTO items VALUES (1, 1)")
    assert refused(settings, "warehouse", "--timeout", "0").code == "nothing-captured"
    system.run("setup", "--apply")
    with psycopg.connect(settings.dsn) as application:
        application.execute("UPDATE items SET n = 2")  # the slot, and so the snapshot, waits for its end
        system.start("capture", "capture")
        system.start("warehouse", "run", "warehouse")
        ended = system.ask("wait", "warehouse", "--timeout", "12")
        assert (ended.code, "view-behind" in ended.err, "headrace capture" in ended.err) == (5, True, False), ended
        assert "\ncapture: " in f"\n{ended.err}", "what it waits for"
        system.start("wait", "wait", "warehouse", "--timeout", "100")
        assert system.ask("wait", "warehouse", "--timeout", "0.5").code == 5
    eventually("it sees it", lambda: not system.alive("wait"))
    assert system.ends("wait") == 0, system.output("wait").read_text()
    assert "1" in system.run("sql", "SELECT count(*) AS n FROM items")
    assert system.ends("capture") == 0


def test_a_wait_that_lasts_over_a_recovery_does_not_answer_for_an_epoch_that_is_void(settings: Settings) -> None:
    """S2: the view's LSN of the new epoch is beyond any of the old, whatever was lost."""
    log = Log(settings)
    log.ensure_spine()
    control = Control(log)

    def say(version: Version) -> None:
        control.report(Report(VIEW, 1, live=True, phase="live", version=version))
        control.flush()

    say(Version(1, 5))
    with pytest.raises(Misconfigured) as caught:
        reached(control, VIEW, Version(1, 10), 20, told=lambda _: say(Version(2, 1)))
    assert caught.value.code == "token-void"
    assert reached(control, VIEW, Version(2, 1), 0).version == Version(2, 1)


def test_no_view_shows_what_was_written_to_a_server_that_has_lost_what_the_log_has(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2: a standby was promoted that lacked it, and uses its LSNs again; capture has stopped, no new epoch has begun."""
    feed = Feed(settings)
    feed.lsn = 490
    control = Control(feed.log)
    control.report(Report(VIEW, 1, live=True, phase="live", version=feed.seal().version))
    control.flush()
    for lsn, code in ((310, "source-behind-log"), (510, "view-behind")):
        facts = {"lsn": format_lsn(lsn), "system_id": SOURCE.system_id, "database": SOURCE.database}
        monkeypatch.setattr(waits, "source_facts", lambda _, facts=facts: facts)
        assert refused(settings, VIEW, "--timeout", "0").code == code
    assert command(settings, "wait", VIEW, "--lsn", f"1@{format_lsn(310)}").exit_code == 0, "that of a write before"


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (Report(VIEW, 1, phase="paused"), "view-paused"),
        (Report(VIEW, 1, phase="stopped", reason="It is full.", code="store-full", remedy="Empty it."), "store-full"),
        (Report(VIEW, 1, phase="following", reason="An index has it.", code="name-taken"), "name-taken"),
        (Report(VIEW, 0, phase="dropped"), "no-such-generation"),
        (Report(VIEW, 1, phase="loading"), "view-behind"),
        (Report(VIEW, 1, phase="waiting", reason="It is away.", code="elasticsearch-away"), "view-behind"),
    ],
)
def test_who_waits_for_a_first_build_that_does_not_become_live_is_told_at_once(
    settings: Settings, report: Report, code: str
) -> None:
    log = Log(settings)
    log.ensure_spine()
    control = Control(log)
    control.report(report)
    control.flush()
    with pytest.raises(HeadraceError) as caught:
        reached(control, VIEW, Version(1, 10), 2 if code == "view-behind" else 0)
    assert caught.value.code == code


def facts(control: Control) -> dict[str, Any]:
    (report,) = control.running(VIEW)
    return report.facts
