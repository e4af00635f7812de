"""What capture does about its committed transactions that lack a marker (`headrace.log.unmarked`).

What is hidden of the checkpoints is decided by the slot: capture confirms only what was committed. A checkpoint that was not confirmed may
be of a cut that was aborted, without a marker of that; it is aborted (again), and what Postgres sends of it is written again.
"""

from __future__ import annotations

from collections.abc import Callable

from headrace import codec
from headrace.change import Checkpoint
from headrace.control import record_key
from headrace.log import CutWriter, Log
from headrace.log.tail import Record
from headrace.log.topics import CONTROL, checkpoints_topic, schemas_topic, table_of
from headrace.log.unmarked import check_shown, newest_hidden
from headrace_capture import jobs
from headrace_capture.progress import NAME


def note_tables(log: Log, say: Callable[[str], None], idle: Callable[[], None]) -> None:
    """Note tables whose newest rows are hidden, to be read again: who fences may abort a transaction that touches them.

    It is in the log before that, for a kill may follow.
    """
    newest = log.newest_checkpoint()
    for table in sorted({table_of(topic) for topic, _ in log.topics.unshown(newest.ends if newest else {}, idle)}):
        say(
            f"warning: the newest rows of {table} lack a commit marker: Kafka was killed. The table is read again beside the stream"
        )
        jobs.doubt(log, table)


def show_spine(log: Log, writer: CutWriter, confirmed: int, idle: Callable[[], None]) -> None:
    """Show what is hidden of checkpoints, schemas and control, with every predecessor fenced; `confirmed` is the slot's LSN.

    Raises:
        Transient: `marker-missing`, where that does not help.
    """
    checkpoints, schemas = checkpoints_topic(log.settings.source), schemas_topic(log.settings.source)
    hidden = [*newest_hidden(log.settings, log.topics, {checkpoints, schemas, CONTROL}, idle)]
    if not hidden:
        return
    sealed = next((each for each in hidden if each.topic == checkpoints), None)
    nothing = record_key(log.settings.source, NAME, jobs.JOB, "")
    writer.again(
        # What is hidden in control may be another source's.
        [each._replace(key=nothing, value=None, headers=[]) if each.topic == CONTROL else each for each in hidden],
        commit=sealed is None or _was_committed(sealed, confirmed),
    )
    check_shown(log.topics, schemas, log.topics.ends({checkpoints: 1}, committed=False))


def _was_committed(sealed: Record, confirmed: int) -> bool:
    if sealed.value is None:
        return True
    checkpoint = codec.decode_checkpoint(sealed.value)
    # Half a transaction is never confirmed, nor a snapshot that runs: they begin again from what is shown.
    return checkpoint.partial is None and checkpoint.snapshot != "running" and checkpoint.version.lsn <= confirmed


def show_tables(
    log: Log, writer: CutWriter, checkpoint: Checkpoint, say: Callable[[str], None], idle: Callable[[], None]
) -> None:
    """Show what is hidden of tables, once the writer goes on after `checkpoint`: the next one has the ends of what this writes."""
    hidden = [*newest_hidden(log.settings, log.topics, checkpoint.ends, idle)]
    if not hidden:
        return
    writer.again(hidden, commit=True)
    left = log.topics.unshown(log.topics.ends(log.partitions(checkpoint.ends), committed=False), idle)
    for topic, partition in sorted(left):
        say(
            f"warning: somebody's transaction is open in {topic} partition {partition}, and no commit of capture's ends it: "
            "its readers stand still (see marker-missing in the runbook)"
        )
