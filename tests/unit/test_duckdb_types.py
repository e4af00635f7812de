"""Values of every type in DuckDB and back: exactly as in the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace import codec
from headrace.change import Column, TableSchema
from headrace.settings import Settings
from headrace.stores.duckdb import Database, DuckDBStore, query, tables
from tests.fixtures.tables import FIRST, SECOND, batch, put, schema

OF_TYPE: list[tuple[str, str, list[Any]]] = [
    ("smallint", "SMALLINT", [0, -32768, 32767]),
    ("integer", "INTEGER", [0, -(2**31), 2**31 - 1]),
    ("bigint", "BIGINT", [0, -(2**63), 2**63 - 1]),
    ("oid", "BIGINT", [4294967295]),
    ("boolean", "BOOLEAN", [True, False]),
    ("real", "FLOAT", [0.1, 1, -1.5, 1e06, 3.4028235e38, 1e-45, "NaN", "Infinity", "-Infinity"]),
    ("double precision", "DOUBLE", [0.1, 1, 123456789012345, 1e15, 1.7976931348623157e308, 5e-324, "NaN", "-Infinity"]),
    ("numeric(10,2)", "DECIMAL(10,2)", ["9.90", "-0.05", "0.00", "99999999.99", "NaN"]),
    ("numeric(2,2)", "DECIMAL(3,2)", ["0.05", "-0.99"]),
    ("numeric(38,10)", "DECIMAL(38,10)", ["1234567890123456789012345678.0123456789"]),
    ("numeric(38,38)", "VARCHAR", ["0.12345678901234567890123456789012345678"]),
    ("numeric(50,10)", "VARCHAR", ["1.0000000000"]),
    ("numeric(3,-2)", "VARCHAR", ["12300"]),
    ("numeric", "VARCHAR", ["1.10", "1e400", "NaN", "Infinity", "0.000000000000000000000000000000000000000000001"]),
    ("text", "VARCHAR", ["", 'it\'s "x"\n\\ \u0001 é 漢 🦆', "NULL", "null", '{"a":1}']),
    ("character(5)", "VARCHAR", ["a    "]),
    ("character varying(10)", "VARCHAR", ["a"]),
    (
        "date",
        "DATE",
        ["2026-01-02", "0001-01-01", "0044-03-15 BC", "infinity", "-infinity", "5874897-12-31", "12026-01-02"],
    ),
    (
        "timestamp without time zone",
        "TIMESTAMP",
        ["2026-01-02T03:04:05", "2026-01-02T03:04:05.1", "2026-01-02T03:04:05.123456", "infinity", "-infinity"],
    ),
    ("timestamp(3) without time zone", "TIMESTAMP", ["294276-12-31T23:59:59.999999", "0044-03-15T00:00:00 BC"]),
    (
        "timestamp with time zone",
        "TIMESTAMP WITH TIME ZONE",
        ["2026-01-02T03:04:05+00:00", "2026-01-02T03:04:05.12+00:00", "infinity", "0044-03-15T00:00:00+00:00 BC"],
    ),
    ("time without time zone", "VARCHAR", ["24:00:00", "01:02:03.5"]),
    ("interval", "VARCHAR", ["1 year 2 mons -3 days"]),
    ("uuid", "UUID", ["6b29fc40-ca47-1067-b31d-00dd010662da"]),
    ("bytea", "BLOB", ["", "AP8=", "aGVsbG8="]),
    ("jsonb", "JSON", [{"a": [1, 2.5, None], "b": {"c": "é"}}, [], "text", 5, 1.0, True, {"a": 1e300}]),
    ("json", "JSON", [{"b": 1, "a": 2}, "\ud7ff"]),
    ("integer[]", "INTEGER[]", [[], [1, None, 3], [[1, 2], [3, 4]]]),
    ("boolean[]", "BOOLEAN[]", [[True, None]]),
    ("real[]", "DOUBLE[]", [[0.1, 2.5], [1, 2], ["NaN"]]),
    ("text[]", "VARCHAR[]", [["a", 'b"c', None, "NULL", "x,y", ""], [["a"], ["b"]]]),
    ("numeric(6,2)[]", "DECIMAL(6,2)[]", [["1.50", None], ["NaN"]]),
    ("date[]", "DATE[]", [["2026-01-02"], ["0044-03-15 BC"]]),
    ("uuid[]", "UUID[]", [["6b29fc40-ca47-1067-b31d-00dd010662da"]]),
    ("timestamp with time zone[]", "VARCHAR[]", [["2026-01-02T03:04:05+00:00"]]),
    ("jsonb[]", "JSON[]", [[{"a": 1}, [1]]]),
    ("mood", "VARCHAR", ["happy"]),
    ("inet", "VARCHAR", ["10.0.0.0/8"]),
    ("money", "VARCHAR", ["$1.00"]),
]


@pytest.fixture(params=[0, 100], ids=["arrow", "lists"])
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Of each value both ways by which rows come into a table."""
    monkeypatch.setattr(tables, "_FEW", request.param)
    made = DuckDBStore(Settings(warehouse=str(tmp_path / "w.duckdb")), "warehouse")
    made.open(FIRST)
    yield made
    made.close()


def read(store: DuckDBStore, sql: str) -> list[list[Any]]:
    database = Database.opened(store.settings.warehouse, "1GB")
    try:
        return query(database, sql, rows=1000, seconds=10).rows
    finally:
        database.release()


@pytest.mark.parametrize(("postgres", "duck", "values"), OF_TYPE, ids=[kind for kind, _, _ in OF_TYPE])
def test_a_value_comes_back_byte_for_byte(store: DuckDBStore, postgres: str, duck: str, values: list[Any]) -> None:
    of = schema("public.t", id="integer", x=postgres)
    rows = [{"id": number, "x": value} for number, value in enumerate([*values, None])]
    store.apply(batch(10, *(put(of, 5, **row) for row in rows), schemas=(of,)))
    store.promote()
    assert [codec.dumps(row.value) for row in store.scan(None, 100)] == [codec.dumps(row) for row in rows]
    assert [name for name, *_ in read(store, "SELECT column_type FROM (DESCRIBE t) WHERE column_name = 'x'")] == [duck]


@pytest.mark.parametrize(("postgres", "duck", "values"), OF_TYPE, ids=[kind for kind, _, _ in OF_TYPE])
def test_one_value_alone_comes_back_too(store: DuckDBStore, postgres: str, duck: str, values: list[Any]) -> None:
    # In a batch of its own a value cannot profit from another one having changed how the column travels.
    of = schema("public.t", id="integer", x=postgres)
    for lsn, value in enumerate(values, start=1):
        store.apply(batch(lsn, put(of, lsn, id=1, x=value), schemas=(of,)))
        assert [codec.dumps(row.value["x"]) for row in store.scan(None, 9)] == [codec.dumps(value)], duck


@pytest.mark.parametrize(("postgres", "duck", "values"), OF_TYPE, ids=[kind for kind, _, _ in OF_TYPE])
def test_a_value_that_went_through_staging_comes_back_too(
    store: DuckDBStore, postgres: str, duck: str, values: list[Any]
) -> None:
    of = schema("public.t", id="integer", **{"x~/\"$.[*]'": postgres})
    store.apply(batch(1, schemas=()))
    rows = [{"id": number, of.columns[1].name: value} for number, value in enumerate([*values, None])]
    store.apply(batch(10, *(put(of, 5, **row) for row in rows), schemas=(of,), shown=1))
    store.apply(batch(20, schemas=()))
    assert [codec.dumps(row.value) for row in store.scan(None, 100)] == [codec.dumps(row) for row in rows], duck


def test_what_a_type_cannot_hold_is_null_to_readers_and_exact_to_verify(store: DuckDBStore) -> None:
    of = schema("public.t", id="integer", d="date", n="numeric(6,2)", a="integer[]")
    row = {"id": 1, "d": "0044-03-15 BC", "n": "NaN", "a": [[1], [2]]}
    store.apply(batch(10, put(of, 5, **row), schemas=(of,)))
    store.promote()
    assert read(store, "SELECT d, n FROM t") == [[None, None]]
    assert store.scan(None, 9)[0].value == row


def test_a_value_of_another_type_than_the_column_never_stops_the_consumer(store: DuckDBStore) -> None:
    kinds = {f"c{number}": kind for number, (kind, _, _) in enumerate(OF_TYPE)}
    of = schema("public.t", id="integer", **kinds)
    odd: list[Any] = ["odd", 1.5, 2**40, True, {"a": [1]}, [["x"]], "-", ""]
    rows = [{"id": number, **dict.fromkeys(kinds, value)} for number, value in enumerate(odd)]
    store.apply(batch(10, *(put(of, 5, **row) for row in rows), schemas=(of,)))
    store.promote()
    assert len(store.scan(None, 100)) == len(odd)
    assert read(store, "SELECT count(*) FROM t") == [[len(odd)]]


@pytest.mark.parametrize(
    ("kind", "value", "change"),
    [
        ("numeric(6,2)", "9.90", "9.91"),
        ("numeric(6,2)", "NaN", "1.00"),
        ("text", "a", "'b'"),
        ("jsonb", {"a": 1}, "'{\"a\":2}'"),
        ("date", "0044-03-15 BC", "'2026-01-01'"),
        ("integer[]", [[1], [2]], "[1, 2]"),
        ("double precision", "NaN", "1.5"),
        ("bytea", "AP8=", "NULL"),
    ],
)
def test_a_cell_changed_behind_its_back_is_seen_by_scan(
    store: DuckDBStore, kind: str, value: object, change: str
) -> None:
    of = schema("public.t", id="integer", x=kind)
    store.apply(batch(10, put(of, 5, id=1, x=value), schemas=(of,)))
    assert store.scan(None, 9)[0].value["x"] == value
    store._opened().cursor().execute(f'UPDATE g1."public.t" SET x = {change}')
    assert store.scan(None, 9)[0].value["x"] != value


@pytest.mark.parametrize(
    ("base", "duck", "values", "largest"),
    [
        ("integer", "INTEGER", [9, 10, 100], 100),
        ("boolean", "BOOLEAN", [False, True], True),
        ("date", "DATE", ["2026-01-02", "12026-01-02"], "12026-01-02"),
        ("jsonb", "JSON", [{"a": 1}, "text", {"a": 9}], {"a": 9}),
        ("bigint[]", "BIGINT[]", [[9], [10]], [10]),
        ("numeric", "VARCHAR", ["1.10"], "1.10"),
    ],
)
def test_a_column_of_a_domain_is_what_is_below_it(
    store: DuckDBStore, base: str, duck: str, values: list[Any], largest: object
) -> None:
    columns = (Column("id", "integer"), Column("q", "sales.qty", nullable=True, base=base))
    of = TableSchema("public.t", 1, columns, ("id",))
    rows = [{"id": number, "q": value} for number, value in enumerate(values)]
    store.apply(batch(10, *(put(of, 5, **row) for row in rows), schemas=(of,)))
    store.promote()
    assert read(store, "SELECT DISTINCT typeof(q), max(q) FROM t GROUP BY 1") == [[duck, largest]]
    assert [row.value for row in store.scan(None, 100)] == rows
    raw = store._opened().cursor()
    if base == "integer":
        assert raw.execute('SELECT count(_headrace_exact) FROM g1."public.t"').fetchall() == [(0,)]


def test_a_domain_that_an_older_headrace_kept_as_text_is_text_until_a_rebuild(
    store: DuckDBStore, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = Column("q", "qty"), Column("q", "qty", base="integer")
    of = TableSchema("public.t", 1, (Column("id", "integer"), before), ("id",))
    store.apply(batch(10, put(of, 5, id=1, q=9), schemas=(of,)))
    store.open(FIRST)
    same = TableSchema("public.t", 1, (Column("id", "integer"), after), ("id",))
    more = TableSchema("public.t", 2, (Column("id", "integer"), after, Column("n", "integer")), ("id",))
    store.apply(batch(20, put(same, 20, id=2, q=100), schemas=(same,)))
    assert "public.t: columns of domains are text until a rebuild: run headrace rebuild NAME" in caplog.text
    store.apply(batch(30, put(more, 30, id=3, q=10, n=1), schemas=(same, more)))
    assert [row.value["q"] for row in store.scan(None, 9)] == [9, 100, 10]
    store.promote()
    assert read(store, "SELECT DISTINCT typeof(q) FROM t") == [["VARCHAR"]]
    store.open(SECOND)
    store.apply(batch(30, put(more, 30, id=3, q=10, n=1), schemas=(same, more)))
    store.promote()
    assert read(store, "SELECT typeof(q), q FROM t") == [["INTEGER", 10]]
