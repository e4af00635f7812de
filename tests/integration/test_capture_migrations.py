"""Any history of migrations amid the writes of several sessions, with capture killed and started: the log ends as Postgres, by itself.

What capture refuses is mended as it says. An odd seed is of a history of all there is, an even one of DDL that is taken back
(`taken_back`). VERSIONS=15,17 names those of Postgres.
"""

from __future__ import annotations

import os
import random
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace

import psycopg
import pytest

from headrace.log import Log
from headrace.settings import Settings
from headrace_capture import attention, catalog, resnapshot, setup
from headrace_capture.recovery import recover
from headrace_ops.postgres import Postgres
from tests.fixtures.capture import Running, eventually, execute, now, rows
from tests.fixtures.migrations import Migrations
from tests.fixtures.mortal import Died, Life, MortalLog
from tests.fixtures.resnapshots import jobs
from tests.fixtures.seeds import ASKED, seeds, steps
from tests.fixtures.sessions import Sessions, Step, history, taken_back
from tests.fixtures.stack import drop_database
from tests.fixtures.states import State, difference, newest_shape, of_log, of_postgres, states_of
from tests.fixtures.versions import NEWEST
from tests.fixtures.writes import IDENTIFIED, MADE, MOOD, TABLES

pytestmark = pytest.mark.usefixtures("often")

PATIENCE = 180.0
SEEDS = seeds("1,2")
AROUND = ["restart", "crash", "die", "die", "settle", "settle", "settle", "reach", "reach", "off", "off", "nap"]
"""What happens to capture in place of a step."""
LOOKED: dict[str, float] = {}
"""When the catalogue was asked whose answer was judged last, by source."""


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = resnapshot.Resnapshot._judge

    def judging(self: resnapshot.Resnapshot, findings: attention.Findings) -> None:
        judge(self, findings)
        LOOKED[self._log.settings.source] = findings.asked

    monkeypatch.setattr(resnapshot.Resnapshot, "_judge", judging)


class Lab:
    """One source, captured through one history.

    Attributes:
        states: What Postgres had, each with the LSNs before and after the commit that made it.
        unsure: Where rows of a table may have changed without an event, from the DDL until all was read again.
        refusals: What capture refused, by code.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.chance = random.Random(seed)
        self.running: Running | None = None
        self.said: list[str] = []
        self.waits: object = None
        self.refusals: list[str] = []
        self.recovered = 0
        self.sessions: Sessions
        self.states: list[tuple[int, int, dict[str, State | None]]] = []
        self.unsure: dict[str, list[tuple[int, int]]] = {table: [] for table in TABLES}
        self._migrating: dict[str, int] = {}
        self._chunked = self.chance.random() < 0.3

    # Capture

    def start(self, steps: int = 10**9) -> None:
        self.life = Life(steps)
        self.running = Running(self.settings, MortalLog(self.settings, self.life), chunked=self._chunked)

    def stop(self) -> None:
        """End it, and do what it says if it has refused to go on; what is not known here is a finding."""
        if self.running is None:
            return
        self.running.stop()
        self.said += self.running.said
        error, self.running = self.running.error, None
        if error is None or isinstance(error, Died):
            return
        self.refusals.append(getattr(error, "code", repr(error)))
        if getattr(error, "code", "") not in {"key-changed", "key-not-sent"}:
            raise error
        assert "headrace resnapshot --recover" in str(error.remedy)  # type: ignore[attr-defined]
        self.recovered = now(self.settings)
        self.sessions.end()  # a new slot waits for what is open
        recover(self.settings, self.said.append)

    def alive(self) -> bool:
        """Start it unless it runs."""
        if self.running is not None and self.running.error is not None:
            self.stop()
        if self.running is None:
            self.start()
        return True

    # Steps

    def step(self, step: Step, sessions: Sessions) -> None:
        around = getattr(self, f"do_{step.kind}", None)
        if around is not None:
            sessions.script.append(f"-- {step.kind}")
            around(random.Random(step.chance), sessions)
            return
        sessions.step(step)

    def note(self, before: int) -> None:
        """Note the state after a commit; of a table that a session holds locked it is the one before."""
        after = now(self.settings)
        for table in self.sessions.migrated:
            self._migrating.setdefault(table, before)
        state = dict(self.states[-1][2]) if self.states else {}
        for table in TABLES:
            with suppress(psycopg.errors.LockNotAvailable):
                state[table] = of_postgres(self.sessions.ask, table)
        self.states.append((before, after, state))

    def do_restart(self, _chance: random.Random, _sessions: Sessions) -> None:
        self.stop()
        self.start()

    def do_crash(self, _chance: random.Random, _sessions: Sessions) -> None:
        self.life.end()
        self.stop()
        self.start()

    def do_die(self, chance: random.Random, _sessions: Sessions) -> None:
        self.stop()
        self.start(chance.randint(1, 60))

    def do_off(self, _chance: random.Random, _sessions: Sessions) -> None:
        self.stop()

    def do_nap(self, chance: random.Random, _sessions: Sessions) -> None:
        time.sleep(chance.random() * 0.5)

    def do_reach(self, *_: object) -> None:
        lsn = now(self.settings)

        def there() -> bool:
            newest = Log(self.settings).newest_checkpoint(complete=True)
            return newest is not None and newest.version.lsn >= lsn

        self._until("the log reaches", there)

    def do_look(self, *_: object) -> None:
        self._look()

    def do_settle(self, _chance: random.Random, sessions: Sessions) -> None:
        """Bring everything to rest, and compare."""
        since = now(self.settings)
        sessions.end()
        self._heal(sessions)
        self._touch()
        self._rest()
        compare(self.settings)
        self.note(now(self.settings))
        until = now(self.settings)
        for table in TABLES:
            self.unsure[table].append((self._migrating.get(table, since), until))
        self._migrating.clear()
        sessions.migrated.clear()

    # Rest

    def _until(self, what: str, condition: Callable[[], bool]) -> None:
        eventually(what, lambda: self.alive() and condition(), PATIENCE)

    def _rest(self) -> None:
        """Wait until capture has seen the catalogue of now, and nothing is to be read again."""
        while True:
            self._look()
            self._until("nothing is to be read again", self._rests)
            running = self.running
            self._look()
            if self.running is running and self._rests():
                return

    def _look(self) -> None:
        began = time.monotonic()
        self._until("it has looked", lambda: LOOKED.get(self.settings.source, 0.0) > began)
        self.do_reach()

    def _rests(self) -> bool:
        newest = Log(self.settings).newest_checkpoint(complete=True)
        found = {name: said["phase"] for name, said in jobs(self.settings).items()}
        assert "failed" not in found.values(), jobs(self.settings)
        self.waits = found, newest
        return newest is not None and not newest.inexact and set(found.values()) <= {"done", "left"}

    def _heal(self, sessions: Sessions) -> None:
        """Bring the schema to where all can be captured: each table by its name, published, with a key."""
        for table in TABLES:
            there = {name for (name,) in rows(self.settings, _THERE)}
            old = f"{table}_old"
            if table not in there:
                made = [f"ALTER TABLE {old} RENAME TO {table}"] if old in there else [MADE[table], IDENTIFIED[table]]
                execute(self.settings, *made)
            elif old in there:
                execute(self.settings, f"DROP TABLE {old}")
            if not rows(self.settings, _SENT.format(self.settings.publication, table)):
                execute(self.settings, f"ALTER PUBLICATION {self.settings.publication} ADD TABLE {table}")
            with psycopg.connect(self.settings.dsn, autocommit=True) as connection:
                self._heal_key(sessions, Migrations(connection, table, self.chance, 0, self.settings.publication))

    def _heal_key(self, sessions: Sessions, maker: Migrations) -> None:
        table = maker.table
        shape = newest_shape(self.settings, f"public.{table}")
        if not any(column.key for column in maker.columns):
            names = list(shape.key) if shape else []
            if not names or not set(names) <= {column.name for column in maker.columns}:
                names = ["healed"]
                added = "ADD COLUMN IF NOT EXISTS healed int GENERATED BY DEFAULT AS IDENTITY"
                execute(self.settings, f"ALTER TABLE {table} {added}")
            assert sessions.run(0, maker.rekey(names), atomic=True), sessions.script[-1]
        elif maker.replica_identity() == "n":
            execute(self.settings, f"ALTER TABLE {table} REPLICA IDENTITY FULL")

    def _touch(self) -> None:
        """Write one row of each table: a column that is new and null everywhere, or gone, comes and goes with the next one."""
        for table in TABLES:
            ((name,),) = rows(self.settings, _FIRST.format(table))
            before = now(self.settings)
            execute(
                self.settings, f'UPDATE {table} SET "{name}" = "{name}" WHERE ctid = (SELECT min(ctid) FROM {table})'
            )
            self.note(before)


_THERE = "SELECT relname::text FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
_SENT = "SELECT FROM pg_publication_tables WHERE pubname = '{}' AND tablename = '{}'"
_FIRST = (
    "SELECT attname::text FROM pg_attribute WHERE attrelid = '{}'::regclass AND attnum > 0 AND NOT attisdropped "
    "AND attgenerated = '' AND attidentity <> 'a' ORDER BY attnum LIMIT 1"
)


def compare(settings: Settings) -> None:
    """The log is what Postgres has, and its newest schema is the table's."""
    for table in TABLES:
        wanted = of_postgres(lambda query: rows(settings, query), table)
        assert wanted is not None, table
        got, _ = of_log(settings, table)
        assert not (found := difference(got, wanted)), f"{table} differs: {found}"
        shape = newest_shape(settings, f"public.{table}")
        if wanted.rows:
            assert shape is not None
            columns = {column.name: column.type.removeprefix("public.") for column in shape.columns}
            assert list(columns.items()) == wanted.columns, f"the shape of {table}"


def every_checkpoint_is_a_state(lab: Lab) -> None:
    """Where nothing was to be read again; a value read again may be a later one until its change has come (S7)."""
    first = max(lab.states[0][1], lab.recovered)
    for table in TABLES:
        for checkpoint, got, reread in states_of(lab.settings, table):
            lsn = checkpoint.version.lsn
            unsure = any(since <= lsn <= until for since, until in lab.unsure[table])
            if lsn < first or unsure or f"public.{table}" in checkpoint.inexact:
                continue
            had = [state[table] for before, _, state in lab.states if before < lsn]
            amid = any(before < lsn < after for before, after, _ in lab.states)
            among = [state for state in (had[-2:] if amid else had[-1:]) if state is not None]
            found = [difference(got, state, reread) for state in among]
            assert not found or not all(found), f"{table} at {checkpoint}: {found}"


@contextmanager
def lab_of(settings: Settings, server: Postgres, seed: int) -> Iterator[Lab]:
    """A database, source and slot of this history's own."""
    chance = random.Random(seed)
    name = f"m{seed}_{uuid.uuid4().hex[:6]}"
    execute(replace(settings, dsn=server.address()), f"CREATE DATABASE {name}")
    own = replace(settings, dsn=server.dsn(name), **dict.fromkeys(("source", "slot", "publication"), name))
    cuts, partitions = chance.choice([1, 2, 3, 5, 10, 25]), chance.choice([1, 1, 1, 3])
    codec = chance.choice(["json", "json", "avro"]) if ASKED else "json"
    lab = Lab(replace(own, cut_records=cuts, partitions=partitions, codec=codec), seed)
    try:
        yield lab
    finally:
        if lab.running is not None:
            lab.running.stop()
        drop_database(server.address(), name)


def begin(lab: Lab) -> None:
    settings = lab.settings
    execute(settings, MOOD, *MADE.values())
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        for table in TABLES:
            makers = [Migrations(connection, table, lab.chance, 0, settings.publication) for _ in range(4)]
            execute(settings, *(statement for maker in makers for statement in maker.insert()))
    execute(settings, IDENTIFIED["coded"])
    with closing(catalog.connect(settings.dsn)) as connection:
        setup.apply(connection, setup.plan(connection, settings, []))
    execute(settings, *IDENTIFIED.values())
    lab.start()
    lab.do_reach()


def live(settings: Settings, server: Postgres, seed: int) -> str:
    """Live through one history; return what went wrong, with all that was done."""
    drawn = history(seed, steps(15), AROUND) if seed % 2 else taken_back(seed)
    with lab_of(settings, server, seed) as lab:
        begin(lab)
        with closing(Sessions(lab.settings)) as sessions:
            lab.sessions, sessions.committed = sessions, lab.note
            try:
                lab.note(now(lab.settings))
                for step in drawn:
                    lab.step(step, sessions)
                lab.do_settle(lab.chance, sessions)
                every_checkpoint_is_a_state(lab)
            except (Exception, Died):  # noqa: BLE001  told with the script
                said = lab.said + (lab.running.said if lab.running else [])
                about = (
                    f"seed {seed} cuts of {lab.settings.cut_records} {lab.settings.partitions=} {lab.settings.codec}"
                )
                return "\n".join([about, *sessions.script, *said, traceback.format_exc(), str(lab.waits)])
    return ""


@pytest.mark.timeout(900 * len(SEEDS))
@pytest.mark.parametrize("version", os.environ.get("VERSIONS", NEWEST).split(","))
def test_any_migration_ends_as_postgres(
    settings: Settings, looking: None, request: pytest.FixtureRequest, version: str
) -> None:
    """Three sessions, four tables: rows out of line, REPLICA IDENTITY FULL, a unique index for a key, and two that look the same."""
    if ASKED:
        request.getfixturevalue("registry")
    server = request.getfixturevalue("postgres" if version == NEWEST else "older_postgres")
    server = server if version == NEWEST else server(version)

    def one(seed: int) -> str:
        found = live(settings, server, seed)
        print(f"{time.strftime('%X')} seed {seed} on {version}: {'failed' if found else 'ok'}", flush=True)  # noqa: T201
        return found

    with ThreadPoolExecutor(3) as pool:
        failed = [found for found in pool.map(one, SEEDS) if found]
    assert not failed, "\n\n".join(failed)
