"""The shop's web application: reads come from the views, every write is one call of the seam `Writes`.

The one ASGI module: its endpoints are plain functions that Starlette runs in threads; only reading a form is
asynchronous.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal, InvalidOperation
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import jinja2
import psycopg
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from headrace.change import format_lsn
from headrace.errors import HeadraceError
from headrace_shop.database import Connection
from headrace_shop.edits import AddReview, Edit, PlaceOrder, SetPrice
from headrace_shop.views import Views, parse_token
from headrace_shop.writes import Writes

Form = Mapping[str, Any]

_CATEGORIES = """
    SELECT c.id, c.name, count(p.id) AS products FROM categories c LEFT JOIN products p ON p.category_id = c.id
    GROUP BY c.id ORDER BY c.name"""
_TALKED_ABOUT = """
    SELECT p.id, p.name, p.director, p.year, p.price FROM products p
    JOIN (SELECT product_id, count(*) AS n FROM reviews GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 12) r ON r.product_id = p.id
    ORDER BY r.n DESC, p.id"""
_ORDER = """
    SELECT p.id, p.name, i.quantity, i.price FROM order_items i JOIN products p ON p.id = i.product_id
    WHERE i.order_id = %s ORDER BY i.line"""
_LARGEST = 2**31 - 1
_DEAREST = Decimal("99999999.99")
_LONGEST = 10_000


class BadFormError(Exception):
    """What somebody typed cannot be taken; the text says why."""


class Shop:
    """The endpoints."""

    def __init__(self, views: Views, writes: Writes, database: ConnectionPool[Connection]) -> None:
        """Serve from these; the caller closes them. `database` is read for the home page and for orders."""
        self._views, self._writes, self._database = views, writes, database
        loader = jinja2.PackageLoader("headrace_shop", "templates")
        self._templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)

    def application(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/", self.home),
                Route("/health", lambda _: PlainTextResponse("ok\n")),
                Route("/search", self.search),
                Route("/sales", self.sales),
                Route("/products/{id:int}", self.product),
                Route("/categories/{id:int}", self.category),
                Route("/orders/{id:int}", self.order),
                Route("/products/{id:int}/price", posted(self.set_price), methods=["POST"]),
                Route("/products/{id:int}/reviews", posted(self.add_review), methods=["POST"]),
                Route("/orders", posted(self.place_order), methods=["POST"]),
                Mount("/static", StaticFiles(directory=str(files("headrace_shop").joinpath("static")))),
            ],
            exception_handlers={
                404: lambda *_: self._absent(),
                HeadraceError: lambda _, error: self._failed(error),
                psycopg.errors.ForeignKeyViolation: lambda *_: self._absent(),
                psycopg.errors.NumericValueOutOfRange: lambda *_: self._absent(),
                psycopg.Error: lambda _, error: self._message(503, "Not now", f"The database says: {error}"),
                BadFormError: lambda _, error: self._message(400, "Please look again", str(error)),
            },
        )

    def home(self, _request: Request) -> Response:
        """Show the genres and what people write about."""
        categories, films = self._select(_CATEGORIES), self._select(_TALKED_ABOUT)
        return self._page(
            "home", categories=categories, films=films, products=sum(row["products"] for row in categories)
        )

    def search(self, request: Request) -> Response:
        """Show what the search index finds."""
        query = request.query_params.get("q", "").strip()[:200]
        return self._page("search", query=query, hits=self._views.search(query) if query else [])

    def sales(self, _request: Request) -> Response:
        """Show the sales as the warehouse counts them."""
        sales = self._views.sales()
        return self._page("sales", totals=sales.totals, genres=sales.genres, films=sales.films)

    def product(self, request: Request) -> Response:
        """Show a product's page as it stands in Redis."""
        return self._cached(request, "products")

    def category(self, request: Request) -> Response:
        """Show a category's page as it stands in Redis."""
        return self._cached(request, "categories")

    def order(self, request: Request) -> Response:
        """Show an order that was placed."""
        lines = self._select(_ORDER, request.path_params["id"])
        if not lines:
            return self._absent()
        return self._page(
            "order",
            id=request.path_params["id"],
            lines=lines,
            total=sum(row["quantity"] * row["price"] for row in lines),
        )

    def set_price(self, request: Request, form: Form) -> Response:
        """Change a price, then show the product."""
        product = request.path_params["id"]
        return self._write(SetPrice(product, _price(form)), f"/products/{product}")

    def add_review(self, request: Request, form: Form) -> Response:
        """Write a review, then show the product."""
        product = request.path_params["id"]
        review = AddReview(product, _text(form, "author"), _whole(form, "stars", 1, 5), _text(form, "body"))
        return self._write(review, f"/products/{product}")

    def place_order(self, _request: Request, form: Form) -> Response:
        """Order one product, then show the order."""
        product = _whole(form, "product_id", 1, _LARGEST)
        quantity = _whole(form, "quantity", 1, 99) if form.get("quantity") else 1
        customer = self._select("SELECT min(id) AS id FROM customers")[0]["id"]
        return self._write(PlaceOrder(customer, [(product, quantity)]), "/orders/{order}")

    def _write(self, edit: Edit, target: str) -> Response:
        """Write, and send the reader on with a token, so that the next page shows the change (S25)."""
        written = self._writes.write(edit)
        place = target.format(order=written.made.ids[0] if written.made.ids else 0)
        token = self._views.token(written.lsn) if written.lsn else ""
        return RedirectResponse(f"{place}?after={token}" if token else place, status_code=303)

    def _cached(self, request: Request, collection: str) -> Response:
        after = parse_token(request.query_params.get("after", ""))
        page = self._views.page(f"{collection}/{request.path_params['id']}", after)
        if page is None:
            return self._absent()
        headers = {"Cache-Control": "no-cache", "X-Headrace-LSN": format_lsn(page.lsn)}
        headers |= {"ETag": page.etag} if page.etag else {}
        if page.etag and page.etag in _tags(request):
            return Response(status_code=304, headers=headers)
        return HTMLResponse(page.html, headers=headers)

    def _select(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        with self._database.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(statement.encode(), values).fetchall()

    def _page(self, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template(f"{name}.html").render(values), status_code=status)

    def _absent(self) -> HTMLResponse:
        return self._message(404, "Not here", "There is no such page, or not any more.", "/", "All genres")

    def _failed(self, error: Exception) -> HTMLResponse:
        code = getattr(error, "code", "")
        if code == "no-such-row":
            return self._absent()
        if code == "view-not-there":
            return self._message(503, "Not built yet", "This view is being built. Come back in a moment.")
        return self._message(503, "Not now", str(error))

    def _message(self, status: int, title: str, text: str, link: str = "", label: str = "") -> HTMLResponse:
        return self._page("message", status, title=title, text=text, link=link, label=label)


def posted(endpoint: Callable[[Request, Form], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that reads the form and runs `endpoint` in a thread; a form of another site is refused."""

    async def read(request: Request) -> Response:
        origin = request.headers.get("origin")
        if origin and urlsplit(origin).netloc != request.headers.get("host"):
            return PlainTextResponse("This form belongs to another site.\n", status_code=403)
        async with request.form(max_files=0) as form:
            return await run_in_threadpool(endpoint, request, dict(form))

    return read


def _tags(request: Request) -> set[str]:
    """Return the ETags of pages that the reader has already."""
    return {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}


def _price(form: Form) -> Decimal:
    try:
        price = Decimal(str(form.get("price", "")).strip().replace(",", ".")).quantize(Decimal("0.01"))
    except InvalidOperation as error:
        raise BadFormError("A price is a number such as 9.90.") from error
    if not price.is_finite() or not 0 <= price <= _DEAREST:
        raise BadFormError(f"A price is between 0 and {_DEAREST}.")
    return price


def _whole(form: Form, name: str, least: int, most: int) -> int:
    text = str(form.get(name, ""))
    if not text.isdecimal() or len(text) > len(str(_LARGEST)) or not least <= int(text) <= most:
        raise BadFormError(f"{name.capitalize()} is a whole number from {least} to {most}.")
    return int(text)


def _text(form: Form, name: str) -> str:
    text = str(form.get(name, "")).strip().replace("\x00", "")
    if not 0 < len(text) <= _LONGEST:
        raise BadFormError(f"{name.capitalize()} is a text of 1 to {_LONGEST} characters.")
    return text
