"""The servers of a benchmark in a folder of their own; whatever becomes of us, all go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench import source
from headrace_ops import NAMES, Stack, guard
from headrace_ops.kafka import Kafka
from headrace_ops.postgres import Postgres


@contextmanager
def stack(names: Sequence[str]) -> Iterator[tuple[Stack, Path]]:
    """Run the servers of these names; within, also use the folder."""
    with guard.temporary("headrace-bench-", NAMES) as folder:
        servers = Stack(folder, spread=True)
        servers.up(names)
        source.calm(postgres(servers))
        yield servers, folder


@contextmanager
def running() -> Iterator[tuple[Postgres, Kafka, Path]]:
    """Run Postgres and Kafka; within, also use the folder."""
    with stack(["postgres", "kafka"]) as (servers, folder):
        yield postgres(servers), kafka(servers), folder


def postgres(servers: Stack) -> Postgres:
    """Return a stack's Postgres."""
    found = servers.server("postgres")
    assert isinstance(found, Postgres)
    return found


def kafka(servers: Stack) -> Kafka:
    """Return a stack's Kafka."""
    found = servers.server("kafka")
    assert isinstance(found, Kafka)
    return found
