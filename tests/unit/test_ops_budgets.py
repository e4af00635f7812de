"""The size budgets are held by something that sees what is over them."""

from __future__ import annotations

from pathlib import Path

from ops import budgets


def test_a_function_and_a_module_that_are_too_long_are_named() -> None:
    text = "def long():\n" + "    pass\n" * 50 + "def fine():\n" + "    pass\n" * 49 + "\n" * 400
    found = list(budgets.excesses(Path("m.py"), text))
    assert found == ["m.py:1: 501 lines, over 400", "m.py:1: long has 51 lines, over 50"]


def test_what_is_within_its_budget_is_not_named() -> None:
    assert list(budgets.excesses(Path("m.py"), "def f():\n" + "    pass\n" * 49)) == []
