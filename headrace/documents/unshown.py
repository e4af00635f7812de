"""Documents that cannot be shown: found in one pass over what a batch touched, so that the runner parks all of them at once."""

from __future__ import annotations

from typing import Any, Final

from headrace.consumer import Cursor
from headrace.documents.declaration import Node
from headrace.errors import Poison

_ROWS: Final = 20
"""Of a join with more rows these many are shown to who looks at what is parked."""


class Unshown:
    """Collects poison, each with the document that it is of, up to what the runner would park."""

    def __init__(self, limit: int) -> None:
        """Collect one more than `limit`, by which the runner sees that it is too many."""
        self._limit = limit
        self._found: list[Poison] = []

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._found)

    def add(self, error: Poison, cursor: Cursor, body: Any) -> None:
        """Note a document; raise all when they are too many."""
        error.cursor, error.body = cursor, error.body if error.body is not None else body
        self._found.append(error)
        if len(self._found) > self._limit:
            self.check()

    def check(self) -> None:
        """Raise what was found."""
        if self._found:
            first, *others = self._found
            first.others = others
            raise first


def rows_of(node: Node | None) -> Any:
    """Return the rows that a document is made of, as JSON values; of many that are joined the first."""
    if node is None:
        return None
    joined = {name: _joined(value) for name, value in node._joins.items()}  # noqa: SLF001  a row's columns and its joins are of one name space
    return dict(node) | ({"joined": joined} if joined else {})


def _joined(value: Node | list[Node] | None) -> Any:
    if not isinstance(value, list):
        return rows_of(value)
    more = [f"and {len(value) - _ROWS} more"] if len(value) > _ROWS else []
    return [*map(rows_of, value[:_ROWS]), *more]
