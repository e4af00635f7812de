"""S5: no cut is open while capture looks for dead keys among all that a topic has, which may take minutes and writes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from headrace.errors import Misconfigured
from headrace.log import CutWriter, Log
from headrace.settings import Settings
from headrace_capture import known, live, snapshot, spool, stream, writing
from tests.fixtures.capture import capturing, execute, prepare, refused, replay, selected
from tests.fixtures.resnapshots import T, ask, done, unseen

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, no int)"
OTHERS = "CREATE TABLE others (id int PRIMARY KEY, no int)"
ROWS = "INSERT INTO {} SELECT i, i FROM generate_series(1, 60) i"

pytestmark = pytest.mark.usefixtures("blind")


class Seen(Log):
    """A log whose writer a test can look at."""

    made: CutWriter

    def writer(self) -> CutWriter:
        self.made = super().writer()
        return self.made


@pytest.fixture
def watched(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Seen, list[bool]]]:
    """Return what makes a log, and a list that tells of each look for keys whether a cut was open then."""

    def make() -> tuple[Seen, list[bool]]:
        log, opened = Seen(settings), []

        def note(statement: str) -> None:
            if "WHERE key > " in statement:
                opened.append(bool(log.made.opened_at))

        def watch(kind: Any) -> None:
            begin = kind.__init__

            def begun(self: Any, *args: Any) -> None:
                begin(self, *args)
                self._db.set_trace_callback(note)

            monkeypatch.setattr(kind, "__init__", begun)

        for module, kind in ((known, known.KnownKeys), (live, live.LiveKeys)):
            monkeypatch.setattr(module, "_BUNCH", 7)
            watch(kind)
        return log, opened

    return make


def test_at_the_end_of_a_pass(settings: Settings, watched: Callable[[], tuple[Seen, list[bool]]]) -> None:
    prepare(settings, ITEMS, ROWS.format("items"))
    log, opened = watched()
    with capturing(settings, log) as capture:
        capture.reach()
        unseen(settings, "DELETE FROM items WHERE id % 3 = 0", "UPDATE items SET no = -no WHERE id % 10 = 5")
        ask(settings, tables=[T])
        done(settings, capture)
    assert len(opened) > 2
    assert not any(opened)
    assert replay(settings, T) == selected(settings, "items")


def test_at_the_end_of_a_snapshot_that_began_again(
    settings: Settings, watched: Callable[[], tuple[Seen, list[bool]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(settings, ITEMS, OTHERS, ROWS.format("items"), ROWS.format("others"))

    def ends(*_: Any) -> None:
        raise Misconfigured("killed", "The process ends here.")

    with monkeypatch.context() as killed:
        killed.setattr(snapshot.Snapshot, "_remove_older", ends)
        assert refused(replace(settings, cut_records=1)).code == "killed"
    execute(settings, "DELETE FROM items WHERE id % 3 = 0", "DELETE FROM others WHERE id % 3 = 0")
    assert not stopped_amid_a_look(settings, monkeypatch), "it looks to the end, and only then whether it is to stop"
    log, opened = watched()
    with capturing(settings, log) as capture:
        capture.reach()
    assert len(opened) > 2
    assert not any(opened)
    for table in ("items", "others"):
        assert replay(settings, f"public.{table}") == selected(settings, table)


def stopped_amid_a_look(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> list[list[bytes]]:
    """Ask capture to stop amid its look for keys that are to be deleted; return what it has found none the less."""
    each, known_by_then = live.LiveKeys.each, threading.Event()
    looked = []

    def stopping(keys: live.LiveKeys, *how: Any) -> list[bytes]:
        known_by_then.wait()
        capture._stop.set()
        looked.append(list(each(keys, *how)))
        return looked[-1]

    with monkeypatch.context() as patched:
        patched.setattr(spool, "_STEPS", 1)
        patched.setattr(live.LiveKeys, "each", stopping)
        with capturing(settings) as capture:
            known_by_then.set()
            capture.join()
    return looked


def test_an_old_cut_ends_while_a_chunk_is_written(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few records it has: looking up what the log has of their keys may take long."""
    monkeypatch.setattr(writing, "LONGEST_SECONDS", 0.0)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 4000) i")
    with capturing(settings) as capture:
        capture.reach()
        unseen(settings, "UPDATE items SET no = -no")
        ask(settings, tables=[T])
        done(settings, capture)
    ends = [sum(c.ends[Log(settings).topic_of(T)]) for c in Log(settings).checkpoints() if c.partial]
    assert max(after - before for before, after in pairwise(ends)) <= 1024 + 1, "rows, and the mark of each cut"
    assert replay(settings, T) == selected(settings, "items")


def test_an_old_cut_ends_amid_a_truncate(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few deletes it has: where Kafka is slow, as many as fill a cut outlast its transaction, every time anew (S5)."""
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 50) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        monkeypatch.setattr(stream, "LONGEST_SECONDS", 0.0)
        execute(settings, "TRUNCATE items", "INSERT INTO items VALUES (1, 2)")
        capture.reach()
    ends = [sum(c.ends[Log(settings).topic_of(T)]) for c in Log(settings).checkpoints() if c.partial]
    assert len(ends) >= 50
    assert max(after - before for before, after in pairwise(ends)) <= 2 + 1, (
        "a delete with its tombstone, and the mark of each cut"
    )
    assert replay(settings, T) == selected(settings, "items")
