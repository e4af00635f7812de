"""A live view is held while it is compared, however the documents of both sides lie."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from headrace import codec, control
from headrace.change import Version
from headrace.consumer import ViewRow
from headrace.control import Control
from headrace.log.tail import Tail
from headrace.runner import comparing
from headrace.runner.comparing import Held, compare
from headrace.runner.scratch import Scratch
from headrace.runner.verbs import HOLD_SECONDS

AT = Version(1, 5)


class Clock:
    """Time that goes on when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (comparing, control):
        monkeypatch.setattr(module, "time", made)
    return made


def test_a_live_view_is_held_on_while_new_code_adds_many_documents_in_a_row(clock: Clock) -> None:
    rows = [ViewRow("", f"{number:03}", {}, AT) for number in range(100)]
    asked = list[float]()

    def hold(*_: Any) -> dict[str, Any]:
        asked.append(clock.now)
        return {"generation": 1, "version": list(AT)}

    def slowly() -> Iterator[ViewRow]:
        for row in rows:
            clock.now += HOLD_SECONDS / 10
            yield row

    live = SimpleNamespace(ask=hold, scan=lambda *_: iter([rows[0], rows[-1]]))
    scratch = SimpleNamespace(reach=lambda _: None, rows=slowly)
    found = compare(Held(cast("Control", live), "view"), cast("Scratch", scratch), AT, 0)
    assert found.counts == {"same": 2, "added": 98}
    assert max(after - before for before, after in pairwise(asked)) < HOLD_SECONDS


def test_who_takes_long_with_what_was_said_does_not_miss_what_is_said_next(clock: Clock) -> None:
    class Message:
        def __init__(self, number: int) -> None:
            self.number = number

        def error(self) -> None:
            return None

        def key(self) -> bytes:
            return b"key"

        def value(self) -> bytes:
            return codec.dumps({"n": self.number})

    sent = iter([[Message(1)], [Message(2)]])
    tail = cast("Tail", SimpleNamespace(poll=lambda _: next(sent)))
    values = control._values(tail, b"key", 60.0, "view", lambda: None)
    assert next(values) == {"n": 1}
    clock.now += 61
    assert next(values) == {"n": 2}
