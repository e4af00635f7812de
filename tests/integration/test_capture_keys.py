"""Keys as the catalogue has them (S8, S9), and a TRUNCATE, which is a delete for each of them (S11)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.log import Log
from headrace.settings import Settings
from tests.fixtures.capture import capturing, changes, execute, prepare, replay, selected

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text, n int)"
T = "public.items"


def test_s8_under_full_the_key_is_the_catalogues(settings: Settings) -> None:
    """FULL flags all columns as key in Relation; a changed value of another column is no changed key."""
    prepare(
        settings,
        "CREATE TABLE items (b int, name text, a int, PRIMARY KEY (a, b))",
        "ALTER TABLE items REPLICA IDENTITY FULL",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(
            settings,
            "INSERT INTO items VALUES (1, 'x', 2)",
            "UPDATE items SET name = 'y'",
            "UPDATE items SET a = 3",
            "DELETE FROM items",
        )
        capture.reach()
    assert [(c.op, c.key) for c in changes(settings, T) if c.row is not None or c.op == "d"][:3] == [
        ("c", b'{"a":2,"b":1}'),
        ("u", b'{"a":2,"b":1}'),
        ("d", b'{"a":2,"b":1}'),
    ]
    assert replay(settings, T) == {}


def test_s9_a_deferrable_key_is_no_key(settings: Settings) -> None:
    """The table is left out with a warning; the others go on."""
    prepare(settings, ITEMS)
    execute(
        settings,
        "CREATE TABLE shifted (id int PRIMARY KEY DEFERRABLE)",
        f"ALTER PUBLICATION {settings.publication} ADD TABLE shifted",
    )
    with capturing(settings) as capture:
        assert "deferrable" in capture.hear("public.shifted is left out")
        execute(settings, "INSERT INTO shifted VALUES (1)", "INSERT INTO items VALUES (1, 'x', 1)")
        capture.reach()
    assert Log(settings).tables() == [T]


def test_a_table_without_a_key_is_left_out_with_what_to_do(settings: Settings) -> None:
    """Named in the warning, with the statement."""
    prepare(settings, ITEMS)
    execute(settings, "CREATE TABLE loose (n int)", f"ALTER PUBLICATION {settings.publication} ADD TABLE loose")
    with capturing(settings) as capture:
        assert "ALTER TABLE public.loose ADD PRIMARY KEY" in capture.hear("public.loose is left out")


@pytest.mark.parametrize("cut_records", [10, 20_000])
def test_s11_truncate_is_a_delete_for_each_live_key(settings: Settings, cut_records: int) -> None:
    """In bounded cuts, whole with its transaction, with rows before and after it in the same one."""
    settings = replace(settings, cut_records=cut_records)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, 'x', i FROM generate_series(1, 35) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(
            settings,
            "BEGIN; INSERT INTO items VALUES (100, 'before', 1); TRUNCATE items; INSERT INTO items VALUES (5, 'after', 1); COMMIT",
        )
        capture.reach()
    dead = [c for c in changes(settings, T) if c.row is None]
    assert len(dead) == 2 * 36
    assert {c.ordinal for c in dead} == {2}
    assert replay(settings, T) == selected(settings, T)


def test_s11_capture_that_is_asked_to_stop_amid_a_truncate_stops(settings: Settings) -> None:
    """At the end of a cut, not when all is deleted; the next one goes on there, and each key is deleted once."""
    rows = 20_000
    settings = replace(settings, cut_records=100)
    prepare(settings, ITEMS, f"INSERT INTO items SELECT i, 'x', i FROM generate_series(1, {rows}) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "BEGIN; TRUNCATE items; INSERT INTO items VALUES (5, 'after', 1); COMMIT")
        capture.eventually("it deletes", lambda: any(c.partial for c in Log(settings).checkpoints()))
    assert 1 < len(replay(settings, T)) < rows
    with capturing(settings) as capture:
        capture.reach()
    assert len([c for c in changes(settings, T) if c.row is None]) == 2 * rows
    assert replay(settings, T) == selected(settings, T)
