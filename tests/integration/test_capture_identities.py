"""Every replica identity: values that an update left alone are whole, and inserts always go on."""

from __future__ import annotations

import itertools

import orjson
import pytest

from headrace.settings import Settings
from tests.fixtures.capture import capturing, execute, prepare, replay, rows, selected
from tests.fixtures.statements import ITEMS, ROWS, equal, numbered, play_while_captured

IDENTITIES = ("DEFAULT", "USING INDEX docs_code", "FULL")
LARGE = "repeat(md5('{}'), 200)"
DOCS = [
    "CREATE TABLE docs (id int PRIMARY KEY, code text NOT NULL, n int, big text, other text)",
    "CREATE UNIQUE INDEX docs_code ON docs (code)",
    "ALTER TABLE docs ALTER big SET STORAGE EXTERNAL, ALTER other SET STORAGE EXTERNAL",
    "INSERT INTO docs SELECT i, 'c' || i, 0, repeat(md5(i::text), 200), repeat(md5('o' || i), 200) FROM generate_series(1, 4) i",
]
UNCHANGED = """
    a INSERT INTO docs VALUES (10, 'c10', 0, {1}, {2})
    a UPDATE docs SET n = 1
    a UPDATE docs SET big = {3} WHERE id = 1
    a UPDATE docs SET n = 2 WHERE id = 1
    a UPDATE docs SET id = id + 100
    a UPDATE docs SET code = code || 'x'
    a BEGIN
    a UPDATE docs SET other = {4} WHERE id = 102
    a UPDATE docs SET n = 3
    a UPDATE docs SET code = code || 'y', n = 4
    a COMMIT
    a BEGIN
    a UPDATE docs SET big = 'small' WHERE id = 103
    a SAVEPOINT s
    a UPDATE docs SET big = {5}
    a ROLLBACK TO s
    a UPDATE docs SET n = 5
    a COMMIT
    a DELETE FROM docs WHERE id = 102
    a UPDATE docs SET n = 6
""".format(*[LARGE.format(n) for n in range(6)])


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_values_left_alone_are_whole_under_each_replica_identity(settings: Settings, late: bool) -> None:
    """Two large values, either of them left alone; also when capture comes after all of it."""
    chosen = [f"ALTER TABLE docs REPLICA IDENTITY {identity}" for identity in IDENTITIES]
    tables = [numbered(number, *DOCS, identity) for number, identity in enumerate(chosen)]
    prepare(settings, *itertools.chain(*tables))
    execute(settings, *numbered(0, chosen[0]))  # setup gave it FULL
    play_while_captured(settings, [*itertools.chain(*[numbered(number, UNCHANGED) for number in range(3)])], late=late)
    for number, key in enumerate(("id", "code", "id")):
        assert replay(settings, f"public.docs{number}") == selected(settings, f"docs{number}", key), IDENTITIES[number]


def test_with_replica_identity_nothing_inserts_go_on(settings: Settings) -> None:
    """Postgres refuses UPDATE and DELETE of such a published table; what it still takes is in the log."""
    prepare(settings, ITEMS, *ROWS[:1])
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "ALTER TABLE items REPLICA IDENTITY NOTHING", "INSERT INTO items VALUES (50, 5, 'n')")
        capture.reach()
        equal(settings, "items")
        execute(settings, "TRUNCATE items", "INSERT INTO items VALUES (51, 5, 'n')")
        capture.reach()
    equal(settings, "items")


def test_a_replica_identity_index_is_the_key_of_a_table_without_a_primary_key(settings: Settings) -> None:
    """The table has lost a column, gained one, and counts by itself; keys change and go."""
    prepare(
        settings,
        "CREATE TABLE loose (gone int, code text NOT NULL, part int NOT NULL, n int GENERATED ALWAYS AS IDENTITY)",
        "CREATE UNIQUE INDEX by_code ON loose (part, code); ALTER TABLE loose REPLICA IDENTITY USING INDEX by_code",
        "INSERT INTO loose SELECT i, 'c' || i, i % 3 FROM generate_series(1, 20) i",
        "ALTER TABLE loose DROP COLUMN gone, ADD COLUMN more text",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(
            settings,
            "INSERT INTO loose VALUES ('new', 1, DEFAULT, 'm')",
            "UPDATE loose SET more = code WHERE part = 1",
            "UPDATE loose SET code = code || '!', part = 9 WHERE part = 2",
            "DELETE FROM loose WHERE part = 0",
            "ALTER TABLE loose DROP COLUMN n",
            "UPDATE loose SET more = 'last' WHERE part = 9",
        )
        capture.reach()
    keyed = "SELECT json_build_object('part', part, 'code', code), row_to_json(l) FROM loose l"
    wanted = {orjson.dumps(key): row for key, row in rows(settings, keyed)}
    log = replay(settings, "public.loose")
    assert {key: {name: row.get(name) for name in ("code", "part", "more")} for key, row in log.items()} == wanted


def test_an_index_may_have_a_column_twice_the_key_has_it_once(settings: Settings) -> None:
    """Postgres refuses it of a primary key only. Keys in the log had it twice, which is not canonical, and no key of a warehouse."""
    prepare(
        settings,
        "CREATE TABLE loose (code text NOT NULL, part int NOT NULL, n int)",
        "CREATE UNIQUE INDEX by_part ON loose (part, code, part); ALTER TABLE loose REPLICA IDENTITY USING INDEX by_part",
        "INSERT INTO loose SELECT 'c' || i, i, 0 FROM generate_series(1, 4) i",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "UPDATE loose SET n = 1 WHERE part < 3", "UPDATE loose SET part = 9 WHERE part = 1")
        execute(settings, "DELETE FROM loose WHERE part = 4")
        capture.reach()
    keyed = "SELECT json_build_object('part', part, 'code', code), row_to_json(l) FROM loose l"
    assert replay(settings, "public.loose") == {orjson.dumps(key): row for key, row in rows(settings, keyed)}
