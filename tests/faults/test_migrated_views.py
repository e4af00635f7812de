"""Views of every store while tables are migrated, their process is killed, and what they keep is lost or put back from an older copy.

Tables, declarations and all that happens are drawn from a seed. Whenever it rests, each view holds what Postgres has, by a join in Python
(`tests.fixtures.migrated`), and `headrace verify` says so too; verify finds nothing wrong while rows change. From step to step capture
changes from JSON to Avro and back.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from elasticsearch import Elasticsearch as Client

from headrace import codec
from headrace.control import Control
from headrace.errors import HeadraceError, Transient
from headrace.log import Log
from headrace.settings import Settings, environment
from tests.fixtures import migrated
from tests.fixtures.capture import capturing, eventually, execute, prepare
from tests.fixtures.meanwhile import over_and_over
from tests.fixtures.migrated_sources import Edits
from tests.fixtures.seeds import seeds, steps
from tests.fixtures.verified import found

SEEDS = seeds("1")
STEPS = steps(1)
PATIENCE = 180.0
STEP = ("work", "kill", "kill", "lose", "lose", "steps", "steps", "rebuild", "rebuild", "compare_amid")
LOSSES = ("local", "local_back", "pages", "pages_back", "warehouse", "warehouse_back", "topics", "indices")
CLEAN, REFUSED = "clean", "refused:"
RUN = "from tests.fixtures.migrated import main; main({})"


class Trial:
    """One seed: the process of its views, and what is done to it."""

    def __init__(self, settings: Settings, seed: int, folder: Path) -> None:
        self.settings, self.seed = settings, seed
        self.chance = random.Random(f"migrated {seed}")
        self.views = migrated.views(seed)
        self.edits = Edits(settings, self.chance)
        self.log = Log(settings)
        self.control = Control(self.log)
        self._out, self._kept = folder / "views.out", folder / "kept"
        self._pages: dict[bytes, bytes] = {}
        self._ddl = self.chance.choice([0.0, 0.15, 0.3, 0.5])

    def start(self, die_before: int = 0) -> None:
        environ = environment(self.settings) | {"PATH": "/usr/bin:/bin", migrated.DIE_BEFORE: str(die_before)}
        with self._out.open("a") as out:
            command = [sys.executable, "-c", RUN.format(self.seed)]
            self.process = subprocess.Popen(command, env=environ, stdout=out, stderr=out)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def say(self, what: str) -> None:
        self.edits.done.append(f"-- {what}")

    def told(self) -> str:
        """Return what a failure is understood by."""
        return "\n".join([f"seed {self.seed}", *self.edits.done, self._out.read_text()[-2000:]])

    # What happens

    def step(self) -> None:
        what = self.chance.choice(STEP)
        self.say(what)
        getattr(self, f"_{what}")()
        if self.chance.random() < 0.7:
            self.compare()

    def _some(self, least: int, most: int) -> None:
        self.edits.work(self.chance.randint(least, most), self._ddl)

    def _work(self) -> None:
        self._some(1, 12)

    def _kill(self) -> None:
        self._some(0, 6)
        time.sleep(self.chance.choice([0, 0.05, 0.2, 0.5]))
        self.kill()
        self._some(0, 6)
        self.start()
        if self.chance.random() < 0.4:
            time.sleep(self.chance.random() * 4)
            self.kill()
            self.start()

    def _steps(self) -> None:
        """Let it die before a step that is drawn, once or twice, with something lost perhaps."""
        self.kill()
        self._some(1, 8)
        if self.chance.random() < 0.5:
            self._lost()
        for _ in range(self.chance.randint(1, 2)):
            self.start(self.chance.choice([self.chance.randint(1, 100), self.chance.randint(100, 1200)]))
            until = time.monotonic() + 12
            while self.process.poll() is None and time.monotonic() < until:
                self._some(0, 1)
                time.sleep(0.2)
            self.say("it lives" if self.process.poll() is None else "it died")
            self.kill()
        self.start()

    def _lose(self) -> None:
        self._some(0, 4)
        self.kill()
        self._copy()
        self._some(0, 4)
        self.start()
        if self.chance.random() < 0.5:
            self.compare()
        self._some(1, 5)
        self.kill()
        self._lost()
        self._some(0, 3)
        self.start()

    def _rebuild(self) -> None:
        names = self.chance.sample(list(self.views), self.chance.randint(1, 2))
        shutil.rmtree(self._kept, ignore_errors=True)  # what was kept knows of no such generation
        self._ask(names, "rebuild")
        self._some(1, 5)
        if self.chance.random() < 0.4:
            self.kill()
            self._some(0, 3)
            if self.chance.random() < 0.3:
                self._lose_local()
            self.start()
        self._ask(names, "promote")
        self._some(0, 3)
        if self.chance.random() < 0.7:
            self._ask(names, "drop")

    def _ask(self, names: list[str], verb: str) -> None:
        self.say(f"{verb} {', '.join(names)}")

        def asked(name: str) -> bool:
            try:
                self.control.ask(name, verb, timeout=60)
            except Transient:
                return False
            except HeadraceError as error:  # it was done, and the answer was lost
                return verb != "rebuild" and error.code in {"nothing-to-promote", "no-such-generation"}
            return True

        for name in names:
            eventually(f"{name} is asked to {verb}", partial(asked, name), PATIENCE)

    def _compare_amid(self) -> None:
        """Migrations apart, whose silent rows are right a little later, verify is exact at any moment."""
        self.compare()
        load = Edits(self.settings, random.Random(self.seed))
        with over_and_over(lambda: load.work(1, 0)):
            for name, cls in self.views.items():
                seen = found(self.settings, cls, name, PATIENCE)
                assert seen.clean, f"{name}: {seen.wrong[:4]} {seen.undecided[:4]}"

    # What is lost, or put back. The process is dead.

    def _copy(self) -> None:
        shutil.rmtree(self._kept, ignore_errors=True)
        self._kept.mkdir()
        if Path(self.settings.state).exists():
            shutil.copytree(self.settings.state, self._kept / "state")
        for file in self._files():
            shutil.copy(file, self._kept / file.name)
        with redis.Redis.from_url(self.settings.redis) as client:
            self._pages = {key: client.dump(key) for key in client.scan_iter()}
        self.say("kept")

    def _lost(self) -> None:
        for what in self.chance.sample(LOSSES, self.chance.choice([1, 1, 2])):
            if self._kept.exists() or not what.endswith("_back"):
                self.say(f"lost: {what}")
                getattr(self, f"_lose_{what}")()

    def _files(self) -> list[Path]:
        return list(Path(self.settings.warehouse).parent.glob("warehouse.duckdb*"))

    def _lose_local(self) -> None:
        shutil.rmtree(self.settings.state, ignore_errors=True)

    def _lose_local_back(self) -> None:
        if (self._kept / "state").exists():
            self._lose_local()
            shutil.copytree(self._kept / "state", self.settings.state)

    def _lose_pages(self) -> None:
        with redis.Redis.from_url(self.settings.redis) as client:
            client.flushdb()

    def _lose_pages_back(self) -> None:
        self._lose_pages()
        with redis.Redis.from_url(self.settings.redis) as client:
            for key, value in self._pages.items():
                client.restore(key, 0, value)

    def _lose_warehouse(self) -> None:
        for file in self._files():
            file.unlink()

    def _lose_warehouse_back(self) -> None:
        self._lose_warehouse()
        for file in self._kept.glob("warehouse.duckdb*"):
            shutil.copy(file, Path(self.settings.warehouse).parent / file.name)

    def _lose_topics(self) -> None:
        names = [name for name in self.log.topics.names() if name.startswith("stream.g")]
        self.log.topics.delete([name for name in names if name != "stream.generations"], wait=True)

    def _lose_indices(self) -> None:
        with Client(self.settings.elasticsearch) as client:
            for index in client.indices.get(index="windows-g*"):
                client.indices.delete(index=index)

    # What must be true

    def compare(self) -> None:
        """Let all rest: each view is what Postgres has, and verify says so."""
        self.edits.sync()
        truth = migrated.Truth.of(self.settings)
        for name, cls in self.views.items():
            self._compare(name, cls, truth)
        self.say("equal")

    def _compare(self, name: str, cls: type[Any], truth: migrated.Truth) -> None:
        wanted = truth.view(cls)
        shown: list[Any] = []
        said = ""

        def equal() -> bool:
            """Also for a moment: one that is wiped, and finds out, is empty as its table may be; then verify cannot compare it yet."""
            nonlocal said
            assert self.process.poll() is None, "the process has ended"
            shown[:] = [self._shown(name, truth)]
            if shown == [wanted]:
                said = self._verified(name, cls)
                shown[:] = [self._shown(name, truth)]
                assert said.startswith((CLEAN, REFUSED)) or shown != [wanted], (
                    f"{name} is equal, and verify says {said}"
                )
            return shown == [wanted] and said == CLEAN

        try:
            eventually(f"{name} is equal", equal, PATIENCE)
        except AssertionError as error:
            said = self._verified(name, cls)
            raise AssertionError(f"{error}; verify says {said}; {_differing(shown, wanted)}") from error

    def _shown(self, name: str, truth: migrated.Truth) -> dict[tuple[str, str], Any] | None:
        try:
            rows = {(row.collection, row.key): row.value for row in self.control.scan(name, timeout=60)}
        except HeadraceError:
            return None
        rows = {key: codec.loads(row["json"]) if {*row} == {"json"} else row for key, row in rows.items()}
        return {
            key: row for key, row in rows.items() if not key[0] or key[0] in truth.rows
        }  # not of a table that is gone

    def _verified(self, name: str, cls: type[Any]) -> str:
        try:
            seen = found(self.settings, cls, name, PATIENCE)
        except HeadraceError as error:
            return f"{REFUSED} {error}"
        return CLEAN if seen.clean else f"{seen.wrong[:5]} {seen.undecided[:5]} {seen.notes}"


def _differing(shown: list[Any], wanted: dict[Any, Any]) -> str:
    if shown in ([], [None]):
        return "nothing was shown"
    keys = [key for key in {*shown[0], *wanted} if shown[0].get(key) != wanted.get(key)]
    return "\n".join(f"{key}: {shown[0].get(key)} and not {wanted.get(key)}" for key in sorted(keys)[:4])


@pytest.mark.timeout(120 + 4 * PATIENCE * STEPS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("elasticsearch", "redis_server", "registry", "often")
def test_after_migrations_kills_and_losses_each_view_is_what_postgres_has(
    settings: Settings, seed: int, tmp_path: Path
) -> None:
    chance = random.Random(f"settings {seed}")
    settings = replace(
        settings,
        partitions=chance.choice([1, 2, 3]),
        batch_records=chance.choice([1, 3, 10, 10_000]),
        cut_records=chance.choice([2, 10, 20_000]),
    )
    with redis.Redis.from_url(settings.redis) as client:
        client.flushdb()
    execute(settings, *migrated.made(chance))
    Edits(settings, chance).work(40, 0)
    if chance.random() < 0.5:
        execute(settings, f"CREATE PUBLICATION {settings.publication} FOR ALL TABLES")
    else:
        prepare(settings)
    trial = Trial(settings, seed, tmp_path)
    codecs = itertools.cycle(("json", "avro"))
    with capturing(replace(settings, codec=next(codecs))) as capture:
        capture.reach()
    try:
        trial.start()
        for _ in range(STEPS):
            with capturing(replace(settings, codec=next(codecs))):
                trial.step()
        with capturing(replace(settings, codec=next(codecs))):
            trial.compare()
    except BaseException:
        print(trial.told())  # noqa: T201  what it must be understood by
        raise
    finally:
        trial.kill()
