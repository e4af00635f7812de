"""The warehouse against a linear model: after any history, with crashes and replays, readers see a state that Postgres had."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.change import NOWHERE, Change, Version
from headrace.settings import Settings
from headrace.stores.duckdb import DuckDBStore
from tests.fixtures.tables import FIRST, batch, gone, put, schema

SHAPES = {
    "public.a": [
        schema("public.a", 1, id="integer", x="text", d="date"),
        schema("public.a", 2, id="integer", x="text", d="date", more="numeric(6,2)"),
        schema("public.a", 3, id="integer", d="date", more="numeric(6,2)"),
        schema("public.a", 4, id="integer", d="text", more="numeric"),
    ],
    "other.b": [schema("other.b", 1, id="text", x="jsonb")],
}
SCHEMAS = tuple(each for shapes in SHAPES.values() for each in shapes)
VALUES: dict[str, list[Any]] = {
    "x": [None, "", "é"],
    "d": [None, "2026-01-01", "0044-03-15 BC", "infinity"],
    "more": [None, "1.50", "NaN"],
}
OPERATION = st.tuples(st.sampled_from(["a", "a", "b"]), st.integers(1, 4), st.booleans(), st.integers(0, 11))
STEP = st.tuples(st.lists(OPERATION, max_size=6), st.sampled_from(["state", "state", "piece", "crash", "shape"]))

State = dict[tuple[str, str], dict[str, Any]]


class Model:
    """The linear truth: every change in order, and the state after each."""

    def __init__(self) -> None:
        self.log: list[Change] = []
        self.shape = 0

    def add(self, operations: Sequence[tuple[str, int, bool, int]]) -> None:
        for letter, number, delete, choice in operations:
            lsn = len(self.log) + 1
            if letter == "b":
                of, key, values = SHAPES["other.b"][0], str(number), {"x": [None, [1], {"n": 1.5}][choice % 3]}
            else:
                of, key = SHAPES["public.a"][self.shape], number
                names = [column.name for column in of.columns[1:]]
                values = {name: VALUES[name][choice % len(VALUES[name])] for name in names}
            self.log.append(gone(of, lsn, key) if delete else put(of, lsn, id=key, **values))

    def state(self, at: int) -> State:
        rows: State = {}
        newest: dict[str, int] = {}
        for change in self.log[:at]:
            place = (change.table, change.key.decode())
            rows.pop(place, None)
            if change.row is not None:
                rows[place] = change.row
            newest[change.table] = max(newest.get(change.table, 0), change.schema)
        return {place: _shaped(row, SHAPES[place[0]][newest[place[0]] - 1]) for place, row in rows.items()}


def _shaped(row: dict[str, Any], of: Any) -> dict[str, Any]:
    return {column.name: row.get(column.name) for column in of.columns}


def seen(store: DuckDBStore, page: int) -> State:
    found: State = {}
    after = None
    while rows := store.scan(after, page):
        found |= {(row.collection, row.key): row.value for row in rows}
        after = (rows[-1].collection, rows[-1].key)
    return found


class View:
    """The store, fed from the model's log as a reader would, from wherever it durably is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.copies = 0
        self.at = self.shown = 0
        self._open(folder / "0.duckdb")

    def _open(self, file: Path) -> None:
        self.store = DuckDBStore(Settings(warehouse=str(file), warehouse_memory="256MB"), "warehouse")
        position = self.store.open(FIRST)
        assert (position.offsets["shop.public.t"][0] if position else 0) == self.at
        assert (position.version if position else NOWHERE) == (Version(1, self.shown) if self.shown else NOWHERE)

    def feed(self, model: Model, *, whole: bool, cut: int) -> None:
        """Bring everything that is new in pieces of `cut` changes; the last completes a state if `whole`."""
        new = model.log[self.at :]
        while len(new) > cut:
            self._piece(new[:cut], whole=False)
            new = new[cut:]
        self._piece(new, whole=whole)

    def _piece(self, changes: Sequence[Change], *, whole: bool) -> None:
        at = self.at + len(changes)
        if not at:
            return
        known = tuple(SHAPES[table][version - 1] for table, version in sorted({(c.table, c.schema) for c in changes}))
        self.store.apply(batch(at, *changes, schemas=known, shown=None if whole else self.shown))
        self.at = at
        if whole:
            self.shown = at

    def crash(self) -> None:
        """Go on from what a kill would have left on disk."""
        self.copies += 1
        file = self.folder / f"{self.copies}.duckdb"
        for suffix in ("", ".wal"):
            was = self.folder / f"{self.copies - 1}.duckdb{suffix}"
            if was.exists():
                shutil.copy(was, f"{file}{suffix}")
        self.store.close()
        self._open(file)


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(st.lists(STEP, min_size=1, max_size=10), st.integers(1, 9), st.integers(1, 7))
def test_any_history_with_crashes_ends_in_the_linear_state(
    steps: list[tuple[list[tuple[str, int, bool, int]], str]], cut: int, page: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, view = Model(), View(Path(folder))
        try:
            for operations, then in steps:
                if then == "shape":
                    model.shape = min(model.shape + 1, len(SHAPES["public.a"]) - 1)
                model.add(operations)
                view.feed(model, whole=then == "state", cut=cut)
                if then == "crash":
                    view.crash()
                assert seen(view.store, page) == model.state(view.shown)
            view.feed(model, whole=True, cut=cut)
            assert seen(view.store, page) == model.state(len(model.log))
            assert [row.version.lsn for row in view.store.scan(None, 100)] == _written(model)
        finally:
            view.store.close()


def _written(model: Model) -> list[int]:
    """Return the LSN of each live row, in the order of scan."""
    last = {(change.table, change.key.decode()): change for change in model.log}
    return [last[place].version.lsn for place in sorted(last) if last[place].row is not None]


def test_after_a_kill_the_file_opens_with_columns_of_other_types(tmp_path: Path) -> None:
    """What DuckDB had not moved out of its log yet it does again, without its functions of JSON."""
    model, view = Model(), View(tmp_path)
    every = [(letter, number, False, number) for letter in "ab" for number in range(1, 5)]
    for shape in (1, 3):
        model.shape = shape
        model.add(every if shape == 1 else every[:2])
        view.feed(model, whole=True, cut=100)
    view.crash()
    assert seen(view.store, 100) == model.state(len(model.log))
    view.store.close()
