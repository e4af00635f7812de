"""Values in Avro with a real schema registry: the same rows as in JSON, whoever reads them, and a log may change its codec."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import orjson
import pytest
from confluent_kafka import Consumer
from confluent_kafka.schema_registry import ConfigCompatibilityLevel, SchemaRegistryClient, ServerConfig
from confluent_kafka.schema_registry.avro import AvroDeserializer

from headrace.errors import Misconfigured, Transient
from headrace.log import Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.settings import Settings
from headrace_ops import Stack
from headrace_ops.registry import Registry
from tests.fixtures.capture import (
    PATIENCE,
    Running,
    capturing,
    changes,
    eventually,
    execute,
    prepare,
    refused,
    replay,
    selected,
)

T = "public.items"
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text, n int)"
BACKWARD = ServerConfig(compatibility=ConfigCompatibilityLevel.BACKWARD)
ANYTHING = ServerConfig(compatibility=ConfigCompatibilityLevel.NONE)


@pytest.fixture
def avro(settings: Settings, registry: Registry) -> Settings:
    return replace(settings, codec="avro")


def values(settings: Settings, table: str = T) -> list[bytes]:
    """Return the values of a table's topic as they are, without tombstones."""
    records = read_to_end(settings, {(Log(settings).topic_of(table), 0): BEGINNING})
    return [record.value for record in records if record.value is not None]


def client(registry: Registry) -> SchemaRegistryClient:
    return SchemaRegistryClient({"url": registry.address()})


def subject(settings: Settings) -> str:
    return f"{Log(settings).topic_of(T)}-value"


def test_a_log_changes_its_codec_in_the_middle(avro: Settings) -> None:
    """JSON, then Avro, then JSON: one state for readers, deletes with tombstones, a TRUNCATE over all of it."""
    settings = replace(avro, codec="json")
    prepare(settings, ITEMS, "CREATE TABLE other (LIKE items INCLUDING ALL)", "INSERT INTO other VALUES (1, 'a', 1)")
    for at, codec in enumerate(("json", "avro", "json")):
        with capturing(replace(settings, codec=codec)) as capture:
            capture.hear("streaming")
            execute(
                settings,
                f"INSERT INTO items SELECT {100 * at} + i, 'n' || i, i FROM generate_series(1, 10) i",
                "UPDATE items SET n = n + 1 WHERE id % 2 = 0",
                f"DELETE FROM items WHERE id = {100 * at} + 3",
                f"UPDATE items SET id = id + 50 WHERE id = {100 * at} + 5",
            )
            capture.reach()
            assert replay(settings, T) == selected(settings, T)
    assert {value[0] for value in values(settings)} == {0, ord("{")}
    with capturing(avro) as capture:
        execute(settings, "TRUNCATE items", "INSERT INTO items VALUES (1, 'after', 1)")
        capture.reach()
    assert replay(settings, T) == selected(settings, T)
    assert replay(settings, "public.other") == selected(settings, "other")
    reader = Log(settings).reader([T, "public.other"], None)
    batch = eventually("the reader reaches the end", lambda: reader.poll(0.2))
    reader.close()
    assert [change.row for change in batch.changes if change.table == T and change.row] == [
        {"id": 1, "name": "after", "n": 1}
    ]


@pytest.mark.parametrize(("first", "then"), [("avro", "avro"), ("avro", "json"), ("json", "avro")])
def test_a_value_left_out_is_taken_from_the_log_in_whichever_codec(avro: Settings, first: str, then: str) -> None:
    """The row is gone from Postgres, and capture that started again remembers nothing: I3, to the last digit of a document."""
    digits = "123456789012345678901234567890.10"
    note = f'{{"n": {digits}, "pad": "{"p" * 4000}"}}'
    wide = {"big text": "W" * 5000, "note json": note, "raw bytea": "\\x" + "00ff" * 2000, "many real[]": "{1,1.5}"}
    names = [name.split()[0] for name in wide]
    prepare(
        avro,
        f"CREATE TABLE items (id int PRIMARY KEY, n int, {', '.join(wide)})",
        *[f"ALTER TABLE items ALTER COLUMN {name} SET STORAGE EXTERNAL" for name in names],
        f"INSERT INTO items VALUES (1, 0, {', '.join(repr(value) for value in wide.values())})",
    )
    execute(avro, "ALTER TABLE items REPLICA IDENTITY DEFAULT")
    with capturing(replace(avro, codec=first)) as capture:
        capture.reach()
    execute(avro, "UPDATE items SET n = 1", "UPDATE items SET n = 2", "DELETE FROM items")
    with capturing(replace(avro, codec=then)) as capture:
        capture.reach()
    found = [change.row for change in changes(avro, T) if change.row]
    assert [row.pop("n") for row in found] == [0, 1, 2]
    assert found[0] == found[1] == found[2]
    assert all(digits.encode() in value for value in values(avro)[:3])


def test_columns_come_and_go_under_backward_compatibility(avro: Settings, registry: Registry) -> None:
    prepare(avro, ITEMS)
    client(registry).set_config(config=BACKWARD)
    try:
        with capturing(avro) as capture:
            capture.hear("streaming")
            execute(
                avro,
                "INSERT INTO items VALUES (1, 'a', 1)",
                "ALTER TABLE items ADD COLUMN more numeric(10,2)[]",
                "INSERT INTO items VALUES (2, 'b', 2, '{1.50}')",
                "ALTER TABLE items DROP COLUMN n",
                "INSERT INTO items VALUES (3, 'c', '{}')",
                "ALTER TABLE items ALTER COLUMN name TYPE varchar(80)",
                "UPDATE items SET name = 'd' WHERE id = 3",
            )
            capture.reach()
        # The changed type has the table read again (S12), which may be in the log already.
        assert [change.row for change in changes(avro, T) if change.read != "resnapshot"] == [
            {"id": 1, "name": "a", "n": 1},
            {"id": 2, "name": "b", "n": 2, "more": ["1.50"]},
            {"id": 3, "name": "c", "more": []},
            {"id": 3, "name": "d", "more": []},
        ]
        assert len(client(registry).get_versions(subject(avro))) >= 3
    finally:
        client(registry).set_config(config=ANYTHING)


def test_a_schema_that_the_registry_refuses_stops_capture_and_says_what_to_do(
    avro: Settings, registry: Registry
) -> None:
    """A column whose type changed is no compatible schema; once it is allowed, capture goes on and nothing is lost."""
    prepare(avro, ITEMS, "INSERT INTO items VALUES (1, 'a', 1)")
    with capturing(avro) as capture:
        capture.reach()
    client(registry).set_config(subject(avro), BACKWARD)
    execute(
        avro,
        "ALTER TABLE items ALTER COLUMN name TYPE bytea USING name::bytea",
        "ALTER TABLE items ALTER COLUMN n TYPE text",
    )
    execute(avro, "INSERT INTO items VALUES (2, '\\x62', 'two')")
    error = refused(avro)
    assert error.code == "schema-refused"
    assert isinstance(error, Misconfigured)
    assert subject(avro) in error.remedy
    assert "delete" not in error.remedy, "the records name its schemas"
    client(registry).set_config(subject(avro), ANYTHING)
    with capturing(avro) as capture:
        eventually("it was read again (S12)", lambda: capture.reach().inexact == ())
    first, second = {"id": 1, "name": "a", "n": 1}, {"id": 2, "name": "Yg==", "n": "two"}
    assert [change.row for change in changes(avro, T) if change.read != "resnapshot"] == [first, second]
    assert list(replay(avro, T).values()) == [{"id": 1, "name": "YQ==", "n": "1"}, second]


def test_while_the_registry_is_away_capture_waits_and_goes_on(avro: Settings, registry: Registry) -> None:
    """What it has asked for already it needs no more; a new table waits for it."""
    prepare(avro, ITEMS, "CREATE TABLE other (LIKE items INCLUDING ALL)")
    with capturing(avro) as capture:
        execute(avro, "INSERT INTO items VALUES (1, 'a', 1)")
        capture.reach()
        registry.kill()
        execute(avro, "INSERT INTO items VALUES (2, 'b', 2)")
        capture.reach()
        execute(avro, "INSERT INTO other VALUES (1, 'a', 1)")
        assert "registry-away" in capture.hear("waiting")
        registry.start()
        capture.reach()
    assert replay(avro, T) == selected(avro, "items")
    assert replay(avro, "public.other") == selected(avro, "other")


def test_readers_say_that_the_registry_is_away_or_does_not_know(
    avro: Settings, registry: Registry, stack: Stack
) -> None:
    prepare(avro, ITEMS, "INSERT INTO items VALUES (1, 'a', 1)")
    with capturing(avro) as capture:
        capture.reach()
    registry.kill()
    with pytest.raises(Transient) as away:
        changes(replace(avro, schema_registry=avro.schema_registry.replace("//", "//me:secret@")), T)
    assert away.value.code == "registry-away"
    assert "secret" not in str(away.value)
    registry.start()
    log = Log(avro)
    value = values(avro)[0]
    with pytest.raises(Misconfigured) as unknown:
        log.values.envelope(value[:1] + (1 << 30).to_bytes(4, "big") + value[5:], T, 1)
    assert unknown.value.code == "schema-unknown"
    with pytest.raises(Misconfigured) as elsewhere:
        changes(replace(avro, schema_registry=avro.schema_registry.replace("/apis/ccompat/v7", "/elsewhere")), T)
    assert elsewhere.value.code == "registry-refuses"
    assert log.values.envelope(value, T, 1)["after"] == {"id": 1, "name": "a", "n": 1}


def test_a_record_is_never_read_by_the_schema_of_another(avro: Settings) -> None:
    """A registry that was replaced gives its ids anew: to another table's schema, or to another version of the table's own."""
    columns = "(id int PRIMARY KEY, {} text, {} text)"
    prepare(
        avro, f"CREATE TABLE items {columns.format('name', 'mail')}", "INSERT INTO items VALUES (1, 'Ann', 'ann@x')"
    )
    execute(
        avro, f"CREATE TABLE products {columns.format('title', 'sku')}", "INSERT INTO products VALUES (1, 't', 's')"
    )
    prepare(avro)
    with capturing(avro) as capture:
        capture.reach()
        execute(
            avro,
            "ALTER TABLE items RENAME name TO other",
            "ALTER TABLE items RENAME mail TO name",
            "ALTER TABLE items RENAME other TO mail",
            "INSERT INTO items VALUES (2, 'bob@x', 'Bob')",
        )
        capture.reach()
    log = Log(avro)
    mine, version_2 = values(avro)[0], values(avro)[-1]
    for written in (values(avro, "public.products")[0], version_2):
        assert written[:5] != mine[:5]
        with pytest.raises(Misconfigured, match="replaced") as error:
            log.values.envelope(written[:5] + mine[5:], T, 1)
        assert error.value.code == "schema-unknown"
    assert log.values.envelope(mine, T, 1)["after"] == {"id": 1, "name": "Ann", "mail": "ann@x"}


def test_a_consumer_that_knows_nothing_of_headrace_reads_the_table(avro: Settings, registry: Registry) -> None:
    """Confluent's own consumer and deserializer, read_committed; keys are JSON, tombstones remove."""
    prepare(avro, ITEMS, "INSERT INTO items SELECT i, 'n' || i, i FROM generate_series(1, 20) i")
    with capturing(avro) as capture:
        capture.hear("streaming")
        execute(avro, "UPDATE items SET n = NULL WHERE id < 5", "DELETE FROM items WHERE id > 15")
        capture.reach()
    assert plain(avro, registry) == {orjson.loads(key)["id"]: row for key, row in selected(avro, "items").items()}


def plain(settings: Settings, registry: Registry) -> dict[int, dict[str, Any]]:
    said = {"bootstrap.servers": settings.kafka, "group.id": "stranger", "auto.offset.reset": "earliest"}
    consumer = Consumer(said | {"isolation.level": "read_committed", "enable.partition.eof": True})
    read = AvroDeserializer(client(registry))
    consumer.subscribe([Log(settings).topic_of(T)])
    state: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        message = consumer.poll(1.0)
        if message is not None and message.error():
            break
        if message is not None:
            key = orjson.loads(message.key())["id"]
            state.pop(key, None)
            envelope: Any = read(message.value())
            if envelope and envelope["after"]:
                state[key] = envelope["after"]
    consumer.close()
    return state


def test_a_codec_that_is_none_is_refused(settings: Settings) -> None:
    prepare(settings, ITEMS)
    assert refused(replace(settings, codec="xml")).code == "bad-setting"
    capture = Running(replace(settings, codec="avro", schema_registry="nowhere"))
    eventually("capture refuses", lambda: capture.error)
    capture.stop()
    assert "HEADRACE_SCHEMA_REGISTRY" in str(capture.error)
