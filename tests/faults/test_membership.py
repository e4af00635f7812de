"""Any history of tables that come and go, are read again and consist of partitions: a linear reader ends with what Postgres has.

What happens is drawn from a seed (see `History`). Whenever it rests nothing is left to be done, each published table that has a key, or is
append-only, is exact and replays to its rows, and what capture refused or let rest was mended by what it named.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import pytest

from headrace.settings import Settings
from headrace_capture import attention, catalog, chunks, cut, fingerprints, relations, resnapshot, stream, watermarks
from tests.fixtures.capture import rows
from tests.fixtures.membership import ROWS, TABLES, History
from tests.fixtures.seeds import seeds, steps
from tests.fixtures.world import World

SEEDS = seeds("102")
STEPS = steps(30)
SLOWED: list[tuple[Any, str]] = [
    (watermarks, "emit"),
    (fingerprints, "read"),
    (stream.Stream, "_begin"),
    (relations.Relations, "take"),
    (cut.Cut, "seal"),
    (chunks.ChunkReader, "_chunk"),
    (catalog, "published_tables"),
]


@pytest.fixture
def world(settings: Settings, seed: int, monkeypatch: pytest.MonkeyPatch) -> World:
    """A source of some kind, set up and not captured yet; what runs beside its stream takes longer now and then."""
    draw = random.Random(seed)
    settings = replace(settings, cut_records=draw.choice([2, 5, 25, 25]), partitions=draw.choice([1, 3]))
    made = World(settings, seed)
    monkeypatch.setattr(attention, "LOOK_SECONDS", draw.choice([0.05, 0.2, 1.0]))
    monkeypatch.setattr(attention, "PACE", 1)
    monkeypatch.setattr(resnapshot, "_AGAIN_SECONDS", 0.1)
    judge = resnapshot.Resnapshot._judge
    monkeypatch.setattr(
        resnapshot.Resnapshot, "_judge", lambda self, found: (judge(self, found), made.judged.append(found.asked))[0]
    )
    for owner, name in SLOWED:
        if draw.random() < 0.5:
            slow(monkeypatch, made, (owner, name), draw.choice([0.02, 0.1, 0.3]), draw.choice([0.05, 0.3]))
    made.sql([*TABLES, *ROWS])
    made.setup()
    publish(made, draw.choice(["", "", "", "ALL TABLES", "TABLES IN SCHEMA public, crm"]))
    return made


def publish(world: World, what: str) -> None:
    """Let the publication be of another kind than setup makes; what setup notes there stays."""
    if what:
        name = world.settings.publication
        ((told,),) = rows(world.settings, "SELECT obj_description(oid, 'pg_publication') FROM pg_publication")
        via = "WITH (publish_via_partition_root)"
        comment = f"COMMENT ON PUBLICATION {name} IS '{told}'"
        world.sql([f"DROP PUBLICATION {name}", f"CREATE PUBLICATION {name} FOR {what} {via}", comment])


def slow(patch: pytest.MonkeyPatch, world: World, where: tuple[Any, str], chance: float, most: float) -> None:
    """Let a call begin or return later now and then."""
    call, draw = getattr(*where), world.random

    def slowly(*args: Any, **named: Any) -> Any:
        for_ = [draw.random() * most * (world.jittery and draw.random() < chance) for _ in range(2)]
        time.sleep(for_[0])
        found = call(*args, **named)
        time.sleep(for_[1])
        return found

    patch.setattr(*where, slowly)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_linear_reader_ends_with_what_postgres_has(world: World, seed: int) -> None:
    history = History(seed, world.settings.publication)
    rest = world.random.choice([8, 12, 24])
    try:
        world.start()
        if world.random.random() < 0.7:
            world.streaming()
        for number, step in enumerate(history.steps(STEPS), start=1):
            world.take(step)
            if number % rest == 0 or number == STEPS:
                world.rest()
    except BaseException:
        print(*world.done, *(line for life in world.said for line in ["-- a life", *life]), sep="\n")  # noqa: T201
        raise
    finally:
        world.close()
