"""Documents in the real stores, with the process killed in a write, and local rows or the view lost (S20). At each step: test_steps.py."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from elasticsearch import Elasticsearch as Client

from headrace import codec
from headrace.change import Position, Row
from headrace.documents import Node
from headrace.settings import Settings
from headrace.stores import Doc, DocumentStore
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace.stores.redis import RedisPages
from headrace_ops import Stack
from tests.fixtures.documents import CATEGORIES, GENERATION, PRODUCTS, REVIEWS, Killed, Products, World, linear


class Killing:
    """A real store between whose steps the process can die: `plan["kill"]` says before which step, and how many writes later."""

    def __init__(self, store: Any, plan: dict[str, Any]) -> None:
        self._store, self.plan = store, plan

    def __copy__(self) -> Killing:
        return Killing(copy.copy(self._store), self.plan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "kill":
            self.plan["kill"] = value
        else:
            super().__setattr__(name, value)

    def write(self, docs: Sequence[Doc], position: Position | None, *, bulk: bool = False) -> None:
        self._die("before")
        if self.plan.get("kill") == "middle":
            self._store.write(docs, None, bulk=True)
        self._die("middle")
        self._store.write(docs, position, bulk=bulk)
        self._die("after")

    def _die(self, at: str) -> None:
        if self.plan.get("kill") == at:
            self.plan["kill"] = None
            raise Killed


class TextProducts(Products):
    """Redis keeps text."""

    def render(self, row: Node) -> Row:
        return {"json": codec.dumps(super().render(row)).decode()}


class Shop(World):
    """A world whose view is in a real store; `wipe` takes everything out of it, behind the store's back."""

    def __init__(
        self, settings: Settings, store: DocumentStore, cls: type[Products], wipe: Callable[[], object]
    ) -> None:
        super().__init__(settings, cls, Killing(store, {}))
        self.wipe = wipe

    def check(self) -> None:
        consumer = self.start()
        try:
            consumer.open(GENERATION)
            found = {row.key: row.value for row in consumer.scan(None, 10_000)}
        finally:
            consumer.close()
        assert {key: codec.loads(body["json"]) if "json" in body else body for key, body in found.items()} == linear(
            self.log.rows
        )


@pytest.fixture(params=["elasticsearch", "redis"])
def world(request: pytest.FixtureRequest, stack: Stack, tmp_path: Path) -> Iterator[Shop]:
    server = request.getfixturevalue("elasticsearch" if request.param == "elasticsearch" else "redis_server")
    settings = replace(Settings(), state=str(tmp_path / "state"), **{request.param: server.address()})
    if request.param == "elasticsearch":
        with Client(settings.elasticsearch) as client:
            store = ElasticsearchIndex(mappings={"dynamic": True})
            yield Shop(
                settings, store, Products, lambda: client.indices.delete(index="products-g1", ignore_unavailable=True)
            )
    else:
        with redis.Redis.from_url(settings.redis) as client:
            client.flushdb()
            yield Shop(settings, RedisPages(), TextProducts, client.flushdb)


@pytest.mark.parametrize("seed", range(2))
def test_a_history_with_kills_and_losses_equals_the_join(world: Shop, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(20):
        for _ in range(chance.randint(1, 6)):
            _change(world, chance)
        world.log.cut()
        world.run(kill=chance.choice([None, None, None, "before", "middle", "after"]), piece=chance.randint(1, 6))
        if chance.random() < 0.1:
            world.wipe()
        if chance.random() < 0.1:
            shutil.rmtree(world.settings.state, ignore_errors=True)
    world.log.cut()
    world.run()
    world.check()


def _change(world: Shop, chance: random.Random) -> None:
    table, key = chance.choice([PRODUCTS, CATEGORIES, REVIEWS]), chance.randint(1, 5)
    rows: dict[str, Row] = {
        PRODUCTS: {"category_id": chance.choice([None, 1, 2, 3]), "name": chance.choice("ab")},
        CATEGORIES: {"name": chance.choice("ab")},
        REVIEWS: {"product_id": chance.choice([None, 1, 2, 3]), "stars": chance.randint(1, 5)},
    }
    world.log.put(table, key, None if chance.random() < 0.3 else {"id": key, **rows[table]})
