"""The Elasticsearch store against a real Elasticsearch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from elasticsearch import ConflictError
from elasticsearch import Elasticsearch as Client

from headrace.change import NOWHERE, Position, Source, Version
from headrace.consumer import Generation, ViewRow
from headrace.errors import Misconfigured, Poison, Transient
from headrace.settings import Settings
from headrace.stores import Doc
from headrace.stores.elasticsearch import ElasticsearchIndex, SearchReader
from headrace.stores.elasticsearch import index as module
from headrace.stores.elasticsearch.paging import MORE
from headrace_ops import Stack
from headrace_ops.elasticsearch import Elasticsearch

MAPPINGS = {"properties": {"name": {"type": "text"}, "stars": {"type": "float"}}}
G1, G2 = Generation("search", 1, "abc"), Generation("search", 2, "abc")
Open = Callable[..., ElasticsearchIndex]


def at(lsn: int) -> Position:
    return Position({"t": [lsn]}, {"t": "T"}, Version(1, lsn), Source("7512", 1, "shop", "s", "p"), 1)


def doc(id_: str, lsn: int, name: str | None = "kettle") -> Doc:
    return Doc(id_, {"name": name} if name else None, Version(1, lsn))


@pytest.fixture
def settings(stack: Stack, elasticsearch: Elasticsearch, tmp_path: Path) -> Settings:
    return replace(Settings(), elasticsearch=elasticsearch.address(), state=str(tmp_path))


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings.elasticsearch) as found:
        yield found


@pytest.fixture
def open_store(settings: Settings) -> Iterator[Open]:
    made: list[ElasticsearchIndex] = []

    def make(generation: Generation = G1) -> ElasticsearchIndex:
        store = ElasticsearchIndex("products", mappings=MAPPINGS)
        store.bind(settings, "search")
        store.open(generation)
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()


def test_the_position_is_there_after_a_restart(open_store: Open) -> None:
    store = open_store()
    assert store.open(G1) is None
    store.write([doc("1", 5)], at(5))
    assert open_store().open(G1) == at(5)
    assert store.generations() == [G1]


def test_an_older_version_never_replaces_a_newer_one_and_a_tie_may(open_store: Open) -> None:
    store = open_store()
    store.write([doc("1", 10, "new")], at(10))
    store.write([doc("1", 9, "old")], at(11))
    assert store.scan(None, 10) == [("", "1", {"name": "new"}, Version(1, 10))]
    store.write([doc("1", 10, "same")], at(12))
    assert store.scan(None, 10)[0].value == {"name": "same"}


def test_a_new_epoch_is_newer_though_its_lsns_are_lower(open_store: Open) -> None:
    """S2: what the source has lost has LSNs above those of the new truth."""
    store = open_store()
    for number, (name, version) in enumerate(
        (("lost", Version(1, 900)), ("true", Version(2, 5)), ("late", Version(1, 901)))
    ):
        store.write([Doc("1", {"name": name}, version)], at(number))
    assert store.scan(None, 10) == [("", "1", {"name": "true"}, Version(2, 5))]


def test_a_zombie_cannot_bring_a_deleted_document_back(open_store: Open, client: Client) -> None:
    """S21: index v100, delete v110, and long after that index v100: so long that a real delete is forgotten."""
    store = open_store()
    store.write([doc("1", 100)], at(100))
    client.indices.put_settings(index="products-g1", settings={"index.gc_deletes": "0s"})
    store.write([doc("1", 110, None)], at(110))
    raw = partial(client.index, index="products-g1", id="raw", version_type="external_gte", document={})
    raw(version=100)
    client.delete(index="products-g1", id="raw", version=110, version_type="external_gte")

    def forgotten() -> bool:
        with suppress(ConflictError):
            return bool(raw(version=100))
        return False

    wait_for(forgotten)
    store.write([doc("1", 100)], at(111))
    found = client.get(index="products-g1", id="1")
    assert (found["_source"]["headrace"]["kind"], found["_version"]) == ("deleted", Version(1, 110).packed())
    assert [row.key for row in store.scan(None, 10)] == ["raw"]


def test_deletes_are_removed_after_a_day(open_store: Open, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store()
    store.write([doc("1", 100, None)], at(100))
    assert hidden_deletes(client) == 1
    monkeypatch.setattr(module, "_DELETED_SECONDS", -10)
    reopened = open_store()
    reopened.write([], at(101))
    assert hidden_deletes(client) == 0


def test_more_deletes_than_are_removed_at_once_go_with_the_next_writes(
    open_store: Open, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.write([doc(str(number), 100, None) for number in range(5)], at(100))
    assert hidden_deletes(client) == 5
    monkeypatch.setattr(module, "_DELETED_SECONDS", -10)
    monkeypatch.setattr(module, "BULK_DOCS", 2)
    reopened = open_store()
    for version in (101, 102, 103):
        reopened.write([], at(version))
    assert hidden_deletes(client) == 0


def hidden_deletes(client: Client) -> int:
    """Return how many deletes the index holds."""
    client.indices.refresh(index="products-g1")
    return int(client.count(index="products-g1", query={"term": {"headrace.kind": "deleted"}})["count"])


def test_scan_gives_bodies_as_rendered_by_id_page_by_page(open_store: Open, client: Client) -> None:
    store = open_store()
    ids = sorted(["10", "9", "a", "ä", "Z", "1,2", "b"])
    store.write([doc(id_, 1, id_) for id_ in ids], at(1))
    client.index(index="products-g1", id="aa", document={"name": "foreign"}, refresh=True)
    found: list[ViewRow] = []
    after = None
    while page := store.scan(after, 3):
        found += page
        after = (page[-1].collection, page[-1].key)
    assert sorted(store.get(["10", "aa", "none"])) == [row for row in found if row.key in {"10", "aa"}]
    assert [row.key for row in found] == sorted([*ids, "aa"])
    assert all(row.value == {"name": row.key} for row in found if row.key != "aa")


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_copies_of_documents_under_other_ids_are_shown_once_each_and_hide_nothing(
    open_store: Open, client: Client, limit: int
) -> None:
    """A copy repeats the id of what it was copied from, by which pages are read; one may lie over another document."""
    store = open_store()
    store.write([doc(str(number), 5) for number in range(1, 9)], at(5))
    source = client.get(index="products-g1", id="3")["_source"]
    for id_ in "9999", "0", "1", "7", "3 ":
        client.index(index="products-g1", id=id_, document=source)
    strange = {"55": "", "56": ["5", "56"], "57": ["zz", "2"]}
    for id_, said in strange.items():
        client.index(index="products-g1", id=id_, document={"headrace": {"id": said}})
    client.index(index="products-g1", id="33", document={}, refresh=True)
    seen: list[str] = []
    while len(page := store.scan(("", seen[-1]) if seen else None, limit)) >= limit and len(seen) < 100:
        seen += [row.key for row in page]
    seen += [row.key for row in page]
    assert sorted(seen) == sorted([*"12345678", "9999", "0", "3 ", *strange, "33"])


@pytest.mark.parametrize("source", [{}, {"headrace": {"id": "b"}}], ids=["no place", "one place"])
def test_that_there_are_more_strange_documents_than_are_named_is_said(
    open_store: Open, client: Client, source: dict[str, Any]
) -> None:
    store = open_store()
    store.write([doc(id_, 5) for id_ in "abc"], at(5))
    for ids in range(1000), range(1000, 1001):
        lines = [line for number in ids for line in ({"create": {"_id": f"x{number}"}}, source)]
        client.bulk(index="products-g1", operations=lines, refresh=True)
        rows: list[ViewRow] = []
        while page := store.scan(("", rows[-1].key) if rows else None, 400):
            rows += page
        ours = {"a", "b", "c"} if not source else {"a", "c"}  # what is at its place may be named or not
        named = [row.key for row in rows]
        assert ours <= set(named), ids
        assert len(named) == len(set(named)), ids
        assert (MORE in named) == (ids.stop > 1000 or bool(source)), ids


def test_readers_see_complete_writes_only(open_store: Open, client: Client) -> None:
    store = open_store()
    store.promote()
    store.write([doc("1", 1)], None, bulk=True)
    assert client.count(index="products")["count"] == 0
    store.write([doc("2", 1), doc("3", 1, None)], at(1))
    assert client.count(index="products")["count"] == 2


def test_a_load_that_was_killed_starts_from_an_empty_index(open_store: Open) -> None:
    open_store().write([doc("ghost", 1)], None, bulk=True)
    store = open_store()
    store.write([doc("1", 2)], at(2))
    assert [row.key for row in store.scan(None, 10)] == ["1"]


def test_a_document_that_does_not_fit_is_poison_with_its_id(open_store: Open) -> None:
    store = open_store()
    with pytest.raises(Poison, match=r"'7'.*stars") as error:
        store.write([doc("1", 1), Doc("7", {"stars": "many"}, Version(1, 1))], at(1))
    assert (error.value.code, error.value.cursor) == ("document-refused", ("", "7"))


def test_elasticsearch_away_is_transient_and_it_goes_on_after(open_store: Open, stack: Stack) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    stack.server("elasticsearch").kill()
    with pytest.raises(Transient):
        store.write([doc("2", 2)], at(2))
    stack.server("elasticsearch").start()
    assert store.open(G1) == at(1)
    store.write([doc("2", 2)], at(2))
    assert [row.key for row in store.scan(None, 10)] == ["1", "2"]


def test_a_number_of_replicas_is_not_overridden(settings: Settings, client: Client) -> None:
    store = ElasticsearchIndex("search", mappings=MAPPINGS, settings={"number_of_replicas": 2})
    store.bind(settings, "search")
    store.open(G1)
    made = client.indices.get_settings(index="search-g1")["search-g1"]["settings"]["index"]
    assert (made["number_of_replicas"], "auto_expand_replicas" in made) == ("2", False)
    store.drop()
    store.close()


def test_an_index_is_durable_whatever_a_template_says_and_refused_where_it_is_not(
    open_store: Open, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it is written, some time later."""
    async_ = {"index.translog.durability": "async"}
    client.indices.put_index_template(name="lax", index_patterns=["products-g*"], template={"settings": async_})
    try:
        store = open_store()
        store.write([doc("1", 1)], at(1))
        made = client.indices.get_settings(index="products-g1")["products-g1"]["settings"]["index"]
        assert made["translog"] == {"durability": "request"}
    finally:
        client.indices.delete_index_template(name="lax")
    client.indices.put_settings(index="products-g1", settings=async_)
    with pytest.raises(Misconfigured) as error:
        open_store()
    assert error.value.code == "index-not-durable"
    store.write([], at(2))
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)
    with pytest.raises(Misconfigured) as error:
        store.write([], at(3))
    assert error.value.code == "index-not-durable"
    client.indices.put_settings(index="products-g1", settings={"index.translog.durability": "request"})
    assert open_store().get(["1"])


def test_a_refused_mapping_says_why(settings: Settings) -> None:
    store = ElasticsearchIndex("broken", mappings={"properties": {"a": {"type": "nonsense"}}})
    store.bind(settings, "search")
    with pytest.raises(Misconfigured, match="nonsense"):
        store.open(G1)


def test_a_reader_finds_highlights_and_says_when_nothing_is_live(open_store: Open, settings: Settings) -> None:
    store = open_store()
    store.write([doc("1", 1, "the <big> kettle"), doc("2", 1, "cup")], at(1))
    reader = SearchReader(settings, "products")
    with pytest.raises(Transient, match="live"):
        reader.search("kettle")
    store.promote()
    (hit,) = reader.search("kettle")
    assert (hit["id"], hit["name"]) == ("1", "the <big> kettle")
    assert hit["highlight"]["name"] == ["the &lt;big&gt; <em>kettle</em>"]


def test_who_waits_until_his_write_is_applied_finds_it(open_store: Open, settings: Settings) -> None:
    """S25: not as soon as the position is there, but as soon as what it covers is found; and no later than that."""
    reader = SearchReader(settings, "products")
    assert reader.applied() == NOWHERE
    store = open_store()
    store.write([doc("1", 1)], at(1))
    assert reader.applied() == NOWHERE
    store.promote()
    assert reader.applied() == Version(1, 1)
    store.write([doc("2", 2)], at(2), bulk=True)  # as it is amid a write: the position is there, and not refreshed
    assert (reader.applied(), len(reader.search("kettle"))) == (Version(1, 1), 1)
    store.write([], at(3))
    assert (reader.applied(), len(reader.search("kettle"))) == (Version(1, 3), 2)
    store.write([], at(4))  # refreshes nothing
    assert reader.applied() == Version(1, 4)
    store.write([doc("3", 5)], at(5), bulk=True)
    assert (open_store().open(G1), reader.applied()) == (at(5), Version(1, 5))
    assert len(reader.search("kettle")) == 3
    reopened = open_store()
    reopened.write([], replace(at(7), held=Version(1, 6)))
    assert reader.applied() == Version(1, 6)
    reopened.drop()
    assert reader.applied() == NOWHERE
    reader.close()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
