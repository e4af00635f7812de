"""`headrace parked`: what it shows, retries and drops, with a process that runs and without."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import Result

from headrace import plugins
from headrace.control import Control, Report
from headrace.log import Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import CONTROL
from headrace.parked import Entry, Shelf
from headrace.settings import Settings
from tests.fixtures.capture import eventually
from tests.fixtures.feed import ITEMS, TAGS, Feed
from tests.fixtures.parked import Picky, forbid
from tests.fixtures.plain import Plain
from tests.fixtures.serving import await_live, serving
from tests.fixtures.shelf import ONE, TWO, Beside, await_parked, command, parked, report, told


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Of three partitions a table the rows 1 and 3 are in the first, 2 is in the second."""
    return replace(settings, partitions=3)


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
