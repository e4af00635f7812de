"""What another process has to do with a view: a view whose own process runs is nobody else's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from headrace import codec
from headrace.change import source_of
from headrace.control import DEAD_SECONDS, Control
from headrace.errors import Misconfigured
from headrace.log import Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.log.topics import CONTROL
from headrace.runner.worker import Worker

_QUICK_SECONDS = 2.0
"""What is asked of a Kafka that may be away keeps nobody waiting for longer who would end."""


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


def check_alone(log: Log, control: Control, name: str, process: str, last: int) -> None:
    """Refuse to go on with a view that another process runs, after nothing was heard of this one for so long that it was taken for dead.

    What this one said may only come now, over what the other says: so not the newest report of a generation counts, but of a process. Who
    was heard just before the `last` of this one, by the broker's time, was there beside it: which of them writes is for the store to say.

    Raises:
        Misconfigured: `view-taken-over`. Transient: `kafka-away`, also where Kafka takes long.
    """
    now, dead = control.clock(_QUICK_SECONDS), DEAD_SECONDS * 1000
    heard: dict[str, int] = {}
    beside = {process}
    for record in read_to_end(log.settings, {(CONTROL, 0): BEGINNING}, committed=False):
        key = codec.loads(record.key)
        if record.value and (key["source"], key["kind"], key["name"]) == (log.settings.source, "report", name):
            said = codec.loads(record.value)
            who = said.get("process", "")
            heard[who] = 0 if said.get("ended") else record.timestamp
            if last - dead < heard[who] <= last:
                beside.add(who)
    if any(now - at <= dead for who, at in heard.items() if who not in beside):
        raise _taken_over(name, f"has run {name} while this one stood still, or was cut off from Kafka")


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
