"""Documents of several levels on real servers: capture, a consumer, and verify, which makes SQL of the declaration (S27)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from random import Random
from typing import Any

import pytest
from elasticsearch import Elasticsearch as Client
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headrace import codec
from headrace.change import Row
from headrace.documents import Aggregate, Avg, Count, Document, DocumentConsumer, Many, Max, Min, Node, One, Sum
from headrace.log import Log
from headrace.settings import Settings
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace_verify.expected import everything, expectation
from headrace_verify.film import Film
from headrace_verify.ledger import DIFFERENT, Difference, Ledger
from headrace_verify.postgres import connect, moment
from headrace_verify.view import write
from tests.fixtures.capture import capturing, execute, prepare, rows
from tests.fixtures.documents_deep import COLUMNS, COMMENTS, Deep, Join, plain
from tests.fixtures.verified import found, kept, loaded
from tests.integration.test_capture_append_only import prepare_append_only
from tests.unit.test_documents_deep import FULL

pytestmark = pytest.mark.usefixtures("elasticsearch")


class Kept(Deep):
    """A view of documents of several levels."""

    store = ElasticsearchIndex("verify-deep", mappings={"dynamic": False})


@pytest.fixture
def deep(settings: Settings) -> Settings:
    """Tables of several levels, with references to what is not there, to nothing, and in circles."""
    tables = [
        f"CREATE TABLE {table} ({', '.join(f'{name} {kind}' for name, kind in columns.items())}, PRIMARY KEY (id))"
        for table, columns in COLUMNS.items()
    ]
    references = [
        f"CREATE INDEX ON {table} ({name})"
        for table, columns in COLUMNS.items()
        for name in columns
        if name.endswith("_id")
    ]
    prepare(
        settings,
        *tables,
        *references,
        "INSERT INTO categories SELECT i, nullif(i % 7, 0), 'c' || i FROM generate_series(1, 20) i",
        "INSERT INTO products SELECT i, nullif(i % 25, 0), 'p' || i FROM generate_series(1, 60) i",
        """INSERT INTO reviews SELECT i, i % 50, nullif(i % 6, 0), nullif(i % 3, 0) = 1, nullif(i % 11, 0) + 0.10
           FROM generate_series(1, 300) i""",
        "INSERT INTO comments SELECT i, i % 320, chr(97 + i % 3) FROM generate_series(1, 600) i",
        "INSERT INTO product_tags SELECT i, i % 50, i % 9 FROM generate_series(1, 150) i",
        "INSERT INTO tags SELECT i, 't' || i FROM generate_series(1, 8) i",
    )
    return settings


def expected(settings: Settings, consumer: type[DocumentConsumer]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what verify expects of all roots, and of each as one of a few."""
    shapes = {table: schema for (table, _), schema in sorted(Log(settings).schemas().items())}
    with connect(settings) as connection:
        with moment(connection):
            said = expectation(connection, consumer, "view", settings, shapes, dict.fromkeys(shapes))
            made = [each.row for each in everything(said, connection)]
        film = Film(connection, list(said.queries(connection, [row.root for row in made])), 0.0, 1)
        film.shoot()
        (frame,) = film.around(1 << 63, 1 << 63)
        few = {each.row.key: each.row.value for each in map(said.made, frame.found)}
    return {row.key: row.value for row in made}, few


def test_the_expectation_of_several_levels_is_the_join(deep: Settings) -> None:
    with capturing(deep) as capture:
        capture.reach()
    held = {
        table: {row["id"]: row for (row,) in rows(deep, f"SELECT row_to_json(t) FROM {table} t")} for table in COLUMNS
    }
    for review in held["public.reviews"].values():
        review["paid"] = None if review["paid"] is None else f"{review['paid']:.2f}"
    made, few = expected(deep, Kept)
    assert made == Join(held).documents()
    assert few == made

    @hypothesis_settings(max_examples=10, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(FULL, st.sets(st.tuples(st.sampled_from(list(COLUMNS)), st.integers(1, 3))))
    def of_any_rows(full: dict[str, tuple[Row, ...]], missing: set[tuple[str, int]]) -> None:
        some = {
            table: {key: {"id": key, **row} for key, row in enumerate(made, 1) if (table, key) not in missing}
            for table, made in full.items()
        }
        inserts = [
            f"INSERT INTO {table} SELECT * FROM json_populate_recordset(NULL::{table}, '{codec.dumps([*of.values()]).decode()}')"
            for table, of in some.items()
        ]
        execute(deep, f"TRUNCATE {', '.join(COLUMNS)}", *inserts)
        made, few = expected(deep, Kept)
        assert made == Join(some).documents()
        assert few == made

    of_any_rows()


LOAD: tuple[Callable[[Random], str], ...] = (
    lambda chance: f"UPDATE categories SET parent_id = {chance.randint(1, 20)} WHERE id = {chance.randint(1, 20)}",
    lambda chance: f"UPDATE products SET category_id = {chance.randint(1, 20)} WHERE id = {chance.randint(1, 60)}",
    lambda chance: f"UPDATE reviews SET product_id = {chance.randint(1, 60)} WHERE id = {chance.randint(1, 300)}",
    lambda chance: f"UPDATE reviews SET hidden = NOT hidden WHERE id = {chance.randint(1, 300)}",
    lambda chance: f"UPDATE reviews SET paid = {chance.randint(-5, 15)}.10 WHERE id = {chance.randint(1, 300)}",
    lambda chance: f"UPDATE comments SET review_id = {chance.randint(1, 300)} WHERE id = {chance.randint(1, 600)}",
    lambda chance: f"DELETE FROM comments WHERE id = {chance.randint(1, 600)}",
    lambda chance: f"INSERT INTO comments VALUES ({chance.randint(1, 600)}, 7, 'a') ON CONFLICT DO NOTHING",
    lambda chance: f"DELETE FROM tags WHERE id = {chance.randint(1, 8)}",
    lambda chance: f"INSERT INTO tags VALUES ({chance.randint(1, 8)}, 'new') ON CONFLICT DO NOTHING",
    *[lambda _: "SELECT pg_sleep(0.02)"] * 10,
)


def test_documents_of_several_levels_are_right_under_load_and_a_wrong_one_is_found(deep: Settings) -> None:
    with kept(deep, Kept):
        with loaded(deep, *LOAD):
            for _ in range(2):
                assert found(deep, Kept, timeout=120).clean
        assert found(deep, Kept).clean
        with closing(Client(deep.elasticsearch)) as client:
            (index,) = client.indices.get_alias(name="verify-deep")
            source = client.get(index=index, id="products-1")["_source"]
            source["reviews"][0]["comments"] = source["reviews"][0]["comments"][1:]
            client.update(index=index, id="products-1", doc={"reviews": source["reviews"]}, refresh=True)
            client.update(index=index, id="products-2", doc={"rating": {"n": 77}}, refresh=True)
        seen = found(deep, Kept)
    assert seen.wrong == [
        Difference(DIFFERENT, "", "products-1", ("reviews",)),
        Difference(DIFFERENT, "", "products-2", ("rating",)),
    ]
    assert not seen.undecided


def test_a_change_excuses_the_documents_that_hold_its_row_at_any_level(deep: Settings) -> None:
    """A snapshot knows which rows a document holds; and a new row names the one that it is joined to."""
    with capturing(deep) as capture:
        capture.reach()
        execute(deep, "INSERT INTO comments VALUES (9999, 1, 'new')", "DELETE FROM comments WHERE id = 1")
        capture.reach()
    log, ledger = Log(deep), Ledger()
    shapes = {schema.table: schema for schema in log.schemas().values()}
    execute(deep, "DELETE FROM comments WHERE id = 9999", "INSERT INTO comments VALUES (1, 1, 'b')")
    with connect(deep) as connection, moment(connection):
        said = expectation(connection, Kept, "view", deep, shapes, dict.fromkeys(shapes))
        write(ledger, everything(said, connection))
    changed = {codec.decode_key(change.key)["id"]: change for change in log.scan(COMMENTS)}
    new, gone = changed[9999], changed[1]
    assert gone.row is None
    assert {key for _, key, _ in ledger.holders(*said.member(gone))} == {"products-1"}
    holding = {key for row in said.above(new) for _, key, _ in ledger.holders(*row)}
    assert holding == {"products-1", "categories-1"}, "all that hold the review, also the one without its comments"
    assert not list(said.above(gone))
    ledger.close()


class Odd(DocumentConsumer):
    """Values whose comparison is not plain: the view's text is compared, so that also their form counts."""

    document = Document(
        "public.makers",
        cheap=Many("public.things", by="maker", order=["price", "-made"], limit=2),
        loud=Many("public.things", by="maker", where={"price": [1.5, "2"], "ok": [True, None]}, order="-weight"),
        first=Many("public.things", by="maker", limit=1),
        named=Many("public.things", by="maker", order="-name", limit=3),
        some=Aggregate(
            "public.things",
            by="maker",
            where={"mark": ["x", None]},
            n=Count(),
            names=Count("name"),
            weight=Sum("weight"),
            mean=Avg("weight"),
            heaviest=Max("weight"),
            price=Sum("price"),
            usual=Avg("price"),
            least=Min("price"),
            most=Max("price"),
            small=Sum("small"),
            youngest=Max("made"),
            last=Max("name"),
            true=Max("ok"),
        ),
        lines=Aggregate(
            "public.lines",
            by="maker",
            n=Count(),
            sum=Sum("size"),
            oids=Sum("oid"),
            low=Min("said"),
            raw=Count("raw"),
            made=Count("made"),
        ),
        latest=Many("public.lines", by="maker", order="-size", limit=2),
        place=One(
            "public.places",
            on=("country", "code"),
            makers=Many("public.makers", by=("country", "code"), order="-id", limit=2),
            n=Aggregate("public.makers", by=("country", "code"), n=Count()),
        ),
    )
    store = ElasticsearchIndex("verify-odd", mappings={"dynamic": False})

    def render(self, row: Node) -> Row:
        return {"all": codec.dumps(plain(row)).decode()}


THINGS = """
    (1, 1, 1.50, 0.1, 0.1, 'b', '2024-01-01 10:00:00+00', true, 'x'),
    (2, 1, 1.5, 0.2, 'NaN', 'B', '2024-01-01 10:00:00.5+00', NULL, NULL),
    (3, 1, NULL, 1, 3, 'ä', NULL, false, 'y'),
    (4, 1, 2.00, 1e300, 1e20, '', 'infinity', true, 'x'),
    (5, 1, 10, -5, 7, 'b', '0044-03-15 00:00:00+00 BC', true, 'x'),
    (6, 2, 'NaN', 'Infinity', 1, NULL, '-infinity', NULL, NULL),
    (7, 2, -1.00, '-Infinity', 2, 'z', '2024-01-01 10:00:00+00', false, 'x'),
    (8, 3, 12345678901234567890123456789.01, 1, NULL, 'q', NULL, NULL, 'x'),
    (9, 3, 0.01, 2, NULL, 'q', NULL, NULL, 'x')
"""


def test_numbers_text_and_nulls_are_sorted_filtered_and_summed_as_in_postgres(settings: Settings) -> None:
    prepare_append_only(
        settings,
        "CREATE DOMAIN public.extra AS jsonb",
        "CREATE TABLE lines (maker int, size int, said text, raw json, made public.extra, oid oid)",
        "CREATE DOMAIN public.price AS numeric",
        "CREATE TABLE places (code int, country text, called text, PRIMARY KEY (country, code))",
        "CREATE TABLE makers (id int PRIMARY KEY, code int, country text)",
        """CREATE TABLE things (id numeric PRIMARY KEY, maker int, price public.price, weight float8, small float4, name text,
           made timestamptz, ok boolean, mark text)""",
        "INSERT INTO makers SELECT i, 7, nullif('y', chr(117 + i)) FROM generate_series(1, 4) i",
        "INSERT INTO places VALUES (7, 'y', 'here'), (8, 'y', 'there')",
        f"INSERT INTO things VALUES {THINGS}",
        """INSERT INTO lines SELECT i % 3, i, 'l' || i, (ARRAY[NULL, e'\t null\n', '[null]', '"null"'])[1 + i % 4]::json,
           (ARRAY['null', NULL, '{}', '0'])[1 + i % 4]::jsonb, i FROM generate_series(1, 20) i""",
        table="lines",
    )
    with kept(settings, Odd):
        execute(
            settings,
            "INSERT INTO things SELECT id + 0.5, maker, price, weight, small, name, made, ok, mark FROM things",
        )
        assert found(settings, Odd).clean
        made, few = expected(settings, Odd)
    assert few == made
    one = {key: codec.loads(value["all"]) for key, value in made.items()}
    assert [thing["id"] for thing in one["1"]["cheap"]] == ["2", "2.5"], "1.50 is 1.5, and the later comes first"
    assert [thing["id"] for thing in one["1"]["loud"]] == ["4", "4.5", "2", "2.5", "1", "1.5"]
    assert one["3"]["some"]["price"] == "24691357802469135780246913578.04"
    assert one["1"]["some"]["small"] == "NaN"
    assert one["2"]["some"]["weight"] == "NaN", "infinities of both signs"
    assert one["4"]["some"]["n"] == 0
    assert [maker["id"] for maker in one["1"]["place"]["makers"]] == [3, 2]
    assert one["1"]["place"]["n"] == {"n": 3}
    assert one["4"]["place"] is None, "half of its key is NULL"
    assert [line["size"] for line in one["2"]["latest"]] == [20, 17]
    lines = one["2"]["lines"]
    assert (lines["n"], lines["raw"], lines["made"]) == (7, 3, 3), "the null of JSON is none"
    assert lines["oids"] == lines["sum"]
