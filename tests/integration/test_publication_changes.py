"""What the publication did not send for a while is read again by itself (I4); without a publication capture stops and says why (I12)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from headrace.cli import app
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.settings import Settings, environment
from headrace_capture import attention, catalog, setup
from headrace_capture.recovery import recover
from tests.fixtures.capture import Running, capturing, eventually, execute, prepare, refused, replay, rows, selected
from tests.fixtures.resnapshots import ask, jobs, phases
from tests.fixtures.silent import fingerprint
from tests.fixtures.slots import await_free

pytestmark = pytest.mark.usefixtures("often")

T = "public.items"
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, n int)"
ROWS = "INSERT INTO items SELECT i, i FROM generate_series(1, 20) i"
MISSED = (
    "UPDATE items SET n = -n WHERE id < 4",
    "DELETE FROM items WHERE id > 17",
    "INSERT INTO items VALUES (30, 30)",
)


@pytest.fixture
def discovered(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, capture learns nothing of the catalogue."""
    event = threading.Event()
    take = attention.CatalogueWatch.take

    def taken(self: attention.CatalogueWatch) -> attention.Findings | None:
        if event.is_set():
            return take(self)
        self._newest = None  # what nobody learns now is not learnt later: that the publication was missing
        return None

    monkeypatch.setattr(attention.CatalogueWatch, "take", taken)
    return event


def leave(settings: Settings) -> str:
    return f"ALTER PUBLICATION {settings.publication} DROP TABLE items"


def join(settings: Settings) -> str:
    return f"ALTER PUBLICATION {settings.publication} ADD TABLE items"


def forgotten(settings: Settings) -> None:
    """Wait until capture has seen that the table is not published."""
    eventually("it is known to be gone", lambda: fingerprint(settings, T) == "null")


def exact(settings: Settings, running: Running, where: str = "") -> None:
    """Wait until it was read again by itself, and is equal."""
    running.hear(f"{T} was read again")
    running.eventually("it is exact", lambda: running.reach().inexact == ())
    assert replay(settings, T) == selected(settings, f"(SELECT * FROM items {where})")
    assert any(c.inexact == (T,) for c in Log(settings).checkpoints())


def test_a_table_that_leaves_and_comes_back_is_read_again(each_version: Settings) -> None:
    settings = each_version
    prepare(settings, ITEMS, ROWS)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, leave(settings))
        forgotten(settings)
        execute(settings, *MISSED, join(settings))
        exact(settings, capture)


def test_also_when_it_was_away_for_a_moment_only(settings: Settings, discovered: threading.Event) -> None:
    """Between two looks at the catalogue."""
    prepare(settings, ITEMS, ROWS)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, leave(settings), *MISSED, join(settings))
        capture.reach()
        discovered.set()
        exact(settings, capture)


def test_also_when_capture_was_off(settings: Settings) -> None:
    prepare(settings, ITEMS, ROWS)
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, leave(settings), *MISSED, join(settings))
    with capturing(settings) as capture:
        exact(settings, capture)


def test_a_table_that_came_and_went_while_capture_was_off_is_passed_over(settings: Settings) -> None:
    """The stream has its rows, the catalogue has nothing: nobody is told to give it a key, which it had."""
    prepare(settings, ITEMS, ROWS)
    with capturing(settings) as capture:
        capture.reach()
    publish = f"ALTER PUBLICATION {settings.publication} ADD TABLE staging"
    made = ("CREATE TABLE staging (id int PRIMARY KEY)", publish, "INSERT INTO staging VALUES (1)")
    execute(settings, *made, "DROP TABLE staging")
    with capturing(settings) as capture:
        capture.hear("public.staging is passed over")
        capture.reach()
    assert not any("ADD PRIMARY KEY" in line for line in capture.said)
    assert Log(settings).tables() == [T]


def test_a_table_that_is_dropped_and_made_anew_is_read_with_what_it_was_loaded_with(settings: Settings) -> None:
    """Of the same shape; the rows of the old one are gone from the log."""
    prepare(settings, ITEMS, ROWS)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "DROP TABLE items")
        forgotten(settings)
        prepare(settings, ITEMS, "INSERT INTO items SELECT i, 0 FROM generate_series(15, 25) i")
        execute(settings, "INSERT INTO items VALUES (26, 0)")
        exact(settings, capture)


def test_a_row_filter_that_changes_lets_the_table_be_read_again(settings: Settings) -> None:
    prepare(settings, ITEMS, ROWS)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"ALTER PUBLICATION {settings.publication} SET TABLE items WHERE (id > 10)")
        exact(settings, capture, "WHERE id > 10")


def test_a_column_list_without_the_key_leaves_out_its_table_only(settings: Settings) -> None:
    """Whether the stream or the catalogue tells of it first, or it is over when the stream comes to what was written meanwhile."""
    prepare(settings, ITEMS, ROWS, "CREATE TABLE others (id int PRIMARY KEY)")
    narrow = f"ALTER PUBLICATION {settings.publication} SET TABLE items (n), others"
    wide = f"ALTER PUBLICATION {settings.publication} SET TABLE items, others"
    why = "the publication's column list leaves out id of its key"
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, narrow, "INSERT INTO items VALUES (31, 31)", "INSERT INTO others VALUES (1)")
        capture.hear(f"public.items is left out: {why}")
        capture.hear(f"public.items cannot be read again: public.items comes without its key: {why}")
        assert capture.reach().inexact == (T,)
        assert list(replay(settings, "public.others")) == [b'{"id":1}']
    with catalog.connect(settings.dsn, name="test") as connection:
        made = setup.plan(connection, settings, [])
    assert [(left.table, left.reason) for left in made.left_out] == [(T, why)]
    assert [warning for warning in made.warnings if "DROP TABLE" in warning], "its updates fail"
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, "INSERT INTO items VALUES (32, 32)", wide)
        exact(settings, capture)
    execute(settings, narrow, "INSERT INTO items VALUES (33, 33)", wide)
    with capturing(settings) as capture:
        exact(settings, capture)


def test_what_leaves_the_publication_as_it_was_lets_nothing_be_read_again(settings: Settings) -> None:
    """Named once more, another table beside it, vacuumed."""
    prepare(settings, ITEMS, ROWS, "CREATE TABLE others (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(
            settings,
            f"ALTER PUBLICATION {settings.publication} SET TABLE items, others",
            f"ALTER PUBLICATION {settings.publication} DROP TABLE others",
            "VACUUM FULL pg_publication_rel",
            "VACUUM FULL pg_publication",
            "VACUUM FREEZE pg_publication",
            "VACUUM FREEZE pg_publication_rel",
            "ALTER TABLE items ADD COLUMN more text",
        )
        eventually("it was looked at", lambda: "more" in fingerprint(settings, T))
        assert capture.reach().inexact == ()
    assert phases(settings) == {"public.others": "left"}


def test_a_table_that_comes_back_in_the_middle_of_a_pass_is_read_from_its_beginning(settings: Settings) -> None:
    """Rows that were read already changed while it was away."""
    settings = replace(settings, cut_records=5)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i FROM generate_series(1, 3000) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        ask(settings, tables=[T])
        eventually("it reads", lambda: jobs(settings)[T]["rows"] > 20)
        assert ask(settings, "pause") == {"jobs": [T]}
        assert jobs(settings)[T]["rows"] < 3000
        execute(settings, leave(settings))
        forgotten(settings)
        execute(settings, *MISSED, join(settings))
        eventually("it is known", lambda: fingerprint(settings, T) != "null")
        ask(settings, "resume")
        capture.eventually("it was read", lambda: phases(settings)[T] == "done", 180)
        exact(settings, capture)


# The publication itself


def checked(settings: Settings) -> tuple[int, str]:
    """Return what `status --check capture` says."""
    done = CliRunner().invoke(app, ["status", "--check", "capture"], env=environment(settings))
    return done.exit_code, done.output


def test_a_publication_that_is_dropped_stops_capture_and_nothing_is_lost(each_version: Settings) -> None:
    """With rows that change meanwhile: 18 sends nothing of them, older servers nothing at all any more. What is named mends it."""
    settings = each_version
    prepare(settings, ITEMS, ROWS)
    running = Running(settings)
    running.hear("streaming")
    execute(settings, f"DROP PUBLICATION {settings.publication}", *MISSED)
    error = eventually("capture stops", lambda: running.error)
    running.join()
    assert isinstance(error, Misconfigured)
    assert error.code == "publication-missing"
    assert "headrace setup … --apply" in error.remedy
    code, said = checked(settings)
    assert (code, "publication" in said) == (1, True)
    prepare(settings)
    if rows(settings, "SHOW server_version_num") < [("180000",)]:
        error = refused(settings)
        assert error.code == "publication-missing"
        assert "headrace resnapshot --recover" in error.remedy
        await_free(settings)
        recover(settings, lambda _: None)
    with capturing(settings) as capture:
        exact(settings, capture)


def test_a_publication_that_is_dropped_while_nothing_changes_stops_capture(settings: Settings) -> None:
    prepare(settings, ITEMS, ROWS)
    running = Running(settings)
    running.hear("streaming")
    execute(settings, f"DROP PUBLICATION {settings.publication}")
    error = eventually("capture stops", lambda: running.error)
    running.join()
    assert (error.code, "headrace setup … --apply" in error.remedy) == ("publication-missing", True)


def test_a_publication_that_is_made_anew_between_two_looks(settings: Settings, discovered: threading.Event) -> None:
    prepare(settings, ITEMS, ROWS)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"DROP PUBLICATION {settings.publication}", *MISSED)
        prepare(settings)
        capture.reach()
        discovered.set()
        exact(settings, capture)


def publishes(settings: Settings, what: str) -> str:
    return f"ALTER PUBLICATION {settings.publication} SET (publish = '{what}')"


EVERYTHING = "insert, update, delete, truncate"


def test_operations_that_were_left_out_for_a_while_are_made_up_for(
    each_version: Settings, discovered: threading.Event
) -> None:
    settings = each_version
    prepare(settings, ITEMS, ROWS)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, publishes(settings, "insert"), *MISSED, publishes(settings, EVERYTHING))
        capture.reach()
        assert replay(settings, T) != selected(settings, T)
        discovered.set()
        exact(settings, capture)


def test_capture_stops_while_operations_are_left_out(settings: Settings) -> None:
    prepare(settings, ITEMS, ROWS)
    running = Running(settings)
    running.hear("streaming")
    execute(settings, publishes(settings, "insert, delete"), *MISSED)
    error = eventually("capture stops", lambda: running.error)
    running.join()
    assert error.code == "publication-incomplete"
    assert "UPDATE, TRUNCATE" in str(error)
    assert refused(settings).code == "publication-incomplete"
    execute(settings, *error.remedy.split(", then")[:1])
    with capturing(settings) as capture:
        exact(settings, capture)


# Columns


@pytest.fixture
def wide(settings: Settings) -> Settings:
    prepare(settings, ITEMS, ROWS)
    return settings


DROP, ADD = "ALTER TABLE items DROP COLUMN n", "ALTER TABLE items ADD COLUMN n int"


def seen(settings: Settings, column: str) -> Callable[[], bool]:
    return lambda: f'"{column}"' in fingerprint(settings, T)


@pytest.mark.parametrize("ddl", [ADD, "ALTER TABLE items ADD COLUMN n text"], ids=["same type", "another type"])
@pytest.mark.parametrize("touched", [False, True], ids=["no row changes", "a row changes"])
def test_a_column_that_is_dropped_and_added_again_loses_its_values(wide: Settings, ddl: str, *, touched: bool) -> None:
    """Postgres shows null in all old rows, without an event."""
    with capturing(wide) as capture:
        capture.hear("streaming")
        execute(wide, f"{DROP}; {ddl}")
        if touched:
            execute(wide, "UPDATE items SET n = '7' WHERE id = 3")
        exact(wide, capture)


@pytest.mark.parametrize("touched", [False, True], ids=["no row changes", "rows change"])
def test_also_when_both_are_seen_apart(wide: Settings, *, touched: bool) -> None:
    with capturing(wide) as capture:
        capture.hear("streaming")
        execute(wide, DROP)
        if touched:
            execute(wide, "DELETE FROM items WHERE id = 1")
        eventually("it is gone", lambda: not seen(wide, "n")())
        execute(wide, ADD)
        if touched:
            execute(wide, "INSERT INTO items VALUES (1, 1)")
        exact(wide, capture)


def test_also_when_it_came_and_went_before_while_capture_was_off(wide: Settings) -> None:
    """A migration that was taken back and made again: the log has values of the first one."""
    more = "ALTER TABLE items ADD COLUMN more int"
    with capturing(wide) as capture:
        capture.reach()
    execute(wide, more, "UPDATE items SET more = 5", "ALTER TABLE items DROP COLUMN more", more)
    with capturing(wide) as capture:
        exact(wide, capture)


def test_a_column_that_is_new_lets_nothing_be_read_again(wide: Settings) -> None:
    """Though the stream shows it before anybody looks at the catalogue; a drop before or after does not matter."""
    with capturing(wide) as capture:
        capture.hear("streaming")
        for name in ("a", "b", "c"):
            execute(wide, f"ALTER TABLE items ADD COLUMN {name} int", f"UPDATE items SET {name} = 1 WHERE id = 1")
            capture.reach()  # a stream that came to it after the next one is there would take that for another name of it
            eventually("it is seen", seen(wide, name))
            execute(wide, f"ALTER TABLE items DROP COLUMN {name}", "UPDATE items SET n = 1 WHERE id = 1")
        eventually("they are gone", lambda: not seen(wide, "c")())
        execute(wide, "ALTER TABLE items ADD COLUMN d int")
        eventually("it is seen", seen(wide, "d"))
        assert capture.reach().inexact == ()
    assert jobs(wide) == {}


def test_a_schema_that_gets_a_dot_takes_its_tables_out_of_the_log_as_they_are(settings: Settings) -> None:
    """What a name with two dots means nobody knows: they were taken for tables that are gone, and all rows deleted, at each look."""
    prepare(
        settings,
        "CREATE SCHEMA crm",
        "CREATE TABLE crm.people (id int PRIMARY KEY)",
        "INSERT INTO crm.people VALUES (1)",
        ITEMS,
    )
    with capturing(settings) as capture:
        capture.reach()
        before = selected(settings, "crm.people")
        execute(settings, 'ALTER SCHEMA crm RENAME TO "crm.old"', 'INSERT INTO "crm.old".people VALUES (2)')
        capture.hear("crm.people is captured no more")
        capture.hear("crm.old.people is left out: its schema has a dot")
        execute(settings, "INSERT INTO items VALUES (1)")
        ask(settings, all=True)
        capture.hear("public.items was read again")
        capture.reach()
        assert replay(settings, "crm.people") == before
        execute(settings, 'ALTER SCHEMA "crm.old" RENAME TO crm')
        capture.hear("crm.people was read again")
        capture.reach()
    assert Log(settings).tables() == ["crm.people", T]
    assert replay(settings, "crm.people") == selected(settings, "crm.people")
