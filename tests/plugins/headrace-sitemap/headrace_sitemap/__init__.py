"""A sitemap for each category: the addresses of its products, kept in Redis as XML that the web server hands out."""

import os
from xml.sax.saxutils import escape

from headrace.documents import Document, DocumentConsumer, Many, Node
from headrace.stores.redis import RedisPages

SITE = os.environ.get("SITE", "https://shop.example")


class Sitemap(DocumentConsumer):
    """One page of XML a category; a category without products has none."""

    document = Document("public.categories", products=Many("public.products", by="category_id"))
    store = RedisPages("sitemap")

    def render(self, row: Node) -> dict[str, str] | None:
        """Return the sitemap of a category, as the field that `PageReader` gives."""
        if not row.products:
            return None
        urls = "".join(f"<url><loc>{escape(SITE)}/products/{product['id']}</loc></url>" for product in row.products)
        return {"html": f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{urls}</urlset>'}
