"""Log and source have parted (I12, S2): capture says how, and one command mends it: the log equals Postgres again, tombstones too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import orjson
import pytest
import typer
from typer.testing import CliRunner

from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.settings import Settings, environment
from headrace_capture import beginnings, catalog, setup, teardown
from headrace_capture.recovery import recover
from headrace_capture.resnapshot_cli import resnapshot
from tests.fixtures.capture import (
    capturing,
    changes,
    eventually,
    execute,
    now,
    prepare,
    refused,
    replay,
    rows,
    selected,
)
from tests.fixtures.plain import Plain
from tests.fixtures.recoveries import ITEMS, T, capture_for_a_while, delete_checkpoints, mends
from tests.fixtures.serving import await_live, serving
from tests.fixtures.slots import await_free, drop_slot, lose_slot
from tests.fixtures.versions import NEWEST, OLDER


@pytest.fixture
def captured(settings: Settings) -> Settings:
    """A source that was captured for a while."""
    capture_for_a_while(settings)
    return settings


def recreate_slot(settings: Settings) -> None:
    drop_slot(settings)
    execute(settings, "INSERT INTO items VALUES (98, 'between')")
    execute(settings, f"SELECT pg_create_logical_replication_slot('{settings.slot}', 'pgoutput')")


def advance_slot(settings: Settings) -> None:
    execute(settings, "INSERT INTO items VALUES (98, 'between')")
    execute(settings, f"SELECT pg_replication_slot_advance('{settings.slot}', pg_current_wal_lsn())")


def test_a_recovery_prints_one_document_for_scripts(captured: Settings) -> None:
    app = typer.Typer()
    app.command()(resnapshot)
    ended = CliRunner().invoke(app, ["--recover", "--json"], env=environment(captured))
    said = orjson.loads(ended.stdout)
    assert (ended.exit_code, said["epoch"], said["snapshot"]) == (0, 2, False)


@pytest.mark.parametrize(
    ("each_postgres", "part", "code"),
    [
        (NEWEST, drop_slot, "slot-missing"),
        (NEWEST, advance_slot, "slot-beyond-checkpoint"),
        *[(version, recreate_slot, "slot-beyond-checkpoint") for version in (*OLDER, NEWEST)],
        *[(version, lose_slot, "slot-lost") for version in (*OLDER, NEWEST)],
    ],
    indirect=["each_postgres"],
)
def test_a_slot_that_no_longer_fits(each_version: Settings, part: Callable[[Settings], None], code: str) -> None:
    """What changed and vanished while nobody listened is in the log afterwards, under a new epoch."""
    settings = each_version
    capture_for_a_while(settings)
    execute(settings, "DELETE FROM items WHERE id % 10 = 3", "UPDATE items SET name = 'gap' WHERE id % 10 = 5")
    part(settings)
    execute(settings, "INSERT INTO items VALUES (99, 'gap')")
    error = mends(settings, code)
    assert code != "slot-lost" or "removed" in error.message, "also before 17, which does not tell why"
    assert {c.version.epoch for c in changes(settings, T) if c.key == b'{"id":3}' and c.row is None} == {2}


def test_a_new_epoch_is_above_every_one_that_the_log_or_a_view_has_seen(captured: Settings) -> None:
    """Also when an epoch left no record: capture itself reported it, and does at its next start."""
    recover(captured, lambda _: None)
    execute(captured, "TRUNCATE items")
    with capturing(captured) as capture:
        capture.hear("was read again")
        capture.reach()
    await_free(captured)
    recover(captured, lambda _: None)
    with capturing(captured) as capture:
        capture.hear("was read again")
        capture.reach()
    await_free(captured)
    assert {c.version.epoch for c in changes(captured, T)} == {1, 2}
    delete_checkpoints(captured)
    assert refused(captured).code == "checkpoints-missing"
    assert recover(captured, lambda _: None).version.epoch == 4


def test_a_log_without_checkpoints_and_records_begins_as_a_new_one(settings: Settings) -> None:
    """There is nothing to recover, and nothing that could be wrong."""
    prepare(settings, ITEMS)
    with pytest.raises(Misconfigured) as nothing:
        recover(settings, lambda _: None)
    assert nothing.value.code == "nothing-captured"
    with capturing(settings) as capture:
        execute(settings, "INSERT INTO items VALUES (1, 'a')")
        capture.reach()
    assert replay(settings, T) == selected(settings, T)


def test_killed_after_its_slot_is_made_the_log_is_refused_though_the_wal_has_overtaken_it(
    captured: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server was restored from older data. To the old epoch the new slot would look right then, and changes be missing."""
    log = Log(captured)
    before = log.newest_checkpoint()
    assert before
    with closing(log.writer()) as writer:  # as of a server that was ahead
        writer.open()
        writer.resume(before)
        ahead = before.version._replace(lsn=now(captured) + 1_000_000)
        writer.seal(version=ahead, commit_ts=before.commit_ts, xid=0, source=before.source)
    assert refused(captured).code == "source-behind-log"
    with monkeypatch.context() as patch:
        patch.setattr(beginnings, "_floor", killed)
        with pytest.raises(RuntimeError, match="killed"):
            recover(captured, lambda _: None)
    execute(captured, "DELETE FROM items WHERE id = 2")
    execute(captured, "SELECT pg_logical_emit_message(false, 'much', repeat('x', 2000000))")
    assert refused(captured).code == "slot-beyond-checkpoint"
    assert recover(captured, lambda _: None).version.epoch == 3
    with capturing(captured) as capture:
        capture.hear("public.items was read again")
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
    assert replay(captured, T) == selected(captured, "items")


def killed(*_: object) -> str:
    raise RuntimeError("killed")


def test_it_refuses_while_capture_runs(captured: Settings, fresh_database: Callable[[], str]) -> None:
    """Also where the settings lead to another slot or database than its own: it would be fenced, and go on from their epoch."""
    elsewhere = replace(captured, dsn=fresh_database())
    prepare(elsewhere, ITEMS)
    with capturing(captured) as capture:
        capture.hear("streaming")
        for settings in (captured, replace(captured, slot=f"{captured.slot}_2"), elsewhere):
            with pytest.raises(Misconfigured, match="Stop `headrace capture`") as running:
                recover(settings, lambda _: None)
            assert running.value.code == "slot-active"
        capture.reach()
    assert {c.version.epoch for c in Log(captured).checkpoints()} == {1}


def test_recovered_twice_and_under_another_key(captured: Settings) -> None:
    """A key that changed needs a new topic: the same command makes it."""
    execute(captured, "ALTER TABLE items DROP CONSTRAINT items_pkey", "ALTER TABLE items ADD PRIMARY KEY (id, name)")
    recover(captured, lambda _: None)
    execute(captured, "DELETE FROM items WHERE id = 4")
    recover(captured, lambda _: None)
    with capturing(captured) as capture:
        capture.hear("public.items was read again")
        capture.reach()
    pairs = {(row["id"], row["name"]) for row in replay(captured, T).values()}
    assert pairs == set(rows(captured, "SELECT id, name FROM items"))
    assert {tuple(key) for key in (Log(captured).schemas()[T, 2].key,)} == {("id", "name")}


def test_a_table_that_lost_its_key_and_is_append_only_by_now_has_a_new_topic(captured: Settings) -> None:
    """Records under both kinds of key were in one topic, and no view that is joined by the old one asked to be rebuilt."""
    old = Log(captured).topics.describe([Log(captured).topic_of(T)])
    execute(captured, "ALTER TABLE items DROP CONSTRAINT items_pkey, REPLICA IDENTITY DEFAULT")
    with closing(catalog.connect(captured.dsn)) as connection:
        setup.apply(connection, setup.plan(connection, captured, [], appended=[T]))
    said: list[str] = []
    recover(captured, said.append)
    assert any("made anew" in line for line in said)
    assert Log(captured).topics.describe(old) != old
    made = Log(captured).topics.describe(old)
    recover(captured, lambda _: None)
    assert Log(captured).topics.describe(old) == made, "once is enough"
    with capturing(captured) as capture:
        capture.hear("public.items was read again")
        capture.reach()
    found = sorted((row["id"], row["name"]) for row in replay(captured, T).values())
    assert found == sorted(rows(captured, "SELECT id, name FROM items"))


def test_another_slot_leaves_the_one_before_and_says_so(captured: Settings) -> None:
    """Nobody reads it any more, and it keeps WAL."""
    said: list[str] = []
    other = replace(captured, slot=f"{captured.slot}_2")
    assert "--recover" in refused(other).remedy
    recover(other, said.append)
    drop = f"SELECT pg_drop_replication_slot('{captured.slot}')"
    assert any(line.endswith(drop) for line in said), said
    execute(captured, drop)
    with capturing(other) as capture:
        capture.hear("public.items was read again")
        capture.reach()
    await_free(other)
    said.clear()
    recover(other, said.append)
    assert not any("pg_drop" in line for line in said)


def test_tables_that_went_meanwhile(settings: Settings) -> None:
    """A dropped one has dead keys only; one that is no longer published, or has lost its key, stays as the log has it, this one inexact."""
    for name in ("dropped", "private", "keyless"):
        execute(settings, f"CREATE TABLE {name} (id int PRIMARY KEY)", f"INSERT INTO {name} VALUES (1)")
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        capture.reach()
    execute(
        settings,
        "DROP TABLE dropped",
        f"ALTER PUBLICATION {settings.publication} DROP TABLE private",
        "ALTER TABLE keyless DROP CONSTRAINT keyless_pkey",
    )
    await_free(settings)
    recover(settings, lambda _: None)
    with capturing(settings) as capture:
        capture.hear("public.dropped was read again")
        eventually("all is exact that can be", lambda: capture.reach().inexact == ("public.keyless",))
    left = {name: len(replay(settings, f"public.{name}")) for name in ("dropped", "private", "keyless")}
    assert left == {"dropped": 0, "private": 1, "keyless": 1}


def test_a_value_that_is_nowhere_is_no_reason_to_stop(settings: Settings) -> None:
    """Inserted while nobody listened, changed but for its large value, and gone: the change is left out, the log ends exact."""
    docs = (
        "CREATE TABLE docs (id int PRIMARY KEY, n int, big text)",
        "ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL",
    )
    prepare(settings, *docs, "INSERT INTO docs VALUES (1, 0, 'a')")
    execute(settings, "ALTER TABLE docs REPLICA IDENTITY DEFAULT")
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, f"INSERT INTO docs SELECT i, 0, '{'W' * 5000}' FROM generate_series(2, 9) i")
    await_free(settings)
    recover(settings, lambda _: None)
    execute(
        settings, "UPDATE docs SET n = n + 1", "UPDATE docs SET id = 20 WHERE id = 2", "DELETE FROM docs WHERE id > 5"
    )
    with capturing(settings) as capture:
        assert "nor in the log" in capture.hear("public.docs is inexact")
        capture.hear("public.docs was read again")
        eventually("it is exact", lambda: capture.reach().inexact == ())
    assert replay(settings, "public.docs") == selected(settings, "docs")


def test_an_append_only_table_is_written_anew(settings: Settings) -> None:
    """What its log had under the old epoch gives way to what Postgres has now (S10)."""
    execute(settings, "CREATE TABLE log (what text)", "INSERT INTO log VALUES ('before')", ITEMS)
    with closing(catalog.connect(settings.dsn)) as connection:
        setup.apply(connection, setup.plan(connection, settings, ["items"], appended=["log"]))
    with capturing(settings) as capture:
        execute(settings, "INSERT INTO log VALUES ('truncated later')")
        capture.reach()
    drop_slot(settings)
    execute(settings, "TRUNCATE log", "INSERT INTO log VALUES ('gap'), ('gap')")
    assert recover(settings, lambda _: None).inexact == (T, "public.log")
    with capturing(settings) as capture:
        execute(settings, "INSERT INTO log VALUES ('after')", "INSERT INTO items VALUES (1, 'a')")
        capture.hear("public.log was read again")
        eventually("all is exact", lambda: capture.reach().inexact == ())
    assert sorted(row["what"] for row in replay(settings, "public.log").values()) == ["after", "gap", "gap"]
    assert replay(settings, T) == selected(settings, T)


def test_a_view_of_a_log_begun_anew_takes_the_place_of_one_that_went_through_a_recovery(captured: Settings) -> None:
    """After a teardown with its topics: the new log is above every epoch that the old views have shown, and reported."""
    recover(captured, lambda _: None)
    log = Log(captured)
    with serving(captured, plain=Plain) as control, capturing(captured) as capture:
        capture.hear("public.items was read again")
        await_live(control, "plain")
        eventually("the view reports the new epoch", lambda: control.reports()["plain"][0].version.epoch == 2)
    await_free(captured)
    with closing(catalog.connect(captured.dsn)) as connection:
        teardown.run(connection, captured, teardown.plan(connection, captured))
    own = log.own_topics()
    log.delete_topics(own)
    eventually("they are gone", lambda: not log.topics.names() & set(own))
    prepare(captured)
    with capturing(captured) as capture:
        assert capture.reach().version.epoch == 3
        with serving(captured, plain=Plain) as control:
            eventually("the old one is refused", lambda: control.reports()["plain"][0].code == "topic-replaced")
            assert control.ask("plain", "rebuild") == {"generation": 2}
            eventually("the new one follows", lambda: control.reports()["plain"][-1].phase == "following")
            assert control.ask("plain", "promote")["generation"] == 2
    assert replay(captured, T) == selected(captured, T)
