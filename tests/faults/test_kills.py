"""SIGKILL of capture, the broker and Postgres, under load: nothing is lost and nothing comes twice; test_everything.py kills the views too.

The workload numbers every change, in the row that it writes and in the ledger (`headrace shop work`). Kafka's own console
consumer, which knows nothing of headrace, must see each committed number exactly once, and no other; each delete once, with its
tombstone behind it; and of each key last what Postgres has.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from headrace.change import format_lsn
from headrace.codec import encode_key
from headrace.settings import Settings
from headrace_ops.kafka import Kafka
from headrace_ops.stack import Stack
from headrace_shop.database import KEYS
from tests.fixtures.capture import now, rows
from tests.fixtures.processes import SMALL, System, console
from tests.fixtures.seeds import seeds, steps

LOG = ("capture", "kafka", "postgres")
"""What stands between a commit and the log."""
SEEDS = seeds("1")
KILLS = steps(len(LOG), "KILLS")
BUSY = "200/s"
"""So many that some are always on their way."""


def cut_small(settings: Settings, seed: int) -> Settings:
    """Return settings with which the transactions of the shop span cuts (S5), for every other seed: for the rest they stay whole."""
    return replace(settings, cut_records=25) if seed % 2 else settings


def check_cuts(system: System) -> None:
    """Some transaction must have spanned cuts, where they are small."""
    if system.settings == cut_small(system.settings, 1):
        assert any(checkpoint.partial for checkpoint in system.log.checkpoints())


@pytest.fixture
def settings(settings: Settings, seed: int) -> Settings:
    return cut_small(settings, seed)


@pytest.mark.timeout(300 * KILLS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_log_is_exact_after_each_kill_of_capture_broker_and_postgres(
    system: System, stack: Stack, kafka: Kafka, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """Each of the three once, then whichever is drawn; a kill that came when nothing was to be done is made again."""
    chance = random.Random(seed)
    system.run("shop", "load", *SMALL)
    system.up("warehouse")
    load = itertools.count(1000 * seed)
    with _working(system, next(load)):
        system.busy(100)  # `check` wants something to be there
    for step, victim in enumerate([*chance.sample(LOG, len(LOG)), *chance.choices(LOG, k=KILLS - len(LOG))], 1):
        late = 0
        while not late:
            killed = _kill_in_the_log(system, stack, victim, chance, load)
            late, more = killed.counts(check(system, kafka))
            told = f"{late} committed changes were not in the log, {more} came later, now it is exact"
            print(f"seed {seed}, step {step}: {victim} killed, {told}", flush=True)  # noqa: T201  what a failure must be repeated with
        record_property("kill", victim)
    check_cuts(system)
    system.settle("warehouse")
    system.verify("warehouse")


class Killed(NamedTuple):
    """When a kill began, and when what was killed was surely dead: ms, by the clock of Postgres and of the broker."""

    begun: int
    dead: int

    def counts(self, records: list[dict[str, Any]]) -> tuple[int, int]:
        """Return how many changes were committed before it and are in the log since, and how many were committed later."""
        ledger = [(each["source"]["ts_ms"], each["written"]) for each in records if _of_ledger(each)]
        late = sum(committed < self.begun and written > self.dead for committed, written in ledger)
        return late, sum(committed > self.dead for committed, _ in ledger)


def _kill_in_the_log(system: System, stack: Stack, victim: str, chance: random.Random, load: Iterator[int]) -> Killed:
    """Kill it at a drawn moment under load, start it again after another, let the load go on for a while."""
    with _working(system, next(load)):
        system.busy(chance.randint(5, 200))
        killed = _killed(system, stack, victim)
        if victim != "postgres":
            system.busy(chance.randint(5, 400))
    if victim == "capture":
        system.start(victim, "capture")
    else:
        stack.server(victim).start()
    with _working(system, next(load)):
        system.busy(chance.randint(5, 40))
    lsn = now(system.settings)
    system.waiting(f"the log to reach {format_lsn(lsn)}", lambda: newest(system) >= lsn)
    return killed


@contextmanager
def _working(system: System, seed: int) -> Iterator[None]:
    system.start("work", "shop", "work", "--rate", BUSY, "--seed", str(seed))
    yield
    system.stop("work")


def _killed(system: System, stack: Stack, victim: str) -> Killed:
    begun = now_ms()
    if victim == "capture":
        system.kill(victim)
        return Killed(begun, now_ms())
    server = stack.server(victim)
    if victim == "kafka":  # it hangs before: so something is committed that it has not
        server.pause()
        system.busy(1)
        begun = now_ms()
    server.kill()
    dead = now_ms()
    return Killed(dead if victim == "postgres" else begun, dead)  # whatever Postgres had committed was so before


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def check(system: System, kafka: Kafka) -> list[dict[str, Any]]:
    """Hold what a stranger reads against the ledger and the tables, and return its records but for tombstones."""
    read = console(kafka, f"{system.settings.source}\\.public\\..*")
    records = [each for each in read if each["op"]]
    committed = system.numbers()
    assert len(committed) > 100
    in_ledger = [each["after"]["seq"] for each in records if _of_ledger(each)]
    if system.settings.partitions > 1:  # which have no order among each other
        in_ledger.sort()
    assert in_ledger == [number for number, _ in committed], "the ledger's topic is the ledger, in its order"
    in_rows = Counter(each["after"]["seq"] for each in records if _written(each))
    assert in_rows == Counter(number for number, what in committed if not what.startswith("delete"))
    deleted = [each for each in records if each["op"] == "d"]
    tables = Counter(f"delete {each['source']['table']}" for each in deleted)
    assert tables == Counter(what for _, what in committed if what.startswith("delete"))
    behind = Counter((each["key"], each["place"][0], each["place"][1] + 1) for each in deleted)
    assert behind == Counter((each["key"], *each["place"]) for each in read if not each["op"]), "tombstones"
    last = {(each["source"]["table"], each["key"]): each["after"] for each in records}
    assert {key: row for key, row in last.items() if row is not None} == tables_of(system)
    return records


def tables_of(system: System) -> dict[tuple[str, str], Any]:
    """Return the rows of Postgres as the log has them, by table and key; a `numeric` is a string there."""
    found = {}
    for table, key in KEYS.items():
        for (text,) in rows(system.settings, f"SELECT row_to_json(t)::text FROM {table} t"):
            row = json.loads(text, parse_float=str)
            found[table, encode_key({name: row[name] for name in key}).decode()] = row
    return found


def _of_ledger(record: dict[str, Any]) -> bool:
    return bool(record["source"]["table"] == "ledger")


def _written(record: dict[str, Any]) -> bool:
    return not _of_ledger(record) and record["op"] in {"c", "u"}


def newest(system: System) -> int:
    checkpoint = system.log.newest_checkpoint()
    return checkpoint.version.lsn if checkpoint else 0
