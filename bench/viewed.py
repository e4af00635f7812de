"""The views that `make bench-views` builds: `headrace run --consumer bench/viewed.py:OrderSearch`.

Documents, mapping, settings and template are those of the loaders too (`loaders.py`), so that both do the same work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import jinja2

from headrace.change import Row
from headrace.documents import Document, DocumentConsumer, Many, Node
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace.stores.redis import RedisPages

_KEYWORD, _TEXT = {"type": "keyword"}, {"type": "text"}
ORDER_MAPPINGS: Final[dict[str, Any]] = {
    "properties": {
        "customer": {"type": "integer"},
        "quantity": {"type": "integer"},
        "status": _KEYWORD,
        "amount": {"type": "double"},
        "placed": {"type": "date"},
        "title": _TEXT,
        "note": _TEXT,
    }
}
PRODUCT_MAPPINGS: Final[dict[str, Any]] = {
    "properties": {
        "id": {"type": "long"},
        "name": _TEXT,
        "description": _TEXT,
        "price": {"type": "double"},
        "reviews": {"properties": {"stars": {"type": "integer"}, "body": _TEXT}},
    }
}
INDEX_SETTINGS: Final = {"number_of_shards": 1, "number_of_replicas": 0}

TEMPLATE: Final = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Order {{ order.id }}: {{ order.title }}</title></head>
<body><header><a href="/">Orders</a> / <a href="/customers/{{ order.customer_id }}">customer {{ order.customer_id }}</a></header>
<main><h1>{{ order.title }}</h1>
<p class="status {{ order.status }}">{% if order.status == "shipped" %}On its way{% else %}In work: {{ order.status }}{% endif %}</p>
<dl>{% for name in ("quantity", "amount", "placed") %}<dt>{{ name }}</dt><dd>{{ order[name] }}</dd>{% endfor %}</dl>
<blockquote>{{ order.note }}</blockquote></main></body></html>
"""
)


def order_document(row: Mapping[str, Any]) -> Row:
    """Return the document of an order."""
    return {
        "customer": row["customer_id"],
        "quantity": row["quantity"],
        "status": row["status"],
        "amount": row["amount"],
        "placed": row["placed"],
        "title": row["title"],
        "note": row["note"],
    }


def order_page(row: Mapping[str, Any]) -> Row:
    """Return the page of an order."""
    return {"html": TEMPLATE.render(order=row), "quantity": str(row["quantity"])}


def product_document(row: Mapping[str, Any], reviews: Iterable[Mapping[str, Any]]) -> Row:
    """Return the document of a product with its reviews."""
    rows = [{"stars": review["stars"], "body": review["body"]} for review in reviews]
    return {name: row[name] for name in ("id", "name", "description", "price")} | {"reviews": rows}


class OrderSearch(DocumentConsumer):
    """A document for each order."""

    document = Document("public.orders")
    store = ElasticsearchIndex(mappings=ORDER_MAPPINGS, settings=INDEX_SETTINGS)

    def render(self, row: Node) -> Row:
        """Return the document of an order."""
        return order_document(row)


class OrderPages(DocumentConsumer):
    """A page for each order."""

    document = Document("public.orders")
    store = RedisPages()

    def render(self, row: Node) -> Row:
        """Return the page of an order."""
        return order_page(row)


class ProductSearch(DocumentConsumer):
    """A document for each product with its reviews."""

    document = Document("public.products", reviews=Many("public.reviews", by="product_id"))
    store = ElasticsearchIndex(mappings=PRODUCT_MAPPINGS, settings=INDEX_SETTINGS)

    def render(self, row: Node) -> Row:
        """Return the document of a product, as pgsync makes it."""
        return product_document(row, row.reviews)
