"""Documents by id, page by page, whoever has written them: verify is to tell what somebody has done to the index.

Elasticsearch does not sort by `_id`; `headrace.id` repeats it, and is each document's *place*. A document that somebody else put there has
none, or that of the document which it was copied from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from elasticsearch import Elasticsearch

from headrace.change import NOWHERE
from headrace.consumer import ViewRow
from headrace.stores.elasticsearch.client import hits_of, row_of

INTERNAL = {"exists": {"field": "headrace.kind"}}
_NAMED = {"exists": {"field": "headrace.id"}}
_OURS = {"bool": {"must_not": [INTERNAL], "filter": [_NAMED]}}
_FOREIGN = {"bool": {"must_not": [INTERNAL, _NAMED]}}
_BY_PLACE = [{"headrace.id": "asc"}]
_MOST, _STANDING = 1000, 4
"""Most documents without a place, and at one place; and at how many places off their keys scans stand."""
MORE: Final = f"(and more: of these only {_MOST} are named)"
"""The key of a row that says so."""


_Placed = tuple[str, ViewRow]


class Paging:
    """Pages of the documents of an index."""

    def __init__(self, server: Elasticsearch, index: str) -> None:
        """Nothing is read yet."""
        self._server, self._index = server, index
        self._places: dict[str, str] = {}

    def next(self, key: str | None, limit: int) -> list[ViewRow]:
        """Return the documents that follow a key, by place; and more than `limit` where there are several at the last place.

        Up to a thousand without a place are found apart and put where their keys belong; that there are more is said by a row of its own.
        """
        at = None if key is None else self._places.get(key, key)
        how = {} if at is None else {"search_after": [at]}
        placed = self._placed(_OURS, limit, sort=_BY_PLACE, **how)
        end = placed[-1][0] if len(placed) == limit else None
        if end is not None:
            before = [each for each in placed if each[0] < end]
            placed = before + self._all_at(end, before[-1][0] if before else at, len(placed) - len(before))
        foreign = _some(self._placed(_FOREIGN, _MOST + 1), MORE)
        placed += [each for each in foreign if (at is None or each[0] > at) and (end is None or each[0] <= end)]
        placed.sort(key=lambda each: each[0])
        if len(placed) > limit:
            placed = [each for each in placed if each[0] <= placed[limit - 1][0]]
        if placed:
            self._stand(*placed[-1])
        return [row for _, row in placed]

    def _stand(self, place: str, row: ViewRow) -> None:
        """Know the place from which a scan goes on."""
        self._places.pop(row.key, None)
        if place != row.key:
            self._places[row.key] = place
            if len(self._places) > _STANDING:  # of a scan that was given up nobody says so
                del self._places[next(iter(self._places))]

    def _all_at(self, place: str, after: str | None, known: int) -> list[_Placed]:
        """Return the documents at a place, which comes after another; so many are known."""
        how = {} if after is None else {"search_after": [after]}
        there = self._placed(_OURS, known + 1, sort=_BY_PLACE, **how)
        if there and there[-1][0] == place:
            there = self._placed(_OURS, _MOST + 1, sort=_BY_PLACE, **how)
        return _some([each for each in there if each[0] == place], place)

    def _placed(self, query: Mapping[str, Any], size: int, **how: Any) -> list[_Placed]:
        hits = hits_of(self._server, self._index, query, size, **how)
        # A document may have several ids: the first is its place.
        return [(hit.get("sort", [hit["_id"]])[0], row_of(hit)) for hit in hits]


def _some(found: list[_Placed], place: str) -> list[_Placed]:
    """Return documents that are not paged, and where there are more the row that says so, at a place."""
    return found if len(found) <= _MOST else [*found[:_MOST], (place, ViewRow("", MORE, {}, NOWHERE))]
