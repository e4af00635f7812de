"""A table that is dropped, or gets another key, before it has been read again to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from headrace.errors import Misconfigured
from headrace.settings import Settings
from headrace_capture import resnapshot as beside
from headrace_capture.resnapshot_cli import resnapshot
from tests.fixtures.capture import Running, capturing, eventually, execute, prepare, replay, selected
from tests.fixtures.resnapshots import ITEMS, T, ask, commands, done, jobs, phases, reporting

__all__ = ["commands"]


@contextmanager
def in_the_middle(settings: Settings) -> Iterator[Running]:
    """Capture a table of some rows, half of which have been read again; the pass is paused."""
    settings = replace(settings, cut_records=5)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 12000) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        ask(settings, tables=[T])
        eventually("it reads", lambda: jobs(settings)[T]["rows"])
        assert ask(settings, "pause") == {"jobs": [T]}
        assert jobs(settings)[T]["after"]
        yield capture


@pytest.mark.parametrize("ddl", ["DROP TABLE items", "ALTER TABLE items RENAME TO others"])
def test_a_table_that_goes_in_the_middle_of_a_pass_keeps_no_row(settings: Settings, ddl: str) -> None:
    """Nor those that came or changed since the pass began."""
    with in_the_middle(settings) as capture:
        execute(settings, "INSERT INTO items VALUES (0, 0)", "UPDATE items SET no = 0 WHERE id = 12000")
        capture.reach()
        execute(settings, ddl)
        ask(settings, "resume")
        done(settings, capture)
        assert "public.items" not in capture.reach().inexact
    assert replay(settings, T) == {}


@pytest.mark.usefixtures("often")
def test_a_table_that_could_not_be_read_and_is_taken_out_keeps_no_initial_snapshot_waiting(settings: Settings) -> None:
    """All others were read: nothing is read, or mended, after it."""
    settings = replace(settings, message_max_bytes=100_000)
    large = "CREATE TABLE large (id int PRIMARY KEY, a text)", "INSERT INTO large VALUES (1, repeat('x', 200000))"
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 1)", *large)
    with capturing(settings, chunked=True) as capture:
        capture.eventually("one fails", lambda: phases(settings) == {T: "done", "public.large": "failed"})
        execute(settings, f"ALTER PUBLICATION {settings.publication} DROP TABLE large")
        capture.hear("the initial snapshot is complete")
        assert capture.reach().snapshot is None
    assert phases(settings)["public.large"] == "left"


@pytest.mark.usefixtures("often")
def test_what_could_not_be_read_of_a_table_that_is_taken_out_is_forgotten(settings: Settings) -> None:
    """Of one that the log knows it is noted that it left, of one that it never had nothing; the first is read when it comes back."""
    settings = replace(settings, message_max_bytes=100_000)
    never = f"never{'$' * 40}"  # Kafka takes no name that long
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, a text)", "INSERT INTO items VALUES (1, 'a')")
    publication = f"ALTER PUBLICATION {settings.publication}"
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"{publication} DROP TABLE items")
        capture.eventually("it has left", lambda: phases(settings) == {T: "left"})
        execute(
            settings, "INSERT INTO items VALUES (2, repeat('x', 200000))", f"CREATE TABLE {never} (id int PRIMARY KEY)"
        )
        execute(settings, f"{publication} ADD TABLE items, {never}")
        capture.eventually("both fail", lambda: phases(settings) == {T: "failed", f"public.{never}": "failed"})
        execute(settings, f"{publication} DROP TABLE items, {never}")
        capture.eventually("nothing failed any more", lambda: phases(settings) == {T: "left"})
        execute(settings, "DELETE FROM items WHERE id = 2", "INSERT INTO items VALUES (3, 'c')")
        execute(settings, f"{publication} ADD TABLE items")
        done(settings, capture)
        assert capture.reach().inexact == ()
    assert replay(settings, T) == selected(settings, T)


def test_a_row_of_a_table_that_is_gone_is_refused_and_the_stream_goes_on(commands: Settings) -> None:
    settings = commands
    prepare(settings, ITEMS, "CREATE TABLE others (id int PRIMARY KEY)", "INSERT INTO items VALUES (1, 1)")
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        execute(settings, "DROP TABLE items")
        reporting(settings)
        with pytest.raises(Misconfigured, match="items is gone"):
            resnapshot(["items"], key="1", wait=True)
        execute(settings, "INSERT INTO others VALUES (1)")
        capture.reach()
        resnapshot(["items"], wait=True)
        capture.reach()
    assert replay(settings, "public.others") == {b'{"id":1}': {"id": 1}}
    assert replay(settings, T) == {}


def test_a_key_that_gets_another_column_in_the_middle_of_a_pass_stops_its_table_only(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next chunk finds it before the catalogue is looked at."""
    monkeypatch.setattr(beside.Resnapshot, "_judge", lambda *_: None)
    with in_the_middle(settings) as capture:
        execute(settings, "ALTER TABLE items DROP CONSTRAINT items_pkey, ADD PRIMARY KEY (id, no)")
        ask(settings, "resume")
        capture.eventually("the job ends", lambda: phases(settings)[T] == "failed")
        assert "a key cannot change" in jobs(settings)[T]["reason"]
        assert capture.reach().inexact == (T,)
