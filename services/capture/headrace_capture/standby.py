"""Whether capture is a synchronous standby: then each commit of the application waits until Kafka has it, or for ever [I1].

Postgres counts whoever reads its WAL, a logical slot's reader too, by the name of the connection and nothing else. It shows what it
decided to `pg_read_all_stats` only, so the names are compared here as it does; the setting and the connection's name anybody may read.
Which standby is away decides whether one that is named is waited for, so each that may be is told.
"""

from __future__ import annotations

import re
from typing import Final

NAME: Final = "headrace capture"
"""What the stream's connection is called, unless the DSN says otherwise."""


def told(names: str, application: str) -> str:
    """Return what it means, and what mends it, where synchronous_standby_names is `names` and counts `application`; otherwise ""."""
    if not counts(names, application):
        return ""
    return (
        f"synchronous_standby_names ({names}) counts capture (application_name {application}) among the standbys: commits wait until "
        "Kafka has them, and for ever where a value must be read again (S7), though no true standby may have them. Name yours only, run: "
        "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (YOUR_STANDBY)'; SELECT pg_reload_conf()"
    )


def counts(names: str, application: str) -> bool:
    """Whether synchronous_standby_names counts a connection of this name."""
    listed = re.sub(r"^\s*((any|first)\s+)?\d+\s*\(", "", names, flags=re.IGNORECASE)
    named = {quoted.replace('""', '"') or plain for quoted, plain in _NAMED.findall(listed)}
    return not {name.lower() for name in named}.isdisjoint({"*", application.lower()})


_NAMED: Final = re.compile(r'"((?:[^"]|"")*)"|([^\s,()"]+)')
