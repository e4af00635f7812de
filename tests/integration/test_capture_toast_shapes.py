"""Values kept out of line, of columns or tables that changed before capture came to their change (S7)."""

from __future__ import annotations

import pytest

from headrace.settings import Settings
from headrace_capture import resnapshot
from tests.fixtures.capture import capturing, changes, eventually, execute, prepare, replay, selected
from tests.fixtures.silent import fingerprint
from tests.fixtures.toast import DOCS, T, W, X, by_key, last


@pytest.mark.parametrize("identity", ["FULL", "DEFAULT"])
def test_a_value_that_is_remembered_is_of_its_column_whatever_becomes_of_the_others(
    settings: Settings, identity: str
) -> None:
    """One wide column goes and another comes: as many as before, but not the same ones."""
    prepare(settings, "CREATE TABLE docs (id int PRIMARY KEY, n int, title text, body text)")
    execute(settings, "ALTER TABLE docs ALTER COLUMN body SET STORAGE EXTERNAL")
    execute(settings, f"ALTER TABLE docs REPLICA IDENTITY {identity}")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"INSERT INTO docs VALUES (1, 0, 't', '{W}')")
        capture.reach()
        execute(settings, "ALTER TABLE docs DROP COLUMN title", "ALTER TABLE docs ADD COLUMN summary text")
        execute(settings, "UPDATE docs SET n = 1")
        capture.reach()
    assert last(settings)[0] == {"id": 1, "n": 1, "body": W, "summary": None}


def test_nothing_is_remembered_of_another_table_of_the_same_name_and_shape(settings: Settings) -> None:
    prepare(settings, DOCS)
    by_key(settings)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"INSERT INTO docs VALUES (1, 0, '{W}')")
        capture.reach()
        execute(settings, "DROP TABLE docs", *DOCS.split("; "), f"INSERT INTO docs VALUES (1, 0, '{X}')")
        execute(settings, f"ALTER PUBLICATION {settings.publication} ADD TABLE docs", "UPDATE docs SET n = 1")
        capture.reach()
    assert {change.row["big"] for change in changes(settings, T) if change.row and change.row["n"] == 1} == {X}


def test_of_a_column_that_is_out_of_line_no_more(settings: Settings) -> None:
    """SET STORAGE is of later values: an update still leaves out the one that is out of line."""
    prepare(settings, DOCS, f"INSERT INTO docs VALUES (1, 0, '{W}')")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "ALTER TABLE docs ALTER COLUMN big SET STORAGE PLAIN", "UPDATE docs SET n = 1")
        capture.reach()
    assert last(settings) == ({"id": 1, "n": 1, "big": W}, None)


@pytest.mark.parametrize(
    ("identity", "type_", "read"),
    [("FULL", "varchar(10)", None), ("DEFAULT", "varchar(10)", None), ("DEFAULT", "text", "reread")],
)
def test_of_a_table_that_was_written_anew_in_line_before_capture_came_to_the_change(
    settings: Settings, identity: str, type_: str, read: str | None
) -> None:
    """Postgres is asked only for a value of the column's type; the catalogue says by then that nothing of a short one is out of line."""
    prepare(settings, DOCS, f"INSERT INTO docs VALUES (1, 0, '{W}')")
    execute(settings, f"ALTER TABLE docs REPLICA IDENTITY {identity}")
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, "UPDATE docs SET n = 1", f"ALTER TABLE docs ALTER COLUMN big TYPE {type_} USING left(big, 10)")
    with capturing(settings) as capture:
        capture.hear("public.docs was read again")
        capture.reach()
    log = [change for change in changes(settings, T) if change.row]
    assert (log[1].op, log[1].row, log[1].read) == ("u", {"id": 1, "n": 1, "big": W if read is None else W[:10]}, read)
    assert replay(settings, T) == {b'{"id":1}': {"id": 1, "n": 1, "big": W[:10]}}


@pytest.mark.parametrize(
    ("key", "type_", "value", "ddl"),
    [
        (
            "int",
            "bytea",
            "decode(repeat('ab', 5000), 'hex')",
            "ALTER TABLE docs ALTER COLUMN big TYPE text USING encode(big, 'base64')",
        ),
        ("int", "text[]", "ARRAY[repeat('W', 5000)]", "ALTER TABLE docs ALTER COLUMN big TYPE text USING big[1]"),
        (
            "int",
            "text",
            "repeat('W', 5000)",
            "ALTER TABLE docs ALTER COLUMN id TYPE uuid USING lpad(id::text, 32, '0')::uuid",
        ),
        ("mood", "text", "repeat('W', 5000)", "ALTER TYPE mood RENAME VALUE '1' TO 'one'"),
        ("positive", "text", "repeat('W', 5000)", "ALTER TABLE docs ALTER COLUMN id TYPE bigint"),
    ],
    ids=["bytea", "array", "key", "key's label", "key's domain"],
)
def test_of_a_type_that_changed_before_capture_came_to_the_change(
    settings: Settings, key: str, type_: str, value: str, ddl: str
) -> None:
    """Postgres has a value of another type by now, or finds no row by the key's text: the log has what the change left alone."""
    prepare(
        settings,
        "CREATE TYPE mood AS ENUM ('1', '2')",
        "CREATE DOMAIN positive AS int",
        f"CREATE TABLE docs (id {key} PRIMARY KEY, n int, big {type_})",
        "ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL",
        f"INSERT INTO docs VALUES ('1', 0, {value})",
    )
    by_key(settings)
    with capturing(settings) as capture:
        capture.reach()
        eventually("it was looked at", lambda: fingerprint(settings, T) != "null")
    execute(settings, "UPDATE docs SET n = 1", ddl)
    with capturing(settings) as capture:
        capture.reach()
        capture.hear("public.docs was read again")
        capture.reach()
    before, update = [change for change in changes(settings, T) if change.row][:2]
    assert (update.op, update.row, update.read) == ("u", {**(before.row or {}), "n": 1}, None)
    assert replay(settings, T) == selected(settings, "docs")


def test_of_a_type_that_changed_before_the_change_of_a_row_that_is_gone(settings: Settings) -> None:
    """What the log has is no value of the column's new type: the change is left out, and its delete follows."""
    prepare(settings, DOCS, f"INSERT INTO docs VALUES (1, 0, '{W}')")
    by_key(settings)
    with capturing(settings) as capture:
        capture.reach()
    ddl = "ALTER COLUMN big TYPE bytea USING big::bytea, ALTER COLUMN big SET STORAGE EXTERNAL"
    execute(settings, f"ALTER TABLE docs {ddl}", "UPDATE docs SET n = 1", "DELETE FROM docs")
    with capturing(settings) as capture:
        capture.hear("nor in the log as bytea")
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
    assert [(change.op, change.schema) for change in changes(settings, T)] == [("r", 1), ("d", 2), ("d", 2)]


@pytest.mark.parametrize("ddl", ["ALTER COLUMN big TYPE text", "DROP COLUMN other"])
def test_of_a_shape_that_changed_while_the_log_may_be_wrong(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, ddl: str
) -> None:
    """What the log has may be older than what Postgres has then: the change is left out, and the table read again."""
    prepare(
        settings,
        "CREATE TABLE docs (id int PRIMARY KEY, n int, big varchar(9000), other int)",
        "ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL",
        "INSERT INTO docs VALUES (1, 0, repeat('W', 5000))",
    )
    by_key(settings)
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, "UPDATE docs SET n = 1", f"ALTER TABLE docs {ddl}")
    monkeypatch.setattr(resnapshot.Resnapshot, "_doubted", lambda *_: True)
    with capturing(settings) as capture:
        capture.hear("public.docs was read again")
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
    assert [change.op for change in changes(settings, T)] == ["r", "r"], "no update with the log's value"
    assert replay(settings, T) == selected(settings, "docs")
