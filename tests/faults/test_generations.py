"""Rebuilds under load and kills: readers of every store never see an empty, half-built, mixed or older view."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from elasticsearch import Elasticsearch as Client

from headrace import codec
from headrace.errors import HeadraceError
from headrace.log.tail import BEGINNING, read_to_end
from headrace.settings import Settings
from headrace.stores.kafka import live_topic
from headrace.stores.redis.reader import PageReader
from headrace_ops.elasticsearch import Elasticsearch
from headrace_warehouse.cli import ask
from tests.fixtures.capture import execute, rows
from tests.fixtures.processes import System
from tests.fixtures.seeds import steps
from tests.fixtures.ticks import FILE, MAKE, ROWS, TICK, repeating

REBUILDS = steps(2, "REBUILDS")
GATES = ("verify", "counts", "none")
SPECS = {name: f"{FILE}:{name.title().replace('_', '')}" for name in ("ticks_found", "ticks_pages", "ticks_stream")}
FILES = tuple(part for spec in SPECS.values() for part in ("--consumer", spec))
RUN = {name: ("--consumer", spec) for name, spec in SPECS.items()}
VIEWS = (*SPECS, "warehouse")


class Reader(threading.Thread):
    """Polls a view until stopped, as an application would; `wrong` is what it must not have seen."""

    def __init__(self, poll: Callable[[], Iterator[int]]) -> None:
        super().__init__(daemon=True)
        self.wrong: list[str] = []
        self.polls = 0
        self.newest = 0
        self._poll = poll
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.is_set() and not self.wrong:
            try:
                for n in self._poll():
                    if n < self.newest:
                        self.wrong.append(f"{n} after {self.newest}")
                    self.newest = n
                    self.polls += 1
                self._stopping.wait(0.01)
            except Exception as error:  # noqa: BLE001  told by the test
                self.wrong.append(repr(error))

    def stop(self) -> None:
        self._stopping.set()
        self.join(60)


Seen = defaultdict[int, list[int]]
"""What readers saw of each generation."""


def of_search(address: str, by_generation: Seen) -> Callable[[], Iterator[int]]:
    client = Client(address, max_retries=0)

    def poll() -> Iterator[int]:
        hits = client.search(index="found", size=1000)["hits"]["hits"]
        seen = {hit["_source"]["n"] for hit in hits}
        indices = {hit["_index"] for hit in hits}
        assert (len(hits), len(seen), len(indices)) == (ROWS, 1, 1), hits
        by_generation[int(indices.pop().rpartition("g")[2])] += seen
        yield from seen

    return poll


def of_pages(settings: Settings) -> Callable[[], Iterator[int]]:
    reader = PageReader(settings, "ticking")

    def poll() -> Iterator[int]:
        for id_ in range(1, ROWS + 1):
            page = reader.get(str(id_))
            assert page, f"there is no page {id_}"
            yield int(page.html)

    return poll


def of_warehouse(settings: Settings) -> Callable[[], Iterator[int]]:
    def poll() -> Iterator[int]:
        try:
            found = ask(settings.warehouse_listen, "SELECT count(*), min(n), max(n) FROM ticks")
        except HeadraceError as error:
            if error.code == "warehouse-not-running":  # its process is dead, and with it who answers
                return
            raise
        ((count, least, most),) = found["rows"]
        assert (count, least) == (ROWS, most), "an answer is not one state"
        yield most

    return poll


def of_stream(settings: Settings, by_generation: Seen) -> Callable[[], Iterator[int]]:
    def poll() -> Iterator[int]:
        topic = live_topic(settings, "ticked")
        assert topic, "the pointer points at nothing"
        try:
            found = {each.key: each.value for each in read_to_end(settings, {(topic, 0): BEGINNING})}
        except HeadraceError:
            assert live_topic(settings, "ticked") != topic, "what readers are pointed at is not there"
            return
        if live_topic(settings, "ticked") != topic:
            return  # it may have gone on: readers look where the pointer points
        seen = {codec.loads(value)["n"] for value in found.values() if value}
        assert (len(found), len(seen)) == (ROWS, 1), found
        by_generation[int(topic.rpartition("g")[2])] += seen
        yield from seen

    return poll


def pass_ticks(system: System, count: int) -> None:
    """Wait until so many more transactions are committed."""

    def now() -> int:
        ((n,),) = rows(system.settings, "SELECT max(n) FROM ticks")
        return int(n)

    until = now() + count
    system.wait(f"{count} more ticks", lambda: now() >= until)


def kill_and_start(system: System, victim: str, meanwhile: int) -> None:
    """Kill a view's process, start it again after so many ticks, and wait until it says something."""
    system.kill(victim)
    killed = time.time()
    pass_ticks(system, meanwhile)
    system.start(victim, "run", *RUN.get(victim, (victim,)))
    await_word(system, victim, killed)


def await_word(system: System, view: str, since: float) -> None:
    """Wait until a view's process says something that was not said before; what a killed one said last may be of any age by then."""
    system.waiting(
        f"{view} to be there", lambda: min(r.age for r in system.control.running(view)) < time.time() - since
    )


def await_polls(system: System, readers: dict[str, Reader]) -> None:
    """Wait until each reader has seen its view again, or something wrong: one amid a poll may yet see what was before."""
    wanted = {name: reader.polls + 2 for name, reader in readers.items()}
    system.wait(
        "every reader to see its view", lambda: all(r.wrong or r.polls >= wanted[n] for n, r in readers.items())
    )


@pytest.mark.timeout(600 + 150 * REBUILDS)
@pytest.mark.usefixtures("redis_server")
def test_readers_of_every_store_see_whole_and_newer_states_only_over_rebuilds_with_kills(
    system: System, elasticsearch: Elasticsearch, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(REBUILDS)
    settings, found, ticked = system.settings, Seen(list), Seen(list)
    execute(settings, *MAKE)
    system.up(*VIEWS, options=RUN)
    polls = {
        "ticks_found": of_search(elasticsearch.address(), found),
        "ticks_pages": of_pages(settings),
        "ticks_stream": of_stream(settings, ticked),
        "warehouse": of_warehouse(settings),
    }
    readers = {name: Reader(poll) for name, poll in polls.items()}
    for reader in readers.values():
        reader.start()
    with repeating(settings, TICK, every=0.1):
        for number, gate in zip(range(REBUILDS), itertools.cycle(GATES), strict=False):
            system.run("rebuild", *VIEWS)
            victim = chance.choice(VIEWS)
            pass_ticks(system, chance.randint(1, 30))
            kill_and_start(system, victim, chance.randint(1, 30))
            print(f"rebuild {number}: {victim} killed, gate {gate}", flush=True)  # noqa: T201  what a failure must be repeated with
            ended = system.ask("rebuild", *VIEWS, "--wait", "--gate", gate, *FILES, seconds=400)
            assert ended.code == 0, (number, gate, victim, ended)
            record_property("kill", victim)
            await_polls(system, readers)
            for name in VIEWS:
                system.run("drop", name)
                record_property("rebuild", name)
    system.settle(*VIEWS)
    await_polls(system, readers)
    for reader in readers.values():
        reader.stop()
    assert {name: reader.wrong for name, reader in readers.items() if reader.wrong} == {}
    ((newest,),) = rows(settings, "SELECT max(n) FROM ticks")
    assert {name: reader.newest for name, reader in readers.items()} == dict.fromkeys(VIEWS, newest)
    assert set(found) == set(ticked) == set(range(1, REBUILDS + 2)), "readers saw every generation"
    for number in range(1, REBUILDS + 1):
        of_old, of_new = found[number] + ticked[number], found[number + 1] + ticked[number + 1]
        assert max(of_old) <= min(of_new), (
            f"generation {number + 1} was promoted at another LSN in one store than in the other"
        )
    system.verify("warehouse", options=FILES)


@pytest.mark.usefixtures("redis_server")
def test_a_rebuild_goes_on_on_another_host_where_nothing_is_kept_locally(system: System, tmp_path: Path) -> None:
    settings, halt = system.settings, tmp_path / "halt"
    run = ("run", "--consumer", f"{FILE}:HaltingPages")
    system.environment |= {"HALT": str(halt), "HEADRACE_BATCH_RECORDS": "50"}
    execute(settings, *MAKE, *[TICK] * 30)
    system.up("halting_pages", options={"halting_pages": run[1:]})
    execute(settings, *[TICK] * 30)
    system.settle("halting_pages")
    halt.touch()
    system.run("rebuild", "halting_pages")
    system.wait("the build to be half way", halt.with_suffix(".reached").exists)
    system.kill("halting_pages")
    killed = time.time()
    halt.unlink()
    system.environment["HEADRACE_STATE"] = str(tmp_path / "another-host")
    system.start("halting_pages", *run)
    await_word(system, "halting_pages", killed)
    options = ("--consumer", run[2])
    assert system.facts("rebuild", "halting_pages", "--wait", *options)["generation"] == 2
    assert system.verify(options=options)["halting_pages"]["generation"] == 2
    assert list((tmp_path / "another-host").rglob("halting_pages-g2.sqlite"))
