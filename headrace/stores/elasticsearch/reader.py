"""Searching a live view."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.change import Row
from headrace.errors import Transient
from headrace.settings import Settings
from headrace.stores.elasticsearch.client import body_of, client, errors


class SearchReader:
    """Searches a live view; what an application uses."""

    def __init__(self, settings: Settings, alias: str, fields: Sequence[str] = ("name^3", "category", "*")) -> None:
        """Search `fields` (with boosts, as ``name^3``) behind `alias`. Connects to nothing. Raises Misconfigured:
        `bad-setting`."""
        self._client = client(settings)
        self._alias = alias
        self._fields = list(fields)

    def search(self, text: str, size: int = 30) -> list[Row]:
        """Return up to `size` documents for `text`, the best first: each body with its `id` and `highlight`, a mapping
        of fields to fragments of HTML in which the words found are in ``<em>``.

        Raises:
            Transient: `view-not-there`, when no generation is live; `elasticsearch-away`, `elasticsearch-busy`.
        """
        nothing = Transient("view-not-there", f"No generation of {self._alias} is live yet.", "See: headrace status")
        with errors(missing=nothing):
            found = self._client.search(
                index=self._alias,
                query={"multi_match": {"query": text, "fields": self._fields, "type": "best_fields", "lenient": True}},
                highlight={"fields": {"*": {}}, "encoder": "html", "require_field_match": False},
                size=size,
            )
        return [
            {**body_of(hit), "id": hit["_id"], "highlight": hit.get("highlight", {})} for hit in found["hits"]["hits"]
        ]

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
