"""The suite that every consumer passes, those of headrace as well as a stranger's: subclass it, name the consumer and some rows.

What the view should hold is not asked of the author: whatever has happened to a generation, it must hold what a fresh one holds that
was given the same rows at once, without any mishap. A view whose content does not follow from the rows overrides what is not true of
it, and says why.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest

from headrace.change import Column
from headrace.consumer import Cursor, Generation
from headrace.errors import HeadraceError, Transient, Wiped
from headrace.testing.harness import compare_with_scan, shown
from headrace.testing.parking import Parks
from headrace.testing.steps import FailAfterWrite, FailBeforeWrite, dies_before

_MORE = "headrace_conformance"


class ConsumerConformance(Parks):
    """Subclass it in a test; pytest runs its methods. The view's server must be a test's: generations are made and dropped.

    Class attributes:
        consumer: The class.
        history: For each table that it reads its rows, those that a document is made for first. At least two keys there, and one of them
            twice: its later row must make another view than its earlier one. With keys of 2 and 10 it sees that a scan goes by text.
        name: Names the view, by default the consumer's own name.
        lost: A column of the first table that the consumer can do without; the test of a column that is dropped needs it.
        stride: A process is killed before every step, and every write fails; every n-th where that takes too long.
        modules: Names of modules whose functions are steps: see `headrace.testing.steps.Steps`. By default those of DuckDB and Kafka.
    """

    def test_the_history_can_tell_a_right_view_from_a_wrong_one(self) -> None:
        log = self._log()
        states = [self._expected(log)]
        for _ in range(2):
            self._change(log)
            states.append(self._expected(log))
        assert [] not in states, "these rows make an empty view"
        assert states[0] == states[2] != states[1], (
            "the rows of one key make the same view: choose rows that can be told apart"
        )

    # Nothing is shown that Postgres never had

    def test_a_build_shows_nothing_before_its_first_state(self) -> None:
        for number, schema in enumerate(self.history, 1):
            log = self._log(cut=False)
            *_, last = log.rows[schema.table].values()
            log.delete(schema.table, last)  # the row is in an earlier piece than its tombstone
            log.cut()
            with self._opened(number) as (consumer, position):
                for batch in log.batches(position, piece=1):
                    consumer.apply(batch)
                    if not batch.complete:
                        assert shown(consumer) == [], "a half of the first state is shown"
                assert shown(consumer) == self._expected(log), f"{last} of {schema.table} was deleted meanwhile"

    def test_between_two_states_the_earlier_one_is_shown(self) -> None:
        log = self._log()
        self._catch_up(log)
        before = self._shown()
        self._change(log)
        with self._opened() as (consumer, position):
            batches = list(log.batches(position, piece=1))
            assert len(batches) > 2, "the history needs two rows at least"
            for batch in batches:
                consumer.apply(batch)
                assert shown(consumer) == (self._expected(log) if batch.complete else before)

    def test_after_a_restart_between_two_states_the_earlier_one_is_shown(self) -> None:
        log = self._log()
        self._catch_up(log)
        before = self._shown()
        self._change(log)
        with self._opened() as (consumer, position):
            consumer.apply(next(log.batches(position, piece=1)))
        assert self._shown() == before
        self._catch_up(log)
        assert self._shown() == self._expected(log)

    def test_what_one_process_begins_another_ends(self) -> None:
        log = self._log()
        for _ in range(3):  # from zero, and then by turns: what a process keeps of its own is not what the view holds
            assert not dies_before(0, partial(self._begin, log)), "nothing ends it"
            self._catch_up(log)
            self._check(log)
            self._change(log)

    # What comes again, and what was never there

    def test_the_position_is_where_the_view_is(self) -> None:
        log = self._log()
        assert self._position() is None, "a new generation begins from zero"
        self._catch_up(log)
        self._check(log)
        log.cut()  # without a change: whoever waits for its version must not wait for ever
        self._catch_up(log)
        self._check(log)
        self._change(log)
        with self._opened() as (consumer, position):
            (batch,) = log.batches(position)
            at, table = batch.position, (self._schema.table,)
            batch.position = replace(at, held=at.version, parked=table, inexact=table, approximate=table)
            consumer.apply(batch)
        assert self._position() == batch.position

    def test_the_same_batch_twice_is_as_good_as_once(self) -> None:
        log = self._log()
        self._catch_up(log, twice=True)
        self._change(log)
        self._catch_up(log, twice=True)
        assert self._shown() == self._expected(log)

    def test_a_replay_from_zero_gives_the_same_view(self) -> None:
        log = self._log()
        self._catch_up(log)
        self._change(log)
        self._catch_up(log)
        self._catch_up(log, number=2)
        assert self._shown(2) == self._shown() == self._expected(log)

    def test_a_tombstone_of_a_key_that_was_never_there_changes_nothing(self) -> None:
        log = self._log()
        schema, row = self._schema, dict(self.history[self._schema][0])
        never = {name: "-1" if isinstance(row[name], str) else -1 for name in schema.key}
        self._catch_up(log)
        before = self._shown()
        log.delete(schema.table, never)
        log.cut()
        self._catch_up(log)
        assert self._shown() == before
        fresh = self._log(cut=False)
        fresh.delete(schema.table, never)
        fresh.cut()
        self._catch_up(fresh, number=2)
        assert self._shown(2) == before, "the build from zero met it too"

    def test_deletes_take_everything_away_and_rows_come_back(self) -> None:
        log = self._log()
        self._catch_up(log)
        for table, rows in log.rows.items():
            for row in list(rows.values()):
                log.delete(table, row)
                log.cut()
                self._catch_up(log)
                assert self._shown() == self._expected(log), f"after the delete of {row} of {table}"
        assert self._shown() == [], "something is left when no row is"
        self._put_all(log)
        self._catch_up(log)
        assert self._shown() == self._expected(log)

    def test_the_last_change_of_a_key_in_a_batch_wins(self) -> None:
        log = self._log()
        self._catch_up(log)
        first, last = self._versions
        table = self._schema.table
        for final in (first, last, None):
            for row in (last, None, first, last, final):
                if row is None:
                    log.delete(table, last)
                else:
                    log.put(table, row)
            log.cut()
            self._catch_up(log)
            assert self._shown() == self._expected(log), f"the last was {final}"

    # Schemas

    def test_a_column_more(self) -> None:
        log = self._log()
        self._catch_up(log)
        before = self._schema
        log.alter(replace(before, version=before.version + 1, columns=(*before.columns, Column(_MORE, "text"))))
        for row in self._versions:
            log.put(before.table, {**row, _MORE: "more"})
            log.cut()
            self._catch_up(log)
        assert self._shown() == self._expected(log)

    def test_a_column_less(self) -> None:
        if not self.lost:
            pytest.skip("no column is named that it can do without: set `lost`")
        log = self._log()
        self._catch_up(log)
        before = self._schema
        left = tuple(column for column in before.columns if column.name != self.lost)
        log.alter(replace(before, version=before.version + 1, columns=left))
        for row in self._versions:
            log.put(before.table, row)
            log.cut()
            self._catch_up(log)
        assert self._shown() == self._expected(log)

    # Mishaps

    def test_a_kill_between_every_two_steps_of_the_first_state(self) -> None:
        log = self._log()
        expected = self._expected(log)
        for step in itertools.count(1, self.stride):
            died = dies_before(step, partial(self._catch_up, log, number=step), self.modules)
            self._catch_up(log, number=step)
            assert self._shown(step) == expected, f"after a kill before step {step}"
            if not died:
                return

    def test_a_kill_between_every_two_steps_of_apply(self) -> None:
        log = self._log()
        self._catch_up(log)
        for step in itertools.count(1, self.stride):
            self._change(log)
            died = dies_before(step, partial(self._catch_up, log), self.modules)
            self._catch_up(log)
            self._check(log, f"after a kill before step {step}")
            if not died:
                return

    def test_every_lost_answer(self) -> None:
        log = self._log()
        self._catch_up(log)
        for number in itertools.count(1):
            self._change(log)
            fault = FailAfterWrite(number)
            try:
                self._catch_up(log, fault)
            except Transient:  # anything else would stop the consumer for good
                self._catch_up(log)
            self._check(log, f"the answer to {number} was lost")
            if not fault.count:
                pytest.skip("Python does not see what this store sends, if it sends anything")
            if not fault.failed:
                return

    def test_every_write_that_does_not_arrive(self) -> None:
        log = self._log()
        self._catch_up(log)
        for number in itertools.count(1, self.stride):
            self._change(log)
            fault = FailBeforeWrite(number)
            try:
                self._catch_up(log, fault)
            except Transient:  # anything else would stop the consumer for good
                self._catch_up(log)
            self._check(log, f"write {number} did not arrive")
            if not fault.failed:
                break
        if fault.count == fault.local:
            pytest.skip("Python does not see what this store writes, or not what its client raises")

    @pytest.mark.parametrize("kind", [FailBeforeWrite, FailAfterWrite])
    def test_every_promotion_that_fails(self, kind: type[FailBeforeWrite | FailAfterWrite]) -> None:
        self._two(live=1)
        for step in itertools.count(1, self.stride):
            (earlier,) = self._live()
            number, fault = 3 - earlier, kind(step)
            try:
                assert len(self._generations(fault)) == 2
                self._promote(number, fault)
            except Transient:  # see above
                assert self._live() in ([earlier], [number])
                self._promote(number)
            else:
                assert self._live() == [number], f"{step} of the promotion failed, and it did not say so"
            if not fault.failed:
                return

    @pytest.mark.parametrize("kind", [FailBeforeWrite, FailAfterWrite])
    def test_every_drop_that_fails(self, kind: type[FailBeforeWrite | FailAfterWrite]) -> None:
        log = self._two(live=2)
        for step in itertools.count(1, self.stride):
            with suppress(Wiped):  # a drop whose answer was lost may be done only now
                self._catch_up(log)
            self._catch_up(log)
            fault = kind(step)
            try:
                self._drop(1, fault)
            except Transient:  # see above
                assert self._live() == [2]
            else:
                assert [each.number for each in self._generations()] == [2], (
                    f"{step} of the drop failed, and it did not say so"
                )
            if not fault.failed:
                return

    @pytest.mark.parametrize("deleted", [False, True])
    @pytest.mark.parametrize("host", ["", "other"])
    def test_a_process_that_was_replaced_changes_nothing_any_more(self, host: str, *, deleted: bool) -> None:
        log = self._log()
        self._catch_up(log)
        if deleted:  # what comes too late puts a row that was deleted since; else it deletes one that was put since
            self._change(log)
            self._catch_up(log)
        with self._opened(host=host) as (zombie, position):
            for batch in log.batches(position):
                zombie.apply(batch)
            try:
                stale = self._position()
            except Transient:
                return  # it keeps a successor out while it lives, on the same host at least
            self._change(log)
            self._change(log)
            self._catch_up(log)
            with suppress(HeadraceError):  # it may be refused, or find nothing to do
                for batch in itertools.islice(log.batches(stale), 1):
                    zombie.apply(batch)
            self._check(log)

    # Generations

    def test_readers_are_pointed_at_one_generation(self) -> None:
        log = self._log()
        for number in (1, 2, 1):
            self._catch_up(log, number=number)
            self._promote(number)
            assert self._live() == [number]

    def test_a_promotion_keeps_the_earlier_generation(self) -> None:
        log = self._log()
        self._catch_up(log)
        self._promote(1)
        self._catch_up(log, number=2)
        self._promote(2)
        made = [Generation(self._name, number, "conformance", live=number == 2) for number in (1, 2)]
        assert self._generations() == made
        for number in (1, 2):
            self._check(log, number=number)

    def test_a_kill_between_every_two_steps_of_a_promotion(self) -> None:
        log = self._two(live=1)
        earlier, number = 1, 2
        for step in self._from_opened(number):
            died = dies_before(step, partial(self._promote, number), self.modules)
            assert self._live() in ([earlier], [number]), f"after a kill before step {step}"
            if not died:
                break
            self._promote(number)
            assert self._live() == [number]
            earlier, number = number, earlier
        assert self._live() == [number]
        for number in (1, 2):
            self._check(log, number=number)

    def test_a_kill_between_every_two_steps_of_a_drop(self) -> None:
        log = self._two(live=2)
        for step in self._from_opened(1):
            self._catch_up(log)
            self._check(log, "what is left of it is gone on with, or it is made anew")
            died = dies_before(step, partial(self._drop, 1), self.modules)
            assert self._live() == [2], f"after a kill before step {step}"
            if not died:
                assert [each.number for each in self._generations()] == [2]
                self._check(log, number=2)
                return

    def test_what_is_dropped_is_gone_and_nothing_else(self) -> None:
        log = self._two(live=2)
        self._drop(1)
        assert [each.number for each in self._generations()] == [2]
        assert self._shown(2) == self._expected(log)
        assert self._position() is None, "a dropped generation is made anew"

    def test_what_is_dropped_while_it_is_live_is_live_no_more(self) -> None:
        log = self._log()
        self._catch_up(log)
        for step in self._from_opened(1):
            self._catch_up(log)
            self._promote(1)
            died = dies_before(step, partial(self._drop, 1), self.modules)
            self._drop(1)
            assert self._generations() == [], f"after a kill before step {step}"
            self._begin(log)
            assert self._live() == [], f"a build is live, after a kill before step {step} of the drop"
            if not died:
                return

    def test_a_scan_gives_the_same_rows_in_pages_of_any_size(self) -> None:
        log = self._log()
        self._catch_up(log)
        with self._opened() as (consumer, _):
            assert shown(consumer, 1) == shown(consumer, 2) == shown(consumer)

    def test_single_rows_and_counts_are_those_of_a_scan(self) -> None:
        log = self._log()
        asked: set[Cursor] = set()
        self._catch_up(log, number=2)
        for _ in range(3):
            with self._opened() as (consumer, position):
                for batch in log.batches(position, piece=1):
                    consumer.apply(batch)
                    asked |= compare_with_scan(consumer, asked)
            self._change(log)
