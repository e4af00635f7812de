"""A transaction that touches many tables for the first time: each comes with its shape, for which the catalogue is asked."""

from __future__ import annotations

import time
from typing import Any

import pytest

from headrace.settings import Settings
from headrace_capture import catalog, progress
from tests.fixtures.capture import capturing, changes, execute, prepare

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
        time.sleep(0.15)
        return ask(*args, **named)

    monkeypatch.setattr(catalog, "published_tables", slow)
    monkeypatch.setattr(progress, "STALLED_SECONDS", 2.5)
    with capturing(settings) as capture:
        capture.reach()
    assert [line for line in capture.said if "streaming from" in line or "Kafka" in line] == capture.said[:1]
    assert all([change.key for change in changes(settings, f"public.{name}")] == [b'{"id":1}'] for name in NAMES)
