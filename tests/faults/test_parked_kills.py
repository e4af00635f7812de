"""SIGKILL between what is written of a parked record and what is applied: nothing is lost, done twice or out of order."""

from __future__ import annotations

from functools import partial
from typing import Any

import orjson
import pytest

from headrace.control import Control
from headrace.errors import HeadraceError
from headrace.log import Log
from headrace.parked import Shelf
from headrace.settings import Settings
from tests.fixtures.capture import capturing, eventually, execute, prepare
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.parked import AFTER, BEFORE, FILE, applied, forbid
from tests.fixtures.plain import Plain
from tests.fixtures.processes import System
from tests.fixtures.shelf import FILMS, ONE, TWO, documents_or_none, parked


def start(system: System, name: str, cls: str) -> None:
    system.start(name, "run", "--consumer", f"{FILE}:{cls}")


def await_killed(system: System, name: str) -> None:
    """Wait until the program has killed itself, and take note of that."""
    eventually(f"{name} is killed", lambda: not system.alive(name))
    system.kill(name)


def facts(settings: Settings, name: str) -> dict[str, Any]:
    try:
        (report,) = Control(Log(settings)).running(name)
    except HeadraceError:
        return {}
    return report.facts | {"phase": report.phase}


def is_parked(settings: Settings, name: str, count: int) -> bool:
    return facts(settings, name).get("parked") == count


def ask(system: System, *command: str) -> tuple[int, Any]:
    ended = system.ask(*command, "--json")
    return ended.code, orjson.loads(ended.out) if ended.out else ended.err


def test_rows_killed_between_the_entry_and_apply_and_between_a_retry_and_its_tombstone(
    settings: Settings, system: System
) -> None:
    feed = Feed(settings)
    view = Plain(settings, "picky")
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    forbid(settings, 13)
    start(system, "picky", "Picky")
    eventually("it is live", lambda: view.rows() == {ONE: 10, TWO: 20})
    settings.path(BEFORE).touch()
    feed.cut((ITEMS, 2, 13), (ITEMS, 1, 11), (ITEMS, 2, 14))
    await_killed(system, "picky")
    assert parked(settings, "picky") == [TWO, TWO], "it is written before anything is applied without it"
    assert view.rows() == {ONE: 10, TWO: 20}
    start(system, "picky", "Picky")
    eventually("it is parked", partial(is_parked, settings, "picky", 2))
    eventually("the rest is applied", lambda: view.rows() == {ONE: 11, TWO: 20})
    forbid(settings)
    settings.path(AFTER).touch()
    code, _ = ask(system, "parked", "retry", "picky", TWO)
    assert code in {3, 5}, "nobody answers"
    await_killed(system, "picky")
    assert view.rows()[TWO] == 14
    assert parked(settings, "picky") == [TWO, TWO], "it is not known yet that it is done"
    start(system, "picky", "Picky")
    feed.cut((ITEMS, 2, 15))
    eventually("it is known to be done", lambda: view.rows() == {ONE: 11, TWO: 15})
    eventually("it is noted, which comes after", lambda: applied(settings, TWO)[3:])
    assert applied(settings, TWO) == ["20", "13", "14", "15"]
    assert Shelf(feed.log).entries("picky") == []
    assert view.rows() == {change.key.decode(): change.row["n"] for change in feed.log.scan(ITEMS) if change.row}


def test_rows_killed_when_they_are_given_up_are_given_up(settings: Settings, system: System) -> None:
    """A position that names what is on the shelf no more would be that of a view which lacks it."""
    feed = Feed(settings)
    view = Plain(settings, "picky")
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    start(system, "picky", "Picky")
    eventually("it is live", lambda: view.rows() == {ONE: 10, TWO: 20})
    forbid(settings, 13)
    feed.cut((ITEMS, 2, 13))
    eventually("it is parked", partial(is_parked, settings, "picky", 1))
    settings.path(AFTER).touch()
    code, _ = ask(system, "parked", "drop", "picky", TWO, "--yes")
    assert code in {3, 5}, "nobody answers"
    await_killed(system, "picky")
    assert parked(settings, "picky") == [TWO], "it is not known yet that it is given up"
    start(system, "picky", "Picky")
    feed.cut((ITEMS, 2, 15))
    eventually("it is applied again", lambda: view.rows() == {ONE: 10, TWO: 15})
    assert parked(settings, "picky") == []


@pytest.mark.usefixtures("redis_server")
def test_documents_killed_between_the_entry_and_apply_and_between_a_retry_and_its_tombstone(
    settings: Settings, system: System
) -> None:
    prepare(settings, *FILMS)
    control = Control(Log(settings))
    with capturing(settings) as capture:
        start(system, "paged", "Paged")
        eventually("it is live", lambda: len(documents_or_none(control, "paged")) == 6)
        forbid(settings, "13")
        settings.path(BEFORE).touch()
        execute(
            settings,
            "BEGIN; UPDATE films SET n = '13' WHERE id = 2; UPDATE reviews SET film_id = 2 WHERE id = 1; COMMIT",
        )
        await_killed(system, "paged")
        assert parked(settings, "paged") == ["2"]
        start(system, "paged", "Paged")
        eventually(
            "both parents of the move", lambda: documents_or_none(control, "paged").get("1", {}).get("etag") == ""
        )
        assert eventually("the other", lambda: documents_or_none(control, "paged").get("2")) == {
            "html": "2",
            "etag": "2",
        }
        eventually("it is said", partial(is_parked, settings, "paged", 1))
        execute(settings, "INSERT INTO reviews VALUES (7, 2), (8, 3)")
        capture.reach()
        eventually("others go on", lambda: documents_or_none(control, "paged").get("3", {}).get("etag") == "3,8")
        forbid(settings)
        settings.path(AFTER).touch()
        code, _ = ask(system, "parked", "retry", "paged", "2")
        assert code in {3, 5}, "nobody answers"
        await_killed(system, "paged")
        assert parked(settings, "paged") == ["2"]
        start(system, "paged", "Paged")
        execute(settings, "INSERT INTO reviews VALUES (9, 2)")
        capture.reach()
        eventually(
            "it is as it is now",
            lambda: documents_or_none(control, "paged").get("2", {}).get("etag") == "1,2,7,9",
        )
        assert eventually("it is there", lambda: documents_or_none(control, "paged").get("2"))["html"] == "13"
        assert parked(settings, "paged") == []
        ended = system.ask("verify", "--consumer", f"{FILE}:Paged", "--json")
        assert ended.code == 0, ended
