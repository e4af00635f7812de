"""The part of the suite that is about what cannot be done: the runner parks it, and calls `apply` again without it [I9]."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from headrace.consumer import Batch, Consumer, Cursor
from headrace.errors import Poison
from headrace.testing.harness import Harness, shown


class Parks(Harness):
    """What `ConsumerConformance` asks of a consumer by the runner's part; of one that leaves alone what is parked, that it does."""

    def test_what_cannot_be_done_stays_as_it_was_until_it_can_be(self) -> None:
        log = self._log()
        log.put(self._schema.table, self._versions[0])
        log.cut()
        self._catch_up(log)
        before = self._shown()
        log.put(self._schema.table, self._versions[1])
        log.cut()
        leaves = getattr(self.consumer, "leaves_parked", False) and hasattr(self.consumer, "render")
        for number in (1, 2):  # the second begins where the first was refused
            with self._opened() as (consumer, position):
                (batch,) = log.batches(position)
                parked = (
                    _refused(consumer, batch) if leaves else {(each.table, each.key.decode()) for each in batch.changes}
                )
                assert not [row for row in shown(consumer) if row not in before], "what cannot be done is shown"
                if number == 1:
                    continue
                held, tables = batch.position.version.before(), tuple(sorted({table for table, _ in parked}))
                around = replace(batch.position, held=held, parked=tables)
                left = batch.changes if leaves else []
                consumer.apply(replace(batch, changes=left, position=around, parked=frozenset(parked)))
                assert not [row for row in shown(consumer) if row not in before], "what is parked is shown"
        with self._opened() as (consumer, position):
            assert position == around, "it has not gone on around what is parked"
            consumer.apply(replace(batch, changes=[] if leaves else batch.changes, hurry=True))
        self._check(log, "it was tried again")


def _refused(consumer: Consumer, batch: Batch) -> set[Cursor]:
    """Apply a batch while no document can be rendered; return which these are."""

    def fail(_row: Any) -> None:
        raise ValueError("no document can be rendered now")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(consumer, "render", fail)
        with pytest.raises(Poison) as found:
            consumer.apply(batch)
    return {error.cursor for error in (found.value, *found.value.others) if error.cursor}
