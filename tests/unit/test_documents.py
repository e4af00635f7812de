"""Documents against a linear model: after any history, with kills and replays, the view is a plain join of the rows."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import codec
from headrace.change import Change, Checkpoint, Column, Position, Row, Source, TableSchema, Version
from headrace.consumer import Batch, Cursor, Generation, ViewRow
from headrace.documents import Document, DocumentConsumer, Many, Node, One, count, mean
from headrace.errors import Misconfigured, Poison, Refused, Transient
from headrace.settings import Settings
from headrace.stores import Doc

SOURCE = Source("7512", 1, "shop", "headrace", "headrace")
PRODUCTS, CATEGORIES, REVIEWS = "public.products", "public.categories", "public.reviews"
GENERATION = Generation("products", 1, "abc")
NOW = int(time.time() * 1000)


class Killed(BaseException):
    """The process died here."""


class Memory:
    """A document store in memory that outlives the consumer, with the version check of the real ones."""

    def __init__(self) -> None:
        self.docs: dict[str, Doc] = {}
        self.position: bytes | None = None
        self.written: list[Doc] = []
        self.kill: str | None = None

    def __copy__(self) -> Memory:
        return self

    def bind(self, settings: Settings, consumer: str) -> None:
        """Connect to nothing."""

    def generations(self) -> list[Generation]:
        return [GENERATION]

    def open(self, generation: Generation) -> Position | None:
        if self.position is None:
            self.docs.clear()
            return None
        return codec.decode_position(self.position)

    def write(self, docs: Sequence[Doc], position: Position | None, *, bulk: bool = False) -> None:
        self._die("before")
        for doc in docs:
            self.written.append(doc)
            if doc.id not in self.docs or self.docs[doc.id].version <= doc.version:
                self.docs[doc.id] = doc
        self._die("middle")
        if position is not None:
            self.position = codec.encode_position(position)
        self._die("after")

    def _die(self, at: str) -> None:
        if self.kill == at:
            self.kill = None
            raise Killed

    def wipe(self) -> None:
        self.docs.clear()
        self.position = None

    def promote(self) -> None:
        """Nothing to point."""

    def drop(self) -> None:
        self.wipe()

    def close(self) -> None:
        """Nothing to release."""

    def get(self, ids: Sequence[str]) -> Sequence[ViewRow]:
        return [row for row in self.scan(None, 10**9) if row.key in ids]

    def scan(self, after: Cursor | None, limit: int) -> Sequence[ViewRow]:
        start = after[1] if after else ""
        found = [
            ViewRow("", d.id, d.body, d.version) for d in self.docs.values() if d.body is not None and d.id > start
        ]
        return sorted(found, key=lambda row: row.key)[:limit]

    def bodies(self) -> dict[str, Row | None]:
        return {row.key: row.value for row in self.scan(None, 10**9)}


class Log:
    """A log in memory that makes the batches a reader would make."""

    def __init__(self) -> None:
        self.records: list[Change] = []
        self.cuts: list[tuple[int, int]] = []
        self.rows: dict[str, dict[int, Row]] = {PRODUCTS: {}, CATEGORIES: {}, REVIEWS: {}}

    def put(self, table: str, key: int, row: Row | None) -> None:
        if row is None:
            self.rows[table].pop(key, None)
        else:
            self.rows[table][key] = row
        lsn = 100 * (len(self.cuts) + 1)
        offset = len(self.records)
        op = "d" if row is None else "c"
        version = Version(1, lsn)
        self.records.append(Change(table, op, codec.encode_key({"id": key}), row, version, offset, 1, 1, 0, offset))

    def cut(self) -> None:
        self.cuts.append((len(self.records), 100 * (len(self.cuts) + 1)))

    def batches(self, position: Position | None, piece: int = 10**9) -> Iterator[Batch]:
        """Yield the whole log after `position`: pieces, the last of which completes the newest cut."""
        now = replace(position) if position else Position(source=SOURCE, topics={"t": "T"}, appended=NOW)
        start = now.offsets["t"][0] if now.offsets else 0
        end, lsn = self.cuts[-1]
        if now.version.lsn == lsn:
            return
        loading = now.loading
        while True:
            upto = min(start + piece, end)
            done = upto == end
            version = Version(1, lsn) if done else now.version
            now = replace(now, offsets={"t": [upto]}, version=version)
            checkpoint = Checkpoint(Version(1, lsn), 0, 0, {"t": [end]}, SOURCE) if done else None
            changes = self.records[start:upto]
            if loading:
                changes = list({(change.table, change.key): change for change in changes}.values())
            yield Batch(changes, now, checkpoint, loading, SCHEMAS)
            if done:
                return
            start = upto


SCHEMAS = {
    (table, 1): TableSchema(table, 1, tuple(Column(name, "integer") for name in columns), ("id",))
    for table, columns in {
        PRODUCTS: ("id", "category_id", "name"),
        CATEGORIES: ("id", "name"),
        REVIEWS: ("id", "product_id", "stars"),
    }.items()
}


class Products(DocumentConsumer):
    document = Document(PRODUCTS, category=One(CATEGORIES, on="category_id"), reviews=Many(REVIEWS, by="product_id"))

    def render(self, row: Node) -> Row:
        return {
            "name": row["name"],
            "category": row.category and row.category["name"],
            "reviews": [review["id"] for review in row.reviews],
            "stars": mean(row.reviews, "stars"),
            "count": count(row.reviews),
        }


def linear(rows: dict[str, dict[int, Row]]) -> dict[str, Row]:
    """Join by brute force, without headrace.documents."""
    expected: dict[str, Row] = {}
    for key, product in rows[PRODUCTS].items():
        reviews = sorted(id_ for id_, review in rows[REVIEWS].items() if review["product_id"] == key)
        stars = [rows[REVIEWS][id_]["stars"] for id_ in reviews]
        expected[str(key)] = {
            "name": product["name"],
            "category": (rows[CATEGORIES].get(product["category_id"]) or {"name": None})["name"],
            "reviews": reviews,
            "stars": sum(stars) / len(stars) if stars else None,
            "count": len(reviews),
        }
    return expected


class World:
    """A log, a view and a state folder; `run` is a process that starts, catches up and ends."""

    def __init__(self, folder: Path, cls: type[DocumentConsumer] = Products) -> None:
        self.settings = Settings(state=str(folder))
        self.log, self.store = Log(), Memory()
        self.cls: Any = type("Products", (cls,), {"store": self.store})
        self.consumer: DocumentConsumer | None = None

    def start(self) -> DocumentConsumer:
        self.consumer = self.cls(self.settings, "products")
        return self.consumer

    def run(self, kill: str | None = None, piece: int = 10**9, stop_after: int = 10**9) -> None:
        consumer = self.start()
        self.store.kill = kill
        try:
            position = consumer.open(GENERATION)
            for number, batch in enumerate(self.log.batches(position, piece)):
                if number == stop_after:
                    break
                consumer.apply(batch)
        except Killed:
            pass
        finally:
            self.store.kill = None
            consumer.close()

    def opened_at(self) -> Position | None:
        consumer = self.start()
        try:
            return consumer.open(GENERATION)
        finally:
            consumer.close()

    def lose_local(self) -> None:
        shutil.rmtree(self.settings.state)

    def check(self) -> None:
        assert self.store.bodies() == linear(self.log.rows)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "state")


def _shop(log: Log) -> None:
    log.put(REVIEWS, 7, {"id": 7, "product_id": 1, "stars": 4})
    log.put(PRODUCTS, 1, {"id": 1, "category_id": 5, "name": "kettle"})
    log.put(PRODUCTS, 2, {"id": 2, "category_id": None, "name": "cup"})
    log.put(CATEGORIES, 5, {"id": 5, "name": "kitchen"})
    log.cut()


def test_a_child_may_arrive_before_its_parents(world: World) -> None:
    _shop(world.log)
    world.run(piece=1)
    world.check()
    assert [doc.id for doc in world.store.written] == ["1", "2"]


def test_a_child_that_moves_updates_both_parents(world: World) -> None:
    _shop(world.log)
    world.run()
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 2, "stars": 4})
    world.log.cut()
    world.run()
    world.check()


@pytest.mark.parametrize("at", ["before", "middle", "after"])
def test_a_kill_at_any_step_of_a_move_leaves_no_old_parent(world: World, at: str) -> None:
    """S20: the replay must still know the old parent."""
    _shop(world.log)
    world.run()
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 2, "stars": 4})
    world.log.cut()
    world.run(kill=at)
    world.log.put(PRODUCTS, 2, {"id": 2, "category_id": 5, "name": "mug"})
    world.log.cut()
    world.run()
    world.check()


def test_a_child_may_come_when_no_root_was_ever_seen(world: World) -> None:
    world.log.cut()
    world.run()
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 1, "stars": 4})
    world.log.cut()
    world.run()
    assert world.store.written == []


def test_a_one_row_that_changes_updates_every_document_and_its_delete_too(world: World) -> None:
    _shop(world.log)
    world.run()
    world.log.put(CATEGORIES, 5, {"id": 5, "name": "tea"})
    world.log.cut()
    world.run()
    world.check()
    world.log.put(CATEGORIES, 5, None)
    world.log.cut()
    world.run()
    world.check()


def test_a_changed_root_key_moves_the_document(world: World) -> None:
    _shop(world.log)
    world.run()
    world.log.put(PRODUCTS, 1, None)
    world.log.put(PRODUCTS, 3, {"id": 3, "category_id": 5, "name": "kettle"})
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 3, "stars": 4})
    world.log.cut()
    world.run()
    world.check()
    assert world.store.docs["1"].body is None


def test_half_a_transaction_is_not_rendered(world: World) -> None:
    _shop(world.log)
    world.run()
    written = len(world.store.written)
    world.log.put(PRODUCTS, 1, None)
    world.log.put(PRODUCTS, 2, None)
    world.log.cut()
    world.run(piece=1, stop_after=1)
    assert len(world.store.written) == written
    world.run()
    world.check()


def test_a_lost_local_store_is_loaded_while_readers_keep_the_old_documents(world: World) -> None:
    _shop(world.log)
    world.run()
    world.lose_local()
    world.log.put(PRODUCTS, 1, None)
    world.log.cut()
    world.run(piece=1, stop_after=2)
    assert world.store.bodies().keys() == {"1", "2"}
    world.run(piece=1)
    world.check()


def test_local_rows_ahead_of_the_view_are_thrown_away(world: World) -> None:
    _shop(world.log)
    world.run()
    docs, position = dict(world.store.docs), world.store.position
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 2, "stars": 4})
    world.log.cut()
    world.run()
    world.store.docs, world.store.position = docs, position
    world.run()
    world.check()


def test_a_wiped_view_is_built_from_zero(world: World) -> None:
    _shop(world.log)
    world.run()
    world.store.wipe()
    assert world.opened_at() is None
    world.run()
    world.check()


def test_a_kill_while_loading_resumes(world: World) -> None:
    _shop(world.log)
    world.run(piece=1, stop_after=2)
    position = world.opened_at()
    assert position is not None
    assert position.offsets == {"t": [2]}
    world.run()
    world.check()


def test_a_damaged_local_store_is_loaded_again(world: World) -> None:
    _shop(world.log)
    world.run()
    Path(world.settings.path("products-g1.sqlite")).write_bytes(
        b"not a database, but long enough to be looked at" * 100
    )
    world.run()
    world.check()


def test_a_generation_of_other_code_gets_local_rows_of_its_own(world: World) -> None:
    _shop(world.log)
    world.run()
    assert world.start().open(replace(GENERATION, fingerprint="other")) is None


def test_a_reload_is_refused_when_tombstones_may_be_gone(world: World) -> None:
    _shop(world.log)
    world.run()
    world.lose_local()
    consumer = world.start()
    consumer.open(GENERATION)
    batch = next(world.log.batches(None))
    batch.position.appended = NOW + world.settings.delete_retention_ms + 1
    with pytest.raises(Refused, match=r"delete\.retention\.ms"):
        consumer.apply(batch)


def test_the_rows_wait_until_the_view_accepts(world: World) -> None:
    _shop(world.log)

    def away(*_args: object, **_kwargs: object) -> None:
        raise Transient("away", "The store is away.")

    write, world.store.write = world.store.write, away  # type: ignore[method-assign]
    with pytest.raises(Transient):
        world.run()
    world.store.write = write  # type: ignore[method-assign]
    world.run()
    world.check()


def test_an_error_in_render_names_the_document(tmp_path: Path) -> None:
    class Broken(Products):
        def render(self, row: Node) -> Row:
            return {"name": row["title"]}

    world = World(tmp_path / "state", Broken)
    _shop(world.log)
    with pytest.raises(Poison, match=r"public\.products \{\"id\":1\}: KeyError\('title'\)"):
        world.run()


def test_a_declared_column_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    class Wrong(Products):
        document = Document(PRODUCTS, category=One(CATEGORIES, on="kind_id"))

    world = World(tmp_path / "state", Wrong)
    _shop(world.log)
    with pytest.raises(Misconfigured, match=r"public\.products has no column kind_id"):
        world.run()


def test_a_composite_key_makes_an_id_that_no_other_key_makes() -> None:
    assert DocumentConsumer.id(None, "t", {"a": "x,y", "b": 1}) == "x\\,y,1"  # type: ignore[arg-type]
    assert DocumentConsumer.id(None, "t", {"a": "x,y"}) == "x,y"  # type: ignore[arg-type]


def test_dropping_removes_the_local_rows(world: World) -> None:
    _shop(world.log)
    world.run()
    consumer = world.start()
    consumer.open(GENERATION)
    consumer.drop()
    consumer.close()
    assert not list(Path(world.settings.state).iterdir())


def test_touched_documents_wait_on_disk(world: World) -> None:
    _shop(world.log)
    world.run(piece=2, stop_after=1)
    db = sqlite3.connect(world.settings.path("products-g1.sqlite"))
    assert db.execute("SELECT key FROM touched").fetchall() == [("[1]",)]
    db.close()


KEYS = st.integers(1, 4)
PRODUCT = st.tuples(
    st.just(PRODUCTS),
    KEYS,
    st.none() | st.fixed_dictionaries({"category_id": st.none() | KEYS, "name": st.sampled_from("ab")}),
)
CATEGORY = st.tuples(st.just(CATEGORIES), KEYS, st.none() | st.fixed_dictionaries({"name": st.sampled_from("ab")}))
REVIEW = st.tuples(
    st.just(REVIEWS),
    KEYS,
    st.none() | st.fixed_dictionaries({"product_id": st.none() | KEYS, "stars": st.integers(1, 5)}),
)
STEP = st.one_of(
    PRODUCT,
    CATEGORY,
    REVIEW,
    st.tuples(
        st.just("run"), st.sampled_from([None, None, "before", "middle", "after"]), st.integers(1, 5), st.integers(1, 9)
    ),
    st.sampled_from([("lose",), ("wipe",), ("truncate",)]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, max_size=40))
def test_any_history_with_kills_equals_the_join(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "state")
        for step in steps:
            _take(world, step)
        world.log.cut()
        world.run()
        world.check()


def _take(world: World, step: tuple[Any, ...]) -> None:
    if step[0] == "run":
        world.log.cut()
        world.run(*step[1:])
    elif step[0] == "lose":
        if Path(world.settings.state).exists():
            world.lose_local()
    elif step[0] == "wipe":
        world.store.wipe()
    elif step[0] == "truncate":
        for key in list(world.log.rows[PRODUCTS]):
            world.log.put(PRODUCTS, key, None)
    else:
        table, key, row = step
        world.log.put(table, key, row and {"id": key, **row})
