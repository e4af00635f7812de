"""The servers of a benchmark: Postgres and Kafka in a folder of their own; whatever becomes of us, both go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import source
from headrace_ops import NAMES, Stack, guard
from headrace_ops.kafka import Kafka
from headrace_ops.postgres import Postgres


@contextmanager
def running() -> Iterator[tuple[Postgres, Kafka, Path]]:
    """Run both; within, also use the folder."""
    with guard.temporary("headrace-bench-", NAMES) as folder:
        stack = Stack(folder, spread=True)
        stack.up(["postgres", "kafka"])
        postgres, kafka = stack.server("postgres"), stack.server("kafka")
        assert isinstance(postgres, Postgres)
        assert isinstance(kafka, Kafka)
        source.calm(postgres)
        yield postgres, kafka, folder
