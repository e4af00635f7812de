"""Documents of any declaration over tables whose shapes change, with kills, losses and restored files, against a join by brute force."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest

from headrace import codec
from headrace.change import Checkpoint
from headrace.consumer import Batch
from headrace.documents import DocumentConsumer
from headrace.settings import Settings
from tests.fixtures import migrated
from tests.fixtures.documents import GENERATION, SOURCE, Killed, Memory, World
from tests.fixtures.migrated_log import EVERY, Trial
from tests.fixtures.seeds import seeds

SEEDS = seeds("1,2,14,22,25,38,41,42")


class Documents(Trial):
    """A view of one declaration."""

    STEPS: ClassVar[dict[str, float]] = {
        "change": 30,
        "migrate": 12,
        "cut": 8,
        "read_again": 6,
        "run": 14,
        "compact": 1,
        "lose": 2,
        "wipe": 1,
        "keep": 3,
        "local_back": 2,
        "view_back": 3,
    }

    def __init__(self, seed: int, folder: str) -> None:
        chance = random.Random(f"migrated documents {seed}")
        self.cls = migrated.views(seed)[chance.choice(["stream", "windows", "texts"])]
        super().__init__(chance, self.cls.tables)
        self.world = World(Settings(state=f"{folder}/state"), self.cls, Memory(), {})
        self._state, self._kept = Path(f"{folder}/state"), Path(f"{folder}/kept")
        self._view: tuple[Any, Any] | None = None

    def _run(self) -> None:
        """Start a process, which may be killed."""
        world, kill = self.world, self.chance.choice([None, None, "before", "middle", "after"])
        piece, most = self.chance.choice([1, 2, 5, EVERY]), self.chance.choice([1, 2, EVERY, EVERY])
        consumer = world.start()
        world.store.kill = kill
        try:
            for number, batch in enumerate(self.log.batches(consumer.open(GENERATION), piece)):
                if number < most:
                    consumer.apply(batch)
        except Killed:
            self.done.append(f"killed {kill}")
        finally:
            world.store.kill = None
            consumer.close()

    def _compact(self) -> None:
        self.log.compact()
        self._view = None  # what is older than that is refused

    def _lose(self) -> None:
        shutil.rmtree(self._state, ignore_errors=True)

    def _wipe(self) -> None:
        self.world.store.wipe()

    def _keep(self) -> None:
        if self._state.exists():
            shutil.rmtree(self._kept, ignore_errors=True)
            shutil.copytree(self._state, self._kept)
            self._view = dict(self.world.store.docs), self.world.store.position

    def _local_back(self) -> None:
        if self._view:
            self._lose()
            shutil.copytree(self._kept, self._state)

    def _view_back(self) -> None:
        if self._view:
            self.world.store.docs, self.world.store.position = dict(self._view[0]), self._view[1]

    def check(self) -> None:
        """What is shown when all is, is the join."""
        self.log.sync()
        consumer = self.world.start()
        for batch in self.log.batches(consumer.open(GENERATION), EVERY):
            consumer.apply(batch)
        if consumer.pending():
            self._hurry(consumer)
        consumer.close()
        shown = {key: _plain(body) for key, body in self.world.store.bodies().items()}
        wanted = {key: body for (_, key), body in self.log.truth().view(self.cls).items()}
        assert shown == wanted
        self.done.append("equal")

    def _hurry(self, consumer: DocumentConsumer) -> None:
        position = consumer.open(GENERATION)
        assert position is not None
        checkpoint = Checkpoint(position.version, 0, 0, position.offsets, SOURCE)
        consumer.apply(Batch([], position, checkpoint, loading=False, hurry=True))


def _plain(body: Any) -> Any:
    return codec.loads(body["json"]) if "json" in body else body


@pytest.mark.parametrize("seed", SEEDS)
def test_documents_of_any_declaration_after_any_migrations_are_the_join(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Documents(seed, folder).live()
