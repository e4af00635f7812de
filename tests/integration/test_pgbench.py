"""pgbench moves money while its tables are captured: in every answer of the warehouse the three sums are equal.

Each of its transactions adds one amount to an account, a teller and a branch. A state in which the sums differ is one that
Postgres never had.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from headrace.settings import Settings
from headrace_warehouse.cli import ask
from tests.fixtures.capture import execute, rows
from tests.fixtures.processes import System

SECONDS = 8
SUMS = """
SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
       (SELECT sum(bbalance) FROM pgbench_branches)
"""
TABLES = [
    "CREATE TABLE pgbench_branches (bid int PRIMARY KEY, bbalance int, filler char(88))",
    "CREATE TABLE pgbench_tellers (tid int PRIMARY KEY, bid int, tbalance int, filler char(84))",
    "CREATE TABLE pgbench_accounts (aid int PRIMARY KEY, bid int, abalance int, filler char(84))",
    "CREATE TABLE pgbench_history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22))",
    "INSERT INTO pgbench_branches SELECT i, 0 FROM generate_series(1, 2) i",
    "INSERT INTO pgbench_tellers SELECT i, 1 + i % 2, 0 FROM generate_series(1, 20) i",
    "INSERT INTO pgbench_accounts SELECT i, 1 + i % 2, 0 FROM generate_series(1, 2000) i",
]


@pytest.fixture
def tables(settings: Settings) -> None:
    """pgbench's tables, small. Its history has no key: setup leaves it out and says so."""
    execute(settings, *TABLES)


@pytest.mark.usefixtures("tables")
def test_the_sums_are_equal_in_every_query(system: System, tmp_path: Path) -> None:
    settings = system.settings
    assert "pgbench_history" in system.run("setup")
    system.up("warehouse")
    seen: list[tuple[int, ...]] = []
    for _ in range(6):  # until enough was seen, where the rest is slow
        with (tmp_path / "pgbench.log").open("wb") as output:
            load = subprocess.Popen(_load(settings.dsn), stdout=output, stderr=output)
        try:
            while load.poll() is None:
                seen.append(_sums(settings))
        finally:
            load.kill()
            load.wait()
        assert load.returncode == 0, (tmp_path / "pgbench.log").read_text()
        if len(set(seen)) > SECONDS:
            break
    assert [sums for sums in seen if len(set(sums)) != 1] == []
    assert len(set(seen)) > SECONDS, f"the load went on, and {len(seen)} queries saw {set(seen)}"
    system.settle("warehouse")
    assert _sums(settings) == tuple(rows(settings, SUMS)[0])
    system.verify("warehouse")


def _load(dsn: str) -> list[str]:
    pgbench = shutil.which("pgbench")
    assert pgbench, "pgbench is not installed: see CONTRIBUTING.md"
    return [
        pgbench,
        "--no-vacuum",
        "--client=2",
        "--rate=300",
        f"--time={SECONDS}",
        "--scale=1",
        f"--file={SCRIPT}",
        dsn,
    ]


SCRIPT = Path(__file__).with_name("tpcb.sql")
"""pgbench's own TPC-B for the few rows above: its built-in one wants 100 000 accounts."""


def _sums(settings: Settings) -> tuple[int, ...]:
    (row,) = ask(settings.warehouse_listen, SUMS)["rows"]
    return tuple(int(value) for value in row)
