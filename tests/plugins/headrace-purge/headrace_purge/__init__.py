"""Purges a page from an HTTP cache (Varnish, a CDN) when the row that it shows has changed. A purge may be repeated."""

import os
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException

from headrace import codec
from headrace.change import Change
from headrace.effects import EffectConsumer
from headrace.errors import Transient


class Purge(EffectConsumer):
    """One request for each product that changed, with the method PURGE."""

    tables = ("public.products",)

    def effect(self, changes: Sequence[Change]) -> None:
        """Purge each page once, however often its row has changed."""
        for id_ in {codec.decode_key(change.key)["id"]: None for change in changes}:
            request = urllib.request.Request(f"{os.environ['CACHE']}/products/{id_}", method="PURGE")
            try:
                urllib.request.urlopen(request, timeout=10).close()
            except (OSError, HTTPException) as error:
                if getattr(error, "code", 0) == 404:  # the cache does not have it
                    continue
                raise Transient("cache-away", f"The cache does not answer: {error}.", "Change CACHE.") from error
