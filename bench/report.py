"""What people and scripts get to see: ratios first, absolute figures with the conditions under which they hold.

results.md is written by a whole run only, from what it measured; nobody edits it.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import confluent_kafka

from bench import debezium
from bench.measure import Run
from bench.parts import Part, Sizes
from headrace_ops import artifacts, java

TITLES = {
    "snapshot": "Snapshot",
    "single": "Backlog of updates, one a transaction",
    "batched": "Backlog of updates, 1 000 a transaction",
    "tpcb": "Backlog of pgbench's TPC-B",
    "latency": "Latency, commit to polled",
}
_MEGA = 1_000_000


@dataclass(frozen=True, slots=True)
class Ratio:
    """One comparison.

    Attributes:
        of: What is compared.
        value: The median over the pairs; `low` and `high` are the least and the greatest.
        wanted: What is to be reached, in words; empty where nothing is promised.
        met: Whether it is.
    """

    of: str
    value: float
    low: float
    high: float
    wanted: str = ""
    met: bool = True

    def told(self) -> str:
        """Return it for people."""
        spread = "" if self.low == self.high else f" ({self.low:.2f} to {self.high:.2f})"
        verdict = f", wanted {self.wanted}: {'met' if self.met else 'NOT MET'}" if self.wanted else ""
        return f"{self.of}: {self.value:.2f}{spread}{verdict}"


def ratios(part: Part) -> Iterator[Ratio]:
    """Yield what the part shows, the noise first."""
    if len(part.again) == 2:
        first, second = part.again
        if part.name == "latency":
            yield ratio("headrace / headrace, p50", [_over(first.p50, second.p50)])
        else:
            yield ratio("headrace / headrace, net", [_over(first.net, second.net)])
    pairs = [(pair[0], pair[1]) for pair in part.pairs if len(pair) == 2]
    if pairs:
        yield from _against(part.name, pairs)
    yield from _limits(part)
    yield from _ours(part)


def _over(value: float, other: float) -> float:
    return value / other if other else 0.0  # so few records that all were there at the first look


def _against(name: str, pairs: Sequence[tuple[Run, Run]]) -> Iterator[Ratio]:
    def each(value: Callable[[Run], float]) -> list[float]:
        return [_over(value(ours), value(theirs)) for ours, theirs in pairs]

    if name == "latency":
        yield ratio("headrace / Debezium, p50", each(lambda run: run.p50))
        yield ratio("headrace / Debezium, p99", each(lambda run: run.p99))
    else:
        yield ratio("headrace / Debezium, net rate", each(lambda run: run.net), least=5 if name == "snapshot" else 4)
        least = 6 if name == "snapshot" else None
        yield ratio("headrace / Debezium, rate from process start", each(lambda run: run.from_start), least=least)
    yield ratio("headrace / Debezium, CPU seconds", each(lambda run: run.cpu), most=0.2)
    yield ratio("headrace / Debezium, peak memory", each(lambda run: run.peak))


def _limits(part: Part) -> Iterator[Ratio]:
    if part.limits:
        runs = [*part.again, *(pair[0] for pair in part.pairs)]
        found = [_over(ours.net, limit.net) for ours, limit in zip(runs, part.limits, strict=True)]
        yield ratio("headrace / pg_recvlogical, net rate", found, least=0.7)


def _ours(part: Part) -> Iterator[Ratio]:
    runs = [*part.again, *(pair[0] for pair in part.pairs)]
    yield ratio("headrace, peak memory in MB", [run.peak / _MEGA for run in runs], most=150)
    if part.name == "latency":
        yield ratio("headrace, p50 in ms", [run.p50 for run in runs], most=15)
        yield ratio("headrace, p99 in ms", [run.p99 for run in runs], most=50)


def ratio(of: str, values: Sequence[float], *, least: float | None = None, most: float | None = None) -> Ratio:
    """Return the median of some values, held against what is wanted."""
    value = median(values)
    wanted, met = "", True
    if least is not None:
        wanted, met = f"at least {least:g}", value >= least
    elif most is not None:
        wanted, met = f"under {most:g}", value < most
    return Ratio(of, value, min(values), max(values), wanted, met)


def facts(parts: Iterable[Part], told: dict[str, str]) -> dict[str, Any]:
    """Return everything for JSON."""
    return {
        "conditions": told,
        "parts": [asdict(part) | {"ratios": [asdict(ratio) for ratio in ratios(part)]} for part in parts],
    }


def page(parts: Iterable[Part], told: dict[str, str]) -> str:
    """Return results.md."""
    lines = [
        "# Results",
        "",
        "Written by `make bench-capture` from one run: only its ratios mean much. [README.md](README.md) says how it was measured.",
        "",
    ]
    for part in parts:
        lines += [
            f"## {TITLES[part.name]}",
            "",
            *([f"A row is {part.row_bytes} bytes as JSON.", ""] if part.row_bytes else []),
            *_rates(part),
            "",
            *(f"- {ratio.told()}" for ratio in ratios(part)),
            "",
        ]
    lines += ["## Conditions", "", *(f"- {name}: {what}" for name, what in told.items())]
    return "\n".join(lines) + "\n"


def _rates(part: Part) -> list[str]:
    head = (
        ("", "runs", "p50, ms", "p99, ms", "CPU s", "peak MB")
        if part.name == "latency"
        else ("", "runs", "records", "net, 1/s", "from start, 1/s", "CPU s", "peak MB")
    )
    groups = [
        [*part.again, *(pair[0] for pair in part.pairs)],
        [pair[1] for pair in part.pairs if len(pair) > 1],
        part.limits,
    ]
    rows = [_row(part.name, runs) for runs in groups if runs]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]


def _row(name: str, runs: Sequence[Run]) -> tuple[str, ...]:
    def mid(value: Callable[[Run], float]) -> float:
        return median(value(run) for run in runs)

    used = f"{mid(lambda run: run.cpu):.1f}", f"{mid(lambda run: run.peak) / _MEGA:.0f}"
    begin = runs[0].kind, str(len(runs))
    if name == "latency":
        return (*begin, f"{mid(lambda run: run.p50):.1f}", f"{mid(lambda run: run.p99):.1f}", *used)
    rates = f"{mid(lambda run: run.net):,.0f}", f"{mid(lambda run: run.from_start):,.0f}"
    return (*begin, f"{mid(lambda run: run.records):,.0f}", *rates, *used)


def conditions(sizes: Sizes, postgres: str) -> dict[str, str]:
    """Return what the figures depend on; `postgres` is the server's version."""
    return {
        **surroundings(postgres),
        "Debezium": f"{debezium.VERSION} on Kafka Connect, {' '.join(debezium.MEMORY)}",
        "Debezium for throughput": _options(debezium.THROUGHPUT),
        "Debezium for latency": _options(debezium.LATENCY),
        "sizes": ", ".join(f"{name} {value}" for name, value in asdict(sizes).items()),
    }


def surroundings(postgres: str) -> dict[str, str]:
    """Return what any figure of ours depends on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GB, {platform.system()} {platform.release()}; "
        "servers, tools and the reader all on it",
        "load when it began": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "Postgres": f"{postgres}, autovacuum off",
        "Kafka": f"{artifacts.KAFKA.name.partition('-')[2]}, one broker, 512 MB of heap; every topic has one partition",
        "Java": _said(str(java.find() / "bin/java"), "--version").partition("\n")[0],
        "headrace": f"Python {platform.python_version()}, confluent-kafka {version('confluent-kafka')} "
        f"(librdkafka {confluent_kafka.libversion()[0]}), psycopg {version('psycopg')}; default settings",
    }


def _options(tuning: dict[str, dict[str, str]]) -> str:
    return ", ".join(f"{name}={value}" for group in tuning.values() for name, value in group.items())


def _processor() -> str:
    for fact in Path("/proc/cpuinfo").read_text().splitlines():
        if fact.startswith("model name"):
            return fact.partition(": ")[2]
    return platform.machine()


def _commit() -> str:
    return _said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12") or "unknown"


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
