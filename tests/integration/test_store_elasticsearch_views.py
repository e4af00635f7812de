"""Views in Elasticsearch: whose index it is, who may write it, and what becomes of it when it is promoted or lost."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from elasticsearch import Elasticsearch as Client
from elasticsearch import NotFoundError

from headrace.consumer import Generation
from headrace.errors import Misconfigured, Transient, Wiped
from headrace.settings import Settings
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace.stores.elasticsearch import index as module
from headrace.stores.elasticsearch.bulks import POSITION
from tests.fixtures.meanwhile import over_and_over
from tests.integration.test_store_elasticsearch import (
    G1,
    G2,
    MAPPINGS,
    Open,
    at,
    client,
    doc,
    open_store,
    settings,
    wait_for,
)

__all__ = ["client", "open_store", "settings"]


def test_promotion_is_atomic_for_a_polling_reader(open_store: Open, client: Client) -> None:
    first, second = open_store(), open_store(G2)
    first.write([doc("1", 1, "old")], at(1))
    first.promote()
    second.write([doc("1", 1, "new")], at(1))
    seen: list[str] = []

    def read() -> None:
        hits = client.search(index="products")["hits"]["hits"]
        seen.append(",".join(hit["_source"]["name"] for hit in hits))

    with over_and_over(read):
        wait_for(lambda: len(seen) > 5)
        second.promote()
        count = len(seen)
        wait_for(lambda: len(seen) > count + 5)
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
