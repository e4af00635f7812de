"""A skipped test is a failure unless it is listed."""

from __future__ import annotations

import pytest

from tests.fixtures import skips


def report(outcome: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid="tests/t.py::test_a",
        location=("t", 1, "a"),
        keywords={},
        outcome=outcome,
        longrepr=None,
        when="call",  # type: ignore[arg-type]
    )


def test_a_skipped_test_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skips, "allowed", dict)
    refused = skips._refuse(report("skipped"), "tests/t.py::test_a")
    assert refused.failed
    assert "tests/skips.toml" in str(refused.longrepr)


def test_a_listed_test_may_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skips, "allowed", lambda: {"tests/t.py::test_a": "no engine here"})
    assert skips._refuse(report("skipped"), "tests/t.py::test_a").skipped


def test_a_passed_test_passes() -> None:
    assert skips._refuse(report("passed"), "tests/t.py::test_a").passed
