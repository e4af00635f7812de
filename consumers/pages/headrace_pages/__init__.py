"""The shop's product and category pages, rendered into Redis.

`HEADRACE_TEMPLATES` names the folder of the templates. They are part of the consumer's fingerprint: a changed template is other
code, whose pages are built beside the live ones by a rebuild.
"""

from __future__ import annotations

import hashlib
import os
import traceback
from pathlib import Path
from typing import Any

import jinja2

from headrace import settings as all_settings
from headrace.change import Row
from headrace.documents import Document, DocumentConsumer, Many, Node, One, mean
from headrace.errors import Misconfigured
from headrace.settings import Settings
from headrace.stores.redis import RedisPages

_SHOWN = 60


class Pages(DocumentConsumer):
    """A page for each product, ``products/<id>``, and for each category, ``categories/<id>``: its HTML and ETag."""

    documents = (
        Document(
            "public.products",
            category=One("public.categories", on="category_id"),
            reviews=Many("public.reviews", by="product_id"),
        ),
        Document("public.categories", products=Many("public.products", by="category_id")),
    )
    store = RedisPages()

    def __init__(self, settings: Settings, name: str) -> None:
        """Read the templates. Raises Misconfigured: `template-error`, `template-missing`."""
        super().__init__(settings, name)
        self._folder = Path(settings.templates)
        # All of them now: what Jinja read as it renders could be newer than what the runner has found unchanged.
        self._texts = {path.relative_to(self._folder): path.read_bytes() for path in _files(self._folder)}
        self._environment = jinja2.Environment(
            loader=jinja2.FunctionLoader(self._text), autoescape=True, undefined=jinja2.StrictUndefined
        )
        self._templates = {table: self._read(f"{one}.html") for table, one in _PAGE_OF.items()}

    @staticmethod
    def fingerprint_files() -> list[Path]:
        """Return the templates, without what an editor leaves beside them."""
        return _files(Path(all_settings.load().templates))

    def id(self, table: str, key: Row) -> str:
        """Return the page's address in the shop."""
        return f"{table.removeprefix('public.')}/{key['id']}"

    def render(self, row: Node) -> Row:
        """Return HTML and ETag of a product's or a category's page."""
        values = _product(row) if row.table == "public.products" else _category(row)
        try:
            html = self._templates[row.table].render(values)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise self._broken(error) from error
        return {"html": html, "etag": f'"{hashlib.sha256(html.encode()).hexdigest()[:20]}"'}

    def _text(self, name: str) -> tuple[str, str, None] | None:
        path = Path(name.lstrip("/"))
        return (self._texts[path].decode(), str(self._folder / path), None) if path in self._texts else None

    def _read(self, name: str) -> jinja2.Template:
        try:
            return self._environment.get_template(name)
        except jinja2.TemplateNotFound as error:
            raise Misconfigured(
                "template-missing", f"There is no template {self._folder / str(error)}.", "Change HEADRACE_TEMPLATES."
            ) from error
        except jinja2.TemplateError as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> Misconfigured:
        """Name the file and line of a template's error: Jinja puts them into the traceback."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(".html")]
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(self._folder)
        if isinstance(error, jinja2.TemplateSyntaxError):
            place = f"{error.filename}:{error.lineno}"
        return Misconfigured(
            "template-error",
            f"{place}: {error}.",
            f"Mend the template, start its process again, then: headrace rebuild {self.name}",
        )


_PAGE_OF = {"public.products": "product", "public.categories": "category"}


def _files(folder: Path) -> list[Path]:
    """Return its files, also below folders that are links; not those of hidden folders, which a mounted ConfigMap makes anew."""
    found: list[Path] = []
    for at, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(at, name) for name in names if name[0] not in ".#" and name[-1] != "~"]
    return [path for path in found if path.is_file()]


def _product(row: Node) -> dict[str, Any]:
    return {"product": row, "reviews": row.reviews, "average": mean(row.reviews, "stars")}


def _category(row: Node) -> dict[str, Any]:
    best = sorted(row.products, key=lambda product: (-float(product["rating"] or 0), product["name"], product["id"]))
    return {"category": row, "products": best[:_SHOWN], "total": len(best)}
