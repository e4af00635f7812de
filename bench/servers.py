"""The servers of a benchmark: Postgres and Kafka in a folder of their own; whatever becomes of us, both go."""

from __future__ import annotations

import shutil
import tempfile
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
    folder = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    folder.chmod(0o755)  # the servers' user must get in
    stack = Stack(folder, spread=True)
    with guard.armed(folder, NAMES, remove=True):
        try:
            stack.up(["postgres", "kafka"])
            postgres, kafka = stack.server("postgres"), stack.server("kafka")
            assert isinstance(postgres, Postgres)
            assert isinstance(kafka, Kafka)
            source.calm(postgres)
            yield postgres, kafka, folder
        finally:
            stack.down()
            shutil.rmtree(folder, ignore_errors=True)
