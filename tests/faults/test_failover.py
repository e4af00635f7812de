"""A source that is another server than before (S2): a standby that was promoted, a backup that was restored.

The servers are this file's own: two of them, one made as a copy of the other.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from headrace.change import Checkpoint, Row, Version
from headrace.control import Control
from headrace.documents import Document, DocumentConsumer, Node
from headrace.errors import Misconfigured, Transient
from headrace.log import CutWriter, Log
from headrace.settings import Settings
from headrace.stores.duckdb import DuckDBStore
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace.stores.kafka import KafkaTopic
from headrace.stores.redis import RedisPages
from headrace_capture import catalog, teardown
from headrace_capture.capture import Capture
from headrace_capture.recovery import recover
from headrace_ops import artifacts, guard
from headrace_ops.postgres import Postgres
from headrace_verify.verify import Verifier
from tests.fixtures.capture import (
    Running,
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
from tests.fixtures.mortal import Died, Life, MortalLog
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving
from tests.fixtures.versions import NEWEST, OLDER

T = "public.items"
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, n int)"


class Pair:
    """A server and its copy; `settings` lead to the first."""

    def __init__(self, first: Postgres, second: Postgres, settings: Settings) -> None:
        self.first, self.second = first, second
        self.first.start()
        self.settings = replace(settings, dsn=self.first.dsn("postgres"))
        self.after = replace(settings, dsn=self.second.dsn("postgres"))

    def copy(self, *, standby: bool, slots: bool = True) -> None:
        """Copy the data; as a standby it follows the first from now on, with its failover slots or without."""
        self.first.stop()
        self.second.data.parent.mkdir(parents=True)
        copied = ["/bin/cp", "-a", str(self.first.data), str(self.second.data)]
        subprocess.run(copied, check=True)
        if standby:
            (self.second.data / "standby.signal").write_text("")
            with (self.second.data / "postgresql.conf").open("a") as conf:
                leader = f"host=127.0.0.1 port={self.first.port} user=postgres dbname=postgres"
                conf.write(f"primary_conninfo = '{leader}'\nprimary_slot_name = 'standby'\nhot_standby_feedback = on\n")
                conf.write("sync_replication_slots = on\n" * slots)
        self.first.start()
        if standby:
            execute(self.settings, "SELECT pg_create_physical_replication_slot('standby', true)")
            self.second.start()

    def follow(self) -> None:
        """Wait until the standby has all that the first has written."""
        (lsn,) = rows(self.settings, "SELECT pg_current_wal_flush_lsn()::text")[0]
        behind = f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'"
        eventually("the standby follows", lambda: rows(self.after, behind) == [(True,)])

    def sync_slot(self, capture: Running) -> None:
        """Wait until the standby has the slot."""
        synced = f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{self.settings.slot}' AND NOT temporary"

        def there() -> bool:
            execute(self.settings, "SELECT pg_log_standby_snapshot()")  # what makes a slot move on
            capture.reach()
            return bool(rows(self.after, synced))

        eventually("the slot is there too", there)

    def promote(self) -> None:
        """Lose the first; the second takes over."""
        self.first.kill()
        assert rows(self.after, "SELECT pg_promote()") == [(True,)]


@pytest.fixture
def pair(settings: Settings, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two servers, of the newest version or the one that is asked for, the first with a table of twenty rows."""
    version = OLDER.get(getattr(request, "param", NEWEST))
    artifact = artifacts.postgres(version) if version else artifacts.POSTGRES
    own = partial(guard.temporary, "headrace-tests-", ["postgres"])
    with own() as first, own() as second:
        servers = [Postgres(folder, artifact=artifact, spread=True) for folder in (first, second)]
        made = Pair(*servers, settings)
        prepare(made.settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 20) i")
        yield made


class HalfLog(MortalLog):
    """A log whose capture dies when the first cut with a part of a transaction, or of the initial snapshot, is there."""

    def __init__(self, settings: Settings) -> None:
        self._end = (life := Life()).end
        super().__init__(settings, life)

    def writer(self) -> CutWriter:
        writer = super().writer()
        seal = writer.seal

        def sealing(**named: Any) -> Checkpoint:
            sealed = seal(**named)
            if not sealed.complete and any(map(any, sealed.ends.values())):
                self._end()
            return sealed

        writer.seal = sealing  # type: ignore[method-assign]
        return writer


def captured_by_half(settings: Settings) -> Checkpoint:
    """Run capture until it dies; return its last checkpoint."""
    settings = replace(settings, cut_records=1000)
    running = Running(settings, HalfLog(settings))
    running.join()
    assert isinstance(running.error, Died), running.error
    newest = Log(settings).newest_checkpoint()
    assert newest
    return newest


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


@contextmanager
def seen(settings: Settings, **others: type[Any]) -> Iterator[Plain]:
    """A view of the log, and others, from before what happens until after it."""
    with serving(settings, plain=Plain, **others) as control:
        view = Plain(settings, "plain")
        await_live(control, "plain", *others)
        eventually("it shows all rows", lambda: len(view.rows()) >= 20)
        yield view


def equal(settings: Settings, running: Running, view: Plain) -> None:
    """Log and view are the table."""
    running.reach()
    expected = {key.decode(): row["n"] for key, row in selected(settings, "items").items()}
    assert {key.decode(): row["n"] for key, row in replay(settings, T).items()} == expected
    eventually("the view shows it", lambda: view.rows() == expected)


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


def mend(settings: Settings, code: str, view: Plain, **others: type[Any]) -> Version:
    """Capture refuses with `code`; the command that it names mends log and views. Return where the view was before."""
    error = refused(settings)
    assert error.code == code
    assert "headrace resnapshot --recover" in error.remedy
    before = view.version(1)
    recover(settings, lambda _: None)
    with capturing(settings) as capture:
        capture.hear("public.items was read again")
        equal(settings, capture, view)
        log = Log(settings)
        for name, consumer in others.items():
            (outcome,) = Verifier(log, Control(log), lambda *_: None, 60).verify({name: consumer})
            with closing(outcome):
                assert (outcome.rows, [*outcome.wrong(), *outcome.undecided()]) == (len(view.rows()), []), name
    assert (before.epoch, view.version(1).epoch) == (1, 2)
    return before


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


BIG = "INSERT INTO items SELECT i, 0 FROM generate_series(200, 20000) i"


@pytest.mark.timeout(300)
def test_a_standby_that_lacks_a_transaction_of_which_the_log_has_a_half(pair: Pair) -> None:
    """It has all that is whole in the log, and its slot: the half is refused all the same, and taken back (S5)."""
    pair.copy(standby=True)
    with capturing(pair.settings) as capture:
        pair.sync_slot(capture)
    with seen(pair.settings) as view:
        pair.follow()
        pair.second.stop()
        execute(pair.settings, BIG)
        assert captured_by_half(pair.settings).partial
        pair.first.kill()
        pair.second.start()
        pair.promote()
        execute(pair.after, "UPDATE items SET n = 7 WHERE id = 7", "INSERT INTO items VALUES (100, 100)")
        mend(pair.after, "timeline-diverged", view)


@pytest.mark.timeout(300)
def test_a_restored_copy_has_overtaken_a_transaction_of_which_the_log_has_a_half(pair: Pair) -> None:
    """What it sends instead is not taken for the rest, nor for what comes before: it is refused as often as capture starts."""
    with capturing(pair.settings) as capture:
        capture.reach()
    pair.copy(standby=False)
    with seen(pair.settings) as view:
        execute(pair.settings, BIG)
        half = captured_by_half(pair.settings)
        assert half.partial
        pair.first.kill()
        pair.second.start()
        execute(pair.after, BIG.replace("20000", "5000"))
        while now(pair.after) <= half.partial[0]:
            execute(pair.after, "SELECT pg_switch_wal()", "CREATE TABLE IF NOT EXISTS other (id int)")
        execute(pair.after, "DROP TABLE other", "DELETE FROM items WHERE id = 7")
        assert refused(replace(pair.after, cut_records=1000)).code == "partial-missing"
        mend(pair.after, "partial-missing", view)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("chunked", [False, True], ids=["at once", "chunked"])
@pytest.mark.parametrize("promoted", [False, True], ids=["restored", "promoted"])
def test_an_initial_snapshot_starts_again_on_a_server_that_is_behind(
    pair: Pair, *, promoted: bool, chunked: bool
) -> None:
    """What the first attempt published has versions above all that the second server has; nothing of it stays (S6)."""
    pair.copy(standby=promoted, slots=False)
    with serving(pair.settings, plain=Plain):
        view = Plain(pair.settings, "plain")
        if promoted:
            pair.follow()
            pair.second.stop()
        execute(pair.settings, BIG, "UPDATE items SET n = -n", "DELETE FROM items WHERE id = 6")
        before = captured_by_half(pair.settings)
        assert before.snapshot == "running"
        pair.first.kill()
        pair.second.start()
        if promoted:
            pair.promote()
            while now(pair.after) <= before.version.lsn:  # only the timeline tells that it was behind
                execute(pair.after, "SELECT pg_switch_wal()", "UPDATE items SET n = 7 WHERE id = 7")
        execute(pair.after, "INSERT INTO items VALUES (100, 100)")
        with capturing(pair.after, chunked=chunked) as capture:
            capture.hear("streaming")
            assert not any("nothing was lost" in line for line in capture.said)
            execute(pair.after, "DELETE FROM items WHERE id = 8")
            equal(pair.after, capture, view)
        assert view.version(1).epoch == 2


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
