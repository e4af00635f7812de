"""Any history of what may be asked of a view's generations, in every store, amid kills: a reader polls, and all ends well.

What happens is drawn from a seed, which repeats it but for its moments. A view is built, promoted, rolled back, dropped, paused and
replayed by code that changes, on two hosts with a state folder each, while its processes and commands are killed at any step, frozen and
woken, local folders and stores lost, and rows change.

- Readers never see an empty, mixed or older view, but where somebody lost the store, dropped it or asked for what is stale.
- One generation is live at most; a command that is refused has changed nothing, and what it says to run next is no circle.
- Left alone, the view comes to the newest LSN by itself, or says which command it wants, which then works. Then it equals Postgres, and
  of all other generations nothing is left.
"""

from __future__ import annotations

import random
import re
import shlex
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest

from headrace.control import DEAD_SECONDS
from headrace.errors import Misconfigured
from headrace.runner.scratch import NUMBER as SCRATCH
from headrace.settings import Settings
from headrace_ops.stack import Stack
from tests.fixtures.capture import capturing, execute, now, prepare
from tests.fixtures.rebuilt import KINDS, ROWS, UNFIT, numbers
from tests.fixtures.seeds import ASKED, seeds, steps
from tests.fixtures.ticks import repeating
from tests.fixtures.two_hosts import Hosts

SEEDS = seeds("1")
STEPS, REST = steps(5), 5
"""So many, and after each five it rests."""
STORES, AT_ONCE = list(KINDS) if ASKED else ["kept"], 3
SERVERS = {"redis": "redis", "elasticsearch": "elasticsearch", "kafka": "kafka"}
PATIENCE = 180.0
TICK = "UPDATE ticks SET n = n + 1"
MAKE = (
    "CREATE TABLE ticks (id int PRIMARY KEY, n int)",
    f"INSERT INTO ticks SELECT i, 0 FROM generate_series(1, {ROWS}) i",
)

ANYTHING: tuple[tuple[str, ...], ...] = (
    ("rebuild", "VIEW"),
    *[("rebuild", "VIEW", "--wait", "--gate", gate) for gate in ("verify", "counts", "none")],
    ("promote", "VIEW"),
    ("rollback", "VIEW"),
    ("rollback", "VIEW", "--stale"),
    ("drop", "VIEW"),
    ("drop", "VIEW", "--all"),
    ("pause", "VIEW"),
    ("resume", "VIEW"),
    ("replay", "--against", "VIEW", "--diff"),
    ("parked", "retry", "VIEW", "--all"),
    ("parked", "drop", "VIEW", "--all", "--yes"),
    ("promote", "VIEW", "--generation", "?"),
    ("drop", "VIEW", "?"),
)
TO_A_BUILD: tuple[tuple[str, ...], ...] = (
    *[("promote", "VIEW")] * 3,
    ("rebuild", "VIEW", "--wait", "--gate", "none"),
    ("rollback", "VIEW"),
    ("pause", "VIEW"),
)
TO_BEGIN = (("rebuild", "VIEW"), ("rebuild", "VIEW", "--wait", "--gate", "none"))
BESIDE_OLDER: tuple[tuple[str, ...], ...] = (
    ("rebuild", "VIEW"),
    *[("rollback", "VIEW")] * 3,
    ("rollback", "VIEW", "--stale"),
    ("drop", "VIEW"),
    ("drop", "VIEW", "?"),
)


disturbances: list[str] = []
"""What has happened to servers that all use; `moving` is held meanwhile."""
moving = threading.Lock()


class History(Hosts):
    """What happens to it, and how it ends."""

    # Steps

    def step(self) -> None:
        hit = (self.hit, self.other_host, self.other_code, self.lose_folder, self.lose_store, self.poison, self.away)
        (what,) = self.chance.choices((self.command, *hit), (60, 11, 6, 10, 4, 2, 4, 3))
        what()
        time.sleep(self.chance.choice((0, 0, 0.3, 1.0, 2.5)))

    def command(self) -> None:
        """Ask for something, amid which a process may die or the command be killed; then perhaps for what its refusal names."""
        chance, words = self.chance, self.drawn()
        self.able()
        if {"--all", "--stale"} & set(words) and words[0] in {"drop", "rollback"}:
            self.reader.strict = False
        armed = [each for each in self.running().values() if each.armable and chance.random() < 0.4]
        for each in armed:
            each.arm(chance.choice((chance.randint(1, 30), chance.randint(1, 200))))
        disturbed, before, hosts = len(disturbances), self.held(), list(self.running())
        code, said = self.ask(*words, kill=chance.uniform(0.2, 4) if chance.random() < 0.1 else None)
        calm = not (armed or self.frozen()) and (disturbed, hosts) == (len(disturbances), list(self.running()))
        if calm and before is not None:
            self.check_command(words, code, said, before)
        if code == Misconfigured.exit_code and chance.random() < 0.5 and (remedy := commands_in(said, self.view)):
            self.ask(*self.filled(remedy[0]))

    def drawn(self) -> tuple[str, ...]:
        """Return a command: mostly one that has something to do as it stands."""
        found = self.reports()
        live = next((each.generation for each in found if each.live), 0)
        useful = ANYTHING
        if self.chance.random() > 0.4:
            newer = any(each.generation > live for each in found)
            useful = TO_A_BUILD if newer else BESIDE_OLDER if len(found) > 1 else TO_BEGIN
        if any(each.phase == "paused" for each in found) and self.chance.random() < 0.4:
            useful = (("resume", "VIEW"),)
        known = [each.generation for each in found if each.generation] or [1]
        filled = {"VIEW": self.view, "?": str(self.chance.choice([*known, max(known) + 1]))}
        return tuple(filled.get(word, word) for word in self.chance.choice(useful))

    def able(self) -> None:
        """Mostly somebody hears a command."""
        if self.frozen() and self.chance.random() < 0.6:
            for each in self.running().values():
                each.signal(signal.SIGCONT)
        if not self.running():
            self.start(self.chance.randrange(2))
        deadline = time.monotonic() + self.chance.choice((0, 15, 15, 15))
        while time.monotonic() < deadline and not any(each.age < 2 and not each.ended for each in self.reports()):
            time.sleep(0.1)

    def filled(self, remedy: tuple[str, ...]) -> tuple[str, ...]:
        if remedy[:2] == ("rebuild", self.view):
            return ("rebuild", self.view, "--wait", "--gate", self.chance.choice(("verify", "none")))
        return tuple("1" if word == "N" else word for word in remedy)

    def check_command(self, words: tuple[str, ...], code: int | None, said: str, before: dict[int, bool]) -> None:
        """What was refused has changed nothing, but that a build which had been begun is there now; what was done shows."""
        after = self.held()
        if after is None:
            return
        told = (words, said, before, after)
        was, is_ = ([number for number, live in each.items() if live] for each in (before, after))
        if code == Misconfigured.exit_code and "--wait" not in words and was and "as soon as" not in said:
            assert was == is_, told
            assert set(before) <= set(after), told
        if code == 0 and words[0] in {"promote", "rollback"}:
            assert f"generation {is_[0]} of" in said, told
        if code == 0 and words[0] == "drop" and words[-1] != self.view:
            assert not after if "--all" in words else int(words[-1]) not in after, told

    def hit(self) -> None:
        if not self.running():
            return
        number, host = self.chance.choice(list(self.running().items()))
        how = self.chance.choice(("kill", "kill", "stop", "freeze", "freeze"))
        self.say(f"{how} host {number}{' (frozen)' if host.frozen else ''}")
        if how == "kill":
            host.kill()
        elif how == "stop" and not host.frozen:
            host.signal(signal.SIGTERM)
            assert host.wait(60), "it does not end"
        elif how == "freeze":
            host.signal(signal.SIGCONT if host.frozen else signal.SIGSTOP)

    def other_host(self) -> None:
        """Start the other host too; the one that ran is frozen, and wakes perhaps, or runs on."""
        first = next(iter(self.running().values()), None)
        other = next((number for number in (0, 1) if number not in self.running()), None)
        if other is None:
            return
        if first is not None and self.chance.random() < 0.6:
            self.say("freeze who ran")
            first.signal(signal.SIGSTOP)
        self.start(other)
        time.sleep(self.chance.choice((0.5, 2, 12)))
        if first is not None and first.frozen and self.chance.random() < 0.7:
            self.say("who ran wakes")
            first.signal(signal.SIGCONT)
            time.sleep(self.chance.choice((0, 1)))

    def other_code(self) -> None:
        self.code = 1 - self.code
        self.kill_all()
        self.start(self.chance.randrange(2))

    def lose_folder(self) -> None:
        number = self.chance.randrange(2)
        if number in self.running():
            self.running()[number].kill()
        self.say(f"host {number} loses its folder")
        shutil.rmtree(self.host(number), ignore_errors=True)

    def lose_store(self) -> None:
        self.reader.strict = self.whole = False
        if self.store == "duckdb":
            self.kill_all()
        self.say("the store is wiped")
        self.kind.wipe(self.settings)

    def poison(self) -> None:
        if self.store == "duckdb":
            return
        self.say(f"row {UNFIT} is {'fit again' if self.unfit.exists() else 'unfit'}")
        if self.unfit.exists():
            self.unfit.unlink()
        else:
            self.unfit.touch()
            execute(
                self.settings, f"INSERT INTO ticks VALUES ({UNFIT}, 0) ON CONFLICT (id) DO UPDATE SET n = ticks.n + 1"
            )

    def away(self) -> None:
        name = SERVERS.get(self.store, "kafka")
        server, how = self.stack.server(name), self.chance.choice(("pause", "kill"))
        self.say(f"{name}: {how}")
        with moving:
            disturbances.append(name)
            if how == "kill":
                self.reader.strict = self.reader.strict and name != "redis"
                server.kill()
                time.sleep(self.chance.choice((0, 2)))
                server.start()
            else:
                server.pause()
                time.sleep(self.chance.choice((1, 4, 12)))
                server.resume()

    # How it ends

    def settle(self) -> None:
        """All is up and left alone: the view comes to the newest LSN, or says which command it wants."""
        for each in self.running().values():
            each.arm(0)
            if each.frozen and self.chance.random() < 0.5:
                each.kill()
            each.signal(signal.SIGCONT)
        self.unfit.unlink(missing_ok=True)
        target, deadline, starts, tried = now(self.settings), time.monotonic() + PATIENCE, 0, list[str]()
        self.say(f"left alone, to come to {target}")
        self.since = max(self.since, time.monotonic() + 1.0)  # what was asked just now takes a moment to be said
        looked = time.monotonic()
        while not self.has(target):
            if not self.running():
                starts += 1
                assert starts < 8, f"it ends again and again: {self.output('run', self.newest).read_text()}"
                self.start(self.chance.randrange(2), steps=False)
            assert time.monotonic() < deadline, f"stuck after {tried} at {self.reports()}"
            wanted = self.wanted() if time.monotonic() - looked > 3 else None
            if wanted is not None and tried.count(wanted[0]) < 4:
                tried.append(wanted[0])
                code, said = self.ask(*wanted[1])
                if code == Misconfigured.exit_code and (further := commands_in(said, self.view)):
                    self.ask(*self.filled(further[0]))
                deadline, looked = time.monotonic() + PATIENCE, time.monotonic()
            time.sleep(0.3)
        self.say(f"settled after {tried}")
        self.await_reader()

    def has(self, target: int) -> bool:
        """Whether who runs now says that the live generation shows it all."""
        heard = min(DEAD_SECONDS, time.monotonic() - self.since)
        live = [each for each in self.reports() if each.live and each.age < heard and not each.ended]
        return any(e.phase == "live" and e.version.lsn >= target and not e.facts.get("parked") for e in live)

    def wanted(self) -> tuple[str, tuple[str, ...]] | None:
        """Which command the view's status names: of its live generation, of the newest while there is none."""
        found = [each for each in self.reports() if not each.dead and not each.ended]
        for each in [each for each in found if each.live] or found[-1:]:
            if parked := each.facts.get("parked"):
                return f"{parked} parked", ("parked", "retry", self.view, "--all", "--generation", str(each.generation))
            words = commands_in(f"do: {each.remedy} {each.reason}", self.view)
            if words and (each.phase in {"stopped", "stale", "paused", "dropped"} or each.code == "not-by-itself"):
                return f"{each.generation} {each.phase} {each.code}", self.filled(words[0])
        return None

    def await_reader(self) -> None:
        self.reader.strict = True
        polls, deadline = self.reader.polls + 3, time.monotonic() + PATIENCE
        while self.reader.polls < polls and not self.reader.wrong:
            assert time.monotonic() < deadline, f"the reader sees nothing: {self.reader.said}"
            time.sleep(0.05)
        assert not self.reader.wrong, self.reader.wrong

    def compare(self) -> None:
        """The live generation equals Postgres; when the others are dropped, nothing of them is left anywhere."""
        if len(self.running()) > 1:
            self.kill_all()
            self.start(self.chance.randrange(2), steps=False)
            self.settle()
        (host,) = self.running()
        (live,) = {each.generation for each in self.reports() if each.live}
        self.do("verify", self.view)
        for number in sorted({each.generation for each in self.reports()} - {live}):
            code, said = self.ask("drop", self.view, str(number))
            assert code == 0 or "no-such-generation" in said, said
        if self.replay_killed:
            self.ask("replay", "--against", self.view)
            self.replay_killed = False
        self.check_left({live}, host)

    def check_left(self, wanted: set[int], host: int) -> None:
        """Nothing but these generations is there: in control, in the store, on the host, among what is parked."""
        told = orjson.loads(self.do("status", "--json"))["consumers"].get(self.view, [])
        assert {each["generation"] for each in told} - {0} == wanted, told
        held = self.held()
        assert held is None or set(held) == wanted, held
        assert {each.generation for each in self.shelf.entries(self.view)} <= wanted
        files = numbers(map(str, self.host(host).rglob("*")), r"-g(\d+)\.")
        assert files <= wanted or not self.whole, f"host {host} has {files}"
        with self.closed(host):
            left = self.kind.traces(self.settings) - {SCRATCH}
        assert left == wanted, f"the store has {left}"

    @contextmanager
    def closed(self, host: int) -> Iterator[None]:
        """Nobody has the file of a store that one process has at a time."""
        if self.store != "duckdb":
            yield
            return
        self.kill_all()
        yield
        self.start(host, steps=False)
        self.able()

    def drop_all(self) -> None:
        self.reader.strict = False
        self.do("drop", self.view, "--all")
        self.check_left(set(), next(iter(self.running())))
        self.do("rebuild", self.view)

    def failure(self) -> str:
        """Go through it all; return what did not hold."""
        self.start(0, steps=False)
        self.held()  # its first look ends what a process before it has left undone
        self.reader.start()
        try:
            self.go()
        except BaseException:  # noqa: BLE001  the others end
            said = f"{self.store}: {traceback.format_exc()}"
            self.say(f"FAILED {said}")
            return said
        finally:
            self.reader.stop()
            for each in self.hosts:
                if each is not None:
                    each.kill()
        return ""

    def go(self) -> None:
        self.settle()
        for number in range(1, STEPS + 1):
            self.step()
            assert not self.reader.wrong, self.reader.wrong
            if number % REST == 0 or number == STEPS:
                self.settle()
                self.compare()
        self.drop_all()
        self.settle()


def commands_in(said: str, view: str) -> list[tuple[str, ...]]:
    """Return the commands about a view that a remedy names."""
    _, _, remedy = said.partition("do:")
    verbs = r"headrace ((?:rebuild|promote|rollback|drop|pause|resume|parked \w+)(?: [-\w?]+)*)"
    found = re.findall(verbs, " ".join(remedy.split()))
    named = [re.sub(rf"({view}(?: --?[\w-]+(?: \w+)?| \d+)*).*", r"\1", each) for each in found]
    return [tuple(shlex.split(each)) for each in named if view in each]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", SEEDS)
def test_any_history_of_generations_ends_well(
    settings: Settings, stack: Stack, tmp_path: Path, seed: int, request: pytest.FixtureRequest
) -> None:
    """A view in each of some stores, at the same time."""
    stores = random.Random(seed).sample(STORES, min(len(STORES), AT_ONCE))
    for store, server in (("redis", "redis_server"), ("elasticsearch", "elasticsearch")):
        if store in stores:
            request.getfixturevalue(server)
    prepare(settings, *MAKE)
    print(f"\n=== seed {seed}", flush=True)  # noqa: T201
    histories = [History(settings, stack, tmp_path, store, seed) for store in stores]
    with capturing(settings), repeating(settings, TICK, every=0.2), ThreadPoolExecutor(len(stores)) as pool:
        failed = [each for each in pool.map(History.failure, histories) if each]
    assert not failed, "\n".join(failed)
