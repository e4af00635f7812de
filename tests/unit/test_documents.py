"""Documents against a linear model: after any history, with kills and replays, the view is a plain join of the rows."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.change import Row, TableSchema
from headrace.documents import Count, Document, DocumentConsumer, Many, Node, One, Window
from headrace.errors import Misconfigured, Poison, Transient
from headrace.settings import Settings
from tests.fixtures.documents import CATEGORIES, PRODUCTS, REVIEWS, SCHEMAS, Memory, Products, World, shop


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


def test_a_live_view_waits_for_a_declared_column_that_is_dropped_and_added_again(world: World) -> None:
    """In transactions of their own, with a row between; from zero a column that is not there is refused for good."""
    shop(world.log)
    world.run()
    whole, shown = SCHEMAS[REVIEWS, 1], world.store.bodies()
    less = replace(whole, version=2, columns=tuple(each for each in whole.columns if each.name != "product_id"))
    world.log.schemas = SCHEMAS | {(REVIEWS, 2): less}
    world.log.put(REVIEWS, 7, {"id": 7, "stars": 4})
    world.log.cut()
    with pytest.raises(Transient, match=r"public\.reviews has no column product_id") as gone:
        world.run()
    assert gone.value.code == "document-column"
    assert world.store.bodies() == shown
    shutil.rmtree(world.settings.state)  # elsewhere, say: its local rows are loaded again
    with pytest.raises(Transient, match=r"public\.reviews has no column product_id"):
        world.run()
    zero = World(replace(world.settings, state=f"{world.settings.state}-zero"), schemas=world.log.schemas)
    zero.log.put(REVIEWS, 7, {"id": 7, "stars": 4})
    zero.log.cut()
    with pytest.raises(Misconfigured, match="has no column product_id"):
        zero.run()
    world.log.schemas |= {(REVIEWS, 3): replace(whole, version=3)}
    world.log.put(REVIEWS, 8, {"id": 8, "product_id": 1, "stars": 5})
    world.log.cut()
    world.run()
    world.check()


def _with(table: str, name: str, kind: str) -> TableSchema:
    schema = SCHEMAS[table, 1]
    columns = tuple(replace(column, type=kind) if column.name == name else column for column in schema.columns)
    return replace(schema, version=2, columns=columns)


def test_a_composite_key_makes_an_id_that_no_other_key_makes() -> None:
    assert DocumentConsumer.id(None, "t", {"a": "x,y", "b": 1}) == "x\\,y,1"  # type: ignore[arg-type]
    assert DocumentConsumer.id(None, "t", {"a": "x,y"}) == "x,y"  # type: ignore[arg-type]


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
    st.sampled_from([("lose",), ("wipe",), ("truncate", PRODUCTS), ("compact",)]),
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, max_size=40))
def test_any_history_with_kills_equals_the_join(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Settings(state=f"{folder}/state"))
        for step in steps:
            world.take(step)
        world.log.cut()
        world.run()
        world.check()
