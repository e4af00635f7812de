"""`headrace resnapshot`: one row, pauses and cancels, and what is told to who waits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psycopg
import pytest
import typer

from headrace import control
from headrace.control import Control
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.settings import Settings, environment
from headrace_capture.cli import resnapshot
from tests.fixtures.capture import capturing, end, eventually, execute, prepare, replay, selected, spawn
from tests.fixtures.resnapshots import ITEMS, T, ask, done, jobs, phases, reporting, unnoticed

pytestmark = pytest.mark.usefixtures("blind")


def test_one_row_by_its_key(commands: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """Changed, gone, and never there, which is said: the log may write it otherwise; keys of two columns, by the command."""
    settings = commands
    prepare(
        settings,
        ITEMS,
        "CREATE TABLE pairs (a text, b timestamptz, n int, PRIMARY KEY (b, a))",
        "CREATE DOMAIN code AS varchar(3); CREATE TABLE codes (id code PRIMARY KEY, n int); INSERT INTO codes VALUES ('abc', 1)",
        "INSERT INTO items SELECT i, i FROM generate_series(1, 5) i",
        "INSERT INTO pairs VALUES ('it''s', '2026-01-02 03:04:05+00', 1)",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        with unnoticed(settings):
            execute(
                settings,
                "DELETE FROM items WHERE id < 3",
                "UPDATE items SET no = 0 WHERE id > 3",
                "UPDATE pairs SET n = 2",
                "UPDATE codes SET n = 2",
            )
        reporting(settings)
        for table, key in (
            ("items", "1"),
            ("items", '{"id": 4}'),
            ("items", "77"),
            ("codes", "abcd"),  # which its type takes for abc
            ("public.pairs", '{"a":"it\'s","b":"2026-01-02T03:04:05Z"}'),
        ):
            resnapshot([table], key=key, wait=True)
        capture.reach()
        assert phases(settings) == {'public.items {"id":"77"}': "done"}
        note = capsys.readouterr().err
        assert note.count("note: ") == note.count('public.items {"id":"77"}: Postgres has no row of this key') == 1
        with pytest.raises(Misconfigured, match="invalid input syntax"):
            resnapshot(["items"], key="x", wait=True)
        with pytest.raises(Misconfigured, match=r"is \(b, a\), not 1"):
            resnapshot(["pairs"], key="1")
        with pytest.raises(Misconfigured, match="has no table"):
            resnapshot(["other"])
        with pytest.raises(typer.Exit):
            resnapshot()
    assert replay(settings, T) == {b'{"id":%d}' % i: {"id": i, "no": no} for i, no in ((2, 2), (3, 3), (4, 0), (5, 5))}
    assert [row["n"] for row in replay(settings, "public.pairs").values()] == [2]
    assert list(replay(settings, "public.codes").values()) == [{"id": "abc", "n": 2}]
    with pytest.raises(Misconfigured) as refusal:
        resnapshot(everything=True)
    assert (refusal.value.code, refusal.value.remedy) == ("capture-not-running", "Run: headrace capture")


def test_keys_of_an_extension_s_types_are_compared_by_their_own_operators(commands: Settings) -> None:
    """ORDER BY takes them in any search_path; with ours a bare > would be that of text, or none: rows would be in no chunk."""
    settings = replace(commands, cut_records=2)
    prepare(
        settings,
        "CREATE EXTENSION citext",
        "CREATE EXTENSION ltree",
        "CREATE DOMAIN route AS ltree",
        "CREATE TABLE names (id citext PRIMARY KEY)",
        "INSERT INTO names VALUES ('apple'), ('banana'), ('Cherry'), ('Date'), ('elder')",
        "CREATE TABLE places (n int, id route, name citext, PRIMARY KEY (n, id, name))",
        "INSERT INTO places SELECT n, at::ltree, k.id FROM generate_series(1, 2) n, unnest('{a,a.b}'::text[]) at, names k",
    )
    with capturing(settings, chunked=True) as capture:
        capture.hear("the initial snapshot is complete")
        capture.reach()
        reporting(settings)
        resnapshot(["places"], key='{"n": 1, "id": "a.b", "name": "Date"}', wait=True)
    assert replay(settings, "public.names") == selected(settings, "names")
    assert len(replay(settings, "public.places")) == 20


def test_pause_resume_cancel(commands: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """A pass that is paused stands still, over a restart too; resumed it ends; cancelled it leaves the log as it is."""
    settings = replace(commands, cut_records=5)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 12000) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        ask(settings, tables=[T])
        assert ask(settings, "pause") == {"jobs": [T]}
        read = jobs(settings)[T]["rows"]
        assert read < 12000
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "INSERT INTO items VALUES (0, 0)")
        capture.reach()
        assert (phases(settings), jobs(settings)[T]["rows"]) == ({T: "paused"}, read)
        assert ask(settings, "resume", tables=[T]) == {"jobs": [T]}
        eventually("it goes on", lambda: jobs(settings)[T]["rows"] > read)
        assert ask(settings, "cancel") == {"jobs": [T]}
        assert jobs(settings) == {}
        assert ask(settings, "cancel") == {"jobs": []}
        resnapshot(status=True, json=True)
        assert json.loads(capsys.readouterr().out) == []
        capture.reach()
    assert replay(settings, T) == selected(settings, T)


def test_what_is_cancelled_by_its_key_is_that_row_only(settings: Settings) -> None:
    """The table's own pass goes on where it was; so with a pause."""
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 1), (2, 2)")
    one, two = {"id": "1"}, {"id": "2"}
    row = f'{T} {{"id":"1"}}'
    with capturing(settings) as capture, psycopg.connect(settings.dsn) as application:
        capture.hear("streaming")
        application.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        ask(settings, tables=[T])
        ask(settings, tables=[T], key=one)
        ask(settings, tables=[T], key=two)
        assert ask(settings, "pause", tables=[T], key=one) == {"jobs": [row]}
        assert ask(settings, "cancel", tables=[T], key=one) == {"jobs": [row]}
        assert phases(settings) == {T: "waiting", row: "cancelled", f'{T} {{"id":"2"}}': "waiting"}
        application.rollback()
        done(settings, capture)


@pytest.mark.usefixtures("often")
def test_what_joined_and_was_never_read_is_not_cancelled_but_taken_out(settings: Settings) -> None:
    """It would begin again by itself. Of all that is read again the rest is cancelled; paused it is forgotten when it is taken out."""
    prepare(settings, ITEMS)
    execute(settings, "CREATE TABLE late (id int PRIMARY KEY)")
    publication = f"ALTER PUBLICATION {settings.publication}"
    with capturing(settings) as capture, psycopg.connect(settings.dsn) as application:
        capture.hear("streaming")
        application.execute("INSERT INTO late VALUES (1)")
        execute(settings, f"{publication} ADD TABLE late")
        eventually("it waits", lambda: jobs(settings).get("public.late", {}).get("reason", "").startswith("waits for"))
        for tables in ([], ["public.late"]):
            with pytest.raises(Misconfigured) as refusal:
                ask(settings, "cancel", tables=tables)
            assert refusal.value.code == "snapshot-not-cancelled"
        assert ask(settings, "pause") == {"jobs": ["public.late"]}
        application.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        ask(settings, tables=[T])
        assert ask(settings, "cancel") == {"jobs": [T]}
        assert phases(settings) == {"public.late": "paused"}
        execute(settings, f"{publication} DROP TABLE late")
        eventually("it is forgotten", lambda: not jobs(settings))
        application.commit()
        assert capture.reach().inexact == ()


@contextmanager
def awaited(
    settings: Settings, table: str, *options: str, dead: float = control.DEAD_SECONDS
) -> Iterator[subprocess.Popen[str]]:
    """Run `headrace resnapshot TABLE --wait`; go on when capture has answered that it will be done."""
    kept = Control(Log(settings)).kept
    patient = f"from headrace import cli, control; control.DEAD_SECONDS = {dead}; cli.main()"
    command = [sys.executable, "-c", patient, "resnapshot", table, "--wait", *options]
    environ = os.environ | environment(settings) | {"COLUMNS": "200"}
    reporting(settings)
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as waiter:
        try:
            eventually(
                "it is to be read again", lambda: any(name.startswith(f"public.{table}") for name in phases(settings))
            )
            eventually("that is answered", lambda: kept("capture", "request") == [{}])
            yield waiter
        finally:
            waiter.kill()


@pytest.mark.parametrize("ends", ["killed", "off", "row-too-large"])
def test_who_waits_for_a_pass_is_told_when_capture_is_gone(settings: Settings, ends: str) -> None:
    """However it ended; the table is still to be read then, here because somebody holds it."""
    prepare(settings, ITEMS, "CREATE TABLE large (id int PRIMARY KEY, a text)", "INSERT INTO items VALUES (1, 1)")
    capture = spawn(replace(settings, message_max_bytes=100_000))
    try:
        reporting(settings)
        with psycopg.connect(settings.dsn) as application:
            application.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
            with awaited(settings, "items", dead=3.0 if ends == "killed" else control.DEAD_SECONDS) as waiter:
                if ends == "row-too-large":
                    execute(settings, "INSERT INTO large VALUES (1, repeat('x', 200000))")
                else:
                    capture.send_signal(signal.SIGKILL if ends == "killed" else signal.SIGTERM)
                said = waiter.communicate(timeout=60)[0]
        assert phases(settings)[T] == "waiting"
    finally:
        end(capture)
    assert (waiter.returncode, "capture-not-running" in said) == (3, True), said
    assert ("It stopped: " in said) == (ends == "row-too-large"), said


@pytest.mark.parametrize("options", [[], ["--key", "1"]])
def test_who_waits_for_a_pass_is_told_when_it_is_cancelled(settings: Settings, options: list[str]) -> None:
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 1)")
    with capturing(settings) as capture:
        capture.hear("streaming")
        reporting(settings)
        with psycopg.connect(settings.dsn) as application:
            application.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
            with awaited(settings, "items", *options) as waiter:
                assert waiter.stdout is not None
                told = waiter.stdout.readline()
                assert told.startswith("public.items"), told
                assert told.endswith(": waiting\n"), "so that one sees that it goes on"
                ask(settings, "cancel")
                said = waiter.communicate(timeout=60)[0]
        assert (waiter.returncode, "resnapshot-cancelled" in said) == (3, True), said
        with awaited(settings, "items", *options) as waiter:
            said = waiter.communicate(timeout=60)[0]
        assert waiter.returncode == 0, said


def test_who_waits_for_a_pass_is_told_when_it_is_paused(settings: Settings) -> None:
    """Before it was asked for, or meanwhile; what is asked for again stays paused."""
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 1)")
    with capturing(settings) as capture:
        capture.hear("streaming")
        reporting(settings)
        with psycopg.connect(settings.dsn) as application:
            application.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
            for paused in (False, True):
                with awaited(settings, "items") as waiter:
                    if not paused:
                        assert ask(settings, "pause") == {"jobs": [T]}
                    said = waiter.communicate(timeout=60)[0]
                assert (waiter.returncode, "resnapshot-paused" in said) == (3, True), said
                assert "headrace resnapshot --resume" in said
                assert phases(settings) == {T: "paused"}
        assert ask(settings, "resume") == {"jobs": [T]}
        done(settings, capture)
