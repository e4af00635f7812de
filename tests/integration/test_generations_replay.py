"""Replay: new code held against what runs, at one LSN, and nothing of it stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from headrace.consumer import Generation
from headrace.errors import Misconfigured
from headrace.runner.scratch import NUMBER, Scratch
from headrace.settings import Settings, environment
from headrace_ops.elasticsearch import Elasticsearch
from headrace_warehouse import Warehouse
from tests.fixtures import ticks
from tests.fixtures.capture import eventually, prepare
from tests.fixtures.feed import ITEMS, Feed
from tests.fixtures.generations import KEY, PLAIN, captured, command, headrace, report
from tests.fixtures.plain import Doubled, Plain
from tests.fixtures.serving import await_live, serving


def test_a_replay_shows_what_new_code_would_add_remove_and_change(feed: Feed, settings: Settings) -> None:
    last = feed.cut((ITEMS, 1, 10), (ITEMS, 2, 20), (ITEMS, 3, 30))
    spec = f"{PLAIN}:Doubled"
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        ended = command(settings, "replay", "doubled", "--consumer", spec, "--against", "plain", "--diff", "--json")
        assert ended.exit_code == 1, ended.output
        said = orjson.loads(ended.stdout)
        assert (said["against"], said["generation"], said["lsn"]) == ("plain", 1, f"0/{last.version.lsn:X}")
        assert {kind: said[kind] for kind in ("added", "removed", "changed", "same")} == {
            "added": 1,
            "removed": 1,
            "changed": 1,
            "same": 1,
        }
        assert [(each["kind"], each["key"]) for each in said["documents"]] == [
            ("changed", KEY),
            ("removed", '{"id":2}'),
            ("added", '{"id":9}'),
        ]
        assert (said["documents"][0]["before"], said["documents"][0]["after"]) == ({"n": 10}, {"n": 100})
        shown = command(
            settings, "replay", "doubled", "--consumer", spec, "--against", "plain", "--diff", "--limit", "1"
        )
        assert "n: 10 → 100" in shown.stdout
        assert "1 added, 1 removed, 1 changed, 1 same" in shown.stdout
        assert "~" not in command(settings, "replay", "doubled", "--consumer", spec, "--against", "plain").stdout
        last = feed.cut((ITEMS, 3, 31))
        eventually("the live one goes on", lambda: report(control, "plain", 1).version == last.version)
    assert [generation.number for generation in Plain(settings, "plain").generations()] == [1]
    assert sorted(control.reports()) == ["plain"], "nobody heard of the scratch generation"


@pytest.mark.usefixtures("redis_server")
def test_the_same_code_changes_nothing_in_any_store_while_all_rows_change(
    settings: Settings, elasticsearch: Elasticsearch
) -> None:
    """Both sides are compared at one LSN; the alias and the prefix of the live views are fixed in their classes."""
    prepare(settings, *ticks.MAKE)
    views = {"found": ticks.TicksFound, "pages": ticks.TicksPages, "stream": ticks.TicksStream, "warehouse": Warehouse}
    with captured(settings, **views) as control, ticks.repeating(settings, ticks.TICK):
        for name, code in views.items():
            spec = ("--consumer", f"{ticks.FILE}:{code.__name__}") if code is not Warehouse else ()
            ended = headrace(settings, "replay", name, *spec, "--diff", "--json")
            assert ended.returncode == 0, ended.stdout + ended.stderr
            assert orjson.loads(ended.stdout)["same"] == ticks.ROWS
        spec = ("--consumer", f"{ticks.FILE}:NewFound")
        ended = headrace(settings, "replay", "found", *spec, "--diff", "--json")
        said = orjson.loads(ended.stdout)
        assert {kind: said[kind] for kind in ("added", "removed", "changed")} == {
            "added": 0,
            "removed": 1,
            "changed": 1,
        }
        assert said["documents"][-1]["after"] == {"word": "two"}
        for name, consumer in views.items():
            assert [generation.number for generation in consumer(settings, name).generations()] == [1]
            assert leftovers(settings, name, consumer) == []
        assert {each.generation for name in views for each in control.reports()[name]} == {1}


@pytest.mark.usefixtures("redis_server")
def test_what_a_killed_replay_leaves_behind_the_next_one_drops(settings: Settings, tmp_path: Path) -> None:
    """And its folder goes at once."""
    prepare(settings, *ticks.MAKE)
    words = ("replay", "pages", "--consumer", f"{ticks.FILE}:TicksPages")
    env = os.environ | environment(settings) | {"TMPDIR": str(tmp_path)}
    with captured(settings, pages=ticks.TicksPages) as control:
        kept = lambda: list(tmp_path.glob("headrace-replay-*/**/*.sqlite"))  # noqa: E731  made once the store is open
        begun = lambda: leftovers(settings, "pages", ticks.TicksPages) and kept()  # noqa: E731
        for _ in range(10):  # one that had ended by then is made again
            process = subprocess.Popen([sys.executable, "-m", "headrace", *words], env=env)
            eventually("it has begun to build, or has ended", lambda: begun() or process.poll() is not None)  # noqa: B023
            process.kill()
            process.wait()
            if leftovers(settings, "pages", ticks.TicksPages):
                break
        eventually("its folder is gone", lambda: not list(tmp_path.glob("headrace-replay-*")))
        assert leftovers(settings, "pages", ticks.TicksPages), "killed before its end"
        control.ask("pages", "release")
        assert headrace(settings, *words).returncode == 0
        assert leftovers(settings, "pages", ticks.TicksPages) == []
        assert [generation.live for generation in ticks.TicksPages(settings, "pages").generations()] == [True]


def leftovers(settings: Settings, name: str, consumer: type[Any]) -> list[Generation]:
    scratch = consumer(settings, name if consumer is Warehouse else f"{name}--replay")  # a file is one consumer's
    return [generation for generation in scratch.generations() if generation.number == NUMBER]


def test_what_has_effects_is_not_replayed(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "purge.py"
    file.write_text(
        "from headrace.effects import EffectConsumer\n\nclass Purge(EffectConsumer):\n    tables = ['public.items']\n"
    )
    refused = command(settings, "replay", "--consumer", f"{file}:Purge").exception
    assert isinstance(refused, Misconfigured)
    assert refused.code == "replay-no-view"


def test_a_replay_against_a_view_that_stands_still_builds_nothing(
    feed: Feed, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Scratch] = []
    monkeypatch.setattr(Scratch, "build", lambda scratch, *_: built.append(scratch))
    feed.cut((ITEMS, 1, 1))
    words = ("replay", "doubled", "--consumer", f"{PLAIN}:Doubled", "--against", "plain")
    with serving(settings, plain=Plain) as control:
        await_live(control, "plain")
        control.ask("plain", "pause")
        eventually("it is paused", lambda: report(control, "plain", 1).phase == "paused")
        paused = command(settings, *words)
        control.ask("plain", "resume")
    with serving(settings, plain=Doubled) as control:
        eventually("it is stale", lambda: report(control, "plain", 1).phase == "stale")
        stale = command(settings, *words)
    for ended, code in ((paused, "view-paused"), (stale, "stale-generation")):
        assert isinstance(ended.exception, Misconfigured), ended.output
        assert ended.exception.code == code
    assert not built


def test_a_replay_against_a_view_that_nobody_runs_says_so(feed: Feed, settings: Settings) -> None:
    feed.cut((ITEMS, 1, 1))
    ended = command(settings, "replay", "doubled", "--consumer", f"{PLAIN}:Doubled", "--against", "plain").exception
    assert isinstance(ended, Misconfigured)
    assert ended.code == "consumer-not-running"
