"""Views in Redis: promoted, dropped, of another source or consumer, and those of which something was lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace

import pytest
import redis

from headrace.change import NOWHERE, Version
from headrace.consumer import Generation
from headrace.errors import Misconfigured, Transient, Wiped
from headrace.settings import Settings
from headrace.stores.redis import Page, PageReader, RedisPages
from tests.fixtures.meanwhile import over_and_over
from tests.integration.test_store_redis import G1, G2, Open, at, client, doc, open_store, settings

__all__ = ["client", "open_store", "settings"]


def test_a_view_of_another_source_is_read_and_not_taken_over(
    open_store: Open, settings: Settings, client: redis.Redis
) -> None:
    """Also while it loads; one that was dropped is nobody's."""
    store, other = open_store(), RedisPages()
    other.bind(replace(settings, source="crm"), "pages")
    with closing(other):
        store.write([doc("1", 1)], None)
        assert other.open(G1) is None
        store.write([doc("2", 2)], at(2))
        assert other.open(G1) == at(2)
        with pytest.raises(Misconfigured, match=f"of source {settings.source}") as error:
            other.write([doc("1", 3)], at(3))
        assert error.value.code == "view-of-another"
        store.write([doc("1", 4)], at(4))
        assert [row.version.lsn for row in other.scan(None, 10)] == [4, 2]
        client.hdel("pages:g1", "source")  # as it was before that was kept
        assert other.open(G1) == at(4)
        assert client.hget("pages:g1", "source") is None
        store.drop()
        assert other.open(G1) is None
        other.write([doc("3", 1)], at(1))
        assert [row.key for row in other.scan(None, 10)] == ["3"]


def test_a_flush_is_noticed_by_the_next_write(open_store: Open, client: redis.Redis) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    client.flushdb()
    with pytest.raises(Wiped):
        store.write([doc("2", 2)], at(2))
    assert client.keys() == []
    assert store.open(G1) is None
    store.write([doc("2", 2)], at(2))
    assert [row.key for row in store.scan(None, 10)] == ["2"]


def test_a_redis_that_came_back_with_older_data_is_noticed(open_store: Open, client: redis.Redis) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    before = client.dump("pages:g1") or b""
    store.write([doc("1", 2)], at(2))
    client.restore("pages:g1", 0, before, replace=True)
    with pytest.raises(Wiped):
        store.write([doc("1", 3)], at(3))
    assert store.open(G1) == at(1)


@pytest.mark.parametrize("bulk", [True, False], ids=["of a load", "the last"])
def test_a_redis_that_came_back_without_pages_of_no_position_is_noticed(
    open_store: Open, client: redis.Redis, *, bulk: bool
) -> None:
    """Saved between two of them, which go out one after another; nobody is told of the restart."""
    store = open_store()
    store.write([doc("1", 1)], None, bulk=True)
    store.arrive()
    saved = client.dump("pages:g1") or b""
    store.write([doc("2", 1)], None, bulk=True)
    store.arrive()
    client.restore("pages:g1", 0, saved, replace=True)
    client.delete("pages:1:2")
    if bulk:
        store.write([doc("3", 1)], None, bulk=True)
    with pytest.raises(Wiped, match="moved"):
        store.write([doc("4", 1)], at(1))
    assert store.open(G1) is None
    assert store.scan(None, 10) == []
    store.write([doc("3", 1)], None, bulk=True)
    store.write([doc("2", 1)], at(1))
    assert [row.key for row in store.scan(None, 10)] == ["2", "3"]


def test_promotion_is_atomic_for_a_polling_reader(open_store: Open, settings: Settings) -> None:
    first, second = open_store(), open_store(G2)
    reader = PageReader(settings, "pages")
    with pytest.raises(Transient, match="live"):
        reader.get("1")
    assert reader.applied() == NOWHERE
    first.write([doc("1", 7, "old")], at(8))
    second.write([doc("1", 9, "new")], at(10))
    first.promote()
    assert reader.get("1") == Page("old", "e", Version(1, 7))
    assert reader.get("2") is None
    assert reader.applied() == Version(1, 8)
    seen: list[Page | None] = []
    with over_and_over(lambda: seen.append(reader.get("1"))):
        wait_for(lambda: len(seen) > 20)
        second.promote()
        first.drop()
    assert [page and page.html for page in dict.fromkeys(seen)] == ["old", "new"]
    assert [(g.number, g.live) for g in second.generations()] == [(2, True)]


def test_dropping_takes_every_key_of_the_generation(open_store: Open, client: redis.Redis) -> None:
    store = open_store()
    store.write([doc(str(n), 1) for n in range(2500)], at(1))
    store.promote()
    store.drop()
    assert client.keys() == []


def test_a_prefix_of_another_consumer_is_refused(open_store: Open) -> None:
    open_store()
    with pytest.raises(Misconfigured) as error:
        open_store(replace(G1, fingerprint="other"))
    assert error.value.code == "view-of-another"


def test_who_takes_a_name_that_is_taken_does_not_disturb_who_has_it(
    open_store: Open, settings: Settings, client: redis.Redis
) -> None:
    store = open_store(G2)
    store.write([doc("1", 1)], at(1))
    store.promote()
    kept = set(client.keys())
    other = RedisPages("pages")
    other.bind(settings, "other")
    assert other.generations() == []
    for number in (1, 2, 3):
        with pytest.raises(Misconfigured) as error:
            other.open(Generation("other", number, "abc"))
        assert error.value.code == "view-of-another"
    other.close()
    assert set(client.keys()) == kept
    store.write([doc("2", 2)], at(2))
    assert [row.key for row in store.scan(None, 10)] == ["1", "2"]


@pytest.mark.parametrize("name", ["pages--replay", "other--replay"])
def test_a_scratch_view_may_lie_beside_the_one_it_is_of(open_store: Open, settings: Settings, name: str) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    scratch = RedisPages("pages")
    scratch.bind(settings, name)
    assert scratch.open(Generation(name, 1_000_000, "abd")) is None
    assert store.open(G1) == at(1)
    scratch.close()


def test_a_live_view_whose_state_is_gone_shows_nothing_before_it_is_whole(
    open_store: Open, settings: Settings, client: redis.Redis
) -> None:
    store = open_store()
    store.write([doc("1", 1), doc("2", 1)], at(1))
    store.promote()
    client.delete("pages:g1")
    with pytest.raises(Wiped):
        store.write([doc("1", 2)], at(2))
    assert store.open(G1) is None
    with closing(PageReader(settings, "pages")) as reader:
        for written in (None, doc("1", 2)):
            if written is not None:
                store.write([written], None)
            with pytest.raises(Transient) as error:
                reader.get("1")
            assert error.value.code == "view-not-there"
        with pytest.raises(Wiped):
            store.promote()
        store.write([doc("2", 2)], at(2))
        store.promote()
        assert reader.get("2") == Page("<p>", "e", Version(1, 2))


def test_opening_another_generation_leaves_the_live_one_to_readers(
    open_store: Open, settings: Settings, client: redis.Redis
) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    store.promote()
    open_store(G2)
    client.delete("pages:g1")  # it is whole for readers until it is opened anew
    open_store(G2)
    with closing(PageReader(settings, "pages")) as reader:
        assert reader.get("1") == Page("<p>", "e", Version(1, 1))


def test_what_is_lost_or_taken_over_is_not_promoted(open_store: Open, client: redis.Redis) -> None:
    store = open_store(G2)
    store.write([doc("1", 1)], at(1))
    successor = open_store(G2)
    with pytest.raises(Misconfigured) as error:
        store.promote()
    assert error.value.code == "view-taken-over"
    client.flushdb()
    with pytest.raises(Wiped):
        successor.promote()
    assert client.keys() == []


@pytest.mark.parametrize("by", ["a kill", "the server"])
def test_a_drop_that_was_cut_short_is_finished_and_nothing_is_built_again(
    open_store: Open, settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """By the server: who is told that it failed would open the generation again, and build it."""
    store = open_store()
    store.write([doc("1", 1), doc("2", 1)], at(1))
    store.promote()

    def cut(_seconds: float) -> None:
        if by == "a kill":
            raise KeyboardInterrupt
        client.config_set("min-replicas-to-write", "1")

    try:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) if by == "a kill" else nullcontext():
            patched.setattr("headrace.stores.redis.pages.time.sleep", cut)
            store.drop()
    finally:
        client.config_set("min-replicas-to-write", "0")
    assert client.keys("pages:1:*")
    assert store.generations() == []
    successor = RedisPages()
    successor.bind(settings, "pages")
    assert successor.generations() == []
    successor.open(G2)
    successor.close()
    assert set(client.keys()) == {"pages:g2", "pages:generations"}
    assert client.smembers("pages:generations") == {"2"}


def test_a_generation_that_is_opened_while_it_is_dropped_stays(
    open_store: Open, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other code too: what is dropped is nobody's."""
    store = open_store()
    store.write([doc("1", 1)], at(1))

    def opened(_seconds: float) -> None:
        open_store(replace(G1, fingerprint="other")).write([doc("2", 2)], at(2))

    monkeypatch.setattr("headrace.stores.redis.pages.time.sleep", opened)
    store.drop()
    assert set(client.keys()) == {"pages:g1", "pages:generations", "pages:1:2"}


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
