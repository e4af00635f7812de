"""The warehouse over tables whose shapes change, killed at any call of DuckDB, wiped or put back, against the rows themselves."""

from __future__ import annotations

import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from headrace import codec
from headrace.settings import Settings
from headrace.stores.duckdb import Database, DuckDBStore
from tests.fixtures.documents import GENERATION, Killed
from tests.fixtures.dying import Cursor
from tests.fixtures.migrated_log import EVERY, Trial
from tests.fixtures.seeds import seeds

SEEDS = seeds("1,2,4")


class File(Trial):
    """The warehouse's."""

    STEPS: ClassVar[dict[str, float]] = {
        "change": 30,
        "migrate": 14,
        "cut": 8,
        "read_again": 6,
        "run": 8,
        "compact": 1,
        "wipe": 0.5,
        "keep": 1,
        "put_back": 1,
    }

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__(random.Random(f"migrated warehouse {seed}"))
        self._folder, self._lives, self._left = folder, 0, EVERY
        self._settings = Settings(warehouse=str(folder / "0.duckdb"), warehouse_memory="256MB")
        self._kept: dict[str, bytes] = {}

    def count(self) -> None:
        """Die before the step that was drawn."""
        self._left -= 1
        if not self._left:
            raise Killed

    def _run(self) -> None:
        """Start a process, which may be killed amid it or at its end."""
        store, dies = DuckDBStore(self._settings, "warehouse"), self.chance.random() < 0.8
        piece, last = self.chance.choice([1, 2, 5, EVERY]), self.chance.choice([EVERY, self.chance.randint(1, 60)])
        try:
            position = store.open(GENERATION)
            self._left = last
            for batch in self.log.batches(position, piece):
                store.apply(batch)
        except Killed:
            dies = True
        self._left = EVERY
        if dies:
            self._die()
        store.close()

    def _die(self) -> None:
        """Go on from what a kill would have left on disk."""
        self.done.append("killed")
        self._lives += 1
        name = f"{self._lives}.duckdb"
        for file in self._files():
            shutil.copy(file, self._folder / (name + file.name.partition(".duckdb")[2]))
        self._settings = replace(self._settings, warehouse=str(self._folder / name))

    def _files(self) -> list[Path]:
        return list(self._folder.glob(f"{Path(self._settings.warehouse).name}*"))

    def _compact(self) -> None:
        self.log.compact()
        self._kept.clear()  # what is older than that is refused

    def _wipe(self) -> None:
        for file in self._files():
            file.unlink()

    def _keep(self) -> None:
        self._kept = {file.name.partition(".duckdb")[2]: file.read_bytes() for file in self._files()}

    def _put_back(self) -> None:
        if self._kept:
            self._wipe()
        for suffix, content in self._kept.items():
            Path(self._settings.warehouse + suffix).write_bytes(content)

    def check(self) -> None:
        """What is shown when all is, is what Postgres has."""
        self.log.sync()
        store = DuckDBStore(self._settings, "warehouse")
        for batch in self.log.batches(store.open(GENERATION), self.chance.choice([1, 3, EVERY])):
            store.apply(batch)
        shown = {f"{row.collection} {row.key}": row.value for row in store.scan(None, 10_000)}
        store.close()
        wanted = {" ".join(key): row for key, row in self.log.truth().view(DuckDBStore).items()}
        assert codec.loads(codec.dumps(shown)) == wanted
        self.done.append("equal")


@pytest.mark.parametrize("seed", SEEDS)
def test_the_warehouse_after_any_migrations_and_kills_is_what_postgres_has(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trial, cursor = File(seed, Path(folder)), Database.cursor
        monkeypatch.setattr(Database, "cursor", lambda of: Cursor(cursor(of), trial.count))
        trial.live()
