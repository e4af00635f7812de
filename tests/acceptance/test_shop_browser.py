"""The shop, looked at in headless Chromium: capture, the consumers and the shop run as their own processes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import psycopg
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from headrace.settings import Settings, environment
from headrace_ops import ports
from headrace_shop.processes import Programs

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 20_000.0
"""How long a browser waits for something to appear, ms."""


@pytest.fixture
def shop(settings: Settings, elasticsearch: object, redis_server: object, tmp_path: Path) -> Iterator[str]:
    port = ports.choose()
    programs = Programs(tmp_path, environment(replace(settings, heartbeat_ms=0)))
    try:
        programs.run("shop", "load", "--products", "120", "--reviews", "300", "--customers", "10", "--orders", "40")
        programs.run("setup", "--apply")
        programs.start("capture", "capture")
        programs.start("run", "run", "search", "pages", "warehouse")
        programs.start("shop", "shop", "serve", "--port", str(port))
        address = f"http://127.0.0.1:{port}"
        programs.wait("the shop", lambda: _answers(address))
        yield address
    finally:
        programs.stop_all()


@pytest.fixture
def browser(shop: str) -> Iterator[Page]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_playwright() as playwright:
        process = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = process.new_page(base_url=shop)
        page.set_default_timeout(SECONDS)
        expect.set_options(timeout=SECONDS)
        yield page
        process.close()


def _answers(address: str) -> bool:
    try:
        paths = ("/", "/products/1", "/categories/1", "/search?q=Skyfall", "/sales")
        return all(httpx.get(address + path, timeout=10).is_success for path in paths)
    except httpx.HTTPError:
        return False


def reload_until(browser: Page, place: Locator, text: str) -> None:
    """Reload until the first of `place` shows `text`. The shop waits two seconds for its views; a busy machine may need more."""
    for _ in range(100):
        if text in place.first.inner_text():
            break
        browser.reload()
    expect(place.first).to_contain_text(text)


def test_a_price_edited_in_the_form_is_followed_by_page_search_and_category(browser: Page, settings: Settings) -> None:
    browser.goto("/products/1")
    expect(browser.get_by_role("heading", name="Skyfall")).to_be_visible()
    browser.fill("input[name=price]", "77.25")
    browser.locator("form[action$='/price'] button").click()
    expect(browser).to_have_url(re.compile(r"/products/1\?after="))
    reload_until(browser, browser.locator("main"), "77.25")

    browser.fill("input[name=q]", "Skyfall")
    browser.press("input[name=q]", "Enter")
    hit = browser.locator("li", has=browser.locator("a[href='/products/1']"))
    reload_until(browser, hit, "77.25")
    with psycopg.connect(settings.dsn) as connection:
        assert connection.execute("SELECT price::text FROM products WHERE id = 1").fetchone() == ("77.25",)


def test_a_review_with_markup_in_it_is_shown_as_it_was_written(browser: Page) -> None:
    browser.goto("/products/2")
    browser.fill("input[name=author]", "Ada <i>")
    browser.fill("textarea[name=body]", "<script>document.title = 'taken'</script> & fine")
    browser.locator("[name=stars]").first.evaluate("element => element.value ||= '5'")
    browser.locator("form[action$='/reviews'] button").click()
    reload_until(browser, browser.locator("main"), "<script>document.title = 'taken'</script> & fine")
    assert browser.title() != "taken"


def test_an_order_placed_in_the_form_is_counted_in_the_sales(browser: Page) -> None:
    browser.goto("/sales")
    orders = int(browser.locator(".figures strong").first.inner_text())
    browser.goto("/products/3")
    browser.locator("form[action='/orders'] button").click()
    expect(browser.get_by_role("heading", name="Thank you for your order")).to_be_visible()
    browser.goto("/sales")
    reload_until(browser, browser.locator(".figures strong"), str(orders + 1))
    expect(browser.locator(".figures strong").first).to_have_text(str(orders + 1))
