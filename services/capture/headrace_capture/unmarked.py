"""What capture does about its transactions that lack a marker (`headrace.log.unmarked`): each is ended as it was to end.

Whether it was committed is told by its checkpoint, the last record of every cut: one that is shown, or that the slot has confirmed, for
capture confirms only what was committed. Any other cut is aborted (again), and what Postgres sends of it is written again.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace

from headrace.change import Checkpoint
from headrace.codec import encode_checkpoint, encode_checkpoint_key
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

    It is in the log before that, for a kill may follow. Kafka itself aborts a cut whose capture has gone for longer than a transaction may
    last: then something lies beyond the ends, and the record before an end is not shown.
    """
    # What is wrong with topics that are missing, or have other partitions, is said where they are checked.
    there = log.topics.describe(log.topics.names() & ends.keys())
    ends = {topic: of for topic, of in ends.items() if topic in there and there[topic][1] == len(of)}
    hidden = log.topics.unshown(ends, idle)
    for table in sorted({table_of(topic) for topic, _ in hidden.keys() | _taken_away(log, ends, hidden, idle)}):
        jobs.doubt(log, table)
        say(
            f"warning: the newest rows of {table} lack a commit marker: Kafka was killed. The table is read again beside the stream"
        )


def _taken_away(
    log: Log, ends: Ends, hidden: Container[tuple[str, int]], idle: Callable[[], None]
) -> set[tuple[str, int]]:
    """Return which partitions show what they have, but not the record before their end in `ends`, its newest one that was committed."""
    has = log.topics.ends({topic: len(of) for topic, of in ends.items()}, committed=False)
    last = {
        (topic, partition): end - 1
        for topic, of in ends.items()
        for partition, end in enumerate(of)
        # Behind the end is its own marker.
        if 0 < end < has[topic][partition] - 1 and (topic, partition) not in hidden
    }
    # Where somebody deleted records nothing can be told.
    begins = log.topics.begins({topic: len(ends[topic]) for topic, _ in last})
    last = {place: offset for place, offset in last.items() if offset >= begins[place[0]][place[1]]}
    read = {(record.topic, record.partition, record.offset) for record in read_to_end(log.settings, last, idle=idle)}
    return {place for place, offset in last.items() if (*place, offset) not in read}


def newest_committed(log: Log, confirmed: int) -> tuple[Checkpoint | None, bool]:
    """Return the newest checkpoint of a cut that was committed, shown or not, and whether it is the last; `confirmed` is the slot's LSN."""
    shown, hidden, is_last = log.newest_checkpoint(), None, True
    if shown is None or shown.snapshot == "running":  # a new slot's LSN was confirmed by nobody
        return shown, shown is not None
    spine = Spine(shown if shown.complete else log.newest_checkpoint(complete=True))
    for record in read_to_end(
        log.settings, {(checkpoints_topic(log.settings.source), 0): shown.offset + 1}, committed=False
    ):
        if record.value is None:
            continue
        taken = spine.take(record.value, record.offset, record.timestamp)
        # Half a transaction is never confirmed, only what is whole before it in the same cut. Nor is a new epoch, which has a new slot.
        is_last = (
            taken is not None
            and (taken.partial is None or taken.version > (hidden or shown).version)
            and taken.version.epoch == shown.version.epoch
            and taken.version.lsn <= confirmed
        )
        hidden = taken if is_last else hidden
    return hidden or shown, is_last


def show_spine(
    log: Log, writer: CutWriter, before: Checkpoint | None, confirmed: int, idle: Callable[[], None]
) -> None:
    """End what is hidden of checkpoints, schemas and control, with every predecessor fenced.

    `before` is the newest checkpoint of a cut that was committed, as it was before that: to fence may have taken it away.

    Raises:
        Transient: `marker-missing`, where that does not help.
    """
    checkpoints, schemas = checkpoints_topic(log.settings.source), schemas_topic(log.settings.source)
    hidden = [*hidden_records(log.settings, log.topics, {checkpoints, schemas, CONTROL}, idle)]
    shown = log.newest_checkpoint()
    newest, is_last = newest_committed(log, confirmed) if hidden else (shown, True)
    nothing = record_key(log.settings.source, NAME, jobs.JOB, "")
    ended: dict[bool, list[Record]] = {True: [], False: []}
    for first, last in hidden:
        if first.topic == checkpoints:
            committed = newest is not None and newest.offset >= first.offset and is_last
            shown = newest if committed else shown
        else:  # a cut's checkpoint comes after all else of it
            committed = newest is not None and newest.appended >= first.timestamp
        # What is hidden in control may be another source's.
        ended[committed].append(last._replace(key=nothing, value=None, headers=[]) if first.topic == CONTROL else last)
    _end(writer, ended)
    if before is not None and (shown is None or shown.version < before.version):
        whole = replace(before, base=before.version.lsn)
        key, value = encode_checkpoint_key(whole), encode_checkpoint(whole)
        writer.again([Record(checkpoints, 0, 0, 0, key, value, [])], commit=True)
    elif not hidden:
        return
    check_shown(log.topics, schemas, log.topics.ends({checkpoints: 1}, committed=False))


def show_tables(
    log: Log, writer: CutWriter, checkpoint: Checkpoint, say: Callable[[str], None], idle: Callable[[], None]
) -> None:
    """End what is hidden of tables, once the writer goes on after `checkpoint`: the next one has the ends of what this writes."""
    ended: dict[bool, list[Record]] = {True: [], False: []}
    for _, last in hidden_records(log.settings, log.topics, checkpoint.ends, idle):
        # What lies beyond the end is of a cut that was not committed, and ends as that: what it takes away was noted (`note_tables`).
        ended[last.offset < checkpoint.ends[last.topic][last.partition]].append(last)
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
