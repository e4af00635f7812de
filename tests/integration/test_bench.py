"""The benchmarks work, and they would notice: small sizes, headrace only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench import big, source, truth
from bench.parts import QUICK, Bench
from headrace.errors import Poison
from headrace_ops.kafka import Kafka
from headrace_ops.postgres import Postgres
from tests.fixtures.stack import drop_database

SIZES = replace(QUICK, rows=3_000, changed_rows=300, changes=3_000, pairs=0, seconds=1, warm=1)


@pytest.fixture
def bench(postgres: Postgres, kafka: Kafka, tmp_path: Path) -> Iterator[Bench]:
    """A benchmark of headrace alone; its databases go with it."""

    def say(_line: str, *, lasting: bool = False) -> None:
        pass

    yield Bench(postgres, kafka, tmp_path, SIZES, say, ours=True)
    drop_database(postgres.address(), "single")


def test_a_backlog_is_drained_by_us_and_by_the_limit(bench: Bench) -> None:
    part = bench.run("single")
    runs = [*part.again, *part.limits]
    assert [(run.records, run.extra) for run in runs] == [(3_000, 0)] * 4
    assert all(run.from_start > 0 and run.cpu > 0 and run.peak > 1_000_000 for run in runs)


def test_a_row_that_is_not_postgress_is_noticed(postgres: Postgres) -> None:
    origin = source.orders(postgres, "truth", 2)
    try:
        found = truth.Found(rows={b'{"id":1}': hash((1, 99, "paid", "a title", "a note"))})
        with pytest.raises(Poison, match="another row"):
            truth.compare(origin.dsn, "orders", "id", source.ORDERS.columns, found)
    finally:
        drop_database(postgres.address(), "truth")


def test_large_tables_and_transactions_are_measured_and_their_topics_compared(
    postgres: Postgres, kafka: Kafka, tmp_path: Path
) -> None:
    def say(_line: str, *, lasting: bool = False) -> None:
        pass

    try:
        parts = list(big.Big(postgres, kafka, tmp_path, big.QUICK, say).run())
    finally:
        drop_database(postgres.address(), "narrow")
        drop_database(postgres.address(), "mixed")
    assert [part.records for part in parts] == [60_000, 121_000, 32_000, 32_000]
    assert all(1_000_000 < part.peak < big.MOST_MB * 1_000_000 for part in parts)
    assert [part.view_peak > 1_000_000 for part in parts] == [False, False, True, True]
