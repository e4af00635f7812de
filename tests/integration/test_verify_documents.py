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
from headrace.documents import Aggregate, Avg, Count, Document, DocumentConsumer, Many, Max, Min, Node, One, Sum, Window
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.settings import Settings
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace_verify.expected import everything, expectation
from headrace_verify.film import Film
from headrace_verify.ledger import DIFFERENT, Difference, Ledger
from headrace_verify.postgres import connect, moment
from headrace_verify.view import write
from tests.fixtures.capture import capturing, eventually, execute, prepare, rows
from tests.fixtures.documents_deep import COLUMNS, COMMENTS, Deep, Join, plain
from tests.integration.test_capture_append_only import prepare_append_only
from tests.integration.test_verify import found, kept, loaded
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


def _of_shop(**joins: Any) -> Document:
    return Document("public.products", **joins)


USES: dict[str, tuple[str, Document | Window]] = {
    "by": ("reviews.product_id", _of_shop(r=Many("public.reviews", by="product_id"))),
    "on": ("products.category_id", _of_shop(c=One("public.categories", on="category_id"))),
    "where": ("reviews.hidden", _of_shop(r=Many("public.reviews", by="product_ref", where={"hidden": False}))),
    "order": ("reviews.stars", _of_shop(r=Many("public.reviews", by="product_ref", order="-stars"))),
    "least": ("reviews.stars", _of_shop(a=Aggregate("public.reviews", by="product_ref", x=Min("stars")))),
    "sum": ("reviews.stars", _of_shop(a=Aggregate("public.reviews", by="product_ref", x=Sum("stars")))),
    "count": ("reviews.stars", _of_shop(a=Aggregate("public.reviews", by="product_ref", x=Count("stars")))),
    "deeper": (
        "comments.review_id",
        _of_shop(r=Many("public.reviews", by="product_ref", c=Many("public.comments", by="review_id"))),
    ),
    "window": ("reviews.at", Window("public.reviews", on="at", seconds=60, n=Count())),
    "of a window": ("reviews.stars", Window("public.reviews", on="kept_at", seconds=60, n=Sum("stars"))),
}
"""Kinds of use of a column, each with the column."""


def test_a_declared_column_that_is_gone_before_the_log_says_so_is_named(settings: Settings) -> None:
    """No row was written since: the log's newest schema still has it."""
    prepare(
        settings,
        "CREATE TABLE categories (id int PRIMARY KEY)",
        "CREATE TABLE products (id int PRIMARY KEY, category_id int)",
        "CREATE TABLE reviews (id int PRIMARY KEY, product_id int, product_ref int, hidden bool, stars int, "
        "at timestamp, kept_at timestamp)",
        "CREATE TABLE comments (id int PRIMARY KEY, review_id int)",
        "INSERT INTO categories VALUES (1)",
        "INSERT INTO products VALUES (1, 1)",
        "INSERT INTO reviews VALUES (1, 1, 1, false, 5, '2026-01-01', '2026-01-01')",
        "INSERT INTO comments VALUES (1, 1)",
    )
    with capturing(settings) as capture:
        capture.reach()
    for gone in dict.fromkeys(column for column, _ in USES.values()):
        table, column = gone.split(".")
        execute(settings, f"ALTER TABLE {table} DROP COLUMN {column}")
    shapes = {schema.table: schema for schema in Log(settings).schemas().values()}
    for use, (gone, declared) in USES.items():

        class Declared(DocumentConsumer):
            """A view of one of them."""

            document = declared
            store = ElasticsearchIndex("verify-gone", mappings={})

            def render(self, row: Node) -> Row:
                return dict(row)

        with connect(settings) as postgres, pytest.raises(Misconfigured, match=gone.split(".")[1]) as refused:
            list(everything(expectation(postgres, Declared, use, settings, shapes, dict.fromkeys(shapes)), postgres))
        assert refused.value.code == "document-column", use


class Whole(DocumentConsumer):
    """Documents with all columns."""

    document = Document("public.products")
    store = ElasticsearchIndex("verify-whole", mappings={"dynamic": False})

    def render(self, row: Node) -> Row:
        return dict(row)


def test_a_column_that_documents_show_until_the_log_knows_it_is_gone_is_noted(settings: Settings) -> None:
    prepare(
        settings,
        "CREATE TABLE products (id int PRIMARY KEY, name text, note text)",
        "INSERT INTO products VALUES (1, 'a', 'x'), (2, 'b', 'y')",
    )
    with kept(settings, Whole):
        assert found(settings, Whole).notes == []
        execute(settings, "ALTER TABLE products DROP COLUMN note")
        seen = found(settings, Whole)
        assert [difference.columns for difference in seen.wrong] == [("note",), ("note",)]
        assert any("public.products has no column note any more" in note for note in seen.notes)
        execute(settings, "UPDATE products SET name = name WHERE id = 1")
        eventually("the log knows it", lambda: found(settings, Whole).notes == [])
        seen = found(settings, Whole)
        assert (seen.clean, seen.notes) == (True, [])


KEYS = {
    "numeric(10,0)": ["int", "numeric", "numeric(10,2)"],
    "numeric": ["numeric"],
    "bigint": ["text", "double precision", "price"],
    "text": ["bigint", "citext", "char(3)"],
    "citext": ["citext"],
    "char(3)": ["char(4)", "text"],
    "date": ["timestamp"],
    "timestamp": ["timestamptz"],
    "inet": ["cidr"],
    "interval": ["interval"],
    "macaddr": ["macaddr8"],
}
"""Types of a key, each with types of columns that may refer to it in Postgres, or hold the same, and are written otherwise."""
ALIKE = {
    "bigint": ("7", ["int", "smallint", "whole", "oid"]),
    "numeric(10,0)": ("7", ["numeric(4)"]),
    "price": ("7", ["price"]),
    "text": ("0e37df36-f698-11e6-8dd4-cb9ced3df976", ["varchar(36)", "uuid", "name"]),
    "uuid": ("0e37df36-f698-11e6-8dd4-cb9ced3df976", ["text"]),
    "mood": ("good", ["text", "other_mood"]),
    "varchar(9)": ("(1,2)", ["point"]),
    'text COLLATE "C"': ("a", ["text", 'text COLLATE "ucs_basic"']),
    "char(3)": ("a", ["char(3)"]),
    "timestamptz": ("2026-01-01 10:00:00+00", ["timestamptz(3)"]),
}
"""Types of a key, each with a value, and with types of columns that the log writes alike, of some of which Postgres says no equality."""


def test_a_join_of_columns_whose_equal_values_are_written_otherwise_is_refused(settings: Settings) -> None:
    """By the names that capture has from Postgres."""
    prepare(
        settings,
        "CREATE EXTENSION citext",
        "CREATE DOMAIN price AS numeric",
        "CREATE DOMAIN whole AS int",
        *[f"CREATE TABLE r{n} (id {kind} PRIMARY KEY)" for n, kind in enumerate(KEYS)],
        *[
            f"CREATE TABLE c{n}_{m} (id int PRIMARY KEY, r {kind})"
            for n, kinds in enumerate(KEYS.values())
            for m, kind in enumerate(kinds)
        ],
    )
    with capturing(settings) as capture:
        capture.reach()
    shapes = {schema.table: schema for schema in Log(settings).schemas().values()}
    for n, kinds in enumerate(KEYS.values()):
        for m, kind in enumerate(kinds):
            with (
                connect(settings) as postgres,
                pytest.raises(Misconfigured, match=f"r{n}.id.* not joined") as refused,
            ):
                expectation(postgres, _joined(n, m), "view", settings, shapes, dict.fromkeys(shapes))
            assert refused.value.code == "document-column", kind


def test_columns_that_are_written_alike_are_joined_by_that(settings: Settings) -> None:
    """Postgres has no operator for some of these pairs, and no grouping by some of the types."""
    prepare(
        settings,
        "CREATE DOMAIN price AS numeric",
        "CREATE DOMAIN whole AS int",
        "CREATE TYPE mood AS ENUM ('good')",
        "CREATE TYPE other_mood AS ENUM ('bad', 'good')",
        *[f"CREATE TABLE r{n} (id {kind} PRIMARY KEY)" for n, kind in enumerate(ALIKE)],
        *[f"INSERT INTO r{n} VALUES ('{value}')" for n, (value, _) in enumerate(ALIKE.values())],
        *[
            f"{command} c{n}_{m} {rest.format(kind=kind, value=value)}"
            for n, (value, kinds) in enumerate(ALIKE.values())
            for m, kind in enumerate(kinds)
            for command, rest in (
                ("CREATE TABLE", "(id int PRIMARY KEY, r {kind})"),
                ("INSERT INTO", "VALUES (1, '{value}'), (2, '{value}'), (3, NULL)"),
            )
        ],
    )
    with capturing(settings) as capture:
        capture.reach()
    for n, (kind, (_, kinds)) in enumerate(ALIKE.items()):
        for m, other in enumerate(kinds):
            made, few = expected(settings, _joined(n, m))
            assert few == made
            root = next(value for key, value in made.items() if key.startswith("public.r"))
            assert [row["id"] for row in root["of"]] == [1, 2], (kind, other)
            assert ([row["id"] for row in root["first"]], root["some"]) == ([1], {"n": 2}), (kind, other)
            found = {value["id"]: value["of"] for key, value in made.items() if key.startswith("public.c")}
            one = {"id": root["id"]}
            assert found == {1: one, 2: one, 3: None}, (kind, other)


def _joined(n: int, m: int) -> type[DocumentConsumer]:
    """Return a view of two tables, joined either way."""

    class Joined(DocumentConsumer):
        documents = (
            Document(
                f"public.r{n}",
                of=Many(f"public.c{n}_{m}", by="r"),
                first=Many(f"public.c{n}_{m}", by="r", limit=1),
                some=Aggregate(f"public.c{n}_{m}", by="r", n=Count()),
            ),
            Document(f"public.c{n}_{m}", of=One(f"public.r{n}", on="r")),
        )
        store = ElasticsearchIndex("verify-joined", mappings={})

        def id(self, table: str, key: Row) -> str:
            return f"{table} {key['id']}"

        def render(self, row: Node) -> Row:
            return plain(row)

    return Joined


def test_roots_that_share_an_id_are_named(settings: Settings) -> None:
    """One overwrites the other's document, and by rows alone nothing differs while both are alike."""

    class Joint(DocumentConsumer):
        documents = (Document("public.films"), Document("public.books"))
        store = ElasticsearchIndex("verify-joint", mappings={"dynamic": False})

        def id(self, table: str, key: Row) -> str:
            return "same" if table == "public.books" else str(key["id"])

        def render(self, row: Node) -> Row:
            return {"title": row["title"]}

    tables = [f"CREATE TABLE {name} (id text PRIMARY KEY, title text)" for name in ("films", "books")]
    prepare(settings, *tables, *(f"INSERT INTO {name} VALUES ('same', 'Dune')" for name in ("films", "books")))
    with kept(settings, Joint):
        with pytest.raises(Misconfigured) as refused:
            found(settings, Joint)
        assert refused.value.code == "document-ids"
        for root in ('public.films {"id":"same"}', 'public.books {"id":"same"}'):
            assert root in refused.value.message
        execute(settings, "INSERT INTO books VALUES ('another', 'Emma')", "DELETE FROM films")
        with pytest.raises(Misconfigured) as refused:
            found(settings, Joint)
        assert 'public.books {"id":"another"}' in refused.value.message
        execute(settings, "DELETE FROM books WHERE id = 'another'", "UPDATE books SET title = 'Dune II'")
        assert found(settings, Joint).clean
