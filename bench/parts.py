"""What is measured, in which order: headrace against itself first, then in turn with Debezium, on the same rows.

What headrace gives twice says how much a ratio is worth. Each later pair (ours, then theirs) gives one ratio; their median counts.
A backlog is built while every tool is stopped, its slots kept, and is then drained by each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench import latency, measure, source
from bench.debezium import Debezium, Prompt
from bench.measure import Run, Say
from bench.source import ORDERS, Source
from bench.tools import Headrace, Limit, Tool
from headrace_ops.kafka import Kafka
from headrace_ops.postgres import Postgres

PARTS: Final = ("snapshot", "single", "batched", "tpcb", "latency")
_BATCH = 1_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    rows: int = 500_000
    changed_rows: int = 50_000
    changes: int = 300_000
    scale: int = 4
    bank_changes: int = 438_000
    rate: int = 200
    seconds: int = 30
    warm: int = 5
    pairs: int = 3


FULL: Final = Sizes()
QUICK: Final = Sizes(
    rows=120_000, changed_rows=20_000, changes=60_000, scale=1, bank_changes=60_000, seconds=5, warm=2, pairs=1
)


@dataclass(frozen=True, slots=True)
class Part:
    """What one part gave.

    Attributes:
        name: One of `PARTS`.
        again: The runs of headrace against itself.
        pairs: Headrace's and Debezium's runs, in turn; without the latter when only ours are wanted.
        limits: Those of `pg_recvlogical`, one for each backlog.
        row_bytes: What a row is as JSON, on average; 0 where it does not matter.
    """

    name: str
    again: list[Run] = field(default_factory=list)
    pairs: list[tuple[Run, ...]] = field(default_factory=list)
    limits: list[Run] = field(default_factory=list)
    row_bytes: int = 0


class Bench:
    """Runs parts on servers that run.

    Attributes:
        ours: Whether to leave Debezium out.
    """

    def __init__(self, postgres: Postgres, kafka: Kafka, folder: Path, sizes: Sizes, say: Say, *, ours: bool) -> None:
        """Keep outputs and offsets in `folder`."""
        self._postgres = postgres
        self._kafka = kafka
        self._folder = folder
        self._sizes = sizes
        self._say = say
        self._ours = ours
        self._made = 0

    def run(self, name: str) -> Part:
        """Run one part."""
        if name == "snapshot":
            return self._snapshot()
        if name == "latency":
            return self._latency()
        part, sizes = Part(name), self._sizes
        if name == "tpcb":
            origin = source.bank(self._postgres, name, sizes.scale)
            self._backlogs(part, origin, source.transfer(origin), sizes.bank_changes)
        else:
            origin = source.orders(self._postgres, name, sizes.changed_rows)
            build = source.change(origin, sizes.changed_rows, 1 if name == "single" else _BATCH)
            self._backlogs(part, origin, build, sizes.changes)
        return part

    def _snapshot(self) -> Part:
        rows = self._sizes.rows
        origin = source.orders(self._postgres, "snapshot", rows)
        part = Part(
            "snapshot", row_bytes=int(origin.value("SELECT avg(octet_length(row_to_json(o)::text)) FROM orders o"))
        )

        def one(kind: type[Tool]) -> Run:
            with self._tool(kind, origin) as tool:
                return self._told(measure.drain(tool, {ORDERS.name: rows}, self._say, snapshot=True))

        part.again.extend(one(Headrace) for _ in range(2))
        for _ in range(self._sizes.pairs):
            part.pairs.append(tuple(one(kind) for kind in self._kinds(Debezium)))
        return part

    def _backlogs(self, part: Part, origin: Source, build: Callable[[int], dict[str, int]], changes: int) -> None:
        limit = Limit("recvlogical", origin, self._folder)

        def drain(tools: Sequence[Tool]) -> tuple[Run, ...]:
            self._say(f"{part.name}: building a backlog of {changes:,} changes")
            expected = build(changes)
            runs = tuple(self._told(measure.drain(tool, expected, self._say)) for tool in tools)
            part.limits.append(self._told(measure.limit(limit, expected)))
            return runs

        with ExitStack() as stack:
            ours = stack.enter_context(self._asleep(Headrace, origin))
            part.again.extend(run for _ in range(2) for run in drain([ours]))
            theirs = [stack.enter_context(self._asleep(kind, origin)) for kind in self._kinds(Debezium)[1:]]
            part.pairs.extend(drain([ours, *theirs]) for _ in range(self._sizes.pairs))
        limit.drop()

    def _latency(self) -> Part:
        sizes, part = self._sizes, Part("latency")
        origin = source.orders(self._postgres, "latency", 1_000)

        def one(kind: type[Tool]) -> Run:
            with self._tool(kind, origin) as tool:
                return self._told(latency.measure(tool, sizes.rate, sizes.seconds, sizes.warm, self._say))

        part.again.extend(one(Headrace) for _ in range(2))
        for _ in range(sizes.pairs):
            part.pairs.append(tuple(one(kind) for kind in self._kinds(Prompt)))
        return part

    def _kinds(self, theirs: type[Tool]) -> list[type[Tool]]:
        return [Headrace] if self._ours else [Headrace, theirs]

    @contextmanager
    def _tool(self, kind: type[Tool], origin: Source) -> Iterator[Tool]:
        """Give a tool with new topics and a new slot; take them away again, for the disk's sake."""
        self._made += 1
        tool = kind(f"{kind.kind.lower()}_{self._made}", origin, self._kafka, self._folder)
        tool.prepare()
        try:
            yield tool
        finally:
            tool.drop()

    @contextmanager
    def _asleep(self, kind: type[Tool], origin: Source) -> Iterator[Tool]:
        """Give a tool that has streamed and was stopped: its slot keeps what comes."""
        with self._tool(kind, origin) as tool:
            self._say(f"{tool.name}: making its slot")
            with tool.awake():
                pass
            yield tool

    def _told(self, run: Run) -> Run:
        self._say(f"  {run.told()}", lasting=True)
        return run
