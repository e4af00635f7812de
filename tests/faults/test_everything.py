"""All of it at once, under load: kills of every process, outages of the stores, rebuilds, parked records, a debounced view.

What happens is drawn from a seed, which repeats it. Nothing may be lost and nothing may be stuck: after each step all goes on by itself,
and each time the load rests nothing is parked, Kafka's own console consumer sees every committed number once, and every view equals
Postgres, row by row.

Two of three steps hit two victims at once, so that six hit every one. Each is frozen first, and more is committed: so there is work that
it has not done, whatever the moment was. Then it is killed (a store may stay frozen instead), yet more is committed, and it is started
again. In some steps a customer is unfit meanwhile, in some views are built anew, in some tables are read again.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import pytest

from headrace.change import format_lsn
from headrace.parked import Shelf
from headrace.settings import Settings
from headrace_ops.kafka import Kafka
from headrace_ops.stack import Stack
from tests.faults.test_kills import Killed, check, check_cuts, cut_small, newest, now_ms
from tests.fixtures import fussy
from tests.fixtures.capture import execute, now, replay
from tests.fixtures.processes import SMALL, Ended, System
from tests.fixtures.seeds import seeds, steps

SPECS = {"customers": f"{fussy.FILE}:Customers", "shelves": f"{fussy.FILE}:Shelves"}
FILES = tuple(part for spec in SPECS.values() for part in ("--consumer", spec))
RUN = {name: ("--consumer", spec) for name, spec in SPECS.items()}
SHOP = ("search", "pages", "warehouse")
VIEWS = (*SHOP, *SPECS)
STORES = ("elasticsearch", "redis")
LOG = ("capture", "kafka", "postgres")
SERVERS = ("kafka", "postgres", *STORES)
VICTIMS = (*LOG, *VIEWS, *STORES)
TABLES = ("products", "reviews", "customers", "orders")
GATES = ("verify", "counts", "none")
SEEDS = seeds("1")
STEPS = steps(6)
RATE = "40/s"
COMPARED = 3
"""After so many steps the load rests, and all is compared."""

Record = Callable[[str, object], None]


@pytest.fixture
def settings(settings: Settings, seed: int) -> Settings:
    """Each table has three partitions: what a view reads of them comes in another order than it was written."""
    return cut_small(replace(settings, partitions=3), seed)


@pytest.mark.timeout(180 + 150 * STEPS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("elasticsearch", "redis_server")
def test_whatever_dies_or_is_away_nothing_is_lost_nothing_is_stuck_and_every_view_is_equal(
    system: System, stack: Stack, kafka: Kafka, seed: int, record_property: Record
) -> None:
    system.run("shop", "load", *SMALL)
    system.up(*VIEWS, options=RUN)
    trial = Trial(system, stack, seed, record_property)
    trial.work()
    system.busy(100)  # `check` wants something to be there
    for step in range(1, STEPS + 1):
        trial.step(step)
        if step % COMPARED == 0 or step == STEPS:
            trial.compare(kafka)
    check_cuts(system)


class Trial:
    """One seed."""

    def __init__(self, system: System, stack: Stack, seed: int, record: Record) -> None:
        self.system, self.stack, self.record = system, stack, record
        self.chance = random.Random(f"everything {seed}")
        self.where = f"seed {seed}"
        self.killed: list[tuple[str, Killed]] = []
        self._loads = itertools.count(1000 * seed)
        self._victims: list[str] = []
        self._gates = itertools.cycle(self.chance.sample(GATES, len(GATES)))
        self._mended = itertools.cycle(self.chance.sample(("retry", "drop"), 2))
        self._reread = itertools.cycle(self.chance.sample(("", *TABLES), len(TABLES) + 1))
        self._shelf = Shelf(system.log)

    def say(self, what: str) -> None:
        print(f"{self.where}: {what}", flush=True)  # noqa: T201  what a failure must be repeated with

    def work(self) -> None:
        """Let the load go on."""
        self.system.start("work", "shop", "work", "--rate", RATE, "--seed", str(next(self._loads)))

    def step(self, number: int) -> None:
        """Hit something; in two of three steps while views are built anew, in every other while a customer is unfit or tables are read."""
        self.where = f"{self.where.partition(',')[0]}, step {number}"
        with ExitStack() as meanwhile:
            if number % 2 == 0:
                meanwhile.enter_context(self.read_again(number))
            if number % 3 != 1:
                meanwhile.enter_context(self.rebuilt())
            if number % 2 == 1:
                meanwhile.enter_context(self.parked())
            self.hit(self.drawn(1 if number % 3 == 0 else 2))
            self.goes_on()

    def drawn(self, count: int) -> list[str]:
        """Return the next victims: every one before any comes twice."""
        victims: list[str] = []
        for _ in range(count):
            rest = [each for each in VICTIMS if each not in victims]
            self._victims = self._victims or self.chance.sample(rest, len(rest))
            victims.append(self._victims.pop())
        return victims

    # What is hit

    def hit(self, victims: list[str]) -> None:
        """Freeze victims, let changes come that they do not have, kill them, let more come, and start them again."""
        system, chance = self.system, self.chance
        system.busy(chance.randint(1, 60))
        before = now(system.settings)
        with ExitStack() as frozen:
            for victim in victims:
                frozen.enter_context(self._frozen(victim))
            since = now(system.settings)
            system.busy(chance.randint(1, 20))
            at, begun = now(system.settings), now_ms()
            said = [self._end(victim) for victim in victims]
            dead = now_ms()
        if "postgres" not in victims:
            system.busy(chance.randint(5, 120))
        # At their start programs end where Kafka is away for long, and capture where any server is, for somebody to read it.
        for victim in sorted(
            chance.sample(victims, len(victims)), key=lambda each: (each != "kafka", each == "capture")
        ):
            self._start(victim)
        system.busy(chance.randint(5, 40))
        later = now(system.settings)
        self.say(f"{', '.join(said)} at {format_lsn(at)}, back at {format_lsn(later)}")
        assert before <= since < at < later, "there was work before it and after it"
        self.killed += [(victim, Killed(begun, dead)) for victim in victims if victim in LOG]

    @contextmanager
    def _frozen(self, victim: str) -> Iterator[None]:
        """Let it stand; of Postgres, which has what is committed, let capture."""
        if victim in {"kafka", *STORES}:
            self.stack.server(victim).pause()
            yield
        else:
            with self.system.paused("capture" if victim == "postgres" else victim):
                yield

    def _end(self, victim: str) -> str:
        """Kill it; a store may stay as it is. Return what was done, in words, and count it."""
        how = "killed"
        if victim in STORES and self.chance.random() < 0.5:
            how = "paused"
        elif victim in SERVERS:
            self.stack.server(victim).kill()
        else:
            self.system.kill(victim)
        if victim == "postgres":
            self.system.stop("work")  # it has died of that
        self.record("kill" if how == "killed" else "pause", victim)
        return f"{victim} {how}"

    def _start(self, victim: str) -> None:
        if victim in SERVERS:
            self.stack.server(victim).start()
        else:
            self.system.start(victim, *(("capture",) if victim == "capture" else ("run", *RUN.get(victim, (victim,)))))
        if victim == "postgres":
            self.work()

    def goes_on(self) -> None:
        """Wait until the log and every generation of every view have what was committed by now, but for what is parked."""
        system, lsn = self.system, now(self.system.settings)
        system.waiting(f"the log to reach {format_lsn(lsn)}", lambda: newest(system) >= lsn)
        for view in VIEWS:
            system.waiting(f"{view} to go on to {format_lsn(lsn)}", partial(self._has, view, lsn))

    def _has(self, view: str, lsn: int) -> bool:
        reports = self.system.control.running(view)
        return all(report.version.lsn >= lsn or report.facts.get("parked") for report in reports)

    # What happens meanwhile

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Make a customer unfit, and fit again afterwards; what was parked is tried again, or given up before."""
        settings, how = self.system.settings, next(self._mended)
        customer = self.chance.choice(fussy.customers(settings))
        fussy.unfit(settings, customer)
        self.system.waiting(f"customer {customer} to be parked", lambda: bool(self._shelf.entries("customers")))
        self.say(f"customer {customer} is parked")
        yield
        assert self._shelf.entries("customers"), "nobody has tried it"
        if how == "drop":
            self._ask(("drop", "--yes"))
        fussy.mend(settings, customer)
        lsn = now(settings)
        self.system.waiting("nothing to be parked", lambda: self._unparked(lsn))
        self.say(f"customer {customer}: {how}")
        self.record("park", how)

    def _unparked(self, lsn: int) -> bool:
        """Whether every generation shows the customer as it is now; what is parked is tried again."""
        self._ask(("retry",))
        return all(report.version.lsn >= lsn for report in self.system.control.running("customers"))

    def _ask(self, how: tuple[str, ...]) -> None:
        for generation in sorted({entry.generation for entry in self._shelf.entries("customers")}):
            verb, *options = how
            what = ("parked", verb, "customers", "--all", "--generation", str(generation), *options, "--json")
            ended = self.system.ask(*what)
            assert ended.code in {0, 1, 3, 5}, ended  # not mended yet, still loading, busy: asked again

    @contextmanager
    def rebuilt(self) -> Iterator[None]:
        """Begin to build some views anew, and promote them afterwards, by one of the gates."""
        names, gate = self.chance.sample(VIEWS, self.chance.randint(1, 2)), next(self._gates)
        self.system.run("rebuild", *names)
        yield
        with ThreadPoolExecutor() as pool:
            promoted = pool.submit(self._promote, names, gate)
            amid = self.chance.random() < 0.4
            if amid:  # the command ends then, or it goes on by itself
                self.hit([self.chance.choice(names)])
        ended = promoted.result()
        if amid and ended.code in {3, 5}:
            self.goes_on()
            ended = self._promote(names, gate)
        assert ended.code == 0, (names, gate, ended)
        for name in names:
            self.system.control.ask(name, "drop", timeout=120)
            self.record("rebuild", name)
        self.say(f"{', '.join(names)} built anew, gate {gate}")

    def _promote(self, names: list[str], gate: str) -> Ended:
        return self.system.ask("rebuild", *names, "--wait", "--gate", gate, *FILES, seconds=400)

    @contextmanager
    def read_again(self, number: int) -> Iterator[None]:
        """Let tables be read again; or give one a column whose values no event tells, for which it is read again by itself."""
        settings, table, column = self.system.settings, next(self._reread), f"added_{number}"
        if table:
            execute(settings, f"ALTER TABLE {table} ADD COLUMN {column} int NOT NULL DEFAULT {number}")
        else:
            self.system.run("resnapshot", *TABLES)
        yield

        def done() -> bool:
            if table:
                return all(column in row for row in replay(settings, f"public.{table}").values())
            (jobs,) = self.system.control.kept("capture", "resnapshot")
            return all(job["phase"] == "done" for job in jobs.values())

        # In small cuts ten thousand rows are hundreds of chunks, each in a Kafka transaction of its own.
        self.system.waiting(f"{table or ', '.join(TABLES)} to be read again", done, 600.0)
        self.say(f"{table or ', '.join(TABLES)} read again")
        self.record("reread", table or "several")

    # What must be true

    def compare(self, kafka: Kafka) -> None:
        """Let the load rest, wait until all is shown, and hold the log and every view against Postgres."""
        system = self.system
        system.stop("work")
        system.settle(*VIEWS)
        assert self._shelf.entries() == []
        records = check(system, kafka)
        for victim, killed in self.killed:
            late, more = killed.counts(records)
            self.say(f"when {victim} was killed {late} committed changes were not in the log, {more} came later")
            assert late, "it had done all that there was"
            assert more, "nothing came after it"
        self.killed.clear()
        system.verify(*SHOP, options=FILES)
        self.say("the log is exact, every view is equal")
        self.work()
