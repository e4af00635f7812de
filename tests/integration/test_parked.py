"""Records that cannot be done are parked by key: all others go on, later changes wait, and a retry ends in view == SELECT [I9]."""

from __future__ import annotations

import re
import shlex
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
from typer.testing import CliRunner, Result

from headrace import plugins
from headrace.change import Change, Version
from headrace.cli import app
from headrace.consumer import Batch
from headrace.control import Control, Report
from headrace.effects import EffectConsumer
from headrace.errors import HeadraceError, Misconfigured, Poison
from headrace.log import Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import CONTROL
from headrace.parked import Entry, Shelf
from headrace.settings import Settings, environment
from headrace.stores.duckdb import Database, query
from headrace.stores.redis import PageReader
from headrace_verify.verify import Verifier
from tests.fixtures.capture import capturing, eventually, execute, prepare
from tests.fixtures.feed import ITEMS, TAGS, Feed
from tests.fixtures.parked import Found, Housed, Paged, Picky, applied, forbid
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving

ONE, TWO, THREE = '{"id":1}', '{"id":2}', '{"id":3}'
FILMS = [
    "CREATE TABLE films (id int PRIMARY KEY, n text)",
    "CREATE TABLE reviews (id int PRIMARY KEY, film_id int)",
    "INSERT INTO films SELECT i, i::text FROM generate_series(1, 6) i",
    "INSERT INTO reviews VALUES (1, 1), (2, 2), (3, 3)",
]


def command(settings: Settings, *words: str) -> Result:
    return CliRunner().invoke(app, words, env=environment(settings) | {"COLUMNS": "200"})


def told(settings: Settings, *words: str, code: int = 0) -> Any:
    """Run a command with --json; return what it printed."""
    done = command(settings, *words, "--json")
    assert done.exit_code == code, (done.output, done.exception)
    return orjson.loads(done.stdout)


def parked(settings: Settings, name: str, generation: int | None = None) -> list[str]:
    """Return the keys under which something is parked, one for each record."""
    return [entry.key for entry in Shelf(Log(settings)).entries(name, generation)]


def report(control: Control, name: str, generation: int = 1) -> Report:
    """Return what a process that runs says of a generation."""
    reports = control.reports().get(name, [])
    found = [report for report in reports if report.generation == generation and not report.ended]
    return found[0] if found else Report(name, generation, phase="none")


def await_parked(control: Control, name: str, count: int, generation: int = 1) -> Report:
    """Wait until so many records are said to be parked."""
    eventually(f"{count} are parked", lambda: report(control, name, generation).facts.get("parked", 0) == count)
    return report(control, name, generation)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Of three partitions a table the rows 1 and 3 are in the first, 2 is in the second."""
    return replace(settings, partitions=3)


@pytest.fixture
def feed(settings: Settings) -> Feed:
    return Feed(settings)


# Rows


@pytest.fixture
def picky(feed: Feed, settings: Settings) -> Iterator[Control]:
    """A view with rows 1 and 2; of row 2 the changes 13 and 14 are parked, of row 1 the change 11 is not."""
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    forbid(settings, 13)
    with serving(settings, picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13), (ITEMS, 1, 11))
        await_parked(control, "picky", 1)
        feed.cut((ITEMS, 2, 14), (ITEMS, 3, 30))
        await_parked(control, "picky", 2)
        yield control


def test_later_changes_of_the_key_wait_and_all_others_go_on(feed: Feed, settings: Settings, picky: Control) -> None:
    view = Plain(settings, "picky")
    assert view.rows() == {ONE: 11, TWO: 20, THREE: 30}
    first, second = Shelf(feed.log).entries("picky")
    assert (first.code, first.reason, first.remedy) == ("unlucky", f"{TWO} has 13.", "Change the row.")
    assert (second.code, "waits behind" in second.reason) == ("", True)
    assert [entry.change().row for entry in (first, second)] == [{"id": 2, "n": 13}, {"id": 2, "n": 14}]
    scanned = {change.offset: change for change in feed.log.scan(ITEMS)}
    for entry in (first, second):
        (place,) = entry.where
        assert entry.change() == scanned[place.first]
        assert place.topic == feed.log.topic_of(ITEMS)
    said = report(picky, "picky")
    assert (said.phase, said.facts["parked"]) == ("live", 2)
    assert said.version == first.held == Version(1, first.version.lsn - 1), "no token is answered beyond (S25)"
    forbid(settings)
    assert picky.ask("picky", "retry") == {"generation": 1, "done": [[ITEMS, TWO]], "left": []}
    assert view.rows() == {ONE: 11, TWO: 14, THREE: 30}
    assert applied(settings, TWO) == ["20", "13", "14"], "in their order, each once"
    assert parked(settings, "picky") == []
    last = feed.cut((ITEMS, 2, 15))
    eventually("later changes are applied again", lambda: view.rows()[TWO] == 15)
    eventually("tokens are answered again", lambda: report(picky, "picky").version == last.version)


def test_a_retry_that_fails_leaves_it_parked_with_the_newer_reason(
    feed: Feed, settings: Settings, picky: Control
) -> None:
    forbid(settings, 14)
    answer = picky.ask("picky", "retry", {"key": TWO})
    assert (answer["done"], answer["left"][0]["reason"]) == ([], f"{TWO} has 14.")
    assert Shelf(feed.log).entries("picky")[0].reason == f"{TWO} has 14."
    assert Plain(settings, "picky").rows()[TWO] == 20
    assert len(parked(settings, "picky")) == 2


def test_one_key_is_retried_the_other_stays(feed: Feed, settings: Settings, picky: Control) -> None:
    forbid(settings, 13, 33)
    feed.cut((ITEMS, 3, 33))
    await_parked(picky, "picky", 3)
    forbid(settings, 13)
    answer = picky.ask("picky", "retry")
    assert (answer["done"], [each["key"] for each in answer["left"]]) == ([[ITEMS, THREE]], [TWO])
    assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 20, THREE: 33}
    assert set(parked(settings, "picky")) == {TWO}


def test_a_restart_keeps_what_is_parked(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    forbid(settings, 13)
    with serving(settings, picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "picky", 1)
    with serving(settings, picky=Picky) as control:
        feed.cut((ITEMS, 2, 14), (ITEMS, 1, 11))
        held = await_parked(control, "picky", 2).version
        assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 20}
    with serving(settings, picky=Picky) as control:
        assert await_parked(control, "picky", 2).version == held
        forbid(settings)
        eventually("it stands at a state", lambda: control.ask("picky", "retry")["done"])
        assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 14}


def test_what_a_process_that_was_replaced_parks_late_is_not_tried_again(feed: Feed, settings: Settings) -> None:
    """The older row would come back, and stay."""
    feed.cut((ITEMS, 2, 20))
    forbid(settings, 13)
    with serving(settings, picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "picky", 1)
        (late,) = Shelf(feed.log).entries("picky")
        forbid(settings)
        assert control.ask("picky", "retry")["done"]
        feed.cut((ITEMS, 2, 14))
        eventually("it goes on", lambda: Plain(settings, "picky").rows() == {TWO: 14})
    Shelf(feed.log).put(late)
    with serving(settings, picky=Picky) as control:
        eventually("it is taken away", lambda: parked(settings, "picky") == [])
        await_live(control, "picky")
        with pytest.raises(Misconfigured) as refused:
            control.ask("picky", "retry")
        assert refused.value.code == "not-parked"
        feed.cut((ITEMS, 2, 15))
        eventually("it goes on", lambda: Plain(settings, "picky").rows() == {TWO: 15})


def parked_by_a_process_that_ended(feed: Feed, settings: Settings) -> Version:
    """Let a live view of two rows park the second one's change, and end; return what tokens are held back to."""
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    forbid(settings, 13)
    with serving(settings, picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        return await_parked(control, "picky", 1).version


def test_a_start_with_another_store_leaves_what_is_parked_where_it_is(feed: Feed, settings: Settings) -> None:
    """From another folder there is nothing of the view: it is built there from zero."""
    held = parked_by_a_process_that_ended(feed, settings)
    elsewhere = replace(settings, state=f"{settings.state}/elsewhere")
    with serving(elsewhere, picky=Picky) as control:
        eventually("it is built there", lambda: Plain(elsewhere, "picky").rows() == {ONE: 10, TWO: 13})
    with serving(settings, picky=Picky) as control:
        feed.cut((ITEMS, 1, 11))
        eventually("it goes on", lambda: Plain(settings, "picky").rows() == {ONE: 11, TWO: 20})
        assert await_parked(control, "picky", 1).version == held
        forbid(settings)
        assert control.ask("picky", "retry")["done"] == [[ITEMS, TWO]]
        assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 13}


def test_a_view_that_lacks_what_is_not_on_the_shelf_any_more_goes_no_further(feed: Feed, settings: Settings) -> None:
    held = parked_by_a_process_that_ended(feed, settings)
    Shelf(feed.log).clear("picky", lambda _number: True)
    feed.cut((ITEMS, 1, 11))
    with serving(settings, picky=Picky) as control:
        eventually("it stops", lambda: report(control, "picky").phase == "stopped")
        said = report(control, "picky")
        assert (said.code, said.version) == ("parked-lost", held), "no token is answered beyond (S25)"
        assert "headrace rebuild picky" in said.remedy
        assert [row.value["n"] for row in control.scan("picky")] == [10, 20], "it can still be read"
        forbid(settings)
        assert control.ask("picky", "rebuild") == {"generation": 2}
        eventually("it is built", lambda: report(control, "picky", 2).phase == "following")
        control.ask("picky", "promote")
        assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 13}


def test_a_generation_that_lacks_what_is_lost_is_not_promoted(feed: Feed, settings: Settings) -> None:
    """Neither over a live one nor by itself where there is none any more."""
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    with serving(settings, picky=Picky) as control:
        await_live(control, "picky")
        assert control.ask("picky", "rebuild") == {"generation": 2}
        eventually("it is built", lambda: report(control, "picky", 2).phase == "following")
        forbid(settings, 13)
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "picky", 1)
        await_parked(control, "picky", 1, generation=2)
    Shelf(feed.log).clear("picky", lambda number: number == 2)
    with serving(settings, picky=Picky) as control:
        await_parked(control, "picky", 1)
        eventually("it stops", lambda: report(control, "picky", 2).code == "parked-lost")
        for verb in ("promote", "hold"):
            with pytest.raises(Misconfigured) as refused:
                control.ask("picky", verb)
            assert refused.value.code == "parked-lost"
            assert "headrace rebuild picky" in refused.value.remedy
    with closing(sqlite3.connect(settings.path("plain.sqlite"))) as file, file:
        file.execute("DELETE FROM generations WHERE number = 1")
    with serving(settings, picky=Picky) as control:
        eventually("it stops", lambda: report(control, "picky", 2).code == "parked-lost")
        assert control.ask("picky", "rebuild") == {"generation": 3}
        eventually("what is whole goes live", lambda: await_parked(control, "picky", 1, generation=3).live)
        assert not report(control, "picky", 2).live


def test_what_is_dropped_is_lost_and_later_changes_are_applied(feed: Feed, settings: Settings, picky: Control) -> None:
    answer = picky.ask("picky", "drop-parked", {"key": TWO})
    assert (answer["dropped"], answer["records"]) == ([[ITEMS, TWO]], 2)
    view = Plain(settings, "picky")
    assert view.rows()[TWO] == 20
    feed.cut((ITEMS, 2, 15))
    eventually("the next change is applied", lambda: view.rows()[TWO] == 15)
    assert await_parked(picky, "picky", 0).phase == "live"


def test_a_wiped_view_and_a_dropped_generation_have_nothing_parked(
    feed: Feed, settings: Settings, picky: Control
) -> None:
    view = Plain(settings, "picky")
    forbid(settings)
    view.wipe()
    last = feed.cut((ITEMS, 1, 12))
    eventually("it is built anew", lambda: view.rows() == {ONE: 12, TWO: 14, THREE: 30})
    assert parked(settings, "picky") == []
    eventually("that is told", lambda: (said := report(picky, "picky")).live and said.version == last.version)
    forbid(settings, 14)
    assert picky.ask("picky", "rebuild") == {"generation": 2}
    await_parked(picky, "picky", 1, generation=2)
    picky.ask("picky", "drop", {"generation": 2})
    assert parked(settings, "picky") == []


def test_a_build_that_lacks_something_is_not_promoted_over_a_live_view(
    feed: Feed, settings: Settings, picky: Control
) -> None:
    forbid(settings, 14)
    picky.ask("picky", "rebuild")
    eventually("it is built", lambda: report(picky, "picky", 2).phase == "following")
    await_parked(picky, "picky", 1, generation=2)
    for verb in ("promote", "hold"):
        with pytest.raises(Misconfigured) as refused:
            picky.ask("picky", verb)
        assert refused.value.code == "records-parked"
        assert "headrace parked retry picky --all --generation 2" in refused.value.remedy
    assert "all when left out" in command(settings, "parked", "show", "--help").stdout
    for which, generations in (((), [1, 1, 2]), (("--generation", "2"), [2])):
        shown = told(settings, "parked", "show", "picky", TWO, *which)
        assert [each["generation"] for each in shown] == generations
    forbid(settings)
    picky.ask("picky", "retry", {"generation": 2})
    picky.ask("picky", "promote")
    assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 14, THREE: 30}
    assert parked(settings, "picky", 1) == [TWO, TWO], "the one before keeps its own"
    with pytest.raises(Misconfigured) as refused:
        picky.ask("picky", "retry")
    assert (refused.value.code, refused.value.remedy) == ("not-parked", "Say which: --generation 1")


def test_above_the_limit_the_consumer_stops_and_says_what_to_run(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    few = replace(settings, parked_limit=2)
    with serving(few, picky=Picky, beside=Beside) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13), (ITEMS, 3, 13))
        await_parked(control, "picky", 2)
        feed.cut((ITEMS, 1, 11), (ITEMS, 2, 14))
        eventually("it stops", lambda: report(control, "picky").phase == "stopped")
        said = report(control, "picky")
        assert said.code == "too-many-parked"
        assert f"--all --generation {said.generation}" in said.remedy
        assert "headrace parked list picky" in said.remedy
        assert Plain(settings, "picky").rows() == {ONE: 10}, "nothing of that batch was applied"
    forbid(settings)
    with serving(settings, picky=Picky) as control:  # more are allowed
        await_parked(control, "picky", 3)
        eventually("it stands at a state", lambda: control.ask("picky", "retry")["done"])
    assert Plain(settings, "picky").rows() == {ONE: 11, TWO: 14, THREE: 13}


class Beside(Plain):
    """In a file of its own; the process stays for it."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, name)
        self._path = settings.path("beside.sqlite")


def test_with_a_limit_of_0_the_first_one_stops_the_consumer(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(replace(settings, parked_limit=0), picky=Picky, beside=Beside) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        eventually("it stops", lambda: report(control, "picky").phase == "stopped")
        said = report(control, "picky")
        assert (said.code, said.facts.keys()) == ("unlucky", {"reads", "written_ms"})
        assert f"See {ITEMS} partition 1 offset" in said.reason
    assert parked(settings, "picky") == []


class Wrong(Picky):
    """Names another key than is in the batch."""

    def apply(self, batch: Batch) -> None:
        try:
            super().apply(batch)
        except Poison as error:
            raise Poison(error.code, error.message, cursor=(TAGS, "nothing")) from error


def test_a_consumer_that_names_what_is_not_in_its_batch_stops(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(settings, wrong=Wrong, beside=Beside) as control:
        await_live(control, "wrong")
        feed.cut((ITEMS, 2, 13))
        eventually("it stops", lambda: report(control, "wrong").phase == "stopped")
        assert report(control, "wrong").code == "unlucky"
    assert parked(settings, "wrong") == []


class Delayed(Plain):
    """Says that it has not shown everything."""

    waits: Version | None = None

    def pending(self) -> Version | None:
        return type(self).waits


def test_what_a_consumer_delays_holds_tokens_back(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = feed.cut((ITEMS, 1, 10))
    with serving(settings, delayed=Delayed) as control:
        await_live(control, "delayed")
        monkeypatch.setattr(Delayed, "waits", first.version)
        held = Version(1, first.version.lsn - 1)
        eventually("it is held back", lambda: report(control, "delayed").version == held)
        monkeypatch.setattr(Delayed, "waits", None)
        eventually("it is not", lambda: report(control, "delayed").version == first.version)


class Called(EffectConsumer):
    """A webhook whose receiver refuses some rows."""

    name = "called"
    tables = (ITEMS,)

    def effect(self, changes: Any) -> None:
        for change in changes:
            self._call(change)

    def _call(self, change: Change) -> None:
        path = self.settings.path("forbidden")
        if change.row and path.exists() and str(change.row["n"]) in orjson.loads(path.read_bytes()):
            raise Poison("refused", "The receiver says 400.", cursor=(change.table, change.key.decode()))
        with self.settings.path("called").open("a") as calls:
            calls.write(f"{change.row and change.row['n']}\n")


def test_an_effect_that_is_refused_is_parked_and_goes_to_no_other_generation(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)

    def calls() -> list[str]:
        path = settings.path("called")
        return path.read_text().splitlines() if path.exists() else []

    with serving(settings, called=Called) as control:
        await_live(control, "called")
        feed.cut((ITEMS, 2, 13), (ITEMS, 1, 11))
        await_parked(control, "called", 1)
        feed.cut((ITEMS, 2, 14))
        await_parked(control, "called", 2)
        assert set(calls()) == {"11"}
        control.ask("called", "rebuild")
        eventually("it is built", lambda: report(control, "called", 2).phase == "following")
        with pytest.raises(Misconfigured) as refused:
            control.ask("called", "promote")
        assert refused.value.code == "records-parked"
        forbid(settings)
        assert control.ask("called", "retry")["done"] == [[ITEMS, TWO]]
        assert calls()[-2:] == ["13", "14"]
        feed.cut((ITEMS, 3, 30))  # the position says that nothing is parked any more
        eventually("it goes on", lambda: "30" in calls())
        control.ask("called", "promote")
        assert parked(settings, "called") == []


def test_effects_that_are_not_on_the_shelf_any_more_are_begun_anew(feed: Feed, settings: Settings) -> None:
    """No build would tell of them, nor be promoted."""
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(settings, called=Called) as control:
        await_live(control, "called")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "called", 1)
    Shelf(feed.log).clear("called", lambda _number: True)
    with serving(settings, called=Called) as control:
        eventually("it stops", lambda: report(control, "called").code == "parked-lost")
        assert report(control, "called").remedy == "Run: headrace drop called --all, then headrace rebuild called"
        assert command(settings, "drop", "called", "--all").exit_code == 0
        assert command(settings, "rebuild", "called").exit_code == 0
        await_live(control, "called")
        last = feed.cut((ITEMS, 1, 11))
        eventually("it goes on", lambda: report(control, "called").version == last.version)
        assert settings.path("called").read_text() == "11\n"


@pytest.mark.parametrize("verb", ["retry", "drop-parked"])
@pytest.mark.parametrize("view", [Picky, Called])
def test_what_was_tried_again_or_given_up_is_not_missed_after_a_restart(
    feed: Feed, settings: Settings, view: type[Any], verb: str
) -> None:
    """The position is written with it, also when nothing comes afterwards."""
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(settings, view=view) as control:
        await_live(control, "view")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "view", 1)
        forbid(settings)
        control.ask("view", verb)
        assert parked(settings, "view") == []
    last = feed.cut((ITEMS, 1, 11))
    with serving(settings, view=view) as control:
        eventually("it goes on", lambda: (said := report(control, "view")).live and said.version == last.version)


# Documents


@contextmanager
def films(settings: Settings, *, before: tuple[str, ...] = (), **views: type[Any]) -> Iterator[tuple[Any, Control]]:
    """Films and reviews, captured, with views that are live."""
    prepare(settings, *FILMS, *before)
    with capturing(settings) as capture, serving(settings, **views) as control:
        capture.reach()
        await_live(control, *views)
        yield capture, control


def differing(settings: Settings, name: str, consumer: type[Any], generation: int | None = None) -> list[Any]:
    """Compare a view with Postgres; return what differs."""
    log = Log(settings)
    (outcome,) = Verifier(log, Control(log), lambda *_: None, 60).verify({name: consumer}, generation)
    with closing(outcome):
        assert outcome.rows
        return [*outcome.wrong(), *outcome.undecided()]


def documents(control: Control, name: str) -> dict[str, Any]:
    return {row.key: row.value for row in control.scan(name)}


@pytest.mark.usefixtures("elasticsearch")
def test_documents_that_cannot_be_rendered_or_are_refused_are_parked(settings: Settings) -> None:
    """At the first build, which goes live without them, and later; verify, which cannot compare, says so at once."""
    forbid(settings, "3")
    bad = ("UPDATE films SET n = 'no number' WHERE id = 5",)
    with films(settings, before=bad, found=Found) as (capture, control):
        await_parked(control, "found", 2)
        assert sorted(documents(control, "found")) == ["1", "2", "4", "6"]
        rendered, refused = Shelf(Log(settings)).entries("found")
        assert (rendered.collection, rendered.key, rendered.code) == ("public.films", "3", "render-failed")
        assert rendered.body == {"id": 3, "n": "3", "joined": {"reviews": [{"id": 3, "film_id": 3}]}}
        assert (refused.key, refused.code, refused.body["n"]) == ("5", "document-refused", "no number")
        for statement in (
            "INSERT INTO reviews VALUES (7, 3), (8, 4), (9, 5)",
            "UPDATE films SET n = 'none' WHERE id = 6",
        ):
            execute(settings, statement)
        await_parked(control, "found", 3)
        eventually("others go on", lambda: documents(control, "found")["4"]["reviews"] == [8])
        assert documents(control, "found")["6"]["n"] == "6", "the one before stays"
        with pytest.raises(Misconfigured) as told_so:
            differing(settings, "found", Found)
        assert told_so.value.code == "records-parked"
        assert "3 records are parked in generation 1 of found" in told_so.value.message
        # Their causes go: one by the row, of which the newest state counts, one by the code's outside. One stays.
        forbid(settings)
        execute(settings, "UPDATE films SET n = '55' WHERE id = 5", "DELETE FROM reviews WHERE id = 9")
        capture.reach()
        done = set[str]()
        eventually("they were read", lambda: done.update(retried(control, "found")) or done == {"3", "5"})
        execute(settings, "DELETE FROM films WHERE id = 6")
        capture.reach()
        eventually("a row that is gone is no document", lambda: retried(control, "found") == {"6"})
        assert differing(settings, "found", Found) == []


def retried(control: Control, name: str) -> set[str]:
    """Try everything again; return the keys of what is done."""
    try:
        return {key for _, key in control.ask(name, "retry")["done"]}
    except Misconfigured as error:
        if error.code == "not-parked":
            return set()
        raise


@pytest.mark.usefixtures("redis_server")
def test_a_page_that_is_no_text_is_parked_and_tokens_stop_before_it(settings: Settings) -> None:
    with films(settings, paged=Paged) as (capture, control), closing(PageReader(settings, "unlucky")) as pages:
        capture.reach()
        eventually("it has come there", lambda: pages.applied().lsn >= capture.reach().version.lsn)
        execute(settings, "UPDATE films SET n = NULL WHERE id = 2", "INSERT INTO reviews VALUES (7, 1)")
        said = await_parked(control, "paged", 1)
        (entry,) = Shelf(Log(settings)).entries("paged")
        assert (entry.key, entry.code) == ("2", "page-not-text")
        target = capture.reach().version
        eventually("others go on", lambda: (page := pages.get("1")) and page.etag == "1,7")
        assert pages.applied() == said.version == entry.held < target
        execute(settings, "UPDATE films SET n = 'two' WHERE id = 2", "INSERT INTO reviews VALUES (8, 2)")
        capture.reach()
        eventually("it was read", lambda: retried(control, "paged") == {"2"})
        eventually("tokens are answered again", lambda: pages.applied() >= target)
        assert differing(settings, "paged", Paged) == []


@pytest.mark.usefixtures("redis_server")
def test_documents_stay_parked_over_restarts_wipes_and_rebuilds(settings: Settings) -> None:
    forbid(settings, "3")
    prepare(settings, *FILMS)
    with capturing(settings) as capture:
        with serving(settings, paged=Paged) as control:
            await_live(control, "paged")
            await_parked(control, "paged", 1)
        with serving(settings, paged=Paged) as control:
            execute(settings, "INSERT INTO reviews VALUES (7, 3), (8, 4)")
            eventually("others go on", lambda: documents_or_none(control, "paged").get("4", {}).get("etag") == "8")
            assert await_parked(control, "paged", 1)
            assert "3" not in documents(control, "paged")
            with closing(redis.Redis.from_url(settings.redis)) as client:
                client.flushdb()
            execute(settings, "INSERT INTO reviews VALUES (9, 4)")
            eventually(
                "it is built anew", lambda: documents_or_none(control, "paged").get("4", {}).get("etag") == "8,9"
            )
            assert await_parked(control, "paged", 1), "the cause is there still"
            rebuilt = lambda: control.ask("paged", "rebuild") == {"generation": 2}  # noqa: E731  1 until that is live again
            eventually("another is begun", rebuilt)
            eventually("it is built", lambda: report(control, "paged", 2).phase == "following")
            await_parked(control, "paged", 1, generation=2)
            with pytest.raises(Misconfigured, match="parked in generation 2"):
                control.ask("paged", "promote")
            forbid(settings)
            assert control.ask("paged", "retry", {"generation": 2})["done"] == [["public.films", "3"]]
            control.ask("paged", "promote")
            assert differing(settings, "paged", Paged) == []
            capture.reach()


def documents_or_none(control: Control, name: str) -> dict[str, Any]:
    try:
        return documents(control, name)
    except HeadraceError:  # it is being opened anew
        return {}


@pytest.mark.usefixtures("redis_server")
def test_a_document_that_is_dropped_stays_as_it_is_until_it_changes(settings: Settings) -> None:
    with films(settings, paged=Paged) as (capture, control):
        forbid(settings, "13")
        execute(settings, "UPDATE films SET n = '13' WHERE id = 2")
        await_parked(control, "paged", 1)
        lost = command(settings, "parked", "drop", "paged", "2")
        assert lost.exit_code == 2, "nobody agreed"
        assert "lost: document public.films 2 as it is now" in lost.stdout
        would = told(settings, "parked", "drop", "paged", "2", code=2)
        assert would == {
            "name": "paged",
            "generation": 1,
            "dropped": [["public.films", "2"]],
            "records": 1,
            "applied": False,
        }
        assert parked(settings, "paged") == ["2"]
        forbid(settings)
        assert told(settings, "parked", "drop", "paged", "2", "--yes") == would | {"applied": True}
        assert await_parked(control, "paged", 0)
        execute(settings, "INSERT INTO reviews VALUES (7, 1)")
        eventually("others go on", lambda: documents(control, "paged")["1"]["etag"] == "1,7")
        assert documents(control, "paged")["2"]["html"] == "2"
        assert [difference.key for difference in differing(settings, "paged", Paged)] == ["2"], "and verify says so"
        execute(settings, "INSERT INTO reviews VALUES (8, 2)")
        capture.reach()
        eventually("it changes", lambda: documents(control, "paged")["2"] == {"html": "13", "etag": "2,8"})
        assert differing(settings, "paged", Paged) == []


@pytest.mark.usefixtures("redis_server")
def test_many_at_once_are_found_in_one_pass_and_too_many_stop_it(settings: Settings) -> None:
    rendered: list[object] = []

    class Counting(Paged):
        def render(self, row: Any) -> Any:
            rendered.append(row["id"])
            return super().render(row)

    many = [str(n) for n in range(1001, 1061)]
    forbid(settings, *many[:40])
    prepare(settings, *FILMS, "INSERT INTO films SELECT i, i::text FROM generate_series(1001, 2000) i")
    with capturing(settings) as capture, serving(replace(settings, parked_limit=50), paged=Counting) as control:
        await_live(control, "paged")
        await_parked(control, "paged", 40)
        assert len(rendered) <= 2 * 1006, "once to find them, once without them"
        forbid(settings, *many)
        execute(settings, "INSERT INTO reviews SELECT i, i FROM generate_series(1001, 1060) i")
        capture.reach()
        eventually("it stops, and its process with it", lambda: control.reports()["paged"][0].ended)
        assert control.reports()["paged"][0].code == "too-many-parked"
        assert len(parked(settings, "paged")) == 40


def test_a_warehouse_names_the_tables_that_lack_something(settings: Settings) -> None:
    with films(settings, housed=Housed) as (capture, control):
        forbid(settings, "13")
        execute(settings, "UPDATE films SET n = '13' WHERE id = 2", "UPDATE films SET n = 'x' WHERE id = 1")
        await_parked(control, "housed", 1)
        capture.reach()
        asked = "SELECT id, n FROM films ORDER BY id LIMIT 2"
        eventually("others go on", lambda: answered(settings, asked).rows == [[1, "x"], [2, "2"]])
        found = answered(settings, asked)
        assert (found.parked, found.inexact) == (("public.films",), ())
        assert found.version == report(control, "housed").version
        forbid(settings)
        assert control.ask("housed", "retry")["done"]
        found = answered(settings, asked)
        assert (found.rows, found.parked) == ([[1, "x"], [2, "13"]], ())
        assert differing(settings, "housed", Housed) == []


def answered(settings: Settings, sql: str) -> Any:
    database = Database.opened(settings.warehouse, settings.warehouse_memory)
    try:
        return query(database, sql, rows=10, seconds=30)
    finally:
        database.release()


# Commands


def test_the_commands_show_retry_and_say_what_to_run(feed: Feed, settings: Settings, picky: Control) -> None:
    listed = told(settings, "parked", "list", "picky")
    assert [(each["key"], each["code"]) for each in listed] == [(TWO, "unlucky"), (TWO, "")]
    assert "unlucky: " in command(settings, "parked", "list").stdout
    assert told(settings, "parked", "show", "picky", TWO)[0]["body"]["row"] == {"id": 2, "n": 13}
    shown = command(settings, "parked", "show", "picky", TWO).stdout
    assert "Change the row." in shown
    assert f"{feed.log.topic_of(ITEMS)} partition 1 offset" in shown
    missing = command(settings, "parked", "show", "picky", "9")
    assert missing.exception.code == "not-parked"  # type: ignore[union-attr]
    assert "2 records are parked" in command(settings, "status", "picky").stdout
    checked = command(settings, "status", "--check", "picky")
    assert (checked.exit_code, "headrace parked list picky" in checked.stdout) == (1, True)
    assert command(settings, "parked", "retry", "picky").exit_code == 2
    failed = command(settings, "parked", "retry", "picky", TWO)
    assert (failed.exit_code, f"still parked picky {ITEMS} {TWO}" in failed.stdout) == (1, True)
    forbid(settings)
    assert "done picky" in command(settings, "parked", "retry", "picky", "--all").stdout
    assert command(settings, "parked", "list").stdout == "nothing is parked\n"
    assert command(settings, "status", "--check", "picky").stdout == "ok\n"


class Both(Picky):
    """Of two tables, whose keys can be the same."""

    tables = (ITEMS, TAGS)


def test_of_two_tables_and_two_generations_the_flags_choose_one(feed: Feed, settings: Settings) -> None:
    def left() -> set[tuple[int, str]]:
        return {(entry.generation, entry.collection) for entry in Shelf(feed.log).entries("both")}

    def shown(*flags: str) -> list[tuple[int, str]]:
        found = told(settings, "parked", "show", "both", TWO, *flags)
        return [(each["generation"], each["collection"]) for each in found]

    feed.cut((ITEMS, 2, 20), (TAGS, 2, 20))
    with serving(settings, both=Both) as control:
        await_live(control, "both")
        forbid(settings, 13)
        feed.cut((ITEMS, 2, 13), (TAGS, 2, 13))
        await_parked(control, "both", 2)
        assert control.ask("both", "rebuild") == {"generation": 2}
        await_parked(control, "both", 2, generation=2)
        assert len(shown()) == 4
        assert shown("--collection", TAGS) == [(1, TAGS), (2, TAGS)]
        assert shown("--generation", "2") == [(2, ITEMS), (2, TAGS)]
        documents = [
            told(settings, "why", "both", TWO, "--table", ITEMS, *of)["document"] for of in (["--generation", "1"], [])
        ]
        assert [each["value"]["n"] for each in documents] == [20, 20], "without the flag it is the live one"
        of_two = ("--collection", TAGS, "--generation", "2")
        lost = command(settings, "parked", "drop", "both", TWO, *of_two)
        assert (lost.exit_code, lost.stdout.count("lost: "), left()) == (2, 1, set(shown())), "nobody agreed"
        forbid(settings)
        assert told(settings, "parked", "retry", "both", TWO, *of_two)["done"] == [[TAGS, TWO]]
        assert left() == {(1, ITEMS), (1, TAGS), (2, ITEMS)}
        found = told(settings, "why", "both", TWO, "--table", TAGS, "--generation", "2")
        assert (found["generation"], found["document"]["value"]["n"]) == (2, 13)
        assert told(settings, "parked", "drop", "both", TWO, "--collection", ITEMS, "--yes")["dropped"] == [
            [ITEMS, TWO]
        ]
        assert left() == {(1, TAGS), (2, ITEMS)}, "without the flag it is the live one"
        assert told(settings, "parked", "drop", "both", "--all", "--generation", "2", "--yes")["records"] == 1
        assert left() == {(1, TAGS)}


def test_what_is_parked_is_shown_with_no_process_running(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(settings, picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "picky", 1)
    assert [each["key"] for each in told(settings, "parked", "list")] == [TWO]
    nobody: list[Callable[[], Result]] = [
        lambda: command(settings, "parked", "retry", "picky", "--all"),
        lambda: command(settings, "parked", "drop", "picky", "--all", "--yes"),
    ]
    for run in nobody:
        assert run().exception.code == "consumer-not-running"  # type: ignore[union-attr]


def test_a_consumer_that_nobody_can_run_any_more_is_forgotten_with_what_it_had_parked(
    feed: Feed, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "gone-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: gone\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[headrace.consumers]\ngone = tests.fixtures.parked:Picky\n")
    monkeypatch.syspath_prepend(str(package.parent))

    def refused(*words: str) -> tuple[int, str]:
        done = command(settings, *words)
        return done.exit_code, getattr(done.exception, "code", "")

    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(settings, beside=Beside) as control:
        await_live(control, "beside")
        with serving(settings, gone=plugins.load("gone")):
            await_live(control, "gone")
            feed.cut((ITEMS, 2, 13))
            await_parked(control, "gone", 1)
            control.ask("gone", "pause")
        assert refused("drop", "gone", "--all", "--yes") == (1, "consumer-not-running"), "it can be run, and asked"
        shutil.rmtree(package)
        assert refused("run", "gone") == (1, "unknown-consumer")
        assert "gone: no process reports" in command(settings, "status", "--check").stdout
        assert refused("drop", "gone", "--yes") == (1, "consumer-not-running"), "only as a whole"
        asked = command(settings, "drop", "gone", "--all")
        assert (asked.exit_code, "records parked: 1" in asked.stdout, "store" in asked.stdout) == (2, True, True)
        asked = command(settings, "drop", "gone", "--all", "--json")
        assert (asked.exit_code, asked.stdout, parked(settings, "gone")) == (2, "", [TWO])
        assert told(settings, "drop", "gone", "--all", "--yes") == {"forgotten": [1], "parked": 1}
        assert command(settings, "status", "--check").stdout == "ok\n"
        assert (parked(settings, "gone"), parked(settings, "beside")) == ([], [])
        records = {record.key: record.value for record in read_to_end(settings, {(CONTROL, 0): BEGINNING})}
        assert [key for key, value in records.items() if value and b'"name":"gone"' in key] == []
        assert Plain(settings, "gone").rows() == {ONE: 10}, "its store is not touched"
        with serving(settings, gone=Picky):
            eventually("it says what it lacks", lambda: report(control, "gone").code == "parked-lost")
        assert told(settings, "drop", "gone", "--all", "--yes") == {"forgotten": [1], "parked": 0}
        for name, code in (("gone", "consumer-not-running"), ("capture", "capture-not-running")):
            control.report(Report("capture", phase="off", ended=True))
            control.keep("capture", "catalogue", {}, "public.items")
            assert refused("drop", name, "--all", "--yes") == (1, code)
        assert control.kept("capture", "catalogue") == [{"public.items": {}}], "a service keeps what it needs"


def test_a_body_that_is_too_large_is_cut_and_says_so(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(replace(settings, message_max_bytes=300), picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "picky", 1)
        (entry,) = told(settings, "parked", "show", "picky", TWO)
        assert (entry["cut"], entry["body"][:8]) == (True, '{"table"')
        forbid(settings)
        with pytest.raises(Misconfigured) as cut:
            control.ask("picky", "retry")
        assert cut.value.code == "parked-body-cut"
        assert f"headrace parked drop picky --generation 1 --collection {ITEMS} '{TWO}'" in cut.value.remedy


def test_a_retry_of_all_leaves_what_is_cut_and_does_the_rest(feed: Feed, settings: Settings) -> None:
    wide = "x" * 4_000
    feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20))
    forbid(settings, 13, wide)
    with serving(replace(settings, message_max_bytes=3_000), picky=Picky) as control:
        await_live(control, "picky")
        feed.cut((ITEMS, 2, wide), (ITEMS, 3, 13))
        feed.cut((ITEMS, 2, 14))
        await_parked(control, "picky", 3)
        assert [entry.cut for entry in Shelf(feed.log).entries("picky")] == [True, False, False]
        reasons = [entry.reason for entry in Shelf(feed.log).entries("picky")]
        forbid(settings)
        answer = told(settings, "parked", "retry", "picky", "--all", code=1)
        (left,) = answer["left"]
        assert (answer["done"], left["key"], left["code"]) == ([[ITEMS, THREE]], TWO, "parked-body-cut")
        assert Plain(settings, "picky").rows() == {ONE: 10, TWO: 20, THREE: 13}
        assert [entry.reason for entry in Shelf(feed.log).entries("picky")] == reasons[:2], "why it was parked is kept"
        said = command(settings, "parked", "retry", "picky", "--all")
        assert said.exception.code == "parked-body-cut", "it is all that is left"  # type: ignore[union-attr]
        command(settings, "parked", "drop", "picky", "--all", "--yes")
        feed.cut((ITEMS, 2, 15))
        eventually("the row comes again", lambda: Plain(settings, "picky").rows() == {ONE: 10, TWO: 15, THREE: 13})


class Wordy(Picky):
    """Quotes far too much."""

    def apply(self, batch: Batch) -> None:
        try:
            super().apply(batch)
        except Poison as error:
            raise Poison(error.code, f"{error.message} {'x' * 20_000_000} the end", cursor=error.cursor) from error


def test_a_huge_reason_is_cut_and_no_entry_or_report_is_too_large_for_it(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    with serving(replace(settings, parked_limit=1), wordy=Wordy, beside=Beside) as control:
        await_live(control, "wordy")
        feed.cut((ITEMS, 2, 13))
        await_parked(control, "wordy", 1)
        (entry,) = Shelf(feed.log).entries("wordy")
        assert (entry.reason.startswith(f"{TWO} has 13. xxx"), entry.reason.endswith("xxx the end")) == (True, True)
        assert (len(entry.reason) < 20_000, entry.cut, entry.change().row) == (True, False, {"id": 2, "n": 13})
        feed.cut((ITEMS, 3, 13))
        eventually("it stops and says so", lambda: report(control, "wordy").code == "too-many-parked")


class Many(Wordy):
    """Counts rows of very many collections."""

    def count(self) -> dict[str, int]:
        return {f"public.items{number}": 1 for number in range(100_000)}


def test_an_answer_that_kafka_does_not_take_is_refused_and_the_process_goes_on(feed: Feed, settings: Settings) -> None:
    """Its request must not be read again at the next start, either."""
    feed.cut((ITEMS, 1, 10))
    forbid(settings, 13)
    small = replace(settings, parked_limit=200, message_max_bytes=100_000)
    with serving(small, wordy=Many) as control:
        await_live(control, "wordy")
        feed.cut(*((ITEMS, number, 13) for number in range(100, 250)))
        await_parked(control, "wordy", 150)
        answer = control.ask("wordy", "retry", timeout=60)
        assert {(len(each["reason"]) < 500, each["reason"].endswith("…")) for each in answer["left"]} == {(True, True)}
        with pytest.raises(Misconfigured) as error:
            control.counts("wordy", 1, timeout=20)
        assert error.value.code == "record-too-large"
        assert control.ask("wordy", "release") == {}


@pytest.mark.parametrize("key", ['{"name":"o\'brien"}', "-5", "two words"])
def test_what_is_printed_to_be_pasted_names_the_key_whatever_it_is(settings: Settings, key: str) -> None:
    log = Log(settings)
    log.ensure_spine()
    entry = Entry("picky", 3, ITEMS, key, "0:1", reason="No.", body={"n": 13})
    Shelf(log).put(entry)
    (line,) = [line for line in command(settings, "parked", "list").stdout.splitlines() if line.startswith("then: ")]
    shown = command(settings, *shlex.split(line.removeprefix("then: headrace ")))
    assert (shown.exit_code, "picky, generation 3" in shown.stdout) == (0, True)
    (line,) = re.findall(r"then  (headrace parked retry .*)", shown.stdout)
    assert shlex.split(line)[3:6] == ["picky", "--generation", "3"]
    assert shlex.split(line)[-1] == key
    assert f"drop picky --generation 3 --collection {ITEMS} {line.partition(' 3 ')[2]}, then" in entry.body_cut().remedy
