"""`headrace demo`: the whole system from nothing, by its own command line, with an accident or two on the way.

The act is a list of scenes; each says what it does, does it, and says what was seen. The first thing that does not hold
ends the demo with exit code 1. Whatever happens, what was started is stopped.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import httpx
import psycopg
import typer
from rich.console import Console
from rich.table import Table

from headrace.change import format_lsn, parse_lsn
from headrace.control import Control, Report
from headrace.errors import CHECK_FAILED, INTERRUPTED, HeadraceError
from headrace.log import Log
from headrace.settings import load, masked
from headrace_shop.processes import Programs, watched

VIEWS = ("search", "pages", "warehouse")
_RATE = "50/s"
_out = Console(highlight=False, soft_wrap=True)


def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="Stop everything at the end instead of staying up.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same shop, load and accidents.")] = 1,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The shop's port; 0 takes a free one.")] = 0,
) -> None:
    """Show it all: stack, shop, capture, three views, a kill, a rebuild, verify, and what dual writes do.

    Everything is made in a new folder and removed at the end.

    Exit codes: 0 all of it held; 1 something did not; 130 it was interrupted.

    Examples:

        headrace demo

        headrace demo --once
    """
    with _folder() as folder, watched(folder), _interruptible(), ExitStack() as stack:
        act = Act(folder, seed, port, stack)
        try:
            held = act.play()
            if held and not once:
                act.stay()
        except KeyboardInterrupt:
            say("stopping")
            raise typer.Exit(INTERRUPTED) from None
        if not held:
            raise typer.Exit(CHECK_FAILED)


@dataclass(slots=True)
class Act:
    """The demo as it goes on.

    Attributes:
        folder: Where everything is kept.
        seed: Of shop, load and accidents.
        port: Of the shop, 0 for a free one.
        closing: What must be done at the end.
        programs: The command line with the stack's settings; set by the first scene.
        control: What the consumers say of themselves; set by the first scene.
    """

    folder: Path
    seed: int
    port: int
    closing: ExitStack
    programs: Programs = field(init=False)
    control: Control = field(init=False)
    _start: float = field(default_factory=time.monotonic)

    def play(self) -> bool:
        """Play every scene; return whether everything held."""
        try:
            self._servers()
            self._shop()
            self._views()
            self._death()
            self._rebuild()
            held = self._verify("all three views, row by row, while the load goes on")
            self._calm()
            return self._replay() and held
        except HeadraceError as error:
            _out.print(f"[red]It did not hold:[/red] {error}", markup=True)
            return False

    def stay(self) -> None:
        """Keep everything up until Ctrl-C."""
        say(f"everything stays up: the shop is open at [bold]http://127.0.0.1:{self.port}/[/bold]; Ctrl-C ends it")
        say(f"in another terminal: [bold]. {self._environment()}[/bold], and then for example: headrace status --watch")
        self.programs.start("work", "shop", "work", "--rate", "5/s", "--seed", str(self.seed + 1))
        with suppress(KeyboardInterrupt):
            signal.pause()
        say("stopping")

    # Scenes

    def _servers(self) -> None:
        self._scene("Real servers: Postgres, Kafka, Elasticsearch, Redis")
        place = str(self.folder / "stack")
        bare = Programs(self.folder, {})
        self.closing.callback(bare.run, "stack", "down", "--remove", "--dir", place)
        bare.run("stack", "up", "--dir", place, *_ports())
        settings = bare.facts("stack", "env", "--dir", place)
        for name, address in settings.items():
            say(f"{name.removeprefix('HEADRACE_').lower()} at {masked(address)}")
        state = self.folder / "state"
        config = self.folder / "headrace.toml"
        config.touch()  # an empty one: the one of the current folder is not the demo's
        settings |= {
            "HEADRACE_CONFIG": str(config),
            "HEADRACE_SOURCE": "shop",
            "HEADRACE_STATE": str(state),
            "HEADRACE_WAREHOUSE": str(state / "warehouse.duckdb"),
            "HEADRACE_WAREHOUSE_LISTEN": f"127.0.0.1:{_free_port()}",
        }
        self.programs = Programs(self.folder, settings)
        self.control = Control(Log(load(settings)))
        self.closing.callback(self.programs.stop_all)

    def _shop(self) -> None:
        self._scene("A shop that knows nothing of all this: it writes to Postgres, once")
        counts = self.programs.facts("shop", "load", "--seed", str(self.seed))
        say(", ".join(f"{count:,} {table.replace('_', ' ')}" for table, count in counts.items()))

    def _views(self) -> None:
        self._scene("Capture publishes every change to Kafka; three consumers keep three views")
        self.programs.run("setup", "--apply")
        self.programs.start("capture", "capture")
        for view in VIEWS:
            self.programs.start(view, "run", view)
        took = self.programs.wait("all views to be live", lambda: all(self._live(view) for view in VIEWS))
        say(f"search, pages and warehouse are live after {took:.1f} s")
        self.port = self.port or _free_port()
        self.programs.start("shop", "shop", "serve", "--port", str(self.port))
        self.programs.wait("the shop to answer", self._shop_answers)
        say(f"the shop is open at http://127.0.0.1:{self.port}/")
        self.programs.start("work", "shop", "work", "--rate", _RATE, "--seed", str(self.seed))
        say(
            f"a load of {_RATE} transactions begins: prices, reviews, orders, moves, renames, deletes, some rolled back"
        )

    def _death(self) -> None:
        self._scene("The search consumer dies")
        self._pass(4)
        applied = self._applied("search")
        pid = self.programs.kill("search")
        say(f"SIGKILL to search (pid {pid}) at {format_lsn(applied)}; the others go on")
        self._pass(4)
        behind = self._lsn() - applied
        say(f"{behind:,} bytes of WAL later it starts again, at its own position")
        self.programs.start("search", "run", "search")
        target = self._lsn()
        took = self.programs.wait(
            "search to catch up", lambda: self._applied("search") >= target and self._live("search")
        )
        say(f"it has caught up after {took:.1f} s, under load")

    def _rebuild(self) -> None:
        self._scene("The pages are rebuilt from zero, beside the live ones, while the load goes on")
        start = time.monotonic()
        self.programs.run("rebuild", "pages", "--wait")
        live = self._report("pages").generation
        say(
            f"generation {live} of pages was built, verified and promoted in {time.monotonic() - start:.1f} s; "
            f"generation {live - 1} stays until dropped"
        )

    def _verify(self, what: str) -> bool:
        self._scene(f"Verify: {what}")
        return all([self._verified(view)["ok"] for view in VIEWS])  # noqa: C419 - each, also after one that differs

    def _verified(self, view: str) -> dict[str, Any]:
        """Verify one view by itself: the shorter it takes, the fewer rows change meanwhile and are compared again."""
        (fact,) = self.programs.facts("verify", view, ok=(0, CHECK_FAILED))
        self._said(fact)
        return dict(fact)

    def _said(self, fact: dict[str, Any]) -> None:
        wrong = _differing(fact)
        undecided = f", {fact['undecided']} could not be decided" if fact["undecided"] else ""
        say(f"{fact['consumer']}: {fact['rows']:,} rows at {fact['lsn']}, {wrong} differ{undecided}")
        for difference in fact["differences"][:5]:
            say(f"  [red]{difference['kind']}[/red] {difference['collection']} {difference['key']}")

    def _calm(self) -> None:
        self._scene("The load ends")
        say(self.programs.stop("work", signal.SIGINT).strip())
        self._settle()

    def _replay(self) -> bool:
        self._scene("The same two accidents, written through the log and written to every store by the application")
        for line in self.programs.run("shop", "replay", "--writes", "log", "--seed", str(self.seed)).splitlines():
            say(f"log: {line}")
        self._settle()
        by_log = {view: self._verified(view) for view in VIEWS}
        lines = self.programs.run("shop", "replay", "--writes", "dual", "--seed", str(self.seed)).splitlines()
        for line in lines:
            say(f"dual writes: {line}")
        by_dual = {name: _count(lines, name) for name in VIEWS}
        return self._close(by_log, by_dual)

    def _close(self, by_log: dict[str, dict[str, Any]], by_dual: dict[str, int]) -> bool:
        self._scene("What came of it")
        table = Table("view", "rows", "applied LSN", "lag", "differing rows: log", "differing rows: dual writes")
        for view in VIEWS:
            report, fact = self._report(view), by_log[view]
            lsn, lag = format_lsn(report.version.lsn), f"{report.lag[0]} records"
            table.add_row(view, f"{fact['rows']:,}", lsn, lag, str(_differing(fact)), str(by_dual[view]))
        _out.print(table)
        log, dual = sum(_differing(fact) for fact in by_log.values()), sum(by_dual.values())
        held = log == 0 and all(fact["ok"] for fact in by_log.values()) and dual > 0
        _out.print(
            f"[bold]log {log}, dual writes {dual}[/bold]: "
            + ("all of it held" if held else "[red]that is not what was promised[/red]")
        )
        return held

    def _environment(self) -> Path:
        """Return a file that a shell reads to use this stack."""
        path = self.folder / "env"
        mine = {name: value for name, value in self.programs.environment.items() if name.startswith("HEADRACE_")}
        path.touch()
        path.chmod(0o600)  # there may be passwords in it
        path.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in mine.items()))
        return path

    # What is seen

    def _scene(self, title: str) -> None:
        _out.print(f"\n[bold cyan]{title}[/bold cyan] [dim]({time.monotonic() - self._start:.0f} s)[/dim]")

    def _report(self, view: str) -> Report:
        """Return what the live generation says of itself, or an empty report: what `headrace status` prints."""
        found = self.control.reports().get(view, [])
        return next((report for report in found if report.live), Report(view))

    def _live(self, view: str) -> bool:
        report = self._report(view)
        return report.phase == "live" and not report.dead

    def _applied(self, view: str) -> int:
        return self._report(view).version.lsn

    def _lsn(self) -> int:
        with psycopg.connect(self.programs.environment["HEADRACE_DSN"], autocommit=True) as connection:
            row = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
        return parse_lsn(row[0]) if row else 0

    def _settle(self) -> None:
        """Wait until every view shows what is committed now."""
        target = self._lsn()
        took = self.programs.wait("the views", lambda: all(self._applied(view) >= target for view in VIEWS))
        say(f"every view has reached {format_lsn(target)} after {took:.1f} s")

    def _shop_answers(self) -> bool:
        try:
            pages = [
                httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=10)
                for path in ("/", "/products/1", "/search?q=Skyfall", "/sales")
            ]
        except httpx.HTTPError:
            return False
        return all(page.status_code == httpx.codes.OK for page in pages)

    def _pass(self, seconds: float) -> None:
        """Let the load go on for a while, so that there is something to see."""
        until = time.monotonic() + seconds
        self.programs.wait("the load", lambda: time.monotonic() >= until)


def say(line: str) -> None:
    """Say what was done or seen."""
    _out.print(f"  {line}")


def _differing(fact: dict[str, Any]) -> int:
    return int(fact["missing"] + fact["extra"] + fact["different"])


def _count(lines: list[str], view: str) -> int:
    line = next(line for line in lines if line.startswith(f"{view}: "))
    return int(line.rpartition(", ")[2].split()[0])


@contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder and remove it, but for the outputs of the programs when something did not hold."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-demo-"))
    folder.chmod(0o755)  # the servers' unprivileged user must get in
    say(f"in {folder}")
    kept = False
    try:
        yield folder
    except typer.Exit as end:
        kept = end.exit_code == CHECK_FAILED
        raise
    finally:
        for part in folder.iterdir():
            if not (kept and part.suffix == ".log"):
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        if kept:
            say(f"what the programs said stays in {folder}")
        else:
            folder.rmdir()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the demo as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ports() -> Iterator[str]:
    """Yield options that give each server of the stack a port that nobody else wants; containers have theirs already."""
    if os.environ.get("HEADRACE_STACK", "processes") == "processes":
        for server in ("postgres", "kafka", "elasticsearch", "redis"):
            yield from ("--port", f"{server}={_free_port()}")


def _free_port() -> int:
    """Return a port that is free now, as is the next one: the dual writer's warehouse takes it.

    It is below those that the system gives to outgoing connections, of which one could take it meanwhile.
    """
    while True:
        port = random.randrange(15_000, 32_000)
        with (
            suppress(OSError),
            socket.create_server(("127.0.0.1", port)),
            socket.create_server(("127.0.0.1", port + 1)),
        ):
            return port
