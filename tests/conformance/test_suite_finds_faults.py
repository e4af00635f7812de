"""The suite fails who breaks a promise: each fault below, made in a consumer that passes, is found by the test that is about it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.pytests import run_pytest

LATE = """ours = "SELECT 1 FROM generations WHERE number = ? AND owner = ?"
            if not self._db.execute(ours, (self._number, self._owner)).fetchone():
                for change in batch.changes:
                    row = (self._number, change.table, change.key.decode(), codec.dumps(change.row), change.version.packed())
                    if change.row is not None:
                        self._db.execute("INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?, ?)", row)
                return
            self._move(batch.position)"""
"""What is newer than it wins, but what was deleted since leaves nothing that could."""
FAULTS = {
    "the position is forgotten": (
        "return codec.decode_position(position) if position else None",
        "return None",
        "test_the_position_is_where_the_view_is",
    ),
    "half a state is shown": (
        "if batch.complete:",
        "if batch:",
        "test_between_two_states_the_earlier_one_is_shown",
    ),
    "half of the first state is shown": (
        "if batch.complete:",
        "if batch.complete or batch.loading:",
        "test_a_build_shows_nothing_before_its_first_state",
    ),
    "the position is durable before the rows are": (
        "self._move(batch.position)\n",
        "self._move(batch.position)\n            self._db.execute('COMMIT')\n            self._db.execute('BEGIN IMMEDIATE')\n",
        "test_a_kill_between_every_two_steps_of_apply",
    ),
    "deletes are not seen": (
        "AND row IS NOT NULL",
        "",
        "test_deletes_take_everything_away_and_rows_come_back",
    ),
    "the first change of a key wins": (
        "INSERT OR REPLACE INTO staged",
        "INSERT OR IGNORE INTO staged",
        "test_the_last_change_of_a_key_in_a_batch_wins",
    ),
    "whoever was replaced writes on": (
        "WHERE number = ? AND owner = ?",
        "WHERE number = ? AND ? <> ''",
        "test_a_process_that_was_replaced_changes_nothing_any_more",
    ),
    "two generations are live": (
        "UPDATE generations SET live = (number = ?)",
        "UPDATE generations SET live = 1 WHERE number = ?",
        "test_readers_are_pointed_at_one_generation",
    ),
    "a drop takes everything": (
        'f"DELETE FROM {table} WHERE number = ?"',
        'f"DELETE FROM {table} WHERE number > 0 OR number = ?"',
        "test_what_is_dropped_is_gone_and_nothing_else",
    ),
    "a scan loses the place": (
        "(tbl, key) > (?, ?)",
        "(tbl, key) >= (?, ?)",
        "test_a_scan_gives_the_same_rows_in_pages_of_any_size",
    ),
    "a column more cannot be taken": (
        "for change in batch.changes:",
        "for change in batch.changes:\n                assert change.schema == 1",
        "test_a_column_more",
    ),
    "a delete is not seen while it loads": (
        "for change in batch.changes:",
        "for change in batch.changes:\n                if batch.loading and change.row is None:\n                    continue",
        "test_a_build_shows_nothing_before_its_first_state",
    ),
    "a promotion takes the earlier generation away": (
        'SET live = (number = ?)", (self._number,))',
        'SET live = (number = ?)", (self._number,))\n            self._db.execute("DELETE FROM generations WHERE NOT live")',
        "test_a_promotion_keeps_the_earlier_generation",
    ),
    "a promotion empties the earlier generation": (
        'SET live = (number = ?)", (self._number,))',
        'SET live = (number = ?)", (self._number,))\n            self._db.execute("DELETE FROM rows WHERE number <> ?", (self._number,))',
        "test_a_promotion_keeps_the_earlier_generation",
    ),
    "a promotion is two steps": (
        """with self._transaction():
            self._db.execute("UPDATE generations SET live = (number = ?)", (self._number,))""",
        """self._db.execute("UPDATE generations SET live = 0")
        self._db.execute("UPDATE generations SET live = 1 WHERE number = ?", (self._number,))""",
        "test_a_kill_between_every_two_steps_of_a_promotion",
    ),
    "a drop is three steps, and what is left is taken for whole": (
        """with self._transaction():
            for table in ("generations", "rows", "staged"):""",
        """if True:
            for table in ("rows", "staged", "generations"):""",
        "test_a_kill_between_every_two_steps_of_a_drop",
    ),
    "whoever was replaced brings back what was deleted since": (
        "self._move(batch.position)",
        LATE,
        "test_a_process_that_was_replaced_changes_nothing_any_more",
    ),
    "a write that failed is not noticed": (
        'self._db.execute("INSERT OR REPLACE INTO staged VALUES (?, ?, ?, ?, ?)", staged)',
        """try:
                    self._db.execute("INSERT OR REPLACE INTO staged VALUES (?, ?, ?, ?, ?)", staged)
                except Exception:
                    pass""",
        "test_every_write_that_does_not_arrive",
    ),
    "a full disk stops it for good": (
        "except sqlite3.OperationalError as error:",
        "except ZeroDivisionError as error:",
        "test_every_write_that_does_not_arrive",
    ),
    "a scan goes backwards": (
        '(tbl, key) > (?, ?) ORDER BY tbl, key LIMIT ?",\n                (self._number, *(after or ("", "")), limit),',
        '(tbl, key) < (?, ?) ORDER BY tbl DESC, key DESC LIMIT ?",\n                (self._number, *(after or ("~", "~")), limit),',
        "test_a_scan_gives_the_same_rows_in_pages_of_any_size",
    ),
    "a scan goes by numbers": (
        """AND (tbl, key) > (?, ?) ORDER BY tbl, key LIMIT ?",
                (self._number, *(after or ("", "")), limit),""",
        """AND (tbl, key->>'id') > (?, ?) ORDER BY tbl, key->>'id' LIMIT ?",
                (self._number, *((after[0], codec.loads(after[1])["id"]) if after else ("", -9)), limit),""",
        "test_a_scan_gives_the_same_rows_in_pages_of_any_size",
    ),
    "it is asked for rows and gives those that nobody sees yet": (
        "    def scan(",
        """    def get(self, keys):
        both = "SELECT * FROM rows UNION SELECT * FROM staged ORDER BY version"
        newest = {(table, key): (row, version) for number, table, key, row, version in self._db.execute(both) if number == self._number}
        found = [(key, *newest[key]) for key in map(tuple, keys) if key in newest]
        return [ViewRow(*key, codec.loads(row), Version.unpacked(version)) for key, row, version in found if row]

    def scan(""",
        "test_single_rows_and_counts_are_those_of_a_scan",
    ),
    "it counts every generation": (
        "    def scan(",
        """    def count(self):
        return dict(self._db.execute("SELECT tbl, count(*) FROM rows GROUP BY tbl"))

    def scan(""",
        "test_single_rows_and_counts_are_those_of_a_scan",
    ),
    "half a state is kept in a variable of the module": (
        'self._db.execute("INSERT OR REPLACE INTO staged VALUES (?, ?, ?, ?, ?)", staged)',
        """kept = globals().setdefault("_KEPT", {})
                kept[staged[:3]] = staged
                if batch.complete:
                    for each in list(kept):
                        self._db.execute("INSERT OR REPLACE INTO staged VALUES (?, ?, ?, ?, ?)", kept.pop(each))""",
        "test_what_one_process_begins_another_ends",
    ),
    "what its client raises comes out of open": (
        'with self._transaction():\n            self._db.execute("INSERT OR IGNORE INTO generations',
        'if True:\n            self._db.execute("INSERT OR IGNORE INTO generations',
        "test_every_write_that_does_not_arrive",
    ),
    "what its client raises comes out of generations": (
        'with self._errors():\n            found = self._db.execute("SELECT number',
        'if True:\n            found = self._db.execute("SELECT number',
        "test_every_promotion_that_fails",
    ),
    "what its client raises comes out of a promotion": (
        'with self._transaction():\n            self._db.execute("UPDATE generations SET live',
        'if True:\n            self._db.execute("UPDATE generations SET live',
        "test_every_promotion_that_fails",
    ),
    "what its client raises comes out of a drop": (
        "with self._transaction():\n            for table in",
        "with self._db:\n            for table in",
        "test_every_drop_that_fails",
    ),
    "a drop that fails is not noticed": (
        "with self._transaction():\n            for table in",
        "with __import__('contextlib').suppress(sqlite3.OperationalError), self._db:\n            for table in",
        "test_every_drop_that_fails",
    ),
    "a batch without changes is passed over": (
        "with self._transaction():\n            self._move(batch.position)",
        "if not batch.changes:\n            return\n        with self._transaction():\n            self._move(batch.position)",
        "test_between_two_states_the_earlier_one_is_shown or test_the_position_is_where_the_view_is",
    ),
    "a batch around what is parked is passed over": (
        "with self._transaction():\n            self._move(batch.position)",
        "if batch.parked:\n            return\n        with self._transaction():\n            self._move(batch.position)",
        "test_what_cannot_be_done_stays_as_it_was_until_it_can_be",
    ),
    "the pointer outlives the drop of the live one": (
        (
            'self._db.execute("UPDATE generations SET live = (number = ?)", (self._number,))',
            'self._db.execute("REPLACE INTO generations (number, fingerprint) VALUES (-1, ?)", (self._number,))',
        ),
        (
            '"SELECT number, fingerprint, live FROM generations ORDER BY number"',
            """"SELECT number, fingerprint, number = (SELECT fingerprint + 0 FROM generations WHERE number = -1) "
                "FROM generations WHERE number > 0 ORDER BY number\"""",
        ),
        "test_what_is_dropped_while_it_is_live_is_live_no_more",
    ),
    "a position is offsets and a version": (
        "codec.encode_position(position), self._number",
        "codec.encode_position(Position(offsets=position.offsets, version=position.version)), self._number",
        "test_the_position_is_where_the_view_is",
    ),
    "a position is a version": (
        "codec.encode_position(position), self._number",
        "codec.encode_position(Position(version=position.version)), self._number",
        "test_every_write_that_does_not_arrive",
    ),
    "a position forgets what is parked": (
        "codec.encode_position(position), self._number",
        "codec.encode_position(__import__('dataclasses').replace(position, held=None, parked=(), inexact=())), self._number",
        "test_the_position_is_where_the_view_is",
    ),
    "a generation forgets what built it": (
        "Generation(self.name, number, fingerprint, bool(live))",
        'Generation(self.name, number, "", bool(live))',
        "test_a_promotion_keeps_the_earlier_generation",
    ),
    "a scan goes on after rows only that are there": (
        "        with self._errors():\n            found = self._db.execute(\n",
        """        keys = [(key.collection, key.key) for key in self.scan(None, 1000)] if after else []
        if after and after not in keys:
            raise KeyError(after)
        with self._errors():
            found = self._db.execute(
""",
        "test_single_rows_and_counts_are_those_of_a_scan",
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    command = [sys.executable, "-m", "headrace", "new", "consumer", "rows", "--store", "custom", "--dir", str(folder)]
    subprocess.run(command, check=True)
    return folder / "headrace-rows"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, made: Path, tmp_path: Path) -> None:
    *edits, tests = FAULTS[fault]
    edits = edits if isinstance(edits[0], tuple) else [tuple(edits)]
    root = shutil.copytree(made, tmp_path / made.name)
    module = root / "headrace_rows/__init__.py"
    for right, wrong in edits:
        assert right in module.read_text()
        module.write_text(module.read_text().replace(right, wrong))
    done = run_pytest(root, "-k", tests, "tests")
    for test in tests.split(" or "):
        assert re.search(rf"FAILED .*::{test}", done.stdout), done.stdout[-3000:]
