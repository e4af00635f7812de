"""A warehouse killed between any two steps goes on from a state that it had, and ends where an unbroken one does.

The killed process is real and gets a real SIGKILL, right before its n-th call of DuckDB, for every n that there is.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headrace.change import NOWHERE, Version
from headrace.consumer import Batch
from headrace.settings import Settings
from headrace.stores.duckdb import DuckDBStore
from tests.fixtures.tables import FIRST, batch, gone, put, schema

V1 = schema("public.items", 1, id="integer", name="text", d="date")
V2 = schema("public.items", 2, id="integer", d="date", price="numeric(6,2)")
TAGS = schema("sales.tags", id="integer", tag="text")

BATCHES = [
    batch(1, put(V1, 1, id=1, name="a"), put(V1, 1, id=2, name="b"), schemas=(V1,), shown=0),
    batch(2, put(V1, 2, id=1, name="c"), gone(V1, 2, 2), schemas=(V1,)),
    batch(3, put(V1, 3, id=3, name="d"), put(TAGS, 3, id=1, tag="x"), schemas=(V1, TAGS)),
    batch(4, put(V1, 4, id=1, name="half"), schemas=(V1,), shown=3),
    batch(5, put(V2, 5, id=3, d="0044-03-15 BC", price="1.50"), gone(TAGS, 5, 1), schemas=(V2, TAGS), shown=3),
    batch(6, put(V2, 6, id=4, price="2.00"), schemas=(V2,)),
]
STATES = {
    0: {},
    2: {("public.items", 1): "c"},
    3: {("public.items", 1): "c", ("public.items", 3): "d", ("sales.tags", 1): "x"},
    6: {("public.items", 1): None, ("public.items", 3): "1.50", ("public.items", 4): "2.00"},
}

# Forks a child for each step; the child opens the store, applies everything, promotes, and is killed before its n-th call.
KILLER = """
import os, signal, sys
from headrace.settings import Settings
from headrace.stores.duckdb import Database, DuckDBStore
from tests.fixtures.tables import FIRST
from tests.integration.test_warehouse_kill import BATCHES

class Counting:
    def __init__(self, cursor, before):
        self._cursor, self._before = cursor, before
    def __getattr__(self, name):
        found = getattr(self._cursor, name)
        if name not in {"execute", "begin", "commit", "register"}:
            return found
        def call(*args):
            self._before()
            result = found(*args)
            return self if result is self._cursor else result
        return call

def child(file, step):
    count = 0
    def before():
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
    plain = Database.cursor
    Database.cursor = lambda self: Counting(plain(self), before)
    store = DuckDBStore(Settings(warehouse=file, warehouse_memory="256MB"), "warehouse")
    store.open(FIRST)
    for batch in BATCHES:
        store.apply(batch)
        if batch.position.version.lsn == 2:
            store.promote()
    os._exit(7)

folder, first, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
step = first
while True:
    pid = os.fork()
    if pid == 0:
        try:
            child(f"{folder}/{step}.duckdb", step)
        finally:
            os._exit(9)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != -signal.SIGKILL:
        sys.exit(0 if status == 7 else f"step {step}: {status}")
    print(step, flush=True)
    step += every
"""


def shown(store: DuckDBStore) -> dict[tuple[str, int], object]:
    name = {"public.items": ("price", "name"), "sales.tags": ("tag",)}
    found = {}
    for row in store.scan(None, 100):
        column = next(column for column in name[row.collection] if column in row.value)
        found[row.collection, row.value["id"]] = row.value[column]
    return found


def rest(at: int) -> list[Batch]:
    return [each for each in BATCHES if each.position.offsets["shop.public.t"][0] > at]


@pytest.mark.timeout(1200)  # each of its calls waits for the disk, on which others may write
def test_killed_before_any_call_of_duckdb_it_goes_on_from_a_state_it_had(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), "1", "1"],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    steps = [int(line) for line in done.stdout.split()]
    assert len(steps) > 60
    reached = set()
    for step in steps:
        store = DuckDBStore(Settings(warehouse=str(tmp_path / f"{step}.duckdb"), warehouse_memory="256MB"), "warehouse")
        position = store.open(FIRST)
        views = store._opened().cursor().execute("SELECT count(*) FROM duckdb_views() WHERE NOT internal").fetchall()
        assert (views[0][0] > 0) == any(each.live for each in store.generations()), f"step {step}"
        at = position.offsets["shop.public.t"][0] if position else 0
        version = position.version if position else NOWHERE
        assert shown(store) == STATES[version.lsn], f"step {step}"
        for each in rest(at):
            store.apply(each)
        assert shown(store) == STATES[6], f"step {step}"
        assert store._opened().cursor().execute("SELECT count(*) FROM g1._staged").fetchall() == [(0,)]
        reached.add((at, version.lsn))
        store.promote()
        store.close()
    assert reached == {(0, 0), (1, 0), (2, 2), (3, 3), (4, 3), (5, 3)}


@pytest.mark.parametrize("version", [Version(1, 2), Version(1, 6)])
def test_the_model_of_this_test_is_what_an_unbroken_one_shows(tmp_path: Path, version: Version) -> None:
    store = DuckDBStore(Settings(warehouse=str(tmp_path / "w.duckdb"), warehouse_memory="256MB"), "warehouse")
    store.open(FIRST)
    for each in BATCHES:
        store.apply(each)
        if each.position.version == version:
            assert shown(store) == STATES[version.lsn]
    store.close()
