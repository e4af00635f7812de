"""One drain: a tool is started, its topics are watched until everything is there, and then they are read.

A sample is a moment, up to which offset a reader of committed records could see each topic, and what the tool had used of the
processor. *Net* is from the first sample with records to the first with all of them, and counts what became visible in between: what
was there with the first one is left out, its time being unknown. *From start* is from before the process was started.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from confluent_kafka import Consumer

from bench import truth
from bench.program import Program
from bench.tools import PATIENCE, Limit, Tool
from headrace.errors import Poison, Transient

_INTERVAL = 0.02
_QUIET_SECONDS = 4.0
"""A tool that is at-least-once may write old changes again first: then so many records are there before the last ones are."""


class Say(Protocol):
    """Tells people what happens; a `lasting` line stays on the terminal."""

    def __call__(self, line: str, *, lasting: bool = False) -> None: ...


@dataclass(frozen=True, slots=True)
class Run:
    """What one run gave.

    Attributes:
        kind: Which tool.
        records: As counted in the topics; of `pg_recvlogical` what was committed.
        extra: How many of them are more than were expected (a tool that is at-least-once may write a change twice).
        net: Records a second from the first visible one to the last; 0 when all of them became visible at once.
        from_start: Records a second from the start of the process.
        seconds: From the start of the process to the last record visible.
        broker_seconds: From the first record to the last by the broker's own clock: when they were written, not when visible.
        cpu: Seconds of the processor, user and system, from the start of the process to the last record.
        peak: Most bytes of memory resident.
        p50: Of the latency, milliseconds from commit to polled; 0 where it was not measured. Likewise `p99`.
    """

    kind: str
    records: int
    extra: int = 0
    net: float = 0.0
    from_start: float = 0.0
    seconds: float = 0.0
    broker_seconds: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    p50: float = 0.0
    p99: float = 0.0

    def told(self) -> str:
        """Return it in one line."""
        used = f"{self.cpu:.1f} CPU s, {self.peak / 1_000_000:.0f} MB"
        if self.p50:
            return f"{self.kind}: p50 {self.p50:.1f} ms, p99 {self.p99:.1f} ms, {used}"
        extra = f" ({self.extra} more than were made)" if self.extra else ""
        rates = f"net {self.net:,.0f}/s, from start {self.from_start:,.0f}/s"
        return f"{self.kind}: {self.records:,} records{extra} in {self.seconds:.1f} s, {rates}, {used}"


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen at one moment."""

    at: float
    ends: tuple[int, ...]
    cpu: float


def drain(tool: Tool, expected: Mapping[str, int], say: Say, *, snapshot: bool = False) -> Run:
    """Start `tool`, wait until so many records of each table are there, stop it, read them all."""
    with truth.reading(tool.kafka) as consumer:
        starts = truth.ends(consumer, tool.topics)
        program = tool.start(snapshot=snapshot)
        try:
            samples = _watch(program, consumer, tool.topics, starts, sum(expected.values()), say)
            peak = program.peak()
        finally:
            program.stop()
            tool.free()
    found = [_read(tool, at, starts[at]) for at in range(len(starts))]
    _check(tool, found, expected)
    return _judge(tool, program, samples, found, sum(expected.values()), peak)


def limit(tool: Limit, expected: Mapping[str, int]) -> Run:
    """Run `pg_recvlogical` over the backlog."""
    program = tool.start()
    program.wait(PATIENCE)
    seconds = time.monotonic() - program.started_at
    tool.check()
    records = sum(expected.values())
    return Run(
        tool.kind,
        records,
        from_start=records / seconds,
        net=records / seconds,
        seconds=seconds,
        cpu=program.cpu(),
        peak=program.peak(),
    )


def _watch(
    program: Program, consumer: Consumer, topics: Sequence[str], starts: Sequence[int], expected: int, say: Say
) -> list[Sample]:
    """Look until there are as many offsets as records are expected, and no more come."""
    samples: list[Sample] = []
    grown_at = told_at = time.monotonic()
    while True:
        seen = truth.ends(consumer, topics)
        now = time.monotonic()
        if not samples or seen != samples[-1].ends:
            grown_at = now
        samples.append(Sample(now, seen, program.cpu()))
        done = sum(seen) - sum(starts)
        if done >= expected and now - grown_at > _QUIET_SECONDS:
            return samples
        program.check()
        if now - grown_at > PATIENCE:
            raise Transient(
                "bench-slow",
                f"{program.name} has written {done} of {expected}, and no more comes.",
                program.said()[-2000:],
            )
        if now - told_at > 1.0:
            told_at = now
            program.peak()
            say(f"{program.name}: {done:,} of {expected:,}")
        time.sleep(_INTERVAL)


def _read(tool: Tool, at: int, start: int) -> truth.Found:
    return truth.read(tool.kafka, tool.topics[at], start, tool.source.tables[at].columns)


def _check(tool: Tool, found: Sequence[truth.Found], expected: Mapping[str, int]) -> None:
    """Raise Poison unless every change is there and the rows are Postgres's."""
    for table, topic in zip(tool.source.tables, found, strict=True):
        if len(topic.offsets) < expected[table.name]:
            said = f"{tool.name} wrote {len(topic.offsets)} changes of {table.name}; {expected[table.name]} were made."
            raise Poison("bench-missing", said, "Look at the log of the tool.")
        truth.compare(tool.source.dsn, table.name, table.key, table.columns, topic)


def _judge(
    tool: Tool, program: Program, samples: Sequence[Sample], found: Sequence[truth.Found], expected: int, peak: int
) -> Run:
    total = sum(len(topic.offsets) for topic in found)
    seen = [sum(topic.below(end) for topic, end in zip(found, sample.ends, strict=True)) for sample in samples]
    first = next(at for at, count in enumerate(seen) if count)
    last = next(at for at, count in enumerate(seen) if count == total)
    began, ended = samples[first].at, samples[last].at
    seconds = ended - program.started_at
    broker = max(topic.last_ms for topic in found) - min(topic.first_ms for topic in found)
    return Run(
        tool.kind,
        records=total,
        extra=total - expected,
        net=(total - seen[first]) / max(ended - began, _INTERVAL),
        from_start=total / seconds,
        seconds=seconds,
        broker_seconds=broker / 1000,
        cpu=samples[last].cpu,
        peak=peak,
    )
