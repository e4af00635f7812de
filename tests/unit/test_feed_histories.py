"""A Debezium feed against a model of its source (S28): whatever the connector sends, and again, whoever reads it ends with its rows."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from headrace.change import Position
from headrace.consumer import ALL, Batch
from headrace.documents import Document, DocumentConsumer, Many, Node
from headrace.log import FeedReader, Log
from headrace.settings import Settings
from headrace.stores.duckdb import DuckDBStore
from tests.fixtures.documents import GENERATION, Killed, Memory
from tests.fixtures.envelopes import value, with_schema
from tests.fixtures.seeds import seeds
from tests.fixtures.simulated import Broker, simulate
from tests.fixtures.tables import FIRST

SEEDS = seeds("0-11")
HOUR = 3_600_000
T, U = "public.t", "public.u"
TEMPORAL = "io.debezium.time."


def numeric(length: int, scale: int) -> dict[str, Any]:
    said = {"type": "NUMERIC", "length": str(length), "scale": str(scale)}
    return {"type": "string", "parameters": {f"__debezium.source.column.{name}": each for name, each in said.items()}}


def array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


KINDS: dict[str, tuple[dict[str, Any], list[tuple[Any, Any]]]] = {
    "smallint": ({"type": "int16"}, [(5, 5), (-32768, -32768)]),
    "integer": ({"type": "int32"}, [(7, 7), (2**31 - 1, 2**31 - 1)]),
    "bigint": ({"type": "int64"}, [(2**40, 2**40), (-(2**63), -(2**63))]),
    "double": ({"type": "double"}, [(1.5, 1.5), (1e300, 1e300), (3.0, 3), ("NaN", "NaN"), ("-Infinity", "-Infinity")]),
    "real": ({"type": "float"}, [(0.1, 0.1), (2.0, 2), ("Infinity", "Infinity")]),
    "boolean": ({"type": "boolean"}, [(True, True), (False, False)]),
    "text": ({"type": "string"}, [("", ""), ('é\n"x', 'é\n"x'), ("null", "null"), ("NaN", "NaN")]),
    "numeric(6,2)": (numeric(6, 2), [("1.50", "1.50"), ("NAN", "NaN"), ("-9999.99", "-9999.99")]),
    "numeric(8,2)": (numeric(8, 2), [("123456.78", "123456.78"), ("NAN", "NaN")]),
    "numeric(12,4)": (numeric(12, 4), [("1.5000", "1.5000"), ("-0.0001", "-0.0001")]),
    "numeric": (numeric(0, 0), [("1" * 50 + ".5", "1" * 50 + ".5"), ("NEGATIVE_INFINITY", "-Infinity")]),
    "date": (
        {"type": "string", "name": TEMPORAL + "IsoDate"},
        [("2024-01-02Z", "2024-01-02"), ("-0043-03-15Z", "0044-03-15 BC")],
    ),
    "timestamp": (
        {"type": "string", "name": TEMPORAL + "IsoTimestamp"},
        [("2024-01-02T03:04:05.1Z", "2024-01-02T03:04:05.1"), ("+294247-01-10T04:00:25.2Z", "infinity")],
    ),
    "zoned": (
        {"type": "string", "name": TEMPORAL + "ZonedTimestamp"},
        [("2024-01-02T03:04:05.100000Z", "2024-01-02T03:04:05.100000Z"), ("infinity", "infinity")],
    ),
    "jsonb": (
        {"type": "string", "name": "io.debezium.data.Json"},
        [('{"a": [1, 2.5]}', {"a": [1, 2.5]}), ('"x"', "x")],
    ),
    "uuid": ({"type": "string", "name": "io.debezium.data.Uuid"}, [("b68a35a7-17ad-35b3-af2a-ae46edb4545a",) * 2]),
    "bytes": ({"type": "bytes"}, [("aGVq", "aGVq"), ("", "")]),
    "integer[]": (array({"type": "int32"}), [([1, None, 2], [1, None, 2]), ([], [])]),
    "text[]": (array({"type": "string"}), [(["a", "NaN", None], ["a", "NaN", None])]),
    "double[]": (array({"type": "double"}), [([1.5, "NaN"], [1.5, "NaN"])]),
}
"""Each type's field in Connect's schema; values as the connector writes them, and in the form of headrace's log."""
NUMBERS = [
    kind for kind in KINDS if kind.startswith("numeric") or kind in ("smallint", "integer", "bigint", "double", "real")
]


class Connector:
    """A source's tables, and what the connector writes of them."""

    def __init__(self, broker: Broker, chance: random.Random, *, schemas: bool, tombstones: bool) -> None:
        self.broker, self.chance, self.schemas, self.tombstones = broker, chance, schemas, tombstones
        self.columns: dict[str, dict[str, str]] = {
            T: {"id": "integer", "n": "integer"},
            U: {"id": "integer", "t_id": "integer"},
        }
        self.rows: dict[str, dict[int, dict[str, Any]]] = {T: {}, U: {}}
        self.kinds: dict[tuple[str, str], set[str]] = {}
        self.expected: dict[tuple[str, str], dict[str, tuple[str, Any]]] = {}
        self.lsn = self.committed = 100
        self.first = True
        self.sent: list[tuple[str, int, bytes, bytes, str, Any]] = []
        for table in (T, U):
            broker.make(f"s.{table}", chance.choice([1, 1, 2, 3]))

    def transaction(self) -> None:
        before = None if self.first else self.committed
        for _ in range(self.chance.randint(1, 4)):
            self.lsn += self.chance.randint(1, 9)
            self._change(before)
        self.lsn += 8
        self.committed, self.first = self.lsn, False

    def snapshot(self) -> None:
        """Of rows that were there before."""
        for _ in range(self.chance.randint(0, 8)):
            table, id_ = self.chance.choice([T, U]), self.chance.randint(1, 9)
            self._put(table, id_, "r", None)

    def _change(self, before: int | None) -> None:
        table, id_ = self.chance.choice([T, U]), self.chance.randint(1, 9)
        do = self.chance.random()
        if id_ in self.rows[table] and do < 0.3:
            self._delete(table, id_, before)
        elif id_ in self.rows[table] and do < 0.4:
            other = self.chance.randint(1, 9)
            if other not in self.rows[table]:
                self._delete(table, id_, before)
                self._put(table, other, "c", before)
        else:
            self._put(table, id_, "u" if id_ in self.rows[table] else "c", before)

    def _put(self, table: str, id_: int, op: str, before: int | None) -> None:
        row, said = {}, {}
        for name, kind in self.columns[table].items():
            written, plain = (
                self.chance.choice([*KINDS[kind][1], (None, None)]) if name.startswith("x") else (None, None)
            )
            if not name.startswith("x"):
                written = plain = {"id": id_, "n": self.lsn, "t_id": self.chance.choice([None, *range(1, 6)])}[name]
            row[name], said[name] = (kind, plain if self.schemas else written), written
            looks = {"text"} if isinstance(written, str) and not self.schemas else set()
            self.kinds.setdefault((table, name), set()).update({kind}, looks)
        self.rows[table][id_] = row
        self._send(table, id_, op, said, row, before)

    def _delete(self, table: str, id_: int, before: int | None) -> None:
        del self.rows[table][id_]
        self._send(table, id_, "d", None, None, before)

    def _send(self, table: str, id_: int, op: str, said: Any, row: Any, before: int | None) -> None:
        payload = value(op, said, [before, self.lsn])
        key = orjson.dumps({"id": id_})
        if self.schemas:
            fields = [KINDS[kind][0] | {"field": name} for name, kind in self.columns[table].items()]
            payload = with_schema(payload, fields)
            of_key = {"type": "struct", "fields": [{"type": "int32", "field": "id"}]}
            key = orjson.dumps({"schema": of_key, "payload": {"id": id_}})
        self._emit((table, id_, key, payload, op, row))
        self.sent.append((table, id_, key, payload, op, row))

    def _emit(self, event: Any) -> None:
        table, id_, key, payload, op, row = event
        place = f"s.{table}", id_ % len(self.broker.topics[f"s.{table}"])
        self.broker.write(place, key, payload, [])
        if op == "d" and self.tombstones:
            self.broker.write(place, key, None, [])
        named = table, f'{{"id":{id_}}}'
        self.expected.pop(named, None)
        if row is not None:
            self.expected[named] = row

    def restart(self) -> None:
        """Send again what was not noted. The first transaction after a start knows none before it."""
        self.first = True
        for event in self.sent[len(self.sent) - self.chance.randint(0, min(6, len(self.sent))) :]:
            self._emit(event)

    def alter(self) -> None:
        table = self.chance.choice([T, U])
        columns = self.columns[table]
        others = [name for name in columns if name.startswith("x")]
        do = self.chance.choice(["add", "add", "retype", "retype", "drop", "rename"])
        if do == "add" or not others:
            columns[f"x{self.chance.randint(1, 3)}_{table[-1]}"] = self.chance.choice(
                self.chance.choice([NUMBERS, list(KINDS)])
            )
            return
        name = self.chance.choice(others)
        kind = columns.pop(name)
        if do == "retype":
            columns[name] = self.chance.choice(
                NUMBERS if kind in NUMBERS and self.chance.random() < 0.7 else list(KINDS)
            )
        elif do == "rename":
            columns.setdefault(f"x{self.chance.randint(1, 3)}_{table[-1]}", kind)


class Plain(DocumentConsumer):
    document = Document(T)
    store: Any

    def render(self, row: Node) -> dict[str, Any]:
        return {"n": row["n"]}


class Joined(DocumentConsumer):
    document = Document(T, us=Many(U, by="t_id"))
    store: Any

    def render(self, row: Node) -> dict[str, Any]:
        return {"n": row["n"], "us": [u["id"] for u in row.us]}


class Served:
    """A view, with its reader; a kill takes both away, and what is durable stays."""

    def __init__(self, log: Log, tables: Any, make: Callable[[], Any], generation: Any) -> None:
        self.log, self.tables, self.make, self.generation = log, tables, make, generation
        self.consumer: Any = None
        self.reader: FeedReader | None = None
        self.complete = False
        self.position: Position | None = None

    def open(self) -> None:
        self.consumer = self.make()
        position = self.consumer.open(self.generation)
        reader = self.log.reader(self.tables, position)
        assert isinstance(reader, FeedReader)
        self.reader = reader

    def kill(self) -> None:
        if self.consumer is not None:
            self.consumer.close()
        self.consumer = self.reader = None

    def poll(self) -> bool:
        if self.reader is None:
            self.open()
        assert self.reader is not None
        batch = self.reader.poll(0.0)
        if batch is None:
            return False
        self._apply(batch)
        return batch.complete

    def _apply(self, batch: Batch) -> None:
        try:
            self.consumer.apply(batch)
        except Killed:
            self.kill()
        else:
            if batch.complete:
                self.position = batch.position.copy()

    def at_end(self, broker: Broker) -> bool:
        return self.position is not None and all(
            at >= part.end
            for topic, ats in self.position.offsets.items()
            for at, part in zip(ats, broker.topics[topic], strict=True)
        )


class World:
    """A connector, and three views of what it writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.broker = Broker(chance)
        settings = Settings(
            source="s",
            feed="debezium",
            batch_records=chance.choice([1, 3, 50]),
            warehouse=str(folder / "w.duckdb"),
            warehouse_memory="256MB",
            state=str(folder / "state"),
        )
        log = simulate(monkeypatch, self.broker, settings)
        schemas, tombstones = chance.random() < 0.7, chance.random() < 0.8
        self.connector = Connector(self.broker, chance, schemas=schemas, tombstones=tombstones)
        self.stores = {"plain": Memory(), "joined": Memory()}
        self.views = {"warehouse": Served(log, ALL, lambda: DuckDBStore(settings, "warehouse"), FIRST)}
        for name, of, tables in (("plain", Plain, [T]), ("joined", Joined, [T, U])):
            made: Any = type(of.__name__, (of,), {"store": self.stores[name]})
            generation = replace(GENERATION, consumer=name)
            self.views[name] = Served(log, tables, partial(made, settings, name), generation)

    def run(self) -> None:
        doing = {
            self.connector.transaction: 35,
            self.connector.restart: 7,
            self.connector.alter: 10,
            self.compact: 10,
            self.kill: 8,
            self.die: 4,
            self.read: 26,
        }
        self.connector.snapshot()
        for do in self.chance.choices(list(doing), list(doing.values()), k=self.chance.randint(10, 60)):
            self.broker.now += self.chance.choice([0, 10, 1000, HOUR])
            do()
        for store in self.stores.values():
            store.kill = None
        for name, view in self.views.items():
            self.finish(name, view)
        self.check_rows()
        self.check_documents()

    def compact(self) -> None:
        place = self.chance.choice(self.broker.places())
        self.broker.roll(place)
        self.broker.compact(place, 0, 100 * HOUR)

    def kill(self) -> None:
        self.chance.choice(list(self.views.values())).kill()

    def die(self) -> None:
        self.chance.choice(list(self.stores.values())).kill = self.chance.choice(["before", "middle", "after"])

    def read(self) -> None:
        for _ in range(self.chance.randint(1, 5)):
            self.chance.choice(list(self.views.values())).poll()

    def finish(self, name: str, view: Served) -> None:
        for _ in range(2000):
            self.broker.now += 1000
            if view.poll() and view.at_end(self.broker):
                return
        raise AssertionError(f"{name} does not come to the end")

    def check_rows(self) -> None:
        expected = self.connector.expected
        found = {(row.collection, row.key): row.value for row in self.views["warehouse"].consumer.scan(None, 1000)}
        assert found.keys() == expected.keys()
        for place, row in found.items():
            assert expected[place].keys() <= row.keys()
            for name, mine in row.items():
                kind, said = expected[place].get(name, ("", None))
                kinds = self.connector.kinds[place[0], name]
                assert same(mine, kind, said, kinds), (place, name, mine, kind, said, kinds)

    def check_documents(self) -> None:
        rows = {
            place: {name: said for name, (_, said) in row.items()} for place, row in self.connector.expected.items()
        }
        us: dict[Any, list[int]] = {}
        for (table, _), row in sorted(rows.items()):
            if table == U:
                us.setdefault(row["t_id"], []).append(row["id"])
        t = [row for (table, _), row in rows.items() if table == T]
        assert self.stores["plain"].bodies() == {str(row["id"]): {"n": row["n"]} for row in t}
        assert self.stores["joined"].bodies() == {
            str(row["id"]): {"n": row["n"], "us": us.get(row["id"], [])} for row in t
        }


def same(mine: Any, kind: str, wanted: Any, kinds: set[str]) -> bool:
    """Whether a value is the one that was sent: in another form, where its column had several types."""
    if mine == wanted or mine is None or wanted is None or len(kinds) == 1:
        return bool(mine == wanted)
    if kinds <= set(NUMBERS) and "NaN" not in str(wanted) and "Inf" not in str(wanted):
        return abs(Decimal(str(mine)) - Decimal(str(wanted))) <= abs(Decimal(str(wanted))) * Decimal("1e-7")
    return not kinds <= set(NUMBERS)  # text: how it is written depends on the type


def test_whoever_reads_a_feed_ends_with_the_rows_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            world = World(monkeypatch, Path(folder), seed)
            try:
                world.run()
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
            finally:
                for view in world.views.values():
                    view.kill()
                monkeypatch.undo()
