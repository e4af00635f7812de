"""`headrace status` of tables: those that are captured no more, were never read, or are inexact."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import orjson
import psycopg
import pytest
from typer.testing import CliRunner

from headrace.change import Version
from headrace.cli import app
from headrace.control import Control, Report
from headrace.log import Log
from headrace.settings import Settings, environment
from tests.fixtures.capture import Running, capturing, execute, prepare, replay
from tests.fixtures.feed import ITEMS, TAGS, Feed
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving
from tests.fixtures.statuses import say, status


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
        deadline = time.monotonic() + 60
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
