"""What excuses a difference: a change that is in one only of a snapshot of Postgres and a view (S27)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headrace.change import Change, Checkpoint, Version
from headrace.log import Log
from headrace_verify.expected import Expectation
from headrace_verify.ledger import Ledger, Member
from headrace_verify.postgres import Moment


class Take(NamedTuple):
    """A snapshot of Postgres, and what in a view differs from it."""

    moment: Moment
    ledger: Ledger

    def hear(self, change: Change, expected: Expectation, shown: Version | None) -> None:
        """Let a change excuse what it touches, if it is in one only of snapshot and view, or may be.

        It touches what its row names, and the documents that hold the row, or one that it is joined to: by a snapshot, or by
        what an earlier change named. Where a row was that has left since the view's state nobody may know, if it had come there
        just before and only with others: see `Expectation.adrift`. Then it may have been in any.
        """
        unseen = self.moment.unseen(change.xid, change.version.lsn)
        member = expected.member(change)
        held = [touched for row in (member, *expected.above(change)) for touched in self.ledger.holders(*row)]
        touches = [*expected.named(change), *held]
        if unseen if shown is None else unseen == (change.version < shown):
            for touched in touches:
                self.ledger.excuse(*touched)
            if shown is not None and not unseen and change.table in expected.adrift:
                self.ledger.excuse_all()
        if shown is not None:
            self.ledger.add((), (Member(*member, collection, key) for collection, key, _ in touches))


def excuse(
    log: Log, expected: Expectation, takes: Sequence[Take], before: Checkpoint, shown: Version | None = None
) -> None:
    """Find for each difference the change that may explain it.

    What was logged since `before` is read first, and only if that leaves something unexcused, all that was logged before it.

    Args:
        log: Where the changes are.
        expected: What the view should hold.
        takes: Snapshots, with what differs from them.
        before: A checkpoint from before all of them.
        shown: The version of the state that the view shows; None when it is not known: then all that may be in the view counts.
    """
    for old in (False, True):
        left = [take for take in takes if next(take.ledger.differences(excused=False), None)]
        for change in log.scan(*expected.tables, since={} if old else before.ends) if left else ():
            # LSNs and transactions of an earlier epoch are of another server's: they excuse nothing.
            if change.version.epoch >= before.version.epoch and old == _precedes(log, change, before):
                for take in left:
                    take.hear(change, expected, shown)


def _precedes(log: Log, change: Change, checkpoint: Checkpoint) -> bool:
    ends = checkpoint.ends.get(log.topic_of(change.table))
    return ends is not None and change.offset < ends[change.partition]
