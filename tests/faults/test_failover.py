"""A source that is another server than before (S2): a standby that was promoted, a backup that was restored."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from headrace.change import Row
from headrace.control import Control
from headrace.documents import Document, DocumentConsumer, Node
from headrace.errors import Misconfigured, Transient
from headrace.log import Log
from headrace.stores.duckdb import DuckDBStore
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace.stores.kafka import KafkaTopic
from headrace.stores.redis import RedisPages
from headrace_capture import catalog, teardown
from headrace_capture.capture import Capture
from headrace_verify.verify import Verifier
from tests.fixtures.capture import capturing, changes, eventually, execute, prepare, refused
from tests.fixtures.pair import ITEMS, Pair, T, equal, mend, seen
from tests.fixtures.versions import NEWEST, OLDER


class Found(DocumentConsumer):
    document = Document(T)
    store = ElasticsearchIndex("failover-found", mappings={"properties": {"n": {"type": "integer"}}})

    def render(self, row: Node) -> Row:
        return {"n": row["n"]}


class Streamed(Found):
    store = KafkaTopic("failover-streamed")


class Paged(DocumentConsumer):
    document = Document(T)
    store = RedisPages("failover-paged")

    def render(self, row: Node) -> Row:
        return {"html": str(row["n"])}


class Tables(DuckDBStore):
    """The built-in one without its endpoint."""


OF_EVERY_STORE: dict[str, type[Any]] = {"found": Found, "streamed": Streamed, "paged": Paged, "tables": Tables}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pair", ["17", NEWEST], indirect=True)  # before, there are no failover slots
def test_a_standby_with_the_slot_takes_over(pair: Pair) -> None:
    """A failover slot: capture goes on where the log ends, in the same epoch, and nothing is read again."""
    pair.copy(standby=True)
    with capturing(pair.settings) as capture:
        capture.reach()
    with seen(pair.settings) as view:
        with capturing(pair.settings) as capture:
            capture.hear("streaming")
            execute(pair.settings, "UPDATE items SET n = -n WHERE id < 5", "DELETE FROM items WHERE id = 6")
            pair.sync_slot(capture)
        pair.follow()
        pair.promote()
        execute(pair.after, "DELETE FROM items WHERE id = 7", "INSERT INTO items VALUES (100, 100)")
        with capturing(pair.after) as capture:
            capture.hear("timeline 2 goes on from timeline 1")
            equal(pair.after, capture, view)
    assert {change.version.epoch for change in changes(pair.after, T)} == {1}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pair", [*OLDER, NEWEST], indirect=True)
def test_a_standby_without_the_slot_takes_over(pair: Pair) -> None:
    """Nothing was lost by the failover, but what came since is not in the log: said, and mended by one command."""
    pair.copy(standby=True, slots=False)
    with capturing(pair.settings) as capture:
        capture.reach()
    with seen(pair.settings) as view:
        execute(pair.settings, "DELETE FROM items WHERE id = 6")
        pair.follow()
        pair.promote()
        execute(pair.after, "DELETE FROM items WHERE id = 7", "INSERT INTO items VALUES (100, 100)")
        mend(pair.after, "slot-missing", view)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("elasticsearch", "redis_server")
def test_a_standby_that_lacks_what_was_published(pair: Pair) -> None:
    """The log has transactions that the new server never had, and their LSNs are used again: a new epoch takes them back,
    in every store, whatever its LSNs."""
    pair.copy(standby=True)
    with capturing(pair.settings) as capture:
        capture.reach()
    with seen(pair.settings, **OF_EVERY_STORE) as view:
        pair.follow()
        pair.second.stop()
        with capturing(pair.settings) as capture:
            capture.hear("streaming")
            execute(
                pair.settings,
                "INSERT INTO items SELECT i, 0 FROM generate_series(200, 3000) i",
                "UPDATE items SET n = -n",
            )
            capture.reach()
        eventually("the view has what will be lost", lambda: len(view.rows()) > 2000)
        pair.first.kill()
        pair.second.start()
        pair.promote()
        execute(pair.after, "UPDATE items SET n = 7 WHERE id = 7", "INSERT INTO items VALUES (100, 100)")
        before = mend(pair.after, "timeline-diverged", view, **OF_EVERY_STORE)
        assert view.version(1).lsn < before.lsn


@pytest.mark.timeout(300)
def test_a_standby_takes_over_between_the_look_at_the_server_and_the_stream(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lacks what was published and has the slot, which goes on wherever it is told to: nothing is streamed from there."""
    pair.copy(standby=True)
    with capturing(pair.settings) as capture:
        pair.sync_slot(capture)
        pair.follow()
        pair.second.stop()
        execute(pair.settings, "INSERT INTO items SELECT i, 0 FROM generate_series(200, 3000) i")
        before = capture.reach()
    stream = Capture._stream

    def late(of: Capture, *args: Any) -> None:
        if of._settings is pair.settings:
            pair.first.kill()
            pair.second.start()
            pair.promote()
            execute(pair.after, "UPDATE items SET n = 7 WHERE id = 7")
            of._settings = pair.after
        stream(of, *args)

    monkeypatch.setattr(Capture, "_stream", late)
    assert refused(pair.settings).code == "timeline-diverged"
    after = Log(pair.settings).newest_checkpoint()
    assert after
    assert (after.version, after.source) == (before.version, before.source)


@pytest.mark.timeout(300)
def test_a_server_made_from_a_dump(pair: Pair) -> None:
    """Its LSNs have nothing to do with those of the log, and are lower; nor are its rows those of the log's end."""
    execute(pair.settings, "SELECT pg_switch_wal()")  # to the next file
    with capturing(pair.settings) as capture:
        capture.reach()
    with seen(pair.settings) as view:
        pair.first.kill()
        pair.second.start()
        prepare(pair.after, ITEMS, "INSERT INTO items SELECT i, -i FROM generate_series(5, 40) i")
        before = mend(pair.after, "other-source", view)
        assert view.version(1).lsn < before.lsn


@pytest.mark.timeout(300)
def test_a_restored_copy_on_the_same_timeline(pair: Pair) -> None:
    """Older data, the slot within: the log is beyond its server."""
    with capturing(pair.settings) as capture:
        capture.reach()
    pair.copy(standby=False)
    with capturing(pair.settings) as capture:
        capture.hear("streaming")
        execute(
            pair.settings,
            "INSERT INTO items SELECT i, 0 FROM generate_series(200, 3000) i",
            "DELETE FROM items WHERE id = 1",
        )
        capture.reach()
    with seen(pair.settings) as view:
        pair.first.kill()
        pair.second.start()
        mend(pair.after, "source-behind-log", view)


@pytest.mark.timeout(300)
def test_a_standby_is_no_source_yet(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be about to promote it, or the address leads to several: capture that has run before waits for the primary."""
    pair.copy(standby=True)
    error = refused(pair.after)
    assert (error.code, error.exit_code) == ("postgres-standby", Transient.exit_code)
    connect, standbys = catalog.connect_replication, iter([False, False, True])  # two looks, then the stream

    def balanced(dsn: str, *, name: str) -> catalog.Connection:
        return connect(pair.after.dsn if next(standbys, False) else dsn, name=name)

    with capturing(pair.settings) as capture:
        capture.hear("streaming")
        monkeypatch.setattr(catalog, "connect_replication", balanced)
        execute(
            pair.settings,
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_type = 'logical'",
        )
        capture.hear("standby")
        execute(pair.settings, "DELETE FROM items WHERE id = 6")
        capture.reach()
    verifier = Verifier(Log(pair.after), Control(Log(pair.after)), lambda *_: None, 60)
    with pytest.raises(Misconfigured) as refusal:
        list(verifier.verify({}))
    assert refusal.value.code == "postgres-standby"
    with closing(catalog.connect(pair.after.dsn)) as standby, pytest.raises(Misconfigured) as refusal:
        teardown.plan(standby, pair.after)
    assert refusal.value.code == "postgres-standby"
