"""What capture does about its committed transactions that lack a marker (`headrace.log.unmarked`), before it reads the log."""

from __future__ import annotations

from collections.abc import Callable

from headrace.control import record_key
from headrace.log import CutWriter, Log
from headrace.log.topics import CONTROL, table_of
from headrace.log.unmarked import newest_hidden
from headrace_capture import jobs
from headrace_capture.progress import NAME

_ROUNDS = 3
"""What was hidden in the checkpoints and the schemas may name further topics."""


def order(log: Log, say: Callable[[str], None], idle: Callable[[], None]) -> None:
    """Order that tables are read again whose newest rows are hidden: who fences may abort a transaction that touches them.

    It is in the log before that, for a kill may follow.
    """
    newest = log.newest_checkpoint()
    for table in sorted({table_of(topic) for topic, _ in log.topics.unshown(newest.ends if newest else {}, idle)}):
        say(
            f"warning: the newest rows of {table} lack a commit marker: Kafka was killed. The table is read again beside the stream"
        )
        jobs.order(log, table, "Kafka did not show its newest rows")


def end(log: Log, writer: CutWriter, idle: Callable[[], None]) -> None:
    """End what no marker has ended, with every predecessor fenced.

    Raises:
        Transient: `marker-missing`, where that does not help.
    """
    shared = {CONTROL}  # once: another source's cut may be open there, and stay so
    nothing = record_key(log.settings.source, NAME, jobs.JOB, "")
    for _ in range(_ROUNDS):
        own = log.own_topics()
        hidden = [*newest_hidden(log.settings, log.topics, shared.union(own), idle)]
        if not hidden:
            return
        writer.again(
            # What is hidden in control may be another source's.
            record._replace(key=nothing, value=None, headers=[]) if record.topic == CONTROL else record
            for record in hidden
        )
        shared.clear()
    log.topics.check_shown(log.topics.ends(log.partitions(own), committed=False))
