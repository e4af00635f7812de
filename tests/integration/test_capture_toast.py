"""Whole rows (I3, S7): values that Postgres keeps out of line and does not send with an update that left them alone."""

from __future__ import annotations

import threading
from dataclasses import replace

import orjson
import psycopg
import pytest

from headrace.log import Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.settings import Settings
from headrace_capture import toast
from tests.fixtures.capture import capturing, changes, eventually, execute, prepare, replay, rows
from tests.fixtures.toast import DOCS, T, W, X, by_key, last


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let capture remember no large values: as if they had been pushed out."""
    monkeypatch.setattr(toast, "WORTH_REMEMBERING", 1 << 60)


def test_from_the_same_transaction(settings: Settings) -> None:
    """Insert, then update something else: the second row has the value of the first."""
    prepare(settings, DOCS)
    by_key(settings)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"BEGIN; INSERT INTO docs VALUES (1, 0, '{W}'); UPDATE docs SET n = 1; COMMIT")
        capture.reach()
    assert last(settings) == ({"id": 1, "n": 1, "big": W}, None)


def test_from_an_earlier_transaction(settings: Settings) -> None:
    """What the stream brought before is known, also under a changed key."""
    prepare(settings, DOCS)
    by_key(settings)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"INSERT INTO docs VALUES (1, 0, '{W}')", "UPDATE docs SET id = 2", "UPDATE docs SET n = 5")
        capture.reach()
    assert [(c.row, c.read) for c in changes(settings, T) if c.row] == [
        ({"id": id_, "n": n, "big": W}, None) for id_, n in ((1, 0), (2, 0), (2, 5))
    ]


@pytest.mark.usefixtures("forgetful")
def test_from_the_old_row_under_full(settings: Settings) -> None:
    """REPLICA IDENTITY FULL, as setup declares it for such tables, sends the old value."""
    prepare(settings, DOCS, f"INSERT INTO docs VALUES (1, 0, '{W}')")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "UPDATE docs SET n = 1", "UPDATE docs SET id = 2")
        capture.reach()
    assert [(c.row, c.read) for c in changes(settings, T) if c.row][1:] == [
        ({"id": 1, "n": 1, "big": W}, None),
        ({"id": 2, "n": 1, "big": W}, None),
    ]


def test_read_again_and_marked(settings: Settings) -> None:
    """After a start nothing is remembered: the value is read from Postgres, and the record says so."""
    prepare(settings, DOCS, f"INSERT INTO docs VALUES (1, 0, '{W}')")
    by_key(settings)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "UPDATE docs SET n = 1")
        capture.reach()
    assert last(settings) == ({"id": 1, "n": 1, "big": W}, "reread")


def test_states_before_the_moment_of_a_reread_name_its_table(settings: Settings) -> None:
    """The value may be of a later moment than they are; from there on the row is what it was (S7)."""
    prepare(settings, DOCS, f"INSERT INTO docs VALUES (1, 0, '{W}')")
    by_key(settings)
    with capturing(settings) as capture:
        capture.hear("streaming")
    execute(settings, "UPDATE docs SET n = 1", f"UPDATE docs SET big = '{X}'", "UPDATE docs SET n = 2")
    with capturing(replace(settings, cut_records=1)) as capture:
        capture.reach()
        eventually("it says so no more", lambda: (now := Log(settings).newest_checkpoint()) and not now.approximate)
    assert [c.row and c.row["big"] for c in changes(settings, T) if c.read != "snapshot"] == [X, X, X]
    named = [found for found in Log(settings).checkpoints() if found.approximate]
    assert named, "the first has the later value"
    assert all(found.version.lsn < found.approximate[T] for found in named)


def test_read_again_by_names_with_a_percent_sign(settings: Settings) -> None:
    """What stands for a parameter elsewhere is a name's here."""
    columns = '"100%" int PRIMARY KEY, "a%b" int, "%s" text'
    prepare(settings, 'CREATE SCHEMA "%(s"', f'CREATE TABLE "%(s"."do%cs" ({columns})')
    execute(settings, 'ALTER TABLE "%(s"."do%cs" ALTER COLUMN "%s" SET STORAGE EXTERNAL')
    execute(settings, 'ALTER TABLE "%(s"."do%cs" REPLICA IDENTITY DEFAULT')
    execute(settings, f"""INSERT INTO "%(s"."do%cs" VALUES (1, 0, '{W}')""")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, 'UPDATE "%(s"."do%cs" SET "a%b" = 1')
        capture.reach()
    log = changes(settings, "%(s.do%cs")
    assert [(c.row, c.read) for c in log][-1:] == [({"100%": 1, "a%b": 1, "%s": W}, "reread")]


def test_read_again_by_a_key_of_an_extension_s_types(settings: Settings) -> None:
    """By their own operators, as their index has them; with our search_path a bare = would be that of text, or none."""
    prepare(
        settings,
        "CREATE EXTENSION citext; CREATE EXTENSION ltree; CREATE DOMAIN route AS ltree",
        "CREATE TABLE docs (at route, name citext, n int, big text, PRIMARY KEY (at, name))",
        "ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL",
        f"INSERT INTO docs VALUES ('a.b', 'Date', 0, '{W}')",
    )
    by_key(settings)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "UPDATE docs SET n = 1")
        capture.reach()
    assert last(settings) == ({"at": "a.b", "name": "Date", "n": 1, "big": W}, "reread")


@pytest.mark.usefixtures("forgetful")
def test_of_a_composite_key(settings: Settings) -> None:
    """Its text is compared with nothing: then the log says what the value was."""
    prepare(
        settings,
        "CREATE TYPE pair AS (a int, b text)",
        "CREATE TABLE docs (id pair PRIMARY KEY, n int, big text); ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL",
        f"INSERT INTO docs VALUES ('(1,x)', 0, '{W}')",
    )
    by_key(settings)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "UPDATE docs SET n = 1")
        capture.reach()
    assert last(settings)[0] == {"id": "(1,x)", "n": 1, "big": W}


@pytest.mark.usefixtures("forgetful")
def test_a_reread_is_believed_only_if_it_sees_the_change(settings: Settings) -> None:
    """(seen) T sets big, then n, and its commit waits for a standby: the stream has T, a plain re-read would show the older big."""
    prepare(settings, DOCS, f"INSERT INTO docs VALUES (1, 0, '{W}')")
    by_key(settings)
    execute(settings, "CREATE TABLE probe (id int PRIMARY KEY)")
    try:
        with capturing(settings) as capture:
            capture.reach()
            execute(settings, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
            eventually("commits wait", lambda: rows(settings, "SHOW synchronous_standby_names") == [("nobody",)])
            execute(settings, "CHECKPOINT")  # the checkpointer lets them wait, once it knows
            script = f"BEGIN; UPDATE docs SET big = '{X}'; UPDATE docs SET n = 1; COMMIT"
            waiting = threading.Thread(target=execute, args=(settings, script))
            waiting.start()
            again = "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_current_snapshot()::text, %'"
            eventually("capture reads the row again", lambda: rows(settings, again))
            assert rows(settings, "SELECT n FROM docs") == [(0,)]
            release(settings)
            waiting.join()
            capture.reach()
    finally:
        release(settings)
    assert last(settings) == ({"id": 1, "n": 1, "big": X}, "reread")


def release(settings: Settings) -> None:
    """Let commits no longer wait for a standby."""
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = local")
        connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
        connection.execute("SELECT pg_reload_conf()")


def test_of_a_row_that_is_gone_from_the_log(settings: Settings) -> None:
    """While capture was off the row changed and went: the log has the value, to the last digit, and Postgres no longer.

    Rows of the same key in a table that inherits from it are no rows of it.
    """
    digits = "123456789012345678901234567890.10"
    note = '{"n": ' + digits + ', "s": "a,b}\\"", "l": [1, {"x": null}], "pad": "' + "p" * 4000 + '"}'
    prepare(
        settings,
        "CREATE TABLE docs (id int PRIMARY KEY, n int, big text, note json)",
        "ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL, ALTER COLUMN note SET STORAGE EXTERNAL",
        f"INSERT INTO docs VALUES (1, 0, '{W}', '{note}')",
    )
    by_key(settings)
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, "UPDATE docs SET n = 1", "UPDATE docs SET id = 2", "UPDATE docs SET n = 3", "DELETE FROM docs")
    execute(
        settings,
        "CREATE TABLE more (PRIMARY KEY (id)) INHERITS (docs)",
        f"INSERT INTO more VALUES (1, 9, '{X}', '0'), (2, 9, '{X}', '0')",
    )
    with capturing(settings) as capture:
        capture.reach()
    log = changes(settings, T)
    assert [(c.op, c.key, c.read) for c in log if c.op != "d" or c.row] == [
        ("r", b'{"id":1}', "snapshot"),
        ("u", b'{"id":1}', None),
        ("c", b'{"id":2}', None),
        ("u", b'{"id":2}', None),
    ]
    assert all(c.row["big"] == W for c in log if c.row)
    values = [record.value for record in read_to_end(settings, {(Log(settings).topic_of(T), 0): BEGINNING})]
    assert all(digits.encode() in value for value in values if value and b'"after":null' not in value)
    assert log[-1].row is None


def test_of_a_row_that_is_gone_though_its_value_is_in_the_open_cut(settings: Settings) -> None:
    """What the open cut holds is committed before the log is asked."""
    prepare(settings, DOCS)
    by_key(settings)
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, f"INSERT INTO docs VALUES (1, 0, '{W}')", "UPDATE docs SET n = 1", "DELETE FROM docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toast, "WORTH_REMEMBERING", 1 << 60)
        with capturing(settings) as capture:
            capture.reach()
    assert [(c.op, c.row and c.row["n"]) for c in changes(settings, T)] == [
        ("c", 0),
        ("u", 1),
        ("d", None),
        ("d", None),
    ]
    assert all(c.row["big"] == W for c in changes(settings, T) if c.row)


@pytest.mark.parametrize("read", ["reread", None])
def test_of_a_key_that_is_out_of_line(settings: Settings, read: str | None) -> None:
    """Then the new row leaves the key out as well, and the old one has it; the row is live in Postgres, or in the log alone by now."""
    prepare(
        settings,
        "CREATE TABLE docs (part int, id text, n int, big text, PRIMARY KEY (part, id))",
        "ALTER TABLE docs ALTER COLUMN id SET STORAGE EXTERNAL, ALTER COLUMN big SET STORAGE EXTERNAL",
        f"INSERT INTO docs VALUES (1, '{'k' * 2300}', 0, '{W}')",
    )
    by_key(settings)
    with capturing(settings) as capture:
        capture.reach()
    script = ["UPDATE docs SET n = 1", "UPDATE docs SET part = 2", "UPDATE docs SET n = 3"]
    execute(settings, *script, *([] if read else ["DELETE FROM docs"]))
    with capturing(settings) as capture:
        capture.reach()
    log = [change for change in changes(settings, T) if change.row]
    row = {"id": "k" * 2300, "big": W}
    assert [(change.op, change.row) for change in log] == [
        ("r", {"part": 1, "n": 0, **row}),
        ("u", {"part": 1, "n": 1, **row}),
        ("c", {"part": 2, "n": 1, **row}),
        ("u", {"part": 2, "n": 3, **row}),
    ]
    assert log[2].read == read
    assert [change.key for change in log] == [orjson.dumps({"part": part, "id": "k" * 2300}) for part in (1, 1, 2, 2)]
    assert list(replay(settings, T).values()) == ([log[-1].row] if read else [])


INTO = "UPDATE docs SET tenant = 5 WHERE id = 1"


@pytest.mark.parametrize(
    ("identity", "script", "log"),
    [
        ("DEFAULT", [INTO], [("c", 0, "reread")]),
        ("USING INDEX docs_pkey", [INTO], [("c", 0, "reread")]),
        ("FULL", [INTO], [("c", 0, None)]),
        ("DEFAULT", [f"BEGIN; UPDATE docs SET big = '{X}'; {INTO}; COMMIT"], [("c", 0, "reread")]),
        ("DEFAULT", [INTO, "UPDATE docs SET n = 7"], [("c", 0, "reread"), ("u", 7, "reread")]),
        ("DEFAULT", [INTO, "UPDATE docs SET tenant = 6"], []),
    ],
    ids=["by key", "by index", "full", "changed by the same", "and changed then", "and out of it again"],
)
def test_of_a_row_that_an_update_moves_into_the_row_filter(
    settings: Settings, identity: str, script: list[str], log: list[tuple[str, int, str | None]]
) -> None:
    """Postgres makes an INSERT of it, without what the update left alone; a value that is nowhere makes the table be read again."""
    prepare(
        settings,
        "CREATE TABLE docs (tenant int, id int, n int, big text, more text, PRIMARY KEY (tenant, id))",
        "ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL, ALTER COLUMN more SET STORAGE EXTERNAL",
        f"INSERT INTO docs VALUES (1, 1, 0, '{W}', '{W}'), (5, 2, 0, '{W}', '{W}')",
    )
    execute(settings, f"ALTER PUBLICATION {settings.publication} SET TABLE docs WHERE (tenant = 5)")
    execute(settings, f"ALTER TABLE docs REPLICA IDENTITY {identity}")
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, *script)
    with capturing(settings) as capture:
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
    moved = [change for change in changes(settings, T) if change.row and change.row["id"] == 1]
    assert [(change.op, (change.row or {})["n"], change.read) for change in moved] == log
    there = rows(
        settings, "SELECT json_build_object('tenant', 5, 'id', id), row_to_json(d) FROM docs d WHERE tenant = 5"
    )
    assert replay(settings, T) == {orjson.dumps(key): row for key, row in there}


def test_a_domain_s_value_is_read_again_of_a_partition(settings: Settings) -> None:
    prepare(
        settings,
        "CREATE DOMAIN name AS varchar(9000)",
        "CREATE TABLE docs (id int PRIMARY KEY, n numeric(5, 2), big public.name, more varchar(9000)) PARTITION BY RANGE (id)",
        "CREATE TABLE part PARTITION OF docs FOR VALUES FROM (0) TO (10)",
        "ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL, ALTER COLUMN more SET STORAGE EXTERNAL",
        f"INSERT INTO docs VALUES (1, 0, '{W}', '{X}')",
    )
    execute(settings, "ALTER TABLE part REPLICA IDENTITY DEFAULT")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "UPDATE docs SET n = 1")
        capture.reach()
    assert last(settings) == ({"id": 1, "n": "1.00", "big": W, "more": X}, "reread")
