"""What capture does about its transactions that lack a marker (`headrace.log.unmarked`): each is ended as it was to end.

Whether it was committed is told by its checkpoint, the last record of every cut: one that is shown, or that the slot has confirmed, for
capture confirms only what was committed. Any other cut is aborted (again), and what Postgres sends of it is written again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from headrace.change import Checkpoint
from headrace.control import record_key
from headrace.log import CutWriter, Log
from headrace.log.spine import Spine
from headrace.log.tail import Record, read_to_end
from headrace.log.topics import CONTROL, Ends, checkpoints_topic, schemas_topic, table_of
from headrace.log.unmarked import check_shown, hidden_records
from headrace_capture import jobs
from headrace_capture.progress import NAME


def note_tables(log: Log, ends: Ends, say: Callable[[str], None], idle: Callable[[], None]) -> None:
    """Note tables that do not show what was committed, up to `ends`, to be read again, before a cut is aborted that may touch them.

    It is in the log before that, for a kill may follow.
    """
    # What is wrong with topics that are missing, or have other partitions, is said where they are checked.
    there = log.topics.describe(log.topics.names() & ends.keys())
    ends = {topic: of for topic, of in ends.items() if topic in there and there[topic][1] == len(of)}
    for table in sorted({table_of(topic) for topic, _ in log.topics.unshown(ends, idle)}):
        jobs.doubt(log, table)
        say(
            f"warning: the newest rows of {table} lack a commit marker: Kafka was killed. The table is read again beside the stream"
        )


def newest_committed(log: Log, confirmed: int) -> Checkpoint | None:
    """Return the newest checkpoint of a cut that was committed, shown or not; `confirmed` is the slot's LSN."""
    shown, hidden = log.newest_checkpoint(), None
    if shown is None or shown.snapshot == "running":  # a new slot's LSN was confirmed by nobody
        return shown
    spine = Spine(shown)
    for record in read_to_end(
        log.settings, {(checkpoints_topic(log.settings.source), 0): shown.offset + 1}, committed=False
    ):
        hidden = spine.take(record.value, record.offset, record.timestamp) or hidden
    # Half a transaction is never confirmed: it begins again from what is shown.
    if hidden is None or hidden.partial is not None or hidden.version.lsn > confirmed:
        return shown
    return hidden


def show_spine(log: Log, writer: CutWriter, confirmed: int, idle: Callable[[], None]) -> None:
    """End what is hidden of checkpoints, schemas and control, with every predecessor fenced.

    Raises:
        Transient: `marker-missing`, where that does not help.
    """
    checkpoints, schemas = checkpoints_topic(log.settings.source), schemas_topic(log.settings.source)
    hidden = [*hidden_records(log.settings, log.topics, {checkpoints, schemas, CONTROL}, idle)]
    if not hidden:
        return
    newest = newest_committed(log, confirmed)
    nothing = record_key(log.settings.source, NAME, jobs.JOB, "")
    ended: dict[bool, list[Record]] = {True: [], False: []}
    for first, last in hidden:
        if first.topic == checkpoints:
            committed = newest is not None and newest.offset >= first.offset
        else:  # a cut's checkpoint comes after all else of it
            committed = newest is not None and newest.appended >= first.timestamp
        # What is hidden in control may be another source's.
        ended[committed].append(last._replace(key=nothing, value=None, headers=[]) if first.topic == CONTROL else last)
    _end(writer, ended)
    check_shown(log.topics, schemas, log.topics.ends({checkpoints: 1}, committed=False))


def show_tables(
    log: Log, writer: CutWriter, checkpoint: Checkpoint, say: Callable[[str], None], idle: Callable[[], None]
) -> None:
    """End what is hidden of tables, once the writer goes on after `checkpoint`: the next one has the ends of what this writes."""
    ended: dict[bool, list[Record]] = {True: [], False: []}
    for first, last in hidden_records(log.settings, log.topics, checkpoint.ends, idle):
        ended[first.offset < checkpoint.ends[first.topic][first.partition]].append(last)
    _end(writer, ended)
    if not any(ended.values()):
        return
    left = log.topics.unshown(log.topics.ends(log.partitions(checkpoint.ends), committed=False), idle)
    for topic, partition in sorted(left):
        say(
            f"warning: somebody's transaction is open in {topic} partition {partition}, and no cut of capture's ends it: "
            "its readers stand still (see marker-missing in the runbook)"
        )


def _end(writer: CutWriter, ended: Mapping[bool, list[Record]]) -> None:
    for committed, records in ended.items():
        if records:
            writer.again(records, commit=committed)
