"""Joins the streams of orders, of their lines and of customers into one: a record for each order, for whoever reads Kafka."""

from headrace.documents import Document, DocumentConsumer, Many, Node, One
from headrace.stores.kafka import KafkaTopic


class OrderDetails(DocumentConsumer):
    """An order with its customer's name and its lines."""

    document = Document(
        "public.orders",
        customer=One("public.customers", on="customer_id"),
        lines=Many("public.order_items", by="order_id"),
    )
    store = KafkaTopic("order_details")

    def render(self, row: Node) -> dict[str, object]:
        """Return the record of an order."""
        return {
            "status": row["status"],
            "customer": row.customer and row.customer["name"],
            "lines": [dict(line) for line in row.lines],
        }
