"""`make bench-big`: memory stays bounded whatever the size of a table or of a transaction [I10], and the log is exact afterwards.

Capture runs as a process of its own. It reads a table of ten million rows, expands its TRUNCATE into ten million deletes (killed once
in the middle), and takes transactions of a million changes, the second of them killed in the middle too; the warehouse follows these.
Peak memory is the kernel's high-water mark of the process. Afterwards every topic is read from its beginning by a plain reader: it must
have the rows that Postgres has, and each change must have come once. See README.md in this folder.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from bench import report, servers, source, truth
from bench.measure import Say
from bench.program import Program
from bench.source import Source
from bench.tools import Headrace
from headrace.change import parse_lsn
from headrace.cli.show import print_error
from headrace.control import Control
from headrace.errors import HeadraceError, Poison, Transient
from headrace.settings import Settings, environment
from headrace_ops import ports
from headrace_ops.kafka import Kafka
from headrace_ops.postgres import Postgres

PAGE = Path(__file__).with_name("big.md")
MOST_MB: Final = 150
WAREHOUSE_MEMORY: Final = "512MB"
_PATIENCE = 1_800.0
_INTERVAL = 0.1


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything: rows of the large table, changes of a transaction, rows of the tables that it changes.

    Attributes:
        cut_records: That of capture; few where there is little, so that it can be killed half way.
    """

    rows: int = 10_000_000
    kept: int = 1_000
    changes: int = 1_000_000
    orders: int = 100_000
    narrow: int = 50_000
    notes: int = 20_000
    cut_records: int = Settings().cut_records

    @property
    def tables(self) -> dict[str, int]:
        """Return the rows of the tables that a transaction changes."""
        return {"orders": self.orders, "narrow": self.narrow, "notes": self.notes}


FULL: Final = Sizes()
QUICK: Final = Sizes(rows=60_000, changes=32_000, orders=3_000, narrow=2_000, notes=500, cut_records=1_000)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one part gave.

    Attributes:
        what: In words.
        records: That it wrote into the topics.
        seconds: From the commit, or from the start of the process, until a complete checkpoint covers all of it.
        peak: Most bytes of memory that capture held; of its two lives the greater.
        view_seconds: From the commit until the warehouse shows it; 0 where it did not run.
        view_peak: Most bytes that its process held.
    """

    what: str
    records: int
    seconds: float
    peak: int
    view_seconds: float = 0.0
    view_peak: int = 0

    def cells(self) -> tuple[str, ...]:
        """Return a row of the table."""
        view = (f"{self.view_seconds:.0f}", f"{self.view_peak / 1e6:.0f}") if self.view_peak else ("", "")
        return (
            self.what,
            f"{self.records:,}",
            f"{self.seconds:.0f}",
            f"{self.records / self.seconds:,.0f}",
            f"{self.peak / 1e6:.0f}",
            *view,
        )


class Big:
    """Runs the parts on servers that run."""

    def __init__(self, postgres: Postgres, kafka: Kafka, folder: Path, sizes: Sizes, say: Say) -> None:
        """Keep outputs and views in `folder`."""
        self._postgres = postgres
        self._kafka = kafka
        self._folder = folder
        self._sizes = sizes
        self._say = say

    def run(self) -> Iterator[Measured]:
        """Yield what each part gave, once its topics have been checked."""
        sizes = self._sizes
        with self._captured(lambda: source.narrow(self._postgres, "narrow", sizes.rows)) as tool:
            yield self._snapshot(tool)
            yield self._truncation(tool)
        with self._captured(lambda: source.mixed(self._postgres, "mixed", sizes.tables)) as tool:
            with tool.awake():
                pass
            yield self._insertion(tool)
            yield self._updates(tool)

    def _snapshot(self, tool: Headrace) -> Measured:
        rows = self._sizes.rows
        self._say(f"snapshot of {rows:,} rows")
        program = tool.start(snapshot=True)
        try:
            seconds = self._until(program, tool.streams)
        finally:
            program.stop()
            tool.free()
        self._check(tool, {"narrow": {"r": rows}})
        return Measured(f"Snapshot of {rows:,} narrow rows", rows, seconds, program.peak())

    def _truncation(self, tool: Headrace) -> Measured:
        rows, kept = self._sizes.rows, self._sizes.kept
        self._say(f"TRUNCATE of {rows:,} rows")
        statement = f"TRUNCATE narrow; INSERT INTO narrow SELECT i, -i FROM generate_series(1, {kept}) i"
        seconds, peak = self._killed_once(tool, statement, 2 * rows)
        self._check(tool, {"narrow": {"r": rows, "d": rows, "": rows, "c": kept}})
        what = f"TRUNCATE of {rows:,} rows and {kept:,} new ones, one transaction; capture killed once in the middle"
        return Measured(what, 2 * rows + kept, seconds, peak)

    def _insertion(self, tool: Headrace) -> Measured:
        sizes = self._sizes
        statement = source.insertion(sizes.orders + 1, sizes.orders + sizes.changes)
        with self._warehouse(tool) as view, tool.awake() as program:
            self._say(f"one transaction of {sizes.changes:,} inserts")
            began, lsn = self._commit(tool, statement)
            seconds = self._until(program, lambda: _complete(tool) >= lsn, began)
            shown = self._until(view, lambda: _shown(tool) >= lsn, began)
        self._check(tool, {"orders": {"r": sizes.orders, "c": sizes.changes}})
        what = f"One transaction of {sizes.changes:,} inserts"
        return Measured(what, sizes.changes, seconds, program.peak(), shown, view.peak())

    def _updates(self, tool: Headrace) -> Measured:
        sizes = self._sizes
        statement, each = source.change_all(sizes.changes, sizes.tables)
        changes = sum(each.values())
        with self._warehouse(tool) as view:
            self._say(f"one transaction of {changes:,} updates")
            began = time.monotonic()
            seconds, peak = self._killed_once(tool, statement, each["orders"])
            lsn = parse_lsn(tool.source.lsn())
            with tool.awake():
                shown = self._until(view, lambda: _shown(tool) >= lsn, began)
        inserted = {"orders": {"c": sizes.changes}}
        self._check(
            tool, {name: {"r": sizes.tables[name], "u": count} | inserted.get(name, {}) for name, count in each.items()}
        )
        what = f"One transaction of {changes:,} updates in three tables in turn; capture killed once in the middle"
        return Measured(what, changes, seconds, peak, shown, view.peak())

    def _killed_once(self, tool: Headrace, statement: str, records: int) -> tuple[float, int]:
        """Run a statement; kill capture when half of its `records` are in the first topic; return seconds and peak memory."""
        with truth.reading(self._kafka) as consumer, tool.awake() as program:
            topics = tool.topics[:1]
            before = truth.ends(consumer, topics)[0]
            began, lsn = self._commit(tool, statement)
            self._until(program, lambda: truth.ends(consumer, topics)[0] - before > records // 2)
            peak = program.peak()
            program.kill()
            self._say(f"killed after {time.monotonic() - began:.0f} s")
        if _complete(tool) >= lsn:
            raise Poison("bench-late", "Capture was done before it was killed.", "Run it again.")
        again = tool.start(snapshot=False)
        try:
            seconds = self._until(again, lambda: _complete(tool) >= lsn, began)
        finally:
            again.stop()
            tool.free()
        return seconds, max(peak, again.peak())

    @contextmanager
    def _captured(self, make: Callable[[], Source]) -> Iterator[Headrace]:
        self._say("making the rows")
        origin = make()
        tool = Headrace(origin.dsn.rpartition("/")[2], origin, self._kafka, self._folder)
        tool.settings = replace(tool.settings, cut_records=self._sizes.cut_records)
        tool.prepare()
        yield tool
        tool.drop()

    @contextmanager
    def _warehouse(self, tool: Headrace) -> Iterator[Program]:
        """Run the warehouse; within, it is live. At the end it is compared with Postgres."""
        settings = replace(
            tool.settings,
            state=str(self._folder / "state"),
            warehouse=str(self._folder / "warehouse.duckdb"),
            warehouse_memory=WAREHOUSE_MEMORY,
            warehouse_listen=f"{ports.HOST}:{ports.choose()}",
        )
        headrace = [sys.executable, "-m", "headrace"]
        view = Program("warehouse", [*headrace, "run", "warehouse"], self._folder, environment(settings))
        try:
            with tool.awake():
                lsn = parse_lsn(tool.source.lsn())
                self._until(view, lambda: _shown(tool) >= lsn)
            yield view
            self._say("comparing the warehouse with Postgres")
            with tool.awake():
                Program("verify", [*headrace, "verify", "warehouse"], self._folder, environment(settings)).wait(
                    _PATIENCE
                )
        finally:
            view.stop()

    def _commit(self, tool: Headrace, statement: str) -> tuple[float, int]:
        """Run a statement as one transaction; return when it was committed, and where."""
        tool.source.run(statement)
        return time.monotonic(), parse_lsn(tool.source.lsn())

    def _until(self, program: Program, reached: Callable[[], bool], began: float | None = None) -> float:
        """Wait; return the seconds since `began`, else since the program was started. Its memory is looked at meanwhile."""
        began = began or program.started_at
        told_at = time.monotonic()
        while not reached():
            program.check()
            megabytes = program.peak() / 1e6
            now = time.monotonic()
            if now - began > _PATIENCE:
                raise Transient("bench-slow", f"{program.name} takes too long.", program.said()[-2000:])
            if now - told_at > 10:
                told_at = now
                self._say(f"{program.name}: {now - began:.0f} s, {megabytes:.0f} MB")
            time.sleep(_INTERVAL)
        program.peak()
        return time.monotonic() - began

    def _check(self, tool: Headrace, expected: Mapping[str, Mapping[str, int]]) -> None:
        """Raise Poison unless a plain reader has the rows that Postgres has, and read every change once."""
        for table, topic in zip(tool.source.tables, tool.topics, strict=True):
            if table.name not in expected:
                continue
            self._say(f"reading {topic}")
            ids = int(tool.source.value(f"SELECT coalesce(max(id), 0) FROM {table.name}"))
            most = max(ids, sum(expected[table.name].values()))
            read = truth.replay(self._kafka, topic, table.columns, most)
            if dict(read.ops) != dict(expected[table.name]):
                raise Poison("bench-missing", f"{topic} has {dict(read.ops)}; {dict(expected[table.name])} were made.")
            if read.hashes != truth.select(tool.source.dsn, table.name, table.columns, most).hashes:
                raise Poison("bench-wrong-row", f"A plain reader of {topic} has other rows than Postgres.")


def _complete(tool: Headrace) -> int:
    newest = tool.log.newest_checkpoint(complete=True)
    return newest.version.lsn if newest else 0


def _shown(tool: Headrace) -> int:
    """Return up to where the warehouse shows everything."""
    with suppress(HeadraceError):
        return max((report.version.lsn for report in Control(tool.log).running("warehouse") if report.live), default=0)
    return 0


def table(parts: list[Measured]) -> list[str]:
    """Return the parts as a table."""
    head = ("", "records", "s", "records/s", "capture, peak MB", "warehouse, s", "warehouse, peak MB")
    return ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *(p.cells() for p in parts))]


def page(parts: list[Measured], told: dict[str, str]) -> str:
    """Return big.md."""
    lines = [
        "# Large tables and large transactions",
        "",
        "Written by `make bench-big` from one run. After each part a plain reader of the topics had the rows that Postgres had,",
        "and each change once; the warehouse was equal to Postgres by `headrace verify`. [README.md](README.md) says how it was measured.",
        "",
        *table(parts),
        "",
        verdict(parts),
        "",
        "## Conditions",
        "",
        *(f"- {name}: {what}" for name, what in told.items()),
    ]
    return "\n".join(lines) + "\n"


def verdict(parts: list[Measured]) -> str:
    """Return whether memory was bounded as promised."""
    most = max(part.peak for part in parts) / 1e6
    return f"Capture's peak memory {most:.0f} MB, wanted under {MOST_MB}: {'met' if most < MOST_MB else 'NOT MET'}"


def big(quick: Annotated[bool, typer.Option("--quick", help="Few rows: to see that it works.")] = False) -> None:
    """Measure memory and time over large tables and transactions; a whole run also writes bench/big.md.

    Example: `python -m bench.big --quick`
    """
    console = Console(highlight=False, soft_wrap=True)
    sizes = QUICK if quick else FULL
    began = time.monotonic()

    def say(line: str, *, lasting: bool = False) -> None:
        style = "bold" if lasting else "dim"
        console.print(f"{time.monotonic() - began:6.0f} s  {line}", style=style, markup=False)

    with servers.running() as (postgres, kafka, folder):
        told = report.surroundings(source.version(postgres))
        told["the warehouse"] = f"DuckDB may use {WAREHOUSE_MEMORY}"
        told["sizes"] = ", ".join(f"{name} {value}" for name, value in asdict(sizes).items())
        parts = []
        for part in Big(postgres, kafka, folder, sizes, say).run():
            say(" ".join(part.cells()), lasting=True)
            parts.append(part)
    console.print("\n".join([*table(parts), "", verdict(parts)]), markup=False)
    if not quick:
        PAGE.write_text(page(parts, told))
        console.print(f"written: {PAGE}", markup=False)


def main() -> None:
    """Run it; an error of ours is printed in three lines. SIGTERM ends what was started too."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    try:
        typer.run(big)
    except HeadraceError as error:
        print_error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
