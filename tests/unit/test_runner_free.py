"""When a process takes up again a view that another had taken over: by a clock of the test, since Kafka's own waits are long."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.control import Report
from headrace.errors import Transient
from headrace.log import Log
from headrace.runner import Runner, runner
from headrace.settings import Settings
from tests.fixtures.plain import Plain


class Spoken:
    """Control, of which only the reports are asked; to ask it takes some seconds."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock
        self.takes, self.said = 0.0, list[Report]()
        self.away = False

    def reports(self) -> dict[str, list[Report]]:
        self._clock[0] += self.takes
        if self.away:
            raise Transient("kafka-away", "It does not answer.", "Wait.")
        return {"view": self.said}


def test_a_view_is_free_when_who_runs_it_has_ended_or_is_long_unheard_by_a_kafka_that_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    control: Any = Spoken(clock)
    one = Runner(Log(Settings()), control, "view", Plain)

    def is_free(**facts: Any) -> bool:
        clock[0] += 6
        control.said = [Report("view", 1, phase="live", **facts)] if facts else []
        return one._is_free()

    assert not is_free(age=1.0)
    control.away, control.takes = True, 15.0
    assert not is_free(age=1.0)
    control.away, control.takes = False, 8.0
    assert not is_free(age=16.0), "who runs it could say nothing either, while Kafka was away"
    control.takes = 0.0
    assert not is_free(age=30.0), "nor need it have been connected again"
    assert not is_free(age=1.0)
    assert not is_free(), "it drops its generations, say"
    assert is_free(age=2.0, ended=True)
    assert not is_free(age=1.0)
    assert not is_free(age=11.0)
    assert is_free(age=17.0)
