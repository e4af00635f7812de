"""Windows of time: which one a timestamp is in, and documents of them against grouping by brute force."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.change import Column, Row, TableSchema
from headrace.consumer import Origin
from headrace.documents import Count, Document, Many, Sum, Window
from headrace.documents.windows import window_start
from headrace.errors import Misconfigured
from headrace.settings import Settings
from headrace.stores.redis import RedisPages
from headrace_verify.expected import Documents
from headrace_verify.postgres import Table
from tests.fixtures.documents import GENERATION, World
from tests.fixtures.windows import COLUMNS, ORDERS, SCHEMAS, Sales, linear


@pytest.mark.parametrize(
    ("value", "seconds", "start"),
    [
        ("2024-02-29T23:59:59.999999+00:00", 60, "2024-02-29T23:59:00+00:00"),
        ("2024-02-29T23:59:59.9", 86400, "2024-02-29T00:00:00"),
        ("2024-02-29", 3600, "2024-02-29T00:00:00"),
        ("1969-12-31T23:59:59.5+00:00", 60, "1969-12-31T23:59:00+00:00"),
        ("2024-01-01T10:00:30+05:30", 3600, "2024-01-01T04:00:00+00:00"),
        ("2024-01-01T10:00:30Z", 3600, "2024-01-01T10:00:00+00:00"),
        ("0044-03-15T12:34:56+00:00 BC", 60, "0044-03-15T12:34:00+00:00 BC"),
        ("0001-01-01T00:00:00", 86400 * 7, "0001-12-28T00:00:00 BC"),
        ("12024-01-01T10:00:30", 60, "12024-01-01T10:00:00"),
        ("294276-12-31T23:59:59.999999", 3600, "294276-12-31T23:00:00"),
        ("4713-11-25T00:00:01 BC", 60, "4713-11-25T00:00:00 BC"),
    ],
)
def test_the_window_of_a_timestamp(value: str, seconds: int, start: str) -> None:
    assert window_start(value, seconds) == start


@given(st.datetimes(), st.sampled_from([1, 7, 60, 900, 3600, 86400, 604800]))
def test_the_window_of_any_timestamp_is_the_whole_multiple_before_it(at: datetime, seconds: int) -> None:
    since = int((at - datetime(1970, 1, 1)).total_seconds() // seconds * seconds)  # noqa: DTZ001 -- as timestamp
    if since < (datetime(1, 1, 1) - datetime(1970, 1, 1)).total_seconds():  # noqa: DTZ001
        return
    start = datetime.fromisoformat(window_start(at.isoformat(), seconds))
    assert (start - datetime(1970, 1, 1)).total_seconds() == since  # noqa: DTZ001
    assert window_start(at.replace(tzinfo=UTC).isoformat(), seconds) == start.replace(tzinfo=UTC).isoformat()


def test_what_is_no_timestamp_is_refused() -> None:
    with pytest.raises(Misconfigured, match="'soon' is no timestamp"):
        window_start("soon", 60)


@pytest.mark.parametrize("seconds", [0, -1, 1.5, True])
def test_a_window_has_whole_seconds(seconds: Any) -> None:
    with pytest.raises(Misconfigured, match="whole number"):
        Window(ORDERS, on="at", seconds=seconds)


def test_a_window_is_no_join_and_its_names_are_apart() -> None:
    with pytest.raises(Misconfigured, match="is no join"):
        Document(ORDERS, minute=Window(ORDERS, on="at", seconds=60))  # type: ignore[arg-type]
    with pytest.raises(Misconfigured, match="window's start and a value"):
        Window(ORDERS, on="at", seconds=60, start="n", n=Count())
    with pytest.raises(Misconfigured, match="Use Count"):
        Window(ORDERS, on="at", seconds=60, n=Many(ORDERS, by="id"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (Window(ORDERS, on="since", seconds=60), "no column since"),
        (Window(ORDERS, on="state", seconds=60), "no timestamp"),
        (Window(ORDERS, on="at", seconds=60, n=Sum("weight")), "no column weight"),
        (Window(ORDERS, on="at", seconds=60, where={"kind": 1}), "no column kind"),
    ],
)
def test_a_window_that_does_not_fit_the_table_is_refused(tmp_path: Path, declared: Window, said: str) -> None:
    class Wrong(Sales):
        document = declared

    world = World(Settings(state=str(tmp_path / "state")), Wrong, schemas=SCHEMAS)
    world.log.put(ORDERS, 1, order(1))
    world.log.cut()
    with pytest.raises(Misconfigured, match=said):
        world.run()


def test_an_array_of_timestamps_is_no_timestamp(tmp_path: Path) -> None:
    class Wrong(Sales):
        document = Window(ORDERS, on="at", seconds=60)

    columns = (Column("id", "integer"), Column("at", "timestamp without time zone[]"))
    world = World(
        Settings(state=str(tmp_path / "state")), Wrong, schemas={(ORDERS, 1): TableSchema(ORDERS, 1, columns, ("id",))}
    )
    world.log.put(ORDERS, 1, order(1))
    world.log.cut()
    with pytest.raises(Misconfigured, match="no timestamp"):
        world.run()


def order(key: int, **values: Any) -> Row:
    row = {"at": "2024-01-01T10:00:30+00:00", "day": "2024-01-01", "state": "paid", "pieces": 1, "paid": "9.90"}
    return {"id": key, **row, **values}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(Settings(state=str(tmp_path / "state")), Sales, schemas=SCHEMAS)


def caught_up(world: World, **how: Any) -> set[str]:
    """Cut, catch up and compare; return the ids of what was written."""
    world.log.cut()
    world.store.written.clear()
    world.run(**how)
    assert world.store.bodies() == linear(world.log.rows[ORDERS])
    return {doc.id for doc in world.store.written}


def test_a_row_that_moves_changes_both_windows_and_an_empty_one_goes(world: World) -> None:
    world.log.put(ORDERS, 1, order(1))
    world.log.put(ORDERS, 2, order(2, at="2024-01-01T10:00:59.999999+00:00"))
    caught_up(world)
    assert world.store.bodies()["minute 2024-01-01T10:00:00+00:00"]["paid"] == "19.80"
    world.log.put(ORDERS, 2, order(2, at="2024-01-01T10:01:00+00:00"))
    both = {"minute 2024-01-01T10:00:00+00:00", "minute 2024-01-01T10:01:00+00:00"}
    assert both <= caught_up(world)
    world.log.put(ORDERS, 2, None)
    assert "minute 2024-01-01T10:01:00+00:00" in caught_up(world)
    assert "minute 2024-01-01T10:01:00+00:00" not in world.store.bodies()
    world.log.put(ORDERS, 1, order(1, at=None, day="infinity"))
    caught_up(world)
    assert world.store.bodies().keys() == {"id 1"}


def test_a_row_that_changes_within_its_window_changes_the_window(world: World) -> None:
    world.log.put(ORDERS, 1, order(1))
    caught_up(world)
    world.log.put(ORDERS, 1, order(1, pieces=7, state="open"))
    assert {"minute 2024-01-01T10:00:00+00:00", "hour 2024-01-01T10:00:00+00:00"} <= caught_up(world)


@pytest.mark.parametrize("at", ["before", "middle", "after"])
def test_a_kill_at_any_step_of_a_move_leaves_no_old_window(world: World, at: str) -> None:
    world.log.put(ORDERS, 1, order(1))
    caught_up(world)
    world.log.put(ORDERS, 1, order(1, at="2024-01-01T11:00:30+00:00"))
    world.log.cut()
    world.run(kill=at)
    world.log.put(ORDERS, 1, order(1, at="2024-01-01T12:00:30+00:00"))
    caught_up(world)


def test_a_window_that_lost_its_rows_while_the_local_store_was_lost_goes(world: World) -> None:
    """A tombstone does not say in which window its row was: only the view still knows of the window."""
    for key in range(3):
        world.log.put(ORDERS, key, order(key, at=f"2024-01-01T1{key}:00:30+00:00"))
    caught_up(world)
    world.lose_local()
    world.log.put(ORDERS, 0, None)
    world.log.put(ORDERS, 1, order(1, at="2024-01-01T12:00:30+00:00"))
    caught_up(world, piece=1)


@pytest.mark.parametrize("old", [1704103230, "soon", [1]])
def test_rows_from_before_the_column_was_a_timestamp_are_in_no_window(tmp_path: Path, old: Any) -> None:
    """The log has them until it is compacted, and before the same rows, read again: a load meets them, and verify in a look through it."""

    class Changed(Sales):
        documents = (Window(ORDERS, on="at", seconds=60, start="minute", n=Count()),)
        store = RedisPages()

    before = tuple(Column(name, "bigint" if name == "at" else kind) for name, kind in COLUMNS.items())
    schemas = {(ORDERS, 1): TableSchema(ORDERS, 1, before, ("id",))}
    schemas[ORDERS, 2] = replace(SCHEMAS[ORDERS, 1], version=2)
    world = World(Settings(state=str(tmp_path / "state")), Changed, schemas=schemas)
    world.log.put(ORDERS, 1, order(1, at=old))
    world.log.put(ORDERS, 2, order(2, at=old))
    world.log.put(ORDERS, 1, order(1))
    world.log.cut()
    world.run(piece=2)
    assert world.store.bodies() == {"minute 2024-01-01T10:00:00+00:00": {"minute": "2024-01-01T10:00:00+00:00", "n": 1}}
    world.log.put(ORDERS, 2, order(2))
    world.log.cut()
    world.run()
    assert [body and body["n"] for body in world.store.bodies().values()] == [2]
    tables = {ORDERS: Table(ORDERS, ("id",), (), only=True, approximate=False)}
    expected = Documents(Changed(Settings(), "changed"), tables, ())
    assert [[key for _, key, _ in expected.named(change)] for change in world.log.records] == [
        [],
        [],
        ["minute 2024-01-01T10:00:00+00:00"],
        ["minute 2024-01-01T10:00:00+00:00"],
    ]


def test_why_tells_the_rows_of_a_window(world: World) -> None:
    for key in range(7):
        world.log.put(ORDERS, key, order(key))
    caught_up(world)
    consumer = world.start()
    consumer.open(GENERATION)
    first, *rows = consumer.why(("", "hour 2024-01-01T10:00:00+00:00"), 2)
    assert consumer.why(("", "hour 2024-01-01T11:00:00+00:00"), 2) == []
    consumer.close()
    assert first == Origin((), ORDERS, rows=7, values={"n": 7})
    assert [row.change and row.change.key for row in rows] == [b'{"id":0}', b'{"id":1}']


# Any history

KEYS = st.integers(1, 5)
ROW = st.fixed_dictionaries(
    {
        "at": st.sampled_from(
            [
                None,
                "infinity",
                *(
                    f"{day}T{time}+00:00"
                    for day in ("1969-12-31", "2024-02-29")
                    for time in ("10:00:00", "10:00:59.999999", "10:01:00", "11:00:00.5")
                ),
            ]
        ),
        "day": st.sampled_from([None, "-infinity", "2024-02-28", "2024-02-29", "1969-12-31"]),
        "state": st.sampled_from([None, "open", "paid"]),
        "pieces": st.none() | st.integers(-2, 5),
        "paid": st.sampled_from([None, "9.90", "-1.00", "0.05"]),
    }
)
STEP = st.one_of(
    *[st.tuples(st.just(ORDERS), KEYS, st.one_of(ROW, ROW, ROW, st.none()))] * 4,
    st.tuples(
        st.just("run"), st.sampled_from([None, None, "before", "middle", "after"]), st.integers(1, 5), st.integers(1, 9)
    ),
    st.tuples(st.just("caught up"), st.integers(1, 5)),
    st.sampled_from([("lose",), ("wipe",), ("compact",)]),
)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.lists(STEP, min_size=5, max_size=50))
def test_any_history_of_windows_equals_the_groups(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Settings(state=f"{folder}/state"), Sales, schemas=SCHEMAS)
        for step in steps:
            if step[0] == "caught up":
                caught_up(world, piece=step[1])
            else:
                world.take(step)
        caught_up(world)


def test_the_columns_are_those_of_the_fixture() -> None:
    assert order(1).keys() == COLUMNS.keys()
