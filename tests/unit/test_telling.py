"""Who waits is told when something changes, and now and then how far it is."""

from __future__ import annotations

import pytest

from headrace.cli import show


def test_a_change_of_phase_is_told_at_once_and_what_moves_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(show.time, "monotonic", lambda: now)
    telling = show.Telling()

    def told(seconds: float, name: str, phase: str, far: str = "") -> str:
        nonlocal now
        now += seconds
        telling.tell(name, phase, far)
        said = capsys.readouterr()
        assert said.out == "", "it is for scripts"
        return said.err

    assert told(0.5, "a", "loading", "9 left") == "", "it may be over in a moment"
    assert told(4, "a", "loading", "8 left") == "a: loading, 8 left\n"
    assert told(0, "b", "loading", "8 left") == "b: loading, 8 left\n"
    assert told(30, "a", "loading", "7 left") == ""
    assert told(1, "a", "following") == "a: following\n"
    assert told(59, "b", "loading", "7 left") == "b: loading, 7 left\n"
    assert told(90, "b", "loading", "7 left") == "", "nothing has moved"
    assert told(1, "b", "loading", "6 left") == "b: loading, 6 left\n"
