"""Reading pages of a live view."""

from __future__ import annotations

from typing import Any, NamedTuple

from headrace import codec
from headrace.change import NOWHERE, Version
from headrace.errors import Transient
from headrace.settings import Settings
from headrace.stores.redis import scripts
from headrace.stores.redis.client import client, errors, text_version


class Page(NamedTuple):
    """A page as a reader gets it: its HTML, its ETag, and the LSN of the state that it shows."""

    html: str
    etag: str
    version: Version

    @property
    def lsn(self) -> int:
        """Return the LSN that the page shows."""
        return self.version.lsn


class PageReader:
    """Reads pages of a live view, each in one round trip; what an application uses. Thread-safe."""

    def __init__(self, settings: Settings, prefix: str) -> None:
        """Read pages under `prefix`. Connects to nothing. Raises Misconfigured: `bad-setting`."""
        self._redis = client(settings)
        self._prefix = prefix
        self._script = self._redis.register_script(scripts.READ)

    def get(self, id_: str) -> Page | None:
        """Return a page, None when there is none.

        Raises:
            Transient: `view-not-there`, when no generation is live; `redis-away`, `redis-busy`.
        """
        with errors():
            said, *found = self._script(keys=[f"{self._prefix}:live"], args=[f"{self._prefix}:", id_])
        if said == "nothing":
            raise Transient("view-not-there", f"No generation of {self._prefix} is live yet.", "See: headrace status")
        html, etag, version = found[0]
        return Page(html, etag or "", text_version(version)) if html is not None else None

    def applied(self) -> Version:
        """Return the version up to which the live generation shows everything (S25); NOWHERE when none is live."""
        with errors():
            position: Any = self._redis.eval(scripts.APPLIED, 1, f"{self._prefix}:live", f"{self._prefix}:g")
        return codec.decode_position(position).reached if position else NOWHERE

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
