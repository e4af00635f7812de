"""What another process has to do with a view: a view whose own process runs is nobody else's."""

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


def check_alone(control: Control, name: str, process: str) -> None:
    """Refuse to go on with a view that another process runs, after this one has stood for so long that it was taken for dead.

    Raises:
        Misconfigured: `view-taken-over`. Transient: `kafka-away`.
    """
    said = control.reports().get(name, [])
    if any(each.process != process and each.heard for each in said):
        raise _taken_over(name, f"has run {name} while this one stood still")


def check_stands(control: Control, name: str, phase: str) -> None:
    """Refuse to drop again what the store has of a view that is to stay dropped, as far as this process knows.

    Raises:
        Misconfigured: `view-taken-over`: another process was asked to build it since. Transient: `kafka-away`.
    """
    (standing,) = control.kept(name, "standing", committed=False)
    if standing.get("", {}).get("phase") != phase:
        raise _taken_over(name, f"has begun {name} anew since it was dropped")


def _taken_over(name: str, why: str) -> Misconfigured:
    return Misconfigured("view-taken-over", f"Another process {why}.", f"Run the consumer {name} in one process only.")
