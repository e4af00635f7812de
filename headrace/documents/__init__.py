"""Documents: one for each row of a root table, with rows of other tables in it.

A plugin declares what belongs together and renders it; this package finds the documents that a change touches.

    class ProductSearch(DocumentConsumer):
        document = Document("public.products", category=One("public.categories", on="category_id"))
        store = ElasticsearchIndex("products", mappings={...})

        def render(self, product):
            return {"name": product["name"], "category": product.category and product.category["name"]}

A `Window` is a document for each minute, hour or day of a table's rows.
"""

from headrace.documents.aggregates import Avg, Count, Max, Min, Sum, count, mean, total
from headrace.documents.consumer import DocumentConsumer
from headrace.documents.declaration import Aggregate, Document, Many, Node, One
from headrace.documents.windows import Window

__all__ = [
    "Aggregate",
    "Avg",
    "Count",
    "Document",
    "DocumentConsumer",
    "Many",
    "Max",
    "Min",
    "Node",
    "One",
    "Sum",
    "Window",
    "count",
    "mean",
    "total",
]
