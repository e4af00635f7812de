"""Tables read again while the stream runs (I4, S7): the log ends equal to Postgres, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Self

import psycopg
import pytest
import typer

from headrace import control
from headrace.control import Control
from headrace.errors import HeadraceError, Misconfigured
from headrace.log import Log, kafka
from headrace.log.tail import BEGINNING, read_to_end
from headrace.settings import Settings, environment
from headrace_capture import known, spool
from headrace_capture import resnapshot as beside
from headrace_capture.cli import resnapshot
from tests.fixtures.capture import (
    Running,
    capturing,
    changes,
    end,
    eventually,
    execute,
    prepare,
    refused,
    replay,
    selected,
    spawn,
)
from tests.fixtures.disk import no_room
from tests.fixtures.feed import add_partition

T = "public.items"
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, no int)"

pytestmark = pytest.mark.usefixtures("blind")


def ask(settings: Settings, verb: str = "resnapshot", **args: Any) -> dict[str, Any]:
    """Ask the running capture, as soon as it has reported."""
    reporting(settings)
    return Control(Log(settings)).ask("capture", verb, args)


def reporting(settings: Settings) -> None:
    """Wait until capture has reported that it streams."""
    reports = Control(Log(settings)).reports
    eventually("capture reports", lambda: any(r.phase == "streaming" for r in reports().get("capture", [])))


def jobs(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return the jobs' records in the log."""
    (found,) = Control(Log(settings)).kept("capture", "resnapshot")
    return found


def phases(settings: Settings) -> dict[str, str]:
    """Return the phase of each job in the log."""
    return {name: said["phase"] for name, said in jobs(settings).items()}


def done(settings: Settings, running: Running, *tables: str) -> None:
    """Wait until the tables have been read again."""
    running.reach()
    eventually("they are done", lambda: all(phases(settings).get(table) == "done" for table in tables or (T,)))
    running.reach()


def foreign(settings: Settings) -> dict[bytes, Any]:
    """Return the table as a reader has it that knows nothing of headrace: the last value of each key, none for a tombstone."""
    log = Log(settings)
    topic = log.topic_of(T)
    places = {(topic, partition): BEGINNING for partition in range(log.partitions([topic])[topic])}
    last = {record.key: record.value for record in read_to_end(settings, places)}
    return {key: json.loads(value)["after"] for key, value in last.items() if value is not None}


def unseen(settings: Settings, *statements: str) -> None:
    """Change rows so that the stream does not mention it, and the table is not read again unasked."""
    execute(
        settings,
        f"ALTER PUBLICATION {settings.publication} SET (publish = '')",
        *statements,
        f"ALTER PUBLICATION {settings.publication} SET (publish = 'insert, update, delete, truncate')",
    )


def test_rows_and_deletes_that_were_never_seen_are_in_the_log_afterwards(settings: Settings) -> None:
    """In chunks of a few rows: changed rows, new rows, and tombstones for those that are gone."""
    settings = replace(settings, cut_records=7)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 60) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        unseen(settings, "DELETE FROM items WHERE id % 10 = 3", "UPDATE items SET no = -no WHERE id % 10 = 5")
        unseen(settings, "INSERT INTO items VALUES (1000, 1)")
        assert ask(settings, tables=[T]) == {"jobs": [T]}
        done(settings, capture)
    assert replay(settings, T) == selected(settings, T)
    assert {c.read for c in changes(settings, T) if c.op == "r"} == {"snapshot", "resnapshot"}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_table_of_large_rows_is_read_in_chunks_of_a_bounded_size(settings: Settings, *, chunked: bool) -> None:
    """A chunk ends with the row that reaches its most bytes: the COPY that has more rows is given up (I10)."""
    docs = "CREATE TABLE docs (id int PRIMARY KEY, big text); ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL"
    prepare(
        settings, docs, f"INSERT INTO docs SELECT i, repeat(i::text, {100_000 // 3}) FROM generate_series(100, 299) i"
    )
    with capturing(settings, chunked=chunked) as capture:
        if not chunked:
            capture.hear("streaming")
            ask(settings, tables=["public.docs"])
        capture.hear("public.docs was read again: 200 rows")
        capture.reach()
    assert replay(settings, "public.docs") == selected(settings, "docs")


class Load:
    """Writes until told to stop: inserts, updates, deletes, changed keys, in transactions of one or many."""

    def __init__(self, settings: Settings, keys: int, seed: int = 1) -> None:
        self.commits = 0
        self._settings = settings
        self._keys = keys
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with psycopg.connect(self._settings.dsn) as connection:
            while not self._stop.wait(0.01):  # not more than capture keeps up with: its cuts are tiny here
                for _ in range(self._random.choice([1, 1, 2, 30])):
                    connection.execute(self._change().encode())
                connection.commit()
                self.commits += 1

    def _change(self) -> str:
        key, other, what = self._random.randrange(self._keys), self._random.randrange(self._keys), self._random.random()
        if what < 0.2:
            return f"DELETE FROM items WHERE id = {key}"
        if what < 0.3:
            free = f"NOT EXISTS (SELECT FROM items WHERE id = {other})"
            return f"UPDATE items SET id = {other}, no = no + 1 WHERE id = {key} AND {free}"
        return f"INSERT INTO items VALUES ({key}, 0) ON CONFLICT (id) DO UPDATE SET no = items.no + 1"


def test_under_load_the_log_stays_exact(settings: Settings) -> None:
    """Three times over while rows come, change, move and go; no version ever stands for two states of the topic."""
    settings = replace(settings, cut_records=150, partitions=3)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 1000) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        with Load(settings, 1500) as load:
            for _ in range(3):
                before = load.commits
                ask(settings, tables=[T])
                done(settings, capture)
                capture.eventually("rows changed meanwhile", lambda before=before: load.commits > before)
        capture.reach()
    assert replay(settings, T) == selected(settings, T)
    assert foreign(settings) == selected(settings, T)
    states = [(c.version, c.ends) for c in Log(settings).checkpoints() if c.complete]
    assert states == sorted(states, key=lambda state: state[0])
    assert all(ends == dict(states)[version] for version, ends in states)


def test_a_pass_goes_on_after_a_kill(settings: Settings) -> None:
    """SIGKILL in the middle of a pass, under load: it goes on behind what is in the log, and ends exact."""
    settings = replace(settings, cut_records=100)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 6000) i")
    with capturing(settings) as capture:
        capture.reach()
        unseen(settings, "DELETE FROM items WHERE id % 100 = 3", "UPDATE items SET no = -no WHERE id % 100 = 5")
        capture.reach()
    with Load(settings, 2000):
        process = spawn(settings)
        try:
            ask(settings, tables=[T])
            eventually("it reads", lambda: jobs(settings)[T]["rows"] > 400)
        finally:
            end(process)
        read = jobs(settings)[T]
        assert read["phase"] == "reading"
        with capturing(settings) as capture:
            done(settings, capture)
    with capturing(settings) as capture:
        capture.reach()
    assert replay(settings, T) == selected(settings, T)
    assert foreign(settings) == selected(settings, T)
    whole = jobs(settings)[T]
    assert whole["first"] == read["first"]
    assert whole["rows"] > read["rows"]


@pytest.fixture
def commands(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the command reads its settings from."""
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    return settings


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


@contextmanager
def unnoticed(settings: Settings, publish: str = "truncate") -> Iterator[None]:
    """Let the stream miss what is done meanwhile, but for `publish`, and capture not know that it did: nothing is read by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beside.Resnapshot, "_judge", lambda *_: None)
        execute(settings, f"ALTER PUBLICATION {settings.publication} SET (publish = '{publish}')")
        yield
        execute(
            settings, f"ALTER PUBLICATION {settings.publication} SET (publish = 'insert, update, delete, truncate')"
        )


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


def test_the_initial_snapshot_in_chunks(settings: Settings) -> None:
    """Killed under load it goes on where it was; nothing is a state before it is complete; then the log is the tables."""
    settings = replace(settings, cut_records=100)
    prepare(
        settings,
        ITEMS,
        "CREATE TABLE empty (id int PRIMARY KEY)",
        "INSERT INTO items SELECT i, i FROM generate_series(1, 9000) i",
    )
    with Load(settings, 9500):
        process = spawn(settings, "--snapshot=chunked")
        try:
            eventually("it reads", lambda: jobs(settings).get(T, {}).get("rows", 0) > 500)
        finally:
            end(process)
        read = jobs(settings)[T]["rows"]
        assert read < 9000
        assert Log(settings).newest_checkpoint(complete=True) is None
        with capturing(settings) as capture:
            capture.hear("the initial snapshot is complete")
            capture.reach()
    with capturing(settings) as capture:
        assert capture.reach().inexact == ()
        assert "public.empty" in Log(settings).tables()
    assert replay(settings, T) == selected(settings, T)


def test_large_chunks_are_not_read_back_and_no_less_exact(settings: Settings) -> None:
    """What a pass has just written it does not read again; what the stream wrote meanwhile it does."""
    settings = replace(settings, cut_records=2000)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 9000) i")
    with capturing(settings, chunked=True) as capture, Load(settings, 10000):
        capture.hear("the initial snapshot is complete")
        ask(settings, tables=[T])
        done(settings, capture)
    with capturing(settings) as capture:
        capture.reach()
    assert replay(settings, T) == selected(settings, T)


def test_a_row_that_cannot_be_written_stops_its_table_and_nothing_else(settings: Settings) -> None:
    """Larger than a record may be: the job says so and rests, the stream goes on; asked again under a higher limit it ends."""
    small = replace(settings, message_max_bytes=100_000)
    prepare(small, ITEMS)
    with capturing(small) as capture:
        capture.hear("streaming")
        execute(
            small,
            "CREATE TABLE large (id int PRIMARY KEY, a text)",
            "INSERT INTO large VALUES (1, 'a'), (2, repeat('x', 200000))",
            f"ALTER PUBLICATION {small.publication} ADD TABLE large",
        )
        capture.hear("public.large cannot be read again")
        execute(small, "INSERT INTO items VALUES (1, 1)")
        assert capture.reach().inexact == ("public.large",)
        assert "row-too-large" in capture.hear("cannot be read again")
        assert phases(small) == {"public.large": "failed"}
    with capturing(settings) as capture:
        ask(settings, tables=["public.large"])
        done(settings, capture, "public.large")
        assert capture.reach().inexact == ()
    assert replay(settings, T) == selected(settings, T)
    assert replay(settings, "public.large") == selected(settings, "large")


def test_no_room_for_the_keys_stops_their_table_and_nothing_else(settings: Settings) -> None:
    """With room again the pass ends; a TRUNCATE, for which the stream itself must list the keys, stops capture with the reason."""
    prepare(settings, "CREATE TABLE items (id text PRIMARY KEY)", "CREATE TABLE few (id int PRIMARY KEY)")
    # More keys than SQLite keeps in memory: what it writes of them is larger than there is room for.
    execute(settings, "INSERT INTO items SELECT lpad(i::text, 800, '0') FROM generate_series(1, 8000) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        with no_room():
            ask(settings, tables=[T])
            assert "spool-full" in capture.hear("cannot be read again")
            execute(settings, "INSERT INTO few VALUES (1)")
            capture.reach()
        ask(settings, tables=[T])
        done(settings, capture)
    execute(settings, "TRUNCATE items")
    with no_room():
        assert refused(settings).code == "spool-full"
    with capturing(settings) as capture:
        capture.reach()
    assert replay(settings, T) == {}


@pytest.mark.parametrize("amid", ["catch_up", "older"])
def test_asked_to_stop_while_it_looks_what_the_log_has_it_writes_nothing_more(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, amid: str
) -> None:
    """That may take minutes. The job is there for the next start."""
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 1), (2, 2)")
    monkeypatch.setattr(spool, "_STEPS", 1)
    look, looked = getattr(known.KnownKeys, amid), []
    with capturing(settings) as capture:

        def stopping(keys: known.KnownKeys, first: Any, second: Any, *more: Any) -> Any:
            if threading.current_thread().name.startswith("resnapshot"):
                return None  # all is left to the stream
            if amid == "older":
                return look(keys, first, capture._stop.set, *more)
            capture._stop.set()
            looked.append(look(keys, first, second, *more))
            return None

        capture.hear("streaming from")
        capture.reach()
        monkeypatch.setattr(known.KnownKeys, amid, stopping)
        unseen(settings, "DELETE FROM items WHERE id = 1")
        with suppress(HeadraceError):  # it may end before it answers
            ask(settings, tables=[T])
        capture.join()
    assert (phases(settings)[T], looked) == ("waiting", [])
    assert b'{"id":1}' in replay(settings, T)
    monkeypatch.setattr(known.KnownKeys, amid, look)
    with capturing(settings) as capture:
        done(settings, capture)
    assert replay(settings, T) == selected(settings, T)


def test_a_partition_that_was_added_is_no_fault_of_the_table_that_is_read_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer finds it when the chunk is committed: no cut may be, and capture says so (S9)."""
    settings = replace(settings, partitions=2)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 2000) i")
    often = {"topic.metadata.refresh.interval.ms": 50}  # by itself a producer looks every five minutes
    monkeypatch.setattr(kafka, "producer", partial(kafka.producer, **often))
    capture = Running(settings)

    def refused() -> bool:
        with suppress(HeadraceError):  # it may have ended
            Control(Log(settings)).ask("capture", "resnapshot", {"tables": [T]}, 5.0)
        return capture.error is not None or phases(settings).get(T) == "failed"

    try:
        capture.hear("streaming from")
        capture.reach()
        add_partition(settings, Log(settings).topic_of(T))
        eventually("it is refused", refused)
    finally:
        capture.stop()
    assert isinstance(capture.error, Misconfigured)
    assert capture.error.code == "partitions-changed"
    assert not any("cannot be read again" in line for line in capture.said)
