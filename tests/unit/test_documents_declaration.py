"""Declarations of documents and the rows that render gets."""

import copy
import pickle
from dataclasses import replace
from fractions import Fraction
from typing import Any

import jinja2
import pytest

from headrace import codec
from headrace.change import Column, TableSchema, Version
from headrace.documents import (
    Aggregate,
    Avg,
    Count,
    Document,
    Many,
    Max,
    Min,
    Node,
    One,
    Sum,
    Window,
    count,
    mean,
    total,
)
from headrace.documents.checks import check, check_types, check_window
from headrace.documents.local import Touched
from headrace.documents.order import Shape
from headrace.documents.rendering import rendered
from headrace.errors import Misconfigured, Poison

PRODUCT = Document(
    "public.products",
    category=One("public.categories", on="category_id"),
    reviews=Many("public.reviews", by="product_id"),
)


REVIEWS = [{"id": 10, "stars": 1}, {"id": 9, "stars": None}, {"id": 2, "stars": 4}]


def _node() -> Node:
    reviews = [Node("public.reviews", review) for review in REVIEWS]
    return Node("public.products", {"id": 1, "name": "kettle"}, {"category": None, "reviews": reviews})


def _picked(many: Many, rows: list[dict[str, Any]], numbers: tuple[str, ...] = ("id",)) -> list[Any]:
    return [row["id"] for row, _ in many.picked(((row, None) for row in rows), Shape(("id",), numbers))]


def test_a_declaration_names_its_tables_the_root_first() -> None:
    assert PRODUCT.tables == ("public.products", "public.categories", "public.reviews")


def test_columns_are_items_and_attributes_and_joins_are_attributes() -> None:
    node = _node()
    assert (node["name"], node.name, node.table, node.category) == ("kettle", "kettle", "public.products", None)
    assert dict(node) == {"id": 1, "name": "kettle"}
    with pytest.raises(KeyError):
        _ = node["category"]


def test_joins_methods_of_a_mapping_and_the_table_come_before_columns_of_their_names() -> None:
    row = {"id": 1, "items": "three", "category": "old", "table": "oak", "_joins": 2}
    node = Node("t", row, {"category": None})
    assert (node.id, node.category, node.table, node["table"]) == (1, None, "t", "oak")
    assert dict(node.items()) == row
    assert copy.deepcopy(node).id == pickle.loads(pickle.dumps(node)).id == 1  # noqa: S301  its own


def test_what_render_changes_of_a_row_is_what_a_template_finds() -> None:
    row = {"id": 1, "name": "kettle", "copy": "text", "secret": "x", "hidden": "y"}
    node = Node("t", row, {"category": None})
    node.category, node.extra = "changed", 5
    node["name"] = "KETTLE"
    node.update(id=2)
    node |= {"copy": "other"}
    del node["secret"]
    assert (node.pop("hidden"), node.pop("hidden", 7)) == ("y", 7)
    with pytest.raises(KeyError):
        node.pop("hidden")
    template = jinja2.Environment(autoescape=True).from_string(
        "{{ r.name }} {{ r.id }} {{ r.copy }} {{ r.extra }} {{ r.category }} {{ r.secret }}{{ r.hidden }}"
    )
    assert template.render(r=node) == "KETTLE 2 other 5 changed "
    assert row["name"] == "kettle"


def test_columns_and_joins_may_have_the_names_that_only_a_dictionary_has() -> None:
    Document("t", update=One("u", on="update_id"))
    node = Node("t", {"id": 1, "copy": "text"}, {"update": None})
    assert (node.copy, node.update, dict(node)) == ("text", None, {"id": 1, "copy": "text"})
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True).from_string(
        "{{ row.copy }} {{ row.id }}"
    )
    assert template.render(row=node) == "text 1"


def test_who_reads_what_is_neither_join_nor_column_is_told_of_which_row() -> None:
    class Wrong:
        name = "wrong"

        def render(self, row: Node) -> dict[str, Any]:
            return {"name": row.title}

    with pytest.raises(Poison, match=r"public.products has no join and no column 'title'"):
        rendered(Wrong(), Touched(PRODUCT, {"id": 1}, None), _node(), "1", Version(1, 1))


def test_many_rows_come_in_the_order_of_their_keys() -> None:
    assert _picked(Many("public.reviews", by="product_id"), REVIEWS) == [2, 9, 10]


def test_aggregates_leave_nulls_out() -> None:
    reviews = _node().reviews
    assert (count(reviews), count(reviews, "stars"), total(reviews, "stars"), mean(reviews, "stars")) == (3, 2, 5, 2.5)
    assert (count([]), total([], "stars"), mean([], "stars")) == (0, 0, None)


def test_a_total_of_numerics_is_exact_and_in_their_form() -> None:
    assert total([{"price": "0.10"}, {"price": "0.20"}], "price") == "0.30"


def test_a_long_total_is_not_rounded() -> None:
    many = [{"price": "12345678901234567890123456789.01"}, {"price": "0.01"}]
    assert total(many, "price") == "12345678901234567890123456789.02"


@pytest.mark.parametrize(
    "values",
    [
        ["NaN", 1.5],
        ["Infinity", 1.5, None],
        ["Infinity", "-Infinity", 2.5],
        ["-Infinity", 7],
        ["NaN", "1.10"],
        [1e308, 1e308],
        [-1e308, -1e308, 1],
        [0.1, 0.2],
        [1.5, 1.5],
        [9223372036854775807] * 3,
        [-9223372036854775808],
        [1, 2, 2],
        ["1.10", "2"],
        [None],
    ],
)
def test_total_and_mean_of_rows_are_what_sum_and_avg_declare(values: list[Any]) -> None:
    """Every number that the log has is added, and what comes out is JSON."""
    rows = [{"n": value} for value in values]
    declared = []
    for function in (Sum("n"), Avg("n")):
        state = None
        for value in values:
            state = function.add(state, value, number=True)
        declared.append(function.result(state))
    assert [total(rows, "n") or None, mean(rows, "n")] == declared
    codec.dumps([total(rows, "n"), mean(rows, "n")])


def test_total_and_mean_take_booleans_and_refuse_what_is_no_number() -> None:
    """A document of such a row is parked, as for any other mistake in render."""
    rows = [{"n": True}, {"n": False}, {"n": None}]
    assert (total(rows, "n"), mean(rows, "n")) == (1, 0.5)
    assert isinstance(total([{"n": 1.5}, {"n": 0.5}], "n"), float)
    for values in (["many"], [1, "many"], [{}]):
        for function in (total, mean):
            with pytest.raises((ArithmeticError, TypeError, ValueError)):
                function([{"n": value} for value in values], "n")


def test_a_declaration_of_several_levels_names_the_tables_of_all() -> None:
    tag = One("public.tags", on="tag_id", owner=One("public.users", on="user_id"))
    document = Document(
        "public.products",
        tags=Many("public.product_tags", by="product_id", tag=tag),
        rating=Aggregate("public.reviews", by="product_id", n=Count()),
    )
    assert document.tables == (
        "public.products",
        "public.product_tags",
        "public.tags",
        "public.users",
        "public.reviews",
    )


ROWS = [
    {"id": 1, "price": "9.90", "name": "b"},
    {"id": 2, "price": "10.00", "name": None},
    {"id": 3, "price": None, "name": "a"},
    {"id": 4, "price": "NaN", "name": "b"},
    {"id": 5, "price": "10.0", "name": "B"},
    {"id": 6, "price": "-Infinity", "name": "ä"},
]


@pytest.mark.parametrize(
    ("order", "ids"),
    [
        ("price", [6, 1, 2, 5, 4, 3]),
        ("-price", [4, 2, 5, 1, 6, 3]),
        ("name", [5, 3, 1, 4, 6, 2]),
        (["-name", "-price"], [6, 4, 1, 3, 5, 2]),
        ("-id", [6, 5, 4, 3, 2, 1]),
    ],
)
def test_order_is_by_value_with_nulls_last_and_ties_by_the_key(order: Any, ids: list[int]) -> None:
    many = Many("t", by="x", order=order)
    assert _picked(many, ROWS, ("id", "price")) == ids
    for limit in range(1, 7):
        assert _picked(Many("t", by="x", order=order, limit=limit), ROWS, ("id", "price")) == ids[:limit]


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ({"price": "10"}, [2, 5]),
        ({"price": 9.9}, [1]),
        ({"price": ["NaN", None]}, [3, 4]),
        ({"name": "b"}, [1, 4]),
        ({"name": "b", "price": "9.9"}, [1]),
        ({"name": None}, [2]),
        ({"name": []}, []),
        ({"id": True}, []),
        ({"gone": None}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_a_filter_compares_numbers_by_value_and_text_as_it_is(where: Any, ids: list[int]) -> None:
    admits = Many("t", by="x", where=where).filter(Shape(("id",), ("id", "price")))
    assert [row["id"] for row in ROWS if admits(row)] == ids


def _over(values: list[Any], number: bool = True) -> list[Any]:
    aggregate = Aggregate("t", by="x", n=Count(), v=Count("v"), s=Sum("v"), a=Avg("v"), low=Min("v"), high=Max("v"))
    shape = Shape((), ("v",) if number else ())
    return list(aggregate.over(({"v": value} for value in values), shape).values())


@pytest.mark.parametrize(
    ("values", "results"),
    [
        ([], [0, 0, None, None, None, None]),
        ([None], [1, 0, None, None, None, None]),
        ([3, None, 4], [3, 2, 7, 3.5, 3, 4]),
        ([2**62, 2**62], [2, 2, float(2**63), float(2**62), 2**62, 2**62]),
        ([0.1, 0.2], [2, 2, 0.3, 0.15, 0.1, 0.2]),
        ([1e308, 1e308], [2, 2, "Infinity", 1e308, 1e308, 1e308]),
        ([1.5, "NaN"], [2, 2, "NaN", "NaN", 1.5, "NaN"]),
        (["9.90", "10.0", "10.00"], [3, 3, "29.90", float(Fraction("29.90") / 3), "9.90", "10.00"]),
        (["Infinity", "-Infinity"], [2, 2, "NaN", "NaN", "-Infinity", "Infinity"]),
    ],
)
def test_aggregates_are_exact_and_in_the_form_of_the_log(values: list[Any], results: list[Any]) -> None:
    assert _over(values) == results
    assert _over(values[::-1]) == _over(values), "in any order"


def test_a_long_sum_is_not_rounded() -> None:
    assert _over(["12345678901234567890123456789.01", "0.01"])[2] == "12345678901234567890123456789.02"


def test_least_and_greatest_of_text_are_by_code_points() -> None:
    aggregate = Aggregate("t", by="x", low=Min("v"), high=Max("v"))
    assert aggregate.over(({"v": value} for value in ("b", "B", "ä", None)), Shape()) == {"low": "B", "high": "ä"}


def test_which_columns_hold_numbers_is_known_below_domains() -> None:
    columns = (
        Column("id", "bigint"),
        Column("price", "numeric(10,2)"),
        Column("cost", "public.money_", base="numeric"),
        Column("name", "text"),
        Column("prices", "numeric[]"),
    )
    shape = Shape.of(TableSchema("t", 1, columns, ("id",)))
    assert shape == Shape(("id",), frozenset({"id", "price", "cost"}), ("id", "price", "cost", "name", "prices"))


@pytest.mark.parametrize(
    ("declare", "said"),
    [
        (lambda: Document("t", other="public.others"), "is no join"),
        (lambda: One("t", on="x", stars=Avg("stars")), "is no join"),
        (lambda: Many("t", by="x", filter={"a": 1}), "is no join"),
        (lambda: Many("t", by="x", limit=0), "limit=0"),
        (lambda: Many("t", by="x", where={"a": {"b": 1}}), "where 'a'"),
        (lambda: Aggregate("t", by="x", stars="avg"), "stars='avg'"),
    ],
)
def test_what_is_no_join_is_refused(declare: Any, said: str) -> None:
    with pytest.raises(Misconfigured, match=said) as error:
        declare()
    assert error.value.code == "document-join"


def test_a_join_cannot_hide_what_every_row_has() -> None:
    with pytest.raises(Misconfigured, match="'items'"):
        Document("public.orders", items=Many("public.order_items", by="order_id"))
    with pytest.raises(Misconfigured, match="'keys'"):
        Many("public.orders", by="customer_id", keys=One("public.keys", on="key_id"))


@pytest.mark.parametrize("kind", ["json", "jsonb"])
@pytest.mark.parametrize("function", [Sum, Avg])
def test_json_is_not_added_since_a_number_there_may_be_text(function: type[Sum | Avg], kind: str) -> None:
    newest = {
        "public.a": TableSchema("public.a", 1, (Column("id", "bigint"),), ("id",)),
        "public.b": TableSchema(
            "public.b", 1, (Column("id", "bigint"), Column("a", "bigint"), Column("n", kind)), ("id",)
        ),
    }
    check(Document("public.a", b=Aggregate("public.b", by="a", n=Count("n"))), newest)
    with pytest.raises(Misconfigured, match=f"b.n is {kind}, whose values are not added") as error:
        check(Document("public.a", b=Aggregate("public.b", by="a", n=function("n"))), newest)
    assert error.value.code == "document-column"


def test_of_a_column_of_which_a_feed_has_shown_only_nulls_nothing_is_said() -> None:
    newest = {"public.b": TableSchema("public.b", 1, (Column("id", "bigint"), Column("at", "unknown")), ("id",))}
    check(Document("public.a", b=Many("public.b", by="id", where={"at": 1}, order=["at"])), newest)
    check_window(Window("public.b", on="at", seconds=60, n=Count("at")), newest)


def _join(refers: Column, referred: Column, *, one: bool = False) -> None:
    """Hold a document of one join against tables whose columns are these."""
    join = One("public.b", on="b") if one else Many("public.b", by="b")
    ours, theirs = ("public.a", "public.b") if one else ("public.b", "public.a")
    columns = (Column("id", "bigint"), replace(refers, name="b"))
    newest = {
        ours: TableSchema(ours, 1, columns, ("id",)),
        theirs: TableSchema(theirs, 1, (replace(referred, name="key"),), ("key",)),
    }
    document = Document("public.a", b=join)
    check(document, newest)
    check_types(document, newest)


def _column(kind: str, base: str = "") -> Column:
    return Column("", kind, base=base)


WRITTEN_OTHERWISE = [
    (_column("integer"), _column("numeric(10,0)")),
    (_column("text"), _column("bigint")),
    (_column("integer"), _column("uuid")),
    (_column("double precision"), _column("integer")),
    (_column("boolean"), _column("smallint")),
    (_column("numeric(10,2)"), _column("numeric(10,0)")),
    (_column("numeric"), _column("numeric")),
    (_column("numeric(10,0)"), _column("numeric")),
    (_column("character(3)"), _column("character(4)")),
    (_column("character(3)"), _column("character varying(3)")),
    (_column("bpchar"), _column("bpchar")),
    (_column("public.citext"), _column("public.citext")),
    (_column("public.price", base="numeric"), _column("public.cost", base="numeric")),
    (_column("date"), _column("timestamp without time zone")),
    (_column("timestamp without time zone"), _column("timestamp with time zone")),
    (_column("inet"), _column("cidr")),
    (_column("real"), _column("double precision")),
    *((_column(kind), _column(kind)) for kind in ("interval", "jsonb", "integer[]", "numrange")),
]


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("columns", WRITTEN_OTHERWISE)
def test_a_join_of_columns_whose_equal_values_are_written_otherwise_is_refused(
    columns: tuple[Column, Column], one: bool
) -> None:
    for refers, referred in (columns, columns[::-1]):
        with pytest.raises(Misconfigured, match="not joined") as error:
            _join(refers, referred, one=one)
        assert error.value.code == "document-column"


@pytest.mark.parametrize(
    "columns",
    [
        (_column("integer"), _column("bigint")),
        (_column("public.id", base="integer"), _column("smallint")),
        (_column("character varying(20)"), _column("text")),
        (_column("character varying"), _column("uuid")),
        (_column("public.state"), _column("public.state")),
        (_column("character(3)"), _column("character(3)")),
        (_column("numeric(10,0)"), _column("numeric(20,0)")),
        (_column("numeric(10,2)"), _column("numeric(12,2)")),
        (_column("public.price", base="numeric"), _column("public.price", base="numeric")),
        (_column("real"), _column("real")),
        (_column("timestamp(3) with time zone"), _column("timestamp with time zone")),
    ],
)
def test_a_join_of_columns_whose_values_are_written_alike_is_admitted(columns: tuple[Column, Column]) -> None:
    for refers, referred in (columns, columns[::-1]):
        _join(refers, referred)
        _join(refers, referred, one=True)
