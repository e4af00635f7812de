"""Any history of migrations amid the writes of several sessions, with capture killed and started: the log ends as Postgres, by itself.

What capture refuses is mended as it says. VERSIONS=15,17 names those of Postgres. The log is in JSON, or changes its codec again and again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace.settings import Settings
from headrace_ops.postgres import Postgres
from tests.fixtures.keyed import Keyed
from tests.fixtures.lab import AROUND, live, note_looks
from tests.fixtures.migrations import Migrations
from tests.fixtures.seeds import ASKED, seeds, steps
from tests.fixtures.sessions import Step, history, taken_back
from tests.fixtures.structures import Structures
from tests.fixtures.typed import Typed
from tests.fixtures.versions import NEWEST

pytestmark = pytest.mark.usefixtures("often")

SEEDS = seeds("1,2")
STRUCTURED = seeds("1")

BOTH = ("json", "avro")
RESTARTS = ["restart", "crash", "die"] * 2
RESTART = Step(0, "restart", 0)

Lives = Callable[[Callable[[Postgres, int], str], list[int]], None]


@pytest.fixture(params=os.environ.get("VERSIONS", NEWEST).split(","))
def lives(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Lives:
    """Live through the histories of some seeds, three at a time, and tell of each that went wrong."""
    note_looks(monkeypatch)
    version = request.param
    if ASKED:
        request.getfixturevalue("registry")
    server = request.getfixturevalue("postgres" if version == NEWEST else "older_postgres")
    server = server if version == NEWEST else server(version)

    def all_of(one: Callable[[Postgres, int], str], some: list[int]) -> None:
        def told(seed: int) -> str:
            found = one(server, seed)
            print(f"{time.strftime('%X')} seed {seed} on {version}: {'failed' if found else 'ok'}", flush=True)  # noqa: T201
            return found

        with ThreadPoolExecutor(3) as pool:
            failed = [found for found in pool.map(told, some) if found]
        assert not failed, "\n\n".join(failed)

    return all_of


@pytest.mark.timeout(900 * len(SEEDS))
def test_any_migration_ends_as_postgres(settings: Settings, lives: Lives) -> None:
    """Three sessions, four tables: rows out of line, REPLICA IDENTITY FULL, a unique index for a key, and two that look the same.

    An odd seed is of a history of all there is, an even one of DDL that is taken back (`taken_back`).
    """

    def one(server: Postgres, seed: int) -> str:
        drawn = history(seed, steps(15), AROUND) if seed % 2 else taken_back(seed)
        return live(settings, server, seed, Migrations, drawn)

    lives(one, SEEDS)


@pytest.mark.timeout(900 * len(STRUCTURED))
@pytest.mark.parametrize("maker", [Structures, Keyed, Typed])
def test_migrations_of_one_kind_end_as_postgres(settings: Settings, lives: Lives, maker: type[Migrations]) -> None:
    """Three sessions, three tables: partitions at two levels, some unlogged, and composites in domains, arrays and composites; keys of
    two and three columns; tables of one type, one of them partitioned."""

    def one(server: Postgres, seed: int) -> str:
        return live(settings, server, seed, maker, history(seed, steps(25), AROUND, maker))

    lives(one, STRUCTURED)


@pytest.mark.timeout(900 * len(STRUCTURED) * 2)
@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("maker", [Migrations, Structures])
def test_a_log_that_changes_its_codec_amid_migrations_ends_as_postgres(
    settings: Settings, lives: Lives, maker: type[Migrations]
) -> None:
    """Each capture writes in the other codec, from JSON to Avro and back: what it needs of the log is in both."""

    def one(server: Postgres, seed: int) -> str:
        drawn = history(seed, steps(15), [*AROUND, *RESTARTS], maker)
        third = len(drawn) // 3
        parts = drawn[:third], drawn[third : 2 * third], drawn[2 * third :]
        return live(settings, server, seed, maker, [step for part in parts for step in (*part, RESTART)], BOTH)

    lives(one, STRUCTURED)
