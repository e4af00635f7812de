"""SIGKILL of a consumer that keeps no view, between an effect and the position: every change is told, in the order of its key."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest

from headrace.settings import Settings
from tests.fixtures.capture import eventually, execute
from tests.fixtures.heard import FOLDER, Heard
from tests.fixtures.processes import System

RUN = ("--consumer", f"{FOLDER}/headrace-webhook/headrace_webhook/__init__.py:Webhook")
ROWS, STEPS = 100, 4
KILLED = (30, 330, 400)
"""At these requests, which are told and never answered: the transaction is ROWS * STEPS changes, done in pieces or as a whole."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A key's changes are in one of three partitions."""
    return replace(settings, partitions=3)


def test_killed_between_an_effect_and_its_position_every_change_is_told_in_its_order(
    system: System, heard: Heard, instead: dict[int, Callable[[], object]]
) -> None:
    system.environment["WEBHOOK"] = os.environ["WEBHOOK"]
    create = "CREATE TABLE orders (id int PRIMARY KEY, status int)"
    execute(system.settings, create, f"INSERT INTO orders SELECT i, 0 FROM generate_series(1, {ROWS}) i")
    system.up("webhook", options={"webhook": RUN})
    instead |= dict.fromkeys(KILLED, lambda: system.kill("webhook"))
    updates = "; ".join(f"UPDATE orders SET status = {step}" for step in range(1, STEPS + 1))
    execute(system.settings, f"DO $$ BEGIN {updates}; END $$")
    for number in KILLED:
        eventually("it is killed", lambda number=number: len(heard) == number and not system.alive("webhook"))
        execute(system.settings, f"DELETE FROM orders WHERE id = {number % ROWS + 1}")
        system.start("webhook", "run", *RUN)
    system.settle("webhook")
    keys = [key for _, _, key, _ in heard]
    assert [keys.count(keys[number - 1]) > 1 for number in KILLED] == [True] * 3, "what was told is told again"
    first = {key: body for _, _, key, body in reversed(heard)}
    last = {key: body for _, _, key, body in heard}
    assert first == last, "under one Idempotency-Key is one change"
    for order in (list(dict.fromkeys(keys)), list(dict.fromkeys(reversed(keys)))[::-1]):
        assert statuses(order, last) == expected(), "as each was told the first time, and the last"


def statuses(keys: list[str | None], bodies: dict[str | None, bytes]) -> dict[int, list[int | None]]:
    """Return what each row became, in the order of the calls; None when it was deleted."""
    found: dict[int, list[int | None]] = defaultdict(list)
    for body in (json.loads(bodies[key]) for key in keys):
        found[body["key"]["id"]].append(body["row"] and body["row"]["status"])
    return found


def expected() -> dict[int, list[int | None]]:
    gone = {number % ROWS + 1 for number in KILLED}
    return {id_: [*range(1, STEPS + 1), *([None] if id_ in gone else [])] for id_ in range(1, ROWS + 1)}
