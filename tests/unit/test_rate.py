"""How long a build still takes: while it reads by what is left to read, then by how far it is with what it does with that."""

from __future__ import annotations

import time

import pytest

from headrace.runner.rate import seconds_left


def test_what_is_left_is_told_by_what_is_being_done() -> None:
    assert seconds_left(100, 50.0, (0, 0), None) == 2.0
    assert seconds_left(0, 50.0, (0, 0), None) == -1.0
    assert seconds_left(100, 0.0, (0, 0), None) == -1.0
    began = time.monotonic() - 1000
    assert seconds_left(0, 50.0, (250, 1000), began) == pytest.approx(3000, rel=0.1), "it reads nothing meanwhile"
    assert seconds_left(0, 50.0, (0, 1000), began) == -1.0, "it has just begun"
    assert seconds_left(0, 50.0, (1000, 1000), began) == 0.0
