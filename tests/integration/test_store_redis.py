"""The Redis store against a real Redis."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from headrace.change import NOWHERE, Position, Source, Version
from headrace.consumer import Generation, ViewRow
from headrace.errors import Misconfigured, Poison, Transient
from headrace.settings import Settings
from headrace.stores import Doc
from headrace.stores.redis import PageReader, RedisPages
from headrace.stores.redis import pages as module
from headrace_ops import Stack, artifacts, guard
from headrace_ops.redis import Redis

G1, G2 = Generation("pages", 1, "abc"), Generation("pages", 2, "abc")
Open = Callable[..., RedisPages]
_databases = itertools.cycle(range(1000, 1024))  # of those that the server has, the ones that nobody else uses


def at(lsn: int) -> Position:
    return Position(
        {"main.public.t": [lsn]}, {"main.public.t": "T"}, Version(1, lsn), Source("7512", 1, "shop", "s", "p"), 1
    )


def doc(id_: str, lsn: int, html: str | None = "<p>") -> Doc:
    return Doc(id_, {"html": html, "etag": "e"} if html is not None else None, Version(1, lsn))


@pytest.fixture
def settings(redis_server: Redis, tmp_path: Path) -> Settings:
    address = redis_server.address().rpartition("/")[0]
    found = replace(Settings(), redis=f"{address}/{next(_databases)}", state=str(tmp_path))
    with redis.Redis.from_url(found.redis) as client:
        client.flushdb()
    return found


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis, decode_responses=True) as found:
        yield found


@pytest.fixture
def open_store(settings: Settings) -> Iterator[Open]:
    made: list[RedisPages] = []

    def make(generation: Generation = G1) -> RedisPages:
        store = RedisPages()
        store.bind(settings, "pages")
        store.open(generation)
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()


def test_the_position_is_there_after_a_restart(open_store: Open) -> None:
    store = open_store()
    assert store.open(G1) is None
    store.write([doc("product/1", 5)], at(5))
    assert open_store().open(G1) == at(5)
    assert store.generations() == [G1]


def test_an_older_version_never_replaces_a_newer_one_and_a_tie_may(open_store: Open) -> None:
    store = open_store()
    store.write([doc("1", 10, "new")], at(10))
    store.write([doc("1", 9, "old")], at(11))
    assert store.scan(None, 10) == [("", "1", {"html": "new", "etag": "e"}, Version(1, 10))]
    store.write([doc("1", 10, "same")], at(12))
    assert store.scan(None, 10)[0].value["html"] == "same"
    store.write([Doc("1", {"html": "large"}, Version(2, 2**48 - 1))], at(13))
    store.write([Doc("1", {"html": "small"}, Version(2, 2**48 - 2))], at(14))
    assert store.scan(None, 10)[0] == ("", "1", {"html": "large"}, Version(2, 2**48 - 1))


def test_a_new_epoch_is_newer_though_its_lsns_are_lower(open_store: Open) -> None:
    """S2: what the source has lost has LSNs above those of the new truth."""
    store = open_store()
    for number, (name, version) in enumerate(
        (("lost", Version(1, 900)), ("true", Version(2, 5)), ("late", Version(1, 901)))
    ):
        store.write([Doc("1", {"html": name}, version)], at(number))
    assert store.scan(None, 10) == [("", "1", {"html": "true"}, Version(2, 5))]


def test_a_delete_leaves_nothing_and_a_zombie_cannot_undo_it(open_store: Open, client: redis.Redis) -> None:
    """S21, S23: whoever was replaced does not write at all."""
    zombie = open_store()
    zombie.write([doc("1", 100)], at(100))
    successor = open_store()
    successor.write([doc("1", 110, None)], at(110))
    with pytest.raises(Misconfigured) as error:
        zombie.write([doc("1", 100)], at(101))
    assert error.value.code == "view-taken-over"
    assert successor.scan(None, 10) == []
    assert set(client.keys()) == {"pages:g1", "pages:generations"}


def test_pages_whose_answer_was_lost_are_taken_once_more(open_store: Open) -> None:
    store = open_store()
    store.write([doc("1", 1)], None)
    store._writes -= 1
    store.write([doc("1", 1)], None)
    store.write([], at(1))
    assert store.open(G1) == at(1)


def test_the_same_write_again_is_taken_once_more(open_store: Open) -> None:
    """The answer to a write was lost: the position is there already."""
    store = open_store()
    store.write([doc("1", 1)], at(1))
    store.write([doc("1", 1)], at(1))
    assert store.open(G1) == at(1)


def test_a_load_that_was_killed_starts_without_pages(open_store: Open) -> None:
    open_store().write([doc("ghost", 1)], None, bulk=True)
    store = open_store()
    store.write([doc("1", 2)], at(2))
    assert [row.key for row in store.scan(None, 10)] == ["1"]


def test_a_key_that_is_not_utf_8_is_shown_as_near_as_can_be(open_store: Open, client: redis.Redis) -> None:
    store = open_store()
    store.write([doc(id_, 5) for id_ in ("a", "\ufffd", "z")], at(5))
    for key in b"pages:1:b\xff", b"pages:1:y\xff":
        client.hset(key, mapping={"html": "foreign"})
    seen = [row for after in (None, "b\ufffd", "z") for row in store.scan(after and ("", after), 2)]
    assert [row.key for row in seen] == ["a", "b\ufffd", "y\ufffd", "z", "\ufffd"]
    assert [row.value for row in seen if "@error" in row.value] == [{"@error": "its key is not UTF-8"}] * 2


def test_scan_gives_bodies_as_rendered_by_id_page_by_page(open_store: Open, client: redis.Redis) -> None:
    store = open_store()
    other = open_store(Generation("pages", 11, "abc"))
    other.write([doc("other", 1)], at(1))
    ids = ["", "10", "9", "a", "ä", "Z", "1,2", "b", "[x]", "1:2"]
    store.write([doc(id_, 1, id_ or "empty") for id_ in ids], at(1))
    client.hset("pages:1:aa", mapping={"html": "foreign"})
    client.set("pages:1:ab", "of another type")
    found: list[ViewRow] = []
    after = None
    while page := store.scan(after, 3):
        found += page
        after = (page[-1].collection, page[-1].key)
    assert sorted(store.get(["10", "aa", "none"])) == [row for row in found if row.key in {"10", "aa"}]
    assert [row.key for row in found] == sorted([*ids, "aa", "ab"])
    assert {row.key: row.value for row in found}["ä"] == {"html": "ä", "etag": "e"}
    assert {row.key: row.version for row in found}["aa"] == NOWHERE
    client.delete("pages:1:a")
    assert "a" not in [row.key for row in store.scan(None, 100)]
    store.write([doc("ab", 2, "right")], at(2))
    assert {row.key: row.value for row in store.scan(None, 100)}["ab"]["html"] == "right"


@pytest.mark.parametrize("pages", [(1, 1), (1, 2), (2, 1)])
def test_scans_that_take_turns_list_the_ids_once_each(
    open_store: Open, monkeypatch: pytest.MonkeyPatch, pages: tuple[int, int]
) -> None:
    """A later one shows what is there when it begins, wherever an earlier one stands meanwhile."""
    store, ids = open_store(), list("abcdef")
    store.write([doc(id_, 1) for id_ in ids], at(1))
    listed: list[RedisPages] = []
    page_ids = RedisPages._page_ids
    monkeypatch.setattr(RedisPages, "_page_ids", lambda store: listed.append(store) or page_ids(store))
    seen = [[row.key for row in store.scan(None, pages[0])], []]
    store.write([doc("g", 1)], at(2))
    going = [0, 1]
    while going:
        for number in tuple(going):
            after = ("", seen[number][-1]) if seen[number] else None
            found = [row.key for row in store.scan(after, pages[number])]
            seen[number] += found
            if len(found) < pages[number]:
                going.remove(number)
    assert seen[1] == [*ids, "g"]
    assert seen[0][:6] == ids
    assert len(listed) == 2


def test_scans_of_two_generations_go_on_in_their_own_ids(settings: Settings) -> None:
    """Both stores are copies of one, as those of a consumer's class are."""
    made = RedisPages()
    stores = [copy.copy(made), copy.copy(made)]
    for store, generation, last in zip(stores, (G1, G2), "cd", strict=True):
        store.bind(settings, "pages")
        store.open(generation)
        store.write([doc(id_, 1) for id_ in ("a", "b", last)], at(1))
    for store in stores:
        assert [row.key for row in store.scan(None, 2)] == ["a", "b"]
    assert [[row.key for row in store.scan(("", "b"), 2)] for store in stores] == [["c"], ["d"]]
    for store in stores:
        store.close()


def test_a_large_write_goes_in_pieces_with_the_position_last(open_store: Open) -> None:
    store = open_store()
    store.write([doc(f"{n:03}", 1, "x" * 200_000) for n in range(100)], at(1))
    assert len(store.scan(None, 1000)) == 100
    assert open_store().open(G1) == at(1)


def test_a_field_that_is_longer_than_redis_takes_is_poison_until_it_takes_more(
    open_store: Open, client: redis.Redis
) -> None:
    store, (name, most) = open_store(), ("proto-max-bulk-len", 1024 * 1024)
    before = client.config_get(name)[name]
    client.config_set(name, most)
    try:
        store.write([doc("1", 1, "é" * (most // 2))], at(1))
        for bulk in (True, False):
            with pytest.raises(Poison, match=f"{most + 1} bytes, and Redis takes {most} ") as error:
                store.write([doc("1", 2), doc("2", 2, "é" * (most // 2) + "e")], at(2), bulk=bulk)
            assert (error.value.code, error.value.cursor) == ("document-too-large", ("", "2"))
    finally:
        client.config_set(name, before)
    store.write([doc("2", 2, "é" * most)], at(2))
    assert {row.key: len(row.value["html"]) for row in store.scan(None, 10)} == {"1": most // 2, "2": most}


def test_one_read_is_one_round_trip(open_store: Open, settings: Settings, client: redis.Redis) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    store.promote()
    reader = PageReader(settings, "pages")
    reader.get("1")
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    total = client.info("stats")["total_commands_processed"]
    reader.get("1")
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 1
    # Within the script GET and HMGET count too, and so do the two INFO.
    assert client.info("stats")["total_commands_processed"] - total <= 5


def test_a_redis_that_may_evict_is_refused(
    open_store: Open, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it is written, some time later."""
    store = open_store()
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(Misconfigured) as error:
            open_store()
        assert error.value.code == "redis-may-evict"
        store.write([doc("1", 1)], at(1))
        monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)
        with pytest.raises(Misconfigured) as error:
            store.write([doc("2", 2)], at(2))
        assert error.value.code == "redis-may-evict"
        client.config_set("maxmemory-policy", "volatile-lru")
        open_store().write([doc("2", 2)], at(2))
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_a_redis_that_is_full_is_transient(open_store: Open, client: redis.Redis) -> None:
    store = open_store()
    client.config_set("maxmemory", "1")
    try:
        with pytest.raises(Transient) as error:
            store.write([doc("1", 1)], at(1))
        assert error.value.code == "redis-busy"
    finally:
        client.config_set("maxmemory", "0")
    store.write([doc("1", 1)], at(1))


class Oldest(Redis):
    """The oldest version that is supported, whichever the system has."""

    def command(self) -> list[str]:
        return [str(artifacts.get(artifacts.REDIS) / "redis-server"), *super().command()[1:]]


def test_a_redis_before_7_that_is_full_is_transient_too(tmp_path: Path) -> None:
    """It tells that of a script within another error."""
    with guard.temporary("headrace-tests-", [Redis.name]) as folder:
        server = Oldest(folder, spread=True)
        server.start()
        store = RedisPages()
        store.bind(replace(Settings(), redis=server.address(), state=str(tmp_path)), "pages")
        with closing(store), redis.Redis.from_url(server.address(), decode_responses=True) as client:
            assert str(client.info("server")["redis_version"]).startswith("6.2")
            store.open(G1)
            client.config_set("maxmemory", "1")
            for attempt in (lambda: store.write([doc("1", 1)], at(1)), lambda: store.open(G1), store.promote):
                with pytest.raises(Transient) as error:
                    attempt()
                assert error.value.code == "redis-busy"
            client.config_set("maxmemory", "0")
            store.write([doc("1", 1)], at(1))
            assert [row.key for row in store.scan(None, 10)] == ["1"]


def test_a_field_that_is_not_text_is_poison(open_store: Open) -> None:
    with pytest.raises(Poison, match=r"'7'.*stars=4") as error:
        open_store().write([Doc("7", {"stars": 4}, Version(1, 1))], at(1))
    assert error.value.cursor == ("", "7")


def test_a_page_without_fields_is_poison_and_not_a_delete(open_store: Open) -> None:
    store = open_store()
    store.write([doc("1", 100)], at(100))
    with pytest.raises(Poison, match="no field") as error:
        store.write([Doc("1", {}, Version(1, 110)), doc("2", 110)], at(110))
    assert (error.value.code, error.value.cursor) == ("page-empty", ("", "1"))
    assert [row.key for row in store.scan(None, 9)] == ["1"]


def test_redis_away_is_transient_and_it_goes_on_after(open_store: Open, stack: Stack) -> None:
    store = open_store()
    store.write([doc("1", 1)], at(1))
    stack.server("redis").kill()
    with pytest.raises(Transient):
        store.write([doc("2", 2)], at(2))
    stack.server("redis").start()
    assert store.open(G1) == at(1)
    store.write([doc("2", 2)], at(2))
    assert [row.key for row in store.scan(None, 10)] == ["1", "2"]


def test_a_wrong_address_names_the_setting(settings: Settings) -> None:
    with pytest.raises(Misconfigured, match="HEADRACE_REDIS='http://x'"):
        RedisPages("pages").bind(replace(settings, redis="http://x"), "pages")


def test_a_wrong_password_names_the_setting(settings: Settings, client: redis.Redis) -> None:
    client.config_set("requirepass", "right")
    try:
        store = RedisPages("pages")
        store.bind(replace(settings, redis=settings.redis.replace("://", "://:wrong@")), "pages")
        with pytest.raises(Misconfigured, match="HEADRACE_REDIS"):
            store.open(G1)
        with pytest.raises(Misconfigured, match="HEADRACE_REDIS"):
            PageReader(settings, "pages").get("1")
    finally:
        client.config_set("requirepass", "")
