"""Many tables at once: a first snapshot of them, and a transaction that touches them for the first time.

Each comes with its shape, for which the catalogue is asked, and with a topic.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from headrace.log import CutWriter, Log
from headrace.settings import Settings
from headrace_capture import catalog, progress
from tests.fixtures.capture import capturing, changes, execute, prepare
from tests.fixtures.slots import await_free

MANY = 30
NAMES = [f"t{number}" for number in range(MANY)]


def test_s15_the_watchdog_does_not_take_a_slow_catalogue_for_a_kafka_that_is_away(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shapes of many tables come in one bunch, and take longer together than the loop may stand still."""
    prepare(settings, *(f"CREATE TABLE {name} (id int PRIMARY KEY)" for name in NAMES))
    with capturing(settings) as capture:
        capture.reach()
    execute(settings, f"BEGIN; {'; '.join(f'INSERT INTO {name} VALUES (1)' for name in NAMES)}; COMMIT")
    ask = catalog.published_tables

    def slow(*args: Any, **named: Any) -> list[catalog.Table]:
        time.sleep(0.3)
        return ask(*args, **named)

    monkeypatch.setattr(catalog, "published_tables", slow)
    await_free(settings)
    monkeypatch.setattr(progress, "STALLED_SECONDS", 6.0)
    with capturing(settings) as capture:
        capture.reach()
    assert [line for line in capture.said if "streaming from" in line or "Kafka" in line] == capture.said[:1]
    assert all([change.key for change in changes(settings, f"public.{name}")] == [b'{"id":1}'] for name in NAMES)


@pytest.mark.parametrize("chunked", [False, True])
def test_s5_no_cut_is_open_while_the_topics_of_many_tables_are_made(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    """And they take few requests: Kafka ends a cut that is open for a minute, again at each attempt."""
    prepare(settings, *(f"CREATE TABLE {name} (id int PRIMARY KEY)" for name in NAMES))
    log = Log(settings)
    writer, opened = log.writer(), list[bool]()
    monkeypatch.setattr(log, "writer", lambda: writer)
    for asked in ("names", "describe", "configure"):
        monkeypatch.setattr(log.topics, asked, _noted(getattr(log.topics, asked), writer, opened))
    with capturing(settings, log, chunked=chunked) as capture:
        capture.reach()
    assert len(opened) < 2 * MANY  # a chunk asks too
    assert sum(opened) < 5
    assert len(log.tables()) == MANY


def _noted(ask: Callable[..., Any], writer: CutWriter, opened: list[bool]) -> Callable[..., Any]:
    """Return what asks, and notes whether a cut was open then."""

    def noted(*args: Any) -> Any:
        was_open = bool(writer.opened_at)
        answer = ask(*args)  # one that fails is asked again until the broker knows of a topic
        if threading.current_thread().name != "catalogue":  # which asks while chunks are written
            opened.append(was_open)
        return answer

    return noted
