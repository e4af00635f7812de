"""Tables read again under HEADRACE_CODEC=avro: through a kill, a schema that changes meanwhile, and one that the registry refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.log import Log
from headrace.settings import Settings
from headrace_ops.registry import Registry
from tests.fixtures.capture import (
    Running,
    capturing,
    changes,
    end,
    eventually,
    execute,
    prepare,
    replay,
    selected,
    spawn,
)
from tests.fixtures.meanwhile import meanwhile
from tests.fixtures.mortal import Life
from tests.fixtures.resnapshots import Load, ask, done, jobs, unnoticed, unseen
from tests.integration.test_avro import ANYTHING, BACKWARD, client, subject, values
from tests.integration.test_capture_append_only import EVENTS, T, equal, prepare_append_only
from tests.integration.test_resnapshot_append_only import MANY, DyingOfCuts

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, no int, j jsonb, d int[], f float8)"
ROWS = """INSERT INTO items SELECT i, i, '{"a": [1.50, null]}', '{1,NULL}', i / 4.0 FROM generate_series(1, 2000) i"""
MORE = "ALTER TABLE items ADD COLUMN more real DEFAULT 2.5"

pytestmark = pytest.mark.usefixtures("blind")


@pytest.fixture
def avro(settings: Settings, registry: Registry) -> Settings:
    return replace(settings, codec="avro")


def all_avro(settings: Settings, table: str) -> bool:
    return all(value[0] == 0 for value in values(settings, table))


@pytest.mark.parametrize("when", ["before the kill", "after it"])
def test_killed_in_the_middle_and_its_schema_changed(avro: Settings, registry: Registry, when: str) -> None:
    """Under load, and under BACKWARD compatibility: the pass begins again with the new column, and ends exact."""
    client(registry).set_config(config=BACKWARD)
    settings = replace(avro, cut_records=100)
    prepare(settings, ITEMS, ROWS)
    try:
        with capturing(settings) as capture:
            capture.reach()
            unseen(settings, "DELETE FROM items WHERE id % 100 = 3", "UPDATE items SET no = -no WHERE id % 100 = 5")
            capture.reach()
        with meanwhile(Load(settings, 2000)):
            process = spawn(settings)
            try:
                ask(settings, tables=["public.items"])
                eventually("it reads", lambda: jobs(settings)["public.items"]["rows"] > 400)
                if when == "before the kill":
                    execute(settings, MORE)
            finally:
                end(process)
            if when == "after it":
                execute(settings, MORE)
            with capturing(settings) as capture:
                done(settings, capture, "public.items")
                eventually("it is exact", lambda: capture.reach().inexact == ())
        with capturing(settings) as capture:
            eventually("it is exact", lambda: capture.reach().inexact == ())
    finally:
        client(registry).set_config(config=ANYTHING)
    assert replay(settings, "public.items") == selected(settings, "items")
    assert all_avro(settings, "public.items")
    assert {schema.version for schema in Log(settings).schemas().values()} == {1, 2}


def test_an_append_only_table_killed_while_it_is_written(avro: Settings) -> None:
    """Also its deletes are of the schema that they name."""
    settings = replace(avro, cut_records=1000)
    prepare_append_only(settings, EVENTS, MANY)
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, "ALTER TABLE events ADD COLUMN more text DEFAULT 'x'")
    halves: set[str] = set()
    for cuts in range(1, 12):
        running = Running(settings, DyingOfCuts(settings, Life(), cuts, after=True))
        eventually("it dies or is done", lambda: running.error or jobs(settings).get(T, {}).get("phase") == "done")  # noqa: B023
        if running.error is None:
            running.stop()
            break
        running.join()
        halves.add(jobs(settings)[T]["phase"])
    with capturing(settings) as capture:
        eventually("it is exact", lambda: capture.reach().inexact == ())
    equal(settings)
    assert halves >= {"writing", "removing"}
    assert all_avro(settings, T)


def test_a_log_in_json_is_avro_when_it_was_read_again(avro: Settings) -> None:
    """What of the log is Avro and what JSON makes no difference to what may be written."""
    prepare(replace(avro, codec="json"), ITEMS, ROWS)
    with capturing(replace(avro, codec="json")) as capture:
        capture.reach()
    with capturing(avro) as capture:
        capture.hear("streaming")
        with unnoticed(avro):
            execute(avro, "DELETE FROM items WHERE id < 10", "UPDATE items SET no = 0 WHERE id = 50")
        execute(avro, "UPDATE items SET f = NULL WHERE id = 51")
        ask(avro, tables=["public.items"])
        done(avro, capture, "public.items")
    assert replay(avro, "public.items") == selected(avro, "items")
    last = {change.key: change.offset for change in changes(avro, "public.items")}
    assert len([1 for offset, value in enumerate(values(avro, "public.items")) if value[0]]) == 2000
    assert min(last.values()) >= 2000


def test_a_schema_that_the_registry_refuses_lets_the_table_rest(avro: Settings, registry: Registry) -> None:
    """The stream goes on; once it is allowed and asked again, the table ends exact."""
    prepare(avro, ITEMS, ROWS, "CREATE TABLE others (id int PRIMARY KEY)")
    with capturing(avro) as capture:
        capture.reach()
        client(registry).set_config(subject(avro), BACKWARD)
        execute(avro, "ALTER TABLE items ALTER COLUMN no TYPE text USING 'no ' || no")
        assert "schema-refused" in capture.hear("public.items cannot be read again")
        execute(avro, "INSERT INTO others VALUES (1)")
        assert capture.reach().inexact == ("public.items",)
        client(registry).set_config(subject(avro), ANYTHING)
        ask(avro, tables=["public.items"])
        done(avro, capture, "public.items")
        assert capture.reach().inexact == ()
    assert replay(avro, "public.items") == selected(avro, "items")
    assert replay(avro, "public.others") == selected(avro, "others")
