"""The shop over HTTP, in each way of writing: pages are validated by their ETags, and whoever wrote sees what he wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx
import pytest
import redis

from headrace.change import parse_lsn
from headrace_ops import ports
from tests.fixtures.capture import eventually
from tests.fixtures.processes import SMALL, System

Serve = Callable[[str], AbstractContextManager[httpx.Client]]


@pytest.fixture
def shop(system: System, elasticsearch: object, redis_server: object) -> Serve:
    """Serve the shop in a way of writing; give a client of it."""

    @contextmanager
    def serve(writes: str) -> Iterator[httpx.Client]:
        port = ports.choose()
        system.start("shop", "shop", "serve", "--writes", writes, "--port", str(port))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            system.wait("the shop to answer", lambda: _answers(client))
            yield client

    system.run("shop", "load", *SMALL)
    return serve


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/products/1").is_success
    except httpx.HTTPError:
        return False


def edited(client: httpx.Client, price: str) -> httpx.Response:
    """Edit a price; return where the reader is sent."""
    return client.post("/products/1/price", data={"price": price})


def test_who_is_asked_to_stop_ends_well(shop: Serve, system: System) -> None:
    system.up("pages")
    with shop("log"):
        system.start("work", "shop", "work", "--rate", "20/s")
        system.wait("some work", lambda: bool(system.numbers()))
        assert system.ends("work") == 0
        assert "transactions committed" in system.output("work").read_text()
        assert system.ends("shop") == 0


def test_a_page_is_validated_by_its_etag_and_a_writer_sees_his_write(shop: Serve, system: System) -> None:
    system.up("pages")
    with shop("log") as client:
        before = client.get("/products/1")
        assert before.headers["cache-control"] == "no-cache"
        _validated(client, before)
        assert client.get("/products/999").status_code == 404

        sent = edited(client, "77.25")
        assert sent.status_code == 303
        place, _, token = sent.headers["location"].partition("?after=")
        assert place == "/products/1"
        epoch, _, lsn = token.partition(":")
        assert epoch == "1"

        def shown() -> httpx.Response | None:
            """The page waits two seconds for the write; a busy machine may need more."""
            page = client.get(sent.headers["location"], headers={"If-None-Match": before.headers["etag"]})
            return page if "77.25" in page.text else None

        after = eventually("the writer sees his write", shown)
        assert after.status_code == 200
        assert parse_lsn(after.headers["x-headrace-lsn"]) > parse_lsn(before.headers["x-headrace-lsn"])
        _validated(client, after)
        void = client.get(f"/products/1?after=0:{lsn}")
        assert void.status_code == 503
        assert "token-void" in void.text

        with redis.Redis.from_url(system.settings.redis) as store:
            assert store.hdel("pages:1:products/2", "etag") == 1
        bare = client.get("/products/2", headers={"If-None-Match": '"of another page"'})
        assert (bare.status_code, bare.headers.get("etag")) == (200, None), "a page without an ETag is nobody's"
        assert client.get("/products/2", headers={"If-None-Match": ""}).status_code == 200


def test_the_dual_writer_serves_the_same_pages_from_stores_of_its_own(shop: Serve, system: System) -> None:
    with shop("dual") as client:
        before = client.get("/products/1")
        _validated(client, before)
        sent = edited(client, "77.25")
        assert (sent.status_code, sent.headers["location"]) == (303, "/products/1"), "there is nothing to wait for"
        after = client.get("/products/1", headers={"If-None-Match": before.headers["etag"]})
        assert after.status_code == 200
        assert "77.25" in after.text
        _validated(client, after)
        assert "77.25" in client.get("/search?q=Skyfall").text
        orders = _orders(client)
        assert client.post("/orders", data={"product_id": "1"}).status_code == 303
        assert _orders(client) == orders + 1
        assert client.get("/").is_success


def _validated(client: httpx.Client, page: httpx.Response) -> None:
    """Ask again with the page's own ETag, alone and among others, and with others only."""
    etag = page.headers["etag"]
    for header in (etag, f'"other", W/{etag}'):
        again = client.get(page.request.url, headers={"If-None-Match": header})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert again.headers["x-headrace-lsn"] == page.headers["x-headrace-lsn"]
    assert client.get(page.request.url, headers={"If-None-Match": '"other"'}).text == page.text


def _orders(client: httpx.Client) -> int:
    found = re.search(r"<strong>(\d+)</strong>", client.get("/sales").text)
    assert found
    return int(found[1])
