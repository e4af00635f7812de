"""Gates: a build that differs from Postgres is not promoted, and nothing is built that nobody could compare."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import orjson
import pytest

from headrace import plugins
from headrace.errors import Misconfigured
from headrace.settings import Settings
from tests.fixtures import ticks
from tests.fixtures.capture import eventually, prepare
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.generations import (
    PLAIN,
    await_phase,
    build,
    build_and_promote,
    captured,
    command,
    headrace,
    live_of,
    report,
)
from tests.fixtures.plain import Loses, Plain
from tests.fixtures.serving import await_live, serving


def lose_pointer(settings: Settings, *gone: int) -> None:
    """Let the store forget which generation is live, and some generations."""
    with closing(sqlite3.connect(settings.path("plain.sqlite"))) as db, db:
        db.execute("UPDATE generations SET live = 0")
        db.executemany("DELETE FROM generations WHERE number = ?", [(number,) for number in gone])


@pytest.mark.parametrize("gate", ["verify", "counts"])
def test_a_build_that_differs_is_refused_and_stays_beside_the_live_one(settings: Settings, gate: str) -> None:
    prepare(
        settings, "CREATE TABLE items (id int PRIMARY KEY, n int)", "INSERT INTO items VALUES (1, 1), (2, 2), (3, 3)"
    )
    view = Plain(settings, "plain")
    with captured(settings, plain=Loses) as control:
        spec = ("--consumer", f"{PLAIN}:Loses")
        ended = headrace(settings, "rebuild", "plain", "--wait", "--gate", gate, *spec)
        assert ended.returncode == 1, ended.stdout + ended.stderr
        assert "generation 2 of plain differs from Postgres" in ended.stderr
        assert "headrace drop plain 2, then: headrace rebuild plain" in ended.stderr
        assert [generation.live for generation in view.generations()] == [True, False]
        lose_pointer(settings)
        eventually("readers have theirs again", lambda: live_of(settings) == [1])
        ended = headrace(settings, "rebuild", "plain", "--wait", "--gate", "none", "--json")
        assert ended.returncode == 0, ended.stderr
        eventually("it is live", lambda: control.running("plain")[-1].live)


def test_nothing_is_built_where_the_gate_could_not_ask_the_code_that_runs(
    feed: Feed, settings: Settings, tmp_path: Path
) -> None:
    """It would be found out after the build, which may take hours."""
    feed.cut((ITEMS, 1, 1))
    newer = tmp_path / "newer.py"
    newer.write_text(PLAIN.read_text() + "# other code\n")
    specs = {"other-code": (f"{newer}:Plain",), "unknown-consumer": (f"{newer.parent}/none.py:Plain",)}
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        for code, spec in (*specs.items(), ("unknown-consumer", ())):
            options = [word for each in spec for word in ("--consumer", each)]
            refused = command(settings, "rebuild", "plain", "--wait", *options).exception
            assert isinstance(refused, Misconfigured)
            assert refused.code == code
            if code == "other-code":
                assert "start that process again, then: headrace rebuild plain --wait" in refused.remedy
        assert [generation.number for generation in Plain(settings, "plain").generations()] == [1]


def test_nothing_is_built_by_code_that_was_changed_since(feed: Feed, settings: Settings, tmp_path: Path) -> None:
    """It would be what runs, again and again; started anew the process has the new one."""
    feed.cut((ITEMS, 1, 1))
    file = tmp_path / "view.py"
    file.write_text(PLAIN.read_text())
    view = Plain(settings, "plain")
    with serving(settings, plain=plugins.load_file(f"{file}:Plain")[1]) as control:
        await_live(control, "plain")
        for saved in ("# other code\n", "half a line("):
            file.write_text(PLAIN.read_text() + saved)
            with pytest.raises(Misconfigured, match="changed after its process had been started") as refused:
                control.ask("plain", "rebuild")
            assert refused.value.code == "other-code"
            assert "Start that again, then: headrace rebuild plain" in refused.value.remedy
        assert [generation.number for generation in view.generations()] == [1]
    file.write_text(PLAIN.read_text() + "# other code\n")
    with serving(settings, plain=plugins.load_file(f"{file}:Plain")[1]) as control:
        await_phase(control, "plain", 1, "stale")
        assert command(settings, "rebuild", "plain", "--wait", "--gate", "none").exit_code == 0
        assert live_of(settings) == [2]


def test_neither_what_a_gate_refused_nor_what_was_rolled_back_from_goes_live_by_itself(
    feed: Feed, settings: Settings
) -> None:
    """Also after a restart, when nothing else is left; a person may still want it."""
    feed.cut((ITEMS, 1, 1))
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        build_and_promote(control, 2)
        control.ask("plain", "rollback")
        lose_pointer(settings)
        build(control, 3)
        control.ask("plain", "refuse", {"generation": 3})
    lose_pointer(settings, 1)
    with serving(settings, plain=Plain) as control:
        for number in (2, 3):
            await_phase(control, "plain", number, "following")
        eventually("that is said", lambda: report(control, "plain", 3).code == "not-by-itself")
        assert live_of(settings) == []
        control.ask("plain", "promote", {"generation": 3})
        assert live_of(settings) == [3]
        eventually("it is live, and well", lambda: report(control, "plain", 3).code == "")
    lose_pointer(settings)
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
    assert live_of(settings) == [3]


def test_a_first_build_that_differs_is_said_to_be_live_already(settings: Settings, tmp_path: Path) -> None:
    """Where nothing is live the first state goes live by itself: there is nothing that readers could keep instead.

    So it is said of one that could not be compared, because verify was killed.
    """
    dies = tmp_path / "dies.py"
    killed = "import os, sys\nif 'verify' in sys.argv and os.path.exists(__file__ + '.dies'): os.kill(os.getpid(), 9)\n"
    dies.write_text(f"{PLAIN.read_text()}\n{killed}")
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY, n int)", "INSERT INTO items VALUES (1, 1), (2, 2)")
    view = Plain(settings, "plain")
    with captured(settings, plain=plugins.load_file(f"{dies}:Lacks")[1]) as control:
        control.ask("plain", "drop", {"all": True})
        ended = headrace(settings, "rebuild", "plain", "--wait", "--consumer", f"{dies}:Lacks")
        assert ended.returncode == 1, ended.stdout + ended.stderr
        assert "generation 1 of plain differs from Postgres; it is live already, for no other was" in ended.stderr
        assert "nothing was promoted" not in ended.stderr
        assert [generation.live for generation in view.generations()] == [True]
        dies.with_suffix(".py.dies").touch()
        ended = headrace(settings, "rebuild", "plain", "--wait", "--consumer", f"{dies}:Lacks")
        assert (ended.returncode, "killed by signal 9. Nothing was promoted" in ended.stderr) == (5, True), ended.stderr
        assert [generation.live for generation in view.generations()] == [True, False]


def test_counts_are_exact_while_rows_come_and_go(settings: Settings) -> None:
    prepare(
        settings,
        "CREATE TABLE items (id int PRIMARY KEY, n int)",
        "INSERT INTO items SELECT i FROM generate_series(1, 50) i",
    )
    with captured(settings, plain=Plain), ticks.repeating(settings, *COMING_AND_GOING, every=0.01):
        counts: list[int] = []
        for _ in range(3):
            counted = headrace(settings, "verify", "--consumer", f"{PLAIN}:Plain", "--counts", "--json")
            assert counted.returncode == 0, counted.stdout + counted.stderr
            (fact,) = orjson.loads(counted.stdout)
            counts.append(fact["rows"])
        assert counts == sorted(set(counts)), "there were more each time"


COMING_AND_GOING = (
    "INSERT INTO items SELECT top + i FROM (SELECT max(id) AS top FROM items) t, generate_series(1, 3) i",
    "UPDATE items SET id = -id WHERE id = (SELECT max(id) FROM items)",
    "DELETE FROM items WHERE id = (SELECT min(id) FROM items)",
)
