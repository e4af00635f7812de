"""The file of the warehouse: lost, damaged, somebody else's, or not to be opened now."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from headrace.errors import HeadraceError, Misconfigured, Transient
from headrace.settings import Settings
from headrace.stores.duckdb import Database, DuckDBStore, query
from tests.fixtures.tables import FIRST, SECOND, batch, put
from tests.fixtures.warehouses import ITEMS, TAGS, ask, rows
from tests.unit.test_duckdb_store import settings, store

__all__ = ["settings", "store"]


def test_a_file_that_must_be_opened_anew_waits_for_a_query_that_runs(store: DuckDBStore, settings: Settings) -> None:
    """What holds the file is told as busy, and not as a fault; without the query it is opened, with what was committed."""
    store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), schemas=(ITEMS,)))
    database = Database.opened(settings.warehouse, settings.warehouse_memory)
    running, ended = threading.Event(), threading.Event()

    def batches() -> Iterator[pa.RecordBatch]:
        running.set()
        ended.wait(60)
        yield pa.record_batch({"n": [1]})

    with database.cursor() as cursor:
        cursor.register("slow", pa.RecordBatchReader.from_batches(pa.schema({"n": pa.int64()}), batches()))
        asker = threading.Thread(target=lambda: cursor.execute("SELECT sum(n) FROM slow").fetchall())
        asker.start()
        running.wait(60)
        database._gave_up = True
        with pytest.raises(Transient, match="cannot write"):
            database.renew()
        ended.set()
        asker.join()
    store.close()
    database.renew()
    assert store.open(FIRST) is not None
    assert rows(store) == {("public.items", '{"id":1}'): {"id": 1, "name": "a"}}
    database.release()


def test_a_lost_file_is_made_anew(store: DuckDBStore, settings: Settings) -> None:
    store.apply(batch(10, put(ITEMS, 10, id=1), schemas=(ITEMS,)))
    store.close()
    Path(settings.warehouse).unlink()
    assert store.generations() == []
    assert store.open(FIRST) is None


@pytest.mark.parametrize("damage", ["garbage", "cut", "flipped", "empty"])
def test_a_damaged_file_is_set_aside_and_made_anew(store: DuckDBStore, settings: Settings, damage: str) -> None:
    store.apply(batch(10, *(put(ITEMS, 10, id=n, name=str(n)) for n in range(5000)), schemas=(ITEMS,)))
    store.close()
    file = Path(settings.warehouse)
    data = bytearray(file.read_bytes())
    if damage == "garbage":
        data = bytearray(b"not a database" * 1000)
    elif damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flipped":
        data[4096 : 3 * 4096] = b"\xff" * 8192
    else:
        data.clear()
    file.write_bytes(data)
    if damage == "cut":  # DuckDB opens this one and finds out when it reads
        with pytest.raises(Misconfigured, match="is damaged"):
            store.open(FIRST)
        store.close()
    assert store.generations() == []
    assert store.open(FIRST) is None
    assert file.with_name("w.duckdb.broken").read_bytes() == bytes(data)
    store.apply(batch(10, put(ITEMS, 10, id=1), schemas=(ITEMS,)))
    assert len(store.scan(None, 9)) == 1


def _killed(settings: Settings, *statements: str) -> None:
    """Run statements whose effect stays in the write-ahead log."""
    script = f"import duckdb, os; connection = duckdb.connect({settings.warehouse!r})\n"
    script += "\n".join(f"connection.execute({each!r})" for each in statements)
    subprocess.run([sys.executable, "-c", f"{script}\nos._exit(0)"], check=True)


def test_whichever_block_is_damaged_below_the_write_ahead_log_it_is_told_as_damage(settings: Settings) -> None:
    """DuckDB finds one as it replays the log, and calls that a transaction that failed: no waiting mends it."""
    script = f"""
import os
from headrace.settings import Settings
from headrace.stores.duckdb import DuckDBStore
from tests.fixtures.tables import FIRST, batch, put
from tests.fixtures.warehouses import ITEMS
store = DuckDBStore(Settings(warehouse={settings.warehouse!r}), "warehouse")
for lsn in range(10, 15):
    store.open(FIRST)
    store.apply(batch(lsn, *(put(ITEMS, lsn, id=n, name=str(n)) for n in range(100)), schemas=(ITEMS,)))
    if lsn < 13:
        store.close()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
    file, log = Path(settings.warehouse), Path(f"{settings.warehouse}.wal")
    whole, logged, found = file.read_bytes(), log.read_bytes(), set[str]()
    for at in range(12288, len(whole), 262144):
        file.write_bytes(whole[: at + 100] + bytes([whole[at + 100] ^ 1]) + whole[at + 101 :])
        log.write_bytes(logged)
        store = DuckDBStore(settings, "warehouse")
        try:
            found.add(str(len(store.generations())))
        except HeadraceError as error:
            found.add(error.code)
    assert found <= {"0", "1", "warehouse-damaged"}
    assert "0" in found


def test_who_reads_what_is_damaged_is_told_what_loads_it_anew(store: DuckDBStore, settings: Settings) -> None:
    """Nobody else reads it: without that the process goes on, and finds nothing wrong when it is started again."""
    store.apply(batch(10, *(put(ITEMS, 10, id=n, name=str(n)) for n in range(5000)), schemas=(ITEMS,)))
    store.promote()
    store.close()
    file = Path(settings.warehouse)
    whole, said = file.read_bytes(), set[str]()
    for at in range(12288, len(whole), 262144):
        file.write_bytes(whole[: at + 100] + bytes([whole[at + 100] ^ 1]) + whole[at + 101 :])
        database = Database.opened(settings.warehouse, settings.warehouse_memory)
        try:
            query(database, "SELECT sum(id), max(name) FROM items", rows=9, seconds=60)
        except HeadraceError as error:
            if not list(file.parent.glob("*.broken")):  # else that was seen as it was opened
                said.add(f"{error.code} {error.remedy}")
        database.release()
        for each in file.parent.glob("w.duckdb*"):
            each.unlink()
    (told,) = said
    assert told.startswith("warehouse-damaged Before")
    assert f"touch {file}.damaged" in told


def test_what_a_file_that_cannot_be_opened_is_refused_with_opens_a_new_one(
    store: DuckDBStore, settings: Settings
) -> None:
    """Its write-ahead log has what DuckDB cannot do before it has loaded its extensions."""
    store.apply(batch(10, put(ITEMS, 10, id=1, name="1"), schemas=(ITEMS,)))
    store.close()
    _killed(settings, 'ALTER TABLE g1."public.items" ALTER name TYPE VARCHAR USING to_json(name)::VARCHAR')
    for _ in range(2):
        with pytest.raises(Misconfigured, match="replaying") as refused:
            store.generations()
        assert refused.value.code == "warehouse-failed"
    command = refused.value.remedy.partition("run: ")[2].partition(". ")[0]
    subprocess.run(shlex.split(command), check=True)
    assert store.open(FIRST) is None
    store.apply(batch(10, put(ITEMS, 10, id=1), schemas=(ITEMS,)))
    assert len(store.scan(None, 9)) == 1
    assert Path(f"{settings.warehouse}.wal.broken").exists()


@pytest.mark.parametrize("scarce", ["files", "memory"])
def test_a_whole_file_that_cannot_be_opened_now_is_left_as_it_is(
    store: DuckDBStore, settings: Settings, scarce: str
) -> None:
    """The process is short of something as it starts; the next attempt finds the view where it was."""
    store.apply(batch(10, *(put(ITEMS, 10, id=n, name=str(n) * 500) for n in range(9000)), schemas=(ITEMS,)))
    store.close()
    script = f"""
import os, resource, duckdb
real = duckdb.connect
if {scarce == "memory"}:
    with real({settings.warehouse!r}, config={{"checkpoint_threshold": "1GB"}}) as large:
        large.execute("PRAGMA disable_checkpoint_on_shutdown")
        large.execute("CREATE TABLE g1.more AS SELECT range AS n, repeat(md5(range::text), 2) AS text FROM range(300000)")
        large.execute("UPDATE g1.more SET text = text || 'x' WHERE n % 2 = 0")
    duckdb.connect = lambda path, config: real(path, config=config | {{"memory_limit": "8MB"}})
from headrace.settings import Settings
from headrace.stores.duckdb import Database
if {scarce == "files"}:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    last = max(os.dup(0) for _ in range(64 - len(os.listdir("/proc/self/fd")) + 1))
    os.close(last)
try:
    Database.opened({settings.warehouse!r}, "1GB")
except Exception as error:
    print(type(error).__name__, error.code, error.remedy)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    expected = {"files": "Transient warehouse-io See the message", "memory": "Transient warehouse-memory"}
    assert said.startswith(expected[scarce])
    assert not list(Path(settings.warehouse).parent.glob("*.broken"))
    assert [found.number for found in store.generations()] == [1]


def test_an_attempt_that_failed_while_the_file_was_given_up_can_be_closed(
    store: DuckDBStore, settings: Settings
) -> None:
    other = DuckDBStore(settings, "warehouse")
    database = Database.opened(settings.warehouse, settings.warehouse_memory)
    database._root.close()
    with pytest.raises(Transient):
        other.open(FIRST)
    other.close()
    assert database.users == 2
    database.release()


def test_what_was_set_aside_before_is_kept(store: DuckDBStore, settings: Settings) -> None:
    store.close()
    file = Path(settings.warehouse)
    for text in ("first", "second"):
        file.write_text(text)
        assert store.generations() == []
    assert [file.with_name(f"w.duckdb.{name}").read_text() for name in ("broken", "broken2")] == ["first", "second"]


def test_a_file_that_another_process_has_is_refused(settings: Settings) -> None:
    script = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, settings.warehouse], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(Misconfigured, match=rf"w\.duckdb.*PID {other.pid}") as raised:
            DuckDBStore(settings, "warehouse").open(FIRST)
        assert raised.value.code == "warehouse-locked"
        other.communicate()


def test_somebody_elses_database_is_refused_and_left_alone(settings: Settings) -> None:
    with duckdb.connect(settings.warehouse) as bare:
        bare.execute("CREATE TABLE mine AS SELECT 1")
    store = DuckDBStore(settings, "warehouse")
    with pytest.raises(Misconfigured, match="did not make"):
        store.open(FIRST)
    store.close()
    with duckdb.connect(settings.warehouse) as bare:
        assert bare.execute("SHOW TABLES").fetchall() == [("mine",)]


def test_a_folder_in_place_of_the_file_is_misconfigured(settings: Settings) -> None:
    Path(settings.warehouse).mkdir()
    with pytest.raises(Misconfigured, match="cannot be opened"):
        DuckDBStore(settings, "warehouse").open(FIRST)


def test_a_size_that_is_none_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="HEADRACE_WAREHOUSE_MEMORY='much'"):
        DuckDBStore(Settings(warehouse=str(tmp_path / "w"), warehouse_memory="much"), "warehouse").open(FIRST)


def test_a_file_of_another_consumer_is_refused_and_left_as_it_is(store: DuckDBStore, settings: Settings) -> None:
    store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), schemas=(ITEMS,)))
    store.promote()
    sales = DuckDBStore(settings, "sales")
    for attempt in (sales.generations, lambda: sales.open(FIRST), lambda: sales.open(SECOND)):
        with pytest.raises(Misconfigured, match="is of warehouse, not of sales") as error:
            attempt()
        assert error.value.code == "view-of-another"
        assert "HEADRACE_WAREHOUSE" in error.value.remedy
        sales.close()
    assert ask(settings, "SELECT name FROM items").rows == [["a"]]
    assert [(found.consumer, found.number, found.live) for found in store.generations()] == [("warehouse", 1, True)]


def test_a_file_that_says_no_consumer_is_of_who_opens_it_first(store: DuckDBStore, settings: Settings) -> None:
    store.close()
    with duckdb.connect(settings.warehouse) as raw:
        raw.execute("DROP TABLE headrace.consumer")
    sales = DuckDBStore(settings, "sales")
    assert [found.number for found in sales.generations()] == [1]
    sales.open(FIRST)
    sales.close()
    with pytest.raises(Misconfigured, match="is of sales, not of warehouse"):
        store.open(FIRST)


@pytest.mark.parametrize("name", ["headrace", "Headrace", "g1", "g2.old", "public", "information_schema"])
def test_a_file_that_duckdb_would_take_for_a_schema_in_it_is_refused(tmp_path: Path, name: str) -> None:
    refused = DuckDBStore(Settings(warehouse=str(tmp_path / f"{name}.duckdb"), warehouse_memory="1GB"), "warehouse")
    with pytest.raises(Misconfigured, match="would take it for the file's") as error:
        refused.open(FIRST)
    assert (error.value.code, list(tmp_path.iterdir())) == ("warehouse-file", [])


@pytest.mark.parametrize("name", ["main", "system", "sales", "warehouse"])
def test_a_file_of_another_name_works_through_a_rebuild(tmp_path: Path, name: str) -> None:
    settings = Settings(warehouse=str(tmp_path / f"{name}.duckdb"), warehouse_memory="1GB")
    store = DuckDBStore(settings, "warehouse")
    for generation in (FIRST, SECOND):
        store.open(generation)
        store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), put(TAGS, 10, id=1, tag="x"), schemas=(ITEMS, TAGS)))
        store.promote()
        tagged = "SELECT name, tag FROM items JOIN public.items USING (name), " + (
            "sales_.tags" if name == "sales" else "sales.tags"
        )
        assert ask(settings, tagged).rows == [["a", "x"]]
    store.close()
