"""What a store may have of another source: a view whose own process runs is nobody else's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from headrace.change import source_of
from headrace.control import Control
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.runner.worker import Worker


def check_not_of_another(log: Log, name: str, seen: Iterable[Worker]) -> None:
    """Refuse to build beside a view of another source whose process runs: its readers would see this one's rows.

    Raises:
        Misconfigured: `view-of-another`.
    """
    topics = {topic for each in seen if each.opened for topic in each.opened.topics}
    for source in set(map(source_of, topics)) - {log.settings.source}:
        try:
            Control(Log(replace(log.settings, source=source))).running(name)
        except Misconfigured:  # nobody runs it any more
            continue
        said = f"What the store has of {name} is of source {source}, whose process runs."
        remedy = "Give the store of one of the two another name, or end that process for good."
        raise Misconfigured("view-of-another", said, remedy)
