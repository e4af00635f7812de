"""The shop's two plugins: what they render."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.change import Row
from headrace.documents import Node
from headrace.errors import Misconfigured
from headrace.settings import Settings
from headrace_pages import Pages
from headrace_search import ProductSearch

TEMPLATES = Path(__file__).parents[2] / "templates"
SETTINGS = replace(Settings(), templates=str(TEMPLATES))
FILM: Row = {
    "id": 7,
    "category_id": 2,
    "name": "The <b>Mill</b>",
    "description": "Water & wheels",
    "director": None,
    "year": 1999,
    "rating": "7.5",
    "price": "9.90",
    "stock": 3,
    "seq": 1,
}


def _film(reviews: int = 2, category: bool = True) -> Node:
    said = [
        {
            "id": n,
            "product_id": 7,
            "author": "Ada",
            "stars": 4 + n,
            "body": "<script>",
            "created_at": "2026-01-01T00:00:00+00:00",
        }
        for n in range(reviews)
    ]
    joined = {
        "category": Node("public.categories", {"id": 2, "name": "Drama"}) if category else None,
        "reviews": [Node("public.reviews", row) for row in said],
    }
    return Node("public.products", FILM, joined)  # type: ignore[arg-type]


@pytest.fixture
def pages() -> Pages:
    return Pages(SETTINGS, "pages")


def test_a_product_is_found_with_its_category_and_its_stars() -> None:
    search = ProductSearch(SETTINGS, "search")
    document = search.render(_film())
    assert (document["category"], document["reviews"], document["stars"]) == ("Drama", 2, 4.5)
    bare = search.render(_film(reviews=0, category=False))
    assert (bare["category"], bare["reviews"], bare["stars"]) == (None, 0, None)


def test_a_product_page_is_escaped_and_offers_its_forms(pages: Pages) -> None:
    html = pages.render(_film())["html"]
    assert "The &lt;b&gt;Mill&lt;/b&gt;" in html
    assert "<script>" not in html
    for form in (
        'action="/orders"',
        'action="/products/7/price"',
        'action="/products/7/reviews"',
        'href="/categories/2"',
    ):
        assert form in html


def test_a_page_is_a_function_of_its_rows_and_so_is_its_etag(pages: Pages) -> None:
    assert pages.render(_film()) == pages.render(_film())
    assert pages.render(_film())["etag"] != pages.render(_film(reviews=1))["etag"]


def test_a_page_of_a_product_without_category_or_reviews(pages: Pages) -> None:
    assert "Nobody has written" in pages.render(_film(reviews=0, category=False))["html"]


def test_a_category_page_shows_its_best_products(pages: Pages) -> None:
    products = [FILM | {"id": n, "name": f"Film {n}", "rating": None if n % 2 else f"{n / 10:.1f}"} for n in range(100)]
    joined = {"products": [Node("public.products", product) for product in products]}
    html = pages.render(Node("public.categories", {"id": 2, "name": "Drama"}, joined))["html"]  # type: ignore[arg-type]
    assert "100 films, the 60 best rated" in html
    assert 'href="/products/98"' in html
    assert 'href="/products/99"' not in html


def test_ids_are_addresses(pages: Pages) -> None:
    assert (pages.id("public.products", {"id": 7}), pages.id("public.categories", {"id": 2})) == (
        "products/7",
        "categories/2",
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{% if %}", "product.html:3"),
        ("{{ product.nonsense }}", "product.html:3"),
        ("{{ nonsense }}", "product.html:3"),
    ],
)
def test_a_template_with_an_error_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    folder = tmp_path / "templates"
    shutil.copytree(TEMPLATES, folder)
    (folder / "product.html").write_text(f"one\ntwo\n{line}\n")
    with pytest.raises(Misconfigured) as error:
        Pages(replace(SETTINGS, templates=str(folder)), "pages").render(_film())
    assert error.value.code == "template-error"
    assert said in error.value.message


def test_templates_that_are_saved_meanwhile_change_no_page(tmp_path: Path) -> None:
    """A template extends and imports others, which nothing has rendered yet."""
    folder = shutil.copytree(TEMPLATES, tmp_path / "templates")
    before, after = (Pages(replace(SETTINGS, templates=str(folder)), "pages") for _ in range(2))
    wanted = before.render(_film())
    for name in ("base.html", "product.html", "stars.html"):
        (folder / name).write_text("other")
    assert before.render(_film()) == after.render(_film()) == wanted


def test_a_template_is_found_by_each_name_that_jinja_takes(tmp_path: Path) -> None:
    folder = shutil.copytree(TEMPLATES, tmp_path / "templates")
    (folder / "parts").mkdir()
    (folder / "parts" / "end.html").write_text("the end")
    (folder / "product.html").write_text("{% include './parts/end.html' %}, {% include '/parts/end.html' %}")
    pages = Pages(replace(SETTINGS, templates=str(folder)), "pages")
    assert pages.render(_film())["html"] == "the end, the end"


def test_a_missing_folder_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="HEADRACE_TEMPLATES"):
        Pages(replace(SETTINGS, templates=str(tmp_path / "none")), "pages")


def test_templates_are_part_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder is a link; what an editor leaves beside them is not, nor a hidden folder, as that of a mounted ConfigMap."""
    folder, parts = shutil.copytree(TEMPLATES, tmp_path / "templates"), tmp_path / "parts"
    for name in (".product.html.swp", "product.html~", "#product.html#"):
        (folder / name).touch()
    parts.mkdir()
    (parts / "one.html").touch()
    (folder / "parts").symlink_to(parts)
    (folder / "..2026").mkdir()
    (folder / "..2026" / "hidden.html").touch()
    monkeypatch.setenv("HEADRACE_TEMPLATES", str(folder))
    assert {path.name for path in Pages.fingerprint_files()} == {
        "base.html",
        "category.html",
        "one.html",
        "product.html",
        "stars.html",
    }
