"""Any history: what a linear reader of the log ends with is what Postgres has, and every complete checkpoint is a state it had."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import replace

import psycopg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headrace.change import Row
from headrace.log import Log
from headrace.settings import Settings
from tests.fixtures.capture import Running, changes, execute, now, prepare, replay, selected
from tests.fixtures.mortal import Died, Life, MortalLog

T = "public.items"
ITEMS = (
    "CREATE TABLE items (id int PRIMARY KEY, n int, big text); ALTER TABLE items ALTER COLUMN big SET STORAGE EXTERNAL"
)
KEYS = st.integers(1, 6)
BIG = "repeat(md5('{}'), 90)"
VALUES = ["NULL", "'small'", BIG.format(1), BIG.format(2)]
CHANGE = st.one_of(
    st.builds(
        "INSERT INTO items VALUES ({0}, {1}, {2})".format,
        KEYS,
        st.integers(0, 9),
        st.sampled_from(VALUES),
    ),
    st.builds("UPDATE items SET n = {1} WHERE id = {0}".format, KEYS, st.integers(10, 19)),
    st.builds("UPDATE items SET big = {1} WHERE id = {0}".format, KEYS, st.sampled_from(["'less'", BIG.format(3)])),
    st.builds("UPDATE items SET id = {1} WHERE id = {0}".format, KEYS, KEYS),
    st.builds("UPDATE items SET id = id + 100 WHERE id > {0}".format, KEYS),
    st.builds("DELETE FROM items WHERE id = {0}".format, KEYS),
    st.just("TRUNCATE items"),
)
TRANSACTION = st.tuples(st.lists(CHANGE, min_size=1, max_size=6), st.booleans())
HISTORY = st.lists(
    st.one_of(TRANSACTION, TRANSACTION, TRANSACTION, st.sampled_from(["restart", "crash"])), min_size=1, max_size=12
)


class Lab:
    """One source, captured through all examples, in one codec after another; a linear record of the states that Postgres had, by LSN."""

    def __init__(self, settings: Settings, codecs: tuple[str, ...]) -> None:
        self.settings = settings
        self._codecs = itertools.cycle(codecs)
        self.start()
        self.running.reach()
        self.states: list[tuple[int, int, dict[bytes, Row]]] = []

    def start(self) -> None:
        self.life = Life()
        self.settings = replace(self.settings, codec=next(self._codecs))
        self.running = Running(self.settings, MortalLog(self.settings, self.life))

    def restart(self, how: str) -> None:
        """Stop capture as its operator would, or as SIGKILL does, wherever it is; start it again."""
        if how == "crash":
            self.life.end()
        self.running.stop()
        assert self.running.error is None or (how == "crash" and isinstance(self.running.error, Died))
        self.start()

    def commit(self, statements: list[str], *, roll_back: bool) -> None:
        """Run a transaction; a statement that fails undoes itself alone."""
        with psycopg.connect(self.settings.dsn, autocommit=True) as connection, connection.transaction() as whole:
            for statement in statements:
                with suppress(psycopg.errors.UniqueViolation), connection.transaction():
                    connection.execute(statement.encode())
            before = now(self.settings)
            if roll_back:
                raise psycopg.Rollback(whole)
        self.states.append((before, now(self.settings), selected(self.settings, T)))

    def states_at(self, lsn: int) -> list[dict[bytes, Row]]:
        """Return what Postgres had at an LSN; two states when it lies where a commit was on its way."""
        states = [state for before, _, state in self.states if before < lsn]
        return states[-2:] if any(before < lsn < after for before, after, _ in self.states) else states[-1:]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("identity", "codecs"), [("FULL", ("json",)), ("DEFAULT", ("json",)), ("DEFAULT", ("avro", "json"))]
)
@pytest.mark.usefixtures("registry")
def test_any_history_replays_to_what_postgres_has(settings: Settings, identity: str, codecs: tuple[str, ...]) -> None:
    """Several changes a transaction, rollbacks, changed keys, TRUNCATE, values out of line, restarts, crashes, cuts of five records."""
    settings = replace(settings, cut_records=5)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, i, repeat(md5(i::text), 90) FROM generate_series(1, 3) i")
    execute(settings, f"ALTER TABLE items REPLICA IDENTITY {identity}")
    lab = Lab(settings, codecs)

    @hypothesis_settings(max_examples=10, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(HISTORY)
    def histories(history: list[tuple[list[str], bool] | str]) -> None:
        for step in history:
            if isinstance(step, str):
                lab.restart(step)
            else:
                lab.commit(step[0], roll_back=step[1])
        lab.running.reach()
        assert replay(settings, T) == selected(settings, T)

    try:
        histories()
        lab.running.stop()
        assert lab.running.error is None
        every_checkpoint_is_a_state(lab)
    finally:
        lab.running.stop()


def every_checkpoint_is_a_state(lab: Lab) -> None:
    """Cut at its `ends`, the log is Postgres at its LSN; a value read again may be a later one until its change has come (S7)."""
    log = changes(lab.settings, T)
    topic = Log(lab.settings).topic_of(T)
    first = lab.states[0][1]
    for checkpoint in Log(lab.settings).checkpoints():
        if not checkpoint.complete or checkpoint.version.lsn < first:
            continue
        state: dict[bytes, Row | None] = {}
        reread: set[bytes] = set()
        for change in log[: sum(c.offset < checkpoint.ends[topic][0] for c in log)]:
            state[change.key] = change.row
            (reread.add if change.read == "reread" else reread.discard)(change.key)
        had = [{k: r for k, r in had.items() if k not in reread} for had in lab.states_at(checkpoint.version.lsn)]
        found = {k: r for k, r in state.items() if r and k not in reread}
        assert found in had
