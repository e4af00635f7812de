"""The shop's reader of views: what a token promises."""

from __future__ import annotations

from typing import Any

from headrace.change import NOWHERE, Version
from headrace_shop.views import Views


class Moves:
    """Pages that go on to the next state just when they are asked where they stand."""

    page = "old"

    def get(self, _page_id: str) -> str:
        return self.page

    def applied(self) -> Version:
        self.page = "new"
        return Version(1, 10)


def test_who_waits_for_a_token_gets_a_page_that_has_it() -> None:
    moves: Any = Moves()
    views = Views(moves, moves, moves)
    assert views.page("1", NOWHERE) == "old"
    assert views.page("1", Version(1, 10)) == "new"
