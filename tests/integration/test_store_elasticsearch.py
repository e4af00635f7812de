"""The Elasticsearch store against a real Elasticsearch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from elasticsearch import ConflictError, NotFoundError
from elasticsearch import Elasticsearch as Client

from headrace.change import NOWHERE, Position, Source, Version
from headrace.consumer import Generation, ViewRow
from headrace.errors import Misconfigured, Poison, Transient, Wiped
from headrace.settings import Settings
from headrace.stores import Doc
from headrace.stores.elasticsearch import ElasticsearchIndex, SearchReader
from headrace.stores.elasticsearch import index as module
from headrace.stores.elasticsearch.bulks import POSITION
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


def test_readers_see_complete_writes_only(open_store: Open, client: Client) -> None:
    store = open_store()
    store.promote()
    store.write([doc("1", 1)], None, bulk=True)
    assert client.count(index="products")["count"] == 0
    store.write([doc("2", 1), doc("3", 1, None)], at(1))
    assert client.count(index="products")["count"] == 2


def test_promotion_is_atomic_for_a_polling_reader(open_store: Open, client: Client) -> None:
    first, second = open_store(), open_store(G2)
    first.write([doc("1", 1, "old")], at(1))
    first.promote()
    second.write([doc("1", 1, "new")], at(1))
    seen: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            hits = client.search(index="products")["hits"]["hits"]
            seen.append(",".join(hit["_source"]["name"] for hit in hits))

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: len(seen) > 5)
    second.promote()
    count = len(seen)
    wait_for(lambda: len(seen) > count + 5)
    stop.set()
    reader.join()
    assert set(seen) == {"old", "new"}
    assert seen == sorted(seen, reverse=True)
    assert [(g.number, g.live) for g in first.generations()] == [(1, False), (2, True)]
    first.promote()
    second.drop()
    assert [(g.number, g.live) for g in first.generations()] == [(1, True)]


def test_an_index_deleted_while_running_is_not_made_by_a_write(open_store: Open, client: Client) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    client.indices.delete(index="products-g1")
    with pytest.raises(Wiped):
        store.write([doc("2", 2)], at(2))
    with pytest.raises(Wiped):
        store.write([], at(2))
    with pytest.raises(NotFoundError):
        client.indices.get(index="products-g1")
    assert store.open(G1) is None
    store.write([doc("2", 2)], at(2))
    assert [row.key for row in store.scan(None, 10)] == ["2"]


def test_a_position_that_was_deleted_or_is_of_another_index_means_from_zero(open_store: Open, client: Client) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    client.delete(index="products-g1", id="headrace:position")
    with pytest.raises(Wiped):
        store.write([], at(2))
    assert store.open(G1) is None
    store.write([doc("1", 1)], at(1))
    found = client.get(index="products-g1", id="headrace:position")["_source"]
    found["headrace"]["state"]["uuid"] = "another"
    client.index(index="products-g1", id="headrace:position", document=found)
    assert store.open(G1) is None


def test_a_load_that_was_killed_starts_from_an_empty_index(open_store: Open) -> None:
    open_store().write([doc("ghost", 1)], None, bulk=True)
    store = open_store()
    store.write([doc("1", 2)], at(2))
    assert [row.key for row in store.scan(None, 10)] == ["1"]


def test_a_bulk_that_is_late_never_reaches_the_next_attempt(
    open_store: Open, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one makes the index anew, and its log may not have the row any more: no version would refuse that document."""
    killed, may = open_store(), threading.Event()
    post = killed._client.bulk
    monkeypatch.setattr(killed._client, "bulk", lambda **bulk: may.wait(60) and post(**bulk))
    killed.write([doc("ghost", 1)], None, bulk=True)
    store = open_store()
    may.set()
    with pytest.raises(Misconfigured) as error:
        killed.arrive()
    assert error.value.code == "view-taken-over"
    store.write([doc("1", 2)], at(2))
    assert [row.key for row in store.scan(None, 10)] == ["1"]
    assert client.count(index="products-g1")["count"] == 2, "its document and the position"


def test_a_view_of_another_source_is_read_and_not_taken_over(
    open_store: Open, settings: Settings, client: Client
) -> None:
    """Also while it loads, and before it has any position."""
    store, other = open_store(), ElasticsearchIndex("products", mappings=MAPPINGS)
    other.bind(replace(settings, source="crm"), "search")
    store.write([doc("1", 1)], None)
    assert other.open(G1) is None
    store.write([doc("2", 2)], at(2))
    assert other.open(G1) == at(2)
    with pytest.raises(Misconfigured, match=f"of source {settings.source}") as error:
        other.write([doc("1", 3)], at(3))
    assert error.value.code == "view-of-another"
    store.write([doc("1", 4)], at(4))
    assert [row.version.lsn for row in other.scan(None, 10)] == [4, 2]
    client.delete(index="products-g1", id=POSITION, refresh=True)
    assert other.open(G1) is None
    with pytest.raises(Misconfigured, match=f"of source {settings.source}"):
        other.write([doc("1", 5)], at(5))
    assert client.count(index="products-g1")["count"] == 2, "it is not made anew"
    other.close()


def test_a_bulk_that_is_late_never_reaches_an_index_that_has_a_position(open_store: Open) -> None:
    killed = open_store()
    killed.write([doc("1", 1), doc("2", 1)], at(1))
    store = open_store()
    store.write([doc("1", 3, "newer"), doc("2", 3, None)], at(3))
    killed.write([doc("1", 4, "of another history"), doc("3", 2)], None, bulk=True)
    with pytest.raises(Misconfigured):
        killed.arrive()
    store.write([doc("4", 4)], at(4))
    assert [(row.key, row.value["name"]) for row in store.scan(None, 10)] == [("1", "newer"), ("4", "kettle")]


def _aliases(client: Client) -> set[str]:
    return set(client.indices.get_alias(index="products-g1")["products-g1"]["aliases"])


def test_one_writer_has_one_alias_and_may_open_again(open_store: Open, client: Client) -> None:
    for lsn in (1, 2, 3):
        open_store().write([doc("1", lsn)], at(lsn))
    client.indices.put_alias(index="products-g1", name="of-somebody-else")
    store = open_store()
    assert store.open(G1) == at(3)
    store.write([doc("1", 4)], at(4))
    assert _aliases(client) == {store._target, "of-somebody-else"}


def test_who_cannot_open_leaves_no_alias_behind(open_store: Open, client: Client) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    client.indices.put_settings(index="products-g1", settings={"index.blocks.write": True})
    for _ in range(3):
        with pytest.raises(Transient):
            open_store()
    assert _aliases(client) == {store._target}


def test_a_writer_whose_alias_somebody_took_away_opens_again(open_store: Open, client: Client) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    client.indices.delete_alias(index="products-g1", name=store._target)
    with pytest.raises(Wiped, match="alias is gone"):
        store.write([doc("1", 2, "newer")], at(2))
    assert store.open(G1) == at(1)
    store.write([doc("1", 2, "newer")], at(2))
    assert store.scan(None, 10)[0].value == {"name": "newer"}


def test_of_two_that_load_the_former_finds_out(
    open_store: Open, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the later one makes the index anew it is gone for a moment, and not wiped."""
    monkeypatch.setattr(module, "_MOMENTS", (0.0, 0.2, 0.5, 1.0, 2.0, 4.0))  # a busy server takes longer to make it
    former = open_store()
    client.indices.delete(index="products-g1")
    later = threading.Timer(0.4, open_store)
    later.start()
    with pytest.raises(Misconfigured) as error:
        former.write([doc("1", 1)], None)
    later.join()
    assert error.value.code == "view-taken-over"


def test_a_process_that_was_replaced_finds_out(open_store: Open) -> None:
    zombie = open_store()
    zombie.write([doc("1", 1)], at(1))
    successor = open_store()
    successor.write([doc("1", 2, "newer")], at(2))
    with pytest.raises(Misconfigured) as error:
        zombie.write([doc("1", 1, "older")], at(3))
    assert error.value.code == "view-taken-over"
    assert successor.scan(None, 10)[0].value == {"name": "newer"}


def test_a_document_that_does_not_fit_is_poison_with_its_id(open_store: Open) -> None:
    store = open_store()
    with pytest.raises(Poison, match=r"'7'.*stars") as error:
        store.write([doc("1", 1), Doc("7", {"stars": "many"}, Version(1, 1))], at(1))
    assert (error.value.code, error.value.cursor) == ("document-refused", ("", "7"))


def test_an_index_of_other_code_is_never_mixed(open_store: Open) -> None:
    open_store().write([doc("1", 1)], at(1))
    with pytest.raises(Misconfigured, match="was not made by search other"):
        open_store(replace(G1, fingerprint="other"))


def test_who_takes_a_name_that_is_taken_does_not_disturb_who_has_it(
    open_store: Open, settings: Settings, client: Client
) -> None:
    store = open_store(G2)
    store.write([doc("1", 1)], at(1))
    store.promote()
    other = ElasticsearchIndex("products", mappings=MAPPINGS)
    other.bind(settings, "other")
    assert other.generations() == []
    for number in (1, 2, 3):
        with pytest.raises(Misconfigured) as error:
            other.open(Generation("other", number, "abc"))
        assert error.value.code == "view-of-another"
    other.close()
    store.write([doc("2", 2)], at(2))
    assert {hit["_id"] for hit in client.search(index="products")["hits"]["hits"]} == {"1", "2"}


@pytest.mark.parametrize("name", ["search--replay", "other--replay"])
def test_a_scratch_view_may_lie_beside_the_one_it_is_of(open_store: Open, settings: Settings, name: str) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    scratch = ElasticsearchIndex("products", mappings=MAPPINGS)
    scratch.bind(settings, name)
    assert scratch.open(Generation(name, 1_000_000, "abd")) is None
    assert store.open(G1) == at(1)
    scratch.close()


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


def test_part_of_an_index_is_never_taken_for_all_of_it(settings: Settings, client: Client) -> None:
    store = ElasticsearchIndex("search", mappings=MAPPINGS, settings={"number_of_shards": 3})
    store.bind(settings, "search")
    store.open(G1)
    store.write([doc(str(n), 1) for n in range(30)], at(1))
    assert (store.count(), len(store.scan(None, 100))) == ({"": 30}, 30)
    (node,) = client.nodes.info()["nodes"]
    gone = {"index": "search-g1", "shard": 1, "node": node, "allow_primary": True}
    for look in (
        lambda: store.count()[""],
        lambda: len(store.scan(None, 100)),
        lambda: len(store.get([str(n) for n in range(30)])),
    ):
        refused = 0
        for _ in range(50):  # the shard comes back by itself, at times before the look
            client.cluster.reroute(commands=[{"cancel": gone}])
            try:
                assert look() == 30
            except Transient:
                refused += 1
            client.cluster.health(index="search-g1", wait_for_status="green")
            if refused == 3:
                break
        assert refused
    store.drop()
    store.close()


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
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
