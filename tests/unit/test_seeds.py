"""Which histories are drawn, and how long they are (`make fuzz`)."""

from __future__ import annotations

import pytest

from tests.fixtures.seeds import seeds, steps


def test_numbers_and_ranges_of_seeds_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDS", "7,100-102")
    monkeypatch.setenv("STEPS", "60")
    assert (seeds("1"), steps(5)) == ([7, 100, 101, 102], 60)


def test_else_they_are_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEEDS", "STEPS"):
        monkeypatch.delenv(name, raising=False)
    assert (seeds("1,4-5"), steps(5)) == ([1, 4, 5], 5)
