"""Local rows of documents that are lost, damaged, old, left behind or ahead of the view: they are loaded again."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace import codec
from headrace.change import Version
from headrace.documents import Document, Many, One, layout, local
from headrace.errors import HeadraceError, Transient
from headrace.runner.worker import Worker
from headrace.settings import Settings
from tests.fixtures.documents import CATEGORIES, GENERATION, PRODUCTS, REVIEWS, Products, World, shop


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(Settings(state=str(tmp_path / "state")))


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


def test_a_load_is_committed_rarely(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill takes away of it is read again."""
    monkeypatch.setattr(local, "RARELY_SECONDS", 3600.0)
    shop(world.log)
    world.run(piece=1, stop_after=3)
    position = world.opened_at()
    assert position is not None
    assert position.offsets == {"t": [1]}, "the first is committed: by it the rows are known as a load's"
    world.run(piece=1)
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


def test_dropping_removes_the_local_rows(world: World) -> None:
    shop(world.log)
    world.run()
    consumer = world.start()
    consumer.open(GENERATION)
    consumer.drop()
    consumer.close()
    assert not [each for each in Path(world.settings.state).rglob("*") if each.is_file()]


@pytest.mark.parametrize("count", [0, 1, 49, 50, 51, 130])
def test_rows_that_go_in_at_once_are_counted_where_they_are_new(count: int) -> None:
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE links (link INT, value TEXT, key TEXT, PRIMARY KEY (link, value, key))")
        rows = [(number, "v", f"k{number}") for number in range(count)]
        assert layout.insert(db, layout.LINK, iter(rows[::3])) == len(rows[::3])
        assert layout.insert(db, layout.LINK, rows) == count - len(rows[::3])
        assert db.execute("SELECT * FROM links ORDER BY link").fetchall() == rows
