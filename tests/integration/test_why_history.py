"""After any history, what `headrace wait` waits for is shown, and what `headrace why` tells is what Postgres has and the log says.

The document is held against a join by brute force of the rows in Postgres; each row that is told against the last record of its key
in the log as it is read by itself, and its transaction against Postgres.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import orjson
import psycopg
import pytest
from typer.testing import CliRunner

from headrace.change import Change, format_lsn
from headrace.cli import app
from headrace.documents import Aggregate, Many, One
from headrace.documents.declaration import Level
from headrace.log import Log
from headrace.settings import Settings, environment
from headrace.stores.elasticsearch import ElasticsearchIndex
from tests.fixtures.capture import capturing, now, prepare, rows
from tests.fixtures.documents_deep import COLUMNS, Deep, Join
from tests.fixtures.seeds import seeds, steps
from tests.fixtures.serving import await_live, serving

pytestmark = pytest.mark.usefixtures("elasticsearch")
SEEDS = seeds("1")
STEPS = steps(2)
_KEYS = 6
Held = dict[str, dict[int, dict[str, Any]]]


class Told(Deep):
    """Documents of several levels."""

    store = ElasticsearchIndex("why-deep", mappings={"dynamic": False})


def statement(chance: Random) -> str:
    """Return a statement that changes something."""
    table = chance.choice(list(COLUMNS))
    key, other = chance.randint(1, _KEYS), chance.randint(1, _KEYS)
    values = ", ".join(_value(name, kind, chance) for name, kind in COLUMNS[table].items() if name != "id")
    names = ", ".join(name for name in COLUMNS[table] if name != "id")
    put = f"INSERT INTO {table} (id, {names}) VALUES ({key}, {values}) ON CONFLICT (id) DO UPDATE SET ({names}) = ROW ({values})"
    return chance.choice(
        [
            *[put] * 8,
            f"DELETE FROM {table} WHERE id = {key}",
            f"UPDATE {table} SET id = {other} WHERE id = {key} AND NOT EXISTS (SELECT FROM {table} WHERE id = {other})",
            f"UPDATE {table} SET id = id",
            f"TRUNCATE {table}" if chance.random() < 0.2 else put,
        ]
    )


def _value(name: str, kind: str, chance: Random) -> str:
    if chance.random() < 0.2:
        return "NULL"
    made = {
        "integer": str(chance.randint(1, _KEYS)),
        "boolean": chance.choice(["true", "false"]),
        "numeric": f"{chance.randint(-2, 2)}.{chance.choice(['1', '10', '00'])}",
    }
    return made.get(kind, f"'{chance.choice('abc')}'")


def held(settings: Settings) -> tuple[Held, dict[tuple[str, int], int]]:
    """Return the rows in Postgres, and the transaction that wrote each."""
    found: Held = {}
    xids: dict[tuple[str, int], int] = {}
    for table in COLUMNS:
        found[table] = {}
        for xmin, row, paid in rows(
            settings, f"SELECT xmin::text::int, row_to_json(t), to_jsonb(t) ->> 'paid' FROM {table} t"
        ):
            found[table][row["id"]] = row | ({"paid": paid} if "paid" in row else {})
            xids[table, row["id"]] = xmin
    return found, xids


class Oracle:
    """What must be told."""

    def __init__(self, settings: Settings) -> None:
        self.log = Log(settings)
        self.rows, self.xids = held(settings)
        self.documents = Join(self.rows).documents()
        self.newest: dict[tuple[str, bytes], Change] = {}
        for change in self.log.scan(*COLUMNS):
            self.newest[change.table, change.key] = change

    def check(self, told: dict[str, Any], id_: str) -> None:
        """Hold an answer against it."""
        document = told["document"]
        assert (document and document["value"]) == self.documents.get(id_)
        root, (table, key) = told["made_from"], id_.split("-")
        row = self.rows[f"public.{table}"].get(int(key))
        assert (told["waits"], told["parked"], told["stale"]) == (False, None, False)
        if row is None:
            assert root is None or (root["table"], root.get("count")) == (f"public.{table}", 0)
            return
        (declared,) = (each for each in Told.documents if each.table == f"public.{table}")
        self._row(root, declared, row)
        if "rating" in root["joins"]:
            assert root["joins"]["rating"]["values"] == self.documents[id_]["rating"]

    def _row(self, fact: dict[str, Any], level: Level, row: dict[str, Any]) -> None:
        change = self.newest[level.table, orjson.dumps({"id": row["id"]})]
        assert (fact["table"], fact["key"], fact["row"]) == (level.table, {"id": row["id"]}, row)
        assert change.row == row
        place = fact["topic"], fact["partition"], fact["offset"], fact["ordinal"], fact["xid"], fact["read"]
        topic = self.log.topic_of(level.table)
        assert place == (topic, change.partition, change.offset, change.ordinal, change.xid, change.read or "stream")
        assert fact["commit"] == {"epoch": change.version.epoch, "lsn": format_lsn(change.version.lsn)}
        assert fact["read"] != "stream" or fact["xid"] == self.xids[level.table, row["id"]]
        assert fact["joins"].keys() == level.joins.keys()
        for name, join in level.joins.items():
            made, members = fact["joins"][name], self._members(join, row)
            assert (made["table"], made["count"]) == (join.table, len(members)), name
            assert [each["key"]["id"] for each in made["rows"]] == [each["id"] for each in members[:3]], name
            for told, each in zip(made["rows"], members, strict=False):
                self._row(told, join, each)

    def _members(self, join: One | Many | Aggregate, row: dict[str, Any]) -> list[dict[str, Any]]:
        there = self.rows[join.table]
        if isinstance(join, One):
            found = there.get(row[join.on[0]])
            return [found] if found else []
        some = [there[key] for key in sorted(there) if there[key][join.by[0]] == row["id"]]
        some = [each for each in some if all(each[name] in list(values) for name, values in join.where.items())]
        if isinstance(join, Aggregate):
            return some
        for column, falling in reversed(join.order):
            known = [each for each in some if each[column] is not None]
            known.sort(key=lambda each: _ordered(each[column]), reverse=falling)
            some = known + [each for each in some if each[column] is None]
        return some[: join.limit] if join.limit else some


def _ordered(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value.lstrip("-")[:1].isdigit() else value


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_told_is_what_postgres_and_the_log_have(settings: Settings, seed: int) -> None:
    chance = Random(seed)
    settings = replace(settings, partitions=3)
    tables = [
        f"CREATE TABLE {table} ({', '.join(f'{name} {kind}' for name, kind in of.items())}, PRIMARY KEY (id))"
        for table, of in COLUMNS.items()
    ]
    prepare(settings, *tables, *(statement(chance) for _ in range(40)))
    with capturing(settings) as capture, serving(settings, view=Told) as control:
        capture.reach()
        await_live(control, "view")
        for _ in range(STEPS):
            _change(settings, chance)
            lsn = now(settings)
            up_to = ["--lsn", format_lsn(lsn)] if chance.random() < 0.5 else []
            command(settings, "wait", "view", *up_to, "--timeout", "180")
            oracle = Oracle(settings)
            ids = [f"{table}-{key}" for table in ("products", "categories", "tags") for key in range(1, _KEYS + 2)]
            for id_ in chance.sample(ids, 5):
                said = command(settings, "why", "view", id_, "--limit", "3", "--json", known=id_ in oracle.documents)
                oracle.check(orjson.loads(said), id_)


def _change(settings: Settings, chance: Random) -> None:
    with psycopg.connect(settings.dsn) as connection:
        for _ in range(chance.randint(1, 12)):
            connection.execute(statement(chance).encode())
            if chance.random() < 0.5:
                connection.commit()


def command(settings: Settings, *words: str, known: bool = True) -> str:
    """Run a command; of a document that is not known it may say so."""
    ended = CliRunner().invoke(app, words, env=environment(settings) | {"COLUMNS": "200"})
    assert ended.exit_code == 0 or (ended.exit_code == 1 and not known), ended.output
    return ended.stdout
