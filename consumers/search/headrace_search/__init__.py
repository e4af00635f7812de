"""The shop's search index in Elasticsearch: a product with its category, its reviews counted and their stars."""

from __future__ import annotations

from headrace.change import Row
from headrace.documents import Document, DocumentConsumer, Many, Node, One, count, mean
from headrace.stores.elasticsearch import ElasticsearchIndex

_TEXT = {"type": "text"}


class ProductSearch(DocumentConsumer):
    """Every product, to be searched by its name, category, director or description."""

    document = Document(
        "public.products",
        category=One("public.categories", on="category_id"),
        reviews=Many("public.reviews", by="product_id"),
    )
    store = ElasticsearchIndex(
        mappings={
            "properties": {
                **dict.fromkeys(("name", "category", "director", "description"), _TEXT),
                "year": {"type": "integer"},
                "price": {"type": "double"},
                "reviews": {"type": "integer"},
                "stars": {"type": "float"},
            }
        }
    )

    def render(self, row: Node) -> Row:
        """Return the document of a product."""
        return {name: row[name] for name in ("name", "description", "director", "year", "price")} | {
            "category": row.category and row.category["name"],
            "reviews": count(row.reviews),
            "stars": mean(row.reviews, "stars"),
        }
