"""Topics, records, checkpoints and schemas that somebody deleted: one command mends the log."""

from __future__ import annotations

from contextlib import closing

import pytest

from headrace.control import Control
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.log.topics import checkpoints_topic, schemas_topic
from headrace.settings import Settings
from headrace_capture import catalog, setup
from headrace_capture.recovery import recover
from tests.fixtures.capture import Running, capturing, eventually, execute, prepare, refused, replay, rows, selected
from tests.fixtures.plain import Plain
from tests.fixtures.recoveries import ITEMS, T, capture_for_a_while, delete, delete_checkpoints, mends, never_back
from tests.fixtures.removed import delete_records
from tests.fixtures.serving import serving
from tests.fixtures.slots import await_free, drop_slot


@pytest.fixture
def captured(settings: Settings) -> Settings:
    """A source that was captured for a while."""
    capture_for_a_while(settings)
    return settings


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made anew"])
def test_a_topic_that_was_deleted(captured: Settings, again: bool) -> None:
    delete(captured, Log(captured).topic_of(T))
    if again:
        Log(captured).ensure_table(T)
    execute(captured, "DELETE FROM items WHERE id = 3")
    mends(captured, "log-lost-records" if again else "topic-missing")


def remove_records(settings: Settings, topic: str, left: int = 3) -> int:
    """Remove what a topic of one partition has, but for its last offsets; return where it begins then."""
    (end,) = Log(settings).topics.ends({topic: 1})[topic]
    delete_records(settings, topic, 0, end - left)
    return end - left


def test_records_that_somebody_removed(captured: Settings) -> None:
    """The topic ends where it did, and nobody can read it from zero: it is made anew, and a view that is built then shows all."""
    old = Log(captured).topics.describe([Log(captured).topic_of(T)])
    begin = remove_records(captured, *old)
    execute(captured, "DELETE FROM items WHERE id = 3")
    assert f"before {begin} " in mends(captured, "log-lost-records").message
    assert Log(captured).topics.describe(old) != old
    delete_checkpoints(captured)
    remove_records(captured, *old)
    assert refused(captured).code == "checkpoints-missing"
    recover(captured, lambda _: None)
    with capturing(captured) as capture:
        assert capture.reach().inexact == ()
    assert replay(captured, T) == selected(captured, T)


def test_a_running_capture_that_needs_records_which_somebody_removed_says_so(settings: Settings) -> None:
    """It took that for a Kafka that is away, and waited for ever, while the slot kept WAL."""
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, 'n' FROM generate_series(1, 30) i")
    running = Running(settings)
    try:
        running.hear("streaming")
        running.reach()
        remove_records(settings, Log(settings).topic_of(T))
        Control(Log(settings)).ask("capture", "resnapshot", {"tables": [T]}, timeout=60)
        assert "headrace resnapshot --recover" in running.hear("public.items cannot be read again")
        execute(settings, "TRUNCATE items", "INSERT INTO items VALUES (1, 'after')")
        eventually("it stops", lambda: running.error)
    finally:
        running.stop()
    assert isinstance(running.error, Misconfigured)
    assert running.error.code == "log-lost-records"
    mends(settings, "log-lost-records")


def test_nobody_misses_old_checkpoints_that_somebody_removed(captured: Settings) -> None:
    remove_records(captured, checkpoints_topic(captured.source))
    execute(captured, "DELETE FROM items WHERE id = 3")
    with capturing(captured) as capture:
        assert capture.reach().version.epoch == 1
    assert replay(captured, T) == selected(captured, T)


def test_schemas_that_were_deleted(captured: Settings) -> None:
    """Records of shapes that nobody knows any more cannot be read from zero: their topic is made anew, and versions begin again.

    Shapes of which some were removed are mended by that: their topic is to be deleted."""
    old = Log(captured).topics.describe([Log(captured).topic_of(T)])
    remove_records(captured, schemas_topic(captured.source), left=0)
    error = refused(captured)
    assert (error.code, "Delete the topic" in error.remedy) == ("log-lost-records", True)
    delete(captured, schemas_topic(captured.source))
    execute(captured, "ALTER TABLE items ADD COLUMN more text", "DELETE FROM items WHERE id = 3")
    mends(captured, "schemas-missing")
    assert Log(captured).topics.describe(old) != old
    assert [len(shape.columns) for shape in Log(captured).schemas().values()] == [3]


def test_checkpoints_and_schemas_that_were_deleted(captured: Settings) -> None:
    """Nothing tells how far the log goes, nor what its records are: both are mended by the same command."""
    delete_checkpoints(captured)
    delete(captured, schemas_topic(captured.source))
    execute(captured, "DELETE FROM items WHERE id = 3")
    assert refused(captured).code == "checkpoints-missing"
    recover(captured, lambda _: None)
    with capturing(captured) as capture:
        execute(captured, "INSERT INTO items VALUES (31, 'new')")
        assert capture.reach().inexact == ()
    assert replay(captured, T) == selected(captured, T)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("slot", [True, False], ids=["slot kept", "slot dropped"])
def test_checkpoints_that_were_deleted(settings: Settings, slot: bool, chunked: bool) -> None:
    """The topics with the rows stay, what vanished meanwhile gets its delete, and a view that runs all the time goes on by itself."""
    items = (
        "CREATE TABLE items (id int PRIMARY KEY, n int)",
        "INSERT INTO items SELECT i, i FROM generate_series(1, 30) i",
    )
    prepare(settings, *items, "CREATE TABLE dropped (id int PRIMARY KEY)", "INSERT INTO dropped VALUES (1)")
    log, view = Log(settings), Plain(settings, "plain")
    with serving(settings, plain=Plain):
        with capturing(settings) as capture:
            capture.reach()
            eventually("the view shows it", lambda: len(view.rows()) == 30)
        topics = log.topics.describe([log.topic_of(T), log.topic_of("public.dropped")])
        delete_checkpoints(settings)
        if not slot:
            drop_slot(settings)
        execute(
            settings, "DELETE FROM items WHERE id = 3", "UPDATE items SET n = -1 WHERE id = 5", "DROP TABLE dropped"
        )
        error = refused(settings, chunked=chunked)
        assert error.code == "checkpoints-missing"
        assert "headrace resnapshot --recover" in error.remedy
        begun = recover(settings, lambda _: None)
        assert (begun.version.epoch, begun.snapshot) == (2, "running")
        with capturing(settings, chunked=chunked) as capture:
            execute(settings, "UPDATE items SET n = -2 WHERE id = 7")
            capture.hear("snapshot is complete" if chunked else "snapshot complete")
            execute(settings, "INSERT INTO items VALUES (31, 31)")
            assert capture.reach().inexact == ()
            truth = {f'{{"id":{id_}}}': n for id_, n in rows(settings, "SELECT id, n FROM items")}
            eventually("the view shows it", lambda: view.rows() == truth)
    assert log.topics.describe(topics) == topics
    assert replay(settings, T) == selected(settings, T)
    assert replay(settings, "public.dropped") == {}
    assert never_back(settings, T)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_checkpoints_that_were_deleted_with_an_append_only_table_in_the_log(
    settings: Settings, *, chunked: bool
) -> None:
    """Its rows are written anew under other positions, and the old ones deleted: it is exact."""
    execute(settings, "CREATE TABLE log (what text)", "INSERT INTO log VALUES ('before')")
    with closing(catalog.connect(settings.dsn)) as connection:
        setup.apply(connection, setup.plan(connection, settings, [], appended=["log"]))
    with capturing(settings) as capture:
        execute(settings, "INSERT INTO log VALUES ('beside')")
        capture.reach()
    delete_checkpoints(settings)
    execute(settings, "INSERT INTO log VALUES ('meanwhile')")
    assert refused(settings).code == "checkpoints-missing"
    recover(settings, lambda _: None)
    with capturing(settings, chunked=chunked) as capture:
        capture.hear("snapshot is complete" if chunked else "snapshot complete")
        execute(settings, "INSERT INTO log VALUES ('after')")
        eventually("every table is exact", lambda: capture.reach().inexact == ())
    found = sorted(row["what"] for row in replay(settings, "public.log").values())
    assert found == ["after", "before", "beside", "meanwhile"]


def test_a_view_of_a_topic_that_was_made_anew_asks_to_be_rebuilt(settings: Settings) -> None:
    """Its offsets mean nothing in the new one, and rows that are gone have no tombstone there."""
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n int)", "INSERT INTO items VALUES (1, 1), (2, 2)")
    log = Log(settings)
    with serving(settings, plain=Plain) as control:
        view = Plain(settings, "plain")
        with capturing(settings) as capture:
            capture.reach()
            eventually("the view shows it", lambda: view.rows() == {'{"id":1}': 1, '{"id":2}': 2})
        log.topics.delete([log.topic_of(T)])
        eventually("it is gone", lambda: log.topic_of(T) not in log.topics.names())
        execute(settings, "DELETE FROM items WHERE id = 2")
    await_free(settings)
    recover(settings, lambda _: None)
    with capturing(settings) as capture, serving(settings, plain=Plain) as control:
        capture.hear("public.items was read again")
        codes = lambda: {report.code for report in control.reports().get("plain", [])}  # noqa: E731  short
        eventually("the view refuses", lambda: "topic-replaced" in codes())
        assert view.rows() == {'{"id":1}': 1, '{"id":2}': 2}
        generation = control.ask("plain", "rebuild")["generation"]
        eventually("it is built", lambda: view.version(generation).epoch == 2)
        control.ask("plain", "promote", {"generation": generation}, timeout=60)
        assert view.rows() == {'{"id":1}': 1}
