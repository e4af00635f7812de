"""SIGKILL of everything, under load: nothing is lost, nothing comes twice, and every view ends equal to Postgres.

The workload numbers every change, in the row that it writes and in the ledger (`headrace shop work`). Kafka's own console
consumer, which knows nothing of headrace, must see each committed number exactly once, and no other.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import pytest

from headrace import plugins
from headrace.change import format_lsn
from headrace.stores.duckdb import DuckDBStore
from headrace_ops.kafka import Kafka
from headrace_ops.stack import Stack
from tests.fixtures.capture import now
from tests.fixtures.processes import SMALL, System, console

VIEWS = ("search", "pages", "warehouse")
VICTIMS = ("capture", "kafka", *VIEWS)
KILLS = 6
SEEDS = [int(seed) for seed in os.environ.get("SOAK_SEEDS", "1").split(",")]
"""`make soak` gives more of them: see tests/soak.py."""
RATE = "60/s"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("elasticsearch", "redis_server")
def test_each_committed_number_is_in_the_log_once_and_every_view_is_equal_after_six_kills(
    system: System, stack: Stack, kafka: Kafka, seed: int
) -> None:
    system.run("shop", "load", *SMALL)
    system.up(*VIEWS)
    kill_under_load(system, stack, seed, KILLS)
    check(system, kafka)


@pytest.mark.parametrize("seed", SEEDS)
def test_postgres_killed_under_load_with_work_that_was_not_captured(
    system: System, stack: Stack, kafka: Kafka, seed: int
) -> None:
    """Capture stands still meanwhile, so that there is such work for certain; what was committed is in the log, once."""
    chance = random.Random(seed)
    system.run("shop", "load", *SMALL)
    system.up("warehouse")
    for step in (1, 2):
        system.start("work", "shop", "work", "--rate", RATE, "--seed", str(100 * seed + step))
        system.busy(chance.randint(5, 40))
        with system.paused("capture"):
            done = _newest(system)
            system.busy(chance.randint(5, 40))
            before = now(system.settings)
            stack.server("postgres").kill()
            system.stop("work")
        stack.server("postgres").start()
        places = (
            f"killed at {format_lsn(before)}, captured {format_lsn(done)}, back at {format_lsn(now(system.settings))}"
        )
        print(f"seed {seed}, step {step}: postgres {places}", flush=True)  # noqa: T201  the same
        assert before > done
        system.run("shop", "work", "--rate", RATE, "--seconds", "1", "--seed", str(100 * seed + 50 + step))
        system.settle("warehouse")
        system.verify("warehouse")
    check(system, kafka)


def kill_under_load(system: System, stack: Stack, seed: int, kills: int) -> None:
    """Kill one after the other at drawn moments, every victim before any one dies twice; after each every view equals Postgres.

    The load rests while they are compared: verify is exact under it too, but not done before its hottest rows rest.
    """
    chance = random.Random(seed)
    drawn: list[str] = []
    for step in range(1, kills + 1):
        drawn = drawn or chance.sample(VICTIMS, len(VICTIMS))
        victim = drawn.pop()
        system.start("work", "shop", "work", "--rate", RATE, "--seed", str(100 * seed + step))
        system.busy(chance.randint(5, 60))
        _kill(system, stack, victim, f"seed {seed}, step {step}: {victim}", chance.randint(10, 60))
        _goes_on(system, victim, now(system.settings))
        system.stop("work")
        system.settle(*VIEWS)
        system.verify(*VIEWS)


def _goes_on(system: System, victim: str, lsn: int) -> None:
    """Wait until what is to be killed has done work since it, or anything before it, was killed last."""
    wanted = VIEWS if victim not in VIEWS else (victim,)
    system.waiting(f"the log to reach {format_lsn(lsn)}", lambda: _newest(system) >= lsn)
    system.waiting(f"{wanted} to go on", lambda: all(system.applied(view).lsn >= lsn for view in wanted))


def check(system: System, kafka: Kafka) -> None:
    """Hold what a stranger reads against the ledger."""
    records = console(kafka, f"{system.settings.source}\\.public\\..*")
    committed = system.numbers()
    assert len(committed) > 100
    in_ledger = [each["after"]["seq"] for each in records if each["source"]["table"] == "ledger"]
    assert in_ledger == [number for number, _ in committed], "the ledger's topic is the ledger, in its order"
    in_rows = Counter(each["after"]["seq"] for each in records if _written(each))
    assert in_rows == Counter(number for number, what in committed if not what.startswith("delete"))


def _written(record: dict[str, Any]) -> bool:
    return record["source"]["table"] != "ledger" and record["op"] in {"c", "u"}


def _kill(system: System, stack: Stack, victim: str, what: str, meanwhile: int) -> None:
    """Kill it with work before it that it had not done, let more come while it is dead, and start it again."""
    before = after = 0
    while before <= after:
        before = now(system.settings)
        if victim == "kafka":
            stack.server(victim).kill()
        else:
            system.kill(victim)
            after = _stands(system, victim)
        system.busy(meanwhile)
        later = now(system.settings)
        if victim == "kafka":
            stack.server(victim).start()
            after = _stands(system, victim)
        else:
            system.start(victim, *(("capture",) if victim == "capture" else ("run", victim)))
        places = f"killed at {format_lsn(before)}, it had done {format_lsn(after)}, back at {format_lsn(later)}"
        print(f"{what} {places}", flush=True)  # noqa: T201  what a failure must be repeated with
        assert later > before


def _stands(system: System, victim: str) -> int:
    """Return where a dead process's work durably ends: the newest checkpoint, or what the view's store says."""
    if victim not in VIEWS:
        system.waiting("the log to answer", lambda: _newest(system) > 0)
        return _newest(system)
    kind = (
        DuckDBStore if victim == "warehouse" else plugins.load(victim)
    )  # the warehouse's own would answer SQL from here
    consumer = kind(system.settings, victim)
    try:
        live = next(generation for generation in consumer.generations() if generation.live)
        position = consumer.open(live)
    finally:
        consumer.close()
    assert position is not None
    return position.version.lsn


def _newest(system: System) -> int:
    checkpoint = system.log.newest_checkpoint()
    return checkpoint.version.lsn if checkpoint else 0
