"""Declarations of documents and the rows that render gets."""

import pytest

from headrace.documents import Document, Many, Node, One, count, mean, total
from headrace.errors import Misconfigured

PRODUCT = Document(
    "public.products",
    category=One("public.categories", on="category_id"),
    reviews=Many("public.reviews", by="product_id"),
)


def _node() -> Node:
    reviews = [{"id": 10, "stars": 1}, {"id": 9, "stars": None}, {"id": 2, "stars": 4}]
    return PRODUCT.node({"id": 1, "name": "kettle"}, {"category": None, "reviews": reviews}, {"public.reviews": ["id"]})


def test_a_declaration_names_its_tables_the_root_first() -> None:
    assert PRODUCT.tables == ("public.products", "public.categories", "public.reviews")


def test_columns_are_items_and_joins_are_attributes() -> None:
    node = _node()
    assert (node["name"], node.table, node.category) == ("kettle", "public.products", None)
    with pytest.raises(AttributeError, match=r"has no join 'name'"):
        _ = node.name


def test_many_rows_come_in_the_order_of_their_keys() -> None:
    assert [review["id"] for review in _node().reviews] == [2, 9, 10]


def test_aggregates_leave_nulls_out() -> None:
    reviews = _node().reviews
    assert (count(reviews), count(reviews, "stars"), total(reviews, "stars"), mean(reviews, "stars")) == (3, 2, 5, 2.5)
    assert (count([]), total([], "stars"), mean([], "stars")) == (0, 0, None)


def test_a_total_of_numerics_is_exact_and_in_their_form() -> None:
    assert total([{"price": "0.10"}, {"price": "0.20"}], "price") == "0.30"


def test_a_nested_join_is_refused() -> None:
    with pytest.raises(Misconfigured, match="one level deep") as error:
        One("public.categories", on="category_id", parent=One("public.categories", on="parent_id"))
    assert error.value.code == "document-nested"


def test_a_join_cannot_hide_what_every_row_has() -> None:
    with pytest.raises(Misconfigured, match="'items'"):
        Document("public.orders", items=Many("public.order_items", by="order_id"))
