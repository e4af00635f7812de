"""Stores and disks that are full or busy: said in status, nothing is lost or parked, and it goes on by itself when there is room.

Each on the live path, where readers keep what they had, and while a view is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

import orjson
import pytest
import redis
from elasticsearch import Elasticsearch as Client
from elasticsearch import NotFoundError

import headrace.stores.duckdb.database
from headrace.errors import Transient
from headrace.settings import Settings
from headrace.stores.duckdb import Database
from headrace.stores.elasticsearch import ElasticsearchIndex
from headrace.stores.redis import PageReader
from headrace_ops.elasticsearch import Elasticsearch
from headrace_warehouse.cli import ask
from tests.fixtures.capture import capturing, eventually, execute, prepare, rows
from tests.fixtures.disk import Disk
from tests.fixtures.processes import System
from tests.fixtures.serving import await_live, serving
from tests.fixtures.statuses import status
from tests.fixtures.ticks import MAKE, TICK, TicksFound, TicksPages

MORE = "INSERT INTO ticks SELECT i, 0 FROM generate_series(1000, 1400) i"
WIDE = "ALTER TABLE ticks ADD COLUMN wide text"
LARGE = "INSERT INTO ticks SELECT i, 0, repeat(md5(i::text), 500) FROM generate_series(1000, 1400) i"
"""6 MB."""


def selected(settings: Settings) -> dict[str, int]:
    return {str(id_): n for id_, n in rows(settings, "SELECT id, n FROM ticks")}


def paged(settings: Settings) -> dict[str, int]:
    with closing(PageReader(settings, "ticking")) as reader:
        found = {id_: reader.get(id_) for id_ in selected(settings)}
    return {id_: int(page.html) for id_, page in found.items() if page}


def found(address: str, alias: str = "found") -> dict[str, int]:
    with Client(address) as client:
        try:
            hits = client.search(index=alias, size=10_000)["hits"]["hits"]
        except NotFoundError:
            return {}
    return {hit["_id"]: hit["_source"]["n"] for hit in hits}


def await_told(settings: Settings, name: str, code: str, *words: str) -> None:
    """Wait until status says why the view waits, to people and to scripts; nothing is parked.

    While it tries again it does not wait, so the two looks may see it differently.
    """

    said = set[str]()

    def told() -> bool:
        ended = status(settings, "--check", name)
        said.add(ended.stdout)
        reports = orjson.loads(status(settings, "--json", name).stdout)["consumers"].get(name, [])
        assert not any(report.get("parked") for report in reports), reports
        waits = ended.exit_code == 1 and all(word in ended.stdout for word in ("waiting", *words))
        return waits and [report["code"] for report in reports] == [code]

    try:
        eventually(f"status says {words}", told)
    except AssertionError as error:
        raise AssertionError(f"{error}; it said {said}") from error


# Redis


@contextmanager
def no_memory(settings: Settings) -> Iterator[None]:
    with redis.Redis.from_url(settings.redis) as client:
        client.config_set("maxmemory", "1")
        try:
            yield
        finally:
            client.config_set("maxmemory", "0")


@pytest.mark.usefixtures("redis_server")
def test_redis_without_memory(settings: Settings) -> None:
    prepare(settings, *MAKE)
    told = ("redis-busy", "does not take writes", "maxmemory")
    with capturing(settings) as capture:
        capture.reach()
        with serving(settings, ticks_pages=TicksPages) as control:
            with no_memory(settings):
                await_told(settings, "ticks_pages", *told)
            await_live(control, "ticks_pages")
            before = paged(settings)
            assert before == selected(settings)
            with no_memory(settings):
                execute(settings, TICK, MORE)
                await_told(settings, "ticks_pages", *told)
                assert paged(settings) == before, "readers keep what they had"
            eventually("it goes on", lambda: paged(settings) == selected(settings))


# Elasticsearch


@pytest.fixture
def cluster(elasticsearch: Elasticsearch) -> Iterator[Callable[..., None]]:
    """Change settings of the cluster while it runs; afterwards they are as before."""
    with Client(elasticsearch.address()) as client:
        changed: set[str] = set()

        def change(**settings: Any) -> None:
            named = {name.replace("__", "."): value for name, value in settings.items()}
            changed.update(named)
            client.cluster.put_settings(persistent=named)

        yield change
        client.cluster.put_settings(persistent=dict.fromkeys(changed))


class Busy(Elasticsearch):
    """The same server with little room for what is to be indexed: it refuses more by 429."""

    def command(self) -> list[str]:
        return [*super().command(), "-E", "indexing_pressure.memory.limit=16kb"]


class Again(TicksFound):
    """Another view of the same rows."""

    store = ElasticsearchIndex("again", mappings={"properties": {"n": {"type": "integer"}}})


def test_elasticsearch_too_busy_for_a_bulk(settings: Settings, elasticsearch: Elasticsearch) -> None:
    prepare(settings, *MAKE)
    told = ("elasticsearch-busy", "rejected execution")
    elasticsearch.stop()
    busy = Busy(elasticsearch.folder, spread=True)
    busy.start()
    with capturing(settings) as capture, serving(settings, ticks_found=TicksFound) as control:
        await_live(control, "ticks_found")
        execute(settings, MORE)
        capture.reach()
        await_told(settings, "ticks_found", *told)
        assert len(found(busy.address())) == 20, "readers keep what they had"
        with serving(settings, again=Again):
            await_told(settings, "again", *told)
            assert found(busy.address(), "again") == {}
            busy.stop()
            elasticsearch.start()
            await_live(control, "again")
            for index in ("found", "again"):
                eventually(f"{index} goes on", lambda: found(busy.address(), index) == selected(settings))  # noqa: B023  called at once


WATERMARKS = ("low", "high", "flood_stage")


def watermarks(cluster: Callable[..., None], free: str) -> None:
    """Say that the disk is full when less than that is free."""
    marks = {f"cluster__routing__allocation__disk__watermark__{name}": free for name in WATERMARKS}
    cluster(cluster__info__update__interval="10s", cluster__routing__allocation__disk__threshold_enabled=True, **marks)


def test_elasticsearch_whose_disk_is_full(
    settings: Settings, elasticsearch: Elasticsearch, cluster: Callable[..., None]
) -> None:
    """The flood stage: indices may only be read, or deleted. Elasticsearch takes that back by itself."""
    prepare(settings, *MAKE)
    told = ("elasticsearch-blocked", "flood-stage watermark", "ticks_found", "found-g1/_settings")
    with capturing(settings) as capture, serving(settings, ticks_found=TicksFound) as control:
        await_live(control, "ticks_found")
        watermarks(cluster, "1000tb")
        with Client(elasticsearch.address()) as client:
            block = "index.blocks.read_only_allow_delete"
            eventually(
                "it is blocked",
                lambda: client.indices.get_settings(index="found-g1", flat_settings=True)["found-g1"]["settings"].get(
                    block
                ),
            )
        execute(settings, TICK)
        capture.reach()
        await_told(settings, "ticks_found", *told)
        assert set(found(elasticsearch.address()).values()) == {0}, "readers keep what they had"
        watermarks(cluster, "1b")
        eventually("it goes on", lambda: found(elasticsearch.address()) == selected(settings), 120)


def test_an_index_that_somebody_has_blocked(settings: Settings, elasticsearch: Elasticsearch) -> None:
    """Elasticsearch does not take that back, and status has the command."""
    prepare(settings, *MAKE)
    with capturing(settings), serving(settings, ticks_found=TicksFound) as control:
        await_live(control, "ticks_found")
        with Client(elasticsearch.address()) as client:
            client.indices.add_block(index="found-g1", block="write")
            execute(settings, TICK)
            await_told(
                settings, "ticks_found", "elasticsearch-blocked", "found-g1/_settings", '"index.blocks.write":null'
            )
            client.indices.put_settings(index="found-g1", settings={"index.blocks.write": None})
        eventually("it goes on", lambda: found(elasticsearch.address()) == selected(settings))


# Disks of our own


@pytest.mark.usefixtures("redis_server")
def test_a_folder_of_local_rows_that_is_full(settings: Settings, disk: Disk) -> None:
    settings = replace(settings, state=str(disk.path))
    prepare(settings, *MAKE, WIDE, LARGE)
    told = ("local-state", "HEADRACE_STATE")
    with capturing(settings) as capture:
        capture.reach()
        with disk.full(), serving(settings, ticks_pages=TicksPages):
            await_told(settings, "ticks_pages", *told)
        with ExitStack() as ends, ExitStack() as full:
            full.enter_context(disk.full(but=1 << 20))
            control = ends.enter_context(serving(settings, ticks_pages=TicksPages))
            await_told(settings, "ticks_pages", *told)
            full.close()
            await_live(control, "ticks_pages")
            assert paged(settings) == selected(settings)
            with disk.full():
                execute(settings, TICK, "UPDATE ticks SET wide = wide || 'more', n = n + 1")
                await_told(settings, "ticks_pages", *told)
            eventually("it goes on", lambda: paged(settings) == selected(settings))


def test_a_warehouse_on_a_full_disk(settings: Settings, disk: Disk, system: System) -> None:
    system.environment["HEADRACE_WAREHOUSE"] = str(disk.path / "warehouse.duckdb")
    told = ("warehouse-io", "HEADRACE_WAREHOUSE")
    execute(settings, *MAKE, WIDE, LARGE)
    system.run("setup", "--apply")
    system.start("capture", "capture")
    with disk.full(but=1 << 20):
        system.start("warehouse", "run", "warehouse")
        await_told(settings, "warehouse", *told)
    system.wait("it to be live", lambda: system.is_live("warehouse"))
    system.settle("warehouse")
    for _ in range(3):
        with disk.full():
            execute(settings, TICK, "UPDATE ticks SET wide = wide || md5(wide), n = n + 1")
            await_told(settings, "warehouse", *told)
            ask(settings.warehouse_listen, "SELECT count(*), min(n), max(n) FROM ticks")
        system.settle("warehouse")
    system.verify("warehouse")


def test_a_warehouse_that_is_made_on_a_full_disk_waits(disk: Disk) -> None:
    file = disk.path / "warehouse.duckdb"
    with disk.full():
        for _ in range(2):
            with pytest.raises(Transient) as error:
                Database.opened(str(file), "1GB")
            assert error.value.code == "warehouse-io"
    database = Database.opened(str(file), "1GB")
    with database.writing(database.lend()):
        pass
    database.release()
    assert not file.with_name(f"{file.name}.broken").exists()


def test_a_warehouse_that_duckdb_gives_up_is_opened_anew(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed is durable, but there is no room to move it from the write-ahead log into the file."""
    monkeypatch.setitem(headrace.stores.duckdb.database._CONFIG, "checkpoint_threshold", "16MB")  # the disk is small
    file = str(disk.path / "warehouse.duckdb")
    first = Database.opened(file, "1GB")
    cursor, idle = first.lend(), first.lend()
    with first.writing(cursor):
        cursor.execute("CREATE TABLE t (n int, wide text)")

    def write(*numbers: int) -> None:
        for n in numbers:
            tried.append(n)
            with first.writing(cursor):
                cursor.execute("DELETE FROM t")
                cursor.execute(f"INSERT INTO t SELECT {n}, repeat(md5(random()::text), 500) FROM range(400)")  # 6 MB

    def numbers(cursor: Any) -> Any:
        with first.looking(cursor):
            return cursor.execute("SELECT DISTINCT n FROM t").fetchall()

    tried: list[int] = []
    write(1, 2)
    with disk.full(but=14 << 20):
        with pytest.raises(Transient, match="COMMIT succeeded") as error:
            write(3, 4, 5)  # one of them is beyond what the write-ahead log may have
        assert error.value.code == "warehouse-io"
        with pytest.raises(Transient):
            numbers(idle)
        assert Database.opened(file, "1GB") is first
        with pytest.raises(Transient, match="closed"):
            numbers(cursor)
        cursor = first.lend()
        assert numbers(cursor) == [(tried[-1],)], "it is as durable as it was said to be"
    write(6)
    assert numbers(cursor) == [(6,)]
    first.release()
    first.release()
