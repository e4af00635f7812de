"""Rows that change all the time: verify decides them, right or wrong, or says that it could not."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from headrace.change import NOWHERE, Version
from headrace.control import Control
from headrace.errors import Transient
from headrace.log import Log
from headrace.settings import Settings, environment
from headrace_verify.ledger import DIFFERENT, Difference
from headrace_verify.verify import Verifier
from tests.fixtures.capture import capturing, eventually, execute, prepare
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving
from tests.fixtures.verified import ITEMS, Mirror, T, found, kept


@contextmanager
def churned(settings: Settings, statement: str) -> Iterator[None]:
    """Run a statement in Postgres again and again until the end, a transaction each: as fast as commits are durable."""
    loop = f"DO $$ BEGIN LOOP {statement}; COMMIT; END LOOP; END $$"

    def churn(connection: psycopg.Connection[Any]) -> None:
        with suppress(psycopg.errors.QueryCanceled):
            connection.execute(loop.encode())

    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        thread = threading.Thread(target=churn, args=(connection,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            connection.cancel()
            thread.join(30)


HOTTEST = f"UPDATE {T} SET n = n + 1 WHERE id = 1"


@contextmanager
def hot(settings: Settings) -> Iterator[None]:
    """Change one row all the time, and some hundreds often."""
    others = f"UPDATE {T} SET n = n + 1 WHERE id = 2 + floor(random() * 300)"
    with churned(settings, HOTTEST), churned(settings, others):
        yield


def test_rows_that_change_all_the_time_are_decided(settings: Settings) -> None:
    """Such a row is never quiet for as long as a change needs to the view: it is compared with the state that the view shows."""
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 400) i")
    with kept(settings, Mirror), hot(settings):
        for _ in range(3):
            assert found(settings, Mirror).clean


def test_so_are_rows_whose_keys_have_a_length(settings: Settings) -> None:
    coins = "CREATE TABLE coins (id char(3) PRIMARY KEY, n int)"
    flags = "CREATE TABLE flags (id bit(4) PRIMARY KEY, n int)"
    prepare(settings, coins, flags, "INSERT INTO coins VALUES ('USD', 1)", "INSERT INTO flags VALUES (B'1010', 1)")
    with kept(settings, Mirror), churned(settings, "UPDATE coins SET n = n + 1; UPDATE flags SET n = n + 1"):
        seen = found(settings, Mirror)
    assert seen.clean, seen.wrong


class Undecided(Control):
    """Asks a view that is always between two states."""

    def counts(self, name: str, generation: int, timeout: float = 150.0) -> tuple[Version, dict[str, int]]:
        return NOWHERE, super().counts(name, generation, timeout)[1]


def test_a_count_that_is_of_no_certain_state_ends_in_time(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verifier, "_await", lambda *_: None)  # that the view is there has the same time
    prepare(settings, ITEMS)
    with kept(settings, Mirror):
        log = Log(settings)
        with pytest.raises(Transient, match="between two states") as ended:
            list(Verifier(log, Undecided(log), lambda *_: None, 1).count({"view": Mirror}))
    assert ended.value.code == "view-behind"


def test_a_row_that_changes_all_the_time_and_is_wrong_is_found(settings: Settings) -> None:
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'right' FROM generate_series(1, 400) i")

    class Wrong(Mirror):
        """Spoils a column of one row whenever it is applied."""

        def apply(self, batch: Any) -> None:
            spoilt = [c._replace(row={**c.row, "name": "wrong"}) if c.key == b'{"id":1}' else c for c in batch.changes]
            super().apply(replace(batch, changes=spoilt))

    with kept(settings, Wrong), hot(settings):
        seen = found(settings, Wrong)
    assert seen.wrong == [Difference(DIFFERENT, T, '{"id":1}', ("name",))]
    assert not seen.undecided


def test_a_rebuild_is_verified_and_promoted_while_rows_change_all_the_time(settings: Settings) -> None:
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 400) i")
    code = Path(__file__).parents[1] / "fixtures" / "plain.py"
    command = [sys.executable, "-m", "headrace", "rebuild", "plain", "--wait", "--consumer", f"{code}:Plain"]
    with capturing(settings) as capture, serving(settings, plain=Plain) as control:
        capture.reach()
        await_live(control, "plain")
        with hot(settings):
            environ = environment(settings) | {"PATH": "/usr/bin:/bin"}
            built = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert [(g.number, g.live) for g in Plain(settings, "plain").generations()] == [(1, False), (2, True)]


def test_what_changes_while_the_view_stands_still_is_undecided_and_that_is_said(settings: Settings) -> None:
    prepare(settings, ITEMS, f"INSERT INTO {T} VALUES (1, 0, 'x')")
    with capturing(settings) as capture, serving(settings, view=Mirror) as control:
        capture.reach()
        await_live(control, "view")

        class Standing(Verifier):
            """Capture ends when the view has been compared."""

            def _compare(self, *args: Any) -> Any:
                execute(settings, HOTTEST)
                shown = capture.reach().version
                eventually("the view has it", lambda: control.reports()["view"][0].version >= shown)
                left = super()._compare(*args)
                capture.stop()
                execute(settings, HOTTEST)
                return left

        log = Log(settings)
        (outcome,) = Standing(log, Control(log), lambda *_: None, 15).verify({"view": Mirror})
        assert [d.key for d in outcome.undecided()] == ['{"id":1}']
        assert not list(outcome.wrong())
        assert any("showed nothing newer" in note for note in outcome.notes)
        outcome.close()
