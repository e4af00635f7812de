"""Searching a live view."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from headrace import codec
from headrace.change import NOWHERE, Row, Version
from headrace.errors import Transient
from headrace.settings import Settings
from headrace.stores.elasticsearch.bulks import state_of
from headrace.stores.elasticsearch.client import body_of, client, errors


class SearchReader:
    """Searches a live view; what an application uses."""

    def __init__(self, settings: Settings, alias: str, fields: Sequence[str] = ("name^3", "category", "*")) -> None:
        """Search `fields` (with boosts, as ``name^3``) behind `alias`. Connects to nothing. Raises Misconfigured:
        `bad-setting`."""
        self._settings, self._client = settings, client(settings)
        self._alias = alias
        self._fields = list(fields)
        self._copy = uuid.uuid4().hex  # of each shard always the same one: replicas show a state one after the other

    def search(self, text: str, size: int = 30) -> list[Row]:
        """Return up to `size` documents for `text`, the best first: each body with its `id` and `highlight`, a mapping
        of fields to fragments of HTML in which the words found are in ``<em>``.

        Raises:
            Transient: `view-not-there`, when no generation is live; `elasticsearch-away`, `elasticsearch-busy`.
        """
        nothing = Transient("view-not-there", f"No generation of {self._alias} is live yet.", "See: headrace status")
        with errors(self._settings, missing=nothing):
            found = self._client.search(
                index=self._alias,
                query={"multi_match": {"query": text, "fields": self._fields, "type": "best_fields", "lenient": True}},
                highlight={"fields": {"*": {}}, "encoder": "html", "require_field_match": False},
                size=size,
                preference=self._copy,
            )
        return [
            {**body_of(hit), "id": hit["_id"], "highlight": hit.get("highlight", {})} for hit in found["hits"]["hits"]
        ]

    def applied(self) -> Version:
        """Return the version up to which searches show everything (S25); NOWHERE when no generation is live."""
        with errors(self._settings):
            found = state_of(self._client, self._alias, preference=self._copy)
            if found and not found[0].get("shown"):  # it may be there before what it covers can be searched
                found = state_of(self._client, self._alias, preference=self._copy, realtime=False)
        position = found and found[0]["position"]
        return codec.decode_position(position).reached if position else NOWHERE

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
