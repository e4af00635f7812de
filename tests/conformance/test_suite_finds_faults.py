"""The suite fails who breaks a promise: each fault below, made in a consumer that passes, is found by the test that is about it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, tmp_path: Path) -> None:
    right, wrong, test = FAULTS[fault]
    made = [sys.executable, "-m", "headrace", "new", "consumer", "rows", "--store", "custom", "--dir", str(tmp_path)]
    subprocess.run(made, check=True)
    root = tmp_path / "headrace-rows"
    module = root / "headrace_rows/__init__.py"
    assert right in module.read_text()
    module.write_text(module.read_text().replace(right, wrong))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:pytest_timeout",
            "-k",
            test,
            "tests",
        ],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert re.search(rf"FAILED .*::{test}", done.stdout), done.stdout[-3000:]
