"""Windows of time on real servers: whatever has happened to the rows, the documents are what SQL groups (S27)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from random import Random
from typing import Any

import psycopg
import pytest
from elasticsearch import Elasticsearch as Client
from hypothesis import HealthCheck, given
from hypothesis import settings as rules
from hypothesis import strategies as st

from headrace import codec
from headrace.change import Row
from headrace.control import Control
from headrace.documents import Count, DocumentConsumer, Max, Node, Sum, Window
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.settings import Settings
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace_verify.expected import everything, expectation
from headrace_verify.film import Film
from headrace_verify.ledger import DIFFERENT, MISSING, Difference
from headrace_verify.postgres import Connection, connect, moment, stream
from headrace_verify.verify import Verifier, _postgres_errors
from tests.fixtures.capture import execute, prepare
from tests.fixtures.documents import World
from tests.fixtures.verified import found, kept, loaded
from tests.fixtures.windows import COLUMNS, ORDERS, SCHEMAS, Sales
from tests.integration.test_capture_append_only import prepare_append_only

TABLE = f"CREATE TABLE {ORDERS} ({', '.join(f'{name} {kind}' for name, kind in COLUMNS.items())}, PRIMARY KEY (id))"


class Kept(Sales):
    """A view of windows."""

    store = ElasticsearchIndex("verify-windows", mappings={"dynamic": False})


# Any history, against what SQL says of the rows that are left


def expected(connection: Connection, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what verify expects of all windows, and of each as one of a few."""
    shapes = {schema.table: schema for schema in SCHEMAS.values()}
    with moment(connection):
        said = expectation(connection, Kept, "view", settings, shapes, dict.fromkeys(shapes))
        made = [each.row for each in everything(said, connection)]
    few: dict[str, Any] = {}
    if made:
        film = Film(connection, list(said.queries(connection, [row.root for row in made])), 0.0, 1)
        film.shoot()
        (frame,) = film.around(1 << 63, 1 << 63)
        few = {each.row.key: each.row.value for each in map(said.made, frame.found)}
    return {row.key: row.value for row in made}, few


@pytest.fixture
def reading(settings: Settings) -> Iterator[Connection]:
    execute(settings, TABLE)
    with closing(connect(settings)) as connection:
        yield connection


TIMES = [
    f"{day}T{time}+00:00{era}"
    for day, era in (
        ("2024-02-29", ""),
        ("1969-12-31", ""),
        ("0044-03-15", " BC"),
        ("0001-12-31", " BC"),
        ("0001-01-01", ""),
        ("294276-12-31", ""),
    )
    for time in ("00:00:00", "10:00:59.999999", "10:01:00", "23:59:59.5")
]
ROW = st.fixed_dictionaries(
    {
        "at": st.sampled_from([None, "infinity", "-infinity", *TIMES]),
        "day": st.sampled_from([None, "infinity", "2024-02-29", "1969-12-31", "0044-03-15 BC", "4713-12-01 BC"]),
        "state": st.sampled_from([None, "open", "paid"]),
        "pieces": st.none() | st.integers(-2, 5),
        "paid": st.sampled_from([None, "9.90", "-1.00", "0.05", "NaN", "12345678901234567890.01"]),
    }
)
STEP = st.one_of(
    *[st.tuples(st.just(ORDERS), st.integers(1, 8), st.one_of(ROW, ROW, ROW, st.none()))] * 5,
    st.tuples(st.just("run"), st.sampled_from([None, "before", "middle", "after"]), st.integers(1, 5)),
    st.just(("lose",)),
)


@rules(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.lists(STEP, min_size=5, max_size=40))
def test_any_history_of_windows_is_what_sql_groups(
    reading: Connection, settings: Settings, steps: list[tuple[Any, ...]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Settings(state=f"{folder}/state"), Sales, schemas=SCHEMAS)
        for step in steps:
            world.take(step)
        world.log.cut()
        world.run()
        left = codec.dumps(list(world.log.rows[ORDERS].values())).decode()
        execute(
            settings,
            f"TRUNCATE {ORDERS}",
            f"INSERT INTO {ORDERS} SELECT * FROM json_populate_recordset(NULL::{ORDERS}, $rows${left}$rows$)",
        )
        made, few = expected(reading, settings)
    assert world.store.bodies() == made
    assert few == made


def test_a_window_that_postgres_cannot_compute_is_not_told_as_a_postgres_that_is_away(
    reading: Connection, settings: Settings
) -> None:
    """A date beyond the years of a timestamp; and as SQL alone what is beyond a gigabyte, and a hundred values in one."""
    execute(settings, f"INSERT INTO {ORDERS} (id, day) VALUES (1, '300000-01-01')")
    with pytest.raises(Misconfigured, match="out of range") as refused, _postgres_errors():
        expected(reading, settings)
    assert refused.value.code == "verify-no-expectation"
    for query in "SELECT repeat('x', 1 << 30)", f"SELECT json_build_array({', '.join(['1'] * 101)})":
        with pytest.raises(Misconfigured, match="cannot compute"), _postgres_errors():
            execute(settings, query)


def test_of_large_rows_few_come_at_once(reading: Connection) -> None:
    """A window has the key of each of its rows."""

    class Counting(psycopg.ServerCursor[tuple[str]]):
        """Notes the sizes of what comes at once."""

        def fetchmany(self, size: int = 0) -> list[tuple[str]]:
            rows = super().fetchmany(size)
            sizes.append([len(text) for (text,) in rows])
            return rows

    sizes: list[list[int]] = []
    reading.server_cursor_factory = Counting
    query = b"SELECT repeat('x', CASE WHEN i <= 30 THEN 1 << 20 ELSE 10 END) FROM generate_series(1, 1000) i"
    with moment(reading):
        assert sum(1 for _ in stream(reading, query)) == 1000
    assert max(map(sum, sizes)) <= 4 << 20
    assert max(map(len, sizes)) == 200, "as many as that are small"


# All of it: capture, a consumer, and verify

_SOME_TIME = "timestamptz '2024-02-29 10:00:00+00' + {} * interval '7 s'"
LOAD: tuple[Callable[[Random], str], ...] = (
    lambda chance: (
        f"UPDATE orders SET at = {_SOME_TIME.format(chance.randint(0, 60))} WHERE id = {chance.randint(1, 200)}"
    ),
    lambda chance: f"UPDATE orders SET pieces = pieces + 1 WHERE id = {chance.randint(1, 200)}",
    lambda chance: f"UPDATE orders SET state = 'open' WHERE id = {chance.randint(1, 200)}",
    lambda chance: f"DELETE FROM orders WHERE id = {chance.randint(1, 200)}",
    lambda chance: (
        f"INSERT INTO orders VALUES ({chance.randint(1, 200)}, {_SOME_TIME.format(chance.randint(0, 60))}, "
        f"'2024-02-{chance.randint(1, 29)}', 'paid', 1, 9.90) ON CONFLICT DO NOTHING"
    ),
    *[lambda _: "SELECT pg_sleep(0.02)"] * 6,
)


@pytest.mark.usefixtures("elasticsearch")
def test_windows_are_right_under_load_and_a_wrong_one_is_found(settings: Settings) -> None:
    orders = _SOME_TIME.format("i")
    prepare(
        settings,
        TABLE,
        f"INSERT INTO orders SELECT i, {orders}, '2024-02-29', 'paid', i % 5, i + 0.10 FROM generate_series(1, 200) i",
        "INSERT INTO orders VALUES (201, NULL, NULL, NULL, NULL, NULL), (202, 'infinity', '-infinity', 'open', 1, 1)",
        "INSERT INTO orders VALUES (203, '0044-03-15 12:34:56+00 BC', '0044-03-15 BC', 'paid', 1, 1)",
    )
    with kept(settings, Kept):
        with loaded(settings, *LOAD):
            for _ in range(2):
                assert found(settings, Kept, timeout=120).clean
        assert found(settings, Kept).clean
        with closing(Client(settings.elasticsearch)) as client:
            (index,) = client.indices.get_alias(name="verify-windows")
            ours = {"minute": "0044-03-15T12:34:00+00:00 BC", "n": 2}
            client.update(index=index, id=f"minute {ours['minute']}", doc=ours, refresh=True)
            client.delete(index=index, id="hour 0044-03-15T12:00:00+00:00 BC", refresh=True)
        seen = found(settings, Kept)
        assert seen.wrong == [
            Difference(MISSING, "", "hour 0044-03-15T12:00:00+00:00 BC"),
            Difference(DIFFERENT, "", "minute 0044-03-15T12:34:00+00:00 BC", ("n",)),
        ]
        assert not seen.undecided
        log = Log(settings)
        with pytest.raises(Misconfigured, match="not counted by rows"):
            list(Verifier(log, Control(log), lambda *_: None, 60).count({"view": Kept}))


class Events(DocumentConsumer):
    """Rows without a key: they are in no document but a window."""

    document = Window("public.events", on="at", seconds=10, n=Count(), size=Sum("size"), last=Max("at"))
    store = ElasticsearchIndex("verify-events", mappings={"dynamic": False})

    def render(self, row: Node) -> Row:
        return dict(row)


@pytest.mark.usefixtures("elasticsearch")
def test_windows_of_an_append_only_table_are_kept_and_verified(settings: Settings) -> None:
    prepare_append_only(
        settings,
        "CREATE TABLE public.events (at timestamp, size int)",
        "INSERT INTO events SELECT timestamp '2024-02-29' + i * interval '1 s', i FROM generate_series(1, 50) i",
    )
    with kept(settings, Events):
        with loaded(
            settings,
            lambda chance: f"INSERT INTO events VALUES ('2024-02-29 00:00:{chance.randint(0, 59)}', 1)",
            *[lambda _: "SELECT pg_sleep(0.02)"] * 3,
        ):
            assert found(settings, Events, timeout=120).clean
        assert found(settings, Events).clean
