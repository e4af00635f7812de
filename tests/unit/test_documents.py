"""Documents against a linear model: after any history, with kills and replays, the view is a plain join of the rows."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import codec
from headrace.change import NOWHERE, Position, Row, TableSchema, Version
from headrace.documents import Count, Document, DocumentConsumer, Many, Node, One, Window
from headrace.errors import HeadraceError, Misconfigured, Poison, Refused, Transient
from headrace.log import Lag
from headrace.runner.generations import Generations
from headrace.runner.worker import Worker
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.documents import (
    CATEGORIES,
    GENERATION,
    PRODUCTS,
    REVIEWS,
    SCHEMAS,
    Memory,
    Products,
    World,
    shop,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(Settings(state=str(tmp_path / "state")))


def test_a_child_may_arrive_before_its_parents(world: World) -> None:
    shop(world.log)
    world.run(piece=1)
    world.check()
    assert [doc.id for doc in world.store.written] == ["1", "2"]


def test_a_child_that_moves_updates_both_parents(world: World) -> None:
    shop(world.log)
    world.run()
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 2, "stars": 4})
    world.log.cut()
    world.run()
    world.check()


@pytest.mark.parametrize("at", ["before", "middle", "after"])
def test_a_kill_at_any_step_of_a_move_leaves_no_old_parent(world: World, at: str) -> None:
    """S20: the replay must still know the old parent."""
    shop(world.log)
    world.run()
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 2, "stars": 4})
    world.log.cut()
    world.run(kill=at)
    world.log.put(PRODUCTS, 2, {"id": 2, "category_id": 5, "name": "mug"})
    world.log.cut()
    world.run()
    world.check()


@pytest.mark.parametrize("row", [None, {"id": 7, "product_id": 1, "stars": 4}], ids=["goes", "moves"])
@pytest.mark.parametrize("at", ["middle", "after"])
def test_what_came_in_an_apply_that_was_killed_and_is_gone_by_the_next_leaves_no_trace(
    world: World, at: str, row: Row | None
) -> None:
    """After `min.compaction.lag.ms` the log says nothing of its coming."""
    shop(world.log)
    world.log.put(REVIEWS, 7, None)
    world.log.cut()
    world.run()
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 2, "stars": 4})
    world.log.cut()
    world.run(kill=at)
    world.run(stop_after=0)
    for _ in range(3):
        world.run(kill="before")
    (begun,) = Path(world.settings.state).glob("main/*begun")
    assert len(begun.read_bytes().splitlines()) == 1  # however often it was tried
    assert world.store.bodies()["2"]["reviews"] == [7]  # type: ignore[index]
    world.log.put(REVIEWS, 7, row)
    world.log.cut()
    world.log.compact()
    world.run()
    world.check()
    assert not list(Path(world.settings.state).rglob("*begun*"))


@pytest.mark.parametrize("at", ["middle", "after"])
def test_a_list_of_what_was_begun_that_is_damaged_is_made_good_by_a_reload(world: World, at: str) -> None:
    """Of a power failure."""
    shop(world.log)
    world.run()
    world.log.put(REVIEWS, 8, {"id": 8, "product_id": 2, "stars": 4})
    world.log.cut()
    world.run(kill=at)
    (begun,) = Path(world.settings.state).glob("main/*begun")
    begun.write_bytes(b"\0" * 100)
    world.log.put(REVIEWS, 8, None)
    world.log.cut()
    world.log.compact()
    with pytest.raises(Transient, match="loaded from the log again"):
        world.run()
    world.run()
    world.check()


def away(world: World, *, hours: int) -> None:
    """Let the local rows have been committed so long ago."""
    db = sqlite3.connect(world.settings.path("main/products-g1.sqlite"))
    ((position,),) = db.execute("SELECT value FROM meta WHERE name = 'position'")
    at = codec.decode_position(position)
    at.appended -= hours * 3_600_000
    db.execute("UPDATE meta SET value = ? WHERE name = 'position'", (codec.encode_position(at),))
    db.commit()
    db.close()


@pytest.mark.parametrize("clock", ["right", "an hour behind"])
def test_local_rows_that_another_process_has_left_behind_are_loaded_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: str
) -> None:
    """It ran elsewhere, with local rows of its own: what came and went by then, these rows never heard of."""
    if clock != "right":
        monkeypatch.setattr("headrace.documents.consumer.now", lambda: int(time.time() * 1000) - 3_600_000)
    shop(world.log)
    world.run()
    here = world.settings
    world.settings = replace(here, state=str(tmp_path / "elsewhere"))
    world.log.put(REVIEWS, 8, {"id": 8, "product_id": 2, "stars": 4})
    world.log.cut()
    world.run()
    assert world.store.bodies()["2"]["reviews"] == [8]  # type: ignore[index]
    world.settings = here
    assert world.opened_at() is not None, "for a while the log has it all"
    away(world, hours=1)
    world.log.put(REVIEWS, 8, None)
    world.log.cut()
    world.log.compact()
    world.run()
    world.check()


def test_a_stop_is_no_reason_to_load_again_however_long(world: World) -> None:
    shop(world.log)
    world.run()
    away(world, hours=100)
    assert world.opened_at() is not None
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 2, "stars": 4})
    world.log.cut()
    world.log.compact()
    world.run(kill="middle")
    assert world.opened_at() is not None
    world.run()
    world.check()


def test_a_child_may_come_when_no_root_was_ever_seen(world: World) -> None:
    world.log.cut()
    world.run()
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 1, "stars": 4})
    world.log.cut()
    world.run()
    assert world.store.written == []


@pytest.mark.parametrize("feed", ["headrace", "debezium"])
def test_a_row_that_refers_to_a_key_written_otherwise_deletes_no_document(tmp_path: Path, feed: str) -> None:
    """Such a column is refused where its type is known; of a Debezium feed it may not be. The id of either key is ``1``."""
    world = World(Settings(state=str(tmp_path / "state"), feed=feed))
    shop(world.log)
    world.run()
    world.log.put(REVIEWS, 8, {"id": 8, "product_id": "1", "stars": 4})
    world.log.cut()
    world.run()
    world.check()
    world.log.put(PRODUCTS, 1, {"id": 1, "category_id": 5, "name": "jug"})
    world.log.put(REVIEWS, 8, {"id": 8, "product_id": "1", "stars": 5})
    world.log.cut()
    world.run()
    world.check()


def test_a_one_row_that_changes_updates_every_document_and_its_delete_too(world: World) -> None:
    shop(world.log)
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
    shop(world.log)
    world.run()
    world.log.put(PRODUCTS, 1, None)
    world.log.put(PRODUCTS, 3, {"id": 3, "category_id": 5, "name": "kettle"})
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 3, "stars": 4})
    world.log.cut()
    world.run()
    world.check()
    assert world.store.docs["1"].body is None


def test_half_a_transaction_is_not_rendered(world: World) -> None:
    shop(world.log)
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
    shop(world.log)
    world.run()
    world.lose_local()
    world.log.put(PRODUCTS, 1, None)
    world.log.cut()
    world.run(piece=1, stop_after=2)
    assert world.store.bodies().keys() == {"1", "2"}
    world.run(piece=1)
    world.check()


def test_local_rows_ahead_of_the_view_are_thrown_away(world: World) -> None:
    shop(world.log)
    world.run()
    docs, position = dict(world.store.docs), world.store.position
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 2, "stars": 4})
    world.log.cut()
    world.run()
    world.store.docs, world.store.position = docs, position
    world.run()
    world.check()


def test_a_wiped_view_is_built_from_zero(world: World) -> None:
    shop(world.log)
    world.run()
    world.store.wipe()
    assert world.opened_at() is None
    world.run()
    world.check()


def test_a_kill_while_loading_resumes(world: World) -> None:
    shop(world.log)
    world.run(piece=1, stop_after=2)
    position = world.opened_at()
    assert position is not None
    assert position.offsets == {"t": [2]}
    world.run()
    world.check()


def test_a_damaged_local_store_is_loaded_again(world: World) -> None:
    shop(world.log)
    world.run()
    Path(world.settings.path("main/products-g1.sqlite")).write_bytes(
        b"not a database, but long enough to be looked at" * 100
    )
    world.run()
    world.check()


def test_two_sources_keep_local_rows_apart_in_one_folder(tmp_path: Path) -> None:
    """Those of an earlier version had one place, which may have been another's: they are taken over where they are one's own."""
    one, other = (World(Settings(state=str(tmp_path), source=source)) for source in ("t", "other"))
    shop(one.log)
    one.run()
    at = one.opened_at()
    other.log.put(PRODUCTS, 1, {"id": 1, "category_id": None, "name": "of the other"})
    other.log.cut()
    other.log.cut()
    other.run()
    assert one.opened_at() == at
    (tmp_path / "t" / "products-g1.sqlite").replace(tmp_path / "products-g1.sqlite")
    (tmp_path / "other" / "products-g1.sqlite").unlink()
    assert other.opened_at() is None
    with closing(sqlite3.connect(tmp_path / "products-g1.sqlite")) as running:  # a process of that version
        running.execute("SELECT count(*) FROM rows").fetchone()
        with pytest.raises(Transient, match="locked"):
            one.opened_at()
    assert one.opened_at() == at
    assert not (tmp_path / "products-g1.sqlite").exists()


def test_a_generation_of_other_code_gets_local_rows_of_its_own(world: World) -> None:
    shop(world.log)
    world.run()
    assert world.start().open(replace(GENERATION, fingerprint="other")) is None


def test_a_stale_generation_is_opened_by_other_code_with_the_rows_that_it_has(world: World) -> None:
    """It stands where it stood, as readers see it: `rollback`, tokens and what is parked go by that."""
    shop(world.log)
    world.run()
    stands = world.opened_at()
    reviews, category = Many(REVIEWS, by="product_id"), One(CATEGORIES, on="category_id")

    class Other(Products):
        document = Document(PRODUCTS, reviews=reviews, category=category)

    world.cls = type("Products", (Other,), {"store": world.store})
    assert stands is not None
    assert world.opened_at() == stands


def test_rows_that_are_indexed_for_another_declaration_are_loaded_again_before_they_are_used(world: World) -> None:
    """One from a package of its own, which is not in the fingerprint: where the joins are others, their numbers are."""
    shop(world.log)
    world.run()

    class Other(Products):
        document = Document(
            PRODUCTS, reviews=Many(REVIEWS, by="product_id"), category=One(CATEGORIES, on="category_id")
        )

    world.cls = type("Products", (Other,), {"store": world.store})
    world.log.put(CATEGORIES, 5, {"id": 5, "name": "room"})
    world.log.cut()
    with pytest.raises(Transient, match="another declaration"):
        world.run()
    world.run()
    world.check()


def test_a_generation_that_stands_is_at_what_readers_see_though_its_local_rows_are_lost(world: World) -> None:
    """Else it is at nothing for ever, and no rollback goes to it."""
    shop(world.log)
    world.run()
    world.lose_local()
    log: Any = SimpleNamespace(settings=world.settings, topics=SimpleNamespace(names=set))  # nothing is parked
    worker = Worker(log, world.start, GENERATION, still=True)
    worker.start()
    try:
        assert worker.call(lambda _consumer: worker.state.version).result(5) == Version(1, 100)
        assert worker.opened == world.store.open(GENERATION)
    finally:
        worker.stop()
        worker.join()


@pytest.mark.parametrize("shown", ["shown", "wiped", ""])
@pytest.mark.parametrize("stop_after", [0, 2], ids=["begun", "resumed"])
def test_a_reload_that_is_refused_keeps_what_readers_have_seen_and_begins_a_build_again(
    world: World, stop_after: int, shown: str
) -> None:
    """The one is what a rollback goes to [I8]; the other, also of what was wiped, would stop for nobody's sake."""
    opened: list[Position | None] = []

    def refuse(_tables: Any, position: Position | None, *_: Any) -> None:
        opened.append(position)
        if len(opened) > 1:
            raise Misconfigured("enough", "It is opened anew.", "Look at it.")
        raise Refused("away-too-long", "Its pieces are older than tombstones stay.")

    shop(world.log)
    world.run()
    world.lose_local()
    if shown == "wiped":
        world.store.wipe()
    world.run(piece=1, stop_after=stop_after)
    log: Any = SimpleNamespace(settings=world.settings, topics=SimpleNamespace(names=set), reader=refuse)
    worker = Worker(log, world.start, GENERATION)
    worker.shown = bool(shown)
    worker.start()
    try:
        eventually("it has stopped", lambda: worker.state.phase == "stopped")
        if shown == "shown":
            asked = worker.call(lambda _consumer: worker.state.version)
            assert (asked.result(5), len(opened)) == (Version(1, 100), 1)
            world.check()
        else:
            assert (len(opened), opened[1], world.store.bodies()) == (2, None, {})
    finally:
        worker.stop()
        worker.join()


def test_a_view_that_reloads_is_held_at_what_readers_see(world: World) -> None:
    """S24: they would go back in time by a promotion of anything."""
    shop(world.log)
    world.run()
    world.lose_local()
    reader = SimpleNamespace(newest=None, position=Position(), lag=lambda: Lag(9, 9, 9.0), poll=lambda _seconds: None)
    reader.mirror = reader.close = lambda: None
    log: Any = SimpleNamespace(settings=world.settings, topics=SimpleNamespace(names=set), reader=lambda *_: reader)
    worker = Worker(log, world.start, GENERATION)
    worker.start()
    try:
        assert worker.hold(5, 5, whole=False) == Version(1, 100)
        worker.release()
        eventually("it loads", lambda: worker.state.phase == "loading")
        assert (worker.state.version, worker.seen) == (NOWHERE, Version(1, 100))
    finally:
        worker.stop()
        worker.join()


def test_who_asks_a_worker_that_ends_hears_so(world: World) -> None:
    """Else the promotion of a first build would be waited for, and never tried again."""
    log: Any = SimpleNamespace(settings=world.settings)
    worker = Worker(log, world.start, GENERATION)
    worker.stop()
    asked = worker.call(lambda _consumer: None)
    worker.start()
    worker.join()
    with pytest.raises(Transient) as told:
        asked.result(0)
    assert told.value.code == "worker-busy"


def test_a_refused_view_answers_again_whatever_its_consumer_raised(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By when it is made once more it can be read."""
    monkeypatch.setattr("headrace.runner.worker._BACKOFF_SECONDS", (0.05, 0.05))
    made: list[DocumentConsumer] = []

    def fail(*_: Any) -> None:
        raise OSError("Too many open files")

    def make() -> DocumentConsumer:
        made.append(world.start())
        if len(made) == 2:
            fail()
        if len(made) == 3:
            made[-1].open = made[-1].close = fail  # type: ignore[method-assign, assignment]
        return made[-1]

    def refuse(*_: Any) -> None:
        raise Refused("away-too-long", "Its pieces are older than tombstones stay.")

    shop(world.log)
    world.run()
    log: Any = SimpleNamespace(settings=world.settings, topics=SimpleNamespace(names=set), reader=refuse)
    worker = Worker(log, make, replace(GENERATION, live=True))
    worker.start()
    try:
        eventually("it is made once more", lambda: len(made) == 4)
        assert worker.call(lambda consumer: consumer.count()).result(10) == {"": 2}
    finally:
        worker.stop()
        worker.join()


def test_a_drop_that_is_carried_out_when_nobody_waits_for_it_ends_the_generation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be opened anew, and built again."""
    monkeypatch.setattr("headrace.runner.generations.CALL_SECONDS", 0.1)
    shop(world.log)
    world.run()
    waits, forgotten = threading.Event(), []
    reader = SimpleNamespace(newest=None, position=Position(), lag=lambda: Lag(9, 9, 9.0), poll=lambda _seconds: None)
    reader.mirror = reader.close = lambda: None
    log: Any = SimpleNamespace(settings=world.settings, topics=SimpleNamespace(names=set), reader=lambda *_: reader)
    control: Any = SimpleNamespace(forget=lambda _, number: forgotten.append(number), keep=lambda *_: None)
    generations = Generations(log, control, "products", world.cls)
    generations.make, generations._shelf = world.start, SimpleNamespace(clear=lambda *_: None)  # type: ignore[assignment]
    monkeypatch.setattr(world.store, "drop", lambda: waits.wait(30) and world.store.wipe())
    worker = generations.workers[1] = Worker(log, world.start, GENERATION)
    worker.start()
    try:
        eventually("it follows", lambda: worker.follows)
        with pytest.raises(Transient) as told:
            generations.drop(1)
        assert (told.value.code, worker.is_alive()) == ("worker-busy", True)
        waits.set()
        worker.join(30)
        assert not worker.is_alive()
        assert world.store.position is None
    finally:
        worker.stop()
        worker.join()
    generations._serve({2: replace(GENERATION, number=2, fingerprint="other", live=True)})
    generations.workers[2].stop()
    assert (forgotten, list(generations.workers)) == ([1], [2])


def test_a_first_build_is_not_promoted_when_somebody_has_promoted_another_meanwhile(world: World) -> None:
    """It was in a long apply when it was asked to go live by itself."""
    log: Any = SimpleNamespace(settings=world.settings)
    generations = Generations(log, Any, "products", world.cls)  # type: ignore[arg-type]
    for number in (1, 2):
        generations.workers[number] = Worker(log, world.start, replace(GENERATION, number=number))
        generations.workers[number].state.version = Version(1, 100)
    shown: list[int] = []
    held = {number: worker.generation for number, worker in generations.workers.items()}
    generations._serve(held)
    function, _ = generations.workers[2]._calls.get_nowait()
    function(SimpleNamespace(promote=lambda: shown.append(2)))  # type: ignore[arg-type]
    assert shown == [2], "none is live"
    generations._serve(held | {1: replace(GENERATION, live=True)})
    function(SimpleNamespace(promote=lambda: shown.append(2)))  # type: ignore[arg-type]
    assert shown == [2]


def test_a_reload_is_refused_when_tombstones_may_be_gone(world: World) -> None:
    shop(world.log)
    world.run()
    world.lose_local()
    consumer = world.start()
    consumer.open(GENERATION)
    batch = next(world.log.batches(None))
    batch.position.appended = int(time.time() * 1000) + world.settings.delete_retention_ms + 1
    with pytest.raises(Refused, match=r"delete\.retention\.ms"):
        consumer.apply(batch)


def test_the_rows_wait_until_the_view_accepts(world: World) -> None:
    shop(world.log)

    def away(*_args: object, **_kwargs: object) -> None:
        raise Transient("away", "The store is away.")

    write, world.store.write = world.store.write, away  # type: ignore[method-assign]
    with pytest.raises(Transient):
        world.run()
    world.store.write = write  # type: ignore[method-assign]
    world.run()
    world.check()


@pytest.mark.parametrize(
    ("error", "code"),
    [(sqlite3.IntegrityError("NOT NULL"), "consumer-failed"), (sqlite3.OperationalError("full"), "local-state")],
)
def test_an_error_of_sqlite_in_the_store_says_nothing_of_the_local_rows(
    world: World, error: sqlite3.Error, code: str
) -> None:
    shop(world.log)
    world.run()
    world.log.put(PRODUCTS, 2, {"id": 2, "category_id": 5, "name": "mug"})
    world.log.cut()

    def broken(*_args: object, **_kwargs: object) -> None:
        raise error

    write, world.store.write = world.store.write, broken  # type: ignore[method-assign]
    with pytest.raises(HeadraceError, match=type(error).__name__) as raised:
        world.run()
    world.store.write = write  # type: ignore[method-assign]
    assert raised.value.code == code
    assert "products-g1.sqlite" not in str(raised.value)
    assert world.opened_at() is not None
    world.run()
    world.check()


def test_an_error_in_render_names_the_document(tmp_path: Path) -> None:
    class Broken(Products):
        def render(self, row: Node) -> Row:
            return {"name": row["title"]}

    world = World(Settings(state=str(tmp_path / "state")), Broken)
    shop(world.log)
    with pytest.raises(
        Poison, match=r"public\.products \{\"id\":1\}: KeyError\('title'\) at .*test_documents\.py:\d+\."
    ):
        world.run()


def test_a_declared_column_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    class Wrong(Products):
        document = Document(PRODUCTS, category=One(CATEGORIES, on="kind_id"))

    world = World(Settings(state=str(tmp_path / "state")), Wrong)
    shop(world.log)
    with pytest.raises(Misconfigured, match=r"public\.products has no column kind_id"):
        world.run()


@pytest.mark.parametrize(
    "documents",
    [
        (Document(PRODUCTS), Document(PRODUCTS, reviews=Many(REVIEWS, by="product_id"))),
        (Window(REVIEWS, "at", 60, n=Count()), Window(REVIEWS, "at", 3600, n=Count())),
    ],
)
def test_documents_that_no_id_can_tell_apart_are_refused(tmp_path: Path, documents: Any) -> None:
    made = type("Twice", (Products,), {"store": Memory(), "documents": documents, "id": lambda _, *at: repr(at)})
    with pytest.raises(Misconfigured, match=documents[0].table) as refused:
        made(Settings(state=str(tmp_path)), "twice")
    assert refused.value.code == "document-ids"


def test_windows_with_keys_of_their_own_names_are_told_apart(tmp_path: Path) -> None:
    documents = (
        Window(REVIEWS, "at", 60, start="minute", n=Count()),
        Window(REVIEWS, "at", 3600, n=Count()),
        Document(REVIEWS),
    )
    made = type("Apart", (Products,), {"store": Memory(), "documents": documents, "id": lambda _, *at: repr(at)})
    made(Settings(state=str(tmp_path)), "apart")


def test_a_view_whose_joined_columns_change_their_type_waits_until_both_have(world: World) -> None:
    """Each table's schema comes by itself, also of one migration; a view of such columns from zero is refused for good."""
    shop(world.log)
    world.run()
    before = dict(world.log.schemas)
    world.log.schemas = before | {(PRODUCTS, 2): _with(PRODUCTS, "id", "uuid")}
    world.log.put(REVIEWS, 7, {"id": 7, "product_id": 2, "stars": 4})
    world.log.cut()
    with pytest.raises(Transient, match=r"reviews.product_id is integer and .*products.id is uuid") as half:
        world.run()
    assert half.value.code == "document-column"
    zero = World(replace(world.settings, state=f"{world.settings.state}-zero"), schemas=world.log.schemas)
    zero.log.put(PRODUCTS, 1, {"id": 1, "category_id": None, "name": "tea"})
    zero.log.cut()
    with pytest.raises(Misconfigured, match="not joined"):
        zero.run()
    world.log.schemas |= {(REVIEWS, 2): _with(REVIEWS, "product_id", "uuid")}
    world.run()
    world.check()


def _with(table: str, name: str, kind: str) -> TableSchema:
    schema = SCHEMAS[table, 1]
    columns = tuple(replace(column, type=kind) if column.name == name else column for column in schema.columns)
    return replace(schema, version=2, columns=columns)


def test_a_composite_key_makes_an_id_that_no_other_key_makes() -> None:
    assert DocumentConsumer.id(None, "t", {"a": "x,y", "b": 1}) == "x\\,y,1"  # type: ignore[arg-type]
    assert DocumentConsumer.id(None, "t", {"a": "x,y"}) == "x,y"  # type: ignore[arg-type]


def test_dropping_removes_the_local_rows(world: World) -> None:
    shop(world.log)
    world.run()
    consumer = world.start()
    consumer.open(GENERATION)
    consumer.drop()
    consumer.close()
    assert not [each for each in Path(world.settings.state).rglob("*") if each.is_file()]


def test_touched_documents_wait_on_disk(world: World) -> None:
    shop(world.log)
    world.run(piece=2, stop_after=1)
    db = sqlite3.connect(world.settings.path("main/products-g1.sqlite"))
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
    st.sampled_from([("lose",), ("wipe",), ("truncate",), ("compact",)]),
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, max_size=40))
def test_any_history_with_kills_equals_the_join(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Settings(state=f"{folder}/state"))
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
    elif step[0] == "compact":
        world.log.cut()
        world.log.compact()
    elif step[0] == "truncate":
        for key in list(world.log.rows[PRODUCTS]):
            world.log.put(PRODUCTS, key, None)
    else:
        table, key, row = step
        world.log.put(table, key, row and {"id": key, **row})
