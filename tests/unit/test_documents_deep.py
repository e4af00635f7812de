"""Documents of several levels against a join by brute force; what they keep in memory; files of another layout."""

from __future__ import annotations

import sqlite3
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import codec
from headrace.change import Change, Column, Position, Row, TableSchema, Version
from headrace.documents import Aggregate, Count, Document, Many, One, Sum, Window
from headrace.documents.layout import LAYOUT, SCHEMA
from headrace.documents.local import LocalRows, Touched
from headrace.documents.when import EVER, When
from headrace.errors import Misconfigured
from headrace.settings import Settings
from tests.fixtures.documents import CATEGORIES, GENERATION, PRODUCTS, REVIEWS, SOURCE, World
from tests.fixtures.documents_deep import COLUMNS, COMMENTS, DEEP_SCHEMAS, TAGGED, TAGS, Deep, Join, plain
from tests.fixtures.windows import ORDERS


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(Settings(state=str(tmp_path / "state")), Deep, schemas=DEEP_SCHEMAS)


def grown(world: World) -> World:
    """Two products and three categories, one above the other; a review with a comment; a tag."""
    put = world.log.put
    put(COMMENTS, 1, {"id": 1, "review_id": 1, "said": "a"})
    put(REVIEWS, 1, {"id": 1, "product_id": 1, "stars": 4, "hidden": False, "paid": "9.90"})
    put(PRODUCTS, 1, {"id": 1, "category_id": 1, "name": "kettle"})
    put(PRODUCTS, 2, {"id": 2, "category_id": None, "name": "cup"})
    for key, parent in (1, 2), (2, 3), (3, None):
        put(CATEGORIES, key, {"id": key, "parent_id": parent, "name": f"c{key}"})
    put(TAGGED, 1, {"id": 1, "product_id": 1, "tag_id": 1})
    put(TAGS, 1, {"id": 1, "name": "red"})
    caught_up(world)
    world.store.written.clear()
    return world


def caught_up(world: World, **how: Any) -> set[str]:
    """Cut, catch up and compare; return the ids of what was written."""
    world.log.cut()
    world.store.written.clear()
    world.run(**how)
    assert world.store.bodies() == Join(world.log.rows).documents()
    return {doc.id for doc in world.store.written}


def test_what_is_two_levels_up_is_in_the_document_whatever_came_first(world: World) -> None:
    grown(world)
    assert world.store.bodies()["products-1"]["category"]["parent"]["parent"]["name"] == "c3"
    assert world.store.bodies()["products-1"]["reviews"][0]["comments"][0]["said"] == "a"


def test_a_change_two_levels_away_is_rendered_where_it_is_seen_and_nowhere_else(world: World) -> None:
    grown(world)
    world.log.put(CATEGORIES, 3, {"id": 3, "parent_id": None, "name": "renamed"})
    assert caught_up(world) == {"products-1", "categories-3"}
    world.log.put(COMMENTS, 1, {"id": 1, "review_id": 1, "said": "b"})
    assert caught_up(world) == {"products-1"}
    world.log.put(TAGS, 1, {"id": 1, "name": "blue"})
    assert caught_up(world) == {"products-1", "tags-1"}


def test_a_row_that_moves_takes_what_is_joined_to_it_along(world: World) -> None:
    grown(world)
    world.log.put(REVIEWS, 1, {"id": 1, "product_id": 2, "stars": 4, "hidden": False, "paid": "9.90"})
    assert {"products-1", "products-2"} <= caught_up(world)
    world.log.put(COMMENTS, 1, None)
    assert caught_up(world) == {"products-2"}


@pytest.mark.parametrize("at", ["before", "middle", "after"])
def test_a_kill_while_both_a_row_and_the_row_above_it_move_leaves_nothing_behind(world: World, at: str) -> None:
    """S20, a level further down: the replay must still know where both were."""
    grown(world)
    world.log.put(REVIEWS, 2, {"id": 2, "product_id": 2, "stars": 1, "hidden": None, "paid": None})
    caught_up(world)
    world.log.put(COMMENTS, 1, {"id": 1, "review_id": 2, "said": "a"})
    world.log.put(REVIEWS, 2, {"id": 2, "product_id": 1, "stars": 1, "hidden": None, "paid": None})
    world.log.put(REVIEWS, 1, {"id": 1, "product_id": 2, "stars": 4, "hidden": False, "paid": "9.90"})
    world.log.cut()
    world.run(kill=at)
    caught_up(world)


def test_a_row_that_refers_to_itself_ends_where_the_declaration_ends(world: World) -> None:
    grown(world)
    world.log.put(CATEGORIES, 1, {"id": 1, "parent_id": 1, "name": "loop"})
    caught_up(world)
    world.log.put(CATEGORIES, 1, {"id": 1, "parent_id": 2, "name": "no loop"})
    caught_up(world)


def test_a_filter_that_a_row_passes_or_not_and_a_limit_that_it_is_within_or_not(world: World) -> None:
    grown(world)
    for key, paid in (2, "10.00"), (3, "9.95"), (4, None):
        world.log.put(REVIEWS, key, {"id": key, "product_id": 1, "stars": 1, "hidden": None, "paid": paid})
    caught_up(world)
    best = world.store.bodies()["products-1"]["best"]
    assert [review["paid"] for review in best] == ["10.00", "9.95"], "by value, not by text"
    world.log.put(REVIEWS, 2, {"id": 2, "product_id": 1, "stars": 1, "hidden": True, "paid": "10.00"})
    caught_up(world)
    assert [review["id"] for review in world.store.bodies()["products-1"]["best"]] == [3, 1]


def test_a_file_of_another_layout_is_thrown_away_and_loaded_again(world: World) -> None:
    """The version before this one wrote the fingerprint alone."""
    grown(world)
    with closing(sqlite3.connect(world.settings.path("main/products-g1.sqlite"), isolation_level=None)) as db:
        db.execute("UPDATE meta SET value = ? WHERE name = 'fingerprint'", (GENERATION.fingerprint.encode(),))
    assert world.opened_at() is None
    world.log.put(CATEGORIES, 3, {"id": 3, "parent_id": None, "name": "renamed"})
    caught_up(world)


def test_what_is_in_a_file_is_of_its_layout(tmp_path: Path) -> None:
    """Another version may go on with it: where this test fails, LAYOUT goes up by one, so that such files are loaded anew."""
    items, kinds = "public.items", "public.kinds"
    documents = (
        Document(items, kind=One(kinds, on=("maker", "kind"), made=Many(items, by=("maker", "kind")))),
        Window(items, on="at", seconds=3600, n=Count()),
    )
    columns = {"id": "numeric(9,2)", "maker": "text", "kind": "boolean", "at": "timestamp with time zone", "on": "date"}
    shapes = {
        items: TableSchema(items, 1, tuple(Column(*each) for each in columns.items()), ("id",)),
        kinds: TableSchema(kinds, 1, (Column("maker", "text"), Column("kind", "boolean")), ("maker", "kind")),
    }
    row = {"id": "1.50", "maker": 'é,"\\', "kind": True, "at": "0044-03-15T12:34:56+00:00 BC", "on": None}
    place = (Version(2, 700), 3, 9, 1, 0, 41)
    local = LocalRows(tmp_path / "rows", documents, "abc")
    local.learn(shapes)
    for table, key, some in (
        (kinds, ("maker", "kind"), row),
        (items, ("id",), row),
        (items, ("id",), row | {"at": None}),
    ):
        change = Change(table, "r", codec.encode_key({name: some[name] for name in key}), some, *place, "snapshot")
        local.apply(change, loading=False)
    local.clear_touched(When(EVER, 60_000))
    local.touch(Touched(documents[0], {"id": "1.50"}, None), Version(2, 800))
    local.commit(Position({"t": [41]}, {"t": "T"}, Version(2, 800), SOURCE, 1))
    asked = (
        "SELECT * FROM meta WHERE name <> 'position'",
        "SELECT * FROM links",
        "SELECT * FROM back",
        "SELECT doc, key, since FROM touched",
    )
    rows = "SELECT tbl, key, row, version, ordinal, xid, schema, part, at, came FROM rows"
    found = [local._db.execute(f"{query} ORDER BY 1, 2").fetchall() for query in (*asked, rows)]
    local.close()
    assert (LAYOUT, sha256(repr([SCHEMA, found]).encode()).hexdigest()[:12]) == (7, "98c9c481c717")


def test_types_are_known_again_after_a_start_without_a_change(world: World) -> None:
    """The schemas come with changes; a build that was stopped before its last, empty batch has none to come."""
    for key, paid in (1, "10"), (2, "9"), (3, "8"):
        world.log.put(REVIEWS, key, {"id": key, "product_id": 1, "stars": 1, "hidden": None, "paid": paid})
    world.log.put(PRODUCTS, 1, {"id": 1, "category_id": 1, "name": "kettle"})
    world.log.cut()
    world.run(piece=2, stop_after=1)
    world.log.schemas = {}
    world.run()
    assert [review["paid"] for review in world.store.bodies()["products-1"]["best"]] == ["10", "9"]


# What does not fit the tables


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (Document(PRODUCTS, category=One(CATEGORIES, on="category_id", top=One(CATEGORIES, on="top_id"))), "top_id"),
        (Document(PRODUCTS, reviews=Many(REVIEWS, by="product_id", order="-at")), "no column at"),
        (Document(PRODUCTS, reviews=Many(REVIEWS, by="product_id", where={"seen": True})), "no column seen"),
        (Document(PRODUCTS, rating=Aggregate(REVIEWS, by="product_id", n=Sum("price"))), "no column price"),
        (Document(PRODUCTS, rating=Aggregate(REVIEWS, by=("id", "stars"), n=Count())), "does not fit the key"),
    ],
)
def test_columns_are_looked_for_at_every_level(tmp_path: Path, declared: Document, said: str) -> None:
    class Wrong(Deep):
        document = declared

    world = grown_alike(World(Settings(state=str(tmp_path / "state")), Wrong, schemas=DEEP_SCHEMAS))
    with pytest.raises(Misconfigured, match=said):
        world.run()


def grown_alike(world: World) -> World:
    for table, columns in COLUMNS.items():
        world.log.put(table, 1, {**dict.fromkeys(columns), "id": 1})
    world.log.cut()
    return world


def test_a_sum_of_what_is_no_number_is_refused(tmp_path: Path) -> None:
    class Wrong(Deep):
        document = Document(PRODUCTS, rating=Aggregate(CATEGORIES, by="parent_id", n=Sum("name")))

    world = World(Settings(state=str(tmp_path / "state")), Wrong, schemas=DEEP_SCHEMAS)
    world.log.put(PRODUCTS, 1, {"id": 1, "category_id": 1, "name": "kettle"})
    world.log.put(CATEGORIES, 1, {"id": 1, "parent_id": 1, "name": "kitchen"})
    world.log.cut()
    with pytest.raises(Misconfigured, match="'kitchen', which is no number"):
        world.run()


# Memory

_MANY = 100_000
_BOUND = 2_000_000
"""Bytes; the rows as Python has them would be twenty times as much."""


def changes(table: str, rows: Iterator[Row]) -> Iterator[Change]:
    for row in rows:
        yield Change(table, "c", codec.encode_key({"id": row["id"]}), row, Version(1, 1), 1, 1, 1, 0, 0)


def held(work: Any) -> tuple[Any, int]:
    """Return what `work` gives, and the most bytes that it held at a time."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_root_with_100000_children_is_rendered_and_changed_in_little_memory(tmp_path: Path) -> None:
    document = Document(
        PRODUCTS,
        latest=Many(REVIEWS, by="product_id", order=["-stars", "-id"], limit=3),
        rating=Aggregate(REVIEWS, by="product_id", n=Count(), paid=Sum("paid")),
    )
    local = LocalRows(tmp_path / "rows", [document], "abc")
    local.learn({table: schema for (table, _), schema in DEEP_SCHEMAS.items()})
    reviews = ({"id": n, "product_id": 1, "stars": n % 5, "hidden": False, "paid": "0.10"} for n in range(_MANY))
    for change in changes(REVIEWS, reviews):
        local.apply(change, loading=True)
    for root in changes(PRODUCTS, ({"id": n, "category_id": None, "name": "kettle"} for n in (1, 2))):
        local.apply(root, loading=True)
    (touched, _), most = held(lambda: list(local.touched()))
    assert touched.node is not None
    assert plain(touched.node)["rating"] == {"n": _MANY, "paid": "10000.00"}
    assert [review["id"] for review in touched.node.latest] == [99_999, 99_994, 99_989]
    assert most < _BOUND
    local.clear_touched()
    late = [
        {"id": 99_999, "product_id": 1, "stars": 0, "paid": "1.10"},
        {"id": 99_994, "product_id": 2, "paid": "0.20"},
    ]
    gone = [change._replace(row=None) for change in changes(REVIEWS, ({"id": n} for n in range(10)))]

    def follow() -> list[Row]:
        for change in (*changes(REVIEWS, iter(late)), *gone):
            local.apply(change, loading=False)
        return [plain(each.node) for each in local.touched() if each.node]

    (one, two), most = held(follow)
    local.close()
    assert one["rating"] == {"n": _MANY - 11, "paid": "9999.90"}, "1.00 more, 11 times 0.10 less"
    assert [review["id"] for review in one["latest"]] == [99_989, 99_984, 99_979]
    assert (two["rating"], [review["id"] for review in two["latest"]]) == ({"n": 1, "paid": "0.20"}, [99_994])
    assert most < _BOUND


def test_a_window_of_very_many_rows_is_rendered_and_changed_in_little_memory(tmp_path: Path) -> None:
    window = Window(ORDERS, on="at", seconds=3600, n=Count(), paid=Sum("paid"))
    local = LocalRows(tmp_path / "rows", [window], "abc")
    at = {"at": "2026-01-01T10:07:30+00:00", "paid": "0.10"}
    for piece in range(0, _MANY // 4, 1000):
        orders = changes(ORDERS, ({"id": n, **at} for n in range(piece, piece + 1000)))
        local.load(list(orders), touch=True, unknown=False)
    gone = [change._replace(row=None) for change in changes(ORDERS, ({"id": n} for n in range(10)))]
    for many in (_MANY // 4, _MANY // 4 - len(gone)):
        (touched,), most = held(lambda: list(local.touched()))
        assert touched.node is not None
        assert (touched.node["n"], touched.node["paid"]) == (many, f"{many / 10:.2f}")
        assert most < _BOUND // 4
        local.follow(gone)
    local.close()


@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["new", "changed", None])), min_size=1, max_size=12),
    st.data(),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_without_joins_that_go_in_together_are_as_if_one_by_one(
    history: list[tuple[int, str | None]], data: st.DataObject
) -> None:
    made = []
    for at, (id_, name) in enumerate(history, 1):
        row = {"id": id_, "name": name} if name else None
        place = (Version(1, at), at, 1, 1, 0, at)
        made.append(Change(PRODUCTS, "u" if row else "d", codec.encode_key({"id": id_}), row, *place))
    cut = data.draw(st.integers(0, len(made)))
    with tempfile.TemporaryDirectory() as folder:
        one, many = (LocalRows(Path(folder) / name, [Document(PRODUCTS)], "abc") for name in ("one", "many"))
        for change in made:
            one.apply(change, loading=False)
        many.follow(made[:cut])
        many.follow(made[cut:])
        for query in (
            "SELECT tbl, key, row, version, ordinal, came FROM rows",
            "SELECT * FROM touched",
            "SELECT * FROM meta",
        ):
            assert many._db.execute(query).fetchall() == one._db.execute(query).fetchall()
        one.close()
        many.close()


def test_a_row_that_100000_documents_share_is_changed_in_little_memory(tmp_path: Path) -> None:
    document = Document(PRODUCTS, category=One(CATEGORIES, on="category_id", parent=One(CATEGORIES, on="parent_id")))
    local = LocalRows(tmp_path / "rows", [document], "abc")
    for change in changes(PRODUCTS, ({"id": n, "category_id": n % 10, "name": "x"} for n in range(_MANY))):
        local.apply(change, loading=True)
    for change in changes(CATEGORIES, ({"id": n, "parent_id": 99, "name": "x"} for n in range(10))):
        local.apply(change, loading=True)
    local.clear_touched()
    (top,) = changes(CATEGORIES, iter([{"id": 99, "parent_id": None, "name": "top"}]))
    _, most = held(lambda: local.apply(top, loading=False))
    found = local.count_touched()
    local.close()
    assert found == _MANY
    assert most < _BOUND


# Any history

KEYS = (1, 2, 3)
VALUES = {
    "name": st.sampled_from("ab"),
    "stars": st.none() | st.integers(1, 5),
    "hidden": st.sampled_from([False, False, True, None]),
    "paid": st.none() | st.sampled_from(["9.90", "10.00", "-1.00", "9.91"]),
    "said": st.none() | st.sampled_from("abc"),
}
REFERENCE = st.sampled_from([*KEYS, *KEYS, None])


def _rows(table: str) -> st.SearchStrategy[Row]:
    return st.fixed_dictionaries({name: VALUES.get(name, REFERENCE) for name in COLUMNS[table] if name != "id"})


def _changed(table: str) -> st.SearchStrategy[tuple[str, int, Row | None]]:
    row = _rows(table)
    return st.tuples(st.just(table), st.sampled_from(KEYS), st.one_of(row, row, row, st.none()))


CHANGE = st.one_of(*map(_changed, COLUMNS))
CAUGHT_UP = st.tuples(st.just("caught up"), st.integers(1, 5))
KILLED = st.tuples(st.just("killed"), st.sampled_from(["before", "middle", "after", None]), st.integers(1, 3))
STEP = st.one_of(*[CHANGE] * 5, *[CAUGHT_UP] * 4, KILLED, st.sampled_from([("lose",), ("wipe",), ("compact",)]))
FULL = st.fixed_dictionaries({table: st.tuples(*[_rows(table)] * len(KEYS)) for table in COLUMNS})


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(FULL, st.permutations(list(COLUMNS)), st.lists(STEP, min_size=10, max_size=60))
def test_any_history_of_documents_of_several_levels_equals_the_join(
    full: dict[str, tuple[Row, ...]], order: list[str], steps: list[tuple[Any, ...]]
) -> None:
    """Rows come, go and move at each level in any order, in cuts and halves of them, with kills, and loading anew."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Settings(state=f"{folder}/state"), Deep, schemas=DEEP_SCHEMAS)
        for table in order:
            for key, row in zip(KEYS, full[table], strict=True):
                world.log.put(table, key, {"id": key, **row})
        caught_up(world)
        for step in steps:
            _take(world, step)
        caught_up(world)


def _take(world: World, step: tuple[Any, ...]) -> None:
    if step[0] == "caught up":
        caught_up(world, piece=step[1])
    elif step[0] == "killed":
        world.log.cut()
        world.run(kill=step[1], piece=step[2], stop_after=step[2])
    else:
        world.take(step)
