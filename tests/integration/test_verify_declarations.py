"""Declarations as capture names the types: columns that are gone, joins that are refused or written alike, roots that share an id."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.change import Row
from headrace.documents import Aggregate, Count, Document, DocumentConsumer, Many, Min, Node, One, Sum, Window
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.settings import Settings
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace_verify.expected import everything, expectation
from headrace_verify.postgres import connect
from tests.fixtures.capture import capturing, eventually, execute, prepare
from tests.fixtures.documents_deep import plain
from tests.fixtures.verified import found, kept
from tests.integration.test_verify_documents import expected

pytestmark = pytest.mark.usefixtures("elasticsearch")


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
    "ltree": ("Top.a", ["ltree", "route", "text"]),
    "hstore": ('"a"=>"1"', ["hstore"]),
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
        "CREATE EXTENSION ltree",
        "CREATE EXTENSION hstore",
        "CREATE DOMAIN route AS ltree",
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
